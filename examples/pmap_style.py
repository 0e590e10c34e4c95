"""A model written for `jax.pmap`: its batch norm takes the mean over the axis `batch`.

    python examples/pmap_style.py --mesh=data:-1

What I have: `axis_name="batch"` in the model. What I write: `experiment`, and no pmap: the axis is
the global batch on any mesh. By hand, eight shards take the mean of statistics and gradients.
"""

import jax
import optax
from flax import linen as nn

import jaxtrain
from jaxtrain.data import Digits
from jaxtrain.tasks import Classification


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(16, (3, 3), strides=2)(x)
        x = nn.BatchNorm(use_running_average=not train, axis_name="batch")(x)
        return nn.Dense(10)(nn.relu(x).reshape(len(x), -1))


def experiment():
    return jaxtrain.Run(
        name="pmap_style",
        model=CNN(),
        data=Digits(train="train[:90%]", validation="train[90%:]"),
        task=Classification(),
        optimizer=optax.sgd(0.1, momentum=0.9),
        steps=200,
    )


def by_hand(params, collections, batches, keys):
    optimizer = optax.sgd(0.1, momentum=0.9)
    opt_state = optimizer.init(params)

    def shard(params, images, labels):
        def loss(params):
            variables = {"params": params, **collections}
            logits, _ = CNN().apply(variables, images, True, mutable="batch_stats")
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.lax.pmean(jax.value_and_grad(loss)(params), "batch")

    mapped = jax.jit(jax.vmap(shard, (None, 0, 0), None, axis_name="batch"))
    for batch in batches:
        shards = [batch[name].reshape(8, 16, *batch[name].shape[1:]) for name in ("image", "label")]
        value, grads = mapped(params, *shards)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        yield value


if __name__ == "__main__":
    jaxtrain.main(experiment())
