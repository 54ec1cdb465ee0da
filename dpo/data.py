"""Preference data: rows of any known format become one Example each, and Examples become token ids.

An Example is a conversation that ends in a user turn, and the responses to compare: (chosen, rejected) for preference
rows, one response for SFT and unpaired rows. Formats are recognised by their keys:

    the guide's, ShareGPT ranking    conversations [{from, value}], chosen, rejected (strings or {from, value})
    Alpaca ranking                   instruction, [input, system, history], chosen, rejected
    prompt/chosen/rejected           strings, or messages [{role, content}]
    unpaired (pref_loss: kto)        an SFT row with label (or kto_tag) true or false; a preference row gives two
    SFT (stage: sft)                 conversations or messages ending in an assistant turn; instruction/output;
                                     prompt/completion; a preference row gives its chosen response

No row is repaired: a bad one stops the run with file:line, the key and the rule, or is counted and listed
(on_bad_row=skip).
"""

import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from models.template import ChatTemplate, Message

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


@dataclass(frozen=True)
class Encoded:
    """An Example as token ids; the responses end in the template's end-of-turn unless they were cut."""

    prompt_ids: list[int]
    response_ids: tuple[list[int], ...]
    example: Example
    dropped_turns: int
    """old turns left out so that the rest fits cutoff_len."""
    cut: tuple[bool, ...]
    """whether each response lost its end to cutoff_len."""

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + sum(map(len, self.response_ids))


class BadRow(ValueError):
    """A row that cannot be used; str() is one line with file:line, the rule and what was given."""


def find_dataset(dataset: str, dataset_dir: str) -> Path:
    """The file that `dataset` names: a path, or a name in dataset_dir, with or without .json or .jsonl."""
    tried = [Path(dataset).expanduser()]
    tried += [Path(dataset_dir) / (dataset + suffix) for suffix in ("", ".json", ".jsonl")]
    for path in tried:
        if path.is_file():
            if path.suffix not in (".json", ".jsonl"):
                raise ValueError(f"dataset={dataset}: {path.suffix or 'no'} suffix; .json and .jsonl files are read")
            return path
    raise ValueError(f"dataset={dataset}: no such file; looked for {', '.join(map(str, tried))}")


def read_examples(
    path: Path, *, stage: str, on_bad_row: str, max_samples: int | None = None
) -> tuple[list[Example], list[str]]:
    """(examples, bad rows as one line each) of the first max_samples rows of a .json or .jsonl file.

    stage: dpo asks for two responses, sft for one, kto for one with a label.
    on_bad_row: stop raises the first BadRow, skip collects them.
    """
    examples: list[Example] = []
    bad: list[str] = []
    rows = _json_rows(path) if path.suffix == ".json" else _jsonl_rows(path)
    for source, row in islice(rows, max_samples):
        try:
            example = _example(row, source, "dpo" if stage == "kto" and "chosen" in row else stage)
            examples += _unpaired(example) if stage == "kto" and len(example.responses) == 2 else [example]
        except BadRow as error:
            if on_bad_row == "stop":
                raise
            bad.append(str(error))
    if not examples:
        raise ValueError(f"{path}: no usable row ({len(bad)} bad){': ' + bad[0] if bad else ''}")
    return examples, bad


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # A generator that raised is finished, so bad lines are yielded as they are found and raised by _example.
    with open(path, "rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if not raw.strip():
                continue
            source = f"{path}:{number}"
            try:
                yield source, json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield source, BadRow(f"{source}: byte {error.start + 1} is not UTF-8; save the file as UTF-8")
            except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4,300 digits
                yield source, BadRow(f"{source}: not valid JSON ({error}); expected one object per line")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of a JSON array with their lines, parsed one by one so that each keeps its line."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise ValueError(f"{path}:{line}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    if text.startswith("\ufeff"):
        raise ValueError(f"{path}:1: begins with a byte order mark; save the file as UTF-8 without BOM")
    decoder = json.JSONDecoder()
    position, line = _skip_space(text, 0, 1)
    if text[position : position + 1] != "[":
        raise ValueError(f"{path}:{line}: expected a JSON array of rows; for one object per line name the file .jsonl")
    position, line = _skip_space(text, position + 1, line)
    while text[position : position + 1] != "]":
        try:
            row, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            # What follows a syntax error cannot be told from it, so this stops whatever on_bad_row says.
            raise ValueError(f"{path}:{line}: not valid JSON ({error})") from None
        yield f"{path}:{line}", row
        line += text.count("\n", position, end)
        position, line = _skip_space(text, end, line)
        if text[position : position + 1] == ",":
            position, line = _skip_space(text, position + 1, line)
            if text[position : position + 1] == "]":
                raise ValueError(f"{path}:{line}: not valid JSON (a comma after the last row)")
        elif text[position : position + 1] != "]":
            raise ValueError(f"{path}:{line}: not valid JSON (expected ',' or ']' after a row); is the file cut short?")
    position, line = _skip_space(text, position + 1, line)
    if position < len(text):
        raise ValueError(f"{path}:{line}: not valid JSON (text after the array's end); one array per file")


def _skip_space(text: str, position: int, line: int) -> tuple[int, int]:
    end = position
    while end < len(text) and text[end] in " \t\r\n":
        end += 1
    return end, line + text.count("\n", position, end)


def _example(row: Any, source: str, stage: str) -> Example:
    """The Example of one parsed row; BadRow names the key, the rule and what was given."""
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


def encode(example: Example, template: ChatTemplate, cutoff_len: int) -> Encoded:
    """Token ids of an Example, at most cutoff_len per prompt plus response.

    Over it, whole old turns go first; system and last turn stay; then the responses are cut at their end, and lose
    their end-of-turn with it. BadRow where the last turn leaves no room, or the cut makes both responses equal.
    """
    system = [m for m in example.messages[:1] if m["role"] == "system"]
    spoken = list(example.messages[len(system) :])
    dropped = 0
    while True:
        try:
            prompt_ids, responses = template.encode([*system, *spoken], example.responses)
        except (ValueError, TypeError) as error:  # TypeError: the tokenizer's word for half a surrogate pair
            raise BadRow(f"{example.source}: cannot be tokenized ({error})") from None
        if len(spoken) == 1 or len(prompt_ids) + max(map(len, responses)) <= cutoff_len:
            break
        spoken = spoken[2:]
        dropped += 2
    room = cutoff_len - len(prompt_ids)
    if room < 1:
        raise BadRow(
            f"{example.source}: system and last turn take {len(prompt_ids)} tokens and leave no room for a response in "
            f"cutoff_len={cutoff_len}; raise it or shorten the prompt"
        )
    cut = tuple(ids[:room] for ids in responses)
    if len(cut) == 2 and responses[0] == responses[1]:
        raise BadRow(f"{example.source}: chosen and rejected are equal once the template has rendered them")
    if len(cut) == 2 and cut[0] == cut[1]:
        raise BadRow(f"{example.source}: chosen and rejected are equal within cutoff_len={cutoff_len}; raise it")
    return Encoded(prompt_ids, cut, example, dropped, tuple(len(ids) > room for ids in responses))


def encode_all(
    examples: Sequence[Example], template: ChatTemplate, *, cutoff_len: int, on_bad_row: str
) -> tuple[list[Encoded], list[str]]:
    """(encoded, bad rows as one line each), on_bad_row as in read_examples."""
    encoded: list[Encoded] = []
    bad: list[str] = []
    for example in examples:
        try:
            encoded.append(encode(example, template, cutoff_len))
        except BadRow as error:
            if on_bad_row == "stop":
                raise
            bad.append(str(error))
    if not encoded:
        raise ValueError(f"no row is left after tokenization ({len(bad)} bad): {bad[0] if bad else ''}")
    return encoded, bad


def split_by_prompt(examples: Sequence[Example], val_size: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, held out): val_size of the rows (a share below 1, else a count), no prompt on both sides."""
    wanted = val_size * len(examples) if val_size < 1 else val_size
    by_prompt: dict[str, list[Example]] = {}
    for example in examples:
        by_prompt.setdefault(json.dumps(example.messages), []).append(example)
    prompts = sorted(by_prompt)
    random.Random(seed).shuffle(prompts)
    held: set[str] = set()
    count = 0
    for prompt in prompts:
        if count >= wanted:
            break
        held.add(prompt)
        count += len(by_prompt[prompt])
    train = [example for example in examples if json.dumps(example.messages) not in held]
    if not train or not held:
        raise ValueError(f"val_size={val_size}: leaves {len(train)} of {len(examples)} rows to train on")
    return train, [example for example in examples if json.dumps(example.messages) in held]
