"""The doctor as a command: any dataset gives a report, a report hides and runs nothing, an export loses no row."""

import json
import sys
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from test_doctor_text import corpus_of

from dpo.data import read_examples
from dpo.doctor.__main__ import DoctorConfig, examine
from dpo.doctor.check import Check
from dpo.doctor.export import export_rows
from dpo.doctor.page import side_by_side, write_page
from dpo.doctor.report import dropped, most_telling, summary
from dpo.sources import Source
from models.command import CONF, expand_arguments


def config(*arguments: str) -> DictConfig:
    expanded, _ = expand_arguments(list(arguments), DoctorConfig)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("doctor", expanded)


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(question: str = "Why?", chosen: str = "Because it is.", rejected: str = "No idea, sorry.", **more) -> dict:
    return {"prompt": question, "chosen": chosen, "rejected": rejected, **more}


def lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check(name: str, verdict: str = "note", **more) -> Check:
    return Check(name, f"Is {name} so?", verdict, f"{name} is", **more)


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    """Plots take longer than all else, and have a test of their own."""
    if "plots" not in request.node.name:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


# --- the whole command ---


def test_schema_and_file_have_the_same_keys_in_the_same_order_and_each_is_explained():
    written = [str(key) for key in OmegaConf.load(CONF / "doctor.yaml") if key not in ("defaults", "hydra")]
    assert written == [f.name for f in fields(DoctorConfig)]
    assert all(f.default == "???" for f in fields(DoctorConfig))
    text = (CONF / "doctor.yaml").read_text().splitlines()
    assert all(text[i - 1][0] == "#" for i, line in enumerate(text) if line.partition(":")[0] in written)


@pytest.mark.slow
def test_any_dataset_gives_a_report(tmp_path):
    """Whatever texts JSON can hold, also half surrogate pairs; once small, once repeated beyond the smallest sizes."""
    text = st.text(st.characters(exclude_categories=[]), min_size=1, max_size=30).filter(str.strip)
    mark = st.sampled_from(["<s>", "**a**", "\n\nHuman: b", "```", "1. a\n2. b", "很好", "I cannot", "\x00", "a " * 30])

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(text | mark, text | mark, text | mark), min_size=1, max_size=4), st.sampled_from([1, 60]))
    def law(rows, times):
        given = [pair(f"{q} {i}", c, r) for i in range(times) for q, c, r in rows if c != r]
        path, output = write(tmp_path / "rows.jsonl", [*given, pair()]), tmp_path / "out"
        (
            (tmp_path / "kept.jsonl").unlink(missing_ok=True),
            (tmp_path / "kept.jsonl.dropped.jsonl").unlink(missing_ok=True),
        )
        cfg = config(f"dataset={path}", f"output_dir={output}", f"eval_dataset={path}")
        examine(OmegaConf.merge(cfg, {"export": str(tmp_path / "kept.jsonl")}))
        report = json.loads((output / "report.json").read_text())
        assert report["rows"] == len(given) + 1 == report["kept"] + report["dropped"]
        assert (output / "report.html").read_text(encoding="utf-8").endswith("</html>\n")
        assert len(lines(tmp_path / "kept.jsonl")) == report["kept"]

    law()


def test_the_built_in_world_is_worth_training_on(tmp_path, capsys):
    cfg = config("dataset=world", "eval_dataset=world", "max_samples=300", f"output_dir={tmp_path}")
    checks = {c.name: c for c in examine(cfg)}
    assert all(c.verdict != "warn" for c in checks.values())
    assert checks["length"].numbers["auc"] < 0.5 and not checks["contradictions"].rows
    assert "300 rows: 0 warn" in capsys.readouterr().out


def test_benchmarks_and_held_out_pairs_are_looked_for(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [pair("say one"), pair("say two"), pair("say three")])
    held, bench = write(tmp_path / "held.jsonl", [pair("Say TWO!"), {}]), write(tmp_path / "quiz.jsonl", ["say three"])
    cfg = config(f"dataset={path}", f"eval_dataset={held}", f"benchmarks=[{bench}]", f"output_dir={tmp_path / 'out'}")
    checks = {c.name: c for c in examine(cfg)}
    assert "eval_dataset: 1 rows cannot be used; the first:" in capsys.readouterr().out
    assert list(checks["leaks_eval_dataset"].rows) == [1] and list(checks["leaks_quiz"].rows) == [2]


@pytest.mark.parametrize(
    "key, value, rule",
    [
        ("on_bad_row", "fix", "expected one of stop, skip"),
        ("max_samples", "0", "must be at least 1"),
        ("seed", "-1", "must be at least 0"),
        ("dataset", "nowhere", "no such file"),
        ("eval_dataset", "nowhere", "no such file"),
        ("benchmarks", "[nowhere]", "no such file"),
    ],
)
def test_a_bad_value_is_refused(key, value, rule, tmp_path):
    path = write(tmp_path / "rows.jsonl", [pair()])
    with pytest.raises(ValueError, match=f"{value.strip('[]')}.*{rule}"):
        examine(config(f"dataset={path}", f"output_dir={tmp_path}", f"{key}={value}"))


def test_bad_rows_stop_where_asked(tmp_path):
    path = write(tmp_path / "rows.jsonl", [pair(), {"prompt": "a"}])
    with pytest.raises(ValueError, match=r"rows.jsonl:2: chosen is missing"):
        examine(config(f"dataset={path}", f"output_dir={tmp_path}", "on_bad_row=stop"))


def test_a_model_is_asked_only_where_one_is_named(tmp_path):
    """Its two checks, and with folds the third."""
    cfg = ["dataset=world", "max_samples=12", f"output_dir={tmp_path}"]
    without, asked = (examine(config(*cfg, *more)) for more in ([], ["model_name_or_path=world"]))
    names = [check.name for check in asked[len(without) :]]
    assert names == ["reference_margin", "likelihood_displacement"]


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("flip_folds=1", "flip_folds=1: must be at least 2, or 0 for no check"),
        ("flip_share=1.5", "flip_share=1.5: must be at least 0 and below 1"),
        ("flip_beta=0", "flip_beta=0.0: must be above 0"),
        ("data_format=csv", "data_format=csv: expected one of llamafactory_v1"),
    ],
)
def test_a_value_out_of_its_range_is_refused(tmp_path, override, rule):
    with pytest.raises(ValueError, match=f"^{rule}"):
        examine(config("dataset=world", override, f"output_dir={tmp_path / 'out'}"))


# --- what is said ---


def test_the_most_telling_are_the_gravest_then_the_largest():
    checks = [
        check("a", "ok"), check("b", numbers={"share": 0.2}), check("c", "warn", numbers={"share": 0.1}),
        check("d", "warn", numbers={"auc": 0.2}), check("e"),
    ]  # fmt: skip
    assert [c.name for c in most_telling(checks)] == ["d", "c", "b"]
    assert most_telling([check("a", "ok")]) == []


def test_the_summary_has_a_line_for_each_check_and_places_for_the_telling():
    corpus = corpus_of(*[("q", "a", "b")] * 5)
    text = summary([check("a", "ok"), check("b", rows={4: "odd", 0: "even", 1: "x", 2: "y"}, advice="Look.")], corpus)
    assert "ok    a" in text and "note  b" in text and "Look." in text and "0 warn, 1 note, 1 ok" in text
    assert text.index("rows.jsonl:5: odd") < text.index("rows.jsonl:1: even") and "rows.jsonl:3" not in text


def test_a_terminal_gets_no_control_characters():
    text = summary([check("b", rows={0: "\x1b[2J\u202e"})], corpus_of(("q", "a", "b")))
    assert "\x1b" not in text and "\u202e" not in text


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)


def test_a_page_shows_rows_and_runs_none(tmp_path):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=y>"
    corpus = corpus_of((evil, evil + "a", evil + "b"))
    write_page(tmp_path / "page.html", [check("b", rows={0: evil}, advice=evil)], corpus, {"dataset": evil})
    page = (tmp_path / "page.html").read_text()
    tags = Tags(page).tags
    assert "script" not in tags and "img" not in tags and tags.count("mark") == 2
    assert "http" not in page and "&lt;script&gt;" in page


def test_a_page_has_plots_where_matplotlib_is_and_says_so_where_not(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    corpus = corpus_of(("q", "a", "b"))
    checks = [check("b", "ok", values={"lengths": corpus.chosen_words.counts, "others": corpus.rejected_words.counts})]
    write_page(tmp_path / "page.html", checks, corpus, {})
    assert 'src="data:image/png;base64,iVBOR' in (tmp_path / "page.html").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_page(tmp_path / "page.html", checks, corpus, {})
    page = (tmp_path / "page.html").read_text()
    assert "img" not in Tags(page).tags and "No plot: drawing needs matplotlib" in page


def test_side_by_side_marks_what_differs():
    assert side_by_side("a big < cat sat", "a small < cat sat") == (
        "a <mark>big</mark> &lt; cat sat", "a <mark>small</mark> &lt; cat sat"
    )  # fmt: skip
    assert side_by_side("one two", "three four") == ("one two", "three four")


# --- export ---


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.lists(st.sampled_from(["good", "bad", "drop"]), min_size=1), suffix=st.sampled_from(["jsonl", "json"]))
def test_an_export_and_what_is_dropped_are_all_rows_in_order(tmp_path, kinds, suffix):
    rows = [pair(id=i) if kind != "bad" else {"prompt": "a", "id": i} for i, kind in enumerate(kinds)]
    path, out = tmp_path / f"rows.{suffix}", tmp_path / "out.jsonl"
    path.write_text(json.dumps(rows) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    for file in tmp_path.glob("out*"):
        file.unlink()
    examples = [kind for kind in kinds if kind != "bad"]
    reasons = {index: ["because"] for index, kind in enumerate(examples) if kind == "drop"}
    counts = export_rows(config(f"dataset={path}"), [Source("rows", (path,))], out, reasons)
    kept, left_out = lines(out), lines(tmp_path / "out.jsonl.dropped.jsonl")
    assert kept == [row for row, kind in zip(rows, kinds, strict=True) if kind == "good"]
    assert [entry["row"] for entry in left_out] == [r for r, kind in zip(rows, kinds, strict=True) if kind != "good"]
    assert counts == (len(kept), len(left_out)) and all(entry["why"] and entry["source"] for entry in left_out)


def test_only_checks_that_drop_drop():
    two, three = check("b", rows={2: "y", 0: "z"}, drops=True), check("c", rows={2: "v"}, drops=True)
    checks = [check("a", rows={1: "x"}), two, three]
    assert dropped(checks) == {0: ["b: z"], 2: ["b: y", "c: v"]}


def test_an_exported_dataset_is_read_again_without_what_was_wrong(tmp_path, capsys):
    rows = [pair(), pair(), pair("q2", "N/A"), pair("q3", "It is **so**", "it is so"), {"prompt": "a"}, pair("q4")]
    path, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "deep" / "clean.jsonl"
    path.write_text(path.read_text() + "{\n")
    before = path.read_bytes()
    examine(config(f"dataset={path}", f"export={out}", f"output_dir={tmp_path / 'out'}"))
    assert [e.messages[0]["content"] for e in read_examples(out, stage="dpo", on_bad_row="stop")[0]] == ["Why?", "q4"]
    why = [entry["why"][0].partition(":")[0] for entry in lines(tmp_path / "deep" / "clean.jsonl.dropped.jsonl")]
    assert why == ["duplicates", "no_answer", "formatting_only", "bad row", "bad row"]
    assert path.read_bytes() == before and "2 rows in" in capsys.readouterr().out


def test_an_export_never_replaces_a_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", [pair()])
    other = write(tmp_path / "other.jsonl", [])
    beside = write(tmp_path / "new.jsonl.dropped.jsonl", [])
    for name, rule in (
        (path, "rows.jsonl: is the dataset itself"),
        (other, "other.jsonl exists"),
        (tmp_path / "new.jsonl", f"{beside} exists"),
        (tmp_path / "rows.txt", r"rows.txt: expected the name of a .jsonl file"),
    ):
        with pytest.raises(ValueError, match=rule):
            examine(config(f"dataset={path}", f"export={name}", f"output_dir={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()


def test_a_row_that_is_several_pairs_goes_if_one_of_them_does(tmp_path):
    """Three ranked responses are three pairs: of two rows, the second's last pair (the sixth of all) has a reason."""
    rows = [{"prompt": f"q{i}", "responses": ["a", "b", "c"], "scores": [3, 2, 1]} for i in range(2)]
    path = write(tmp_path / "rows.jsonl", rows)
    cfg = config(f"dataset={path}", "ranking_to_pairs=all")
    assert export_rows(cfg, [Source("rows", (path,))], tmp_path / "out.jsonl", {5: ["x: y"]}) == (1, 1)
    assert lines(tmp_path / "out.jsonl") == rows[:1]


def test_half_a_surrogate_pair_is_exported_as_it_was(tmp_path):
    path = write(tmp_path / "rows.jsonl", [pair(chosen="a \ud800"), pair("é")])
    source = Source("rows", (path,))
    assert export_rows(config(f"dataset={path}"), [source], tmp_path / "out.jsonl", {}) == (2, 0)
    assert lines(tmp_path / "out.jsonl") == lines(path)
