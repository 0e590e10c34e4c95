"""A Haiku model with state: batch norm and dropout, as `hk.transform_with_state` gives it.

    python examples/haiku_model.py

What I have: a function of Haiku modules. What I write: `experiment`, which holds its transform.
"""

import haiku as hk
import jax
import optax

import jaxtrain
from jaxtrain.data import Digits
from jaxtrain.tasks import Classification

OPTIMIZER = optax.adamw(2e-3)


def forward(x, is_training):
    x = hk.Conv2D(16, 3)(x)
    x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training)
    x = hk.avg_pool(jax.nn.relu(x), (2, 2, 1), (2, 2, 1), "VALID").reshape(len(x), -1)
    x = hk.dropout(hk.next_rng_key(), 0.2, x) if is_training else x
    return hk.Linear(10)(x)


def experiment():
    return jaxtrain.Run(
        name="haiku_model",
        model=hk.transform_with_state(forward),
        data=Digits(train="train[:90%]", validation="train[90%:]"),
        task=Classification(),
        optimizer=OPTIMIZER,
        batch_size=64,
        steps=300,
    )


def by_hand(params, collections, batches, keys):
    model, opt_state = hk.transform_with_state(forward), OPTIMIZER.init(params)

    def loss(params, batch, key):
        logits, _ = model.apply(params, collections["state"], key, batch["image"], True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    for batch, key in zip(batches, keys):
        value, grads = jax.jit(jax.value_and_grad(loss))(params, batch, key)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        yield value


if __name__ == "__main__":
    jaxtrain.main(experiment())
