"""Ollama's history file."""

from pathlib import Path

from corral.cli.repl_history import KEPT, HistoryFile


def test_questions_are_kept_for_their_owner_alone_and_the_oldest_go(tmp_path: Path) -> None:
    path = tmp_path / ".ollama" / "history"
    history = HistoryFile(path, is_kept=True)
    for number in range(KEPT + 2):
        history.add(f"question {number}")
    assert history.questions()[0] == "question 2"
    assert len(path.read_text().splitlines()) == KEPT
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [entry.name for entry in path.parent.iterdir()] == ["history"]


def test_two_conversations_keep_each_others_questions(tmp_path: Path) -> None:
    one, other = (HistoryFile(tmp_path / "history", is_kept=True) for _ in range(2))
    one.add("one")
    other.add("two")
    one.add("three")
    assert other.questions() == ["one", "two", "three"]


def test_what_is_not_to_be_kept_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "history"
    history = HistoryFile(path, is_kept=False)
    history.add("secret")
    history.is_kept = True
    for text in ("two\nlines", "  ", "kept"):
        history.add(text)
    assert path.read_text() == "kept\n"


def test_file_of_ollama_is_read_as_ollama_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_bytes(b"  one \n\n\ntwo\nthree \xff\n")
    assert HistoryFile(path, is_kept=False).questions() == ["one", "two", "three \ufffd"]


def test_file_that_cannot_be_used_costs_the_history_alone(tmp_path: Path) -> None:
    (tmp_path / "history").mkdir()
    history = HistoryFile(tmp_path / "history", is_kept=True)
    history.add("one")
    assert history.questions() == []
