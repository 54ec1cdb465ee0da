"""report.md says what the numbers mean, shows any text as it is, and is there however a run ends."""

import json
import math
import struct
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from test_trainer import config

from dpo.diagnostics import Alarm
from dpo.report import fenced, table, verdicts, write_report
from dpo.run import RunDir
from dpo.trainer import Trainer
from train import train

ALARM = Alarm("saturation", 5, "the loss is 0.001", "Stop here")


def training(step: int, loss: float = 0.5, **rewards: float) -> dict[str, float]:
    """rewards: chosen, rejected, margins, accuracies."""
    row = {"step": step, "epoch": 0.1, "loss": loss, "learning_rate": 1e-6, "grad_norm": 1.0}
    return row | {f"rewards/{name}": value for name, value in rewards.items()}


def evaluation(step: int, loss: float, **rewards: float) -> dict[str, float]:
    return {"step": step, "eval_loss": loss} | {f"eval_rewards/{name}": value for name, value in rewards.items()}


START = {"chosen": 0.0, "rejected": 0.0, "margins": 0.0, "accuracies": 0.0}


def said(training_rows, evaluations=()) -> list[tuple[str, str]]:
    """(yes or no, what was found) of every verdict."""
    return [(verdict, found) for verdict, _, found in verdicts(training_rows, evaluations)]


# --- verdicts ---


def test_a_healthy_run_is_five_times_yes():
    last = training(9, 0.4, chosen=0.5, rejected=-0.25, margins=0.75, accuracies=0.9)
    assert said([training(1, 0.693, **START), last]) == [
        ("yes", "0.4"), ("yes", "+0.5 from 0"), ("yes", "-0.25 from 0"), ("yes", "0.75, 0 in the first line logged"),
        ("yes", "90.0%"),
    ]  # fmt: skip


def test_a_run_that_learned_nothing_is_five_times_no():
    found = said(
        [training(1, 0.693, **START), training(9, 0.7, chosen=-0.2, rejected=0.1, margins=-0.3, accuracies=0.4)]
    )
    assert [verdict for verdict, _ in found] == ["no"] * 5
    assert found[0][1] == "0.7: little was learned, labels are noisy, or the loss has another scale"
    assert found[1][1].startswith("-0.2 from 0; usual where both fall")


def test_what_has_not_moved_has_not_risen_fallen_or_grown():
    assert [verdict for verdict, _ in said([training(1, 0.693, **START)])] == ["no"] * 5


@pytest.mark.parametrize(
    ("loss", "verdict"), [(0.299, "no"), (0.3, "yes"), (0.6, "yes"), (0.601, "no"), (math.nan, "no")]
)
def test_the_guides_loss_is_from_0_3_to_0_6(loss, verdict):
    assert said([training(1, loss)])[0][0] == verdict


def test_a_small_loss_is_said_to_be_of_easy_pairs():
    assert said([training(1, 0.1)]) == [("no", "0.1: the pairs are easy, or pref_beta is large")]


def test_held_out_rows_stand_before_those_trained_on_and_the_newest_of_them_counts():
    rows = [training(1, 0.693, **START), training(9, 0.4, chosen=1.0, rejected=-1.0, margins=2.0, accuracies=1.0)]
    held_out = [evaluation(0, 0.1), evaluation(9, 0.65, chosen=-0.5, rejected=-0.6, margins=0.1, accuracies=0.5)]
    questions = [question for _, question, _ in verdicts(rows, held_out)]
    assert questions[0] == "Did the loss of held-out rows end between 0.3 and 0.6?"
    assert [verdict for verdict, _ in said(rows, held_out)] == ["no", "no", "yes", "yes", "no"]


def test_an_evaluation_before_the_first_update_is_no_verdict_on_the_run():
    """eval_on_start with eval_strategy=no, or a run that ends before its next evaluation."""
    rows = [training(9, 0.4, chosen=0.5, rejected=-0.25, margins=0.75, accuracies=0.9)]
    assert said(rows, [evaluation(0, 0.693, **START)]) == said(rows)


def test_an_evaluation_of_samples_alone_is_no_verdict_on_held_out_rows():
    assert said([training(1, 0.5)], [{"step": 1, "eval_completions/kl": 0.1}]) == [("yes", "0.5")]


def test_margins_are_compared_with_the_first_line_that_has_them():
    """All updates of a window may have been skipped, and of unpaired rows all may be of one kind."""
    last = training(9, 0.4, chosen=0.5, rejected=-0.25, margins=0.75)
    first = training(2, chosen=0.1, rejected=0.0, margins=0.1)
    assert said([training(1, math.nan), first, last])[3] == ("yes", "0.75, 0.1 in the first line logged")
    held_out = evaluation(9, 0.4, chosen=0.5, rejected=-0.25, margins=0.75)
    assert said([training(1, math.nan)], [held_out])[3][0] == "yes"


# --- the file ---


def run_dir_of(path: Path, *rows: dict) -> RunDir:
    run_dir = RunDir(path, overwrite=False, resume=False)
    run_dir.write_config(OmegaConf.create({"seed": 7}))
    for row in rows:
        run_dir.log(row)
    return run_dir


def report_of(run_dir: RunDir, alarms=(), notes=(), draw: bool = False) -> str:
    path = write_report(run_dir, dict(notes), alarms, "It came to its end.", draw=draw)
    assert path == run_dir.path / "report.md"
    return path.read_text(encoding="utf-8")


def test_it_holds_what_the_run_was_made_of_how_it_went_and_what_that_means(tmp_path):
    rows = training(5, 0.6931, **START), training(10, 0.4), evaluation(10, 0.45)
    text = report_of(run_dir_of(tmp_path / "run", *rows), [ALARM], {"Start": "rows: 9\nreference: none"})
    assert text.startswith(
        "# run\n\nIt came to its end.\n\n## Verdicts\n\n|  | question | found |\n| --- | --- | --- |\n| yes |"
    )
    assert "\n## Alarms\n\n- **saturation**, step 5: the loss is 0.001. Stop here.\n" in text
    assert "\n## Start\n\n```\nrows: 9\nreference: none\n```\n" in text
    assert "\n| metric | step 5 | step 10 | step 10 |\n" in text
    assert "\n| loss | 0.6931 | 0.4 |  |\n" in text and "\n| eval_loss |  |  | 0.45 |\n" in text
    assert text.endswith("\n## Config\n\n```\nseed: 7\n```\n")


def test_a_run_that_logged_nothing_has_a_report(tmp_path):
    text = report_of(run_dir_of(tmp_path), draw=True)
    assert "## Verdicts\n\nNothing was logged.\n\n## Alarms\n\nNone.\n" in text
    assert "## Metrics\n\n## Answers\n\nNone were drawn (num_samples)." in text and "No figure" in text
    assert not (tmp_path / "curves.png").exists()


def test_a_run_that_only_evaluated_has_its_numbers(tmp_path):
    text = report_of(run_dir_of(tmp_path, evaluation(0, 0.7)))
    assert "Nothing was logged." in text and "| eval_loss | 0.7 |" in text


def samples(step: int, **responses: str) -> list[dict]:
    return [{"step": step, "prompt": p, "response": r, "kl": step / 4 if step else None} for p, r in responses.items()]


def test_answers_are_those_of_the_first_and_of_the_newest_step_by_prompt(tmp_path):
    run_dir = run_dir_of(tmp_path)
    run_dir.samples.append(
        [*samples(0, one="1", two="2", three="3"), *samples(5, one="?"), *samples(9, three="III", one="I")]
    )
    text = report_of(run_dir)
    assert "```\nprompt: one\n\nstep 0: 1\n\nstep 9, KL 2.25 nats: I\n```\n" in text
    assert "```\nprompt: three\n\nstep 0: 3\n\nstep 9, KL 2.25 nats: III\n```\n" in text
    assert text.count("prompt: ") == 2


@pytest.mark.parametrize(
    "text",
    ["plain", "```", "a ```python\nx\n``` b", "````\n```", "`" * 9, "| a | b |\n# no heading", "~~~\n- item\n1. one"],
)
def test_no_text_ends_its_fence(text):
    """CommonMark 4.5: a line of at least as many backticks as the opening fence has ends it."""
    first, *body, last = fenced(text).split("\n")
    assert first == last and set(first) == {"`"} and len(first) >= 3
    assert "\n".join(body) == text and first not in text


def test_a_response_cannot_break_the_report(tmp_path):
    run_dir = run_dir_of(tmp_path)
    evil = "a | b\n```\n# I am a heading\x1b[2J\n````\n"
    run_dir.samples.append([*samples(0, one=evil), *samples(4, one=evil)])
    text = report_of(run_dir)
    outside = text.split("\n`````\n")
    assert len(outside) == 3 and "heading" not in outside[0] + outside[2] and "\x1b" not in text
    assert "## Config" in outside[2]


def test_half_a_character_of_a_response_is_written_all_the_same(tmp_path):
    """A model may write one, and JSON holds it; UTF-8 does not."""
    run_dir = run_dir_of(tmp_path)
    run_dir.samples.append([*samples(0, one="a\ud83d"), *samples(4, one="b")])
    text = report_of(run_dir, notes={"Start": "dataset: b\udce9.jsonl"})
    assert "step 0: a" in text and "dataset: b\\udce9.jsonl" in text


def test_a_cell_of_a_table_keeps_its_bars():
    assert table(("a", "b"), [("x|y", "1")]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |"


# --- the figure ---

CURVES = [training(step, 0.7 - step / 20, **START) for step in (1, 2, 3)] + [evaluation(3, 0.5, **START)]


def test_the_figure_is_a_png_of_1100_by_600(tmp_path):
    pytest.importorskip("matplotlib")
    text = report_of(run_dir_of(tmp_path, *CURVES, training(4, math.nan)), draw=True)
    assert "](curves.png)" in text and "No figure" not in text
    content = (tmp_path / "curves.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and struct.unpack(">II", content[16:24]) == (1100, 600)


def test_a_figure_that_was_not_wanted_is_not_drawn(tmp_path):
    assert "No figure: it needs `plot_loss=true`" in report_of(run_dir_of(tmp_path, *CURVES), draw=False)
    assert not (tmp_path / "curves.png").exists()


def test_without_matplotlib_the_report_says_how_to_get_the_figure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as where the extra is not installed
    assert 'matplotlib (`pip install -e ".[plot]"`)' in report_of(run_dir_of(tmp_path, *CURVES), draw=True)


# --- of a run ---


def ended_early(path: Path) -> str:
    text = (path / "report.md").read_text(encoding="utf-8")
    return text.split("\n\n")[1]


def test_a_run_that_comes_to_its_end_says_so(tmp_path, capsys):
    train(config(tmp_path, "max_steps=1", "warmup_ratio=0"))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    ended = "It came to its end; its result is of update 1. 1 of 1 updates were made."
    assert ended_early(tmp_path) == ended and f"report: {tmp_path / 'report.md'}\n" in capsys.readouterr().out
    assert "## Start\n\n```\nrows: 24 to train on" in text and "reference: the base model, adapter off\n" in text


def test_a_run_that_a_signal_stopped_says_so_and_names_no_result(tmp_path, monkeypatch):
    def stopped(self: Trainer, stop):
        self.state.step = 2
        raise SystemExit(143)

    monkeypatch.setattr(Trainer, "train", stopped)
    with pytest.raises(SystemExit):
        train(config(tmp_path))
    assert ended_early(tmp_path) == "It ended early: stopped by a signal. 2 of 3 updates were made."


@pytest.mark.slow
def test_a_run_that_three_bad_updates_stopped_says_which(tmp_path, monkeypatch):
    from dpo import trainer as trainer_module

    monkeypatch.setattr(trainer_module, "clip_gradients", lambda parameters, limit: parameters[0].new_tensor(math.nan))
    with pytest.raises(ValueError, match="third update in a row"):
        train(config(tmp_path))
    assert ended_early(tmp_path).startswith("It ended early: step 3: the gradient is not finite (")
    assert ended_early(tmp_path).endswith(" says more. 2 of 3 updates were made.")
    assert "- **non_finite**, step 1: 1 updates were skipped" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [None, None]


def test_a_report_that_cannot_be_written_costs_no_run(tmp_path, capsys):
    (tmp_path / "report.md").mkdir(parents=True)
    metrics = train(config(tmp_path, "max_steps=1", "warmup_ratio=0"))
    assert "loss" in metrics and "warning: report.md could not be written (" in capsys.readouterr().out
    assert (tmp_path / "adapter_model.safetensors").exists()
