"""Fold an adapter into its base and write a model: `python -m models.export key=value ...` (keys: conf/export.yaml).

    W <- W + scaling B A, in float32, rounded once to the dtype written

The directory is what transformers, vLLM and llama.cpp's convert_hf_to_gguf.py read: the base's config.json (its
`architectures` name the model class) with its dtype corrected, the base's tokenizer and template byte for byte, and
safetensors under the checkpoint's names, a tied embedding once.

bfloat16 has 8 bits: where training moved W by less than half of the last one, rounding undoes it. How much of the
adapter that costs is measured and printed: KL(adapted || written) per token, beside KL(adapted || base), on a fixed
text, computed in float32, so that only the weights differ. Left out: quantising, uploading, several adapters at once.

Shapes: T tokens, D width, V vocabulary.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig
from torch import Tensor

from models.command import ANY, one_line_errors, prepare_command_line, refuse_unset
from models.config import read_json, read_model_config
from models.lora import ADAPTER_CONFIG, load_adapter, merge, read_adapter_config
from models.stream import pack
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from models.weights import load_model, resolve_model_dir, save_model, stored_dtype, weight_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARE_TO_WARN_OF = 0.1
# What the cost of rounding is measured on.
PROBE = """\
Why is the sky blue? Air scatters blue light, of 450 nanometres, about six times as much as red light, of 700 \
nanometres, because the effect grows with the fourth power of the frequency: (700 / 450) ** 4 = 5.86. A good answer is \
short, true and kind; if you are not sure of it, say so, and say what would settle the question."""


@dataclass
class ExportConfig:
    """Every key of models.export; see conf/export.yaml for what each means."""

    # LLaMA-Factory's export files have these too.
    WITHOUT_EFFECT: ClassVar[dict[str, Any]] = {
        "export_device": ANY, "export_legacy_format": False, "export_hub_model_id": None,
        "export_quantization_bit": None, "template": ANY, "finetuning_type": ANY, "stage": ANY,
    }  # fmt: skip

    model_name_or_path: str = MISSING
    adapter_name_or_path: str | None = MISSING
    export_dir: str = MISSING
    export_size: float = MISSING
    infer_dtype: str = MISSING
    overwrite_output_dir: bool = MISSING


ConfigStore.instance().store(name="export_schema", node=ExportConfig)


@hydra.main(version_base="1.3", config_path="../conf", config_name="export")
def main(cfg: DictConfig) -> None:
    with one_line_errors():
        export(cfg)


def export(cfg: DictConfig) -> None:
    """Merge, measure, write. What can be wrong is looked at before anything is written."""
    check(cfg)
    source, target = resolve_model_dir(cfg.model_name_or_path), Path(cfg.export_dir).expanduser()
    check_target(target, source, overwrite=cfg.overwrite_output_dir)
    read_model_config(source)
    stored = stored_dtype(weight_files(source))
    if cfg.adapter_name_or_path:
        read_adapter_config(Path(cfg.adapter_name_or_path).expanduser())
    dtype = dtype_to_write(source, cfg.infer_dtype)
    (probe_ids,) = Tokenizer(source).encode([PROBE])

    # In a dtype that holds what is stored and what is written: nothing is rounded before the sum is.
    model = load_model(source, dtype=torch.promote_types(stored, dtype), device=torch.device("cpu"))
    model.dtype = torch.float32
    base_TV = log_probabilities(model, probe_ids)
    if cfg.adapter_name_or_path:
        load_adapter(model, Path(cfg.adapter_name_or_path).expanduser(), dropout=0.0)
    adapted_TV = log_probabilities(model, probe_ids)
    merge(model)
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(
                f"infer_dtype={cfg.infer_dtype}: {name} is not finite in {name_of(dtype)}; float16 ends at 65504, so "
                "choose another, and if that is no help the base or the adapter is broken"
            )
    cost = mean_kl(adapted_TV, log_probabilities(model, probe_ids))
    print(describe(cost, mean_kl(adapted_TV, base_TV), name_of(dtype), len(probe_ids)))
    save_model(model, target, source_dir=source, shard_bytes=cfg.export_size * 10**9)
    files = weight_files(target)
    size = sum(path.stat().st_size for path in files)
    print(f"export: {target} ({size_of(size)} of weights in {len(files)} file{'s' if len(files) > 1 else ''})")


def check(cfg: DictConfig) -> None:
    refuse_unset(cfg)
    if not cfg.export_dir:
        raise ValueError("export_dir='': name a directory")
    if not 0 < cfg.export_size < math.inf:
        raise ValueError(f"export_size={cfg.export_size}: must be above 0")
    if cfg.infer_dtype not in ("auto", *DTYPES):
        raise ValueError(f"infer_dtype={cfg.infer_dtype}: expected one of auto, {', '.join(DTYPES)}")


def check_target(target: Path, source: Path, *, overwrite: bool) -> None:
    """ValueError where writing a model into `target` would destroy one, or make another thing of what lies there."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"export_dir={target}: is a file; name a directory")
    if target.resolve() == source.resolve():
        raise ValueError(f"export_dir={target}: is model_name_or_path itself, which is never written to; name another")
    if (target / ADAPTER_CONFIG).is_file():
        # transformers and PEFT apply an adapter that lies beside a model, here a second time.
        raise ValueError(f"export_dir={target}: holds an adapter, which readers would add once more; name another")
    if not overwrite and ((target / "config.json").exists() or any(target.glob("model*.safetensors*"))):
        raise ValueError(f"export_dir={target}: holds a model already; name another, or pass overwrite_output_dir=true")


def dtype_to_write(source: Path, infer_dtype: str) -> torch.dtype:
    """infer_dtype, or what the base's config.json says."""
    config = read_json(source / "config.json")
    name = config.get("dtype", config.get("torch_dtype")) if infer_dtype == "auto" else infer_dtype
    if str(name) not in DTYPES:
        raise ValueError(
            f"infer_dtype=auto: {source / 'config.json'} says dtype={name!r}; name one of {', '.join(DTYPES)}"
        )
    return DTYPES[str(name)]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def size_of(count: int) -> str:
    """Bytes in the largest of GB, MB and kB that there is one of."""
    unit, factor = next(((u, f) for u, f in (("GB", 10**9), ("MB", 10**6)) if count >= f), ("kB", 10**3))
    return f"{count / factor:.2f} {unit}"


def describe(cost: float, effect: float, dtype: str, tokens: int) -> str:
    """The measurement in a line: KL(adapted || written), and its share of KL(adapted || base)."""
    share = ""
    if effect:
        part = f"{cost / effect:.1%}" if cost / effect >= 0.0005 else "less than 0.1%"
        share = f", {part} of the {effect:.1e} that the adapter does"
    line = f"rounding to {dtype} costs {cost:.1e} nats per token{share} (KL over {tokens} tokens of text)"
    if effect and cost > SHARE_TO_WARN_OF * effect:
        line = f"warning: {line}; infer_dtype=float32 keeps all of it, and so does serving the adapter unmerged"
    return line


@torch.no_grad()
def log_probabilities(model: Transformer, input_ids: list[int]) -> Tensor:
    """(T, V) log pi(. | input_ids[: t + 1]), in float64: a KL of 1e-10 is not lost to rounding."""
    hidden_TD = model(pack([input_ids], [[]]))
    logits_TV = hidden_TD @ model.head_weight_VD.to(hidden_TD.dtype).T
    return logits_TV.double().log_softmax(-1)


def mean_kl(p_TV: Tensor, q_TV: Tensor) -> float:
    """KL(p || q) in nats, the mean over tokens."""
    return float((p_TV.exp() * (p_TV - q_TV)).sum(-1).mean())


if __name__ == "__main__":
    prepare_command_line(ExportConfig)
    main()
