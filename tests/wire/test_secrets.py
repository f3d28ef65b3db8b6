"""Text that does not show itself."""

import pickle

import pytest

from corral.wire.secrets import Secret

SECRET = Secret("hunter2")


def test_t113_secret_is_masked_wherever_text_is_made_of_it() -> None:
    for text in (repr(SECRET), str(SECRET), f"{SECRET}", f"{SECRET!r}", "%s" % SECRET, f"{[SECRET]}", f"{ {'a': SECRET} }"):  # noqa: UP031
        assert "hunter2" not in text
        assert "***" in text


def test_secret_is_revealed_when_asked() -> None:
    assert SECRET.reveal() == "hunter2"


@pytest.mark.parametrize(("other", "is_equal"), [(Secret("hunter2"), True), (Secret("hunter3"), False), (Secret(""), False)])
def test_secret_is_compared_by_content(other: Secret, is_equal: bool) -> None:
    assert (other == SECRET) is is_equal


def test_secret_is_never_equal_to_plain_text() -> None:
    assert SECRET != "hunter2"


def test_t056_secret_outside_ascii_is_compared_without_failing() -> None:
    assert Secret("pässwörd") == Secret("pässwörd")
    assert Secret("\ud800") != Secret("\ud801")


def test_secret_is_neither_hashed_nor_pickled() -> None:
    with pytest.raises(TypeError):
        hash(SECRET)
    with pytest.raises(TypeError):
        pickle.dumps(SECRET)
