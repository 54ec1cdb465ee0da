"""Tokens: an Example as token ids, at most cutoff_len of them, with an exact border between prompt and responses."""

from collections.abc import Sequence
from dataclasses import dataclass

from dpo.formats import BadRow, Example
from models.template import ChatTemplate


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
