"""From config to rows: several datasets become one list, and what is odd about them is said."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import eval  # noqa: F401  (registers its schema)
import train  # noqa: F401
from dpo import build
from dpo.build import build_eval_rows, build_rows
from models.template import ChatTemplate
from models.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate("auto", Tokenizer(ROOT / "experiments" / "world" / "model"))


def config(name: str, **values: object):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(name, [f"{key}={value}" for key, value in {"model_name_or_path": "world", **values}.items()])


def dataset(folder: Path, name: str, *rows: dict) -> str:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def pairs(*prompts: str) -> list[dict]:
    return [{"prompt": prompt, "chosen": "Grass.", "rejected": "Stones."} for prompt in prompts]


def prompts(rows) -> list[str]:
    return [row.example.messages[-1]["content"] for row in rows]


def test_datasets_are_read_one_after_the_other_or_mixed_with_a_warning(tmp_path, template):
    """max_samples is of each."""
    names = f"[{dataset(tmp_path, 'a', *pairs('1', '2', '3'))},{dataset(tmp_path, 'b', *pairs('4', '5'))}]"
    given = {"dataset": names, "dataset_dir": tmp_path, "eval_dataset": "null"}
    rows = build_rows(config("config", **given, max_samples=2), template)
    assert (prompts(rows.train), rows.warnings) == (["1", "2", "4", "5"], [])
    rows = build_rows(config("config", **given, mix_strategy="interleave_under"), template)
    assert prompts(rows.train) == ["1", "4", "2", "5"]
    assert rows.warnings == ["mixed: 2 rows from the 3 of a, 2 rows from the 2 of b"]
    given |= {"mix_strategy": "interleave_over", "interleave_probs": "[9,1]"}
    rows = build_rows(config("config", **given, max_samples=1), template)
    assert len(rows.train) > 2 and prompts(rows.train) == ["1"] * (len(rows.train) - 1) + ["4"]


def test_held_out_datasets_are_evaluated_whole_and_what_is_also_trained_on_is_said(tmp_path, template):
    """mix_strategy is of the training rows."""
    dataset(tmp_path, "a", *pairs("1", "2"))
    dataset(tmp_path, "b", *pairs("2", "3", "4"))
    dataset(tmp_path, "c", *pairs("1", "5"))
    given = {"dataset": "a", "eval_dataset": "[b,c]", "dataset_dir": tmp_path, "mix_strategy": "interleave_under"}
    rows = build_rows(config("config", **given), template)
    assert prompts(rows.evaluation) == ["2", "3", "4", "1", "5"]
    assert rows.warnings == ["2 of 5 held-out prompts are also trained on"]
    rows = build_eval_rows(config("eval", eval_dataset="[b,c]", dataset_dir=tmp_path), template)
    assert prompts(rows.evaluation) == ["2", "3", "4", "1", "5"]


@pytest.mark.parametrize(("name", "key"), [("config", "dataset"), ("eval", "eval_dataset")])
def test_format_and_policy_reach_the_rows(tmp_path, template, name, key):
    ranked = {"prompt": "q", "responses": ["Grass.", "Hay.", "Stones."], "scores": [3, 2, 1], "chosen": "A cow."}
    given = {key: dataset(tmp_path, "a", ranked), "dataset_dir": tmp_path, "data_format": "ranked"}
    given |= {"eval_dataset": "null"} if name == "config" else {}
    build, side = (build_rows, "train") if name == "config" else (build_eval_rows, "evaluation")
    rows = getattr(build(config(name, **given), template), side)
    assert [row.example.responses for row in rows] == [("Grass.", "Stones.")]
    rows = getattr(build(config(name, **given, ranking_to_pairs="best_rest"), template), side)
    assert [row.example.responses for row in rows] == [("Grass.", "Hay."), ("Grass.", "Stones.")]


def test_a_split_by_prompt_holds_over_mixed_datasets(tmp_path, template):
    dataset(tmp_path, "a", *pairs(*"123456"))
    dataset(tmp_path, "b", *pairs(*"345678"))
    given = {"dataset": "[a,b]", "dataset_dir": tmp_path, "eval_dataset": "null", "val_size": 0.3}
    rows = build_rows(config("config", **given), template)
    assert not set(prompts(rows.train)) & set(prompts(rows.evaluation)) and rows.warnings == []
    assert len(rows.train) + len(rows.evaluation) == 12


def test_a_token_cache_knows_what_is_trained_on_from_what_is_held_out(tmp_path, template):
    """The same two files, once both to train on and once one of each."""
    a, b = dataset(tmp_path, "a", *pairs("q1", "q2")), dataset(tmp_path, "b", *pairs("q3", "q4"))
    shared = {"dataset_dir": tmp_path, "tokenized_path": tmp_path / "cache"}
    both = build_rows(config("config", dataset=f"[{a},{b}]", eval_dataset="null", **shared), template)
    apart = build_rows(config("config", dataset=a, eval_dataset=b, **shared), template)
    assert (len(both.train), len(both.evaluation)) == (4, 0)
    assert (prompts(apart.train), prompts(apart.evaluation)) == (["q1", "q2"], ["q3", "q4"])


def test_probabilities_that_would_draw_for_ever_are_refused(tmp_path, template):
    a, b = dataset(tmp_path, "a", *pairs("q1", "q2")), dataset(tmp_path, "b", *pairs("q3", "q4"))
    cfg = config(
        "config", dataset=f"[{a},{b}]", dataset_dir=tmp_path, eval_dataset="null", mix_strategy="interleave_over",
        interleave_probs="[0.9999999,0.0000001]",
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"interleave_probs=\[0.9999999, 1e-07\]: would draw about 20000000 rows from 4;"
    ):
        build_rows(cfg, template)


# --- the policy ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attn_implementation": "flex_attention"}, "attn_implementation=flex_attention with device=cpu"),
        ({"torch_compile": True}, "torch_compile=True with device=cpu: needs"),
    ],
    ids=["flex_attention", "torch_compile"],
)
def test_what_the_device_cannot_do_is_refused_before_weights_are_read(monkeypatch, values, message):
    def read(*arguments, **more):
        raise AssertionError("weights were read")

    monkeypatch.setattr(build, "load_model", read)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=message):
        build.build_policy(config("config", **values), torch.device("cpu"))


def test_the_policy_and_a_reference_with_weights_of_its_own_compute_in_the_way_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(build, "refuse_flex", lambda *arguments: None)
    cfg = config("config", attn_implementation="flex_attention", torch_compile=True, finetuning_type="full")
    policy = build.build_policy(cfg, torch.device("cpu"))
    for model in (policy, build._frozen_copy(cfg, policy).model):
        assert model.attn_implementation == "flex_attention"
        assert all("after_attention" in vars(block) for block in model.model.layers)
    plain = build.build_policy(config("config"), torch.device("cpu"))
    assert plain.attn_implementation == "sdpa" and "after_attention" not in vars(plain.model.layers[0])
