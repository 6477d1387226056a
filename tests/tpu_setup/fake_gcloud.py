"""A `gcloud` for tests: it records each call, plays the failures it is told to, and keeps one slice in a folder.

The folder is $FAKE_GCLOUD; in it
    calls        a JSON list a line: the words of each call
    plays.json   kind of call -> what its next calls do, one after the other; afterwards "ok"
    state        of the queued resource; missing: there is none
    host<N>/     the home of each host
Kinds: create, ready (the first ssh of a bootstrap), bootstrap, start, status. Plays: "quota", "preempt", "fail", "down N" (from
now on that host never answers), and for status the states themselves ("running", "exit 1").
With $FAKE_HOSTS_RUN set, commands really run, each host in its home, as processes that find each other on this machine.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ["FAKE_GCLOUD"])
HOSTS = int(os.environ.get("FAKE_HOSTS", "4"))
RUNS = "FAKE_HOSTS_RUN" in os.environ
STATE = FOLDER / "state"
COMING = {"WAITING_FOR_RESOURCES": "PROVISIONING", "PROVISIONING": "ACTIVE"}


def play(kind):
    path = FOLDER / "plays.json"
    plays = json.loads(path.read_text()) if path.exists() else {}
    chosen = plays.get(kind, []).pop(0) if plays.get(kind) else "ok"
    path.write_text(json.dumps(plays))
    return chosen


def die(message, status=1):
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    sys.exit(status)


def option(words, name, default=""):
    return next((word.partition("=")[2] for word in words if word.startswith(f"--{name}=")), default)


def queue(verb, words):
    if verb == "create":
        if play("create") == "quota":
            die('{"code": 8, "message": "Quota limit \'TPUV5sLitepodPerProjectPerZoneForTPUAPI\' has been exceeded."}')
        STATE.write_text("WAITING_FOR_RESOURCES")
    elif verb == "list" and STATE.exists():
        state = STATE.read_text()
        print(state)
        STATE.write_text(COMING.get(state, state))
    elif verb == "describe":
        print(f"state:\n  state: {STATE.read_text()}")
    elif verb == "delete":
        STATE.unlink()
        for host in range(HOSTS):
            shutil.rmtree(FOLDER / f"host{host}", ignore_errors=True)


def down():
    path = FOLDER / "down"
    return set(map(int, path.read_text().split())) if path.exists() else set()


def preempt():
    STATE.write_text("SUSPENDED")
    die("[255] Connection closed by remote host", 255)


def ssh(words):
    command = option(words, "command")
    kind = command.split()[2] if command.startswith("bash apr/host.sh") else "ready"
    kind = {"state": "status"}.get(kind, kind)
    chosen = play(kind)
    if chosen == "preempt":
        preempt()
    if chosen == "fail":
        die("[1] the command failed on a host", 1)
    if chosen.startswith("down"):
        (FOLDER / "down").write_text(chosen.removeprefix("down"))
    worker = option(words, "worker", "0")
    hosts = range(HOSTS) if worker == "all" else [int(worker)]
    if missing := down() & set(hosts):
        die(f"[255] ssh: connect to host {min(missing)} port 22: Connection timed out", 255)
    if not RUNS:
        if kind == "status":
            print(*[chosen if chosen != "ok" else known(host) for host in hosts], sep="\n")
        for host in hosts:
            (FOLDER / f"host{host}").mkdir(exist_ok=True)
            if kind == "start":
                (FOLDER / f"host{host}" / "started").touch()
        return
    processes = [subprocess.Popen(["bash", "-c", command], cwd=home(host), env=environment(host)) for host in hosts]
    sys.exit(max(process.wait() for process in processes))


def known(host):
    return "exit 0" if (FOLDER / f"host{host}" / "started").exists() else "none"


def home(host):
    path = FOLDER / f"host{host}"
    path.mkdir(exist_ok=True)
    return path


def environment(host):
    names = {"COORDINATOR_ADDRESS": os.environ["FAKE_HOSTS_RUN"], "NUM_PROCESSES": str(HOSTS), "PROCESS_ID": str(host)}
    return os.environ | {"HOME": str(home(host))} | {f"JAX_{name}": value for name, value in names.items()}


def scp(words):
    *sources, target = [word for word in words if not word.startswith("--")]
    for host in range(HOSTS):
        for source in sources:
            if (home(host) / target.partition(":")[2]).is_dir():
                shutil.copy(source, home(host) / target.partition(":")[2])


def main(words):
    with (FOLDER / "calls").open("a") as file:
        file.write(json.dumps(words) + "\n")
    match words:
        case ["compute", "tpus", "queued-resources", verb, *rest]:
            queue(verb, rest)
        case ["compute", "tpus", "tpu-vm", "ssh", _, *rest]:
            ssh(rest)
        case ["compute", "tpus", "tpu-vm", "scp", *rest]:
            scp(rest)
        case ["compute", "tpus", "tpu-vm", "describe", *_]:
            print(";".join(f"10.0.0.{host}" for host in range(HOSTS)))


main(sys.argv[1:])
