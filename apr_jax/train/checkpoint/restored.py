"""Models in memory: with their experiment, as evaluation and RL need them, and without one."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import pydantic

from apr_jax.config import Experiment
from apr_jax.errors import UserError
from apr_jax.model.config import ModelConfig
from apr_jax.tasks import Method
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.train.config import LoraConfig

STAGES = ("sft", "rl")
# A method stands in tables, messages and file names; which ones there are is the task's to say.
_METHOD = re.compile(r"[A-Za-z0-9._+-]{1,40}")
_FILE_METHOD: pydantic.TypeAdapter[Method | None] = pydantic.TypeAdapter(Method | None)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model without an experiment, such as an imported one: what supervised training starts from.

    Attributes:
      params: the weights, numpy leaves.
      model: the shape of the network.
      tokenizer: the tokenizer, of which V is the number of the model's embeddings.
      path: where it was read.
      window: positions of the window in which it was trained; 0 if it was trained elsewhere.
    """

    params: Any
    model: ModelConfig
    tokenizer: Tokenizer
    path: str
    window: int = 0


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint or an exported model holds.

    Attributes:
      params: the weights, numpy leaves.
      config: the experiment in which they were trained.
      method: the method whose demonstrations the model learned from.
      stage: "sft" or "rl".
      tokenizer: the tokenizer of the run.
      step: the step of the run after which the weights were saved.
      path: folder of the step, or the exported file.
      file_method: what the method is if its demonstrations were those of a file of thread trees;
        None if it is one of the task's own, or if the checkpoint does not say.

    Raises:
      UserError: this library never writes such a method, stage or step. A file from elsewhere may
        hold anything there.
    """

    params: Any
    config: Experiment
    method: str
    stage: str
    tokenizer: Tokenizer
    step: int
    path: str
    file_method: Method | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or not _METHOD.fullmatch(self.method):
            raise UserError(
                f"{self.path}: method={self.method!r:.60} must be the name of a method: at most 40"
                " letters, digits and . _ + -"
            )
        if self.stage not in STAGES:
            raise UserError(
                f"{self.path}: stage={self.stage!r:.60} must be one of {', '.join(STAGES)}"
            )
        if type(self.step) is not int or self.step < 0:
            raise UserError(
                f"{self.path}: step={self.step!r:.60} must be a whole number of at least 0"
            )

    @property
    def pretrained(self) -> Pretrained:
        """The model without the experiment in which it was trained."""
        window = self.config.limits.window
        return Pretrained(self.params, self.config.model, self.tokenizer, self.path, window)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """The adapters of a step of a run, without the model to which they are added.

    Attributes:
      adapters: see `model/lora.py`; numpy leaves.
      lora: their settings.
      tokenizer: the tokenizer of the run.
      path: folder of the step.
    """

    adapters: Any
    lora: LoraConfig
    tokenizer: Tokenizer
    path: str


def read_file_method(about: Mapping[str, Any], path: str) -> Method | None:
    """Reads `file_method` from what a checkpoint or an exported model says about itself.

    Args:
      about: the values; those of older models lack this one.
      path: of the checkpoint or the file, for the message.

    Raises:
      UserError: the value is no method.
    """
    try:
        return _FILE_METHOD.validate_python(about.get("file_method"), extra="forbid")
    except pydantic.ValidationError as error:
        where = ".".join(map(str, ("file_method", *error.errors()[0]["loc"])))
        raise UserError(f"{path}: {where} is not what this library writes there") from None
