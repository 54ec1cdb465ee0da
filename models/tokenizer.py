"""The checkpoint's tokenizer: tokenizer.json through `tokenizers`, and what tokenizer_config.json says beside it.

Two rules. The tokenizer adds no special token: the template decides (a second BOS is the field's oldest bug). And text
never becomes a special token: `encode_rendered` gives the specials of the template their ids, while the same characters
inside a user's message are encoded as the plain text they are.

Special is what tokenizer.json calls so. Added tokens that it does not, such as Qwen3's <think>, are vocabulary, which
text may use. Out of reach: a template that rewrites the inside of a message (changes its case, deletes what parts two
halves of a special), or that writes a special's first half right before a message.

Where SentencePiece's space stands is read from tokenizer.json. (transformers 5 goes by tokenizer_config.json's `legacy`
instead, where that names LlamaTokenizer as the class.)
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from models.config import read_json

# Stands for the first character of a special token's string inside a message (the next code points for other first
# characters), and is turned back before encoding: see escape(). Of the last plane, where no font has put its icons.
MARK = "\U00100000"
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# One byte of a character that a SentencePiece vocabulary lacks.
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """encode, decode and the special tokens of one checkpoint directory.

    Attributes:
        bos_token, eos_token: their strings, or None.
        chat_template: the checkpoint's own Jinja, or None.
        files: what text, ids and templates come from.
        stop_ids: ids that end a generated response: eos and what generation_config.json adds.
    """

    def __init__(self, model_dir: Path):
        path = Path(model_dir) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a tokenizer is read from tokenizer.json alone")
        try:
            self.rust = RustTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception for whatever is wrong with the file
            raise ValueError(f"{path}: not a readable tokenizer ({error})") from None
        self.rust.no_truncation()
        self.rust.no_padding()
        # Text is text: the strings of special tokens inside it are encoded as characters.
        self.rust.encode_special_tokens = True
        added = self.rust.get_added_tokens_decoder()
        self.special_ids = {token.content: i for i, token in added.items() if token.special}
        longest_first = sorted((t for t in added.values() if t.special), key=lambda t: len(t.content), reverse=True)
        # The first character stands before the look-ahead, so that `re` skips to the next one as fast as str.find.
        starts = [f"{re.escape(t.content[0])}(?={re.escape(t.content[1:])})" for t in longest_first]
        self._starts = re.compile("|".join(starts) or r"(?!)")
        self._heads = {token[:n] for token in self.special_ids for n in range(1, len(token))}
        self._longest_head = max(map(len, self._heads), default=0)
        # lstrip and rstrip: the token takes the white space beside it.
        taking = [r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in longest_first]
        self._specials = re.compile("|".join(taking) or r"(?!)")
        firsts = sorted({token[0] for token in self.special_ids})
        self._marks = {first: chr(ord(MARK) + i) for i, first in enumerate(firsts)}
        # SentencePiece puts a space before whatever it is given, but none belongs where a text continues. Such a piece
        # is given with a mark in front, and a last step cuts that off with the space. (A second tokenizer without the
        # space would leave it out after an added token inside the piece, too.)
        steps = f"{self.rust.normalizer} {self.rust.pre_tokenizer}"
        self._after_text = self._after_special = ""
        if "Prepend(" in steps or "Metaspace(" in steps:
            self._after_text = self._marks[""] = chr(ord(MARK) + len(firsts))  # escape() refuses it too
            cut = pre_tokenizers.Split(Regex(rf"\A.?{self._after_text}"), "removed")
            before = [self.rust.pre_tokenizer] if self.rust.pre_tokenizer else []
            self.rust.pre_tokenizer = pre_tokenizers.Sequence([*before, cut])
            if "prepend_scheme=first" in steps:  # the others put the space after every special token too
                self._after_special = self._after_text
        settings = path.with_name("tokenizer_config.json")
        self.files = [path.with_name(name) for name in FILES if path.with_name(name).is_file()]
        self.bos_token, self.eos_token = (_token_string(settings, key) for key in ("bos_token", "eos_token"))
        self.chat_template = _chat_template(settings)
        generation = path.with_name("generation_config.json")
        ends = _read_json(generation).get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if not all(type(end) is int for end in ends):
            raise ValueError(f"{generation}: eos_token_id={ends!r:.100}: expected a token id, or a list of them")
        self.stop_ids = frozenset([*ends, *(i for token, i in self.special_ids.items() if token == self.eos_token)])

    def escape(self, text: str) -> str:
        """`text` with a mark where a special token's string would begin, so that a template's own are told from it."""
        for mark in self._marks.values():
            if mark in text:
                raise ValueError(
                    f"text holds {mark!r} (U+{ord(mark):04X}, private use), which is reserved here; remove it"
                )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text holds {text[error.start]!r}, half of a surrogate pair; remove it") from None
        text = self._starts.sub(lambda match: self._marks[match[0]], text)
        # The first half of a special at the end, whose other half may begin the next message; templates may trim.
        end = len(text.rstrip())
        for i in range(max(0, end - self._longest_head), end):
            if text[i:end] in self._heads:
                text = text[:i] + self._marks[text[i]] + text[i + 1 :]
        return text

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain texts; nothing is added, special strings stay characters."""
        # Fast: without the tokens' places in the text.
        return [encoding.ids for encoding in self.rust.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_rendered(self, texts: Sequence[str], after: str = "") -> list[list[int]]:
        """Token ids of rendered templates, in which the messages' text went through escape().

        after: the rendered text that each of them continues.
        """
        before = self._split(after)[-1] if after else None
        return self._encode_parts([self._marked(before, self._split(text)) for text in texts])

    def encode_continued(
        self, rendered: Sequence[tuple[str, Sequence[str]]]
    ) -> list[tuple[list[int], list[list[int]]]]:
        """encode_rendered of many prompts and of the texts that continue each, at once: `tokenizers` uses all cores."""
        parts = []
        for prompt, texts in rendered:
            split = self._split(prompt)
            before = split[-1] if split else None
            parts += [self._marked(None, split), *(self._marked(before, self._split(text)) for text in texts)]
        ids = iter(self._encode_parts(parts))
        return [(next(ids), [next(ids) for _ in texts]) for _, texts in rendered]

    def _encode_parts(self, texts: Sequence[Sequence[str | int]]) -> list[list[int]]:
        """Ids of texts that are cut into plain text and specials' ids."""
        # Each text once: "user\n" stands in every row, and one prompt may stand in many.
        plain = list(dict.fromkeys(part for parts in texts for part in parts if isinstance(part, str)))
        known = dict(zip(plain, self.encode(plain), strict=True))
        return [[i for part in parts for i in (known[part] if isinstance(part, str) else (part,))] for parts in texts]

    def _marked(self, before: str | int | None, parts: Sequence[str | int]) -> list[str | int]:
        """The parts, text with the mark that says what stands before it."""
        marks = {type(None): "", str: self._after_text, int: self._after_special}
        marked: list[str | int] = []
        for part in parts:
            marked.append(marks[type(before)] + part if isinstance(part, str) else part)
            before = part
        return marked

    def _split(self, text: str) -> list[str | int]:
        """Text between the special tokens, marks taken out, and the specials' ids."""
        parts: list[str | int] = []
        start = 0
        for match in self._specials.finditer(text):
            token = match[0] if match[0] in self.special_ids else match[0].strip()
            parts += [self._unmarked(text[start : match.start()]), self.special_ids[token]]
            start = match.end()
        parts.append(self._unmarked(text[start:]))
        return [part for part in parts if part != ""]

    def _unmarked(self, text: str) -> str:
        for first, mark in self._marks.items():
            text = text.replace(mark, first)
        return text

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.rust.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids that arrive one by one: the pieces join to decode(ids), and none ends inside a character.

        All is decoded anew at each id (0.5 ms for 2,000), for what a token means can hang on any before it: a byte of a
        character, SentencePiece's first space. `tokenizers`' DecodeStream keeps the rest at the end and can raise.
        """
        seen: list[int] = []
        shown = 0
        for i in ids:
            token = self.rust.id_to_token(i)
            if token is None or token in self.special_ids:  # decode() leaves these out before it joins the others
                continue
            seen.append(i)
            if not BYTE.fullmatch(token):  # a run of them is text or not by its end
                whole = self.decode(seen).removesuffix("\ufffd")
                if len(whole) > shown:
                    yield whole[shown:]
                shown = len(whole)
        if rest := self.decode(seen)[shown:]:
            yield rest


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def _token_string(settings: Path, key: str) -> str | None:
    token = _read_json(settings).get(key)
    token = token["content"] if isinstance(token, dict) and "content" in token else token
    if not isinstance(token, str | None):
        raise ValueError(f"{settings}: {key}={token!r:.100}: expected a token's string")
    return token


def _chat_template(settings: Path) -> str | None:
    """The Jinja of chat_template.jinja, or of tokenizer_config.json (a string, or a list with one called default)."""
    path = settings.with_name("chat_template.jinja")
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _read_json(settings).get("chat_template")
    if isinstance(template, list):
        named = {t["name"]: t.get("template") for t in template if isinstance(t, dict) and "name" in t}
        template = named.get("default")
    if not isinstance(template, str | None):
        raise ValueError(f"{settings}: chat_template={template!r:.100}: expected Jinja text, or a list with a default")
    return template
