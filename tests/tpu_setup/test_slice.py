"""The scripts against a cloud that refuses, preempts and goes silent."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import typer
from clouds import SCRIPTS, write_script

from apr_jax.cli.main import app

CONFIG = "experiments/nano.py"
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


@pytest.mark.skipif(
    shutil.which("shellcheck", path=os.path.dirname(sys.executable)) is None, reason="no shellcheck"
)
def test_the_shell_is_clean():
    command = shutil.which("shellcheck", path=os.path.dirname(sys.executable))
    found = subprocess.run(
        [command, "-x", "-P", "SCRIPTDIR", *sorted(SCRIPTS.glob("*.sh"))],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout


def test_an_old_bash_is_told_so(cloud):
    """That of macOS is 3.2.

    Bash does not let anybody set its version, so the script reads another variable.
    """
    for path in (cloud.clone / "tpu_setup").glob("*.sh"):
        path.write_text(
            path.read_text().replace("BASH_VERSINFO", "VERSION").replace("BASH_VERSION", "VERSION")
        )
    library = cloud.clone / "tpu_setup" / "lib.sh"
    text = library.read_text()
    for version, wanted in (("3 2", 2), ("4 3", 2), ("4 4", 0), ("5 0", 0)):
        library.write_text(f"VERSION=({version})\n{text}")
        status, _, errors = cloud.call("slice.sh", "--help")
        assert status == wanted and ("must be 4.4 or newer" in errors) == (wanted == 2), errors
        assert len(errors.splitlines()) == wanted // 2


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_prints_commands_and_calls_nothing(cloud, verb):
    shutil.rmtree(cloud.clone / "dist")  # Nor does it need a wheel.
    status, said, _ = cloud.call("slice.sh", verb, *VERBS[verb], "--dry-run")
    assert status == 0 and cloud.calls() == []
    assert all(line.startswith("+ ") for line in said.splitlines())
    assert ("gcloud" in said and "us-west4-a" in said) or verb in ("saved", "fetch")


def test_the_watcher_dry_runs_too(cloud):
    shutil.rmtree(cloud.clone / "dist")
    status, said, _ = cloud.call("watch.sh", "--dry-run", "--spot", "--config", CONFIG)
    assert status == 0 and cloud.calls() == []
    for part in (
        "queued-resources create",
        "--spot",
        "host.sh\\ bootstrap\\ apr_jax-VERSION-py3-none-any.whl",
        "host.sh\\ start",
        "queued-resources delete",
    ):
        assert part in said


@pytest.mark.parametrize("script", ["slice.sh", "watch.sh", "gke.sh"])
def test_help_is_the_text_at_the_top(cloud, script):
    status, said, _ = cloud.call(script, "--help")
    assert (
        status == 0
        and "--dry-run prints" in said
        and "Settings" in said
        and not said.startswith("#")
    )


@pytest.mark.parametrize(
    ("script", "words", "settings", "told"),
    [
        (
            "slice.sh",
            ["create"],
            {"TPU_ZONE": ""},
            "$TPU_ZONE is not set: export TPU_ZONE=us-west4-a",
        ),
        ("slice.sh", ["create"], {"TPU_TYPE": ""}, "$TPU_TYPE is not set"),
        ("slice.sh", ["create"], {"TPU_TYPE": "v9-8"}, "TPU_TYPE=v9-8: must be v2-, v3-"),
        ("slice.sh", ["create", "--cheap"], {}, "create --cheap: must be --spot or --reserved"),
        ("slice.sh", ["bootstrap"], {"RUN": ""}, "$RUN is not set: export RUN=gs://BUCKET/paper"),
        (
            "slice.sh",
            ["bootstrap"],
            {"RUN": "runs/x"},
            "RUN=runs/x: must be gs://BUCKET/FOLDER, or the absolute path",
        ),
        ("slice.sh", ["start"], {}, "give --config FILE"),
        ("slice.sh", ["start", "--config", "nowhere.py"], {}, "--config nowhere.py: no such file"),
        ("slice.sh", ["fly"], {}, "fly: must be check, create, bootstrap"),
        ("slice.sh", ["logs", "first"], {}, "logs first: must be the number of a host, from 0"),
        ("slice.sh", ["stop", "3"], {}, "stop 3: takes nothing more"),
        ("slice.sh", ["fetch", "a", "b"], {}, "fetch a b: takes at most one word more"),
        ("slice.sh", ["fetch", "--all"], {}, "fetch --all: takes no flag but --dry-run"),
        (
            "slice.sh",
            ["create", "--spot", "--reserved"],
            {},
            "create --spot --reserved: must be one of",
        ),
        (
            "slice.sh",
            ["create"],
            {"POLL_SECONDS": "abc"},
            "POLL_SECONDS=abc: must be seconds, more than 0",
        ),
        (
            "slice.sh",
            ["create"],
            {"POLL_SECONDS": "0.0"},
            "POLL_SECONDS=0.0: must be seconds, more than 0",
        ),
        (
            "slice.sh",
            ["create"],
            {"DRY_RUN": "yes"},
            "DRY_RUN=yes: must be 1 (on), or 0 or empty (off)",
        ),
        ("slice.sh", ["saved"], {"RUN": "gs://"}, "RUN=gs://: must be gs://BUCKET/FOLDER"),
        (
            "slice.sh",
            ["check", "--config", CONFIG, "--spott"],
            {},
            "--spott: must be --config FILE, --set FIELD=VALUE",
        ),
        (
            "slice.sh",
            ["start", "--config", CONFIG, "--out", "x"],
            {},
            "--out: the run is kept in $RUN (now 'gs://bucket/",
        ),
        (
            "watch.sh",
            ["--config", CONFIG, "--spott"],
            {},
            "--spott: must be --config FILE, --set FIELD=VALUE",
        ),
        ("watch.sh", ["--config", CONFIG, "--out=x"], {}, "--out=x: the run is kept in $RUN"),
        (
            "watch.sh",
            ["--config", CONFIG, "--scale", "nano"],
            {},
            "--scale: hosts have no experiments/",
        ),
        (
            "watch.sh",
            ["--config", CONFIG, "--only", "train"],
            {},
            "--only train: must be training or figures",
        ),
        ("watch.sh", ["--config", CONFIG, "--set", "seed"], {}, "--set seed: must be FIELD=VALUE"),
        ("watch.sh", ["--config", CONFIG, "--set"], {}, "--set: give a value"),
        (
            "watch.sh",
            ["--config", CONFIG, "seed=1"],
            {},
            "seed=1: must be --config FILE, --set FIELD=VALUE",
        ),
        (
            "watch.sh",
            ["--config", CONFIG, "--config=b.py"],
            {},
            f"--config b.py: --config {CONFIG} is given already",
        ),
        (
            "watch.sh",
            ["--spot", "--reserved", "--config", CONFIG],
            {},
            "--spot --reserved: must be one of",
        ),
        (
            "slice.sh",
            ["stop"],
            {"STOP_SECONDS": "1m"},
            "STOP_SECONDS=1m: must be a whole number, at least 1",
        ),
        ("watch.sh", [], {}, "give --config FILE"),
        ("watch.sh", ["--config", CONFIG], {"TPU_ZONE": ""}, "$TPU_ZONE is not set"),
        ("watch.sh", ["--config", CONFIG], {"TPU_TYPE": ""}, "$TPU_TYPE is not set"),
        ("watch.sh", ["--config", CONFIG], {"TPU_TYPE": "v9-8"}, "TPU_TYPE=v9-8: must be v2-, v3-"),
        (
            "watch.sh",
            ["--config", CONFIG],
            {"SLICE_TRIES": "0"},
            "SLICE_TRIES=0: must be a whole number, at least 1",
        ),
        (
            "gke.sh",
            ["fetch"],
            {"RUN": "/disk"},
            "RUN=/disk: pods share no disk; must be gs://BUCKET/FOLDER",
        ),
        ("gke.sh", ["fetch", "a", "b"], {}, "fetch a b: takes at most one word more"),
        ("gke.sh", ["logs", "1", "2"], {}, "logs 1 2: takes at most one word more"),
        ("gke.sh", ["delete", "mine"], {}, "delete mine: takes nothing more"),
        ("gke.sh", ["status", "mine"], {}, "status mine: takes nothing more"),
        ("gke.sh", ["cluster", "mine"], {}, "cluster mine: takes nothing more"),
        ("gke.sh", ["image", "mine"], {}, "image mine: takes nothing more"),
        ("gke.sh", ["delete-cluster", "mine"], {}, "delete-cluster mine: takes nothing more"),
        (
            "gke.sh",
            ["status"],
            {"GKE_SPOT": "yes"},
            "GKE_SPOT=yes: must be 1 (on), or 0 or empty (off)",
        ),
        ("gke.sh", ["logs", "x"], {}, "logs x: must be the number of a host, from 0"),
        (
            "gke.sh",
            ["status"],
            {"GKE_RESTARTS": "-1"},
            "GKE_RESTARTS=-1: must be a whole number, at least 1",
        ),
        ("gke.sh", ["start", "--config", CONFIG], {}, "$GKE_IMAGE is not set"),
        (
            "gke.sh",
            ["start", "--config", CONFIG],
            {"GKE_IMAGE": "i", "RUN": "/disk"},
            "RUN=/disk: pods share no disk",
        ),
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


def test_scripts_let_through_the_commands_own_words():
    """Of what `apr reproduce` takes, --out and --scale make no sense on hosts; lib.sh names the
    others.
    """
    taken = {
        flag
        for given in typer.main.get_command(app).commands["reproduce"].params
        for flag in given.opts
    }
    accepted = "--config | --set | --data | --models | --exclude | --only"
    assert taken == {*accepted.split(" | "), "--out", "--scale"}
    assert f"{accepted}) ;;" in (SCRIPTS / "lib.sh").read_text()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("script", "words"),
    [("watch.sh", []), ("slice.sh", ["check"]), ("slice.sh", ["start"]), ("gke.sh", ["start"])],
)
def test_mistyped_field_is_found_before_anything_is_made(cloud, script, words):
    cloud.install_apr()
    settings = {"GKE_IMAGE": "i", "GKE_TPU": "v5e", "GKE_TOPOLOGY": "4x4"}
    status, said, errors = cloud.call(
        script, *words, "--config", CONFIG, "--set", "train.stf=1", **settings
    )
    assert (status, said) == (2, "") and cloud.calls() == []
    assert len(errors.splitlines()) == 1
    assert (
        "error: --set 'train.stf=1': no field 'train.stf'; did you mean 'train.rl.steps'?" in errors
    )


def test_failing_config_is_found_before_anything_is_made(cloud):
    cloud.install_apr()
    (cloud.clone / "mine.py").write_text("import of_this_folder\n")
    (
        cloud.clone / "of_this_folder.py"
    ).touch()  # It stays here when mine.py is copied to the hosts.
    status, said, errors = cloud.call("watch.sh", "--config", "mine.py")
    assert (status, said) == (2, "") and cloud.calls() == []
    assert "error: config mine.py" in errors and "No module named 'of_this_folder'" in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    "first", [None, "#!/nowhere/python", "#!/bin/sh", f"#!{sys.executable} -S"]
)
def test_words_are_not_checked_without_apr(cloud, first):
    """The script says so and goes on."""
    apr = cloud.folder / "bin" / "apr"
    apr.unlink()
    if first:
        write_script(apr, "")
        apr.write_text(first + "\n")
    path = f"{cloud.folder / 'bin'}:/usr/bin:/bin"
    status, _, errors = cloud.call(
        "slice.sh", "check", "--config", CONFIG, "--set", "train.stf=1", PATH=path
    )
    assert (
        status == 0
        and f"--config {CONFIG} and --set were not checked: there is no apr in .venv/bin" in errors
    )


def test_apr_of_the_clone_precedes_that_on_path(cloud):
    write_script(cloud.clone / ".venv" / "bin" / "python", "echo of the clone; exit 1")
    write_script(cloud.clone / ".venv" / "bin" / "apr", "")
    (cloud.clone / ".venv" / "bin" / "apr").write_text(f"#!{cloud.clone}/.venv/bin/python\n")
    status, _, errors = cloud.call("slice.sh", "check", "--config", CONFIG)
    assert status == 2 and "error: of the clone" in errors


def test_switches_are_off_at_0(cloud):
    (cloud.folder / "state").write_text("ACTIVE")
    assert cloud.call("slice.sh", "status", DRY_RUN="0")[:2] == (0, "none\n" * 4)
    calls = len(cloud.calls())
    assert (
        cloud.call("slice.sh", "status", DRY_RUN="1")[1].startswith("+ gcloud")
        and len(cloud.calls()) == calls
    )


def test_five_commands_from_nothing_to_the_log(cloud):
    write_script(cloud.folder / "bin" / "tail", 'echo "$PWD: $*"')  # It would follow for ever.
    for verb in ("create", "bootstrap", "start", "logs"):  # The first is `make wheel`.
        status, said, errors = cloud.call("slice.sh", verb, *VERBS[verb])
        assert status == 0, errors
    assert said == f"{cloud.folder}/host0: -n 200 -F apr/run.log\n"
    assert cloud.call("slice.sh", "logs", 3)[1] == said.replace("host0", "host3")
    assert cloud.kinds() == ["create", "bootstrap", "start"]
    (create,) = [words for words in cloud.calls() if "create" in words]
    assert {
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
    } <= set(create)
    (start,) = [word for words in cloud.calls() for word in words if "host.sh start" in word]
    assert (
        start == "--command=bash apr/host.sh start --config apr/nano.py --out gs://bucket/run --set"
        " seed=1 "
    )
    assert "--worker=all" in next(words for words in cloud.calls() if start in words)


def test_a_second_create_waits_for_what_was_asked_for(cloud):
    (cloud.folder / "state").write_text("PROVISIONING")
    assert cloud.call("slice.sh", "create")[0] == 0
    assert cloud.kinds() == []


def test_quota(cloud):
    cloud.plays(create=["quota"])
    status, _, errors = cloud.call("slice.sh", "create")
    assert status == 1 and "has been exceeded" in errors
    assert (
        "the request for v5litepod-16 in us-west4-a was refused; if by quota: another zone"
        in errors
    )


def test_a_request_that_cannot_be_met(cloud):
    (cloud.folder / "state").write_text("FAILED")
    status, _, errors = cloud.call("slice.sh", "create")
    assert status == 3 and "apr is FAILED, and won't come up: slice.sh delete" in errors


def test_gcloud_may_fail_while_a_request_waits(cloud):
    cloud.plays(list=["ok", "fail", "fail", "ok", "fail"])
    status, _, errors = cloud.call("slice.sh", "create")
    assert (
        status == 0 and "gcloud does not answer (2 of 10)" in errors and "(3 of 10)" not in errors
    )
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


def test_results_come_without_data_and_optimizers(cloud, tmp_path):
    """They come from a shared disk."""
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
    status, _, errors = cloud.call(
        "slice.sh", "fetch", target, RUN=str(tmp_path / "a disk" / "run")
    )
    assert status == 0, errors
    assert {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} == wanted
    assert cloud.call("slice.sh", "fetch", target, RUN=str(tmp_path / "nowhere"))[0] == 1


def test_results_from_a_bucket_come_without_data_and_optimizers(cloud, tmp_path):
    wanted = {
        "report.html",
        "data.json",
        "apr/sft/metrics.jsonl",
        "apr/sft/checkpoints/10/params/a",
        "apr/sft/checkpoints/10/data/b",
        "apr/sft/checkpoints/10/metadata/state",
        "apr/sft/state/c",
    }
    for name in (
        *wanted,
        "data/data.json",
        "data/train/d",
        "apr/sft/checkpoints/10/state/c",
        "sos+/rl/checkpoints/2/state/d/0",
    ):
        path = cloud.folder / "gs" / "bucket" / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for script in ("slice.sh", "gke.sh"):
        target = tmp_path / script
        status, _, errors = cloud.call(script, "fetch", target)
        assert status == 0, errors
        assert {
            str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()
        } == wanted
    assert cloud.call("slice.sh", "fetch", target, RUN="gs://bucket/nowhere")[0] == 1


def test_what_the_run_has_saved(cloud, tmp_path):
    (cloud.folder / "state").write_text("ACTIVE")
    for run in ("gs://bucket/run", "gs://bucket/run//"):
        step = "gs://bucket/run/apr/sft/checkpoints/10/commit_success.txt"
        cloud.plays(saved=[step])
        assert cloud.call("slice.sh", "saved", RUN=run)[:2] == (0, f"{step}\n")
        assert cloud.calls()[-1] == [
            "storage",
            "ls",
            "gs://bucket/run/*/*/checkpoints/*/commit_success.txt",
        ]
    (tmp_path / "apr" / "rl" / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "apr" / "rl" / "checkpoints" / "9.orbax-checkpoint-tmp-12").mkdir()
    assert cloud.call("slice.sh", "saved", RUN=str(tmp_path))[:2] == (
        0,
        f"{tmp_path}/apr/rl/checkpoints/5\n",
    )
    assert cloud.call("slice.sh", "saved", RUN="/nowhere")[0] == 1, (
        "ls ends with 2, which would be wrong use"
    )


def test_a_host_that_never_comes_up_is_named(cloud):
    (cloud.folder / "state").write_text("ACTIVE")
    cloud.plays(ready=["down 2"])
    # More than the one second of other tests: on a busy machine the first look alone takes that.
    status, _, errors = cloud.call("slice.sh", "bootstrap", HOST_SECONDS="5")
    assert status == 3 and cloud.kinds() == []
    assert re.search("not all hosts of apr answer yet; waiting for [1-5] s more", errors), errors
    assert "host 2 of apr never came up" in errors
