"""doctor: what works on this machine and with the hub, what does not, and the one thing to do about each."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from corral.cli import render
from corral.cli.command import command
from corral.cli.context import Environment, hub_option, json_option, pass_environment, wait_for
from corral.cli.waiting import Waiting

if TYPE_CHECKING:
    from corral.cli.doctor_findings import Finding

_VARIABLES = ("OLLAMA_HOST", "OLLAMA_MODELS", "OLLAMA_API_KEY", "OLLAMA_NO_CLOUD", "CORRAL_HUB")


@command(variables=_VARIABLES)
@click.argument("auth", required=False, type=click.Choice(["auth"]))
@hub_option
@json_option
@click.pass_context
@pass_environment
def doctor(environment: Environment, ctx: click.Context, auth: str | None, hub_url: str, as_json: bool) -> None:
    """Say what works here and at the hub, what does not, and what to do about it.

    With `auth`, look only at who this machine is to the hub: key, clock, device, API key.

    Looks, and changes nothing. The exit status is 1 when there is a problem."""
    from corral.cli.doctor_findings import EVERYTHING, IDENTITY, findings
    from corral.cli.doctor_gather import look
    from corral.main.shared import SystemClock
    from corral.settings import parse_hub_url

    hub = parse_hub_url(hub_url, where="--hub") if hub_url else ""
    with Waiting():
        seen = wait_for(look(environment.settings, hub, clock=SystemClock(), is_identity_only=auth is not None))
    found = findings(seen, checks=IDENTITY if auth else EVERYTHING)
    sys.stdout.write(render.as_json([finding.as_object() for finding in found]) if as_json else report(found))
    if any(finding.status == "problem" for finding in found):
        ctx.exit(1)


def report(found: "Sequence[Finding]") -> str:
    """A row for each finding, what to do below each problem, and how many there are."""
    width = max(len(finding.check) for finding in found)
    lines = []
    for finding in found:
        row = f"{finding.check.ljust(width)} {render.plain(finding.detail)}"
        match finding.status:
            case "ok":
                lines.append(row)
            case "skipped":
                lines.append(render.quiet(row))
            case "problem":
                lines += [f"{row}  {render.failed('✗')}", f"  → {render.plain(finding.fix)}"]
    count = sum(finding.status == "problem" for finding in found)
    total = "No problems." if not count else "1 problem." if count == 1 else f"{count} problems."
    lines.append(render.failed(total) if count else render.done(total))
    return "".join(f"{line}\n" for line in lines)
