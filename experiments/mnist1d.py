"""MNIST-1D (4,000 + 1,000 signals of 40 samples; Greydanus and Kobak, arXiv 2011.14439): a 1-D CNN,
or an MLP.

    python experiments/mnist1d.py --data.path=PATH/mnist1d.npz
    python experiments/mnist1d.py --data.path=PATH/mnist1d.npz --model=mlp --steps=12000

The file holds x, y, x_test and y_test of the published set, which its authors' package makes again
(the same labels, signals to 3e-7): `pip install mnist1d`, then in Python `from mnist1d.data import
make_dataset, get_dataset_args; data = make_dataset(get_dataset_args())` and
`numpy.savez("mnist1d.npz", **{name: data[name] for name in ("x", "y", "x_test", "y_test")})`.
Results, with seeds 0, 1, 2: the CNN 98.57% test accuracy (98.6, 98.8, 98.3) in 54 to 59 s, the MLP
90.57% (91.4, 90.1, 90.2) in 82 to 164 s, start included, on two busy cores (Intel Xeon,
2026-11-25). Published: 94 and 68, and 96 for people. What makes the difference is to shift
the signals in a circle. Chosen on the last tenth of the train split; the test split was read in
these runs only. More in docs/results.md.
"""

import jaxtrain
from jaxtrain import augment, optimizers, schedules
from jaxtrain.data.sources.arrays import Arrays
from jaxtrain.models import convnet, mlp
from jaxtrain.tasks import Classification


def experiment() -> jaxtrain.Run:
    """The run, before flags."""
    return jaxtrain.Run(
        name="mnist1d",
        model=convnet.ConvNet(
            num_classes=10, widths=(32, 64, 128), kernel=5, padding="circular", dropout=0.3
        ),
        data=Arrays(path="mnist1d.npz", train="train[:90%]", validation="train[90%:]", test="test"),
        task=Classification(label_smoothing=0.1),
        optimizer=optimizers.Muon(learning_rate=0.02, weight_decay=0.01),
        schedule=schedules.Cosine(),
        augment=augment.SignalAugment(shift=0.5, scale=0.1, noise=0.05),
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
