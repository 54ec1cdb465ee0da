"""The endpoint judge against a server that fails in every way: judged right or counted, and nothing asked twice."""

import json
import math
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from judge_server import BODIES, FAULTS, HARMLESS, SLOW, TEMPORARY, JudgeServer, pair, right, serving

from dpo.judge.endpoint import OPENAI, REASONING, THINKING, Answer, EndpointJudge, _retry_after
from dpo.judge.retry import FAILURES_IN_A_ROW, TRIES, Backoff, Limits
from dpo.judge.store import Store
from dpo.judge.verdict import Judged, Pair, Verdict, count_outcomes

ROOT = Path(__file__).parent.parent
KEY = "sk-very-secret"


class NoWaiting:
    """A clock that waits pass at once."""

    def __init__(self) -> None:
        self.now, self.waits = 0.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def backoff(self, deadline: float = 1e9) -> Backoff:
        return Backoff(deadline=deadline, sleep=self.sleep, clock=lambda: self.now)


def limits(**more) -> Limits:
    return Limits(**({"max_requests": None, "max_cost": None, "price_prompt": 0.0, "price_completion": 0.0} | more))


def judge_of(server: JudgeServer, **more) -> EndpointJudge:
    settings = {
        "model": "m", "base_url": server.url, "api_key": KEY, "seed": 0, "store": Store(None), "limits": limits(),
        "concurrency": 4, "timeout": 10.0, "logprobs": None, "backoff": NoWaiting().backoff(),
    }  # fmt: skip
    return EndpointJudge(**(settings | more))


def pairs(n: int, seed: int = 0) -> list[Pair]:
    rng = random.Random(seed)
    return [pair(i, *rng.sample(range(100), 2)) for i in range(n)]


def after_the_probe(*faults: str | None):
    """A script: these faults for the requests of each question in turn, the last for all that follow."""
    return lambda question, n: faults[min(n, len(faults) - 1)] if "[Response A" in question else None


def each_its_own(faults: list[str], and_then: str | None = "the same"):
    """A script: question i has fault i for good, or at first."""

    def script(question: str, n: int) -> str | None:
        number = re.search(r"Question (\d+)\?", question)
        return (faults[int(number[1])] if n == 0 or and_then == "the same" else and_then) if number else None

    return script


def test_a_pair_is_asked_in_both_orders_and_told_of_the_pair():
    """p of the better one is 0.8 / (0.8 + 0.2) in both orders: "A" and " A" together against "B"."""
    with serving() as server:
        better, worse = judge_of(server)([pair(1, 9, 2), pair(2, 2, 9)])
    assert (better.verdict, worse.verdict) == (Verdict.FIRST, Verdict.SECOND)
    assert better.p == pytest.approx(0.8) and worse.p == pytest.approx(0.2)
    assert [order.tokens for order in better.orders] == [101, 101] and server.requests == 1 + 4


def test_equal_responses_tie_though_the_judge_likes_a():
    with serving() as server:
        (one,) = judge_of(server)([pair(1, 5, 5)])
    assert (one.verdict, one.p) == (Verdict.TIE, 0.5) and server.requests == 2  # the probe, and one question


def test_swapped_responses_give_the_mirrored_verdict_and_no_request():
    with serving() as server:
        judge = judge_of(server)
        (one,) = judge([pair(1, 9, 2)])
        asked = server.requests
        (other,) = judge([pair(1, 2, 9)])
    assert server.requests == asked and all(order.cached for order in other.orders)
    assert other.verdict is Verdict.SECOND and other.p == pytest.approx(1 - one.p)


@pytest.mark.parametrize("logprobs", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_body_that_is_broken_for_good_is_no_verdict_and_a_harmless_one_the_right_verdict(logprobs):
    with serving(each_its_own(list(BODIES))) as server:
        judged = judge_of(server, logprobs=logprobs)([pair(i, 9, 2) for i in range(len(BODIES))])
    for fault, one in zip(BODIES, judged, strict=True):
        harmless = fault in HARMLESS or (fault == "no_letter_in_tops" and not logprobs)
        refused = fault in ("filtered", "refusal", "refusal_field")
        assert one.verdict is (Verdict.FIRST if harmless else Verdict.INVALID), fault
        assert {order.outcome for order in one.orders} == {"ok" if harmless else "refused" if refused else "malformed"}
        # A broken answer is asked again once, a refusal is not.
        assert {order.attempts for order in one.orders} == {1 if harmless or refused else 2}
        assert bool(one.reason) != harmless


def test_a_letter_after_a_second_try_is_a_verdict_and_counted_as_such():
    with serving(lambda question, n: "pleas" if "single letter" not in question else None) as server:
        (one,) = judge_of(server)([pair(1, 9, 2)])
    assert (one.verdict, one.reason) == (Verdict.FIRST, "") and count_outcomes([one])["reasked"] == 2
    assert {(order.attempts, order.reason) for order in one.orders} == {(2, "")}


def test_what_may_pass_is_tried_again():
    with serving(each_its_own(TEMPORARY, None)) as server:
        judged = judge_of(server, timeout=SLOW / 2)([pair(i, 9, 2) for i in range(len(TEMPORARY))])
    assert {one.verdict for one in judged} == {Verdict.FIRST}
    assert {order.attempts for one in judged for order in one.orders} == {2}


def test_what_lasts_is_an_http_error():
    """One after the other, with a good answer between, or the circuit would open."""
    lasting = ["503", "reset"]
    with serving(each_its_own([fault for name in lasting for fault in (name, "decorated")])) as server:
        judged = judge_of(server, concurrency=1)([pair(i, 9, 2) for i in range(2 * len(lasting))])
    for one in judged[::2]:
        assert one.verdict is Verdict.INVALID and count_outcomes([one])["http_error"] == 2
        assert {order.attempts for order in one.orders} == {TRIES}


def test_a_server_that_is_not_there_is_named_with_the_reason():
    with serving() as server:
        gone = judge_of(server)
    with pytest.raises(
        ValueError, match=r"127\.0\.0\.1:\d+ did not answer \(ConnectError: .*; start again with judge_c"
    ):
        gone(pairs(1))


def test_retry_after_is_waited_for():
    clock = NoWaiting()
    with serving(after_the_probe("429", None)) as server:
        server.retry_after = "37"
        judge_of(server, backoff=clock.backoff())([pair(1, 9, 2)])
    assert clock.waits == [37, 37]


@pytest.mark.parametrize(("header", "seconds"), [("7", 7), ("-3", 0), ("nan", 0), ("soon", 0), (None, 0), ("inf", 0)])
def test_retry_after_in_seconds(header, seconds):
    assert _retry_after(header) == seconds


def test_retry_after_as_a_date():
    assert 50 < _retry_after(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))) <= 60


def test_a_400_is_not_tried_again_and_of_a_content_filter_is_a_refusal():
    with serving(each_its_own(["400", "filter_400"])) as server:
        error, refusal = judge_of(server)([pair(0, 9, 2), pair(1, 9, 2)])
    assert server.requests == 1 + 4 and error.verdict is refusal.verdict is Verdict.INVALID
    assert count_outcomes([error])["http_error"] == count_outcomes([refusal])["refused"] == 2


@pytest.mark.parametrize("fault", ["401", "404"])
def test_what_no_other_question_would_mend_stops_the_run_and_shows_no_key(fault):
    with serving(lambda key, n: fault) as server:
        with pytest.raises(ValueError, match=f"status {fault}.*start again") as caught:
            judge_of(server, concurrency=1)(pairs(20))
        assert server.requests == 1 and KEY not in str(caught.value) and "***" in str(caught.value)


def test_a_dead_server_opens_the_circuit():
    with serving(after_the_probe("500")) as server:
        with pytest.raises(ValueError, match=r"3[0-3] requests failed in a row, the last with status 500"):
            judge_of(server)(pairs(100))
        assert server.requests <= 1 + FAILURES_IN_A_ROW + 3  # three more in flight, which may be counted


def test_no_more_requests_run_at_a_time_than_allowed():
    with serving(delay=0.05) as server:
        judge_of(server, concurrency=3)(pairs(12))
        assert 1 < server.most_running <= 3


# --- limits, and going on ---


def test_max_requests_is_never_passed_and_the_next_start_goes_on(tmp_path):
    store, asked = Store(str(tmp_path / "cache")), pairs(10)
    with serving() as server:
        for start in range(1, 4):
            with pytest.raises(
                ValueError, match=r"judge_max_requests=6 is reached, after \d of 10 pairs; start again, and"
            ):
                judge_of(server, store=store, limits=limits(max_requests=6))(asked)
            assert server.requests == 6 * start
        judged = judge_of(server, store=store)(asked)
        assert server.requests == 1 + 20 and max(map(len, server.seen.values())) == 1
    assert [one.verdict for one in judged] == [right(one) for one in asked]


def test_every_request_waits_for_its_turn():
    """Seven, the probe and two failures among them, at two a minute."""
    clock = NoWaiting()
    spending = limits(requests_per_minute=2, clock=lambda: clock.now)
    with serving(after_the_probe("429", None)) as server:
        judge_of(server, limits=spending, concurrency=1, backoff=clock.backoff())(pairs(2))
    assert server.requests == 1 + 2 * 4 and clock.now == pytest.approx(30 * 8)


@pytest.mark.parametrize("fault", [None, "lies_about_usage", "no_usage"])
def test_max_cost_is_never_passed_whatever_is_said_of_usage(fault):
    """At 1 per token and 101 tokens an answer; where usage is a lie, the bound counts: more than a token a byte."""
    spending = limits(max_cost=3000.0, price_prompt=1e6, price_completion=1e6)
    with serving(lambda key, n: fault) as server:
        with pytest.raises(ValueError, match=r"judge_max_cost=3000 would be passed, with \d+ spent"):
            judge_of(server, limits=spending, concurrency=2)(pairs(100))
        assert spending.cost <= 3000 and 1 < server.requests <= 3000 / 101
        assert fault or spending.cost == 101 * server.requests


def test_only_answers_and_refusals_are_kept():
    faults = ["decorated", "refusal", "html", "breaks_off", "400"]
    store, asked = Store(None), [pair(i, 9, 2) for i in range(len(faults))]
    with serving(each_its_own(faults)) as server:
        judge_of(server, store=store)(asked)
        again = judge_of(server, store=store)(asked)
    assert [all(order.cached for order in one.orders) for one in again] == [True, True, False, False, False]


@pytest.mark.parametrize("change", [{"model": "other"}, {"seed": 1}, {"logprobs": False}])
def test_another_judge_is_asked_anew(change):
    store = Store(None)
    with serving() as server:
        judge_of(server, store=store)([pair(1, 9, 2)])
        before = server.requests
        judge_of(server, store=store, **change)([pair(1, 9, 2)])
        assert server.requests >= before + 2


def test_the_key_is_sent_and_never_kept(tmp_path):
    """Not even where the server repeats it."""
    with serving(after_the_probe("400", None)) as server:
        judge_of(server, store=Store(str(tmp_path / "cache")))(pairs(3))
        assert server.keys == {f"Bearer {KEY}"}
    for file in tmp_path.iterdir():
        assert KEY.encode() not in file.read_bytes()


KILLED = """
import sys
from judge_server import pair
from test_judge_endpoint import judge_of, pairs
from dpo.judge.store import Store
class Server: url = sys.argv[1]
judge_of(Server, store=Store(sys.argv[2]))(pairs(int(sys.argv[3])))
"""


def judged_by_a_process(server: JudgeServer, cache: Path, n: int) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, server.url, str(cache), str(n)], env=os.environ | {"PYTHONPATH": path}
    )


@pytest.mark.slow
def test_what_was_answered_before_kill_9_is_never_asked_again(tmp_path):
    """What the file holds when the process is dead is exactly what the next start does not ask."""
    cache, n = tmp_path / "cache", 30
    with serving(delay=0.02) as server:
        process = judged_by_a_process(server, cache, n)
        while server.requests < n:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.1)
        asked = server.requests
        ((kept,),) = sqlite3.connect(cache).execute("SELECT count(*) FROM answers")
        assert asked - 4 <= kept <= asked < 2 * n + 1
        judged = judge_of(server, store=Store(str(cache)))(pairs(n))
        assert server.requests == asked + (2 * n + 1 - kept)
    assert [one.verdict for one in judged] == [right(one) for one in pairs(n)]


# --- chaos ---


def chaos(server: JudgeServer, asked: list[Pair], **more) -> list[Judged]:
    judged = judge_of(server, **more)(asked)
    assert len(judged) == len(asked)
    for one, judgement in zip(asked, judged, strict=True):
        assert judgement.verdict in (right(one), Verdict.INVALID), (one, judgement)
    counts = count_outcomes(judged)
    assert sum(counts.values()) == 2 * len(asked)
    assert (judgement.verdict is Verdict.INVALID) == any(order.verdict is Verdict.INVALID for order in judgement.orders)
    return judged


def faulty(seed: int, share: float, faults: list[str]):
    def script(question: str, n: int) -> str | None:
        rng = random.Random(f"{seed} {question} {n}")
        return rng.choice(faults) if rng.random() < share else None

    return script


@pytest.mark.parametrize("logprobs", [None, pytest.param(False, marks=pytest.mark.slow)])
def test_in_chaos_every_pair_is_judged_right_or_counted_as_invalid(logprobs):
    faults = [fault for fault in FAULTS if fault not in ("slow", "drips")]
    with serving(faulty(3, 0.5, faults)) as server:
        judged = chaos(server, pairs(60), logprobs=logprobs, concurrency=8)
    assert 30 < sum(one.verdict is not Verdict.INVALID for one in judged) < 60


@pytest.mark.slow
def test_a_thousand_pairs_in_chaos_with_three_kills(tmp_path, capsys):
    cache, n = tmp_path / "cache", int(os.environ.get("DPO_CHAOS", "200"))
    start = time.monotonic()
    with serving(faulty(5, 0.4, FAULTS), delay=0.002) as server:
        for kill in range(1, 4):
            process = judged_by_a_process(server, cache, n)
            while server.requests < kill * n // 2:
                assert process.poll() is None
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(1)
        ((kept,),) = sqlite3.connect(cache).execute("SELECT count(*) FROM answers")
        judged = chaos(server, pairs(n), store=Store(str(cache)), concurrency=16, timeout=SLOW / 2)
        # A question whose answer was on its way at a kill may be asked once more: 4 at a time, 3 kills.
        good = Counter(sum(fault is None for fault in faults) for faults in server.seen.values())
        assert sum(count for times, count in good.items() if times > 1) <= 3 * 4
    invalid = sum(one.verdict is Verdict.INVALID for one in judged)
    assert invalid < n / 2
    with capsys.disabled():
        print(
            f"\n{n} pairs, {server.requests} requests, {time.monotonic() - start:.0f} s; {kept} answers kept at the "
            f"last kill; {n - invalid} judged, all right; {invalid} invalid; {count_outcomes(judged)}"
        )


# --- before the first request ---


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://host/v1", "ftp://host"),
        ("http://me:secret@host/v1", "no name or password"),
        ("x", "http"),
        ("http://host:99999/v1", "judge_base_url: its host or port"),
        ("http://me:secret/x@host/v1", "judge_base_url: its host or port"),
        ("http://[::1/v1", "judge_base_url: its host or port"),
    ],
)
def test_a_url_that_is_none_or_holds_a_password_is_refused(url, says):
    with pytest.raises(ValueError, match=says) as caught:
        judge_of(type("Server", (), {"url": url}))
    assert "secret" not in str(caught.value)


def test_openai_itself_needs_a_key():
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        judge_of(type("Server", (), {"url": None}), api_key=None)
    assert str(judge_of(type("Server", (), {"url": None})).client.base_url).rstrip("/") == OPENAI


def test_a_key_that_no_header_can_hold_is_refused_and_not_shown():
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds a character that no key has") as caught:
        judge_of(type("Server", (), {"url": "http://host/v1"}), api_key="“sk-secret”")
    assert "sk-secret" not in str(caught.value)


def test_without_the_client_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r'pip install -e ".\[judge\]"'):
        judge_of(type("Server", (), {"url": "http://host/v1"}))


def test_the_way_of_asking_is_found_out_once_and_logprobs_can_be_insisted_on():
    store = Store(None)
    with serving(lambda key, n: "no_logprobs") as server:
        judge_of(server, store=store)([pair(1, 9, 2)])
        judge_of(server, store=store)([pair(2, 9, 2)])
        assert server.requests == 1 + 4
        with pytest.raises(ValueError, match=r"judge_logprobs=true: 127.0.0.1:.* gives none for m"):
            judge_of(server, logprobs=True)([pair(1, 9, 2)])


@pytest.mark.parametrize(
    ("model", "way"), [("thinks_aloud", THINKING), ("thinks_aside", THINKING), ("no_temperature", REASONING)]
)
def test_a_model_that_thinks_has_room_for_it(model, way):
    with serving(lambda question, n: model) as server:
        judge = judge_of(server)
        (one,) = judge([pair(1, 9, 2)])
    assert judge.settings == way and (one.verdict, one.p) == (Verdict.FIRST, None)
    assert count_outcomes([one])["ok"] == 2


@pytest.mark.parametrize("model", ["cut_thoughts", "rambles"])
def test_a_model_that_only_rambles_gets_no_room_for_it(model):
    """Four ways are tried; then both orders are asked about in the shortest, and each once more."""
    with serving(lambda question, n: model) as server:
        judge = judge_of(server)
        (one,) = judge([pair(1, 9, 2)])
        assert judge.settings["max_tokens"] == 16 and server.requests == 4 + 4
    assert one.verdict is Verdict.INVALID and count_outcomes([one])["malformed"] == 2


@pytest.mark.parametrize(("fault", "says"), [("400", "status 400"), ("cut_null", "cut off before its letter")])
def test_an_endpoint_that_fails_every_way_of_asking_is_named(fault, says):
    with (
        serving(lambda key, n: fault) as server,
        pytest.raises(ValueError, match=rf"judge_model=m: .* fails every way of asking \(.*{says}"),
    ):
        judge_of(server)([pair(1, 9, 2)])
    assert server.requests == 4


def test_p_is_read_where_the_letter_stands_and_a_quoted_letter_is_one():
    """After thoughts that name a letter, 0.6 / (0.6 + 0.2) of the token "A with its quotation mark."""
    places = [[(" a", -0.1), (" b", -9.0)], [("</think>", -0.1)], [('"A', math.log(0.6)), ("B", math.log(0.2))]]
    content = [
        {"token": tops[0][0], "top_logprobs": [{"token": token, "logprob": logp} for token, logp in tops]}
        for tops in places
    ]
    body = {"choices": [{"message": {"content": "A"}, "logprobs": {"content": content}}]}
    assert Answer(json.dumps(body)).p_a() == pytest.approx(0.75)


def test_an_unreadable_probe_decides_nothing():
    with serving(lambda key, n: "html") as server, pytest.raises(ValueError, match="five answers that cannot be read"):
        judge_of(server)([pair(1, 9, 2)])


def test_an_unreadable_probe_is_sent_again():
    with serving(lambda question, n: "html" if "[Response A" not in question and n < 3 else None) as server:
        (one,) = judge_of(server)([pair(1, 9, 2)])
    assert one.verdict is Verdict.FIRST and one.p == pytest.approx(0.8) and server.requests == 4 + 2


def test_once_a_run_is_stopped_nothing_is_asked_anew():
    """Pair 0 is judged at once, while the first order of pair 1 is on its way; its second order is not begun."""

    def stop(pair: Pair, one: Judged) -> None:
        raise KeyboardInterrupt

    with serving(each_its_own(["decorated", "slow"])) as server:
        with pytest.raises(KeyboardInterrupt):
            judge_of(server)([pair(0, 9, 2), pair(1, 9, 2)], stop)
        assert server.requests == 1 + 2 + 1


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_in_flight():
    store = Store(None)
    with serving(delay=0.02) as server:
        judge = judge_of(server, store=store)

        def stop(pair: Pair, one: Judged) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            judge(pairs(50), stop)
        asked = server.requests
        assert asked < 50 and not any(thread.name.startswith("judge") for thread in threading.enumerate())
        judge_of(server, store=store)(pairs(50))
        assert server.requests == 101
