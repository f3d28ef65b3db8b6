"""The loop of every client script: imported once, it answers each line of JSON on stdin with one line of JSON on stdout.

A job is `{"url", "model", "key"}` and what else the script wants; the answer is an object of check -> result, of all
checks unless the job names some as `only`. Importing a client takes longer than all its checks, so one process serves every
server and key.
"""

import json
import os
import sys

#: What the packages read their key from.
KEYS = ("OLLAMA_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY")
#: How long an answer of these checks may be: enough for several pieces of a stream.
TOKENS = 4


def serve(checks, errors):
    """Answer jobs until stdin ends. checks: (job) -> check -> function; errors: exception -> what to report of it."""
    # What a package prints must not get between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        for name in KEYS:
            os.environ.pop(name, None)
            if job["key"] or name != "OLLAMA_API_KEY":
                os.environ[name] = job["key"] or "unused"
        chosen = {name: check for name, check in checks(job).items() if name in job.get("only", [name])}
        report = {name: result(check, errors) for name, check in chosen.items()}
        print(json.dumps(report), file=answers, flush=True)


def result(check, errors):
    """A check's result, or the package's own error."""
    try:
        return check()
    except tuple(errors) as error:
        return next(tell(error) for kind, tell in errors.items() if isinstance(error, kind))
