"""Draws the pictures of docs/concepts.md, as SVG in docs/img/.

    python docs/drawings.py            # writes all of them
    python docs/drawings.py --check    # writes nothing; exit status 1 if one is out of date

All of them show the same two demonstrations. Tokens, positions, hidden blocks, packed rows, what a
token sees and advantages are computed by the library; only their places on paper are chosen here.
To keep the pictures small, the tokenizer has one piece for each text; a real one splits it up.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from apr_jax.data.encode import ThreadTokens, tokenize_tree
from apr_jax.data.packing import Rows, pack_trees
from apr_jax.model.attention.packed import visible
from apr_jax.tasks import Spawn, Thread
from apr_jax.text import JOIN, JOINED, SPAWN, SentencePieceTokenizer
from apr_jax.train.rl.advantages import leave_one_out

FOLDER = Path(__file__).resolve().parent / "img"
FONT_SIZE = 12
CHARACTER = 7.3  # Width of a character, in pixels: that of the widest of the fonts, and a little.
CELL = 26  # Height of a token.
GAP = 2  # Between two tokens.
MARGIN = 20

# Colors of the light and of the dark form: what is filled, by its meaning.
COLORS = {
    "card": ("#ffffff", "#161b22"),
    "ink": ("#111827", "#e6edf3"),
    "muted": ("#5b6472", "#9aa4b2"),
    "line": ("#9ca3af", "#6e7681"),
    "prompt": ("#e5e7eb", "#30363d"),
    "text": ("#dbeafe", "#1f3a5f"),
    "block": ("#f5d0fe", "#5a2a66"),
    "joined": ("#cffafe", "#134e58"),
    "answer": ("#fde68a", "#6b4e00"),
    "good": ("#bbf7d0", "#14532d"),
    "bad": ("#fecaca", "#7f1d1d"),
    "other": ("#ddd6fe", "#3f3270"),
}

# The two demonstrations: sums of which children add up parts.
PARTS = (("1+2=", "3+4=", "5+6+7="), ("8+9=", "2+7="))
TREE_COLORS = ("text", "other")


class Drawing:
    """An SVG image that grows as things are drawn on it.

    Args:
      title: what the image shows, for those who cannot see it.
    """

    def __init__(self, title: str):
        self._title = title
        self._elements: list[str] = []
        self._right = 0.0
        self._bottom = 0.0

    def box(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """Draws a filled rectangle."""
        self._grow(x + width, y + height)
        self._elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3"'
            f' class="{color}"/>'
        )

    def text(
        self, x: float, y: float, text: str, color: str = "ink", size: int = FONT_SIZE
    ) -> None:
        """Writes a text whose base line begins at (x, y)."""
        self._grow(x + text_width(text) * size / FONT_SIZE, y + 4)
        self._elements.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" class="{color}">'
            f"{html.escape(text, quote=False)}</text>"
        )

    def token(self, x: float, y: float, width: float, color: str, text: str) -> None:
        """Draws a token: a box with its text in the middle."""
        self.box(x, y, width, CELL, color)
        self.text(x + (width - text_width(text)) / 2, y + 17, text)

    def path(self, points: str, dashed: bool = False, arrow: bool = False) -> None:
        """Draws a line along the path `points`, in the language of SVG."""
        dashes = ' stroke-dasharray="4 4"' if dashed else ""
        head = ' marker-end="url(#arrow)"' if arrow else ""
        self._elements.append(f'<path d="{points}" class="path"{dashes}{head}/>')

    def svg(self) -> str:
        """Returns the image as a file of SVG."""
        width = round(self._right + MARGIN)
        height = round(self._bottom + MARGIN)
        light, dark = (
            "".join(f".{name}{{fill:{colors[index]}}}" for name, colors in COLORS.items())
            + f".path{{fill:none;stroke:{COLORS['line'][index]};stroke-width:1.5}}"
            for index in (0, 1)
        )
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
            f' width="{width}" height="{height}"'
            " font-family=\"ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace\">",
            f"<title>{html.escape(self._title, quote=False)}</title>",
            f"<style>{light}@media (prefers-color-scheme: dark){{{dark}}}</style>",
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"'
            ' markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" class="line"/></marker>',
            "</defs>",
            f'<rect width="{width}" height="{height}" rx="10" class="card"/>',
            *self._elements,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"

    def _grow(self, right: float, bottom: float) -> None:
        """Makes room up to a point."""
        self._right = max(self._right, right)
        self._bottom = max(self._bottom, bottom)


def text_width(text: str) -> float:
    """Returns the width of a text, in pixels."""
    return CHARACTER * len(text)


def cell_width(text: str) -> float:
    """Returns the width of a token with this text."""
    return text_width(text) + 10


# The demonstrations.


@dataclasses.dataclass(frozen=True)
class Example:
    """A demonstration as the library records it, with the texts of its tokens.

    Attributes:
      threads: the token sequences, the root first.
      texts: the text of each token of each thread.
    """

    threads: list[ThreadTokens]
    texts: list[list[str]]

    def decisions(self, thread: int, after_join: bool) -> int:
        """Returns how many tokens a thread samples before or after its join of children."""
        tokens = self.threads[thread].tokens
        sampled = self.threads[thread].sampled
        joined = np.flatnonzero(tokens == JOINED)
        split = int(joined[0]) if len(joined) else len(tokens)
        return int(sampled[split:].sum() if after_join else sampled[:split].sum())


def demonstration(parts: Sequence[str]) -> Thread:
    """Returns the demonstration in which each child adds up one of the parts: "1+2=", "3+4="."""
    children = tuple(_add(part) for part in parts)
    total = sum(int(child.answer) for child in children)
    prompt = "+".join(part.removesuffix("=") for part in parts) + "="
    text = "+".join(child.answer for child in children) + f"={total}"
    return Thread(prompt, (Spawn(children), text), str(total))


def _add(part: str) -> Thread:
    """Returns the child that adds up the numbers of a part one after the other."""
    first, *rest = map(int, part.removesuffix("=").split("+"))
    steps = []
    for number in rest:
        steps.append(f"{first}+{number}={first + number}")
        first += number
    return Thread(part, tuple(steps), str(first))


def examples() -> list[Example]:
    """Returns both demonstrations in the tokens of one tokenizer."""
    trees = [demonstration(parts) for parts in PARTS]
    pieces = sorted({text for tree in trees for text in _texts(tree)}, key=len)
    tokenizer = SentencePieceTokenizer.train(
        pieces, phrases=[piece for piece in pieces if len(piece) > 1]
    )
    found = []
    for tree in trees:
        threads = tokenize_tree(tree, tokenizer)
        texts = [[tokenizer.pieces[token] for token in thread.tokens] for thread in threads]
        found.append(Example(threads, texts))
    return found


def _texts(thread: Thread) -> list[str]:
    """Returns all texts of a thread and of those below it."""
    texts = [thread.prompt, thread.answer]
    for part in thread.body:
        if isinstance(part, str):
            texts.append(part)
            continue
        for child in part.children:
            texts += _texts(child)
    return texts


def token_colors(thread: ThreadTokens) -> list[str]:
    """Returns the color of each token of a thread: what it is."""
    tokens = thread.tokens
    join_at = int(np.flatnonzero(tokens == JOIN)[0])
    joined = np.flatnonzero(tokens == JOINED)
    colors = []
    for place in range(len(tokens)):
        if thread.hidden_block[place]:
            colors.append("block")
        elif not thread.sampled[place]:
            colors.append("joined" if len(joined) and place >= joined[0] else "prompt")
        else:
            colors.append("answer" if place >= join_at else "text")
    return colors


# The drawings.


def thread_tree() -> Drawing:
    """Draws the threads of one tree below each other, over sequential tokens."""
    example = examples()[0]
    drawing = Drawing(
        "A thread tree: the root spawns three children, waits, and goes on with what they join back"
    )
    left = 100
    drawing.text(MARGIN, 30, "thread", "muted")
    drawing.text(left, 30, "time, in tokens that are sampled one after the other", "muted")

    # Texts of the root by what they are: prompt, spawn block, joined block, text and answer.
    texts = example.texts[0]
    block_at = texts.index("<spawn>")
    joined_at = texts.index("<joined>")
    messages = [text for text in texts[block_at:joined_at] if not text.startswith("<")]
    answers = [text for text in texts[joined_at:] if not text.startswith("<")][: len(messages)]
    thought, answer = texts[-4], texts[-2]

    y = 44
    x = float(left)
    for color, text in (("prompt", texts[1]), ("block", f"<spawn> {' '.join(messages)} </spawn>")):
        drawing.token(x, y, cell_width(text), color, text)
        x += cell_width(text) + GAP
    spawned = x + 10
    ends = []
    for thread in range(1, len(example.threads)):
        row = y + 46 * thread
        message, *steps, _, result, _ = example.texts[thread][1:]
        drawing.path(f"M{spawned - 10:g} {y + CELL / 2:g}V{row + CELL / 2:g}H{spawned:g}")
        drawing.text(MARGIN, row + 17, f"child {thread}")
        place = spawned
        for color, text in (
            ("prompt", message),
            *(("text", step) for step in steps),
            ("answer", f"<join> {result}"),
        ):
            drawing.token(place, row, cell_width(text), color, text)
            place += cell_width(text) + GAP
        ends.append((place, row + CELL / 2))

    resumed = max(place for place, _ in ends) + 14
    for place, middle in ends:
        drawing.path(f"M{place:g} {middle:g}H{resumed - 6:g}", dashed=True)
    drawing.path(f"M{resumed - 6:g} {ends[-1][1]:g}V{y + CELL / 2:g}H{resumed:g}", dashed=True)
    drawing.path(f"M{spawned:g} {y + CELL / 2:g}H{resumed - 6:g}", dashed=True)
    drawing.text((spawned + resumed) / 2 - text_width("waits") / 2, y + 8, "waits", "muted")
    drawing.text(MARGIN, y + 17, "root")
    x = resumed
    for color, text in (
        ("joined", f"<joined> {' '.join(answers)}"),
        ("text", thought),
        ("answer", f"<join> {answer}"),
    ):
        drawing.token(x, y, cell_width(text), color, text)
        x += cell_width(text) + GAP

    _legend(
        drawing,
        y + 46 * len(example.threads) + 6,
        (
            ("prompt", "given: prompt or message"),
            ("block", "spawn block"),
            ("joined", "given: answers of the children"),
            ("text", "text"),
            ("answer", "answer"),
        ),
    )
    return drawing


def token_sequence() -> Drawing:
    """Draws the tokens of a root and of one child, with their positions."""
    example = examples()[0]
    root = example.threads[0]
    texts = example.texts[0]
    drawing = Drawing(
        "The token sequence of a root with its positions: what the children join stands at the"
        " positions of the spawn block, which is hidden from then on"
    )
    # A column for each position, as wide as the widest token that ever stands there.
    widths = np.zeros(int(root.position.max()) + 1)
    for position, text in zip(root.position, texts, strict=True):
        widths[position] = max(widths[position], cell_width(text))
    starts = MARGIN + np.concatenate([[0.0], np.cumsum(widths + GAP)])  # [positions + 1]
    joined_at = int(np.flatnonzero(root.tokens == JOINED)[0])
    spawn_at = int(np.flatnonzero(root.tokens == SPAWN)[0])
    colors = token_colors(root)

    above, below = 64, 134
    drawing.text(MARGIN, 30, "root: up to its spawn")
    for place, (position, text) in enumerate(zip(root.position, texts, strict=True)):
        y = above if place < joined_at else below
        drawing.token(starts[position], y, widths[position], colors[place], text)
        drawing.text(starts[position] + 2, y - 5, str(position), "muted", 10)
    after_block = starts[root.position[joined_at - 1] + 1]
    drawing.text(after_block + 8, above + 17, "waits for its children", "muted")

    left = starts[root.position[spawn_at]]
    middle = (above + CELL + below) / 2
    drawing.text(left + 12, middle + 1, "the block is hidden from here on: same positions", "muted")
    drawing.path(f"M{left + 5:g} {above + CELL + 3}V{below - 17}", arrow=True)
    drawing.text(MARGIN, below - 22, "root: goes on")

    child = example.threads[1]
    y = below + 84
    drawing.text(MARGIN, y - 24, "first child: its message is all that it sees of the root")
    x = float(MARGIN)
    for position, text, color in zip(
        child.position, example.texts[1], token_colors(child), strict=True
    ):
        drawing.text(x + 2, y - 5, str(position), "muted", 10)
        drawing.token(x, y, cell_width(text), color, text)
        x += cell_width(text) + GAP

    _legend(
        drawing,
        y + CELL + 24,
        (
            ("prompt", "prompt token"),
            ("joined", "prompt token: joined block"),
            ("block", "sampled, hidden block"),
            ("text", "sampled"),
            ("answer", "sampled: answer"),
        ),
    )
    return drawing


@dataclasses.dataclass
class Stay:
    """A thread in a decode slot: from when to when."""

    tree: int
    thread: int
    slot: int
    start: int
    stop: int


def schedule(trees: Sequence[Example], slots: int) -> list[Stay]:
    """Gives decode slots to the threads of some trees: an idle slot takes who has waited longest.

    All trees have one spawn, that of their roots.
    """
    ready = [(tree, 0, False) for tree in range(len(trees))]  # (tree, thread, after its join)
    running: list[Stay] = []
    done: list[Stay] = []
    step = 0
    while ready or running:
        ended = [stay for stay in running if stay.stop == step]
        running = [stay for stay in running if stay.stop > step]
        for stay in ended:
            done.append(stay)
            threads = len(trees[stay.tree].threads)
            of_tree = [other for other in done if other.tree == stay.tree]
            if stay.thread == 0 and len(of_tree) == 1:
                ready += [(stay.tree, child, False) for child in range(1, threads)]
            elif stay.thread > 0 and len(of_tree) == threads:
                ready.append((stay.tree, 0, True))
        for slot in sorted(set(range(slots)) - {stay.slot for stay in running}):
            if ready:
                tree, thread, after_join = ready.pop(0)
                length = trees[tree].decisions(thread, after_join)
                running.append(Stay(tree, thread, slot, step, step + length))
        step += 1
    return done


def decode_slots() -> Drawing:
    """Draws which thread holds which decode slot at which decode step."""
    trees = examples()
    stays = schedule(trees, slots=3)
    drawing = Drawing("Three decode slots over time: idle slots take threads of any tree")
    left, top, step_width, row = 90, 62, 34, 40
    last = max(stay.stop for stay in stays)

    drawing.text(MARGIN, 30, "one decode step samples a token on each slot that is taken", "muted")
    for step in range(last + 1):
        drawing.text(left + step * step_width - 3, top - 8, str(step), "muted", 10)
        drawing.path(f"M{left + step * step_width} {top - 3}v3")
    for slot in range(3):
        drawing.text(MARGIN, top + slot * row + 23, f"slot {slot}")
        drawing.path(f"M{left} {top + slot * row + 19}H{left + last * step_width}", dashed=True)
    for stay in stays:
        name = "root" if stay.thread == 0 else f"child {stay.thread}"
        if stay.thread == 0 and stay.start > 0:
            name = "root again"
        label = f"{'AB'[stay.tree]} {name}"
        width = (stay.stop - stay.start) * step_width - GAP
        y = top + stay.slot * row + 6
        drawing.token(left + stay.start * step_width + 1, y, width, TREE_COLORS[stay.tree], label)

    _legend(drawing, top + 3 * row + 14, tuple(zip(TREE_COLORS, ("tree A", "tree B"), strict=True)))
    return drawing


def rl_step() -> Drawing:
    """Draws a step of reinforcement learning on the trees of one problem."""
    drawing = Drawing(
        "A step of RL: four trees of one problem, their answers, rewards and advantages, and what"
        " the update does to the sampled tokens of all their threads"
    )
    right_answer = examples()[0].texts[0][-2]
    # Bars of each tree, (start, length) a thread, the root's two first; and the tree's answer.
    trees = (
        ([(0, 40), (96, 34), (42, 34), (42, 34), (42, 52)], right_answer),
        ([(0, 30), (72, 40), (32, 38), (32, 30)], "27"),
        ([(0, 124)], "18"),
        ([(0, 34), (88, 36), (36, 50), (36, 44)], right_answer),
    )
    rewards = np.array([[float(answer == right_answer) for _, answer in trees]])
    advantages = np.asarray(leave_one_out(rewards, np.ones_like(rewards, bool)))[0]

    columns = (MARGIN, 180, 260, 340, 450)
    heads = ("1 rollout", "2 answer", "3 reward", "4 advantage", "5 update: all sampled tokens")
    for x, head in zip(columns, heads, strict=True):
        drawing.text(x, 30, head, "muted")
    for index, (bars, answer) in enumerate(trees):
        top = 46 + 72 * index
        color = "good" if advantages[index] > 0 else "bad"
        verdict = "✓" if answer == right_answer else "✗"
        _bars(drawing, columns[0], top, bars, "text")
        drawing.text(columns[1], top + 14, f"{answer} {verdict}")
        drawing.text(columns[2], top + 14, f"{rewards[0, index]:g}")
        drawing.text(columns[3], top + 14, f"{advantages[index]:+.2f}")
        _bars(drawing, columns[4], top, bars, color)
        more = "more likely" if advantages[index] > 0 else "less likely"
        drawing.text(columns[4] + 148, top + 14, more)
    return drawing


def _bars(
    drawing: Drawing, x: float, y: float, bars: Sequence[tuple[int, int]], color: str
) -> None:
    """Draws a small thread tree: a bar for each stretch of a thread, the root's on one line."""
    row = 0
    for index, (start, length) in enumerate(bars):
        is_root_again = index == 1 and len(bars) > 1
        if index > 0 and not is_root_again:
            row += 1
        drawing.box(x + start, y + row * 14 + 4, length, 10, color)
    if len(bars) > 1:
        waits = bars[0][0] + bars[0][1]
        drawing.path(f"M{x + waits} {y + 9}H{x + bars[1][0]}", dashed=True)


def packing() -> Drawing:
    """Draws two trees in packed rows, and what the tokens of a row see."""
    trees = examples()
    rows = pack_trees([tree.threads for tree in trees], length=25)
    drawing = Drawing(
        "Threads of two trees side by side in rows of one length, and which tokens of a row see"
        " which"
    )
    size = 18
    left, top = 76, 48
    drawing.text(MARGIN, 30, "whole threads in rows of 25 tokens, the longest first", "muted")
    for row in range(rows.tokens.shape[0]):
        y = top + row * 34
        drawing.text(MARGIN, y + 17, f"row {row}")
        _packed_row(drawing, rows, row, left, y, size)

    y = top + rows.tokens.shape[0] * 34 + 26
    drawing.text(MARGIN, y, "row 1: the token of each line sees the colored columns", "muted")
    _seen(drawing, rows, 1, left, y + 12)
    _legend(
        drawing,
        y + 12 + rows.tokens.shape[1] * 11 + 14,
        (("text", "tree A"), ("other", "tree B"), ("block", "hidden block")),
    )
    return drawing


def _packed_row(drawing: Drawing, rows: Rows, row: int, left: float, y: float, size: float) -> None:
    """Draws the threads of a row as boxes with their names, and its padding."""
    segments = rows.segment[row]
    for segment in range(1, int(segments.max()) + 1):
        columns = np.flatnonzero(segments == segment)
        tree = int(rows.tree[row, columns[0]])
        is_root = bool((rows.tokens[row, columns] == SPAWN).any())
        name = f"{'AB'[tree]} {'root' if is_root else 'child'}"
        width = len(columns) * size - GAP
        drawing.token(left + columns[0] * size, y, width, TREE_COLORS[tree], name)
    padding = np.flatnonzero(segments == 0)
    if len(padding):
        x = left + padding[0] * size
        drawing.path(f"M{x:g} {y + CELL / 2:g}h{len(padding) * size:g}", dashed=True)


def _seen(drawing: Drawing, rows: Rows, row: int, left: float, top: float) -> None:
    """Draws a square for each pair of a token and one that it sees."""
    size = 11
    segment = rows.segment[row]
    block = rows.hidden_block[row]
    terms = [jnp.asarray(term) for term in (segment, block, np.arange(len(segment)))]
    sees = np.asarray(visible(*terms, *terms)) & (segment > 0)[:, None]
    for query in range(len(segment)):
        for key in range(len(segment)):
            if sees[query, key]:
                color = "block" if block[key] else TREE_COLORS[rows.tree[row, key]]
                drawing.box(left + key * size, top + query * size, size - 1, size - 1, color)

    x = left + len(segment) * size + 16
    hidden = np.flatnonzero(block)
    notes = (
        (1, "each token sees those before it"),
        (int(hidden[0]) + 1, "the spawn block sees itself, too,"),
        (int(hidden[0]) + 3, "and nothing later sees the block"),
        (int(np.flatnonzero(segment == 2)[0]) + 2, "the child sees its own thread alone"),
    )
    for line, note in notes:
        drawing.text(x, top + line * size + 4, note)


def _legend(drawing: Drawing, y: float, entries: Sequence[tuple[str, str]]) -> None:
    """Draws a line that says what the colors mean."""
    x = float(MARGIN)
    for color, meaning in entries:
        drawing.box(x, y, 14, 14, color)
        drawing.text(x + 20, y + 11, meaning, "muted")
        x += 20 + text_width(meaning) + 18


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "thread_tree": thread_tree,
    "token_sequence": token_sequence,
    "decode_slots": decode_slots,
    "rl_step": rl_step,
    "packing": packing,
}


def main(arguments: list[str]) -> int:
    """Writes the drawings, or checks them, and returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if one is old")
    flags = parser.parse_args(arguments)
    old = 0
    for name, draw in DRAWINGS.items():
        path = FOLDER / f"{name}.svg"
        svg = draw().svg()
        if path.is_file() and path.read_text(encoding="utf-8") == svg:
            continue
        old += 1
        print(f"docs/img/{path.name} is out of date" if flags.check else f"docs/img/{path.name}")
        if not flags.check:
            path.write_text(svg, encoding="utf-8")
    return int(bool(flags.check and old))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
