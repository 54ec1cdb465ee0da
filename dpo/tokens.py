"""Tokens: an Example as token ids, at most cutoff_len of them, with an exact border between prompt and responses."""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain

from dpo.formats import NUMBERS, BadRow, Example
from models.template import ChatTemplate, Message

# Rows given to the tokenizer at once: many enough for its threads, few enough that a bad row is said soon.
BATCH_ROWS = 1024


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
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each response."""
        return tuple(map(len, self.response_ids))

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + sum(self.lengths)

    @property
    def has_numbers(self) -> bool:
        """Whether the row says a weight, margin or soft label of its own."""
        return any(getattr(self.example, key) != getattr(Example, key) for key in NUMBERS)

    @property
    def key(self) -> str:
        """A digest of the ids and where they part."""
        ids = chain(self.prompt_ids, *self.response_ids)
        parts = array("i", [len(self.response_ids), len(self.prompt_ids), *self.lengths, *ids])
        return sha256(parts.tobytes()).hexdigest()


@dataclass(frozen=True)
class Rows:
    """The rows of a run."""

    train: Sequence[Encoded]
    evaluation: Sequence[Encoded]
    skipped: Sequence[str]
    """bad rows, a line each."""
    warnings: Sequence[str] = ()
    """what is odd about them, a line each."""


def encode(example: Example, template: ChatTemplate, cutoff_len: int) -> Encoded:
    """Token ids of an Example, at most cutoff_len per prompt plus response.

    Over it, whole old turns go first; system and last turn stay; then the responses are cut at their end, and lose
    their end-of-turn with it. BadRow where the last turn leaves no room, or the cut makes both responses equal.
    """
    (result,) = encode_batch([example], template, cutoff_len)
    if isinstance(result, BadRow):
        raise result
    return result


def encode_batch(examples: Sequence[Example], template: ChatTemplate, cutoff_len: int) -> list[Encoded | BadRow]:
    """What `encode` gives, or raises, for each of the Examples; many at once are several times as fast."""
    results: dict[int, Encoded | BadRow] = {}
    turns_without = dict.fromkeys(range(len(examples)), 0)  # rows that are not done yet: old turns left out
    while turns_without:
        rendered: dict[int, tuple[str, list[str]]] = {}
        for i, dropped in turns_without.items():
            try:
                rendered[i] = template.parts(_without_old_turns(examples[i], dropped), examples[i].responses)
            except ValueError as error:
                results[i] = BadRow(f"{examples[i].source}: cannot be tokenized ({error})")
        encoded = template.tokenizer.encode_continued(list(rendered.values()))
        too_long = {}
        for i, (prompt_ids, responses) in zip(rendered, encoded, strict=True):
            dropped = turns_without[i]
            if len(prompt_ids) + max(map(len, responses)) > cutoff_len and _old_turns(examples[i]) > dropped:
                too_long[i] = dropped + 2
            else:
                results[i] = _fitted(examples[i], prompt_ids, responses, dropped, cutoff_len)
        turns_without = too_long
    return [results[i] for i in range(len(examples))]


def _old_turns(example: Example) -> int:
    """Turns before the last one, the system's not counted."""
    return len(example.messages) - 1 - (example.messages[0]["role"] == "system")


def _without_old_turns(example: Example, dropped: int) -> list[Message]:
    first = len(example.messages) - 1 - _old_turns(example)
    return [*example.messages[:first], *example.messages[first + dropped :]]


def _fitted(
    example: Example, prompt_ids: list[int], responses: list[list[int]], dropped: int, cutoff_len: int
) -> Encoded | BadRow:
    """The row with its responses cut to what cutoff_len leaves them."""
    room = cutoff_len - len(prompt_ids)
    if room < 1:
        return BadRow(
            f"{example.source}: system and last turn take {len(prompt_ids)} tokens and leave no room for a response in "
            f"cutoff_len={cutoff_len}; raise it or shorten the prompt"
        )
    cut = tuple(ids[:room] for ids in responses)
    if len(cut) == 2 and responses[0] == responses[1]:
        return BadRow(f"{example.source}: chosen and rejected are equal once the template has rendered them")
    if len(cut) == 2 and cut[0] == cut[1]:
        return BadRow(f"{example.source}: chosen and rejected are equal within cutoff_len={cutoff_len}; raise it")
    return Encoded(prompt_ids, cut, example, dropped, tuple(len(ids) > room for ids in responses))


def encode_all(
    examples: Sequence[Example], template: ChatTemplate, *, cutoff_len: int, on_bad_row: str
) -> tuple[list[Encoded], list[str]]:
    """(encoded, bad rows as one line each), on_bad_row as in read_examples."""
    encoded: list[Encoded] = []
    bad: list[str] = []
    for i in range(0, len(examples), BATCH_ROWS):
        for result in encode_batch(examples[i : i + BATCH_ROWS], template, cutoff_len):
            if isinstance(result, Encoded):
                encoded.append(result)
            elif on_bad_row == "stop":
                raise result
            else:
                bad.append(str(result))
    if not encoded:
        raise ValueError(f"no row is left after tokenization ({len(bad)} bad): {bad[0] if bad else ''}")
    return encoded, bad


def describe_cuts(rows: Iterable[Encoded]) -> list[str]:
    """One line of what cutoff_len took of the rows; none where it took nothing."""
    shortened, cut = 0, Counter[str]()
    for row in rows:
        shortened += row.dropped_turns > 0
        if any(row.cut):
            cut.update(side for side, was_cut in zip(sides(row), row.cut, strict=True) if was_cut)
    if not (shortened or cut):
        return []
    counts = ", ".join(f"{count} {side}".removesuffix(" response") for side, count in sorted(cut.items())) or "0"
    return [f"cutoff_len: {shortened} rows lost old turns; responses cut at their end: {counts}"]


def sides(row: Encoded) -> tuple[str, ...]:
    """What a row's own responses are called."""
    if len(row.cut) == 2:
        return ("chosen", "rejected")
    return ({None: "response", True: "desirable", False: "undesirable"}[row.example.label],)


if __name__ == "__main__":
    from dpo.token_view import command

    command()
