"""signin, signout, whoami: who this device is to a hub.

Signing in is a challenge that a person answers in a browser: the device signs `POST /api/me`; a hub that does not know its key
answers 401 with a link; the person opens it, compares the fingerprint and presses Connect; the same signed request is then
answered with the account. Requests go to the hub directly, so this works with and without a running local server.
"""

import asyncio
import sys
import threading
import time
import webbrowser
from collections.abc import Mapping
from typing import Any

import click

from corral.cli import render
from corral.cli.command import HUB_VARIABLES, command
from corral.cli.context import Environment, Failed, hub_option, json_option, pass_environment, pasted_secret, wait_for
from corral.cli.hub_access import HubAccess, host_of, hub_access, hub_of_local_server, not_signed_in

_WAIT_S = 15 * 60
#: Whoever is signed in in the browser presses Connect within seconds; whoever still has to sign up takes minutes.
_POLL_S = (1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 3.0, 4.0, 5.0)


@command(variables=HUB_VARIABLES)
@hub_option
@click.option("--api-key-stdin", is_flag=True, help="Connect without a browser, by an API key with the scope `keys`.")
@click.option("--no-browser", is_flag=True, help="Print the link only.")
@pass_environment
def signin(environment: Environment, hub_url: str, api_key_stdin: bool, no_browser: bool) -> None:
    """Connect this device to a hub, so that hosted models run as you.

    Opens the hub's page in a browser and waits until you press Connect there.
    """
    try:
        wait_for(_sign_in(environment, hub_url, api_key_stdin=api_key_stdin, no_browser=no_browser))
    except KeyboardInterrupt:
        render.say("\nStopped waiting; this device is not connected. → corral signin starts again")
        raise


async def _sign_in(environment: Environment, hub_url: str, *, api_key_stdin: bool, no_browser: bool) -> None:
    async with hub_access(environment, hub_url) as access:
        await _agree_on_signature(access)
        if api_key_stdin:
            account = await _connect_by_key(access)
        else:
            status, answer = await access.signed("POST", "/api/me")
            if status == 200:
                access.memory.choose_hub(access.hub)
                print(f"Already signed in to {host_of(access.hub)} as {render.plain(answer['name'])}.")
                # Whoever signs in once more is still refused somewhere, and nothing here will change that.
                render.say("→ corral doctor auth says why, if something is refused all the same")
                return
            link = await _link_of(access, status, answer)
            _show_link(environment, access, link, no_browser=no_browser)
            account = await _wait_until_connected(access)
        access.memory.choose_hub(access.hub)
        print(f"{render.done('Signed in')} to {host_of(access.hub)} as {render.plain(account['name'])}.")
        _mention_other_hub(environment, access)


async def _agree_on_signature(access: HubAccess) -> None:
    """Ask the hub anew which signature it takes: signing in is where a person vouches for a hub."""
    before, now = await access.client.renegotiate()
    if before is not None and before.signature != "stock" and now.signature == "stock":
        render.say(f"Note: {host_of(access.hub)} no longer takes the stronger signature; using the one of stock clients.")


async def _link_of(access: HubAccess, status: int, answer: Any) -> str:
    """The link a person has to open. The hub's own is taken only when it leads to the hub. Raises: Failed."""
    from corral.wire.discovery import origin_of
    from corral.wire.signing import connect_url

    if status != 401:
        text = answer.get("error") if isinstance(answer, dict) else None
        raise Failed(f"{host_of(access.hub)} answered {status}: {text or 'it gave no reason'}", "is that address a hub's?")
    base = await access.client.signin_base()
    offered = answer.get("signin_url") if isinstance(answer, dict) else None
    if isinstance(offered, str) and len(offered) <= 2048 and origin_of(offered) == origin_of(base):
        return offered
    from corral.main.shared import device_name

    return connect_url(base, device_name(), access.client.device_key())


def _show_link(environment: Environment, access: HubAccess, link: str, *, no_browser: bool) -> None:
    from corral.main.shared import device_name

    is_opening = not no_browser and _has_browser(environment.environ)
    render.say(f"Opening {link}" if is_opening else f"Open this link in a browser:\n  {link}")
    sys.stderr.write(
        render.facts([("device", device_name()), ("fingerprint", access.client.device_key().fingerprint)], indent="  ")
    )
    waiting = render.needs_you("Waiting for you to press Connect in the browser", out=sys.stderr)
    render.say(f"{waiting} (Ctrl-C to stop waiting)…")
    if is_opening:
        # Some browsers stay in the foreground of whoever starts them; a thread that is not waited for may be held up.
        threading.Thread(target=_open, args=(link,), daemon=True).start()


def _open(link: str) -> None:
    if not webbrowser.open(link):
        render.say("The browser did not open; open the link above yourself.")


def _has_browser(environ: Mapping[str, str]) -> bool:
    """Whether a browser would open in a window of its own. A text browser in this terminal would only be in the way."""
    if sys.platform in ("darwin", "win32"):
        return True
    return any(environ.get(name) for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"))


async def _wait_until_connected(access: HubAccess) -> dict[str, Any]:
    """Ask who we are until the hub knows. Raises: Failed when nobody pressed Connect in time."""
    from corral.wire.errors import CorralError

    deadline = time.monotonic() + _WAIT_S
    is_away, attempt = False, 0
    while time.monotonic() < deadline:
        await asyncio.sleep(_POLL_S[min(attempt, len(_POLL_S) - 1)])
        attempt += 1
        try:
            status, answer = await access.signed("POST", "/api/me")
        except CorralError as error:
            if error.code != "upstream_failed":
                raise
            if not is_away:
                render.say(f"{host_of(access.hub)} does not answer at the moment; still waiting.")
            is_away = True
            continue
        is_away = False
        if status == 200:
            return dict(answer)
        if status not in (401, 429) and status < 500:
            text = answer.get("error") if isinstance(answer, dict) else None
            raise Failed(f"{host_of(access.hub)} answered {status}: {text or 'it gave no reason'}")
    raise Failed("nobody pressed Connect within 15 minutes", "corral signin")


async def _connect_by_key(access: HubAccess) -> dict[str, Any]:
    """Connect this device with an API key instead of a browser. Raises: Failed."""
    from corral.main.shared import device_name
    from corral.wire.apikeys import parse_api_key
    from corral.wire.errors import CorralError
    from corral.wire.pasted import fault_of_api_key

    pasted = pasted_secret("signin --api-key-stdin")
    # Password stores keep notes on the lines behind it.
    key = parse_api_key(pasted.splitlines()[0].strip())
    if key is None:
        advice = f"pipe in all of it, alone and without quotes; a new one is made on {access.hub}/settings/keys"
        raise Failed(f"what came on standard input {fault_of_api_key(pasted)}", advice)
    body = {"name": device_name(), **await access.client.enrollment(key.public_id)}
    api = access.by_key(key.text)
    try:
        api.post("/api/user/keys", body)
    except Failed as error:
        code = getattr(error, "code", 0)
        if code == 401:
            message = f"{host_of(access.hub)} does not accept this API key"
            raise Failed(message, f"create one with the scope keys on {access.hub}/settings/keys") from error
        if code == 403:
            raise Failed(error.message, f"create one with the scope keys on {access.hub}/settings/keys") from error
        if code != 409:  # connected already: say as whom
            raise
    status, answer = await access.signed("POST", "/api/me")
    if status != 200:
        raise CorralError(
            "unauthorized", f"{host_of(access.hub)} took the key but does not know this device ({status}) → corral doctor auth"
        )
    return dict(answer)


def _mention_other_hub(environment: Environment, access: HubAccess) -> None:
    """The local server relays to its own hub; when that is another one, say so."""
    other = hub_of_local_server(environment.settings)
    if other and host_of(other) != host_of(access.hub):
        render.say(f"Note: the running local server uses the hub {other}.\n→ restart it with CORRAL_HUB={access.hub}")


@command(variables=HUB_VARIABLES)
@hub_option
@pass_environment
def signout(environment: Environment, hub_url: str) -> None:
    """Disconnect this device. Its key stays on this machine; signing in connects it again."""
    wait_for(_sign_out(environment, hub_url))


async def _sign_out(environment: Environment, hub_url: str) -> None:
    async with hub_access(environment, hub_url) as access:
        path = f"/api/user/keys/{access.client.device_key().encoded}"
        status, answer = await access.signed("DELETE", path)
        if status == 401:
            print(f"Not signed in to {host_of(access.hub)}.")
        elif status == 200:
            print(f"{render.done('Signed out')} of {host_of(access.hub)}.")
        else:
            text = answer.get("error") if isinstance(answer, dict) else None
            raise Failed(f"there was an error signing out: {text or f'{host_of(access.hub)} answered {status}'}")


@command(variables=HUB_VARIABLES)
@hub_option
@json_option
@pass_environment
def whoami(environment: Environment, hub_url: str, as_json: bool) -> None:
    """Show which account this device acts as, or where it is not connected, the API key in OLLAMA_API_KEY."""
    wait_for(_who_am_i(environment, hub_url, as_json=as_json))


async def _who_am_i(environment: Environment, hub_url: str, *, as_json: bool) -> None:
    async with hub_access(environment, hub_url) as access:
        status, answer = await access.signed("POST", "/api/me")
        is_by_key = status == 401 and access.has_key
        if is_by_key:
            status, answer = 200, access.by_own_key("POST", "/api/me")
        if status == 401:
            raise not_signed_in(access.hub)
        if status != 200 or not isinstance(answer, dict):
            raise Failed(f"{host_of(access.hub)} answered {status}")
        if as_json:
            sys.stdout.write(render.as_json([answer]))
            return
        email = f" ({answer['email']})" if answer.get("email") else ""
        rows = [("account", f"{answer.get('name', '')}{email}"), ("hub", access.hub)]
        if device := answer.get("device"):
            rows.append(("device", device["name"]))
        if is_by_key:
            rows.append(("signed in", "by API key (OLLAMA_API_KEY)"))
        else:
            rows.append(("fingerprint", access.client.device_key().fingerprint))
        sys.stdout.write(render.facts(rows))
