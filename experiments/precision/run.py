"""What a weight of bfloat16 loses at a small learning rate: full fine-tuning in three arms from one start, as CSV.

    python -m experiments.precision.run MODEL_DIR DATASET [UPDATES] [LEARNING_RATE]

    float32             weights and computation in float32
    bf16 masters        bf16=true: computation in bfloat16, weights and optimiser state in float32
    bf16 saved narrow   the same run, its weights rounded to bfloat16 at the end
    bf16 alone          computation, weights and optimiser state in bfloat16, as after a plain model.bfloat16()

The arms make the same updates of the same rows. dW is how far the weights went; the cosine is to float32's dW. What
they are worth is measured on held-out rows in float32, whatever they were trained in, against the start; `logged` is
what the run itself says, computed as it trains, of its last quarter.
"""

import copy
import csv
import math
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from torch import Tensor

from dpo.build import build_objective, build_policy, build_rows, build_template, new_objective
from dpo.config import TrainConfig
from dpo.doctor.flips import NoDirectory
from dpo.reference import frozen_reference
from dpo.tokens import Rows
from dpo.trainer import Trainer, evaluate
from models.command import CONF, expand_arguments
from models.transformer import Transformer

HELD_OUT, BATCH = 48, 8
EVALUATED = ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies")
COLUMNS = ("learning_rate", "arm", "changed", "|dW|/|W|", "cosine", *EVALUATED, "logged loss", "logged margins")


def config(model_dir: str, dataset: str, updates: int, learning_rate: float, bf16: bool) -> DictConfig:
    arguments, _ = expand_arguments([
        f"model_name_or_path={model_dir}", f"dataset={dataset}", "on_bad_row=skip", "device=cpu", f"bf16={bf16}",
        "finetuning_type=full", "cutoff_len=256", f"max_samples={updates * BATCH + HELD_OUT}", f"val_size={HELD_OUT}",
        f"per_device_train_batch_size={BATCH}", "gradient_accumulation_steps=1", f"max_steps={updates}",
        "lr_scheduler_type=constant_with_warmup", f"learning_rate={learning_rate}", "save_strategy=no",
        "eval_strategy=no", f"logging_steps={max(1, updates // 4)}",
    ], TrainConfig)  # fmt: skip
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", arguments)


def in_float32(policy: Transformer) -> Transformer:
    """A frozen copy whose weights and computation are float32."""
    model = copy.deepcopy(policy).requires_grad_(False).float()
    model.dtype = torch.float32
    return model


def moves(policy: Transformer, start: Transformer) -> list[Tensor]:
    """How far every weight is from the start, flat."""
    pairs = zip(policy.parameters(), start.parameters(), strict=True)
    return [(now.detach().float() - before).flatten() for now, before in pairs]


def dot(ones: list[Tensor], others: list[Tensor]) -> float:
    return sum(float(one.double() @ other.double()) for one, other in zip(ones, others, strict=True))


def describe(
    arm: str, policy: Transformer, start: Transformer, against: list[Tensor], cfg: DictConfig, rows: Rows
) -> dict[str, Any]:
    """One line of the result; against: the first arm's dW."""
    dW, W = moves(policy, start), [weight.flatten() for weight in start.parameters()]
    objective = new_objective(cfg)
    objective.reference = frozen_reference(start)
    measured = evaluate(in_float32(policy), objective, rows.evaluation, cfg.per_device_eval_batch_size)
    norm = math.sqrt(dot(dW, dW))
    return {
        "learning_rate": cfg.learning_rate,
        "arm": arm,
        "changed": sum(int(d.count_nonzero()) for d in dW) / sum(len(d) for d in dW),
        "|dW|/|W|": norm / math.sqrt(dot(W, W)),
        "cosine": dot(dW, against) / (norm * math.sqrt(dot(against, against))) if norm else math.nan,
    } | {name: measured[name] for name in EVALUATED}


def main(model_dir: str, dataset: str, updates: str = "40", learning_rate: str = "5e-7") -> None:
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    against: list[Tensor] = []
    for arm in ("float32", "bf16 masters", "bf16 alone"):
        cfg = config(model_dir, dataset, int(updates), float(learning_rate), bf16=arm != "float32")
        rows = build_rows(cfg, build_template(cfg))
        policy = build_policy(cfg, torch.device("cpu"))
        if arm == "bf16 alone":
            policy.to(torch.bfloat16)
        objective, _ = build_objective(cfg, policy, rows)
        start = in_float32(policy)
        trainer = Trainer(cfg, policy, objective, rows.train, [], NoDirectory(), Path())
        with redirect_stdout(sys.stderr):
            logged = trainer.train()
        against = against or moves(policy, start)
        last = {"logged loss": logged["loss"], "logged margins": logged["rewards/margins"]}
        lines = [describe(arm, policy, start, against, cfg, rows) | last]
        if arm == "bf16 masters":
            # Against a start that is rounded too: what rounding does to weights that were float32 is no move.
            narrow, narrow_start = policy.to(torch.bfloat16), start.to(torch.bfloat16).float()
            lines.append(describe("bf16 saved narrow", narrow, narrow_start, against, cfg, rows))
        for line in lines:
            writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in line.items()})
            sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
