"""Handwritten digits (scikit-learn's 1,797 images of 8 x 8): a small CNN, in under a minute on two
CPU cores, with no download.

    scripts/train                                  # this experiment is the default
    python experiments/digits.py --seed=1
    python experiments/digits.py --model=mlp --optimizer.learning_rate=3e-4

Result: 99.54% test accuracy (99.72, 99.72, 99.17 with seeds 0, 1, 2) on the stratified 20% that are
the test split; a support vector machine gets 98.89 there. A run takes 22 to 32 s, start included,
on two busy cores (Intel Xeon, 2026-11-25). The recipe was chosen on parts of the
train split; the test split was read only after it was fixed. More in docs/results.md.
"""

import jaxtrain
from jaxtrain import augment, optimizers, schedules
from jaxtrain.data.sources.digits import Digits
from jaxtrain.models import convnet, mlp, resnet, vit
from jaxtrain.tasks import Classification


def experiment() -> jaxtrain.Run:
    """The run, before flags."""
    return jaxtrain.Run(
        name="digits",
        model=convnet.ConvNet(num_classes=10, widths=(32, 64, 96), depth=1, dropout=0.2),
        data=Digits(train="train[:90%]", validation="train[90%:]", test="test"),
        task=Classification(label_smoothing=0.1),
        optimizer=optimizers.AdamW(learning_rate=3e-3, weight_decay=0.05),
        schedule=schedules.Cosine(),
        augment=augment.ImageAugment(crop_padding=1, erase=0.5, erase_area=0.2),
        steps=1200,
        ema_decay=0.99,
        eval_every=jaxtrain.Horizon(10, "percent"),
        checkpoint_every=jaxtrain.Horizon(10, "percent"),
        offers={
            "model": convnet.NAMES | mlp.NAMES | resnet.NAMES | vit.NAMES,
            "data": {"digits": Digits()},
            "optimizer": optimizers.NAMES,
            "schedule": schedules.NAMES,
            "augment": augment.NAMES,
        },
    )


if __name__ == "__main__":
    jaxtrain.main(experiment())
