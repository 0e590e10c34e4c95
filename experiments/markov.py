"""A Markov chain whose next token depends on two before it: a tiny causal decoder, on synthetic
tokens, with no download.

    python experiments/markov.py
    python experiments/markov.py --data.concentration=0.3

Result: a test loss of 1.261 and 1.269 nats a token with seeds 0 and 1. On these test sequences
1.232 is what the chain itself would get (1.230 is expected, 1.190 with an endless past), 2.47
whoever sees one token, 2.77 chance. A run takes 54 to 56 s, start included, on two busy cores
(Intel Xeon, 2026-11-25). The recipe was chosen on the last 5% of the train split; the test
split was read by these settings only.
"""

import jaxtrain
from jaxtrain import augment, optimizers, schedules
from jaxtrain.data.sources.markov import SyntheticTokens
from jaxtrain.models import transformer
from jaxtrain.tasks import NextToken


def experiment() -> jaxtrain.Run:
    """The run, before flags."""
    return jaxtrain.Run(
        name="markov",
        model=transformer.Transformer(
            vocabulary=16, width=64, depth=2, heads=4, positions="rotary"
        ),
        data=SyntheticTokens(
            vocabulary=16,
            order=2,
            length=32,
            examples=32768,
            test_examples=4096,
            train="train[:95%]",
            validation="train[95%:]",
        ),
        task=NextToken(),
        optimizer=optimizers.AdamW(learning_rate=8e-3, weight_decay=0.01),
        schedule=schedules.Cosine(),
        augment=augment.NoAugment(),
        steps=600,
        batch_size=64,
        eval_every=jaxtrain.Horizon(10, "percent"),
        checkpoint_every=jaxtrain.Horizon(25, "percent"),
        offers={
            "model": transformer.NAMES,
            "data": {"tokens": SyntheticTokens()},
            "optimizer": optimizers.NAMES,
            "schedule": schedules.NAMES,
            "augment": {"none": augment.NoAugment()},
        },
    )


if __name__ == "__main__":
    jaxtrain.main(experiment())
