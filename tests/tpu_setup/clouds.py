"""A clone with the scripts, and a `gcloud` on PATH that is ours."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tpu_setup"


class Cloud:
    """What the scripts see, and what they did.

    They run in a clone of their own, with some wheel in dist/ and no .venv. An `apr` on PATH finds
    every config good.

    Args:
      folder: of the fake `gcloud` (fake_gcloud.py).
    """

    def __init__(self, folder):
        self.folder = folder
        self.clone = folder / "clone"
        shutil.copytree(SCRIPTS, self.clone / "tpu_setup")
        (self.clone / "experiments").mkdir()
        for config in (ROOT / "experiments").glob("*.py"):
            shutil.copy(config, self.clone / "experiments")
        write_script(self.clone / "dist" / "apr_jax-0-py3-none-any.whl", "")
        binaries = folder / "bin"
        write_script(binaries / "no-python", "exit 0")
        self.install_apr(binaries / "no-python")
        fake = Path(__file__).with_name("fake_gcloud.py")
        write_script(binaries / "gcloud", f'exec {sys.executable} -I -S {fake} "$@"')
        self.environment = os.environ | {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "FAKE_GCLOUD": str(folder),
            "TPU_ZONE": "us-west4-a",
            "TPU_TYPE": "v5litepod-16",
            "RUN": "gs://bucket/run",
            "POLL_SECONDS": "0.02",
            "HOST_SECONDS": "1",
        }

    def install_apr(self, python=sys.executable):
        """An `apr` on PATH, as pip writes it: its first line names the Python that has the
        package.
        """
        path = self.folder / "bin" / "apr"
        path.write_text(f"#!{python}\nraise SystemExit('only its Python is asked')\n")
        path.chmod(0o755)

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
            [self.clone / "tpu_setup" / script, *map(str, words)],
            env=self.environment | settings,
            cwd=self.clone,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return ended.returncode, ended.stdout, ended.stderr


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
