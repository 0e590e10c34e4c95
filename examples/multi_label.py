"""Several labels for one image: is the digit even, is it prime, is it more than four?

    python examples/multi_label.py

What I have: labels of shape (N, C), 0 or 1. What I write: `experiment`, whose task is `MultiLabel`.
"""

import jax
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import jaxtrain
from jaxtrain.data import Arrays
from jaxtrain.tasks import MultiLabel

OPTIMIZER = optax.adam(2e-3)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(64)(x.reshape(len(x), -1))))


def experiment():
    images, digit = load_digits(return_X_y=True)
    label = np.stack([digit % 2 == 0, np.isin(digit, (2, 3, 5, 7)), digit > 4], axis=1)
    arrays = {"x": np.uint8(images * 15).reshape(-1, 8, 8), "label": np.int32(label)}
    return jaxtrain.Run(
        name="multi_label",
        model=Net(),
        data=Arrays.of(arrays, train="train[:80%]", validation="train[80%:]", test=""),
        task=MultiLabel(),
        optimizer=OPTIMIZER,
        batch_size=64,
        steps=300,
    )


def by_hand(params, collections, batches, keys):
    opt_state = OPTIMIZER.init(params)

    def loss(params, batch):
        logits = Net().apply({"params": params}, batch["image"])
        return optax.sigmoid_binary_cross_entropy(logits, batch["label"]).mean()

    for batch in batches:
        value, grads = jax.jit(jax.value_and_grad(loss))(params, batch)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        yield value


if __name__ == "__main__":
    jaxtrain.main(experiment())
