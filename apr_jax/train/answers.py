"""The answers that the trees of a forest gave, as text."""

import numpy as np

from apr_jax.text.tokenizer import JOIN, Tokenizer
from apr_jax.threads.forest import ROOT, Status, ThreadForest


def extract_answers(forest: ThreadForest, tokenizer: Tokenizer) -> list[str]:
    """Returns, for each tree, the text between its root's `<join>` and `<eos>`.

    The text is "" for a tree whose root ended in any other way.

    Args:
      forest: B trees, numpy leaves.
      tokenizer: the tokenizer of the tokens.
    """
    tokens = np.asarray(forest.tokens)[:, ROOT]  # [B, L]
    length = np.asarray(forest.length)[:, ROOT]  # [B]
    done = np.asarray(forest.status)[:, ROOT] == Status.DONE  # [B]

    answers = []
    for root_tokens, root_length, is_done in zip(tokens, length, done, strict=True):
        if not is_done:
            answers.append("")
            continue
        # A root that is DONE has exactly one <join>: the protocol ends a thread at any other.
        start = int(np.argmax(root_tokens == JOIN)) + 1
        answers.append(tokenizer.decode(root_tokens[start:root_length].tolist()))
    return answers
