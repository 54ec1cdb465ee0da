"""A judge behind an OpenAI-compatible endpoint: OpenAI, vLLM, llama.cpp's server and others, by the official client.

The client's own retries are off; dpo.judge.retry does them. An answer is read from the raw JSON: the letter by
dpo.judge.prompt, and where the endpoint gives log-probabilities, of the letter's token

    p(A) = P(A) / (P(A) + P(B))      P(A): the sum over the likeliest tokens that are read as A: "A", " A", "a", ...

Whether it does, and whether it thinks before it answers, is found out once. No failure ever becomes a verdict.
Questions of another protocol go by chat(), with the same cache, retries and limits.
"""

import asyncio
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dpo.judge.prompt import PROMPT_SHA256, ask_again, is_refusal, judge_messages, read_letter
from dpo.judge.retry import Backoff, GaveUp, Limits, Stopped, Temporary
from dpo.judge.store import Exchange, Store, key_of
from dpo.judge.verdict import Judged, OnDone, Order, Pair, Verdict, decide, ignore, of_letter
from models.template import Message

OPENAI = "https://api.openai.com/v1"
RETRIED = (408, 409, 429)  # and every 5xx
FATAL = (401, 403, 404)  # no other question would fare better
# Ways to ask, the best first: who thinks aloud needs room for it, and OpenAI's reasoning models have no temperature.
WITH_LOGPROBS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 16, "logprobs": True, "top_logprobs": 5}
AS_TEXT: dict[str, Any] = {"temperature": 0.0, "max_tokens": 16}
THINKING: dict[str, Any] = {"temperature": 0.0, "max_tokens": 4096}
REASONING: dict[str, Any] = {"max_completion_tokens": 4096}
PROBE: list[Message] = [{"role": "user", "content": "Reply with the single letter A."}]
# Requests for one question last at most this many times one request's time limit.
DEADLINE = 10
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Reply:
    """What the endpoint said to a conversation that is no pair."""

    text: str
    logps: dict[str, float] | None
    """of the likeliest first tokens, where they were asked for and can be read."""
    outcome: str
    """one of dpo.judge.verdict.OUTCOMES: the text is to be read after ok and reasked alone."""
    reason: str = ""

    @property
    def answered(self) -> bool:
        return self.outcome in ("ok", "reasked")


class Refused(Exception):
    """The endpoint said no to this one request, and would say it again."""

    def __init__(self, reason: str, status: int, filtered: bool):
        super().__init__(reason)
        self.status, self.filtered = status, filtered


class EndpointJudge:
    prompt_sha256 = PROMPT_SHA256

    def __init__(
        self, *, model: str, base_url: str | None, api_key: str | None, seed: int, store: Store, limits: Limits,
        concurrency: int, timeout: float, logprobs: bool | None, backoff: Backoff | None = None,
    ):  # fmt: skip
        """logprobs None: if the endpoint has them. api_key None: it wants none."""
        try:
            import openai
        except ImportError:
            raise ValueError('judge=openai: the client is not installed; pip install -e ".[judge]"') from None
        try:
            url = urlsplit(base_url or OPENAI)
            port = url.port
        except ValueError:  # whose message may repeat a part of a password
            raise ValueError("judge_base_url: its host or port is none; expected http(s)://HOST[:PORT]/v1") from None
        if url.scheme not in ("http", "https") or not url.hostname or url.username or url.password:
            raise ValueError(
                f"judge_base_url={url.scheme}://{url.hostname}: expected http(s)://HOST[:PORT]/v1, and no name or "
                "password, which would be kept; the key is read from OPENAI_API_KEY"
            )
        if not api_key and base_url is None:
            raise ValueError("judge=openai: OPENAI_API_KEY is not set; export it, or name another judge_base_url")
        self.errors = openai
        self.key = (api_key or "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise ValueError("OPENAI_API_KEY holds a character that no key has; export the key alone")
        self.client = openai.AsyncOpenAI(
            api_key=self.key or "none", base_url=base_url or OPENAI, max_retries=0, timeout=timeout
        )
        # A loop of its own: there a request can be ended as a whole. The client's timeout begins anew with every byte.
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.model, self.name = model, f"openai:{model}"
        self.host = url.hostname + (f":{port}" if port else "")
        self.seed, self.store, self.limits, self.concurrency = seed, store, limits, concurrency
        self.timeout, self.logprobs = timeout, logprobs
        self.stopping = threading.Event()
        self.backoff = backoff or Backoff(deadline=DEADLINE * timeout, sleep=self._wait)
        self.settings: dict[str, Any] | None = None

    def __call__(self, pairs: Sequence[Pair], on_done: OnDone = ignore) -> list[Judged]:
        """Raises ValueError where the run has to stop; started again, it asks only what was not answered."""
        return self._each(pairs, self._judge, on_done, "pairs", first=self._set_settings)

    def chat(
        self, conversations: Sequence[Sequence[Message]], settings: Mapping[str, Any],
        on_done: Callable[[int, Reply], None] = lambda i, reply: None,
    ) -> list[Reply]:  # fmt: skip
        """A reply to each conversation, asked with these settings, for protocols with prompts of their own.

        on_done hears of each with its place. What has no text, or log-probabilities that the settings ask for and that
        cannot be read, is asked for once more. Raises as __call__ does.
        """
        places = range(len(conversations))
        return self._each(places, lambda i: self._reply(conversations[i], settings), on_done, "questions")

    def require_logprobs(self) -> None:
        """ValueError where the endpoint gives no log-probabilities: asked once, and kept."""
        self.logprobs = True
        self._each([None], lambda _: self._set_settings(), lambda *_: None, "probes")

    def _each(
        self, items: Sequence[Item], work: Callable[[Item], Made], on_done: Callable[[Item, Made], None], what: str,
        first: Callable[[], None] = lambda: None,
    ) -> list[Made]:  # fmt: skip
        """What work makes of each item, `concurrency` at a time; first: done before them."""
        results: dict[int, Made] = {}
        self.stopping.clear()
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge") as pool:
            try:
                first()
                futures = {pool.submit(work, item): i for i, item in enumerate(items)}
                for future in as_completed(futures):
                    i = futures.pop(future)
                    results[i] = future.result()
                    on_done(items[i], results[i])
            except BaseException as error:
                # What is in flight is paid for: it is waited for and kept.
                self.stopping.set()
                pool.shutdown(cancel_futures=True)
                if isinstance(error, Stopped):
                    raise ValueError(
                        f"{self.name}: {error}, after {len(results)} of {len(items)} {what}; {self._way_on()}"
                    ) from None
                raise
        return [results[i] for i in range(len(items))]

    def _set_settings(self) -> None:
        self.settings = self.settings or self._choose_settings()

    def _way_on(self) -> str:
        if self.store.path:
            return "start again, and what was answered is not asked again"
        return "start again with judge_cache, which keeps what is answered"

    def _wait(self, seconds: float) -> None:
        if self.stopping.wait(seconds):
            raise Stopped("the run is being stopped")

    # --- one pair ---

    def _judge(self, pair: Pair) -> Judged:
        return decide((self._order(pair, True), self._order(pair, False)))

    def _order(self, pair: Pair, first_is_a: bool) -> Order:
        messages = judge_messages(pair, first_is_a=first_is_a, seed=self.seed)
        exchange, cached = self.store.once(self._key(messages), lambda: self._ask(messages))
        letter, p_a = exchange["letter"], exchange["p_a"]
        p = p_a if p_a is None or first_is_a else 1 - p_a
        verdict = of_letter(letter, first_is_a) if letter else Verdict.INVALID
        return Order(
            verdict, p, exchange["text"], exchange["tokens"], cached, exchange["attempts"], exchange["outcome"],
            exchange["reason"],
        )  # fmt: skip

    def _key(self, messages: Sequence[Message]) -> str:
        return key_of(
            kind="openai", model=self.model, host=self.host, prompt=PROMPT_SHA256, messages=list(messages),
            settings=self.settings, seed=self.seed,
        )  # fmt: skip

    def _ask(self, messages: Sequence[Message]) -> Exchange:
        """One question, asked again once where the answer is no letter."""
        exchange: Exchange = {
            "letter": None, "p_a": None, "text": "", "tokens": 0, "attempts": 0, "outcome": "malformed", "reason": "",
            "responses": [],
        }  # fmt: skip
        assert self.settings is not None
        question = messages
        for outcome in ("ok", "reasked"):
            try:
                body, attempts = self._send(question, self.settings)
            except GaveUp as error:
                exchange["attempts"] += error.attempts
                return exchange | {"outcome": "http_error", "reason": str(error)}
            except Refused as error:
                said = "refused" if error.filtered else "http_error"
                return exchange | {"outcome": said, "reason": str(error), "attempts": exchange["attempts"] + 1}
            exchange["attempts"] += attempts
            exchange["responses"].append(body)
            exchange["tokens"] += sum(_usage(body) or (0, 0))
            answer = Answer(body)
            exchange["text"] = answer.text or ""
            letter = read_letter(answer.text or "")
            if answer.refused or (letter is None and is_refusal(answer.text or "")):
                return exchange | {"outcome": "refused", "reason": f"the judge refused: {answer.text or ''!r:.60}"}
            p_a = answer.p_a() if letter and self.settings.get("logprobs") else None
            if letter and not (isinstance(p_a, float) and math.isnan(p_a)):
                # A letter is the likeliest token; the sum over its variants may say otherwise, and counts.
                letter = letter if p_a is None or p_a == 0.5 else "A" if p_a > 0.5 else "B"
                return exchange | {"outcome": outcome, "letter": letter, "p_a": p_a, "reason": ""}
            exchange["reason"] = f"no letter in {answer.text!r:.60}" if answer.text is not None else answer.problem
            question = ask_again(messages, answer.text or "")
        return exchange

    # --- one conversation ---

    def _reply(self, messages: Sequence[Message], settings: Mapping[str, Any]) -> Reply:
        key = key_of(
            kind="openai chat", model=self.model, host=self.host, messages=list(messages), settings=dict(settings)
        )
        exchange, _ = self.store.once(key, lambda: self._converse(messages, settings))
        return Reply(exchange["text"], exchange["logps"], exchange["outcome"], exchange["reason"])

    def _converse(self, messages: Sequence[Message], settings: Mapping[str, Any]) -> Exchange:
        exchange: Exchange = {"text": "", "logps": None, "outcome": "malformed", "reason": "", "responses": []}
        for outcome in ("ok", "reasked"):
            try:
                body, _ = self._send(messages, settings)
            except GaveUp as error:
                return exchange | {"outcome": "http_error", "reason": str(error)}
            except Refused as error:
                return exchange | {"outcome": "refused" if error.filtered else "http_error", "reason": str(error)}
            exchange["responses"].append(body)
            answer = Answer(body)
            logps = answer.first_logps() if settings.get("logprobs") else None
            if answer.refused:
                return exchange | {"outcome": "refused", "reason": f"the judge refused: {answer.text or ''!r:.60}"}
            if answer.text and (logps or not settings.get("logprobs")):
                return exchange | {"outcome": outcome, "text": answer.text, "logps": logps, "reason": ""}
            exchange["reason"] = "the answer has no log-probabilities" if answer.text else answer.problem
        return exchange

    # --- one request ---

    def _send(self, messages: Sequence[Message], settings: Mapping[str, Any]) -> tuple[str, int]:
        """(the body that came back with a status of success, requests it took)."""
        longest = settings.get("max_tokens") or settings["max_completion_tokens"]
        # A token is at least a byte, but for the few that mark the turns.
        asked = sum(len(m["content"].encode()) + 16 for m in messages) + 16
        bound = self.limits.cost_of(asked, longest)

        def send() -> str:
            self._wait(0.0)  # raises once the run is being stopped
            wait = self.limits.begin(bound)
            cost, failure = 0.0, ""
            try:
                if wait:
                    self.backoff.sleep(wait)
                body = self._request(messages, settings)
                usage = _usage(body)
                cost = self.limits.cost_of(*usage) if usage else bound
                return body
            except Temporary as error:
                cost, failure = (0.0 if error.answered else bound), str(error)
                raise
            except Refused as error:
                failure = "" if error.filtered else str(error)
                raise
            finally:
                self.limits.end(bound, cost, failure)

        return self.backoff(send)

    def _request(self, messages: Sequence[Message], settings: Mapping[str, Any]) -> str:
        create = self.client.chat.completions.with_raw_response.create
        sent: Any = list(messages)
        whole = asyncio.wait_for(create(model=self.model, messages=sent, **settings), self.timeout)
        try:
            return self._hide(asyncio.run_coroutine_threadsafe(whole, self.loop).result().http_response.text)
        except self.errors.APIStatusError as error:
            status, body = error.status_code, self._hide(str(error.response.text))
            reason = f"status {status}: {' '.join(body.split())[:200]}"
            if status in RETRIED or status >= 500:
                raise Temporary(reason, _retry_after(error.response.headers.get("retry-after"))) from None
            if status in FATAL:
                raise Stopped(f"{self.host} answered with {reason}") from None
            raise Refused(reason, status, filtered="content_filter" in body) from None
        except (self.errors.APITimeoutError, TimeoutError):
            raise Temporary("no answer within judge_timeout", answered=False) from None
        except (self.errors.APIError, OSError) as error:  # connections that fail, bodies that break off
            cause = error.__cause__ or error  # the client's own message is "Connection error."
            raise Temporary(self._hide(f"{type(cause).__name__}: {cause}"), answered=False) from None

    def _hide(self, text: str) -> str:
        """A text of the endpoint's without the key, which a proxy may well repeat."""
        # A word so short is no secret, and may well stand in an answer.
        return text.replace(self.key, "***") if len(self.key) >= 8 else text

    # --- how it is asked ---

    def _choose_settings(self) -> dict[str, Any]:
        """The best way to ask that the endpoint takes: found out once, and kept with the answers."""
        key = key_of(kind="openai settings", model=self.model, host=self.host, logprobs=self.logprobs)
        known, _ = self.store.once(key, self._probe)
        return known["settings"]

    def _probe(self) -> Exchange:
        ways = [WITH_LOGPROBS] if self.logprobs else [AS_TEXT, THINKING, REASONING]
        if self.logprobs is None:
            ways = [WITH_LOGPROBS, *ways]
        problems = []
        rambling = None  # the first way in which there was text, but no letter in time
        for settings in ways:
            try:
                answer = self._readable_answer(settings)
            except Refused as error:
                problems.append(str(error))
                continue
            except GaveUp as error:
                raise Stopped(f"{self.host} did not answer ({error})") from None
            if settings is WITH_LOGPROBS and answer.text is not None and not answer.positions:
                if self.logprobs:
                    raise ValueError(
                        f"judge_logprobs=true: {self.host} gives none for {self.model}; pass auto or false"
                    )
                settings = AS_TEXT
            if read_letter(answer.text or "") or not (answer.is_cut or rambling):
                return {"outcome": "ok", "settings": settings}
            problems.append("the answer is cut off before its letter")
            rambling = rambling or (settings if answer.text else None)
        # Room to think did not help: it is asked for little, and what it says is no verdict.
        if rambling:
            return {"outcome": "ok", "settings": rambling}
        raise ValueError(f"judge_model={self.model}: {self.host} fails every way of asking ({problems[-1]})")

    def _readable_answer(self, settings: Mapping[str, Any]) -> "Answer":
        # What cannot be read says nothing of the endpoint, and a wrong guess would change every key.
        for _ in range(5):
            body, _ = self._send(PROBE, settings)
            answer = Answer(body)
            if answer.text is not None or answer.is_cut:
                return answer
        raise Stopped(f"{self.host} gave five answers that cannot be read ({answer.problem})")


class Answer:
    """What a body says, however broken: every part is there or None, and nothing is guessed."""

    def __init__(self, body: str):
        self.text: str | None = None
        self.refused = self.is_cut = False
        self.positions: list[Any] = []
        self.problem = "the answer has no text"
        try:
            choice = json.loads(body)["choices"][0]
            message = choice["message"]
            self.refused = choice.get("finish_reason") == "content_filter" or bool(message.get("refusal"))
            self.is_cut = choice.get("finish_reason") == "length"
            content = message.get("content")
            if isinstance(content, list):  # parts, of which some may be thoughts
                content = "".join(part["text"] for part in content if part["type"] == "text")
            if isinstance(content, str):
                # Half a surrogate pair can stand in JSON and in no request.
                self.text = content.rsplit("</think>", 1)[-1].encode("utf-8", "replace").decode()
            positions = (choice.get("logprobs") or {}).get("content")
            self.positions = positions if isinstance(positions, list) else []
        except (ValueError, RecursionError):
            self.problem = f"the answer is no JSON: {body!r:.60}"
        except (LookupError, TypeError, AttributeError):
            self.problem = f"the answer has no choice with a message: {body!r:.60}"

    def p_a(self) -> float | None:
        """P(A) / (P(A) + P(B)) of the letter's token; None without log-probabilities, NaN where they hold no letter."""
        # The last, for thoughts may come before it.
        places = [p for p in self.positions if isinstance(p, dict) and read_letter(str(p.get("token")))]
        logps = _logps(places[-1]) if places else None
        if logps is None:
            return None
        a, b = (sum(math.exp(logp) for token, logp in logps.items() if read_letter(token) == letter) for letter in "AB")
        return a / (a + b) if a + b > 0 else math.nan

    def first_logps(self) -> dict[str, float] | None:
        """Log-probabilities of the likeliest first tokens; None where they are missing or cannot be ones."""
        return _logps(self.positions[0]) if self.positions else None


def _logps(position: Any) -> dict[str, float] | None:
    """Of the likeliest tokens there; None where they are missing or cannot be log-probabilities."""
    try:
        # A token that stands there twice counts once.
        logps = {str(top["token"]): float(top["logprob"]) for top in position["top_logprobs"]}
    except (LookupError, TypeError, ValueError, OverflowError):
        return None
    return logps if logps and all(-math.inf < logp <= 0.01 for logp in logps.values()) else None


def _usage(body: str) -> tuple[int, int] | None:
    """(prompt, completion) tokens, where an answer says how many in numbers that can be."""
    try:
        usage = json.loads(body)["usage"]
        counts = usage["prompt_tokens"], usage["completion_tokens"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return counts if all(type(n) is int and 0 <= n < 2**53 for n in counts) else None


def _retry_after(header: str | None) -> float:
    """Seconds, from a number of them or a date; 0 where it says neither."""
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(str(header)).timestamp() - time()
        except (ValueError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
