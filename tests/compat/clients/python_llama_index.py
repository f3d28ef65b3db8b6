"""What `llama-index-llms-ollama` sees: a conversation in two streamed turns. See jobs.py; the package below it reads
OLLAMA_API_KEY."""

import jobs
import ollama
from llama_index.core.base.llms.types import ChatMessage
from llama_index.llms.ollama import Ollama


def conversation(job):
    """The tokens of each prompt and answer, and the pieces that each came in. Without a context window of its own, the package
    asks the server for the model's."""
    more = {"num_predict": jobs.TOKENS, "seed": 1}
    model = Ollama(model=job["model"], base_url=job["url"], temperature=0, additional_kwargs=more)
    messages, counts = [], []
    for question in ("My name is Ann.", "What is my name?"):
        messages.append(ChatMessage(role="user", content=question))
        pieces = list(model.stream_chat(messages))
        messages.append(pieces[-1].message)
        raw = pieces[-1].raw
        counts.append([raw["prompt_eval_count"], raw["eval_count"], len(pieces)])
    return counts


ERRORS = {ollama.ResponseError: lambda error: {"error": error.error, "status": error.status_code}}
jobs.serve(lambda job: {"conversation": lambda: conversation(job)}, ERRORS)
