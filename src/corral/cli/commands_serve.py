"""up, serve, hub serve: commands that stay in the foreground until they are told to end."""

import asyncio
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import click

from corral.cli import render
from corral.cli.command import command
from corral.cli.context import Environment, Failed, pass_environment, wait_for
from corral.cli.starting import (
    hub_lines,
    hub_port_advice,
    local_lines,
    local_port_advice,
    parse_model_option,
    parse_parameter_options,
    taken_text,
)

if TYPE_CHECKING:
    from corral.settings import Address, Settings

_SUPERVISED = click.option("--supervised", is_flag=True, hidden=True, help="Report to `corral up` and end when it is gone.")
_SERVE_VARIABLES = (
    *("OLLAMA_HOST", "OLLAMA_MODELS", "OLLAMA_CONTEXT_LENGTH", "OLLAMA_KEEP_ALIVE", "OLLAMA_LOAD_TIMEOUT"),
    *("OLLAMA_NUM_PARALLEL", "OLLAMA_MAX_LOADED_MODELS", "OLLAMA_MAX_QUEUE", "OLLAMA_ORIGINS", "OLLAMA_NO_CLOUD"),
    *("OLLAMA_NOPRUNE", "OLLAMA_DEBUG", "CORRAL_HUB", "CORRAL_LOCAL_AUTH", "CORRAL_LLAMA_SERVER"),
)
_HUB_VARIABLES = (
    *("CORRAL_HUB_LISTEN", "CORRAL_PUBLIC_URL", "CORRAL_HOME", "CORRAL_DATABASE_URL", "CORRAL_SIGNUP", "CORRAL_QUOTA"),
    *("CORRAL_MAX_REPOSITORIES", "CORRAL_SCRUB_DAYS"),
    *("CORRAL_MIRROR", "CORRAL_TRUSTED_PROXIES", "CORRAL_LLAMA_SERVER", "OLLAMA_DEBUG"),
)
_PR_SET_PDEATHSIG = 1
#: What runs a server: (settings, called once the port answers, set to end it).
Serve = Callable[["Settings", Callable[[dict[str, Any]], None], asyncio.Event], Coroutine[Any, Any, None]]


@command(variables=_SERVE_VARIABLES)
@_SUPERVISED
@pass_environment
def serve(environment: Environment, supervised: bool) -> None:
    """Run the local server: models of this machine, and hosted ones if signed in."""
    from corral.main.local import run_local

    settings = environment.settings
    _run(settings, run_local, local_lines, supervised=supervised, address=settings.local, advice=local_port_advice(settings))


@command("serve", variables=_HUB_VARIABLES)
@click.option("--workers", type=click.IntRange(min=1), default=1, hidden=True)
@_SUPERVISED
@pass_environment
def hub_serve(environment: Environment, workers: int, supervised: bool) -> None:
    """Run the hub: accounts, API keys, devices and hosted models."""
    from corral.main.hub import run_hub

    if workers > 1:
        # Sightings of unknown devices and sign-in throttles are kept in memory; workers that do not share them break both.
        raise Failed("this release runs the hub in one worker", "leave --workers out", status=2)
    settings = environment.settings
    _run(settings, run_hub, hub_lines, supervised=supervised, address=settings.hub_listen, advice=hub_port_advice(settings))


@command(variables=("OLLAMA_HOST", "OLLAMA_MODELS", "CORRAL_HUB_LISTEN", "CORRAL_HOME", "CORRAL_PUBLIC_URL"))
@click.option("--model", "models", multiple=True, metavar="NAME=FILE", help="Install a GGUF file and offer it on the hub.")
@click.option(
    "--parameter", "parameters", multiple=True, metavar='"NAME VALUE"', help="A PARAMETER of such a model when it is new."
)
@pass_environment
def up(environment: Environment, models: tuple[str, ...], parameters: tuple[str, ...]) -> int:
    """Run the hub and the local server together until Ctrl-C.

    On the first run this prints a link that creates the admin account.
    """
    from corral.cli.up import Supervisor

    named = [parse_model_option(text) for text in models]
    parse_parameter_options(parameters)
    return wait_for(Supervisor(environment).run(named, parameters))


def _run(
    settings: "Settings",
    run: Serve,
    lines: Callable[[dict[str, Any]], str],
    *,
    supervised: bool,
    address: "Address",
    advice: str,
) -> None:
    """Run one server. address: where it listens; advice: what to do when that is taken."""
    from corral.main.shared import set_up_process
    from corral.wire.errors import CorralError

    set_up_process(settings)
    for warning in settings.warnings:
        render.say(f"Warning: {warning}")

    def announce(facts: dict[str, Any]) -> None:
        print(json.dumps(facts) if supervised else lines(facts), flush=True)

    async def work() -> None:
        stop = asyncio.Event()
        if supervised:
            _end_with_parent(stop)
        await run(settings, announce, stop)

    try:
        wait_for(work())
    except CorralError as error:
        if error.code != "conflict":
            raise
        raise Failed(taken_text(address), advice) from error


def _end_with_parent(stop: asyncio.Event) -> None:
    """Set `stop` when standard input ends: it is a pipe that `corral up` holds open for as long as it lives, however it dies."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            stop.set()

    loop.add_reader(0, read)
    if sys.platform == "linux":
        # A process that is stopped (SIGSTOP, a debugger) would not read the end, and outlive its parent until somebody wakes it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0)
