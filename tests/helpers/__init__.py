"""Helpers that several tests share: small data, fakes; and the type checker of the tests."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # An int will do for a float.
