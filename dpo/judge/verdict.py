"""A judge's verdict on a pair of responses, and how two orders of showing them make one.

Judges favour a position, so every pair is asked about twice, each response once in first place. Verdicts are never
computed with: a failure code that takes part in `1 - rank` becomes somebody's win.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from models.template import Message


class Verdict(Enum):
    FIRST = "first"
    SECOND = "second"
    TIE = "tie"
    INVALID = "invalid"


MIRRORED = {
    Verdict.FIRST: Verdict.SECOND, Verdict.SECOND: Verdict.FIRST, Verdict.TIE: Verdict.TIE,
    Verdict.INVALID: Verdict.INVALID,
}  # fmt: skip
# What becomes of one question: a letter at once, a letter after it was asked again, the judge refused, it said no
# letter twice, or no request came through.
OUTCOMES = ("ok", "reasked", "refused", "malformed", "http_error")


@dataclass(frozen=True)
class Pair:
    id: str
    """stays the same from run to run."""
    messages: Sequence[Message]
    """the conversation up to the user turn that both responses answer."""
    first: str
    second: str


@dataclass(frozen=True)
class Order:
    """The answer to one order of showing a pair, told of the pair: FIRST is its first response, wherever it stood."""

    verdict: Verdict
    p: float | None
    """probability that the pair's first response is the better one, where the judge has probabilities."""
    raw: str
    """what the judge wrote last."""
    tokens: int
    """of prompt and answer."""
    cached: bool
    attempts: int
    """requests that it took, failed ones too."""
    outcome: str = "ok"
    """one of OUTCOMES."""
    reason: str = ""
    """why there is no verdict."""


@dataclass(frozen=True)
class Judged:
    verdict: Verdict
    p: float | None
    """probability that the pair's first response is the better one, the mean of both orders."""
    orders: tuple[Order, ...]
    """(first response shown first, second response shown first); empty for a judge that no order sways."""
    reason: str = ""
    """why the pair is invalid."""


OnDone = Callable[[Pair, Judged], None]


def ignore(pair: Pair, judged: Judged) -> None:
    """The OnDone of who waits for the whole list."""


class Judge(Protocol):
    @property
    def name(self) -> str:
        """kind and model, for results: openai:gpt-4."""

    @property
    def prompt_sha256(self) -> str | None:
        """of the prompt's wording; None where nothing is asked in words."""

    def __call__(self, pairs: Sequence[Pair], on_done: OnDone = ignore) -> list[Judged]:
        """A Judged for every pair, in order; on_done hears of each as soon as it is there."""


def decide(orders: tuple[Order, Order]) -> Judged:
    """One verdict of two: agreement wins, disagreement is a tie, and an invalid order makes the pair invalid."""
    one, other = (order.verdict for order in orders)
    if Verdict.INVALID in (one, other):
        return Judged(Verdict.INVALID, None, orders, "; ".join(dict.fromkeys(o.reason for o in orders if o.reason)))
    p = None if orders[0].p is None or orders[1].p is None else (orders[0].p + orders[1].p) / 2
    return Judged(one if one is other else Verdict.TIE, p, orders)


def of_letter(letter: str, first_is_a: bool) -> Verdict:
    """The verdict that a letter means."""
    return {("A", True): Verdict.FIRST, ("B", True): Verdict.SECOND,
            ("A", False): Verdict.SECOND, ("B", False): Verdict.FIRST}[letter, first_is_a]  # fmt: skip


def count_outcomes(judged: Iterable[Judged]) -> dict[str, int]:
    """How many questions came to each of OUTCOMES."""
    counts = Counter(order.outcome for one in judged for order in one.orders)
    return {outcome: counts[outcome] for outcome in OUTCOMES}
