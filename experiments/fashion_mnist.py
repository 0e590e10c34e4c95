"""Fashion-MNIST (60,000 + 10,000 images of 28 x 28): a CNN of under 100,000 parameters by default.

    scripts/prepare_fashion_mnist      # once: builds the TFDS set
    python experiments/fashion_mnist.py
    python experiments/fashion_mnist.py --model=resnet20
"""

import jaxtrain
from jaxtrain import augment, optimizers, schedules
from jaxtrain.data.tfds_source import Tfds
from jaxtrain.models import convnet, mlp, resnet, vit
from jaxtrain.tasks import Classification


def experiment() -> jaxtrain.Run:
    """The run, before flags."""
    return jaxtrain.Run(
        name="fashion_mnist",
        model=convnet.ConvNet(num_classes=10),
        data=Tfds(name="fashion_mnist", train="train[:55000]", validation="train[55000:]", test="test"),
        task=Classification(),
        optimizer=optimizers.AdamW(learning_rate=3e-3, weight_decay=0.05),
        schedule=schedules.Cosine(),
        augment=augment.ImageAugment(flip=0.5, crop_padding=2),
        epochs=15,
        offers={
            "model": convnet.NAMES | mlp.NAMES | resnet.NAMES | vit.NAMES,
            "data": {"tfds": Tfds(name="fashion_mnist")},
            "optimizer": optimizers.NAMES,
            "schedule": schedules.NAMES,
            "augment": augment.NAMES,
        },
    )


if __name__ == "__main__":
    jaxtrain.main(experiment())
