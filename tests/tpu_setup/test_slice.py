"""The scripts against a cloud that refuses, preempts and goes silent."""

import os
import shutil
import subprocess
import sys

import pytest
from clouds import ROOT, SCRIPTS, write_script

CONFIG = ROOT / "experiments" / "nano.py"
VERBS = {
    "check": [],
    "create": ["--spot"],
    "bootstrap": [],
    "start": ["--config", CONFIG, "--set", "seed=1"],
    "logs": [],
    "status": [],
    "stop": [],
    "saved": [],
    "fetch": [],
    "delete": [],
}
pytestmark = pytest.mark.usefixtures("any_wheel")


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
    assert ("gcloud" in said and "us-west4-a" in said) or verb in ("saved", "fetch")


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
        ("slice.sh", ["fly"], {}, "fly: must be check, create, bootstrap"),
        ("slice.sh", ["logs", "first"], {}, "logs first: must be the number of a host, from 0"),
        ("slice.sh", ["stop", "3"], {}, "stop 3: takes nothing more"),
        ("slice.sh", ["stop"], {"STOP_SECONDS": "1m"}, "STOP_SECONDS=1m: must be a whole number, at least 1"),
        ("watch.sh", [], {}, "give --config FILE"),
        ("watch.sh", ["--config", CONFIG], {"TPU_ZONE": ""}, "$TPU_ZONE is not set"),
        ("watch.sh", ["--config", CONFIG], {"TPU_TYPE": ""}, "$TPU_TYPE is not set"),
        ("watch.sh", ["--config", CONFIG], {"TPU_TYPE": "v9-8"}, "TPU_TYPE=v9-8: must be v2-, v3-"),
        ("watch.sh", ["--config", CONFIG], {"SLICE_TRIES": "0"}, "SLICE_TRIES=0: must be a whole number, at least 1"),
        ("gke.sh", ["fetch"], {"RUN": "/disk"}, "RUN=/disk: pods share no disk; must be gs://BUCKET/FOLDER"),
        ("gke.sh", ["logs", "x"], {}, "logs x: must be the number of a host, from 0"),
        ("gke.sh", ["status"], {"GKE_RESTARTS": "-1"}, "GKE_RESTARTS=-1: must be a whole number, at least 1"),
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
    assert cloud.call("slice.sh", "logs", 3)[1] == said.replace("host0", "host3")
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
    assert status == 3 and "apr is FAILED, and won't come up: slice.sh delete" in errors


def test_gcloud_may_fail_while_a_request_waits(cloud):
    cloud.plays(list=["ok", "fail", "fail", "ok", "fail"])
    status, _, errors = cloud.call("slice.sh", "create")
    assert status == 0 and "gcloud does not answer (2 of 10)" in errors and "(3 of 10)" not in errors
    (cloud.folder / "state").write_text("WAITING_FOR_RESOURCES")
    cloud.plays(list=["ok", *["fail"] * 10])
    status, _, errors = cloud.call("slice.sh", "create")
    assert status == 1 and "gcloud has not answered 10 times in a row; the request stands" in errors


def test_stop_says_how_long_it_waits(cloud):
    (cloud.folder / "state").write_text("ACTIVE")
    assert cloud.call("slice.sh", "stop")[:2] == (0, "none\n" * 4)
    assert cloud.call("slice.sh", "stop", STOP_SECONDS="7")[0] == 0
    stops = [word for words in cloud.calls() for word in words if "host.sh stop" in word]
    assert ["host.sh stop 300;" in stops[0], "host.sh stop 7;" in stops[1]] == [True, True]


def test_results_from_a_shared_disk_come_without_data_and_optimizers(cloud, tmp_path):
    (cloud.folder / "state").write_text("ACTIVE")
    wanted = {
        "report.html",
        "apr/sft/metrics.jsonl",
        "apr/sft/checkpoints/10/params/a",
        "apr/sft/checkpoints/10/data/b",
    }
    for name in (*wanted, "data/data.json", "apr/sft/checkpoints/10/state/c"):
        path = tmp_path / "a disk" / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    target = tmp_path / "here"
    status, _, errors = cloud.call("slice.sh", "fetch", target, RUN=str(tmp_path / "a disk" / "run"))
    assert status == 0, errors
    assert {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} == wanted
    assert cloud.call("slice.sh", "fetch", target, RUN=str(tmp_path / "nowhere"))[0] == 1


def test_what_the_run_has_saved(cloud, tmp_path):
    (cloud.folder / "state").write_text("ACTIVE")
    cloud.plays(saved=["gs://bucket/run/apr/sft/checkpoints/10/"])
    assert cloud.call("slice.sh", "saved")[:2] == (0, "gs://bucket/run/apr/sft/checkpoints/10/\n")
    assert cloud.calls()[-1] == ["storage", "ls", "gs://bucket/run/*/*/checkpoints/"]
    (tmp_path / "apr" / "rl" / "checkpoints" / "5").mkdir(parents=True)
    assert cloud.call("slice.sh", "saved", RUN=str(tmp_path))[:2] == (0, f"{tmp_path}/apr/rl/checkpoints/5\n")
    assert cloud.call("slice.sh", "saved", RUN="/nowhere")[0] == 1, "ls ends with 2, which would be wrong use"


def test_a_host_that_never_comes_up_is_named(cloud):
    (cloud.folder / "state").write_text("ACTIVE")
    cloud.plays(ready=["down 2"])
    status, _, errors = cloud.call("slice.sh", "bootstrap")
    assert status == 3 and cloud.kinds() == []
    assert "(try 3 of 3)" in errors and "host 2 of apr never came up" in errors
