"""The token cache: what was tokenised is found, what depends on something else is not, a damaged file is never used."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import dpo.build
import dpo.digests
import dpo.token_cache
import eval  # noqa: F401, registers its schema
from dpo.build import WORLD, build_eval_rows, build_rows, build_template
from dpo.config import EvalConfig, TrainConfig, check
from dpo.formats import Example
from dpo.metrics import TIMING_KEYS
from dpo.run import check_resume
from dpo.token_cache import cached_rows, read_rows, rows_key, write_rows
from dpo.tokens import Encoded, Rows
from models.command import expand_arguments
from models.template import TEMPLATES
from train import sweep_job, train

CONF = str(Path(__file__).parent.parent / "conf")
TALK = ({"role": "user", "content": "é"},)
PAIRS = [
    Encoded([1, 2], ([3], [4, 5]), Example(TALK, ("a", "b"), "f:1"), 0, (False, False)),
    Encoded([70000], ([2, 3, 4], [5]), Example(TALK, ("c", "d"), "f:2", weight=2.0), 2, (True, False)),
]
LABELLED = [
    Encoded([9, 9], ([1], [2, 2]), Example(TALK, ("a",), "f:3", label=False), 0, (True,)),
    Encoded([8], ([1], [1]), Example(TALK, ("b",), "f:4", soft_label=0.5, label=True), 0, (False,)),
]
NAMES = ("prompt_ids", "response_ids", "example", "dropped_turns", "cut", "lengths", "tokens", "has_numbers", "key")


def fields(rows: Sequence[Encoded]) -> list[list]:
    return [[getattr(row, name) for name in NAMES] for row in rows]


@pytest.mark.parametrize("rows", [PAIRS, LABELLED, LABELLED[:1]], ids=["pairs", "labelled", "one"])
@pytest.mark.parametrize("held_out", [[], PAIRS])
def test_rows_are_read_as_they_were_written(tmp_path, rows, held_out):
    stored = read_rows(write_rows(tmp_path, "key", Rows(rows, held_out, ["f:5: bad", "f:6: \ud800"])))
    assert fields(stored.train) == fields(rows) and fields(stored.evaluation) == fields(held_out)
    assert stored.skipped == ["f:5: bad", "f:6: \ud800"]


def test_stored_rows_are_a_sequence(tmp_path):
    stored = read_rows(write_rows(tmp_path, "key", Rows(PAIRS, [], []))).train
    assert (len(stored), stored[-1].key, stored[0].key) == (2, PAIRS[1].key, PAIRS[0].key)
    assert fields(stored[1:]) == fields(PAIRS[1:]) and [row.key for row in stored] == [row.key for row in PAIRS]
    with pytest.raises(IndexError):
        stored[2]


def test_a_rows_key_is_its_ids_and_where_they_part():
    ids = [([1, 2], ([3], [4])), ([1], ([2, 3], [4])), ([1, 2], ([3, 4],)), ([1, 2], ([3, 4], [])), ([1, 2, 3], ([4],))]
    rows = [Encoded(prompt, responses, PAIRS[0].example, 0, ()) for prompt, responses in ids]
    assert len({row.key for row in rows}) == 5
    assert Encoded([1, 2], ([3], [4]), PAIRS[1].example, 2, (True, True)).key == rows[0].key


# --- the cache ---


class Maker:
    """Counts how often rows had to be made."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> Rows:
        self.count += 1
        return Rows(PAIRS, [], ["f:5: bad"])


def ask(cache: Path, make: Maker, **values) -> Rows:
    data = cache.parent / "data.jsonl"
    if not data.exists():
        data.write_text("rows")
    rows = cached_rows(cache, [data], {"cutoff_len": 8} | values, make)
    assert fields(rows.train) == fields(PAIRS) and rows.skipped == ["f:5: bad"]
    return rows


def test_rows_are_made_once(tmp_path, capsys):
    make = Maker()
    ask(tmp_path / "cache", make)
    assert "tokenized: 2 rows made in 0.0 s and kept" in capsys.readouterr().out
    ask(tmp_path / "cache", make)
    assert make.count == 1 and "tokenized: 2 rows found" in capsys.readouterr().out


def test_another_value_or_another_byte_is_another_key(tmp_path):
    make = Maker()
    ask(tmp_path / "cache", make)
    ask(tmp_path / "cache", make, cutoff_len=9)
    data = tmp_path / "data.jsonl"
    times = data.stat().st_atime_ns, data.stat().st_mtime_ns
    data.write_text("ROWS")
    os.utime(data, ns=times)  # as a tool that unpacks an archive does
    ask(tmp_path / "cache", make)
    assert make.count == 3


def test_files_are_known_by_name_and_content_and_not_by_where_they_lie(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    key = rows_key(tmp_path, [tmp_path / "a" / "tokenizer.json"], {})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert rows_key(tmp_path, [tmp_path / "b" / "tokenizer.json"], {}) == key
    monkeypatch.setattr(dpo.token_cache, "TOKENS_VERSION", 0)
    version = rows_key(tmp_path, [tmp_path / "a" / "tokenizer.json"], {})
    monkeypatch.setattr(dpo.token_cache.tokenizers, "__version__", "0")
    assert len({key, version, rows_key(tmp_path, [tmp_path / "a" / "tokenizer.json"], {})}) == 3


def flipped(at: int):
    return lambda content: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [lambda c: c[:-3], lambda c: b"", flipped(3), flipped(40), flipped(-2)])
def test_a_damaged_file_is_said_and_made_anew(tmp_path, capsys, damage):
    """Cut short, emptied, and one bit in its length, its header and its last number."""
    make, cache = Maker(), tmp_path / "cache"
    ask(cache, make)
    (path,) = cache.glob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    ask(cache, make)
    assert make.count == 2 and f"tokenized: {path} is damaged and is not used" in capsys.readouterr().out
    ask(cache, make)
    assert make.count == 2 and "is damaged" not in capsys.readouterr().out


def test_a_write_that_was_cut_short_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    def interrupt(source, target):
        if target.suffix == ".safetensors":
            raise KeyboardInterrupt
        os.rename(source, target)

    make = Maker()
    with monkeypatch.context() as patch:
        patch.setattr(dpo.digests.os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ask(tmp_path / "cache", make)
    ask(tmp_path / "cache", make)
    assert make.count == 2


def test_two_jobs_that_start_together_do_each_other_no_harm(tmp_path):
    """The second begins and ends while the first tokenises; both had found nothing, and both rows stay readable."""
    second = Maker()
    rows: list[Rows] = []

    class First(Maker):
        def __call__(self) -> Rows:
            rows.append(ask(tmp_path / "cache", second))
            return super().__call__()

    rows.append(ask(tmp_path / "cache", First()))
    assert second.count == 1 and len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    assert fields(rows[0].train) == fields(rows[1].train)


# --- whole runs on the built-in world ---

SMALL = ["max_samples=40", "per_device_train_batch_size=4", "logging_steps=1", "num_samples=0", "max_steps=1",
         "eval_dataset=null", "device=cpu"]  # fmt: skip


@lru_cache
def defaults() -> DictConfig:
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", SMALL)


def config(*changes: str) -> DictConfig:
    """The default run's, made small."""
    return OmegaConf.merge(defaults(), OmegaConf.from_dotlist(list(changes)))


def rows_of(*overrides: str) -> Rows:
    cfg = config(*overrides)
    return build_rows(cfg, build_template(cfg))


def metrics(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING_KEYS} for line in lines]


@pytest.mark.parametrize(
    "change",
    [
        "val_size=8",
        "val_size=0.3 seed=7",
        "stage=sft",
        "pref_loss=kto",
        "pref_loss=apo_zero_unpaired",
        "eval_dataset=world cutoff_len=40 on_bad_row=skip",
    ],
)
def test_the_rows_of_the_cache_are_those_without_it(tmp_path, monkeypatch, change):
    """Split, labelled, with mismatched responses, cut and skipped ones too."""
    expected = rows_of(*change.split())
    for _ in range(2):
        rows = rows_of(*change.split(), f"tokenized_path={tmp_path}")
        assert fields(rows.train) == fields(expected.train) and fields(rows.evaluation) == fields(expected.evaluation)
        assert rows.skipped == expected.skipped
        monkeypatch.setattr(dpo.build, "encode_all", None)  # the second time nothing is tokenised


KEYS = ["cutoff_len=41", "max_samples=39", "on_bad_row=skip", "val_size=5", "val_size=5 seed=1", "template=chatml",
        "stage=sft", "pref_loss=kto", "pref_loss=apo_zero_unpaired", "eval_dataset=world", "dataset=MOVED"]  # fmt: skip


def test_every_key_that_changes_the_rows_is_in_the_caches_key(tmp_path):
    """And what changes none is not: a loss, a rate, a seed that splits nothing."""
    moved = shutil.copy(WORLD / "data" / "train.jsonl", tmp_path / "moved.jsonl")
    cache = tmp_path / "cache"
    for number, change in enumerate(["cutoff_len=40", *KEYS], start=1):
        rows_of("cutoff_len=40", *change.replace("MOVED", str(moved)).split(), f"tokenized_path={cache}")
        assert len(list(cache.glob("*.safetensors"))) == number, change
    for change in ("pref_loss=ipo pref_beta=0.3", "learning_rate=1e-4", "seed=3", "per_device_train_batch_size=2"):
        rows_of("cutoff_len=40", *change.split(), f"tokenized_path={cache}")
    assert len(list(cache.glob("*.safetensors"))) == number


def test_a_named_template_that_is_changed_is_another_key(tmp_path, monkeypatch):
    rows_of("template=chatml", f"tokenized_path={tmp_path}")
    monkeypatch.setitem(TEMPLATES, "chatml", replace(TEMPLATES["chatml"], default_system="Be kind."))
    rows_of("template=chatml", f"tokenized_path={tmp_path}")
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_run_from_the_cache_is_the_run_without_it(tmp_path):
    for name, path in (("without", "null"), ("made", tmp_path / "cache"), ("found", tmp_path / "cache")):
        train(config(f"tokenized_path={path}", f"output_dir={tmp_path / name}", "val_size=8", "weight_decay=0"))
    assert metrics(tmp_path / "without") == metrics(tmp_path / "made") == metrics(tmp_path / "found")
    held_out = [(tmp_path / name / "held_out.jsonl").read_bytes() for name in ("without", "made", "found")]
    assert held_out[0] == held_out[1] == held_out[2]


@pytest.mark.slow
def test_a_sweeps_jobs_share_one_cache(tmp_path, capsys):
    for number in range(2):
        sweep_job(config(f"output_dir={tmp_path}", f"pref_beta={number + 1}"), {}, number)
    assert "tokenized: 40 rows found" in capsys.readouterr().out
    assert len(list((tmp_path / "tokenized").glob("*.safetensors"))) == 1


def test_a_sweep_keeps_to_the_directory_that_is_named(tmp_path):
    sweep_job(config(f"output_dir={tmp_path / 'sweep'}", f"tokenized_path={tmp_path / 'cache'}"), {}, 0)
    assert (tmp_path / "cache").is_dir() and not (tmp_path / "sweep" / "tokenized").exists()


def test_an_evaluation_finds_what_an_evaluation_has_made(tmp_path, monkeypatch):
    arguments, _ = expand_arguments(["model_name_or_path=world", "eval_dataset=world", "max_samples=8",
                                     f"tokenized_path={tmp_path}"], EvalConfig)  # fmt: skip
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("eval", arguments)
    expected = fields(build_eval_rows(cfg, build_template(cfg)).evaluation)
    monkeypatch.setattr(dpo.build, "encode_all", None)
    assert fields(build_eval_rows(cfg, build_template(cfg)).evaluation) == expected


def test_a_cache_that_is_a_file_is_refused_and_a_resume_may_have_another(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"tokenized_path=.*file: is a file; name a directory"):
        check(config(f"tokenized_path={tmp_path / 'file'}"))
    (tmp_path / "config.yaml").write_text("tokenized_path: elsewhere\n")
    check_resume(tmp_path, config(f"tokenized_path={tmp_path}"))


def test_a_llama_factory_file_may_name_it(tmp_path):
    (tmp_path / "dpo.yaml").write_text("dataset: world\nmodel_name_or_path: world\ntokenized_path: saves/tokens\n")
    arguments, notes = expand_arguments([f"config_file={tmp_path / 'dpo.yaml'}"], TrainConfig)
    assert "tokenized_path='saves/tokens'" in arguments and not any("tokenized_path" in note for note in notes)
