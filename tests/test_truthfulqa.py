"""MC1, MC2 and the binary forms are arithmetic on summed log-likelihoods; the data are what they should be."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import eval  # noqa: F401  (registers its schema)
from dpo.evals.progress import Progress
from dpo.evals.truthfulqa import PRESET, Item, mc1, mc2, questions, read, run, sample
from models.command import CONF

COLUMNS = ("Category", "Question", "Best Answer", "Best Incorrect Answer")
ITEM = Item("0", "Is it?", {"Yes": 1, "No": 0}, {"No": 0, "Yes": 1, "Sure": 1}, "Facts", ("Yes", "No"))


def write_data(directory: Path, rows: int = 817, columns=COLUMNS) -> Path:
    """Questions with a space after them in the table, or in both, and true answers behind a false one."""
    directory.mkdir()
    targets = {"mc1_targets": {"a cow": 1, "a lion": 0}, "mc2_targets": {"a lion": 0, "a cow": 1, "a dog": 1}}
    items = [{"question": f"What eats {i}?" + " " * (i % 2), **targets} for i in range(rows)]
    (directory / "mc_task.json").write_text(json.dumps(items))
    with open(directory / "TruthfulQA.csv", "w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        for i in range(rows):
            row = ("Even" if i % 2 == 0 else "Odd", f"What eats {i}? ", "a cow", "a lion")
            table.writerow(dict(zip(COLUMNS, row, strict=True)))
    return directory


def configured(tmp_path: Path, **values):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        values = {"task": "truthfulqa", "model_name_or_path": "world", "output_dir": tmp_path / "out", **values}
        return compose("eval", [f"{key}={value}" for key, value in values.items()])


def test_mc1_asks_whether_the_best_answer_is_the_likeliest():
    assert mc1([-3, -1, -2], [0, 1, 0])
    assert not mc1([-1, -3, -2], [0, 1, 0])
    assert not mc1([-1, -1], [1, 0])  # a tie is no preference


def test_mc2_is_the_share_of_probability_on_true_answers_wherever_they_stand():
    """Probabilities 0.1 true, 0.3 false, 0.2 true: (0.1 + 0.2) / 0.6."""
    assert mc2([math.log(0.1), math.log(0.3), math.log(0.2)], [1, 0, 1]) == pytest.approx(0.5)


def test_mc2_of_answers_too_unlikely_for_a_float():
    """exp(-800) is 0; the ratio exp(-800) / (exp(-800) + exp(-800 + ln 3)) is a quarter."""
    assert math.exp(-800) == 0
    assert mc2([-800, -800 + math.log(3)], [1, 0]) == pytest.approx(0.25)


def test_a_question_follows_the_six_pairs_and_an_answer_follows_a_space():
    asked = questions([ITEM])
    context, answers = asked["0"]
    assert context == PRESET + "Q: Is it?\nA:" and PRESET.count("Q: ") == PRESET.count("A: ") == 6
    assert answers == [" Yes", " No", " Sure"]  # each is read once, whichever forms it is an answer of
    assert asked["0 best second"] == ("Question: Is it?\nOptions:\n(A) No\n(B) Yes\nAnswer: (", ["A", "B"])


@pytest.mark.parametrize("first, second, right", [(0.9, 0.3, True), (0.9, 0.95, False), (0.4, 0.1, True)])
def test_letters_are_right_where_the_mean_over_both_orders_is_above_a_half(first, second, right):
    """first, second: P(A) with the best answer first, and with it second, where B is its letter."""
    pair = lambda p: torch.tensor([math.log(p), math.log(1 - p)], dtype=torch.float64)
    logps = {"0": torch.zeros(3), "0 best first": pair(first), "0 best second": pair(second)}
    row = sample(ITEM, logps)
    assert row["binary_letters"] is right is ((first + 1 - second) / 2 > 0.5)
    assert row["binary_letters_first"] == pytest.approx((first + second) / 2)


@pytest.mark.parametrize("yes, no, right", [(-1, -2, True), (-2, -1, False), (-1, -1, False)])
def test_the_binary_form_by_likelihood_compares_the_pair_alone(yes, no, right):
    """Whatever other answers are worth: Sure is the likeliest."""
    logps = {"0": torch.tensor([yes, no, 0.0])} | {f"0 best {place}": torch.zeros(2) for place in ("first", "second")}
    assert sample(ITEM, logps)["binary_loglikelihood"] is right


def test_a_run_writes_every_form_with_its_category_and_interval(tmp_path):
    directory = write_data(tmp_path / "data")
    result = run(configured(tmp_path, truthfulqa_dir=directory, max_samples=3))
    assert result.counts == {"n": 3, "n_binary": 3, "without_category": 0, "truncated": 0}
    assert result.provenance["questions"] == "the first 3 of 817"
    assert {*result.intervals} == {"mc1", "mc2", "binary_loglikelihood", "binary_letters"}
    assert [(row["category"], row["n"]) for row in result.tables["category"]] == [("Even", 2), ("Odd", 1)]
    # One true and one false answer: both forms ask the same.
    assert result.metrics["mc1"] == result.metrics["binary_loglikelihood"]
    first = result.samples[0]
    assert first["mc1"] == (first["log_likelihoods"]["a cow"] > first["log_likelihoods"]["a lion"])
    assert first["true"] == ["a cow", "a dog"]


def test_a_run_that_was_killed_gives_the_same_bytes(tmp_path):
    cfg = configured(tmp_path, truthfulqa_dir=write_data(tmp_path / "data"), max_samples=4, max_tokens_per_batch=300)
    whole = run(cfg)
    path = tmp_path / "out" / "log_likelihoods.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    assert run(cfg) == whole and len(lines) == 1 + 3 * 4
    # Other streams, and another number of questions, are another evaluation.
    cfg.max_tokens_per_batch = 299
    with pytest.raises(ValueError, match="holds rows of max_tokens_per_batch=300"):
        run(cfg)
    cfg.max_tokens_per_batch = 300
    cfg.max_samples = 3
    with pytest.raises(ValueError, match="questions_sha256"):
        run(cfg)
    Progress(path, json.loads(lines[0]))  # and the file is as it was


def test_the_older_table_has_no_binary_form(tmp_path, capsys):
    directory = write_data(tmp_path / "data", columns=COLUMNS[:3])
    result = run(configured(tmp_path, truthfulqa_dir=directory, max_samples=1))
    assert "binary_letters" not in result.metrics and result.counts["n_binary"] == 0
    assert "has no column 'Best Incorrect Answer'" in capsys.readouterr().out


def test_a_question_that_the_table_lacks_has_no_category(tmp_path):
    directory = write_data(tmp_path / "data")
    items = json.loads((directory / "mc_task.json").read_text())
    items[0]["question"] = "Another?"
    (directory / "mc_task.json").write_text(json.dumps(items))
    first, second, *_ = read(directory)
    assert (first.category, first.pair) == (None, None)
    assert (second.category, second.pair) == ("Odd", ("a cow", "a lion"))


@pytest.mark.parametrize("name", ["mc_task.json", "TruthfulQA.csv"])
def test_a_missing_file_is_named_with_where_to_get_it(tmp_path, name):
    (write_data(tmp_path / "data") / name).unlink()
    with pytest.raises(ValueError, match=f"truthfulqa_dir=.*data: has no {name}; .*github.com/sylinrl/TruthfulQA"):
        read(tmp_path / "data")


def test_another_number_of_questions_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mc_task.json: 816 questions, expected 817 or 790"):
        read(write_data(tmp_path / "data", rows=816))
    assert len(read(write_data(tmp_path / "newer", rows=790))) == 790


@pytest.mark.parametrize(
    "change",
    [
        {"mc1_targets": {"a": 1, "b": 1}},
        {"mc2_targets": {"a": 2}},
        {"mc1_targets": None},
        {"mc1_targets": {"a": 1}, "mc2_targets": {"a": 1}},
    ],
)
def test_a_question_without_one_best_answer_among_others_is_refused(tmp_path, change):
    directory = write_data(tmp_path / "data")
    items = json.loads((directory / "mc_task.json").read_text())
    items[5] |= change
    (directory / "mc_task.json").write_text(json.dumps(items))
    with pytest.raises(ValueError, match=r"mc_task.json: question 5 is not one with mc1_targets"):
        read(directory)


@pytest.mark.parametrize("name, text, found", [
    ("mc_task.json", "{", "JSONDecodeError"),
    ("mc_task.json", "7", "TypeError: 'int' object is not iterable"),
    ("TruthfulQA.csv", "Question,Category\nWhy?,Facts\n", "KeyError: 'Best Answer'"),
    ("TruthfulQA.csv", "Question,Best Answer\nWhy?,So\n", "KeyError: 'Category'"),
])  # fmt: skip
def test_a_file_that_is_not_the_benchmarks_is_refused(tmp_path, name, text, found):
    (write_data(tmp_path / "data") / name).write_text(text)
    with pytest.raises(ValueError, match=f"data: a file is not readable .{found}.*; take data/mc_task.json"):
        read(tmp_path / "data")


@pytest.mark.real
def test_the_published_files_are_read(real):
    """Two questions list a false answer before a true one; 38 categories; the table of before 2025 has no pairs."""
    items = read(real / "benchmarks")
    assert len(items) == 817 and len({item.category for item in items}) == 38
    unsorted = [item for item in items if list(item.mc2.values()) != sorted(item.mc2.values(), reverse=True)]
    assert len(unsorted) == 2 and not any(item.pair for item in items)
