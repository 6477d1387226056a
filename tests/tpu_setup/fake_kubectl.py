"""A `kubectl` for tests: it records each call, and keeps one JobSet in the folder $FAKE_GCLOUD, as
the real one would.

    kubectl-calls    a JSON list a line: the words of each call
    jobset.yaml      what was applied; missing: there is none
    terminal         "Completed", "Failed"; missing: it runs

What the command does not know ends with status 1, as does applying a JobSet that is there with
other words: all of it that matters is immutable.
"""

import json
import os
import sys
from pathlib import Path

FOLDER = Path(os.environ.get("FAKE_GCLOUD", "."))
JOBSET = FOLDER / "jobset.yaml"
TERMINAL = FOLDER / "terminal"
FLAGS = {
    "get": {"--ignore-not-found", "--output", "--selector"},
    "delete": {"--cascade"},
    "apply": {"--filename", "--server-side"},
    "wait": {"--for", "--timeout", "--namespace", "--all"},
    "logs": {"--follow", "--tail", "--selector"},
}


def die(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def main(words):
    with (FOLDER / "kubectl-calls").open("a") as file:
        file.write(json.dumps(words) + "\n")
    verb, *rest = words
    for word in rest:
        if word.startswith("-") and word.partition("=")[0] not in FLAGS.get(verb, ()):
            die(f"unknown flag: {word}")
    match words:
        case [
            "get",
            "jobset",
            name,
            "--ignore-not-found",
            "--output=jsonpath={.metadata.name}={.status.terminalState}",
        ]:
            if JOBSET.exists():
                print(f"{name}={TERMINAL.read_text() if TERMINAL.exists() else ''}", end="")
        case ["delete", "jobset", name, *_]:
            if not JOBSET.exists():
                die(f'jobsets.jobset.x-k8s.io "{name}" not found')
            JOBSET.unlink()
            TERMINAL.unlink(missing_ok=True)
        case ["apply", "--filename=-"]:
            text = sys.stdin.read()
            if JOBSET.exists() and JOBSET.read_text() != text:
                die(
                    "admission webhook denied the request: spec.replicatedJobs: Invalid value:"
                    " field is immutable"
                )
            print("jobset unchanged" if JOBSET.exists() else "jobset created")
            JOBSET.write_text(text)
        case ["logs", *_] | ["get", "pods", *_] | ["apply", "--server-side", *_] | ["wait", *_]:
            pass
        case _:
            die(f"unknown command: {words}")


if __name__ == "__main__":
    main(sys.argv[1:])
