"""Files by their path in a question."""

import base64
from pathlib import Path

import pytest

from corral.cli.attachments import MAX_FILE_BYTES, kind_of, paths_in, take_attachments
from corral.cli.context import Failed

PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)
WAV = b"RIFF\x24\x00\x00\x00WAVEfmt "


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "my pictures").mkdir()
    for name in ("a.png", "my pictures/b.png", "it's (1).png"):
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "c.WAV").write_bytes(WAV)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("what is /tmp/a.png?", ["/tmp/a.png"]),
        ("./a.JPG and ../b.jpeg", ["./a.JPG", "../b.jpeg"]),
        (r"C:\pictures\a.webp", [r"C:\pictures\a.webp"]),
        ("~/a.wav", ["~/a.wav"]),
        (r"/tmp/my\ file.png now", [r"/tmp/my\ file.png"]),
        ("a.png", []),
        ("/tmp/a.pngs and /tmp/b.txt", []),
        ("and/or\n/x", []),
    ],
)
def test_paths_are_found_by_how_they_begin_and_end(text: str, found: list[str]) -> None:
    assert paths_in(text) == found


@pytest.mark.parametrize(
    ("text", "left", "paths"),
    [
        ("what is {home}/a.png here", "what is  here", ["{home}/a.png"]),
        ("'{home}/my pictures/b.png' what?", "what?", ["{home}/my pictures/b.png"]),
        ("{home}/my\\ pictures/b.png what?", "what?", ["{home}/my pictures/b.png"]),
        ("{home}/it\\'s\\ \\(1\\).png", "", ["{home}/it's (1).png"]),
        ("a / b: {home}/a.png", "a / b:", ["{home}/a.png"]),
        ("~/a.png and {home}/c.WAV", "and", ["~/a.png", "{home}/c.WAV"]),
        ("{home}/nothing.png stays", "{home}/nothing.png stays", []),
        ("and/or " + "so on " * 100 + "x.png", "and/or " + "so on " * 100 + "x.png", []),
        ("and/or " + "so on " * 60 + "{home}/a.png", ("and/or " + "so on " * 60).strip(), ["{home}/a.png"]),
    ],
)
def test_files_that_are_there_are_taken_out_of_the_text(home: Path, text: str, left: str, paths: list[str]) -> None:
    got, attached = take_attachments(text.format(home=home), home)
    assert (got, [one.path for one in attached]) == (left.format(home=home), [path.format(home=home) for path in paths])


def test_files_are_sent_whole_and_by_their_content(home: Path) -> None:
    _, (picture, sound) = take_attachments(f"{home}/a.png {home}/c.WAV", home)
    assert (picture.kind, base64.b64decode(picture.data)) == ("image", PNG)
    assert (sound.kind, base64.b64decode(sound.data)) == ("audio", WAV)


def test_file_that_is_not_what_it_says_is_refused(home: Path) -> None:
    (home / "secret.png").write_text("-----BEGIN OPENSSH PRIVATE KEY-----")
    with pytest.raises(Failed, match="it is no JPEG, PNG or WebP image and no WAV audio"):
        take_attachments(f"{home}/secret.png", home)


def test_file_that_is_too_large_is_refused(home: Path) -> None:
    with (home / "large.png").open("wb") as file:
        file.write(PNG)
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(Failed, match=r"file size exceeds maximum limit \(100MB\)"):
        take_attachments(f"{home}/large.png", home)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\xff\xd8\xff\xe0", "image"),
        (PNG, "image"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "image"),
        (WAV, "audio"),
        (b"RIFF\0\0\0\0AVI ", ""),
        (b"", ""),
    ],
)
def test_kind_is_told_by_the_content(head: bytes, kind: str) -> None:
    assert kind_of(head) == kind
