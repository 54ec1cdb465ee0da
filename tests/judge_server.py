"""A scripted OpenAI-compatible server on 127.0.0.1 that judges right, and fails in every way that servers do.

A response says its quality (`quality 7`); the server reads both between their markers and finds the better one. Before
that, `script(question, n)` may name a fault for the n-th request (from 0) that asks the same question.
"""

import json
import math
import re
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dpo.judge.verdict import Pair, Verdict

Script = Callable[[str, int], str | None]
BLOCK = r"\[Response {0} ([0-9a-f]+)\]\n(.*)\n\[End of Response {0} \1\]"
QUALITY = re.compile(r"quality (\d+)")
SLOW = 1.0


def pair(number: int, first: int, second: int, **more: str) -> Pair:
    """A pair of responses of these qualities."""
    messages = [{"role": "user", "content": f"Question {number}?"}]
    return Pair(str(number), messages, more.get("a", f"quality {first}"), more.get("b", f"quality {second}"))


def right(pair: Pair) -> Verdict:
    first, second = (int(QUALITY.search(text)[1]) for text in (pair.first, pair.second))
    return Verdict.FIRST if first > second else Verdict.SECOND if second > first else Verdict.TIE


def better(prompt: str) -> str:
    """The letter of the better response; A of equal ones, as a judge with a position bias has it."""
    a, b = (re.search(BLOCK.format(letter), prompt, re.DOTALL) for letter in "AB")
    if a is None or b is None:  # the probe
        return "A"
    return "A" if int(QUALITY.search(a[2])[1]) >= int(QUALITY.search(b[2])[1]) else "B"


def answer(letter: str, logprobs: bool) -> dict:
    other = {"A": "B", "B": "A"}[letter]
    top = [{"token": letter, "logprob": math.log(0.7)}, {"token": f" {letter}", "logprob": math.log(0.1)},
           {"token": other, "logprob": math.log(0.2)}, {"token": "The", "logprob": -9999.0}]  # fmt: skip
    content = [{"token": letter, "logprob": math.log(0.7), "top_logprobs": top}]
    message = {"role": "assistant", "content": letter}
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": "stop",
        "logprobs": {"content": content} if logprobs else None,
    }
    return {
        "id": "x",
        "object": "chat.completion",
        "choices": [choice],
        "usage": {"prompt_tokens": 100, "completion_tokens": 1},
    }


def wrong(letter: str) -> str:
    return {"A": "B", "B": "A"}[letter]


def _content(body: dict, text: object, finish_reason: str = "stop") -> dict:
    body["choices"][0] |= {"finish_reason": finish_reason, "logprobs": None}
    body["choices"][0]["message"]["content"] = text
    return body


def _refusing(body: dict) -> dict:
    body["choices"][0]["message"]["refusal"] = "No."
    return body


def _tops(body: dict, *tops: tuple[object, object]) -> dict:
    if body["choices"][0]["logprobs"]:
        place = body["choices"][0]["logprobs"]["content"][0]
        place["top_logprobs"] = [{"token": token, "logprob": logprob} for token, logprob in tops]
    return body


# What a body becomes; the status is 200. right: the right letter.
BODIES: dict[str, Callable[[dict, str], object]] = {
    "cut_json": lambda body, right: json.dumps(body)[:60],
    "html": lambda body, right: f"<html><body>502 Bad Gateway {wrong(right)}</body></html>",
    "empty": lambda body, right: "",
    "a_list": lambda body, right: [wrong(right)],
    "empty_choices": lambda body, right: body | {"choices": []},
    "null_content": lambda body, right: _content(body, None),
    "cut_null": lambda body, right: _content(body, None, "length"),
    "number_content": lambda body, right: _content(body, 1),
    "pleas": lambda body, right: _content(body, "Please, {0}. I beg you! Answer: {0} is best".format(wrong(right))),
    "half_a_pair": lambda body, right: _content(body, f"\ud800{wrong(right)} \udc00"),
    "both": lambda body, right: _content(body, f"{wrong(right)}{right}"),
    "too_long": lambda body, right: _content(body, "The better response, all things", "length"),
    "filtered": lambda body, right: _content(body, wrong(right), "content_filter"),
    "refusal": lambda body, right: _content(body, "I'm sorry, but I can't compare these."),
    "refusal_field": lambda body, right: _refusing(body),
    "cut_thoughts": lambda body, right: _content(body, f"<think>\nWhat is asked? {right}", "length"),
    "no_letter_in_tops": lambda body, right: _tops(body, ("The", -0.1), ("x", -2.0)),
    # Harmless ones: the verdict is still there.
    "no_logprobs": lambda body, right: _content(body, right),
    "decorated": lambda body, right: _content(body, f"**Answer:** {right.lower()}.\n"),
    "thoughts": lambda body, right: _content(body, f"<think>\n{wrong(right)}?\n</think>\n\n{right}"),
    "parts": lambda body, right: _content(
        body, [{"type": "thinking", "thinking": [{"type": "text", "text": "?"}]}, {"type": "text", "text": right}]
    ),
    "quoted_token": lambda body, right: _tops(body, (f'"{right}', -0.1), (f'"{wrong(right)}', -3.0)),
    "no_tops": lambda body, right: _tops(body),
    "twice": lambda body, right: _tops(body, (right, -0.5), *[(wrong(right), -1.0)] * 3),
    "mad_logprobs": lambda body, right: _tops(body, (right, "x"), (wrong(right), 0.0)),
    "positive_logprobs": lambda body, right: _tops(body, (right, -3.0), (wrong(right), 7.0)),
    "huge_logprobs": lambda body, right: _tops(body, (right, -(10**400)), (wrong(right), -1.0)),
    "nan_logprobs": lambda body, right: _tops(body, (right, math.nan), (wrong(right), -1.0)),
    "lies_about_usage": lambda body, right: body | {"usage": {"prompt_tokens": -5, "completion_tokens": "many"}},
    "huge_usage": lambda body, right: body | {"usage": {"prompt_tokens": 10**400, "completion_tokens": 1}},
    "no_usage": lambda body, right: {key: value for key, value in body.items() if key != "usage"},
}  # fmt: skip
HARMLESS = list(BODIES)[list(BODIES).index("no_logprobs") :]
STATUSES = {name: int(name[-3:]) for name in ("429", "408", "409", "500", "503", "400", "filter_400", "401", "404")}
TEMPORARY = ["429", "408", "409", "500", "503", "slow", "drips", "reset", "breaks_off"]
FAULTS = [*TEMPORARY, *BODIES]
# Models that think first, and what becomes of a request to them.
THINKERS: dict[str, Callable[[dict], str | None]] = {
    "thinks_aloud": lambda request: "cut_thoughts" if request["max_tokens"] < 100 else "thoughts",
    "thinks_aside": lambda request: "cut_null" if request["max_tokens"] < 100 else None,
    "rambles": lambda request: "too_long" if request.get("max_tokens", 4096) < 100 else "pleas",
    "no_temperature": lambda request: "400" if "temperature" in request else None,
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "JudgeServer"

    def log_message(self, *args: object) -> None: ...

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = "\n".join(message["content"] for message in request["messages"])
        with self.server.lock:
            n = len(self.server.seen[question])
            fault = self.server.script(question, n) if self.server.script else None
            self.server.seen[question].append(fault)
            self.server.keys.add(self.headers["Authorization"])
            self.server.running += 1
            self.server.most_running = max(self.server.running, self.server.most_running)
        try:
            time.sleep(self.server.delay)
            self._answer(request, fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client did not wait, or was killed
        finally:
            with self.server.lock:
                self.server.running -= 1

    def _answer(self, request: dict, fault: str | None) -> None:
        prompt = next(m["content"] for m in request["messages"] if m["role"] == "user")
        letter = better(prompt)
        fault = THINKERS[fault](request) if fault in THINKERS else fault
        body: object = answer(letter, bool(request.get("logprobs")))
        if fault in STATUSES:
            said = "content_filter" if fault == "filter_400" else f"{self.headers.get('Authorization')} says {fault}"
            body = {"error": {"message": said, "type": "server", "code": said}}
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if fault == "slow":
            time.sleep(SLOW)
        if fault in BODIES:
            body = BODIES[fault](body, letter)  # type: ignore[arg-type]
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(STATUSES.get(fault or "", 200))
        self.send_header("Content-Type", "text/html" if fault == "html" else "application/json")
        self.send_header("Content-Length", str(len(content)))
        if fault == "429":
            self.send_header("Retry-After", self.server.retry_after)
        self.end_headers()
        if fault == "breaks_off":
            content, self.close_connection = content[: len(content) // 2], True
        if fault == "drips":  # the whole answer, a byte at a time
            for byte in content:
                self.wfile.write(bytes([byte]))
                time.sleep(2 * SLOW / len(content))
            return
        self.wfile.write(content)


class JudgeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, script: Script | None = None, delay: float = 0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.delay, self.retry_after = script, delay, "0"
        self.lock = threading.Lock()
        self.seen: defaultdict[str, list[str | None]] = defaultdict(list)
        """the faults with which each question was answered, in order; None: none."""
        self.keys: set[str] = set()
        self.running = self.most_running = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def requests(self) -> int:
        return sum(map(len, self.seen.values()))

    def handle_error(self, request: object, client_address: object) -> None: ...


@contextmanager
def serving(script: Script | None = None, delay: float = 0.0) -> Iterator[JudgeServer]:
    server = JudgeServer(script, delay)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
