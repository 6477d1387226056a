"""A `gcloud` for tests: it records each call, plays the failures it is told to, and keeps one slice
in a folder.

The folder is $FAKE_GCLOUD; in it
    calls        a JSON list a line: the words of each call
    plays.json   kind of call -> what its next calls do, one after the other; afterwards "ok"
    state        of the queued resource; missing: there is none
    host<N>/     the home of each host
    gs/          what buckets hold, for rsync
Kinds: check, bucket, list, create, ready (the first ssh of a bootstrap), bootstrap, start, status,
saved. Plays: "fail", "preempt", "down N" (from now on that host never answers); for create also
"quota", "usage" and the state of the request ("FAILED"), for status what the hosts say ("running",
"exit 1"; with commas, what each says), for saved what the bucket holds.

What ssh is given runs in a shell in each host's home, so a file that nobody copied there is missing
there. A copy of host.sh is one that only tells states (STUB); with $FAKE_HOSTS_RUN set it is the
real one, its processes find each other on this machine.

A command that is not in COMMANDS, a flag that the command does not have, or the wrong number of
other words, end with status 2.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ.get("FAKE_GCLOUD", "."))
HOSTS = int(os.environ.get("FAKE_HOSTS", "4"))
RUNS = "FAKE_HOSTS_RUN" in os.environ
STATE = FOLDER / "state"
COMING = {"WAITING_FOR_RESOURCES": "PROVISIONING", "PROVISIONING": "ACTIVE"}
ANYWHERE = {"project", "format", "quiet"}
# Other flags have a value.
SWITCHES = {
    "quiet",
    "force",
    "spot",
    "reserved",
    "recursive",
    "uniform-bucket-level-access",
}
TPU = "compute tpus tpu-vm"
QUEUE = "compute tpus queued-resources"
MANY = {f"{TPU} scp", "services enable"}
# How many words it has that are no flags (at least so many for MANY), flags that it needs, flags
# that it may have.
COMMANDS = {
    f"{QUEUE} create": (
        1,
        {"zone", "node-id", "accelerator-type", "runtime-version"},
        {"spot", "reserved"},
    ),
    f"{QUEUE} list": (0, {"zone"}, {"filter"}),
    f"{QUEUE} describe": (1, {"zone"}, set()),
    f"{QUEUE} delete": (1, {"zone"}, {"force"}),
    f"{TPU} ssh": (1, {"zone"}, {"worker", "command", "ssh-flag"}),
    f"{TPU} create": (1, {"zone", "accelerator-type", "version"}, {"spot"}),
    f"{TPU} delete": (1, {"zone"}, set()),
    f"{TPU} scp": (2, {"zone"}, {"worker"}),
    f"{TPU} describe": (1, {"zone"}, set()),
    f"{TPU} accelerator-types describe": (1, {"zone"}, set()),
    "storage ls": (1, set(), set()),
    "storage rsync": (2, set(), {"recursive", "exclude"}),
    "container clusters create-auto": (1, {"region"}, set()),
    "container clusters list": (0, {"region"}, {"filter"}),
    "container clusters get-credentials": (1, {"region"}, set()),
    "container clusters delete": (1, {"region"}, set()),
    # Of docs/launch.md alone.
    "services enable": (1, set(), set()),
    "projects describe": (1, set(), set()),
    "storage buckets create": (1, {"location"}, {"uniform-bucket-level-access"}),
    "storage buckets add-iam-policy-binding": (1, {"member", "role"}, set()),
    "artifacts repositories create": (1, {"repository-format", "location"}, set()),
    "auth configure-docker": (1, set(), set()),
    "auth application-default login": (0, set(), set()),
}
STUB = """case $1 in
  start) touch apr/started ;;
  state | stop)
    if [ -n "${FAKE_STATE+told}" ]; then echo "$FAKE_STATE"; elif [ -f apr/started ]; then echo exit 0; else echo none; fi ;;
esac
"""


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
    return next(
        (word.partition("=")[2] for word in words if word.startswith(f"--{name}=")), default
    )


def parse(words):
    """The command's name, and what follows it.

    Exits with status 2 where gcloud's own parser would.
    """
    spoken = " ".join(words)
    name = max(
        (name for name in COMMANDS if f"{spoken} ".startswith(f"{name} ")), key=len, default=None
    )
    if name is None:
        die(f"Invalid choice: {spoken}", 2)
    count, needed, allowed = COMMANDS[name]
    rest = words[len(name.split()) :]
    others = [word for word in rest if not word.startswith("-")]
    flags = {}
    for word in rest:
        if word.startswith("-"):
            flag, _, value = word.removeprefix("--").partition("=")
            if flag not in needed | allowed | ANYWHERE:
                die(f"unrecognized arguments: {word}", 2)
            if (flag in SWITCHES) == bool(value):
                die(f"argument --{flag}: wrong or missing value", 2)
            flags[flag] = value
    if missing := needed - set(flags):
        die(f"argument --{min(missing)}: Must be specified.", 2)
    if len(others) < count or (len(others) > count and name not in MANY):
        die(f"{name}: {count} words expected, got {others}", 2)
    return name, rest


def queue(verb, words):
    if verb == "create":
        chosen = play("create")
        if chosen == "usage":
            die("unrecognized arguments: --node-id", 2)
        if chosen == "quota":
            die(
                '{"code": 8, "message": "Quota limit \'TPUV5sLitepodPerProjectPerZoneForTPUAPI\''
                ' has been exceeded."}'
            )
        if STATE.exists():
            die("ALREADY_EXISTS: Resource 'apr' already exists")
        STATE.write_text("WAITING_FOR_RESOURCES" if chosen == "ok" else chosen)
    elif verb == "list" and play("list") == "fail":
        die("UNAVAILABLE: The service is currently unavailable.")
    elif verb == "list" and STATE.exists():
        state = STATE.read_text()
        print(state)
        STATE.write_text(COMING.get(state, state))
    elif verb in ("describe", "delete") and not STATE.exists():
        die("NOT_FOUND: Resource 'apr' was not found")
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


def reach(hosts):
    state = STATE.read_text() if STATE.exists() else "missing"
    if state != "ACTIVE":
        die(f"This TPU has state {state} and cannot be reached")
    if missing := down() & set(hosts):
        die(f"[255] ssh: connect to host {min(missing)} port 22: Connection timed out", 255)


def ssh(words):
    command = option(words, "command")
    named = re.search(r"host\.sh (\w+)", command)
    kind = {"state": "status"}.get(named[1], named[1]) if named else "ready"
    chosen = play(kind)
    if chosen == "preempt":
        preempt()
    if chosen == "fail":
        die("[1] the command failed on a host", 1)
    if chosen.startswith("down"):
        (FOLDER / "down").write_text(chosen.removeprefix("down"))
    worker = option(words, "worker", "0")
    hosts = range(HOSTS) if worker == "all" else [int(worker)]
    reach(hosts)
    told = [{}] * HOSTS if chosen == "ok" else [{"FAKE_STATE": said} for said in chosen.split(",")]
    if len(told) == 1:
        told *= HOSTS
    processes = [
        subprocess.Popen(
            ["bash", "-c", command], cwd=home(host), env=environment(host) | told[host]
        )
        for host in hosts
        if host < len(told)
    ]
    sys.exit(max(process.wait() for process in processes))


def home(host):
    path = FOLDER / f"host{host}"
    path.mkdir(exist_ok=True)
    return path


def environment(host):
    address = os.environ.get("FAKE_HOSTS_RUN", "")
    names = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": str(HOSTS), "PROCESS_ID": str(host)}
    return (
        os.environ
        | {"HOME": str(home(host))}
        | {f"JAX_{name}": value for name, value in names.items()}
    )


def scp(words):
    *sources, target = [word for word in words if not word.startswith("--")]
    reach(range(HOSTS))
    for host in range(HOSTS):
        folder = home(host) / target.partition(":")[2]
        if not folder.is_dir():
            die(f"scp: {folder}: No such file or directory")
        for source in map(Path, sources):
            if source.name == "host.sh" and not RUNS:
                (folder / source.name).write_text(STUB)
            else:
                shutil.copy(source, folder)


def rsync(words):
    """As gcloud: a comma parts patterns, and one that matches from the start of the path below the
    source leaves a file out.
    """
    source, target = [word for word in words if not word.startswith("--")]
    patterns = [pattern for pattern in option(words, "exclude").split(",") if pattern]
    root = FOLDER / "gs" / source.removeprefix("gs://")
    if not root.is_dir():
        die(f"Did not find existing container at: {source}")
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if path.is_file() and not any(re.match(pattern, name) for pattern in patterns):
            (Path(target) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, Path(target) / name)


def main(words):
    with (FOLDER / "calls").open("a") as file:
        file.write(json.dumps(words) + "\n")
    name, rest = parse(words)
    if name.startswith(QUEUE):
        queue(name.removeprefix(f"{QUEUE} "), rest)
    elif name == f"{TPU} ssh":
        ssh(rest)
    elif name == f"{TPU} scp":
        scp(rest)
    elif name == f"{TPU} describe":
        print(";".join(f"10.0.0.{host}" for host in range(HOSTS)))
    elif name == f"{TPU} accelerator-types describe":
        if play("check") == "fail":
            die(f"NOT_FOUND: Resource '{rest[0]}' was not found")
        print(rest[0])
    elif name == "container clusters list" and play("cluster") != "missing":
        print(option(rest, "filter").removeprefix("name="))
    elif name == "storage rsync":
        rsync(rest)
    elif name == "storage ls" and "*" in rest[0]:
        saved = play("saved")
        if saved == "ok":
            die("One or more URLs matched no objects.")
        print(saved)
    elif name == "storage ls" and play("bucket") == "fail":
        die(f"{rest[0]} not found: 404.")


if __name__ == "__main__":
    main(sys.argv[1:])
