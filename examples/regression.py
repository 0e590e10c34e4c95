"""Regression on a table: the progress of diabetes after a year from ten measurements.

    python examples/regression.py

What I have: arrays `x` (N, 10) and `target` (N, 1), and two functions over a list of pairs; any
pytree will do. What I write: `experiment`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_diabetes

import jaxtrain
from jaxtrain.data import Arrays
from jaxtrain.tasks import Regression

OPTIMIZER = optax.adamw(3e-3, weight_decay=0.1)


def init(key, x):
    first, second = jax.random.normal(key, (10, 64)) / 10**0.5, jnp.zeros((64, 1))
    return [(first, jnp.zeros(64)), (second, jnp.zeros(1))]


def apply(params, x):
    (first, bias), (second, shift) = params
    return jnp.tanh(x @ first + bias) @ second + shift


def experiment():
    x, y = load_diabetes(return_X_y=True)
    arrays = {"x": np.float32(x), "target": np.float32((y - y.mean()) / y.std())[:, None]}
    return jaxtrain.Run(
        name="regression",
        model=(init, apply),
        data=Arrays.of(arrays, train="train[:80%]", validation="train[80%:]", test=""),
        task=Regression(),
        optimizer=OPTIMIZER,
        steps=200,
    )


def by_hand(params, collections, batches, keys):
    opt_state = OPTIMIZER.init(params)

    def loss(params, batch):
        return jnp.mean(jnp.square(apply(params, batch["image"]) - batch["target"]))

    for batch in batches:
        value, grads = jax.jit(jax.value_and_grad(loss))(params, batch)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        yield value


if __name__ == "__main__":
    jaxtrain.main(experiment())
