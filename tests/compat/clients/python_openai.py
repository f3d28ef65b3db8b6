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


def completion():
    """Text from a prompt."""
    answer = client.completions.create(model=MODEL, prompt="Say hello.", max_tokens=12, temperature=0)
    return {"text": answer.choices[0].text, "finish": answer.choices[0].finish_reason, "tokens": answer.usage.completion_tokens}


def completion_streamed():
    """The same as a stream with its usage."""
    more = {"max_tokens": 12, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(model=MODEL, prompt="Say hello.", **more))
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    return {"text": text, "tokens": chunks[-1].usage.completion_tokens, "chunks": len(chunks)}


def embeddings():
    """Vectors of two texts: the package asks for base64 by itself and unpacks it."""
    answer = client.embeddings.create(model=MODEL, input=["Hello", "Goodbye"])
    numbers = client.embeddings.create(model=MODEL, input="Hello", encoding_format="float")
    same = max(abs(a - b) for a, b in zip(answer.data[0].embedding, numbers.data[0].embedding, strict=True))
    return {"sizes": [len(item.embedding) for item in answer.data], "is_same": same < 1e-3}


def response():
    """One answer by the newer route."""
    more = {"max_output_tokens": 12, "temperature": 0}
    answer = client.responses.create(model=MODEL, input="Say hello.", instructions="Be brief.", **more)
    return {"text": answer.output_text, "status": answer.status, "tokens": answer.usage.output_tokens}


def response_streamed():
    """The same as a stream, put together by the package."""
    more = {"max_output_tokens": 12, "temperature": 0}
    with client.responses.stream(model=MODEL, input="Say hello.", instructions="Be brief.", **more) as events:
        names = [event.type for event in events]
        answer = events.get_final_response()
    return {"text": answer.output_text, "status": answer.status, "first": names[0], "last": names[-1]}


CHECKS = {
    "models": lambda: [model.id for model in client.models.list()],
    "model": lambda: client.models.retrieve(MODEL).id,
    "chat": chat,
    "chat_streamed": chat_streamed,
    "completion": completion,
    "completion_streamed": completion_streamed,
    "embeddings": embeddings,
    "response": response,
    "response_streamed": response_streamed,
    "unknown_model": lambda: str(client.chat.completions.create(model="no-such-model", messages=MESSAGES)),
}


def result(check):
    """A check's result, or the package's own error."""
    try:
        return check()
    except openai.APIStatusError as error:
        return {"error": type(error).__name__, "status": error.status_code}


print(json.dumps({name: result(check) for name, check in CHECKS.items()}))
