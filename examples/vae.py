"""A variational autoencoder: it draws in training and in evaluation, and has a loss of its own.

    python examples/vae.py

What I have: a model with a random stream. What I write: a task, the negative lower bound in nats.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jaxtrain
from jaxtrain import data, metrics


class VAE(nn.Module):
    @nn.compact
    def __call__(self, x):
        mean, log_variance = jnp.split(nn.Dense(16)(nn.relu(nn.Dense(96)(x))), 2, axis=-1)
        noise = jax.random.normal(self.make_rng("noise"), mean.shape)
        z = nn.relu(nn.Dense(96)(mean + noise * jnp.exp(log_variance / 2)))
        return nn.Dense(64)(z), mean, log_variance


class Bound:
    def inputs(self, batch):
        return batch["image"].reshape(-1, 64)

    def loss(self, outputs, batch, train=True):
        pixels, mean, log_variance = outputs
        error = optax.sigmoid_binary_cross_entropy(pixels, self.inputs(batch)).sum(-1)
        each = error + (mean**2 + jnp.exp(log_variance) - log_variance - 1).sum(-1) / 2
        return {"loss": metrics.weighted(each, batch.get("weight"))}


def experiment():
    parts = {"model": VAE(), "data": data.Digits(), "task": Bound(), "optimizer": optax.sgd(3e-3)}
    return jaxtrain.Run(name="vae", **parts, normalize=False, steps=400)


def by_hand(params, collections, batches, keys):
    def loss(params, x, key):
        rngs = {"noise": jax.random.fold_in(key, 4255749673)}  # crc32 of its name
        p, m, v = VAE().apply({"params": params}, x, rngs=rngs)
        log_p = x * jax.nn.log_sigmoid(p) + (1 - x) * jax.nn.log_sigmoid(-p)
        return (-log_p.sum(-1) + 0.5 * (m**2 + jnp.exp(v) - v - 1).sum(-1)).mean()

    for batch, key in zip(batches, keys):
        value, grads = jax.jit(jax.value_and_grad(loss))(
            params, batch["image"].reshape(-1, 64), key
        )
        params = jax.tree.map(lambda param, grad: param - 3e-3 * grad, params, grads)
        yield value


if __name__ == "__main__":
    jaxtrain.main(experiment())
