"""MT-Bench: two turns, grades and games read as published but for its two parsing bugs; failures are never numbers."""

import json
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from scripted_endpoint import serving

import eval  # noqa: F401  (registers its schema)
from dpo.evals.mt_bench import (
    count_games,
    count_grades,
    grades_of,
    judge_messages,
    outcome,
    read_grade,
    read_verdict,
    run,
    template_name,
)  # fmt: skip
from dpo.evals.mt_bench_files import NEED_REFERENCE, TEMPERATURES, TEMPLATES, answered, read, read_answers
from dpo.evals.results import Result, write
from dpo.judge.endpoint import Reply
from models.command import CONF

WRITING_AND_MATH = [
    {"question_id": 81, "category": "writing", "turns": ["a", "b"]},
    {"question_id": 111, "category": "math", "turns": ["c", "d"]},
]


def configured(tmp_path: Path, **values):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        base = {"task": "mt_bench", "model_name_or_path": "world", "output_dir": tmp_path / "out", "max_samples": 4,
                "max_new_tokens": 3, "mt_bench_dir": tmp_path, "judge_cache": tmp_path / "cache"}  # fmt: skip
        return compose("eval", [f"{key}={value}" for key, value in (base | values).items()])


def write_rows(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """80 questions, their categories in turn, and templates that show each field between its name's tags."""
    names = list(TEMPERATURES)
    questions = [
        {"question_id": 81 + i, "category": names[i % 8], "turns": [f"first {81 + i}", f"second {81 + i}"]}
        for i in range(80)
    ]
    references = [
        {"question_id": one["question_id"], "choices": [{"turns": [f"REF1 {one['question_id']}", "REF2"]}]}
        for one in questions if one["category"] in NEED_REFERENCE
    ]  # fmt: skip
    prompts = [
        {"name": name, "system_prompt": f"system {name}",
         "prompt_template": "\n".join(f"<{field}>{{{field}}}</{field}>" for field in sorted(fields))}
        for name, fields in TEMPLATES.items()
    ]  # fmt: skip
    write_rows(tmp_path / "question.jsonl", questions)
    write_rows(tmp_path / "reference_gpt-4.jsonl", references)
    write_rows(tmp_path / "judge_prompts.jsonl", prompts)
    return tmp_path


def write_baseline(path: Path, turns=("base 1", "base 2")) -> Path:
    choices = [{"index": 0, "turns": turns}]
    write_rows(path, [{"question_id": i, "model_id": "base", "choices": choices} for i in range(81, 161)])
    return path


# --- parsing ---


@pytest.mark.parametrize(
    "judgment, expected",
    [
        ("Rating: [[5]]", 5), ("Rating: [[7.5]]", 7.5), ("see [1]; Rating: [[8]]", 8), ("Rating: [6]", 6),
        ("[[3]] and then [[9]]", 3), ("Rating: 7", -1), ("", -1), ("$ERROR$", -1), ("[[11]]", -1), ("[[0]]", -1),
        ("[[rating]]", -1),
    ],
)  # fmt: skip
def test_a_grade_is_the_first_in_double_brackets_or_else_in_single_ones(judgment, expected):
    assert read_grade(judgment) == expected


@pytest.mark.parametrize(
    "judgment, expected",
    [
        ("[[A]]", "one"), ("[[B]]", "other"), ("[[C]]", "tie"), ('not "[[A]]" but [[B]]', "other"),
        ("[[B]] is what it says itself. [[C]]", "tie"), ("A", "error"), ("", "error"), ("$ERROR$", "error"),
    ],
)  # fmt: skip
def test_a_verdict_is_the_last_one(judgment, expected):
    """FastChat looks for [[A]] first, so that a text that quotes both is A's."""
    assert read_verdict(judgment, "one", "other") == expected


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ("model_1", "model_1", "win"), ("model_2", "model_2", "loss"), ("model_1", "model_2", "tie"),
        ("tie", "tie", "tie"), ("tie", "model_1", "tie"), ("error", "model_1", "error"), ("error", "error", "error"),
    ],
)  # fmt: skip
def test_orders_that_disagree_are_a_tie_and_one_that_is_missing_an_error(first, second, expected):
    assert outcome({"g1_winner": first, "g2_winner": second}) == expected
    assert outcome({"g1_winner": second, "g2_winner": first}) == expected


def test_template_of_category_and_turn():
    assert template_name("single", "writing", 1) == "single-v1"
    assert template_name("single", "coding", 2) == "single-math-v1-multi-turn"
    assert template_name("pair", "stem", 2) == "pair-v2-multi-turn"
    assert template_name("pair", "reasoning", 1) == "pair-math-v1"


@pytest.mark.parametrize("evil", ["{answer_b}", "{0}", "[[10]]", "[The End of Assistant's Answer]"])
def test_an_answer_stands_in_the_prompt_as_it_is(evil):
    prompt = {"system_prompt": "s", "prompt_template": "Q {question} A {answer_a} B {answer_b}"}
    asked = judge_messages(prompt, {"question": "q", "answer_a": evil, "answer_b": "b"})
    assert asked[1]["content"] == f"Q q A {evil} B b"


@pytest.mark.parametrize("said, score", [("ok", 7), ("reasked", 7), ("refused", -1), ("malformed", -1)])
def test_a_grade_is_read_of_an_answer_alone(said, score):
    """What a judge was cut off at, or said beside a refusal, is no grade."""
    (row,) = grades_of([({"turn": 1}, [("prompt", Reply("[[7]]", None, said, "why"))])], "policy")
    assert (row["score"], row["reason"], row["user_prompt"]) == (score, "why", "prompt")


@pytest.mark.parametrize("mark", ["ERROR", "$ERROR$", " ERROR\n"])
def test_a_failed_answer_is_no_answer(mark):
    assert not answered(["fine", mark]) and answered(["ERROR: no such file is what it prints"])


# --- numbers ---


def graded(**scores):
    return [
        {"question_id": int(key[1:-1]), "turn": int(key[-1]), "score": score, "judgment": "[[1]]"}
        for key, score in scores.items()
    ]


def test_scores_by_hand_without_failures():
    """Writing 8 and 6, math 3 and a failure: mean of 8, 6, 3 is 17/3; turn 1 is 5.5, turn 2 is 6. One of 4 failed."""
    result = Result("mt_bench", {}, samples=[{}, {}])
    rows = graded(q811=8, q812=6, q1111=3, q1112=-1)
    rows[0]["judgment"] = 'it says "[[10]]"; [[8]]'
    count_grades(result, WRITING_AND_MATH, rows, resamples=2000, seed=0)
    assert result.metrics == pytest.approx({"score": 17 / 3, "turn_1": 5.5, "turn_2": 6})
    assert result.counts == {"judgments": 4, "failures": 1, "several_grades": 1}
    assert "1 of 4 judgments failed, more than 2%" in result.error
    assert result.tables["grades by category"][1] == {
        "category": "math", "questions": 1, "score": 3, "turn 1": 3, "turn 2": None,
    }  # fmt: skip
    assert result.samples[1]["grades"] == {"turn 1": 3, "turn 2": None}


def test_the_interval_resamples_questions_not_grades():
    """Two questions, each with equal grades: a resample's mean is 2, 5 or 8, and 2 and 8 are as likely as 25% each."""
    result = Result("mt_bench", {}, samples=[{}, {}])
    count_grades(result, WRITING_AND_MATH, graded(q811=2, q812=2, q1111=8, q1112=8), resamples=2000, seed=0)
    assert result.intervals["score"] == (2, 8) and result.error == ""


def test_games_by_hand():
    """A win, a tie and a loss: 1.5 of 3; the game with an error is in no rate."""
    winners = [(81, 1, "model_1", "model_1"), (81, 2, "model_1", "model_2"), (111, 1, "model_2", "model_2"),
               (111, 2, "model_1", "error")]  # fmt: skip
    rows = [dict(zip(("question_id", "turn", "g1_winner", "g2_winner"), row, strict=True)) for row in winners]
    result = Result("mt_bench", {}, samples=[{}, {}])
    count_games(result, WRITING_AND_MATH, rows, resamples=2000, seed=0)
    assert result.metrics == {"win_rate_adjusted": 0.5}
    assert result.counts == {"games": 4, "wins": 1, "ties": 1, "losses": 1, "games_failed": 1}
    assert "1 of 4 games failed" in result.error


# --- whole evaluations ---


def field(text: str, name: str) -> str | None:
    found = re.search(f"<{name}>(.*)</{name}>", text, re.DOTALL)
    return found and found[1]


def judge_of_fields(messages):
    """Grades turn 1 with 4 and turn 2 with 6; of a pair prefers the baseline on turn 1, and A on turn 2."""
    text = messages[-1]["content"]
    if "<answer_a>" in text:
        return "[[A]]" if field(text, "answer_a") == "base 1" else "not [[A]], so [[B]]"
    if "<answer_a_2>" in text:
        return "[[A]]"
    return "Rating: [[6]]" if "<answer_2>" in text else "Rating: [[4]]"


def test_grades_and_games_end_to_end_and_again_without_a_request(data):
    """Four questions: 8 grades of mean 5; turn 1 is lost in both orders, turn 2 is a tie, so the rate is 1/4."""
    with serving(judge_of_fields) as endpoint:
        more = {"judge": "openai", "judge_model": "lab/j", "judge_base_url": endpoint.url}
        cfg = configured(data, mt_bench_baseline=write_baseline(data / "base.jsonl"), **more)
        result = run(cfg)
        assert len(endpoint.asked) == 8 + 16
        write(result, data / "a")
        assert "grades: turn 1 4, turn 2 6" in (data / "a" / "report.html").read_text()  # and no interval of 4 to 6
        (data / "cache").unlink()
        write(run(cfg), data / "b")
        assert len(endpoint.asked) == 24
    for name in ("results.json", "samples.jsonl"):
        assert (data / "a" / name).read_bytes() == (data / "b" / name).read_bytes()
    assert result.metrics == {"score": 5, "turn_1": 4, "turn_2": 6, "win_rate_adjusted": 0.25} and not result.error
    assert result.counts["losses"] == 4 and result.counts["ties"] == 4
    assert result.provenance["questions"] == "the first 4 of 80"
    # What was asked: the category's template, T=0, references of the third question (reasoning), own answers.
    single = [json.loads(line) for line in (data / "out/model_judgment/lab_j_single.jsonl").read_text().splitlines()]
    assert [row["judge"] for row in single[1:4]] == [
        ["lab/j", n] for n in ("single-v1", "single-math-v1", "single-math-v1")
    ]
    assert set(single[0]) == {
        "question_id", "model", "judge", "user_prompt", "judgment", "reason", "score", "turn", "tstamp",
    }  # fmt: skip
    answers = {row["question_id"]: row for row in
               map(json.loads, (data / "out/model_answer/world.jsonl").read_text().splitlines())}  # fmt: skip
    second = next(row for row in single if row["question_id"] == 83 and row["turn"] == 2)["user_prompt"]
    turns = answers[83]["choices"][0]["turns"]
    wanted = {"question_1": "first 83", "question_2": "second 83", "answer_1": turns[0], "answer_2": turns[1],
              "ref_answer_1": "REF1 83", "ref_answer_2": "REF2"}  # fmt: skip
    assert {name: field(second, name) for name in wanted} == wanted
    assert {(r["temperature"], r["max_tokens"]) for r in endpoint.asked} == {(0.0, 2048)}
    assert set(answers[81]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    pair = [json.loads(line) for line in (data / "out/model_judgment/lab_j_pair.jsonl").read_text().splitlines()]
    assert (pair[0]["g1_winner"], pair[0]["g2_winner"]) == ("model_2", "model_2")


def test_equal_answers_are_a_tie_whatever_the_judge_says_and_asked_about_once(data):
    run(configured(data))
    with serving(judge_of_fields) as endpoint:
        more = {"judge": "openai", "judge_model": "j", "judge_base_url": endpoint.url}
        result = run(configured(data, mt_bench_baseline=data / "out/model_answer/world.jsonl", **more))
        assert len(endpoint.asked) == 8 + 8
    assert result.counts["ties"] == 8 and result.metrics["win_rate_adjusted"] == 0.5


def test_answers_go_on_where_they_were_and_keep_their_ids(data):
    first = run(configured(data))
    path = data / "out" / "answers.jsonl"
    whole = path.read_bytes()
    before = (data / "out/model_answer/world.jsonl").read_text()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:4]) + b'{"id": "84-1", "te')
    again = run(configured(data))
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert again.samples == first.samples
    after = (data / "out/model_answer/world.jsonl").read_text()
    drop = lambda text: re.sub(r'"tstamp": [\d.]+', "", text)
    assert drop(after) == drop(before)


def test_temperatures_are_the_categories_and_turn_2_follows_the_own_answer(data, monkeypatch):
    calls = []

    def generate(policy, prompts, **settings):
        calls.append((prompts, settings))
        return original(policy, prompts, **settings)

    import dpo.evals.answers as module

    original = module.generate
    monkeypatch.setattr(module, "generate", generate)
    result = run(configured(data, max_samples=8, per_device_eval_batch_size=1))
    assert [settings["sampling"].temperature for _, settings in calls[:8]] == [0.7] * 2 + [0.0] * 4 + [0.1] * 2
    # Seeds 42 + 2 i of first turns, 43 + 2 i of second ones.
    seeds = [settings["seeds"][0] for _, settings in calls]
    assert sorted(seeds[:8]) == list(range(42, 58, 2)) and sorted(seeds[8:]) == list(range(43, 59, 2))
    from dpo.build import model_dir
    from models.tokenizer import Tokenizer

    decode = Tokenizer(model_dir("world")).decode
    second = [decode(prompts[0]) for prompts, _ in calls[8:]]
    for sample in result.samples:
        text = next(text for text in second if f"second {sample['id']}" in text)
        own = sample["answers"]["policy, turn 1"]
        assert own and f"first {sample['id']}" in text and own in text


def test_failed_answers_of_a_baseline_are_not_judged_and_counted(data):
    with serving(judge_of_fields) as endpoint:
        more = {"judge": "openai", "judge_model": "j", "judge_base_url": endpoint.url}
        path = write_baseline(data / "base.jsonl", turns=("base 1", "$ERROR$"))
        result = run(configured(data, mt_bench_baseline=path, **more))
        assert not any("$ERROR$" in request["messages"][-1]["content"] for request in endpoint.asked)
    assert result.counts["games_failed"] == 4 and "4 of 8 games failed" in result.error
    assert result.metrics["win_rate_adjusted"] == 0  # turn 1 alone


def test_an_own_answer_that_reads_as_a_failure_is_not_graded(data):
    """Its question's both turns are not: turn 2 is judged beside turn 1."""
    run(configured(data))
    path = data / "out" / "answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_rows(path, [row | ({"text": "ERROR"} if row.get("id") == "81-1" else {}) for row in rows])
    with serving(judge_of_fields) as endpoint:
        result = run(configured(data, judge="openai", judge_model="j", judge_base_url=endpoint.url))
        assert len(endpoint.asked) == 6
    assert result.counts["failures"] == 2 and result.samples[0]["grades"] == {"turn 1": None, "turn 2": None}
    first = json.loads((data / "out/model_judgment/j_single.jsonl").read_text().splitlines()[0])
    assert (first["score"], first["reason"]) == (-1, "an answer reads ERROR or $ERROR$")


def test_requests_that_fail_are_failures_and_are_asked_again(data):
    refuse = [True]
    with serving(lambda messages: None if refuse[0] else "[[7]]") as endpoint:
        cfg = configured(data, judge="openai", judge_model="j", judge_base_url=endpoint.url)
        result = run(cfg)
        assert "8 of 8 judgments failed" in result.error and "score" not in result.metrics
        rows = (data / "out/model_judgment/j_single.jsonl").read_text().splitlines()
        assert {json.loads(row)["judgment"] for row in rows} == {""}
        assert all("status 400" in json.loads(row)["reason"] for row in rows)
        refuse[0] = False
        assert run(cfg).metrics["score"] == 7


# --- files ---


def break_row(path: Path, number: int, **change) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[number] |= change
    write_rows(path, rows)


def test_files_that_are_not_the_benchmarks_are_refused(data):
    def refused(match):
        with pytest.raises(ValueError, match=match):
            read(data)

    break_row(data / "judge_prompts.jsonl", 0, prompt_template="{question} {reply}")
    refused("expected a template single-v1 with answer, question")
    break_row(data / "reference_gpt-4.jsonl", 0, choices=[{"turns": ["one"]}])
    refused("has no two turns of question_id=83")
    for choices in ([], [5], ["turns"], {"turns": []}):
        break_row(data / "reference_gpt-4.jsonl", 0, choices=choices)
        refused("reference_gpt-4.jsonl:1: choices=" + re.escape(str(choices)))
    lines = (data / "question.jsonl").read_text()
    write_rows(data / "question.jsonl", map(json.loads, lines.splitlines()[:79]))
    refused("has 79 questions of 79 ids, MT-Bench has 80")
    break_row(data / "question.jsonl", 2, turns=["one"])
    refused("question_id=83 has category='reasoning' and 1 turns")
    (data / "question.jsonl").unlink()
    refused(r"question.jsonl: no such file; take question.jsonl")


def test_a_baseline_answers_every_question(data):
    path = data / "base.jsonl"
    write_rows(path, [{"question_id": 81, "model_id": "b", "choices": [{"turns": ["1", "2"]}]}])
    assert read_answers(str(path), WRITING_AND_MATH[:1]) == ("b", {81: ["1", "2"]})
    with pytest.raises(ValueError, match="no answer of two turns to question_id=111"):
        read_answers(str(path), WRITING_AND_MATH)
    write_rows(path, [{"question_id": 81}])
    with pytest.raises(ValueError, match=r"base.jsonl:1: has no 'model_id'; name a file of model_answer/"):
        read_answers(str(path), WRITING_AND_MATH)
    with pytest.raises(ValueError, match=r"none.jsonl: no such file; name a file of model_answer/"):
        read_answers(str(data / "none.jsonl"), WRITING_AND_MATH)


@pytest.mark.real
def test_the_published_files_are_read(real):
    questions, references, prompts = read(real / "benchmarks" / "mt_bench")
    assert [question["question_id"] for question in questions] == list(range(81, 161))
    assert sorted(references) == list(range(101, 131))
    assert {q["question_id"] for q in questions if q["category"] in NEED_REFERENCE} == set(references)
    for name, fields in TEMPLATES.items():
        asked = judge_messages(prompts[name], {field: f"<{field}>" for field in fields})
        assert all(f"<{field}>" in asked[1]["content"] for field in fields) and "{" not in asked[1]["content"]
