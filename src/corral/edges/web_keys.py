"""The page of devices and API keys, and the small pages behind it: create, rotate, rename, change, revoke.

What gives authority away (a new key, a rotated one, a device that may do more) asks for the password when it was typed more than
five minutes ago. What takes authority back never does: revoking must be quick for somebody who has just lost a laptop.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from starlette.requests import Request
from starlette.responses import Response

from corral.core.ports import Clock, UsageStore
from corral.core.records import Account, ApiKey, Device, Principal, Scope
from corral.edges.asgi import Dialect, Endpoint, caller_of, endpoint, facts_of
from corral.edges.forms import (
    MAX_FORM_BYTES,
    MEMBER,
    Form,
    Stepped,
    StepUp,
    Unproven,
    query_of,
    redirect,
    session_form,
    session_of,
)
from corral.edges.pages import Draft, Pages, scope_choices
from corral.edges.web_models import Shelf
from corral.hub.credentials import Credentials
from corral.wire.errors import CorralError
from corral.wire.secrets import Secret
from corral.wire.text import shown_name

#: value of the form -> (words, days or None for no expiry). The first is what the form begins with (security.md 3).
_EXPIRIES: dict[str, tuple[str, int | None]] = {
    "90": ("in 90 days", 90),
    "7": ("in 7 days", 7),
    "30": ("in 30 days", 30),
    "365": ("in a year", 365),
    "never": ("no expiry", None),
}
_OVERLAPS: dict[str, tuple[str, int]] = {
    "0": ("at once, because it leaked", 0),
    "1h": ("in an hour", 3600),
    "24h": ("in a day", 86_400),
    "7d": ("in a week", 604_800),
}
_NOTICES = {
    "key": "The key is revoked. It is refused from now on.",
    "device": "The device is revoked. It is refused from now on.",
    "renamed": "The device has its new name.",
    "scopes": "The device may do that from its next request on, and nothing else.",
}
_SHOWN_REVOKED = timedelta(days=30)
_TICKED = frozenset({Scope.INFERENCE})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Desk:
    """What the page lists about one account."""

    devices: list[Device]
    keys: list[ApiKey]
    revoked: list[ApiKey]

    def live_keys(self, now: datetime) -> list[ApiKey]:
        """The keys that have not expired either."""
        return [key for key in self.keys if key.expires_at is None or key.expires_at > now]

    @property
    def shared_names(self) -> set[str]:
        """Names that several keys have, as after a rotation; the page tells such keys apart by their age."""
        return {name for name, count in Counter(key.name for key in self.keys).items() if count > 1}


class KeyPages:
    """Handlers of /settings/keys and /settings/devices."""

    def __init__(
        self, *, pages: Pages, credentials: Credentials, usage: UsageStore, shelf: Shelf, step_up: StepUp, clock: Clock
    ) -> None:
        self._pages = pages
        self._credentials = credentials
        self._usage = usage
        self._shelf = shelf
        self._step_up = step_up
        self._clock = clock

    def endpoints(self) -> list[Endpoint]:
        """A GET shows what its POST would do."""
        rows = [
            ("/settings/keys", self.show, self.create),
            ("/settings/keys/{key_id}/rotate", self.show_rotate, self.rotate),
            ("/settings/keys/{key_id}/revoke", self.show_revoke_key, self.revoke_key),
            ("/settings/devices/{device_id}/rename", self.show_rename, self.rename),
            ("/settings/devices/{device_id}/scopes", self.show_scopes, self.change_scopes),
            ("/settings/devices/{device_id}/revoke", self.show_revoke_device, self.revoke_device),
        ]
        html, limit = Dialect.HTML, MAX_FORM_BYTES
        gets = [endpoint("GET,HEAD", path, show, MEMBER, dialect=html) for path, show, _ in rows]
        return gets + [endpoint("POST", path, act, MEMBER, dialect=html, max_body_bytes=limit) for path, _, act in rows]

    # ── The lists ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def show(self, request: Request) -> Response:
        """Everything that can act as the visitor."""
        notice = _NOTICES.get(query_of(request).text("done"), "")
        return await self._page(caller_of(request), Draft({"expires": "90"}), _TICKED, notice=notice)

    async def _page(
        self, caller: Principal, draft: Draft, ticked: frozenset[Scope], *, notice: str = "", status: int = 200
    ) -> Response:
        desk = await self._desk_of(caller.account)
        return self._pages.render(
            "keys.html",
            caller=caller,
            status=status,
            draft=draft,
            notice=notice,
            devices=desk.devices,
            keys=desk.keys,
            revoked=desk.revoked,
            shared_names=desk.shared_names,
            tokens=await self._tokens_of(caller.account),
            choices=scope_choices(ticked),
            expiries=[(value, words) for value, (words, _) in _EXPIRIES.items()],
            needs_password=self._step_up.is_needed(session_of(caller)),
        )

    async def _desk_of(self, account: Account) -> _Desk:
        devices = await self._credentials.devices_of(account)
        keys = await self._credentials.keys_of(account)
        since = self._clock.now() - _SHOWN_REVOKED
        return _Desk(
            devices=[device for device in devices if device.revoked_at is None],
            keys=[key for key in keys if key.revoked_at is None],
            revoked=[key for key in keys if key.revoked_at is not None and key.revoked_at > since],
        )

    async def _tokens_of(self, account: Account) -> dict[str, int]:
        tokens: dict[str, int] = {}
        totals = await self._usage.totals(account.id, since=self._clock.now() - timedelta(days=30))
        for credential_id, _model, _requests, prompt_tokens, eval_tokens in totals:
            tokens[credential_id] = tokens.get(credential_id, 0) + prompt_tokens + eval_tokens
        return tokens

    # ── API keys ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def create(self, request: Request) -> Response:
        """Make a key and show it, once: on the answer to this POST."""
        form, caller, _ = session_form(request)
        errors = _key_errors(form, taken=[key.name for key in (await self._desk_of(caller.account)).live_keys(self._clock.now())])
        if errors:
            return await self._page(caller, _key_draft(form, errors), form.scopes(), status=422)
        stepped = await self._step_up.check(request, form, caller)
        if isinstance(stepped, Unproven):
            return await self._page(caller, _key_draft(form, stepped.errors), form.scopes(), status=stepped.status)
        return self._step_up.finish(await self._create(request, form, stepped), stepped)

    async def _create(self, request: Request, form: Form, stepped: Stepped) -> Response:
        days = _EXPIRIES[form.text("expires")][1]
        try:
            key, secret = await self._credentials.create_key(
                stepped.caller,
                name=form.text("name"),
                scopes=form.scopes(),
                expires_at=self._clock.now() + timedelta(days=days) if days else None,
                network=facts_of(request).network,
            )
        except CorralError as error:
            if error.code not in ("invalid", "conflict", "rate_limited"):
                raise
            field = "" if error.code == "rate_limited" else "name"
            return await self._page(stepped.caller, _key_draft(form, {field: error.message}), form.scopes(), status=error.status)
        return await self._secret_page(stepped.caller, key, secret)

    async def _secret_page(
        self, caller: Principal, key: ApiKey, secret: Secret, *, old_ends_at: datetime | None = None
    ) -> Response:
        return self._pages.render(
            "key_created.html",
            caller=caller,
            is_personal=True,
            status=201,
            key=key,
            secret=secret.reveal(),
            old_ends_at=old_ends_at,
            example=await self._shelf.example(caller),
        )

    async def show_rotate(self, request: Request) -> Response:
        """How long shall the old key live on."""
        caller = caller_of(request)
        return self._rotate_page(caller, await self._key(request, caller), Draft({"overlap": "24h"}))

    def _rotate_page(self, caller: Principal, key: ApiKey, draft: Draft, *, status: int = 200) -> Response:
        return self._pages.render(
            "key_rotate.html",
            caller=caller,
            status=status,
            key=key,
            draft=draft,
            overlaps=[(value, words) for value, (words, _) in _OVERLAPS.items()],
            needs_password=self._step_up.is_needed(session_of(caller)),
        )

    async def rotate(self, request: Request) -> Response:
        """A successor, shown once."""
        form, caller, _ = session_form(request)
        key, overlap = await self._key(request, caller), form.text("overlap")
        if overlap not in _OVERLAPS:
            raise CorralError("bad_request", "the form names an overlap that does not exist")
        stepped = await self._step_up.check(request, form, caller)
        if isinstance(stepped, Unproven):
            return self._rotate_page(caller, key, Draft({"overlap": overlap}, stepped.errors), status=stepped.status)
        overlap_s = _OVERLAPS[overlap][1]
        new, secret = await self._credentials.rotate_key(
            stepped.caller, key.id, overlap_s=overlap_s, network=facts_of(request).network
        )
        ends_at = self._clock.now() + timedelta(seconds=overlap_s)
        if key.expires_at is not None:
            ends_at = min(ends_at, key.expires_at)
        return self._step_up.finish(await self._secret_page(stepped.caller, new, secret, old_ends_at=ends_at), stepped)

    async def show_revoke_key(self, request: Request) -> Response:
        """What revoking will do."""
        caller = caller_of(request)
        key = await self._key(request, caller)
        return self._confirm_page(
            caller,
            heading=f"Revoke the key “{key.name}”?",
            consequence=f"Whatever uses {key.prefix}… is refused from its next request on. This cannot be undone.",
            action=f"/settings/keys/{key.id}/revoke",
            verb=f"Revoke {key.name}",
        )

    async def revoke_key(self, request: Request) -> Response:
        """Refused from the next request on, in every worker. Raises: not_found."""
        _, caller, _ = session_form(request)
        await self._credentials.revoke_key(caller, request.path_params["key_id"], network=facts_of(request).network)
        return redirect("/settings/keys?done=key")

    async def _key(self, request: Request, caller: Principal) -> ApiKey:
        keys = await self._credentials.keys_of(caller.account)
        found = (key for key in keys if key.id == request.path_params["key_id"] and key.revoked_at is None)
        key = next(found, None)
        if key is None:
            raise CorralError("not_found")
        return key

    # ── Devices ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def show_rename(self, request: Request) -> Response:
        """The present name, to be changed."""
        caller = caller_of(request)
        device = await self._device(request, caller)
        return self._rename_page(caller, device, Draft({"name": device.name}))

    def _rename_page(self, caller: Principal, device: Device, draft: Draft, *, status: int = 200) -> Response:
        return self._pages.render("device_rename.html", caller=caller, status=status, device=device, draft=draft)

    async def rename(self, request: Request) -> Response:
        """Give the device another name."""
        form, caller, _ = session_form(request)
        device, name = await self._device(request, caller), form.text("name")
        try:
            await self._credentials.rename_device(caller, device.id, name, network=facts_of(request).network)
        except CorralError as error:
            if error.code != "invalid":
                raise
            return self._rename_page(caller, device, Draft({"name": name}, {"name": error.message}), status=422)
        return redirect("/settings/keys?done=renamed")

    async def show_scopes(self, request: Request) -> Response:
        """What the device may do, to be changed."""
        caller = caller_of(request)
        device = await self._device(request, caller)
        return self._scopes_page(caller, device, Draft(), device.scopes)

    def _scopes_page(
        self, caller: Principal, device: Device, draft: Draft, ticked: frozenset[Scope], *, status: int = 200
    ) -> Response:
        return self._pages.render(
            "device_scopes.html",
            caller=caller,
            status=status,
            device=device,
            draft=draft,
            choices=scope_choices(ticked),
            needs_password=self._step_up.is_needed(session_of(caller)),
        )

    async def change_scopes(self, request: Request) -> Response:
        """Let the device do what is ticked, from its next request on. Only what it could not do before asks for the password."""
        form, caller, _ = session_form(request)
        device, wanted = await self._device(request, caller), form.scopes()
        stepped: Stepped | Unproven = Stepped(caller=caller, session=session_of(caller))
        if not wanted <= device.scopes:
            stepped = await self._step_up.check(request, form, caller)
        if isinstance(stepped, Unproven):
            return self._scopes_page(caller, device, Draft(errors=stepped.errors), wanted, status=stepped.status)
        network = facts_of(request).network
        await self._credentials.set_device_scopes(stepped.caller, device.id, wanted, network=network)
        return self._step_up.finish(redirect("/settings/keys?done=scopes"), stepped)

    async def show_revoke_device(self, request: Request) -> Response:
        """What revoking will do."""
        caller = caller_of(request)
        device = await self._device(request, caller)
        return self._confirm_page(
            caller,
            heading=f"Revoke the device “{device.name}”?",
            consequence="It is signed out: its next request is refused, and running ones end. corral signin connects it again.",
            action=f"/settings/devices/{device.id}/revoke",
            verb=f"Revoke {device.name}",
        )

    async def revoke_device(self, request: Request) -> Response:
        """Refused from the next request on. Raises: not_found."""
        _, caller, _ = session_form(request)
        await self._credentials.revoke_device(caller, request.path_params["device_id"], network=facts_of(request).network)
        return redirect("/settings/keys?done=device")

    async def _device(self, request: Request, caller: Principal) -> Device:
        devices = await self._credentials.devices_of(caller.account)
        device = next((found for found in devices if found.id == request.path_params["device_id"]), None)
        if device is None:
            raise CorralError("not_found")
        return device

    def _confirm_page(self, caller: Principal, *, heading: str, consequence: str, action: str, verb: str) -> Response:
        return self._pages.render(
            "confirm.html",
            caller=caller,
            draft=Draft(),
            needs_password=False,
            heading=heading,
            consequence=consequence,
            action=action,
            verb=verb,
            back="/settings/keys",
            keep="Keep it",
        )


def _key_errors(form: Form, *, taken: Sequence[str]) -> dict[str, str]:
    errors, name = {}, shown_name(form.text("name"))
    if not name:
        errors["name"] = "Give the key a name, so that you know it again."
    elif name.lower() in {other.lower() for other in taken}:
        errors["name"] = f"You have a key named {name} already. Give this one another name, or rotate that one."
    if not form.scopes():
        errors["scope"] = "Tick at least one: a key that may do nothing is of no use."
    if form.text("expires") not in _EXPIRIES:
        errors["expires"] = "Choose when the key expires."
    return errors


def _key_draft(form: Form, errors: Mapping[str, str]) -> Draft:
    return Draft({"name": form.text("name"), "expires": form.text("expires")}, errors)
