"""A sequence model of two inputs, tokens and lengths, with a loss over what is not padding.

    python examples/two_inputs.py

What I have: two arrays, and tags that are -1 in the padding. What I write: how the task calls them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import jaxtrain
from jaxtrain.data import Arrays
from jaxtrain.tasks import Classification


class Tagger(nn.Module):
    @nn.compact
    def __call__(self, tokens, lengths):
        return nn.Dense(2)(nn.RNN(nn.GRUCell(32))(nn.Embed(12, 32)(tokens), seq_lengths=lengths))


def experiment():
    tokens = np.random.default_rng(0).integers(0, 12, (2000, 16))
    seen = np.tril(tokens[:, :, None] == tokens[:, None], -1).any(-1)
    arrays = {"tokens": tokens, "lengths": 4 + tokens.sum(1) % 13}
    arrays["tags"] = np.where(np.arange(16) < arrays["lengths"][:, None], seen, -1)
    return jaxtrain.Run(
        name="two_inputs",
        model=Tagger(),
        data=Arrays.of(arrays, train="train[:80%]", validation="train[80%:]", test=""),
        task=Classification(input="tokens,lengths", target="tags", ignore=-1),
        optimizer=optax.adam(3e-3),
        steps=400,
    )


def by_hand(params, collections, batches, keys):
    optimizer = optax.adam(3e-3)
    opt_state = optimizer.init(params)

    def loss(params, tokens, lengths, tags):
        log_p = jax.nn.log_softmax(Tagger().apply({"params": params}, tokens, lengths))
        chosen = jnp.take_along_axis(log_p, jnp.maximum(tags, 0)[..., None], -1)[..., 0]
        return -jnp.mean(chosen, where=np.arange(16) < lengths[:, None])

    for batch in batches:
        value, grads = jax.jit(jax.value_and_grad(loss))(
            params, *map(batch.get, ("tokens", "lengths", "tags"))
        )
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        yield value


if __name__ == "__main__":
    jaxtrain.main(experiment())
