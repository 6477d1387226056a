"""Launches a whole experiment with XManager; for now on this machine, as a process of its own.

    python experiments/launch.py --config experiments/nano.py --out runs/launched --executor local

The job is `apr reproduce` by the same Python. XManager streams its output, the job's name before each line, and notes
the experiment in ~/.xmanager. A run that was stopped goes on from its checkpoints when it is launched again. Needs the
extra [launch]. Exit status: 0 done, 1 the job failed, 2 a wrong flag or config, 130 Ctrl-C.
"""

import argparse
import asyncio
import importlib.util
import sys
from pathlib import Path
from typing import Any

from apr_jax.config import load
from apr_jax.errors import UsageError, UserError

REMEDY = "pip install 'apr_jax[launch]' (in the clone: .venv/bin/pip install -e '.[launch]')"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags of this launcher."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="experiment file, e.g. experiments/nano.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--executor", choices=["local"], default="local", help="where the job runs")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field; repeatable"
    )
    return parser.parse_args(arguments)


def job_arguments(flags: argparse.Namespace) -> list[str]:
    """What the job's Python is given: `-m apr_jax reproduce ...`."""
    settings = [word for setting in flags.set for word in ("--set", setting)]
    paths = ["--config", str(flags.config.absolute()), "--out", str(flags.out.absolute())]
    return ["-m", "apr_jax", "reproduce", *paths, *settings]


async def launch(name: str, arguments: list[str]) -> None:
    """Runs the job to its end.

    Raises:
      UserError: the job failed.
    """
    from absl import flags
    from xmanager import xm, xm_local

    flags.FLAGS(["launch"])  # XManager reads its own flags, all at their defaults.
    async with xm_local.create_experiment(experiment_title=f"apr_jax {name}") as experiment:
        program = xm.Packageable(
            executable_spec=xm.Binary(path=sys.executable), executor_spec=xm_local.Local.Spec(), args=arguments
        )
        [executable] = experiment.package([program])
        unit: Any = await experiment.add(xm.Job(executable, executor=xm_local.Local(), name=name))
        try:
            await unit.wait_until_complete()
        except xm.ExperimentUnitError as error:
            raise UserError(f"the job failed ({error}); what it saved is kept, launch it again to go on") from None


def main(arguments: list[str]) -> int:
    """Launches, and returns the exit status."""
    flags = parse(arguments)
    try:
        config = load(flags.config, flags.set)  # A wrong config is found here, not in the job.
        if importlib.util.find_spec("xmanager") is None:
            raise UserError(f"xmanager is not installed, and it is what launches: {REMEDY}")
        asyncio.run(launch(config.name, job_arguments(flags)))
    except KeyboardInterrupt:
        print("launch: interrupted; the job was told to save and stop; launch it again to go on", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"launch: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
