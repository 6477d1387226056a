"""From demonstrations to packed rows.

    data = Path("runs/nano/data")
    build(config, data)                                                # build.py: once
    batches = sft_batches(data, "apr", rows=24, length=224, seed=0)    # pipeline.py
    rows = next(batches)                                               # packing.py: a `Rows` record

The life of a demonstration, and the modules through which it passes:

    demonstrate.py   a solver's tree of text for each problem; those beyond the limits are dropped
    encode.py        text as token sequences, one for each thread (`tokenize_tree`, `read_thread`)
    dataset.py       the trees on disk, as a TensorFlow data set, without TensorFlow
    build.py         all of this for an experiment: problems, tokenizer, demonstrations, data.json
    pipeline.py      shuffled and packed batches, to whose order a checkpoint can return
    packing.py       threads side by side in rows (`pack_trees`, `pack_forest` for RL)

statistics.py says how good and how long demonstrations are, integers.py stores integers in few
bytes, and config.py says how much is built.

The exported names are imported at their first use: the processes that demonstrate need neither JAX
nor Grain. Nothing here imports TensorFlow.
"""

from typing import TYPE_CHECKING

from apr_jax.data.config import DataConfig
from apr_jax.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from apr_jax.data.encode import ThreadTokens, read_thread, tokenize_tree
    from apr_jax.data.packing import Rows, pack_forest, pack_trees
    from apr_jax.data.pipeline import Batches, LocalRows, sft_batches, steps_of_an_epoch

__all__ = [
    "Batches",
    "DataConfig",
    "LocalRows",
    "Rows",
    "ThreadTokens",
    "pack_forest",
    "pack_trees",
    "read_thread",
    "sft_batches",
    "steps_of_an_epoch",
    "tokenize_tree",
]

# Exported name -> the module that defines it, where that is imported at the name's first use.
_DEFINED_IN = {
    "Batches": "pipeline",
    "LocalRows": "pipeline",
    "Rows": "packing",
    "ThreadTokens": "encode",
    "pack_forest": "packing",
    "pack_trees": "packing",
    "read_thread": "encode",
    "sft_batches": "pipeline",
    "steps_of_an_epoch": "pipeline",
    "tokenize_tree": "encode",
}

__getattr__ = lazy_names(__name__, _DEFINED_IN)
