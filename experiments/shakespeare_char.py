"""A small decoder over the characters of Shakespeare: nanoGPT's settings, for a CPU and for a GPU.

    python experiments/shakespeare_char.py --data.path=tinyshakespeare.txt
    python experiments/shakespeare_char.py --data.path=tinyshakespeare.txt --model=large \\
        --data.length=256 --batch_size=64 --steps=5000 --optimizer.learning_rate=1e-3

Without a path the text is Python's own library. Tokens are bytes, of which these plays use 65.
Result of the first command, nanoGPT's CPU setting with a higher rate, seed 0: a loss of 1.789 nats
(2.581 bits a byte) over the whole validation text after 2,000 steps; nanoGPT itself gave 1.886.
"""

import jaxtrain
from jaxtrain import augment, optimizers, schedules
from jaxtrain.data.sources.text import Mixture, Text
from jaxtrain.models import transformer
from jaxtrain.tasks import NextToken

SIZES = {
    "small": transformer.Transformer(vocabulary=257, width=128, depth=4, heads=4),
    "large": transformer.Transformer(vocabulary=257, width=384, depth=6, heads=6, dropout=0.2),
}
"""nanoGPT's settings for a CPU and for a GPU."""


def experiment() -> jaxtrain.Run:
    """The run, before flags."""
    text = Text(length=64, train="all[:90%]", validation="all[90%:]", split_by="tokens")
    return jaxtrain.Run(
        name="shakespeare_char",
        model=SIZES["small"],
        data=text,
        task=NextToken(),
        optimizer=optimizers.AdamW(learning_rate=2e-3, b2=0.99, weight_decay=0.1),
        schedule=schedules.Cosine(),
        augment=augment.NoAugment(),
        steps=2000,
        batch_size=12,
        clip_norm=1.0,
        eval_every=jaxtrain.Horizon(25, "percent"),
        checkpoint_every=jaxtrain.Horizon(25, "percent"),
        sample_every=jaxtrain.Horizon(25, "percent"),
        offers={
            "model": SIZES | transformer.NAMES,
            "data": {"text": text, "mixture": Mixture.like(text)},
            "optimizer": optimizers.NAMES,
            "schedule": schedules.NAMES,
            "augment": {"none": augment.NoAugment()},
        },
    )


if __name__ == "__main__":
    jaxtrain.main(experiment())
