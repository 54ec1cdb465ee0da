"""The command runs lm_eval's tasks on a policy; its keys are those of conf/harness.yaml."""

import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from dpo.build import WORLD
from dpo.evals.choices import encode_choices, option_logps
from dpo.evals.harness import RULES, HarnessConfig, evaluate
from models.command import CONF
from models.tokenizer import Tokenizer
from models.weights import load_model

TASK = """\
task: cows
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{q}}"
doc_to_choice: "{{o}}"
doc_to_target: "{{a}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROWS = [
    {"q": "What does a cow eat?", "o": ["A cow eats grass.", "stone the if"], "a": 0},
    {"q": "Is a lion a pet?", "o": ["grass grass", "A lion is no pet."], "a": 1},
    {"q": "May I pet a cow?", "o": ["A cow", "A cow is"], "a": 1},  # an option that begins another is likelier
]


def configured(**values) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        values = {"model_name_or_path": "world", **values}
        return compose("harness", [f"{key}={value}" for key, value in values.items()])


def test_the_schema_and_the_file_have_the_same_keys():
    written = [str(key) for key in OmegaConf.load(CONF / "harness.yaml") if key not in ("defaults", "hydra")]
    assert written == [f.name for f in fields(HarnessConfig)]
    assert all(f.default == "???" for f in fields(HarnessConfig))


@pytest.mark.parametrize("key, value", [("limit", 0), ("num_fewshot", -1), ("max_length", 0)])
def test_a_value_out_of_range_is_refused(key, value):
    assert key in RULES
    with pytest.raises(ValueError, match=f"{key}={value}: must"):
        evaluate(configured(tasks="cows", **{key: value}))


def test_two_precisions_are_refused():
    with pytest.raises(ValueError, match="bf16=True and fp16=True: choose one"):
        evaluate(configured(tasks="cows", bf16=True, fp16=True))


def test_tasks_must_be_named():
    with pytest.raises(ValueError, match="tasks is not set"):
        evaluate(configured())


def test_without_lm_eval_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r'dpo.evals.harness needs lm_eval; pip install -e "\.\[lm-eval\]"'):
        evaluate(configured(tasks="cows"))


@pytest.mark.slow
def test_a_task_of_local_rows_is_measured_and_an_unknown_one_refused(tmp_path: Path, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "cows.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.jsonl")))
    results = evaluate(configured(tasks="cows", include_path=tmp_path, output_file=tmp_path / "out.json"))
    policy = load_model(WORLD / "model", dtype=torch.float32, device=torch.device("cpu"))
    asked = [(row["q"], [f" {option}" for option in row["o"]]) for row in ROWS]
    encoded = encode_choices(Tokenizer(WORLD / "model"), asked, 512)
    logps = option_logps(policy, [q.context_ids for q in encoded], [q.option_ids for q in encoded], 1000)
    expected = sum(int(values.argmax()) == row["a"] for values, row in zip(logps, ROWS, strict=True)) / 3
    assert results["results"]["cows"]["acc,none"] == pytest.approx(expected) and 0 < expected < 1
    assert json.loads((tmp_path / "out.json").read_text())["results"]["cows"]["acc,none"] == pytest.approx(expected)
    assert "|cows |" in capsys.readouterr().out
    from dpo.evals.lm_eval_model import PolicyLM

    chats: list = []
    original = PolicyLM.apply_chat_template

    def record(self, chat, *args, **kwargs):
        chats.append(chat)
        return original(self, chat, *args, **kwargs)

    monkeypatch.setattr(PolicyLM, "apply_chat_template", record)
    results = evaluate(configured(tasks="cows", include_path=tmp_path, limit=1, apply_chat_template=True))
    assert results["n-samples"]["cows"]["effective"] == 1
    assert [chat[-1]["content"] for chat in chats] == ["What does a cow eat?"]
    with pytest.raises(ValueError, match="tasks=cow: lm_eval has no such task"):
        evaluate(configured(tasks="cow", include_path=tmp_path))
