"""Demonstrations as a TensorFlow data set on ArrayRecord files, without TensorFlow.

One example is one demonstration tree, and each method is a config of the data set. Without this
library the files are read by

    tfds.builder_from_directory("runs/nano/data/demonstrations/apr/1.0.0").as_data_source("train")

Random access by index is cheap (`TreeSource`), so nothing has to be loaded whole. Nor is anything
held whole while it is written: a split is a row of files, its shards.
"""

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.proto import tf_example_pb2

from apr_jax.data.demonstrate import Example
from apr_jax.errors import UserError
from apr_jax.io.library_errors import is_of_machine, what_went_wrong

# Feature -> what it holds. How many bits its integers have depends on the data set:
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
    """Returns the features of a data set whose integers have the given types."""
    # "bytes" keeps the narrow type; the default would store every number as a 64-bit varint.
    return {
        name: tfds.features.Tensor(
            shape=(None,), dtype=types[name].type, encoding="bytes", doc=meaning
        )
        for name, meaning in MEANINGS.items()
    }


_SHARD_BYTES = 64 << 20  # A shard ends behind the example that makes it as large as this.

Source = Callable[[], Iterator[Example]]  # Yields the examples of a split.


def config_name(method: str) -> str:
    """Returns the name of a method as TFDS allows it: with letters, digits and underscores only.

    `sos+` becomes `sos_plus`, and `apr-nested` becomes `apr_nested`.
    """
    return method.replace("+", "_plus").replace("-", "_")


class Demonstrations(FileReaderBuilder):
    """The data set of one method.

    Args:
      sources: split -> function that yields its examples, in the order in which they are stored.
      types: feature -> type of its integers.
      kwargs: arguments of every TFDS builder; `config` is named for the method.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self, *, sources: Mapping[str, Source], types: Mapping[str, np.dtype], **kwargs: Any
    ):
        self._sources = sources
        self._types = types
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Demonstrations of a task as trees of threads.",
            features=tfds.features.FeaturesDict(features(self._types)),
            # The pipeline shuffles anew in each epoch. In the files, example k is demonstration k.
            disable_shuffling=True,
        )

    def _download_and_prepare(
        self,
        dl_manager: tfds.download.DownloadManager,
        download_config: tfds.download.DownloadConfig | None = None,
    ) -> None:
        del dl_manager, download_config
        self.info.set_splits(
            tfds.core.SplitDict([self._write_split(name) for name in self._sources])
        )

    def _write_split(self, name: str) -> tfds.core.SplitInfo:
        """Writes the examples of a split, shard after shard.

        TFDS's own builders would sort a split in memory, or have to know the number of shards
        beforehand.
        """
        template = self._get_filename_template(split_name=name)
        serializer = ExampleSerializer(self.info.features.get_serialized_info())
        writer = tfds.core.ExampleWriter(self.info.file_format)
        folder = Path(self.data_path)
        records = (
            _sorted(serializer.serialize_example(self.info.features.encode_example(example)))
            for example in self._sources[name]()
        )

        lengths: list[int] = []
        total_bytes = 0
        for shard in _shards(records):
            try:
                writer.write(folder / f"{name}.{len(lengths)}", enumerate(shard))
            except RuntimeError as error:  # array_record raises it, for example for a full disk.
                raise UserError(
                    f"data {self.data_dir_root}: cannot write demonstrations: {error}"
                ) from None
            lengths.append(len(shard))
            total_bytes += sum(map(len, shard))

        # Only now the number of shards is known, which stands in the name of each.
        for index in range(len(lengths)):
            path = template.sharded_filepath(shard_index=index, num_shards=len(lengths))
            (folder / f"{name}.{index}").rename(path)
        return tfds.core.SplitInfo(
            name=name,
            shard_lengths=lengths,
            num_bytes=total_bytes,
            filename_template=template,
        )


def _shards(records: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Divides records among shards; where one ends depends on the records alone."""
    shard: list[bytes] = []
    size = 0
    for record in records:
        shard.append(record)
        size += len(record)
        if size >= _SHARD_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _sorted(record: bytes) -> bytes:
    """Returns a serialized example with its features sorted by name.

    TFDS lets protobuf put the features of an example in any order, which differs from process to
    process. So files are equal, byte for byte, wherever the examples are.
    """
    example = tf_example_pb2.Example.FromString(record)
    return example.SerializeToString(deterministic=True)


def _with_config(config: tfds.core.BuilderConfig) -> type[Demonstrations]:
    """Returns the class of a data set that knows this config.

    TFDS warns of a config that the class does not know. If the class lists its configs in
    BUILDER_CONFIGS, TFDS writes a hidden folder `.config` that names the first of them as the
    default, and there is no default method. So the class is asked for its config instead.
    """

    # mypy does not see the keyword of TFDS's base class.
    class Configured(Demonstrations, skip_registration=True):  # type: ignore[call-arg]
        name = Demonstrations.name

        @classmethod
        def get_builder_config(
            cls, name: str, version: Any = None
        ) -> tfds.core.BuilderConfig | None:
            del version
            return config if name == config.name else None

    return Configured


def directory(data_dir: Path, method: str) -> Path:
    """Returns the folder that holds the examples of a method."""
    return data_dir / "demonstrations" / config_name(method) / str(Demonstrations.VERSION)


def write(
    data_dir: Path, method: str, sources: Mapping[str, Source], types: Mapping[str, np.dtype]
) -> None:
    """Writes the examples of one method; they appear in `directory` together, or not at all.

    Args:
      data_dir: folder of the data.
      method: the method.
      sources: split -> function that yields its examples.
      types: feature -> type of its integers.

    Raises:
      UserError: they cannot be written, for example because the disk is full.
    """
    tfds.disable_progress_bar()  # `apr data build` shows a progress bar of its own.
    config = tfds.core.BuilderConfig(
        name=config_name(method), description=f"demonstrations by {method}"
    )
    builder = _with_config(config)(
        sources=sources,
        types=types,
        data_dir=data_dir,
        config=config,
        file_format=tfds.core.FileFormat.ARRAY_RECORD,
    )
    # TFDS announces a download, although there is none.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()


class TreeSource:
    """Random access to a split: `len(source)`, and `source[k]`, which is feature -> array.

    TFDS's own data source parses every feature, in 0.09 ms an example. This one parses only the
    wanted features, in 0.02 ms.

    Args:
      path: folder that `write` has filled.
      split: "train" or "validation".
      names: features that are wanted.

    Raises:
      UserError: `source[k]` raises it if the file is damaged there. Each chunk of the file has a
        checksum and is read when it is asked for, which may be in the middle of a training.
    """

    def __init__(self, path: Path, split: str, names: tuple[str, ...]):
        self._path = path
        self._split = split
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        stored = tfds.builder_from_directory(path)
        self._records = stored.as_data_source(split, deserialize_method=raw)
        self._dtypes = {name: stored.info.features[name].np_dtype for name in names}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, k: SupportsIndex) -> Example:
        try:
            return self.parse(k)
        # array_record and protobuf raise errors of many types for damaged bytes.
        except Exception as error:
            pattern = f"*-{self._split}.array_record*"
            files = ", ".join(sorted(str(file) for file in self._path.glob(pattern)))
            raise UserError(
                f"{files or self._path}: demonstration {int(k)} is damaged"
                f" ({type(error).__name__}); delete {self._path} and run `apr data build` again"
            ) from None

    def parse(self, k: SupportsIndex) -> Example:
        """Reads demonstration k; raises errors of the libraries if it is damaged."""
        stored = tf_example_pb2.Example.FromString(self._records[k]).features.feature
        return {
            name: np.frombuffer(stored[name].bytes_list.value[0], dtype)
            for name, dtype in self._dtypes.items()
        }


def read(
    data_dir: Path, method: str, split: str, names: tuple[str, ...] = tuple(MEANINGS)
) -> TreeSource:
    """Opens a split for random access.

    Args:
      data_dir: folder of the data.
      method: the method of the demonstrations.
      split: "train" or "validation".
      names: features that are wanted.

    Raises:
      UserError: there is no such data set, or it is damaged.
    """
    path = directory(data_dir, method)
    try:
        source = TreeSource(path, split, names)
        source.parse(len(source) - 1)  # Shows whether the file is cut off at its end.
        return source
    # TFDS and array_record raise errors of many types for a missing or damaged file.
    except Exception as error:
        if is_of_machine(error):
            raise UserError(
                f"data {path}: cannot be read here and now ({what_went_wrong(error)})"
            ) from None
        raise UserError(
            f"data {data_dir}: holds no readable {split} demonstrations of method {method!r}"
            f" ({path}: {type(error).__name__}); delete the folder and run `apr data build --out"
            f" {data_dir}`"
        ) from None
