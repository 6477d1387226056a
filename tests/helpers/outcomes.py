"""Follows recorded trees through the tables of docs/protocol.md, and says which of their cells came
up.

It looks at nothing but the forest: neither engine nor interpreter. A stream that does what no cell
says fails.
"""

import collections
from pathlib import Path

import numpy as np

from apr_jax.threads import NOT_FORCED, ROOT, Limits, Refusal, Status, ThreadForest
from apr_jax.threads import protocol as p
from apr_jax.threads.sampling import token_classes

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"
_NAMES = {token: f"`{piece}`" for token, piece in enumerate(p.CONTROL_PIECES)}
_NAMES |= dict.fromkeys((p.PAD, p.BOS, p.UNK), "`<pad>`, `<bos>`, `<unk>`")
_SUSPENDED = "suspended"
_NEVER = "never"
_BOTH = "the window or the token sequence is full and the chain is spent"
_BOTH_AT_JOIN = "the joined block has no room and the chain is spent"
_END_FIRST = (
    "a token that ends the thread fills the window or the token sequence, or spends the chain"
)
NOT_MADE = "Forced children not made"


def _table(corner: str) -> dict[tuple[str, str], str]:
    """(row, column) -> cell of the table with this bold corner."""
    lines = PAGE.read_text().splitlines()
    begin = next(at for at, line in enumerate(lines) if line.startswith(f"| **{corner}**"))
    rows = []
    for line in lines[begin:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    columns = rows[0][1:]
    return {
        (row[0], column): cell
        for row in rows[2:]
        for column, cell in zip(columns, row[1:], strict=True)
    }


TOKENS, RUNS_OUT = _table("token"), _table("full or spent")
TWO = {row: cell for (row, _), cell in _table("two at once").items()}
CAUSES = [row for row, _ in _table("cause")]
CASES = (
    *(f"{token} {place}" for token, place in TOKENS),
    *(f"{what} {place}" for (what, place), cell in RUNS_OUT.items() if cell != _NEVER),
    *TWO,
    *CAUSES,
    NOT_MADE,
)


def outcomes(tree: ThreadForest, limits: Limits, forced: int = NOT_FORCED) -> collections.Counter:
    """How often each of `CASES` came up in one tree (fields without the batch axis)."""
    seen: collections.Counter = collections.Counter()
    classes = token_classes(int(tree.tokens.max()) + 1)[tree.tokens] & tree.allowed
    assert ((classes > 0) == tree.sampled).all(), "a token that was not allowed"
    refused = 0
    for thread_index in np.flatnonzero(tree.status != Status.FREE):
        refused += _follow(tree, thread_index, limits, seen)
    causes = {Refusal(number).name: int(count) for number, count in enumerate(tree.refusals)}
    assert sum(causes.values()) == refused, (causes, refused)
    seen.update(causes)
    if forced != NOT_FORCED:
        made = int(np.sum(tree.parent == ROOT))
        assert made <= forced
        assert made == forced or tree.status[ROOT] not in (Status.DONE, Status.NO_ANSWER)
        seen[NOT_MADE] += made < forced
    return seen


def _follow(
    tree: ThreadForest, thread_index: int, limits: Limits, seen: collections.Counter
) -> int:
    """Follows one thread, and returns how many refusals its spawns must have counted."""
    tokens = tree.tokens[thread_index]
    length = int(tree.length[thread_index])
    status = Status(int(tree.status[thread_index])).name
    place = "while thinking"
    messages = 0
    round_ = -1
    refused = 0
    for at in range(length):
        if not tree.sampled[thread_index, at]:
            place = "while thinking"
            continue
        assert place != _SUSPENDED, "a suspended thread drew a token"
        token = _NAMES.get(int(tokens[at]), "text")
        cell = TOKENS[token, place]
        seen[f"{token} {place}"] += 1
        if cell == "before the first `<msg>`":
            messages = 0
            round_ = round_ + 1
        messages += token == "`<msg>`"
        if cell == _SUSPENDED:
            children = np.flatnonzero((tree.parent == thread_index) & (tree.round == round_))
            spent = status == "OUT_OF_BUDGET" and at == length - 1 and len(children) == 0
            refused += 0 if spent else max(messages, 1) - len(children)
            seen["the window at `</spawn>`"] += (
                int(tree.position[thread_index, at]) + 1 >= limits.window
            )
            seen["the token sequence at `</spawn>`"] += at + 1 >= limits.max_thread_tokens
        place = cell
    used = int(tree.position[thread_index, length - 1]) + 1
    end = int(tree.end[thread_index])
    full = {
        "the window": used >= limits.window,
        "the token sequence": length >= limits.max_thread_tokens,
    }
    chain = end >= limits.max_sequential
    if place in Status.__members__:
        assert place == status, (place, status)
        seen[_END_FIRST] += chain or any(full.values())
        return refused
    if place == _SUSPENDED:
        if status == "OUT_OF_BUDGET" and len(children) == 0:
            place = "at `</spawn>`"
            full = {}
        else:
            place = "at the join"
            begin = int(
                tree.position[
                    thread_index, np.flatnonzero(tree.hidden_block[thread_index] == round_ + 1)[0]
                ]
            )
            block = 2 + sum(1 + len(answer(tree, child)) for child in children)
            full = {
                "the window": begin + block + 1 > limits.window,
                "the token sequence": length + block + 1 > limits.max_thread_tokens,
            }
    what = next(
        (name for name, holds in (full | {"the chain": chain}).items() if holds),
        "the thread's tokens",
    )
    assert RUNS_OUT[what, place] == status, (what, place, status)
    seen[f"{what} {place}"] += 1
    if any(full.values()) and chain:
        assert TWO[_BOTH] == TWO[_BOTH_AT_JOIN] == status
        seen[_BOTH_AT_JOIN if place == "at the join" else _BOTH] += 1
    return refused


def answer(tree: ThreadForest, thread_index: int) -> list[int]:
    """What a thread joins."""
    if tree.status[thread_index] != Status.DONE:
        return []
    stream = tree.tokens[thread_index, : tree.length[thread_index] - 1].tolist()
    return stream[len(stream) - stream[::-1].index(p.JOIN) :]
