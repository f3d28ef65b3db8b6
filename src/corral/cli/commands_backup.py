"""hub backup and hub restore: one archive of all that a hub is, and putting one back."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from corral.cli import render
from corral.cli.command import command
from corral.cli.context import Environment, Failed, json_option, pass_environment, wait_for
from corral.cli.progress import TransferView

if TYPE_CHECKING:
    from corral.main.backup import BackupPlan
    from corral.main.restore import Restored, TakenAgain

_STREAM = "-"
_VARIABLES = ("CORRAL_HOME", "CORRAL_DATABASE_URL")
#: Of the bar, which has no digest of its own.
_BAR = "all"
#: What was taken away, by its kind in the log of revocations: of one, of several.
_TAKEN = {
    "key": ("API key", "API keys"),
    "device": ("device", "devices"),
    "device-scopes": ("device's scopes", "devices' scopes"),
    "account": ("account locked out", "accounts locked out"),
    "account-deleted": ("account deleted", "accounts deleted"),
    "administrator": ("administrator", "administrators"),
    "password": ("password", "passwords"),
    "collaborator": ("collaborator", "collaborators"),
    "public": ("model's being public", "models' being public"),
}
#: What somebody is to do about it, by kind; the account's name comes behind it.
_NEEDED = {
    "password": "set another password since, which is in no backup → corral hub user passwd",
    "account": "was locked out since; to let in again → corral hub user enable",
    "administrator": "was an administrator then; to make one again → corral hub user promote",
}


@command("backup", variables=_VARIABLES)
@click.argument("file", required=False, default="")
@click.option("--without-blobs", is_flag=True, help="Leave out the models' content, for a copy of blobs/ made otherwise.")
@json_option
@pass_environment
def backup(environment: Environment, file: str, without_blobs: bool, as_json: bool) -> None:
    """Back up the hub into one archive, also while it runs: accounts, devices, API keys, models and what they are checked with.

    FILE is a new file, an older backup to replace, a directory, or - for standard output; left out, a file named by the time in
    the current directory. The archive holds secrets of the hub, and is readable by its owner alone."""
    from corral.main.backup import back_up

    target = _target(file, as_json=as_json)

    def announce(plan: "BackupPlan") -> None:
        render.say(_plan_line(plan))
        for digest in plan.damaged:
            render.say(f"Warning: {digest[:19]} is damaged and left out; corral hub scrub names the models it belongs to")

    with TransferView("", monotonic=time.monotonic) as view:
        work = back_up(
            environment.settings,
            target,
            with_blobs=not without_blobs,
            announce=announce,
            report=_reporting(view, "backing up"),
        )
        plan = wait_for(work)
    render.say("It holds password hashes and what API keys are checked with: keep it as closed as the hub.")
    if not isinstance(target, Path):
        return
    if target.stat().st_mode & 0o077:
        render.say(f"Warning: others can read {render.plain(str(target))}: its file system keeps no modes")
    if as_json:
        fields = {**asdict(plan), "created_at": _json_time(plan.created_at)}
        sys.stdout.write(render.as_json({"file": str(target), **fields}))
    else:
        sys.stdout.write(f"{render.plain(str(target))}\n")


def _target(file: str, *, as_json: bool) -> Path | BinaryIO:
    if file == _STREAM:
        if as_json:
            raise Failed("standard output cannot be both, the archive and JSON", "give a file's name with --json", status=2)
        if sys.stdout.isatty():
            raise Failed("standard output is a terminal", "redirect it: corral hub backup - > FILE", status=2)
        # Without a buffer of its own, which would try once more at the end, when the reader has left.
        return FileIO(sys.stdout.fileno(), "wb", closefd=False)
    path = Path.cwd() / file
    if file.endswith("/") and not path.is_dir():
        raise Failed(f"there is no directory {render.plain(file)}", f"mkdir {render.plain(file)}, and back up again")
    if not path.suffix and not path.exists():
        # A file of that name, where a directory was meant, would be in the way of every backup after it.
        what = render.plain(file)
        raise Failed(
            f"there is no directory {what}", f"mkdir {what}, and back up again; a new file is named with its ending, {what}.tar"
        )
    return path / f"corral-hub-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.tar" if path.is_dir() else path


def _plan_line(plan: "BackupPlan") -> str:
    blobs = f"{_count(plan.blobs, 'blob')} of {render.size(plan.blob_bytes)}" if plan.has_blobs else "no blobs"
    database = f"a database of {render.size(plan.database_bytes)}"
    return f"{_count(plan.accounts, 'account')}, {database}, {blobs}: {render.size(plan.size_bytes)} in all."


@command("restore", variables=_VARIABLES)
@click.argument("file")
@click.option("--replace", is_flag=True, help="Restore where a hub is. Its database stays beside, under another name.")
@json_option
@pass_environment
def restore(environment: Environment, file: str, replace: bool, as_json: bool) -> None:
    """Make a hub of a backup in FILE, or - for standard input, in an empty CORRAL_HOME. The hub must not run.

    All of the backup is checked before anything is put in place. What was revoked since, as far as this CORRAL_HOME knows, stays
    revoked; browser sessions and registry tokens end."""
    from corral.main.restore import restore as put_back

    def announce(created_at: datetime, size_bytes: int) -> None:
        render.say(f"A backup of {_shown(created_at)}, {render.size(size_bytes)}.")

    with _opened(file) as source, TransferView("", monotonic=time.monotonic) as view:
        work = put_back(
            environment.settings, source, may_replace=replace, announce=announce, report=_reporting(view, "restoring")
        )
        done = wait_for(work)
    if as_json:
        sys.stdout.write(render.as_json({**asdict(done), "created_at": _json_time(done.created_at)}))
    _say_restored(done, str(environment.settings.corral_home))


def _opened(file: str) -> AbstractContextManager[BinaryIO]:
    if file != _STREAM:
        return (Path.cwd() / file).open("rb", buffering=0)
    if sys.stdin.isatty():
        raise Failed("standard input is a terminal", "pipe the backup in: … | corral hub restore -", status=2)
    return nullcontext(sys.stdin.buffer)


def _say_restored(done: "Restored", home: str) -> None:
    blobs = f", {_count(done.blobs, 'blob')} of {render.size(done.blob_bytes)}" if done.blobs else ""
    render.say(f"Restored {_count(done.accounts, 'account')}{blobs} into {render.plain(home)}.")
    if done.former:
        render.say(f"The database that was there is now {render.plain(done.former)}.")
    for line in _taken_lines(done.taken_again):
        render.say(line)
    if done.is_forgetful:
        log = render.plain(f"{home}/revocations.log")
        render.say(f"There was no {log}, so what was revoked since the backup works again")
        render.say("→ if the old home still has that file, copy it there, and restore again with --replace")
    if not done.administrators:
        render.say("Nobody is an administrator now → corral hub user promote NAME")
    if done.missing_blobs:
        verb = "is" if done.missing_blobs == 1 else "are"
        text = f"{_count(done.missing_blobs, 'blob')} of its models {verb} not here"
        render.say(f"{text} → copy what is missing into {render.plain(home)}/blobs")
    render.say("Browser sessions and registry tokens have ended; all else works as it did when the backup was made.")


def _taken_lines(taken: "Sequence[TakenAgain]") -> list[str]:
    """What was revoked once more, and who needs something of it."""
    if not taken:
        return []
    counts = Counter(one.kind for one in taken)
    summary = ", ".join(f"{count} {words[count > 1]}" for kind, words in _TAKEN.items() if (count := counts[kind]))
    lines = [f"Taken away again, as it was since the backup: {summary}."]
    for kind, sentence in _NEEDED.items():
        lines += [f"{one.name} {sentence} {one.name}" for one in taken if one.kind == kind and one.name]
    for one in taken:
        if one.owner:
            key = f'{one.owner}\'s API key "{render.plain(one.name)}"'
            lines.append(f"{key} was revoked or rotated since; where it is still needed → {one.owner} makes a new one")
    return lines


def _reporting(view: TransferView, verb: str) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        view.show({"digest": _BAR, "status": verb, "total": total, "completed": done})

    return report


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _shown(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _json_time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
