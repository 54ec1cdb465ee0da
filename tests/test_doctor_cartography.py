"""A map of a run's rows: the measures are the paper's, damaged lines are told, and no row runs or moves the cursor."""

import json
import math
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from test_doctor_command import Tags

import train  # noqa: F401  (registers its schema)
from dpo.config import TrainConfig
from dpo.doctor.__main__ import DoctorConfig, examine
from dpo.doctor.cartography import map_of, map_run, read_ledger, texts_of, to_read
from dpo.doctor.page import row_html
from dpo.formats import Example
from models.command import CONF, expand_arguments

LOG3 = math.log(3)  # sigmoid(log 3) = 3/4, sigmoid(-log 3) = 1/4


def config(*arguments: str) -> DictConfig:
    expanded, _ = expand_arguments(list(arguments), DoctorConfig)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("doctor", expanded)


def visit(source: str, margin: float, step: int = 2, split: str = "train") -> dict:
    return {"step": step, "split": split, "source": source, "loss": 0.5, "margin": margin}


def write_ledger(run: Path, *visits: object) -> Path:
    run.mkdir(exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in visits]
    (run / "ledger.jsonl").write_text("".join(lines))
    return run


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    """Plots take longer than all else, and have a test of their own."""
    if "plot" not in request.node.name:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


# --- the measures ---


def test_confidence_variability_and_correctness_by_hand():
    """p of 1/4 and 3/4: mean 1/2, standard deviation 1/4, right at one of two; a margin of 0 is a half, and wrong."""
    places = {place.source: place for place in map_of("train", {"a": [-LOG3, LOG3], "b": [0.0, 0.0], "c": [LOG3]})}
    for source, expected in {"a": (0.5, 0.25, 0.5), "b": (0.5, 0.0, 0.0), "c": (0.75, 0.0, 1.0)}.items():
        place = places[source]
        assert (place.confidence, place.variability, place.correctness) == pytest.approx(expected)
    assert places["a"].why == "confidence 0.5, variability 0.25, ranked right at 1 of 2 visits"


def test_each_kind_by_hand():
    """The easy rows' median confidence is 3/4, so a hard row is likely flipped up to 1/4."""
    margins = {
        "flipped": [-LOG3, -LOG3], "hard": [-LOG3, -1.0], "easy": [LOG3, LOG3], "easier": [9.0, 9.0],
        "just": [0.1, 0.1], "some": [-9.0, -9.0, 0.1], "once": [-9.0],
    }  # fmt: skip
    kinds = {place.source: place.kind for place in map_of("train", margins)}
    assert kinds == {
        "flipped": "likely flipped", "hard": "hard", "easy": "easy", "easier": "easy", "just": "easy",
        "some": "ambiguous", "once": "seen once",
    }  # fmt: skip
    assert [place.kind for place in map_of("train", {"a": [-9.0, -9.0]})] == ["hard"]  # no row says what sure is


@pytest.mark.parametrize("size", [1, 0.01, 1e-6])
def test_the_size_of_the_margins_changes_no_kind(size):
    """As a smaller beta or learning rate would; all confidences go to a half."""
    margins = {"flipped": [-2, -3], "hard": [-1, -0.5], "some": [-2, 0.5], "a": [0.5, 1], "b": [1, 2], "c": [2, 3]}
    places = map_of("train", {source: [size * margin for margin in row] for source, row in margins.items()})
    kinds = {"flipped": "likely flipped", "hard": "hard", "some": "ambiguous", "a": "easy", "b": "easy", "c": "easy"}
    assert {place.source: place.kind for place in places} == kinds


def test_rows_to_read_are_the_least_confident_and_of_the_ambiguous_the_most_variable():
    margins = {
        "a": [-1.1, -1.1], "b": [-2.0, -2.0], "easy": [1.0, 1.0], "some": [-1.0, 1.0], "more": [-3.0, 3.5],
        "once": [0.0], "less": [-1.0],
    }  # fmt: skip
    found = {kind: [place.source for place in places] for kind, places in to_read(map_of("eval", margins)).items()}
    assert found == {"likely flipped": ["b", "a"], "ambiguous": ["more", "some"], "seen once": ["less", "once"]}


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=4), min_size=1))
def test_every_row_has_one_place_whatever_its_margins(margins):
    places = map_of("train", margins)
    assert sorted(place.source for place in places) == sorted(margins)
    for place in places:
        assert 0 <= place.confidence <= 1 and 0 <= place.variability <= 0.5 and 0 <= place.correctness <= 1
    assert [place.confidence for place in places] == sorted(place.confidence for place in places)


def test_margins_far_below_0_keep_their_order():
    """exp(-40) and exp(-41) differ, though 1 - tanh would make both 0."""
    places = map_of("train", {"a": [-40.0, -40.0], "b": [-41.0, -41.0]})
    assert [place.source for place in places] == ["b", "a"] and places[1].confidence == pytest.approx(math.exp(-40))


# --- the ledger ---


def test_visits_before_anything_is_learned_are_left_out(tmp_path):
    """Of update 1 and evaluation 0; an evaluation after update 1 has something to say."""
    visits = [visit("a", 0.0, step=1), visit("a", 1.0, step=3), visit("a", 0.0, step=0, split="eval")]
    ledger = read_ledger(write_ledger(tmp_path, *visits, visit("a", 2.0, step=1, split="eval")))
    assert ledger.margins == {("train", "a"): [1.0], ("eval", "a"): [2.0]}
    assert (ledger.left_out, ledger.damaged, ledger.cut) == (2, [], False)


@pytest.mark.parametrize("end", ["{", '{"step": 3, "split": "tr', json.dumps(visit("a", 9.0))])
def test_a_last_line_without_its_end_is_cut_and_no_visit(tmp_path, end):
    ledger = read_ledger(write_ledger(tmp_path, visit("a", 1.0), end))
    assert ledger.margins == {("train", "a"): [1.0]} and ledger.cut and not ledger.damaged


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{\n", "not valid JSON"),
        ("[1]\n", r"a visit must be an object, got list \[1\]"),
        ({"step": 3}, "split is missing; a visit has step, split, source, loss, margin"),
        (visit("b", 1.0, step=-1), "step must be a whole number of at least 0, got int -1"),
        (visit("b", 1.0) | {"step": True}, "step must be a whole number of at least 0, got bool True"),
        (visit("b", 1.0, split="test"), "split must be train or eval, got str 'test'"),
        (visit("b", 1.0) | {"split": []}, r"split must be train or eval, got list \[\]"),
        (visit("b", 1.0) | {"source": 3}, "source must be text, got int 3"),
        (visit("b", math.nan), "margin must be a finite number, got float nan"),
        (visit("b", 1.0) | {"loss": None}, "loss must be a finite number, got NoneType None"),
        (visit("b", 10**400), "margin must be a finite number"),
    ],
)
def test_a_damaged_line_is_told_with_its_place_and_the_others_are_read(tmp_path, line, message, capsys):
    run = write_ledger(tmp_path / "run", visit("a", 1.0), line, visit("a", 2.0))
    ledger = read_ledger(run)
    assert ledger.margins == {("train", "a"): [1.0, 2.0]}
    (damaged,) = ledger.damaged
    with pytest.raises(ValueError, match=rf"ledger\.jsonl:2: {message}"):
        raise ValueError(damaged)
    map_run(config(f"ledger={run}", f"output_dir={tmp_path / 'out'}"))
    assert f"damaged, and left out: {run / 'ledger.jsonl'}:2: " in capsys.readouterr().out


def test_of_many_damaged_lines_the_first_are_shown_and_all_counted(tmp_path, capsys):
    run = write_ledger(tmp_path / "run", visit("a", 1.0), *["x\n"] * 5)
    map_run(config(f"ledger={run}", f"output_dir={tmp_path / 'out'}"))
    text = capsys.readouterr().out
    assert text.count("damaged, and left out: ") == 4 and "damaged, and left out: 2 more lines" in text
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["damaged"]) == 5


@pytest.mark.parametrize(
    ("visits", "message"),
    [
        (None, "ledger=.*run: holds no ledger.jsonl; name the directory of a run that wrote one"),
        ([], "ledger.jsonl: no visit after the first update in 0 lines; name the directory of a longer run"),
        ([visit("a", 0.0, step=1)], "no visit after the first update in 1 lines; name"),
        (["x\n"], "in 1 lines, .*ledger.jsonl:1: not valid JSON"),
        (["x"], "in 0 lines; name"),
    ],
)
def test_a_ledger_that_says_nothing_is_refused(tmp_path, visits, message):
    (tmp_path / "run").mkdir()
    if visits is not None:
        write_ledger(tmp_path / "run", *visits)
    with pytest.raises(ValueError, match=message):
        read_ledger(tmp_path / "run")


# --- the command ---

EVIL = "<script>alert(1)</script>\x1b[2J\u202e"


@pytest.fixture
def run(tmp_path) -> Path:
    """A run on three rows, of which the second is wrong at both visits."""
    rows = [{"prompt": f"Why {i}? {EVIL}", "chosen": f"Because {EVIL}", "rejected": "No."} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        expanded, _ = expand_arguments([f"dataset={tmp_path / 'rows.jsonl'}", "model_name_or_path=world"], TrainConfig)
        cfg = compose("config", expanded)
    places = [f"{tmp_path / 'rows.jsonl'}:{i}" for i in (1, 2, 3)]
    visits = [visit(place, margin, step) for step in (2, 3) for place, margin in zip(places, (1, -5, 0.5), strict=True)]
    path = write_ledger(tmp_path / "run", *visits, visit("<script>held.jsonl:7", -0.5, step=3, split="eval"))
    OmegaConf.save(cfg, path / "config.yaml")
    return path


def test_the_rows_to_read_are_shown_with_their_texts(run, tmp_path, capsys):
    assert examine(config(f"ledger={run}", f"output_dir={tmp_path / 'out'}")) == []
    text = capsys.readouterr().out
    assert text.replace("\n", "").isprintable()
    assert "7 visits of 4 rows, without 0 before the first update" in text
    assert "train likely flipped       1 rows (33.3%)" in text and "train easy                 2 rows (66.7%)" in text
    assert "eval  seen once            1 rows (100.0%)  no variability; num_train_epochs=2 or more gives it" in text
    shown = text.partition("train, likely flipped:\n")[2].splitlines()
    assert shown[0].startswith(
        f"  {tmp_path / 'rows.jsonl'}:2: confidence 0.00669, variability 0, ranked right at 0 of"
    )
    assert shown[1].startswith("    prompt      Why 1? <script>") and shown[2].startswith("    chosen      Because ")
    assert shown[3] == "    rejected    No."
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["counts"] == {"train": {"likely flipped": 1, "easy": 2}, "eval": {"seen once": 1}}
    assert len(report["rows"]) == 4 and report["rows"][0]["source"] == f"{tmp_path / 'rows.jsonl'}:2"


def test_where_the_datasets_cannot_be_read_the_map_is_drawn_and_the_reason_said(run, tmp_path, capsys):
    (tmp_path / "rows.jsonl").unlink()
    map_run(config(f"ledger={run}", f"output_dir={tmp_path / 'out'}"))
    text = capsys.readouterr().out
    assert "texts are not shown: dataset=" in text and "no such file" in text and "prompt   " not in text
    (run / "config.yaml").unlink()
    map_run(config(f"ledger={run}", f"output_dir={tmp_path / 'out'}"))
    assert "texts are not shown: " in capsys.readouterr().out


def test_the_page_has_a_plot_where_matplotlib_is_and_says_so_where_not(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for there in (True, False):
        if not there:
            monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        map_run(config(f"ledger={run}", f"output_dir={tmp_path / 'out'}"))
        page = (tmp_path / "out" / "report.html").read_text()
        assert ('src="data:image/png;base64,iVBOR' in page) == there == ("img" in Tags(page).tags)
        assert ("No plot: drawing needs matplotlib" in page) != there
        assert ("No plot: drawing needs matplotlib" in capsys.readouterr().out) != there
        assert "script" not in Tags(page).tags and "&lt;script&gt;" in page
        assert "<h2>train, likely flipped: 1 of 1 rows</h2>" in page


def test_no_plot_is_drawn_where_no_row_is_seen_twice(tmp_path, capsys):
    run = write_ledger(tmp_path / "run", visit("a", 1.0))
    map_run(config(f"ledger={run}", f"output_dir={tmp_path / 'out'}"))
    assert "No plot: no row was seen twice." in capsys.readouterr().out
    assert "No plot: no row was seen twice." in (tmp_path / "out" / "report.html").read_text()


def test_a_labelled_pair_is_one_place_with_both_responses(run, tmp_path, capsys):
    text = (run / "config.yaml").read_text().replace("pref_loss: sigmoid", "pref_loss: kto")
    (run / "config.yaml").write_text(text)
    map_run(config(f"ledger={run}", f"output_dir={tmp_path / 'out'}"))
    text = capsys.readouterr().out
    assert "3 places hold several pairs or labelled rows, which stand on the map as one" in text
    assert "    desirable   Because" in text and "    undesirable No." in text


def test_a_labelled_row_is_shown_alone_and_escaped():
    """A row of one response, and a ranking's place of two pairs."""
    labelled = Example(({"role": "user", "content": "Why?"},), ("<b>",), "f:1", label=False)
    assert texts_of([labelled]) == ("Why?", [("undesirable", "<b>")])
    pair = Example(labelled.messages, ("a", "b"), "f:1")
    assert texts_of([pair, pair])[1] == [("chosen", "a"), ("rejected", "b")] * 2
    assert texts_of([]) == ("", [])
    assert '<b>undesirable</b><div class="text">&lt;b&gt;</div>' in row_html("f:1", "why", *texts_of([labelled]))


def test_what_a_ledger_is_not_asked_is_refused():
    cfg = config("ledger=runs/7")
    for key, value in {"dataset": "a", "eval_dataset": "b", "benchmarks": ["c"], "model_name_or_path": "d"}.items():
        with pytest.raises(ValueError, match=rf"ledger=runs/7 with {key}=.*: is not read there; leave one of them out"):
            examine(OmegaConf.merge(cfg, {key: value}))
    with pytest.raises(ValueError, match=r"with export=e\.jsonl: is not read there"):
        examine(OmegaConf.merge(cfg, {"export": "e.jsonl"}))


def test_without_a_dataset_the_ledger_is_the_other_way():
    with pytest.raises(ValueError, match=r"dataset is not set; pass dataset=\.\.\. \(or ledger=RUN_DIR\)"):
        examine(config())
