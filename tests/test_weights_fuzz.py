"""A mutated model directory is loaded whole or refused in one line that names it; nothing else ever happens.

The plain `pytest` tries 100 mutants. `DPO_FUZZ=2000 pytest -s tests/test_weights_fuzz.py` tries 2,000 and prints how
many were loaded and refused, the seconds of the slowest and the memory that all of them needed.
"""

import json
import os
import resource
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from models.config import parse_model_config, read_model_config
from models.transformer import Transformer
from models.weights import load_model, read_tensors

CONFIG = {
    "model_type": "qwen2", "vocab_size": 29, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "rms_norm_eps": 1e-6, "sliding_window": 9,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
INDEX, SHARDS = "model.safetensors.index.json", ("a.safetensors", "b.safetensors")
FILES = ("config.json", INDEX, *SHARDS)
VALUES = [
    0, -1, 1, 2, 3, 4, 6, 13, 10**5, 10**9, 2**31, 2**62, 2**63, 2**64, 10**30, 10**400, -(2**63), 0.5, 2.0, 1e308,
    float("inf"), float("nan"), True, False, None, "", "F64", "F16", "I8", "F4", "F8_E4M3", "qwen3", "llama", "mistral",
    "two\nlines", "\0", "\ud800", "\u2028é漢", "b.safetensors", "..", "x" * 5000, [], [1], [-1], [2**62, 2**62],
    [0, 2**63], [1] * 1000, {}, {"": {}}, {"rope_type": "llama3"},
]  # fmt: skip


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    """Two shards, their index and a config with many keys."""
    where = tmp_path_factory.mktemp("healthy")
    (where / "config.json").write_text(json.dumps(CONFIG))
    with torch.device("meta"):
        shapes = shapes_of(Transformer(parse_model_config(CONFIG), torch.float32))
    shard_of = {name: SHARDS[i % 2] for i, name in enumerate(shapes)}
    for shard in SHARDS:
        tensors = {name: torch.ones(shape) for name, shape in shapes.items() if shard_of[name] == shard}
        save_file(tensors, where / shard, metadata={"format": "pt"})
    (where / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": shard_of}))
    return where


# --- mutations: of the bytes of a file, or of the JSON in it; two numbers choose where and what ---


def flip(content: bytes, where: int, what: int) -> bytes:
    return content[:where] + bytes([what % 256]) + content[where + 1 :]


def truncate(content: bytes, where: int, what: int) -> bytes:
    return content[:where]


def delete(content: bytes, where: int, what: int) -> bytes:
    return content[:where] + content[where + what % 9 + 1 :]


def insert(content: bytes, where: int, what: int) -> bytes:
    inserted = (b"\0", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b'"', b",", b"\xff", b" " * 4096)
    return content[:where] + inserted[what % len(inserted)] + content[where:]


def repeat(content: bytes, where: int, what: int) -> bytes:
    return content[: where + what % 99] + content[where:]


def change_value(tree: dict, where: int, what: int) -> None:
    holder, key = places(tree)[where % len(places(tree))]
    holder[key] = VALUES[what % len(VALUES)]


def remove_key(tree: dict, where: int, what: int) -> None:
    holder, key = places(tree)[where % len(places(tree))]
    del holder[key]


def swap_values(tree: dict, where: int, what: int) -> None:
    (a, i), (b, j) = places(tree)[where % len(places(tree))], places(tree)[what % len(places(tree))]
    a[i], b[j] = b[j], a[i]


def rename_key(tree: dict, where: int, what: int) -> None:
    named = [(holder, key) for holder, key in places(tree) if isinstance(holder, dict)]
    holder, key = named[where % len(named)]
    names = [key for _, key in named] + ["x", "two\nlines", "lm_head.bias", "漢" * 5000]
    holder[names[what % len(names)]] = holder.pop(key)


def double_key(tree: dict, where: int, what: int) -> str:
    """The text of `tree` with one of its keys standing twice, under two values."""
    key = list(tree)[where % len(tree)]
    other = list(tree.values())[what % len(tree)]
    return "{" + json.dumps(key) + ":" + json.dumps(other) + "," + json.dumps(tree)[1:]


ON_BYTES = (flip, truncate, delete, insert, repeat)
ON_JSON = (change_value, remove_key, swap_values, rename_key, double_key)


def places(tree: object) -> list[tuple]:
    """Every (container, key) of a JSON value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in [(tree, key), *places(value)]]


def mutate(path: Path, how, where: int, what: int) -> None:
    content = path.read_bytes()
    if how in ON_BYTES:
        path.write_bytes(how(content, where % (len(content) + 1), what))
        return
    length = int.from_bytes(content[:8], "little") if path.name in SHARDS else len(content)
    start = 8 if path.name in SHARDS else 0
    try:
        tree = json.loads(content[start : start + length])
        text = (how(tree, where, what) or json.dumps(tree)).encode()
    except (ValueError, RecursionError, LookupError, ArithmeticError, AttributeError, TypeError):
        return  # an earlier mutation left no JSON to change
    prefix = len(text).to_bytes(8, "little") if start else b""
    path.write_bytes(prefix + text + content[start + length :])


def shapes_of(model: Transformer) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters()}


MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(FILES), st.sampled_from(ON_BYTES + ON_JSON), st.integers(0, 1 << 16), st.integers(0, 1 << 16)
    ),
    min_size=1,
    max_size=2,
)


def test_a_mutated_directory_is_loaded_whole_or_refused_in_one_line_that_names_it(healthy, tmp_path):
    outcomes, seconds, before = Counter(), [], peak_mb()

    @settings(max_examples=int(os.environ.get("DPO_FUZZ", 100)), derandomize=True, deadline=None)
    @given(mutations=MUTATIONS)
    def try_mutant(mutations):
        for name in FILES:
            shutil.copyfile(healthy / name, tmp_path / name)
        for name, how, where, what in mutations:
            mutate(tmp_path / name, how, where, what)
        started = time.process_time()
        model = unless_refused(load, tmp_path)
        for shard in SHARDS:
            unless_refused(read_tensors, tmp_path / shard)
        seconds.append(time.process_time() - started)
        assert seconds[-1] < 1
        outcomes["refused" if model is None else "loaded"] += 1
        if model is not None:
            with torch.device("meta"):
                assert shapes_of(model) == shapes_of(Transformer(read_model_config(tmp_path), torch.float32))
            assert all(parameter.isfinite().all() for parameter in model.parameters())

    try_mutant()
    print(f"{dict(outcomes)}, slowest {max(seconds):.3f} s, {peak_mb() - before} MB in all")
    assert min(outcomes["loaded"], outcomes["refused"]) > 10
    assert peak_mb() - before < 200


def load(where: Path) -> Transformer:
    return load_model(where, dtype=torch.float32, device=torch.device("cpu"))


def unless_refused(read, where: Path):
    """What `read` makes of a place; None where it raises a ValueError as it should be."""
    try:
        return read(where)
    except ValueError as error:
        assert str(error).startswith(str(where)) and len(str(error).splitlines()) == 1, error
        assert len(str(error)) < 1000
        return None


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
