"""An Equinox model with dropout, called with one example, as Equinox users write it.

    python examples/equinox_model.py

What I have: an `equinox.Module`. What I write: `experiment`, which holds one that is made.
"""

import equinox as eqx
import jax
import optax

import jaxtrain
from jaxtrain.data import Digits
from jaxtrain.tasks import Classification

OPTIMIZER = optax.adamw(2e-3)


class Net(eqx.Module):
    layers: list
    dropout: eqx.nn.Dropout = eqx.nn.Dropout(0.2)

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.layers = [eqx.nn.Linear(64, 96, key=first), eqx.nn.Linear(96, 10, key=second)]

    def __call__(self, x, key=None):
        return self.layers[1](self.dropout(jax.nn.relu(self.layers[0](x.reshape(-1))), key=key))


def experiment():
    return jaxtrain.Run(
        name="equinox_model",
        model=Net(jax.random.key(0)),
        data=Digits(train="train[:90%]", validation="train[90%:]"),
        task=Classification(),
        optimizer=OPTIMIZER,
        steps=300,
    )


def by_hand(params, collections, batches, keys):
    net = Net(jax.random.key(0))
    opt_state = OPTIMIZER.init(eqx.filter(net, eqx.is_array))

    @eqx.filter_value_and_grad
    def loss(net, batch, key):
        logits = jax.vmap(net)(batch["image"], jax.random.split(key, 128))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    for batch, key in zip(batches, keys):
        value, grads = loss(net, batch, key)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, eqx.filter(net, eqx.is_array))
        net = eqx.apply_updates(net, updates)
        yield value


if __name__ == "__main__":
    jaxtrain.main(experiment())
