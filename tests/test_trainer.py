"""The training loop: how a batch is cut does not show, a seed determines a run, a resume continues it exactly."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dpo.build import WORLD
from dpo.metrics import TIMING_KEYS
from dpo.trainer import Plan
from models.weights import read_tensors
from train import train

CONF = str(Path(__file__).parent.parent / "conf")
SMALL = ["max_samples=24", "max_steps=3", "logging_steps=1", "num_samples=0", "eval_dataset=null", "device=cpu"]


def config(output_dir: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", [*SMALL, f"output_dir={output_dir}", *overrides])


def rows(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING_KEYS} for line in lines]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(run / "adapter_model.safetensors")


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_the_cut_into_micro_batches_does_not_show(tmp_path, loss):
    """8 x 1, 2 x 4 and 1 x 8 are one logical batch of 8. float32 adds up in another order, which Adam magnifies."""
    results = []
    for size, accumulate in ((8, 1), (2, 4), (1, 8)):
        cut = [f"per_device_train_batch_size={size}", f"gradient_accumulation_steps={accumulate}", f"pref_loss={loss}"]
        train(config(tmp_path / f"{size}", *cut))
        results.append((rows(tmp_path / f"{size}"), adapter(tmp_path / f"{size}")))
    for metrics, weights in results[1:]:
        for row, expected in zip(metrics, results[0][0], strict=True):
            assert row == pytest.approx(expected, rel=2e-5, abs=2e-6)
        assert metrics[0] == pytest.approx(results[0][0][0], rel=2e-6, abs=2e-6)  # before Adam's first step
        for name, tensor in weights.items():
            # Adam's first steps are sign-like: a gradient of 1e-9 that changes in its last digits moves by a whole
            # learning rate times that relative change, so weights agree less closely than losses.
            torch.testing.assert_close(tensor, results[0][1][name], rtol=1e-3, atol=5e-5)


def test_the_cut_does_not_show_in_sft_either(tmp_path):
    """The loss is the mean over the logical batch's response tokens, not a mean of micro-batch means."""
    for size, accumulate in ((8, 1), (2, 4)):
        cut = [f"per_device_train_batch_size={size}", f"gradient_accumulation_steps={accumulate}", "stage=sft"]
        train(config(tmp_path / f"{size}", *cut))
    for row, expected in zip(rows(tmp_path / "2"), rows(tmp_path / "8"), strict=True):
        assert row == pytest.approx(expected, rel=2e-5, abs=2e-6)


def test_a_seed_determines_the_run_and_another_seed_another(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(config(tmp_path / name, f"seed={seed}", "lora_dropout=0.1", "per_device_train_batch_size=4"))
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert rows(tmp_path / "a") != rows(tmp_path / "c")


@pytest.mark.parametrize("kind", ["finetuning_type=lora", "finetuning_type=full"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, kind):
    common = [
        kind,
        "max_steps=6",
        "save_steps=2",
        "lora_dropout=0.1",
        "logging_steps=3",
        "per_device_train_batch_size=4",
    ]
    learning = "learning_rate=1e-5" if "full" in kind else "learning_rate=1e-3"
    train(config(tmp_path / "whole", *common, learning))
    for later in (tmp_path / "whole" / "checkpoint-6", tmp_path / "whole" / "checkpoint-4"):
        later.rename(tmp_path / later.name)
    weights = "adapter_model.safetensors" if "lora" in kind else "model.safetensors"
    expected, expected_rows = read_tensors(tmp_path / "whole" / weights), rows(tmp_path / "whole")
    train(config(tmp_path / "whole", *common, learning, "resume_from_checkpoint=true"))
    assert rows(tmp_path / "whole") == expected_rows
    for name, tensor in read_tensors(tmp_path / "whole" / weights).items():
        assert torch.equal(tensor, expected[name]), name


def test_the_first_loss_is_log_2_and_the_first_rewards_are_0(tmp_path):
    """Policy equals reference before the first update, whatever the reference's source."""
    for kind in ("finetuning_type=lora", "finetuning_type=full"):
        run = tmp_path / kind.partition("=")[2]
        train(config(run, kind, "max_steps=1", "learning_rate=1e-6"))
        first = rows(run)[0]
        assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)
        assert first["rewards/margins"] == 0 and first["rewards/accuracies"] == 0


def test_an_adapter_that_is_continued_is_its_own_reference(tmp_path):
    """Without ref_model the reference is a snapshot of the adapter (loss log 2); ref_model names the base instead."""
    train(config(tmp_path / "first", "learning_rate=1e-2"))
    continued = f"adapter_name_or_path={tmp_path / 'first'}"
    train(config(tmp_path / "snapshot", continued, "max_steps=1"))
    train(config(tmp_path / "base", continued, "max_steps=1", "ref_model=world"))
    assert rows(tmp_path / "snapshot")[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert abs(rows(tmp_path / "base")[0]["loss"] - 0.6931472) > 1e-3


def test_the_norm_that_is_reported_is_the_one_before_clipping(tmp_path):
    for clip in (0, 1e-6):
        train(config(tmp_path / str(clip), f"max_grad_norm={clip}", "max_steps=1"))
    assert rows(tmp_path / "0")[0]["grad_norm"] == rows(tmp_path / "1e-06")[0]["grad_norm"] > 1e-3


@pytest.mark.parametrize("precision", ["bf16=true", "fp16=true", "gradient_checkpointing=true"])
def test_lower_precision_and_recomputation_follow_the_float32_run(tmp_path, precision):
    """bfloat16 keeps 8 bits: a response's log-probability of about -20 nats is known to about 0.1."""
    train(config(tmp_path / "plain"))
    train(config(tmp_path / "other", precision))
    for row, expected in zip(rows(tmp_path / "other"), rows(tmp_path / "plain"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=0.02)
        assert row["logps/chosen"] == pytest.approx(expected["logps/chosen"], rel=0.01)
    assert all(tensor.dtype == torch.float32 for tensor in adapter(tmp_path / "other").values())


def plan(rows: int, *overrides: str) -> Plan:
    return Plan.of(config(Path("unused"), "max_steps=-1", *overrides), rows)


def test_epochs_become_steps_rounded_up_as_in_hugging_face():
    """7 rows in batches of 2 are 4 steps an epoch; 0.5 epochs 2, 0.6 epochs 3, 2 epochs 8; max_steps stands before."""
    batch = "per_device_train_batch_size=2"
    steps = {e: plan(7, batch, f"num_train_epochs={e}").total_steps for e in (1, 0.5, 0.6, 2)}
    assert steps == {1: 4, 0.5: 2, 0.6: 3, 2: 8}
    assert plan(7, batch, "max_steps=5").total_steps == 5


def test_every_epoch_visits_every_row_once_in_an_order_of_its_own():
    p = plan(7, "per_device_train_batch_size=2", "num_train_epochs=2")
    epochs = [[i for step in range(4 * e, 4 * e + 4) for i in p.indices(step)] for e in (0, 1)]
    assert [sorted(order) for order in epochs] == [list(range(7))] * 2
    assert epochs[0] != epochs[1]


def test_disable_shuffling_keeps_file_order():
    p = plan(5, "per_device_train_batch_size=2", "disable_shuffling=true")
    assert [p.indices(step) for step in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]


def test_a_reference_with_another_vocabulary_is_refused(tmp_path):
    """Its log-probabilities would be of other text."""
    other = tmp_path / "other"
    shutil.copytree(WORLD / "model", other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("<|endoftext|>", "<|endofstory|>"), encoding="utf-8")
    with pytest.raises(ValueError, match="another vocabulary"):
        train(config(tmp_path / "run", f"ref_model={other}"))


def test_a_run_that_cannot_begin_leaves_no_trace_and_removes_nothing(tmp_path):
    run = tmp_path / "run"
    train(config(run))
    before = sorted((p.name, p.stat().st_mtime_ns) for p in run.iterdir())
    for overrides in (
        ["overwrite_output_dir=true", "lora_target=nonsense"],
        ["overwrite_output_dir=true", f"adapter_name_or_path={run}"],
        ["resume_from_checkpoint=true"],
        [],
    ):
        with pytest.raises(ValueError):
            train(config(run, *overrides))
        assert sorted((p.name, p.stat().st_mtime_ns) for p in run.iterdir()) == before


def test_a_resume_with_another_config_is_refused(tmp_path):
    train(config(tmp_path, "save_steps=2"))
    with pytest.raises(ValueError, match=r"pref_beta=0.5: the run in .* was made with pref_beta=1.0"):
        train(config(tmp_path, "save_steps=2", "resume_from_checkpoint=true", "pref_beta=0.5"))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_row(tmp_path):
    """Weights so large that fp16 overflows in the forward pass: no loss scale can mend that."""
    from models.weights import write_tensors

    broken = tmp_path / "broken"
    shutil.copytree(WORLD / "model", broken)
    tensors = read_tensors(broken / "model.safetensors")
    write_tensors(broken / "model.safetensors", {n: t * (1e4 if "down_proj" in n else 1) for n, t in tensors.items()})
    with pytest.raises(ValueError, match=r"step 1: the loss is not finite \(rows .*train.jsonl:\d+"):
        train(config(tmp_path / "run", f"model_name_or_path={broken}", "fp16=true"))


def test_resume_from_checkpoint_false_starts_anew(tmp_path):
    """LLaMA-Factory's files write false where they mean none."""
    train(config(tmp_path, "resume_from_checkpoint=false", "max_steps=1"))
    assert len(rows(tmp_path)) == 1
