"""Whatever lies at a path: arrays, a folder of images or of records, told by its files, with
held-out parts cut off where it has none."""

import dataclasses
import pathlib
from typing import Annotated, Any, Literal

import numpy as np

from jaxtrain import extras, messages
from jaxtrain.data.checks import named_splits
from jaxtrain.data.sources import arrays, images
from jaxtrain.data.sources.digits import stratified_rows
from jaxtrain.data.sources.records import Records
from jaxtrain.data.splits import Splits, choose
from jaxtrain.data.table import ArrayTable, Table, select
from jaxtrain.errors import UserError
from jaxtrain.fields import AtLeast, Public

LARGEST_SIDE = 64
"""Images are cut to their own size, but to no more than this, unless --data.size says so."""
_LABELS = ("label", "target")
_TEXT_TABLES = (".csv", ".tsv", ".txt", ".xls", ".xlsx", ".parquet", ".json", ".jsonl")


@dataclasses.dataclass(frozen=True)
class Own:
    """A file or folder of one's own.

    >>> Own(path="my.npz", split_seed=1).test
    'test'

    An .npz or .npy file or a folder of .npy files is read as `Arrays`, a folder of class folders as
    `Images`, a folder with dataset.json as `Records`. Without a test split a fifth of the train
    split is held out, by class where there are classes; without a validation split a tenth of the
    rest.
    """

    path: str = ""
    """An .npz or .npy file, or a folder of .npy files, of a folder of images for each class, or of
    records"""
    split_seed: Annotated[int, AtLeast(0)] = 0
    """Which part is held out where there is none; the same for every --seed"""
    image_key: Annotated[str, Public()] = ""
    """Of arrays: name of the inputs; empty for the usual names"""
    label_key: Annotated[str, Public()] = ""
    """Of arrays: name of the labels; empty for the usual names"""
    image_range: tuple[float, float] | None = None
    """Lowest and highest value that pixels can have, where their type does not say it"""
    size: tuple[int, int] | None = None
    """Of image files: height and width; none for their own, up to 64"""
    color: Literal["auto", "rgb", "gray"] = "auto"
    """Of image files: three channels or one; auto by the first files"""
    train: str = "train"
    """Split to train on"""
    validation: str = "validation"
    """Split to evaluate on while training; empty for none"""
    test: str = "test"
    """Split to evaluate on at the end; empty for none"""

    def open(self) -> Splits:
        """Opens what lies there and cuts the held-out parts; `UserError` if it is no data set."""
        source, there = self._source()
        opened: Splits = dataclasses.replace(
            source,
            train="train",
            validation="validation" if "validation" in there else "",
            test="test" if "test" in there else "",
        ).open()
        found = {"train": opened.train, "validation": opened.validation, "test": opened.test}
        tables: dict[str, Table] = {
            name: _as_features(table) for name, table in found.items() if table is not None
        }
        notes, fingerprint = list(opened.notes), opened.fingerprint
        for name in ("validation", "test"):
            if name in tables and not _has_labels(tables[name], tables["train"]):
                notes.append(f"{name} has no labels; left out, a part of train is held out instead")
                del tables[name]
        wanted = named_splits((self.train, self.validation, self.test))
        cut = [name for name in ("test", "validation") if name in wanted and name not in tables]
        if cut:
            fingerprint += f", split_seed {self.split_seed}"
            tables |= hold_out(tables["train"], self.split_seed, *cut)
        chosen = choose(
            tables,
            train=self.train,
            validation=self.validation,
            test=self.test,
            fingerprint=fingerprint,
            modified_ns=opened.modified_ns,
            origin=f"--data.path={self.path!r}",
            ranges=self.image_range is None,
        )
        notes = tuple(dict.fromkeys([*notes, *chosen.notes]))
        return dataclasses.replace(chosen, notes=notes)

    def _source(self) -> tuple[Any, set[str]]:
        """The source that reads what lies there, and the splits that it has."""
        place, origin = pathlib.Path(self.path).expanduser(), f"--data.path={self.path!r}"
        if not self.path or not place.exists():
            near = messages.did_you_mean_path(str(place)) if self.path else ""
            what = "no such file or folder" if self.path else "no file given"
            remedy = "; give an .npz file, or a folder of images for each class"
            raise UserError(f"{origin}: {what}{near or remedy}")
        if place.suffix.lower() in _TEXT_TABLES and place.is_file():
            raise UserError(f"{origin}: {_save_as_npz(self.path)}")
        if place.is_file() or any(place.glob("*.npy")):
            source = arrays.Arrays(
                path=self.path,
                image_key=self.image_key,
                label_key=self.label_key,
                image_range=self.image_range,
            )
            return source, arrays.splits_of(self.path)
        if (place / "dataset.json").is_file():
            source = Records(path=self.path)
            return source, source.splits()
        texts = sorted(file for file in place.iterdir() if file.suffix.lower() in _TEXT_TABLES)
        there = images.splits_of(place)
        if texts and there is None:
            raise UserError(f"{origin}: {_save_as_npz(str(texts[0]))}")
        if there is None:
            raise UserError(
                f"{origin}: holds neither .npy files nor folders of images; give an .npz file, or a"
                " folder that holds a folder of images for each class"
            )
        return self._images(place), there

    def _images(self, place: pathlib.Path) -> images.Images:
        """Image files, in the size and colours that the first of them have."""
        extras.require("--data.path", "PIL")
        size, color = self.size, self.color
        if size is None or color == "auto":
            side, gray = images.first_look(place)
            side = max(1, min(side, LARGEST_SIDE))
            size = (side, side) if size is None else size
            color = ("gray" if gray else "rgb") if color == "auto" else color
        return images.Images(path=self.path, size=size, color=color, image_range=self.image_range)


def _save_as_npz(path: str) -> str:
    """What to do with a table of texts."""
    stem = pathlib.Path(path).with_suffix(".npz").name
    return (
        "tables of texts are not read; save arrays, in Python: import numpy as np; t ="
        f" np.genfromtxt({path!r}, delimiter=',', skip_header=1); np.savez({stem!r}, x=t[:, :-1],"
        " y=t[:, -1]) (classes: y=t[:, -1].astype(int)); then"
        f" --data.path={stem}"
    )


def _as_features(table: Table) -> Table:
    """The table with its `image` called `features`, if it is a row of floats: its columns have
    scales of their own, so that one mean and deviation of all would not do."""
    field = table.fields.get("image")
    if table.arrays is None or field is None or len(field.shape) != 1 or field.dtype.kind != "f":
        return table
    named = {("features" if name == "image" else name): a for name, a in table.arrays.items()}
    return ArrayTable(named, table.num_classes, table.class_names)


def _has_labels(table: Table, train: Table) -> bool:
    wanted = [name for name in _LABELS if name in train.fields]
    return all(name in table.fields for name in wanted)


def hold_out(train: Table, seed: int, *names: str) -> dict[str, Table]:
    """The train split without the parts that are held out, and these: of `test` a fifth (of every
    class, where there are classes), of `validation` a tenth of the rest.

    >>> from jaxtrain.data.table import ArrayTable
    >>> parts = hold_out(ArrayTable({"image": np.zeros((100, 2))}), 0, "test", "validation")
    >>> {name: len(table) for name, table in parts.items()}
    {'test': 20, 'validation': 8, 'train': 72}

    `UserError` if there are too few examples for it.
    """
    labels_N = _classes(train)
    if labels_N is not None:
        rest, test = stratified_rows(labels_N, seed)
    else:
        rows = np.random.RandomState(seed).permutation(len(train))
        rest, test = np.split(rows, [len(rows) - len(rows) // 5])
    parts = {}
    if "test" in names:
        parts["test"] = test
    else:
        rest = np.concatenate([rest, test])
        rest = np.random.RandomState(seed).permutation(rest)
    if "validation" in names:
        rest, parts["validation"] = np.split(rest, [len(rest) - len(rest) // 10])
    if not all(map(len, parts.values())):
        raise UserError(
            f"--data.path: {len(train)} examples are too few to hold out {' and '.join(names)};"
            f" give"
            f" {' and '.join(f'--data.{name}=' for name in names)} to do without"
        )
    # Sorted, so that files are read in their order.
    return {name: select(train, np.sort(rows)) for name, rows in (parts | {"train": rest}).items()}


def _classes(table: Table) -> np.ndarray | None:
    """The class of every row; None where rows have none, or not one each."""
    if "label" not in table.fields or table.fields["label"].shape or table.num_classes is None:
        return None
    if table.arrays is not None:
        labels_N = np.asarray(table.arrays["label"])
    elif isinstance(table, images.ImageTable):
        labels_N = table.labels_N
    else:
        return None
    return labels_N if len(labels_N) >= 2 and labels_N.min() >= 0 else None
