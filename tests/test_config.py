"""The config: one set of keys everywhere, every range enforced by name, every group file what it says."""

import copy
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import eval  # noqa: F401  (registers its schema)
import train  # noqa: F401
from dpo.config import RULES, TERM_KEYS, EvalConfig, SharedConfig, TrainConfig, check, preference_loss_of
from dpo.formats import FORMATS
from dpo.losses import OFF, OPTIONS, PREF_LOSSES
from dpo.optim import SCHEDULES
from dpo.preference import F_DIVERGENCES, Pairs, PreferenceLoss, PreferenceObjective
from dpo.unpaired import Labelled, UnpairedObjective
from models.command import expand_arguments
from models.template import TEMPLATES

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
GROUP_FILES = sorted(path for path in CONF.glob("*/*.yaml"))


def composed(name: str = "config", *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))


@pytest.fixture(scope="module")
def default() -> DictConfig:
    return composed()


@pytest.fixture(scope="module")
def default_eval() -> DictConfig:
    return composed("eval", "model_name_or_path=m", "eval_dataset=d")


def changed(cfg: DictConfig, **values: object) -> DictConfig:
    cfg = copy.deepcopy(cfg)
    for key, value in values.items():
        cfg[key] = value
    return cfg


def some_pairs() -> Pairs:
    """Three pairs whose log-ratios differ in sign, as do their lengths."""
    columns = [[-8, -3, -9], [-6, -4, -12], [2, -3, 0.5], [-1, -2, -1.5], [4, 2, 3], [2, 5, 3], [3, 3, 3]]
    ones = torch.ones(3)
    return Pairs(*map(torch.tensor, columns), weight=ones, margin=0 * ones, soft_label=math.nan * ones)


def some_rows() -> Labelled:
    """Three labelled rows."""
    ones = torch.ones(3)
    ratios = torch.tensor([2, -3, 0.5])
    return Labelled(-5 * ones, ratios, ones, 4 * ones, desirable=torch.tensor([1, 0, 1.0]), weight=ones)


# --- keys ---


@pytest.mark.parametrize(("file", "schema"), [("config.yaml", TrainConfig), ("eval.yaml", EvalConfig)])
def test_schema_and_file_have_the_same_keys_in_the_same_order(file, schema):
    """Those of each dataclass that the schema is made of are in the file's order."""
    written = [str(key) for key in OmegaConf.load(CONF / file) if key not in ("defaults", "hydra")]
    assert sorted(written) == sorted(f.name for f in fields(schema))
    for part in schema.__mro__[:-1]:
        own = [name for name in part.__annotations__ if name.islower()]
        assert [key for key in written if key in own] == own


@pytest.mark.parametrize("schema", [TrainConfig, EvalConfig])
def test_no_value_hides_in_the_schema(schema):
    """A default in two places would be two defaults; values stand in conf/ alone."""
    assert all(f.default == "???" for f in fields(schema))


def test_keys_shared_by_both_commands_stand_once():
    train_keys, eval_keys, shared = ({f.name for f in fields(s)} for s in (TrainConfig, EvalConfig, SharedConfig))
    # What eval.py alone asks of these differs: where they are kept from is conf/eval.yaml, and not a saved run.
    assert train_keys & eval_keys == shared | {"eval_dataset", "max_new_tokens", "output_dir", "seed"}


def test_every_key_of_the_files_has_a_comment_above_it():
    """In config.yaml each; eval.yaml explains what it does not share."""
    lines = (CONF / "config.yaml").read_text().splitlines()
    for i, line in enumerate(lines):
        if re.match(r"[a-z_]+:", line) and line.split(":")[0] not in ("defaults", "hydra"):
            assert lines[i - 1].startswith("# "), line


def sources(*files: str) -> str:
    return "\n".join((ROOT / file).read_text(encoding="utf-8") for file in files)


# dpo.evals.harness is a command with keys of its own.
EVALS = [path for path in (ROOT / "dpo" / "evals").glob("*.py") if path.stem != "harness"]
EVAL_FILES = [str(path.relative_to(ROOT)) for path in EVALS]
# The code that obeys keys; dpo/config.py, which only checks them, does not count.
READERS = {
    "train": (TrainConfig, ("dpo/build.py", "dpo/trainer.py", "dpo/plan.py", "train.py")),
    "eval": (EvalConfig, ("dpo/build.py", "dpo/judge/build.py", "eval.py", *EVAL_FILES)),
}

LOSS_KEYS = {"pref_loss", "loss_weights", *OPTIONS.values(), *TERM_KEYS}


class Recorder:
    """A config that notes which keys are asked for."""

    def __init__(self, cfg: DictConfig):
        self.cfg, self.asked = cfg, set()

    def __getattr__(self, key: str) -> object:
        return self[key]

    def __getitem__(self, key: str) -> object:
        self.asked.add(key)
        return self.cfg[key]


def test_the_losss_keys_are_read_by_the_function_that_builds_it(default):
    recorder = Recorder(default)
    preference_loss_of(recorder)
    assert recorder.asked == LOSS_KEYS
    assert set(TERM_KEYS) < {f.name for f in fields(PreferenceLoss)}


@pytest.mark.parametrize("command", READERS)
def test_every_key_is_read_somewhere(command):
    """As cfg.KEY, or by preference_loss_of. `run` is expanded on the command line."""
    schema, files = READERS[command]
    text = sources(*files)
    read = set(re.findall(r"\bcfg\.(?:get\(\")?([a-z_0-9]+)", text)) | LOSS_KEYS
    assert "preference_loss_of(cfg)" in text
    unread = {f.name for f in fields(schema)} - read
    assert unread == ({"run"} if command == "eval" else set())


@pytest.mark.parametrize("command", READERS)
def test_only_keys_that_exist_are_read(command):
    """cfg is structured, so a wrong name would fail at run time, but only where that line runs."""
    known = {f.name for schema in (TrainConfig, EvalConfig) for f in fields(schema)}
    assert set(re.findall(r"\bcfg\.([a-z_0-9]+)", sources(*READERS[command][1]))) - known <= {"get"}


# --- groups ---


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_group_file_composes_and_sets_what_it_says(path):
    group = path.parent.name
    others = [] if group == "experiment" else ["~experiment"]
    cfg = composed("config", *others, f"{group}={path.stem}", "output_dir=x")
    values = OmegaConf.load(path)
    assert set(map(str, values)) <= {f.name for f in fields(TrainConfig)}
    for key, value in values.items():
        assert cfg[key] == value and type(cfg[key]) is type(value), key
    assert path.read_text().startswith("# @package _global_\n# ")  # and says why


@pytest.mark.slow
def test_every_group_file_passes_its_checks():
    for path in GROUP_FILES:
        given = {"model_name_or_path": "m", "dataset": "d", "output_dir": "x", **OmegaConf.load(path)}
        others = [] if path.parent.name == "experiment" else ["~experiment"]
        overrides = [f"{key}={value}" for key, value in given.items()]
        warnings = check(composed("config", *others, f"{path.parent.name}={path.stem}", *overrides))
        # The guide's two columns are for full fine-tuning, and say so with LoRA.
        # SimPO's gamma is always said in the other convention too.
        expected = ("suits full fine-tuning", "which is gamma / beta")
        assert [w for w in warnings if not any(text in w for text in expected)] == [], path


@pytest.mark.parametrize("path", sorted(CONF.glob("loss/*.yaml")), ids=lambda path: path.stem)
def test_every_key_of_a_loss_file_is_one_that_its_losses_read(path):
    """None is refused, and changing any number changes the loss of a pair."""
    cfg = composed("config", f"loss={path.stem}")
    check(cfg)

    def losses(cfg: DictConfig) -> torch.Tensor:
        loss = preference_loss_of(cfg)
        kind, measured = (UnpairedObjective, some_rows()) if loss.unpaired else (PreferenceObjective, some_pairs())
        return kind(loss, reference=None).losses(measured)

    result = losses(cfg)
    assert result.isfinite().all() and result.shape == (3,)
    for key, value in OmegaConf.load(path).items():
        if isinstance(value, float):
            assert not torch.equal(losses(changed(cfg, **{key: value * 0.7})), result), key
    assert path.stem in PREF_LOSSES or path.stem in ("beta_dpo", "cdpo", "chipo", "dr_dpo", "mpo", "wpo")


def test_every_loss_but_the_auxiliary_one_has_its_file():
    assert set(PREF_LOSSES) - {path.stem for path in CONF.glob("loss/*.yaml")} == {"sft"}


GUIDE = {"conservative": (1e-7, 0.05, 16), "recommended": (5e-7, 0.1, 32)}


@pytest.mark.parametrize("name", GUIDE)
def test_experiments_hold_the_guides_two_columns(name):
    cfg = composed("config", f"experiment={name}")
    batch = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps
    assert (cfg.learning_rate, cfg.pref_beta, batch) == GUIDE[name]
    assert cfg.num_train_epochs == 1


def test_a_loss_brings_its_own_beta_above_the_experiments():
    """experiment=world has beta 1, loss=hinge 0.05; the command line stands above both."""
    assert composed("config", "loss=hinge").pref_beta == 0.05
    assert composed("config", "loss=hinge", "pref_beta=0.7").pref_beta == 0.7


def test_without_the_default_experiment_model_and_dataset_must_be_named():
    cfg = composed("config", "~experiment")
    with pytest.raises(ValueError, match=r"model_name_or_path is not set; pass model_name_or_path=\.\.\. \(or model="):
        check(cfg)
    with pytest.raises(ValueError, match=r"dataset is not set; pass dataset=\.\.\.$"):
        check(changed(cfg, model_name_or_path="m"))


# --- rules ---

# The settings under which a key is read, where that is not the default's.
READ_UNDER = {
    "judge": {"task": "win_rate"},
    "discopop_tau": {"pref_loss": "discopop"},
    "simpo_gamma": {"pref_loss": "simpo"},
    "kto_chosen_weight": {"pref_loss": "kto"},
    "kto_rejected_weight": {"pref_loss": "kto"},
    "early_stopping_steps": {"val_size": 0.5},
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
    "ref_model_mixup_alpha": {"sync_ref_model": True},
    "ref_model_sync_steps": {"sync_ref_model": True},
}
# key: (values at the edge that are refused, values at the edge that are not), by hand from conf/config.yaml.
EDGES: dict[str, tuple[list, list]] = {
    "judge": (["gpt-4", ""], ["gold", "model", "openai", "human"]),
    "judge_template": (["vicuna"], ["auto", *TEMPLATES]),
    "judge_concurrency": ([0, -1], [1]),
    "judge_requests_per_minute": ([0], [1]),
    "judge_max_requests": ([0], [1]),
    "judge_max_cost": ([0.0, float("inf")], [0.01]),
    "judge_price_prompt": ([-0.1, float("nan")], [0.0, 2.5]),
    "judge_price_completion": ([-0.1], [0.0]),
    "judge_timeout": ([0.0, float("inf")], [0.1]),
    "judge_logprobs": (["yes", 2], ["auto", True, False]),
    "judge_seed": ([-1, 2**32], [0, 2**32 - 1]),
    "max_invalid": ([1.0, -0.1], [0.0, 0.99]),
    "task": (["alpaca", ""], ["preference"]),
    "resamples": ([0, 1999], [2000]),
    "safetybench_set": (["test_en", ""], ["en", "zh", "zh_subset", "dev_en", "dev_zh"]),
    "safetybench_shots": ([-1, 6], [0, 5]),
    "perplexity_stride": ([0], [1, None]),
    "max_tokens_per_batch": ([0], [1]),
    "stage": (["ppo", "DPO"], ["dpo", "sft"]),  # kto: see test_stage_kto_is_the_loss_of_that_name
    "finetuning_type": (["freeze"], ["lora", "full"]),
    "template": (["vicuna"], ["auto", *TEMPLATES]),
    "pref_beta": ([0.0, -0.1, float("inf"), float("nan")], [1e-9]),
    "dpo_label_smoothing": ([0.5, 1.0, -0.1, float("nan")], [0.0, 0.49]),
    "discopop_tau": ([0.0, -1.0], [1e-9]),
    "simpo_gamma": ([-0.1, float("inf")], [0.0, 1.5]),
    "kto_chosen_weight": ([-0.1, float("nan")], [0.0, 1.5]),
    "kto_rejected_weight": ([-0.1, float("nan")], [0.0, 1.5]),
    "pref_ftx": ([-1.0, float("nan")], [0.0, 1.0]),
    "dpop_lambda": ([-1.0], [0.0, 50.0]),
    "len_reg_alpha": ([float("nan"), float("inf")], [-0.1, 0.0, 0.1]),
    "ld_alpha": ([-0.1, 1.1, float("nan")], [0.0, 1.0, None]),
    "f_divergence_type": (["kl", ""], list(F_DIVERGENCES)),
    "f_alpha_divergence_coef": ([1.0, float("nan")], [-1.0, 0.0, 2.0]),
    "ref_model_mixup_alpha": ([0.0, -0.1, 1.1, float("nan")], [1e-9, 1.0]),
    "ref_model_sync_steps": ([0, -1], [1]),
    "dr_dpo_beta": ([0.0, -1.0, float("inf")], [1e-9, None]),
    "beta_dpo_alpha": ([-0.1, float("nan")], [0.0, 0.6]),
    "lora_rank": ([0, -8], [1]),
    "lora_alpha": ([0.0, -1.0], [0.5, None]),
    "lora_dropout": ([1.0, -0.1, float("nan")], [0.0, 0.999]),
    "val_size": ([-0.1, float("inf")], [0.0, 0.1, 100]),
    "cutoff_len": ([1, 0, -1], [2]),
    "max_samples": ([0, -1], [1, None]),
    "on_bad_row": (["fix"], ["stop", "skip"]),
    "per_device_train_batch_size": ([0], [1]),
    "max_tokens_per_micro_batch": ([0, -1, "all", 1.5, True], [1, 4096, "auto", None]),
    "per_device_eval_batch_size": ([0], [1]),
    "gradient_accumulation_steps": ([0], [1]),
    "learning_rate": ([0.0, -1e-7, float("inf"), float("nan")], [1e-9]),
    "lr_scheduler_type": (["polynomial"], list(SCHEDULES)),
    "dataset": ([5, "", [], ["a", 5], ["a", "b", "a"], "a,a", True], ["a", "a,b", ["a", "b"], ["a,b"]]),
    "eval_dataset": ([5, ["a", "a"]], ["a", ["a", "b"]]),
    "data_format": (["sharegpt"], [None, *FORMATS]),
    "ranking_to_pairs": (["best"], ["best_worst", "best_rest", "all"]),
    "mix_strategy": (["interleave"], ["concat", "interleave_under", "interleave_over"]),
    "warmup_ratio": ([1.0, -0.1], [0.0, 0.99]),
    "warmup_steps": ([-1], [0]),
    "num_train_epochs": ([0.0, -1.0, float("inf")], [0.1]),
    "optim": (["adam", ""], ["adamw_torch", "rmsprop", "sgd"]),
    "weight_decay": ([-0.1], [0.0]),
    "max_grad_norm": ([-1.0, float("nan")], [0.0]),
    "seed": ([-1], [0]),
    "runs": ([["a", "b", "a"]], [["a", "b"], []]),
    "device": (["gpu", "mps", "", "cudax", "cuda:", "cuda:x", "cpu:0"], ["auto", "cpu", "cuda", "cuda:1"]),
    "attn_implementation": (["eager", "flash_attention_2", ""], ["sdpa", "flex_attention"]),
    "logging_steps": ([0], [1]),
    "eval_strategy": (["yes"], ["no", "steps", "epoch"]),
    "eval_steps": ([0], [1]),
    "save_strategy": (["best"], ["no", "steps", "epoch"]),
    "save_total_limit": ([0, -1], [1, None]),
    "early_stopping_steps": ([0, -1], [1, None]),
    "save_steps": ([0], [1]),
    "num_samples": ([-1], [0]),
    "max_new_tokens": ([0], [1]),
}


def test_every_rule_has_its_edges_tested():
    assert set(EDGES) == set(RULES)


@pytest.mark.parametrize("key", EDGES)
def test_a_value_out_of_range_is_refused_with_its_name_and_the_rule(default, default_eval, key):
    # val_size and an eval_dataset exclude each other, which is another rule.
    base = changed(default, eval_dataset=None) if key in default else default_eval
    cfg = changed(base, **READ_UNDER.get(key, {}))
    bad, good = EDGES[key]
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{key}={re.escape(str(value))}: (must|expected)"):
            check(changed(cfg, **{key: value}))
    for value in good:
        check(changed(cfg, **{key: value}))


def test_rules_name_the_choices(default):
    for given in ("ktoo", "sigmoid,ktoo", ["sigmoid", "ktoo"]):
        shown = given if isinstance(given, str) else ",".join(given)
        with pytest.raises(ValueError, match=rf"^pref_loss={shown}: expected one or several of sigmoid, .*, sft$"):
            check(changed(default, pref_loss=given))
    with pytest.raises(ValueError, match=r"^f_divergence_type=kl: expected one of reverse_kl, forward_kl, js_div"):
        check(changed(default, f_divergence_type="kl"))


# --- the loss ---


@pytest.mark.parametrize(
    "given", [[0.5], [1, 2, 3], [0.5, 0], [1, -1], [1, float("nan")], [1, "x"], "1", 0.5, [None, 1]]
)
def test_probabilities_are_one_positive_number_for_each_dataset(default, given):
    mixed = changed(default, dataset=["a", "b"], mix_strategy="interleave_under")
    for good in (None, [0.7, 0.3], "0.7,0.3", [2, 1]):
        check(changed(mixed, interleave_probs=good))
    with pytest.raises(ValueError, match=r"^interleave_probs=.*: expected a number above 0 for each of 2 datasets"):
        check(changed(mixed, interleave_probs=given))


def test_probabilities_are_refused_where_nothing_is_drawn(default):
    with pytest.raises(
        ValueError, match=r"^interleave_probs=\[1, 1\] with mix_strategy=concat: is not read there; leave it out$"
    ):
        check(changed(default, dataset=["a", "b"], interleave_probs=[1, 1]))


@pytest.mark.parametrize("given", [["sigmoid", "bco_pair"], "sigmoid,bco_pair", "sigmoid, bco_pair"])
@pytest.mark.parametrize("weights", [[0.8, 0.2], "0.8,0.2", ["0.8", 0.2]])
def test_losses_and_weights_are_lists_or_text_with_commas(default, given, weights):
    loss = preference_loss_of(changed(default, pref_loss=given, loss_weights=weights))
    assert loss.losses == ((PREF_LOSSES["sigmoid"], 0.8), (PREF_LOSSES["bco_pair"], 0.2))


def test_one_loss_without_a_list_and_no_weights_are_weight_1(default):
    assert preference_loss_of(changed(default, pref_loss="ipo")).losses == ((PREF_LOSSES["ipo"], 1.0),)
    assert preference_loss_of(changed(default, pref_loss="ipo", loss_weights=2)).losses == ((PREF_LOSSES["ipo"], 2.0),)


@pytest.mark.parametrize("command", ["default", "default_eval"])
def test_every_key_reaches_the_loss(request, command):
    values = {
        "pref_loss": ["sigmoid", "discopop", "simpo"], "pref_beta": 0.7, "dpo_label_smoothing": 0.1,
        "discopop_tau": 0.2, "simpo_gamma": 0.3, "pref_ftx": 0.4, "dpop_lambda": 5.0, "len_reg_alpha": 0.6,
        "ld_alpha": 0.8, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.9,
        "dr_dpo_beta": 1.1, "beta_dpo_alpha": 1.2, "use_weighting": False,
    }  # fmt: skip
    loss = preference_loss_of(changed(request.getfixturevalue(command), **values))
    assert [part.function.__name__ for part, _ in loss.losses] == ["sigmoid_loss", "discopop_loss", "simpo_loss"]
    assert loss.options == OFF | {"beta": 0.7, "label_smoothing": 0.1, "tau": 0.2, "gamma": 0.3}
    weights = {"kto_chosen_weight": 1.3, "kto_rejected_weight": 0.9}
    kto = preference_loss_of(changed(request.getfixturevalue(command), pref_loss="kto", **weights))
    assert kto.options == OFF | {"beta": kto.beta, "chosen_weight": 1.3, "rejected_weight": 0.9}
    assert {key: getattr(loss, key) for key in TERM_KEYS} == {key: values[key] for key in TERM_KEYS}
    # Weighing pairs and Dr.DPO exclude each other.
    assert preference_loss_of(changed(request.getfixturevalue(command), use_weighting=True)).use_weighting


def test_stage_kto_is_the_loss_of_that_name(default, tmp_path):
    """LLaMA-Factory's files say stage: kto and no pref_loss."""
    file = tmp_path / "kto.yaml"
    file.write_text("stage: kto\nkto_chosen_weight: 1.2\n")
    for argv in (["stage=kto"], [f"config_file={file}"]):
        assert "pref_loss=kto" in [a.replace("'", "") for a in expand_arguments(argv, TrainConfig)[0]]
    assert "pref_loss=kto" not in expand_arguments(["stage=dpo"], TrainConfig)[0]
    check(changed(default, stage="kto", pref_loss="kto"))
    with pytest.raises(ValueError, match="stage=kto with pref_loss=sigmoid: is of pairs; leave pref_loss out"):
        check(changed(default, stage="kto"))


UNREAD = [
    ({"pref_loss": "hinge", "dpo_label_smoothing": 0.1}, "dpo_label_smoothing=0.1: not read by pref_loss=hinge"),
    ({"simpo_gamma": 1.0}, "simpo_gamma=1.0: not read by pref_loss=sigmoid"),
    ({"discopop_tau": 0.1}, "discopop_tau=0.1: not read by pref_loss=sigmoid"),
    ({"pref_loss": "nca_pair", "dpop_lambda": 1.0}, "dpop_lambda=1.0: not read by pref_loss=nca_pair"),
    ({"pref_loss": "ipo", "len_reg_alpha": 0.1}, "len_reg_alpha=0.1: not read by pref_loss=ipo"),
    ({"pref_loss": "bco_pair", "f_divergence_type": "forward_kl"}, "f_divergence_type=forward_kl: not read by pref_l"),
    ({"f_alpha_divergence_coef": 0.3}, "f_alpha_divergence_coef=0.3: not read by f_divergence_type=reverse_kl"),
    ({"pref_loss": "exo_pair"}, "dpo_label_smoothing=0: exo_pair takes its logarithm"),
    ({"loss_weights": [1.0, 2.0]}, "loss_weights=[1.0, 2.0]: 2 for 1 losses; give one for each"),
    ({"loss_weights": "a"}, "loss_weights=a: expected a number for each loss of pref_loss"),
    ({"loss_weights": [float("inf")]}, "loss_weights=[inf]: must be finite"),
    ({"pref_loss": []}, "pref_loss=: expected one or several of sigmoid"),
    ({"pref_loss": [["sigmoid"]]}, "pref_loss=['sigmoid']: expected one or several of sigmoid"),
]


@pytest.mark.parametrize(("values", "message"), UNREAD, ids=[m.partition(":")[0] for _, m in UNREAD])
@pytest.mark.parametrize("command", ["default", "default_eval"])
def test_what_the_loss_does_not_read_is_refused_by_both_commands(request, command, values, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check(changed(request.getfixturevalue(command), **values))


# --- combinations ---

COMBINATIONS = [
    ({"bf16": True, "fp16": True}, "bf16=True and fp16=True: choose one"),
    (
        {"finetuning_type": "full", "adapter_name_or_path": "runs/a"},
        "finetuning_type=full with adapter_name_or_path=runs/a: only lora continues an adapter",
    ),
    ({"stage": "sft", "ref_model": "r"}, "stage=sft with ref_model=r: SFT has no reference"),
    ({"pref_loss": "simpo", "pref_beta": 2.0, "ref_model": "r"}, "ref_model=r: pref_loss=simpo has no reference"),
    ({"stage": "sft", "ref_model_adapters": "r"}, "stage=sft with ref_model_adapters=r: SFT has no reference"),
    ({"sync_ref_model": True, "stage": "sft"}, "sync_ref_model=True with stage=sft: SFT has no reference"),
    (
        {"sync_ref_model": True, "pref_loss": "simpo", "pref_beta": 2.0},
        "sync_ref_model=True: pref_loss=simpo has no reference",
    ),
    (
        {"sync_ref_model": True, "ref_cache_dir": "c"},
        "sync_ref_model=True with ref_cache_dir=c: what moves is not kept",
    ),
    (
        {"sync_ref_model": True, "ref_model": "r"},
        "sync_ref_model=True with ref_model=r: the reference moves from where training starts",
    ),
    (
        {"sync_ref_model": True, "ref_model_adapters": "a"},
        "sync_ref_model=True with ref_model_adapters=a: the reference moves from where training starts",
    ),
    (
        {"torch_compile": True, "lora_dropout": 0.1},
        r"torch_compile=True with lora_dropout=0\.1: code that is compiled twice may drop other numbers",
    ),
    (
        {"val_size": 0.1, "eval_dataset": "e"},
        r"val_size=0\.1 with eval_dataset=e: choose one of the two",
    ),
]


@pytest.mark.parametrize(("values", "message"), COMBINATIONS, ids=lambda x: "+".join(x) if isinstance(x, dict) else "")
def test_a_combination_that_cannot_run_is_refused_and_each_half_is_fine(default, values, message):
    """Each half alone passes, so it is the combination that the message is about."""
    with pytest.raises(ValueError, match=f"^{message}"):
        check(changed(default, **values))
    cfg = changed(default, eval_dataset=None)
    for key, value in values.items():
        check(changed(cfg, **{key: value}))


def test_a_reference_that_moves_may_be_named_only_where_training_starts_from_it(default):
    """ref_model=world is what training starts from, unless an adapter is continued."""
    cfg = changed(default, sync_ref_model=True, ref_model="world")
    check(cfg)
    with pytest.raises(ValueError, match=r"^sync_ref_model=True with ref_model=world: the reference moves from where"):
        check(changed(cfg, adapter_name_or_path="runs/a"))


@pytest.mark.parametrize("stage", ["dpo", "sft"])
def test_how_a_reference_moves_is_refused_where_none_does(default, stage):
    for key, value, off in (("ref_model_mixup_alpha", 0.5, 0.6), ("ref_model_sync_steps", 100, 512)):
        message = f"^{key}={value}: not read without sync_ref_model=true; leave it at {off}$"
        with pytest.raises(ValueError, match=message):
            check(changed(default, stage=stage, **{key: value}))


AWAY = {
    "loss_weights": [2.0], "dpo_label_smoothing": 0.1, "discopop_tau": 0.1, "simpo_gamma": 1.0, "pref_ftx": 1.0,
    "dpop_lambda": 1.0, "len_reg_alpha": 0.1, "ld_alpha": 0.5, "f_divergence_type": "forward_kl",
    "f_alpha_divergence_coef": 0.3, "kto_chosen_weight": 2.0, "kto_rejected_weight": 2.0,
    "dr_dpo_beta": 1.0, "beta_dpo_alpha": 0.6, "use_weighting": True,
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(LOSS_KEYS - {"pref_loss", "pref_beta"}))
def test_sft_refuses_what_changes_a_preference_loss(default, key):
    """Not the loss and its beta: LLaMA-Factory's files carry them, whatever the stage."""
    sft = changed(default, stage="sft", pref_loss="ipo", pref_beta=0.3, ld_alpha=1.0)
    assert check(sft) == []
    with pytest.raises(ValueError, match=re.escape(f"stage=sft with {key}={AWAY[key]}: SFT has no preference loss")):
        check(changed(sft, **{key: AWAY[key]}))


def test_a_run_that_neither_trains_nor_evaluates_is_refused(default):
    """do_train=false needs held-out rows from somewhere."""
    with pytest.raises(ValueError, match=r"^do_train=False without eval_dataset or val_size"):
        check(changed(default, do_train=False, eval_dataset=None))
    for held_out in ({"eval_dataset": "e"}, {"eval_dataset": None, "val_size": 0.1}):
        check(changed(default, do_train=False, **held_out))


def test_bf16_and_fp16_together_are_refused_in_an_evaluation_too(default_eval):
    assert check(default_eval) == []
    with pytest.raises(ValueError, match="bf16=True and fp16=True"):
        check(changed(default_eval, bf16=True, fp16=True))


WARNED = [
    ({"finetuning_type": "full", "learning_rate": 2e-5}, "learning_rate=2e-05 is the size of SFT's"),
    ({"pref_beta": 1.5}, r"pref_beta=1\.5 lies outside 0\.001 to 1, as is usual with sigmoid, which reads sums"),
    (
        {"pref_loss": ["sft", "sigmoid_norm"], "pref_beta": 0.5},
        r"pref_beta=0\.5 lies outside 1 to 20, .* means per",
    ),
    ({"pref_loss": "simpo", "pref_beta": 2.0}, r"simpo_gamma=0\.5, which is gamma / beta = 0\.25"),
]
NOT_WARNED = [
    {"finetuning_type": "full", "learning_rate": 1.9e-5},
    {"finetuning_type": "lora", "learning_rate": 1e-3},
    {"finetuning_type": "full", "learning_rate": 1e-3, "stage": "sft"},
    {"pref_beta": 1.0},
    {"pref_beta": 1.5, "stage": "sft"},
]


@pytest.mark.parametrize(("values", "message"), WARNED)
def test_a_likely_mistake_is_warned_about(default, values, message):
    (warning,) = check(changed(default, **values))
    assert re.match(message, warning)


@pytest.mark.parametrize("values", NOT_WARNED, ids=str)
def test_what_is_usual_is_not_warned_about(default, values):
    assert check(changed(default, **values)) == []


def test_the_default_run_passes_without_a_warning(default):
    assert check(default) == []


def test_no_file_that_is_read_is_written_over(default, tmp_path):
    """The starting adapter's directory as output_dir; and data in a directory that is to be overwritten."""
    adapter = changed(default, adapter_name_or_path=str(tmp_path), output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=f"output_dir={tmp_path}: is adapter_name_or_path, whose files the result"):
        check(adapter)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("")
    cfg = changed(default, eval_dataset=str(held_out), output_dir=str(tmp_path), overwrite_output_dir=True)
    with pytest.raises(ValueError, match=f"overwrite_output_dir=True: would delete eval_dataset={held_out}; name"):
        check(cfg)
