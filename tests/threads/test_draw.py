"""The drawing of a tree, against a family worked out by hand."""

import jax
import numpy as np

from apr_jax.threads import Limits, interpret, make_prompts
from apr_jax.threads import protocol as p
from apr_jax.threads.draw import draw_tree, thread_names

A = len(p.CONTROL_PIECES)


def family():
    """The root spawns two children, the second of which spawns one; then the root spawns once
    more.
    """
    written = iter(
        [
            *(A, p.SPAWN, p.MSG, p.MSG, A, p.END_SPAWN),  # Root: 6 steps.
            *(A, p.JOIN, p.EOS),  # Slot 1: 3 steps.
            *(p.SPAWN, p.MSG, p.END_SPAWN),  # Slot 2: 3 steps,
            *(A, A, p.JOIN, p.EOS),  # its child: 4,
            *(p.JOIN, p.EOS),  # and 2.
            *(p.SPAWN, p.MSG, p.END_SPAWN),  # Root: 3 steps,
            p.EOS,  # its last child: 1,
            *(p.JOIN, A, p.EOS),  # and 3.
        ]
    )

    def logits_of(seen):
        return np.eye(A + 1, dtype=np.float32)[next(written)] * 50

    limits = Limits(window=30, max_thread_tokens=60, max_threads=16, children=3, max_depth=2)
    tree = interpret(logits_of, make_prompts([[p.BOS, A]], 2), 0, jax.random.key(0), limits)
    return jax.tree.map(lambda field: np.asarray(field)[None], tree)


def test_lanes_by_hand():
    forest = family()
    drawn = draw_tree(forest, 0)
    names = list(thread_names(forest, 0).values())
    assert names[:3] == ["root", "└ 1", "└ 2"]
    assert names[3].startswith("  └ ") and names[4].startswith("└ ")
    lanes = list(drawn.values())
    assert lanes[0] == "━━━━━┳" + "┄┄┄┄┄┄┄┄┻" + "━━┳" + "┻" + "━━╸"
    assert lanes[1] == " " * 6 + "━━╸"
    assert lanes[2] == " " * 6 + "━━┳" + "┄┄┄┻" + "━╸"
    assert lanes[3] == " " * 9 + "━━━╸"
    assert lanes[4] == " " * 18 + "╸"
    assert len(lanes) == 5


def test_a_prefix_of_the_steps_and_a_smaller_scale():
    forest = family()
    early = draw_tree(forest, 0, until=8)
    assert list(early.values())[:4] == ["━━━━━┳┄┄", "      ━━", "      ━━", ""]
    assert all(len(lane) <= 11 for lane in draw_tree(forest, 0, width=10).values())
