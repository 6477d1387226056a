"""Integers in as few bytes as can hold them, and never in fewer.

numpy's `astype` wraps values that do not fit, without an error: token 128,000 in 16 bits becomes
token 62,464, and 65,536 becomes `<pad>`. So whatever is stored in narrow integers goes through
`fitted`.
"""

import numpy as np
from numpy.typing import ArrayLike


def unsigned(largest: int, least_bits: int = 16) -> np.dtype:
    """Returns the narrowest unsigned type, of at least `least_bits`, that holds 0 to `largest`.

    Raises:
      ValueError: more than 32 bits would be needed.
    """
    types = [f"u{bits // 8}" for bits in (8, 16, 32) if bits >= least_bits]
    return _narrowest(largest, types)


def signed(largest: int) -> np.dtype:
    """Returns the narrowest signed type, of 16 or 32 bits, that holds -1 to `largest`.

    Raises:
      ValueError: more than 32 bits would be needed.
    """
    return _narrowest(largest, ["i2", "i4"])


def _narrowest(largest: int, types: list[str]) -> np.dtype:
    """Returns the first of some types, from narrow to wide, that holds `largest`."""
    for name in types:
        if largest <= np.iinfo(name).max:
            return np.dtype(name)
    raise ValueError(f"{largest} does not fit into 32 bits")


def fitted(values: ArrayLike, dtype: np.dtype, what: str) -> np.ndarray:
    """Converts values to `dtype`, without changing any.

    Args:
      values: numbers.
      dtype: an integer type.
      what: name of the values, for the error.

    Raises:
      ValueError: one of the values does not fit.
    """
    given = np.asarray(values)
    limits = np.iinfo(dtype)
    # "Not inside" instead of "outside", so that NaN, which compares false, does not fit either.
    outside = ~((given >= limits.min) & (given <= limits.max))
    if outside.any():
        raise ValueError(
            f"{what} {given[outside].flat[0]} does not fit into {dtype}: {limits.min} to"
            f" {limits.max}"
        )
    return given.astype(dtype)
