"""What `llm` sees with its plugin `llm-ollama`: a conversation in two streamed turns. See jobs.py; the package below it reads
OLLAMA_API_KEY and OLLAMA_HOST."""

import os

import jobs
import llm
import llm_ollama
import ollama


def conversation(job):
    """The tokens of each prompt and answer, and the pieces that each came in."""
    talk = llm_ollama.Ollama(job["model"]).conversation()
    counts = []
    for question in ("My name is Ann.", "What is my name?"):
        answer = talk.prompt(question, temperature=0, seed=1, num_predict=jobs.TOKENS)
        pieces = list(answer)
        counts.append([answer.input_tokens, answer.output_tokens, len(pieces)])
    return counts


def checks(job):
    """Name -> check."""
    os.environ["OLLAMA_HOST"] = job["url"]
    return {"models": lambda: [model.model_id for model in llm.get_models()], "conversation": lambda: conversation(job)}


jobs.serve(checks, {ollama.ResponseError: lambda error: {"error": error.error, "status": error.status_code}})
