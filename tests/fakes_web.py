"""A whole hub in memory as a browser sees it: real services on fake stores, and a browser that fills in the forms it is shown."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urlencode, urlsplit

from starlette.requests import Request
from starlette.responses import Response

from asgi_client import Answer, Caller
from corral.core.catalog import Description, Facts, Kind
from corral.core.policy import CLIENT_PROOFS, Access
from corral.core.records import Account, Capability, HostedModel, Model, ModelDetails, Principal, Proof, Scope
from corral.core.registry import Right, Visibility
from corral.core.scrubbing import HurtBlob
from corral.edges.asgi import App, AppOptions, Dialect, caller_of, endpoint, json_response
from corral.edges.pages import Pages, security_headers
from corral.edges.web import web_endpoints
from corral.hub.accounts import AccountRules, Accounts
from corral.hub.catalog import Catalog
from corral.hub.credentials import Credentials
from corral.hub.links import BlobLinks
from corral.hub.passwords import PasswordCost
from corral.hub.quotas import Quotas
from corral.hub.registry import Registry
from corral.hub.repositories import Repositories
from corral.hub.sightings import MemorySightings
from corral.hub.stubs import Stubs
from corral.hub.tokens import RegistryTokens
from corral.hub.uploads import Uploads
from corral.wire.apikeys import Peppers
from corral.wire.browser import session_cookie_name
from corral.wire.manifest import MANIFEST_TYPE
from corral.wire.names import Digest, parse_name
from corral.wire.repositories import parse_repository
from corral.wire.signing import DevicePrivateKey, authorization_header, request_challenge, signed_target
from fakes import NOON, FakeClock, MemoryAccounts, MemoryAudit, MemoryCredentials, MemorySessions, MemoryUsage, SeededEntropy
from fakes_catalog import MemoryCatalog
from fakes_models import MemoryHosting
from fakes_registry import FakeRegistryFiles, FakeRegistryStore
from identity_hub import TOKEN_KEYS

PASSWORD = "seven lamps over a quiet river"
#: Cheap enough for a test; what it costs in earnest is the identity tests' business.
QUICK = PasswordCost(time_cost=1, memory_kib=8)


#: What the hub's repository holds; `Site.host` offers them.
MODELS = ("smollm2:135m", "gemma3:270m", "alice/tiny:latest", "alice/tiny:big", "alice/secret:latest")


#: What is told of a model that is pushed.
FACTS = Facts(
    kind=Kind.MODEL,
    size_bytes=91_739_413,
    family="llama",
    parameter_size="134.52M",
    quantization="Q4_1",
    context_length=8192,
    capabilities=frozenset({Capability.COMPLETION}),
)


def _model(name: str) -> Model:
    details = ModelDetails(
        format="gguf", family="llama", parameter_size="134.52M", quantization_level="Q4_1", context_length=8192
    )
    return Model(
        name=parse_name(name),
        digest=Digest("3f9a1c" + "0" * 58),
        size_bytes=91_739_413,
        modified_at=NOON,
        details=details,
        capabilities=frozenset({Capability.COMPLETION}),
    )


class Site:
    """A hub with the pages, and one JSON route for devices to knock at."""

    def __init__(self, *, public_url: str = "http://localhost:11435", sign_up_open: bool = True) -> None:
        self.public_url = public_url
        self.clock = FakeClock()
        entropy = SeededEntropy()
        self.account_store = MemoryAccounts()
        self.session_store = MemorySessions(self.account_store)
        self.credential_store = MemoryCredentials(self.account_store)
        self.usage, self.audit = MemoryUsage(), MemoryAudit()
        self.sightings = MemorySightings()
        self.hurt: list[HurtBlob] = []
        self.hosting = MemoryHosting(*(_model(name) for name in MODELS))
        self.accounts = Accounts(
            accounts=self.account_store,
            sessions=self.session_store,
            audit=self.audit,
            clock=self.clock,
            entropy=entropy,
            rules=AccountRules(sign_up_open=sign_up_open, password_cost=QUICK),
        )
        self.credentials = Credentials(
            accounts=self.accounts,
            store=self.credential_store,
            sightings=self.sightings,
            audit=self.audit,
            clock=self.clock,
            entropy=entropy,
            peppers=Peppers(current_id="p1", values={"p1": b"p" * 32}),
            tokens=RegistryTokens(TOKEN_KEYS, issuer=public_url, clock=self.clock, entropy=entropy),
            public_url=public_url,
        )
        self._build_registry(entropy)
        self.rows = web_endpoints(
            accounts=self.accounts,
            credentials=self.credentials,
            hosting=self.hosting,
            repositories=self.repositories,
            registry=self.registry,
            catalog=self.catalog,
            quotas=self.quotas,
            hurt_blobs=self._hurt_blobs,
            usage=self.usage,
            audit=self.audit,
            public_url=public_url,
            clock=self.clock,
            sign_up_open=sign_up_open,
        )
        options = AppOptions(
            authenticate=self.credentials.authenticate,
            error_page=Pages(public_url=public_url, clock=self.clock, sign_up_open=sign_up_open).error,
            response_headers=security_headers(public_url),
            fallback=lambda path: Dialect.NATIVE if path.startswith(("/api/", "/v1/", "/v2/")) else Dialect.HTML,
        )
        self.app = App([endpoint("POST", "/api/me", _me, Access(CLIENT_PROOFS)), *self.rows], options)

    async def _hurt_blobs(self) -> list[HurtBlob]:
        return self.hurt

    def _build_registry(self, entropy: SeededEntropy) -> None:
        """A registry in memory. What is pushed to it is described by nobody but the test."""
        store = self.registry_store = FakeRegistryStore(self.account_store)
        self.registry_files = FakeRegistryFiles(self.clock)
        self.catalog_store = MemoryCatalog(store, self.account_store)
        self.repositories = Repositories(
            store=store, accounts=self.account_store, audit=self.audit, clock=self.clock, entropy=entropy
        )
        common = {"repositories": self.repositories, "store": store, "files": self.registry_files, "clock": self.clock}
        quotas = self.quotas = Quotas(store=store, files=self.registry_files, accounts=self.account_store)
        links = BlobLinks(quotas=quotas, **common)
        uploads = Uploads(links=links, quotas=quotas, entropy=entropy, **common)
        stubs = Stubs(self.hosting, public_url=self.public_url, clock=self.clock)
        self.registry = Registry(uploads=uploads, links=links, stubs=stubs, **common)
        self.catalog = Catalog(store=self.catalog_store, registry=store, repositories=self.repositories)

    async def push(
        self, path: str, tag: str = "latest", *, is_public: bool = False, facts: Facts | None = FACTS, **texts: Any
    ) -> Digest:
        """A model in a repository, described unless there are no facts; the digest of its manifest. texts: of the description."""
        name = parse_repository(path)
        owner = await self.account_store.by_name(name.namespace)
        account = owner or (await self.signed_in("boss", is_admin=True) and await self.account_store.by_name("boss"))
        assert account is not None
        caller = Principal(account=account, proof=Proof.API_KEY, credential_id="k", scopes=frozenset(Scope))
        repository = await self.repositories.find(name, Right.PUSH, caller)
        body = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "path": path, "tag": tag, "layers": []}).encode()
        digest, _ = await self.registry.put_manifest(name, tag, caller, body, MANIFEST_TYPE)
        if is_public:
            await self.registry_store.change_repository(repository.id, visibility=Visibility.PUBLIC)
        if facts is not None:
            await self.catalog_store.describe(Description(digest=digest, facts=facts, **texts))
        return digest

    async def host(self, name: str, *, is_public: bool = True) -> None:
        """Offer one of `MODELS`."""
        await self.hosting.offer(HostedModel(name=name, model=_model(name), is_public=is_public, created_at=NOON))

    async def add_account(self, name: str = "alice", *, is_admin: bool = False) -> Account:
        return await self.accounts.add(name, email=f"{name}@example.org", password=PASSWORD, is_admin=is_admin)

    async def signed_in(self, name: str = "alice", *, is_admin: bool = False, network: str = "127.0.0.1") -> "Browser":
        """A browser with a session of a new account, or of the one with that name."""
        account = await self.account_store.by_name(name) or await self.add_account(name, is_admin=is_admin)
        _, value = await self.accounts.open_session(account, network=network, user_agent="Mozilla/5.0 (X11; Linux) Firefox/140.0")
        browser = Browser(self, network=network)
        browser.cookies[session_cookie_name(self.public_url)] = value.reveal()
        return browser

    async def knock(self, key: DevicePrivateKey, *, network: str = "127.0.0.1", name: str = "finch") -> str:
        """What a device does when it signs in: one signed call. Returns the path and query of its `signin_url`."""
        target = signed_target("/api/me", "", int(self.clock.now().timestamp()))
        headers = {
            "authorization": authorization_header(key, request_challenge("POST", target)),
            "corral-device-name": name,
        }
        caller = Caller(self.app, scheme="https", client=(network, 40000))
        answer = await caller.request("POST", target, headers=headers)
        parts = urlsplit(answer.json()["signin_url"])
        return f"{parts.path}?{parts.query}"

    @property
    def writes(self) -> dict[str, int]:
        """How often each store was changed so far."""
        stores = (self.account_store, self.session_store, self.credential_store, self.usage, self.audit)
        reads = ("get", "by_", "list", "has_", "password_hash", "device", "api_key", "totals", "recent", "of_account")
        counts = {
            f"{type(store).__name__}.{name}": count
            for store in stores
            for name, count in store.calls.items()
            if not name.startswith(reads)
        }
        return counts | {"sightings": len(self.sightings)}


async def _me(request: Request) -> Response:
    return json_response({"name": caller_of(request).account.name})


def device_key(number: int = 1) -> DevicePrivateKey:
    """A device's key, the same for the same number."""
    return DevicePrivateKey(bytes([number]) * 32)


@dataclass
class Form:
    """A form as the page shows it. fields: what would be sent if nothing were changed."""

    method: str
    action: str
    fields: dict[str, list[str]] = field(default_factory=dict)
    buttons: list[str] = field(default_factory=list)


@dataclass
class Page:
    """An answer with its forms, its links, and every element's attributes."""

    status: int
    headers: Mapping[str, str]
    html: str
    forms: list[Form]
    elements: list[tuple[str, dict[str, str]]]
    text: str

    def form(self, action: str) -> Form:
        """The form that posts there, leaving its query aside."""
        return next(form for form in self.forms if form.action.partition("?")[0] == action)

    def find(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        """Attributes of the elements with this tag and these attribute values."""
        return [found for kind, found in self.elements if kind == tag and attributes.items() <= {**found, "": ""}.items()]


class _Reader(HTMLParser):
    """Collects what `Page` offers."""

    def __init__(self) -> None:
        super().__init__()
        self.forms: list[Form] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self._in_form = False
        self._select = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.elements.append((tag, found))
        if tag == "form":
            self._in_form = True
            self.forms.append(Form(found.get("method", "get"), found["action"]))
        elif self._in_form:
            self._control(tag, found)

    def _control(self, tag: str, found: dict[str, str]) -> None:
        fields = self.forms[-1].fields
        is_box = found.get("type") in ("checkbox", "radio")
        if tag == "input" and "name" in found and (not is_box or "checked" in found):
            fields.setdefault(found["name"], []).append(found.get("value", "on" if is_box else ""))
        elif tag == "select":
            self._select = found["name"]
        elif tag == "option" and "selected" in found:
            fields[self._select] = [found["value"]]

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._in_form = False

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append(data.strip())


def read_page(answer: Answer) -> Page:
    """Parse an answer."""
    reader, html = _Reader(), answer.body.decode()
    reader.feed(html)
    return Page(answer.status, answer.headers, html, reader.forms, reader.elements, " ".join(reader.words))


@dataclass
class Browser:
    """Keeps cookies, sends what a browser sends, and posts forms as they are shown, with what a person changes."""

    site: Site
    network: str = "127.0.0.1"
    cookies: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=lambda: {"sec-fetch-site": "same-origin", "user-agent": "Firefox/140.0"})

    async def get(self, target: str, *, method: str = "GET", follow: bool = False) -> Page:
        """One page; with `follow`, the page it leads to."""
        headers = {name: value for name, value in self.headers.items() if name != "sec-fetch-site"}
        page = await self._send(method, target, headers, b"")
        while follow and page.status == 303:
            page = await self._send("GET", page.headers["location"], headers, b"")
        return page

    async def post(
        self, target: str, fields: Mapping[str, str | Sequence[str]], *, headers: Mapping[str, str] | None = None
    ) -> Page:
        """Send fields as a form. headers: instead of those of the browser."""
        body = urlencode(dict(fields), doseq=True).encode()
        sent = {"content-type": "application/x-www-form-urlencoded", **(self.headers if headers is None else headers)}
        return await self._send("POST", target, sent, body)

    async def submit(self, page: Page, action: str, *, follow: bool = True, **changes: str | Sequence[str]) -> Page:
        """Post a form of a page with some fields changed, and go where it leads."""
        form = page.form(action)
        answer = await self.post(form.action, {**form.fields, **changes})
        return await self.get(answer.headers["location"], follow=True) if follow and answer.status == 303 else answer

    async def _send(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Page:
        sent = dict(headers)
        if self.cookies:
            sent["cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        parts = urlsplit(self.site.public_url)
        caller = Caller(self.site.app, host=parts.netloc, scheme=parts.scheme, client=(self.network, 50000))
        answer = await caller.request(method, target, headers=sent, body=body)
        self._keep_cookies(answer)
        return read_page(answer)

    def _keep_cookies(self, answer: Answer) -> None:
        text = answer.headers.get("set-cookie", "")
        if not text:
            return
        name, _, value = text.partition(";")[0].partition("=")
        if "Max-Age=0" in text:
            self.cookies.pop(name, None)
        else:
            self.cookies[name] = value
