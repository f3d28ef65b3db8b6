"""What litellm's `ollama_chat` sees: a conversation in two streamed turns. See jobs.py."""

import jobs
import litellm


def conversation(job):
    """The tokens of each prompt and answer, and the pieces that each came in."""
    more = {"temperature": 0, "seed": 1, "max_tokens": jobs.TOKENS, "stream": True, "stream_options": {"include_usage": True}}
    messages, counts = [], []
    for question in ("My name is Ann.", "What is my name?"):
        messages.append({"role": "user", "content": question})
        asked = {"model": f"ollama_chat/{job['model']}", "api_base": job["url"], "api_key": job["key"] or None}
        pieces = list(litellm.completion(messages=messages, **asked, **more))
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        messages.append({"role": "assistant", "content": text})
        usage = next(piece.usage for piece in pieces if getattr(piece, "usage", None))
        counts.append([usage.prompt_tokens, usage.completion_tokens, len(pieces)])
    return counts


ERRORS = {litellm.exceptions.APIError: lambda error: {"error": str(error), "status": error.status_code}}
jobs.serve(lambda job: {"conversation": lambda: conversation(job)}, ERRORS)
