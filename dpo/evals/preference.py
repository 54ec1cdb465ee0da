"""task=preference: the guide's metrics of a policy on held-out pairs, by the code that training uses, and what they hide.

    accuracy by slice         by file, by which response is longer, and by thirds of the prompts' lengths, in tokens
    calibration               the policy says with probability sigmoid(margin) that chosen is the better one, so it is
                              sure of its choice by sigmoid(|margin|); of rows that it is so sure of, is that share right?
    calibration_error         sum over bins of (rows in it / all) |share that is right - mean sureness|
                              (Guo et al. 2017, arXiv:1706.04599, Eq. 3; ten bins of equal width)

sigmoid(margin) is the Bradley-Terry probability under pref_loss=sigmoid; other losses mean other things by their margin.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig

from dpo.build import build_eval_rows, build_finished_policy, build_finished_reference, build_template, new_objective
from dpo.config import as_list
from dpo.evals import provenance
from dpo.evals.results import Result, file_sha256, finite
from dpo.evals.statistics import thirds, wilson
from dpo.objective import Saw, evaluate
from dpo.tokens import Encoded, describe_cuts, sides
from models.weights import choose_device

BINS = 10


def run(cfg: DictConfig) -> Result:
    seen: list[tuple[Encoded, float]] = []

    def saw(rows: Sequence[Encoded], losses: object, margins: object) -> None:
        if margins is not None:
            seen.extend(zip(rows, margins.tolist(), strict=True))

    metrics = preference(cfg, saw)
    time = {"eval_runtime": metrics.pop("eval_runtime")}
    result = Result("preference", finite(metrics), time=time)
    result.provenance = {
        **provenance.of_policy(cfg), "eval_dataset": ",".join(as_list(cfg.eval_dataset)), "pref_loss": str(cfg.pref_loss),
        "pref_beta": cfg.pref_beta, "cutoff_len": cfg.cutoff_len,
    }  # fmt: skip
    if seen:
        _add_calibration(result, seen)
    return result


def preference(cfg: DictConfig, saw: Saw = lambda *_: None) -> dict[str, float]:
    """The guide's metrics of the policy against the reference on eval_dataset."""
    device = choose_device(cfg.device)
    template = build_template(cfg)
    rows = build_eval_rows(cfg, template)
    print("\n".join([f"rows: {len(rows.evaluation)}, {len(rows.skipped)} skipped", *describe_cuts(rows.evaluation)]))
    objective, description = new_objective(cfg), "none"
    objective.check(rows.evaluation)
    policy = build_finished_policy(cfg, device)
    if objective.loss.needs_reference:
        objective.reference, description = build_finished_reference(cfg, policy, rows.evaluation)
    print(f"reference: {description}")
    return evaluate(policy, objective, rows.evaluation, cfg.per_device_eval_batch_size, saw)


def _add_calibration(result: Result, seen: Sequence[tuple[Encoded, float]]) -> None:
    margins = [margin for _, margin in seen]
    right = sum(margin > 0 for margin in margins)
    result.metrics["accuracy"] = right / len(seen)
    result.intervals["accuracy"] = wilson(right, len(seen))
    result.metrics["calibration_error"], table = calibration(margins)
    result.counts["rows"] = len(seen)
    result.tables["calibration"] = table
    result.tables["by slice"] = [
        _slice(name, [margin for row, margin in seen if holds(row)]) for name, holds in slices([r for r, _ in seen]).items()
    ]
    # The most wrong ones first.
    result.samples = [
        {
            "id": row.example.source, "prompt": row.example.messages[-1]["content"], "margin": margin,
            "answers": dict(zip(sides(row), row.example.responses, strict=False)),
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


def slices(rows: Sequence[Encoded]) -> dict[str, Callable[[Encoded], bool]]:
    found: dict[str, Callable[[Encoded], bool]] = {}
    for name in dict.fromkeys(map(_file, rows)):
        found[f"file {name}"] = lambda row, name=name: _file(row) == name
    if all(len(row.lengths) == 2 for row in rows):
        found["chosen is longer"] = lambda row: row.lengths[0] > row.lengths[1]
        found["chosen is shorter"] = lambda row: row.lengths[0] < row.lengths[1]
        found["equally long"] = lambda row: row.lengths[0] == row.lengths[1]
    for low, high in thirds([len(row.prompt_ids) for row in rows]):
        found[f"prompt of {low} to {high} tokens"] = lambda row, a=low, b=high: a <= len(row.prompt_ids) <= b
    return found


def _file(row: Encoded) -> str:
    return Path(row.example.source.rpartition(":")[0]).name


def _slice(name: str, margins: Sequence[float]) -> dict[str, object]:
    n, right = len(margins), sum(margin > 0 for margin in margins)
    told = {"accuracy": right / n, "95%": list(wilson(right, n)), "mean margin": sum(margins) / n} if n else {}
    return {"slice": name, "rows": n, **told}
