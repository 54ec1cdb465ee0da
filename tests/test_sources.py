"""Sources: what a dataset's name finds, what a registry's entry means, and what the hub is asked for."""

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from dpo.data import read_examples
from dpo.formats import BadRow
from dpo.sources import COLUMNS, Source, find_dataset

PAIR = {"chosen": "c", "rejected": "r"}


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(prompt: str) -> dict:
    return {"prompt": prompt, **PAIR}


def prompts(source: Source, **options) -> list[str]:
    examples, _ = read_examples(source, stage="dpo", on_bad_row="stop", **options)
    return [example.messages[-1]["content"] for example in examples]


# --- files and directories ---


def test_a_dataset_is_a_path_or_a_name_in_dataset_dir(tmp_path):
    for name in ("a.json", "b.jsonl", "c.csv", "d", "e.jsonl.gz", "f.json.gz", "g.parquet"):
        (tmp_path / name).write_text("[]")
    for dataset in (str(tmp_path / "a.json"), "a.json", "a"):
        assert find_dataset(dataset, str(tmp_path)) == Source(dataset, (tmp_path / "a.json",))
    for name in ("b.jsonl", "e.jsonl.gz", "f.json.gz", "g.parquet"):
        assert find_dataset(name.partition(".")[0], str(tmp_path)).files == (tmp_path / name,)
    with pytest.raises(
        ValueError, match=r"^dataset=x: no such file; looked for x, .*/x with or without \.json, \.jsonl"
    ):
        find_dataset("x", str(tmp_path))
    with pytest.raises(ValueError, match=r"^dataset=c\.csv: \.csv suffix; \.json, .*, \.parquet files are read$"):
        find_dataset("c.csv", str(tmp_path))
    with pytest.raises(ValueError, match=r"^dataset=d: no suffix;"):
        find_dataset("d", str(tmp_path))


def test_a_directory_is_all_its_data_files_sorted(tmp_path):
    """Neither the registry nor what is no data; max_samples counts over all of them."""
    write(tmp_path / "d" / "b.jsonl", row("3"))
    write(tmp_path / "d" / "a.jsonl", row("1"), row("2"))
    for name in ("dataset_info.json", "README.md"):
        (tmp_path / "d" / name).write_text("{}")
    for dataset in ("d", str(tmp_path / "d")):
        assert prompts(find_dataset(dataset, str(tmp_path))) == ["1", "2", "3"]
    assert prompts(find_dataset("d", str(tmp_path)), max_samples=2) == ["1", "2"]
    examples, _ = read_examples(find_dataset("d", str(tmp_path)), stage="dpo", on_bad_row="stop")
    assert [e.source for e in examples] == [
        f"{tmp_path}/d/{place}" for place in ("a.jsonl:1", "a.jsonl:2", "b.jsonl:1")
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^dataset=empty: the directory .*/empty holds no \.json, .* file; name one"):
        find_dataset("empty", str(tmp_path))


# --- dataset_info.json ---


def registered(folder: Path, entry: object, *rows: object) -> Source:
    """The source of an entry; its file, where it names one, holds the rows."""
    write(folder / "rows.jsonl", *rows)
    (folder / "dataset_info.json").write_text(json.dumps({"mine": entry, "another": {}}))
    return find_dataset("mine", str(folder))


SHAREGPT = {
    "file_name": "rows.jsonl", "formatting": "sharegpt", "ranking": True,
    "columns": {"messages": "talk", "chosen": "good", "rejected": "bad", "system": "rules"},
    "tags": {"role_tag": "who", "content_tag": "said", "user_tag": "me", "assistant_tag": "you", "system_tag": "law"},
}  # fmt: skip


def test_columns_and_tags_of_an_entry_are_the_rows_keys_and_words(tmp_path):
    """Columns that are named are all that is read, as in LLaMA-Factory: the `prompt` beside them is not."""
    me, you = {"who": "me", "said": "q1"}, {"who": "you", "said": "a1"}
    given = {"talk": [me, you, {"who": "me", "said": "q2"}], "good": {"who": "you", "said": "c"}, "prompt": "not read"}
    given |= {"bad": {"who": "you", "said": "r"}, "rules": "s", "weight": 2}
    (example,), _ = read_examples(registered(tmp_path, SHAREGPT, given), stage="dpo", on_bad_row="stop")
    assert [(m["role"], m["content"]) for m in example.messages] == [
        ("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"),
    ]  # fmt: skip
    assert (example.responses, example.weight) == (("c", "r"), 2)
    law = given | {"talk": [{"who": "law", "said": "s"}, *given["talk"]], "rules": ""}
    (same,), _ = read_examples(registered(tmp_path, SHAREGPT, law), stage="dpo", on_bad_row="stop")
    assert same.messages == example.messages


def test_the_columns_of_an_alpaca_entry_are_question_input_answer_and_history(tmp_path):
    entry = {"file_name": "rows.jsonl", "columns": {"prompt": "q", "query": "more", "response": "a", "history": "old"}}
    given = {"q": "q2", "more": "m", "a": "c", "old": [["q1", "a1"]], "messages": "not read"}
    (example,), _ = read_examples(registered(tmp_path, entry, given), stage="sft", on_bad_row="stop")
    assert [m["content"] for m in example.messages] == ["q1", "a1", "q2\nm"] and example.responses == ("c",)


def test_the_label_of_a_kto_entry_is_its_column(tmp_path):
    entry = {"file_name": "rows.jsonl", "columns": {"prompt": "q", "response": "a", "kto_tag": "liked"}}
    (example,), _ = read_examples(
        registered(tmp_path, entry, {"q": "q", "a": "c", "liked": False}), stage="kto", on_bad_row="stop"
    )
    assert (example.responses, example.label) == (("c",), False)


def test_an_entry_without_columns_leaves_rows_as_they_are(tmp_path):
    assert prompts(registered(tmp_path, {"file_name": "rows.jsonl", "ranking": True}, row("q"))) == ["q"]


def test_a_row_without_a_column_of_its_entry_is_a_bad_row_with_the_rows_own_key(tmp_path):
    source = registered(tmp_path, SHAREGPT, {"talk": [], "good": "c", "rules": None})
    with pytest.raises(BadRow, match=r"rows\.jsonl:1: bad is missing; dataset_info\.json names it as a column of"):
        prompts(source)


def test_a_role_that_no_tag_names_is_a_bad_row(tmp_path):
    given = {"talk": [{"who": "he", "said": "q"}], "good": "c", "bad": "r", "rules": None}
    with pytest.raises(BadRow, match=r"rows\.jsonl:1: conversations\[0\] has the role str 'he'; expected one of"):
        prompts(registered(tmp_path, SHAREGPT, given))


def test_num_samples_are_the_first_rows_and_must_be_there(tmp_path):
    rows = [row(str(i)) for i in range(3)]
    source = registered(tmp_path, {"file_name": "rows.jsonl", "num_samples": 2}, *rows)
    assert prompts(source) == ["0", "1"] and prompts(source, max_samples=1) == ["0"]
    source = registered(tmp_path, {"file_name": "rows.jsonl", "num_samples": 4}, *rows)
    with pytest.raises(ValueError, match=r"^mine: num_samples=4, but it has 3 rows"):
        prompts(source)
    assert prompts(source, max_samples=2) == ["0", "1"]


def test_an_entry_may_name_a_directory(tmp_path):
    write(tmp_path / "many" / "x.jsonl", row("q"))
    assert prompts(registered(tmp_path, {"file_name": "many"})) == ["q"]


BAD_ENTRIES = {
    "text": ("rows.jsonl", "is 'rows.jsonl'; expected an object"),
    "unknown_key": ({"file_name": "rows.jsonl", "file": "x"}, "has file='x'; expected some of file_name, "),
    "unknown_column": (
        {"file_name": "rows.jsonl", "columns": {"x": "y"}},
        "has columns: x='y'; expected some of",
    ),
    "columns_is_a_list": ({"file_name": "rows.jsonl", "columns": ["x"]}, r"has columns: \['x'\]; expected an object"),
    "unknown_tag": ({"file_name": "rows.jsonl", "tags": {"x": "y"}}, "has tags: x='y'; expected some of user_tag"),
    "column_is_a_number": (
        {"file_name": "rows.jsonl", "columns": {"prompt": 3}},
        "has columns: prompt=3; expected",
    ),
    "file_is_a_list": ({"file_name": ["rows.jsonl"]}, r"has file_name=\['rows\.jsonl'\]; expected text"),
    "formatting": ({"file_name": "rows.jsonl", "formatting": "chatml"}, "has formatting='chatml'; expected alpaca"),
    "num_samples": ({"file_name": "rows.jsonl", "num_samples": 0}, "has num_samples=0; expected a whole number"),
    "missing_file": ({"file_name": "no.json"}, "names no.json, which is not in "),
    "nowhere": ({"formatting": "alpaca"}, "gives neither; only file_name and hf_hub_url are read"),
    "elsewhere": ({"ms_hub_url": "x/y"}, "gives ms_hub_url; only file_name and hf_hub_url are read"),
}


@pytest.mark.parametrize("key", BAD_ENTRIES)
def test_a_bad_entry_is_refused_with_the_file_the_value_and_the_rule(tmp_path, key):
    entry, rule = BAD_ENTRIES[key]
    with pytest.raises(ValueError, match=rf"^dataset=mine: its entry in .*/dataset_info\.json {rule}"):
        registered(tmp_path, entry)


def test_a_name_that_the_registry_does_not_have_is_refused_with_those_that_are_near(tmp_path):
    registered(tmp_path, {"file_name": "rows.jsonl"})
    with pytest.raises(ValueError, match=r"^dataset=anoter: no such file; .*dataset_info\.json has another$"):
        find_dataset("anoter", str(tmp_path))
    with pytest.raises(ValueError, match=r"dataset_info\.json has mine, another$"):
        find_dataset("zzz", str(tmp_path))


def test_a_registry_that_is_none_is_refused(tmp_path):
    (tmp_path / "dataset_info.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"dataset_info\.json: expected an object of names, got \[1\]"):
        find_dataset("a", str(tmp_path))
    path = str(write(tmp_path / "rows.jsonl", row("q")))
    assert prompts(find_dataset(path, str(tmp_path))) == ["q"]  # a path needs none


# --- the hub ---


class Hub:
    """In place of huggingface_hub.snapshot_download: gives what the patterns allow, and notes what was asked."""

    def __init__(self, folder: Path, *names: str):
        self.folder, self.names, self.asked, self.given = folder, names, [], []

    def __call__(self, repo: str, **asked) -> str:
        self.asked.append({"repo": repo, **asked})
        allowed, ignored = asked["allow_patterns"], asked["ignore_patterns"]
        for name in self.names:
            if any(fnmatch(name, p) for p in allowed) and not any(fnmatch(name, p) for p in ignored or []):
                self.given.append(name)
                write(self.folder / name, row(name))
        return str(self.folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def of(*names: str) -> Hub:
        fake = Hub(tmp_path / "snapshot", *names)
        monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
        return fake

    return of


def found(source: Source, hub: Hub) -> list[str]:
    return [path.relative_to(hub.folder).as_posix() for path in source.files]


def test_the_hub_is_asked_for_the_data_files_of_one_split_of_a_dataset(hub):
    files = (
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "train.py",
        "data/test-0.parquet",
    )
    fake = hub(*files, "README.md", "train.csv")
    assert found(find_dataset("org/pairs", "data"), fake) == list(files[:2]) == fake.given
    assert len(fake.asked) == 1 and (fake.asked[0]["repo"], fake.asked[0]["repo_type"]) == ("org/pairs", "dataset")
    assert found(find_dataset("org/pairs:test", "data"), fake) == ["data/test-0.parquet"]


def test_files_of_a_split_keep_their_rows_in_order(hub):
    hub("b/train.jsonl", "a/train.jsonl.gz.jsonl", "a/train.jsonl")
    source = find_dataset("org/pairs", "data")
    assert prompts(source) == ["a/train.jsonl", "a/train.jsonl.gz.jsonl", "b/train.jsonl"]


def test_a_split_is_a_whole_word(hub):
    """UltraFeedback's train_prefs and train_sft are two splits, and neither is train."""
    fake = hub("data/train_prefs-0.parquet", "data/train_sft-0.parquet")
    assert found(find_dataset("org/pairs:train_prefs", "data"), fake) == ["data/train_prefs-0.parquet"]
    shown = "it has data/train_prefs-0.parquet, data/train_sft-0.parquet; a split is named org/pairs:SPLIT"
    with pytest.raises(ValueError, match=rf"^dataset=org/pairs: org/pairs has no data file of split train; {shown}$"):
        find_dataset("org/pairs", "data")


def test_where_no_file_names_a_split_all_are_train(hub):
    fake = hub("pairs.json", "more/pairs.jsonl", "test.json", "LICENSE")
    assert found(find_dataset("org/pairs", "data"), fake) == ["more/pairs.jsonl", "pairs.json"] == sorted(fake.given)
    with pytest.raises(ValueError, match="org/pairs has no data file of split validation; a split is named"):
        find_dataset("org/pairs:validation", "data")


def test_files_of_another_split_that_were_fetched_before_are_left_alone(hub):
    fake = hub("test.jsonl", "train.jsonl")
    find_dataset("org/pairs:test", "data")
    assert found(find_dataset("org/pairs", "data"), fake) == ["train.jsonl"]


def test_an_entry_says_split_subset_folder_and_revision(tmp_path, hub):
    fake = hub("x/en/val.jsonl", "x/open/val.jsonl", "en/val.jsonl", "x/en/train.jsonl")
    entry = {
        "hf_hub_url": "org/pairs",
        "split": "val",
        "subset": "en",
        "folder": "x",
        "revision": "v2",
        "file_name": "-",
    }
    assert found(registered(tmp_path, entry), fake) == ["x/en/val.jsonl"] and "en/val.jsonl" not in fake.given
    assert fake.asked[0]["revision"] == "v2"


def test_what_the_hub_does_not_give_is_refused_with_its_reason(monkeypatch):
    def refuse(*_, **__):
        raise OSError("\nOffline mode is on\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"^dataset=org/d: no such file, .* did not give it \(Offline mode is on\)"):
        find_dataset("org/d", "data")


@pytest.mark.parametrize("name", ["/no/such", "./no", "../no/x", "a/b/c", "a/b.jsonl", "~/no", "pairs", "a/b:", ".a/b"])
def test_a_missing_path_is_refused_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match=f"^dataset={re.escape(name)}: no such file; looked for"):
        find_dataset(name, "data")


# --- a real registry ---


@pytest.mark.real
def test_every_entry_of_llama_factorys_registry_is_understood(real, hub):
    """Each is read, or names a file that is not there or another hub alone; no key is unknown."""
    folder = real / "preferences"
    fake = hub("en/train/0.parquet", "zh/train/0.parquet", "default/train.parquet", "python/train.parquet")
    fake.names += ("validation.parquet", "train_sft.parquet", "full.parquet")
    registry = json.loads((folder / "dataset_info.json").read_text())
    refused = []
    for name in registry:
        try:
            assert set(find_dataset(name, str(folder)).columns) <= set(COLUMNS.values())
        except ValueError as error:
            assert re.search("which is not in|gives ms_hub_url", str(error)), error
            refused.append(name)
    there = {path.name for path in folder.iterdir()}
    assert refused == [n for n, e in registry.items() if "hf_hub_url" not in e and e.get("file_name") not in there]
    assert len(registry) - len(refused) == 93
