"""A multi-layer perceptron: every place of the input is a feature.

Dims: B batch, D features.
"""

from typing import Literal

import jax
from flax import linen as nn

from jaxtrain.fields import Count, DropRate
from jaxtrain.models import layers


class MLP(nn.Module):
    """Dense layers with an activation between them.

    >>> import jax.numpy as jnp
    >>> model = MLP(widths=(32,))
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8)))
    >>> model.apply(variables, jnp.zeros((3, 8, 8))).shape
    (3, 10)

    Inputs of any shape (B, ...) are flattened; no `widths` at all makes it a linear model.
    """

    num_classes: Count = 10
    "outputs of the network"
    widths: tuple[int, ...] = (256, 256)
    "features of each hidden layer"
    norm: Literal["none", "batch", "layer"] = "none"
    "normalisation before each activation"
    activation: layers.Activation = "relu"
    "the nonlinearity"
    dropout: DropRate = 0.0
    "share of each hidden layer dropped in training"
    input_dropout: DropRate = 0.0
    "share of the input's places dropped in training"

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        layers.check_counts(self.widths, "MLP.widths")
        x_BD = layers.as_float(inputs).reshape(inputs.shape[0], -1)
        x_BD = layers.Dropout(self.input_dropout)(x_BD, train)
        for index, width in enumerate(self.widths):
            x_BD = layers.dense(
                width, ("mlp_in", "mlp"), initializer=layers.HE_FAN_IN, name=f"hidden{index}"
            )(x_BD)
            x_BD = self._normalize(x_BD, train=train, name=f"norm{index}")
            x_BD = layers.ACTIVATIONS[self.activation](x_BD)
            x_BD = layers.Dropout(self.dropout)(x_BD, train)
        return layers.head(self.num_classes, "mlp_in")(x_BD)

    def _normalize(self, x_BD: jax.Array, *, train: bool, name: str) -> jax.Array:
        if self.norm == "batch":
            return layers.batch_norm(train, axis="mlp", name=name)(x_BD)
        return layers.layer_norm("mlp", name=name)(x_BD) if self.norm == "layer" else x_BD


NAMES: dict[str, nn.Module] = {"mlp": MLP()}
