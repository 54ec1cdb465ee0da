"""Formats: a row of any known format becomes one Example.

An Example is a conversation that ends in a user turn, and the responses to compare: (chosen, rejected) for preference
rows, one response for SFT and unpaired rows. Formats are recognised by their keys:

    the guide's, ShareGPT ranking    conversations [{from, value}], chosen, rejected (strings or {from, value})
    Alpaca ranking                   instruction, [input, system, history], chosen, rejected
    prompt/chosen/rejected           strings, or messages [{role, content}]
    unpaired (pref_loss: kto)        an SFT row with label (or kto_tag) true or false; a preference row gives two
    SFT (stage: sft)                 conversations or messages ending in an assistant turn; instruction/output;
                                     prompt/completion; a preference row gives its chosen response

No row is repaired: a bad one is a BadRow, one line with file:line, the key and the rule.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from models.template import Message

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


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


class BadRow(ValueError):
    """A row that cannot be used; str() is one line with file:line, the rule and what was given."""


def examples_of(row: Any, source: str, stage: str) -> list[Example]:
    """The Examples of one parsed row; BadRow names the key, the rule and what was given.

    stage: dpo asks for two responses, sft for one, kto for one with a label: a pair gives two of those.
    """
    example = _example(row, source, "dpo" if stage == "kto" and isinstance(row, dict) and "chosen" in row else stage)
    return _unpaired(example) if stage == "kto" and len(example.responses) == 2 else [example]


def _example(row: Any, source: str, stage: str) -> Example:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"{source}: a row must be an object, got {type(row).__name__}")
    try:
        messages = _messages(row)
        responses: tuple[str, ...]
        label = None
        if stage == "kto":
            label = _label(row)
        if stage in ("sft", "kto"):
            messages, responses = _sft_response(row, messages)
        else:
            responses = (_response(row, "chosen"), _response(row, "rejected"))
            if responses[0] == responses[1]:
                raise BadRow("chosen equals rejected; a pair needs two different responses")
        _check_turns(messages)
        return Example(tuple(messages), responses, source, label=label, **_numbers(row))
    except BadRow as error:
        raise BadRow(f"{source}: {error}") from None


def _unpaired(pair: Example) -> list[Example]:
    """A pair as a desirable and an undesirable row."""
    return [replace(pair, responses=(text,), label=i == 0) for i, text in enumerate(pair.responses)]


def _label(row: dict[str, Any]) -> bool:
    key = "label" if "label" in row else "kto_tag"
    if key not in row:
        raise BadRow("label is missing; an unpaired row needs label (or kto_tag), or chosen and rejected")
    if not isinstance(row[key], bool):
        raise BadRow(f"{key} must be true or false, got {_show(row[key])}")
    return row[key]


# Optional numbers of a row: where each may lie.
NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "weight": ("at least 0", lambda value: value >= 0),
    "margin": ("a finite number", lambda value: True),
    "soft_label": ("between 0 and 1", lambda value: 0 <= value <= 1),
}


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """weight, margin and soft_label of a row, as far as it has them."""
    numbers = {}
    for key, (rule, holds) in NUMBERS.items():
        value = row.get(key)
        if value is not None:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and abs(value) <= sys.float_info.max and holds(value)):
                raise BadRow(f"{key} must be {rule}, got {_show(value)}")
            numbers[key] = float(value)
    return numbers


def _messages(row: dict[str, Any]) -> list[Message]:
    key = next((key for key in ("conversations", "messages", "instruction", "prompt") if key in row), None)
    if key is None:
        keys = ", ".join(repr(key)[:40] for key in list(row)[:8]) or "none"
        raise BadRow(f"no known format has these keys: {keys}; expected conversations, messages, instruction or prompt")
    system = [{"role": "system", "content": _text(row, "system")}] if _given(row, "system") else []
    if key == "instruction":
        text = _text(row, "instruction")
        # A blank line has no meaning here: LLaMA-Factory joins instruction and input by one newline.
        text += "\n" + _text(row, "input") if _given(row, "input") else ""
        return [*system, *_history(row), {"role": "user", "content": text}]
    if key == "prompt" and not isinstance(row["prompt"], list):
        return [*system, {"role": "user", "content": _text(row, "prompt")}]
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{key} must be a list of at least one turn, got {_show(turns)}")
    return [*system, *(_turn(turn, f"{key}[{i}]") for i, turn in enumerate(turns))]


def _given(row: dict[str, Any], key: str) -> bool:
    """Whether an optional key holds anything; null and "" are how datasets say no."""
    return row.get(key) not in (None, "")


def _history(row: dict[str, Any]) -> list[Message]:
    history = [] if row.get("history") is None else row["history"]
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        raise BadRow(f"history must be a list of [question, answer] pairs, got {_show(history)}")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair, strict=True)]


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"{where} must be an object with from and value (or role and content), got {_show(turn)}")
    role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"{where} has the role {_show(role)}; expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise BadRow(f"{where} must hold text, got {_show(content)}")
    return {"role": ROLES[role], "content": content}


def _response(row: dict[str, Any], side: str) -> str:
    value = row.get(side)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        turn = _turn(value, side)
        if turn["role"] != "assistant":
            raise BadRow(f"{side} is a {turn['role']} turn; expected the assistant's")
        value = turn["content"]
    if side not in row:
        unpaired = "; rows with a label are for pref_loss=kto" if "label" in row or "kto_tag" in row else ""
        raise BadRow(f"{side} is missing; a preference row needs chosen and rejected{unpaired}")
    if not isinstance(value, str):
        raise BadRow(f"{side} must be text or one assistant turn, got {_show(value)}")
    if not value.strip():
        raise BadRow(f"{side} is empty; every row needs non-empty responses")
    return value


def _sft_response(row: dict[str, Any], messages: list[Message]) -> tuple[list[Message], tuple[str, ...]]:
    if messages[-1]["role"] == "assistant":
        messages, text = messages[:-1], messages[-1]["content"]
    else:
        key = next((key for key in ("chosen", "output", "completion", "response") if key in row), None)
        if key is None:
            raise BadRow("no response; expected a last assistant turn, chosen, output, completion or response")
        text = _response(row, key)
    if not text.strip():
        raise BadRow("the response is empty; every row needs a non-empty one")
    return messages, (text,)


def _check_turns(messages: Sequence[Message]) -> None:
    """After an optional system turn, user and assistant alternate, and the user has the last word."""
    turns = [m["role"] for m in messages]
    spoken = turns[1:] if turns[:1] == ["system"] else turns
    expected = [("user", "assistant")[i % 2] for i in range(len(spoken))]
    if not spoken or spoken != expected or spoken[-1] != "user":
        shown = ", ".join(turns[:6]) + (", ..." if len(turns) > 6 else "")
        raise BadRow(f"turns are {shown or 'none'}; expected [system,] user, assistant, ..., user before the response")
    if not messages[-1]["content"].strip():
        raise BadRow("the last user turn is empty; nothing to respond to")


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise BadRow(f"{key} must be text, got {_show(row[key])}")
    return row[key]


def _show(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:  # nested as deeply as the JSON parser allows
        text = "nested too deeply to show"
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
