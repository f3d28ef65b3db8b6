"""What `langchain-ollama` sees: a conversation in two streamed turns. See jobs.py; the package below it reads OLLAMA_API_KEY."""

import jobs
import ollama
from langchain_core.messages import HumanMessage
from langchain_ollama import ChatOllama, OllamaEmbeddings


def conversation(job):
    """The tokens of each prompt and answer, and the pieces that each came in."""
    chat = ChatOllama(model=job["model"], base_url=job["url"], temperature=0, seed=1, num_predict=jobs.TOKENS)
    messages, counts = [], []
    for question in ("My name is Ann.", "What is my name?"):
        messages.append(HumanMessage(question))
        pieces = list(chat.stream(messages))
        answer = sum(pieces[1:], pieces[0])
        messages.append(answer)
        counts.append([answer.usage_metadata["input_tokens"], answer.usage_metadata["output_tokens"], len(pieces)])
    return counts


def embed(job):
    """The sizes of two vectors."""
    return [len(vector) for vector in OllamaEmbeddings(model=job["model"], base_url=job["url"]).embed_documents(["one", "two"])]


ERRORS = {ollama.ResponseError: lambda error: {"error": error.error, "status": error.status_code}}
jobs.serve(lambda job: {"conversation": lambda: conversation(job), "embed": lambda: embed(job)}, ERRORS)
