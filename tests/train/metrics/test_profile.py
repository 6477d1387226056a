"""`--profile`: the trace of one step, and steps that a run does not have."""

import gzip
import re

import pytest
from helpers.whole_runs import changed

from apr_jax.errors import UsageError
from apr_jax.train.metrics import profile
from apr_jax.train.metrics.profile import profiled
from apr_jax.train.rl.trainer import train_rl
from apr_jax.train.sft import train_sft


@pytest.mark.thorough
def test_a_profile_of_a_step_is_written_and_named(config, data_dir, tmp_path, capsys):
    train_sft(config, data_dir, tmp_path, "apr", progress=False, profile=3)
    assert f"profile of step 3: {tmp_path / 'profile'}" in capsys.readouterr().err
    (run,) = (tmp_path / "profile" / "plugins" / "profile").iterdir()
    assert list(run.glob("*.xplane.pb")) and (run / "perfetto_trace.json.gz").is_file()
    with pytest.raises(UsageError, match="--profile 3: of the run in .* all 6 steps are done"):
        train_sft(config, data_dir, tmp_path, "apr", progress=False, profile=3)


@pytest.mark.thorough
def test_rl_profile_has_rollout_and_update(config, data_dir, checkpoint, tmp_path, capsys):
    short = changed(config, rl={"steps": 2, "validate_every": 9})
    train_rl(short, data_dir, tmp_path, checkpoint, progress=False, profile=2)
    assert f"profile of step 2: {tmp_path / 'profile'}" in capsys.readouterr().err
    (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    called = re.findall(
        r"PjitFunction\((rollout|step)\)", gzip.decompress(trace.read_bytes()).decode()
    )
    assert called.count("step") == 2 * called.count("rollout") > 0, "two PPO epochs"


@pytest.mark.parametrize("step", [0, 2, 7])
def test_a_step_outside_the_run_is_refused_by_name(tmp_path, step):
    with pytest.raises(
        UsageError, match=f"--profile {step}: of the run in .* steps 3 to 6 are left"
    ):
        profiled(None, step, start=2, steps=6, workdir=tmp_path)


def test_only_the_step_is_traced(tmp_path, monkeypatch):
    traced = []
    monkeypatch.setattr(
        profile.jax.profiler, "trace", lambda *_, **__: traced.append(len(done)) or _Nothing()
    )
    done = []
    advance = profiled(
        lambda state, step, stopping: (done.append(step), {}), 5, start=2, steps=6, workdir=tmp_path
    )
    for step in range(2, 6):
        advance(None, step, lambda: 0)
    assert done == [2, 3, 4, 5] and traced == [2]


class _Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_libtpu_without_a_tpu_is_refused_before_it_crashes(tmp_path, monkeypatch):
    monkeypatch.setattr(profile.importlib.util, "find_spec", lambda name: name)
    profiled(None, 1, start=0, steps=6, workdir=tmp_path)  # JAX was told not to look for one.
    monkeypatch.setattr(profile, "jax", _Fallen())
    with pytest.raises(UsageError, match="set JAX_PLATFORMS=cpu"):
        profiled(None, 1, start=0, steps=6, workdir=tmp_path)


class _Fallen:
    """JAX after it has looked for a TPU in vain."""

    class config:
        jax_platforms = None

    @staticmethod
    def default_backend():
        return "cpu"
