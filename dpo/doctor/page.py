"""report.html: the same findings to read, with plots and the worst rows side by side; one file that needs no other.

Everything that comes from the dataset is escaped: a row is shown, never run.
"""

import base64
import difflib
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dpo.doctor.check import VERDICTS, Check
from dpo.doctor.report import dropped, most_telling
from dpo.doctor.text import Corpus

WORST, LONGEST = 10, 2000
# Beyond this many words a comparison word by word takes too long, and helps nobody.
COMPARED_WORDS = 400
NO_PLOT = 'No plot: drawing needs matplotlib (pip install -e ".[plot]").'
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .3rem .6rem; }
tr + tr td { border-top: 1px solid #ddd; }
.ok, .note, .warn { font-weight: bold; } .ok { color: #2a7d2e; } .note { color: #a86500; } .warn { color: #b3261e; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f4; padding: .5rem; border-radius: .3rem;
  max-height: 24rem; overflow: auto; font-size: 14px; }
.row { border-left: 3px solid #ccc; padding-left: .8rem; margin: 1rem 0; } .prompt { background: #eef2f7; }
mark { background: #ffe08a; } img { max-width: 100%; } pre { white-space: pre-wrap; } summary { cursor: pointer; }
.place { color: #666; font-size: 13px; }
"""


def write_page(path: Path, checks: Sequence[Check], corpus: Corpus, about: Mapping[str, Any]) -> None:
    page = "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><title>Is the data worth training on?</title>',
            f"<style>{STYLE}</style></head><body>",
            "<h1>Is the data worth training on?</h1>",
            f"<p>{escape(', '.join(f'{name}: {value}' for name, value in about.items()))}</p>",
            f"<p>{len(corpus):,} rows, of which export= would leave out {len(dropped(checks)):,}.</p>",
            *_telling(checks),
            "<h2>All questions</h2><table>",
            *(
                f'<tr><td class="{check.verdict}">{check.verdict}</td><td>{_link(check)}</td>'
                f"<td>{escape(check.summary)}</td></tr>"
                for check in checks
            ),
            "</table>",
            *(_section(check, corpus) for check in checks if _has_section(check)),
            "</body></html>",
        ]
    )
    # Half a surrogate pair, which JSON can hold, has no UTF-8.
    path.write_bytes((page + "\n").encode("utf-8", "backslashreplace"))


def _has_section(check: Check) -> bool:
    return bool(check.rows or check.values or check.verdict != VERDICTS[0])


def _link(check: Check) -> str:
    question = escape(check.question)
    return f'<a href="#{escape(check.name)}">{question}</a>' if _has_section(check) else question


def _telling(checks: Sequence[Check]) -> list[str]:
    found = most_telling(checks)
    if not found:
        return ["<p>Nothing stands out.</p>"]
    items = [
        f'<li><span class="{c.verdict}">{escape(c.question)}</span> {escape(c.summary)}. {escape(c.advice)}</li>'
        for c in found
    ]
    return ["<h2>The most telling findings</h2><ol>", *items, "</ol>"]


def _section(check: Check, corpus: Corpus) -> str:
    rows = list(check.rows.items())
    return "\n".join(
        [
            f'<h2 id="{escape(check.name)}">{escape(check.question)}</h2>',
            f'<p><span class="{check.verdict}">{check.verdict}</span> {escape(check.summary)}.</p>',
            f"<p>{escape(check.advice)}</p>" if check.advice else "",
            _plot(check.values) if check.values else "",
            f"<details><summary>{min(WORST, len(rows))} of {len(rows):,} rows</summary>" if rows else "",
            *(_row(row, why, corpus) for row, why in rows[:WORST]),
            "</details>" if rows else "",
        ]
    )


def _row(row: int, why: str, corpus: Corpus) -> str:
    sides = [("chosen", corpus.chosen[row]), ("rejected", corpus.rejected[row])]
    return row_html(corpus.source(row), why, corpus.question[row], sides)


def row_html(source: str, why: str, question: str, sides: Sequence[tuple[str, str]]) -> str:
    """A row: its place, why it is shown, its question and its responses by name, two of them compared."""
    texts = [text for _, text in sides]
    marked = side_by_side(*texts) if len(texts) == 2 else [escape(_cut(text)) for text in texts]
    columns = "".join(
        f'<div><b>{escape(name)}</b><div class="text">{text}</div></div>'
        for (name, _), text in zip(sides, marked, strict=True)
    )
    return (
        f'<div class="row"><p><span class="place">{escape(source)}</span><br>{escape(why)}</p>'
        f'<div class="text prompt">{escape(_cut(question))}</div><div class="pair">{columns}</div></div>'
    )


def side_by_side(chosen: str, rejected: str) -> tuple[str, str]:
    """Both texts as HTML; what one has and the other has not is marked where most is common."""
    texts = [_cut(text) for text in (chosen, rejected)]
    a, b = ([part for word in text.split(" ") for part in (word, " ")][:-1] for text in texts)
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    if max(len(a), len(b)) > 2 * COMPARED_WORDS or matcher.ratio() < 0.5:
        return escape(texts[0]), escape(texts[1])
    marked: tuple[list[str], list[str]] = ([], [])
    for kind, a1, a2, b1, b2 in matcher.get_opcodes():
        for side, part in zip(marked, ("".join(a[a1:a2]), "".join(b[b1:b2])), strict=True):
            side.append(escape(part) if kind == "equal" or not part else f"<mark>{escape(part)}</mark>")
    return "".join(marked[0]), "".join(marked[1])


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} [... {len(text) - LONGEST:,} more characters]"


def _plot(values: Mapping[str, np.ndarray]) -> str:
    """A histogram of each, in one picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"<p>{escape(NO_PLOT)}</p>"
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axis = figure.subplots()
    together = np.concatenate([np.asarray(value, dtype=float) for value in values.values()])
    low, high = np.quantile(together, [0.005, 0.995])
    edges = np.linspace(low, max(high, low + 1e-6), 51).tolist()
    for name, value in values.items():
        axis.hist(np.clip(value, low, high), bins=edges, alpha=0.55, label=name)
    axis.set_ylabel("rows")
    axis.legend()
    return picture(figure, ", ".join(values))


def picture(figure: Any, alt: str) -> str:
    """A matplotlib figure inside the page."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100, metadata={"Software": None})
    return png_html(png.getvalue(), alt)


def png_html(png: bytes, alt: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
