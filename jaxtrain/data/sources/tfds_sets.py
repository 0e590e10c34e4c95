"""Sets prepared by TensorFlow Datasets: read without TensorFlow where they are ArrayRecord files,
and with it (on the CPU) otherwise.

A set that fits into memory is loaded whole when opened; a larger one is read record by record,
ahead of the step.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import numpy as np

from jaxtrain import extras, messages
from jaxtrain.data import checks
from jaxtrain.data.sources.image_files import fit_pixels
from jaxtrain.data.sources.records import located, read_located
from jaxtrain.data.splits import Splits, choose, digest_of_files, newest_change
from jaxtrain.data.table import device_dtype, load, num_bytes, on_device
from jaxtrain.errors import UserError
from jaxtrain.fields import Public

_AUTO_BYTES = 2**30
_RANDOM_ACCESS = ("array_record",)


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A TFDS set by its name."""

    name: str = ""
    """Name of the set as TFDS knows it, e.g. fashion_mnist, imagenet2012 or cifar10:3.0.2"""
    data_dir: str = ""
    """Where TFDS keeps its sets; empty for TFDS's own default, ~/tensorflow_datasets"""
    download: bool = False
    """Whether to download and prepare a set that is not there"""
    image_key: Annotated[str, Public()] = "image"
    """Feature that holds the inputs"""
    label_key: Annotated[str, Public()] = "label"
    """Feature that holds the labels; empty for none"""
    size: tuple[int, int] | None = None
    """Height and width to which images are cut (at the centre) and resized; needed where they
    differ in size"""
    in_memory: Literal["auto", "yes", "no"] = "auto"
    """Whether to load the splits whole; auto does so up to 1 GiB"""
    train: str = "train"
    """Split to train on"""
    validation: str = ""
    """Split to evaluate on while training, e.g. train[90%:]; empty for none"""
    test: str = "test"
    """Split to evaluate on at the end; empty for none"""

    def open(self) -> Splits:
        """Finds the set (or prepares it), and loads it where it fits into memory."""
        builder = self._builder()
        describe = _Description.of(builder, self)
        file_format = builder.info.file_format.value
        table_class = RandomAccessTable if file_format in _RANDOM_ACCESS else TensorflowTable
        if table_class is TensorflowTable:
            _tensorflow(self.name, file_format)
        splits = builder.info.splits
        tables = {name: table_class(builder, name, describe) for name in splits}
        files = {
            path.name: pathlib.Path(path)
            for split in splits.values()
            for path in map(pathlib.Path, split.filepaths)
        }
        opened = choose(
            tables,
            train=self.train,
            validation=self.validation,
            test=self.test,
            fingerprint=digest_of_files(files),
            modified_ns=newest_change(files.values()),
            origin=f"--data.name={self.name}",
        )
        parts = {
            role: part
            for role in ("train", "validation", "test")
            if (part := getattr(opened, role)) is not None
        }
        if not self._loads(sum(map(num_bytes, parts.values())), table_class, file_format):
            return opened
        loaded = {role: load(part, chunk=16384) for role, part in parts.items()}
        origin = f"--data.name={self.name}"
        found = [*checks.check_values(loaded, origin), *checks.check_alike(loaded, origin)]
        notes = tuple(dict.fromkeys([*opened.notes, *found]))
        return dataclasses.replace(opened, notes=notes, **loaded)

    def _loads(self, size: int, table_class: type, file_format: str) -> bool:
        """Whether the parts are to be loaded whole."""
        wanted = self.in_memory == "yes" or (self.in_memory == "auto" and size <= _AUTO_BYTES)
        if not wanted and table_class is TensorflowTable:
            raise UserError(
                f"--data.name={self.name}: prepared as {file_format}, which can only be loaded"
                f" whole ({messages.bytes_text(size)}); pass --data.in_memory=yes, or prepare it"
                " with --file_format=array_record"
            )
        return wanted

    def _builder(self) -> Any:
        if not self.name:
            raise UserError("--data.name='': no set named; e.g. --data.name=fashion_mnist")
        extras.require(f"--data.name={self.name}", "tensorflow_datasets", "PIL")
        import tensorflow_datasets as tfds

        data_dir = str(pathlib.Path(self.data_dir).expanduser()) if self.data_dir else None
        core: Any = (
            tfds.core
        )  # both modules are there at run time; the package doesn't declare them
        try:
            return core.read_only_builder.builder_from_files(self.name, data_dir=data_dir)
        except (core.registered.DatasetNotFoundError, OSError) as error:
            if not self.download:
                raise UserError(self._missing(tfds)) from error
        return self._prepare(tfds, data_dir)

    def _missing(self, tfds: Any) -> str:
        """What to say of a set that is not there: an unknown name, or one that is not prepared."""
        data_dir = self.data_dir or "~/tensorflow_datasets"
        prepared = {
            path.parent.name for path in pathlib.Path(data_dir).expanduser().glob("[a-z]*/[0-9]*")
        }
        base = self.name.split(":")[0].split("/")[0]
        # the community list would be fetched
        known = {*tfds.list_builders(with_community_datasets=False), *prepared}
        if base not in known:
            return (
                f"--data.name={self.name!r}: unknown; prepared in {data_dir}:"
                f" {', '.join(sorted(prepared)) or 'none'}"
                f"{messages.did_you_mean(base, sorted(known))}"
            )
        run = (
            "scripts/prepare_fashion_mnist"
            if base == "fashion_mnist"
            else f"tfds build {base} --file_format=array_record"
        )
        remedy = f"run {run}, or pass --data.data_dir or --data.download"
        return (
            f"--data.name={self.name}: not in --data.data_dir={data_dir} and downloads are off;"
            f" {remedy}"
        )

    def _prepare(self, tfds: Any, data_dir: str | None) -> Any:
        """Downloads and prepares the set as ArrayRecord files."""
        try:
            builder = tfds.builder(self.name, data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare()
        except ImportError as error:
            remedy = "pip install tensorflow-cpu and what it names"
            raise UserError(
                f"--data.name={self.name}: preparing it needs more packages ({error}); {remedy}"
            ) from error
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--data.name={self.name}: cannot be downloaded and prepared"
                f" ({type(error).__name__}: {reason})"
            ) from error
        return builder


def _tensorflow(name: str, file_format: str) -> Any:
    """TensorFlow, kept off the GPUs, whose memory is for jax."""
    try:
        import tensorflow as tf
    except ImportError as error:
        wanted = extras.missing(
            f"--data.name={name}: prepared as {file_format}, which", "tensorflow"
        )
        raise UserError(f"{wanted}, or prepare it with --file_format=array_record") from error
    tf.config.set_visible_devices([], "GPU")
    return tf


@dataclasses.dataclass(frozen=True)
class _Description:
    """What one example of a set looks like, and how to make its record an example."""

    fields: Mapping[str, jax.ShapeDtypeStruct]
    keys: Mapping[str, str]
    size: tuple[int, int] | None
    num_classes: int | None
    class_names: tuple[str, ...] | None

    @classmethod
    def of(cls, builder: Any, source: Tfds) -> "_Description":
        features = builder.info.features
        keys = {"image": source.image_key} | (
            {"label": source.label_key} if source.label_key else {}
        )
        fields = {}
        for field, key in keys.items():
            if key not in features:
                raise UserError(
                    f"--data.{field}_key={key!r}: {source.name} has no such feature; valid:"
                    f" {', '.join(sorted(features))}{messages.did_you_mean(key, features)}"
                )
            shape = tuple(features[key].shape)
            if field == "image" and source.size is not None:
                shape = (*source.size, shape[-1] or 3)
            if None in shape:
                raise UserError(
                    f"--data.name={source.name}: {key} differs in shape between examples, {shape};"
                    " set --data.size=224,224"
                )
            dtype = np.dtype(features[key].np_dtype)
            if dtype.kind not in "uifb":
                raise UserError(
                    f"--data.{field}_key={key!r}: {source.name} has {dtype} there; expected"
                    " integers, floats or booleans; name another feature"
                )
            deep = field == "image" and dtype == np.uint16 and len(shape) == 3
            fields[field] = jax.ShapeDtypeStruct(
                shape, np.dtype("float32") if deep else device_dtype(dtype)
            )
        if "label" in fields and fields["label"].dtype.kind == "f":
            # Floats are no classes.
            fields["target"], keys["target"] = fields.pop("label"), keys.pop("label")
        label = features[source.label_key] if source.label_key else None
        num_classes = getattr(label, "num_classes", None)
        names = tuple(label.names) if label is not None and num_classes else None
        return cls(fields, keys, source.size, num_classes, names)

    def rows(self, examples: list[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """The columns of a list of TFDS examples; `UserError` if an integer does not fit into 32
        bits."""
        rows = {
            name: np.empty((len(examples), *field.shape), field.dtype)
            for name, field in self.fields.items()
        }
        for place, example in enumerate(examples):
            for name, key in self.keys.items():
                value = np.asarray(example[key])
                if name == "image":
                    value = _pixels(value, self.size, rows[name].dtype)
                elif value.dtype.kind in "iu":
                    value = on_device({key: value[None]}, lambda _: "a record")[key][0]
                rows[name][place] = value
        return rows


def _pixels(pixels: np.ndarray, size: tuple[int, int] | None, dtype: np.dtype) -> np.ndarray:
    """One image in its size; 16 bits become 0..1."""
    deep = pixels.dtype == np.uint16 and dtype.kind == "f"
    if size is not None:
        pixels = fit_pixels(pixels, size)
    return pixels / np.float32(65535) if deep else pixels


class RandomAccessTable:
    """A split in a format that reads without TensorFlow and in any order."""

    arrays = None

    def __init__(self, builder: Any, split: str, describe: _Description) -> None:
        info = builder.info.splits[split]
        self.fields, self.num_classes, self.class_names = (
            describe.fields,
            describe.num_classes,
            describe.class_names,
        )
        self._describe = describe
        self._files, self._counts = [str(path) for path in info.filepaths], list(info.shard_lengths)
        self._source = builder.as_data_source(split) if info.num_examples else ()

    def __len__(self) -> int:
        return sum(self._counts)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows at `indices`; `UserError` naming file and record if one is damaged."""
        return self._describe.rows(
            read_located(self._source, np.asarray(indices), self._files, self._counts)
        )

    def where(self, index: int) -> str:
        """The file that holds an example, and its number in there."""
        file, record = located(index, self._files, self._counts)
        return f"{file}: record {record}"


class TensorflowTable:
    """A split that only TensorFlow reads, and only in the order of its files: good for loading it
    whole."""

    arrays = None
    in_order = True
    """Nobody reads single rows of it; it is looked at when it is loaded."""

    def __init__(self, builder: Any, split: str, describe: _Description) -> None:
        self.fields, self.num_classes, self.class_names = (
            describe.fields,
            describe.num_classes,
            describe.class_names,
        )
        self._builder, self._split, self._describe = builder, split, describe

    def __len__(self) -> int:
        return self._builder.info.splits[self._split].num_examples

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows at `indices`, which must follow one another."""
        import tensorflow_datasets as tfds

        first, last = int(indices[0]), int(indices[-1])
        assert np.array_equal(indices, np.arange(first, last + 1)), (
            "TensorFlow's files are read in order only"
        )
        # One file after the other: the default interleaves them.
        config = tfds.ReadConfig(interleave_cycle_length=1)
        dataset = self._builder.as_dataset(
            split=f"{self._split}[{first}:{last + 1}]", read_config=config, shuffle_files=False
        )
        return self._describe.rows(list(tfds.as_numpy(dataset)))
