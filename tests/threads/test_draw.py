"""The drawing of a tree, against a family worked out by hand."""

import jax
import numpy as np

from apr_jax.threads import Limits, interpret, make_prompts
from apr_jax.threads import protocol as p
from apr_jax.threads.draw import draw_tree, thread_names

A = len(p.CONTROL_PIECES)


def family():
    """Makes a tree: the root spawns two children, the second spawns one, the root spawns again."""
    written = iter(
        [
            *(A, p.SPAWN, p.MSG, p.MSG, A, p.END_SPAWN),  # Root: 6 steps.
            *(A, p.JOIN, p.EOS),  # Thread 1: 3 steps.
            *(p.SPAWN, p.MSG, p.END_SPAWN),  # Thread 2, up to its spawn: 3 steps.
            *(A, A, p.JOIN, p.EOS),  # The child of thread 2: 4 steps.
            *(p.JOIN, p.EOS),  # Thread 2, after its join: 2 steps.
            *(p.SPAWN, p.MSG, p.END_SPAWN),  # Root, up to its second spawn: 3 steps.
            p.EOS,  # The root's last child: 1 step.
            *(p.JOIN, A, p.EOS),  # Root, after its second join: 3 steps.
        ]
    )

    def logits_of(seen):
        return np.eye(A + 1, dtype=np.float32)[next(written)] * 50

    limits = Limits(window=30, max_thread_tokens=60, max_threads=16, children=3, max_depth=2)
    tree = interpret(logits_of, make_prompts([[p.BOS, A]], 2), 0, jax.random.key(0), limits)
    return jax.tree.map(lambda field: np.asarray(field)[None], tree)


def test_timelines_match_a_tree_worked_out_by_hand():
    forest = family()
    drawn = draw_tree(forest, 0)
    names = list(thread_names(forest, 0).values())
    assert names[:3] == ["root", "└ 1", "└ 2"]
    assert names[3].startswith("  └ ") and names[4].startswith("└ ")
    timelines = list(drawn.values())
    assert timelines[0] == "━━━━━┳" + "┄┄┄┄┄┄┄┄┻" + "━━┳" + "┻" + "━━╸"
    assert timelines[1] == " " * 6 + "━━╸"
    assert timelines[2] == " " * 6 + "━━┳" + "┄┄┄┻" + "━╸"
    assert timelines[3] == " " * 9 + "━━━╸"
    assert timelines[4] == " " * 18 + "╸"
    assert len(timelines) == 5


def test_a_prefix_of_the_steps_and_a_smaller_scale():
    forest = family()
    early = draw_tree(forest, 0, until=8)
    assert list(early.values())[:4] == ["━━━━━┳┄┄", "      ━━", "      ━━", ""]
    assert all(len(timeline) <= 11 for timeline in draw_tree(forest, 0, width=10).values())
