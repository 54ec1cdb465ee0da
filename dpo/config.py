"""The config: every key's type, its range, and which combinations cannot run.

Types stand here, values and meanings in conf/config.yaml; a test holds the two key sets equal. Keys are
LLaMA-Factory's, flat at the root.

Everything a user can get wrong is a ValueError of one sentence: what was given, the rule, the way out.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from omegaconf import MISSING, DictConfig, ListConfig

from dpo.data import MIX_STRATEGIES
from dpo.formats import FORMATS
from dpo.losses import OFF, OPTIONS, PREF_LOSSES
from dpo.optim import SCHEDULES
from dpo.optimizers import OPTIMIZERS
from dpo.preference import F_DIVERGENCES, PreferenceLoss, preference_loss
from dpo.rankings import RANKING_TO_PAIRS
from dpo.run import saved_keys
from models.command import refuse_unset
from models.template import TEMPLATES


@dataclass
class SharedConfig:
    """The keys that train.py and eval.py share, and that mean the same in both."""

    model_name_or_path: str = MISSING
    adapter_name_or_path: str | None = MISSING
    ref_model: str | None = MISSING
    ref_model_adapters: str | None = MISSING
    ref_cache_dir: str | None = MISSING
    template: str = MISSING
    date_string: str | None = MISSING
    pref_loss: Any = MISSING
    loss_weights: Any = MISSING
    pref_beta: float = MISSING
    dpo_label_smoothing: float = MISSING
    discopop_tau: float = MISSING
    simpo_gamma: float = MISSING
    kto_chosen_weight: float = MISSING
    kto_rejected_weight: float = MISSING
    pref_ftx: float = MISSING
    dpop_lambda: float = MISSING
    len_reg_alpha: float = MISSING
    ld_alpha: float | None = MISSING
    f_divergence_type: str = MISSING
    f_alpha_divergence_coef: float = MISSING
    dr_dpo_beta: float | None = MISSING
    beta_dpo_alpha: float = MISSING
    use_weighting: bool = MISSING
    dataset_dir: str = MISSING
    data_format: str | None = MISSING
    ranking_to_pairs: str = MISSING
    tokenized_path: str | None = MISSING
    cutoff_len: int = MISSING
    max_samples: int | None = MISSING
    on_bad_row: str = MISSING
    per_device_eval_batch_size: int = MISSING
    bf16: bool = MISSING
    fp16: bool = MISSING
    device: str = MISSING


@dataclass
class JudgeKeys:
    """The keys of a judge, which eval.py and dpo.judge share; see conf/judge.yaml."""

    judge: str | None = MISSING
    judge_model: str | None = MISSING
    judge_template: str = MISSING
    judge_base_url: str | None = MISSING
    judge_labels: str | None = MISSING
    judge_cache: str | None = MISSING
    judge_concurrency: int = MISSING
    judge_requests_per_minute: int | None = MISSING
    judge_max_requests: int | None = MISSING
    judge_max_cost: float | None = MISSING
    judge_price_prompt: float | None = MISSING
    judge_price_completion: float | None = MISSING
    judge_timeout: float = MISSING
    judge_logprobs: Any = MISSING
    judge_seed: int = MISSING
    max_invalid: float = MISSING


@dataclass
class TrainConfig(SharedConfig):
    """Every key of train.py; see conf/config.yaml for what each means."""

    NOT_THE_WORLDS: ClassVar = {"model_name_or_path", "dataset", "model", "data"}
    # LLaMA-Factory's name for training with the loss of the same name.
    STANDS_FOR: ClassVar = {"stage": lambda stage: {"pref_loss": "kto"} if stage == "kto" else {}}

    sync_ref_model: bool = MISSING
    ref_model_mixup_alpha: float = MISSING
    ref_model_sync_steps: int = MISSING
    finetuning_type: str = MISSING
    lora_target: str = MISSING
    lora_rank: int = MISSING
    lora_alpha: float | None = MISSING
    use_rslora: bool = MISSING
    lora_dropout: float = MISSING
    stage: str = MISSING
    do_train: bool = MISSING
    dataset: Any = MISSING
    eval_dataset: Any = MISSING
    mix_strategy: str = MISSING
    interleave_probs: Any = MISSING
    val_size: float = MISSING
    disable_shuffling: bool = MISSING
    per_device_train_batch_size: int = MISSING
    max_tokens_per_micro_batch: Any = MISSING
    gradient_accumulation_steps: int = MISSING
    learning_rate: float = MISSING
    lr_scheduler_type: str = MISSING
    warmup_ratio: float = MISSING
    warmup_steps: int = MISSING
    num_train_epochs: float = MISSING
    max_steps: int = MISSING
    optim: str = MISSING
    weight_decay: float = MISSING
    max_grad_norm: float = MISSING
    seed: int = MISSING
    gradient_checkpointing: bool = MISSING
    attn_implementation: str = MISSING
    torch_compile: bool = MISSING
    logging_steps: int = MISSING
    eval_strategy: str = MISSING
    eval_on_start: bool = MISSING
    eval_steps: int = MISSING
    save_strategy: str = MISSING
    save_steps: int = MISSING
    save_total_limit: int | None = MISSING
    metric_for_best_model: str = MISSING
    greater_is_better: bool | None = MISSING
    load_best_model_at_end: bool = MISSING
    early_stopping_steps: int | None = MISSING
    output_dir: str = MISSING
    overwrite_output_dir: bool = MISSING
    resume_from_checkpoint: str | None = MISSING
    plot_loss: bool = MISSING
    num_samples: int = MISSING
    max_new_tokens: int = MISSING


@dataclass
class EvalConfig(JudgeKeys, SharedConfig):  # the shared keys first
    """Every key of eval.py; see conf/eval.yaml."""

    STANDS_FOR: ClassVar = {
        # Not where the run was written, nor how it answered while it trained.
        "run": lambda run: saved_keys(run, wanted=["eval_dataset", *(f.name for f in fields(SharedConfig))])
    }

    task: str = MISSING
    run: str | None = MISSING
    runs: list[str] = MISSING
    eval_dataset: Any = MISSING
    temperature: float = MISSING
    top_k: int = MISSING
    top_p: float = MISSING
    min_p: float = MISSING
    max_new_tokens: int = MISSING
    seed: int = MISSING
    resamples: int = MISSING
    truthfulqa_dir: str = MISSING
    safetybench_dir: str = MISSING
    safetybench_set: str = MISSING
    safetybench_shots: int = MISSING
    perplexity_file: str | None = MISSING
    perplexity_stride: int | None = MISSING
    max_tokens_per_batch: int = MISSING
    model_id: str | None = MISSING
    alpaca_eval_dir: str = MISSING
    alpaca_eval_prompt: str | None = MISSING
    alpaca_eval_annotations: str | None = MISSING
    mt_bench_dir: str = MISSING
    mt_bench_baseline: str | None = MISSING
    output_dir: str = MISSING
    output_file: str | None = MISSING


# What eval.py can do, each in the file of dpo/evals/ that has its name, and the keys that it cannot do without.
TASKS: dict[str, tuple[str, ...]] = {
    "preference": ("model_name_or_path", "eval_dataset"),
    "win_rate": ("model_name_or_path", "eval_dataset"),
    "generation": ("model_name_or_path", "eval_dataset"),
    "kl": ("model_name_or_path", "eval_dataset"),
    "world": ("model_name_or_path",),
    "truthfulqa": ("model_name_or_path",),
    "safetybench": ("model_name_or_path",),
    "perplexity": ("model_name_or_path", "perplexity_file"),
    "alpaca_eval": (),
    "mt_bench": ("model_name_or_path",),
    "compare": ("runs",),
}
# Those that may ask a judge.
JUDGED = ("win_rate", "alpaca_eval", "mt_bench")


def _one_of(*choices: str) -> tuple[Any, str]:
    return (lambda value: value in choices), f"expected one of {', '.join(choices)}"


ANY_NUMBER = (lambda value: True), "must be finite"
AT_LEAST_1 = (lambda value: value >= 1), "must be at least 1"
NOT_NEGATIVE = (lambda value: value >= 0), "must not be negative"
POSITIVE = (lambda value: value > 0), "must be above 0"
SHARE = (lambda value: 0 <= value < 1), "must be at least 0 and below 1"


def _are_names(value: Any) -> bool:
    names = as_list(value)
    return bool(names) and all(isinstance(name, str) and name for name in names) and len({*names}) == len(names)


DATASETS = _are_names, "expected a name or a path, or a list of them, each once"
# Fields of PreferenceLoss that are config keys of the same name.
TERM_KEYS = (
    "pref_ftx", "dpop_lambda", "len_reg_alpha", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef",
    "dr_dpo_beta", "beta_dpo_alpha", "use_weighting",
)  # fmt: skip
RULES: dict[str, tuple[Any, str]] = {
    "task": _one_of(*TASKS),
    "runs": ((lambda value: len({*value}) == len(value)), "expected each evaluation once"),
    "resamples": ((lambda value: value >= 2000), "must be at least 2000, or the interval would hang on the draw"),
    "safetybench_set": _one_of("en", "zh", "zh_subset", "dev_en", "dev_zh"),
    "safetybench_shots": ((lambda value: 0 <= value <= 5), "must be between 0 and 5"),
    "perplexity_stride": AT_LEAST_1,
    "max_tokens_per_batch": AT_LEAST_1,
    "stage": _one_of("dpo", "kto", "sft"),
    "finetuning_type": _one_of("lora", "full"),
    "template": _one_of("auto", *TEMPLATES),
    "pref_beta": POSITIVE,
    "dpo_label_smoothing": ((lambda value: 0 <= value < 0.5), "must be at least 0 and below 0.5"),
    "discopop_tau": POSITIVE,
    "simpo_gamma": NOT_NEGATIVE,
    "kto_chosen_weight": NOT_NEGATIVE,
    "kto_rejected_weight": NOT_NEGATIVE,
    "pref_ftx": NOT_NEGATIVE,
    "dpop_lambda": NOT_NEGATIVE,
    "len_reg_alpha": ANY_NUMBER,
    "ld_alpha": ((lambda value: 0 <= value <= 1), "must be between 0 and 1, which is null"),
    "f_divergence_type": _one_of(*F_DIVERGENCES),
    "f_alpha_divergence_coef": ((lambda value: value != 1), "must not be 1, where it is reverse_kl: choose that"),
    "ref_model_mixup_alpha": ((lambda value: 0 < value <= 1), "must be above 0 and at most 1"),
    "ref_model_sync_steps": AT_LEAST_1,
    "dr_dpo_beta": POSITIVE,
    "beta_dpo_alpha": NOT_NEGATIVE,
    "lora_rank": AT_LEAST_1,
    "lora_alpha": POSITIVE,
    "lora_dropout": SHARE,
    "dataset": DATASETS,
    "eval_dataset": DATASETS,
    "data_format": _one_of(*FORMATS),
    "ranking_to_pairs": _one_of(*RANKING_TO_PAIRS),
    "mix_strategy": _one_of(*MIX_STRATEGIES),
    "val_size": NOT_NEGATIVE,
    "cutoff_len": ((lambda value: value >= 2), "must be at least 2: one prompt token and one response token"),
    "max_samples": AT_LEAST_1,
    "on_bad_row": _one_of("stop", "skip"),
    "per_device_train_batch_size": AT_LEAST_1,
    "max_tokens_per_micro_batch": (
        (lambda value: value == "auto" or (type(value) is int and value >= 1)),
        "expected auto, a whole number of at least 1, or null",
    ),
    "per_device_eval_batch_size": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "learning_rate": POSITIVE,
    "lr_scheduler_type": _one_of(*SCHEDULES),
    "warmup_ratio": SHARE,
    "warmup_steps": NOT_NEGATIVE,
    "num_train_epochs": POSITIVE,
    "optim": _one_of(*OPTIMIZERS),
    "weight_decay": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "seed": ((lambda value: 0 <= value < 2**32), "must be at least 0 and below 2^32"),
    "attn_implementation": _one_of("sdpa", "flex_attention"),
    "device": (re.compile(r"auto|cpu|cuda(:[0-9]+)?").fullmatch, "expected auto, cpu, cuda or cuda:N"),
    "logging_steps": AT_LEAST_1,
    "eval_strategy": _one_of("no", "steps", "epoch"),
    "eval_steps": AT_LEAST_1,
    "save_strategy": _one_of("no", "steps", "epoch"),
    "save_steps": AT_LEAST_1,
    "save_total_limit": AT_LEAST_1,
    "early_stopping_steps": AT_LEAST_1,
    "num_samples": NOT_NEGATIVE,
    "max_new_tokens": AT_LEAST_1,
    "judge": _one_of("gold", "model", "openai", "human"),
    "judge_template": _one_of("auto", *TEMPLATES),
    "judge_concurrency": AT_LEAST_1,
    "judge_requests_per_minute": AT_LEAST_1,
    "judge_max_requests": AT_LEAST_1,
    "judge_max_cost": POSITIVE,
    "judge_price_prompt": NOT_NEGATIVE,
    "judge_price_completion": NOT_NEGATIVE,
    "judge_timeout": POSITIVE,
    "judge_logprobs": ((lambda value: value in ("auto", True, False)), "expected auto, true or false"),
    "judge_seed": ((lambda value: 0 <= value < 2**32), "must be at least 0 and below 2^32"),
    "max_invalid": SHARE,
}
# How a reference moves, and where each key is when nothing is said.
MOVES = {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512}


def check(cfg: DictConfig) -> list[str]:
    """ValueError for a value out of its range or a combination that cannot run; returns warnings, a line each."""
    refuse_unset(cfg, needed=_needed(cfg), model_name_or_path=" (or model=NAME)")
    check_values(cfg)
    if "task" in cfg and cfg.judge and cfg.task not in JUDGED:
        raise ValueError(f"judge={cfg.judge}: not read by task={cfg.task}, but by {', '.join(JUDGED)}; leave it out")
    if cfg.bf16 and cfg.fp16:
        raise ValueError("bf16=True and fp16=True: choose one; neither means float32")
    for key in ("ref_cache_dir", "tokenized_path"):
        if cfg[key] and Path(cfg[key]).is_file():
            raise ValueError(f"{key}={cfg[key]}: is a file; name a directory")
    if cfg.get("stage") == "sft":
        _refuse_preference_options(cfg)
        return _check_training(cfg)
    loss = preference_loss_of(cfg)
    if cfg.get("stage") == "kto" and not loss.unpaired:
        raise ValueError(f"stage=kto with pref_loss={cfg.pref_loss}: is of pairs; leave pref_loss out, or stage=dpo")
    warnings = [
        f"pref_beta={cfg.pref_beta:g} lies outside {low:g} to {high:g}, as is usual with {name}, which reads "
        + ("means per token" if PREF_LOSSES[name].per_token else "sums over a response's tokens")
        for name in as_list(cfg.pref_loss)
        for low, high in [PREF_LOSSES[name].usual_beta]
        if name != "sft" and not low <= cfg.pref_beta <= high
    ]
    if "gamma" in {option for part, _ in loss.losses for option in part.options}:
        warnings.append(f"simpo_gamma={cfg.simpo_gamma:g}, which is gamma / beta = {cfg.simpo_gamma / cfg.pref_beta:g}")
    return warnings + (_check_training(cfg) if "stage" in cfg else [])


def _needed(cfg: DictConfig) -> Sequence[str] | None:
    """The keys that an evaluation cannot do without; None of a training run: all that have no value of their own."""
    if "task" not in cfg:
        return None
    if cfg.task not in TASKS:
        raise ValueError(f"task={cfg.task}: {RULES['task'][1]}")
    return TASKS[cfg.task]


def check_values(cfg: DictConfig, more: Mapping[str, tuple[Any, str]] = MappingProxyType({})) -> None:
    """ValueError for a value out of its key's range; `more` are the rules of keys that another command has."""
    rules = RULES | dict(more)
    for key in map(str, cfg):
        if key in rules and (value := cfg[key]) is not None:
            holds, rule = rules[key]
            if (isinstance(value, float) and not math.isfinite(value)) or not holds(value):
                raise ValueError(f"{key}={value}: {rule}")


def as_list(value: Any) -> list[Any]:
    """A list, one value, or LLaMA-Factory's comma-separated text, as a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return list(value) if isinstance(value, Sequence | ListConfig) else [value]


def preference_loss_of(cfg: DictConfig) -> PreferenceLoss:
    """The preference loss that a config asks for; ValueError where it asks for one that cannot be."""
    weights = None if cfg.loss_weights is None else as_list(cfg.loss_weights)
    try:
        weights = weights and [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise ValueError(f"loss_weights={cfg.loss_weights}: expected a number for each loss of pref_loss") from None
    terms = {key: cfg[key] for key in TERM_KEYS if cfg[key] is not None}
    return preference_loss(as_list(cfg.pref_loss), weights, {name: cfg[key] for name, key in OPTIONS.items()}, **terms)


def _refuse_preference_options(cfg: DictConfig) -> None:
    """ValueError for what changes a preference loss, in a run that has none; pref_loss and pref_beta are always set."""
    off: dict[str, object] = {"loss_weights": None} | {OPTIONS[option]: value for option, value in OFF.items()}
    off |= {field.name: field.default for field in fields(PreferenceLoss) if field.name in TERM_KEYS}
    for key, value in off.items():
        if cfg[key] is not None and cfg[key] != value:
            raise ValueError(f"stage=sft with {key}={cfg[key]}: SFT has no preference loss; leave it out")


def _lies_in(path: str, directory: str) -> bool:
    return Path(path).resolve().is_relative_to(Path(directory).resolve())


def _check_training(cfg: DictConfig) -> list[str]:
    if cfg.finetuning_type == "full" and cfg.adapter_name_or_path:
        raise ValueError(
            f"finetuning_type=full with adapter_name_or_path={cfg.adapter_name_or_path}: only lora continues an adapter"
        )
    if not cfg.do_train and not (cfg.eval_dataset or cfg.val_size):
        raise ValueError("do_train=False without eval_dataset or val_size: nothing to do; name one of the two")
    for key in ("model_name_or_path", "adapter_name_or_path", "ref_model", "ref_model_adapters"):
        if cfg.overwrite_output_dir and cfg[key] and _lies_in(cfg[key], cfg.output_dir):
            raise ValueError(f"overwrite_output_dir=True: would delete {key}={cfg[key]}; name another output_dir")
        if cfg[key] and Path(cfg[key]).resolve() == Path(cfg.output_dir).resolve():
            raise ValueError(
                f"output_dir={cfg.output_dir}: is {key}, whose files the result would replace; name another"
            )
    for key in ("dataset", "eval_dataset"):
        for name in as_list(cfg[key]) if cfg.overwrite_output_dir and cfg[key] else ():
            if Path(name).exists() and _lies_in(name, cfg.output_dir):
                raise ValueError(f"overwrite_output_dir=True: would delete {key}={name}; name another output_dir")
    if cfg.torch_compile and cfg.lora_dropout:
        raise ValueError(
            f"torch_compile=True with lora_dropout={cfg.lora_dropout}: code that is compiled twice may drop other "
            "numbers the second time; leave one of them out"
        )
    for key in ("ref_model", "ref_model_adapters"):
        if cfg.stage == "sft" and cfg[key]:
            raise ValueError(f"stage=sft with {key}={cfg[key]}: SFT has no reference; leave it out")
        if cfg.stage != "sft" and cfg[key] and not preference_loss_of(cfg).needs_reference:
            raise ValueError(f"{key}={cfg[key]}: pref_loss={cfg.pref_loss} has no reference; leave it out")
    if cfg.sync_ref_model:
        _check_moving_reference(cfg)
    for key, default in MOVES.items():
        if not cfg.sync_ref_model and cfg[key] != default:
            raise ValueError(f"{key}={cfg[key]}: not read without sync_ref_model=true; leave it at {default}")
    _check_mixture(cfg)
    evaluates = cfg.eval_strategy != "no" and (cfg.eval_dataset or cfg.val_size)
    for key in ("load_best_model_at_end", "early_stopping_steps"):
        if cfg[key] and not evaluates:
            raise ValueError(f"{key}={cfg[key]}: needs evaluations; set eval_strategy, and eval_dataset or val_size")
    if cfg.val_size and cfg.eval_dataset:
        raise ValueError(f"val_size={cfg.val_size} with eval_dataset={cfg.eval_dataset}: choose one of the two")
    warnings = []
    rate = cfg.learning_rate
    if cfg.stage != "sft" and cfg.finetuning_type == "full" and rate >= 2e-5:
        warnings.append(f"learning_rate={rate:g} is the size of SFT's; DPO with full fine-tuning wants about 5e-7")
    if cfg.stage != "sft" and cfg.finetuning_type == "lora" and rate < 2e-6:
        warnings.append(f"learning_rate={rate:g} suits full fine-tuning; LoRA usually wants about 5e-6")
    return warnings


def _check_mixture(cfg: DictConfig) -> None:
    if cfg.interleave_probs is None:
        return
    given = f"interleave_probs={cfg.interleave_probs}"
    if cfg.mix_strategy == "concat":
        raise ValueError(f"{given} with mix_strategy=concat: is not read there; leave it out")
    count = len(as_list(cfg.dataset))
    try:
        probs = [float(p) for p in as_list(cfg.interleave_probs)]
    except (TypeError, ValueError):
        probs = []
    if len(probs) != count or not all(math.isfinite(p) and p > 0 for p in probs):
        raise ValueError(f"{given}: expected a number above 0 for each of {count} datasets")


def _check_moving_reference(cfg: DictConfig) -> None:
    if cfg.stage == "sft":
        raise ValueError("sync_ref_model=True with stage=sft: SFT has no reference; leave it out")
    if not preference_loss_of(cfg).needs_reference:
        raise ValueError(f"sync_ref_model=True: pref_loss={cfg.pref_loss} has no reference; leave it out")
    if cfg.ref_cache_dir:
        raise ValueError(
            f"sync_ref_model=True with ref_cache_dir={cfg.ref_cache_dir}: what moves is not kept; leave one of them out"
        )
    start = None if cfg.adapter_name_or_path else cfg.model_name_or_path
    for key, same in (("ref_model", start), ("ref_model_adapters", None)):
        if cfg[key] and cfg[key] != same:
            raise ValueError(
                f"sync_ref_model=True with {key}={cfg[key]}: the reference moves from where training starts; leave one "
                "of them out"
            )
