"""What the unmodified `anthropic` package sees. See jobs.py; the package itself reads ANTHROPIC_API_KEY."""

from functools import partial

import anthropic
import jobs

MESSAGES = [{"role": "user", "content": "Say hello."}]
# The package has no argument for a temperature any more; the dialect still has the member.
MORE = {"max_tokens": jobs.TOKENS, "extra_body": {"temperature": 0}}


def message(client, model):
    """One answer."""
    answer = client.messages.create(model=model, messages=MESSAGES, **MORE)
    text = "".join(block.text for block in answer.content if block.type == "text")
    return {"text": text, "stop": answer.stop_reason, "in": answer.usage.input_tokens, "out": answer.usage.output_tokens}


def streamed(client, model):
    """The same as a stream, put together by the package, and the names of its events."""
    with client.messages.stream(model=model, messages=MESSAGES, **MORE) as events:
        names = [event.type for event in events]
        answer = events.get_final_message()
    text = "".join(block.text for block in answer.content if block.type == "text")
    return {"text": text, "stop": answer.stop_reason, "out": answer.usage.output_tokens, "first": names[0], "last": names[-1]}


def conversation(client, model):
    """Three streamed turns, each with everything that was said before."""
    messages, said = [], []
    for question in ("Say hello.", "Say it again.", "Say goodbye."):
        messages.append({"role": "user", "content": question})
        with client.messages.stream(model=model, messages=messages, system="Be brief.", **MORE) as events:
            said.append("".join(events.text_stream))
            answer = events.get_final_message()
        messages.append({"role": "assistant", "content": [block.model_dump() for block in answer.content]})
    return said


def blocks(client, model):
    """A prompt made of blocks, with the result of a tool and a wish to think."""
    use = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Oslo"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "rain"}]}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "How is the weather in Oslo?"}]},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
    ]
    thinking = {"type": "enabled", "budget_tokens": 1024}
    answer = client.messages.create(model=model, messages=messages, max_tokens=jobs.TOKENS, thinking=thinking)
    return answer.role


def count(client, model):
    """Tokens of a short and of a longer prompt."""
    longer = [{"role": "user", "content": "Say hello. " * 20}]
    counted = [client.messages.count_tokens(model=model, messages=messages) for messages in (MESSAGES, longer)]
    return [one.input_tokens for one in counted]


def checks(job):
    """Name -> check."""
    client, model = anthropic.Anthropic(base_url=job["url"], max_retries=0), job["model"]
    return {
        **{check.__name__: partial(check, client, model) for check in (message, streamed, conversation, blocks, count)},
        "unknown_model": lambda: str(client.messages.create(model="no-such-model", messages=MESSAGES, max_tokens=1)),
        "no_messages": lambda: str(client.messages.create(model=model, messages=[], max_tokens=1)),
    }


jobs.serve(checks, {anthropic.APIStatusError: lambda error: {"error": type(error).__name__, "status": error.status_code}})
