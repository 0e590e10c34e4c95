"""Warm starts: which stored array becomes which variable of a new model, by ordered rules over
slash paths.

A rule is PATTERN=VALUE, as in `--init_rules='head=skip,encoder=backbone'`. A stored path meets the
rules in their order. `skip` leaves the array out, and a variable of the new model whose path it
matches stays new; `resize` interpolates position embeddings; any other value is a new name, put
where the pattern was found (`re.sub`, once), and the rules after it see that name. Everything that
is left must fit: every stored array has a place, every variable an array, of one shape.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtrain import messages, tree
from jaxtrain.checkpoints import arrays, former_layouts, positions
from jaxtrain.checkpoints.arrays import Specs
from jaxtrain.errors import UserError
from jaxtrain.tree import Rules

FLAG = "--init_rules"
SKIP = "skip"
WORDS = (SKIP, positions.RESIZE)


@dataclasses.dataclass(frozen=True)
class Row:
    """What becomes of one variable, or of one stored array."""

    path: str
    """In the new model; of a skipped array its own."""
    what: str
    """taken, resized, new or skipped."""
    source: str
    """The stored path; empty for a new variable."""
    shape: tuple[int, ...]
    cast: str = ""
    """Its dtype before and after, if they differ."""
    note: str = ""
    """How it was resized."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a warm start takes, before anything is read."""

    rows: tuple[Row, ...]
    wanted: Specs
    resizes: Mapping[str, positions.Resize]
    """By the path in the new model."""

    @property
    def notes(self) -> list[str]:
        """A line on dtypes that differ."""
        casts: dict[str, list[str]] = {}
        for row in self.rows:
            if row.cast:
                casts.setdefault(row.cast, []).append(row.path)
        return [
            f"{len(paths)} array{'s' if len(paths) > 1 else ''} cast from {cast}, e.g. {paths[0]}"
            for cast, paths in casts.items()
        ]

    def count(self, what: str) -> int:
        """How many arrays are taken, resized, new or skipped."""
        return sum(row.what == what for row in self.rows)

    def values(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays of the variables that are not new, by their paths in the new model; those that
        are still in a file stay there unless they are resized. `UserError` for a value that the new
        dtype cannot hold."""
        found: dict[str, Any] = {}
        for row in self.rows:
            if row.what not in ("taken", "resized"):
                continue
            value, dtype = stored[row.source], np.dtype(jnp.dtype(_plain(self.wanted, row.path)))
            if row.path in self.resizes:
                value = self.resizes[row.path].of(np.asarray(value))
            if not isinstance(value, np.ndarray):
                found[row.path] = value  # cast, and looked at, as it is read
                continue
            with np.errstate(over="ignore"):
                cast = value.astype(dtype)
            if cast.dtype != value.dtype and not np.isfinite(cast).all():
                raise UserError(f"{row.path}: values of {value.dtype} do not fit into {dtype}")
            found[row.path] = cast
        return found


def plan(
    stored: Specs,
    wanted: Specs,
    rules: Rules[str] = (),
    *,
    what: str = "the stored model",
    images: tuple[positions.Grid | None, positions.Grid | None] = (None, None),
) -> Plan:
    """What becomes of every array of `stored` and every variable of `wanted`.

    >>> stored = {"params/head/kernel": ["float32", [4, 10]], "params/a": ["float32", [4]]}
    >>> wanted = {"params/head/kernel": ["float32", [4, 3]], "params/a": ["float32", [4]]}
    >>> [(row.path, row.what) for row in plan(stored, wanted, (("head", "skip"),)).rows][:2]
    [('params/head/kernel', 'new'), ('params/a', 'taken')]
    >>> plan(stored, wanted)
    Traceback (most recent call last):
    ...
    jaxtrain.errors.UserError: the stored model does not fit the model: missing: none, extra: none,
    shape: params/head/kernel (4,10) vs (4,3); to go on without: --init_rules='head=skip'

    `images` are height and width of the images that the stored and the new model see, if they do.
    `UserError` for a rule that is of no use, and for whatever does not fit, with the rules that
    would leave it out.
    """
    if said := former_layouts.fused_attention(stored, wanted):
        raise UserError(f"{what} {said}")
    decided = _follow(stored, wanted, rules)
    _check_doubles(decided)
    fitting = {
        source: path for source, (path, _) in decided.items() if path is not None and path in wanted
    }
    # what is left out is no misfit
    fresh = _left_new(wanted, rules)
    left = {path: stored[source] for source, (path, _) in decided.items() if path is not None}
    resizes = {
        path: positions.Resize.between(
            path, word, stored[source][1], wanted[path][1], images=images
        )
        for source, (path, word) in decided.items()
        if word and path is not None and path in wanted
    }
    still = {path: spec for path, spec in wanted.items() if path in left or path not in fresh}
    shaped = {
        path: [spec[0], wanted[path][1]] if path in resizes else spec for path, spec in left.items()
    }
    _check_fit(shaped, still, rules, what=what, images=images[1])
    rows = _rows(stored, wanted, decided, fitting, resizes)
    if not fitting:
        raise UserError(f"{what}: nothing is left to take; drop {FLAG}, or the warm start")
    return Plan(tuple(rows), wanted, resizes)


def as_flag(rules: Rules[str]) -> str:
    """Rules as they are typed.

    >>> as_flag((("head", "skip"), ("pos", "resize")))
    "--init_rules='head=skip,pos=resize'"
    """
    return f"{FLAG}='{','.join(f'{pattern}={value}' for pattern, value in rules)}'"


Decided = dict[str, tuple[str | None, str]]
"""By stored path: the path in the new model, None if it is left out; and how it is resized."""


def _follow(stored: Specs, wanted: Specs, rules: Rules[str]) -> Decided:
    """What the rules make of every stored path; `UserError` for a rule that decides nothing, and
    for a new name that leads nowhere."""
    compiled = [(tree.compile_pattern(pattern, FLAG), value) for pattern, value in rules]
    used: set[int] = set()
    led: dict[int, list[str]] = {}
    decided: Decided = {}
    for source in stored:
        path, word, passed = source, "", []
        for number, (pattern, value) in enumerate(compiled):
            if not pattern.search(path):
                continue
            used.add(number)
            if _is_word(value):
                word = value
                break
            path = _renamed(pattern, value, path)
            passed.append(number)
        for number in passed:
            led.setdefault(number, []).append(path)
        decided[source] = (None, "") if word == SKIP else (path, word)
    for number, (pattern, value) in enumerate(compiled):
        if value == SKIP and any(map(pattern.search, wanted)):
            used.add(number)
    for number, (pattern, value) in enumerate(rules):
        if number not in used:
            raise UserError(_of_no_use(pattern, value, [*stored, *wanted]))
        paths = led.get(number)
        if paths and not any(path in wanted for path in paths):
            near = messages.did_you_mean(value, [*WORDS, *_names(wanted)])
            raise UserError(
                f"{FLAG}: {pattern}={value}: the new model has no {paths[0]}{near}"
                f" (paths: {_some(list(wanted))})"
            )
    return decided


def _is_word(value: str) -> bool:
    return value == SKIP or value.partition(":")[0] == positions.RESIZE


def _renamed(pattern: re.Pattern[str], value: str, path: str) -> str:
    try:
        return pattern.sub(value, path, count=1)
    except (re.error, IndexError) as error:
        raise UserError(
            f"{FLAG}: {pattern.pattern}={value}: no such group ({error}); put what it stands for in"
            " the pattern into ( )"
        ) from error


def _of_no_use(pattern: str, value: str, paths: Sequence[str]) -> str:
    known = list(dict.fromkeys(paths))
    near = messages.did_you_mean(pattern, [*_names(known), *known])
    return f"{FLAG}: {pattern}={value}: no path holds {pattern!r}{near} (paths: {_some(known)})"


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:6]) + (", ..." if len(paths) > 6 else "")


def _names(paths: Iterable[str]) -> list[str]:
    """The parts of all paths, each once."""
    return list(dict.fromkeys(part for path in paths for part in path.split("/")))


def _left_new(wanted: Specs, rules: Rules[str]) -> set[str]:
    """The variables that a rule leaves new."""
    skips = [tree.compile_pattern(pattern, FLAG) for pattern, value in rules if value == SKIP]
    return {path for path in wanted if any(pattern.search(path) for pattern in skips)}


def _check_doubles(decided: Decided) -> None:
    by_path: dict[str, str] = {}
    for source, (path, _) in decided.items():
        if path is None:
            continue
        if path in by_path:
            raise UserError(
                f"{FLAG}: {by_path[path]} and {source} both become {path}; skip one of them first:"
                f" '{_pattern([source], [other for other in decided if other != source])}=skip'"
            )
        by_path[path] = source


def _check_fit(
    left: Specs,
    wanted: Specs,
    rules: Rules[str],
    *,
    what: str,
    images: positions.Grid | None,
) -> None:
    """`UserError` for arrays without a place, variables without an array, and other shapes and
    kinds of numbers, with the rules that would mend it."""
    unfit = {path for path in {*left, *wanted} if path not in left or path not in wanted}
    shared = [path for path in wanted if path in left]
    misshapen = [path for path in shared if left[path][1] != wanted[path][1]]
    kinds = [path for path in shared if not arrays.castable(left[path][0], wanted[path][0])]
    if not (unfit or misshapen or kinds):
        return
    text = arrays.misfit(left, wanted) or "the kinds of numbers differ"
    text += "".join(
        f"; {path} is {left[path][0]}, the model wants {wanted[path][0]}" for path in kinds[:1]
    )
    transposed = [path for path in misshapen if left[path][1] == wanted[path][1][::-1]]
    if transposed:
        text += f"; {transposed[0]} looks transposed, and nothing is turned on the way"
    resizable = {
        path
        for path in misshapen
        if images is not None and positions.looks_like(path, left[path][1], wanted[path][1])
    }
    bad = (unfit | {*misshapen} | {*kinds}) - resizable
    fine = [path for path in shared if path not in bad and path not in resizable]
    if not fine:
        raise UserError(f"{what} does not fit the model: {text}; nothing fits: is it the model?")
    more = [(pattern, SKIP) for pattern in _patterns(bad, [*fine, *resizable])]
    more += [
        (_pattern([path], [*fine, *bad, *(resizable - {path})]), positions.RESIZE)
        for path in sorted(resizable)
    ]
    raise UserError(
        f"{what} does not fit the model: {text}; to go on without: {as_flag((*rules, *more))}"
    )


def _plain(specs: Specs, path: str) -> str:
    """The dtype of an array, of a random key that of its data."""
    dtype = specs[path][0]
    return "uint32" if dtype.startswith("key<") else dtype


def _patterns(bad: Iterable[str], fine: Sequence[str]) -> list[str]:
    """The shortest patterns that match all of the bad paths and none of the fine ones."""
    heads: dict[str, list[str]] = {}
    for path in sorted(bad):
        parts = path.split("/")
        folders = ("/".join(parts[:end]) for end in range(2, len(parts) + 1))
        head = next(
            (
                head
                for head in folders
                if not any(f"{other}/".startswith(f"{head}/") for other in fine)
            ),
            path,
        )
        heads.setdefault(head.rpartition("/")[2], []).append(path)
    found: list[str] = []
    for paths in heads.values():
        if not all(any(re.search(pattern, path) for pattern in found) for path in paths):
            found.append(_pattern(paths, fine))
    return found


def _pattern(paths: Sequence[str], fine: Sequence[str]) -> str:
    """A pattern that is found in all of the paths and in none of the fine ones."""
    shared = paths[0].split("/")
    for path in paths[1:]:
        shared = [part for part in shared if part in path.split("/")]
    whole = "|".join(f"^{_escaped(path)}$" for path in paths)
    names = [_escaped(part) for part in shared[1:]]
    candidates = [*names, *(f"{name}/" for name in names), *(f"/{name}/" for name in names)]
    candidates += [_escaped(paths[0]), f"{_escaped(paths[0])}$"] if len(paths) == 1 else []
    for candidate in candidates:
        if all(re.search(candidate, path) for path in paths) and not any(
            re.search(candidate, path) for path in fine
        ):
            return candidate
    return whole


def _escaped(text: str) -> str:
    """Text as a pattern that a flag can hold: a comma would end its rule."""
    return re.escape(text).replace(",", ".").replace("'", ".")


def _rows(
    stored: Specs,
    wanted: Specs,
    decided: Decided,
    fitting: Mapping[str, str],
    resizes: Mapping[str, positions.Resize],
) -> list[Row]:
    """The table: the variables of the new model in their order, then what is left out."""
    sources = {path: source for source, path in fitting.items()}
    rows = []
    for path, (dtype, shape) in wanted.items():
        if path not in sources:
            rows.append(Row(path, "new", "", tuple(shape)))
            continue
        source = sources[path]
        cast = "" if stored[source][0] == dtype else f"{stored[source][0]} to {dtype}"
        what, note = ("resized", str(resizes[path])) if path in resizes else ("taken", "")
        rows.append(Row(path, what, source, tuple(shape), cast, note))
    skipped = [source for source, (path, _) in decided.items() if path is None]
    return rows + [Row(path, "skipped", path, tuple(stored[path][1])) for path in skipped]
