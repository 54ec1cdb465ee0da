"""Weights in and out: safetensors in Hugging Face directories, memory-mapped, strict about names, shapes and dtypes.

Only safetensors and JSON are read; nothing on this path can run code. A tensor is converted to the run's dtype as it is
read, so a checkpoint is in memory once. Left out: pytorch_model.bin (pickle) and quantised formats.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.config import read_model_config
from models.transformer import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a model directory holds besides its weights; carried over whenever a model is written.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


FETCHED = ["*.safetensors", "*.json", "*.jinja"]
NOT_FETCHED = ["consolidated*", "original/*"]  # the same weights once more, in their authors' own format


def resolve_model_dir(name_or_path: str) -> Path:
    """A local directory as it is; any other name is fetched from the Hugging Face hub, safetensors and text only."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name_or_path.startswith(("./", "../", "~")) or name_or_path.count("/") > 1:
        raise ValueError(f"model_name_or_path={name_or_path}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=FETCHED, ignore_patterns=NOT_FETCHED))
    except Exception as error:  # the hub's client raises a family of types: offline, missing, gated, malformed name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"model_name_or_path={name_or_path}: no such directory, and the Hugging Face hub did not give it ({reason})"
        ) from None


def choose_device(device: str) -> torch.device:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device}: this PyTorch sees no CUDA device; pass device=cpu or auto")
    index = device.partition(":")[2]
    if index and not (index.isdigit() and int(index) < torch.cuda.device_count()):
        raise ValueError(f"device={device}: this PyTorch sees {torch.cuda.device_count()} CUDA devices, counted from 0")
    return torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(bf16: bool, fp16: bool) -> torch.dtype:
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def load_model(
    model_dir: Path, *, dtype: torch.dtype, device: torch.device, gradient_checkpointing: bool = False
) -> Transformer:
    """The model of a directory, frozen, in eval mode, its weights in `dtype` on `device`.

    Raises ValueError naming the file and tensor where the weights are missing, unreadable or do not fit config.json.
    """
    config = read_model_config(model_dir)
    with torch.device("meta"):
        model = Transformer(config, dtype, gradient_checkpointing)
    load_weights(model, model_dir, dtype=dtype, device=device)
    return model.eval()


def load_weights(model: Transformer, model_dir: Path, *, dtype: torch.dtype, device: torch.device) -> None:
    """Fill every parameter of `model` from `model_dir`; each parameter is replaced by a frozen one."""
    files = weight_files(model_dir)
    expected = dict(model.named_parameters())
    seen: dict[str, Path] = {}
    # Old checkpoints store rope's constants; tied models may store the one embedding twice. Neither is a parameter.
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tie_word_embeddings else {}
    stored_twice: tuple[Path, Tensor] | None = None
    names = {name for _, name, _ in _tensors(files)}
    for path, name, read in _tensors(files):
        if name in tied and tied[name] in names:
            stored_twice = path, read().to(device=device, dtype=dtype)
            continue
        name = tied.get(name, name)
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if name not in expected:
            raise ValueError(
                f"{path}: unexpected tensor {name}; a {model.config.model_type} of this config has none of that name"
            )
        if name in seen:
            raise ValueError(f"{path}: tensor {name} stands also in {seen[name]}; each may be stored once")
        seen[name] = path
        tensor = read()
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, config.json asks for {tuple(expected[name].shape)}; "
                "are the config and the weights of one model?"
            )
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ValueError(f"{path}: {name} is {tensor.dtype}; expected float32, bfloat16, float16 or float64")
        _assign(model, name, tensor.to(device=device, dtype=dtype))
    if stored_twice and not torch.equal(stored_twice[1], model.head_weight_VD):
        raise ValueError(
            f"{stored_twice[0]}: lm_head.weight differs from model.embed_tokens.weight, but config.json says that they "
            "are one (tie_word_embeddings); set it to false if the checkpoint has a head of its own"
        )
    missing = sorted(expected.keys() - seen.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{model_dir}: tensor {missing[0]}{more} is missing from {', '.join(p.name for p in files)}")


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a directory: those its index names, or the single file."""
    model_dir = Path(model_dir)
    index = model_dir / INDEX
    if not index.is_file():
        if not (model_dir / WEIGHTS).is_file():
            raise ValueError(f"{model_dir}: holds neither {WEIGHTS} nor {INDEX}; only safetensors weights are read")
        return [model_dir / WEIGHTS]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        names = []
    if not names:
        raise ValueError(f"{index}: not a safetensors index (an object with a weight_map of file names)")
    for name in names:
        # An index is untrusted input: a shard must be a plain file name, or it could read anything on the disk.
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise ValueError(f"{index}: shard {name!r} is not a plain file name in the same directory")
        if not (model_dir / name).is_file():
            raise ValueError(f"{index}: shard {name} is named but not there; is the download complete?")
    return [model_dir / name for name in names]


def _tensors(files: list[Path]) -> Iterator[tuple[Path, str, "_Read"]]:
    for path in files:
        try:
            with safe_open(path, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118, a safe_open is no dict
                    yield path, name, _Read(handle, name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


class _Read:
    """Reads one tensor when called, so that names and shapes can be looked at without it."""

    def __init__(self, handle: safe_open, name: str):
        self.handle, self.name = handle, name

    def __call__(self) -> Tensor:
        return self.handle.get_tensor(self.name)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file."""
    return {name: read() for _, name, read in _tensors([path])}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file beside its final name and rename it, so that a reader never sees half of one."""
    beside = path.with_name(path.name + ".tmp")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, beside, metadata={"format": "pt"})
    os.replace(beside, path)


def save_model(model: Transformer, target_dir: Path, *, source_dir: Path) -> None:
    """Write `model` as a Hugging Face directory; config, tokenizer and template files come from source_dir."""
    target_dir = Path(target_dir)
    target_dir.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        if (source_dir / name).is_file() and source_dir.resolve() != target_dir.resolve():
            shutil.copyfile(source_dir / name, target_dir / name)
    write_tensors(target_dir / WEIGHTS, dict(model.named_parameters()))
    # Shards that lay here before are no longer this model's.
    (target_dir / INDEX).unlink(missing_ok=True)
    config = json.loads((target_dir / "config.json").read_text(encoding="utf-8"))
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    (target_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
