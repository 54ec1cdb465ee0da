"""What the README says is so: its commands compose, its files exist, and no file is left out."""

import json
import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import eval as eval_entry
import train as train_entry
from dpo import losses
from dpo.config import EvalConfig, TrainConfig
from dpo.doctor.__main__ import DoctorConfig, examine
from dpo.formats import FORMATS, examples_of
from dpo.judge.__main__ import JudgeConfig
from dpo.show import ShowConfig, show
from dpo.token_view import TokenViewConfig, view
from models.chat import ChatConfig
from models.command import expand_arguments
from models.export import ExportConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if re.search(r"python (train\.py|eval\.py|-m models\.|-m dpo\.(data|doctor|judge|tokens))", line)
]
ROOTS = {
    "train.py": ("config", TrainConfig),
    "eval.py": ("eval", EvalConfig),
    "dpo.doctor": ("doctor", DoctorConfig),
    "dpo.judge": ("judge", JudgeConfig),
    "models.chat": ("chat", ChatConfig),
    "models.export": ("export", ExportConfig),
    "dpo.data": ("show", ShowConfig),
    "dpo.tokens": ("token_view", TokenViewConfig),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command, tmp_path, monkeypatch):
    """Paths that stand for the user's own are made: a run directory and a LLaMA-Factory file."""
    assert train_entry.ConfigStore is eval_entry.ConfigStore  # both schemas are registered by the imports
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dpo_config.yaml").write_text("model_name_or_path: world\ndataset: world\npref_beta: 0.1\n")
    (tmp_path / "OUTPUT_DIR").mkdir()
    for name, text in (("config.yaml", "model_name_or_path: world\n"), ("adapter_config.json", "{}")):
        (tmp_path / "OUTPUT_DIR" / name).write_text(text)
    script, *arguments = command.partition("python ")[2].removeprefix("-m ").split()
    name, schema = ROOTS[script]
    expanded, _ = expand_arguments(arguments, schema)
    # A sweep composes one job at a time; its first values stand for it.
    overrides = [re.sub(r"=([^,\[]+),.*", r"=\1", a) for a in expanded if a != "-m"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert compose(name, overrides)


def test_there_are_commands():
    assert len(COMMANDS) > 6


def listed_files() -> set[str]:
    """Paths that the section `The files` names, by its three columns: a folder, names in it, what they are."""
    block = re.search(r"## The files\n+```\n(.*?)```", README, re.DOTALL)[1]
    found, folder = set(), ""
    for line in block.splitlines():
        folder = line[:8].strip() or folder
        found |= {
            f"{folder}{name}.py" for name in line[8:29].split() if folder in ("dpo/", "models/") and name[-1] != "/"
        }
    return found


def test_the_list_of_files_is_the_files():
    on_disk = {f"{folder}/{p.name}" for folder in ("dpo", "models") for p in (ROOT / folder).glob("[!_]*.py")}
    assert listed_files() == on_disk


def test_every_path_that_is_named_exists():
    paths = set(re.findall(r"`((?:dpo|models|conf|experiments|tests)/[\w/.]+\.\w+)", README))
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path


def test_every_format_has_a_row_in_the_readme_and_the_row_is_of_that_format():
    """`[...]` stands for the same with another last turn."""
    table = re.search(r"\| data_format \|.*?\n\n", README, re.DOTALL)[0]
    shown = dict(re.findall(r"^\| `(\w+)` \| `(\{.*?\})`(?:,| \(| \|)", table, re.MULTILINE))
    assert list(shown) == list(FORMATS)
    for name, text in shown.items():
        first = re.search(r"\[\{.*\}\](?=, \"rejected)", text)
        row = json.loads(text.replace("[...]", first[0].replace("Hello", "No") if first else ""))
        assert next(name for name, how in FORMATS.items() if how.fits(row)) == name
        (example,) = examples_of(row, "f:1", "dpo")
        assert example.responses in (("Hello", "No"), ("Salut", "Hi")) and example.messages[0]["role"] == "user"


def test_the_licence_and_the_metadata_agree():
    assert "MIT" in (ROOT / "LICENSE").read_text() and "license = MIT" in (ROOT / "setup.cfg").read_text()


def test_the_table_of_losses_is_the_tables():
    assert losses.table() in README


def test_the_readmes_loss_of_ones_own_is_a_loss(monkeypatch):
    """The block is run as it stands; the row's start is the function's."""
    block = re.search(r"### A loss of your own\n.*?```python\n(.*?)```", README, re.DOTALL)[1]
    monkeypatch.setattr(losses, "PREF_LOSSES", table := dict(losses.PREF_LOSSES))
    exec(block, vars(losses) | {"PREF_LOSSES": table})
    zero = torch.zeros(2)
    assert table["cubic"].function(zero, zero, beta=0.1).tolist() == [table["cubic"].start(beta=0.1)] * 2


def test_what_the_readme_shows_of_a_row_is_what_is_printed(capsys):
    block = re.search(r"### What the model sees\n.*?```\n(3000 rows.*?)```", README, re.DOTALL)[1]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        show(compose("show", ["dataset=world", "show=1"]), colour=False)
    assert capsys.readouterr().out.replace(f"{ROOT}/", "") == block


@pytest.mark.slow
def test_what_the_readme_shows_of_the_default_run_is_where_its_policy_has_moved(tmp_path, capsys):
    """Line for line; numbers to 0.2 nats, for another processor rounds otherwise in 188 updates."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        train_entry.train(compose("config", [f"output_dir={tmp_path}", "num_samples=0"]))
        capsys.readouterr()
        arguments, _ = expand_arguments([f"run={tmp_path}", "show=1"], TokenViewConfig)
        view(compose("token_view", arguments), colour=False)
    head, *shown = re.search(r"```\n(row 1 .*? Pick\] it· up\n)", README, re.DOTALL)[1].splitlines()
    printed = capsys.readouterr().out.replace(f"{ROOT}/", "").splitlines()
    start = next(i for i, line in enumerate(printed) if line.startswith("  chosen "))
    printed = [next(line for line in printed if line.startswith("row 1")), "...", *printed[start:]][: len(shown) + 1]
    number = re.compile(r"[-+]\d+\.\d+")
    for line, expected in zip(printed, [head, *shown], strict=True):
        assert number.sub("#", line) == number.sub("#", expected)
        assert [*map(float, number.findall(line))] == pytest.approx([*map(float, number.findall(expected))], abs=0.2)


@pytest.mark.slow
def test_the_doctor_says_of_the_world_what_the_readme_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        examine(compose("doctor", ["dataset=world", "eval_dataset=world", "output_dir=out"]))
    shown = re.search(r"Of the built-in world, for example:\n+```\n(.*?)```", README, re.DOTALL)[1].splitlines()
    assert len(shown) > 4 and set(shown) <= set(capsys.readouterr().out.splitlines())
