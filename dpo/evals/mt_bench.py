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
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from dpo.build import build_finished_policy, build_template
from dpo.evals import provenance
from dpo.evals.answers import answer_all
from dpo.evals.ask import ask
from dpo.evals.mt_bench_files import (
    NEED_REFERENCE,
    PROMPTS,
    QUESTIONS,
    REFERENCES,
    TEMPERATURES,
    Row,
    Turns,
    answered,
    read,
    read_answers,
    write_answers,
    write_lines,
)  # fmt: skip
from dpo.evals.progress import Progress
from dpo.evals.results import Result, file_sha256
from dpo.evals.statistics import bootstrap
from dpo.judge.build import build_endpoint
from dpo.judge.endpoint import EndpointJudge, Reply
from models.sampling import Sampling
from models.template import ChatTemplate, Message
from models.transformer import Transformer
from models.weights import choose_device

SETTINGS = {"temperature": 0.0, "max_tokens": 2048}
MAX_FAILURES = 0.02
GRADE, GRADE_BACKUP, VERDICT = (
    re.compile(pattern) for pattern in (r"\[\[(\d+\.?\d*)\]\]", r"\[(\d+\.?\d*)\]", r"\[\[([ABC])\]\]")
)


def run(cfg: DictConfig) -> Result:
    directory, out = Path(cfg.mt_bench_dir).expanduser(), Path(cfg.output_dir)
    judge = build_endpoint(cfg) if cfg.judge else None
    questions, references, prompts = read(directory)
    total, questions = len(questions), questions[: cfg.max_samples]
    baseline_name, baseline = read_answers(cfg.mt_bench_baseline, questions) if cfg.mt_bench_baseline else ("", {})
    facts: provenance.Facts = {
        "data_sha256": file_sha256(*(directory / name for name in (QUESTIONS, REFERENCES))),
        "questions": "all" if len(questions) == total else f"the first {len(questions)} of {total}",
    }
    answers, answer_facts = answer(cfg, questions)
    name = provenance.model_id(cfg)
    write_answers(out / "model_answer" / f"{name.replace('/', '_')}.jsonl", name, answers)
    result = Result("mt_bench", {}, counts={"questions": len(questions)}, provenance=facts | answer_facts)
    result.samples = [_sample(question, answers, baseline) for question in questions]
    if judge is None:
        print(f"judge is null: the answers are in {out / 'model_answer'}, and not judged")
        return result
    result.provenance |= {
        "judge": judge.name, "judge_prompt_sha256": file_sha256(directory / PROMPTS),
        "mt_bench_baseline": cfg.mt_bench_baseline,
        "baseline_sha256": file_sha256(Path(cfg.mt_bench_baseline).expanduser()) if baseline else None,
    }  # fmt: skip
    judgments = out / "model_judgment"
    stem = judge.model.replace("/", "_")
    grades = grade(judge, questions, answers, references, prompts, name, out)
    write_lines(judgments / f"{stem}_single.jsonl", grades)
    count_grades(result, questions, grades, resamples=cfg.resamples, seed=cfg.seed)
    if baseline:
        games = compare(judge, questions, (answers, baseline), references, prompts, (name, baseline_name), out)
        write_lines(judgments / f"{stem}_pair.jsonl", games)
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
        "answers": {f"{name}, turn {i}": text for i in (1, 2) for name, turns in named.items()
                    for text in [turns[i - 1]]},
    }  # fmt: skip


# --- grades ---


def grade(
    judge: EndpointJudge, questions: Sequence[Row], answers: Mapping[int, Turns], references: Mapping[int, Turns],
    prompts: Mapping[str, Row], model: str, directory: Path,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of JUDGE_single.jsonl, a row for each question and turn; score -1 is a failure."""
    asked: dict[str, tuple[Row, int, str, list[Message]]] = {}
    for turn in (1, 2):
        for question in questions:
            id = question["question_id"]
            name = template_name("single", question["category"], turn)
            fields = _question_fields(question, references, turn) | _answer_fields(answers[id], "answer", turn)
            asked[f"{id}-{turn}"] = question, turn, name, judge_messages(prompts[name], fields)
    judged = {
        key: messages
        for key, (question, turn, _, messages) in asked.items()
        if answered(answers[question["question_id"]][:turn])
    }
    replies = ask(judge, judged, SETTINGS, directory / "replies_single.jsonl")
    return [
        {
            "question_id": question["question_id"], "model": model, "judge": [judge.model, name],
            "user_prompt": messages[-1]["content"], "judgment": _text(replies.get(key)),
            "score": read_grade(_text(replies.get(key))), "turn": turn, "tstamp": time.time(),
        }
        for key, (question, turn, name, messages) in asked.items()
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
        sample["grades"] = [scores.get((question["question_id"], turn)) for turn in (1, 2)]


# --- games against a baseline ---


def compare(
    judge: EndpointJudge, questions: Sequence[Row], answers: tuple[Mapping[int, Turns], Mapping[int, Turns]],
    references: Mapping[int, Turns], prompts: Mapping[str, Row], models: tuple[str, str], directory: Path,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of JUDGE_pair.jsonl: g1 shows model_1, the policy, as assistant A, g2 shows it as B."""
    asked: dict[str, tuple[Row, int, str, list[list[Message]]]] = {}
    for turn in (1, 2):
        for question in questions:
            one, other = (side[question["question_id"]] for side in answers)
            name = template_name("pair", question["category"], turn)
            base = _question_fields(question, references, turn)
            games = []
            for a, b in ((one, other), (other, one)):
                both = _answer_fields(a, "answer_a", turn) | _answer_fields(b, "answer_b", turn)
                games.append(judge_messages(prompts[name], base | both))
            asked[f"{question['question_id']}-{turn}"] = question, turn, name, games
    judged = {
        f"{key}-g{g}": messages
        for key, (question, turn, _, games) in asked.items()
        if all(answered(side[question["question_id"]][:turn]) for side in answers)
        for g, messages in enumerate(games, start=1)
    }
    replies = ask(judge, judged, SETTINGS, directory / "replies_pair.jsonl")
    rows = []
    for key, (question, turn, name, games) in asked.items():
        texts = [_text(replies.get(f"{key}-g{g}")) for g in (1, 2)]
        rows.append(
            {
                "question_id": question["question_id"], "model_1": models[0], "model_2": models[1],
                "g1_winner": read_verdict(texts[0], "model_1", "model_2"),
                "g2_winner": read_verdict(texts[1], "model_2", "model_1"), "judge": [judge.model, name],
                "g1_user_prompt": games[0][-1]["content"], "g1_judgment": texts[0],
                "g2_user_prompt": games[1][-1]["content"], "g2_judgment": texts[1], "turn": turn,
                "tstamp": time.time(),
            }
        )  # fmt: skip
    return rows


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
        sample["games"] = [outcomes[question["question_id"], turn] for turn in (1, 2)]


# --- what both need ---


def template_name(kind: str, category: str, turn: int) -> str:
    """kind: single or pair."""
    general = {"single": "single-v1", "pair": "pair-v2"}[kind]
    return (f"{kind}-math-v1" if category in NEED_REFERENCE else general) + ("-multi-turn" if turn == 2 else "")


def judge_messages(prompt: Row, fields: Mapping[str, str]) -> list[Message]:
    # format looks at the template alone: "{answer_b}" in an answer stays what it is.
    user = prompt["prompt_template"].format(**fields)
    return [{"role": "system", "content": prompt["system_prompt"]}, {"role": "user", "content": user}]


def _question_fields(question: Row, references: Mapping[int, Turns], turn: int) -> dict[str, str]:
    first, second = question["turns"]
    fields = {"question": first} if turn == 1 else {"question_1": first, "question_2": second}
    if question["category"] in NEED_REFERENCE:
        first, second = references[question["question_id"]]
        fields |= {"ref_answer_1": first, "ref_answer_2": second}
    return fields


def _answer_fields(turns: Turns, name: str, turn: int) -> dict[str, str]:
    return {name: turns[0]} if turn == 1 else {f"{name}_1": turns[0], f"{name}_2": turns[1]}


def _text(reply: Reply | None) -> str:
    """What the judge said; nothing where it was not asked, refused or did not answer."""
    return reply.text if reply is not None and reply.answered else ""


def _fail_above_limit(result: Result, what: str, failures: int, n: int) -> None:
    if failures > MAX_FAILURES * n:
        said = (
            f"{failures} of {n} {what} failed, more than {MAX_FAILURES:.0%}; see why in model_judgment, and start "
            "again or choose another judge"
        )
        result.error = f"{result.error}; {said}" if result.error else said


def _mean(values: np.ndarray) -> float | None:
    valid = values[~np.isnan(values)]
    return float(valid.mean()) if len(valid) else None


def _add_mean(result: Result, name: str, values_NT: np.ndarray, *, resamples: int, seed: int) -> None:
    """The mean over turns and questions as a metric; its interval resamples questions that have a value."""
    values_NT = values_NT[~np.isnan(values_NT).all(axis=1)]
    mean = _mean(values_NT)
    if mean is None:
        return
    result.metrics[name] = mean
    if len(values_NT) > 1:
        result.intervals[name] = bootstrap(values_NT, np.nanmean, resamples=resamples, seed=seed, method="bca")


def _by_category(questions: Sequence[Row], values_N2: np.ndarray) -> Iterable[tuple[str, np.ndarray]]:
    categories = np.array([question["category"] for question in questions])
    for category in dict.fromkeys(categories.tolist()):
        yield category, values_N2[categories == category]
