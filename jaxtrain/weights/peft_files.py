"""Adapters of low rank as PEFT keeps them: `adapter_model.safetensors` and `adapter_config.json`.

There A is (rank, in) and B is (out, rank), under the name of Hugging Face's layer; ours lie beside
the kernel of each dense layer, `lora_a` (in..., rank) and `lora_b` (rank, out...). GPT-2 keeps
query, key and value as one layer: an adapter of it is one of each of the three here, with the same
A, and three different ones become one of three times the rank, whose B is zero where it does not
belong. PEFT's patterns of ranks and alphas are read (smaller ranks are filled with zeros, other
scales go into B); whatever is more than plain LoRA is refused.

Dims: R rank, I in, O out.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain import tree
from jaxtrain.checkpoints import lazy
from jaxtrain.errors import UserError
from jaxtrain.messages import did_you_mean, printable
from jaxtrain.models.lora import ADAPTERS, LoRA
from jaxtrain.weights import names, safetensors_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MOST_NAMED = 6
_READ = "peft_type r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern"
"""Settings that are taken over."""
_HARMLESS = """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode
target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out megatron_config
megatron_core loftq_config eva_config corda_config qalora_group_size ensure_weight_tying
runtime_config"""
"""Settings that change no number: what a file says of itself, which layers have an adapter (the
tensors say so), how the base is stored and split, and how others were born that are refused."""
READ, HARMLESS = frozenset(_READ.split()), frozenset(_HARMLESS.split())
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # PiSSA, OLoRA, CorDA and LoftQ change the base too, so A and B belong to another one
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", None),
}
"""Settings that must have one of these values, or be absent; any other makes another network."""
OFF = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config"),
    *("monteclora_config", "velora_config", "lora_ga_config", "kasa_config"),
)
"""What PEFT can do more than plain LoRA, which must be off, as everything that is not known."""
REMEDY = "merge it in PEFT (merge_and_unload) and read the whole model"
Adapters = dict[str, np.ndarray]
"""By slash path, such as `block0/attention/query/lora_a`."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One dense layer of Hugging Face, and the ones of ours that it is made of."""

    name: str
    """Such as `model.layers.0.self_attn.q_proj`."""
    rows: tuple[names.Row, ...]


def layers_of(model: names.Model) -> tuple[Layer, ...]:
    """Every dense layer of the model that can have an adapter.

    >>> from jaxtrain.models import Transformer
    >>> [layer.name for layer in layers_of(Transformer(depth=1))][:2]
    ['transformer.h.0.attn.c_attn', 'transformer.h.0.attn.c_proj']
    """
    found: dict[str, list[names.Row]] = {}
    for row in names.rows(model):
        if row.path.endswith("/kernel"):
            found.setdefault(row.name.removesuffix(".weight"), []).append(row)
    return tuple(Layer(name, tuple(rows)) for name, rows in found.items())


def read(folder: str | Path, model: names.Model) -> tuple[LoRA, Adapters]:
    """The settings of an adapter of PEFT, and its arrays by our paths.

    `UserError` if it is none, if it is more than plain LoRA, or if a tensor has no place in the
    model, has no partner or has another shape.
    """
    place = Path(folder).expanduser()
    shown = printable(str(place))
    if not (place / CONFIG).is_file():
        raise UserError(f"{shown}: has no {CONFIG}; give the folder of a PEFT adapter")
    said = safetensors_files.read_json(place / CONFIG)
    _check_plain(shown, said)
    weights = place / WEIGHTS
    if not weights.is_file() and (place / "adapter_model.bin").is_file():
        weights = place / "adapter_model.bin"  # refused there
    stored = safetensors_files.open_weights(weights)
    pairs = _pairs(shown, stored.tensors, model)
    rank = max(a.shape[0] for a, _ in pairs.values())
    lora = LoRA(
        rank=rank,
        alpha=float(said.get("lora_alpha", 8)),
        rank_stabilized=bool(said.get("use_rslora", False)),
        dropout=float(said.get("lora_dropout", 0.0)),
    )
    found: Adapters = {}
    for layer in layers_of(model):
        if layer.name in pairs:
            a_RI, b_OR = (part.read().astype(np.float32) for part in pairs[layer.name])
            scale = _scale(said, layer.name, a_RI.shape[0]) / lora.scale
            found |= dict(_ours(layer, a_RI, b_OR * np.float32(scale), rank))
    return dataclasses.replace(lora, pattern=_patterns(model, found)), found


def write(
    folder: str | Path, model: names.Model, adapters: tree.PyTree, lora: LoRA, *, base: str = ""
) -> int:
    """Writes a folder that PEFT loads, whole or not at all; how many layers have an adapter.

    `adapters` may be the whole tree of parameters: only adapters are taken. `base` is where PEFT
    shall look for the model itself. `UserError` for an adapter of a layer that Hugging Face's model
    does not have.
    """
    flat = {
        path: np.asarray(leaf)
        for path, leaf in tree.flatten(adapters).items()
        if re.search(ADAPTERS, path)
    }
    left = {path.rpartition("/")[0] for path in flat}
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for layer in layers_of(model):
        here = [row for row in layer.rows if row.path.removesuffix("/kernel") in left]
        if here:
            a_RI, b_OR = _theirs(layer, flat, lora.rank)
            left -= {row.path.removesuffix("/kernel") for row in here}
            tensors[f"{PREFIX}{layer.name}.lora_A.weight"] = a_RI
            tensors[f"{PREFIX}{layer.name}.lora_B.weight"] = b_OR
            ranks[layer.name] = a_RI.shape[0]
    if left or not tensors:
        what = f"no layer of Hugging Face's: {', '.join(sorted(left))}" if left else "no adapters"
        raise UserError(f"adapters of {type(model).__name__}: {what}; train some with --lora")
    config = _config(model, lora, ranks, base)
    specs = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    safetensors_files.write(
        folder, specs, tensors.items(), config=config, config_name=CONFIG, weights_name=WEIGHTS
    )
    return len(ranks)


def _check_plain(shown: str, said: Mapping[str, Any]) -> None:
    if said.get("peft_type") != "LORA":
        raise UserError(f"{shown}: is of the kind {said.get('peft_type')}, not LORA; {REMEDY}")
    for name, value in said.items():
        if name in READ | HARMLESS or (name not in PLAIN and _is_off(value)):
            continue
        if name not in PLAIN and name not in OFF:
            known = (*READ, *HARMLESS, *PLAIN, *OFF)
            raise UserError(
                f"{shown}: {CONFIG}: {name}={value!r}: not a setting of LoRA that we know"
                f"{did_you_mean(name, known)}; take it out if it changes no number, or {REMEDY}"
            )
        if value not in PLAIN.get(name, ()):
            raise UserError(
                f"{shown}: {CONFIG}: {name}={value!r} is more than LoRA here has; {REMEDY}"
            )


def _is_off(value: Any) -> bool:
    """Whether a setting says nothing: null, false, or empty."""
    return value is None or value is False or value in ("", [], {})


Pairs = dict[str, tuple[lazy.Lazy, lazy.Lazy]]


def _pairs(shown: str, tensors: Mapping[str, lazy.Lazy], model: names.Model) -> Pairs:
    """A and B of each layer of theirs, checked against the model."""
    layers = {layer.name: layer for layer in layers_of(model)}
    own = next(iter(layers)).partition(".")[0]
    found: dict[str, dict[str, lazy.Lazy]] = {}
    odd: list[str] = []
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight", name)
        layer = match[1] if match else ""
        # an adapter of the model without its head has names without the first word
        layer = layer if layer in layers or f"{own}.{layer}" not in layers else f"{own}.{layer}"
        if match is None or layer not in layers:
            odd.append(name)
        else:
            lazy.check_floating(shown, name, tensor)
            found.setdefault(layer, {})[match[2]] = tensor
    if odd:
        more = f", ... and {len(odd) - MOST_NAMED} more" if len(odd) > MOST_NAMED else ""
        raise UserError(
            f"{shown}: {', '.join(odd[:MOST_NAMED])}{more} belong to no dense layer of"
            f" {type(model).__name__}; give the adapter's own base model, or {REMEDY}"
        )
    if not found:
        raise UserError(f"{shown}: holds no adapters; give the folder of a PEFT adapter")
    pairs: Pairs = {}
    for name, parts in found.items():
        into, out = _sizes(layers[name])
        shapes = {part: tensor.shape for part, tensor in parts.items()}
        rank = shapes.get("A", (0,))[0]
        if shapes != {"A": (rank, into), "B": (out, rank)}:
            raise UserError(
                f"{shown}: {name} has {shapes}, must be A (rank, {into}) and B ({out}, rank); give"
                " the adapter's own base model"
            )
        pairs[name] = parts["A"], parts["B"]
    return pairs


def _sizes(layer: Layer) -> tuple[int, int]:
    """What enters a layer of theirs, and what leaves it."""
    first = layer.rows[0]
    return first.stored[::-1] if first.transposed else first.stored  # pyright: ignore


def _dims(row: names.Row, into: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dims of a kernel of ours that enter, and those that leave."""
    count = next(n for n in range(len(row.shape)) if math.prod(row.shape[:n]) == into)
    return row.shape[:count], row.shape[count:]


def _scale(said: Mapping[str, Any], name: str, rank: int) -> float:
    """What PEFT multiplies the product of a layer by."""
    alpha = float(_of_pattern(said.get("alpha_pattern"), name, said.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)


def _of_pattern(patterns: Any, name: str, default: Any) -> Any:
    """The value of the first pattern that a layer's name ends in, as PEFT looks for it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf".*(\.|^)({pattern})$", name):
            return value
    return default


def _ours(
    layer: Layer, a_RI: np.ndarray, b_OR: np.ndarray, rank: int
) -> Iterator[tuple[str, np.ndarray]]:
    fill = rank - a_RI.shape[0]
    a_IR = np.pad(a_RI, ((0, fill), (0, 0))).T
    b_RO = np.pad(b_OR, ((0, 0), (0, fill))).T
    for row in layer.rows:
        path = row.path.removesuffix("kernel")
        into, out = _dims(row, a_IR.shape[0])
        index, count = row.part
        size = b_RO.shape[1] // count
        part = b_RO[:, index * size : (index + 1) * size]
        yield f"{path}lora_a", np.ascontiguousarray(a_IR.reshape(*into, rank))
        yield f"{path}lora_b", np.ascontiguousarray(part.reshape(rank, *out))


def _theirs(
    layer: Layer, flat: Mapping[str, np.ndarray], rank: int
) -> tuple[np.ndarray, np.ndarray]:
    into, out = _sizes(layer)
    parts: list[tuple[int, np.ndarray, np.ndarray]] = []
    for row in layer.rows:
        path = row.path.removesuffix("kernel")
        if f"{path}lora_a" in flat:
            a_IR = flat[f"{path}lora_a"].reshape(into, rank)
            parts.append((row.part[0], a_IR, flat[f"{path}lora_b"].reshape(rank, -1)))
    size = out // layer.rows[0].part[1]
    if len(parts) > 1 and all(np.array_equal(a_IR, parts[0][1]) for _, a_IR, _ in parts):
        a_IR = parts[0][1]
        b_RO = np.zeros((rank, out), a_IR.dtype)
        for index, _, part in parts:
            b_RO[:, index * size : (index + 1) * size] = part
    else:
        a_IR = np.concatenate([a_IR for _, a_IR, _ in parts], axis=1)
        b_RO = np.zeros((rank * len(parts), out), a_IR.dtype)
        for place, (index, _, part) in enumerate(parts):
            b_RO[place * rank : (place + 1) * rank, index * size : (index + 1) * size] = part
    return np.ascontiguousarray(a_IR.T), np.ascontiguousarray(b_RO.T)


def _config(model: names.Model, lora: LoRA, ranks: Mapping[str, int], base: str) -> dict[str, Any]:
    """`adapter_config.json`, with every layer by its whole name."""
    wide = {name: rank for name, rank in ranks.items() if rank != lora.rank}
    kind = "FEATURE_EXTRACTION" if type(model).__name__ == "Encoder" else "CAUSAL_LM"
    return {
        "peft_type": "LORA",
        "task_type": kind,
        "base_model_name_or_path": base or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilized,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(ranks),
        # as large as it takes to keep the scale
        "rank_pattern": {re.escape(name): rank for name, rank in wide.items()},
        "alpha_pattern": {
            re.escape(name): lora.scale * (math.sqrt(rank) if lora.rank_stabilized else rank)
            for name, rank in wide.items()
        },
        "bias": "none",
        "use_dora": False,
        "fan_in_fan_out": not next(iter(layers_of(model))).rows[0].transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _patterns(model: names.Model, found: Adapters) -> tuple[str, ...]:
    """Patterns of our paths that name the layers with adapters, and no others."""
    have = {path.rpartition("/")[0] for path in found}
    dense = {row.path.rpartition("/")[0] for layer in layers_of(model) for row in layer.rows}
    patterns: list[str] = []
    for path in sorted(have):
        _, block, part = path.partition("/") if path.startswith("block") else ("", "", path)
        everywhere = f"(^|/){part}$" if block else f"^{path}$"
        alike = {other for other in dense if re.search(everywhere, other)}
        pattern = everywhere if alike <= have else f"^{path}$"
        if pattern not in patterns:
            patterns.append(pattern)
    return tuple(patterns)
