"""What the unmodified `ollama` package sees: one JSON object of check -> result. Runs in an environment of its own.

Usage: python_ollama.py BASE_URL MODEL. The package itself reads OLLAMA_API_KEY.
"""

import asyncio
import json
import sys

import ollama

HOST, MODEL = sys.argv[1:]
OPTIONS = {"num_predict": 12, "temperature": 0, "seed": 1}
MESSAGES = [{"role": "user", "content": "Say hello."}]
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
client = ollama.Client(host=HOST)


def streamed(parts):
    """What a stream amounts to."""
    parts = list(parts)
    text = "".join(part.message.content if hasattr(part, "message") else part.response for part in parts)
    return {"parts": len(parts), "text": text, "done": parts[-1].done, "eval_count": parts[-1].eval_count}


def whole(answer):
    """The same of one answer."""
    text = answer.message.content if hasattr(answer, "message") else answer.response
    return {"text": text, "done": answer.done, "eval_count": answer.eval_count}


async def in_parallel():
    """Three chats at once with the asynchronous client."""
    each = ollama.AsyncClient(host=HOST)
    answers = await asyncio.gather(*(each.chat(MODEL, MESSAGES, options=OPTIONS) for _ in range(3)))
    return [whole(answer)["done"] for answer in answers]


def show():
    """The parts of show that callers read."""
    shown = client.show(MODEL)
    return {"capabilities": shown.capabilities, "info": bool(shown.modelinfo), "family": shown.details.family}


CHECKS = {
    "list": lambda: [model.model for model in client.list().models],
    "show": show,
    "generate": lambda: whole(client.generate(MODEL, "Say hello.", options=OPTIONS)),
    "generate_streamed": lambda: streamed(client.generate(MODEL, "Say hello.", options=OPTIONS, stream=True)),
    "chat": lambda: whole(client.chat(MODEL, MESSAGES, options=OPTIONS)),
    "chat_streamed": lambda: streamed(client.chat(MODEL, MESSAGES, options=OPTIONS, stream=True)),
    "chat_in_parallel": lambda: asyncio.run(in_parallel()),
    "structured": lambda: json.loads(
        client.chat(MODEL, MESSAGES, format=SCHEMA, options={"temperature": 0, "num_predict": 64}).message.content
    ),
    "embed": lambda: [len(vector) for vector in client.embed(MODEL, ["one", "two"]).embeddings],
    "embeddings": lambda: len(client.embeddings(MODEL, "one").embedding),
    "unknown_model": lambda: whole(client.generate("no-such-model", "Hello")),
}


def result(check):
    """A check's result, or the package's own error."""
    try:
        return check()
    except ollama.ResponseError as error:
        return {"error": error.error, "status": error.status_code}


print(json.dumps({name: result(check) for name, check in CHECKS.items()}))
