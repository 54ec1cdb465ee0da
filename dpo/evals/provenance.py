"""Provenance: what a number was found with, down to the bytes of the weights."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from omegaconf import DictConfig

from dpo.build import model_dir
from dpo.config import as_list
from dpo.digests import file_sha256, text_sha256
from dpo.evals.prompts import Prompt, prompts_sha256
from dpo.tokens import Encoded
from models.lora import ADAPTER_WEIGHTS
from models.sampling import Sampling
from models.template import ChatTemplate
from models.weights import choose_device, choose_dtype, weight_files

Facts = dict[str, str | int | float | None]


def of_code(cfg: DictConfig) -> Facts:
    device = choose_device(cfg.device)
    return {
        "git_commit": git_commit(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(choose_dtype(cfg.bf16, cfg.fp16)).removeprefix("torch."),
    }


def of_policy(cfg: DictConfig) -> Facts:
    return {"model_name_or_path": cfg.model_name_or_path, "adapter_name_or_path": cfg.adapter_name_or_path} | {
        "model_sha256": _weights(cfg.model_name_or_path, cfg.adapter_name_or_path)
    }


def of_reference(cfg: DictConfig) -> Facts:
    model = cfg.ref_model or cfg.model_name_or_path
    return {"ref_model": model, "ref_model_adapters": cfg.ref_model_adapters} | {
        "ref_model_sha256": _weights(model, cfg.ref_model_adapters)
    }


def _weights(model: str, adapter: str | None) -> str:
    """Of the model's weights; with an adapter, of both."""
    base = model_sha256(model_dir(model))
    return text_sha256([base, model_sha256(Path(adapter))]) if adapter else base


def of_data(cfg: DictConfig, prompts: Sequence[Prompt]) -> Facts:
    return {"eval_dataset": ",".join(as_list(cfg.eval_dataset or "world")), "data_sha256": prompts_sha256(prompts)}


def of_rows(cfg: DictConfig, rows: Sequence[Encoded]) -> Facts:
    """Of rows with their responses, in their order, wherever they were read from."""
    said = (json.dumps(asdict(replace(row.example, source=""))) for row in rows)
    return {"eval_dataset": ",".join(as_list(cfg.eval_dataset)), "data_sha256": text_sha256(said)}


def of_template(template: ChatTemplate) -> Facts:
    return {"template_sha256": text_sha256([str(template.source)])}


def of_answers(template: ChatTemplate, sampling: Sampling, max_new_tokens: int, seed: int) -> Facts:
    return of_template(template) | {
        "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
        "min_p": sampling.min_p, "max_new_tokens": max_new_tokens, "seed": seed,
    }  # fmt: skip


def model_id(cfg: DictConfig) -> str:
    """What files of answers call the policy: model_id, or the name of its adapter's or its model's directory."""
    return cfg.model_id or Path(cfg.adapter_name_or_path or cfg.model_name_or_path).name


def model_sha256(directory: Path) -> str:
    """Of the weights' bytes: a model's or an adapter's."""
    adapter = directory / ADAPTER_WEIGHTS
    return file_sha256(adapter) if adapter.is_file() else file_sha256(*weight_files(directory))


def git_commit() -> str | None:
    """Of this code; with `+` where files differ from it, None outside a repository."""
    here = Path(__file__).parent
    try:
        commit, changed = (
            subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")
