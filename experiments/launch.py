"""Launches a whole experiment, or a sweep of them, with XManager.

    python experiments/launch.py --config experiments/nano.py --out runs/launched
    python experiments/launch.py --config experiments/nano.py --out runs/lr --tensorboard \\
        --sweep learn.sft.optimizer.lr=1e-3,4e-3
    python experiments/launch.py --config experiments/nano.py --out gs://BUCKET/nano --executor gke --image IMAGE \\
        --require tpu_v5e=2x4

A work unit is one `apr reproduce` (data, SFT, RL, evaluation, report; each goes on where it was when it is launched again):
    local    a process of this Python; units one after the other, for they would share the cores
    gke      a Job on a TPU slice of the current kubectl cluster (launcher/gke.py); units at the same time
    vertex   a custom job of Vertex AI; of TPUs, XManager knows v2 and v3 there
The image is that of tpu_setup/Dockerfile. XManager notes the experiment in ~/.xmanager. Needs the extra [launch]. Exit status:
0 done (gke, vertex: launched), 1 a job failed, 2 a wrong flag or config, 130 Ctrl-C.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apr_jax.config import Experiment, load
from apr_jax.errors import UsageError, UserError
from apr_jax.storage import absolute, is_remote
from launcher.sweep import Unit, work_units

REMEDY = "pip install 'apr_jax[launch]' (in the clone: .venv/bin/pip install -e '.[launch]')"
_PORT = 6006


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags of this launcher."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="experiment file, e.g. experiments/nano.py")
    parser.add_argument("--out", required=True, help="folder of the run, or of all runs of a sweep; gs:// for a cloud")
    parser.add_argument(
        "--executor", choices=["local", "gke", "vertex"], default="local", help="where the jobs run (default: local)"
    )
    add: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument("--set", **add, metavar="FIELD=VALUE", help="override a field; repeatable")
    parser.add_argument(
        "--sweep", **add, metavar="FIELD=A,B", help="a work unit for each value; repeatable: for each combination"
    )
    parser.add_argument(
        "--require", **add, metavar="NAME=AMOUNT", help="of a cloud: tpu_v5e=4x4, cpu=8, ram=64 (GiB); repeatable"
    )
    parser.add_argument("--image", help="of a cloud: the image of tpu_setup/Dockerfile, pushed")
    parser.add_argument("--tensorboard", action="store_true", help=f"TensorBoard beside it, on port {_PORT}")
    parser.add_argument("--dry-run", action="store_true", help="print the specs of the jobs, and launch nothing")
    flags = parser.parse_args(arguments)
    flags.out = str(absolute(flags.out)) if flags.executor == "local" else flags.out.rstrip("/")
    return flags


def check(flags: argparse.Namespace) -> Experiment:
    """Finds what is wrong before anything is launched, in any unit's config too; returns that of the first."""
    if importlib.util.find_spec("xmanager") is None:
        raise UserError(f"xmanager is not installed, and it is what launches: {REMEDY}")
    if flags.executor != "local":
        if not is_remote(flags.out):
            raise UsageError(f"--out {flags.out}: a cloud's machines go; must be gs://BUCKET/FOLDER")
        if not flags.image:
            raise UsageError(f"--executor {flags.executor}: give --image (tpu_setup/gke.sh image builds and pushes it)")
        if not (Path(__file__).parent / flags.config.name).is_file():
            raise UsageError(f"--config {flags.config}: the image holds the files of experiments/ alone; put it there")
    elif flags.image or flags.require:
        raise UsageError(
            "--image and --require are of --executor gke and vertex; a local run takes this machine as it is"
        )
    configs = [load(flags.config, list(unit.settings)) for unit in units_of(flags)]
    return configs[0]


def units_of(flags: argparse.Namespace) -> list[Unit]:
    return work_units(flags.out, flags.set, flags.sweep)


def job_arguments(flags: argparse.Namespace, unit: Unit) -> list[str]:
    """`reproduce ...` as the job's `apr` is given it."""
    config = str(flags.config.absolute()) if flags.executor == "local" else f"experiments/{flags.config.name}"
    settings = [word for setting in unit.settings for word in ("--set", setting)]
    data = ["--data", unit.data] if unit.data else []
    return ["reproduce", "--config", config, "--out", unit.out, *data, *settings]


def requirements(flags: argparse.Namespace) -> Any:
    """The xm.JobRequirements; raises UsageError for what XManager does not know."""
    from xmanager import xm

    asked: dict[str, Any] = {}
    for text in flags.require:
        name, equals, amount = text.partition("=")
        if name.upper() not in xm.ResourceType.__members__ or not equals:
            raise UsageError(f"--require {text!r}: write it like tpu_v5e=4x4, cpu=8 or ram=64")
        try:
            asked[name.lower()] = amount if "x" in amount else float(amount) * (xm.GiB if name.lower() == "ram" else 1)
        except ValueError:
            raise UsageError(f"--require {text!r}: {amount!r} must be a number, or a topology like 4x4") from None
    return xm.JobRequirements(**asked)


def job_of(flags: argparse.Namespace, unit: Unit, name: str) -> Any:
    """The xm.Job of a unit."""
    from xmanager import xm, xm_local
    from xmanager.xm_local import executables

    arguments = job_arguments(flags, unit)
    if flags.executor == "local":
        binary = executables.LocalBinary(name=name, command=sys.executable)
        return xm.Job(binary, executor=xm_local.Local(), args=["-m", "apr_jax", *arguments], name=name)
    # Not packaged: XManager would pull the image, and push it to a registry of its own choice.
    image = executables.GoogleContainerRegistryImage(name=name, image_path=flags.image)
    if flags.executor == "gke":
        from launcher.gke import Gke, slice_of

        executor = Gke(requirements=requirements(flags))
        found = slice_of(executor.requirements)
        environment = {"JAX_COORDINATOR_ADDRESS": "auto"} if found is not None else {}
        return xm.Job(image, executor=executor, args=arguments, name=name, env_vars=environment)
    return xm.Job(image, executor=xm_local.Vertex(requirements=requirements(flags)), args=arguments, name=name)


def spec_of(flags: argparse.Namespace, job: Any) -> dict[str, Any]:
    """What would be launched, for --dry-run: the command, the Kubernetes Job, or Vertex's pool of workers."""
    if flags.executor == "local":
        return {"command": [job.executable.command, *job.args.to_list()]}
    if flags.executor == "gke":
        from launcher.gke import printed

        return printed(job)
    from xmanager.cloud import vertex

    try:
        machine = {name: getattr(value, "name", value) for name, value in vertex.get_machine_spec(job).items()}
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"--require {' '.join(flags.require)}: XManager has no machine of Vertex AI for it ({error})"
        ) from None
    return {
        "machine_spec": machine,
        "replica_count": 1,
        "image_uri": job.executable.image_path,
        "args": job.args.to_list(),
    }


async def launch(flags: argparse.Namespace, name: str) -> list[str]:
    """Launches all units, one after the other; local ones are waited for. Returns those of them that failed, and why."""
    from xmanager import xm, xm_local

    failed: list[str] = []
    try:
        async with xm_local.create_experiment(experiment_title=f"apr_jax {name}") as experiment:
            for unit in units_of(flags):
                launched: Any = await experiment.add(job_of(flags, unit, name))
                if flags.executor != "local":
                    print(f"launched: {unit.out}", file=sys.stderr)
                    continue
                try:
                    await launched.wait_until_complete()
                except xm.ExperimentUnitError as error:
                    failed.append(f"{unit.out} ({error})")
    except RuntimeError:
        if not failed:  # Of a local job that failed XManager tells once more when the experiment ends.
            raise
    return failed


@contextlib.contextmanager
def tensorboard(folder: str) -> Iterator[None]:
    """TensorBoard beside what happens inside, and after that until Ctrl-C.

    XManager could run it too, but it waits for such a job through the first Ctrl-C and leaves it running after the second.
    """
    server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", str(_PORT)])
    try:
        yield
        print(f"launch: TensorBoard stays at http://localhost:{_PORT} until Ctrl-C", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            server.wait()
    finally:
        server.terminate()
        server.wait()


def main(arguments: list[str]) -> int:
    """Launches, and returns the exit status."""
    cloud = False
    try:
        flags = parse(arguments)
        cloud = flags.executor != "local"
        config = check(flags)
        from absl import flags as absl_flags

        absl_flags.FLAGS(["launch"])  # XManager reads its own flags, all at their defaults.
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # It logs, with tracebacks, what is told below in a line.
        if flags.dry_run:
            for unit in units_of(flags):
                print(json.dumps(spec_of(flags, job_of(flags, unit, config.name)), indent=2))
            return 0
        with tensorboard(flags.out) if flags.tensorboard else contextlib.nullcontext():
            failed = asyncio.run(launch(flags, config.name))
            if failed:
                print(f"launch: {len(failed)} of {len(units_of(flags))} jobs failed", file=sys.stderr)
        if failed:
            raise UserError(f"failed: {'; '.join(failed)}; what was saved is kept, launch it again to go on")
    except KeyboardInterrupt:
        print("launch: interrupted; the job was told to save and stop; launch it again to go on", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"launch: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except Exception as error:
        if not cloud:
            raise
        # Of Google's clients, each with types of its own: no credentials, no project, no permission.
        print(f"launch: error: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
