"""How the trees of an evaluation are decoded: the settings, and the limits and prompts they make.

Everything that a user can ask for is checked here, before anything runs or is written.
"""

from __future__ import annotations

import dataclasses

from apr_jax.errors import UsageError, UserError
from apr_jax.tasks import Method, Problem, Task, make_task
from apr_jax.text.tokenizer import BOS
from apr_jax.threads import NOT_FORCED, Limits, Prompts, check_prompts, make_prompts
from apr_jax.train.checkpoint.restored import Restored

# Prompts are padded to a multiple of this width. A few more tokens in a prompt, such as a
# condition, then seldom make a new shape, which would have to be compiled.
_WIDTH_MULTIPLE = 16

_INT32_MAX = 2**31 - 1  # Top-k values and numbers of trees are 32 bits wide on the device.


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How the trees of an evaluation are decoded.

    Attributes:
      samples: trees for each problem.
      temperature: temperature of sampling; 0 decodes greedily.
      top_k: number of most likely tokens that are sampled from; 0 means all.
      top_p: probability mass of the most likely tokens that are sampled from; 1 means all.
      window: positions that a thread may occupy; None takes the checkpoint's own.
      condition: the number that prompts state; None states none. What it counts depends on the
        model's method (`tasks.Condition`): children for APR, window bins for SoS+.
      forced: number of children that the root is made to spawn, over all its spawns; None leaves
        the root free.
      constrain: whether tokens that the protocol does not allow are never sampled; None takes the
        checkpoint's own setting.

    Raises:
      UsageError: a value is out of range, or a setting has no effect on greedy decoding.
    """

    samples: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    window: int | None = None
    condition: int | None = None
    forced: int | None = None
    constrain: bool | None = None

    @property
    def childless(self) -> bool:
        """Whether the prompts ask for no child, or the root is kept from spawning one."""
        return 0 in (self.condition, self.forced)

    def __post_init__(self):
        """Checks the values against each other."""
        if not 0 <= self.top_k <= _INT32_MAX:
            raise UsageError(f"--top-k {self.top_k}: must be from 0 (all tokens) to {_INT32_MAX}")

        is_greedy = self.temperature <= 0
        if is_greedy and self.samples > 1:
            raise UsageError(
                f"--samples {self.samples} with --temperature {self.temperature}: greedy samples"
                " are all the same; give a temperature"
            )
        if is_greedy and (self.top_k or self.top_p < 1):
            raise UsageError(
                f"--top-k {self.top_k}, --top-p {self.top_p} with --temperature {self.temperature}:"
                " greedy decoding takes the most likely token whatever they are; give a"
                " temperature"
            )


GREEDY = Decoding()  # One greedy tree for each problem, within the checkpoint's own limits.


def task_of(restored: Restored) -> Task:
    """Makes the task that a model was trained for.

    Raises:
      UserError: the task does not know the model's method.
    """
    config = restored.config
    task = make_task(config.task, config.limits)
    if restored.file_method is not None:
        return task
    if restored.method not in task.methods:
        raise UserError(
            f"{restored.path}: method={restored.method!r:.60} must be one of"
            f" {', '.join(task.methods)}, the methods of task {config.task.kind!r}"
        )
    return task


def method_of(restored: Restored, task: Task) -> Method:
    """Returns the method that a model of the task has learned."""
    return restored.file_method or task.methods[restored.method]


def limits_of(restored: Restored, decoding: Decoding) -> Limits:
    """Returns the checkpoint's own limits, with what the decoding sets in their place.

    Raises:
      UsageError: the window is too small, or larger than the one of the training.
    """
    limits = restored.config.limits
    window = limits.window if decoding.window is None else decoding.window
    if not 2 <= window <= limits.window:
        raise UsageError(
            f"--window {window}: must be from 2 to {limits.window}, the window the model was"
            " trained with"
        )
    constrain = limits.constrain if decoding.constrain is None else decoding.constrain
    return dataclasses.replace(limits, window=window, constrain=constrain)


def prompts_of(
    restored: Restored, problems: list[Problem], limits: Limits, decoding: Decoding
) -> Prompts:
    """Makes one prompt for each tree: all samples of a problem, then those of the next.

    The identity of a tree, from which its random keys follow, is its place among all trees of the
    evaluation. An evaluation that was interrupted therefore samples the same trees when it goes on.

    Raises:
      UsageError: the model cannot be asked this; the message names the option or the problem.
    """
    task = task_of(restored)
    method = method_of(restored, task)
    _check_forced(restored, method, limits, decoding)
    _check_condition(restored, method, decoding)
    if len(problems) * decoding.samples > _INT32_MAX:
        raise UsageError(
            f"--samples {decoding.samples}: of {len(problems)} problems that is more than"
            f" {_INT32_MAX} trees"
        )

    ids = []
    for problem in problems:
        prompt = _prompt_ids(restored, task, problem, limits, decoding)
        ids += [prompt] * decoding.samples

    longest = max(map(len, ids), default=1)
    padded = longest + -longest % _WIDTH_MULTIPLE
    width = min(padded, limits.window - 1)  # The window also holds at least one sampled token.
    try:
        prompts = make_prompts(
            ids,
            width,
            temperature=decoding.temperature,
            top_k=decoding.top_k,
            top_p=decoding.top_p,
            children=NOT_FORCED if decoding.forced is None else decoding.forced,
        )
        if ids:
            check_prompts(prompts, limits)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return prompts


def _prompt_ids(
    restored: Restored, task: Task, problem: Problem, limits: Limits, decoding: Decoding
) -> list[int]:
    """Returns the token ids of a problem's prompt, which must leave room in the window."""
    try:
        ids = [BOS, *restored.tokenizer.encode(task.prompt(problem, decoding.condition))]
    except ValueError as error:
        raise UsageError(f"problem {problem.id!r}: {error}") from None
    if len(ids) > limits.window - 1:
        raise UsageError(
            f"problem {problem.id!r}: its prompt has {len(ids)} tokens, too many for"
            f" --window {limits.window}"
        )
    return ids


def _check_forced(restored: Restored, method: Method, limits: Limits, decoding: Decoding) -> None:
    """Raises UsageError if the root cannot spawn the number of forced children."""
    if decoding.forced is None:
        return
    if not method.parallel:
        raise UsageError(
            f"--force-children {decoding.forced}: {restored.path} is of method"
            f" {restored.method}, whose threads have no children"
        )
    most = limits.max_threads - 1 if limits.max_depth else 0
    if not 0 <= decoding.forced <= most:
        raise UsageError(
            f"--force-children {decoding.forced}: must be from 0 to {most}, limits.max_threads"
            " less the root"
        )


def _check_condition(restored: Restored, method: Method, decoding: Decoding) -> None:
    """Raises UsageError if the model never saw the condition in its training."""
    if decoding.condition is None:
        return
    trained = method.condition
    if trained is None:
        raise UsageError(
            f"--condition {decoding.condition}: {restored.path} is of method"
            f" {restored.method} and was trained without conditions"
        )
    if not trained.low <= decoding.condition <= trained.high:
        raise UsageError(
            f"--condition {decoding.condition}: must be from {trained.low} to {trained.high}"
            f" {trained.counts}, what the model was trained on"
        )
