"""Python numbers among the parameters: constants in the structure of the tree, which the model gets
back as the numbers that they were."""

from typing import Any

import jax

from jaxtrain import tree
from jaxtrain.adapters.interface import Functions, Variables


def as_constants(functions: Functions) -> Functions:
    """The same functions, whose `init` gives each Python number as a `tree.Constant` and whose
    `apply` takes them so.

    >>> model = Functions(
    ...     lambda key, x: {"params": {"times": 2}},
    ...     lambda variables, x, *, train, key=None: ([x] * variables["params"]["times"], {}),
    ...     None,
    ... )
    >>> variables = as_constants(model).init(jax.random.key(0), 1.0)
    >>> variables, as_constants(model).apply(variables, 1.0, train=True)[0]
    ({'params': {'times': Constant(value=2)}}, [1.0, 1.0])
    """

    def init(key: jax.Array, inputs: Any) -> Variables:
        variables = functions.init(key, inputs)
        return variables | {"params": tree.with_constants(variables["params"])}

    def apply(
        variables: Variables, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Variables]:
        whole = variables | {"params": tree.without_constants(variables["params"])}
        return functions.apply(whole, inputs, train=train, key=key)

    return Functions(init, apply, functions.model)
