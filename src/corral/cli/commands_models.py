"""list, ps, show, stop: what the local server has and runs. Tables as Ollama prints them (ollama-surface 5.2, 5.3)."""

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from corral.cli import render
from corral.cli.api import ApiError, LocalApi
from corral.cli.context import Environment, Failed, json_option, pass_environment

_PARTS = ("license", "modelfile", "parameters", "system", "template")
_ARRAY_SHOWN = 3


@click.command("list")
@click.argument("prefix", default="")
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


@click.command()
@click.argument("prefix", default="")
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


@click.command()
@click.argument("model")
@pass_environment
def stop(environment: Environment, model: str) -> None:
    """Unload a running model; requests in flight are finished."""
    try:
        LocalApi(environment.settings).post("/api/generate", {"model": model, "keep_alive": 0, "stream": False})
    except ApiError as error:
        if error.code == 404:
            raise Failed(f'couldn\'t find model "{model}" to stop', "corral ps lists the running ones") from error
        raise


@click.command()
@click.argument("model")
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
    elif parts:
        text = details.get(parts[0]) or ""
        sys.stdout.write(text if text.endswith("\n") or not text else f"{text}\n")
    else:
        sys.stdout.write(show_text(details, verbose=verbose))


def show_text(details: Mapping[str, Any], *, verbose: bool) -> str:
    """The sections of `show`; a section without rows is left out."""
    info = details.get("model_info") or {}
    sections = [
        ("Model", _model_rows(details, info)),
        ("Capabilities", [(capability, "") for capability in details.get("capabilities") or []]),
        ("Projector", _projector_rows(details.get("projector_info") or {})),
        ("Parameters", _parameter_rows(details.get("parameters") or "")),
    ]
    if verbose:
        sections.append(("Metadata", [(name, _abbreviated(info[name])) for name in sorted(info)]))
        tensors = details.get("tensors") or []
        sections.append(("Tensors", [(row["name"], f"{row['type']}  {row['shape']}") for row in tensors]))
    sections.append(("System", _first_lines(details.get("system") or "")))
    sections.append(("License", _first_lines(details.get("license") or "")))
    return "".join(_section(title, rows) for title, rows in sections if rows)


def _section(title: str, rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    lines = [f"    {render.plain(name).ljust(width)}    {render.plain(value)}".rstrip() for name, value in rows]
    return "\n".join([f"  {title}", *lines]) + "\n\n"


def _model_rows(details: Mapping[str, Any], info: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = details.get("details") or {}
    family = info.get("general.architecture", "")
    count = info.get("general.parameter_count")
    rows = [
        ("Remote model", details.get("remote_model", "")),
        ("Remote URL", details.get("remote_host", "")),
        ("architecture", family or facts.get("family", "")),
        ("parameters", render.number(int(count)) if count else facts.get("parameter_size", "")),
        ("context length", info.get(f"{family}.context_length", facts.get("context_length") or "")),
        ("embedding length", info.get(f"{family}.embedding_length", facts.get("embedding_length") or "")),
        ("quantization", facts.get("quantization_level", "")),
        ("requires", details.get("requires", "")),
    ]
    return [(name, _whole(value)) for name, value in rows if value not in ("", None)]


def _projector_rows(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    family = info.get("general.architecture", "")
    count = info.get("general.parameter_count")
    rows = [
        ("architecture", family),
        ("parameters", render.number(int(count)) if count else ""),
        ("embedding length", info.get(f"{family}.vision.embedding_length", "")),
        ("dimensions", info.get(f"{family}.vision.projection_dim", "")),
    ]
    return [(name, _whole(value)) for name, value in rows if value not in ("", None)]


def _parameter_rows(text: str) -> list[tuple[str, str]]:
    rows = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(row[0], row[1] if len(row) > 1 else "") for row in rows]


def _first_lines(text: str) -> list[tuple[str, str]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(line, "") for line in lines[:2]] + ([("...", "")] if len(lines) > 2 else [])


def _abbreviated(value: Any) -> str:
    if not isinstance(value, list):
        return _whole(value)
    shown = " ".join(_whole(item) for item in value[:_ARRAY_SHOWN])
    return f"[{shown} ...+{len(value) - _ARRAY_SHOWN} more]" if len(value) > _ARRAY_SHOWN else f"[{shown}]"


def _whole(value: Any) -> str:
    """A JSON number without a needless `.0`; anything else as text."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
