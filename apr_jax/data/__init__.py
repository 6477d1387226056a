"""From problems to packed rows: tokenizer, streams, the data set on disk and the pipeline that reads it.

    build(config, Path("runs/nano/data"))                                   # build.py: everything on disk, once
    batches = sft_batches(Path("runs/nano/data"), "apr", rows=24, length=224, seed=0)     # pipeline.py
    rows = next(batches)                                                    # packing.py: a Rows record

`tokenizer`, `streams`, `builder` and `build` need no JAX; nothing here imports TensorFlow.
"""
