"""The texts of a dataset as the checks read them: every text cut into words once, every word a number.

A word is a run of letters and digits after NFKC and lower case, or one character of a script written without spaces
(Chinese, Japanese); apostrophes are left out (dont). Markup and punctuation are no words, so two texts that differ in
nothing else have the same ones.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from dpo.formats import Example

UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
APOSTROPHES = {ord(c): None for c in "'’"}
ASCII = {code: chr(code) if chr(code).isalnum() else None if chr(code) == "'" else " " for code in range(128)}


def words_of(text: str) -> list[str]:
    text = text.lower()
    if text.isascii():
        return text.translate(ASCII).split()  # the same words, three times as fast
    return WORD.findall(unicodedata.normalize("NFKC", text).lower().translate(APOSTROPHES))


class Vocabulary:
    """Words as numbers, in the order of their first use."""

    def __init__(self) -> None:
        self.ids: defaultdict[str, int] = defaultdict()
        self.ids.default_factory = self.ids.__len__

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def words(self) -> list[str]:
        return list(self.ids)

    def read(self, texts: Iterable[str]) -> "Words":
        number = self.ids.__getitem__
        return Words([np.array(list(map(number, words_of(text))), dtype=np.int32) for text in texts])


class Words:
    """Texts as word numbers: row i is flat[starts[i] : starts[i + 1]]."""

    def __init__(self, rows: Sequence[np.ndarray]) -> None:
        self.starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        self.flat = np.concatenate([np.zeros(0, np.int32), *rows])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.flat[self.starts[row] : self.starts[row + 1]]

    def __add__(self, other: "Words") -> "Words":
        """Row by row, the words of both."""
        return Words([np.concatenate([self[row], other[row]]) for row in range(len(self))])

    @cached_property
    def counts(self) -> np.ndarray:
        """How many words each row has."""
        return np.diff(self.starts)

    @cached_property
    def rows(self) -> np.ndarray:
        """The row of each word of flat."""
        return np.repeat(np.arange(len(self)), self.counts)

    @cached_property
    def keys(self) -> np.ndarray:
        """A number for each row, the same for rows of the same words in the same order."""
        seen: dict[bytes, int] = {}
        return np.array([seen.setdefault(self[row].tobytes(), len(seen)) for row in range(len(self))], dtype=np.int64)

    def frequency(self, vocabulary: int) -> np.ndarray:
        """In how many rows each of so many words stands."""
        distinct = [np.zeros(0, np.int32), *(np.unique(self[row]) for row in range(len(self)))]
        return np.bincount(np.concatenate(distinct), minlength=vocabulary)


class Corpus:
    """A dataset's pairs, as text and as words."""

    def __init__(self, examples: Sequence[Example], vocabulary: Vocabulary | None = None) -> None:
        self.examples = examples
        self.vocabulary = Vocabulary() if vocabulary is None else vocabulary
        self.context = ["\n".join(m["content"] for m in example.messages[:-1]) for example in examples]
        """everything before the question: the system turn, earlier turns."""
        self.question = [example.messages[-1]["content"] for example in examples]
        self.chosen = [example.responses[0] for example in examples]
        self.rejected = [example.responses[1] for example in examples]
        self.question_words = self.vocabulary.read(self.question)
        self.prompt_words = self.vocabulary.read(self.context) + self.question_words
        self.chosen_words = self.vocabulary.read(self.chosen)
        self.rejected_words = self.vocabulary.read(self.rejected)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def sides(self) -> tuple[tuple[str, list[str], Words], ...]:
        return ("chosen", self.chosen, self.chosen_words), ("rejected", self.rejected, self.rejected_words)

    def source(self, row: int) -> str:
        return self.examples[row].source

    @cached_property
    def prompts(self) -> np.ndarray:
        """A number for each row's prompt, the same where the prompts are; one without words is its own text."""
        seen: dict[object, int] = {}
        keys = [
            words.tobytes() if len(words) else (context, question)
            for words, context, question in zip(
                map(self.prompt_words.__getitem__, range(len(self))), self.context, self.question, strict=True
            )
        ]
        return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)

    @cached_property
    def frequency(self) -> np.ndarray:
        """In how many of the 2 rows responses each word of the vocabulary stands."""
        size = len(self.vocabulary)
        return self.chosen_words.frequency(size) + self.rejected_words.frequency(size)


def share(count: float, rows: int) -> str:
    return f"{count:,} of {rows:,} rows ({100 * count / max(rows, 1):.1f}%)"
