"""Turns: one message of a conversation, however a dataset writes it, and the rules that every prompt obeys."""

import re
import sys
from collections.abc import Sequence
from typing import Any

from models.template import Message

Row = dict[str, Any]
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Anthropic's HH and what follows it write a dialogue as one text. The blank after the colon belongs to the mark.
MARK = re.compile(r"\n\n(Human|Assistant): ?")


class BadRow(ValueError):
    """A row that cannot be used; str() is one line with file:line, the rule and what was given."""


def turns_of(value: Any, where: str) -> list[Message]:
    """A list of {from, value} or {role, content} objects as messages."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"{where} must be a list of at least one turn, got {show(value)}")
    turns = [turn_of(turn, f"{where}[{i}]") for i, turn in enumerate(value)]
    for i, (given, turn) in enumerate(zip(value, turns, strict=True)):
        # LLaMA-Factory's v1 rows say what to train on; a row that means something else must not train this.
        trained = float(i == len(turns) - 1 and turn["role"] == "assistant")
        if given.get("loss_weight") not in (None, trained):
            raise BadRow(
                f"{where}[{i}] has loss_weight {show(given['loss_weight'])}; only the last answer is trained on"
            )
    return turns


def turn_of(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"{where} must be an object with from and value (or role and content), got {show(turn)}")
    role, content = (_first(turn, keys) for keys in (("from", "role"), ("value", "content")))
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"{where} has the role {show(role)}; expected one of {', '.join(ROLES)}")
    if turn.get("tool_calls"):
        raise BadRow(f"{where} has tool_calls {show(turn['tool_calls'])}; only text is trained on")
    text = _joined(content) if isinstance(content, list) else content
    if not isinstance(text, str):
        raise BadRow(f"{where} must hold text, got {show(content)}")
    return {"role": ROLES[role], "content": text}


def _first(turn: Row, keys: Sequence[str]) -> Any:
    """The first that is not null: a .parquet file has every key in every row."""
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _joined(parts: list[Any]) -> str | None:
    """OpenAI's parts ({type: text, text}), and LLaMA-Factory's ({type: text, value}); None where one is no text."""
    texts = [_first(part, ("text", "value")) for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    whole = len(texts) == len(parts) > 0 and all(isinstance(text, str) for text in texts)
    return "".join(texts) if whole else None


def dialogue_of(text: Any, where: str) -> list[Message]:
    """One text of `\\n\\nHuman:` and `\\n\\nAssistant:` turns as messages."""
    if not isinstance(text, str):
        raise BadRow(f"{where} must be text, got {show(text)}")
    before, *parts = MARK.split(text)
    if before or not parts:
        raise BadRow(f"{where} must begin with '\\n\\nHuman:' or '\\n\\nAssistant:', got {show(text)}")
    return [{"role": _ROLE_OF_MARK[name], "content": said} for name, said in zip(parts[::2], parts[1::2], strict=True)]


_ROLE_OF_MARK = {"Human": "user", "Assistant": "assistant"}


def check_turns(messages: Sequence[Message]) -> None:
    """After an optional system turn, user and assistant alternate, and the user has the last word."""
    turns = [m["role"] for m in messages]
    spoken = turns[1:] if turns[:1] == ["system"] else turns
    expected = [("user", "assistant")[i % 2] for i in range(len(spoken))]
    if not spoken or spoken != expected or spoken[-1] != "user":
        shown = ", ".join(turns[:6]) + (", ..." if len(turns) > 6 else "")
        raise BadRow(f"turns are {shown or 'none'}; expected [system,] user, assistant, ..., user before the response")
    if not messages[-1]["content"].strip():
        raise BadRow("the last user turn is empty; nothing to respond to")


def text_of(row: Row, key: str) -> str:
    if not isinstance(row[key], str):
        raise BadRow(f"{key} must be text, got {show(row[key])}")
    return row[key]


def given(row: Row, key: str) -> bool:
    """Whether an optional key holds anything; null and "" are how datasets say no."""
    return row.get(key) not in (None, "")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def show(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:  # nested as deeply as the JSON parser allows
        text = "nested too deeply to show"
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
