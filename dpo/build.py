"""From config to the objects of a run: device and dtype, tokenizer and template, rows, policy, reference.

Beside the trainer and the entry points the only file that reads cfg. Everything cheap comes before the weights, so that
a mistake in the config or the data is said in the first second.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from dpo.config import as_list, preference_loss_of
from dpo.data import describe_mix, mix_order, read_examples, split_by_prompt, trained_prompts
from dpo.formats import Example
from dpo.memory import (
    SHARE,
    Forecast,
    Lengths,
    bytes_of,
    forecast,
    forecast_of_all,
    largest_budget,
)
from dpo.plan import Plan, cut, cut_by_tokens, cutting
from dpo.preference import PreferenceObjective
from dpo.reference import (
    LiveReference,
    MovingReference,
    Reference,
    base_reference,
    frozen_reference,
    snapshot_reference,
)
from dpo.reference_cache import cached_reference
from dpo.samples import BATCH_SIZE
from dpo.sources import Source, find_dataset
from dpo.token_cache import cached_rows
from dpo.tokens import Encoded, Rows, encode_all
from dpo.unpaired import UnpairedObjective, with_mismatched
from models.compiled import compile_blocks, refuse_compiling
from models.config import read_model_config
from models.flex import refuse_flex
from models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, inject_lora, load_adapter, read_adapter_config
from models.template import ChatTemplate
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from models.weights import WORLD, choose_dtype, load_model, resolve_model_dir, weight_files

model_dir = lru_cache(resolve_model_dir)  # a hub name would ask the network at every call


def build_template(cfg: DictConfig) -> ChatTemplate:
    """The chat template, after a look at everything else of the model and adapter that is cheap to check."""
    directory = model_dir(cfg.model_name_or_path)
    read_model_config(directory)
    weight_files(directory)
    for adapter in filter(None, (cfg.adapter_name_or_path, cfg.ref_model_adapters)):
        read_adapter_config(Path(adapter))
    tokenizer = Tokenizer(directory)
    if cfg.ref_model and model_dir(cfg.ref_model).resolve() != directory.resolve():
        reference = model_dir(cfg.ref_model)
        read_model_config(reference)
        weight_files(reference)
        if Tokenizer(reference).rust.get_vocab() != tokenizer.rust.get_vocab():
            raise ValueError(
                f"ref_model={cfg.ref_model}: its tokenizer has another vocabulary than {cfg.model_name_or_path}'s, so "
                "token ids would mean other text; name a model of the same family"
            )
    return ChatTemplate(cfg.template, tokenizer, cfg.date_string)


def build_rows(cfg: DictConfig, template: ChatTemplate) -> Rows:
    """Training and held-out rows, encoded."""
    train, held_out = (sources_of(cfg, cfg.dataset, "train.jsonl"), sources_of(cfg, cfg.eval_dataset, "eval.jsonl"))
    return _through_token_cache(cfg, template, train, held_out, partial(_make_rows, cfg, template))


def _make_rows(cfg: DictConfig, template: ChatTemplate) -> Rows:
    datasets, skipped = read_datasets(cfg, cfg.dataset, "train.jsonl")
    examples, warnings = _mixed(cfg, datasets)
    held_out: list[Example] = []
    if cfg.eval_dataset:
        held_out, more = _held_out(cfg)
        skipped = skipped + more
        both, prompts = trained_prompts(examples, held_out)
        if both:
            warnings.append(f"{both} of {prompts} held-out prompts are also trained on")
    elif cfg.val_size:
        examples, held_out = split_by_prompt(examples, cfg.val_size, cfg.seed)
    settings = {"cutoff_len": cfg.cutoff_len, "on_bad_row": cfg.on_bad_row}
    train, bad = encode_all(examples, template, **settings)
    evaluation, also_bad = encode_all(held_out, template, **settings) if held_out else ([], [])
    train, evaluation = (_as_the_loss_reads(cfg, rows) for rows in (train, evaluation))
    return Rows(train, evaluation, skipped + bad + also_bad, warnings)


def build_eval_rows(cfg: DictConfig, template: ChatTemplate) -> Rows:
    """Held-out rows alone, encoded."""

    def make() -> Rows:
        examples, skipped = _held_out(cfg)
        rows, bad = encode_all(examples, template, cutoff_len=cfg.cutoff_len, on_bad_row=cfg.on_bad_row)
        return Rows([], _as_the_loss_reads(cfg, rows), skipped + bad)

    return _through_token_cache(cfg, template, [], sources_of(cfg, cfg.eval_dataset, "eval.jsonl"), make)


# Keys that change the rows, beside the data's and the tokenizer's files. Whatever else does belongs here.
ROW_KEYS = (
    "template", "date_string", "cutoff_len", "max_samples", "on_bad_row", "val_size", "data_format", "ranking_to_pairs",
    "mix_strategy", "interleave_probs",
)  # fmt: skip


def _through_token_cache(
    cfg: DictConfig, template: ChatTemplate, train: Sequence[Source], held_out: Sequence[Source],
    make: Callable[[], Rows],
) -> Rows:  # fmt: skip
    """What `make` gives; with tokenized_path, only where it does not lie there."""
    if not cfg.tokenized_path:
        return make()
    files = [path for source in (*train, *held_out) for path in source.files]
    draws = cfg.get("val_size") or cfg.get("interleave_probs")
    values = {key: str(cfg.get(key)) for key in ROW_KEYS} | {
        "source": template.source,
        # Rows name their file in errors, and a registry says how its rows are read.
        # Which are trained on and which held out: the same files in the same order may be either.
        "sources": [[repr(source) for source in sources] for sources in (train, held_out)],
        "kind": _row_kind(cfg),
        "mismatched": _reads_mismatched(cfg),
        "trains": "dataset" in cfg,
        "seed": cfg.seed if draws else None,
    }
    return cached_rows(Path(cfg.tokenized_path), [*files, *template.tokenizer.files], values, make)


def _held_out(cfg: DictConfig) -> tuple[list[Example], list[str]]:
    """The rows of every eval_dataset, one after the other: what is measured on is measured on whole."""
    datasets, skipped = read_datasets(cfg, cfg.eval_dataset, "eval.jsonl")
    return [example for examples in datasets.values() for example in examples], skipped


def _mixed(cfg: DictConfig, datasets: dict[str, list[Example]]) -> tuple[list[Example], list[str]]:
    """(the examples of several datasets as one list, warnings)."""
    names, pools = list(datasets), list(datasets.values())
    lengths = [len(pool) for pool in pools]
    probs = None if cfg.interleave_probs is None else [float(p) for p in as_list(cfg.interleave_probs)]
    order = mix_order(lengths, cfg.mix_strategy, probs, cfg.seed)
    mixed = [pools[dataset][row] for dataset, row in order]
    if len(names) == 1 or cfg.mix_strategy == "concat":
        return mixed, []
    # Not what one would think: an interleaved dataset may be cut short, or repeated.
    return mixed, [describe_mix(names, lengths, order)]


def _as_the_loss_reads(cfg: DictConfig, rows: list[Encoded]) -> list[Encoded]:
    """The rows, with mismatched responses where an unpaired loss compares with them."""
    return with_mismatched(rows, cfg.cutoff_len) if rows and _reads_mismatched(cfg) else rows


def _reads_mismatched(cfg: DictConfig) -> bool:
    return _row_kind(cfg) == "kto" and preference_loss_of(cfg).couples


def _row_kind(cfg: DictConfig) -> str:
    """dpo (pairs), kto (a response with a label) or sft (a response)."""
    if "pref_loss" not in cfg or cfg.get("stage") == "sft":
        return cfg.get("stage", "dpo")
    return "kto" if preference_loss_of(cfg).unpaired else "dpo"


def read_datasets(cfg: DictConfig, names: Any, world_file: str) -> tuple[dict[str, list[Example]], list[str]]:
    """(the examples of each dataset by its name, bad rows as one line each)."""
    datasets: dict[str, list[Example]] = {}
    skipped: list[str] = []
    for source in sources_of(cfg, names, world_file):
        datasets[source.name], bad = read_examples(
            source, stage=_row_kind(cfg), on_bad_row=cfg.on_bad_row, max_samples=cfg.max_samples,
            data_format=cfg.data_format, ranking_to_pairs=cfg.ranking_to_pairs,
        )  # fmt: skip
        skipped += bad
    return datasets, skipped


def sources_of(cfg: DictConfig, names: Any, world_file: str) -> list[Source]:
    """What the names of a key stand for."""
    world = Source("world", (WORLD / "data" / world_file,))
    given = [] if names is None else as_list(names)
    return [world if name == "world" else find_dataset(name, cfg.dataset_dir) for name in given]


def build_policy(cfg: DictConfig, device: torch.device) -> Transformer:
    """The policy with its trainables: a LoRA adapter (fresh or continued), or every weight."""
    dtype = choose_dtype(cfg.bf16, cfg.fp16)
    full = cfg.finetuning_type == "full"
    config = read_model_config(model_dir(cfg.model_name_or_path))
    if cfg.attn_implementation == "flex_attention":
        refuse_flex(device, config.head_dim)
    if cfg.torch_compile:
        refuse_compiling(config, device)
    # Trained weights are float32 masters, cast where they are used: an update of 5e-7 would be lost in bfloat16.
    policy = load_model(
        model_dir(cfg.model_name_or_path), dtype=torch.float32 if full else dtype, device=device,
        gradient_checkpointing=cfg.gradient_checkpointing,
    )  # fmt: skip
    policy.dtype = dtype
    policy.attn_implementation = cfg.attn_implementation
    if cfg.torch_compile:
        compile_blocks(policy)
    if full:
        policy.requires_grad_(True)
    elif cfg.adapter_name_or_path:
        load_adapter(policy, Path(cfg.adapter_name_or_path), dropout=cfg.lora_dropout)
    else:
        # LLaMA-Factory's default where lora_alpha is not set: twice the rank.
        alpha = cfg.lora_alpha if cfg.lora_alpha is not None else 2 * cfg.lora_rank
        inject_lora(
            policy, rank=cfg.lora_rank, alpha=alpha, use_rslora=cfg.use_rslora, dropout=cfg.lora_dropout,
            target=cfg.lora_target, seed=cfg.seed,
        )  # fmt: skip
    return policy


def new_objective(cfg: DictConfig) -> PreferenceObjective:
    """The objective of pairs or of labelled rows, as the loss reads; without its reference yet."""
    loss = preference_loss_of(cfg)
    return (UnpairedObjective if loss.unpaired else PreferenceObjective)(loss, reference=None)


def build_objective(cfg: DictConfig, policy: Transformer, rows: Rows) -> tuple[PreferenceObjective, str]:
    """(objective of a training run, its reference in a few words); the rows are checked against it."""
    objective = new_objective(cfg)
    objective.check(chain(rows.train, rows.evaluation))
    description = "none"
    if objective.loss.needs_reference:
        objective.reference, description = build_reference(cfg, policy, rows)
    return objective, description


def build_reference(cfg: DictConfig, policy: Transformer, rows: Rows) -> tuple[Reference, str]:
    """(reference of a training run, what it is in a few words); see dpo.reference for the choice."""
    if cfg.sync_ref_model:
        alpha, steps = cfg.ref_model_mixup_alpha, cfg.ref_model_sync_steps
        description = f"the policy as it starts, moved by {alpha:g} towards it every {steps} updates"
        return MovingReference(policy, alpha=alpha, sync_steps=steps), description
    adapter = cfg.ref_model_adapters
    build: Callable[[], LiveReference]
    another_model = _is_another_model(cfg) or cfg.finetuning_type == "full"
    if another_model:
        build, description = partial(_frozen_copy, cfg, policy), _describe_frozen_copy(cfg)
    elif cfg.adapter_name_or_path and not cfg.ref_model:
        adapter = cfg.adapter_name_or_path
        build, description = partial(snapshot_reference, policy), "a snapshot of the adapter as it starts"
    else:
        build, description = partial(base_reference, policy), "the base model, adapter off"
    reads = _rows_read(cfg, rows) if cfg.ref_cache_dir else []
    return _through_cache(cfg, policy, reads, build, adapter=adapter, loads_model=another_model), description


def _through_cache(
    cfg: DictConfig, policy: Transformer, rows: Sequence[Encoded], build: Callable[[], LiveReference], *,
    adapter: str | None, loads_model: bool,
) -> Reference:  # fmt: skip
    """What `build` makes; with ref_cache_dir, only where a row is missing there. adapter: the reference's own."""
    if not cfg.ref_cache_dir:
        return build()
    directory = model_dir(cfg.ref_model or cfg.model_name_or_path)
    files = [directory / "config.json", *weight_files(directory)]
    if adapter:
        files += [Path(adapter) / ADAPTER_CONFIG, Path(adapter) / ADAPTER_WEIGHTS]
    return cached_reference(
        Path(cfg.ref_cache_dir), files, choose_dtype(cfg.bf16, cfg.fp16), rows, build,
        device=policy.device, batch_size=cfg.per_device_eval_batch_size, loads_model=loads_model,
    )  # fmt: skip


def _rows_read(cfg: DictConfig, rows: Rows) -> list[Encoded]:
    """The rows that a training run gets to: a short one not to all."""
    plan = Plan.of(cfg, len(rows.train))
    steps = min(plan.total_steps, plan.steps_per_epoch) if cfg.do_train else 0
    indices = sorted({i for step in range(steps) for i in plan.indices(step)})
    evaluates = cfg.eval_strategy != "no" or cfg.eval_on_start or not cfg.do_train
    return [rows.train[i] for i in indices] + list(rows.evaluation if evaluates else [])


def build_finished_policy(cfg: DictConfig, device: torch.device) -> Transformer:
    """The policy of an evaluation: a model, with an adapter where one is named; nothing to train."""
    policy = load_model(model_dir(cfg.model_name_or_path), dtype=choose_dtype(cfg.bf16, cfg.fp16), device=device)
    if cfg.adapter_name_or_path:
        load_adapter(policy, Path(cfg.adapter_name_or_path), dropout=0.0)
    return policy.requires_grad_(False)


def build_finished_reference(cfg: DictConfig, policy: Transformer, rows: Sequence[Encoded]) -> tuple[Reference, str]:
    """The reference of an evaluation: the one that is named, else the policy's base model."""
    build, description = _finished_reference(cfg, policy)
    adapter = cfg.ref_model_adapters
    return _through_cache(cfg, policy, rows, build, adapter=adapter, loads_model=_is_another_model(cfg)), description


def build_live_reference(cfg: DictConfig, policy: Transformer) -> tuple[LiveReference, str]:
    """The same with its model in memory, for what a cache of log-probabilities cannot tell: its own answers."""
    build, description = _finished_reference(cfg, policy)
    return build(), description


def check_reference(cfg: DictConfig) -> None:
    """ValueError where the reference of an evaluation would be the policy itself."""
    if not has_reference(cfg):
        raise ValueError(
            f"model_name_or_path={cfg.model_name_or_path}: nothing to compare it with; name run, adapter_name_or_path "
            "or ref_model"
        )


def has_reference(cfg: DictConfig) -> bool:
    """Whether an evaluation has a reference that is not the policy itself."""
    return bool(cfg.adapter_name_or_path) or _is_another_model(cfg)


def _finished_reference(cfg: DictConfig, policy: Transformer) -> tuple[Callable[[], LiveReference], str]:
    if _is_another_model(cfg):
        return partial(_frozen_copy, cfg, policy), _describe_frozen_copy(cfg)
    description = "the base model, adapter off" if cfg.adapter_name_or_path else "the model itself"
    return partial(base_reference, policy), description


def predict_memory(cfg: DictConfig, policy: Transformer, rows: Rows, free: int | None) -> Forecast:
    """The peak of a training run; max_tokens_per_micro_batch=auto becomes a number in cfg.

    free: bytes that were free before the model was loaded.
    """
    train = [Lengths.of(row) for row in rows.train]
    evaluation = sorted(map(Lengths.of, rows.evaluation), key=lambda row: row.tokens)
    evaluates = (cfg.eval_strategy != "no" or cfg.eval_on_start) and bool(evaluation)
    predict = partial(
        forecast, policy, optim=cfg.optim, reference=_reference_bytes(cfg, policy),
        evaluated=max(cut(evaluation, cfg.per_device_eval_batch_size), key=_tokens) if evaluates else [],
        answers=_longest_prompts(cfg, evaluation or train) if cfg.num_samples else [],
    )  # fmt: skip
    plan = Plan.of(cfg, len(train))
    batches = [[train[i] for i in plan.indices(step)] for step in range(plan.total_steps)]
    if cfg.max_tokens_per_micro_batch == "auto":
        if free is None:
            raise ValueError(
                "max_tokens_per_micro_batch=auto: this system does not say how much memory is free; give a number"
            )

        def peak(most: int) -> int:
            return forecast_of_all(predict, [cut_by_tokens(batch, most) for batch in batches]).peak

        longest = max(row.tokens for row in train)
        cfg.max_tokens_per_micro_batch = largest_budget(peak, longest, max(map(_tokens, batches)), SHARE * free)
    return forecast_of_all(predict, list(map(cutting(cfg), batches)))


def _longest_prompts(cfg: DictConfig, rows: Sequence[Lengths]) -> list[Lengths]:
    """Of the prompts that may be answered, those of a batch that takes the most memory."""
    prompts = sorted((row.prompt for row in rows), reverse=True)
    return [Lengths(prompt, (cfg.max_new_tokens,)) for prompt in prompts[: min(cfg.num_samples, BATCH_SIZE)]]


def _tokens(rows: Sequence[Lengths]) -> int:
    return sum(row.tokens for row in rows)


def _reference_bytes(cfg: DictConfig, policy: Transformer) -> int:
    """What the reference's own weights take; see build_reference for the choice."""
    if cfg.stage == "sft" or not preference_loss_of(cfg).needs_reference:
        return 0
    trained = bytes_of(p for p in policy.parameters() if p.requires_grad)
    if cfg.sync_ref_model:
        return trained
    if _is_another_model(cfg) or cfg.finetuning_type == "full":
        if cfg.ref_cache_dir:  # it is gone before training starts
            return 0
        with torch.device("meta"):
            model = Transformer(read_model_config(model_dir(cfg.ref_model or cfg.model_name_or_path)), policy.dtype)
        return bytes_of(model.to(policy.dtype).parameters())
    return trained if cfg.adapter_name_or_path and not cfg.ref_model else 0


def starts_at_its_reference(cfg: DictConfig) -> bool:
    """Whether policy and reference are the same weights before the first update."""
    continued_against_base = bool(cfg.adapter_name_or_path and cfg.ref_model)
    return not _is_another_model(cfg) and not continued_against_base


def _is_another_model(cfg: DictConfig) -> bool:
    """Whether the reference named is something that the policy's base does not already hold in memory."""
    base = model_dir(cfg.model_name_or_path)
    return bool(cfg.ref_model_adapters or (cfg.ref_model and model_dir(cfg.ref_model).resolve() != base.resolve()))


def _frozen_copy(cfg: DictConfig, policy: Transformer) -> LiveReference:
    directory = model_dir(cfg.ref_model or cfg.model_name_or_path)
    model = load_model(directory, dtype=choose_dtype(cfg.bf16, cfg.fp16), device=policy.device)
    if cfg.ref_model_adapters:
        load_adapter(model, Path(cfg.ref_model_adapters), dropout=0.0)
    model.attn_implementation = policy.attn_implementation
    if cfg.get("torch_compile"):
        compile_blocks(model)
    return frozen_reference(model)


def _describe_frozen_copy(cfg: DictConfig) -> str:
    name = f"a frozen copy of {cfg.ref_model or cfg.model_name_or_path}"
    return " with adapter ".join(filter(None, [name, cfg.ref_model_adapters]))
