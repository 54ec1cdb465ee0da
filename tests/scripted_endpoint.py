"""An OpenAI-compatible endpoint on 127.0.0.1 that says what a function of the question says."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Said = str | dict[str, float] | None
"""a text, log-probabilities of first tokens, or None: status 400."""


class Endpoint(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, say: Callable[[list[dict[str, str]]], Said]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.say = say
        self.asked: list[dict[str, Any]] = []
        """the requests, in the order in which they came."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def log_message(self, *args: object) -> None: ...

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(request)
        said = self.server.say(request["messages"])
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "logprobs": None}
        if isinstance(said, dict):
            tops = [{"token": token, "logprob": logprob} for token, logprob in said.items()]
            first = max(said, key=said.__getitem__)
            choice["logprobs"] = {"content": [{"token": first, "logprob": said[first], "top_logprobs": tops}]}
            said = first
        choice["message"] = {"role": "assistant", "content": said}
        body = {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}
        content = json.dumps(body if said is not None else {"error": {"message": "no"}}).encode()
        self.send_response(200 if said is not None else 400)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(say: Callable[[list[dict[str, str]]], Said]) -> Iterator[Endpoint]:
    server = Endpoint(say)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
