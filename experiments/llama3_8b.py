"""Llama 3 with 8 billion parameters over fsdp and tensor, from scratch or going on from weights.

    python experiments/llama3_8b.py --mesh=fsdp:8,tensor:8 --data.path='corpus/*.parquet' \\
        --data.tokenizer=llama3
    python experiments/llama3_8b.py --model=llama3_2_1b --mesh=fsdp:8 --data.path=corpus

Settings and rate are those of the Llama 3 report (Dubey et al. 2024), at its first length of 8,192.
Not trained yet: no GPU was at hand. What its step holds, sends and runs on 8 and 64 H100 stands in
docs/scaling.md.
"""

import jaxtrain
from jaxtrain import augment, optimizers, schedules
from jaxtrain.data.sources.text import Mixture, Text
from jaxtrain.models import sizes
from jaxtrain.tasks import NextToken

LLAMA = {
    name: model.clone(scan=True, chunk=512)
    for name, model in sizes.NAMES.items()
    if name.startswith("llama3")
}
"""Blocks in a loop, so that FSDP gathers one at a time; the loss in chunks."""


def experiment() -> jaxtrain.Run:
    """The run, before flags."""
    text = Text(tokenizer="bpe:32768", length=8192, layout="packed")
    return jaxtrain.Run(
        name="llama3_8b",
        model=LLAMA["llama3_8b"],
        data=text,
        task=NextToken(input="tokens=tokens,segments=segments"),
        optimizer=optimizers.AdamW(learning_rate=3e-4, b2=0.95, weight_decay=0.1),
        schedule=schedules.Cosine(warmup=jaxtrain.Horizon(2000, "steps")),
        augment=augment.NoAugment(),
        steps=100_000,
        batch_size=512,
        microbatches=8,
        clip_norm=1.0,
        remat="blocks",
        mesh="fsdp:-1",
        eval_every=jaxtrain.Horizon(1, "percent"),
        checkpoint_every=jaxtrain.Horizon(1, "percent"),
        offers={
            "model": LLAMA | sizes.NAMES,
            "data": {"text": text, "mixture": Mixture.like(text)},
            "optimizer": optimizers.NAMES,
            "schedule": schedules.NAMES,
            "augment": {"none": augment.NoAugment()},
        },
    )


if __name__ == "__main__":
    jaxtrain.main(experiment())
