"""What the unmodified `openai` package sees. See jobs.py; the package itself reads OPENAI_API_KEY."""

from functools import partial

import jobs
import openai

MESSAGES = [{"role": "user", "content": "Say hello."}]


def chat(client, model):
    """One answer."""
    answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=jobs.TOKENS, temperature=0)
    choice = answer.choices[0]
    return {"text": choice.message.content, "finish": choice.finish_reason, "tokens": answer.usage.completion_tokens}


def chat_streamed(client, model):
    """A stream with its usage."""
    more = {"max_tokens": jobs.TOKENS, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model=model, messages=MESSAGES, **more))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    finish = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    usage = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    return {"text": text, "finish": finish, "tokens": usage, "chunks": len(chunks)}


def completion(client, model):
    """Text from a prompt."""
    answer = client.completions.create(model=model, prompt="Say hello.", max_tokens=jobs.TOKENS, temperature=0)
    return {"text": answer.choices[0].text, "finish": answer.choices[0].finish_reason, "tokens": answer.usage.completion_tokens}


def completion_streamed(client, model):
    """The same as a stream with its usage."""
    more = {"max_tokens": jobs.TOKENS, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(model=model, prompt="Say hello.", **more))
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    return {"text": text, "tokens": chunks[-1].usage.completion_tokens, "chunks": len(chunks)}


def embeddings(client, model):
    """Vectors of two texts: the package asks for base64 by itself and unpacks it."""
    answer = client.embeddings.create(model=model, input=["Hello", "Goodbye"])
    numbers = client.embeddings.create(model=model, input="Hello", encoding_format="float")
    same = max(abs(a - b) for a, b in zip(answer.data[0].embedding, numbers.data[0].embedding, strict=True))
    return {"sizes": [len(item.embedding) for item in answer.data], "is_same": same < 1e-3}


def response(client, model):
    """One answer by the newer route."""
    more = {"max_output_tokens": jobs.TOKENS, "temperature": 0}
    answer = client.responses.create(model=model, input="Say hello.", instructions="Be brief.", **more)
    return {"text": answer.output_text, "status": answer.status, "tokens": answer.usage.output_tokens}


def response_streamed(client, model):
    """The same as a stream, put together by the package."""
    more = {"max_output_tokens": jobs.TOKENS, "temperature": 0}
    with client.responses.stream(model=model, input="Say hello.", instructions="Be brief.", **more) as events:
        names = [event.type for event in events]
        answer = events.get_final_response()
    return {"text": answer.output_text, "status": answer.status, "first": names[0], "last": names[-1]}


def conversation(client, model):
    """Two streamed turns: the tokens of each prompt and answer."""
    messages, counts = [], []
    more = {"max_tokens": jobs.TOKENS, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    for question in ("My name is Ann.", "What is my name?"):
        messages.append({"role": "user", "content": question})
        chunks = list(client.chat.completions.create(model=model, messages=messages, **more))
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        messages.append({"role": "assistant", "content": text})
        usage = chunks[-1].usage
        counts.append([usage.prompt_tokens, usage.completion_tokens, len(chunks)])
    return counts


def checks(job):
    """Name -> check."""
    client, model = openai.OpenAI(base_url=f"{job['url']}/v1", max_retries=0), job["model"]
    named = (chat, chat_streamed, completion, completion_streamed, conversation, embeddings, response, response_streamed)
    return {
        "models": lambda: [each.id for each in client.models.list()],
        "model": lambda: client.models.retrieve(model).id,
        **{check.__name__: partial(check, client, model) for check in named},
        "unknown_model": lambda: str(client.chat.completions.create(model="no-such-model", messages=MESSAGES)),
    }


jobs.serve(checks, {openai.APIStatusError: lambda error: {"error": type(error).__name__, "status": error.status_code}})
