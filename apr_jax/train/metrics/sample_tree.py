"""One tree of a forest as plain text, to see in a tracker what the model does."""

import numpy as np

from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import Status, ThreadForest
from apr_jax.threads.draw import draw_tree, thread_names

MOST = 8_000  # Characters of a text, because TensorBoard keeps every text of a run in memory.


def tree_text(
    forest: ThreadForest, tree: int, problem: str, correct: bool | None, tokenizer: Tokenizer
) -> str:
    """Draws a tree as text.

    First comes the problem with the verdict, then a line for each thread that shows when it
    decoded, then all that each thread read and wrote.

    Args:
      forest: numpy leaves.
      tree: which tree of the forest.
      problem: the problem, as people read it (`Task.show`).
      correct: whether its answer is right; None if that is unknown.
      tokenizer: the tokenizer of the tokens.
    """
    verdict = {True: "right", False: "wrong", None: "unknown"}[correct]
    names = thread_names(forest, tree)
    timelines = draw_tree(forest, tree)
    width = max(map(len, names.values()))
    counts = [
        f"{int(forest.total_tokens[tree])} tokens",
        f"{int(forest.sequential_tokens[tree])} in sequence",
        f"{int(forest.children[tree])} children",
    ]
    lines = [
        f"{problem}: {verdict}",
        ", ".join(counts),
        "",
        *(f"{name:{width}}  {timelines[thread_index]}" for thread_index, name in names.items()),
    ]
    for thread_index, name in names.items():
        length = int(forest.length[tree, thread_index])
        tokens = np.asarray(forest.tokens)[tree, thread_index, :length]
        status = Status(int(forest.status[tree, thread_index])).name.lower().replace("_", " ")
        lines += ["", f"{name} ({status})", tokenizer.show(tokens.tolist())]

    text = "\n".join(lines)
    if len(text) <= MOST:
        return text
    return f"{text[:MOST]}\n... {len(text) - MOST} characters more"
