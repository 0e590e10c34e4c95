"""A small network between the scales of its data: features of any unit or tokens go in, numbers of
any unit come out.

Dims: B batch, D features, L length, C outputs.
"""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtrain.fields import AtLeast, Count, DropRate
from jaxtrain.models import layers
from jaxtrain.models.convnet import ConvNet
from jaxtrain.models.mlp import MLP


class Fitted(nn.Module):
    """An MLP or a ConvNet whose inputs are standardized by constants, or embedded, and whose
    outputs have a mean and a deviation.

    >>> model = Fitted(1, widths=(8,), mean=(150.0,), deviation=(20.0,))
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 3)))
    >>> model.apply(variables, jnp.zeros((2, 3))).shape
    (2, 1)

    Inputs are features (B, D), signals (B, L) or (B, L, channels), images (B, H, W, channels), or
    tokens (B, L), which a `vocabulary` says.
    """

    num_classes: Count = 1
    "outputs of the network"
    network: Literal["mlp", "convnet"] = "mlp"
    "what lies between the scales"
    widths: tuple[int, ...] = (64, 64)
    "features of each layer, or channels of each stage"
    dropout: DropRate = 0.0
    "share of the features dropped in training"
    vocabulary: Annotated[int, AtLeast(0)] = 0
    "tokens that there are; 0 for inputs that are no tokens"
    input_mean: tuple[float, ...] = ()
    "mean of each feature; empty for inputs that are standardized already"
    input_deviation: tuple[float, ...] = ()
    "deviation of each feature"
    mean: tuple[float, ...] = ()
    "mean of each output; empty for logits"
    deviation: tuple[float, ...] = ()
    "deviation of each output"

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        layers.check_counts(self.widths, "Fitted.widths")
        if self.vocabulary:
            table = layers.boxed(nn.initializers.normal(1.0), "vocab", "embed")
            embed = nn.Embed(self.vocabulary, self.widths[0], embedding_init=table, name="tokens")
            inputs = embed(inputs)
        elif self.input_mean:
            inputs = layers.as_float(inputs)
            inputs = (inputs - jnp.asarray(self.input_mean)[None]) / jnp.asarray(
                self.input_deviation
            )[None]
        kind = MLP if self.network == "mlp" else ConvNet
        outputs_BC = kind(self.num_classes, self.widths, dropout=self.dropout, name="network")(
            inputs, train
        )
        if not self.mean:
            return outputs_BC
        return outputs_BC * jnp.asarray(self.deviation)[None] + jnp.asarray(self.mean)[None]


NAMES: dict[str, nn.Module] = {"fitted": Fitted()}
"""Its scales come from the data: `experiments/own.py` measures them."""
