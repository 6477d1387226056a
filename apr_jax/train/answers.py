"""What the trees of a forest answered."""

import numpy as np

from apr_jax.text.tokenizer import JOIN, Tokenizer
from apr_jax.threads.forest import ROOT, Status, ThreadForest


def extract_answers(forest: ThreadForest, tokenizer: Tokenizer) -> list[str]:
    """The text between each root's `<join>` and `<eos>`; "" for a tree whose root ended in any
    other way.

    Args:
      forest: B trees, numpy leaves.
    """
    tokens, length = np.asarray(forest.tokens)[:, ROOT], np.asarray(forest.length)[:, ROOT]
    done = np.asarray(forest.status)[:, ROOT] == Status.DONE
    answers = []
    for stream, size, ended in zip(tokens, length, done, strict=True):
        # A root that is DONE has exactly one <join>: the protocol ends a thread at any other.
        start = int(np.argmax(stream == JOIN)) + 1
        answers.append(tokenizer.decode(stream[start:size].tolist()) if ended else "")
    return answers
