"""From problems to packed rows: tokenizer, streams, the data set on disk and the pipeline that
reads it.

    data = Path("runs/nano/data")
    build(config, data)                                          # build.py: all on disk, once
    batches = sft_batches(data, "apr", rows=24, length=224, seed=0)    # pipeline.py
    rows = next(batches)                                         # packing.py: a Rows record

`tokenizer`, `streams`, `builder` and `build` need no JAX; nothing here imports TensorFlow.
"""
