"""What all commands share: the forms of flags, the counting of arguments, scopes by their everyday names."""

import click
import pytest

from corral.cli.command import command
from corral.cli.context import Environment, Failed
from corral.cli.scopes import scope_names


@command("made")
@click.argument("first")
@click.argument("second", default="")
@click.option("--flag", is_flag=True)
@click.option("--cut/--no-cut", default=None)
@click.option("-f", "--file", default="")
def made(first: str, second: str, flag: bool, cut: bool | None, file: str) -> None:
    click.echo(repr((first, second, flag, cut, file)))


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    made.main([*words], standalone_mode=False, obj=Environment({}))
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["a"], ("a", "", False, None, "")),
        (["a", "--flag"], ("a", "", True, None, "")),
        (["a", "--flag=true", "b"], ("a", "b", True, None, "")),
        (["a", "--flag=0"], ("a", "", False, None, "")),
        (["a", "--flag", "--flag=F"], ("a", "", True, None, "")),
        (["a", "--cut=false"], ("a", "", False, False, "")),
        (["a", "--cut=T"], ("a", "", False, True, "")),
        (["a", "-f=x=y"], ("a", "", False, None, "x=y")),
        (["a", "-fx"], ("a", "", False, None, "x")),
        (["a", "--file=x"], ("a", "", False, None, "x")),
        (["--", "a", "--flag=true"], ("a", "--flag=true", False, None, "")),
        (["a", "x=y"], ("a", "x=y", False, None, "")),
        (["", ""], ("", "", False, None, "")),
    ],
    ids=lambda value: repr(value),
)
def test_flags_are_read_in_gos_forms(words: list[str], values: tuple[object, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, *words) == repr(values)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "accepts between 1 and 2 arg(s), received 0"),
        (["a", "b", "c", "d"], "accepts between 1 and 2 arg(s), received 4"),
        (["", "", ""], "accepts between 1 and 2 arg(s), received 3"),
    ],
)
def test_arguments_are_counted(words: list[str], text: str) -> None:
    with pytest.raises(click.UsageError) as refused:
        made.main(words, standalone_mode=False)
    assert refused.value.message == text


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["push"], ["models:push"]),
        (["Pull", "models:pull"], ["models:pull"]),
        (["inference,pull", "keys"], ["inference", "models:pull", "keys"]),
        ([], []),
    ],
)
def test_scopes_are_taken_by_name_and_by_their_last_word(words: list[str], names: list[str]) -> None:
    assert scope_names(words) == names


@pytest.mark.parametrize("word", ["pusch", "models", "", "push,,pull"])
def test_scope_that_there_is_not_is_told_which_there_are(word: str) -> None:
    with pytest.raises(Failed) as refused:
        scope_names([word])
    assert (refused.value.advice, refused.value.status) == ("scopes are inference, models:pull, models:push, keys", 2)
