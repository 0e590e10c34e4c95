"""A Linen CNN as others write it: batch norm, dropout, and a switch called `training`.

    python examples/linen_cnn.py

What I have: a module. What I write: `experiment`. `by_hand` is the same training without jaxtrain.
"""

import jax
import optax
from flax import linen as nn

import jaxtrain
from jaxtrain.data import Digits
from jaxtrain.tasks import Classification

OPTIMIZER = optax.adamw(2e-3)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, training):
        x = nn.Conv(16, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=not training)(x)
        x = nn.avg_pool(nn.relu(x), (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(32, (3, 3))(x)).reshape(len(x), -1)
        return nn.Dense(10)(nn.Dropout(0.2, deterministic=not training)(x))


def experiment():
    return jaxtrain.Run(
        name="linen_cnn",
        model=CNN(),
        data=Digits(train="train[:90%]", validation="train[90%:]"),
        task=Classification(),
        optimizer=OPTIMIZER,
        batch_size=64,
        steps=300,
    )


def by_hand(params, collections, batches, keys):
    opt_state = OPTIMIZER.init(params)

    def loss(params, batch, key):
        variables, rngs = {"params": params, **collections}, {"dropout": key}
        logits, _ = CNN().apply(variables, batch["image"], True, rngs=rngs, mutable="batch_stats")
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    for batch, key in zip(batches, keys):
        value, grads = jax.jit(jax.value_and_grad(loss))(params, batch, key)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        yield value


if __name__ == "__main__":
    jaxtrain.main(experiment())
