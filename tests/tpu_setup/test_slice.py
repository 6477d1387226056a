"""The scripts against a cloud that refuses, preempts and goes silent."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, write_script

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
    write_script(cloud.folder / "bin" / "tail", 'echo "$PWD: $*"')  # It would follow for ever.
    for verb in ("create", "bootstrap", "start", "logs"):  # The first is `make wheel`.
        status, said, errors = cloud.call("slice.sh", verb, *VERBS[verb])
        assert status == 0, errors
    assert said == f"{cloud.folder}/host0: -n 200 -F apr/run.log\n"
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


def test_the_fake_hosts_have_only_what_was_copied_there(cloud):
    (cloud.folder / "state").write_text("ACTIVE")
    ssh = ["compute", "tpus", "tpu-vm", "ssh", "apr", "--zone=us-west4-a", "--worker=all"]
    command = [cloud.folder / "bin" / "gcloud", *ssh, "--command=bash apr/host.sh state"]
    assert subprocess.run(command, env=cloud.environment, capture_output=True).returncode == 127
    status, said, _ = cloud.call("slice.sh", "status")
    assert (status, said.split()) == (0, ["none"] * 4)


def test_the_watcher_with_hosts_that_really_run(cloud):
    """From nothing to the end with host.sh itself, over a failure; only Python and `apr` on the hosts are cheap ones."""
    apr = """
[[ $1 == reproduce ]] || exit 0
echo "$*" >>~/starts
sleep 0.5
(($(wc -l <~/starts) > 1))
"""
    python = f"""
[[ $1 == -m ]] || exit 0
mkdir -p "${{@: -1}}/bin" && cd "${{@: -1}}/bin"
printf '#!/bin/bash\n' >python
cat >apr <<'END'
#!/bin/bash{apr}END
chmod +x python apr
"""
    write_script(cloud.folder / "bin" / "python3.13", python)
    status, _, errors = _watch(cloud, FAKE_HOSTS_RUN="127.0.0.1:1", FAKE_HOSTS="2")
    assert status == 0 and "done: slice.sh fetch" in errors, errors
    assert "does not answer" not in errors
    assert cloud.kinds() == ["create", "bootstrap", "start", "stop", "start"]
    start = "reproduce --config apr/nano.py --out gs://bucket/run --set seed=1\n"
    for host in ("host0", "host1"):
        assert (cloud.folder / host / "starts").read_text() == 2 * start


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
