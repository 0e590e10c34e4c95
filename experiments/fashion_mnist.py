"""Fashion-MNIST (60,000 + 10,000 images of 28 x 28): a CNN of 98,682 parameters by default.

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
    data = Tfds(name="fashion_mnist", train="train[:55000]", validation="train[55000:]", test="test")
    return jaxtrain.Run(
        name="fashion_mnist",
        model=convnet.ConvNet(num_classes=10, widths=(16, 32, 64, 128)),
        data=data,
        task=Classification(),
        optimizer=optimizers.Muon(learning_rate=0.02, weight_decay=0.01),
        schedule=schedules.Cosine(),
        augment=augment.ImageAugment(flip=0.5, crop_padding=1),
        epochs=16,
        ema_decay=0.999,
        offers={
            "model": convnet.NAMES | mlp.NAMES | resnet.NAMES | vit.NAMES,
            "data": {"tfds": data},
            "optimizer": optimizers.NAMES,
            "schedule": schedules.NAMES,
            "augment": augment.NAMES,
        },
    )


if __name__ == "__main__":
    jaxtrain.main(experiment())
