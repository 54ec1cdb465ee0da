"""task=win_rate: the guide's evaluation. Before and after training a model answers the same prompts, a judge compares.

    win_rate = (wins + ties / 2) / (wins + ties + losses)         of the model after training, over prompts

The judge sees each pair in both orders; where its two verdicts contradict one another, the pair is a tie. Pairs without
a verdict are counted apart, and above max_invalid of them the evaluation fails. Answers that are equal are a tie that
nobody is asked about. The guide expects 60 to 80% of a DPO that has worked.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from tqdm import tqdm

from dpo.build import build_finished_policy, build_live_reference, build_template, check_reference
from dpo.digests import text_sha256
from dpo.evals import provenance
from dpo.evals.answers import Answer, answer_prompts
from dpo.evals.progress import Progress
from dpo.evals.prompts import Prompt, prompts_of
from dpo.evals.results import Result
from dpo.evals.statistics import (
    Interval,
    bootstrap,
    grouped,
    length_adjusted,
    mcnemar_exact,
    prompts_needed,
    thirds,
    wilson,
)
from dpo.judge.build import build_judge
from dpo.judge.store import KEPT
from dpo.judge.verdict import Judge, Judged, Pair, Verdict
from models.sampling import Sampling
from models.weights import choose_device

GUIDE = (0.6, 0.8)
Sample = Mapping[str, Any]
SCORES = {Verdict.FIRST: 1.0, Verdict.TIE: 0.5, Verdict.SECOND: 0.0}
OUTCOMES = {Verdict.FIRST: "win", Verdict.TIE: "tie", Verdict.SECOND: "loss", Verdict.INVALID: "invalid"}
SCORES_OF = {OUTCOMES[verdict]: score for verdict, score in SCORES.items()}


def run(cfg: DictConfig) -> Result:
    check_reference(cfg)
    template = build_template(cfg)
    prompts = prompts_of(cfg)
    sampling = Sampling(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p)
    judge = build_judge(cfg)
    policy = build_finished_policy(cfg, choose_device(cfg.device))
    reference, description = build_live_reference(cfg, policy)
    print(f"before: {description}")
    settings = provenance.of_answers(template, sampling, cfg.max_new_tokens, cfg.seed)
    before_facts, after_facts = provenance.of_reference(cfg), provenance.of_policy(cfg)
    with reference.as_model() as model:
        before = answer_prompts(cfg, model, template, prompts, "before", before_facts | settings, sampling)
    after = answer_prompts(cfg, policy, template, prompts, "after", after_facts | settings, sampling)
    verdicts = judge_pairs(judge, prompts, after, before, Path(cfg.output_dir) / "verdicts.jsonl")
    result = count(
        prompts, before, after, verdicts, resamples=cfg.resamples, seed=cfg.seed, max_invalid=cfg.max_invalid
    )
    result.provenance = {
        **provenance.of_data(cfg, prompts), **before_facts, **after_facts, **settings,
        "judge": judge.name, "judge_prompt_sha256": judge.prompt_sha256,
    }  # fmt: skip
    return result


def judge_pairs(
    judge: Judge, prompts: Sequence[Prompt], first: Sequence[Answer], second: Sequence[Answer], path: Path
) -> list[dict[str, Any]]:
    """Of each prompt verdict, p and what the judge said, by the pair's first answer; none is asked for twice."""
    pairs = [
        Pair(prompt.id, prompt.messages, a.text, b.text) for prompt, a, b in zip(prompts, first, second, strict=True)
    ]
    unlike = [pair for pair in pairs if pair.first != pair.second]
    texts = [text for pair in pairs for text in (pair.id, pair.first, pair.second)]
    key = {"judge": judge.name, "judge_prompt_sha256": judge.prompt_sha256, "answers_sha256": text_sha256(texts)}
    with Progress(path, key) as progress:
        wanted = [pair for pair in unlike if pair.id not in progress.done]
        with tqdm(total=len(unlike), initial=len(unlike) - len(wanted), desc=f"judge {judge.name}", unit="") as bar:

            def on_done(pair: Pair, judged: Judged) -> None:
                # A failure may be asked about again by whoever starts this evaluation again. A judge without orders
                # costs nothing, and people's labels may have changed by then.
                if judged.orders and all(order.outcome in KEPT for order in judged.orders):
                    progress.add({"id": pair.id, **_told(judged)})
                bar.update()

            told = {pair.id: _told(judged) for pair, judged in zip(wanted, judge(wanted, on_done), strict=True)}
        same = {"verdict": Verdict.TIE.name, "p": 0.5, "orders": [], "reason": "the answers are equal"}
        known = {pair.id: same for pair in pairs} | told | progress.done
        return [known[pair.id] for pair in pairs]


def _told(judged: Judged) -> dict[str, Any]:
    """A verdict in JSON values, without what differs from one asking to the next."""
    orders = [{"verdict": order.verdict.name, "p": order.p, "raw": order.raw} for order in judged.orders]
    return {"verdict": judged.verdict.name, "p": judged.p, "orders": orders, "reason": judged.reason}


def count(
    prompts: Sequence[Prompt], before: Sequence[Answer], after: Sequence[Answer], verdicts: Sequence[Mapping[str, Any]],
    *, resamples: int, seed: int, max_invalid: float,
) -> Result:  # fmt: skip
    """The rates of answers that were judged, as they are and by slice."""
    samples = [
        {
            "id": prompt.id, "source": prompt.source, "prompt": prompt.text,
            "answers": {"before": old.text, "after": new.text},
            "outcome": OUTCOMES[Verdict[row["verdict"]]], "p_after": row["p"],
            "tokens": {"before": old.tokens, "after": new.tokens},
            "cut": {"before": old.finish_reason == "length", "after": new.finish_reason == "length"},
            "judge_said": [order["raw"] for order in row["orders"]], "reason": row["reason"],
        }
        for prompt, old, new, row in zip(prompts, before, after, verdicts, strict=True)
    ]  # fmt: skip
    counts = Counter(sample["outcome"] for sample in samples)
    wins, ties, losses, invalid = (counts[outcome] for outcome in ("win", "tie", "loss", "invalid"))
    valid = [sample for sample in samples if sample["outcome"] != "invalid"]
    result = Result("win_rate", {}, samples=samples)
    result.counts = {
        "prompts": len(samples), "wins": wins, "ties": ties, "losses": losses, "invalid": invalid,
        "equal_answers": sum(old.text == new.text for old, new in zip(before, after, strict=True)),
        "cut_before": sum(sample["cut"]["before"] for sample in samples),
        "cut_after": sum(sample["cut"]["after"] for sample in samples),
    }  # fmt: skip
    if invalid > max_invalid * len(samples):
        result.error = (
            f"{invalid} of {len(samples)} pairs have no verdict, more than max_invalid={max_invalid:g}; see why in the "
            "report, and choose another judge or raise it"
        )
    if not valid:
        return result
    scores = [SCORES_OF[sample["outcome"]] for sample in valid]
    gained = [len(sample["answers"]["after"]) - len(sample["answers"]["before"]) for sample in valid]
    p_values = [sample["p_after"] for sample in valid if sample["p_after"] is not None]
    # Two orders without a verdict do not agree.
    asked = [row["orders"] for row in verdicts if row["orders"] and row["verdict"] != Verdict.INVALID.name]
    rate = float(np.mean(scores))
    needed = prompts_needed(rate, ties=ties / len(valid))
    result.metrics = {
        "win_rate": rate,
        "length_adjusted": length_adjusted(scores, gained),
        "mcnemar_p": mcnemar_exact(wins, losses),
    }
    if len(p_values) == len(valid):
        result.metrics["mean_p_after"] = float(np.mean(p_values))
    if asked:
        agree = [one["verdict"] == other["verdict"] for one, other in asked]
        result.metrics["order_consistency"] = float(np.mean(agree))
    boot = partial(bootstrap, resamples=resamples, seed=seed)
    methods = {
        "Wilson": wilson(wins + ties / 2, len(valid)),
        "bootstrap, percentile": boot(scores, method="percentile"),
        "bootstrap, BCa": boot(scores, method="bca"),
    }
    result.intervals["win_rate"] = interval_of(scores, boot)
    if len(set(scores)) > 1:
        pairs_N2 = np.stack([scores, gained], axis=1)
        result.intervals["length_adjusted"] = boot(
            pairs_N2, lambda rows_N2: length_adjusted(rows_N2[:, 0], rows_N2[:, 1]), method="percentile"
        )
    if needed is not None:
        result.counts["prompts_needed"] = needed
    result.tables = {
        "95% intervals of win_rate": [{"method": name, "from": a, "to": b} for name, (a, b) in methods.items()],
        "what it says": _reading(result, needed, len(valid)),
        "by slice": [_slice(name, part, boot) for name, part in slices(valid).items()],
    }
    return result


def interval_of(scores: Sequence[float], boot: Callable[..., Interval]) -> Interval:
    """Wilson's, which is of wins and losses, and too wide where there are ties: then one of resampled prompts."""
    # Resampled scores that are all alike have an interval of no width, which says nothing.
    if 0.5 in scores and len(set(scores)) > 1:
        return boot(scores, method="bca")
    return wilson(sum(scores), len(scores))


def _reading(result: Result, needed: int | None, n: int) -> list[dict[str, str]]:
    """The numbers in words."""
    rate, p, (low, high) = result.metrics["win_rate"], result.metrics["mcnemar_p"], result.intervals["win_rate"]
    where = "below" if rate < GUIDE[0] else "above" if rate > GUIDE[1] else "within"
    unsure = "" if GUIDE[0] <= low and high <= GUIDE[1] else f", though it may be {low:.0%} to {high:.0%}"
    lines = {
        "the guide expects 60% to 80%": f"{rate:.1%} is {where}{unsure}",
        "do wins and losses differ by more than chance?": f"{'yes' if p < 0.05 else 'not surely'}, p = {p:.2g}",
        "prompts to tell this rate from 50%, at 80% power": (
            "no number would do" if needed is None else f"{needed:,}; there were {n:,}"
        ),
    }
    if "order_consistency" in result.metrics:
        share = result.metrics["order_consistency"]
        lines["does the judge keep its verdict when the order is turned?"] = f"in {share:.0%} of the pairs it was asked"
    return [{"question": question, "answer": answer} for question, answer in lines.items()]


def slices(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """By source, by which answer is longer, and by thirds of the prompts' lengths, in characters."""

    def longer(sample: Sample) -> str:
        gain = len(sample["answers"]["after"]) - len(sample["answers"]["before"])
        return "after is longer" if gain > 0 else "after is shorter" if gain < 0 else "equally long"

    third = thirds([len(sample["prompt"]) for sample in samples], "characters")
    return grouped(samples, lambda one: f"source {one['source']}", longer, lambda one: third(len(one["prompt"])))


def _slice(name: str, samples: Sequence[Sample], boot: Callable[..., Interval]) -> dict[str, Any]:
    counts = Counter(sample["outcome"] for sample in samples)
    scores = [SCORES_OF[sample["outcome"]] for sample in samples]
    row = {"slice": name, "n": len(samples), "wins": counts["win"], "ties": counts["tie"], "losses": counts["loss"]}
    return row | {"win_rate": float(np.mean(scores)), "95%": list(interval_of(scores, boot))}
