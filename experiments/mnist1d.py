"""MNIST-1D (4,000 + 1,000 signals of 40 samples; Greydanus and Kobak, arXiv 2011.14439): a 1-D CNN, or --model=mlp.

    python experiments/mnist1d.py --data.path=PATH/mnist1d.npz
    python experiments/mnist1d.py --data.path=PATH/mnist1d.npz --model=mlp
"""

import jaxtrain
from jaxtrain import augment, optimizers, schedules
from jaxtrain.data.arrays import Arrays
from jaxtrain.models import convnet, mlp
from jaxtrain.tasks import Classification


def experiment() -> jaxtrain.Run:
    """The run, before flags."""
    return jaxtrain.Run(
        name="mnist1d",
        model=convnet.ConvNet(num_classes=10, widths=(32, 64, 128), kernel=5, padding="circular", dropout=0.3),
        data=Arrays(path="mnist1d.npz", train="train[:90%]", validation="train[90%:]", test="test"),
        task=Classification(label_smoothing=0.1),
        optimizer=optimizers.AdamW(learning_rate=3e-3, weight_decay=0.05),
        schedule=schedules.Cosine(),
        augment=augment.SignalAugment(shift=0.1, scale=0.1, noise=0.05),
        steps=3000,
        eval_every=jaxtrain.Horizon(10, "percent"),
        checkpoint_every=jaxtrain.Horizon(10, "percent"),
        offers={
            "model": {"convnet1d": convnet.NAMES["convnet1d"], "mlp": mlp.NAMES["mlp"]},
            "data": {"arrays": Arrays()},
            "optimizer": optimizers.NAMES,
            "schedule": schedules.NAMES,
            "augment": {name: augment.NAMES[name] for name in ("none", "signal")},
        },
    )


if __name__ == "__main__":
    jaxtrain.main(experiment())
