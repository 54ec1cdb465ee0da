"""Weights in and out: safetensors in Hugging Face directories, memory-mapped, strict about names, shapes and dtypes.

Only safetensors and JSON are read; nothing on this path can run code. A tensor is converted to the run's dtype as it is
read, so a checkpoint is in memory once. A file may come from a stranger: what it claims is bounded before it is acted
on, so that a bad one costs one error, not what it asks for. Left out: pytorch_model.bin (pickle) and quantised formats.
"""

import difflib
import functools
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from models.config import one_line, read_json, read_model_config
from models.transformer import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.tmp)?")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Most bytes of header that are read. A tensor's entry takes about 130, so Qwen3-235B's 37,000 tensors take 5 MB; an
# optimiser's file has three tensors for each that is trained.
MODEL_HEADERS, FILE_HEADER = 8 << 20, 32 << 20
# A config may ask for so many tensors of one shape beyond those stored, and the first is named; beyond, none is built.
MISSING_NAMED = 100
# What a model directory holds besides its weights and config.json; carried over whenever a model is written.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip

# The built-in world: its model, and beside it the data that dpo trains on.
WORLD = Path(__file__).parent.parent / "experiments" / "world"
FETCHED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
NOT_FETCHED = ["consolidated*", "original/*"]  # the same weights once more, in their authors' own format


def resolve_model_dir(name_or_path: str) -> Path:
    """`world` is the built-in model, a local directory stands for itself, and any other name is fetched from the hub.

    Of what the Hugging Face hub has, safetensors and text only.
    """
    if name_or_path == "world":
        return WORLD / "model"
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not any((path / name).is_file() for name in (WEIGHTS, INDEX)):
            raise ValueError(
                f"model_name_or_path={name_or_path}: is an adapter; pass adapter_name_or_path={name_or_path} and its "
                "base as model_name_or_path"
            )
        return path
    if path.is_absolute() or name_or_path.startswith(("./", "../", "~")) or name_or_path.count("/") > 1:
        raise ValueError(f"model_name_or_path={name_or_path}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=FETCHED, ignore_patterns=NOT_FETCHED))
    except Exception as error:  # the hub's client raises a family of types: offline, missing, gated, malformed name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "; did you mean world?" if difflib.get_close_matches(name_or_path, ["world"], cutoff=0.8) else ""
        raise ValueError(
            f"model_name_or_path={name_or_path}: no such directory, and the Hugging Face hub did not give it ({reason})"
            + hint
        ) from None


def choose_device(device: str) -> torch.device:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device}: this PyTorch sees no CUDA device; pass device=cpu or auto")
    index = device.partition(":")[2]
    if device.startswith("cpu") and index:
        raise ValueError(f"device={device}: the CPU is one device; pass device=cpu")
    if index and not (index.isdigit() and int(index) < torch.cuda.device_count()):
        raise ValueError(f"device={device}: this PyTorch sees {torch.cuda.device_count()} CUDA devices, counted from 0")
    return torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(bf16: bool, fp16: bool) -> torch.dtype:
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def load_model(
    model_dir: Path, *, dtype: torch.dtype, device: torch.device, gradient_checkpointing: bool = False
) -> Transformer:
    """The model of a directory, frozen, in eval mode, its weights in `dtype` on `device`.

    Raises ValueError naming the file and tensor where the weights are missing, unreadable, not finite or do not fit
    config.json. Names, shapes and dtypes are compared from the files' headers before the first tensor is read.
    """
    config = read_model_config(model_dir)
    headers = _read_headers(weight_files(model_dir), MODEL_HEADERS)
    # Old checkpoints store rope's constants, which are no parameters.
    stored = [tensor for tensor in headers if not tensor.name.endswith("rotary_emb.inv_freq")]
    with _refuse_more_than(stored, model_dir), torch.device("meta"):
        model = Transformer(config, dtype, gradient_checkpointing)
    _refuse_misfits(model, stored, model_dir)
    tied_head: StoredTensor | None = None
    for tensor in stored:
        if tensor.name == HEAD and config.tie_word_embeddings:
            tied_head = tensor
        else:
            _assign(model, tensor.name, tensor.read(dtype, device))
    if tied_head:
        weight_VD = tied_head.read(dtype, device)
        if model.head_weight_VD.is_meta:
            _assign(model, EMBEDDING, weight_VD)
        elif not torch.equal(weight_VD, model.head_weight_VD):
            raise ValueError(
                f"{tied_head.path}: {HEAD} differs from {EMBEDDING}, but config.json says that they are one "
                "(tie_word_embeddings); set it to false if the checkpoint has a head of its own"
            )
    return model.eval()


@contextmanager
def _refuse_more_than(stored: list["StoredTensor"], model_dir: Path) -> Iterator[None]:
    """Building a model of far more tensors than are stored raises ValueError: a config can ask for 10^9 layers."""
    path = model_dir / "config.json"
    left = Counter(tensor.shape for tensor in stored)

    def take(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        left[parameter.shape] -= 1
        if left[parameter.shape] < -MISSING_NAMED:
            raise ValueError(
                f"{path}: asks for over {MISSING_NAMED} tensors of shape {tuple(parameter.shape)} more than are "
                "stored; are the config and the weights of one model?"
            )

    hook = register_module_parameter_registration_hook(take)
    try:
        yield
    except RuntimeError as error:  # a size that 64 bits cannot count
        raise ValueError(f"{path}: asks for a tensor that cannot exist ({one_line(error)})") from None
    finally:
        hook.remove()


def _refuse_misfits(model: Transformer, stored: list["StoredTensor"], model_dir: Path) -> None:
    """ValueError unless every parameter is stored once, in its shape and as a floating-point number."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    missing = expected.keys() - {tensor.name for tensor in stored}
    if model.config.tie_word_embeddings:  # the one embedding may be stored under either name, or under both
        expected[HEAD] = expected[EMBEDDING]
        missing -= {EMBEDDING} if any(tensor.name == HEAD for tensor in stored) else set()
    family, seen = model.config.model_type, dict[str, Path]()
    for tensor in stored:
        path, name = tensor.path, tensor.name
        if name not in expected:
            raise ValueError(f"{path}: unexpected tensor {name!r:.100}; a {family} of this config has none so named")
        if name in seen:
            raise ValueError(f"{path}: tensor {name} stands also in {seen[name]}; each may be stored once")
        seen[name] = path
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{path}: {name} has shape {tensor.shape!s:.100}, config.json asks for {expected[name]}; "
                "are the config and the weights of one model?"
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{path}: {name} is {tensor.dtype}; expected one of {', '.join(FLOATS)}")
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        files = ", ".join(path.name for path in weight_files(model_dir))
        raise ValueError(f"{model_dir}: tensor {min(missing)}{more} is missing from {files:.200}")


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a directory: those its index names, or the single file.

    Links are followed, for the Hugging Face cache is made of them; what is no regular file is never opened.
    """
    model_dir = Path(model_dir)
    index = model_dir / INDEX
    if not index.is_file():
        if not (model_dir / WEIGHTS).is_file():
            raise ValueError(f"{model_dir}: holds neither {WEIGHTS} nor {INDEX}; only safetensors weights are read")
        return [model_dir / WEIGHTS]
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        names = []
    if not names:
        raise ValueError(f"{index}: not a safetensors index (an object with a weight_map of file names)")
    for name in names:
        # An index is untrusted input: a shard must be a plain file name, or it could read anything on the disk.
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise ValueError(f"{index}: shard {name!r:.100} is not a plain file name in the same directory")
        if not os.path.isfile(model_dir / name):
            raise ValueError(f"{index}: shard {name!r:.100} is named but no file there; is the download complete?")
    return [model_dir / name for name in names]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, as its header describes it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """in safetensors' words: BF16, I64, ..."""
    handle: safe_open

    def read(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """The tensor, memory-mapped where neither dtype nor device changes; ValueError where it is not finite."""
        try:
            tensor = self.handle.get_tensor(self.name).to(dtype=dtype, device=device)
        except (SafetensorError, TypeError) as error:
            raise _unreadable(self.path, error) from None
        # The extremes tell in one pass and without a copy: NaN passes through both. (8-bit floats have no extremes.)
        if self.dtype in FLOATS and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{self.path}: {self.name!r:.100} has values that are not finite as {tensor.dtype}")
        return tensor


def _read_headers(files: list[Path], limit: int) -> list[StoredTensor]:
    """What the headers of `files`, of at most `limit` bytes together, say of their tensors; none is read."""
    stored: list[StoredTensor] = []
    length = 0
    for path in files:
        try:
            if not path.is_file():
                raise OSError("no such file")  # a pipe or a device would be waited for
            with path.open("rb") as file:
                length += int.from_bytes(file.read(8), "little")
            if length > limit:
                raise OSError(f"headers of {length} bytes, at most {limit} are read")
            handle = safe_open(path, framework="pt")
            for name in handle.keys():  # noqa: SIM118, a safe_open is no dict
                view = handle.get_slice(name)
                stored.append(StoredTensor(path, name, tuple(view.get_shape()), view.get_dtype(), handle))
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from None
    return stored


def stored_dtype(files: list[Path]) -> torch.dtype:
    """The dtype that holds every tensor of `files` as it is stored; config.json may say another."""
    names = {tensor.dtype for tensor in _read_headers(files, MODEL_HEADERS)} & FLOATS.keys()
    if not names:
        raise ValueError(f"{files[0]}: holds no tensor of {', '.join(FLOATS)}; is it a model's?")
    return functools.reduce(torch.promote_types, [FLOATS[name] for name in names])


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a readable safetensors file ({one_line(error)})")


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file; ValueError where it is unreadable or a number in it is not finite."""
    return {tensor.name: tensor.read() for tensor in _read_headers([Path(path)], FILE_HEADER)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file beside its final name and rename it, so that a reader never sees half of one."""
    beside = path.with_name(path.name + ".tmp")
    beside.touch()
    mode = beside.stat().st_mode  # safetensors makes files that nobody but their owner can read
    content = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        save_file(content, beside, metadata={"format": "pt"})
    except SafetensorError as error:  # its word for a disk that is full
        raise OSError(f"{beside}: {error}") from None
    beside.chmod(mode)
    os.replace(beside, path)


def save_model(model: Transformer, target_dir: Path, *, source_dir: Path, shard_bytes: float = math.inf) -> None:
    """Write `model` as a Hugging Face directory, its weights in one file or, above shard_bytes, in several.

    Config, tokenizer and template files come from source_dir; a model that lay in target_dir is replaced. config.json
    goes first and comes last: a directory without it is no model, so a write that was cut short is never taken for one.
    """
    target_dir = Path(target_dir)
    target_dir.mkdir(parents=True, exist_ok=True)
    config = json.loads((source_dir / "config.json").read_text(encoding="utf-8"))
    config["dtype" if "dtype" in config else "torch_dtype"] = str(model.head_weight_VD.dtype).removeprefix("torch.")
    (target_dir / "config.json").unlink(missing_ok=True)

    parts = shards(dict(model.named_parameters()), shard_bytes)
    count = len(parts)
    names = [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, tensors in zip(names, parts, strict=True):
        write_tensors(target_dir / name, tensors)
    for path in target_dir.iterdir():
        if OURS.fullmatch(path.name) and path.name not in names:
            path.unlink()  # an earlier model's, its index, or half a file of a write that was cut short
    if count > 1:
        total = sum(tensor.nbytes for tensors in parts for tensor in tensors.values())
        weight_map = {tensor: name for name, tensors in zip(names, parts, strict=True) for tensor in tensors}
        _write_json(target_dir / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if source_dir.resolve() != target_dir.resolve():
        for name in COMPANIONS:
            (target_dir / name).unlink(missing_ok=True)
            if (source_dir / name).is_file():
                shutil.copyfile(source_dir / name, target_dir / name)
    _write_json(target_dir / "config.json", config)


def shards(tensors: Mapping[str, Tensor], shard_bytes: float) -> list[dict[str, Tensor]]:
    """`tensors` in order, cut so that no part exceeds shard_bytes; a larger tensor has a part of its own."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > shard_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    return parts


def _write_json(path: Path, content: dict) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)
