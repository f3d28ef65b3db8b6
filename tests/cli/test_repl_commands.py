"""The commands of a conversation: what a text is, what a command says and asks for, and the session after it."""

import json
from typing import Any

import pytest

from corral.cli.api import LocalApi
from corral.cli.context import Environment, Failed
from corral.cli.repl_commands import Desk, carry_out, command_of, completions, is_open, question_of, shown
from corral.cli.repl_state import ModelFacts, Session
from fakes_cli import FakeServer, fake_server

HI = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("hello", ""),
        ("/nope", "/nope"),
        ("/?", "/?"),
        ("/set system You are brief.", "/set"),
        ("/show info", "/show"),
        ("/set parameter stop a/b", "/set"),
        ("/etc/hosts is what?", ""),
        ("/etc/hosts", ""),
        ("/tmp/a.png", ""),
        ("// a comment", ""),
        ("/* a comment */", ""),
        (" /set", ""),
        ("/usr\nis a directory", ""),
        ('/set system """one\ntwo"""', "/set"),
        ("", ""),
    ],
)
def test_text_is_a_command_when_it_begins_with_one_word_behind_a_slash(text: str, command: str) -> None:
    assert command_of(text) == command


@pytest.mark.parametrize(
    ("text", "waits"),
    [
        ("hello", False),
        ('"""', True),
        ('"""one', True),
        ('"""one\ntwo', True),
        ('"""one"""', False),
        ('"""one\ntwo"""  ', False),
        ('say """', False),
        ('/set system """', True),
        ('/set  system  """Be\nbrief."""', False),
        ("/set system plain", False),
        ('/set parameter """', False),
        ('""""""', False),
    ],
)
def test_text_in_triple_quotes_waits_for_its_end(text: str, waits: bool) -> None:
    assert is_open(text) is waits


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("one\ntwo", "one\ntwo"),
        ('"""one"""', "one"),
        ('"""one\ntwo"""', "one\ntwo"),
        ('"""\none\n\ntwo\n"""', "one\n\ntwo"),
        ('say "hi"', 'say "hi"'),
    ],
)
def test_question_is_sent_without_its_quotes(text: str, question: str) -> None:
    assert question_of(text) == question


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/s", ["/set", "/show", "/save"]),
        ("/set n", ["noformat", "nothink", "nowordwrap", "nohistory"]),
        ("/set parameter top", ["top_k", "top_p"]),
        ("/set think m", ["medium", "max"]),
        ("/set format ", ["json"]),
        ("/show l", ["license"]),
        ("/load sm", ["smollm2:135m"]),
        ("/? s", ["set", "show", "shortcuts"]),
        ("/save x", []),
        ("hello", []),
        ("", []),
    ],
)
def test_tab_offers_what_a_command_takes(text: str, words: list[str]) -> None:
    assert completions(text, lambda: ["smollm2:135m", "other"]) == words


class Told:
    """What one command did: the next session, what it said, what it asked the server."""

    def __init__(self, after: Session | None, out: str, err: str, server: FakeServer, kept: list[bool]) -> None:
        self.after, self.out, self.err, self.server, self.kept = after, out, err, server, kept


class Room:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def tell(self, text: str, session: Session | None = None, answers: dict[str, tuple[int, Any]] | None = None) -> Told:
        kept: list[bool] = []
        with fake_server(answers or {}) as server:
            api = LocalApi(Environment({"HOME": "/nonexistent", "OLLAMA_HOST": server.host}).settings)
            after = carry_out(Desk(api=api, keep_history=kept.append), session or Session(model="m"), text)
        captured = self._capsys.readouterr()
        return Told(after, captured.out, captured.err, server, kept)


@pytest.fixture
def room(capsys: pytest.CaptureFixture[str]) -> Room:
    return Room(capsys)


THINKER = Session(model="m", facts=ModelFacts(capabilities=frozenset({"thinking"})))


@pytest.mark.parametrize(
    ("text", "before", "said", "changed"),
    [
        ("/set verbose", Session(model="m"), "Set 'verbose' mode.", {"is_verbose": True}),
        ("/set quiet", Session(model="m", is_verbose=True), "Set 'quiet' mode.", {"is_verbose": False}),
        ("/set nowordwrap", Session(model="m"), "Set 'nowordwrap' mode.", {"is_wrapped": False}),
        ("/set wordwrap", Session(model="m", is_wrapped=False), "Set 'wordwrap' mode.", {"is_wrapped": True}),
        ("/set format json", Session(model="m"), "Set format to 'json' mode.", {"format": "json"}),
        ("/set noformat", Session(model="m", format="json"), "Disabled format.", {"format": None}),
        ("/set format", Session(model="m"), "Invalid or missing format. For 'json' mode use '/set format json'", {}),
        ("/set format xml", Session(model="m"), "Invalid or missing format. For 'json' mode use '/set format json'", {}),
        ("/set think", THINKER, "Set 'think' mode.", {"think": True, "is_think_chosen": True}),
        ("/set think low", THINKER, "Set 'think' mode to 'low'.", {"think": "low", "is_think_chosen": True}),
        ("/set nothink", THINKER, "Set 'nothink' mode.", {"think": False, "is_think_chosen": True}),
        (
            "/set think hard",
            THINKER,
            'error: invalid think value: "hard" (must be "high", "medium", "low", "max", true, or false)',
            {},
        ),
        ("/set parameter seed 1", Session(model="m"), "Set parameter 'seed' to '1'", {"options": {"seed": 1}}),
        ("/set parameter stop a b", Session(model="m"), "Set parameter 'stop' to 'a, b'", {"options": {"stop": ["a", "b"]}}),
        ("/set parameter foo 1", Session(model="m"), "Couldn't set parameter: \"unknown parameter 'foo'\"", {}),
        ("/set parameter top_p x", Session(model="m"), 'Couldn\'t set parameter: "invalid float value [x]"', {}),
        ("/set parameter top_k x", Session(model="m"), 'Couldn\'t set parameter: "invalid int value [x]"', {}),
        ("/set foo", Session(model="m"), "Unknown command '/set foo'. Type /? for help", {}),
        ("/nope", Session(model="m"), "Unknown command '/nope'. Type /? for help", {}),
        ("/show nope", Session(model="m"), "Unknown command '/show nope'. Type /? for help", {}),
        ("/load", Session(model="m"), "Usage:\n  /load <modelname>", {}),
        ("/save a b", Session(model="m"), "Usage:\n  /save <modelname>", {}),
    ],
)
def test_command_says_what_it_did(room: Room, text: str, before: Session, said: str, changed: dict[str, Any]) -> None:
    told = room.tell(text, before)
    assert told.out == f"{said}\n"
    assert told.err == ""
    assert told.after is not None
    for name in Session.__dataclass_fields__:
        assert getattr(told.after, name) == changed.get(name, getattr(before, name))


@pytest.mark.parametrize("text", ["/set think", "/set nothink"])
def test_thinking_of_a_model_that_cannot_is_warned_of(room: Room, text: str) -> None:
    assert room.tell(text).err == 'warning: model "m" does not support thinking output\n'


def test_history_is_switched_in_silence(room: Room) -> None:
    off, on = room.tell("/set nohistory"), room.tell("/set history")
    assert (off.kept, on.kept, off.out + on.out) == ([False], [True], "")


@pytest.mark.parametrize(
    ("text", "system"),
    [
        ("/set system You are  brief.", "You are  brief."),
        ('/set system """\nBe\nbrief.\n"""', "Be\nbrief."),
        ('/set system """Be brief."""', "Be brief."),
        ('/set system ""', ""),
    ],
)
def test_system_message_is_taken_as_written(room: Room, text: str, system: str) -> None:
    told = room.tell(text, Session(model="m").with_system("before"))
    assert told.out == "Set system message.\n"
    assert told.after is not None
    assert told.after.system == system
    assert told.after.messages == (({"role": "system", "content": system},) if system else ())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("/?", "  /load <model>   "),
        ("/help", "  /load <model>   "),
        ("/? set", "  /set nothink "),
        ("/? /set", "  /set nothink "),
        ("/set", "  /set nothink "),
        ("/set system", "  /set nothink "),
        ("/? show", "  /show template "),
        ("/show", "  /show template "),
        ("/? shortcuts", "  Ctrl-g "),
        ("/set parameter", "  temperature <float> "),
        ("/set parameter seed", "  temperature <float> "),
    ],
)
def test_help_is_a_table_that_fits_a_screen(room: Room, text: str, line: str) -> None:
    out = room.tell(text).out
    assert f"\n{line}" in out
    assert out.endswith("\n\n")
    assert all(len(row) <= 80 for row in out.splitlines())
    assert len(out.splitlines()) <= 20


def test_help_tells_of_files_where_the_model_takes_them(room: Room) -> None:
    assert ".png" not in room.tell("/?").out
    assert ".png" in room.tell("/?", Session(model="m", facts=ModelFacts(takes_media=True))).out


@pytest.mark.parametrize("text", ["/bye", "/exit"])
def test_leaving_has_no_session_after_it(room: Room, text: str) -> None:
    assert room.tell(text).after is None


def test_clear_forgets_what_was_said(room: Room) -> None:
    told = room.tell("/clear", Session(model="m", messages=(HI,)))
    assert (told.out, told.after) == ("Cleared session context\n", Session(model="m"))


def test_list_is_the_table_of_installed_models(room: Room) -> None:
    one = {"name": "a:1b", "digest": "0" * 64, "size": 1500, "modified_at": "2026-01-01T00:00:00Z"}
    told = room.tell("/list a", answers={"GET /api/tags": (200, {"models": [one, {**one, "name": "b:1b"}]})})
    assert [row.split()[0] for row in told.out.splitlines()] == ["NAME", "a:1b"]


LOADED = {"POST /api/show": (200, {"capabilities": ["thinking"]}), "POST /api/generate": (200, {"done": True})}


def test_load_goes_on_with_another_model_and_nothing_said(room: Room) -> None:
    told = room.tell("/load n", Session(model="m", messages=(HI,), keep_alive="5m", format="json", options={"seed": 1}), LOADED)
    assert told.out == "Loading model 'n'\n"
    assert told.after is not None
    assert (told.after.model, told.after.messages, told.after.format) == ("n", (), "json")
    assert [request.body for request in told.server.seen] == [
        {"model": "n"},
        {"model": "n", "keep_alive": "5m", "think": True, "stream": False},
    ]


@pytest.mark.parametrize("missing", ["POST /api/show", "POST /api/generate"])
def test_load_of_a_model_that_is_not_there_keeps_the_old_one(room: Room, missing: str) -> None:
    before = Session(model="m", messages=(HI,))
    told = room.tell("/load n", before, {**LOADED, missing: (404, {"error": "model 'n:latest' not found"})})
    assert told.out == "Loading model 'n'\nCouldn't find model 'n'\n"
    assert told.after == before


def test_load_that_fails_otherwise_is_an_error_of_its_own(room: Room) -> None:
    with pytest.raises(Failed, match="no memory"):
        room.tell("/load n", answers={**LOADED, "POST /api/generate": (500, {"error": "no memory"})})


def test_save_makes_a_model_of_the_conversation(room: Room) -> None:
    session = Session(model="m", messages=(HI,), options={"seed": 1})
    told = room.tell("/save mine", session, {"POST /api/create": (200, [{"status": "writing manifest"}, {"status": "success"}])})
    assert (told.out, told.after) == ("Created new model 'mine'\n", session)
    assert told.server.seen[0].body == {"model": "mine", "from": "m", "parameters": {"seed": 1}, "messages": [HI]}


def test_save_under_a_name_that_is_none_says_so(room: Room) -> None:
    told = room.tell("/save a/b/c/d", answers={"POST /api/create": (400, {"error": "invalid model name"})})
    assert told.out == "error: The model name 'a/b/c/d' is invalid\n"


def test_show_asks_with_what_was_set_here(room: Room) -> None:
    session = Session(model="m", options={"seed": 1}).with_system("Be brief.")
    told = room.tell("/show modelfile", session, {"POST /api/show": (200, {"modelfile": "FROM x\n"})})
    assert told.out == "FROM x\n"
    assert told.server.seen[0].body == {"model": "m", "name": "m", "system": "Be brief.", "options": {"seed": 1}}


@pytest.mark.parametrize(
    ("word", "details", "session", "text"),
    [
        ("license", {}, {}, "No license was specified for this model.\n"),
        ("license", {"license": "Apache\nTerms"}, {}, "Apache\nTerms\n"),
        ("template", {}, {}, "No prompt template was specified for this model.\n"),
        ("system", {}, {}, "No system message was specified for this model.\n"),
        ("system", {"system": "own"}, {}, "own\n\n"),
        ("system", {"system": "own"}, {"system": "set here"}, "set here\n\n"),
        ("modelfile", {"modelfile": "FROM x\n\tTEMPLATE"}, {}, "FROM x\n        TEMPLATE\n"),
        (
            "parameters",
            {},
            {},
            "Model defined parameters:\n  No additional parameters were specified for this model.\n\n",
        ),
        (
            "parameters",
            {"parameters": 'stop                           "x"'},
            {"options": {"temperature": 0.5, "top_k": 3, "stop": ["a", "b"], "use_mmap": False, "top_p": 1.0}},
            'Model defined parameters:\n  stop                           "x"\n\nUser defined parameters:\n'
            "  temperature                    0.5\n  top_k                          3\n  stop                           [a b]\n"
            "  use_mmap                       false\n  top_p                          1\n\n",
        ),
    ],
)
def test_show_prints_what_there_is(word: str, details: dict[str, Any], session: dict[str, Any], text: str) -> None:
    assert shown(details, word, Session(model="m", **session)) == text


def test_show_prints_no_control_characters_of_a_models_maker() -> None:
    assert "\x1b" not in shown({"license": "a\x1b]0;x\x07b"}, "license", Session(model="m"))
    assert json.dumps(shown({"system": "a\x1b[2Jb"}, "system", Session(model="m"))).isascii() is True
