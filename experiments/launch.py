"""Launches a whole experiment, or a sweep of them, with XManager.

    python experiments/launch.py --config experiments/nano.py --out runs/launched
    python experiments/launch.py --config experiments/nano.py --out runs/lr --tensorboard \\
        --sweep train.sft.optimizer.lr=1e-3,4e-3
    python experiments/launch.py --config experiments/nano.py --out gs://BUCKET/nano --executor gke
    --image IMAGE \\
        --require tpu_v5e=2x4

A work unit is one `apr reproduce` (data, SFT, RL, evaluation, report; each goes on where it was
when it is launched again):
    local    a process of this Python; units one after the other, for they would share the cores
    gke      a Job on a TPU slice of the current kubectl cluster (launcher/gke.py)
    vertex   a custom job of Vertex AI; of TPUs, XManager knows v2 and v3 there
The image is that of tpu_setup/Dockerfile. Units that start at the same time can't share a build:
build their data before. XManager notes the experiment in ~/.xmanager. Needs the extra [launch], and
[gcs] for a sweep in a cloud. Exit status: 0 done (gke, vertex: launched), 1 a job failed, 2 a wrong
flag or config, or a sweep in a cloud without its data, 130 Ctrl-C. """

import argparse
import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from apr_jax.config import Experiment, load
from apr_jax.errors import UsageError, UserError
from apr_jax.io.storage import absolute, as_path, checked, is_remote, local_path
from launcher.sweep import Unit, work_units

REMEDY = "pip install 'apr_jax[launch]' (in the clone: .venv/bin/pip install -e '.[launch]')"
_HERE = Path(__file__).resolve().parent
_CONFIG = (
    "experiment file, e.g. experiments/nano.py; it is Python and is run: never give a stranger's"
)
_START_SECONDS = 30  # For TensorBoard to answer; it takes a few.


class _Parser(argparse.ArgumentParser):
    """Tells of wrong flags as of everything else, in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags of this launcher."""
    parser = _Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", required=True, help=_CONFIG)
    parser.add_argument(
        "--out",
        required=True,
        help="folder of the run, or of all runs of a sweep; gs:// for a cloud",
    )
    parser.add_argument(
        "--executor",
        choices=["local", "gke", "vertex"],
        default="local",
        help="where the jobs run (default: local)",
    )
    add: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument("--set", **add, metavar="FIELD=VALUE", help="override a field; repeatable")
    parser.add_argument(
        "--sweep",
        **add,
        metavar="FIELD=A,B",
        help="a work unit for each value; repeatable: for each combination",
    )
    parser.add_argument(
        "--require",
        **add,
        metavar="NAME=AMOUNT",
        help="of a cloud: tpu_v5e=4x4, cpu=8, ram=64 (GiB); repeatable",
    )
    parser.add_argument("--image", help="of a cloud: the image of tpu_setup/Dockerfile, pushed")
    parser.add_argument(
        "--service-account",
        help="of gke: the pods' account, which may write to the bucket (default: apr)",
    )
    parser.add_argument(
        "--tensorboard", action="store_true", help="TensorBoard beside it, until Ctrl-C"
    )
    parser.add_argument("--port", type=int, default=6006, help="of TensorBoard (default: 6006)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the specs of the jobs, and launch nothing"
    )
    flags = parser.parse_args(arguments)
    try:
        flags.config = local_path(flags.config)
    except UsageError as error:
        raise UsageError(f"--config {error}") from None
    try:
        # A cloud's bucket is opened by the job, so that gcsfs need not be here.
        flags.out = (
            str(absolute(flags.out))
            if flags.executor == "local"
            else checked(flags.out).rstrip("/")
        )
    except UsageError as error:
        raise UsageError(f"--out {error}") from None
    return flags


def check(flags: argparse.Namespace, units: Sequence[Unit]) -> Experiment:
    """Finds what is wrong before anything is launched, in any unit's config too; returns that of
    the first.
    """
    if importlib.util.find_spec("xmanager") is None:
        raise UserError(f"xmanager is not installed, and it is what launches: {REMEDY}")
    if flags.service_account and flags.executor != "gke":
        raise UsageError(
            f"--service-account {flags.service_account}: is of --executor gke, not of"
            f" {flags.executor}"
        )
    if flags.executor != "local":
        _check_cloud(flags)
    elif flags.image or flags.require:
        raise UsageError(
            "--image and --require are of --executor gke and vertex; a local run takes this machine"
            " as it is"
        )
    configs = [load(flags.config, list(unit.settings)) for unit in units]
    return configs[0]


def _check_cloud(flags: argparse.Namespace) -> None:
    if not is_remote(flags.out):
        raise UsageError(f"--out {flags.out}: a cloud's machines go; must be gs://BUCKET/FOLDER")
    if not flags.image:
        raise UsageError(
            f"--executor {flags.executor}: give --image (tpu_setup/gke.sh image builds and"
            " pushes it)"
        )
    if flags.config.resolve().parent != _HERE:
        raise UsageError(
            f"--config {flags.config}: the image holds the files of {_HERE} alone; must be one of"
            " them"
        )


def check_data(flags: argparse.Namespace, units: Sequence[Unit], config: Experiment) -> None:
    """Makes sure that units of a cloud, which start at the same time, find the data that they
    share.

    Raises:
      UsageError: some are missing, and each unit would build them over the others'; or they are of
        other settings.
    """
    shared = units[0].data
    if flags.executor == "local" or shared is None:
        return
    from apr_jax.data.build import check_built
    from apr_jax.paper.pipeline import METHODS

    settings = [word for setting in flags.set for word in ("--set", setting)]
    methods = [word for method in METHODS for word in ("--method", method)]
    build = shlex.join(
        [
            "apr",
            "data",
            "build",
            "--config",
            str(flags.config),
            "--out",
            shared,
            *settings,
            *methods,
        ]
    )
    if flags.dry_run:
        print(
            f"launch: not checked: that {shared}/data.json is there; it is made by: {build}",
            file=sys.stderr,
        )
        return
    folder = as_path(shared)
    there = (folder / "data.json").is_file()
    if there:
        check_built(config, folder)
    if not there or not set(METHODS) <= set(
        json.loads((folder / "data.json").read_text())["methods"]
    ):
        raise UsageError(
            f"--sweep: {shared} lacks data of {' and '.join(METHODS)}, which the units would all"
            f" build at once; build them first: {build}"
        )


def job_arguments(flags: argparse.Namespace, unit: Unit) -> list[str]:
    """`reproduce ...` as the job's `apr` is given it."""
    config = (
        str(flags.config.absolute())
        if flags.executor == "local"
        else f"experiments/{flags.config.resolve().name}"
    )
    settings = [word for setting in unit.settings for word in ("--set", setting)]
    data = ["--data", unit.data] if unit.data else []
    return ["reproduce", "--config", config, "--out", unit.out, *data, *settings]


def requirements(flags: argparse.Namespace) -> Any:
    """The xm.JobRequirements; raises UsageError for what XManager does not know."""
    from xmanager import xm

    asked: dict[Any, Any] = {}
    for text in flags.require:
        name, _, amount = text.partition("=")
        resource = xm.ResourceType.__members__.get(name.upper())
        if resource is None or not re.fullmatch(r"\d+(\.\d+)?|[1-9]\d*(x[1-9]\d*)+", amount):
            raise UsageError(f"--require {text!r}: write it like tpu_v5e=4x4, cpu=8 or ram=64")
        if resource in asked:
            raise UsageError(f"--require {text!r}: is given twice")
        unit = xm.GiB if resource in (xm.ResourceType.RAM, xm.ResourceType.DISK) else 1
        asked[resource] = amount if "x" in amount else float(amount) * unit
        if not asked[resource]:
            raise UsageError(f"--require {text!r}: must be more than 0")
    try:
        return xm.JobRequirements(asked)
    except ValueError as error:
        raise UsageError(
            f"--require {' '.join(flags.require)}: must be one kind of chip, and numbers of"
            f" everything else ({error})"
        ) from None


def job_of(flags: argparse.Namespace, unit: Unit, name: str) -> Any:
    """The xm.Job of a unit."""
    from xmanager import xm, xm_local
    from xmanager.xm_local import executables

    arguments = job_arguments(flags, unit)
    if flags.executor == "local":
        binary = executables.LocalBinary(name=name, command=sys.executable)
        return xm.Job(
            binary, executor=xm_local.Local(), args=["-m", "apr_jax", *arguments], name=name
        )
    # Not packaged: XManager would pull the image, and push it to a registry of its own choice.
    image = executables.GoogleContainerRegistryImage(name=name, image_path=flags.image)
    if flags.executor == "gke":
        from launcher.gke import ENVIRONMENT, Gke

        executor = Gke(requirements=requirements(flags))
        executor.service_account = flags.service_account or executor.service_account
        return xm.Job(image, executor=executor, args=arguments, name=name, env_vars=ENVIRONMENT)
    return xm.Job(
        image, executor=xm_local.Vertex(requirements=requirements(flags)), args=arguments, name=name
    )


def spec_of(flags: argparse.Namespace, job: Any) -> dict[str, Any]:
    """What would be launched, for --dry-run: the command, the Kubernetes Job, or Vertex's pool of
    workers.
    """
    if flags.executor == "local":
        return {"command": [job.executable.command, *job.args.to_list()]}
    if flags.executor == "gke":
        from launcher.gke import printed

        return printed(job)
    from xmanager.cloud import vertex

    try:
        machine = {
            name: getattr(value, "name", value)
            for name, value in vertex.get_machine_spec(job).items()
        }
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"--require {' '.join(flags.require)}: XManager has no machine of Vertex AI for it"
            f" ({error})"
        ) from None
    return {
        "machine_spec": machine,
        "replica_count": 1,
        "image_uri": job.executable.image_path,
        "args": job.args.to_list(),
    }


async def launch(
    flags: argparse.Namespace, name: str, units: Sequence[Unit], jobs: Sequence[Any]
) -> list[str]:
    """Launches the units' jobs, one after the other; local ones are waited for.

    Returns which of them failed, and why.
    """
    from xmanager import xm, xm_local

    failed: list[str] = []
    try:
        created = xm_local.create_experiment(experiment_title=f"apr_jax {name}")
    except (
        Exception
    ) as error:  # Of the system, sqlite, SQLAlchemy or Alembic, each with types of its own.
        notes = Path("~/.xmanager").expanduser()
        said, *_ = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f"XManager can't note the experiment in {notes} ({said}); it must be a folder that you"
            " may write to; if it is damaged, move it away"
        ) from None
    try:
        async with created as experiment:
            for unit, job in zip(units, jobs, strict=True):
                launched: Any = await experiment.add(job)
                if flags.executor != "local":
                    print(f"launched: {unit.out}", file=sys.stderr)
                    continue
                try:
                    await launched.wait_until_complete()
                except xm.ExperimentUnitError as error:
                    failed.append(f"{unit.out} ({error})")
    except RuntimeError:
        # Of a local job that failed XManager tells once more when the experiment ends.
        if not failed:
            raise
    return failed


@contextlib.contextmanager
def tensorboard(folder: str, port: int) -> Iterator[None]:
    """TensorBoard beside what happens inside, and after that until Ctrl-C.

    XManager could run it too, but it waits for such a job through the first Ctrl-C and leaves it
    running after the second.

    Raises:
      UsageError: the port is taken.
      UserError: TensorBoard does not start.
    """
    if not 0 < port < 2**16:
        raise UsageError(f"--port {port}: must be in 1..65535")
    if _answers(port):
        raise UsageError(
            f"--port {port}: something else answers there already; give TensorBoard another one"
        )
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", "tensorboard.main", "--logdir", folder, "--port", str(port)]
    )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while server.poll() is None and not _answers(port) and time.monotonic() < deadline:
            time.sleep(0.2)
        if server.poll() is not None:
            raise UserError(
                f"TensorBoard does not start, see above; another --port than {port}, or no"
                " --tensorboard"
            )
        yield
        if server.poll() is None:
            print(
                f"launch: TensorBoard stays at http://localhost:{port} until Ctrl-C",
                file=sys.stderr,
            )
            with contextlib.suppress(KeyboardInterrupt):
                server.wait()
        if server.returncode is not None:
            again = shlex.join(
                ["python", "-m", "tensorboard.main", "--logdir", folder, "--port", str(port)]
            )
            print(
                f"launch: TensorBoard ended by itself (status {server.returncode}); {again}",
                file=sys.stderr,
            )
    finally:
        server.terminate()
        server.wait()


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
        return True
    return False


def run(flags: argparse.Namespace) -> None:
    """Checks everything, then launches it; with --dry-run prints it."""
    units = work_units(flags.out, flags.set, flags.sweep)
    config = check(flags, units)
    from absl import flags as absl_flags

    absl_flags.FLAGS(["launch"])  # XManager reads its own flags, all at their defaults.
    # It logs, with tracebacks, what is told below in a line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    jobs = [job_of(flags, unit, config.name) for unit in units]
    specs = [spec_of(flags, job) for job in jobs]
    check_data(flags, units, config)
    if flags.dry_run:
        for spec in specs:
            print(json.dumps(spec, indent=2))
        return
    with tensorboard(flags.out, flags.port) if flags.tensorboard else contextlib.nullcontext():
        failed = asyncio.run(launch(flags, config.name, units, jobs))
        if failed:
            print(f"launch: {len(failed)} of {len(units)} jobs failed", file=sys.stderr)
    if failed:
        raise UserError(
            f"failed: {'; '.join(failed)}; what was saved is kept, launch it again to go on"
        )


def main(arguments: list[str]) -> int:
    """Launches, and returns the exit status."""
    cloud = False
    try:
        flags = parse(arguments)
        cloud = flags.executor != "local"
        run(flags)
    except KeyboardInterrupt:
        print(
            "launch: interrupted; the job was told to save and stop; launch it again to go on",
            file=sys.stderr,
        )
        return 130
    except UserError as error:
        print(f"launch: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except Exception as error:
        if not cloud or os.environ.get("APR_DEBUG"):
            raise
        # Of Google's clients, each with types of its own: no credentials, no project, no
        # permission.
        print(
            f"launch: error: {type(error).__name__}: {' '.join(str(error).split())}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
