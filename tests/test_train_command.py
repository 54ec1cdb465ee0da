"""`python train.py` and `python eval.py` as a user types them: results, sweeps, and mistakes in one line."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from dpo.build import build_policy
from dpo.config import TrainConfig
from models.command import expand_arguments
from models.lora import lora_layers
from train import train

ROOT = Path(__file__).parent.parent
QUICK = ["max_samples=8", "max_steps=2", "logging_steps=1", "num_samples=0", "device=cpu"]
GUIDE = """\
# DPO Configuration
model_name_or_path: world
ref_model: world # Reference model
stage: dpo
do_train: true
dataset: world
template: chatml

# DPO-specific parameters
pref_beta: 0.1 # KL penalty coefficient
pref_loss: sigmoid # or hinge, ipo

# Training hyperparameters
cutoff_len: 2048
per_device_train_batch_size: 1
gradient_accumulation_steps: 32
learning_rate: 5.0e-7 # Much lower than SFT!
num_train_epochs: 1.0 # Usually just 1 epoch
lr_scheduler_type: cosine
warmup_ratio: 0.1

# Optimization
fp16: true
gradient_checkpointing: true

# LoRA configuration
finetuning_type: lora
lora_target: all
lora_rank: 16
lora_alpha: 32

# Evaluation
val_size: 0.1
eval_strategy: steps
eval_steps: 100

# Output
output_dir: {output_dir}
logging_steps: 5
save_steps: 500
"""


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    # HF_HUB_OFFLINE: a name that is no directory must not make a test depend on a network.
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_guides_yaml_runs_as_it_is_and_the_command_line_stands_above_it(tmp_path):
    file = tmp_path / "dpo_config.yaml"
    file.write_text(GUIDE.format(output_dir=tmp_path / "aligned") + "overwrite_cache: true\nddp_timeout: 9\n")
    quick = ["max_samples=20", "per_device_train_batch_size=4", "gradient_accumulation_steps=2", "num_samples=0"]
    done = run("train.py", f"config_file={file}", *quick, "logging_steps=1", "max_steps=1")
    assert done.returncode == 0, done.stderr
    assert "without effect here, and left out: overwrite_cache, ddp_timeout" in done.stdout
    rows = metrics(tmp_path / "aligned")
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert "eval_rewards/accuracies" in rows[-1]
    config = (tmp_path / "aligned" / "config.yaml").read_text()
    assert "pref_beta: 0.1" in config and "logging_steps: 1\n" in config and "fp16: true" in config


@pytest.mark.slow
def test_a_sweep_has_a_directory_per_job_and_one_results_csv(tmp_path):
    done = run("train.py", "-m", "pref_beta=0.05,0.5", f"output_dir={tmp_path}", *QUICK, "eval_dataset=null")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["job"], row["pref_beta"]) for row in table] == [("0", "0.05"), ("1", "0.5")]
    for row in table:
        assert float(row["loss"]) == metrics(tmp_path / row["job"])[-1]["loss"]
    # Once more in the same place: refused, and what lies there stays.
    written = (tmp_path / "results.csv").read_text()
    again = run("train.py", "-m", "pref_beta=0.05,0.5", f"output_dir={tmp_path}", *QUICK, "eval_dataset=null")
    assert again.returncode == 2 and "holds a run already" in again.stderr
    assert (tmp_path / "results.csv").read_text() == written


@pytest.mark.slow
def test_an_evaluation_of_a_saved_run_gives_its_own_last_evaluation(tmp_path):
    directory = tmp_path / "run"
    assert run("train.py", f"output_dir={directory}", *QUICK, "learning_rate=1e-2").returncode == 0
    files = [f"output_dir={tmp_path / 'evaluation'}", f"output_file={tmp_path / 'out.json'}"]
    done = run("eval.py", f"run={directory}", "max_samples=8", *files)
    assert done.returncode == 0, done.stderr
    expected = metrics(directory)[-1]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["accuracy"] == pytest.approx(expected["eval_rewards/accuracies"])
    for name, value in found.items():
        if name.startswith("eval_") and name != "eval_runtime":
            assert value == pytest.approx(expected[name], rel=1e-6), name
    assert abs(expected["eval_rewards/margins"]) > 0


MISTAKES = [
    (["pref_bta=0.2"], "pref_bta=0.2: unknown key; did you mean pref_beta?"),
    (["pref_beta=abc"], "pref_beta=abc: expected a number"),
    (["pref_beta=-1"], "pref_beta=-1.0: must be above 0"),
    (["pref_loss=ipoo"], "pref_loss=ipoo: expected one or several of sigmoid, robust, hinge"),
    (["pref_loss=hinge", "dpo_label_smoothing=0.1"], "dpo_label_smoothing=0.1: not read by pref_loss=hinge"),
    (["pref_loss=sigmoid,sft", "loss_weights=[1]"], "loss_weights=[1.0]: 1 for 2 losses; give one for each"),
    (["loss=ip"], "loss=ip: no such file in conf/loss; did you mean ipo?"),
    (["bf16=true", "fp16=true"], "bf16=True and fp16=True"),
    (["model_name_or_path=/no/such/model", "dataset=world"], "model_name_or_path=/no/such/model: no such directory"),
    (["dataset=/no/such.json", "model_name_or_path=world"], "dataset=/no/such.json: no such file"),
    (["dataset=world"], "model_name_or_path is not set"),
    (["lora_target=nonsense"], "no linear layer is 'nonsense'"),
    (["template=llama3"], "template=llama3: the tokenizer has no token <|start_header_id|>"),
    (["config_file=/no/such.yaml"], "config_file=/no/such.yaml: no such file"),
    (["nonsense"], "nonsense: expected key=value"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_a_mistake_is_refused_before_any_step(tmp_path, monkeypatch, arguments, message):
    """In this process, by the functions that the command calls in turn; the next test is the command itself."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=re.escape(message)):
        expanded, _ = expand_arguments([*arguments, f"output_dir={tmp_path / 'run'}"], TrainConfig)
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            train(compose("config", expanded))


@pytest.mark.parametrize(
    "arguments",
    [
        ["pref_bta=0.2"],
        *(
            pytest.param(a, marks=pytest.mark.slow)
            for a in (["pref_beta=-1"], ["dataset=BAD", "model_name_or_path=world"])
        ),
    ],
)
def test_a_mistake_is_one_line_and_a_non_zero_exit(tmp_path, arguments):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n[1]\n')
    arguments = [argument.replace("BAD", str(tmp_path / "bad.jsonl")) for argument in arguments]
    done = run("train.py", *arguments, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_directory_that_holds_a_run_is_not_touched(tmp_path):
    assert run("train.py", f"output_dir={tmp_path}", *QUICK, "eval_dataset=null").returncode == 0
    before = (tmp_path / "metrics.jsonl").read_bytes()
    done = run("train.py", f"output_dir={tmp_path}", *QUICK, "eval_dataset=null")
    assert done.returncode == 2 and "holds a run already" in done.stderr
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_job_that_fails_does_not_end_the_sweep(tmp_path):
    done = run("train.py", "-m", "lora_dropout=2,0", f"output_dir={tmp_path}", *QUICK, "eval_dataset=null")
    assert done.returncode == 2
    assert "error: job 0: lora_dropout=2.0: must be at least 0 and below 1" in done.stderr
    with open(tmp_path / "results.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert "lora_dropout=2.0" in first["error"] and not first["loss"]
    assert not second["error"] and float(second["loss"]) > 0


@pytest.mark.slow
def test_a_run_with_val_size_keeps_its_held_out_pairs_for_its_evaluation(tmp_path):
    options = ["dataset=world", "eval_dataset=null", "val_size=4", "experiment=world", "learning_rate=1e-2"]
    done = run("train.py", *options, *QUICK, f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "held_out.jsonl").read_text().splitlines()) == 4
    files = [f"output_dir={tmp_path / 'evaluation'}", f"output_file={tmp_path / 'out.json'}"]
    done = run("eval.py", f"run={tmp_path}", *files)
    assert done.returncode == 0, done.stderr
    result, expected = json.loads((tmp_path / "out.json").read_text()), metrics(tmp_path)[-1]
    assert result["eval_rewards/margins"] == pytest.approx(expected["eval_rewards/margins"], rel=1e-5) != 0


def test_use_rslora_reaches_the_adapter():
    """Rank 16 and alpha 32: 32 / 16 without, 32 / 4 with it."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for option, scaling in (("false", 2), ("true", 8)):
            cfg = compose("config", ["lora_rank=16", "lora_alpha=32", f"use_rslora={option}"])
            policy = build_policy(cfg, torch.device("cpu"))
            assert {layer.scaling for layer in lora_layers(policy).values()} == {scaling}
