"""One tree of a forest as plain text, for a look now and then at what the model does."""

import numpy as np

from apr_jax.tasks import Problem
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import Status, ThreadForest
from apr_jax.threads.draw import draw_tree, thread_names

MOST = 8_000  # Characters; TensorBoard keeps every sample of a run in memory.


def tree_text(
    forest: ThreadForest, tree: int, problem: Problem, correct: bool | None, tokenizer: Tokenizer
) -> str:
    """The problem and the verdict, the threads as lanes over decode steps, then what each thread
    read and wrote.

    Args:
      forest: numpy leaves.
      correct: None if that is unknown.
    """
    verdict = {True: "right", False: "wrong", None: "unknown"}[correct]
    names, lanes = thread_names(forest, tree), draw_tree(forest, tree)
    width = max(map(len, names.values()))
    counts = [
        f"{int(forest.total_tokens[tree])} tokens",
        f"{int(forest.sequential_tokens[tree])} in sequence",
        f"{int(forest.children[tree])} children",
    ]
    lines = [
        f"{','.join(map(str, problem.numbers))} -> {problem.target}: {verdict}",
        ", ".join(counts),
        "",
        *(f"{name:{width}}  {lanes[thread_index]}" for thread_index, name in names.items()),
    ]
    for thread_index, name in names.items():
        stream = np.asarray(forest.tokens)[
            tree, thread_index, : int(forest.length[tree, thread_index])
        ]
        status = Status(int(forest.status[tree, thread_index])).name.lower().replace("_", " ")
        lines += ["", f"{name} ({status})", tokenizer.show(stream.tolist())]
    text = "\n".join(lines)
    return text if len(text) <= MOST else f"{text[:MOST]}\n... {len(text) - MOST} characters more"
