"""Rows as the model sees them: `python -m dpo.data dataset=... show=3 key=value ...` (keys: conf/show.yaml).

Every token of prompt and responses, in training's own encoding: which are prompt, which are scored, which are special.
A wrong template shows at once: headers without special tokens, a missing system turn, a response without its end.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from dpo.build import model_dir, read_datasets
from dpo.config import AT_LEAST_1, TrainConfig, check_values
from dpo.formats import NUMBERS, BadRow, Example
from dpo.tokens import Encoded, encode_batch, sides
from models.command import ANY, CONF, one_line_errors, prepare_command_line, refuse_unset, while_read
from models.template import ChatTemplate
from models.tokenizer import Tokenizer

LEGEND = "| prompt, * scored; · parts tokens, «» holds a special one, ⏎ is a newline, … the first part of a character"
# Of a terminal: prompt, scored, special token, what tells rows apart.
COLOURS = {"|": "\033[2m", "chosen": "\033[32m", "rejected": "\033[31m", "special": "\033[1;35m", "head": "\033[1m"}
COLOURS |= {"desirable": COLOURS["chosen"], "undesirable": COLOURS["rejected"], "response": COLOURS["chosen"]}
PLAIN = "\033[0m"


@dataclass
class ShowConfig:
    """Every key of `python -m dpo.data`; see conf/show.yaml for what each means."""

    WITHOUT_EFFECT: ClassVar[dict[str, Any]]

    model_name_or_path: str = MISSING
    template: str = MISSING
    date_string: str | None = MISSING
    stage: str = MISSING
    dataset: Any = MISSING
    dataset_dir: str = MISSING
    data_format: str | None = MISSING
    ranking_to_pairs: str = MISSING
    cutoff_len: int = MISSING
    max_samples: int | None = MISSING
    on_bad_row: str = MISSING
    show: int = MISSING
    rows: list[int] = MISSING


# A training run's file may be given as it is: what it says of training changes no row.
ShowConfig.WITHOUT_EFFECT = {f.name: ANY for f in fields(TrainConfig) if not hasattr(ShowConfig, f.name)}
ConfigStore.instance().store(name="show_schema", node=ShowConfig)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="show")
def main(cfg: DictConfig) -> None:
    with one_line_errors(), while_read():
        show(cfg, colour=sys.stdout.isatty())


def command() -> None:
    prepare_command_line(ShowConfig)
    main()


def show(cfg: DictConfig, *, colour: bool) -> None:
    refuse_unset(cfg)
    check_values(cfg, {"show": AT_LEAST_1})
    template = ChatTemplate(cfg.template, Tokenizer(model_dir(cfg.model_name_or_path)), cfg.date_string)
    datasets, bad = read_datasets(cfg, cfg.dataset, "train.jsonl")
    examples = [example for dataset in datasets.values() for example in dataset]
    numbers = numbers_of(cfg, len(examples))
    picked = encode_batch([examples[number - 1] for number in numbers], template, cfg.cutoff_len)
    name = f"template={cfg.template}, model_name_or_path={cfg.model_name_or_path}, cutoff_len={cfg.cutoff_len}"
    print(f"{len(examples)} rows, {len(bad)} skipped; {name}\n{LEGEND}")
    for number, row in zip(numbers, picked, strict=True):
        print()
        if isinstance(row, BadRow):
            print(visible(f"row {number} cannot be used: {row}"))
        else:
            print("\n".join(lines(number, row, template.tokenizer, colour)))


def numbers_of(cfg: DictConfig, total: int) -> list[int]:
    """Which rows are shown of so many: `rows`, else the first `show`; counted from 1."""
    numbers = list(cfg.rows) or list(range(1, min(cfg.show, total) + 1))
    for number in numbers:
        if not 1 <= number <= total:
            raise ValueError(f"rows={numbers}: {number} is none of the {total} rows, which count from 1")
    return numbers


def lines(number: int, row: Encoded, tokenizer: Tokenizer, colour: bool) -> Iterator[str]:
    """A row, a line of text each; the margin says what its tokens are."""
    names = sides(row)
    turns = ", ".join(message["role"] for message in row.example.messages)
    lengths = ", ".join(f"{name} {length}" for name, length in zip(names, row.lengths, strict=False))
    said = [f"{key} {getattr(row.example, key):g}" for key in NUMBERS if _says(row.example, key)]
    dropped = [f"{row.dropped_turns} old turns left out"] if row.dropped_turns else []
    head = "; ".join([turns, f"tokens: prompt {len(row.prompt_ids)}, {lengths}", *said, *dropped])
    yield paint(visible(f"row {number} ({row.example.source}): {head}"), COLOURS["head"] if colour else "")
    yield from token_lines("prompt", "|", _coloured(pieces(tokenizer, row.prompt_ids), "|", colour))
    for name, ids, cut in zip(names, row.response_ids, row.cut, strict=False):
        found = pieces(tokenizer, ids, before=row.prompt_ids)
        yield from token_lines(name, "*", _coloured(found, name, colour))
        if cut:
            yield cut_line(name)


def cut_line(name: str) -> str:
    return f"  {name:11s}   (cut here by cutoff_len)"


def _says(example: Example, key: str) -> bool:
    return getattr(example, key) != getattr(Example, key)


def pieces(tokenizer: Tokenizer, ids: Sequence[int], before: Sequence[int] = ()) -> list[tuple[str, bool]]:
    """(text, whether special) of each token; of a character in several tokens the last has it, the others have `…`.

    before: ids that they continue. A token is decoded after its neighbour, for SentencePiece drops a first space.
    """
    specials = {i: token for token, i in tokenizer.special_ids.items()}
    left, part, found = list(before[-1:]), list[int](), list[tuple[str, bool]]()
    for i in ids:
        if i in specials:
            found.append((f"«{specials[i]}»", True))
            left, part = [i], []
            continue
        part.append(i)
        text = tokenizer.decode([*left, *part])[len(tokenizer.decode(left)) :]
        if text.endswith("\ufffd"):
            found.append(("…", False))
        else:
            found.append((text, False))
            left, part = part, []
    return found


def _coloured(tokens: Sequence[tuple[str, bool]], what: str, colour: bool) -> list[tuple[str, str]]:
    return [(text, COLOURS["special" if special else what] if colour else "") for text, special in tokens]


def token_lines(name: str, mark: str, tokens: Sequence[tuple[str, str]]) -> Iterator[str]:
    """(text, its colour or nothing) of each token as lines, with a new one after each that ends one."""
    line: list[str] = []
    for i, (text, code) in enumerate(tokens):
        line.append(paint(visible(text), code))
        if "\n" in text or i == len(tokens) - 1:
            yield f"  {name:11s} {mark} " + "·".join(line)
            line = []


def visible(text: str) -> str:
    """Text in which nothing moves the cursor or hides."""
    text = text.replace("\n", "⏎")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def paint(text: str, code: str) -> str:
    return f"{code}{text}{PLAIN}" if code else text
