r"""Launches a whole experiment, or a sweep of them, with XManager.

    python experiments/launch.py --config experiments/nano.py --out runs/launched
    python experiments/launch.py --config experiments/nano.py --out runs/lr --tensorboard \
        --sweep train.sft.optimizer.lr=1e-3,4e-3
    python experiments/launch.py --config experiments/nano.py --out gs://BUCKET/nano \
        --executor gke --image IMAGE --require tpu_v5e=2x4

A work unit is one `apr reproduce`: data, SFT, RL, evaluation and report. When it is launched again,
it goes on where it was. It runs as one of these:

    local    a process of this Python; units run one after the other, because they share the cores
    gke      a Job on a TPU slice of the current kubectl cluster (launcher/gke.py)
    vertex   a custom job of Vertex AI, where XManager knows TPUs v2 and v3 only

The image is that of tpu_setup/Dockerfile. Units that start at the same time cannot build the data
that they share, so these must be built before. XManager notes the experiment in ~/.xmanager.

Needs the extra [launch], and [gcs] for a sweep in a cloud. Exit status: 0 done (gke, vertex:
launched), 1 a job failed, 2 a wrong flag or config, or a sweep in a cloud without its data, 130
Ctrl-C.
"""

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
_START_SECONDS = 30  # In which TensorBoard must answer; it takes a few.


class _Parser(argparse.ArgumentParser):
    """A parser that raises UsageError, so that wrong flags are reported like all other errors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the flags of this launcher.

    Raises:
      UsageError: a flag is wrong.
    """
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
    if flags.tensorboard:
        flags.set = ["train.tracker=tensorboard", *flags.set]
    try:
        flags.config = local_path(flags.config)
    except UsageError as error:
        raise UsageError(f"--config {error}") from None
    try:
        if flags.executor == "local":
            flags.out = str(absolute(flags.out))
        else:
            # The job opens a cloud's bucket, so gcsfs need not be installed here.
            flags.out = checked(flags.out).rstrip("/")
    except UsageError as error:
        raise UsageError(f"--out {error}") from None
    return flags


def check(flags: argparse.Namespace, units: Sequence[Unit]) -> Experiment:
    """Checks flags and configs before anything is launched.

    Returns:
      the config of the first unit.

    Raises:
      UsageError: a flag or a unit's config is wrong.
      UserError: xmanager is not installed.
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
    """Raises UsageError if a cloud's machines could not run the job."""
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
    """Checks that the data exist which the units of a sweep in a cloud share.

    Raises:
      UsageError: data are missing, and units that start at the same time would overwrite each
        other's; or the data have other settings.
    """
    shared = units[0].data
    if flags.executor == "local" or shared is None:
        return
    from apr_jax.data.build import check_built
    from apr_jax.paper.pipeline import sharing_methods

    settings = [word for setting in flags.set for word in ("--set", setting)]
    needed = sharing_methods(config)
    methods = [word for method in needed for word in ("--method", method)]
    command = ["apr", "data", "build", "--config", str(flags.config), "--out", shared]
    build = shlex.join([*command, *settings, *methods])
    if flags.dry_run:
        print(
            f"launch: not checked: that {shared}/data.json is there; it is made by: {build}",
            file=sys.stderr,
        )
        return

    folder = as_path(shared)
    built: set[str] = set()
    if (folder / "data.json").is_file():
        check_built(config, folder)
        built = set(json.loads((folder / "data.json").read_text())["methods"])
    if not set(needed) <= built:
        raise UsageError(
            f"--sweep: {shared} lacks data of {' and '.join(needed)}, which the units would all"
            f" build at once; build them first: {build}"
        )


def job_arguments(flags: argparse.Namespace, unit: Unit) -> list[str]:
    """Returns the arguments of the job's `apr`: `reproduce ...`."""
    if flags.executor == "local":
        config = str(flags.config.absolute())
    else:
        config = f"experiments/{flags.config.resolve().name}"  # Within the image.
    settings = [word for setting in unit.settings for word in ("--set", setting)]
    data = ["--data", unit.data] if unit.data else []
    return ["reproduce", "--config", config, "--out", unit.out, *data, *settings]


def requirements(flags: argparse.Namespace) -> Any:
    """Reads the --require flags as xm.JobRequirements.

    Raises:
      UsageError: XManager does not know a requirement.
    """
    from xmanager import xm

    required: dict[Any, Any] = {}
    for text in flags.require:
        name, _, amount = text.partition("=")
        resource = xm.ResourceType.__members__.get(name.upper())
        if resource is None or not re.fullmatch(r"\d+(\.\d+)?|[1-9]\d*(x[1-9]\d*)+", amount):
            raise UsageError(f"--require {text!r}: write it like tpu_v5e=4x4, cpu=8 or ram=64")
        if resource in required:
            raise UsageError(f"--require {text!r}: is given twice")
        unit = xm.GiB if resource in (xm.ResourceType.RAM, xm.ResourceType.DISK) else 1
        required[resource] = amount if "x" in amount else float(amount) * unit
        if not required[resource]:
            raise UsageError(f"--require {text!r}: must be more than 0")
    try:
        return xm.JobRequirements(required)
    except ValueError as error:
        raise UsageError(
            f"--require {' '.join(flags.require)}: must be one kind of chip, and numbers of"
            f" everything else ({error})"
        ) from None


def job_of(flags: argparse.Namespace, unit: Unit, name: str) -> Any:
    """Makes the xm.Job of a unit."""
    from xmanager import xm, xm_local
    from xmanager.xm_local import executables

    arguments = job_arguments(flags, unit)
    if flags.executor == "local":
        binary = executables.LocalBinary(name=name, command=sys.executable)
        return xm.Job(
            binary, executor=xm_local.Local(), args=["-m", "apr_jax", *arguments], name=name
        )
    # The image is not packaged: XManager would pull it, and push it to a registry of its own
    # choice.
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
    """Describes what would be launched, for --dry-run.

    It is a command, a Kubernetes Job, or Vertex's pool of workers.
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
    """Launches the units' jobs one after the other, and waits for local ones.

    Returns:
      the jobs that failed, with the reasons.

    Raises:
      UserError: XManager cannot note the experiment.
    """
    from xmanager import xm, xm_local

    failed: list[str] = []
    try:
        created = xm_local.create_experiment(experiment_title=f"apr_jax {name}")
    # The system, sqlite, SQLAlchemy and Alembic each have errors of their own.
    except Exception as error:
        notes = Path("~/.xmanager").expanduser()
        reason, *_ = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f"XManager can't note the experiment in {notes} ({reason}); it must be a folder that"
            " you may write to; if it is damaged, move it away"
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
        # XManager reports a local job that failed once more when the experiment ends.
        if not failed:
            raise
    return failed


@contextlib.contextmanager
def tensorboard(folder: str, port: int) -> Iterator[None]:
    """Runs TensorBoard during the `with` block, and afterwards until Ctrl-C.

    XManager could run it too. But XManager keeps waiting for such a job at the first Ctrl-C, and
    leaves it running after the second.

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
    program = ["-m", "tensorboard.main", "--logdir", folder, "--port", str(port)]
    server = subprocess.Popen([sys.executable, "-P", *program])
    try:
        # Wait until it answers.
        deadline = time.monotonic() + _START_SECONDS
        while server.poll() is None and not _answers(port) and time.monotonic() < deadline:
            time.sleep(0.2)
        if server.poll() is not None:
            raise UserError(
                f"TensorBoard does not start, see above; another --port than {port}, or no"
                " --tensorboard"
            )

        yield

        # Everything is launched; TensorBoard stays until Ctrl-C.
        if server.poll() is None:
            print(
                f"launch: TensorBoard stays at http://localhost:{port} until Ctrl-C",
                file=sys.stderr,
            )
            with contextlib.suppress(KeyboardInterrupt):
                server.wait()
        if server.returncode is not None:
            again = shlex.join(["python", *program])
            print(
                f"launch: TensorBoard ended by itself (status {server.returncode}); {again}",
                file=sys.stderr,
            )
    finally:
        server.terminate()
        server.wait()


def _answers(port: int) -> bool:
    """Returns whether something on this machine answers at a port."""
    with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
        return True
    return False


def run(flags: argparse.Namespace) -> None:
    """Checks everything, and then launches it, or prints it with --dry-run."""
    units = work_units(flags.out, flags.set, flags.sweep)
    config = check(flags, units)
    from absl import flags as absl_flags

    # XManager reads its own flags, which all keep their defaults.
    absl_flags.FLAGS(["launch"])
    # XManager logs failures with tracebacks; they are reported below in a line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    jobs = [job_of(flags, unit, config.name) for unit in units]
    specs = [spec_of(flags, job) for job in jobs]
    check_data(flags, units, config)
    if flags.dry_run:
        for spec in specs:
            print(json.dumps(spec, indent=2))
        return
    server = tensorboard(flags.out, flags.port) if flags.tensorboard else contextlib.nullcontext()
    with server:
        failed = asyncio.run(launch(flags, config.name, units, jobs))
        if failed:
            print(f"launch: {len(failed)} of {len(units)} jobs failed", file=sys.stderr)
    if failed:
        raise UserError(
            f"failed: {'; '.join(failed)}; what was saved is kept, launch it again to go on"
        )


def main(arguments: list[str]) -> int:
    """Runs the launcher, and returns its exit status."""
    in_cloud = False
    try:
        flags = parse(arguments)
        in_cloud = flags.executor != "local"
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
        if not in_cloud or os.environ.get("APR_DEBUG"):
            raise
        # Google's clients have errors of their own, for missing credentials, projects and rights.
        message = " ".join(str(error).split())
        print(f"launch: error: {type(error).__name__}: {message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
