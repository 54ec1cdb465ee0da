"""task=mt_bench: 80 questions of two turns, graded by a judge from 1 to 10 (Zheng et al. 2023, arXiv:2306.05685).

    score                  mean grade over questions and turns; turn_1 and turn_2: of one turn
    win_rate_adjusted      (wins + ties / 2) / games against mt_bench_baseline, a game being one turn of a question

Turn 2 follows the policy's own answer to turn 1. The temperature is the category's, seeds are seed + 2 i and one more
for question i. Reasoning, math and coding are judged beside GPT-4's reference answers. Each pair is judged in both
orders, and is a tie where these disagree.

A grade is the first [[n]] of a judgment, or else the first [n]; a verdict is its last [[A]], [[B]] or [[C]], for a
judge may quote both before. What has none, is above 10 or below 1, was never answered, or is of an answer that reads
ERROR (FastChat's mark of a failure) is a failure: not in any number, counted, and of more than 2% the command fails.
`several_grades` counts judgments with more than one [[n]], where a quoted text may have been read.

Answers and judgments are files in FastChat's format: model_answer/MODEL_ID.jsonl, model_judgment/JUDGE_single.jsonl
and JUDGE_pair.jsonl.
"""

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from dpo.build import build_finished_policy, build_template
from dpo.digests import file_sha256
from dpo.evals import mt_bench_files as files
from dpo.evals import provenance
from dpo.evals.answers import answer_all
from dpo.evals.ask import ask
from dpo.evals.mt_bench_files import FAILED_ANSWERS, NEED_REFERENCE, TEMPERATURES, Row, Turns, answered
from dpo.evals.progress import Progress
from dpo.evals.results import Result
from dpo.evals.statistics import bootstrap
from dpo.judge.build import build_endpoint
from dpo.judge.endpoint import EndpointJudge, Reply
from models.sampling import Sampling
from models.template import ChatTemplate, Message
from models.transformer import Transformer
from models.weights import choose_device

SETTINGS = {"temperature": 0.0, "max_tokens": 2048}
MAX_FAILURES = 0.02
NOT_ASKED = Reply("", None, "not asked", f"an answer reads {' or '.join(FAILED_ANSWERS)}")
GRADE, GRADE_BACKUP, VERDICT = (
    re.compile(pattern) for pattern in (r"\[\[(\d+\.?\d*)\]\]", r"\[(\d+\.?\d*)\]", r"\[\[([ABC])\]\]")
)


def run(cfg: DictConfig) -> Result:
    directory, out = Path(cfg.mt_bench_dir).expanduser(), Path(cfg.output_dir)
    judge = build_endpoint(cfg) if cfg.judge else None
    questions, references, prompts = files.read(directory)
    total, questions = len(questions), questions[: cfg.max_samples]
    other = cfg.mt_bench_baseline
    baseline_name, baseline = files.read_answers(other, questions) if other else ("", {})
    facts: provenance.Facts = {
        "data_sha256": file_sha256(*(directory / name for name in (files.QUESTIONS, files.REFERENCES))),
        "questions": "all" if len(questions) == total else f"the first {len(questions)} of {total}",
    }
    answers, answer_facts = answer(cfg, questions)
    name = provenance.model_id(cfg)
    files.write_answers(out / "model_answer" / f"{name.replace('/', '_')}.jsonl", name, answers)
    result = Result("mt_bench", {}, counts={"questions": len(questions)}, provenance=facts | answer_facts)
    result.samples = [_sample(question, answers, baseline) for question in questions]
    if judge is None:
        print(f"judge is null: the answers are in {out / 'model_answer'}, and not judged")
        return result
    result.provenance |= {
        "judge": judge.name, "judge_prompt_sha256": file_sha256(directory / files.PROMPTS),
        "mt_bench_baseline": other, "baseline_sha256": file_sha256(Path(other).expanduser()) if other else None,
    }  # fmt: skip
    judgments = out / "model_judgment"
    stem = judge.model.replace("/", "_")
    asking = partial(ask_about, judge, questions, references, prompts, out)
    grades = grades_of(asking("single", [{"answer": answers}]), name)
    files.write_lines(judgments / f"{stem}_single.jsonl", grades)
    count_grades(result, questions, grades, resamples=cfg.resamples, seed=cfg.seed)
    if baseline:
        orders = [{"answer_a": answers, "answer_b": baseline}, {"answer_a": baseline, "answer_b": answers}]
        games = games_of(asking("pair", orders), name, baseline_name)
        files.write_lines(judgments / f"{stem}_pair.jsonl", games)
        count_games(result, questions, games, resamples=cfg.resamples, seed=cfg.seed)
    return result


# --- the policy's answers ---


def answer(cfg: DictConfig, questions: Sequence[Row]) -> tuple[dict[int, Turns], provenance.Facts]:
    """(the policy's two turns by question_id, what they were made with)."""
    template = build_template(cfg)
    facts = provenance.of_policy(cfg) | provenance.of_answers(
        template, Sampling(0.0, cfg.top_k, cfg.top_p, cfg.min_p), cfg.max_new_tokens, cfg.seed
    )
    facts["temperature"] = "by category"
    policy = build_finished_policy(cfg, choose_device(cfg.device))
    asked = json.dumps([[question["question_id"], question["category"], *question["turns"]] for question in questions])
    key = {name: value for name, value in facts.items() if not name.endswith("_path")}
    key |= {"questions_sha256": sha256(asked.encode()).hexdigest(), "dtype": str(policy.dtype)}
    with Progress(Path(cfg.output_dir) / "answers.jsonl", key) as progress:
        answers = answer_turns(policy, template, questions, cfg, progress)
    return answers, facts


def answer_turns(
    policy: Transformer, template: ChatTemplate, questions: Sequence[Row], cfg: DictConfig, progress: Progress
) -> dict[int, Turns]:
    conversations: list[list[Message]] = [[] for _ in questions]
    sampling = [Sampling(TEMPERATURES[one["category"]], cfg.top_k, cfg.top_p, cfg.min_p) for one in questions]
    for turn in (0, 1):
        for question, conversation in zip(questions, conversations, strict=True):
            conversation.append({"role": "user", "content": question["turns"][turn]})
        answers = answer_all(
            policy, template, conversations, seeds=[cfg.seed + 2 * i + turn for i in range(len(questions))],
            sampling=sampling, max_new_tokens=cfg.max_new_tokens, batch_size=cfg.per_device_eval_batch_size,
            progress=progress, ids=[f"{question['question_id']}-{turn + 1}" for question in questions],
        )  # fmt: skip
        for conversation, one in zip(conversations, answers, strict=True):
            conversation.append({"role": "assistant", "content": one.text})
    return {
        question["question_id"]: [turn["content"] for turn in conversation[1::2]]
        for question, conversation in zip(questions, conversations, strict=True)
    }


def _sample(question: Row, answers: Mapping[int, Turns], baseline: Mapping[int, Turns]) -> dict[str, Any]:
    id, (first, second) = question["question_id"], question["turns"]
    named = {"policy": answers[id]} | ({"baseline": baseline[id]} if baseline else {})
    return {
        "id": str(id), "category": question["category"], "prompt": f"turn 1: {first}\n\nturn 2: {second}",
        "answers": {f"{name}, turn {i}": turns[i - 1] for i in (1, 2) for name, turns in named.items()},
    }  # fmt: skip


# --- what the judge is asked ---

Asked = list[tuple[Row, list[tuple[str, Reply]]]]


def ask_about(
    judge: EndpointJudge, questions: Sequence[Row], references: Mapping[int, Turns], prompts: Mapping[str, Row],
    directory: Path, kind: str, orders: Sequence[Mapping[str, Mapping[int, Turns]]],
) -> Asked:  # fmt: skip
    """A row for each turn of each question, and for each order the prompt and what the judge said to it.

    kind: single or pair; orders: of each, all answers by the field of the templates that shows them.
    """
    rows: list[tuple[Row, dict[str, list[Message]]]] = []
    wanted: dict[str, list[Message]] = {}
    for turn in (1, 2):
        for question in questions:
            id, name = question["question_id"], template_name(kind, question["category"], turn)
            asked = {}
            for g, order in enumerate(orders, start=1):
                shown = {field: answers[id] for field, answers in order.items()}
                fields = fields_of(question, references.get(id, ()), shown)
                asked[f"{id}-{turn}-g{g}"] = judge_messages(prompts[name], fields)
            if all(answered(answers[id][:turn]) for answers in orders[0].values()):
                wanted |= asked
            rows.append(({"question_id": id, "turn": turn, "judge": [judge.model, name]}, asked))
    replies = ask(judge, wanted, SETTINGS, directory / f"replies_{kind}.jsonl")
    return [
        ({**row, "tstamp": time.time()}, [(messages[-1]["content"], replies.get(key, NOT_ASKED))
                                          for key, messages in asked.items()])
        for row, asked in rows
    ]  # fmt: skip


def template_name(kind: str, category: str, turn: int) -> str:
    general = {"single": "single-v1", "pair": "pair-v2"}[kind]
    return (f"{kind}-math-v1" if category in NEED_REFERENCE else general) + ("-multi-turn" if turn == 2 else "")


def fields_of(question: Row, reference: Turns, answers: Mapping[str, Turns]) -> dict[str, str]:
    """Every text that a template may show, by its field: of both turns with their number, the first without too."""
    texts = {"question": question["turns"], "ref_answer": reference, **answers}
    numbered = {f"{name}_{i}": text for name, turns in texts.items() for i, text in enumerate(turns, start=1)}
    return numbered | {name: turns[0] for name, turns in texts.items() if turns}


def judge_messages(prompt: Row, fields: Mapping[str, str]) -> list[Message]:
    # format looks at the template alone: "{answer_b}" in an answer stays what it is.
    user = prompt["prompt_template"].format(**fields)
    return [{"role": "system", "content": prompt["system_prompt"]}, {"role": "user", "content": user}]


# --- grades ---


def grades_of(asked: Asked, model: str) -> list[Row]:
    """The rows of JUDGE_single.jsonl; score -1 is a failure."""
    return [
        {
            **row, "model": model, "user_prompt": prompt, "judgment": _text(reply), "reason": reply.reason,
            "score": read_grade(_text(reply)),
        }
        for row, [(prompt, reply)] in asked
    ]  # fmt: skip


def read_grade(judgment: str) -> float:
    """The grade, in [1, 10]; -1 without one."""
    found = GRADE.search(judgment) or GRADE_BACKUP.search(judgment)
    value = float(found[1]) if found else -1.0
    return value if 1 <= value <= 10 else -1.0


def count_grades(result: Result, questions: Sequence[Row], rows: Sequence[Row], *, resamples: int, seed: int) -> None:
    scores = {(row["question_id"], row["turn"]): row["score"] for row in rows if row["score"] != -1}
    several = [row for row in rows if len(set(GRADE.findall(row["judgment"]))) > 1]
    result.counts |= {"judgments": len(rows), "failures": len(rows) - len(scores), "several_grades": len(several)}
    _fail_above_limit(result, "judgments", len(rows) - len(scores), len(rows))
    # NaN is a failure.
    scores_N2 = np.array([[scores.get((one["question_id"], turn), np.nan) for turn in (1, 2)] for one in questions])
    for name, turns in {"score": [0, 1], "turn_1": [0], "turn_2": [1]}.items():
        _add_mean(result, name, scores_N2[:, turns], resamples=resamples, seed=seed)
    result.tables["grades by category"] = [
        {"category": category, "questions": len(part_N2), "score": _mean(part_N2), "turn 1": _mean(part_N2[:, 0]),
         "turn 2": _mean(part_N2[:, 1])}
        for category, part_N2 in _by_category(questions, scores_N2)
    ]  # fmt: skip
    for sample, question in zip(result.samples, questions, strict=True):
        sample["grades"] = {f"turn {turn}": scores.get((question["question_id"], turn)) for turn in (1, 2)}


# --- games against a baseline ---


def games_of(asked: Asked, model: str, baseline: str) -> list[Row]:
    """The rows of JUDGE_pair.jsonl: g1 shows model_1, the policy, as assistant A, g2 shows it as B."""
    return [
        {
            **row, "model_1": model, "model_2": baseline,
            "g1_winner": read_verdict(_text(reply_1), "model_1", "model_2"),
            "g2_winner": read_verdict(_text(reply_2), "model_2", "model_1"),
            "g1_user_prompt": prompt_1, "g1_judgment": _text(reply_1), "g1_reason": reply_1.reason,
            "g2_user_prompt": prompt_2, "g2_judgment": _text(reply_2), "g2_reason": reply_2.reason,
        }
        for row, [(prompt_1, reply_1), (prompt_2, reply_2)] in asked
    ]  # fmt: skip


def read_verdict(judgment: str, a: str, b: str) -> str:
    """Who won, a or b or tie, by the last verdict of a judgment; error without one."""
    found = VERDICT.findall(judgment)
    return {"A": a, "B": b, "C": "tie"}[found[-1]] if found else "error"


def outcome(row: Row) -> str:
    """Of a game in both orders, for model_1: win, loss, tie where they disagree, error where one is missing."""
    winners = {row["g1_winner"], row["g2_winner"]}
    if "error" in winners:
        return "error"
    return {"model_1": "win", "model_2": "loss", "tie": "tie"}[winners.pop()] if len(winners) == 1 else "tie"


def count_games(result: Result, questions: Sequence[Row], rows: Sequence[Row], *, resamples: int, seed: int) -> None:
    outcomes = {(row["question_id"], row["turn"]): outcome(row) for row in rows}
    names = {"wins": "win", "ties": "tie", "losses": "loss", "games_failed": "error"}
    counts = {name: list(outcomes.values()).count(one) for name, one in names.items()}
    result.counts |= {"games": len(rows), **counts}
    _fail_above_limit(result, "games", counts["games_failed"], len(rows))
    value = {"win": 1.0, "tie": 0.5, "loss": 0.0, "error": np.nan}
    wins_N2 = np.array([[value[outcomes[one["question_id"], turn]] for turn in (1, 2)] for one in questions])
    _add_mean(result, "win_rate_adjusted", wins_N2, resamples=resamples, seed=seed)
    result.tables["games by category"] = [
        {"category": category, "questions": len(part_N2), "wins": int((part_N2 == 1).sum()),
         "ties": int((part_N2 == 0.5).sum()), "losses": int((part_N2 == 0).sum()),
         "turn 1": _mean(part_N2[:, 0]), "turn 2": _mean(part_N2[:, 1]), "win_rate_adjusted": _mean(part_N2)}
        for category, part_N2 in _by_category(questions, wins_N2)
    ]  # fmt: skip
    for sample, question in zip(result.samples, questions, strict=True):
        sample["games"] = {f"turn {turn}": outcomes[question["question_id"], turn] for turn in (1, 2)}


# --- what both need ---


def _text(reply: Reply) -> str:
    """What the judge said; nothing where it was not asked, refused or did not answer."""
    return reply.text if reply.answered else ""


def _fail_above_limit(result: Result, what: str, failures: int, n: int) -> None:
    if failures > MAX_FAILURES * n:
        said = (
            f"{failures} of {n} {what} failed, more than {MAX_FAILURES:.0%}; see why in model_judgment, and start "
            "again or choose another judge"
        )
        result.error = f"{result.error}; {said}" if result.error else said


def _mean(values: np.ndarray) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmean(values))


def _add_mean(result: Result, name: str, values_NT: np.ndarray, *, resamples: int, seed: int) -> None:
    """The mean over turns and questions as a metric; its interval resamples questions that have a value."""
    values_NT = values_NT[~np.isnan(values_NT).all(axis=1)]
    if len(values_NT):
        result.metrics[name] = float(np.nanmean(values_NT))
    if len(values_NT) > 1:
        result.intervals[name] = bootstrap(values_NT, np.nanmean, resamples=resamples, seed=seed, method="bca")


def _by_category(questions: Sequence[Row], values_N2: np.ndarray) -> Iterable[tuple[str, np.ndarray]]:
    categories = np.array([question["category"] for question in questions])
    for category in dict.fromkeys(categories.tolist()):
        yield category, values_N2[categories == category]
