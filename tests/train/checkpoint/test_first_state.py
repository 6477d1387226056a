"""A run does not keep the state with which it begins beside the one that it trains."""

import gc
import weakref

import jax
import pytest
from helpers.checkpoints import OPTIMIZER

from apr_jax.model.transformer import init_params
from apr_jax.train import session
from apr_jax.train.loop import Stage
from apr_jax.train.state import init_state


@pytest.mark.parametrize("resumes", [False, True])
def test_the_loop_alone_holds_the_state(
    run, config, mesh, copied, tmp_path, monkeypatch, late_complaints, resumes
):
    held = []

    def note(state):
        held.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(state))
        return state

    class Loop:
        def __init__(self, stage, state, *others):
            self.state = note(state)

        def run(self, unvalidated):
            assert int(self.state.step) == (4 if resumes else 0)
            del self.state
            gc.collect()
            return [reference() is None for reference in held]

    monkeypatch.setattr(session, "Loop", Loop)
    stage = Stage(
        name="sft",
        steps=9,
        advance=None,
        save_every=1,
        max_consecutive_skipped=3,
        data_state=dict,
        batch=lambda step: {},
        host_seconds=lambda: 0.0,
    )
    params = init_params(config.model, 31, jax.random.key(0))
    gone = session.train(
        run,
        copied if resumes else tmp_path / "new",
        note(init_state(params, OPTIMIZER, mesh)),
        stage,
        restore_data=lambda saved: None,
        log_every=1,
        counted=(),
        shown=(),
        progress=False,
    )
    assert len(gone) > 10
    assert all(gone)
