"""A trained model, complete: what evaluation and RL start from."""

import dataclasses
from typing import Any

from apr_jax.config import Experiment
from apr_jax.errors import UserError
from apr_jax.tasks import METHODS
from apr_jax.text.tokenizer import Tokenizer

STAGES = ("sft", "rl")


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint or a kept model holds.

    Attributes:
      params: numpy leaves.
      stage: "sft" or "rl".
      path: folder of the step, or the file.

    Raises:
      UserError: method, stage or step are none that this library writes; a stranger's file may hold
        anything there.
    """

    params: Any
    config: Experiment
    method: str
    stage: str
    tokenizer: Tokenizer
    step: int
    path: str

    def __post_init__(self) -> None:
        for name, value, known in (("method", self.method, METHODS), ("stage", self.stage, STAGES)):
            if value not in known:
                raise UserError(
                    f"{self.path}: {name}={value!r:.60} must be one of {', '.join(known)}"
                )
        if type(self.step) is not int or self.step < 0:
            raise UserError(
                f"{self.path}: step={self.step!r:.60} must be a whole number of at least 0"
            )
