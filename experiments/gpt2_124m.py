"""GPT-2 with 124 million parameters, from scratch, on text of your own.

    python experiments/gpt2_124m.py --data.path='corpus/*.jsonl' --data.tokenizer=gpt2.json
    python experiments/gpt2_124m.py --data.path='corpus/*.jsonl' --tokens=10B --mesh=data:8

Without a path the text is Python's own library, and the tokenizer is learned from it. A batch is
half a million tokens, as in GPT-3's table for this size (Brown et al. 2020); a card of 80 GB takes
it in microbatches. Not trained to the end yet: no GPU was at hand. What its step holds, sends and
runs on 8 and 64 H100 stands in docs/scaling.md.
"""

import jaxtrain
from jaxtrain import augment, optimizers, schedules
from jaxtrain.data.sources.text import Mixture, Text
from jaxtrain.models import sizes
from jaxtrain.tasks import NextToken

GPT2 = {
    name: model.clone(padded_vocabulary=50304, scan=True, chunk=128)
    for name, model in sizes.NAMES.items()
    if name.startswith("gpt2")
}
"""Rows of the vocabulary in a number that divides well, blocks in a loop, the loss in chunks."""


def experiment() -> jaxtrain.Run:
    """The run, before flags."""
    text = Text(tokenizer="bpe:50257", length=1024)
    return jaxtrain.Run(
        name="gpt2_124m",
        model=GPT2["gpt2_124m"],
        data=text,
        task=NextToken(),
        optimizer=optimizers.AdamW(learning_rate=6e-4, b2=0.95, weight_decay=0.1),
        schedule=schedules.Cosine(warmup=jaxtrain.Horizon(3, "percent")),
        augment=augment.NoAugment(),
        steps=19_073,
        batch_size=512,
        microbatches=8,
        clip_norm=1.0,
        remat="dots",
        eval_every=jaxtrain.Horizon(5, "percent"),
        checkpoint_every=jaxtrain.Horizon(5, "percent"),
        offers={
            "model": GPT2 | sizes.NAMES,
            "data": {"text": text, "mixture": Mixture.like(text)},
            "optimizer": optimizers.NAMES,
            "schedule": schedules.NAMES,
            "augment": {"none": augment.NoAugment()},
        },
    )


if __name__ == "__main__":
    jaxtrain.main(experiment())
