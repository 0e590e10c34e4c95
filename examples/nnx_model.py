"""An NNX model with a random stream of its own: batch norm and dropout.

    python examples/nnx_model.py

What I have: an `nnx.Module`. What I write: `experiment`, which names the class; the run seeds it.
"""

import zlib

import jax
import optax
from flax import nnx

import jaxtrain
from jaxtrain.data import Digits
from jaxtrain.tasks import Classification


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.avg_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), strides=(2, 2))
        return self.head(self.dropout(x.reshape(len(x), -1)))


def experiment():
    return jaxtrain.Run(
        name="nnx_model",
        model=Net,
        data=Digits(train="train[:90%]", validation="train[90%:]"),
        task=Classification(),
        optimizer=optax.adamw(2e-3),
        steps=300,
    )


def by_hand(params, collections, batches, keys):
    net = Net(nnx.Rngs(0))
    nnx.update(net, params, collections["batch_stats"])
    optimizer = nnx.Optimizer(net, optax.adamw(2e-3), wrt=nnx.Param)

    def loss(net, image, label):
        return optax.softmax_cross_entropy_with_integer_labels(net(image), label).mean()

    for batch, key in zip(batches, keys):
        key = jax.random.fold_in(key, zlib.crc32(b"dropout/rngs/key"))  # where the stream lies
        net.dropout.rngs.key[...], net.dropout.rngs.count[...] = key, 0
        value, grads = nnx.jit(nnx.value_and_grad(loss))(net, batch["image"], batch["label"])
        optimizer.update(net, grads)
        yield value


if __name__ == "__main__":
    jaxtrain.main(experiment())
