"""What starting servers takes and says: the lines they print once they answer, what to do about a taken port, `NAME=FILE`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.cli import render
from corral.cli.context import Failed

if TYPE_CHECKING:
    from corral.settings import Address, Settings


def parse_model_option(text: str) -> tuple[str, Path]:
    """`NAME=FILE`. Raises: Failed when the form is another or there is no such file."""
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise Failed(f"--model takes NAME=FILE, not {text!r}", "such as --model smollm2:135m=SmolLM2-135M.gguf", status=2)
    path = Path(file)
    if not path.is_file():
        raise Failed(f"there is no file {file}")
    return name, path


def parse_parameter_options(texts: Sequence[str]) -> dict[str, object]:
    """`NAME VALUE` of each, as behind a Modelfile's PARAMETER. Raises: Failed."""
    from corral.wire.errors import CorralError
    from corral.wire.modelfile import parse_parameter

    parameters: dict[str, object] = {}
    for text in texts:
        name, _, value = text.strip().partition(" ")
        try:
            parameters[name] = parse_parameter(name, value.strip())
        except CorralError as error:
            raise Failed(f"--parameter {text!r}: {error.message}", 'such as --parameter "num_predict 1024"', status=2) from error
    return parameters


def taken_text(address: "Address") -> str:
    """What is wrong when something else listens there already, in the words of Ollama's server."""
    return f"listen tcp {address.bind}: bind: address already in use"


def hub_port_advice(settings: "Settings") -> str:
    """What to do when the hub's port is taken."""
    return f"is a hub running already? Stop it, or set CORRAL_HUB_LISTEN to another port than {settings.hub_listen.port}"


def local_port_advice(settings: "Settings") -> str:
    """What to do when the local server's port is taken."""
    return f"is ollama or corral running already? Stop it, or set OLLAMA_HOST to another port than {settings.local.port}"


def hub_lines(facts: dict[str, Any]) -> str:
    """What `hub serve` prints: where the hub is, what it offers, and the link for the first account."""
    lines = [_line("hub", facts["url"], f"data in {facts['data']}"), *hosted_lines(facts), *first_run_lines(facts)]
    return "\n".join(lines)


def local_lines(facts: dict[str, Any]) -> str:
    """What `serve` prints: where the server is, and the hub it uses."""
    return "\n".join([*_place_lines(facts), _line("cloud", facts["cloud"], ""), *key_lines(facts)])


def _place_lines(facts: dict[str, Any]) -> list[str]:
    """Where the local server is: from here and, if it listens there, from other machines."""
    lines = [_line("local", facts["url"], f"models in {facts['models']}")]
    return lines + ([_line("", facts["url_elsewhere"], "from other machines")] if facts["url_elsewhere"] else [])


def key_lines(facts: dict[str, Any]) -> list[str]:
    """Whom a secured local server asks for a key, and how many there are."""
    asked = {"remote": "asked of all but this machine", "on": "asked of everybody"}.get(facts["asks"])
    return [] if asked is None else [_line("keys", f"{facts['keys']} in {facts['keys_file']}", asked)]


def up_lines(hub: dict[str, Any], local: dict[str, Any]) -> str:
    """What `up` prints once both answer."""
    lines = [_line("hub", hub["url"], f"data in {hub['data']}"), *_place_lines(local)]
    if local["cloud"] != hub["url"]:
        lines.append(_line("cloud", local["cloud"], "because CORRAL_HUB says so"))
    lines += key_lines(local)
    return "\n".join([*lines, *hosted_lines(hub), *first_run_lines(hub)])


def hosted_lines(facts: dict[str, Any]) -> list[str]:
    """One line per hosted model, at most five."""
    hosted: list[tuple[str, str]] = facts["hosted"]
    lines = [_line("hosted", name, f"as {cloud}") for name, cloud in hosted[:5]]
    return lines + ([f"        and {len(hosted) - 5} more"] if len(hosted) > 5 else [])


def first_run_lines(facts: dict[str, Any]) -> list[str]:
    """The one-time link, as long as there is no account."""
    if not facts["signup_url"]:
        return []
    title = render.needs_you("First run.")
    return ["", f"{title} Create the admin account (link works once, for 30 minutes):", f"  {facts['signup_url']}"]


def _line(word: str, what: str, more: str) -> str:
    return f"{word:<8}{what:<28}{more}".rstrip() if len(what) < 28 else f"{word:<8}{what}  {more}".rstrip()
