"""Questions of a protocol of its own: asked once each, kept at once, and failures asked again."""

import math
from pathlib import Path

import pytest
from scripted_endpoint import Endpoint, serving

from dpo.evals.ask import ask
from dpo.judge.endpoint import EndpointJudge
from dpo.judge.retry import Limits
from dpo.judge.store import Store

TEXT = {"temperature": 0.0, "max_tokens": 8}
LOGPROBS = {"temperature": 1.0, "max_tokens": 1, "logprobs": True, "top_logprobs": 5}


def judge_of(server: Endpoint, max_requests: int | None = None) -> EndpointJudge:
    limits = Limits(max_requests=max_requests, max_cost=None, price_prompt=0.0, price_completion=0.0)
    return EndpointJudge(
        model="m", base_url=server.url, api_key=None, seed=0, store=Store(None), limits=limits, concurrency=1,
        timeout=30.0, logprobs=None,
    )  # fmt: skip


def questions(*texts: str) -> dict:
    return {str(i): [{"role": "user", "content": text}] for i, text in enumerate(texts)}


def said(server: Endpoint) -> list[str]:
    return [request["messages"][0]["content"] for request in server.asked]


def test_a_run_that_stopped_asks_the_rest(tmp_path: Path):
    with serving(lambda messages: f"to {messages[0]['content']}") as server:
        with pytest.raises(ValueError, match="judge_max_requests=2 is reached, after 2 of 3 questions"):
            ask(judge_of(server, max_requests=2), questions("a", "b", "c"), TEXT, tmp_path / "r")
        replies = ask(judge_of(server), questions("a", "b", "c"), TEXT, tmp_path / "r")
        assert said(server) == ["a", "b", "c"]
    assert [replies[id].text for id in "012"] == ["to a", "to b", "to c"]


def test_equal_questions_are_asked_once(tmp_path: Path):
    with serving(lambda _: "yes") as server:
        ask(judge_of(server), questions("a", "a"), TEXT, tmp_path / "r")
        assert said(server) == ["a"]


def test_no_text_is_asked_for_once_more_and_never_kept(tmp_path: Path):
    answers = ["", "", "", "there"]
    with serving(lambda _: answers[len(server.asked) - 1]) as server:
        first = ask(judge_of(server), questions("a"), TEXT, tmp_path / "r")["0"]
        assert (first.outcome, first.answered, first.text) == ("malformed", False, "")
        second = ask(judge_of(server), questions("a"), TEXT, tmp_path / "r")["0"]
        assert (second.outcome, second.answered, second.text, second.reason) == ("reasked", True, "there", "")


@pytest.mark.parametrize("said", ["m", {"m": -math.inf}, {"m": math.nan}, {"m": 3.0}])
def test_log_probabilities_that_cannot_be_ones_are_none(tmp_path: Path, said):
    with serving(lambda _: said) as server:
        reply = ask(judge_of(server), questions("a"), LOGPROBS, tmp_path / "r")["0"]
    assert (reply.outcome, reply.logps) == ("malformed", None) and "log-probabilities" in reply.reason


def test_half_a_surrogate_pair_is_sent_as_a_question_mark(tmp_path: Path):
    with serving(lambda _: "yes") as server:
        ask(judge_of(server), questions("a\ud800"), TEXT, tmp_path / "r")
        assert said(server) == ["a?"]


def test_other_questions_are_not_taken_for_these(tmp_path: Path):
    with serving(lambda _: "yes") as server:
        ask(judge_of(server), questions("a"), TEXT, tmp_path / "r")
        with pytest.raises(ValueError, match="holds rows of questions_sha256="):
            ask(judge_of(server), questions("b"), TEXT, tmp_path / "r")
