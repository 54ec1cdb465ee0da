"""`python -m dpo.judge`: its keys, labelling and the card from end to end, and every refusal before a model loads."""

import json
import re
import shutil
from dataclasses import fields

import pytest
from hydra import compose, initialize_config_dir
from judge_server import pair, serving
from omegaconf import DictConfig, OmegaConf

import eval  # noqa: F401  (registers its schema)
from dpo.config import EvalConfig, JudgeKeys
from dpo.data import read_examples
from dpo.judge.__main__ import JudgeConfig, _own, run
from dpo.judge.build import build_judge
from dpo.judge.label import rows_of
from dpo.judge.verdict import Verdict
from models.command import CONF, expand_arguments
from models.weights import WORLD


def config(*arguments: str) -> DictConfig:
    expanded, _ = expand_arguments([*arguments, "judge_cache=null"], JudgeConfig)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("judge", expanded)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_schema_and_file_have_the_same_keys_in_the_same_order_and_each_is_explained():
    written = [str(key) for key in OmegaConf.load(CONF / "judge.yaml") if key not in ("defaults", "hydra")]
    assert written == [f.name for f in fields(JudgeConfig)]
    text = (CONF / "judge.yaml").read_text().splitlines()
    undocumented = [line for i, line in enumerate(text) if line.partition(":")[0] in written and text[i - 1][:1] != "#"]
    assert undocumented == ["judge_price_completion: null"]  # its line stands under that of judge_price_prompt


def test_eval_and_the_command_have_the_judges_keys_and_values_in_common():
    files = [OmegaConf.load(CONF / name) for name in ("judge.yaml", "eval.yaml")]
    for key in [f.name for f in fields(JudgeKeys)][1:]:
        assert files[0][key] == files[1][key], key
    assert OmegaConf.is_missing(files[0], "judge") and files[1].judge is None
    assert {f.name for f in fields(JudgeKeys)} <= {f.name for f in fields(EvalConfig)}


def test_the_world_is_labelled_by_its_reward(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    judged = run(config("judge=gold", "dataset=world", "max_samples=40", f"output_file={out}"))
    examples, _ = read_examples(out, stage="dpo", on_bad_row="stop")
    assert len(examples) == len(judged) == 40 and f"labelled: {out}" in capsys.readouterr().out


def test_a_file_is_labelled_by_an_endpoint(tmp_path, capsys):
    data = write(
        tmp_path / "p.jsonl",
        *({"prompt": f"Question {i}?", "responses": [f"quality {i}", "quality 2!"]} for i in range(5)),
    )
    out = tmp_path / "out.jsonl"
    with serving() as server:
        keys = [
            "judge=openai",
            f"judge_base_url={server.url}",
            "judge_model=m",
            f"dataset={data}",
            f"output_file={out}",
        ]
        judged = run(config(*keys))
    second, first, tie = Verdict.SECOND, Verdict.FIRST, Verdict.TIE
    assert [one.verdict for one in judged] == [second, second, tie, first, first]
    assert "10 ok" in capsys.readouterr().out
    assert [row.responses[0] for row in read_examples(out, stage="dpo", on_bad_row="stop")[0]] == [
        "quality 2!", "quality 2!", "quality 3", "quality 4",
    ]  # fmt: skip
    assert len((tmp_path / "out.jsonl.ties.jsonl").read_text().splitlines()) == 1


def test_too_many_invalid_pairs_fail_after_what_is_valid_was_written(tmp_path):
    data = write(tmp_path / "p.jsonl", *({"id": str(i), "prompt": "Why?", "responses": ["a", "b"]} for i in range(20)))
    labels = write(tmp_path / "labels.jsonl", *({"id": str(i), "verdict": "first"} for i in range(18)))
    out = tmp_path / "out.jsonl"
    keys = ["judge=human", f"judge_labels={labels}", f"dataset={data}", f"output_file={out}"]
    with pytest.raises(
        ValueError, match=r"2 of 20 pairs have no verdict, more than max_invalid=0.05 allows; the first: .*no label"
    ):
        run(config(*keys))
    assert len(out.read_text().splitlines()) == 18
    assert len((tmp_path / "out.jsonl.invalid.jsonl").read_text().splitlines()) == 2
    assert len(run(config(*keys[:-1], f"output_file={tmp_path / 'other.jsonl'}", "max_invalid=0.1"))) == 20


def test_pairs_that_nobody_has_judged_yet_come_with_their_ids_and_are_judged_then(tmp_path):
    data = write(tmp_path / "p.jsonl", *({"prompt": f"{i}?", "responses": ["a", "b"]} for i in range(3)))
    labels, out = tmp_path / "labels.jsonl", tmp_path / "out.jsonl"
    keys = ["judge=human", f"judge_labels={labels}", f"dataset={data}"]
    labels.touch()
    with pytest.raises(ValueError, match=r"3 of 3 pairs have no verdict"):
        run(config(*keys, f"output_file={out}"))
    waiting = [json.loads(line) for line in (tmp_path / "out.jsonl.invalid.jsonl").read_text().splitlines()]
    write(labels, *({"id": row["id"], "verdict": "second"} for row in waiting))
    assert {one.verdict for one in run(config(*keys, f"output_file={tmp_path / 'done.jsonl'}"))} == {Verdict.SECOND}


def test_the_card_of_the_world_says_what_its_labels_are_worth(tmp_path, capsys):
    """One label in 25 goes against the gold reward; the 400 held-out pairs are a sample."""
    card = tmp_path / "card.json"
    run(config("judge=gold", "dataset=world", "card=true", f"output_file={card}"))
    said = json.loads(card.read_text())
    assert said["card"]["agreement"] == pytest.approx(0.96, abs=0.03) and said["poor"] == []
    assert "report card of gold, on 400 pairs" in capsys.readouterr().out


def test_a_card_can_have_labels_of_its_own(tmp_path):
    data = write(
        tmp_path / "p.jsonl", *({"id": str(i), "prompt": "Why?", "responses": ["longer", "b"]} for i in range(4))
    )
    human, right = (write(tmp_path / f"{name}.jsonl", *({"id": str(i), "verdict": verdict} for i in range(4)))
                    for name, verdict in (("human", "first"), ("right", "tie")))  # fmt: skip
    card = tmp_path / "card.json"
    keys = ["judge=human", f"judge_labels={human}", f"dataset={data}", "card=true", f"output_file={card}"]
    run(config(*keys, f"card_labels={right}"))
    assert json.loads(card.read_text())["card"]["p_longer_equal"] == 1.0
    run(config(*keys))
    assert "agreement" not in json.loads(card.read_text())["card"]


@pytest.mark.parametrize(
    ("keys", "own"),
    [({"model_a": "gpt-x", "model_b": "other"}, "first"), ({"model_a": "other", "model_b": "gpt-x"}, "second"),
     ({"model_a": "gpt-x", "model_b": "gpt-x"}, None), ({"model_a": "gpt-x"}, None), ({}, None)],
)  # fmt: skip
def test_rows_say_who_wrote_their_responses(keys, own):
    (row,) = rows_of({"prompt": "Why?", "response_a": "a", "response_b": "b"} | keys, "p:1", data_format=None,
                     ranking_to_pairs="best_worst")  # fmt: skip
    found = _own(row.writers, "models/gpt-x")
    assert (found and found.value) == own
    assert _own(("gpt-x", "other"), None) is None


@pytest.mark.parametrize(
    ("row", "writers"),
    [({"chosen": "a", "rejected": "b", "chosen_model": "x", "rejected_model": "y"}, ("x", "y")),
     ({"chosen": "a", "rejected": "b", "model_a": "x", "model_b": "y"}, ()),
     ({"responses": ["a", "b"], "scores": [1, 2], "model_a": "x", "model_b": "y"}, ()),
     ({"responses": ["a", "b"], "model_a": "x", "model_b": "y"}, ("x", "y"))],
)  # fmt: skip
def test_writers_are_known_where_the_rows_order_is(row, writers):
    """Scores put b first, whoever is called a."""
    (found,) = rows_of({"prompt": "Why?"} | row, "p:1", data_format=None, ranking_to_pairs="best_worst")
    assert found.writers == writers


def test_a_dry_run_says_the_price_and_asks_nothing(tmp_path, capsys):
    """Two questions of about 1,000 characters: 250 tokens each at 4 per million, and a token of answer at 1 each."""
    data = write(tmp_path / "p.jsonl", {"prompt": "Why?", "responses": ["a", "b"]})
    keys = ["judge=openai", "judge_model=m", "judge_price_prompt=4e6", "judge_price_completion=1e6", "dry_run=true"]
    assert run(config(*keys, f"dataset={data}", f"output_file={tmp_path / 'o.jsonl'}")) == []
    pairs, questions, tokens, _, cost = (
        float(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", capsys.readouterr().out)
    )
    assert (pairs, questions) == (1, 2) and cost == 4 * tokens + 2 and 300 < tokens < 600


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["judge=model"], "judge=model: judge_model is not set"),
        (["judge=openai"], "judge=openai: judge_model is not set"),
        (["judge=human"], "judge=human: judge_labels is not set"),
        (["judge=gpt"], "judge=gpt: expected one of gold, model, openai, human"),
        (["judge=gold", "judge_base_url=http://x/v1"], "judge_base_url=http://x/v1: is not read with judge=gold"),
        (["judge=gold", "judge_max_requests=3"], "judge_max_requests=3: is not read"),
        (["judge=gold", "judge_requests_per_minute=3"], "judge_requests_per_minute=3: is not read"),
        (["judge=gold", "judge_price_completion=3"], "judge_price_completion=3.0: is not read"),
        (["judge=gold", "judge_labels=f.jsonl"], "judge_labels=f.jsonl: is not read with judge=gold"),
        (["judge=human", "judge_labels=f.jsonl", "judge_model=m"], "judge_model=m: is not read with judge=human"),
        (["judge=openai", "dry_run=true"], "judge=openai: judge_model is not set"),
        (["judge=openai", "judge_model=m", "judge_max_cost=1"], "judge_max_cost=1: needs judge_price_prompt"),
        (["judge=gold", "judge_logprobs=perhaps"], "judge_logprobs=perhaps: expected auto, true or false"),
        (["judge=gold", "max_invalid=1.5"], "max_invalid=1.5: must be at least 0 and below 1"),
        (["judge=gold", "judge_timeout=0"], "judge_timeout=0.0: must be above 0"),
        (["judge=gold", "bf16=true", "fp16=true"], "choose one"),
        (["judge=gold", "output_file=out.csv"], "output_file=out.csv: expected the name of a .jsonl file"),
    ],
)
def test_mistakes_are_said_before_anything_is_asked(arguments, says, tmp_path):
    defaults = [] if any("output_file" in argument for argument in arguments) else [f"output_file={tmp_path}/o.jsonl"]
    with pytest.raises(ValueError, match=says):
        run(config("dataset=world", *defaults, *arguments))


def test_a_task_that_needs_a_judge_says_so():
    with pytest.raises(ValueError, match="judge is not set; pass judge=gold, model, openai, human"):
        build_judge(OmegaConf.create({"judge": None}))


def test_a_local_model_is_built_from_its_directory():
    judge = build_judge(config("judge=model", "judge_model=world", "dataset=world", "device=cpu"))
    (one,) = judge([pair(1, 9, 2)])
    assert judge.name == "model:world" and one.p is not None


def test_two_local_models_of_one_directory_name_are_two_judges_by_name_and_digest(tmp_path):
    """Else an evaluation that goes on would mix their verdicts."""
    directories = [tmp_path / name / "final" for name in ("a", "b")]
    for directory in directories:
        shutil.copytree(WORLD / "model", directory)
    with (directories[1] / "config.json").open("a") as file:
        file.write("\n")
    a, b = (
        build_judge(config("judge=model", f"judge_model={directory}", "dataset=world", "device=cpu"))
        for directory in directories
    )
    assert a.name != b.name and a.digest != b.digest
