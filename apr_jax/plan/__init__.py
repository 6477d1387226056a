"""`apr plan`: what fits a TPU and how long it takes, found out on a CPU machine.

That is possible because libtpu compiles for any topology.
"""

import enum


class Program(enum.StrEnum):
    """The programs of a run, which `apr plan` compiles."""

    SUPERVISED = "supervised"
    ROLLOUT = "rollout"
    RESCORING = "rescoring"
    UPDATE = "update"
