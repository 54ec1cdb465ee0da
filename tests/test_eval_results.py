"""A result is written whole, the same each time but for its times, and whatever a model says is shown and never run."""

import hashlib
import json
from html.parser import HTMLParser

import pytest

from dpo.digests import file_sha256, text_sha256
from dpo.evals.page import cell, page, table
from dpo.evals.provenance import git_commit, model_sha256
from dpo.evals.results import Result, finite, show, write
from models.weights import WORLD

EVIL = "<script>alert(1)</script> </div> \x1b[31m \u202e \ud800 &amp; <img src=x onerror=y>"


def result(**more) -> Result:
    sample = {"id": "1", "prompt": EVIL, "answers": {"before": EVIL, "after<b>": "fine"}, "reason": EVIL, "p": 0.25}
    return Result(
        "win_rate", {"win_rate": 0.75, "p": 1e-20}, {"win_rate": (0.5, 0.9)}, {"wins": 3}, {"judge": EVIL},
        {f"by {EVIL}": [{"slice": EVIL, "95%": [0.1, 0.2]}, {"more": None}]}, [sample], time={"started": "now"}, **more,
    )  # fmt: skip


class Page(HTMLParser):
    """Tags, and the texts between them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.attributes = set(), [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.texts.append(data)


def test_results_are_sorted_json_and_times_stand_apart(tmp_path):
    write(result(), tmp_path / "new", {"seed": "1"})
    text = (tmp_path / "new" / "results.json").read_text()
    held = json.loads(text)
    assert text == json.dumps(held, indent=2, sort_keys=True) + "\n"
    assert held["time"] == {"started": "now"} and "error" not in held
    assert held["intervals"] == {"win_rate": [0.5, 0.9]} and held["overrides"] == {"seed": "1"}
    (line,) = (tmp_path / "new" / "samples.jsonl").read_text().splitlines()
    assert json.loads(line) == result().samples[0]


def test_a_number_that_is_none_is_refused_and_left_out_before(tmp_path):
    assert finite({"a": 1.0, "b": float("nan"), "c": float("inf")}) == {"a": 1.0}
    bad = result()
    bad.metrics["b"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(bad, tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_why_a_result_is_not_to_be_trusted_stands_in_it_and_on_its_page(tmp_path):
    write(result(error="too many <invalid>"), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["error"] == "too many <invalid>"
    assert "too many <invalid>" in Page((tmp_path / "report.html").read_text()).texts


def test_the_page_shows_everything_and_runs_nothing(tmp_path):
    write(result(), tmp_path)
    text = (tmp_path / "report.html").read_text()
    seen = Page(text)
    assert not seen.tags & {"script", "img", "link", "iframe", "object", "form"}
    assert not {name for name in seen.attributes if name.startswith("on")} and not seen.attributes & {"src", "href"}
    words = "".join(seen.texts)
    for shown in ("<script>alert(1)</script>", "onerror=y", "0.75", "0.5 to 0.9", "before", "after<b>", "fine"):
        assert shown in words, shown
    assert "\x1b" not in text and "\u202e" not in text


def test_a_page_holds_the_first_200_samples_and_says_of_how_many():
    many = [{"id": str(i), "prompt": "p", "answers": {"a": f"text {i}."}} for i in range(1000)]
    found = {"task": "t", "metrics": {}, "intervals": {}, "counts": {}, "tables": {}, "provenance": {}, "time": {}}
    text = page(found, many).decode()
    assert "200 of 1,000 samples" in text and "text 199." in text and "text 200." not in text


def test_the_terminal_shows_metrics_with_intervals_counts_and_tables():
    lines = list(show(result()))
    assert lines[0].split() == ["win_rate", "0.7500", "95%", "interval", "0.5000", "to", "0.9000"]
    assert lines[2].split() == ["wins", "3"] and "\x1b" not in "".join(lines)


def test_tables_are_aligned_below_their_keys():
    lines = list(table([{"a": 1, "b": 0.123456}, {"a": "long", "c": None}]))
    assert lines == ["  a     b       c", "  1     0.1235", "  long"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.123456, "0.1235"),
        ([0.1, 0.2], "0.1 to 0.2"),
        (["a", "b"], "a | b"),
        ({"x": 1, "y": 2.0}, "x 1, y 2"),
        (None, ""),
    ],
)
def test_cells(value, shown):
    assert cell(value) == shown


# --- provenance ---


def test_digests_are_of_bytes(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"1"), b.write_bytes(b"2")
    one, two = (hashlib.sha256(x).hexdigest() for x in (b"1", b"2"))
    assert file_sha256(a) == one
    assert file_sha256(a, b) == text_sha256([one, two]) == hashlib.sha256(f"{one}\n{two}".encode()).hexdigest()


def test_a_models_digest_is_its_weights_and_an_adapters_its_own(tmp_path):
    (file,) = (WORLD / "model").glob("*.safetensors")
    assert model_sha256(WORLD / "model") == hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"1")
    assert model_sha256(tmp_path) == hashlib.sha256(b"1").hexdigest()


def test_the_commit_is_one_or_none(monkeypatch, tmp_path):
    commit = git_commit()
    assert commit is None or len(commit.rstrip("+")) == 40
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None
