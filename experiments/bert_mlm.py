"""An encoder that fills in hidden tokens: BERT's task, without pairs of sentences.

    python experiments/bert_mlm.py --model=small --steps=2000
    python experiments/bert_mlm.py --data.path='corpus/*.jsonl' --data.tokenizer=bert/tokenizer.json

Without a path the text is Python's own library, and the tokenizer is learned from it. Documents lie
packed side by side and do not see one another. The large settings are RoBERTa's (Liu et al. 2019).
No result yet: it was run for a few steps only.
"""

import jaxtrain
from jaxtrain import augment, optimizers, schedules
from jaxtrain.data.sources.text import Mixture, Text
from jaxtrain.models import encoder, sizes
from jaxtrain.tasks import MaskedLanguage

SMALL = encoder.Encoder(vocabulary=4097, width=128, depth=2, heads=4, max_length=128)
"""For a CPU; its last token is the one that hides others."""
ENCODERS = {n: m for n, m in sizes.NAMES.items() if isinstance(m, encoder.Encoder)}


def experiment() -> jaxtrain.Run:
    """The run, before flags."""
    text = Text(tokenizer="bpe:4096", length=127, layout="packed")
    return jaxtrain.Run(
        name="bert_mlm",
        model=SMALL,
        data=text,
        task=MaskedLanguage(input="tokens=tokens,segments=segments"),
        optimizer=optimizers.AdamW(learning_rate=1e-3, b2=0.98, weight_decay=0.01),
        schedule=schedules.Cosine(warmup=jaxtrain.Horizon(6, "percent")),
        augment=augment.NoAugment(),
        steps=2000,
        batch_size=32,
        clip_norm=1.0,
        eval_every=jaxtrain.Horizon(25, "percent"),
        checkpoint_every=jaxtrain.Horizon(25, "percent"),
        offers={
            "model": {"small": SMALL} | ENCODERS,
            "data": {"text": text, "mixture": Mixture()},
            "optimizer": optimizers.NAMES,
            "schedule": schedules.NAMES,
            "augment": {"none": augment.NoAugment()},
        },
    )


if __name__ == "__main__":
    jaxtrain.main(experiment())
