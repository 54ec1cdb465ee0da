"""The command line: config_file below it, values whole, mistakes in one line, nothing inherited in silence."""

import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

import eval  # noqa: F401  (registers its schema)
import train  # noqa: F401
from dpo.config import EvalConfig, TrainConfig, as_list, check, preference_loss_of
from models.command import ANY, WITHOUT_EFFECT, _quote, expand_arguments, one_line_errors, prepare_command_line

CONF = Path(__file__).parent.parent / "conf"


def composed(arguments: list[str], schema: type = TrainConfig) -> DictConfig:
    """What Hydra makes of the expansion of a command line."""
    expanded, _ = expand_arguments(arguments, schema)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config" if schema is TrainConfig else "eval", expanded)


def refusal(arguments: list[str], schema: type = TrainConfig) -> str:
    with pytest.raises(ValueError) as caught:
        expand_arguments(arguments, schema)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def yaml_file(folder: Path, text: str) -> str:
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return f"config_file={folder / 'run.yaml'}"


# --- config_file ---


def test_config_file_stands_above_groups_and_below_the_command_line(tmp_path):
    """pref_beta: 0.05 from loss=hinge, 0.3 from the file, 0.7 from the command line; wherever config_file= stands."""
    file = yaml_file(tmp_path, "pref_beta: 0.3\nseed: 7\n")
    assert composed(["loss=hinge"]).pref_beta == 0.05
    assert composed(["loss=hinge", file]).pref_beta == 0.3
    for arguments in (["pref_beta=0.7", "loss=hinge", file], [file, "loss=hinge", "pref_beta=0.7"]):
        cfg = composed(arguments)
        assert (cfg.pref_beta, cfg.pref_loss, cfg.seed) == (0.7, "hinge", 7)


def test_a_later_config_file_stands_above_an_earlier_one(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\npref_beta: 0.3\n")
    (tmp_path / "b.yaml").write_text("seed: 2\n")
    cfg = composed([f"config_file={tmp_path / 'a.yaml'}", f"config_file={tmp_path / 'b.yaml'}"])
    assert (cfg.seed, cfg.pref_beta) == (2, 0.3)


VALUES = {
    "dataset": ["it's", 'a "b"', "with space", "a,b", "[x]", "{a: 1}", "a=b", "C:\\data\\", "it's\\", "\\'", "null",
                "1e-7", "é猫", "a#b", "a:b", "$x", "(a)"],
    "lora_target": ["q_proj,v_proj", "all"],
    "learning_rate": [5.0e-7, 1e-300, 3],
    "lora_alpha": [None, 32, 0.5],
    "bf16": [True, False],
    "max_samples": [None, 100],
    "eval_dataset": [None, "true", " "],
}  # fmt: skip


@pytest.mark.parametrize("key", VALUES)
def test_values_of_a_config_file_reach_the_config_whole(tmp_path, key):
    """Through YAML, Hydra's override grammar and OmegaConf, to the value and the type that the schema wants."""
    for value in VALUES[key]:
        (tmp_path / "run.yaml").write_text(OmegaConf.to_yaml({key: value}), encoding="utf-8")
        got = composed([f"config_file={tmp_path / 'run.yaml'}"])[key]
        assert got == value and isinstance(got, bool) == isinstance(value, bool), value


def test_floats_as_llama_factory_writes_them(tmp_path):
    """`1e-7` without a point is text in YAML 1.1; OmegaConf reads it as the number that was meant."""
    cfg = composed([yaml_file(tmp_path, "learning_rate: 5.0e-7\npref_beta: 1e-1\nval_size: .5\nseed: 1\n")])
    assert (cfg.learning_rate, cfg.pref_beta, cfg.val_size, cfg.seed) == (5e-7, 0.1, 0.5, 1)


@pytest.mark.parametrize("schema", [TrainConfig, EvalConfig])
def test_several_losses_reach_the_config_typed_or_from_a_file(tmp_path, schema):
    """As a list or as LLaMA-Factory's text with commas; either way the same loss."""
    file = yaml_file(tmp_path, "pref_loss: sigmoid,bco_pair,sft\nloss_weights: [0.8, 0.2, 1]\n")
    for arguments in (
        ["pref_loss=[sigmoid,bco_pair,sft]", "loss_weights=[0.8,0.2,1.0]"],
        ["pref_loss=sigmoid,bco_pair,sft", "loss_weights=0.8,0.2,1.0"],
        [file],
        ["loss=mpo"] if schema is TrainConfig else [file],
        ["loss=hinge", file] if schema is TrainConfig else [file, "pref_loss=[sigmoid,bco_pair,sft]"],
    ):
        needed = [] if schema is TrainConfig else ["model_name_or_path=world", "eval_dataset=world"]
        loss = preference_loss_of(composed([*arguments, *needed], schema))
        names = [part.function.__name__ for part, _ in loss.losses]
        assert names == ["sigmoid_loss", "bco_pair_loss", "sft_loss"], arguments
        assert [weight for _, weight in loss.losses] == [0.8, 0.2, 1.0], arguments


def test_several_datasets_reach_the_config_typed_or_from_a_file(tmp_path):
    """[a,b] is two datasets in one run, as is LLaMA-Factory's text with commas; in a multirun a,b is two runs."""
    file = yaml_file(tmp_path, "dataset: a, b\ninterleave_probs: 0.7, 0.3\nmix_strategy: interleave_under\n")
    for arguments in (
        ["dataset=[a,b]", "interleave_probs=[0.7,0.3]"],
        ["dataset=a,b", "interleave_probs=0.7,0.3"],
        [file],
    ):
        cfg = composed(arguments)
        assert as_list(cfg.dataset) == ["a", "b"] and [float(p) for p in as_list(cfg.interleave_probs)] == [0.7, 0.3]
    assert expand_arguments(["-m", "dataset=a,b"], TrainConfig)[0][:2] == ["-m", "dataset=a,b"]


def test_in_a_multirun_a_comma_between_losses_is_a_sweep_and_one_in_brackets_is_not():
    for typed in ("pref_loss=sigmoid,hinge", "pref_loss=[sigmoid,sft],hinge"):
        assert expand_arguments(["-m", typed], TrainConfig)[0] == ["-m", typed]


SCALARS = st.text(max_size=8) | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False)
SCALARS |= st.text(alphabet="\\'\", a=[]{}$", max_size=8)


@settings(deadline=None, max_examples=150)
@given(value=SCALARS | st.lists(SCALARS, max_size=3))
@example(value="a\\")
@example(value="a\\b'c")
def test_quoting_survives_hydras_grammar(value):
    override = OverridesParser.create().parse_override(f"key={_quote(value)}")
    assert override.value() == value


def test_a_config_file_that_cannot_be_read_is_refused_by_name(tmp_path):
    path = tmp_path / "run.yaml"
    assert refusal([f"config_file={path}"]) == f"config_file={path}: no such file"
    for text, reason in (
        (": [", "not readable as YAML"),
        ("- a\n- b\n", "expected keys"),
        ("a: 1\na: 2\n", "readable"),
    ):
        path.write_text(text)
        assert re.match(rf"config_file={re.escape(str(path))}: .*{reason}", refusal([f"config_file={path}"]))
    path.write_bytes(b"dataset: \xff")
    assert "not readable as YAML" in refusal([f"config_file={path}"])


# --- keys without effect ---


def test_keys_without_effect_are_dropped_with_one_note(tmp_path):
    file = yaml_file(tmp_path, "overwrite_cache: true\npreprocessing_num_workers: 16\nreport_to: [wandb]\nseed: 7\n")
    expanded, notes = expand_arguments([file, "run_name=x"], TrainConfig)
    assert expanded == ["seed=7"]
    assert notes == [
        "without effect here, and left out: overwrite_cache, preprocessing_num_workers, report_to, run_name"
    ]


def test_trust_remote_code_has_no_effect_because_no_remote_code_ever_runs(tmp_path):
    """LLaMA-Factory's own examples set it to true."""
    for argument in ("trust_remote_code=true", yaml_file(tmp_path, "trust_remote_code: true")):
        assert expand_arguments([argument], TrainConfig) == (
            [], ["without effect here, and left out: trust_remote_code"],
        )  # fmt: skip


@pytest.mark.parametrize("key", [key for key, value in WITHOUT_EFFECT.items() if value is not ANY])
def test_the_way_out_of_a_refused_value_is_accepted_when_typed(key):
    """`quantization_bit=4: ... only quantization_bit=null is accepted`: then that must be what the command reads."""
    message = refusal([f"{key}=7"])
    way_out = re.search(rf"only ({key}=\S+) is accepted", message)
    assert way_out, message
    assert expand_arguments([way_out[1]], TrainConfig) == ([], [f"without effect here, and left out: {key}"])


def test_no_key_without_effect_is_a_key_of_the_schema():
    assert not set(WITHOUT_EFFECT) & {f.name for schema in (TrainConfig, EvalConfig) for f in fields(schema)}


# --- mistakes ---

MISTAKES = {
    "unknown": ("pref_bta=0.2", "pref_bta=0.2: unknown key; did you mean pref_beta?"),
    "far": ("zzz=1", "zzz=1: unknown key; conf/ lists every key"),
    "nested": ("a.b=1", "a.b=1: unknown key"),
    "nameless": ("=1", "=1: unknown key"),
    "added": ("+seed=1", "+seed=1: unknown key; did you mean seed?"),
    "float": ("pref_beta=abc", "pref_beta=abc: expected a number"),
    "float_null": ("pref_beta=null", "pref_beta=None: expected a number"),
    "int": ("lora_rank=8.5", "lora_rank=8.5: expected a whole number"),
    "int_text": ("seed=many", "seed=many: expected a whole number"),
    "bool": ("bf16=maybe", "bf16=maybe: expected true or false"),
    "optional_int": ("max_samples=all", "max_samples=all: expected a whole number or null"),
    "list": ("dataset_dir=[a,b]", "dataset_dir=['a', 'b']: expected text"),
    "bracket": ("dataset=[a", "dataset=[a: not readable as key=value"),
    "brace": ("dataset={a", "dataset={a: not readable as key=value"),
    "equals": ("dataset=a=b", "dataset=a=b: not readable as key=value"),
    "quote": ("dataset='a", "dataset='a: not readable as key=value"),
    "no_value": ("dataset", "dataset: expected key=value"),
    "group": ("loss=ip", "loss=ip: no such file in conf/loss; did you mean ipo?"),
    "far_group": ("model=gpt2", "model=gpt2: no such file in conf/model; choose one of "),
    "deleted_key": ("~seed", "~seed: "),
}


@pytest.mark.parametrize("key", MISTAKES)
def test_a_mistake_is_one_line_with_what_was_given_and_the_rule(key):
    argument, message = MISTAKES[key]
    assert refusal([argument]).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pref_bta: 0.2", "pref_bta=0.2: unknown key; did you mean pref_beta?"),
        ("lora_rank: 8.5", "lora_rank=8.5: expected a whole number"),
        ("lora_target: [q_proj, v_proj]", "lora_target=['q_proj', 'v_proj']: expected text"),
        ("adam_beta1: 0.5", "adam_beta1=0.5: is not done here; only adam_beta1=0.9 is accepted"),
    ],
)
def test_a_mistake_in_a_config_file_is_refused_in_the_same_words(tmp_path, text, message):
    assert refusal([yaml_file(tmp_path, text)]) == message


def test_a_group_in_a_config_file_is_not_said_to_be_a_misspelling_of_itself(tmp_path):
    assert "did you mean loss?" not in refusal([yaml_file(tmp_path, "loss: ipo")])


TYPED = st.text(alphabet="abc=,'\"[]{}()$\\ ~+@:#*&!%1.-", max_size=12)


@settings(deadline=None, max_examples=150)
@given(key=st.sampled_from(["dataset=", "pref_beta=", "loss=", "report_to=", "seed=", ""]), text=TYPED)
@example(key="pref_beta=", text="interval(0,1)")
def test_whatever_is_typed_is_accepted_or_refused_in_one_line(key, text):
    """Any other exception would be a traceback on the user's screen. With and without a sweep."""
    for flags in ([], ["-m"]):
        try:
            expand_arguments([*flags, key + text], TrainConfig)
        except ValueError as error:
            assert str(error)


# --- sweeps ---


@pytest.mark.parametrize("sweep", ["0.05,0.1,x", "choice(0.05,x)", "x,0.1"])
def test_a_sweep_checks_every_value(sweep):
    assert refusal(["-m", f"pref_beta={sweep}"]) == "pref_beta=x: expected a number"


def test_a_sweep_over_groups_checks_every_name():
    assert refusal(["-m", "loss=sigmoid,hinge,ip"]).startswith("loss=ip: no such file in conf/loss")
    assert expand_arguments(["-m", "loss=sigmoid,hinge"], TrainConfig)[0] == ["-m", "loss=sigmoid,hinge"]


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
@pytest.mark.parametrize("sweep", ["pref_beta=0.05,0.1", "seed=range(1,4)", "max_samples=null,10", "dataset=a,b"])
def test_a_good_sweep_reaches_hydra_as_it_was_typed(flag, sweep):
    expanded, _ = expand_arguments([flag, sweep], TrainConfig)
    assert expanded[:2] == [flag, sweep]


@pytest.mark.parametrize("sweep", ["loss=choice(sigmoid,hinge)", "loss=glob(*)", "loss=sigmoid, hinge"])
def test_hydras_other_sweeps_over_groups_reach_hydra_too(sweep):
    assert expand_arguments(["-m", sweep], TrainConfig)[0] == ["-m", sweep]


def test_outside_a_sweep_a_comma_in_a_text_is_a_comma():
    assert composed(["lora_target=q_proj,v_proj"]).lora_target == "q_proj,v_proj"
    assert composed(["lora_target='q_proj,v_proj'"]).lora_target == "q_proj,v_proj"


def test_flags_and_hydras_own_keys_are_left_alone():
    arguments = ["--cfg", "job", "hydra.job.name=x", "hydra/launcher=basic", "-m", "--config-dir", "elsewhere"]
    flags = ["--cfg", "job", "-m", "--config-dir", "elsewhere"]
    assert expand_arguments(arguments, TrainConfig)[0] == [*flags, "hydra.job.name=x", "hydra/launcher=basic"]


def test_a_sweep_may_be_asked_for_anywhere_beside_a_config_file(tmp_path):
    """argparse takes overrides in one run only: what config_file expands to must not stand before -m."""
    file = yaml_file(tmp_path, "seed: 7\n")
    for arguments in (["-m", file, "pref_beta=0.1,0.2"], [file, "pref_beta=0.1,0.2", "-m"]):
        expanded, _ = expand_arguments(arguments, TrainConfig)
        assert expanded == ["-m", "seed=7", "pref_beta=0.1,0.2"]


def test_a_group_that_config_file_overrules_is_named(tmp_path):
    _, notes = expand_arguments(["loss=ipo", yaml_file(tmp_path, "pref_loss: sigmoid\n")], TrainConfig)
    assert notes == ["config_file stands above loss=ipo, and sets pref_loss too; its values are used"]


def test_null_leaves_a_group_out():
    assert expand_arguments(["experiment=null"], TrainConfig)[0] == ["~experiment"]


# --- the default experiment ---


@pytest.mark.parametrize("own", ["model_name_or_path=m", "dataset=d", "model=qwen3-0_6b", "data=world"])
def test_naming_a_model_or_a_dataset_drops_the_default_experiment_with_a_note(own):
    """experiment=world would bring its learning rate of 1e-3, two thousand times the usual."""
    _, notes = expand_arguments([own], TrainConfig)
    assert notes == [f"{own.split('=')[0]} is given: the built-in world's settings (experiment=world) are not used"]
    cfg = composed([own, "output_dir=x"])
    assert (cfg.learning_rate, cfg.lora_rank) == (5e-6, 8)


def test_naming_them_in_a_config_file_drops_it_too(tmp_path):
    file = yaml_file(tmp_path, "model_name_or_path: m\ndataset: d\n")
    assert expand_arguments([file], TrainConfig)[1] == [
        "dataset is given: the built-in world's settings (experiment=world) are not used"
    ]
    assert composed([file]).learning_rate == 5e-6


def test_the_default_experiment_stays_otherwise():
    assert expand_arguments(["pref_beta=0.2"], TrainConfig) == (["pref_beta=0.2"], [])
    assert composed([]).learning_rate == 1e-3


def test_an_experiment_that_is_named_is_used_with_any_dataset():
    expanded, notes = expand_arguments(["experiment=conservative", "dataset=d"], TrainConfig)
    assert (expanded, notes) == (["experiment=conservative", "dataset=d"], [])
    assert composed(["experiment=conservative", "dataset=d", "model_name_or_path=m"]).learning_rate == 1e-7


def test_dropping_the_experiment_by_hand_does_no_harm():
    assert composed(["~experiment", "dataset=d", "output_dir=x"]).learning_rate == 5e-6


# --- eval: run= ---

SAVED = {
    "model_name_or_path": "base", "adapter_name_or_path": None, "ref_model": None, "ref_model_adapters": None,
    "template": "chatml", "pref_loss": "ipo", "pref_beta": 0.3, "dataset": "d", "eval_dataset": "it's held out",
    "learning_rate": 1e-3, "max_samples": None, "cutoff_len": 99,
}  # fmt: skip


def saved_run(folder: Path, result: str = "adapter_config.json", **changes: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml({**SAVED, **changes}))
    (folder / result).write_text("{}")
    return f"run={folder}"


def test_run_takes_shared_keys_and_the_command_line_stands_above_them(tmp_path):
    cfg = composed([saved_run(tmp_path / "a"), "pref_beta=0.7"], EvalConfig)
    assert (cfg.template, cfg.pref_loss, cfg.pref_beta, cfg.cutoff_len) == ("chatml", "ipo", 0.7, 99)
    assert (cfg.run, cfg.eval_dataset) == (str(tmp_path / "a"), "it's held out")
    assert check(cfg) == []


def test_run_of_an_adapter_is_the_policy_against_its_base(tmp_path):
    cfg = composed([saved_run(tmp_path / "a")], EvalConfig)
    assert (cfg.model_name_or_path, cfg.adapter_name_or_path) == ("base", str(tmp_path / "a"))
    assert (cfg.ref_model, cfg.ref_model_adapters) == (None, None)


def test_run_of_a_continued_adapter_is_compared_with_what_it_continued(tmp_path):
    """Training's reference was the adapter as it started; with ref_model named, that instead."""
    cfg = composed([saved_run(tmp_path / "a", adapter_name_or_path="first")], EvalConfig)
    assert (cfg.adapter_name_or_path, cfg.ref_model_adapters) == (str(tmp_path / "a"), "first")
    cfg = composed([saved_run(tmp_path / "a", adapter_name_or_path="first", ref_model="other")], EvalConfig)
    assert (cfg.ref_model, cfg.ref_model_adapters) == ("other", None)
    cfg = composed([saved_run(tmp_path / "a", adapter_name_or_path="first", ref_model_adapters="second")], EvalConfig)
    assert cfg.ref_model_adapters == "second"


def test_run_of_a_whole_model_is_compared_with_the_model_it_started_from(tmp_path):
    cfg = composed([saved_run(tmp_path / "a", "model.safetensors")], EvalConfig)
    assert (cfg.model_name_or_path, cfg.ref_model) == (str(tmp_path / "a"), "base")
    cfg = composed([saved_run(tmp_path / "a", "model.safetensors", ref_model="other")], EvalConfig)
    assert cfg.ref_model == "other"


def test_run_reads_its_own_held_out_rows_in_the_format_that_it_wrote_them_in(tmp_path):
    """data_format was of the rows that they were held out of."""
    run = saved_run(tmp_path / "a", data_format="hh", ranking_to_pairs="all")
    assert composed([run], EvalConfig).data_format == "hh"
    (tmp_path / "a" / "held_out.jsonl").touch()
    cfg = composed([run], EvalConfig)
    assert (cfg.eval_dataset, cfg.data_format) == (str(tmp_path / "a" / "held_out.jsonl"), None)
    assert composed([saved_run(tmp_path / "b", eval_dataset=["c", "d"])], EvalConfig).eval_dataset == ["c", "d"]


def test_run_without_held_out_rows_leaves_the_choice_of_them_open(tmp_path):
    """A run with val_size saved no eval_dataset; null is no value that could be passed on."""
    with pytest.raises(ValueError, match=r"^eval_dataset is not set; pass eval_dataset=\.\.\.$"):
        check(composed([saved_run(tmp_path / "a", eval_dataset=None)], EvalConfig))
    assert composed([saved_run(tmp_path / "a", eval_dataset=None), "eval_dataset=e"], EvalConfig).eval_dataset == "e"


def test_run_in_a_directory_with_an_awkward_name(tmp_path):
    folder = tmp_path / "it's, [a] run"
    cfg = composed([saved_run(folder)], EvalConfig)
    assert cfg.adapter_name_or_path == cfg.run == str(folder)


def test_run_without_config_or_result_is_refused(tmp_path):
    assert refusal([f"run={tmp_path}"], EvalConfig) == (
        f"run={tmp_path}: holds no config.yaml; name the directory of a finished run"
    )
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(SAVED))
    assert "holds neither adapter_config.json nor model.safetensors" in refusal([f"run={tmp_path}"], EvalConfig)


def test_a_training_key_is_unknown_to_eval():
    assert refusal(["learning_rate=1"], EvalConfig).startswith("learning_rate=1: unknown key")


# --- the program ---


def test_prepare_command_line_replaces_the_arguments_and_prints_the_notes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "run_name=x", "seed=7"])
    prepare_command_line(TrainConfig)
    assert sys.argv == ["train.py", "seed=7"]
    assert capsys.readouterr().out == "note: without effect here, and left out: run_name\n"


def test_a_mistake_ends_the_program_with_one_line(monkeypatch, capsys):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "pref_bta=1"])
    with pytest.raises(SystemExit) as caught:
        prepare_command_line(TrainConfig)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: pref_bta=1: unknown key; did you mean pref_beta?\n"


def test_an_error_of_many_lines_is_shown_in_one(monkeypatch, capsys):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit), one_line_errors():
        raise ValueError("first\n  second")
    assert capsys.readouterr().err == "error: first second\n"


def test_ctrl_c_is_one_line_and_status_130(capsys):
    """While data and models are read; training listens to it itself."""
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise KeyboardInterrupt
    assert caught.value.code == 130 and capsys.readouterr().err == "stopped by SIGINT\n"


def test_hydra_full_error_shows_the_traceback_and_a_bug_is_never_hidden(monkeypatch):
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError("a bug of ours")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="shown"), one_line_errors():
        raise ValueError("shown")
