"""Where the policy has moved: `python -m dpo.tokens run=RUN_DIR key=value ...` (keys: conf/token_view.yaml).

    log pi(y_t|x, y_<t) - log pi_ref(y_t|x, y_<t)    of every response token y_t, nats

Rewards say how far a response has moved, this says where: beta times it is the token's reward, as far as the policy
holds one (Rafailov et al. 2024, arXiv:2404.12358), and the sum over a response is the log-ratio that the losses read.
The reference is what the run started from, whether its loss reads one or not, and every token counts once, whatever
ld_alpha says.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import hydra
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from dpo.build import build_eval_rows, build_finished_policy, build_finished_reference, build_template
from dpo.config import AT_LEAST_1, EvalConfig, SharedConfig, check, check_values
from dpo.logprobs import token_logps
from dpo.reference import Reference
from dpo.show import COLOURS, LEGEND, cut_line, numbers_of, paint, pieces, token_lines, visible
from dpo.tokens import Encoded, sides
from dpo.trainer import to_stream
from models.command import ANY, CONF, one_line_errors, prepare_command_line, while_read
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from models.weights import choose_device

# Of the most moved tokens of a response: how many each way, from which size (nats), and the tokens around each.
MOST_MOVED, LEAST, BEFORE, AFTER = 5, 0.005, 5, 2
# Share of the shown tokens within the colour scale; a few far out would leave all others white.
WITHIN = 0.95
# Backgrounds of a terminal with 256 colours, from pale to strong.
UP, DOWN = (189, 153, 117, 75, 33), (224, 217, 210, 203, 196)
STYLE = """
body { font: 16px/1.6 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h2 { font-size: 1.1rem; margin-top: 2rem; } .place { color: #666; font-weight: normal; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; padding: .4rem .6rem; border-left: 3px solid #ccc; }
.prompt { color: #666; } .special { color: #88a; } .right { color: #2a7d2e; } .wrong { color: #b3261e; }
td, th { text-align: right; padding: 0 .8rem; } td:first-child, th:first-child { text-align: left; }
.scale { display: inline-block; width: 16rem; height: 1rem; vertical-align: middle;
  background: linear-gradient(to right, rgb(220 50 40), #fff, rgb(40 110 220)); }
"""


@dataclass
class TokenViewConfig(EvalConfig):
    """The keys of eval.py, and which rows are shown."""

    WITHOUT_EFFECT: ClassVar[dict[str, Any]]

    show: int = MISSING
    rows: list[int] = MISSING


READ = {f.name for f in fields(SharedConfig)} | {"run", "eval_dataset", "output_file", "show", "rows"}
# Nothing is drawn or judged here.
TokenViewConfig.WITHOUT_EFFECT = {f.name: ANY for f in fields(TokenViewConfig) if f.name not in READ}

ConfigStore.instance().store(name="eval_schema", node=EvalConfig)
ConfigStore.instance().store(name="token_view_schema", node=TokenViewConfig)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="token_view")
def main(cfg: DictConfig) -> None:
    with one_line_errors(), while_read():
        view(cfg, colour=sys.stdout.isatty())


def command() -> None:
    prepare_command_line(TokenViewConfig)
    main()


@dataclass(frozen=True)
class Response:
    """A response of a row, token by token."""

    name: str
    pieces: list[tuple[str, bool]]
    """(text, whether special) of each token."""
    logps: list[float]
    """log pi of each token, nats."""
    logratios: list[float]
    """log pi - log pi_ref of each, nats."""
    cut: bool
    """whether it lost its end to cutoff_len."""


@dataclass(frozen=True)
class Row:
    number: int
    source: str
    prompt: list[tuple[str, bool]]
    responses: list[Response]
    beta: float

    @property
    def verdict(self) -> str:
        """The margin of a pair, as eval.py's rewards/margins and rewards/accuracies have it."""
        if len(self.responses) == 1:
            return "one response, so no margin"
        margin = self.beta * (sum(self.responses[0].logratios) - sum(self.responses[1].logratios))
        return f"margin {margin:+.3f}, ranked {'right' if margin > 0 else 'wrong'}"


def view(cfg: DictConfig, *, colour: bool) -> None:
    rows, about = viewed(cfg)
    limit = scale_of(rows)
    print(visible(about))
    print(LEGEND)
    print(
        "log-ratio of a token: log pi - log pi_ref, nats; logps, log-ratio of a response: sums; reward: beta log-ratio"
    )
    if colour:
        print(f"background: red from {-limit:.2g} nats and below, none at 0, blue to {limit:+.2g} and above")
    for row in rows:
        print()
        print("\n".join(lines(row, limit, colour)))
    if cfg.output_file:
        # Half a surrogate pair, which a file's name can hold, has no UTF-8.
        Path(cfg.output_file).write_bytes(page(rows, limit, about).encode("utf-8", "backslashreplace"))
        print(f"\npage: {cfg.output_file}")


def viewed(cfg: DictConfig) -> tuple[list[Row], str]:
    """(the rows that cfg asks for, what they are in a line)."""
    check(cfg)
    check_values(cfg, {"show": AT_LEAST_1})
    device = choose_device(cfg.device)
    template = build_template(cfg)
    encoded = build_eval_rows(cfg, template).evaluation
    numbers = numbers_of(cfg, len(encoded))
    picked = [encoded[number - 1] for number in numbers]
    policy = build_finished_policy(cfg, device)
    reference, description = build_finished_reference(cfg, policy, picked)
    measured = measure(policy, reference, picked, cfg.per_device_eval_batch_size)
    rows = [
        to_row(number, row, found, template.tokenizer, cfg.pref_beta)
        for number, row, found in zip(numbers, picked, measured, strict=True)
    ]
    name = cfg.adapter_name_or_path or cfg.model_name_or_path
    about = f"{len(rows)} of {len(encoded)} held-out rows; policy: {name}; reference: {description}"
    return rows, f"{about}; pref_beta={cfg.pref_beta:g}"


@torch.no_grad()
def measure(
    policy: Transformer, reference: Reference, rows: Sequence[Encoded], batch_size: int
) -> list[list[tuple[list[float], list[float]]]]:
    """For each row, for each of its branches: (log pi, log pi - log pi_ref) of its tokens, nats."""
    policy.eval()
    found = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        stream = to_stream(part, policy.device)
        policy_R = token_logps(policy, stream)
        ratio_R = policy_R - reference(stream, part)
        lengths = stream.lengths_B.tolist()
        logps, logratios = ([t.tolist() for t in x_R.cpu().split(lengths)] for x_R in (policy_R, ratio_R))
        branches = iter(zip(logps, logratios, strict=True))
        found += [[next(branches) for _ in row.response_ids] for row in part]
    return found


def to_row(
    number: int, row: Encoded, measured: Sequence[tuple[list[float], list[float]]], tokenizer: Tokenizer, beta: float
) -> Row:
    """What is shown of a row: its own responses, not one that an unpaired loss compares them with."""
    responses = [
        Response(name, pieces(tokenizer, ids, before=row.prompt_ids), *found, cut=cut)
        for name, ids, found, cut in zip(sides(row), row.response_ids, measured, row.cut, strict=False)
    ]
    return Row(number, row.example.source, pieces(tokenizer, row.prompt_ids), responses, beta)


def scale_of(rows: Sequence[Row]) -> float:
    """The size of log-ratio at which the colours end: of WITHIN of the tokens it is less; 1 where nothing moved."""
    sizes = np.abs([ratio for row in rows for response in row.responses for ratio in response.logratios])
    return float(np.quantile(sizes, WITHIN)) or float(sizes.max()) or 1.0


def most_moved(response: Response) -> list[int]:
    """Places of the tokens that gained most, the most first, then of those that lost most."""
    ratios = response.logratios
    order = sorted(range(len(ratios)), key=lambda i: ratios[i])
    up = [i for i in order[::-1][:MOST_MOVED] if ratios[i] >= LEAST]
    return up + [i for i in order[:MOST_MOVED] if ratios[i] <= -LEAST]


def numbers_line(response: Response, beta: float) -> str:
    logratio = sum(response.logratios)
    return f"logps {sum(response.logps):.3f}, log-ratio {logratio:+.3f}, reward {beta * logratio:+.3f}"


def lines(row: Row, limit: float, colour: bool) -> Iterator[str]:
    """A row for the terminal; colours add nothing but colour."""
    yield paint(visible(f"row {row.number} ({row.source}): {row.verdict}"), COLOURS["head"] if colour else "")
    yield from token_lines("prompt", "|", [(text, COLOURS["|"] if colour else "") for text, _ in row.prompt])
    for response in row.responses:
        codes = [background(ratio / limit) if colour else "" for ratio in response.logratios]
        texts = [text for text, _ in response.pieces]
        yield from token_lines(response.name, "*", list(zip(texts, codes, strict=True)))
        if response.cut:
            yield cut_line(response.name)
        yield f"    {numbers_line(response, row.beta)}, {len(texts)} tokens"
        for i in most_moved(response):
            before, after = texts[max(i - BEFORE, 0) : i], texts[i + 1 : i + 1 + AFTER]
            context = f"{'·'.join(before)}[{texts[i]}]{'·'.join(after)}"
            yield f"    {response.logratios[i]:+6.2f}  {visible(context)}"


def background(share: float) -> str:
    """The terminal's code for a log-ratio as a share of the scale; nothing near 0."""
    level = round(min(abs(share), 1) * len(UP))
    return f"\033[30;48;5;{(UP if share > 0 else DOWN)[level - 1]}m" if level else ""


def page(rows: Sequence[Row], limit: float, about: str) -> str:
    """The rows as one HTML file that needs no other; everything that comes from data or tokenizer is escaped."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><title>Where the policy has moved</title>',
            f"<style>{STYLE}</style></head><body>",
            f"<h1>Where the policy has moved</h1><p>{escape(visible(about))}</p>",
            f'<p>log pi - log pi_ref of a token, nats: {-limit:.2g} <span class="scale"></span> {limit:+.2g}; what is '
            "beyond has the colour of the end. A token's numbers are shown where the pointer rests. "
            f"{escape(LEGEND.partition('; ')[2])}</p>",
            *(part for row in rows for part in _html_row(row, limit)),
            "</body></html>\n",
        ]
    )


def _html_row(row: Row, limit: float) -> Iterator[str]:
    kind = row.verdict.rpartition(" ")[2]
    place = f'<span class="place">({_text(row.source)})</span>'
    yield f'<h2>row {row.number} {place}: <span class="{kind}">{row.verdict}</span></h2>'
    yield f'<div class="text prompt">{"".join(_text(text) for text, _ in row.prompt)}</div>'
    for response in row.responses:
        cut = " (cut here by cutoff_len)" if response.cut else ""
        yield f"<p><b>{response.name}</b> {numbers_line(response, row.beta)}, {len(response.pieces)} tokens</p>"
        tokens = zip(response.pieces, response.logps, response.logratios, strict=True)
        yield f'<div class="text">{"".join(_html_token(*token, limit) for token in tokens)}{cut}</div>'


def _html_token(piece: tuple[str, bool], logp: float, logratio: float, limit: float) -> str:
    text, special = piece
    colour = "40 110 220" if logratio > 0 else "220 50 40"
    share = min(abs(logratio) / limit, 1)
    numbers = f"{logratio:+.3f}: policy {logp:.3f}, reference {logp - logratio:.3f}"
    name = ' class="special"' if special else ""
    return f'<span{name} style="background: rgb({colour} / {share:.2f})" title="{numbers}">{_text(text)}</span>'


def _text(text: str) -> str:
    """Escaped; a newline is seen, and then done."""
    return escape(visible(text)).replace("⏎", "⏎\n")
