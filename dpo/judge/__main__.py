"""Ask a judge: `python -m dpo.judge judge=model judge_model=DIR dataset=PAIRS output_file=OUT` (keys: conf/judge.yaml).

Labels a file of response pairs, or with card=true says what the judge is worth on pairs whose labels are known.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig
from tqdm import tqdm

from dpo.config import JudgeKeys, check_values
from dpo.digests import write_beside
from dpo.judge.build import build_judge, check_judge
from dpo.judge.card import card, remarks, show
from dpo.judge.endpoint import EndpointJudge
from dpo.judge.human import read_labels
from dpo.judge.label import Row, check_output, read_pairs, write_rows
from dpo.judge.prompt import judge_messages
from dpo.judge.verdict import Judge, Judged, Pair, Verdict, count_outcomes
from models.command import CONF, one_line_errors, prepare_command_line, refuse_unset, while_read


@dataclass
class JudgeConfig(JudgeKeys):
    """Every key of dpo.judge; see conf/judge.yaml for what each means."""

    dataset: Any = MISSING
    dataset_dir: str = MISSING
    data_format: str | None = MISSING
    ranking_to_pairs: str = MISSING
    max_samples: int | None = MISSING
    on_bad_row: str = MISSING
    output_file: str | None = MISSING
    soft_labels: bool = MISSING
    card: bool = MISSING
    card_labels: str | None = MISSING
    dry_run: bool = MISSING
    per_device_eval_batch_size: int = MISSING
    bf16: bool = MISSING
    fp16: bool = MISSING
    device: str = MISSING


# English text comes to about this.
BYTES_PER_TOKEN = 4
ConfigStore.instance().store(name="judge_schema", node=JudgeConfig)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="judge")
def main(cfg: DictConfig) -> None:
    with one_line_errors(), while_read():
        run(cfg)


def run(cfg: DictConfig) -> list[Judged]:
    """All verdicts, written as rows to train on or summed up in a report card."""
    refuse_unset(cfg)
    check_values(cfg)
    if cfg.bf16 and cfg.fp16:
        raise ValueError("bf16=True and fp16=True: choose one; neither means float32")
    check_judge(cfg)
    labels = read_labels(Path(cfg.card_labels).expanduser()) if cfg.card and cfg.card_labels else None
    output = None if cfg.card else check_output(cfg.output_file)
    rows, bad = read_pairs(cfg)
    if bad:
        print(f"{len(bad):,} rows cannot be used; the first: {bad[0]}")
    if cfg.dry_run:
        print(_estimate(cfg, rows))
        return []
    judge = build_judge(cfg)
    judged = ask(judge, [row.pair for row in rows])
    if output:
        write_rows(output, rows, judged, judge=judge.name, soft_labels=cfg.soft_labels)
    counts = Counter(one.verdict for one in judged)
    print("\n".join(_told(judge, judged, counts)))
    if cfg.card:
        _card(cfg, judge, rows, judged, labels)
    elif output:
        print(f"labelled: {output}; ties and invalid rows, where there are any, beside it")
    invalid = counts[Verdict.INVALID] / len(judged)
    if invalid > cfg.max_invalid:
        reason = next(one.reason for one in judged if one.verdict is Verdict.INVALID)
        raise ValueError(
            f"{counts[Verdict.INVALID]} of {len(judged)} pairs have no verdict, more than "
            f"max_invalid={cfg.max_invalid:g} allows; the first: {reason}; look at what the judge says, choose another "
            "or raise max_invalid"
        )
    return judged


def ask(judge: Judge, pairs: Sequence[Pair]) -> list[Judged]:
    """The judge's verdicts, with a bar."""
    counts: Counter[str] = Counter()
    with tqdm(total=len(pairs), desc="judge", unit="pair", disable=None, delay=1) as bar:

        def on_done(pair: Pair, one: Judged) -> None:
            counts["invalid"] += one.verdict is Verdict.INVALID
            counts["cached"] += bool(one.orders) and all(order.cached for order in one.orders)
            bar.set_postfix(counts, refresh=False)
            bar.update()

        return judge(pairs, on_done)


def _told(judge: Judge, judged: Sequence[Judged], counts: Counter[Verdict]) -> list[str]:
    said = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict)
    lines = [f"{judge.name}: {len(judged)} pairs: {said}"]
    orders = [order for one in judged for order in one.orders]
    if orders:
        outcomes = ", ".join(f"{n} {name}" for name, n in count_outcomes(judged).items() if n)
        lines.append(f"answers: {outcomes}; {sum(order.cached for order in orders)} of {len(orders)} were kept before")
    if isinstance(judge, EndpointJudge):
        lines.append(f"this start: {judge.limits.requests} requests, cost {judge.limits.cost:.4g} at the prices given")
    return lines


def _estimate(cfg: DictConfig, rows: Sequence[Row]) -> str:
    """What asking about all pairs comes to, without asking."""
    questions = [
        judge_messages(row.pair, first_is_a=order, seed=cfg.judge_seed) for row in rows for order in (True, False)
    ]
    tokens = sum(len(message["content"].encode()) for messages in questions for message in messages) // BYTES_PER_TOKEN
    cost = (cfg.judge_price_prompt or 0.0) * tokens / 1e6 + (cfg.judge_price_completion or 0.0) * len(questions) / 1e6
    return (
        f"{len(rows):,} pairs, {len(questions):,} questions, about {tokens:,} tokens, at {BYTES_PER_TOKEN} bytes "
        f"a token; cost about {cost:.4g} at the prices given, less what judge_cache holds"
    )


def _card(
    cfg: DictConfig, judge: Judge, rows: Sequence[Row], judged: Sequence[Judged], labels: dict[str, Verdict] | None
) -> None:  # fmt: skip
    of_rows = [Verdict.FIRST if row.labelled else None for row in rows]
    right = of_rows if labels is None else [labels.get(row.pair.id) for row in rows]
    own = [_own(row.writers, cfg.judge_model) for row in rows]
    made = card([row.pair for row in rows], judged, right, cfg.judge_seed, own)
    found = remarks(made.numbers, cfg.max_invalid)
    print(show(judge.name, made, found))
    if cfg.output_file:
        about = {
            "judge": judge.name, "prompt_sha256": judge.prompt_sha256, "n": made.n, "card": made.numbers,
            "intervals": made.intervals, "poor": found,
        }  # fmt: skip
        write_beside(Path(cfg.output_file).expanduser(), (json.dumps(about, indent=2, sort_keys=True) + "\n").encode())


def _own(writers: Sequence[str], judge_model: str | None) -> Verdict | None:
    """The verdict for the response that the judge's model wrote, if it wrote one of the two."""
    names = {judge_model, Path(judge_model).name} if judge_model else set()
    wrote = [writer in names for writer in writers]
    return Verdict.FIRST if wrote == [True, False] else Verdict.SECOND if wrote == [False, True] else None


if __name__ == "__main__":
    prepare_command_line(JudgeConfig)
    main()
