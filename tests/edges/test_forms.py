"""Forms: what is read from them, and what is refused before it is read."""

from time import process_time

import pytest
from starlette.requests import Request

from corral.core.records import Account, BrowserSession, Principal, Proof, RequestFacts, Scope
from corral.edges.forms import Form, query_of, session_form, session_of, visitor_form
from corral.wire.errors import CorralError
from fakes import NOON

FORM = ["application/x-www-form-urlencoded"]
HUB = "https://hub.example.org"
ALICE = Account(id="a1", name="alice", email="", is_admin=False, created_at=NOON)
SESSION = BrowserSession(
    id="s1", account_id="a1", csrf="token", created_at=NOON, authenticated_at=NOON, last_used_at=NOON, expires_at=NOON
)


def sent(body: bytes = b"", *, target: str = "/", session: BrowserSession | None = SESSION, **headers: list[str]) -> Request:
    named = {"content-type": FORM, **{name.replace("_", "-"): values for name, values in headers.items()}}
    facts = RequestFacts(method="POST", target=target, headers=named, body=body, network="127.0.0.1")
    caller = Principal(account=ALICE, proof=Proof.SESSION, credential_id="s1", scopes=frozenset(Scope), session=session)
    return Request({"type": "http", "corral.facts": facts, "corral.principal": caller})


def refusal(request: Request) -> str:
    with pytest.raises(CorralError) as caught:
        session_form(request)
    return caught.value.code


def test_form_with_the_session_token_is_read() -> None:
    form, caller, session = session_form(sent(b"csrf=token&name=a+b%C3%A9&name2="))
    assert (form.text("name"), form.text("name2"), form.text("absent")) == ("a bé", "", "")
    assert (caller.account, session) == (ALICE, SESSION)


@pytest.mark.parametrize("body", [b"", b"csrf=", b"csrf=tokem", b"csrf=tok%C3%A9n", b"csrf=token%20"])
def test_t44_form_without_the_session_token_is_refused(body: bytes) -> None:
    assert refusal(sent(body)) == "forbidden"


@pytest.mark.parametrize(
    "request_",
    [
        sent(b"csrf=token", content_type=["multipart/form-data; boundary=x"]),
        sent(b"csrf=token", content_type=[""]),
        sent(b'{"csrf":"token"}', content_type=["application/json"]),
        sent(b"csrf=token&x=\xff"),
        sent(b"csrf=token&x=%ff"),
        sent(b"csrf=token&csrf=token"),
        sent(b"csrf=token&" + b"&".join(b"a%d=" % number for number in range(101))),
        sent(b"csrf=token" + b"&" * 50_000 + b"a=b" + b"&c=" * 200),
    ],
)
def test_t106_form_that_is_not_one_is_refused(request_: Request) -> None:
    assert refusal(request_) == "bad_request"


def test_t106_a_million_semicolons_take_no_time() -> None:
    started = process_time()
    assert refusal(sent(b"csrf=token" + b";" * 1_000_000)) in ("bad_request", "forbidden", "too_large")
    assert process_time() - started < 0.1


def test_principal_without_a_session_sends_no_forms() -> None:
    assert refusal(sent(b"csrf=token", session=None)) == "unauthorized"
    with pytest.raises(CorralError):
        session_of(Principal(account=ALICE, proof=Proof.API_KEY, credential_id="k1", scopes=frozenset()))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"sec_fetch_site": ["cross-site"]},
        {"sec_fetch_site": ["same-site"], "origin": [HUB]},
        {"sec_fetch_site": ["none"]},
        {"origin": ["null"]},
        {"origin": ["https://hub.example.org.evil.example"]},
        {"origin": [HUB, HUB]},
    ],
)
def test_t52_form_of_another_site_is_refused_without_a_session_too(headers: dict[str, list[str]]) -> None:
    with pytest.raises(CorralError) as caught:
        visitor_form(sent(b"name=alice", **headers), HUB)
    assert caught.value.code == "forbidden"


@pytest.mark.parametrize("headers", [{"sec_fetch_site": ["same-origin"]}, {"origin": [HUB]}])
def test_form_of_our_own_page_is_read(headers: dict[str, list[str]]) -> None:
    assert visitor_form(sent(b"name=alice", **headers), HUB).text("name") == "alice"


def test_query_is_read_like_a_form() -> None:
    assert query_of(sent(target="/x?code=7K3M-Q9XD&a=%2B")).text("a") == "+"
    with pytest.raises(CorralError):
        query_of(sent(target="/x?code=%ff"))


def test_scope_that_does_not_exist_is_refused() -> None:
    assert Form({"scope": ("inference", "keys")}).scopes() == {Scope.INFERENCE, Scope.KEYS}
    with pytest.raises(CorralError):
        Form({"scope": ("admin:*",)}).scopes()
