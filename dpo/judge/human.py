"""People's verdicts, from a file of JSON lines by pair id:

    {"id": "pairs.jsonl:3", "verdict": "first"}        or "second", "tie", "invalid" (cannot be judged)

`first` is the response that the pair has first, wherever it stood on the screen: in task=win_rate the answer after
training. Other keys are passed over. A pair that the file does not name is invalid: with an empty file all are, and are
written with their ids. Left out: several people to a pair, whose agreement is a question of its own.
"""

from collections.abc import Sequence
from pathlib import Path

from dpo.files import rows_of, suffix_of
from dpo.judge.verdict import Judged, OnDone, Pair, Verdict, ignore
from dpo.turns import BadRow


class HumanJudge:
    prompt_sha256 = None

    def __init__(self, path: Path):
        self.name = f"human:{path.name}"
        self.path = path
        self.labels = read_labels(path)

    def __call__(self, pairs: Sequence[Pair], on_done: OnDone = ignore) -> list[Judged]:
        results = []
        for pair in pairs:
            verdict = self.labels.get(pair.id, Verdict.INVALID)
            said = "nobody could judge it" if pair.id in self.labels else f"{self.path} has no label of it"
            results.append(Judged(verdict, None, (), said if verdict is Verdict.INVALID else ""))
            on_done(pair, results[-1])
        return results


def read_labels(path: Path) -> dict[str, Verdict]:
    """Verdicts by pair id; ValueError with file:line for a row that is none, or says otherwise than one before it."""
    if not path.is_file() or suffix_of(path) != ".jsonl":
        raise ValueError(f"{path}: no such file of labels; name a .jsonl file of rows with id and verdict")
    choices = {verdict.value: verdict for verdict in Verdict}
    labels: dict[str, Verdict] = {}
    for place, row in rows_of(path):
        if isinstance(row, BadRow):
            raise row
        pair, said = (row.get(key) if isinstance(row, dict) else None for key in ("id", "verdict"))
        pair = str(pair) if type(pair) is int else pair  # as dpo.judge.label reads a row's id
        if not isinstance(pair, str) or not isinstance(said, str) or said not in choices:
            raise BadRow(f"{place}: expected an id and a verdict of {', '.join(choices)}, got {row!r:.80}")
        if labels.setdefault(pair, choices[said]) is not choices[said]:
            raise BadRow(f"{place}: {pair} is {said} here and {labels[pair].value} above; keep one")
    return labels
