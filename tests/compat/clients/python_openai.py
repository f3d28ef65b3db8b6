"""What the unmodified `openai` package sees: one JSON object of check -> result. Runs in an environment of its own.

Usage: python_openai.py BASE_URL MODEL. The package itself reads OPENAI_API_KEY.
"""

import json
import sys

import openai

HOST, MODEL = sys.argv[1:]
MESSAGES = [{"role": "user", "content": "Say hello."}]
client = openai.OpenAI(base_url=f"{HOST}/v1", max_retries=0)


def chat():
    """One answer."""
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12, temperature=0)
    choice = answer.choices[0]
    return {"text": choice.message.content, "finish": choice.finish_reason, "tokens": answer.usage.completion_tokens}


def chat_streamed():
    """A stream with its usage."""
    more = {"max_tokens": 12, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model=MODEL, messages=MESSAGES, **more))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    finish = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    usage = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    return {"text": text, "finish": finish, "tokens": usage, "chunks": len(chunks)}


CHECKS = {
    "models": lambda: [model.id for model in client.models.list()],
    "model": lambda: client.models.retrieve(MODEL).id,
    "chat": chat,
    "chat_streamed": chat_streamed,
    "unknown_model": lambda: str(client.chat.completions.create(model="no-such-model", messages=MESSAGES)),
}


def result(check):
    """A check's result, or the package's own error."""
    try:
        return check()
    except openai.APIStatusError as error:
        return {"error": type(error).__name__, "status": error.status_code}


print(json.dumps({name: result(check) for name, check in CHECKS.items()}))
