"""A Markov chain whose next token depends on two before it: a tiny causal decoder, on synthetic tokens, with no download.

    python experiments/markov.py
"""

import jaxtrain
from jaxtrain import augment, optimizers, schedules
from jaxtrain.data.tokens import SyntheticTokens
from jaxtrain.models import transformer
from jaxtrain.tasks import NextToken


def experiment() -> jaxtrain.Run:
    """The run, before flags."""
    return jaxtrain.Run(
        name="markov",
        model=transformer.Transformer(vocabulary=16, width=64, depth=2, heads=4, positions="rotary"),
        data=SyntheticTokens(
            vocabulary=16, order=2, length=32, examples=32768, test_examples=4096, train="train[:95%]", validation="train[95%:]"
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
