"""list, ps, show, stop: what the local server has and runs. Tables as Ollama prints them (ollama-surface 5.2, 5.3)."""

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from corral.cli import render
from corral.cli.api import ApiError, LocalApi
from corral.cli.command import command, installed_models, running_models
from corral.cli.context import Environment, Failed, json_option, pass_environment

_PARTS = ("license", "modelfile", "parameters", "system", "template")
#: How wide an array may be that is shown whole, its brackets and commas counted as Ollama counts them.
_ARRAY_WIDTH = 10
_LINE_WIDTH = 100


@command("list")
@click.argument("prefix", default="", shell_complete=installed_models)
@json_option
@pass_environment
def list_models(environment: Environment, prefix: str, as_json: bool) -> None:
    """List installed models, newest first. PREFIX: only names that begin with it."""
    api = LocalApi(environment.settings)
    sys.stdout.write(render.as_json(_listed(api, prefix)) if as_json else list_text(api, prefix))


def list_text(api: LocalApi, prefix: str = "") -> str:
    """The table of installed models whose names begin so. Raises: Failed."""
    now = datetime.now(UTC)
    return render.table(("NAME", "ID", "SIZE", "MODIFIED"), [_list_row(model, now) for model in _listed(api, prefix)])


def _listed(api: LocalApi, prefix: str) -> list[Mapping[str, Any]]:
    models = api.get("/api/tags").get("models") or []
    return [model for model in models if model["name"].lower().startswith(prefix.lower())]


def _list_row(model: Mapping[str, Any], now: datetime) -> tuple[str, str, str, str]:
    size = "-" if model.get("remote_model") else render.size(model["size"])
    return model["name"], model["digest"][:12], size, render.relative_time(render.parse_time(model["modified_at"]), now)


@command()
@click.argument("prefix", default="", shell_complete=running_models)
@json_option
@pass_environment
def ps(environment: Environment, prefix: str, as_json: bool) -> None:
    """List running models. PREFIX: only names that begin with it."""
    models = LocalApi(environment.settings).get("/api/ps").get("models") or []
    models = [model for model in models if model["name"].startswith(prefix)]
    if as_json:
        sys.stdout.write(render.as_json(models))
        return
    headings = ("NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL")
    now = datetime.now(UTC)
    sys.stdout.write(render.table(headings, [_ps_row(model, now) for model in models]))


def _ps_row(model: Mapping[str, Any], now: datetime) -> tuple[str, ...]:
    expires = render.parse_time(model.get("expires_at", ""))
    until = "Stopping..." if expires and expires < now else render.relative_time(expires, now)
    processor = processor_text(model.get("size", 0), model.get("size_vram", 0))
    context = str(model.get("context_length") or 0)
    return model["name"], model["digest"][:12], render.size(model.get("size", 0)), processor, context, until


def processor_text(size_bytes: int, vram_bytes: int) -> str:
    """Where a model's memory is: `100% CPU`, `100% GPU` or `25%/75% CPU/GPU`."""
    if vram_bytes == 0:
        return "100% CPU"
    if vram_bytes == size_bytes:
        return "100% GPU"
    if vram_bytes > size_bytes or size_bytes == 0:
        return "Unknown"
    on_cpu = round((size_bytes - vram_bytes) / size_bytes * 100)
    return f"{on_cpu}%/{100 - on_cpu}% CPU/GPU"


@command()
@click.argument("model", shell_complete=running_models)
@pass_environment
def stop(environment: Environment, model: str) -> None:
    """Unload a running model; requests in flight are finished."""
    try:
        LocalApi(environment.settings).post("/api/generate", {"model": model, "keep_alive": 0, "stream": False})
    except ApiError as error:
        if error.code == 404:
            raise Failed(f'couldn\'t find model "{model}" to stop', "corral ps lists the running ones") from error
        raise


@command()
@click.argument("model", shell_complete=installed_models)
@click.option("--license", "parts", flag_value="license", multiple=True, help="Print the licence only.")
@click.option("--modelfile", "parts", flag_value="modelfile", multiple=True, help="Print the Modelfile only.")
@click.option("--parameters", "parts", flag_value="parameters", multiple=True, help="Print the parameters only.")
@click.option("--system", "parts", flag_value="system", multiple=True, help="Print the system message only.")
@click.option("--template", "parts", flag_value="template", multiple=True, help="Print the template only.")
@click.option("-v", "--verbose", is_flag=True, help="Also print metadata and tensors.")
@json_option
@pass_environment
def show(environment: Environment, model: str, parts: tuple[str, ...], verbose: bool, as_json: bool) -> None:
    """Show a model's details."""
    if len(set(parts)) > 1:
        allowed = ", ".join(f"'--{part}'" for part in _PARTS[:-1])
        raise Failed(f"only one of {allowed}, or '--{_PARTS[-1]}' can be specified", status=2)
    details = LocalApi(environment.settings).post("/api/show", {"model": model, "verbose": verbose})
    if as_json:
        sys.stdout.write(render.as_json(details))
    elif "image" in (details.get("capabilities") or []):
        raise Failed("image generation models are not currently supported")
    elif parts:
        sys.stdout.write(_part_text(parts[0], details.get(parts[0]) or ""))
    else:
        sys.stdout.write(show_text(details, verbose=verbose))


def _part_text(part: str, text: str) -> str:
    """One part as Ollama prints it: a system message and a template to the byte, so that a file made of them is what they are,
    the others with a line's end. On a terminal every text ends its line, or the prompt would stand behind it, and holds no
    commands for the terminal."""
    text = render.plain_text(text) if sys.stdout.isatty() else text
    is_exact = part in ("system", "template") and not (sys.stdout.isatty() and text and not text.endswith("\n"))
    return text if is_exact else f"{text}\n"


def show_text(details: Mapping[str, Any], *, verbose: bool) -> str:
    """The sections of `show`; a section without rows is left out."""
    info = details.get("model_info") or {}
    sections: list[tuple[str, Sequence[Sequence[str]]]] = [
        ("Model", _model_rows(details, info)),
        ("Capabilities", [(capability,) for capability in details.get("capabilities") or []]),
        ("Projector", _projector_rows(details.get("projector_info") or {})),
        ("Parameters", _parameter_rows(details.get("parameters") or "")),
    ]
    if verbose:
        sections.append(("Metadata", [(name, _abbreviated(info[name])) for name in sorted(info)]))
        tensors = details.get("tensors") or []
        sections.append(("Tensors", [(row["name"], row["type"], _go_text(row["shape"])) for row in tensors]))
    sections.append(("System", _first_lines(details.get("system") or "")))
    sections.append(("License", _first_lines(details.get("license") or "")))
    return "".join(_section(title, rows) for title, rows in sections if rows)


def _section(title: str, rows: Sequence[Sequence[str]]) -> str:
    # Ollama breaks lines that are longer; here they are whole, and not padded, which would break them on the terminal.
    is_long = any(len(row[-1]) > _LINE_WIDTH for row in rows)
    lines = [line.rstrip() if is_long else line for line in render.columns(rows)]
    return f"  {title}\n" + "".join(f"    {line}\n" for line in lines) + "\n"


def _model_rows(details: Mapping[str, Any], info: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = details.get("details") or {}
    family = info.get("general.architecture", "")
    count = info.get("general.parameter_count")
    rows = [
        ("Remote model", details.get("remote_model", "")),
        ("Remote URL", details.get("remote_host", "")),
        ("architecture", family or facts.get("family", "")),
        ("parameters", facts.get("parameter_size") or (render.number(int(count)) if count else "")),
        ("context length", info.get(f"{family}.context_length", facts.get("context_length") or "")),
        ("embedding length", info.get(f"{family}.embedding_length", facts.get("embedding_length") or "")),
        ("quantization", facts.get("quantization_level", "")),
        ("requires", details.get("requires", "")),
    ]
    return [(name, _go_text(value)) for name, value in rows if value not in ("", None)]


def _projector_rows(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    family = info.get("general.architecture", "")
    count = info.get("general.parameter_count")
    rows = [
        ("architecture", family),
        ("parameters", render.number(int(count)) if count else ""),
        ("embedding length", _of_modality(info, family, "embedding_length")),
        ("dimensions", _of_modality(info, family, "projection_dim")),
    ]
    return [(name, _go_text(value)) for name, value in rows if value not in ("", None)]


def _of_modality(info: Mapping[str, Any], family: str, suffix: str) -> Any:
    values = (info.get(f"{family}.{modality}.{suffix}") for modality in ("vision", "audio"))
    return next((value for value in values if value is not None), "")


def _parameter_rows(text: str) -> list[tuple[str, str]]:
    rows = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(row[0], row[1] if len(row) > 1 else "") for row in rows]


def _first_lines(text: str) -> list[tuple[str]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(line,) for line in lines[:2]] + ([("...",)] if len(lines) > 2 else [])


def _abbreviated(value: Any) -> str:
    """A value of the metadata; of an array as many items as a narrow column has room for."""
    if not isinstance(value, list):
        return _go_text(value)
    width, count = 1, 0
    for item in value:
        # As many as fit, and the first in any case.
        width += len(_go_text(item)) + (2 if count else 0)
        if width > _ARRAY_WIDTH and count:
            break
        count += 1
    shown = " ".join(_go_text(item) for item in value[:count])
    return f"[{shown} ...+{len(value) - count} more]" if count < len(value) else f"[{shown}]"


def _go_text(value: Any) -> str:
    """A JSON value as Go prints it: `true`, `<nil>`, `[1 2]`, and a number without a needless `.0`."""
    match value:
        case None:
            return "<nil>"
        case bool():
            return str(value).lower()
        case float() if value.is_integer():
            return str(int(value))
        case list():
            return f"[{' '.join(_go_text(item) for item in value)}]"
    return " ".join(str(value).split())
