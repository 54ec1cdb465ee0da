"""Trying again: exponential backoff with full jitter, the server's own Retry-After, and the limits of a whole run.

    wait before try n + 1 = max(Retry-After, uniform(0, min(CAP, BASE 2^n)))      n = 0, 1, ...

Full jitter spreads the clients that failed together (Brooker 2015, AWS Architecture Blog, "Exponential Backoff and
Jitter"). Of a run are limited: its requests, how many are begun in a minute, its cost, and how many may fail in a row.
"""

import math
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
TRIES, BASE, CAP = 8, 1.0, 60.0
FAILURES_IN_A_ROW = 30


class Temporary(Exception):
    """A request that may succeed when it is sent again.

    retry_after: seconds that the server asks to wait. answered False: nothing came back, so it may have cost something.
    """

    def __init__(self, reason: str, retry_after: float = 0.0, answered: bool = True):
        super().__init__(reason)
        self.retry_after, self.answered = retry_after, answered


class GaveUp(Exception):
    """A request that no try has brought through."""

    def __init__(self, reason: str, attempts: int):
        super().__init__(reason)
        self.attempts = attempts


class Stopped(ValueError):
    """The run ends here; what was answered is kept."""


class Backoff:
    """deadline: seconds of all tries and waits of one request. sleep: may return early, or raise to end it."""

    def __init__(
        self, *, deadline: float, sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic, uniform: Callable[[float, float], float] = random.uniform,
    ):  # fmt: skip
        self.deadline, self.sleep, self.clock, self.uniform = deadline, sleep, clock, uniform

    def __call__(self, send: Callable[[], T]) -> tuple[T, int]:
        """(what send gives, tries); GaveUp after TRIES, or where the next would come after the deadline."""
        end = self.clock() + self.deadline
        for n in range(TRIES):
            try:
                return send(), n + 1
            except Temporary as error:
                wait = max(error.retry_after, self.uniform(0.0, min(CAP, BASE * 2**n)))
                if n + 1 == TRIES or self.clock() + wait > end:
                    raise GaveUp(str(error), n + 1) from None
            self.sleep(wait)
        raise AssertionError("unreachable")


class Limits:
    """What a run may spend. The cost of a request is bounded before it is sent, so that the limit is never passed.

    Prices are per million tokens. Requests in flight count with their bounds: a run may stop a few of them early.
    """

    def __init__(
        self, *, max_requests: int | None, max_cost: float | None, price_prompt: float, price_completion: float,
        requests_per_minute: int | None = None, clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self.max_requests, self.max_cost = max_requests, max_cost
        self.gap, self.clock, self.next = 60 / requests_per_minute if requests_per_minute else 0.0, clock, -math.inf
        self.prices = (price_prompt / 1e6, price_completion / 1e6)
        self.requests, self.cost, self.reserved = 0, 0.0, 0.0
        self.failures: list[str] = []
        self.lock = threading.Lock()

    def cost_of(self, prompt_tokens: int, completion_tokens: int) -> float:
        return prompt_tokens * self.prices[0] + completion_tokens * self.prices[1]

    def begin(self, bound: float) -> float:
        """Before a request that costs at most `bound`: seconds until its turn. Stopped where it may not be sent."""
        with self.lock:
            if len(self.failures) >= FAILURES_IN_A_ROW:
                raise Stopped(f"{len(self.failures)} requests failed in a row, the last with {self.failures[-1]}")
            if self.max_requests is not None and self.requests >= self.max_requests:
                raise Stopped(f"judge_max_requests={self.max_requests} is reached")
            if self.max_cost is not None and self.cost + self.reserved + bound > self.max_cost:
                raise Stopped(f"judge_max_cost={self.max_cost:g} would be passed, with {self.cost:.4g} spent")
            self.requests += 1
            self.reserved += bound
            now = self.clock()
            turn = max(now, self.next)
            self.next = turn + self.gap
            return turn - now

    def end(self, bound: float, cost: float, failure: str) -> None:
        """After it; failure: why it failed, "" where it did not."""
        with self.lock:
            self.reserved -= bound
            self.cost += cost
            self.failures = [*self.failures, failure] if failure else []
