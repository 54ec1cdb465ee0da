"""From the keys that begin with `judge` to a judge; the keys are commented in conf/judge.yaml."""

import os
from pathlib import Path

from omegaconf import DictConfig

from dpo.build import model_dir
from dpo.digests import file_sha256
from dpo.judge.endpoint import EndpointJudge
from dpo.judge.gold import GoldJudge
from dpo.judge.human import HumanJudge
from dpo.judge.local import LocalJudge
from dpo.judge.retry import Limits
from dpo.judge.store import Store
from dpo.judge.verdict import Judge
from models.template import ChatTemplate
from models.tokenizer import Tokenizer
from models.weights import choose_device, choose_dtype, load_model, weight_files

# What each judge cannot do without.
NEEDS = {"gold": None, "model": "judge_model", "openai": "judge_model", "human": "judge_labels"}

# The judges that read a key, of keys that are null until somebody sets them.
READ_BY = {
    "judge_model": ("model", "openai"), "judge_labels": ("human",), "judge_base_url": ("openai",),
    "judge_requests_per_minute": ("openai",), "judge_max_requests": ("openai",), "judge_max_cost": ("openai",),
    "judge_price_prompt": ("openai",), "judge_price_completion": ("openai",),
}  # fmt: skip


def build_judge(cfg: DictConfig) -> Judge:
    """The judge that cfg.judge names. ValueError for what is missing or of another judge."""
    if cfg.judge is None:
        raise ValueError(f"judge is not set; pass judge={', '.join(NEEDS)}")
    check_judge(cfg)
    if cfg.judge == "gold":
        return GoldJudge()
    if cfg.judge == "human":
        return HumanJudge(Path(cfg.judge_labels).expanduser())
    return _build_local(cfg) if cfg.judge == "model" else _build_endpoint(cfg)


def check_judge(cfg: DictConfig) -> None:
    """ValueError where a key that the judge needs is not set, or one is that it does not read."""
    needs = NEEDS[cfg.judge]
    if needs and not cfg[needs]:
        raise ValueError(f"judge={cfg.judge}: {needs} is not set; pass {needs}=...")
    for key, judges in READ_BY.items():
        if cfg[key] is not None and cfg.judge not in judges:
            raise ValueError(f"{key}={cfg[key]}: is not read with judge={cfg.judge}; leave it out")
    prices = [cfg.judge_price_prompt, cfg.judge_price_completion]
    if cfg.judge_max_cost is not None and None in prices:
        raise ValueError(
            f"judge_max_cost={cfg.judge_max_cost:g}: needs judge_price_prompt and judge_price_completion; "
            "no prices are built in"
        )


def _build_local(cfg: DictConfig) -> LocalJudge:
    directory = model_dir(cfg.judge_model)
    template = ChatTemplate(cfg.judge_template, Tokenizer(directory))
    model = load_model(directory, dtype=choose_dtype(cfg.bf16, cfg.fp16), device=choose_device(cfg.device))
    return LocalJudge(
        model.requires_grad_(False), template, name=cfg.judge_model,
        digest=file_sha256(directory / "config.json", *weight_files(directory)),
        batch_size=cfg.per_device_eval_batch_size, seed=cfg.judge_seed, store=Store(cfg.judge_cache),
    )  # fmt: skip


def build_endpoint(cfg: DictConfig) -> EndpointJudge:
    """The endpoint of a task that asks in words of its own; ValueError where cfg.judge names another judge."""
    if cfg.judge != "openai":
        raise ValueError(
            f"judge={cfg.judge}: task={cfg.task} asks in its own words; pass judge=openai, or leave it out"
        )
    check_judge(cfg)
    return _build_endpoint(cfg)


def _build_endpoint(cfg: DictConfig) -> EndpointJudge:
    limits = Limits(
        max_requests=cfg.judge_max_requests, max_cost=cfg.judge_max_cost,
        price_prompt=cfg.judge_price_prompt or 0.0, price_completion=cfg.judge_price_completion or 0.0,
        requests_per_minute=cfg.judge_requests_per_minute,
    )  # fmt: skip
    logprobs = None if cfg.judge_logprobs == "auto" else cfg.judge_logprobs
    return EndpointJudge(
        model=cfg.judge_model, base_url=cfg.judge_base_url, api_key=os.environ.get("OPENAI_API_KEY"),
        seed=cfg.judge_seed, store=Store(cfg.judge_cache), limits=limits, concurrency=cfg.judge_concurrency,
        timeout=cfg.judge_timeout, logprobs=logprobs,
    )  # fmt: skip
