"""authorized_keys of a shared local server: what is understood, what grants nothing, and that what is written is read back."""

import ipaddress
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire.apikeys import make_api_key
from corral.wire.authorized_keys import (
    AuthorizedKey,
    Right,
    Terms,
    format_line,
    key_digest,
    parse_authorized_keys,
    parse_terms,
    with_line,
    without_lines,
)
from corral.wire.errors import CorralError
from corral.wire.signing import DevicePrivateKey

ADA = DevicePrivateKey(bytes(range(32))).public
API_KEY = make_api_key(bytes(range(64)))
DIGEST = key_digest(API_KEY)
KEY_LINE = f"key-sha256 {DIGEST.hex()} ci"


def entry_of(line: str) -> AuthorizedKey:
    (entry,) = parse_authorized_keys(line.encode()).entries
    return entry


def complaint_of(line: str) -> str:
    found = parse_authorized_keys(line.encode())
    assert found.entries == (), "a line that is not understood whole grants nothing"
    (complaint,) = found.complaints
    return complaint


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ("", Terms()),
        ("rights=read ", Terms(right=Right.READ)),
        ('RIGHTS="manage" ', Terms(right=Right.MANAGE)),
        ("cloud,rights=use ", Terms(has_cloud=True)),
        ('models="Llama*,qwen3:*" ', Terms(models=("llama*", "qwen3:*"))),
        ("models=alice/tiny\t", Terms(models=("alice/tiny",))),
        ('expires="2027-01-31" ', Terms(expires_at=datetime(2027, 1, 31, tzinfo=UTC))),
        ("expires=2027-01-31T12:00:00+02:00  ", Terms(expires_at=datetime(2027, 1, 31, 10, tzinfo=UTC))),
        (
            'from="192.168.0.0/16, 2001:db8::/32,10.0.0.7" ',
            Terms(networks=tuple(map(ipaddress.ip_network, ("192.168.0.0/16", "2001:db8::/32", "10.0.0.7")))),
        ),
    ],
)
def test_line_with_options_is_read(options: str, terms: Terms) -> None:
    entry = entry_of(f"{options}{ADA.authorized_key} ada@laptop\r\n")
    assert (entry.terms, entry.key, entry.comment, entry.number) == (terms, ADA, "ada@laptop", 1)


def test_api_key_is_known_by_its_digest_alone() -> None:
    entry = entry_of(KEY_LINE)
    assert (entry.digest, entry.key, entry.name) == (DIGEST, None, "ci")
    assert entry.fingerprint == f"key-sha256:{DIGEST.hex()[:16]}"


def test_line_without_a_comment_is_called_by_its_fingerprint() -> None:
    assert entry_of(ADA.authorized_key).name == ADA.fingerprint


def test_comments_and_empty_lines_are_passed_over_and_counted() -> None:
    found = parse_authorized_keys(f"\ufeff# who\n\n  \n\t{ADA.authorized_key}\n{KEY_LINE}".encode())
    assert [entry.number for entry in found.entries] == [4, 5]
    assert found.complaints == ()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"restrict {ADA.authorized_key}", 'an option "restrict" that is not known'),
        (f'command="rm -rf /" {ADA.authorized_key}', 'an option "command" that is not known'),
        (f"rights=admin {ADA.authorized_key}", "rights is one of read, use, manage"),
        (f"rights {ADA.authorized_key}", "rights is one of"),
        (f"rights=read,rights=manage {ADA.authorized_key}", 'says "rights" twice'),
        (f"rights=read, cloud {ADA.authorized_key}", "not understood"),
        (f"cloud=no {ADA.authorized_key}", "cloud takes no value"),
        (f'models="" {ADA.authorized_key}', "models takes"),
        (f'models="[a-z]*" {ADA.authorized_key}', "models takes"),
        (f'models="llama* {ADA.authorized_key}', "models takes"),
        (f'expires="soon" {ADA.authorized_key}', "expires takes"),
        (f'expires="2027-02-30" {ADA.authorized_key}', "expires takes"),
        (f'expires="9999-12-31T23:59:59-14:00" {ADA.authorized_key}', "expires takes"),
        (f'from="10.0.0.1/8" {ADA.authorized_key}', "from takes"),
        (f'from="box.lan" {ADA.authorized_key}', "from takes"),
        (f'from="" {ADA.authorized_key}', "from takes"),
        ("rights=read", "nothing follows"),
        ("rights=read ", "nothing follows"),
        ("rights=read ssh-rsa AAAAB3NzaC1yc2E= x", "neither ssh-ed25519 nor key-sha256"),
        ("ssh-ed25519", "damaged"),
        (ADA.authorized_key[:-1], "damaged"),
        (f"key-sha256 {DIGEST.hex().upper()}", "64 hex digits"),
        (f"key-sha256 {DIGEST.hex()[:-1]}", "64 hex digits"),
        (f"{ADA.authorized_key} a\u2028b", "characters"),
        (f"{ADA.authorized_key} {'x' * 9000}", "too long"),
        (f"{API_KEY.text.reveal()} ci", "it holds an API key itself"),
        ("\x00", "characters"),
    ],
)
def test_line_that_is_not_understood_grants_nothing_and_says_where_and_why(line: str, said: str) -> None:
    complaint = complaint_of(line)
    assert complaint.startswith("line 1 grants nothing: ")
    assert said in complaint


def test_t012_key_of_small_order_grants_nothing() -> None:
    small = "AAAAC3NzaC1lZDI1NTE5AAAAIAEAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    assert "damaged" in complaint_of(f"ssh-ed25519 {small}")


def test_t113_complaint_repeats_nothing_that_could_be_secret() -> None:
    secret = API_KEY.text.reveal()
    for line in (secret, f"rights={secret} {KEY_LINE}", f"{secret}=1 {KEY_LINE}", f"key-sha256 {secret}", f"crlk,{secret} x"):
        assert secret[5:20] not in complaint_of(line)


def test_one_bad_line_takes_nothing_from_the_others() -> None:
    found = parse_authorized_keys(f"bad line\n{KEY_LINE}\nworse\n{ADA.authorized_key}\n".encode())
    assert [entry.number for entry in found.entries] == [2, 4]
    assert [complaint.split()[1] for complaint in found.complaints] == ["1", "3"]


# ── Whatever a file holds ────────────────────────────────────────────────────────────────────────────────────────────


@given(st.binary(max_size=400))
def test_any_bytes_grant_nothing_and_never_raise(content: bytes) -> None:
    # No valid key of either kind is found by chance.
    assert parse_authorized_keys(content).entries == ()


@given(st.text(st.characters(exclude_characters="\n"), max_size=80))
def test_text_before_a_key_grants_nothing_more_than_options_say(text: str) -> None:
    for entry in parse_authorized_keys(f"rights=read,{text}{KEY_LINE}".encode("utf-8", "replace")).entries:
        assert entry.terms.right is Right.READ


@given(st.integers(0, 200), st.sampled_from("aZ0,=\"' \\\t*#:/"))
def test_a_slip_in_a_narrow_line_never_widens_its_rights(at: int, slip: str) -> None:
    line = f'rights=read,from="10.0.0.0/8",expires="2020-01-01" {KEY_LINE}'
    at = min(at, len(line))
    for changed in (line[:at] + slip + line[at:], line[:at] + slip + line[at + 1 :], line[:at] + line[at + 1 :]):
        for entry in parse_authorized_keys(changed.encode()).entries:
            assert entry.terms.right is Right.READ
            assert entry.terms.networks
            assert entry.terms.expires_at
            assert not entry.terms.has_cloud


_TERMS = st.builds(
    Terms,
    right=st.sampled_from(Right),
    has_cloud=st.booleans(),
    models=st.lists(st.from_regex(r"[a-z0-9_.*?-]{1,8}(/[a-z0-9*]{1,5})?(:[a-z0-9*]{1,5})?", fullmatch=True), max_size=3).map(
        tuple
    ),
    expires_at=st.none()
    | st.datetimes(datetime(2000, 1, 1), datetime(2999, 1, 1), timezones=st.just(UTC)).map(lambda at: at.replace(microsecond=0)),  # noqa: DTZ001 - bounds are naive here
    networks=st.lists(st.ip_addresses().map(ipaddress.ip_network), max_size=2).map(tuple),
)


@given(_TERMS, st.sampled_from([ADA, DIGEST]), st.sampled_from(["", "ada", "Ada's MacBook (work) #2"]))
def test_line_that_is_written_is_read_back_as_it_was_meant(terms: Terms, key: object, comment: str) -> None:
    entry = entry_of(format_line(terms, key, comment))  # type: ignore[arg-type]
    assert (entry.terms, entry.key or entry.digest, entry.comment) == (terms, key, comment)


# ── Changing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lines_come_and_go_while_all_others_stay_as_they_are() -> None:
    before = b"# mine\r\nnot understood \xff\n" + KEY_LINE.encode()
    longer = with_line(before, ADA.authorized_key)
    assert longer == before + b"\n" + ADA.authorized_key.encode() + b"\n"
    assert without_lines(longer, [4]) == before + b"\n"
    assert without_lines(longer, [3]) == b"# mine\r\nnot understood \xff\n" + ADA.authorized_key.encode() + b"\n"
    assert without_lines(before, [3]) == b"# mine\r\nnot understood \xff\n"


@pytest.mark.parametrize("typed", [{"right": "admin"}, {"models": "[x]"}, {"networks": "10.0.0.1/8"}])
def test_terms_that_nobody_can_mean_are_refused(typed: dict[str, str]) -> None:
    with pytest.raises(CorralError) as refused:
        parse_terms(**typed)  # type: ignore[arg-type]
    assert refused.value.code == "bad_request"


def test_rights_hold_what_stands_before_them() -> None:
    assert [[one.covers(other) for other in Right] for one in Right] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
