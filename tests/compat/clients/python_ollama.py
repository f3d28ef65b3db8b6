"""What the unmodified `ollama` package sees. See jobs.py; the package itself reads OLLAMA_API_KEY.

Each check is one of the things that the package's own examples show, written anew so that a small model can pass it.
"""

import asyncio
import json

import jobs
import ollama

OPTIONS = {"num_predict": jobs.TOKENS, "temperature": 0, "seed": 1}
MESSAGES = [{"role": "user", "content": "Say hello."}]
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
#: A model too small for tools calls one all the same where the form of its answer is given, and a template that speaks of tools
#: and thoughts gives it both abilities.
CALL = {
    "type": "object",
    "properties": {
        "name": {"const": "get_weather"},
        "arguments": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "arguments"],
    "additionalProperties": False,
}
TOOLS = """{{ if .Tools }}{{ .Tools }}{{ end }}{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}{{ if .ToolCalls }}{{ range .ToolCalls }}
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}{{ end }}{{ end }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
THINKS = """{{ range .Messages }}<|im_start|>{{ .Role }}
{{ if .Thinking }}<think>{{ .Thinking }}</think>{{ end }}{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ if .Think }}<think>{{ end }}"""


def get_weather(city: str) -> str:
    """Tell the weather of a city.

    Args:
        city: Its name
    """
    return f"rain in {city}"


def streamed(parts):
    """What a stream amounts to."""
    parts = list(parts)
    text = "".join(part.message.content if hasattr(part, "message") else part.response for part in parts)
    return {"parts": len(parts), "text": text, "done": parts[-1].done, "eval_count": parts[-1].eval_count}


def whole(answer):
    """The same of one answer."""
    text = answer.message.content if hasattr(answer, "message") else answer.response
    return {"text": text, "done": answer.done, "eval_count": answer.eval_count}


def likely(logprobs):
    """How many tokens came with their likelihood, and of how many others each."""
    return [
        len(logprobs),
        sorted({len(each.top_logprobs or ()) for each in logprobs}),
        all(each.logprob <= 0 for each in logprobs),
    ]


class Inference:
    """Checks that any way to a model must pass."""

    def __init__(self, job):
        self.host, self.model = job["url"], job["model"]
        self.client = ollama.Client(host=self.host)

    def checks(self):
        """Name -> check."""
        chat, generate, model = self.client.chat, self.client.generate, self.model
        return {
            "list": lambda: [each.model for each in self.client.list().models],
            "show": self.show,
            "generate": lambda: whole(generate(model, "Say hello.", options=OPTIONS)),
            "generate_streamed": lambda: streamed(generate(model, "Say hello.", options=OPTIONS, stream=True)),
            "generate_logprobs": lambda: likely(generate(model, "Say hello.", options=OPTIONS, logprobs=True).logprobs),
            "chat": lambda: whole(chat(model, MESSAGES, options=OPTIONS)),
            "chat_streamed": lambda: streamed(chat(model, MESSAGES, options=OPTIONS, stream=True)),
            "chat_in_parallel": lambda: asyncio.run(self.in_parallel()),
            "chat_logprobs": lambda: likely(chat(model, MESSAGES, options=OPTIONS, logprobs=True, top_logprobs=3).logprobs),
            "conversation": self.conversation,
            "structured": lambda: json.loads(
                chat(model, MESSAGES, format=SCHEMA, options={"temperature": 0, "num_predict": 64}).message.content
            ),
            "embed": lambda: [len(vector) for vector in self.client.embed(model, ["one", "two"]).embeddings],
            "embeddings": lambda: len(self.client.embeddings(model, "one").embedding),
            "unknown_model": lambda: whole(generate("no-such-model", "Hello")),
        }

    def show(self):
        """The parts of show that callers read."""
        shown = self.client.show(self.model)
        return {"capabilities": shown.capabilities, "info": bool(shown.modelinfo), "family": shown.details.family}

    async def in_parallel(self):
        """Three chats at once with the asynchronous client."""
        each = ollama.AsyncClient(host=self.host)
        answers = await asyncio.gather(*(each.chat(self.model, MESSAGES, options=OPTIONS) for _ in range(3)))
        return [whole(answer)["done"] for answer in answers]

    def conversation(self):
        """Two streamed turns: the tokens of each prompt and answer."""
        messages, counts = [], []
        for question in ("My name is Ann.", "What is my name?"):
            messages.append({"role": "user", "content": question})
            parts = list(self.client.chat(self.model, messages, options=OPTIONS, stream=True))
            messages.append({"role": "assistant", "content": "".join(part.message.content for part in parts)})
            counts.append([parts[-1].prompt_eval_count, parts[-1].eval_count, len(parts)])
        return counts


class Library(Inference):
    """What only the local server does: models made, copied, sent to the hub under `publish_as`, brought back, run and removed."""

    def __init__(self, job):
        super().__init__(job)
        self.published = job["publish_as"]

    def checks(self):
        """In this order: the later ones need what the earlier ones made."""
        return {
            "create": self.create,
            "tools": self.tools,
            "thinking": self.thinking,
            "push": lambda: self.transfer(self.client.push(self.published, stream=True)),
            "pull": self.pull,
            "ps": self.ps,
            "delete": self.delete,
        }

    def create(self):
        """Three models from the one that is there: with a system text, with tools, with thoughts."""
        made = self.client.create("talker", from_=self.model, system="Be brief.", parameters={"num_predict": 4})
        parts = [part.status for part in self.client.create("caller", from_=self.model, template=TOOLS, stream=True)]
        self.client.create("thinker", from_=self.model, template=THINKS)
        self.client.copy(self.model, self.published)
        shown = [self.client.show(name) for name in ("talker", "caller", "thinker")]
        can = [sorted(each.capabilities) for each in shown]
        return {"status": made.status, "last": parts[-1], "can": can, "modelfile": shown[0].modelfile}

    def tools(self):
        """A function of ours as a tool: the model's call, and the answer that is given its result."""
        messages = [{"role": "user", "content": "How is the weather in Oslo?"}]
        options = {**OPTIONS, "num_predict": 64}
        said = self.client.chat("caller", messages, tools=[get_weather], format=CALL, options=options).message
        call = said.tool_calls[0].function
        messages += [said, {"role": "tool", "tool_name": call.name, "content": get_weather(**call.arguments)}]
        after = self.client.chat("caller", messages, tools=[get_weather], options=OPTIONS)
        refused = jobs.result(lambda: self.client.chat(self.model, MESSAGES, tools=[get_weather]), ERRORS)
        return {"name": call.name, "arguments": dict(call.arguments), "after": whole(after)["done"], "refused": refused}

    def thinking(self):
        """Thoughts apart from the answer, whole and streamed, by both routes; none when none are wanted."""
        said = self.client.chat("thinker", MESSAGES, think=True, options=OPTIONS).message
        parts = list(self.client.chat("thinker", MESSAGES, think=True, options=OPTIONS, stream=True))
        off = self.client.chat("thinker", MESSAGES, think=False, options=OPTIONS).message
        generated = self.client.generate("thinker", "Say hello.", think=True, options=OPTIONS)
        return {
            "thoughts": [said.thinking, "".join(part.message.thinking or "" for part in parts)],
            "generated": [generated.thinking, generated.response],
            "off": [off.thinking, off.content],
            "refused": jobs.result(lambda: self.client.chat(self.model, MESSAGES, think=True), ERRORS),
        }

    def transfer(self, parts):
        """The last word of a push or pull, and whether each step's bytes all moved."""
        parts = list(parts)
        whole_steps = {part.digest for part in parts if part.digest and part.completed == part.total}
        return {"last": parts[-1].status, "is_whole": whole_steps == {part.digest for part in parts if part.digest}}

    def pull(self):
        """Bring back what was removed here, and see that it runs."""
        self.client.delete(self.published)
        before = [each.model for each in self.client.list().models]
        came = self.transfer(self.client.pull(self.published, stream=True))
        answer = whole(self.client.generate(self.published, "Say hello.", options=OPTIONS))
        return {**came, "was_gone": self.published not in before, "answer": answer["text"]}

    def ps(self):
        """What runs, with the parts that callers read. Its name is that by which these weights were first asked for."""
        self.client.generate(self.model, "Say hello.", options=OPTIONS)
        found = self.client.ps().models[0]
        return {"name": found.model, "size": found.size, "context": found.context_length, "until": found.expires_at.isoformat()}

    def delete(self):
        """What is left of what was made, and the error for what is not there."""
        for name in ("talker", "caller", "thinker", self.published):
            self.client.delete(name)
        left = [each.model for each in self.client.list().models]
        return {"left": left, "again": jobs.result(lambda: self.client.delete("talker"), ERRORS)}


ERRORS = {ollama.ResponseError: lambda error: {"error": error.error, "status": error.status_code}}
jobs.serve(lambda job: (Library if "publish_as" in job else Inference)(job).checks(), ERRORS)
