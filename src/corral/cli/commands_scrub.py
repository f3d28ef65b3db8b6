"""hub scrub: read what the hub keeps, and say what its disk has changed."""

import sys
import time
from typing import TYPE_CHECKING

import click

from corral.cli import render
from corral.cli.command import command
from corral.cli.context import Environment, Failed, json_option, pass_environment, wait_for
from corral.cli.progress import TransferView

if TYPE_CHECKING:
    from corral.core.scrubbing import ScrubProgress
#: Of the bar, which has no digest of its own.
_BAR = "all"


@command(variables=("CORRAL_HOME", "CORRAL_SCRUB_DAYS"))
@click.option("--rate", metavar="SIZE", default="", help="Read at most so much a second, such as 50MB.")
@json_option
@pass_environment
def scrub(environment: Environment, rate: str, as_json: bool) -> None:
    """Read every blob and compare it with its digest. One that a disk has changed is served no more, and the models that it
    belongs to are named; pushing one of them again makes it whole. A running hub does so by itself, slowly, every month.

    The exit status is 1 when something is damaged."""
    from corral.main.scrubbing import scrub_blobs
    from corral.settings import parse_size

    bytes_s = parse_size(rate) if rate else 0
    if bytes_s is None or (rate and not bytes_s):
        raise Failed(f"{rate!r} is no size", "give a size such as 50MB", status=2)
    with TransferView("", monotonic=time.monotonic) as view:

        def report(progress: "ScrubProgress") -> None:
            # What is found wrong is read twice.
            done = min(progress.done_bytes, progress.total_bytes)
            view.show({"digest": _BAR, "status": "reading", "total": progress.total_bytes, "completed": done})

        found = wait_for(scrub_blobs(environment.settings, bytes_s=bytes_s, report=report))
    if as_json:
        hurt = [{"digest": str(blob.digest), "since": blob.since.isoformat(), "models": blob.models} for blob in found.hurt]
        counts = {"blobs": found.blobs, "size_bytes": found.size_bytes, "damaged": found.damaged, "healed": found.healed}
        sys.stdout.write(render.as_json({**counts, "hurt": hurt}))
    else:
        healed = f", {found.healed} healed" if found.healed else ""
        render.say(f"Read {found.blobs} blobs of {render.size(found.size_bytes)}: {len(found.hurt)} damaged{healed}.")
        if found.hurt:
            rows = [
                (blob.digest.file_name[:19], render.size(blob.size_bytes), f"{blob.since:%Y-%m-%d}", ", ".join(blob.models))
                for blob in found.hurt
            ]
            sys.stdout.write(render.table(("DAMAGED", "SIZE", "SINCE", "MODELS"), rows))
    if found.hurt:
        damaged = "1 blob is damaged" if len(found.hurt) == 1 else f"{len(found.hurt)} blobs are damaged"
        raise Failed(damaged, "push the models again, or put the files back from a backup")
