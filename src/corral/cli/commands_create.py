"""create, cp, rm: making, copying and removing models on the local server.

`create` reads a Modelfile here, hashes the files it names, sends those that the server does not have, and follows what the server
does with them. Source: ollama cmd/cmd.go, parser/parser.go, fb30760.
"""

import contextlib
import hashlib
import os
import stat
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from corral.cli import render
from corral.cli.api import ApiError, LocalApi
from corral.cli.command import command, installed_models
from corral.cli.context import Environment, Failed, pass_environment
from corral.cli.progress import TransferView, show_all
from corral.wire.errors import CorralError

if TYPE_CHECKING:
    from corral.wire.modelfile import Recipe

_BLOCK = 1 << 20
#: What a directory's model is taken from: the first of these patterns that finds something.
_MODEL_PATTERNS = (
    *(("model*.safetensors", "*/model*.safetensors"), ("consolidated*.safetensors",), ("*.gguf",)),
    *(("pytorch_model*.bin",), ("consolidated*.pth",), ("*.bin",)),
)
_BESIDE_SAFETENSORS = ("*.json", "*/*.json", "chat_template.jinja", "tokenizer.model", "*/tokenizer.model")
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class _File:
    """A file of the model. name: as the server is told, relative, with slashes."""

    path: Path
    name: str
    size_bytes: int
    digest: str = ""


@command()
@click.argument("model")
@click.option("-f", "--file", "modelfile", type=click.Path(), metavar="FILE", help="The Modelfile. [default: Modelfile]")
@click.option("-q", "--quantize", metavar="KIND", default="", help="Quantize an F16, BF16 or F32 model, such as to Q4_K_M.")
@click.option("--draft-quantize", metavar="KIND", default="", help="The same for the draft model.")
@click.option("--experimental", is_flag=True, hidden=True, help="Accepted for ollama's sake; safetensors need no flag here.")
@pass_environment
def create(
    environment: Environment, model: str, modelfile: str | None, quantize: str, draft_quantize: str, experimental: bool
) -> None:
    """Make a model as a Modelfile says."""
    from corral.wire.names import parse_name

    api = LocalApi(environment.settings)
    # Before gigabytes are hashed for a server that is not there.
    api.require()
    try:
        parse_name(model)
    except CorralError as error:
        raise Failed(
            f"invalid model name: {model}", "names look like tiny, alice/tiny:1b or hub.example:5000/alice/tiny"
        ) from error
    read = _read(modelfile or "")
    for name in read.recipe.deprecated:
        render.say(f"warning: parameter {name} is deprecated")
    if draft_quantize and not read.recipe.drafts:
        raise Failed("--draft-quantize requires a DRAFT model", status=2)
    wanted = {"quantize": quantize, "draft_quantize": draft_quantize}
    with TransferView("", monotonic=time.monotonic) as view:
        view.show({"status": "gathering model components"})
        body = {"model": model, **read.recipe.fields, **_sources(api, read, view)}
        body.update({name: kind for name, kind in wanted.items() if kind})
        with contextlib.closing(api.stream("/api/create", body)) as events:
            if not show_all(events, view):
                raise Failed("the server stopped before the model was made", "look at its log")


@dataclass(frozen=True, slots=True)
class _Read:
    """A Modelfile. shown: how messages call it. directory: where its paths start from. lines: command and value -> line."""

    recipe: "Recipe"
    shown: str
    directory: Path
    lines: Mapping[tuple[str, str], int]

    def missing(self, command: str, value: str) -> Failed:
        """What to say of a file that an instruction names and that is not there."""
        text = f"{self.at(command, value)}: there is no file {value}"
        return Failed(text, "paths in a Modelfile start from its own directory")

    def at(self, command: str, value: str) -> str:
        """Where an instruction stands, as messages begin."""
        return f"{self.shown} (line {self.lines[command, value]})"


def _read(modelfile: str) -> _Read:
    """What the Modelfile asks for; without any, it is whatever lies here. Raises: Failed with file and line."""
    from corral.wire.modelfile import parse_modelfile, recipe_of

    path = Path(modelfile or "Modelfile")
    shown = "standard input" if modelfile == "-" else str(path)
    try:
        data = sys.stdin.buffer.read() if modelfile == "-" else path.read_bytes()
    except FileNotFoundError as error:
        if modelfile:
            raise Failed("specified Modelfile wasn't found", f"there is no file {modelfile}") from error
        data = b"FROM .\n"
    try:
        instructions = parse_modelfile(data)
        recipe = recipe_of(instructions)
    except CorralError as error:
        between = " " if error.message.startswith("(line ") else ": "
        raise Failed(f"{shown}{between}{error.message}") from error
    lines = {(one.command, one.value): one.line for one in instructions}
    return _Read(recipe, shown, Path() if modelfile == "-" else path.parent, lines)


def _sources(api: LocalApi, read: _Read, view: TransferView) -> dict[str, Any]:
    """`from`, `files`, `adapters` and `draft_files` of the request, with every file at the server."""
    recipe, directory = read.recipe, read.directory
    found = [(value, _expanded(value, directory)) for value in recipe.sources]
    files = [path for _, path in found if os.path.lexists(path)]
    names = [value for value, path in found if not os.path.lexists(path)]
    body: dict[str, Any] = {}
    if names:
        if _is_path(names[-1]):
            raise read.missing("from", names[-1])
        body["from"] = names[-1]
    adapters = [_existing(read, "adapter", value) for value in recipe.adapters[-1:]]
    drafts = [_existing(read, "draft", value) for value in recipe.drafts]
    for value, path in zip(recipe.drafts, drafts, strict=True):
        if path.resolve() in {file.resolve() for file in files}:
            raise Failed(f"{read.at('draft', value)}: DRAFT must not reference the same local path as FROM: {value}")
    for field, paths in (("files", files), ("adapters", adapters), ("draft_files", drafts)):
        if paths:
            body[field] = {file.name: file.digest for file in [_sent(api, file, view) for file in _files_of(paths)]}
    return body


def _expanded(value: str, directory: Path) -> Path:
    return directory / Path(value).expanduser() if value.startswith("~") else directory / value


def _existing(read: _Read, command: str, value: str) -> Path:
    path = _expanded(value, read.directory)
    if not path.exists():
        raise read.missing(command, value)
    return path


def _is_path(value: str) -> bool:
    """Whether somebody meant a file, of which the server would only say that it is no name."""
    return value.startswith((".", "/", "~", "\\")) or value.lower().endswith((".gguf", ".safetensors", ".bin"))


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _files_of(paths: Sequence[Path]) -> list[_File]:
    """The files that paths stand for, a directory for those of its model, under names that tell them apart."""
    chosen: list[tuple[Path, str]] = []
    for path in paths:
        chosen += _model_files(path) if path.is_dir() else [(path, path.name)]
    names = [name for _, name in chosen]
    if len(set(names)) < len(names):
        root = os.path.commonpath([path.resolve().parent for path, _ in chosen])
        chosen = [(path, path.resolve().relative_to(root).as_posix()) for path, _ in chosen]
    return [_File(path, name, _regular_size(path)) for path, name in chosen]


def _model_files(directory: Path) -> list[tuple[Path, str]]:
    """The files of the model in a directory. Raises: Failed when there is none, or a file lies outside of it."""
    weights: list[Path] = []
    for patterns in _MODEL_PATTERNS:
        if weights := [path for pattern in patterns for path in sorted(directory.glob(pattern))]:
            break
    if not weights:
        raise Failed("no Modelfile or safetensors files found", f"looked in {directory}; -f names a Modelfile that is elsewhere")
    if weights[0].suffix in _PICKLES:
        raise Failed(f"{weights[0].name} may hold a program, so it is not read", "save the model as safetensors")
    beside = _BESIDE_SAFETENSORS if weights[0].suffix == ".safetensors" else ()
    files = [*weights, *(path for pattern in beside for path in sorted(directory.glob(pattern)))]
    root = directory.resolve()
    for path in files:
        if not path.resolve().is_relative_to(root):
            advice = (
                "huggingface-cli download --local-dir DIR makes a directory of its own" if ".cache" in str(path.resolve()) else ""
            )
            raise Failed(f"insecure path: {path} leads out of {directory}", advice)
    return [(path, path.relative_to(directory).as_posix()) for path in files]


def _regular_size(path: Path) -> int:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise Failed(f"{path} is not a regular file")
    return found.st_size


def _sent(api: LocalApi, file: _File, view: TransferView) -> _File:
    """The file with its digest, once the server has it."""
    digest = hashlib.sha256()
    for block in _blocks(file, view, "hashing"):
        digest.update(block)
    name = f"sha256:{digest.hexdigest()}"
    if not api.has(f"/api/blobs/{name}"):
        # Closed here: a server that refuses leaves the rest of the file unread.
        with contextlib.closing(_blocks(file, view, "copying")) as blocks:
            api.upload(f"/api/blobs/{name}", blocks, file.size_bytes)
    return _File(file.path, file.name, file.size_bytes, name)


def _blocks(file: _File, view: TransferView, verb: str) -> Generator[bytes, None, None]:
    """The file's bytes, and how many of them have been read to the view."""
    done, status = 0, f"{verb} {file.name}"
    # What identifies a bar is called its digest.
    shown = {"status": status, "digest": status, "total": file.size_bytes}
    with file.path.open("rb", buffering=0) as source:
        while done < file.size_bytes and (block := source.read(min(_BLOCK, file.size_bytes - done))):
            yield block
            done += len(block)
            view.show({**shown, "completed": done})
    if done != file.size_bytes:
        raise Failed(f"{file.path} changed while it was read", "try again when it is complete")


# ── Copying and removing ─────────────────────────────────────────────────────────────────────────────────────────────


@command()
@click.argument("source", shell_complete=installed_models)
@click.argument("destination")
@pass_environment
def cp(environment: Environment, source: str, destination: str) -> None:
    """Copy a model: the same under another name."""
    LocalApi(environment.settings).post("/api/copy", {"source": source, "destination": destination})
    sys.stdout.write(f"copied '{source}' to '{destination}'\n")


@command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", shell_complete=installed_models)
@pass_environment
def rm(environment: Environment, models: tuple[str, ...]) -> None:
    """Remove models. A running one is unloaded first."""
    api = LocalApi(environment.settings)
    for model in models:
        _unload(api, model)
        api.request("DELETE", "/api/delete", {"model": model, "name": model})
        sys.stdout.write(f"deleted '{model}'\n")


def _unload(api: LocalApi, model: str) -> None:
    """End the model's runner, if it has one. Asked first, because unloading a hub's model would be a request to the hub."""
    from corral.wire.names import parse_name, parse_reference

    try:
        name = parse_name(parse_reference(model).base).key.short
        running = [str(row.get("name", "")).lower() for row in api.get("/api/ps").get("models") or []]
        if name in running:
            api.post("/api/generate", {"model": model, "keep_alive": 0, "stream": False})
    except ApiError:
        render.say(f"Warning: unable to stop model '{model}'")
    except CorralError:  # no name; the server says so in its own words
        return
