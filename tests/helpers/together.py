"""Several real processes that run one command together, as the hosts of a pod do."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

from apr_jax.train.metrics.recorder import FILE
from helpers.whole_runs import write_config

ROOT = Path(__file__).parents[2]


class Together:
    """`count` processes of one device each that run an `apr` command of a config as one.

    Args:
      folder: where the config may be written to.
      words: of the command, `--config` aside.
      environments: what single processes have in theirs, by number.
    """

    def __init__(self, count, config, folder, *words, environments=None):
        file = write_config(config, folder / f"{config.name}{count}.py")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = list(map(str, [sys.executable, "-m", "apr_jax", *words, "--config", file]))
        self.processes = []
        self._said = []
        for index in range(count):
            names = {
                "COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "NUM_PROCESSES": str(count),
                "PROCESS_ID": str(index),
            }
            environment = os.environ | {f"JAX_{name}": value for name, value in names.items()}
            environment |= {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": "", "COLUMNS": "200"}
            said = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe that nobody reads would stop the process.
            environment |= (environments or {}).get(index, {})
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT
            )
            self.processes.append(process)
            weakref.finalize(self, process.kill)  # Whatever a test that fails leaves behind.
            self._said.append(said)

    def said(self, index):
        self._said[index].seek(0)
        return self._said[index].read().decode()

    def all_said(self):
        return [self.said(index) for index in range(len(self.processes))]

    def wait(self, seconds=240):
        """Exit status and words of each, when all have ended."""
        try:
            for process in self.processes:
                process.wait(seconds)
        finally:
            self.kill()
        return [
            (process.returncode, self.said(index)) for index, process in enumerate(self.processes)
        ]

    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()

    def until_step(self, step, workdir, seconds=240):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (workdir / FILE).exists() and f'"step": {step},' in (workdir / FILE).read_text():
                return
            assert all(process.poll() is None for process in self.processes), self.all_said()
            time.sleep(0.005)
        raise TimeoutError(f"no step {step} in {workdir / FILE}")


def train(count, config, folder, data_dir, stage, workdir, *more, environments=None):
    """`apr train` by `count` processes."""
    words = ["train", stage, "--workdir", workdir, "--data", data_dir, *more]
    return Together(count, config, folder, *words, environments=environments)
