"""Formats: a row of any known format becomes Examples.

An Example is a conversation that ends in a user turn, and the responses to compare: (chosen, rejected) for preference
rows, one response for SFT and unpaired rows. FORMATS is the table; a row's keys say which format it is of.

    SFT (stage: sft)           the last assistant turn, or chosen, output, completion or response; of a ranking the best
    unpaired (pref_loss: kto)  an SFT row with label (or kto_tag) true or false; a pair gives two

No row is repaired: a bad one is a BadRow, one line with file:line, the key and the rule.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dpo.rankings import best_response, is_ranked, ranked_pairs
from dpo.turns import MARK, BadRow, Row, check_turns, dialogue_of, given, is_number, show, text_of, turn_of, turns_of
from models.template import Message


@dataclass(frozen=True)
class Example:
    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    """(chosen, rejected), or (response,) for SFT."""
    source: str
    """file:line"""
    weight: float = 1.0
    """what the pair's loss is multiplied by."""
    margin: float = 0.0
    """by how much the chosen reward shall exceed the rejected one."""
    soft_label: float | None = None
    """the probability that chosen is the better one, where the row says it."""
    label: bool | None = None
    """whether the one response of an unpaired row is desirable."""
    dimensions: dict[str, dict[str, float]] | None = None
    """scores of chosen and rejected by dimension: {"safety": {"chosen": 5, "rejected": 4}}, where the row has them."""
    origin: str = ""
    """where the row itself says that it is from: its `source`."""


# A prompt with what answers it.
Reading = tuple[list[Message], tuple[str, ...]]


@dataclass(frozen=True)
class Format:
    needs: tuple[str, ...]
    """keys without which a row is not of this format."""
    fits: Callable[[Row], bool]
    read: Callable[[Row, bool, str], list[Reading]]
    """(row, whether pairs are wanted or one response, ranking_to_pairs) -> readings."""


def examples_of(
    row: Any, source: str, stage: str, *, data_format: str | None = None, ranking_to_pairs: str = "best_worst"
) -> list[Example]:
    """The Examples of one parsed row; BadRow names the key, the rule and what was given.

    stage: dpo asks for two responses, sft for one, kto for one with a label: a pair gives two of those.
    data_format: a key of FORMATS; None: the first that fits the row.
    """
    if isinstance(row, BadRow):
        raise row
    try:
        examples = _examples(row, source, stage, data_format, ranking_to_pairs)
    except BadRow as error:
        raise BadRow(f"{source}: {error}") from None
    if stage == "kto":
        return [unpaired for example in examples for unpaired in _unpaired(example)]
    return examples


def _examples(row: Any, source: str, stage: str, data_format: str | None, ranking_to_pairs: str) -> list[Example]:
    if not isinstance(row, dict):
        raise BadRow(f"a row must be an object, got {type(row).__name__}")
    for key in ("tools", "images", "videos", "audios"):
        if row.get(key) not in (None, "", "[]", [], {}):
            raise BadRow(f"{key} must be empty, got {show(row[key])}; only text is trained on")
    how = _format_of(row, data_format)
    compared = how is FORMATS["ranked"] or any(row.get(key) is not None for key in ("chosen", "chosen_messages"))
    pairs = stage == "dpo" or (stage == "kto" and compared)
    label = _label(row) if stage == "kto" and not pairs else None
    system: list[Message] = [{"role": "system", "content": text_of(row, "system")}] if given(row, "system") else []
    readings = [((*system, *prompt), responses) for prompt, responses in how.read(row, pairs, ranking_to_pairs)]
    for messages, _ in readings:
        check_turns(messages)
    dimensions, numbers = _dimensions(row), _numbers(row)
    origin = row["source"] if isinstance(row.get("source"), str) else ""
    return [
        Example(messages, responses, source, label=label, dimensions=dimensions, origin=origin, **numbers)
        for messages, responses in readings
    ]


def _format_of(row: Row, data_format: str | None) -> Format:
    if data_format is not None:
        for key in FORMATS[data_format].needs:
            if row.get(key) is None:
                raise BadRow(
                    f"{key} is missing; data_format={data_format} needs {', '.join(FORMATS[data_format].needs)}"
                )
        return FORMATS[data_format]
    fitting = next((how for how in FORMATS.values() if how.fits(row)), None)
    if fitting is None:
        keys = ", ".join(repr(key)[:40] for key in list(row)[:8]) or "none"
        raise BadRow(
            f"no known format has these keys: {keys}; expected {', '.join(PROMPTS)}, or whole conversations as chosen "
            "and rejected"
        )
    return fitting


def _unpaired(example: Example) -> list[Example]:
    """A pair as a desirable and an undesirable row."""
    if len(example.responses) == 1:
        return [example]
    return [replace(example, responses=(text,), label=i == 0) for i, text in enumerate(example.responses)]


# --- what a row says beside its texts ---


def _label(row: Row) -> bool:
    key = "label" if "label" in row else "kto_tag"
    if key not in row:
        raise BadRow("label is missing; an unpaired row needs label (or kto_tag), or chosen and rejected")
    if not isinstance(row[key], bool):
        raise BadRow(f"{key} must be true or false, got {show(row[key])}")
    return row[key]


# Optional numbers of a row: where each may lie.
NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "weight": ("at least 0", lambda value: value >= 0),
    "margin": ("a finite number", lambda value: True),
    "soft_label": ("between 0 and 1", lambda value: 0 <= value <= 1),
}


def _numbers(row: Row) -> dict[str, float]:
    """weight, margin and soft_label of a row, as far as it has them."""
    numbers = {}
    for key, (rule, holds) in NUMBERS.items():
        value = row.get(key)
        if value is not None:
            if not (is_number(value) and holds(value)):
                raise BadRow(f"{key} must be {rule}, got {show(value)}")
            numbers[key] = float(value)
    return numbers


def _dimensions(row: Row) -> dict[str, dict[str, float]] | None:
    dimensions = row.get("dimensions")
    if dimensions is None:
        return None
    if not isinstance(dimensions, dict):
        raise BadRow(f"dimensions must be an object, got {show(dimensions)}")
    # A .parquet file has every dimension in every row.
    dimensions = {name: scores for name, scores in dimensions.items() if scores is not None}
    for name, scores in dimensions.items():
        both = isinstance(scores, dict) and scores.keys() == {"chosen", "rejected"}
        if not both or not all(map(is_number, scores.values())):
            raise BadRow(f"dimensions: {name!r:.40} must be {{chosen: number, rejected: number}}, got {show(scores)}")
    return dimensions or None


# --- a prompt, and its responses beside it ---

PROMPTS = ("conversations", "messages", "instruction", "prompt")


def _prompt(row: Row, key: str) -> list[Message]:
    if key == "instruction":
        text = text_of(row, "instruction")
        # A blank line has no meaning here: LLaMA-Factory joins instruction and input by one newline.
        text = "\n".join(filter(None, [text, text_of(row, "input") if given(row, "input") else ""]))
        return [*_history(row), {"role": "user", "content": text}]
    if key != "prompt" or isinstance(row["prompt"], list):
        return turns_of(row[key], key)
    text = text_of(row, "prompt")
    if not MARK.match(text):
        return [{"role": "user", "content": text}]
    *turns, last = dialogue_of(text, "prompt")
    # It may end in the mark of the turn that is to come.
    return turns if last == {"role": "assistant", "content": ""} else [*turns, last]


def _history(row: Row) -> list[Message]:
    history = [] if row.get("history") is None else row["history"]
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        raise BadRow(f"history must be a list of [question, answer] pairs, got {show(history)}")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair, strict=True)]


def _read_beside(row: Row, pairs: bool, ranking_to_pairs: str, *, key: str) -> list[Reading]:
    """The prompt under `key`, and its responses under keys of their own, or as the last turn of it."""
    prompt = _prompt(row, key)
    if pairs:
        return [(prompt, _differing(_response(row, "chosen"), _response(row, "rejected")))]
    if prompt[-1:] and prompt[-1]["role"] == "assistant":
        *prompt, last = prompt
        text = last["content"]
    else:
        answer = next((key for key in ("chosen", "output", "completion", "response") if row.get(key) is not None), None)
        if answer is None:
            raise BadRow("no response; expected a last assistant turn, chosen, output, completion or response")
        text = _response(row, answer)
    if not text.strip():
        raise BadRow("the response is empty; every row needs a non-empty one")
    return [(prompt, (text,))]


def _response(row: Row, side: str) -> str:
    value = row.get(side)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        turn = turn_of(value, side)
        if turn["role"] != "assistant":
            raise BadRow(f"{side} is a {turn['role']} turn; expected the assistant's")
        value = turn["content"]
    if side not in row:
        unpaired = "; rows with a label are for pref_loss=kto" if "label" in row or "kto_tag" in row else ""
        raise BadRow(f"{side} is missing; a preference row needs chosen and rejected{unpaired}")
    if not isinstance(value, str):
        raise BadRow(f"{side} must be text or one assistant turn, got {show(value)}")
    if not value.strip():
        raise BadRow(f"{side} is empty; every row needs non-empty responses")
    return value


def _differing(chosen: str, rejected: str) -> tuple[str, str]:
    if chosen == rejected:
        raise BadRow("chosen equals rejected; a pair needs two different responses")
    return chosen, rejected


# --- whole conversations on both sides ---


def _read_whole(
    row: Row, pairs: bool, ranking_to_pairs: str, *, keys: tuple[str, str], parse: Callable[[Any, str], list[Message]]
) -> list[Reading]:
    """Two conversations that are the same but for their last turn."""
    sides = []
    for key in keys if pairs else keys[:1]:
        if row.get(key) is None:
            raise BadRow(f"{key} is missing; a preference row needs {' and '.join(keys)}")
        turns = parse(row[key], key)
        if turns[-1]["role"] != "assistant":
            raise BadRow(f"{key} ends in a {turns[-1]['role']} turn; expected the assistant's")
        if not turns[-1]["content"].strip():
            raise BadRow(f"the last turn of {key} is empty; every row needs non-empty responses")
        sides.append(turns)
    prompt, other = sides[0][:-1], sides[-1][:-1]
    if prompt != other:
        turn = next(
            (i for i, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b), min(map(len, sides)) - 1
        )
        raise BadRow(f"{' and '.join(keys)} differ at turn {turn + 1}, before their last; both must answer one prompt")
    for key in PROMPTS:
        if given(row, key):
            _check_stated(row[key], key, sides)
    responses = [turns[-1]["content"] for turns in sides]
    return [(prompt, _differing(*responses) if pairs else (responses[0],))]


def _check_stated(stated: Any, key: str, sides: list[list[Message]]) -> None:
    """A prompt beside whole conversations is theirs, or one of them whole; a text is one of their user turns."""
    if isinstance(stated, str):
        same = {"role": "user", "content": stated} in sides[0]
    else:
        same = turns_of(stated, key) in [sides[0][:-1], *sides]
    if not same:
        raise BadRow(f"{key} is not what the conversations begin with, got {show(stated)}; leave it out or make it so")


def _is_whole(row: Row) -> bool:
    sides = [side for side in (row.get("chosen"), row.get("rejected")) if isinstance(side, list)]
    if len(sides) < 2:
        return False
    return any(len(side) > 1 for side in sides) or not any(row.get(key) is not None for key in PROMPTS)


def _is_dialogue(row: Row) -> bool:
    sides = (row.get("chosen"), row.get("rejected"))
    marked = any(isinstance(side, str) and MARK.match(side) for side in sides)
    return marked and not any(row.get(key) is not None for key in PROMPTS)


# --- several scored responses ---


def _read_ranked(row: Row, pairs: bool, ranking_to_pairs: str) -> list[Reading]:
    key = next((key for key in PROMPTS if row.get(key) is not None), None)
    if key is None:
        raise BadRow(f"no prompt beside the ranked responses; expected one of {', '.join(PROMPTS)}")
    prompt = _prompt(row, key)
    if not pairs:
        return [(prompt, (best_response(row),))]
    return [(prompt, pair) for pair in ranked_pairs(row, ranking_to_pairs)]


def _beside(key: str) -> Format:
    return Format((key,), lambda row: row.get(key) is not None, partial(_read_beside, key=key))


V1 = ("chosen_messages", "rejected_messages")
PAIR = ("chosen", "rejected")
# The first that fits is a row's format: those that need more before those that need less.
FORMATS: dict[str, Format] = {
    # {"chosen_messages": [{role, content: [{type: text, value}]}, ...], "rejected_messages": [...]}
    "llamafactory_v1": Format(
        V1, lambda row: any(row.get(key) is not None for key in V1), partial(_read_whole, keys=V1, parse=turns_of)
    ),
    # {"prompt": ..., "completions": [{response, overall_score}, ...]}; see dpo.rankings
    "ranked": Format((), is_ranked, _read_ranked),
    # {"chosen": [{role, content}, ...], "rejected": [...]}: whole conversations, as TRL has them
    "whole": Format(PAIR, _is_whole, partial(_read_whole, keys=PAIR, parse=turns_of)),
    # {"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": ...}
    "hh": Format(PAIR, _is_dialogue, partial(_read_whole, keys=PAIR, parse=dialogue_of)),
    # {"conversations": [{from, value}], "chosen": text or {from, value}, "rejected": ...}: the guide's, and ShareGPT's
    "conversations": _beside("conversations"),
    # {"messages": [{role, content}], ...}: OpenAI's
    "messages": _beside("messages"),
    # {"instruction": ..., "input": ..., "system": ..., "history": [[question, answer]], "chosen": ..., "rejected": ...}
    "alpaca": _beside("instruction"),
    # {"prompt": text or [{role, content}], "chosen": text or [{role, content}], "rejected": ...}: TRL's
    "prompt": _beside("prompt"),
}
