"""Likely flipped labels: pairs of which a policy trained on all the other prompts says the opposite.

The prompts are dealt into k folds. For each fold DPO trains a fresh LoRA adapter on the others' rows and scores the
fold's own by the implicit reward margin (Rafailov et al. 2023, arXiv:2305.18290, Eq. 5)

    margin = beta (log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)),    p(label) = sigmoid(s margin)

No row is scored by a policy that saw its prompt, so none can have memorised its own label. The lowest margins are the
suspects. s is one number for all rows, the one under which the labels are likeliest (temperature scaling; Guo et al.
2017, arXiv:1706.04599): a policy of few rows is far too sure, and knows it from its held-out labels. p is about the
labels as they are: where a share e of them is flipped at random, who knows the truth gives a flipped one not 0 but e.

In a second round the rows are trained on with their p as weights, so that what the first took for flipped teaches less.

A policy can only repeat what most rows say of each other: flips that follow a rule look right to it, rare truths look
wrong, and where its held-out accuracy is near a half it has learned nothing and the ranking says nothing.

Shapes: N rows; every vector is (N,) unless said. R response tokens.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dpo.doctor.check import Check
from dpo.formats import Example
from dpo.losses import OFF
from dpo.objective import to_stream
from dpo.preference import PreferenceObjective, preference_loss
from dpo.run import RunDir
from dpo.tokens import Encoded
from dpo.trainer import Trainer
from models.lora import adapter_tensors, inject_lora, snapshot
from models.stream import Stream
from models.transformer import Transformer

# A label is doubtful where the held-out policy gives it less than this probability.
DOUBTFUL = 0.25
# Verdict warn above this share of doubtful labels; of the built-in world's, whose noise is by design, 2.5% are.
TOO_MANY = 0.05


class NoDirectory(RunDir):
    """Of a run that leaves no file behind."""

    def __init__(self) -> None:
        pass

    def log(self, metrics: dict[str, float]) -> None:
        pass

    def record(self, rows: Iterable[Mapping[str, Any]]) -> None:
        pass


def flipped_labels(
    policy: Transformer, rows: Sequence[Encoded], token_logps: Sequence[Tensor], cfg: DictConfig
) -> Check:
    """The check; see held_out_margins. At most flip_share of the rows are flagged, none where nothing was learned."""
    margin = held_out_margins(policy, rows, token_logps, cfg)
    scale = calibration(margin)
    p = probability(margin, scale)
    accuracy = float((margin > 0).mean())
    doubtful = float((p < DOUBTFUL).mean())
    # Two standard errors of a coin's accuracy.
    learned = accuracy > 0.5 + 1 / math.sqrt(len(margin))
    flagged = math.ceil(cfg.flip_share * len(margin)) if learned else 0
    suspects = {
        i: f"margin {margin[i]:.2f}, p(label) {p[i]:.0%}"
        for i in np.argsort(margin)[:flagged].tolist()
        if margin[i] < 0
    }
    numbers = {
        "held_out_accuracy": accuracy, "doubtful_share": doubtful, "scale": scale, "margin_mean": float(margin.mean()),
        **{f"margin_p{q:02d}": float(np.percentile(margin, q)) for q in (5, 50, 95)},
    }  # fmt: skip
    summary = (
        f"trained on the other prompts, the model agrees with {accuracy:.1%} of the labels and gives {doubtful:.1%} of "
        f"them a probability below {DOUBTFUL:g}"
    )
    advice = ""
    if not learned:
        summary += "; that is no better than a coin, so the ranking says nothing"
        advice = "Raise flip_learning_rate or flip_epochs, give more rows, or name a better model."
    elif suspects:
        advice = (
            "Read the flagged rows, the worst first; the ranking repeats the majority and finds no systematic flip."
        )
    verdict = "warn" if learned and doubtful > TOO_MANY else "note" if advice else "ok"
    question = "Which labels look flipped?"
    return Check("flipped_labels", question, verdict, summary, advice, numbers, suspects, values={"margin": margin})


def calibration(margin: np.ndarray) -> float:
    """The s between 0.01 and 100 that makes the labels likeliest: the least mean of -log sigmoid(s margin)."""
    return float(min(np.geomspace(0.01, 100, 401), key=lambda scale: np.logaddexp(0, -scale * margin).mean()))


def held_out_margins(
    policy: Transformer, rows: Sequence[Encoded], token_logps: Sequence[Tensor], cfg: DictConfig
) -> np.ndarray:
    """(N,) margins, each from a policy that has not seen its row's prompt; a function of the rows, cfg and seed.

    token_logps: (R,) log pi_ref of every row. policy is left with an adapter.
    """
    inject_lora(
        policy, rank=cfg.flip_lora_rank, alpha=2 * cfg.flip_lora_rank, dropout=0.0, use_rslora=False, target="all",
        seed=cfg.seed,
    )  # fmt: skip
    start = snapshot(policy)
    weight = np.ones(len(rows))
    for number in range(1, cfg.flip_rounds + 1):
        print(f"flipped labels: round {number} of {cfg.flip_rounds}", flush=True)
        margin = _one_round(policy, start, rows, weight, token_logps, cfg)
        weight = probability(margin, calibration(margin))
    return margin


def probability(margin: np.ndarray, scale: float) -> np.ndarray:
    """(N,) p of every label."""
    return 1 / (1 + np.exp(-scale * margin))


def _one_round(
    policy: Transformer, start: Mapping[str, Tensor], rows: Sequence[Encoded], weight: np.ndarray,
    token_logps: Sequence[Tensor], cfg: DictConfig,
) -> np.ndarray:  # fmt: skip
    """Margins of all folds; every fold begins with the adapter `start`, and trains on the others' rows by weight."""
    reference_logps = {row.key: logps_R for row, logps_R in zip(rows, token_logps, strict=True)}

    def reference(stream: Stream, rows: Sequence[Encoded]) -> Tensor:
        return torch.cat([reference_logps[row.key] for row in rows]).to(stream.target_R.device)

    objective = PreferenceObjective(preference_loss(["sigmoid"], None, OFF | {"beta": cfg.flip_beta}), reference)
    weighed = [replace(row, example=replace(row.example, weight=float(w))) for row, w in zip(rows, weight, strict=True)]
    fold = folds([row.example for row in rows], cfg.flip_folds, cfg.seed)
    margin = np.empty(len(rows))
    for k in range(cfg.flip_folds):
        print(f"flipped labels: fold {k + 1} of {cfg.flip_folds}", flush=True)
        for name, tensor in adapter_tensors(policy).items():
            tensor.data.copy_(start[name])
        seen = [row for row, its in zip(weighed, fold, strict=True) if its != k]
        Trainer(_training(cfg), policy, objective, seen, [], NoDirectory(), Path()).train()
        held = np.flatnonzero(fold == k)
        margin[held] = _scores(policy, objective, [rows[i] for i in held.tolist()], cfg.per_device_eval_batch_size)
    return margin


def folds(examples: Sequence[Example], count: int, seed: int) -> np.ndarray:
    """(N,) the fold of every row: no prompt in two, and their sizes as near as the prompts' allow."""
    prompts = [json.dumps(example.messages) for example in examples]
    rows_of = Counter(prompts)
    if count < 2 or count > len(rows_of):
        raise ValueError(
            f"flip_folds={count}: must be between 2 and the number of prompts, {len(rows_of)}; 0: no check"
        )
    shuffled = sorted(rows_of)
    random.Random(seed).shuffle(shuffled)
    sizes = [0] * count
    fold_of = {}
    for prompt in shuffled:
        fold_of[prompt] = smallest = sizes.index(min(sizes))
        sizes[smallest] += rows_of[prompt]
    return np.array([fold_of[prompt] for prompt in prompts])


@torch.no_grad()
def _scores(
    policy: Transformer, objective: PreferenceObjective, rows: Sequence[Encoded], batch_size: int
) -> np.ndarray:
    policy.eval()
    margin = np.empty(len(rows))
    order = sorted(range(len(rows)), key=lambda i: rows[i].tokens)
    for start in range(0, len(rows), batch_size):
        places = order[start : start + batch_size]
        part = [rows[i] for i in places]
        pairs: Any = objective.measure(policy, to_stream(part, policy.device), part, part)
        margin[places] = (objective.loss.beta * (pairs.chosen_logratios - pairs.rejected_logratios)).cpu()
    return margin


def _training(cfg: DictConfig) -> DictConfig:
    """The keys that a Trainer reads."""
    return OmegaConf.create({
        "model_name_or_path": cfg.model_name_or_path, "lora_dropout": 0.0, "seed": cfg.seed,
        "per_device_train_batch_size": cfg.flip_batch_size, "gradient_accumulation_steps": 1,
        "max_tokens_per_micro_batch": None,
        "num_train_epochs": cfg.flip_epochs, "max_steps": -1, "disable_shuffling": False,
        "learning_rate": cfg.flip_learning_rate, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "warmup_steps": 0,
        "optim": "adamw_torch", "load_best_model_at_end": False, "early_stopping_steps": None,
        "weight_decay": 0.0, "max_grad_norm": 1.0,
        "logging_steps": 10**9, "eval_on_start": False, "save_strategy": "no", "save_steps": 1,
    })  # fmt: skip
