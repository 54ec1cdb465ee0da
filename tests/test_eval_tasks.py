"""The tasks of eval.py: calibration by hand, generation and KL by their definitions, the world by enumeration."""

import base64
import csv
import importlib.util
import json
import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from scipy import stats

import eval  # registers its schema
from dpo.build import build_finished_policy, build_template
from dpo.config import TASKS, EvalConfig
from dpo.evals import compare
from dpo.evals.preference import calibration, preference
from dpo.evals.world import lumped_kl, outside
from dpo.evals.world_reward import score
from dpo.kl import kl_and_entropy
from dpo.reference import base_reference
from models.command import expand_arguments
from models.generate import generate
from models.lora import adapters_disabled, inject_lora, lora_layers, save_adapter
from models.sampling import DRAWN
from models.stream import pack
from models.weights import WORLD, load_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    policy = load_model(WORLD / "model", dtype=torch.float32, device=torch.device("cpu"))
    inject_lora(policy, rank=4, alpha=8, use_rslora=False, dropout=0, target="all", seed=0)
    torch.manual_seed(0)
    for layer in lora_layers(policy).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    save_adapter(policy, directory, base_model="world", dropout=0.0)
    return directory


def config(task: str, output: Path, *overrides: str):
    given = [f"task={task}", f"output_dir={output}", "max_new_tokens=12", "device=cpu"]
    if task != "compare":
        given += ["model_name_or_path=world", "eval_dataset=world", "max_samples=4"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("eval", [*given, *overrides])


def test_every_task_is_a_file_with_a_run():
    for task in TASKS:
        assert "\ndef run(cfg: DictConfig) -> Result:\n" in (ROOT / "dpo" / "evals" / f"{task}.py").read_text(), task


# --- preference ---


def test_what_the_pairs_were_is_known_by_their_words_and_not_by_their_file(adapter, tmp_path):
    """And the reference with its weights, where the loss has one."""

    def facts(text: str, name: str, *more: str) -> dict:
        row = {"prompt": "May I pet a cow?", "chosen": "Yes.", "rejected": text}
        (tmp_path / name).write_text(json.dumps(row) + "\n")
        given = [f"adapter_name_or_path={adapter}", f"eval_dataset={tmp_path / name}", *more]
        return eval.evaluate(config("preference", tmp_path / f"out {name}", *given), {}).provenance

    one, same, other = facts("No.", "a.jsonl"), facts("No.", "b.jsonl"), facts("Never.", "c.jsonl", "pref_loss=orpo")
    assert len(one["data_sha256"]) == 64 and one["data_sha256"] == same["data_sha256"] != other["data_sha256"]
    assert one["ref_model_sha256"] != one["model_sha256"] and "ref_model_sha256" not in other
    assert one["template_sha256"] == other["template_sha256"]


def test_calibration_by_hand():
    """sigmoid(2) = 0.881 twice, one right; sigmoid(0.1) = 0.525 once, right; 2/3 |0.5 - 0.881| + 1/3 |1 - 0.525|."""
    error, table = calibration([2.0, -2.0, 0.1])
    sure, unsure = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-0.1))
    assert error == pytest.approx(2 / 3 * (sure - 0.5) + 1 / 3 * (1 - unsure))
    assert [(row["sigmoid(|margin|)"], row["rows"], row["right"]) for row in table] == [
        ([0.5, 0.55], 1, 1),
        ([0.85, 0.9], 2, 0.5),
    ]
    assert table[1]["mean"] == pytest.approx(sure)


def test_a_policy_that_is_right_as_often_as_it_says_is_calibrated():
    margin = math.log(3)  # 75%
    assert calibration([margin, margin, margin, -margin])[0] == pytest.approx(0)
    assert calibration([1000.0, 1000.0])[0] == pytest.approx(0) and calibration([-1000.0])[0] == pytest.approx(1)
    assert calibration([0.0])[0] == pytest.approx(0.5)  # a tie counts as wrong, as in accuracies


def test_preference_adds_to_the_metrics_and_changes_none(adapter, tmp_path):
    given = [f"adapter_name_or_path={adapter}", "pref_beta=1"]
    cfg = config("preference", tmp_path, *given, "max_samples=30")
    result = eval.evaluate(cfg, {})
    plain, _ = preference(cfg)
    assert {name: result.metrics[name] for name in plain if name != "eval_runtime"} == {
        name: value for name, value in plain.items() if name != "eval_runtime"
    }
    assert result.metrics["accuracy"] == pytest.approx(plain["eval_rewards/accuracies"])
    margins = [sample["margin"] for sample in result.samples]
    assert sum(margins) / 30 == pytest.approx(plain["eval_rewards/margins"], rel=1e-5) and margins == sorted(margins)
    interval = stats.bootstrap((margins,), np.mean, n_resamples=9999, rng=np.random.default_rng(0)).confidence_interval
    assert result.intervals["eval_rewards/margins"] == pytest.approx(interval, abs=0.1 * np.std(margins))
    alone = eval.evaluate(config("preference", tmp_path, *given, "max_samples=1"), {})
    (row,) = (sample for sample in result.samples if sample["id"] == alone.samples[0]["id"])
    assert row["margin"] == pytest.approx(alone.samples[0]["margin"], rel=1e-3)
    parts = [row["slice"].split(",")[0].split(" ")[0] for row in result.tables["by slice"]]
    for start in ("source", "chosen", "prompts"):
        rows = [row["rows"] for row, part in zip(result.tables["by slice"], parts, strict=True) if part == start]
        equal = [row["rows"] for row in result.tables["by slice"] if row["slice"] == "equally long"]
        assert sum(rows) + (sum(equal) if start == "chosen" else 0) == 30


def test_pairs_are_told_apart_by_what_their_rows_call_their_source(tmp_path):
    sources = ["chat", "chat", None, 7]
    lines = [{"prompt": f"Why {i}?", "chosen": "so", "rejected": "no", "source": s} for i, s in enumerate(sources)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = eval.evaluate(config("preference", tmp_path / "out", f"eval_dataset={tmp_path / 'p.jsonl'}"), {})
    told = {row["slice"]: row["rows"] for row in result.tables["by slice"] if row["slice"].startswith("source")}
    assert told == {"source chat": 2, "source p.jsonl": 2}


def test_labelled_rows_have_their_slices_too(tmp_path):
    result = eval.evaluate(config("preference", tmp_path, "pref_loss=kto"), {})
    assert {"desirable", "undesirable"} <= {row["slice"] for row in result.tables["by slice"]}
    assert "eval_rewards/margins" not in result.intervals


# --- generation, kl, world ---


def test_generation_is_counted_by_hand(adapter, tmp_path):
    result = eval.evaluate(config("generation", tmp_path, f"adapter_name_or_path={adapter}", "temperature=1"), {})
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()[1:]]
    texts = [row["ids"] for row in rows]
    pairs = [pair for ids in texts for pair in pairwise(ids)]
    tokens = [token for ids in texts for token in ids]
    expected = {
        "mean_tokens": len(tokens) / 4, "ended": sum(row["finish_reason"] == "stop" for row in rows) / 4,
        "distinct_1": len(set(tokens)) / len(tokens), "distinct_2": len(set(pairs)) / len(pairs),
    }  # fmt: skip
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected)
    assert result.provenance["temperature"] == 1 and result.provenance["seed"] == 42


def test_kl_is_of_the_policys_own_samples_at_every_position(adapter, tmp_path):
    """Whatever the temperature says; its end counts."""
    cfg = config("kl", tmp_path, f"adapter_name_or_path={adapter}", "temperature=0.3", "max_new_tokens=30")
    result = eval.evaluate(cfg, {})
    policy, template = build_finished_policy(cfg, torch.device("cpu")), build_template(cfg)
    held = {row["id"]: row for row in map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines()[1:])}
    sums = []
    for i, sample in enumerate(result.samples):
        prompt, _ = template.encode([{"role": "user", "content": sample["prompt"]}], [])
        row = held[sample["id"]]
        (drawn,) = generate(
            policy, [prompt], samples=1, max_new_tokens=30, stop_ids=template.stop_ids, sampling=DRAWN, seeds=[42 + i],
            batch_size=1,
        )  # fmt: skip
        assert row["ids"] == drawn.ids
        ids = row["ids"] + [min(template.stop_ids)] * (row["finish_reason"] == "stop")
        kl_R, _ = kl_and_entropy(policy, base_reference(policy), pack([prompt], [[ids]]))
        sums.append(float(kl_R.sum()))
        assert sample["kl"] == pytest.approx(sums[-1], rel=1e-4) and sample["tokens"] == len(ids)
    assert result.metrics["kl"] == pytest.approx(sum(sums) / 4, rel=1e-4) and result.metrics["kl"] > 0
    assert {row["finish_reason"] for row in held.values()} >= {"stop"}
    assert result.metrics["kl_se"] == pytest.approx(torch.tensor(sums).std().item() / 2, rel=1e-4)
    assert result.provenance["temperature"] == 1


def test_the_world_before_and_after_is_the_probes_score(adapter, tmp_path):
    cfg = config("world", tmp_path, f"adapter_name_or_path={adapter}", "max_samples=1")
    result = eval.evaluate(cfg, {})
    policy, template = build_finished_policy(cfg, torch.device("cpu")), build_template(cfg)
    prompts = [sample["prompt"] for sample in result.samples]
    after = score(policy, template, prompts)
    with adapters_disabled(policy):
        before = score(policy, template, prompts)
    found = result.metrics
    assert (found["expected_reward"], found["mass_outside"]) == pytest.approx(
        (after.expected_reward, after.mass_outside)
    )
    assert found["expected_reward_before"] == pytest.approx(before.expected_reward) != found["expected_reward"]
    assert found["gain"] == pytest.approx(after.expected_reward - before.expected_reward) and found["kl"] > 0


def test_without_a_reference_the_world_has_no_before(tmp_path):
    result = eval.evaluate(config("world", tmp_path, "max_samples=1"), {})
    assert set(result.metrics) == {"expected_reward", "mass_outside"}


def test_a_prompt_of_another_world_is_refused(tmp_path):
    (tmp_path / "asks.txt").write_text("Who am I?\n")
    with pytest.raises(ValueError, match=r"'Who am I\?' is no question of the world"):
        eval.evaluate(config("world", tmp_path / "out", f"eval_dataset={tmp_path / 'asks.txt'}"), {})


def test_the_lumped_kl_by_hand():
    """0.5 log(0.5 / 0.25) + 0.3 log(0.3 / 0.25) + 0.2 log(0.2 / 0.5), and a response that has become impossible."""
    policy, reference = {"a": 0.5, "b": 0.3, "c": 0.0}, {"a": 0.25, "b": 0.125, "c": 0.125}
    expected = 0.5 * math.log(2) + 0.3 * math.log(0.3 / 0.125) + 0.2 * math.log(0.2 / 0.5)
    assert lumped_kl(policy, reference) == pytest.approx(expected) and outside(policy) == pytest.approx(0.2)
    assert lumped_kl(reference, reference) == 0
    assert math.isfinite(lumped_kl({"a": 0.9}, {"a": 1.0}))


# --- compare ---


def result_file(directory: Path, value: float, **more) -> Path:
    directory.mkdir()
    held = {"task": "win_rate", "metrics": {"win_rate": value}, "intervals": {"win_rate": [value - 0.1, value + 0.1]}}
    (directory / "results.json").write_text(json.dumps(held | {"provenance": {"judge": "gold", "seed": 1}} | more))
    return directory


def test_compare_has_a_line_per_metric_and_says_what_differs(tmp_path):
    runs = [result_file(tmp_path / "a", 0.5), result_file(tmp_path / "b", 0.6, provenance={"judge": "gold", "seed": 2})]
    names = ",".join(map(str, runs))
    result = eval.evaluate(config("compare", tmp_path / "out", f"runs=[{names}]"), {})
    a, b = map(str, runs)
    assert result.tables["metrics"] == [{"metric": "win_rate/win_rate", a: "0.5 (0.4 to 0.6)", b: "0.6 (0.5 to 0.7)"}]
    assert result.tables["what differs"] == [{"": "seed", a: 1, b: 2}]
    if importlib.util.find_spec("matplotlib"):
        picture = (tmp_path / "out" / "compare.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert base64.b64encode(picture).decode() in (tmp_path / "out" / "report.html").read_text()


def test_compare_says_when_nothing_differs(tmp_path):
    runs = [result_file(tmp_path / "a", 0.5), result_file(tmp_path / "b", 0.6)]
    result = eval.evaluate(config("compare", tmp_path / "out", f"runs=[{','.join(map(str, runs))}]"), {})
    assert result.tables["what differs"] == [{"": "nothing"}]


def test_without_matplotlib_there_is_no_plot(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert compare.draw({}) == 'No plot: drawing needs matplotlib (pip install -e ".[plot]").'


@pytest.mark.parametrize(("text", "said"), [(None, "holds no results.json"), ("{}", "results.json is no evaluation's")])
def test_compare_needs_results(tmp_path, text, said):
    if text:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=rf"^runs={re.escape(str(tmp_path))}: .*{said}"):
        compare.read_evaluation(tmp_path)


# --- the command ---


def test_files_of_something_else_are_left_alone(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    result_file(tmp_path / "other", 0.5)
    for name, said in (
        ("file", "is a file"),
        ("run", "holds a training run"),
        ("other", "holds the result of task=win_rate"),
    ):
        with pytest.raises(ValueError, match=rf"^output_dir={re.escape(str(tmp_path / name))}: {said}; name a"):
            eval.evaluate(config("world", tmp_path / name), {})


@pytest.mark.parametrize("text", ['{"task', "[1]"])
def test_a_damaged_result_is_named(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    said = rf"^{re.escape(str(tmp_path / 'results.json'))}: holds no JSON object; delete it, or name another directory"
    with pytest.raises(ValueError, match=said):
        eval.evaluate(config("world", tmp_path), {})
    with pytest.raises(ValueError, match=said):
        compare.read_evaluation(tmp_path)


@pytest.mark.parametrize("task", sorted({*TASKS} - {"win_rate", "alpaca_eval", "mt_bench"}))
def test_a_judge_that_a_task_does_not_ask_is_refused(tmp_path, task):
    said = rf"^judge=gold: not read by task={task}, but by win_rate, alpaca_eval, mt_bench; leave it out"
    with pytest.raises(ValueError, match=said):
        eval.evaluate(config(task, tmp_path, "judge=gold", "perplexity_file=x", "runs=[x]"), {})


@pytest.mark.parametrize("task", [task for task, needs in TASKS.items() if needs])
def test_a_task_says_what_it_cannot_do_without(tmp_path, task):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("eval", [f"task={task}", f"output_dir={tmp_path}"])
    with pytest.raises(ValueError, match=rf"^{TASKS[task][0]} is not set; pass {TASKS[task][0]}="):
        eval.evaluate(cfg, {})


def test_where_a_run_was_written_and_what_it_drew_is_not_its_evaluations(adapter):
    """They would replace the run's own files, and cut answers as short as the run's samples."""
    own = {"output_dir": "x", "seed": 7, "max_new_tokens": 64}
    saved = {"model_name_or_path": "world", "pref_beta": 0.5, "eval_dataset": "world", **own}
    (adapter / "config.yaml").write_text(json.dumps(saved))
    given, _ = expand_arguments([f"run={adapter}"], EvalConfig)
    keys = {argument.partition("=")[0] for argument in given}
    assert keys == {"model_name_or_path", "pref_beta", "eval_dataset", "adapter_name_or_path", "run"}


@pytest.mark.slow
def test_each_job_of_a_multirun_has_its_directory_and_is_a_row_of_the_sweep(adapter, tmp_path):
    command = [
        sys.executable,
        "eval.py",
        "--multirun",
        "task=preference",
        "model_name_or_path=world",
        "eval_dataset=world",
    ]
    command += [f"adapter_name_or_path={adapter},/no/such", "max_samples=4", f"output_dir={tmp_path / 'sweep'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "error: job 1: /no/such/adapter_config.json" in done.stderr
    with open(tmp_path / "sweep" / "results.csv", newline="") as file:
        first, second = csv.DictReader(file)
    held = json.loads((tmp_path / "sweep" / "0" / "results.json").read_text())
    assert float(first["accuracy"]) == held["metrics"]["accuracy"] and first["adapter_name_or_path"] == str(adapter)
    assert "no such file" in second["error"]
