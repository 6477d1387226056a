"""The key/value cache of decoding: `cache` for all devices, `cache_tpu` with a kernel for TPU.

Both modules have the same two functions: `empty` makes a layer's cache, and `over` makes the
attention that writes and reads it.
"""
