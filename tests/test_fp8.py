"""Products in fp8 against NumPy: the same rounding by ml_dtypes, the same sums in float64, and
every place where products hide.

Letters of the products: a, b, c, d free dims, k, l, m contracted ones.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain import adapters
from jaxtrain.models import MLP, Transformer, ViT
from jaxtrain.parallel import mesh
from jaxtrain.plan import gpu_target
from jaxtrain.precision import fp8

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
RANDOM = np.random.default_rng(0)


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * RANDOM.normal(size=shape)).astype(np.float32)


def rounded(values: np.ndarray, dtype: Any) -> np.ndarray:
    """The numbers that are left of `values` in a format of eight bits, as float64."""
    largest = np.abs(values).max().astype(np.float32)
    top = np.float32(ml_dtypes.finfo(dtype).max)
    few = (values.astype(np.float32) * (top / largest)).astype(dtype)
    return few.astype(np.float64) * np.float64(largest / top)


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return x @ y


def products(jaxpr: Any) -> Iterator[tuple[str, ...]]:
    """The dtypes of the operands of every product in a jaxpr, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(operand.aval.dtype.name for operand in equation.invars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns"):
                    yield from products(inner)


def count(function: Callable[..., Any], *arguments: Any) -> Counter[str]:
    """How many products a function has, by the dtype of its left operand."""
    return Counter(left for left, _ in products(jax.make_jaxpr(function)(*arguments)))


def both(
    function: Callable[..., Any], x: np.ndarray, y: np.ndarray, upstream: np.ndarray
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The value of a function and both gradients, compiled."""

    def value_and_gradients(x: jax.Array, y: jax.Array, upstream: jax.Array) -> Any:
        value, pullback = jax.vjp(function, x, y)
        return value, pullback(upstream)

    return jax.jit(value_and_gradients)(x, y, upstream)


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_rounds_as_ml_dtypes_does(dtype, scale):
    values = normal(40, 50, scale=scale)
    few, factor = jax.jit(lambda values: fp8.quantize(values, jnp.dtype(dtype)))(values)
    assert few.dtype == dtype
    few = np.asarray(few)
    np.testing.assert_allclose(
        few.astype(np.float64) * np.float64(factor), rounded(values, dtype), rtol=1e-6, atol=0
    )
    assert np.abs(few.astype(np.float32)).max() == ml_dtypes.finfo(dtype).max


def test_a_tensor_without_a_usable_scale_keeps_scale_one():
    quantize = jax.jit(lambda values: fp8.quantize(values, jnp.float8_e4m3fn))
    for values in ([0.0, 0.0], [1e-35, 0.0], []):
        few, factor = quantize(np.array(values, np.float32))
        assert float(factor) == 1.0
        assert np.asarray(few).astype(np.float32).tolist() == [0.0] * len(values)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_an_overflow_is_seen(bad):
    """Where one operand is not finite the row is NaN, in the product and in the gradient, and no
    number hides behind the largest."""
    x, y = normal(3, 4), normal(4, 2)
    x[1, 2] = bad
    product = fp8.with_fp8_products(matmul)
    assert np.isnan(jax.jit(product)(x, y)).tolist() == [[False] * 2, [True] * 2, [False] * 2]
    upstream = np.where(np.arange(3)[:, None] == 1, bad, 1.0).astype(np.float32) * np.ones(
        (1, 2), np.float32
    )
    gradient = jax.jit(lambda x, y, upstream: jax.vjp(product, x, y)[1](upstream)[0])(
        normal(3, 4), y, upstream
    )
    assert np.isnan(gradient).any(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    "letters",
    ["ak,kb->ab", "abk,kcd->abcd", "akbl,lckd->abcd", "klma,bmkl->ab", "kl,lk->", "ka,bk->ba"],
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["fp32", "bf16"])
def test_products_and_gradients_are_those_of_numpy(letters, dtype):
    sizes = dict(zip("abcdklm", (3, 4, 2, 5, 6, 8, 7), strict=True))
    first, second, out = re.split(",|->", letters)
    x, y, upstream = (
        np.asarray(normal(*(sizes[letter] for letter in word))).astype(dtype)
        for word in (first, second, out)
    )

    def function(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(letters, x, y)

    assert count(fp8.with_fp8_products(function), x, y) == {"float8_e4m3fn": 1}
    value, (to_x, to_y) = both(fp8.with_fp8_products(function), x, y, upstream)
    x_fp8, y_fp8, up_fp8 = rounded(x, E4M3), rounded(y, E4M3), rounded(upstream, E5M2)
    wanted = {
        "value": (value, np.einsum(letters, x_fp8, y_fp8)),
        "to x": (to_x, np.einsum(f"{out},{second}->{first}", up_fp8, y_fp8)),
        "to y": (to_y, np.einsum(f"{out},{first}->{second}", up_fp8, x_fp8)),
    }
    for name, (found, right) in wanted.items():
        assert found.dtype == dtype, name
        error = np.abs(np.asarray(found, np.float64) - right).max() / np.abs(right).max()
        assert error < (1e-6 if dtype == np.float32 else 2**-8), name


def test_the_error_of_a_product_is_four_percent():
    x, y = normal(256, 256), normal(256, 256)
    right = x.astype(np.float64) @ y.astype(np.float64)
    found = np.asarray(fp8.with_fp8_products(matmul)(x, y), np.float64)
    assert 0.02 < np.linalg.norm(found - right) / np.linalg.norm(right) < 0.04


def hidden(place: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """tanh(x @ w) three times, in a place where a jaxpr hides it."""

    def once(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(x @ w)

    inner = {
        "plain": once,
        "jit": jax.jit(once),
        "remat": jax.checkpoint(once),
        "jit of remat": jax.jit(jax.checkpoint(once, policy=jax.checkpoint_policies.dots_saveable)),
        "scan of remat": lambda x, w: jax.lax.scan(
            lambda x, _: (jax.checkpoint(once)(x, w), None), x, None, length=1
        )[0],
        "loop": lambda x, w: jax.lax.fori_loop(0, 1, lambda _, x: once(x, w), x),
        "cond": lambda x, w: jax.lax.cond(
            x.sum() > 1e9, lambda x: x + 1.0, lambda x: once(x, w), x
        ),
    }[place]
    return lambda x, w: inner(inner(inner(x, w), w), w)


@pytest.mark.parametrize("place", ["jit", "remat", "jit of remat", "scan of remat", "loop", "cond"])
def test_products_are_found_where_they_hide(place):
    x, w, upstream = normal(4, 8), normal(8, 8), normal(4, 8)

    assert count(fp8.with_fp8_products(hidden(place)), x, w).keys() == {"float8_e4m3fn"}
    wanted = both(fp8.with_fp8_products(hidden("plain")), x, w, upstream)
    function = fp8.with_fp8_products(hidden(place))
    for found in (both(function, x, w, upstream), both(jax.checkpoint(function), x, w, upstream)):
        jax.tree.map(
            lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5),
            found,
            wanted,
        )


def test_products_are_found_in_models_of_any_kind():
    """Also those that no layer makes: the tied head of a decoder, and a function's own."""
    tokens, rows = jnp.ones((2, 8), jnp.int32), jnp.ones((2, 4))
    width = {"width": 8, "depth": 1, "heads": 2}
    by_hand = (lambda key, x: jnp.ones((4, 3))), lambda w, x: jnp.einsum("bd,de->be", x, w)
    models = {
        "mlp": (MLP(widths=(8,)), rows, 2),
        "vit": (ViT(**width, patch=4), jnp.ones((2, 8, 8, 1)), 1 + 6 + 1),
        "decoder, tied": (Transformer(**width), tokens, 6 + 1),
        "decoder": (Transformer(**width, tied=False), tokens, 6 + 1),
        "nnx": (lambda rngs: nnx.Linear(4, 3, rngs=rngs), rows, 1),
        "functions": (by_hand, rows, 1),
    }
    for name, (model, inputs, dense) in models.items():
        net = adapters.functions(model)
        variables = jax.eval_shape(net.init, jax.random.key(0), inputs)
        apply = functools.partial(net.apply, train=False)
        found = count(fp8.with_fp8_products(apply), variables, inputs)
        batched = {"float32": 2} if isinstance(model, ViT | Transformer) else {}
        assert found == {"float8_e4m3fn": dense} | batched, name


def test_what_holds_no_product_stays_the_same_object():
    traced = jax.make_jaxpr(jax.jit(lambda x: jnp.where(x > 0, x, 0.0)))(normal(3))
    assert fp8._rewrite(traced) is traced


def test_what_is_left_alone():
    """Attention's batched products, products of integers, convolutions, and products behind
    derivatives that somebody wrote."""
    query = normal(2, 5, 3, 4)
    assert count(fp8.with_fp8_products(jax.nn.dot_product_attention), query, query, query) == {
        "float32": 2
    }
    whole = np.ones((4, 4), np.int32)
    assert count(fp8.with_fp8_products(matmul), whole, whole) == {"int32": 1}
    assert count(fp8.with_fp8_products(jnp.outer), normal(3), normal(2)).keys() <= {"float32"}

    @jax.custom_vjp
    def doubled(x: jax.Array) -> jax.Array:
        return x @ x

    doubled.defvjp(lambda x: (x @ x, x), lambda x, gradient: (jnp.full_like(x, 7.0),))
    x = normal(4, 4)
    found, gradient = jax.jit(
        jax.value_and_grad(lambda x: fp8.with_fp8_products(doubled)(x).sum())
    )(x)
    np.testing.assert_allclose(found, (x @ x).sum(), rtol=1e-5)
    np.testing.assert_array_equal(gradient, np.full((4, 4), 7.0))
    ends = fp8.with_fp8_products(
        lambda x: jax.lax.while_loop(lambda x: x.sum() < 0, matmul_self, x)
    )
    assert count(ends, x) == {"float32": 1}


def matmul_self(x: jax.Array) -> jax.Array:
    return x @ x


def test_trees_keys_and_constants_pass_through():
    table, key = normal(6, 2), jax.random.key(3)

    def function(parameters: dict[str, jax.Array], key: jax.Array) -> dict[str, Any]:
        noise = jax.random.normal(key, (4, 8))
        return {
            "out": (noise @ parameters["w"]) @ table,
            "same": parameters["b"],
            "key": key,
            "seven": 7,
        }

    parameters = {"w": jnp.asarray(normal(8, 6)), "b": jnp.arange(3)}
    found = jax.jit(fp8.with_fp8_products(function))(parameters, key)
    assert count(
        fp8.with_fp8_products(lambda parameters: function(parameters, key)["out"]), parameters
    ) == {"float8_e4m3fn": 2}
    assert found["same"].tolist() == [0, 1, 2]
    assert found["key"] == key
    assert int(found["seven"]) == 7
    assert np.linalg.norm(
        found["out"] - jax.jit(function)(parameters, key)["out"]
    ) < 0.1 * np.linalg.norm(found["out"])


def test_names_in_a_profile_stay():
    def function(x: jax.Array) -> jax.Array:
        with jax.named_scope("my_layer"):
            return x @ x

    assert "my_layer" in jax.jit(fp8.with_fp8_products(function)).lower(normal(4, 4)).as_text(
        debug_info=True
    )


def test_a_sharded_product_has_the_scale_of_the_whole():
    x, w = normal(16, 32), normal(32, 8)
    x[0, 0] = 50.0
    grid = mesh.make("data:2,fsdp:4")
    product = jax.jit(fp8.with_fp8_products(matmul))
    placed = [
        jax.device_put(x, NamedSharding(grid, PartitionSpec("data"))),
        jax.device_put(w, NamedSharding(grid, PartitionSpec("fsdp"))),
    ]
    np.testing.assert_allclose(product(*placed), product(x, w), rtol=1e-5, atol=1e-5)


# A program for a card that is not here can be kept but not read back; it is compiled again.
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize("card", ["h100", "rtx_4090"])
def test_the_compiler_makes_fp8_kernels(card):
    reason = gpu_target.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    try:
        place = jax.sharding.SingleDeviceSharding(gpu_target.devices(card, 1)[0])
    except ValueError as error:
        pytest.skip(str(error))

    def gradients(x: jax.Array, w: jax.Array, upstream: jax.Array) -> Any:
        return jax.vjp(fp8.with_fp8_products(matmul), x, w)[1](upstream)

    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
        for shape in ((256, 128), (128, 64), (256, 64))
    ]
    text = jax.jit(gradients, out_shardings=place).lower(*shapes).compile().as_text()
    kernels = text.count('custom_call_target="__cublas$lt$matmul$f8"')
    if not kernels:
        dtypes = dict(re.findall(r"(%[\w.]+) = (\w+)\[", text))
        operands = [re.findall(r"%[\w.]+", line) for line in re.findall(r" dot\(([^)]*)\)", text)]
        assert all(dtypes[name].startswith("f8") for pair in operands for name in pair)
        kernels = len(operands)
    assert kernels == 2
