"""A `gcloud` on PATH that is ours, and the scripts called with it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tpu_setup"


class Cloud:
    """What the scripts see, and what they did.

    Args:
      folder: of the fake `gcloud` (fake_gcloud.py).
    """

    def __init__(self, folder):
        self.folder = folder
        binaries = folder / "bin"
        fake = Path(__file__).with_name("fake_gcloud.py")
        write_script(binaries / "gcloud", f'exec {sys.executable} -I -S {fake} "$@"')
        self.environment = os.environ | {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "FAKE_GCLOUD": str(folder),
            "TPU_ZONE": "us-west4-a",
            "TPU_TYPE": "v5litepod-16",
            "RUN": "gs://bucket/run",
            "POLL_SECONDS": "0.02",
            "HOST_TRIES": "3",
        }

    def plays(self, **plays):
        (self.folder / "plays.json").write_text(json.dumps(plays))

    def calls(self):
        """Each call's words; those of ssh by what they do on the hosts."""
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def kinds(self):
        """What was done, in order; looking aside."""
        done = []
        for words in self.calls():
            command = next((word for word in words if word.startswith("--command=")), "")
            if words[2] == "queued-resources":
                done.append(words[3])
            elif named := re.search(r"host\.sh (\w+)", command):
                done.append(named[1])
        return [kind for kind in done if kind not in ("list", "describe", "state")]

    def call(self, script, *words, **settings):
        """Exit status, standard output, standard error."""
        ended = subprocess.run(
            [SCRIPTS / script, *map(str, words)],
            env=self.environment | settings,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return ended.returncode, ended.stdout, ended.stderr


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
