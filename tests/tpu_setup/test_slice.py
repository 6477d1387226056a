"""The scripts against a cloud that refuses, preempts and goes silent; and for real, on two hosts that are this machine."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SCRIPTS

from apr_jax.config import to_dict
from apr_jax.learn.checkpoint import load_checkpoint

CONFIG = ROOT / "experiments" / "nano.py"
VERBS = {
    "create": ["--spot"],
    "bootstrap": [],
    "start": ["--config", CONFIG, "--set", "seed=1"],
    "logs": [],
    "status": [],
    "stop": [],
    "fetch": [],
    "delete": [],
}


@pytest.fixture(autouse=True)
def any_wheel(monkeypatch):
    """A file that is copied to the hosts; only the slow test needs it to be one."""
    made = not list((ROOT / "dist").glob("apr_jax-*.whl"))
    path = ROOT / "dist" / "apr_jax-0-py3-none-any.whl"
    if made:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    yield
    if made:
        path.unlink()


@pytest.mark.skipif(shutil.which("shellcheck", path=os.path.dirname(sys.executable)) is None, reason="no shellcheck")
def test_the_shell_is_clean():
    command = shutil.which("shellcheck", path=os.path.dirname(sys.executable))
    found = subprocess.run(
        [command, "-x", "-P", "SCRIPTDIR", *sorted(SCRIPTS.glob("*.sh"))], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_prints_commands_and_calls_nothing(cloud, verb):
    status, said, _ = cloud.call("slice.sh", verb, *VERBS[verb], "--dry-run")
    assert status == 0 and cloud.calls() == []
    assert all(line.startswith("+ ") for line in said.splitlines())
    assert ("gcloud" in said and "us-west4-a" in said) or verb == "fetch"


def test_the_watcher_dry_runs_too(cloud):
    status, said, _ = cloud.call("watch.sh", "--dry-run", "--spot", "--config", CONFIG)
    assert status == 0 and cloud.calls() == []
    for part in (
        "queued-resources create",
        "--spot",
        "host.sh\\ bootstrap",
        "host.sh\\ start",
        "queued-resources delete",
    ):
        assert part in said


@pytest.mark.parametrize("script", ["slice.sh", "watch.sh", "gke.sh"])
def test_help_is_the_text_at_the_top(cloud, script):
    status, said, _ = cloud.call(script, "--help")
    assert status == 0 and "--dry-run prints" in said and "Settings" in said and not said.startswith("#")


@pytest.mark.parametrize(
    ("script", "words", "settings", "told"),
    [
        ("slice.sh", ["create"], {"TPU_ZONE": ""}, "$TPU_ZONE is not set: export TPU_ZONE=us-west4-a"),
        ("slice.sh", ["create"], {"TPU_TYPE": ""}, "$TPU_TYPE is not set"),
        ("slice.sh", ["create"], {"TPU_TYPE": "v9-8"}, "TPU_TYPE=v9-8: must be v2-, v3-"),
        ("slice.sh", ["create", "--cheap"], {}, "create --cheap: must be --spot or --reserved"),
        ("slice.sh", ["bootstrap"], {"RUN": ""}, "$RUN is not set: export RUN=gs://BUCKET/paper"),
        ("slice.sh", ["bootstrap"], {"RUN": "runs/x"}, "RUN=runs/x: must be gs://BUCKET/FOLDER, or the absolute path"),
        ("slice.sh", ["start"], {}, "give --config FILE"),
        ("slice.sh", ["start", "--config", "nowhere.py"], {}, "--config nowhere.py: no such file"),
        ("slice.sh", ["fly"], {}, "fly: must be create, bootstrap"),
        ("watch.sh", [], {}, "give --config FILE"),
        ("gke.sh", ["start", "--config", CONFIG], {}, "$GKE_IMAGE is not set"),
        ("gke.sh", ["start", "--config", CONFIG], {"GKE_IMAGE": "i", "RUN": "/disk"}, "RUN=/disk: pods share no disk"),
        (
            "gke.sh",
            ["start", "--config", CONFIG],
            {"GKE_IMAGE": "i", "GKE_TPU": "v9", "GKE_TOPOLOGY": "4x4"},
            "GKE_TPU=v9: must be v4, v5e, v5p or v6e",
        ),
    ],
)
def test_wrong_use_is_one_line_and_touches_nothing(cloud, script, words, settings, told):
    status, said, errors = cloud.call(script, *words, **settings)
    assert (status, said) == (2, "") and cloud.calls() == []
    assert len(errors.splitlines()) == 1 and told in errors


def test_five_commands_from_nothing_to_the_log(cloud):
    for verb in ("create", "bootstrap", "start", "logs"):  # The first is `make wheel`.
        status, _, errors = cloud.call("slice.sh", verb, *VERBS[verb])
        assert status == 0, errors
    assert cloud.kinds() == ["create", "bootstrap", "start"]
    (create,) = [words for words in cloud.calls() if "create" in words]
    assert {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} <= set(create)
    (start,) = [word for words in cloud.calls() for word in words if "host.sh start" in word]
    assert start == "--command=bash apr/host.sh start --config apr/nano.py --out gs://bucket/run --set seed=1 "
    assert "--worker=all" in next(words for words in cloud.calls() if start in words)


def test_a_second_create_waits_for_what_was_asked_for(cloud):
    (cloud.folder / "state").write_text("PROVISIONING")
    assert cloud.call("slice.sh", "create")[0] == 0
    assert cloud.kinds() == []


def test_quota(cloud):
    cloud.plays(create=["quota"])
    status, _, errors = cloud.call("slice.sh", "create")
    assert status == 1 and "has been exceeded" in errors
    assert "the request for v5litepod-16 in us-west4-a was refused; if by quota: another zone" in errors


def test_a_request_that_cannot_be_met(cloud):
    (cloud.folder / "state").write_text("FAILED")
    status, _, errors = cloud.call("slice.sh", "create")
    assert status == 1 and "apr is FAILED, and won't come up: slice.sh delete" in errors


def test_a_host_that_never_comes_up_is_named(cloud):
    (cloud.folder / "state").write_text("ACTIVE")
    cloud.plays(ready=["down 2"])
    status, _, errors = cloud.call("slice.sh", "bootstrap")
    assert status == 1 and cloud.kinds() == []
    assert "(try 3 of 3)" in errors and "host 2 of apr never came up" in errors


def _watch(cloud, *words, **settings):
    return cloud.call("watch.sh", "--spot", "--config", CONFIG, "--set", "seed=1", *words, **settings)


def test_the_watcher_brings_a_run_to_its_end(cloud):
    cloud.plays(status=["none", "running", "running"])
    status, _, errors = _watch(cloud)
    assert status == 0 and "done: slice.sh fetch, then slice.sh delete" in errors
    assert cloud.kinds() == ["create", "bootstrap", "start"]


def test_preempted_in_the_middle_of_the_bootstrap(cloud):
    cloud.plays(bootstrap=["preempt"])
    status, _, errors = _watch(cloud)
    assert status == 0 and "the slice is SUSPENDED (preempted?): making it anew" in errors
    assert cloud.kinds() == ["create", "bootstrap", "delete", "create", "bootstrap", "start"]


def test_preempted_while_running_goes_on_with_the_same_command(cloud):
    cloud.plays(status=["none", "running", "preempt", "none", "running"])
    status, _, errors = _watch(cloud)
    assert status == 0, errors
    assert cloud.kinds() == ["create", "bootstrap", "start", "delete", "create", "bootstrap", "start"]
    first, second = [word for words in cloud.calls() for word in words if "host.sh start" in word]
    assert first == second


def test_quota_that_is_full_for_a_while(cloud):
    cloud.plays(create=["quota", "quota"])
    assert _watch(cloud)[0] == 0
    assert cloud.kinds() == ["create", "create", "create", "bootstrap", "start"]


def test_a_host_that_goes_silent_costs_the_slice(cloud):
    cloud.plays(status=["none", "fail", "fail", "fail"])
    status, _, errors = _watch(cloud)
    assert status == 0 and "a host does not answer (3 of 3)" in errors and "a host is lost" in errors
    assert cloud.kinds() == ["create", "bootstrap", "start", "delete", "create", "bootstrap", "start"]


def test_a_run_that_fails_again_and_again_is_left_to_its_owner(cloud):
    cloud.plays(status=["none", "exit 1", "exit 134", "exit 1"])
    status, _, errors = _watch(cloud)
    assert (
        status == 1
        and "the run has failed 3 times: slice.sh logs shows why; the slice is still there, and costs" in errors
    )
    assert cloud.kinds() == ["create", "bootstrap", "start", "stop", "start", "stop", "start"]


def test_wrong_use_is_not_tried_again(cloud):
    cloud.plays(status=["none", "exit 2"])
    status, _, errors = _watch(cloud)
    assert status == 1 and "the run was asked for in a wrong way" in errors
    assert cloud.kinds() == ["create", "bootstrap", "start", "stop"]


def test_a_host_with_an_old_python_gets_one_by_uv(tmp_path):
    """Ubuntu 22.04's python3 is 3.10: whatever this machine has is hidden behind scripts that say so, and record."""
    binaries, home = tmp_path / "bin", tmp_path / "home"
    (home / "apr").mkdir(parents=True)
    binaries.mkdir()
    (home / "apr" / "a.whl").touch()
    calls = tmp_path / "calls"
    made = f"""#!/bin/bash
echo "$(basename $0) $*" >>{calls}
[[ $1 != -c ]] || exit 1
if [[ $3 == venv ]]; then mkdir -p "${{@: -1}}/bin"; for name in python apr; do
  printf '#!/bin/bash\\necho "venv $*" >>{calls}\\n' >"${{@: -1}}/bin/$name"; chmod +x "${{@: -1}}/bin/$name"
done; fi
"""
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (binaries / name).write_text(made)
        (binaries / name).chmod(0o755)
    environment = {"PATH": f"{binaries}:/usr/bin:/bin", "HOME": str(home)}
    command = ["bash", SCRIPTS / "host.sh", "bootstrap", "a.whl", "gs://bucket/run"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.endswith(": ready\n"), ended.stderr
    said = calls.read_text()
    assert "python3 -m pip install --quiet --user uv" in said
    assert f"python3 -m uv venv --quiet --clear --seed --python 3.12 {home}/apr/venv" in said
    assert f"venv -m pip install --quiet --disable-pip-version-check {home}/apr/a.whl[tpu,gcs]" in said


@pytest.mark.slow
def test_two_hosts_are_set_up_and_train_for_real(cloud, config, wheel, tmp_path):
    """The wheel into clean homes, a run of two processes, stopped in the middle, and started again by the same command."""
    del wheel
    file = tmp_path / "tiny.py"
    file.write_text(
        f"from apr_jax.config import from_dict\n\n\ndef experiment():\n    return from_dict({to_dict(config)!r})\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "shared" / "run"
    kept = {name: value for name, value in cloud.environment.items() if name not in ("PYTHONPATH", "APR_CACHE")}
    cloud.environment = kept | {
        "FAKE_HOSTS": "2",
        "FAKE_HOSTS_RUN": f"127.0.0.1:{port}",
        "RUN": str(out),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "XLA_FLAGS": "",
        "APR_CACHE": str(tmp_path / "xla"),
    }
    start = ["start", "--config", file, "--set", "learn.sft.steps=40", "--set", "schedule.lanes=4"]
    for words in (["create"], ["bootstrap"], start):
        status, said, errors = cloud.call("slice.sh", *words)
        assert status == 0, errors + said
    assert said.count("started") == 2
    assert cloud.call("slice.sh", *start)[1].count("runs already") == 2
    log = cloud.folder / "host0" / "apr" / "run.log"
    deadline = time.monotonic() + 400
    while not (out / "sos+" / "sft" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline and "running" in cloud.call("slice.sh", "status")[1], log.read_text()
        time.sleep(1)
    status, said, _ = cloud.call("slice.sh", "stop")
    assert status == 0 and said.split() == ["exit", "143", "exit", "143"], log.read_text()
    assert not (out / "report.html").exists()
    assert cloud.call("slice.sh", *start)[0] == 0
    while "running" in (said := cloud.call("slice.sh", "status")[1]):
        assert time.monotonic() < deadline + 400, log.read_text()
        time.sleep(1)
    assert said.split() == ["exit", "0", "exit", "0"], log.read_text()
    assert "stopped by SIGTERM; the run is saved" in log.read_text()
    assert load_checkpoint(out / "apr" / "rl").config.learn.sft.steps == 40
    assert json.loads((out / "results.json").read_text())["summaries"].keys() == {
        "sos+-sft",
        "sos+-rl",
        "apr-sft",
        "apr-rl",
    }
    for host in (0, 1):
        assert (cloud.folder / f"host{host}" / "apr" / "venv" / "lib").is_dir()
