"""Fine-tuning: a body that was trained on other classes, kept as it is, and a new head.

    python examples/fine_tune.py       # the first time trains the body on digits 0 to 4
    python examples/fine_tune.py       # then a head on digits 5 to 9

What I have: a run. What I write: `init_from`, `init_rules` and what the optimizer leaves alone.
"""

import os

import jax
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import jaxtrain
from jaxtrain import data, optimizers, tasks


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3), strides=2, name="body")(x))
        return nn.Dense(5, name="head")(x.reshape(len(x), -1))


def run(digits, **options):
    images, label = load_digits(return_X_y=True)
    chosen = (label >= digits[0]) & (label <= digits[-1])
    arrays = {"x": images[chosen].reshape(-1, 8, 8, 1) / 16, "y": label[chosen] - digits[0]}
    source = data.Arrays.of(arrays, train="train[:80%]", test="train[80%:]")
    parts = {"model": Net(), "data": source, "task": tasks.Classification()}
    return jaxtrain.Run(**parts, steps=200, **options)


def experiment():
    start = {"name": "head", "init_from": "runs/body", "init_rules": (("head", "skip"),)}
    sgd = optimizers.SGD(learning_rate=0.1, frozen=("body",))
    return run(range(5, 10), **start, optimizer=sgd, clip_norm=0.05)


def by_hand(params, collections, batches, keys):
    optimizer = optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.1))
    opt_state = optimizer.init(params["head"])

    def loss(head, batch):
        logits = Net().apply({"params": params | {"head": head}}, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    for batch in batches:
        value, grads = jax.jit(jax.value_and_grad(loss))(params["head"], batch)
        updates, opt_state = optimizer.update(grads, opt_state, params["head"])
        params = params | {"head": optax.apply_updates(params["head"], updates)}
        yield value


if __name__ == "__main__":
    body = {"name": "body", "workdir": "runs/body", "optimizer": optax.adam(3e-3)}
    jaxtrain.main(experiment() if os.path.exists("runs/body") else run(range(5), **body))
