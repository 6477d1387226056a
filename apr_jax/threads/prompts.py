"""What the roots of a rollout are given: their prompts, how to sample, and how many children they
must make.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from apr_jax.threads import protocol
from apr_jax.threads.limits import Limits

_LEAST = 1e-6  # Of temperatures and top_p: logits divided by much less are no float32 any more.
NOT_FORCED = -1  # `Prompts.children` of a tree that may make as many as it likes.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """One entry a tree.

    Attributes:
      tokens: [B, P] int32 the root's prompt from `<bos>` on, padded.
      length: [B] int32 tokens of the prompt, at least 1.
      tree: [B] int32 identity of the tree; all its randomness is folded from it.
      temperature: [B] float32 of the sampling; 0 is greedy.
      top_k: [B] int32 only the k most likely tokens are drawn from; 0 is all of them.
      top_p: [B] float32 only the fewest most likely tokens that together reach this probability; 1
        is all of them.
      children: [B] int32 that the root must make over its spawns, or NOT_FORCED.
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
    """Prompts (numpy leaves) from token ids; sampling and children are one value for all trees or
    one a tree.

    Args:
      width: P.
      tree: identities; by default 0, 1, 2 and so on.

    Raises:
      ValueError: a prompt or a setting cannot be used; the message names the prompt, the value and
        the rule.
    """
    count = len(ids)
    tokens = np.zeros((count, width), np.int32)
    for number, (row, prompt) in enumerate(zip(tokens, ids, strict=True)):
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
        row[: len(prompt)] = prompt

    def each(name: str, value: Any, dtype: type, low: float, high: float, rule: str) -> np.ndarray:
        values: np.ndarray = np.asarray(value)
        if values.ndim and values.shape != (count,):
            raise ValueError(
                f"{name}: has shape {values.shape} for {count} prompts; give one value, or one a"
                " prompt"
            )
        for number, one in enumerate(np.broadcast_to(values, count)):
            if not low <= one <= high or 0 < one < _LEAST:
                raise ValueError(f"prompt {number}: {name}={one} {rule}")
            if dtype is np.int32 and one != int(one):
                raise ValueError(f"prompt {number}: {name}={one} must be a whole number")
        return np.broadcast_to(values, count).astype(dtype)

    most = np.iinfo(np.int32).max
    return Prompts(
        tokens=tokens,
        length=np.asarray([len(prompt) for prompt in ids], np.int32),
        tree=each(
            "tree",
            np.arange(count) if tree is None else tree,
            np.int32,
            -most,
            most,
            f"must be from {-most} to {most}",
        ),
        temperature=each(
            "temperature",
            temperature,
            np.float32,
            0,
            np.inf,
            f"must be 0 (greedy) or at least {_LEAST}",
        ),
        top_k=each("top_k", top_k, np.int32, 0, most, f"must be from 0 (all tokens) to {most}"),
        top_p=each(
            "top_p", top_p, np.float32, _LEAST, 1, f"must be at least {_LEAST} and at most 1"
        ),
        children=each(
            "children",
            children,
            np.int32,
            NOT_FORCED,
            most,
            f"must be from 0 to {most}, or NOT_FORCED",
        ),
    )


def check_prompts(prompts: Prompts, limits: Limits) -> None:
    """Refuses, before anything is compiled, prompts (numpy leaves) that the limits cannot hold.

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
    most = limits.max_threads - 1 if limits.max_depth else 0
    for number, children in enumerate(np.asarray(prompts.children)):
        if children > most:
            raise ValueError(
                f"prompt {number}: children={children} must be at most {most}: "
                f"limits.max_threads={limits.max_threads}, limits.max_depth={limits.max_depth}"
            )
