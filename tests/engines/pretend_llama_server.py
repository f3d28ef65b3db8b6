"""Behaves as llama-server does while it starts, without a model: what it is told to do stands in the model file, behind the
magic.

{"report": file}  first writes what it was started with there, as JSON
{"say": [lines], "status": n}  prints them to stderr and exits so
{"hang": true}  never answers
{"slow": n}  answers 503 to the first n health checks, printing a line for each
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

arguments = dict(zip(sys.argv, sys.argv[1:], strict=False))
told = json.loads(Path(arguments["--model"]).read_bytes()[4:] or b"{}")
health_checks = 0


class Handler(BaseHTTPRequestHandler):
    """Health for everybody, everything else with the key."""

    def do_GET(self) -> None:
        """Answer one health check."""
        global health_checks  # the server makes a handler per request
        health_checks += 1
        is_ready = health_checks > told.get("slow", 0)
        print(f"0.00 I srv: health check {health_checks}", file=sys.stderr, flush=True)
        self._answer(200 if is_ready else 503, {"status": "ok"})

    def do_POST(self) -> None:
        """Answer one call."""
        self.rfile.read(int(self.headers["Content-Length"]))
        has_key = self.headers["Authorization"] == f"Bearer {os.environ['LLAMA_API_KEY']}"
        self._answer(200 if has_key else 401, {"tokens": [1, 2, 3]})

    def _answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


if "report" in told:
    Path(told["report"]).write_text(json.dumps({"argv": sys.argv, "environment": dict(os.environ), "pid": os.getpid()}))
for line in told.get("say", ()):
    print(line, file=sys.stderr, flush=True)
if "status" in told:
    sys.exit(told["status"])
while told.get("hang"):
    time.sleep(60)
HTTPServer(("127.0.0.1", int(arguments["--port"])), Handler).serve_forever()
