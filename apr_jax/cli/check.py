"""The command `apr check`."""

import time

import typer

from apr_jax.cli.findings import print_finding
from apr_jax.cli.flags import Json
from apr_jax.errors import UserError
from apr_jax.io.json_files import write_json
from apr_jax.io.runtime import is_first, start

check_app = typer.Typer()


@check_app.command(epilog="Example: apr check --json check.json")
def check(json: Json = None) -> None:
    """Check that the devices at hand compute right, and how fast: two minutes, no data needed.

    The first thing to run on a new machine, or on all hosts of a pod at once. It says a line about
    each of versions, devices, engine, rescoring, gradient, a training step and a decode step. Exit
    status 1 if there is a fault, with the reason.
    """
    began = time.monotonic()
    start(together=True)
    from apr_jax.check.device import check_device, to_json

    findings = []
    for finding in check_device():
        findings.append(finding)
        if is_first():
            print_finding(finding.level, finding.subject, finding.text)
    faults = sum(finding.level == "fault" for finding in findings)

    if not is_first():
        if faults:
            raise typer.Exit(1)
        return
    if json:
        write_json(json, to_json(findings))
    if faults:
        raise UserError(f"check: {faults} of {len(findings)} found a fault; see above")
    typer.echo(f"all {len(findings)} checks are ok, in {time.monotonic() - began:.0f} s")
