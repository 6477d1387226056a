"""Integers in as few bytes as hold them, and never a value in fewer.

numpy's `astype` wraps what does not fit without a word: token 128,000 in 16 bits is token 62,464,
and 65,536 is `<pad>`. Whatever is stored in narrow integers goes through `fitted`.
"""

import numpy as np
from numpy.typing import ArrayLike


def unsigned(largest: int, least_bits: int = 16) -> np.dtype:
    """The narrowest unsigned integer of at least `least_bits` that holds 0 to `largest`.

    Raises:
      ValueError: more than 32 bits would be needed.
    """
    return _narrowest(largest, [f"u{bits // 8}" for bits in (8, 16, 32) if bits >= least_bits])


def signed(largest: int) -> np.dtype:
    """The narrowest signed integer, of 16 bits or 32, that holds -1 to `largest`.

    Raises:
      ValueError: more than 32 bits would be needed.
    """
    return _narrowest(largest, ["i2", "i4"])


def _narrowest(largest: int, types: list[str]) -> np.dtype:
    for name in types:
        if largest <= np.iinfo(name).max:
            return np.dtype(name)
    raise ValueError(f"{largest} does not fit into 32 bits")


def fitted(values: ArrayLike, dtype: np.dtype, what: str) -> np.ndarray:
    """The values as `dtype`.

    Args:
      what: the values' name, for the error.

    Raises:
      ValueError: one of them does not fit.
    """
    given = np.asarray(values)
    limits = np.iinfo(dtype)
    outside = ~((given >= limits.min) & (given <= limits.max))  # So written, NaN is outside too.
    if outside.any():
        raise ValueError(
            f"{what} {given[outside].flat[0]} does not fit into {dtype}: {limits.min} to"
            f" {limits.max}"
        )
    return given.astype(dtype)
