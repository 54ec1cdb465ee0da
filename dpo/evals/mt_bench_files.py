"""MT-Bench's files: questions, reference answers and judge prompts, read and checked; answers in FastChat's format."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from string import Formatter
from typing import Any

from dpo.digests import write_beside
from dpo.files import rows_of

QUESTIONS, REFERENCES, PROMPTS = "question.jsonl", "reference_gpt-4.jsonl", "judge_prompts.jsonl"
WAY_OUT = (
    "take question.jsonl, reference_answer/gpt-4.jsonl (as reference_gpt-4.jsonl) of fastchat/llm_judge/data/mt_bench "
    "and judge_prompts.jsonl of fastchat/llm_judge/data, https://github.com/lm-sys/FastChat"
)
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "reasoning": 0.0, "math": 0.0, "coding": 0.0, "extraction": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
NEED_REFERENCE = ("reasoning", "math", "coding")
PER_CATEGORY = 10
FAILED_ANSWERS = ("ERROR", "$ERROR$")
# The fields of each template that is used.
SINGLE, PAIR = {"question", "answer"}, {"question", "answer_a", "answer_b"}
SINGLE_2 = {"question_1", "answer_1", "question_2", "answer_2"}
PAIR_2 = {"question_1", "answer_a_1", "answer_b_1", "question_2", "answer_a_2", "answer_b_2"}
TEMPLATES = {
    "single-v1": SINGLE, "single-math-v1": SINGLE | {"ref_answer_1"},
    "single-v1-multi-turn": SINGLE_2, "single-math-v1-multi-turn": SINGLE_2 | {"ref_answer_1", "ref_answer_2"},
    "pair-v2": PAIR, "pair-math-v1": PAIR | {"ref_answer_1"},
    "pair-v2-multi-turn": PAIR_2, "pair-math-v1-multi-turn": PAIR_2 | {"ref_answer_1", "ref_answer_2"},
}  # fmt: skip
Row = Mapping[str, Any]
Turns = Sequence[str]
"""the two turns of a question, or the two answers to them."""


def read(directory: Path) -> tuple[list[Row], dict[int, Turns], dict[str, Row]]:
    """(the 80 questions, references by question_id, judge prompts by name); ValueError where they are not those."""
    questions = list(_rows(directory / QUESTIONS, "question_id", "category", "turns"))
    for question in questions:
        if question["category"] not in TEMPERATURES or len(_turns(question["turns"])) != 2:
            raise ValueError(
                f"{directory / QUESTIONS}: question_id={question['question_id']} has category="
                f"{question['category']!r} and {len(_turns(question['turns']))} turns, expected two texts and one of "
                f"{', '.join(TEMPERATURES)}; {WAY_OUT}"
            )
    ids = {question["question_id"] for question in questions}
    if len(ids) != len(questions) or len(questions) != PER_CATEGORY * len(TEMPERATURES):
        raise ValueError(
            f"{directory / QUESTIONS}: has {len(questions)} questions of {len(ids)} ids, MT-Bench has "
            f"{PER_CATEGORY * len(TEMPERATURES)}; {WAY_OUT}"
        )
    rows = _rows(directory / REFERENCES, "question_id", "choices")
    references = {row["question_id"]: _turns(row["choices"][0]["turns"]) for row in rows}
    for question in questions:
        if question["category"] in NEED_REFERENCE and len(references.get(question["question_id"], ())) != 2:
            raise ValueError(
                f"{directory / REFERENCES}: has no two turns of question_id={question['question_id']}, whose category "
                f"{question['category']} is judged beside one; {WAY_OUT}"
            )
    prompts: dict[str, Row] = {
        row["name"]: row for row in _rows(directory / PROMPTS, "name", "system_prompt", "prompt_template")
    }
    for name, fields in TEMPLATES.items():
        if name not in prompts or fields != _fields(prompts[name]["prompt_template"]):
            raise ValueError(
                f"{directory / PROMPTS}: expected a template {name} with {', '.join(sorted(fields))}; {WAY_OUT}"
            )
    return questions, references, prompts


def read_answers(path: str, questions: Sequence[Row]) -> tuple[str, dict[int, Turns]]:
    """(model_id, the first choice's turns by question_id) of an answer file in FastChat's format."""
    way_out = "name a file of model_answer/ that answers every question"
    rows = list(_rows(Path(path).expanduser(), "question_id", "model_id", "choices", way_out=way_out))
    answers = {row["question_id"]: _turns(row["choices"][0]["turns"]) for row in rows}
    for question in questions:
        if len(answers.get(question["question_id"], ())) != 2:
            raise ValueError(
                f"mt_bench_baseline={path}: has no answer of two turns to question_id={question['question_id']}; "
                f"{way_out}"
            )
    return rows[0]["model_id"], answers


def _rows(path: Path, *keys: str, way_out: str = WAY_OUT) -> Iterable[Row]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {way_out}")
    for place, row in rows_of(path):
        if isinstance(row, Exception):
            raise row
        for key in keys:
            if not isinstance(row, dict) or key not in row:
                raise ValueError(f"{place}: has no {key!r}; {way_out}")
        choices = row.get("choices", [{"turns": []}])
        if not (isinstance(choices, list) and choices and isinstance(choices[0], dict) and "turns" in choices[0]):
            raise ValueError(f"{place}: choices={choices!r:.60}, expected a list of {{index, turns}}; {way_out}")
        yield row


def _turns(value: Any) -> Turns:
    """The turns where they are texts, none where they are anything else."""
    return value if isinstance(value, list) and all(isinstance(turn, str) for turn in value) else ()


def _fields(template: str) -> set[str]:
    try:
        return {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError:
        return set()


def write_answers(path: Path, model: str, answers: Mapping[int, Turns]) -> None:
    write_lines(
        path,
        [
            {
                "question_id": id, "answer_id": sha256(json.dumps([id, model, turns]).encode()).hexdigest()[:22],
                "model_id": model, "choices": [{"index": 0, "turns": list(turns)}], "tstamp": time.time(),
            }
            for id, turns in answers.items()
        ],
    )  # fmt: skip


def write_lines(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())


def answered(turns: Turns) -> bool:
    """Whether these are answers, and not FastChat's mark of a failure."""
    return not any(turn.strip() in FAILED_ANSWERS for turn in turns)
