"""A chat in the terminal: `python -m models.chat model_name_or_path=... key=value ...` (keys: conf/chat.yaml).

Each answer is drawn from pi(. | system, all turns so far) and shown while it is drawn. A line of stdin is a turn or a
command; answers alone go to stdout and all else to stderr, so `< questions.txt > answers.txt` works as a terminal does.
Left out: keeping the cache between turns, because a prompt is read much faster than an answer is written.
"""

import difflib
import io
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from models.command import ANY, CONF, one_line_errors, prepare_command_line, refuse_unset, while_read
from models.generate import StopStrings, stream_tokens
from models.lora import load_adapter, read_adapter_config
from models.packed import packed
from models.sampling import Sampling
from models.template import ChatTemplate, Message
from models.tokenizer import Tokenizer
from models.weights import choose_device, choose_dtype, load_model, resolve_model_dir

HELP = """\
/reset         forget the conversation and start anew
/system TEXT   replace the system message; without TEXT: the template's own, if it has one
/save FILE     append the conversation to a .jsonl file, as a row to train on
/help          this list
/exit          leave; so does Ctrl-D. Ctrl-C ends an answer, and what was said of it stays
A message that begins with / needs a space before it."""
COMMANDS = [line.split()[0] for line in HELP.splitlines() if line[0] == "/"]


@dataclass
class ChatConfig:
    """Every key of models.chat; see conf/chat.yaml for what each means."""

    # LLaMA-Factory's inference files have these too. No code of a checkpoint is run, whatever they allow.
    WITHOUT_EFFECT: ClassVar[dict[str, Any]] = {"finetuning_type": ANY, "stage": ANY, "trust_remote_code": ANY}

    model_name_or_path: str = MISSING
    adapter_name_or_path: str | None = MISSING
    template: str = MISSING
    default_system: str | None = MISSING
    date_string: str | None = MISSING
    temperature: float = MISSING
    top_k: int = MISSING
    top_p: float = MISSING
    min_p: float = MISSING
    max_new_tokens: int = MISSING
    stop_strings: list[str] = MISSING
    seed: int = MISSING
    bf16: bool = MISSING
    device: str = MISSING


ConfigStore.instance().store(name="chat_schema", node=ChatConfig)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="chat")
def main(cfg: DictConfig) -> None:
    with one_line_errors(), while_read():
        chat = Chat(cfg)
        with packed(chat.model):
            talk(chat)


def check(cfg: DictConfig) -> None:
    refuse_unset(cfg)
    for key, rule, holds in (
        ("max_new_tokens", "must be at least 1", cfg.max_new_tokens >= 1),
        ("seed", "must be at least 0 and below 2^32", 0 <= cfg.seed < 2**32),
        ("device", "expected auto, cpu or cuda", cfg.device.partition(":")[0] in ("auto", "cpu", "cuda")),
    ):
        if not holds:
            raise ValueError(f"{key}={cfg[key]}: {rule}")


class Chat:
    """A conversation with a model: what was said, and what the model says next."""

    def __init__(self, cfg: DictConfig):
        # All that can be wrong without the weights comes before them.
        check(cfg)
        device, directory = choose_device(cfg.device), resolve_model_dir(cfg.model_name_or_path)
        self.sampling = Sampling(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p)
        self.template = ChatTemplate(cfg.template, Tokenizer(directory), cfg.date_string)
        self.stops = StopStrings(list(cfg.stop_strings), self.template.tokenizer)
        self.system, self.max_new_tokens = cfg.default_system, cfg.max_new_tokens
        self.seeds = itertools.count(cfg.seed)  # one for each answer
        if cfg.adapter_name_or_path:
            read_adapter_config(Path(cfg.adapter_name_or_path).expanduser())
        self.model = load_model(directory, dtype=choose_dtype(cfg.bf16, fp16=False), device=device)
        if cfg.adapter_name_or_path:
            load_adapter(self.model, Path(cfg.adapter_name_or_path).expanduser(), dropout=0.0)
        self.positions = self.model.config.max_position_embeddings
        self.reset()

    def reset(self) -> None:
        self.turns: list[Message] = []
        self.forgotten = 0  # turns at the start that the model no longer sees

    def messages(self, first: int = 0) -> list[Message]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + self.turns[first:]

    def prompt_ids(self, question: str) -> list[int]:
        """The conversation and `question`; whole old turns are forgotten where no room for an answer would be left."""
        # A max_new_tokens as large as the model would leave no room for what was said.
        longest = self.positions - min(self.max_new_tokens, self.positions // 2)
        for first in range(self.forgotten, len(self.turns) + 1, 2):
            ids, _ = self.template.encode([*self.messages(first), {"role": "user", "content": question}], [])
            if len(ids) <= longest:
                break
        if len(ids) >= self.positions:
            raise ValueError(f"this message needs {len(ids)} of the model's {self.positions} positions; shorten it")
        if first > 0 and self.forgotten == 0:
            note(f"the conversation outgrows the model's {self.positions} positions: its oldest turns are forgotten")
        self.forgotten = first
        return ids

    def draw(self, prompt_ids: list[int], limit: int) -> Iterator[int]:
        """The tokens of an answer, each of them also added to self.drawn."""
        for token in stream_tokens(
            self.model, prompt_ids, max_new_tokens=limit, stop_ids=self.template.stop_ids, sampling=self.sampling,
            seed=next(self.seeds),
        ):  # fmt: skip
            self.drawn.append(token)
            yield token

    def answer(self, question: str) -> None:
        """Show an answer while it is drawn, and remember it. Ctrl-C ends it; what was shown stays."""
        prompt_ids = self.prompt_ids(question)
        limit = min(self.max_new_tokens, self.positions - len(prompt_ids))
        self.drawn: list[int] = []
        said, start = "", time.perf_counter()
        with suppress(KeyboardInterrupt):
            text = self.template.tokenizer.decode_stream(self.draw(prompt_ids, limit))
            for piece in before_stop(text, self.stops):
                print(piece, end="", flush=True)
                said += piece
        print(flush=True)
        count, seconds = len(self.drawn), time.perf_counter() - start
        if count == limit:
            note(f"({limit} tokens, the most that this answer may have)")
        elif sys.stdout.isatty():
            note(f"({count} tokens, {count / seconds:.1f} per second)")
        # Some templates refuse an empty answer, and there is nothing in one to train on.
        if said.strip():
            self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": said}]

    def save(self, file: str) -> None:
        if not file.endswith(".jsonl") or not self.turns:
            rule = "expected the name of a .jsonl file" if self.turns else "nothing was said yet"
            raise ValueError(f"/save {file}: {rule}")
        row = {"conversations": [{"from": m["role"], "value": m["content"]} for m in self.messages()]}
        try:
            with open(Path(file).expanduser(), "a", encoding="utf-8") as rows:
                rows.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ValueError(f"/save {file}: {error.strerror}; name another file") from None
        note(f"saved: {Path(file).expanduser().resolve()}")


def before_stop(pieces: Iterable[str], stops: StopStrings) -> Iterator[str]:
    """`pieces` up to the first stop string; what may be the beginning of one waits until that is decided."""
    held = ""
    for piece in pieces:
        held += piece
        text = stops.cut(held)
        if text != held:
            yield text
            return
        waits = max((n for s in stops.strings for n in range(len(s)) if held.endswith(s[:n])), default=0)
        yield held[: len(held) - waits]
        held = held[len(held) - waits :]
    yield held


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def talk(chat: Chat) -> None:
    """A turn or a command for every line of stdin, to its end."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a bad byte is one refused line, not the end of all
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with suppress(ImportError):
            import readline  # input() then has line editing, earlier lines, and pasted lines as one message

            readline.parse_and_bind("set enable-bracketed-paste on")
        note("/help lists the commands, Ctrl-D leaves")
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            line = input("\n> " if terminal else "").rstrip()
            command, text = [*line.split(maxsplit=1), "", ""][:2]
            if command == "/exit":
                return
            try:
                if line.startswith("/"):
                    run_command(chat, command, text.strip())
                elif line:
                    chat.answer(line.strip())
            except ValueError as error:
                note(f"error: {' '.join(str(error).split())}")
    if terminal:
        note("")  # what the shell writes next begins a line of its own


def run_command(chat: Chat, command: str, text: str) -> None:
    if command == "/reset":
        chat.reset()
        note("a new conversation")
    elif command == "/system":
        chat.system = text or None
        note(f"system message: {text or 'that of the template, if it has one'}")
    elif command == "/save":
        chat.save(text)
    elif command == "/help":
        note(HELP)
    else:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "/help lists them; with a space before it, it is a message"
        raise ValueError(f"{command}: no such command; {hint}")


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):  # its notes are no answers
        prepare_command_line(ChatConfig)
    main()
