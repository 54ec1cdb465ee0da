"""task=preference: the guide's metrics of a policy on held-out pairs, by the code that training uses, and more.

    by slice             accuracy by file, by which response is longer, and by thirds of the prompts' lengths, in tokens
    calibration          the policy says with probability sigmoid(margin) that chosen is better, so it is sure of its
                         choice by sigmoid(|margin|): is that share of the rows that it is so sure of right?
    calibration_error    sum over bins of (rows in it / all) |share that is right - mean sureness|
                         (Guo et al. 2017, arXiv:1706.04599, Eq. 3; ten bins of equal width)

sigmoid(margin) is Bradley and Terry's probability under pref_loss=sigmoid; other margins mean other things.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from dpo.build import build_eval_rows, build_finished_policy, build_finished_reference, build_template, new_objective
from dpo.evals import provenance
from dpo.evals.results import Result, finite
from dpo.evals.statistics import bootstrap, grouped, thirds, wilson
from dpo.objective import Saw, evaluate
from dpo.tokens import Encoded, describe_cuts, sides
from models.weights import choose_device

BINS = 10
Seen = tuple[Encoded, float]
"""a row and its margin."""


def run(cfg: DictConfig) -> Result:
    seen: list[Seen] = []

    def saw(rows: Sequence[Encoded], losses: Tensor, margins: Tensor | None) -> None:
        if margins is not None:
            seen.extend(zip(rows, margins.tolist(), strict=True))

    metrics, facts = preference(cfg, saw)
    runtime = metrics.pop("eval_runtime")
    result = Result("preference", finite(metrics), provenance=facts, time={"eval_runtime": runtime})
    if seen:
        _add_calibration(result, seen)
        if "rejected" in sides(seen[0][0]):  # of labelled rows it is no mean over rows
            margins = [margin for _, margin in seen]
            result.intervals["eval_rewards/margins"] = bootstrap(
                margins, resamples=cfg.resamples, seed=cfg.seed, method="bca"
            )
    return result


def preference(cfg: DictConfig, saw: Saw = lambda *_: None) -> tuple[dict[str, float], provenance.Facts]:
    """(the guide's metrics of the policy against the reference on eval_dataset, what they were found with)."""
    device = choose_device(cfg.device)
    template = build_template(cfg)
    rows = build_eval_rows(cfg, template)
    print("\n".join([f"rows: {len(rows.evaluation)}, {len(rows.skipped)} skipped", *describe_cuts(rows.evaluation)]))
    objective, description = new_objective(cfg), "none"
    objective.check(rows.evaluation)
    policy = build_finished_policy(cfg, device)
    facts = {
        **provenance.of_policy(cfg), **provenance.of_rows(cfg, rows.evaluation), **provenance.of_template(template),
        "pref_loss": str(cfg.pref_loss), "pref_beta": cfg.pref_beta, "cutoff_len": cfg.cutoff_len, "seed": cfg.seed,
    }  # fmt: skip
    if objective.loss.needs_reference:
        objective.reference, description = build_finished_reference(cfg, policy, rows.evaluation)
        facts |= provenance.of_reference(cfg)
    print(f"reference: {description}")
    return evaluate(policy, objective, rows.evaluation, cfg.per_device_eval_batch_size, saw), facts


def _add_calibration(result: Result, seen: Sequence[Seen]) -> None:
    margins = [margin for _, margin in seen]
    right = sum(margin > 0 for margin in margins)
    result.metrics["accuracy"] = right / len(seen)
    result.intervals["accuracy"] = wilson(right, len(seen))
    result.metrics["calibration_error"], table = calibration(margins)
    result.counts["rows"] = len(seen)
    result.tables["calibration"] = table
    result.tables["by slice"] = [_slice(name, [margin for _, margin in part]) for name, part in slices(seen).items()]
    # The most wrong ones first.
    result.samples = [
        {
            "id": row.example.source, "prompt": row.example.messages[-1]["content"], "margin": margin,
            "answers": dict(zip(sides(row), row.example.responses, strict=True)),
        }
        for row, margin in sorted(seen, key=lambda pair: (pair[1], pair[0].example.source))
    ]  # fmt: skip


def calibration(margins: Sequence[float]) -> tuple[float, list[dict[str, float]]]:
    """(calibration error, a line for every bin of sureness that holds rows)."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for margin in margins:
        sure = 1 / (1 + math.exp(-min(abs(margin), 700)))
        bins[min(BINS - 1, int((sure - 0.5) * 2 * BINS))].append((sure, margin > 0))
    error, table = 0.0, []
    for i, rows in enumerate(bins):
        if rows:
            sure, right = (sum(column) / len(rows) for column in zip(*rows, strict=True))
            error += len(rows) / len(margins) * abs(right - sure)
            edges = [0.5 + i / (2 * BINS), 0.5 + (i + 1) / (2 * BINS)]
            table.append({"sigmoid(|margin|)": edges, "rows": len(rows), "mean": sure, "right": right})
    return error, table


def slices(seen: Sequence[Seen]) -> dict[str, list[Seen]]:
    third = thirds([len(row.prompt_ids) for row, _ in seen], "tokens")

    def longer(one: Seen) -> str:
        names = sides(one[0])
        if len(names) == 1:  # whether it was desirable
            return names[0]
        gain = one[0].lengths[0] - one[0].lengths[1]
        return "chosen is longer" if gain > 0 else "chosen is shorter" if gain < 0 else "equally long"

    return grouped(seen, lambda one: f"source {_origin(one[0])}", longer, lambda one: third(len(one[0].prompt_ids)))


def _origin(row: Encoded) -> str:
    """What the row calls its source, else its file."""
    return row.example.origin or Path(row.example.source.rpartition(":")[0]).name


def _slice(name: str, margins: Sequence[float]) -> dict[str, Any]:
    n, right = len(margins), sum(margin > 0 for margin in margins)
    told = {"accuracy": right / n, "95%": list(wilson(right, n)), "mean margin": sum(margins) / n}
    return {"slice": name, "rows": n, **told}
