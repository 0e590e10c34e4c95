"""Layouts of parameters that models had once: a checkpoint that still has one is refused by name,
with a remedy, where a list of missing paths would leave its reader to guess."""

from collections.abc import Mapping, Sequence
from typing import Any

FUSED_ATTENTION_COMMIT = "d0abf79"
"""A commit of jaxtrain that reads checkpoints with one kernel for query, key and value."""


def fused_attention(
    stored: Mapping[str, Sequence[Any]], wanted: Mapping[str, Sequence[Any]]
) -> str:
    """What to say of stored arrays, by path as (dtype, shape), in which query, key and value are
    one kernel (D, 3, N, K), where the wanted ones have one (D, N, K) for each; otherwise nothing.

    >>> separate = {
    ...     f"attention/{name}/kernel": ["float32", [8, 2, 4]] for name in ("query", "key", "value")
    ... }
    >>> fused_attention({"attention/kernel": ["float32", [8, 3, 2, 4]]}, separate)[:66]
    'holds attention in a former layout: attention/kernel (8,3,2,4); no'
    >>> fused_attention(separate, separate)
    ''
    """
    found = [
        path
        for path, (_, shape) in stored.items()
        if len(shape) == 4
        and shape[1] == 3
        and path not in wanted
        and path.endswith("/kernel")
        and f"{path.removesuffix('kernel')}query/kernel" in wanted
    ]
    if not found:
        return ""
    # An optimizer's state and an average repeat the paths of the parameters.
    found = [path for path in found if path.startswith("params/")] or found
    first, more = found[0], f" and {len(found) - 1} more" if len(found) > 1 else ""
    folder, shape = first.removesuffix("kernel"), stored[first][1]
    return (
        f"holds attention in a former layout: {first} ({','.join(map(str, shape))}){more}; now"
        f" query, key and value have a kernel each, {folder}query/kernel, {folder}key/kernel and"
        f" {folder}value/kernel; train anew, or read it with jaxtrain's commit"
        f" {FUSED_ATTENTION_COMMIT}"
    )
