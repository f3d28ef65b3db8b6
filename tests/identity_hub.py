"""The identity services of a hub, over fakes unless told otherwise, and the requests that clients would send to it."""

import base64
from collections.abc import Iterable

from corral.core.policy import ALL_SCOPES
from corral.core.records import Account, BrowserSession, Device, Principal, RequestFacts, Scope, Visitor
from corral.hub.accounts import AccountRules, Accounts
from corral.hub.credentials import Credentials
from corral.hub.passwords import PasswordCost
from corral.hub.sightings import MemorySightings
from corral.hub.tokens import RegistryTokens
from corral.wire import signing, strong
from corral.wire.apikeys import Peppers
from corral.wire.errors import CorralError
from corral.wire.signing import DevicePrivateKey
from corral.wire.tokens import TokenKeys
from fakes import FakeClock, MemoryAccounts, MemoryAudit, MemoryCredentials, MemorySessions, SeededEntropy
from identity_stores import Stores

HUB = "https://hub.example"
PASSWORD = "nine green bottles on a wall"
LAPTOP = DevicePrivateKey(bytes([7] * 32))
PHONE = DevicePrivateKey(bytes([8] * 32))
HOME, CAFE = "192.0.2.1", "198.51.100.1"
#: argon2 at its cheapest: these tests are about what is done with the answer.
CHEAP = PasswordCost(time_cost=1, memory_kib=8, parallelism=1)
PEPPERS = Peppers(current_id="p1", values={"p1": b"p" * 32, "p0": b"o" * 32})

TOKEN_KEYS = TokenKeys(current_id="t2", seeds={"t1": b"1" * 32, "t2": b"2" * 32}, ticket_secret=b"t" * 32)


class IdentityHub:
    """Accounts and credentials of one hub."""

    def __init__(
        self,
        *,
        public_url: str = HUB,
        sign_up_open: bool = True,
        peppers: Peppers = PEPPERS,
        stores: Stores | None = None,
        clock: FakeClock | None = None,
        seed: int = 0,
    ) -> None:
        self.clock, self.entropy = clock or FakeClock(), SeededEntropy(seed)
        self.account_store = MemoryAccounts()
        self.session_store = MemorySessions(self.account_store)
        self.store = MemoryCredentials(self.account_store)
        self.audit = MemoryAudit()
        if stores is not None:
            # The fakes' own attributes are for tests on fakes alone; the ports are the same.
            self.account_store, self.session_store = stores.accounts, stores.sessions  # type: ignore[assignment]
            self.store, self.audit = stores.credentials, stores.audit  # type: ignore[assignment]
        self.sightings = MemorySightings()
        self.public_url = public_url
        self.tokens = RegistryTokens(TOKEN_KEYS, issuer=public_url, clock=self.clock, entropy=self.entropy)
        rules = AccountRules(sign_up_open=sign_up_open, password_cost=CHEAP)
        self.accounts = Accounts(
            accounts=self.account_store,
            sessions=self.session_store,
            audit=self.audit,
            clock=self.clock,
            entropy=self.entropy,
            rules=rules,
        )
        self.credentials = Credentials(
            accounts=self.accounts,
            store=self.store,
            sightings=self.sightings,
            audit=self.audit,
            clock=self.clock,
            entropy=self.entropy,
            peppers=peppers,
            tokens=self.tokens,
            public_url=public_url,
        )

    # ── What is there ────────────────────────────────────────────────────────────────────────────────────────────────

    async def add(self, name: str = "Ada", *, is_admin: bool = False) -> Account:
        """An account with `PASSWORD`."""
        return await self.accounts.add(name, email=f"{name.lower()}@example.org", password=PASSWORD, is_admin=is_admin)

    async def link(
        self, account: Account, key: DevicePrivateKey = LAPTOP, *, scopes: frozenset[Scope] = frozenset({Scope.INFERENCE})
    ) -> Device:
        """A connected device."""
        return await self.credentials.add_device(account, name="laptop", authorized_key=key.public.authorized_key, scopes=scopes)

    async def key(self, account: Account, scopes: Iterable[Scope] = ALL_SCOPES, **options: object) -> tuple[str, str]:
        """(id, text) of a new API key."""
        values: dict[str, object] = {"name": "ci", "scopes": frozenset(scopes), "expires_at": None, **options}
        key, secret = await self.credentials.create_key(account, **values)  # type: ignore[arg-type]
        return key.id, secret.reveal()

    async def session(self, account: Account, *, network: str = HOME) -> tuple[BrowserSession, str]:
        """(session, cookie value) of a browser that just signed in."""
        session, cookie = await self.accounts.open_session(account, network=network, user_agent="Mozilla/5.0")
        return session, cookie.reveal()

    # ── What is sent ─────────────────────────────────────────────────────────────────────────────────────────────────

    def stock(
        self,
        key: DevicePrivateKey = LAPTOP,
        method: str = "POST",
        path: str = "/api/me",
        *,
        age_s: float = 0,
        network: str = HOME,
        body: bytes = b"",
        is_secure: bool = True,
    ) -> RequestFacts:
        """A request signed as stock clients sign."""
        target = f"{path}{'&' if '?' in path else '?'}ts={int(self.clock.now().timestamp() - age_s)}"
        header = signing.authorization_header(key, signing.request_challenge(method, target))
        return facts(method, target, body=body, network=network, is_secure=is_secure, authorization=header)

    def token(
        self,
        key: DevicePrivateKey = LAPTOP,
        *,
        nonce: bytes = bytes(16),
        public_url: str = "",
        age_s: float = 0,
        network: str = HOME,
        is_secure: bool = True,
    ) -> RequestFacts:
        """A request for a registry token, signed as stock clients sign it."""
        text = base64.urlsafe_b64encode(nonce).decode().rstrip("=")
        ts = int(self.clock.now().timestamp() - age_s)
        target = f"/v2/token?nonce={text}&scope=repository%3Aa%2Fb%3Apull&service=hub&ts={ts}"
        header = signing.authorization_header(key, signing.token_challenge(public_url or self.public_url, target))
        return facts("GET", target, network=network, is_secure=is_secure, authorization=header)

    def strong(
        self, key: DevicePrivateKey = LAPTOP, method: str = "POST", path: str = "/api/keys", *, body: bytes = b"{}"
    ) -> RequestFacts:
        """A request with a strong signature."""
        sent = {"content-type": "application/json"}
        added = strong.sign_headers(
            key,
            method,
            self.public_url + path,
            sent,
            body=body,
            now=self.clock.now().timestamp(),
            nonce=self.entropy.bytes(strong.NONCE_BYTES),
        )
        return facts(method, path, body=body, **{name.lower(): value for name, value in (sent | added).items()})

    # ── What comes of it ─────────────────────────────────────────────────────────────────────────────────────────────

    async def who(self, request: RequestFacts) -> Principal:
        """The principal of a request that must have one."""
        principal = await self.credentials.authenticate(request)
        assert isinstance(principal, Principal)
        return principal

    async def visitor(self, request: RequestFacts) -> Visitor:
        """Who sends a request that proves no account."""
        visitor = await self.credentials.authenticate(request)
        assert isinstance(visitor, Visitor)
        return visitor

    async def refusal(self, request: RequestFacts) -> CorralError:
        """The error of a request that must be refused."""
        try:
            principal = await self.credentials.authenticate(request)
        except CorralError as error:
            return error
        raise AssertionError(f"let in: {principal}")

    @property
    def lookups(self) -> int:
        """How often any store was asked anything."""
        return sum(sum(store.calls.values()) for store in (self.account_store, self.session_store, self.store, self.audit))


def facts(
    method: str = "POST",
    target: str = "/api/me",
    *,
    body: bytes = b"",
    network: str = HOME,
    is_secure: bool = True,
    headers: dict[str, list[str]] | None = None,
    **one_value: str,
) -> RequestFacts:
    """A request. headers or, where each is sent once, keywords; `_` stands for `-`."""
    sent = headers if headers is not None else {name.replace("_", "-"): [value] for name, value in one_value.items()}
    return RequestFacts(method=method, target=target, headers=sent, body=body, network=network, is_secure=is_secure)


def bearer(text: str, method: str = "POST", target: str = "/api/chat") -> RequestFacts:
    """A request with an API key."""
    return facts(method, target, authorization=f"Bearer {text}")


def basic(name: str, password: str, method: str = "GET", target: str = "/v2/") -> RequestFacts:
    """A request with a name and a password."""
    text = base64.b64encode(f"{name}:{password}".encode()).decode()
    return facts(method, target, authorization=f"Basic {text}")


def browser(cookie: str, method: str = "GET", target: str = "/settings", *, site: str = "same-origin") -> RequestFacts:
    """A request of a browser with its session cookie."""
    return facts(method, target, headers={"cookie": [f"theme=dark; __Host-corral={cookie}"], "sec-fetch-site": [site]})


async def error_of(doing: object) -> CorralError:
    """The error that awaiting something must raise."""
    try:
        await doing  # type: ignore[misc]
    except CorralError as error:
        return error
    raise AssertionError("no error")
