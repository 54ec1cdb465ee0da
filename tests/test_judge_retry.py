"""Backoff by its formula on a clock of its own, and limits that hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.judge.retry import BASE, CAP, FAILURES_IN_A_ROW, TRIES, Backoff, GaveUp, Limits, Stopped, Temporary


class Clock:
    def __init__(self) -> None:
        self.now, self.waits = 0.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def backoff(self, deadline: float = 1e9, share: float = 1.0) -> Backoff:
        """Every draw lies at this share of its range."""
        return Backoff(
            deadline=deadline, sleep=self.sleep, clock=lambda: self.now, uniform=lambda a, b: a + share * (b - a)
        )


def failing(times: int, retry_after: float = 0.0, took: float = 0.0, clock: Clock | None = None):
    calls = []

    def send() -> str:
        calls.append(1)
        if clock:
            clock.now += took
        if len(calls) <= times:
            raise Temporary("status 500", retry_after)
        return "here"

    return send


def test_waits_double_up_to_the_cap():
    clock = Clock()
    assert clock.backoff()(failing(7)) == ("here", 8)
    assert clock.waits == [1, 2, 4, 8, 16, 32, 60] and (BASE, CAP, TRIES) == (1, 60, 8)


def test_jitter_is_full():
    clock = Clock()
    clock.backoff(share=0.0)(failing(3))
    assert clock.waits == [0, 0, 0]


def test_the_server_may_ask_for_more_and_not_for_less():
    clock = Clock()
    clock.backoff()(failing(3, retry_after=3.0))
    assert clock.waits == [3, 3, 4]


def test_after_all_tries_it_gives_up_without_a_last_wait():
    clock = Clock()
    with pytest.raises(GaveUp, match="status 500") as caught:
        clock.backoff()(failing(99))
    assert caught.value.attempts == TRIES and len(clock.waits) == TRIES - 1


@given(st.floats(0, 300), st.floats(0, 100), st.floats(0, 1), st.floats(0, 100))
def test_no_wait_ends_after_the_deadline(deadline, retry_after, share, took):
    clock = Clock()
    with pytest.raises(GaveUp):
        clock.backoff(deadline, share)(failing(99, retry_after, took, clock))
    assert sum(clock.waits) <= deadline and clock.now <= deadline + took


def test_what_is_not_temporary_is_raised_at_once():
    def send() -> str:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Clock().backoff()(send)


# --- limits ---


def limits(**more) -> Limits:
    return Limits(**({"max_requests": None, "max_cost": None, "price_prompt": 2e6, "price_completion": 3e6} | more))


def test_prices_are_per_million_tokens():
    assert limits(price_prompt=2.5, price_completion=10.0).cost_of(1000, 100) == pytest.approx(0.0035)


def test_requests_are_counted_to_the_last():
    spending = limits(max_requests=2)
    spending.begin(0.0)
    spending.begin(0.0)
    with pytest.raises(Stopped, match="judge_max_requests=2 is reached"):
        spending.begin(0.0)


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 1))))
def test_cost_never_passes_the_limit_as_long_as_bounds_are_bounds(requests):
    """Half of the requests are still running when the next is begun."""
    spending = limits(max_cost=10.0)
    running: list[tuple[float, float]] = []
    for bound, share in requests:
        try:
            spending.begin(bound)
        except Stopped:
            continue
        running.append((bound, share * bound))
        if len(running) % 2:
            spending.end(*running.pop(0), failure="")
        assert spending.cost <= 10.0 + 1e-9
    for one in running:
        spending.end(*one, failure="")
    assert spending.cost <= 10.0 + 1e-9 and spending.reserved == pytest.approx(0, abs=1e-9)


def test_what_is_in_flight_counts_with_its_bound():
    spending = limits(max_cost=10.0)
    spending.begin(6.0)
    with pytest.raises(Stopped, match="judge_max_cost=10 would be passed, with 0 spent"):
        spending.begin(6.0)
    spending.end(6.0, 1.0, failure="")
    spending.begin(6.0)


def test_requests_of_a_minute_come_evenly_and_a_pause_saves_up_none():
    """Three a minute: a turn every 20 s. Asked for at 0, 0, 0 and, 100 s after the last turn, at 140 and 145."""
    clock = Clock()
    turns = limits(requests_per_minute=3, clock=lambda: clock.now)
    assert [turns.begin(0.0) for _ in range(3)] == [0, 20, 40]
    clock.now = 140.0
    assert turns.begin(0.0) == 0
    clock.now = 145.0
    assert turns.begin(0.0) == 15


def test_without_a_limit_no_request_waits():
    spending = limits()
    assert [spending.begin(0.0) for _ in range(3)] == [0, 0, 0]


def test_failures_in_a_row_open_the_circuit_and_one_success_closes_it():
    spending = limits()
    for _ in range(FAILURES_IN_A_ROW - 1):
        spending.end(0.0, 0.0, failure="status 500")
    spending.end(0.0, 0.0, failure="")
    for _ in range(FAILURES_IN_A_ROW):
        spending.begin(0.0)
        spending.end(0.0, 0.0, failure="status 500")
    with pytest.raises(Stopped, match=f"{FAILURES_IN_A_ROW} requests failed in a row, the last with status 500"):
        spending.begin(0.0)
