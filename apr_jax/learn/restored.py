"""A trained model, complete: what evaluation and RL start from."""

import dataclasses
from typing import Any

from apr_jax.config import Experiment
from apr_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint or a kept model holds.

    Attributes:
      params: numpy leaves.
      stage: "sft" or "rl".
      path: folder of the step, or the file.
    """

    params: Any
    config: Experiment
    method: str
    stage: str
    tokenizer: Tokenizer
    step: int
    path: str
