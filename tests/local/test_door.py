"""Who gets into a secured local server: one test per check, the order of the checks, and what a line lets its holder do."""

import base64
import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from corral.core.local_rights import comes_from_here, may_use_cloud, may_use_model
from corral.core.policy import MANAGES, PUBLIC, READS, USES, check_access, secured
from corral.core.records import Principal, Proof, RequestFacts
from corral.hub.replay import ReplayGuard
from corral.local.door import UNFIT, LocalDoor, Nonces
from corral.wire.apikeys import make_api_key
from corral.wire.authorized_keys import AuthorizedKeys, format_line, key_digest, parse_authorized_keys, parse_terms
from corral.wire.errors import CorralError
from corral.wire.names import parse_name
from corral.wire.signing import DevicePrivateKey, authorization_header, request_challenge
from corral.wire.strong import sign_headers
from fakes import NOON, FakeClock

ADA, EVE = DevicePrivateKey(b"a" * 32), DevicePrivateKey(b"e" * 32)
KEY, OTHER = make_api_key(bytes(range(64))), make_api_key(bytes(reversed(range(64))))
LAN = "192.168.7.20"
KEY_LINE = f"key-sha256 {key_digest(KEY).hex()} ci"
ADA_LINE = f"{ADA.public.authorized_key} ada"


class Door(LocalDoor):
    """A door over lines that a test may change. guesses: networks that showed something wrong."""

    def __init__(self, *lines: str, is_open_here: bool = False) -> None:
        self.lines: Sequence[str] = lines
        self.clock = FakeClock()
        self.guesses: list[str] = []
        self.news: set[tuple[str, str]] = set()
        self.looks = 0
        super().__init__(
            self._read,
            where="~/keys",
            admits_this_machine=is_open_here,
            clock=self.clock,
            replay=ReplayGuard(self.clock, uses_per_minute=3),
            guess=self.guesses.append,
            is_news=lambda *what: what not in self.news and not self.news.add(what),  # type: ignore[func-returns-value]
        )

    def _read(self) -> AuthorizedKeys:
        self.looks += 1
        return parse_authorized_keys("\n".join(self.lines).encode())


def request(
    *headers: tuple[str, str], target: str = "/api/chat", method: str = "POST", network: str = LAN, body: bytes = b""
) -> RequestFacts:
    found: dict[str, list[str]] = {"host": ["box"]}
    for name, value in headers:
        found.setdefault(name, []).append(value)
    return RequestFacts(method=method, target=target, headers=found, body=body, network=network)


def with_key(text: str = KEY.text.reveal(), **more: str) -> RequestFacts:
    return request(("authorization", f"Bearer {text}"), **more)  # type: ignore[arg-type]


def signed(
    key: DevicePrivateKey = ADA, *, at: datetime = NOON, path: str = "/api/chat", method: str = "POST", network: str = LAN
) -> RequestFacts:
    target = f"{path}?ts={int(at.timestamp())}"
    header = authorization_header(key, request_challenge(method, target))
    return request(("authorization", header), target=target, method=method, network=network)


def strongly_signed(
    key: DevicePrivateKey = ADA, *, host: str = "box", body: bytes = b"{}", at: datetime = NOON, nonce: bytes = bytes(16)
) -> RequestFacts:
    url = f"http://{host}/api/chat?x=1"
    headers = {"content-type": "application/json"}
    headers |= sign_headers(key, "POST", url, headers, body=body, now=at.timestamp(), nonce=nonce)
    return request(*((name.lower(), value) for name, value in headers.items()), target="/api/chat?x=1", body=body)


async def refusal(door: LocalDoor, facts: RequestFacts) -> CorralError:
    with pytest.raises(CorralError) as refused:
        await door.authenticate(facts)
    return refused.value


async def let_in(door: LocalDoor, facts: RequestFacts) -> Principal:
    caller = await door.authenticate(facts)
    assert caller is not None
    return caller


# ── Who is let in ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_device_and_api_key_are_let_in_under_their_names() -> None:
    door = Door(ADA_LINE, KEY_LINE)
    ada, ci = await let_in(door, signed()), await let_in(door, with_key())
    assert (ada.account.name, ada.proof, ada.credential_id) == ("ada", Proof.STOCK_SIGNATURE, ADA.public.fingerprint)
    assert (ci.account.name, ci.proof) == ("ci", Proof.API_KEY)
    assert (ada.scopes, ci.scopes) == (frozenset(), frozenset()), "scopes are a hub's"
    assert door.guesses == []


@pytest.mark.parametrize(
    "facts",
    [
        request(),
        request(("authorization", "")),
        request(("authorization", "Bearer")),
        request(("authorization", "Bearer ollama")),
        request(("authorization", "Basic YTpi")),
        request(("authorization", f"Basic {KEY.text.reveal()}")),
        request(("authorization", KEY.text.reveal())),
        with_key(OTHER.text.reveal()),
        with_key(KEY.text.reveal()[:-1] + "0"),
        with_key(KEY.text.reveal() + "\u00e9"),
        with_key(key_digest(KEY).hex()),
        request(("x-api-key", KEY.text.reveal())),
        request(("cookie", f"session={KEY.text.reveal()}")),
        request(target=f"/api/chat?key={KEY.text.reveal()}"),
        signed(EVE),
        request(("authorization", ":")),
        request(("authorization", signed().headers["authorization"][0])),
        request(("authorization", signed().headers["authorization"][0]), target=signed(path="/api/pull").target),
        request(("authorization", signed().headers["authorization"][0]), target=signed().target, method="GET"),
        request(("authorization", signed().headers["authorization"][0]), target=signed().target + "&x=1"),
    ],
)
async def test_t059_whatever_is_wrong_has_one_answer_and_makes_nobody(facts: RequestFacts) -> None:
    error = await refusal(Door(ADA_LINE, KEY_LINE), facts)
    assert (error.code, error.message, error.detail) == ("unauthorized", "unauthorized", {})


async def test_t059_two_credentials_are_refused_whichever_is_right() -> None:
    facts = request(("authorization", f"Bearer {KEY.text.reveal()}"), ("x-api-key", "x"), target="/v1/messages")
    assert (await refusal(Door(KEY_LINE), facts)).code == "two_credentials"


@pytest.mark.parametrize(
    ("target", "is_in"), [("/v1/messages", True), ("/v1/messages/count_tokens?x=1", True), ("/v1/messagesx", False)]
)
async def test_key_in_anthropics_header_counts_on_its_routes_alone(target: str, is_in: bool) -> None:
    facts = request(("x-api-key", KEY.text.reveal()), target=target)
    if is_in:
        assert (await let_in(Door(KEY_LINE), facts)).account.name == "ci"
    else:
        await refusal(Door(KEY_LINE), facts)


async def test_empty_anthropic_header_beside_a_bearer_key_is_nothing() -> None:
    facts = request(("authorization", f"Bearer {KEY.text.reveal()}"), ("x-api-key", ""), target="/v1/messages")
    assert (await let_in(Door(KEY_LINE), facts)).account.name == "ci"


@pytest.mark.parametrize("seconds", [-301, 301])
async def test_t003_wrong_clock_is_told_as_one_and_never_as_a_401(seconds: int) -> None:
    error = await refusal(Door(ADA_LINE), signed(at=NOON + timedelta(seconds=seconds)))
    assert (error.status, error.code) == (403, "clock_skew")


@pytest.mark.parametrize("seconds", [-300, 300])
async def test_clock_within_the_window_is_right(seconds: int) -> None:
    await let_in(Door(ADA_LINE), signed(at=NOON + timedelta(seconds=seconds)))


async def test_order_is_form_then_time_then_signature_then_look_up() -> None:
    door = Door(ADA_LINE)
    wrong = signed(EVE).headers["authorization"][0]
    for facts in (
        request(("authorization", wrong[:-1])),
        signed(EVE, at=NOON - timedelta(hours=1)),
        request(("authorization", wrong), target=signed(path="/x").target),
    ):
        await refusal(door, facts)
        assert door.looks == 0, "a stranger learns nothing about which keys are known"
    await refusal(door, signed(EVE))
    assert door.looks == 1


async def test_t010_older_signature_than_a_minute_behind_the_newest_is_refused() -> None:
    door = Door(ADA_LINE)
    await let_in(door, signed(at=NOON))
    await let_in(door, signed(at=NOON - timedelta(seconds=60)))
    assert (await refusal(door, signed(at=NOON - timedelta(seconds=61)))).code == "stale_signature"


async def test_t011_one_signature_serves_only_so_often() -> None:
    door = Door(ADA_LINE)
    for _ in range(3):
        await let_in(door, signed())
    assert (await refusal(door, signed())).code == "rate_limited"
    door.clock.advance(61)
    await let_in(door, signed())


async def test_removed_line_is_refused_on_the_very_next_request() -> None:
    door = Door(ADA_LINE, KEY_LINE)
    await let_in(door, with_key())
    door.lines = [ADA_LINE]
    assert (await refusal(door, with_key())).code == "unauthorized"
    door.lines = []
    await refusal(door, signed())


@pytest.mark.parametrize("left", [[], [ADA_LINE], [f"rights=read {KEY_LINE}"], [f"expires=2001-01-01 {KEY_LINE}"]])
async def test_t062_sender_whose_line_is_gone_or_changed_is_not_confirmed_when_the_body_has_come(left: list[str]) -> None:
    door = Door(ADA_LINE, KEY_LINE)
    sender = await let_in(door, with_key())
    await door.confirm(sender)
    door.lines = ["# Another line above moves it.", KEY_LINE]
    await door.confirm(sender)
    door.lines = left
    with pytest.raises(CorralError, match="unauthorized"):
        await door.confirm(sender)


async def test_t062_sender_whose_line_expires_is_not_confirmed_when_the_body_has_come() -> None:
    door = Door(f'expires="{(NOON + timedelta(seconds=10)).isoformat()}" {KEY_LINE}')
    sender = await let_in(door, with_key())
    door.clock.advance(9)
    await door.confirm(sender)
    door.clock.advance(1)
    with pytest.raises(CorralError, match="unauthorized"):
        await door.confirm(sender)


async def test_line_counts_until_it_expires() -> None:
    door = Door(f'expires="{(NOON + timedelta(seconds=10)).isoformat()}" {KEY_LINE}')
    door.clock.advance(9)
    await let_in(door, with_key())
    door.clock.advance(1)
    assert (await refusal(door, with_key())).code == "unauthorized"


@pytest.mark.parametrize(
    ("networks", "network", "is_in"),
    [
        ("192.168.0.0/16", LAN, True),
        ("192.168.0.0/16", "192.169.0.1", False),
        ("192.168.0.0/16,2001:db8::/32", "2001:db8::7", True),
        ("192.168.0.0/16", f"::ffff:{LAN}", True),
        ("192.168.0.0/16", "fe80::1%eth0", False),
        ("0.0.0.0/0", "", False),
        ("0.0.0.0/0", "unix", False),
    ],
)
async def test_line_counts_from_its_networks_alone(networks: str, network: str, is_in: bool) -> None:
    door = Door(f'from="{networks}" {ADA_LINE}', f'from="{networks}" {KEY_LINE}')
    for facts in (with_key(network=network), signed(network=network)):
        if is_in:
            await let_in(door, facts)
        else:
            assert (await refusal(door, facts)).code == "unauthorized"


async def test_first_line_that_fits_is_the_one_that_counts() -> None:
    door = Door(
        f"expires=2001-01-01,rights=manage {KEY_LINE}", f"from=10.0.0.0/8,rights=manage {KEY_LINE}", f"rights=read {KEY_LINE}"
    )
    caller = await let_in(door, with_key())
    assert caller.authorized is not None
    assert (caller.authorized.number, caller.authorized.terms.right) == (3, "read")


async def test_wrong_credentials_are_counted_by_network_and_none_at_all_is_not() -> None:
    door = Door(ADA_LINE)
    for facts in (request(), with_key(), signed(EVE), request(("authorization", "Bearer x"), network="10.0.0.9")):
        await refusal(door, facts)
    assert door.guesses == [LAN, LAN, "10.0.0.9"]


# ── The strong signature ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_t019_strong_signature_is_let_in_once() -> None:
    door = Door(ADA_LINE)
    caller = await let_in(door, strongly_signed())
    assert (caller.account.name, caller.proof) == ("ada", Proof.STRONG_SIGNATURE)
    assert (await refusal(door, strongly_signed())).code == "unauthorized"
    await let_in(door, strongly_signed(nonce=b"1" * 16))
    check_access(caller, secured(USES, is_open=False))


@pytest.mark.parametrize(
    "facts",
    [
        replace(strongly_signed(), body=b"{ }"),
        replace(strongly_signed(), method="DELETE"),
        replace(strongly_signed(), target="/api/chat?x=2"),
        strongly_signed(host="other"),
        strongly_signed(EVE),
        strongly_signed(at=NOON - timedelta(seconds=61)),
        strongly_signed(at=NOON + timedelta(seconds=6)),
    ],
)
async def test_t019_strong_signature_of_anything_else_is_refused(facts: RequestFacts) -> None:
    assert (await refusal(Door(ADA_LINE), facts)).code == "unauthorized"


async def test_t059_strong_signature_beside_a_key_is_refused() -> None:
    facts = strongly_signed()
    facts.headers["authorization"] = [f"Bearer {KEY.text.reveal()}"]
    assert (await refusal(Door(ADA_LINE, KEY_LINE), facts)).code == "two_credentials"


async def test_t019_stranger_uses_up_no_nonce_of_anybody() -> None:
    door = Door(KEY_LINE)
    await refusal(door, strongly_signed())
    door.lines = [ADA_LINE]
    await let_in(door, strongly_signed())


def test_nonces_are_kept_longer_than_signatures_are_taken_and_a_full_memory_lets_nobody_in() -> None:
    clock = FakeClock()
    nonces = Nonces(clock, capacity=2)
    assert [nonces.use(b"a", "1"), nonces.use(b"a", "1"), nonces.use(b"b", "1")] == [True, False, True]
    with pytest.raises(CorralError) as full:
        nonces.use(b"c", "1")
    assert full.value.code == "unavailable"
    clock.advance(239)
    assert not nonces.use(b"a", "1")
    clock.advance(2)
    assert nonces.use(b"a", "1")


# ── What the log says ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("facts", [with_key(), signed(), strongly_signed()])
@pytest.mark.parametrize(
    ("options", "why"),
    [("expires=2001-01-01", "expired at 2001-01-01 00:00 UTC"), ("from=10.0.0.0/8", "counts only from 10.0.0.0/8")],
)
async def test_t059_holder_of_a_key_hears_that_its_line_does_not_fit_and_the_log_says_why(
    options: str, why: str, facts: RequestFacts, caplog: pytest.LogCaptureFixture
) -> None:
    error = await refusal(door := Door(f"{options} {KEY_LINE}", f"{options} {ADA_LINE}"), facts)
    assert (error.code, error.message, error.detail) == ("unauthorized", UNFIT, {"is_known": True})
    assert why not in error.message
    assert caplog.records[-1].getMessage().endswith(f" of ~/keys {why}")
    assert door.guesses == [LAN]


async def test_log_tells_of_callers_without_a_credential_once(caplog: pytest.LogCaptureFixture) -> None:
    door = Door(ADA_LINE)
    assert door.turns_away(LAN, {})
    for facts in (request(), request(), request(("authorization", "Basic YTpi"))):
        await refusal(door, facts)
    (record,) = caplog.records
    assert record.getMessage() == f"refused a request without an API key or a signature from {LAN}: callers from there need one"
    assert door.guesses == []


async def test_t113_log_names_who_was_refused_once_and_no_credential(caplog: pytest.LogCaptureFixture) -> None:
    door = Door()
    for facts in (with_key(), with_key(), signed(EVE)):
        await refusal(door, facts)
    assert [record.getMessage() for record in caplog.records] == [
        f"refused the API key key-sha256:{key_digest(KEY).hex()[:16]} from {LAN}: no line of ~/keys lets it in now",
        f"refused the device {EVE.public.fingerprint} from {LAN}: no line of ~/keys lets it in now",
    ]
    assert KEY.text.reveal()[5:] not in caplog.text


async def test_lines_that_grant_nothing_are_told_once_for_each_state_of_the_file(caplog: pytest.LogCaptureFixture) -> None:
    keys = parse_authorized_keys(b"bad line\n" * 25)
    door = Door()
    door._keys = lambda: keys  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        door.keys()
        door.keys()
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith("~/keys: line 1 grants nothing")
    assert told[20:] == ["~/keys: 5 more lines grant nothing"]


# ── This machine ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("network", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
async def test_program_of_this_machine_needs_no_credential_and_a_made_up_one_does_no_harm(network: str) -> None:
    door = Door(is_open_here=True)
    assert await door.authenticate(request(network=network)) is None
    assert await door.authenticate(request(("authorization", "Bearer ollama"), network=network)) is None
    assert (await refusal(Door(), request(network=network))).code == "unauthorized", "CORRAL_LOCAL_AUTH=on asks everybody"


@pytest.mark.parametrize("network", [LAN, "10.0.0.1", "fe80::1%lo", "", "localhost", "127.0.0.1.evil", "::2", "0.0.0.0"])
async def test_whoever_calls_from_elsewhere_needs_one(network: str) -> None:
    assert (await refusal(Door(is_open_here=True), request(network=network))).code == "unauthorized"


@pytest.mark.parametrize(
    "header",
    [
        *("forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-forwarded", "x-real-ip", "via"),
        *("true-client-ip", "cf-connecting-ip", "x-client-ip", "x-original-forwarded-for", "tailscale-user-login"),
        *("x_forwarded_for", "x-forwarded_for", "fastly-client-ip", "x-azure-clientip", "x-appengine-user-ip", "ngrok-trace-id"),
        *(
            "client-ip",
            "forwarded-for",
            "x-nf-client-connection-ip",
            "x-coder-forwarded-for",
            "fly-client-ip",
            "x-cluster-client-ip",
        ),
    ],
)
async def test_request_that_a_proxy_of_this_machine_passes_on_needs_one(header: str) -> None:
    facts = request((header, "127.0.0.1"), network="127.0.0.1")
    assert not comes_from_here(facts.network, facts.headers)
    assert (await refusal(Door(is_open_here=True), facts)).code == "unauthorized"


# ── What a line lets its holder do ───────────────────────────────────────────────────────────────────────────────────


async def caller_of(options: str) -> Principal:
    return await let_in(Door(f"{options} {KEY_LINE}".strip()), with_key())


@pytest.mark.parametrize(("options", "may"), [("rights=read", "R"), ("", "RU"), ("cloud", "RU"), ("rights=manage", "RUM")])
async def test_route_is_for_those_whose_line_has_its_right(options: str, may: str) -> None:
    caller = await caller_of(options)
    for letter, access in (("R", READS), ("U", USES), ("M", MANAGES)):
        for is_open in (True, False):
            if letter in may:
                check_access(caller, secured(access, is_open=is_open))
                continue
            with pytest.raises(CorralError, match=f"rights={access.right}") as refused:
                check_access(caller, secured(access, is_open=is_open))
            assert refused.value.status == 403


def test_t112_route_that_declares_no_right_is_none_of_a_secured_server() -> None:
    with pytest.raises(TypeError):
        secured(PUBLIC, is_open=False)


@pytest.mark.parametrize(
    ("patterns", "yes", "no"),
    [
        (
            "llama*",
            ["llama3:8b", "Llama3.2", "llama:latest"],
            ["alice/llama3:8b", "llama.evil.example/a/b", "codellama", "qwen3:8b"],
        ),
        ("qwen3:*", ["qwen3", "qwen3:8b"], ["qwen3x:8b", "qwen2:8b"]),
        ("tiny", ["tiny", "tiny:1b"], ["tiny2", "alice/tiny"]),
        ("tiny:1b", ["tiny:1b", "TINY:1B"], ["tiny", "tiny:1b-q8"]),
        ("alice/*", ["alice/tiny", "alice/big:1t"], ["bob/tiny", "tiny", "hub.example/alice/tiny"]),
        ("hub.example/alice/*:1?", ["hub.example/alice/x:1b"], ["hub.example/alice/x:10b", "hub.example/bob/x:1b"]),
        ("a,b", ["a", "b"], ["c"]),
    ],
)
async def test_models_of_a_line_are_its_patterns(patterns: str, yes: list[str], no: list[str]) -> None:
    caller = await caller_of(f'models="{patterns}"')
    assert [may_use_model(caller, parse_name(name)) for name in (*yes, *no)] == [True] * len(yes) + [False] * len(no)
    manager = await caller_of(f'rights=manage,models="{patterns}"')
    assert all(may_use_model(manager, parse_name(name)) for name in (*yes, *no)), "who manages is not narrowed"


async def test_cloud_is_for_whose_line_says_so_and_for_managers() -> None:
    callers = [await caller_of(options) for options in ("rights=read", "", "rights=read,cloud", "cloud", "rights=manage")]
    assert [may_use_cloud(caller) for caller in callers] == [False, False, True, True, True]


async def test_caller_without_a_line_may_nothing_on_a_secured_server() -> None:
    caller = await caller_of("rights=manage")
    stranger = Principal(account=caller.account, proof=Proof.API_KEY, credential_id="", scopes=frozenset())
    assert not may_use_cloud(stranger)
    assert not may_use_model(stranger, parse_name("tiny"))
    with pytest.raises(CorralError):
        check_access(stranger, secured(READS, is_open=True))


def test_nobody_who_had_to_prove_anything_may_everything() -> None:
    assert may_use_cloud(None)
    assert may_use_model(None, parse_name("tiny"))


def test_t056_every_digest_is_compared_and_none_with_a_plain_equality(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    from corral.core import local_rights

    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest
    # Patched because the time that a comparison takes cannot be seen in milliseconds.
    monkeypatch.setattr(local_rights.hmac, "compare_digest", lambda one, two: compared.append((one, two)) or real(one, two))
    lines = [format_line(parse_terms(), digest, "x") for digest in (key_digest(KEY), key_digest(OTHER), bytes(32))]
    keys = parse_authorized_keys("\n".join(lines).encode())
    found = local_rights.lines_of_digest(keys, key_digest(KEY))
    assert found is not None
    assert len(compared) == 3


async def test_t011_signature_has_one_spelling() -> None:
    facts = signed()
    header = facts.headers["authorization"][0]
    raw = base64.b64decode(header[69:])
    others = [f"{header[:-3]}{chr(letter)}==" for letter in range(65, 123) if chr(letter).isalpha() and chr(letter) != header[-3]]
    same = [other for other in others if base64.b64decode(other[69:]) == raw]
    assert same
    for other in same:
        await refusal(Door(ADA_LINE), request(("authorization", other), target=facts.target))
