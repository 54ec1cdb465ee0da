"""The reference's log-probabilities on disk: computed once, and read by every later run that asks for the same.

    DIR/KEY/NAME-SHA256.safetensors     parts, each named by its own checksum: {row key: (R,) log pi_ref, nats}
    DIR/digests.json                    checksums of weight files, so that a big file is not hashed by every run

KEY stands for what all rows share: the bytes of the reference's weights and config.json (and of its adapter's two
files), the dtype that computes, and NUMERICS_VERSION. A row's key is its token ids: they say all that tokenizer,
template and its arguments, cutoff_len and the row's text can change. Beta, loss, learning rate, seed, batch size and
output directory change none of it, so a sweep over those computes the reference once. What has another key is not
found, so nothing stale is read; new rows are added.

A part is written beside and renamed, under a name of its own, and never changed: jobs that start together add a part
each, and readers read all. One whose checksum is not its name is reported and left alone, and its rows are computed
again.

The values are the live reference's to rounding, which depends on device and batch: in float32 the loss starts at log 2
within 1e-5, in bfloat16 as near as two batches of one model agree. The first margins are rounding too, and no longer
exactly 0, so the first step's rewards/accuracies mean nothing.

Shapes: R response tokens of a row, or of a micro-batch's rows.
"""

import json
import time
import uuid
from collections.abc import Callable, Container, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from dpo.digests import DIGESTS, digest, write_beside
from dpo.objective import to_stream
from dpo.reference import LiveReference, Reference
from dpo.tokens import Encoded
from models.stream import Stream

# To be raised with every change to models/ or dpo/logprobs.py that moves a log-probability by more than rounding, or
# to what a part holds.
NUMERICS_VERSION = 2
# Rows of a part: what a run that is interrupted loses, at most.
PART_ROWS = 4096


def cached_reference(
    cache_dir: Path, files: Sequence[Path], dtype: torch.dtype, rows: Sequence[Encoded],
    build: Callable[[], LiveReference], *, device: torch.device, batch_size: int, loads_model: bool,
) -> "CachedReference":  # fmt: skip
    """The reference of `rows`, read or computed; it knows no other rows. A line says how many were found.

    files: what the reference is read from. build: makes the live one. loads_model: whether that loads a model which the
    run does not hold anyway; it is then called only where a row is missing.
    """
    folder = cache_dir / reference_key(files, dtype, cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {row.key: row for row in rows}
    logps = read_parts(folder, wanted)
    missing = {key: row for key, row in wanted.items() if key not in logps}
    start = time.perf_counter()
    live = build() if missing or not loads_model else None
    if live and missing:
        logps |= _compute(live, missing, folder, device, batch_size)
    seconds = time.perf_counter() - start
    print(
        f"reference cache: {len(wanted) - len(missing)} of {len(wanted)} rows found, {len(missing)} computed in "
        f"{seconds:.1f} s{', the model was not loaded' if loads_model and not missing else ''} ({cache_dir})"
    )

    return CachedReference(logps, None if loads_model else live)


class CachedReference:
    """The log-probabilities of known rows; `live` is their model where the run holds it anyway."""

    def __init__(self, logps: Mapping[str, Tensor], live: LiveReference | None):
        self.logps, self.live = logps, live

    def __call__(self, stream: Stream, rows: Sequence[Encoded]) -> Tensor:
        return torch.cat([self.logps[row.key] for row in rows]).to(stream.target_R.device)


def live_reference(reference: Reference | None) -> LiveReference | None:
    """The reference as a model in memory, where it is one."""
    if isinstance(reference, CachedReference):
        return reference.live
    return reference if isinstance(reference, LiveReference) else None


def _compute(
    live: LiveReference, missing: Mapping[str, Encoded], folder: Path, device: torch.device, batch_size: int
) -> dict[str, Tensor]:
    """{row key: (R,)} of all missing rows, which are written to `folder` part by part."""
    logps: dict[str, Tensor] = {}
    # Longest first: what does not fit into memory is known at once.
    ordered = sorted(missing.items(), key=lambda item: item[1].tokens, reverse=True)
    with tqdm(total=len(ordered), desc="reference", unit="row", disable=None, delay=2, leave=False) as bar:
        for i in range(0, len(ordered), PART_ROWS):
            share = ordered[i : i + PART_ROWS]
            part: dict[str, Tensor] = {}
            for j in range(0, len(share), batch_size):
                keys, rows = zip(*share[j : j + batch_size], strict=True)
                logps_R = live(to_stream(rows, device), rows).cpu()
                lengths = [sum(row.lengths) for row in rows]
                part |= zip(keys, logps_R.split(lengths), strict=True)
                bar.update(len(rows))
            write_part(folder, part)
            logps |= part
    return logps


def reference_key(files: Sequence[Path], dtype: torch.dtype, cache_dir: Path) -> str:
    """A name for everything that the log-probabilities of all rows depend on."""
    names = [[path.name, digest(path, cache_dir / DIGESTS)] for path in files]
    return _sha256(json.dumps([NUMERICS_VERSION, str(dtype), names]).encode())[:32]


def write_part(folder: Path, logps: Mapping[str, Tensor]) -> None:
    """Add {row key: (R,)} to a folder."""
    content = save({key: logps_R.clone() for key, logps_R in logps.items()})  # clone: safetensors refuses views
    # Two jobs that compute the same rows must not write the same file.
    write_beside(folder / f"{uuid.uuid4().hex[:12]}-{_sha256(content)}.safetensors", content)


def read_parts(folder: Path, wanted: Container[str]) -> dict[str, Tensor]:
    """{row key: (R,)} of the wanted rows that the whole parts of a folder hold; a line for each damaged part."""
    logps: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        if path.stem.rpartition("-")[2] == _sha256(content):
            logps |= {key: logps_R for key, logps_R in load(content).items() if key in wanted}
        else:
            print(f"reference cache: {path} is damaged and is not used; remove it")
    return logps


def _sha256(content: bytes) -> str:
    return sha256(content).hexdigest()
