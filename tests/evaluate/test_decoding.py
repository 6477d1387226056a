"""What an evaluation does not ask for is the model's own: every limit, whether and how the protocol
is kept.
"""

import dataclasses
import types

import pytest
from helpers.whole_runs import changed

from apr_jax.bench import trees
from apr_jax.cli import main
from apr_jax.evaluate import runner as evaluation
from apr_jax.evaluate.decoding import Decoding, limits_of
from apr_jax.threads import Limits

# No field has its default, so that one that gets lost on the way shows.
LIMITS = Limits(
    window=40,
    max_thread_tokens=90,
    max_threads=4,
    children=3,
    max_depth=2,
    max_tokens=150,
    max_sequential=99,
    constrain=True,
)


@pytest.fixture
def restored(config):
    """A model of which only the config is asked for."""
    return types.SimpleNamespace(config=changed(config, limits=LIMITS))


def test_limits_that_nobody_asked_for_are_the_models_own(restored):
    defaults = {field.name: field.default for field in dataclasses.fields(Limits)}
    assert all(getattr(LIMITS, name) != default for name, default in defaults.items())
    assert limits_of(restored, Decoding()) == LIMITS


def test_requested_limit_replaces_that_limit_alone(restored):
    assert limits_of(restored, Decoding(window=30)) == dataclasses.replace(LIMITS, window=30)
    assert limits_of(restored, Decoding(constrain=False)) == dataclasses.replace(
        LIMITS, constrain=False
    )
    free = types.SimpleNamespace(
        config=changed(restored.config, limits=dataclasses.replace(LIMITS, constrain=False))
    )
    assert limits_of(free, Decoding(constrain=True)) == LIMITS


@pytest.mark.parametrize(
    ("flags", "constrain"),
    [((), None), (("--constrain",), True), (("--no-constrain",), False)],
    ids=str,
)
def test_apr_eval_sets_constrain_only_by_a_flag(
    checkpoint, data_dir, tmp_path, monkeypatch, flags, constrain
):
    asked = []

    def evaluate(restored, problems, out, decoding):
        asked.append(decoding)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    paths = ["--checkpoint", checkpoint, "--problems", data_dir / "test.jsonl", "--out", tmp_path]
    assert main.run(["eval", *map(str, paths), *flags]) == main.INTERRUPTED
    assert asked == [Decoding(constrain=constrain)]


def test_the_benchmark_decodes_as_its_peers_do(restored, monkeypatch):
    """Other engines know no protocol, so a model that was trained with it must decode without it
    here.
    """
    made = []

    def make_runner(restored, limits, batch):
        made.append(limits)
        return types.SimpleNamespace(params=None)

    monkeypatch.setattr(trees, "make_runner", make_runner)
    trees.engine(restored, [[1, 10]])
    assert made == [dataclasses.replace(LIMITS, constrain=False)]
