"""Demonstrations as a TensorFlow data set on ArrayRecord files, written and read without
TensorFlow.

One example is one demonstration tree; a config a method. Out of this library the files read as

    tfds.builder_from_directory("runs/nano/data/demonstrations/apr/1.0.0").as_data_source("train")

Random access by index is cheap (`TreeSource`), so nothing has to be loaded whole.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from apr_jax.data.demonstrate import Example
from apr_jax.errors import UserError
from apr_jax.io.library_errors import is_of_machine, what_went_wrong
from apr_jax.tasks import METHODS

# What each feature holds. How many bits its integers have depends on the data set:
# `demonstrate.stored_types`.
MEANINGS = {
    "tokens": "token ids of all threads, one thread after the other, in thread index order",
    "position": "place of each token in its thread's window",
    "hidden_block": "0, or the spawn block of its thread that the token belongs to, from 1",
    "sampled": "1 where the demonstrator chose the token, 0 where it was given",
    "length": "tokens of each thread",
    "parent": "thread index of each thread's parent, -1 for the root",
    "round": "which of the parent's spawns made the thread",
    "depth": "0 for the root",
    "child": "place among the children of that spawn",
}


def features(types: Mapping[str, np.dtype]) -> dict[str, tfds.features.Tensor]:
    """The features of a data set whose integers have the given types."""
    # "bytes" keeps the small type; the default would store every number as a 64-bit varint.
    return {
        name: tfds.features.Tensor(
            shape=(None,), dtype=types[name].type, encoding="bytes", doc=meaning
        )
        for name, meaning in MEANINGS.items()
    }


Source = Callable[[], Iterator[Example]]


def config_name(method: str) -> str:
    """TFDS allows letters, digits and underscores only: `sos+` becomes `sos_plus`, `apr-nested`
    `apr_nested`.
    """
    return method.replace("+", "_plus").replace("-", "_")


class Demonstrations(tfds.core.GeneratorBasedBuilder):
    """The data set of one method.

    Args:
      sources: for each split what yields its examples, in the order in which they will be stored.
      types: of each feature's integers.
      kwargs: of every TFDS builder; `config` is one of the methods' names.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 - TFDS wants a class attribute.
        tfds.core.BuilderConfig(name=config_name(method), description=f"demonstrations by {method}")
        for method in METHODS
    ]

    def __init__(
        self, *, sources: Mapping[str, Source], types: Mapping[str, np.dtype], **kwargs: Any
    ):
        self._sources = sources
        self._types = types
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Symbolic searches for Countdown solutions as trees of threads.",
            features=tfds.features.FeaturesDict(features(self._types)),
            # The pipeline shuffles, anew each epoch; on disk demonstration k is example k.
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, Example]]]:
        del dl_manager
        return {split: self._generate_examples(source) for split, source in self._sources.items()}

    def _generate_examples(self, source: Source) -> Iterator[tuple[int, Example]]:
        yield from enumerate(source())


def directory(data_dir: Path, method: str) -> Path:
    """Where the examples of a method are."""
    return data_dir / "demonstrations" / config_name(method) / str(Demonstrations.VERSION)


def write(
    data_dir: Path, method: str, sources: Mapping[str, Source], types: Mapping[str, np.dtype]
) -> None:
    """Writes the examples of one method; they appear at `directory` when all are there, or not at
    all.

    Args:
      sources: for each split what yields its examples.
      types: of each feature's integers.

    Raises:
      UserError: they cannot be written, for example because the disk is full.
    """
    tfds.disable_progress_bar()  # Ours counts demonstrations, whatever TFDS does with them.
    builder = Demonstrations(
        sources=sources,
        types=types,
        data_dir=data_dir,
        config=config_name(method),
        file_format=tfds.core.FileFormat.ARRAY_RECORD,
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces downloads; there are none.
            builder.download_and_prepare()
    except RuntimeError as error:  # How array_record reports a full disk.
        raise UserError(
            f"data {data_dir}: cannot write demonstrations of {method!r}: {error}"
        ) from None


class TreeSource:
    """Random access to a split: `len(source)` and `source[k]` -> feature name to array.

    TFDS's own data source parses every feature in 0.09 ms an example; this parses the wanted ones
    in 0.02 ms.

    Args:
      path: a directory of this builder.
      split: "train" or "validation".
      names: features that are wanted.

    Raises:
      UserError: of `source[k]`, if the file is damaged there. Each chunk has a sum and is read when
        it is asked for, which may be in the middle of a training.
    """

    def __init__(self, path: Path, split: str, names: tuple[str, ...]):
        self._path, self._split = path, split
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        stored = tfds.builder_from_directory(path)
        self._records = stored.as_data_source(split, deserialize_method=raw)
        self._dtypes = {name: stored.info.features[name].np_dtype for name in names}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, k: SupportsIndex) -> Example:
        try:
            return self.parse(k)
        except (
            Exception
        ) as error:  # array_record and protobuf raise all sorts of types for damaged bytes.
            files = ", ".join(
                sorted(str(file) for file in self._path.glob(f"*-{self._split}.array_record*"))
            )
            raise UserError(
                f"{files or self._path}: demonstration {int(k)} is damaged"
                f" ({type(error).__name__}); delete {self._path} and run `apr data build` again"
            ) from None

    def parse(self, k: SupportsIndex) -> Example:
        """Demonstration k; raises whatever the libraries do if it is damaged."""
        stored = tf_example_pb2.Example.FromString(self._records[k]).features.feature
        return {
            name: np.frombuffer(stored[name].bytes_list.value[0], dtype)
            for name, dtype in self._dtypes.items()
        }


def read(
    data_dir: Path, method: str, split: str, names: tuple[str, ...] = tuple(MEANINGS)
) -> TreeSource:
    """The examples of a split.

    Raises:
      UserError: there is no such data set, or it is damaged.
    """
    path = directory(data_dir, method)
    try:
        source = TreeSource(path, split, names)
        source.parse(len(source) - 1)  # A file that is cut off shows at its end.
        return source
    except (
        Exception
    ) as error:  # TFDS and array_record raise all sorts of types for a missing or damaged file.
        if is_of_machine(error):
            raise UserError(
                f"data {path}: cannot be read here and now ({what_went_wrong(error)})"
            ) from None
        raise UserError(
            f"data {data_dir}: holds no readable {split} demonstrations of method {method!r}"
            f" ({path}: {type(error).__name__}); delete the folder and run `apr data build --out"
            f" {data_dir}`"
        ) from None
