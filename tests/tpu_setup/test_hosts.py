"""What runs on the hosts: setting up with an old Python; and all of it for real, two hosts that are
this machine.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest
from clouds import SCRIPTS, write_script

from apr_jax.config import to_dict
from apr_jax.train.checkpoint import load_checkpoint


def test_host_with_old_python_gets_one_by_uv(tmp_path):
    """Ubuntu 22.04's python3 is 3.10: whatever this machine has is hidden behind scripts that say
    so, and record.
    """
    binaries = tmp_path / "bin"
    home = tmp_path / "home"
    (home / "apr").mkdir(parents=True)
    (home / "apr" / "a.whl").touch()
    calls = tmp_path / "calls"
    made = f"""echo "$(basename $0) $*" >>{calls}
[[ $1 != -c ]] || exit 1
if [[ $3 == venv ]]; then mkdir -p "${{@: -1}}/bin"; for name in python apr; do
  printf '#!/bin/bash\\necho "venv $*" >>{calls}\\n' >"${{@: -1}}/bin/$name"; chmod +x "${{@: -1}}/bin/$name"
done; fi
"""
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        write_script(binaries / name, made)
    environment = {"PATH": f"{binaries}:/usr/bin:/bin", "HOME": str(home)}
    command = ["bash", SCRIPTS / "host.sh", "bootstrap", "a.whl", "gs://bucket/run"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.endswith(": ready\n"), ended.stderr
    said = calls.read_text()
    assert "python3 -m pip install --quiet --user uv" in said
    assert f"python3 -m uv venv --quiet --clear --seed --python 3.12 {home}/apr/venv" in said
    assert (
        "venv -m pip install --quiet --disable-pip-version-check"
        f" {home}/apr/a.whl[tpu,gcs,tasks,tensorboard,wandb]" in said
    )


@pytest.mark.parametrize(
    ("trap", "seconds", "ended"), [("exit 143", 20, "exit 143"), ("", 1, "exit 137")]
)
def test_stop_kills_what_does_not_end(tmp_path, trap, seconds, ended):
    home = tmp_path / "apr"
    home.mkdir()
    (home / "installed").touch()
    write_script(
        home / "venv" / "bin" / "apr",
        f"trap '{trap}' TERM\ntouch ~/ready\nfor _ in {{1..300}}; do sleep 0.1; done",
    )

    def host(*words):
        command = ["bash", SCRIPTS / "host.sh", *map(str, words)]
        done = subprocess.run(
            command,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr

    host("start")
    while not (tmp_path / "ready").exists():
        time.sleep(0.1)
    assert host("state")[0] == "running"
    said, errors = host("stop", seconds)
    assert said == ended
    assert ("not ended 1 s after SIGTERM: killed" in errors) == (trap == "")


def test_who_looks_finds_a_whole_status_or_none(tmp_path):
    """A look in the middle of writing it once said "exit ", which passed for done: so what is
    written comes by rename.
    """
    home = tmp_path / "apr"
    binaries = tmp_path / "bin"
    home.mkdir()
    (home / "installed").touch()
    write_script(home / "venv" / "bin" / "apr", "sleep 0.3; exit 7")
    write_script(
        binaries / "mv",
        f'echo "${{2##*/}} $(<"$1") $([[ -e $2 ]] && echo there)" >>{tmp_path}/moves; /bin/mv "$@"',
    )
    environment = {"PATH": f"{binaries}:/usr/bin:/bin", "HOME": str(tmp_path)}
    for verb in ("start", "state"):
        command = ["bash", SCRIPTS / "host.sh", verb]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        while verb == "start" and not (home / "exit").exists():
            time.sleep(0.1)
    assert ended.stdout == "exit 7\n"
    moves = [line.split(" ") for line in (tmp_path / "moves").read_text().splitlines()]
    assert [(name, there) for name, _, there in moves] == [("pid", ""), ("exit", "")] and moves[1][
        1
    ] == "7"


@pytest.mark.slow
def test_two_hosts_are_set_up_and_train_for_real(cloud, config, wheel, tmp_path):
    """The watcher from nothing to the end: the wheel into clean homes, a run of two processes, of
    which one is told to end in the middle, and both go on.
    """
    shutil.rmtree(cloud.clone / "dist")
    (cloud.clone / "dist").mkdir()
    shutil.copy(wheel, cloud.clone / "dist")
    cloud.install_apr()
    file = tmp_path / "tiny.py"
    file.write_text(
        "from apr_jax.config import from_dict\n\n\ndef experiment():\n    return"
        f" from_dict({to_dict(config)!r})\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "shared" / "run"
    kept = {
        name: value
        for name, value in cloud.environment.items()
        if name not in ("PYTHONPATH", "APR_CACHE")
    }
    cloud.environment = kept | {
        "FAKE_HOSTS": "2",
        "FAKE_HOSTS_RUN": f"127.0.0.1:{port}",
        "RUN": str(out),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "XLA_FLAGS": "",
        "APR_CACHE": str(tmp_path / "xla"),
    }
    words = ["--config", file, "--set", "train.sft.steps=40", "--set", "schedule.slots=4"]
    with (tmp_path / "watch.log").open("w") as said:
        watch = subprocess.Popen(
            [cloud.clone / "tpu_setup" / "watch.sh", *words],
            env=cloud.environment | {"POLL_SECONDS": "2"},
            cwd=cloud.clone,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    log = cloud.folder / "host0" / "apr" / "run.log"
    try:
        deadline = time.monotonic() + 1200
        while not (out / "sos+" / "sft" / "metrics.jsonl").exists():
            assert time.monotonic() < deadline and watch.poll() is None, (
                tmp_path / "watch.log"
            ).read_text()
            time.sleep(1)
        assert cloud.call("slice.sh", "start", *words)[1].count("runs already") == 2
        # As when a host is taken away.
        os.kill(int((cloud.folder / "host1" / "apr" / "pid").read_text()), signal.SIGTERM)
        assert watch.wait(timeout=900) == 0, (tmp_path / "watch.log").read_text() + log.read_text()
    finally:
        watch.kill()
        cloud.call("slice.sh", "stop", STOP_SECONDS="60")
    assert "the run has ended on a host (1 of 3)" in (tmp_path / "watch.log").read_text()
    assert cloud.kinds()[:6] == ["create", "bootstrap", "start", "start", "stop", "start"]
    assert log.read_text().count("stopped by SIGTERM; the run is saved") == 1
    assert f"{out}/sos+/sft/checkpoints/" in cloud.call("slice.sh", "saved")[1]
    assert load_checkpoint(out / "apr" / "rl").config.train.sft.steps == 40
    done = json.loads((out / "results.json").read_text())["seconds"].keys()
    assert done >= {
        "data",
        "sos+/sft",
        "apr/sft",
        "sos+/rl",
        "apr/rl",
        "eval/sos+-rl",
        "eval/apr-rl",
    }
    for host in (0, 1):
        assert (cloud.folder / f"host{host}" / "apr" / "venv" / "lib").is_dir()
