"""The prompts of a rollout's roots, the settings of their sampling, and forced children."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from apr_jax.threads import protocol
from apr_jax.threads.limits import Limits

# The smallest temperature (but 0) and top_p: logits divided by much less overflow float32.
_SMALLEST_SETTING = 1e-6
_LARGEST_INT = np.iinfo(np.int32).max
NOT_FORCED = -1  # `Prompts.children` of a tree that may make as many children as it likes.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a batch, one entry for each of B trees; P is the width of the longest.

    Attributes:
      tokens: [B, P] int32, the root's prompt from `<bos>` on, padded.
      length: [B] int32, tokens of the prompt, at least 1.
      tree: [B] int32, identity of the tree, from which all its randomness is folded.
      temperature: [B] float32 of the sampling; 0 is greedy.
      top_k: [B] int32, sampling is limited to the k most likely tokens; 0 is no limit.
      top_p: [B] float32, sampling is limited to the fewest most likely tokens that together reach
        this probability; 1 is no limit.
      children: [B] int32, children that the root must make over all its spawns, or NOT_FORCED.
    """

    tokens: jax.Array
    length: jax.Array
    tree: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    children: jax.Array


def make_prompts(
    ids: Sequence[Sequence[int]],
    width: int,
    *,
    tree: Sequence[int] | None = None,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    children: int | Sequence[int] = NOT_FORCED,
) -> Prompts:
    """Makes prompts, with numpy leaves, from token ids.

    Each setting is one value for all trees or a sequence of one value a tree.

    Args:
      ids: the token ids of each prompt, from `<bos>` on.
      width: P, to which the prompts are padded.
      tree: identities of the trees; by default 0, 1, 2 and so on.
      temperature: temperature of the sampling; 0 is greedy.
      top_k: number of the most likely tokens that may be sampled; 0 is no limit.
      top_p: probability that the tokens which may be sampled reach together; 1 is no limit.
      children: children that the root must make, or NOT_FORCED.

    Raises:
      ValueError: a prompt or a setting cannot be used; the message names the prompt, the value and
        the rule.
    """
    count = len(ids)
    tokens = np.zeros((count, width), np.int32)
    for number, (row, prompt) in enumerate(zip(tokens, ids, strict=True)):
        _check_prompt(number, prompt, width)
        row[: len(prompt)] = prompt

    return Prompts(
        tokens=tokens,
        length=np.asarray([len(prompt) for prompt in ids], np.int32),
        tree=_one_a_prompt(
            "tree",
            np.arange(count) if tree is None else tree,
            count,
            np.int32,
            -_LARGEST_INT,
            _LARGEST_INT,
            f"must be from {-_LARGEST_INT} to {_LARGEST_INT}",
        ),
        temperature=_one_a_prompt(
            "temperature",
            temperature,
            count,
            np.float32,
            0,
            np.inf,
            f"must be 0 (greedy) or at least {_SMALLEST_SETTING}",
        ),
        top_k=_one_a_prompt(
            "top_k",
            top_k,
            count,
            np.int32,
            0,
            _LARGEST_INT,
            f"must be from 0 (all tokens) to {_LARGEST_INT}",
        ),
        top_p=_one_a_prompt(
            "top_p",
            top_p,
            count,
            np.float32,
            _SMALLEST_SETTING,
            1,
            f"must be at least {_SMALLEST_SETTING} and at most 1",
        ),
        children=_one_a_prompt(
            "children",
            children,
            count,
            np.int32,
            NOT_FORCED,
            _LARGEST_INT,
            f"must be from 0 to {_LARGEST_INT}, or NOT_FORCED",
        ),
    )


def _check_prompt(number: int, prompt: Sequence[int], width: int) -> None:
    """Raises ValueError unless the prompt is `<bos>` and text, of at most `width` tokens."""
    if not prompt or prompt[0] != protocol.BOS:
        raise ValueError(
            f"prompt {number}: starts with {list(prompt[:1])}, but must start with <bos>"
        )
    if len(prompt) > width:
        raise ValueError(f"prompt {number}: has {len(prompt)} tokens, more than width={width}")
    for place, token in enumerate(prompt[1:], start=1):
        if token < len(protocol.CONTROL_PIECES):
            name = protocol.CONTROL_PIECES[token] if token >= 0 else token
            raise ValueError(
                f"prompt {number}: has {name} at place {place}; only text may follow <bos>"
            )


def _one_a_prompt(
    name: str, value: Any, count: int, dtype: type, low: float, high: float, rule: str
) -> np.ndarray:
    """Checks a setting, one value or one a prompt, against its bounds; returns one a prompt."""
    given: np.ndarray = np.asarray(value)
    if given.ndim and given.shape != (count,):
        raise ValueError(
            f"{name}: has shape {given.shape} for {count} prompts; give one value, or one a prompt"
        )

    settings = np.broadcast_to(given, count)
    for number, setting in enumerate(settings):
        if not low <= setting <= high or 0 < setting < _SMALLEST_SETTING:
            raise ValueError(f"prompt {number}: {name}={setting} {rule}")
        if dtype is np.int32 and setting != int(setting):
            raise ValueError(f"prompt {number}: {name}={setting} must be a whole number")
    return settings.astype(dtype)


def check_prompts(prompts: Prompts, limits: Limits) -> None:
    """Refuses prompts (numpy leaves) that the limits cannot hold, before anything is compiled.

    Raises:
      ValueError: names the prompt or field, the value and the rule.
    """
    if len(prompts.length) == 0:
        raise ValueError("prompts: there are none; a rollout needs at least one tree")

    longest = int(np.argmax(prompts.length))
    if prompts.length[longest] > limits.window - 1:
        raise ValueError(
            f"prompt {longest}: has {prompts.length[longest]} tokens; "
            f"limits.window={limits.window} must leave room for one more"
        )

    most_children = limits.max_threads - 1 if limits.max_depth else 0
    for number, children in enumerate(np.asarray(prompts.children)):
        if children > most_children:
            raise ValueError(
                f"prompt {number}: children={children} must be at most {most_children}: "
                f"limits.max_threads={limits.max_threads}, limits.max_depth={limits.max_depth}"
            )
