"""What a conversation of `corral run` is made of, and what changes it: no terminal, no server.

A session is a value: every change gives a new one, so that a question that failed, or a model that could not be loaded, leaves
what was there before. Source: ollama cmd/cmd.go runOptions, cmd/interactive.go, api/types.go FormatParams, fb30760.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from corral.wire.errors import CorralError

Message = Mapping[str, Any]

LEVELS = ("high", "medium", "low", "max")
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"(?!\S)|\S+')


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a session needs of /api/show. parent: the model that this one was made from; messages: stored with it, which the
    server puts before what is said; remote_host, remote_model: of one that runs elsewhere."""

    capabilities: frozenset[str] = frozenset()
    parent: str = ""
    messages: tuple[Message, ...] = ()
    remote_host: str = ""
    remote_model: str = ""
    takes_media: bool = False

    @classmethod
    def of(cls, details: Mapping[str, Any]) -> "ModelFacts":
        """Out of the answer to /api/show."""
        capabilities = frozenset(details.get("capabilities") or ())
        # Servers of before capabilities tell of pictures by these two.
        info = details.get("model_info") or {}
        has_projector = bool(details.get("projector_info")) or any(".vision." in name for name in info)
        return cls(
            capabilities=capabilities,
            parent=(details.get("details") or {}).get("parent_model") or "",
            messages=tuple(details.get("messages") or ()),
            remote_host=details.get("remote_host") or "",
            remote_model=details.get("remote_model") or "",
            takes_media=has_projector or not capabilities.isdisjoint(("vision", "audio")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One conversation and how it is held. format: `json`, a schema, or None. think: what was chosen, where is_think_chosen says
    that it was. keep_alive: seconds or a duration, empty for the server's own. system: what the person set; it stands among the
    messages too, where it was set."""

    model: str
    facts: ModelFacts = field(default_factory=ModelFacts)
    messages: tuple[Message, ...] = ()
    system: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    format: Any = None
    think: bool | str | None = None
    is_think_chosen: bool = False
    keep_alive: str | float = ""
    is_verbose: bool = False
    is_wrapped: bool = True
    hides_thinking: bool = False

    @property
    def thinks(self) -> bool | str | None:
        """What to send as `think`: what was chosen, else yes where the model can."""
        if self.is_think_chosen:
            return self.think
        return True if "thinking" in self.facts.capabilities else None

    def request(self, **more: Any) -> dict[str, Any]:
        """The body of a request of this session: what every one carries, and more; fields that say nothing are left out."""
        body = {
            "model": self.model,
            "format": self.format,
            "think": self.thinks,
            "keep_alive": None if self.keep_alive == "" else self.keep_alive,
            "options": dict(self.options) or None,
            **more,
        }
        return {name: value for name, value in body.items() if value is not None}

    def with_answer(self, question: Message, answer: Message) -> "Session":
        """The conversation after one more question and its answer."""
        return replace(self, messages=(*self.messages, question, answer))

    def with_system(self, text: str) -> "Session":
        """With another system message from here on; it replaces one that nothing was said to. An empty text takes it away."""
        before = self.messages
        while before and before[-1].get("role") == "system":
            before = before[:-1]
        if text:
            return replace(self, system=text, messages=(*before, {"role": "system", "content": text}))
        kept = tuple(message for message in before if message.get("role") != "system")
        return replace(self, system="", messages=kept)

    def cleared(self) -> "Session":
        """Nothing said yet; the system message stays."""
        return replace(self, messages=()).with_system(self.system)

    def with_model(self, model: str, facts: ModelFacts) -> "Session":
        """A new conversation with that model. Options, format and modes stay; the system message is the new model's own."""
        return replace(self, model=model, facts=facts, messages=(), system="")

    def with_parameter(self, name: str, words: Sequence[str]) -> "Session":
        """With an option set. Raises: CorralError with Ollama's text."""
        return replace(self, options={**self.options, name: parameter_value(name, words)})

    def recipe(self, name: str) -> dict[str, Any]:
        """The body of POST /api/create for a model that goes on where this conversation stands. The system message goes into its
        own field and not among the messages too, where it would be given twice."""
        own = [message for message in self.messages if message != {"role": "system", "content": self.system}]
        body = {
            "model": name,
            "from": self.source,
            "system": self.system,
            "parameters": dict(self.options),
            "messages": [*self.facts.messages, *own],
        }
        return {field: value for field, value in body.items() if value}

    @property
    def source(self) -> str:
        """What a saved session is made from: the model that this one was made from, so that saving again does not add layer to
        layer, else this one. A conversation with a cloud model stays one with a cloud model."""
        from corral.wire.names import parse_name

        if is_cloud(self.model) and not is_cloud(self.facts.parent):
            return self.model
        try:
            parse_name(self.facts.parent)
        except CorralError:
            return self.model
        return self.facts.parent


def is_cloud(model: str) -> bool:
    """Whether a name asks for the hub's model by `:cloud` or `-cloud`."""
    from corral.wire.names import Source, parse_reference

    try:
        return parse_reference(model).source is Source.CLOUD
    except CorralError:
        return False


def parameter_value(name: str, words: Sequence[str]) -> Any:
    """An option out of the words behind its name; only `stop` takes several. Raises: CorralError with Ollama's text, also for a
    value that no request could carry."""
    from corral.wire.modelfile import parse_parameter
    from corral.wire.options import merge_options

    value = list(words) if name == "stop" else parse_parameter(name, " ".join(words))
    merge_options({}, {name: value})
    return value


def words_of(line: str) -> list[str]:
    """The words of a command. Text in double quotes is one word, in which `\\n`, `\\t` and `\\"` mean what they mean in JSON:
    Ollama has no way to write a blank within a stop word."""
    return [_unquoted(word) for word in _WORD.findall(line)]


def _unquoted(word: str) -> str:
    if len(word) < 2 or not (word.startswith('"') and word.endswith('"')):
        return word
    try:
        text = json.loads(word)
    except ValueError:
        return word
    return text if isinstance(text, str) else word


def parse_think(text: str) -> bool | str | None:
    """`true`, `false` or a level; None when it is neither."""
    if text in LEVELS:
        return text
    return {"true": True, "false": False}.get(text)
