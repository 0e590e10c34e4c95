"""Which tensor of a Hugging Face file is which parameter of ours, and how it is laid out there.

A file's tensor becomes a parameter by at most three steps: it is transposed, as `torch.nn.Linear`
keeps (out, in); cut into equal parts along its last dim, where a file keeps query, key and value
as one; and reshaped, so that heads have a dim of their own. `rows` lists all of them for a model,
`plan` holds that list against what a file has, and `to_ours` and `to_hugging_face` do the steps,
one tensor at a time.

Dims: V rows of the vocabulary, P places, D model width, N heads, M heads of keys and values, K head
width, F hidden width, C classes.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxtrain import tree
from jaxtrain.checkpoints import lazy
from jaxtrain.errors import UserError
from jaxtrain.models.encoder import Encoder
from jaxtrain.models.transformer import Transformer

Model = Transformer | Encoder
Shape = tuple[int, ...]
Read = Callable[[str], Any]
"""Gives the tensor of a name, as NumPy or as JAX has it."""

MOST_NAMED = 8
"""How many names of one kind an error lists."""
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|attn\.(masked_)?bias$|embeddings\.position_ids$")
"""What PyTorch modules saved beside their parameters: rotation rates, the causal mask, the count of
places. A model makes them anew."""
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""As the first BERT files, converted from TensorFlow, have them."""
UNUSED_OF_BERT = re.compile(r"^(bert\.)?(pooler\.|cls\.|classifier\.)")
"""The heads that BERT was trained with; a model with another head leaves them out, and says so."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter of ours in a tensor of theirs."""

    path: str
    """As in `block0/attention/query/kernel`."""
    shape: Shape
    name: str
    """Of the tensor, in a file of the whole model."""
    stored: Shape
    """The tensor's shape."""
    transposed: bool = False
    """The tensor is (out, in)."""
    part: tuple[int, int] = (0, 1)
    """Which of how many equal parts along the last dim, once it is transposed."""
    padding: int = 0
    """Rows of a padded vocabulary, which files do not have."""

    def ours(self, tensor: Any) -> Any:
        """The parameter, from the tensor.

        >>> Row("query", (2, 1, 2), "c_attn", (2, 6), part=(1, 3)).ours(
        ...     np.arange(12).reshape(2, 6)
        ... ).tolist()
        [[[2, 3]], [[8, 9]]]
        """
        if self.padding:
            rows = np.zeros((self.padding, *self.stored[1:]), tensor.dtype)
            tensor = np.concatenate([np.asarray(tensor), rows])
        array = tensor.T if self.transposed else tensor
        index, count = self.part
        if count > 1:
            width = array.shape[-1] // count
            array = array[..., index * width : (index + 1) * width]
        return array.reshape(self.shape)


def rows(model: Model) -> tuple[Row, ...]:
    """Every parameter of `model`, and where it is in a file of the whole model.

    >>> [row.name for row in rows(Transformer(depth=1))][:3]
    ['transformer.wte.weight', 'transformer.wpe.weight', 'transformer.h.0.ln_1.weight']

    `UserError` for settings that no family has.
    """
    if isinstance(model, Encoder):
        return tuple(_bert(model))
    _check_settings(model)
    return tuple(_gpt2(model) if model.positions == "learned" else _llama(model))


def _check_settings(model: Transformer) -> None:
    """`UserError` for settings that no family's names can say."""
    learned = model.positions == "learned"
    wanted: dict[str, tuple[Any, ...]] = (
        {"norm": ("layer",), "gated": (False,), "bias": ("all",), "arrangement": ("pre",)}
        | {"qk_norm": ("none",), "key_heads": (0, model.heads)}
        if learned
        else {"norm": ("rms",), "gated": (True,), "arrangement": tuple(NORMS)}
    )
    for name, values in wanted.items():
        if getattr(model, name) not in values:
            raise UserError(
                f"Transformer.{name}={getattr(model, name)}: no Hugging Face family that we know"
                f" has it with positions={model.positions}; there it is"
                f" {' or '.join(map(str, values))}"
            )


def copies(model: Model) -> dict[str, str]:
    """Tensors that a file may have twice, by the name of the second: it must equal the first.

    >>> copies(Transformer())
    {'lm_head.weight': 'transformer.wte.weight'}
    """
    if isinstance(model, Encoder):
        return {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }
    return {"lm_head.weight": rows(model)[0].name} if model.tied else {}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of every tensor of a file, before any is read."""

    rows: tuple[Row, ...]
    """With the names that this file has."""
    copies: tuple[tuple[str, str], ...]
    """Pairs of tensors that must be equal."""
    new: tuple[str, ...]
    """Paths of parameters that the file does not have and need not have."""
    notes: tuple[str, ...]
    """What is said once: tensors that are left out."""


def plan(
    model: Model,
    available: Mapping[str, Shape],
    *,
    new: Iterable[str] = (),
    what: str = "the file",
) -> Plan:
    """Holds the parameters of `model` against the tensors that a file has.

    >>> plan(Transformer(depth=1), {"wte.weight": (2, 2)})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    jaxtrain.errors.UserError: the file is not the model of its config.json: missing: wpe.weight,
    ... and 7 more; misshapen: wte.weight (2, 2), must be (64, 128)

    Names may lack the prefix of the whole model. `new` are the first words of paths that may be
    missing, such as a head for other classes. `UserError`, one for all, if a tensor is missing, is
    left over or has another shape.
    """
    own, fresh = rows(model), tuple(new)
    prefix = own[0].name.partition(".")[0] + "."
    given = {_new_name(name): name for name in available}
    bare = not any(name.startswith(prefix) for name in given)

    def there(name: str) -> str:
        return name.removeprefix(prefix) if bare else name

    wanted = [dataclasses.replace(row, name=there(row.name)) for row in own]
    twice = {there(copy): there(first) for copy, first in copies(model).items()}
    is_new = {row.path for row in wanted if row.path.partition("/")[0] in fresh}
    found = [row for row in wanted if row.name in given]
    misshapen = {
        row.name: f"{given[row.name]} {tuple(available[given[row.name]])}, must be {row.stored}"
        for row in found
        if tuple(available[given[row.name]]) != row.stored
    }
    missing = [row.name for row in wanted if row.name not in given and row.path not in is_new]
    rest = set(given) - {row.name for row in wanted} - set(twice)
    rest = {name for name in rest if not BUFFERS.search(name)}
    unused = {name for name in rest if isinstance(model, Encoder) and UNUSED_OF_BERT.match(name)}
    faults = {
        "missing": list(dict.fromkeys(missing)),
        "left over": [given[name] for name in sorted(rest - unused)],
        "misshapen": list(misshapen.values()),
    }
    if any(faults.values()):
        listed = "; ".join(f"{word}: {_listed(names)}" for word, names in faults.items() if names)
        raise UserError(f"{what} is not the model of its config.json: {listed}")
    return Plan(
        tuple(dataclasses.replace(row, name=given[row.name]) for row in found),
        tuple((given[copy], given[first]) for copy, first in twice.items() if copy in given),
        tuple(row.path for row in wanted if row.name not in given),
        (f"{what}: left out, for this model has no place for it: {_listed(sorted(unused))}",)
        if unused
        else (),
    )


def to_ours(
    model: Model,
    read: Read,
    available: Mapping[str, Shape],
    *,
    new: Iterable[str] = (),
    what: str = "the file",
) -> dict[str, Any]:
    """The parameters of `model`, as a tree, from the tensors that `read` gives, one at a time.

    >>> model = Transformer(vocabulary=3, width=2, heads=1, depth=1, max_length=4)
    >>> file = {row.name: np.ones(row.stored) for row in rows(model)}
    >>> params = to_ours(model, file.__getitem__, {name: file[name].shape for name in file})
    >>> params["block0"]["attention"]["query"]["kernel"].shape
    (2, 1, 2)

    `available` has the shapes of all tensors. What is `new` is not in the tree if the file does not
    have it. `UserError` as in `plan`, for a second copy of a tensor that differs from the first,
    and for weights of whole numbers.
    """
    planned = plan(model, available, new=new, what=what)
    for copy, first in planned.copies:
        check_copy(copy, first, read, what=what)
    found: dict[str, Any] = {}
    for row in planned.rows:
        *folders, leaf = row.path.split("/")
        place = found
        for folder in folders:
            place = place.setdefault(folder, {})
        tensor = read(row.name)
        lazy.check_floating(what, row.name, tensor)
        place[leaf] = row.ours(tensor)
    return found


def check_copy(copy: str, first: str, read: Read, *, what: str = "the file") -> None:
    """`UserError` if two tensors differ that are one in the model."""
    if not np.array_equal(np.asarray(read(copy)), np.asarray(read(first))):
        raise UserError(
            f"{what}: {copy} differs from {first}, but config.json says that they are one; set"
            ' "tie_word_embeddings": false there if the model was trained so'
        )


def tensors(model: Model, params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Name and tensor, one at a time, as `transformers` saves a whole model.

    >>> model = Transformer(vocabulary=3, width=2, heads=1, depth=1, max_length=4)
    >>> file = {row.name: np.ones(row.stored) for row in rows(model)}
    >>> params = to_ours(model, file.__getitem__, {name: file[name].shape for name in file})
    >>> {name: array.shape for name, array in tensors(model, params)} == {
    ...     name: array.shape for name, array in file.items()
    ... }
    True

    Tied heads are left out, and so are the rows that pad a vocabulary. `UserError` for parameters
    that are not the model's.
    """
    given = tree.flatten(params)
    parts: dict[str, list[Row]] = {}
    for row in rows(model):
        parts.setdefault(row.name, []).append(row)
    own = {row.path: row.shape for row in rows(model)}
    shapes = {path: tuple(np.shape(leaf)) for path, leaf in given.items()}
    if own != shapes:
        odd = sorted(
            path for path in own.keys() | shapes.keys() if own.get(path) != shapes.get(path)
        )
        raise UserError(f"the parameters are not those of the model: {_listed(odd)}")
    for name, together in parts.items():
        yield name, _theirs(together, [given[row.path] for row in together])


def to_hugging_face(model: Model, params: Any) -> dict[str, np.ndarray]:
    """All tensors of a file that `transformers` loads, by name; see `tensors`."""
    return dict(tensors(model, params))


def _theirs(together: list[Row], params: list[Any]) -> np.ndarray:
    """One tensor, from the parameters that are its parts."""
    first = together[0]
    padded = (first.stored[0] + first.padding, *first.stored[1:])
    flat = padded[::-1] if first.transposed else padded
    pieces = [np.asarray(param).reshape(*flat[:-1], flat[-1] // first.part[1]) for param in params]
    array = np.concatenate(pieces, axis=-1) if len(pieces) > 1 else pieces[0]
    array = array.T if first.transposed else array
    return np.ascontiguousarray(array[: first.stored[0]])


def _new_name(name: str) -> str:
    """The name that newer files have for it."""
    for old, new in OLD_NAMES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:MOST_NAMED])
    return shown + (f", ... and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")


# --- the families
# --------------------------------------------------------------------------------------------------


def _linear(path: str, name: str, into: Shape, out: Shape, *, bias: bool) -> Iterator[Row]:
    """A dense layer as `torch.nn.Linear` keeps it: the dims of what enters it and of what leaves it
    are one each there."""
    flat_in, flat_out = int(np.prod(into)), int(np.prod(out))
    yield Row(f"{path}/kernel", into + out, f"{name}.weight", (flat_out, flat_in), transposed=True)
    if bias:
        yield Row(f"{path}/bias", out, f"{name}.bias", (flat_out,))


def _scaled(path: str, name: str, shape: Shape, *, bias: bool) -> Iterator[Row]:
    """A norm."""
    stored = (int(np.prod(shape)),)
    yield Row(f"{path}/scale", shape, f"{name}.weight", stored)
    if bias:
        yield Row(f"{path}/bias", shape, f"{name}.bias", stored)


def _table(model: Transformer, name: str) -> Iterator[Row]:
    """The embedding, whose vocabulary may be padded here."""
    padding = max(model.padded_vocabulary - model.vocabulary, 0)
    shape, stored = (model.vocabulary + padding, model.width), (model.vocabulary, model.width)
    yield Row("embed", shape, f"{name}.weight", stored, padding=padding)


def _head(model: Transformer) -> Iterator[Row]:
    """The head, if it is not the embedding."""
    if model.tied:
        return
    padding = max(model.padded_vocabulary - model.vocabulary, 0)
    shape, stored = (model.width, model.vocabulary + padding), (model.vocabulary, model.width)
    yield Row("head/kernel", shape, "lm_head.weight", stored, transposed=True, padding=padding)


def _gpt2(model: Transformer) -> Iterator[Row]:
    """GPT-2, whose dense layers are `Conv1D`: kernels (in, out), query, key and value as one."""
    size = model.block_settings()
    D, F = model.width, size.hidden
    heads = (size.heads, size.head_dim)
    yield from _table(model, "transformer.wte")
    yield Row("positions", (model.max_length, D), "transformer.wpe.weight", (model.max_length, D))
    for index in range(model.depth):
        ours, theirs = f"block{index}", f"transformer.h.{index}"
        yield from _scaled(f"{ours}/norm0", f"{theirs}.ln_1", (D,), bias=True)
        for part, name in enumerate(("query", "key", "value")):
            path, fused = f"{ours}/attention/{name}", f"{theirs}.attn.c_attn"
            yield Row(f"{path}/kernel", (D, *heads), f"{fused}.weight", (D, 3 * D), part=(part, 3))
            yield Row(f"{path}/bias", heads, f"{fused}.bias", (3 * D,), part=(part, 3))
        for path, name, into, out in (
            ("attention/out", "attn.c_proj", heads, D),
            ("mlp_in", "mlp.c_fc", (D,), F),
            ("mlp_out", "mlp.c_proj", (F,), D),
        ):
            stored = (int(np.prod(into)), out)
            yield Row(f"{ours}/{path}/kernel", (*into, out), f"{theirs}.{name}.weight", stored)
            yield Row(f"{ours}/{path}/bias", (out,), f"{theirs}.{name}.bias", (out,))
        yield from _scaled(f"{ours}/norm1", f"{theirs}.ln_2", (D,), bias=True)
    yield from _scaled("norm", "transformer.ln_f", (D,), bias=True)
    yield from _head(model)


NORMS = {
    "pre": {"norm0": "input_layernorm", "norm1": "post_attention_layernorm"},
    "output": {"norm0_out": "post_attention_layernorm", "norm1_out": "post_feedforward_layernorm"},
    "sandwich": {
        "norm0": "input_layernorm",
        "norm0_out": "post_attention_layernorm",
        "norm1": "pre_feedforward_layernorm",
        "norm1_out": "post_feedforward_layernorm",
    },
}
"""By arrangement: one name means two things, before the second branch (Llama) and after the first
(OLMo 2, Gemma)."""


def _llama(model: Transformer) -> Iterator[Row]:
    """Llama and its relatives, which keep its names."""
    size = model.block_settings()
    D, F = model.width, size.hidden
    heads, key_heads = (size.heads, size.head_dim), (size.key_heads, size.head_dim)
    yield from _table(model, "model.embed_tokens")
    for index in range(model.depth):
        ours, theirs = f"block{index}", f"model.layers.{index}"
        for path, name in NORMS[model.arrangement].items():
            yield from _scaled(f"{ours}/{path}", f"{theirs}.{name}", (D,), bias=False)
        for path, name, out in (
            ("query", "q_proj", heads),
            ("key", "k_proj", key_heads),
            ("value", "v_proj", key_heads),
        ):
            yield from _linear(
                f"{ours}/attention/{path}",
                f"{theirs}.self_attn.{name}",
                (D,),
                out,
                bias=model.bias != "none",
            )
        if model.qk_norm != "none":
            for path, name, shape in (
                ("query_norm", "q_norm", heads),
                ("key_norm", "k_norm", key_heads),
            ):
                normed = shape if model.qk_norm == "all" else shape[-1:]
                yield from _scaled(
                    f"{ours}/attention/{path}", f"{theirs}.self_attn.{name}", normed, bias=False
                )
        for path, name, into, out, with_bias in (
            ("attention/out", "self_attn.o_proj", heads, (D,), ("all", "attention")),
            ("mlp_gate", "mlp.gate_proj", (D,), (F,), ("all",)),
            ("mlp_in", "mlp.up_proj", (D,), (F,), ("all",)),
            ("mlp_out", "mlp.down_proj", (F,), (D,), ("all",)),
        ):
            yield from _linear(
                f"{ours}/{path}", f"{theirs}.{name}", into, out, bias=model.bias in with_bias
            )
    yield from _scaled("norm", "model.norm", (D,), bias=False)
    yield from _head(model)


def _bert(model: Encoder) -> Iterator[Row]:
    """BERT, by its names of today."""
    size = model.block_settings()
    D, F = model.width, size.hidden
    heads = (size.heads, size.head_dim)
    tables = (("embed", "word", model.vocabulary), ("positions", "position", model.max_length))
    for path, name, count in (*tables, ("token_types", "token_type", model.token_types)):
        yield Row(path, (count, D), f"bert.embeddings.{name}_embeddings.weight", (count, D))
    yield from _scaled("norm", "bert.embeddings.LayerNorm", (D,), bias=True)
    for index in range(model.depth):
        ours, theirs = f"block{index}", f"bert.encoder.layer.{index}"
        for path, name, into, out in (
            ("attention/query", "attention.self.query", (D,), heads),
            ("attention/key", "attention.self.key", (D,), heads),
            ("attention/value", "attention.self.value", (D,), heads),
            ("attention/out", "attention.output.dense", heads, (D,)),
            ("mlp_in", "intermediate.dense", (D,), (F,)),
            ("mlp_out", "output.dense", (F,), (D,)),
        ):
            yield from _linear(f"{ours}/{path}", f"{theirs}.{name}", into, out, bias=True)
        yield from _scaled(
            f"{ours}/norm0_out", f"{theirs}.attention.output.LayerNorm", (D,), bias=True
        )
        yield from _scaled(f"{ours}/norm1_out", f"{theirs}.output.LayerNorm", (D,), bias=True)
    if model.pooler:
        yield from _linear("pooler", "bert.pooler.dense", (D,), (D,), bias=True)
    if model.head == "tokens":
        yield from _linear("head_in", "cls.predictions.transform.dense", (D,), (D,), bias=True)
        yield from _scaled("head_norm", "cls.predictions.transform.LayerNorm", (D,), bias=True)
        yield Row("head_bias", (model.vocabulary,), "cls.predictions.bias", (model.vocabulary,))
    elif model.head == "classes":
        yield from _linear("head", "classifier", (D,), (model.num_classes,), bias=True)
