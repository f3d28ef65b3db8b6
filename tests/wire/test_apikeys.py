"""API keys as text: made, read back, refused when damaged, and hashed under a pepper."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire.apikeys import ENTROPY_BYTES, Peppers, api_key_hmac, make_api_key, parse_api_key
from corral.wire.secrets import Secret
from fakes import SeededEntropy

KEY = make_api_key(bytes(range(64)))
TEXT = KEY.text.reveal()
entropies = st.binary(min_size=ENTROPY_BYTES, max_size=ENTROPY_BYTES)


def test_t053_key_has_the_form_that_scanners_look_for() -> None:
    # A vector, so that keys made by one release are keys to the next.
    assert TEXT == "crlk_0Gcb0VZXHtbKLaMqUiIawolD691iK8Ufvf9Ncn7q8d4aVXZu"
    assert re.fullmatch(r"crlk_[0-9A-Za-z]{48}", TEXT)
    assert KEY.public_id == TEXT[5:15]
    assert KEY.prefix == TEXT[:9]


@given(entropies)
def test_key_made_is_read_back(entropy: bytes) -> None:
    made = make_api_key(entropy)
    read = parse_api_key(made.text.reveal())
    assert read is not None
    assert (read.public_id, read.text) == (made.public_id, made.text)


def test_t053_keys_in_great_number_are_distinct() -> None:
    entropy = SeededEntropy()
    keys = [make_api_key(entropy.bytes(ENTROPY_BYTES)) for _ in range(2000)]
    assert len({key.text.reveal() for key in keys}) == len({key.public_id for key in keys}) == 2000


@given(st.integers(0, len(TEXT) - 1), st.characters())
def test_t054_key_with_one_changed_character_is_refused(place: int, character: str) -> None:
    changed = TEXT[:place] + character + TEXT[place + 1 :]
    assert (parse_api_key(changed) is None) is (changed != TEXT)


@given(st.text(max_size=80) | st.text("crlk_09AZaz", min_size=50, max_size=56))
def test_t056_any_other_text_is_no_key(text: str) -> None:
    assert parse_api_key(text) is None


@pytest.mark.parametrize(
    "text", [TEXT + "\n", " " + TEXT, TEXT.upper(), TEXT[:-1], TEXT + "0", TEXT.replace("crlk", "crlx"), "é" * 53]
)
def test_t056_key_with_anything_around_it_is_refused(text: str) -> None:
    assert parse_api_key(text) is None


@pytest.mark.parametrize("count", [0, 63, 65])
def test_key_of_too_little_or_too_much_entropy_is_a_mistake_of_ours(count: int) -> None:
    with pytest.raises(ValueError, match="64 random bytes"):
        make_api_key(bytes(count))


def test_hmac_depends_on_every_character_and_on_the_pepper() -> None:
    other = make_api_key(bytes(64))
    pepper, pepper2 = bytes(32), bytes([1] * 32)
    assert len({api_key_hmac(KEY, pepper), api_key_hmac(other, pepper), api_key_hmac(KEY, pepper2)}) == 3
    assert len(api_key_hmac(KEY, pepper)) == 32


def test_t113_neither_a_key_nor_peppers_show_their_secret() -> None:
    assert TEXT not in repr(KEY)
    assert "***" in repr(KEY)
    assert repr(Peppers(current_id="p1", values={"p1": b"pepper"})) == "Peppers(current_id='p1')"
    assert isinstance(KEY.text, Secret)
