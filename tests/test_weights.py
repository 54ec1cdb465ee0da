"""Weights are read strictly, whatever their files, and written as transformers reads them."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import models.weights
from models.stream import pack
from models.transformer import Transformer
from models.weights import load_model, read_tensors, resolve_model_dir, save_model, weight_files, write_tensors

SIZES = {
    "vocab_size": 29, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6,
}  # fmt: skip
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
IDS = [3, 1, 28, 7, 7]


@pytest.fixture
def untied(tmp_path) -> Path:
    return save(tmp_path / "untied", LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)))


@pytest.fixture
def tied(tmp_path) -> Path:
    return save(tmp_path / "tied", Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)))


def save(where: Path, model: torch.nn.Module, **options) -> Path:
    model.save_pretrained(where, **options)
    return where


def load(where: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    return load_model(where, dtype=dtype, device=torch.device("cpu"))


def parameters(where: Path) -> dict[str, Tensor]:
    return dict(load(where).named_parameters())


def edit(where: Path, changes: dict[str, Tensor | None]) -> None:
    """Change, add or (with None) remove tensors of a directory's single file."""
    tensors = load_file(where / "model.safetensors") | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, where / "model.safetensors")


@torch.no_grad()
def logits(model: Transformer) -> Tensor:
    return model(pack([IDS], [[]])) @ model.head_weight_VD.to(model.dtype).T


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- reading ---


def test_every_parameter_is_the_stored_tensor_frozen_and_in_eval_mode(untied):
    model = load(untied)
    assert_same(dict(model.named_parameters()), load_file(untied / "model.safetensors"))
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_shards_are_read_as_one_file(untied):
    theirs = AutoModelForCausalLM.from_pretrained(untied)
    sharded = save(untied.with_name("sharded"), theirs, max_shard_size="4KB")
    assert len(weight_files(sharded)) > 2
    assert not (sharded / "model.safetensors").exists()
    assert_same(parameters(sharded), parameters(untied))


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_stored_dtype_becomes_the_dtype_of_the_run(untied, stored, dtype):
    tensors = {name: tensor.to(stored) for name, tensor in load_file(untied / "model.safetensors").items()}
    save_file(tensors, untied / "model.safetensors")
    model = load(untied, dtype)
    assert_same(dict(model.named_parameters()), {name: tensor.to(dtype) for name, tensor in tensors.items()})
    assert logits(model).dtype == dtype


@pytest.mark.parametrize("names", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)])
def test_a_tied_embedding_may_be_stored_under_either_name_or_both(tied, names):
    embedding = load_file(tied / "model.safetensors")[EMBEDDING]
    expected = logits(load(tied))
    edit(tied, {name: embedding.clone() if name in names else None for name in (EMBEDDING, HEAD)})
    assert torch.equal(logits(load(tied)), expected)


def test_a_tied_checkpoint_with_two_different_embeddings_is_refused(tied):
    """transformers keeps both, against the config; to take one of them silently would be another model."""
    edit(tied, {HEAD: load_file(tied / "model.safetensors")[EMBEDDING] + 1})
    theirs = dict(AutoModelForCausalLM.from_pretrained(tied).named_parameters())
    assert not torch.equal(theirs[EMBEDDING], theirs[HEAD])
    with pytest.raises(ValueError, match=rf"{HEAD}.*tie_word_embeddings"):
        load(tied)


def test_stored_rope_constants_are_no_parameters(untied):
    expected = parameters(untied)
    edit(untied, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})
    assert_same(parameters(untied), expected)


# --- refusals ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({DOWN: None}, rf"{DOWN} is missing from model\.safetensors$"),
        ({DOWN: None, "model.norm.weight": None}, rf"{DOWN} and 1 more is missing"),
        ({HEAD: None}, "lm_head.weight is missing"),
        ({"model.layers.2.mlp.bias": torch.ones(2)}, "unexpected tensor 'model.layers.2.mlp.bias'; a llama of this"),
        ({"two\nlines": torch.ones(2)}, r"unexpected tensor 'two\\nlines'"),
        ({DOWN: torch.ones(20, 16)}, rf"{DOWN} has shape \(20, 16\), config.json asks for \(16, 20\)"),
        ({DOWN: torch.ones(16, 20, dtype=torch.int64)}, rf"{DOWN} is I64; expected one of F64, F32, F16, BF16"),
        ({DOWN: torch.ones(16, 20, dtype=torch.bool)}, rf"{DOWN} is BOOL"),
        ({DOWN: torch.ones(16, 20).to(torch.float8_e4m3fn)}, rf"{DOWN} is F8_E4M3"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_file_and_name_before_any_is_read(
    untied, changes, message, monkeypatch
):
    edit(untied, changes)
    monkeypatch.setattr(models.weights.StoredTensor, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match=message) as refused:
        load(untied)
    assert str(refused.value).startswith(str(untied))


def test_a_tied_model_stored_without_its_embedding_is_refused(tied):
    edit(tied, {EMBEDDING: None})
    with pytest.raises(ValueError, match=f"{EMBEDDING} is missing"):
        load(tied)


def test_a_tensor_stored_in_two_shards_is_refused_by_both_files(untied):
    shutil.copy(untied / "model.safetensors", untied / "a.safetensors")
    (untied / "model.safetensors").rename(untied / "b.safetensors")
    write_index(untied, {"x": "a.safetensors", "y": "b.safetensors"})
    with pytest.raises(ValueError, match=r"b\.safetensors: tensor .* stands also in .*a\.safetensors"):
        load(untied)


def write_index(where: Path, weight_map: object) -> None:
    (where / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "..\\a", "..", "", 7])
def test_a_shard_outside_the_directory_is_refused(untied, shard):
    shutil.copy(untied / "model.safetensors", untied.parent / "outside.safetensors")
    write_index(untied, {"x": shard})
    with pytest.raises(ValueError, match=r"index\.json: shard .* is not a plain file name") as refused:
        load(untied)
    assert repr(shard) in str(refused.value)


def test_a_missing_shard_is_refused_by_name(untied):
    write_index(untied, {"x": "model.safetensors", "y": "model-00002.safetensors"})
    with pytest.raises(ValueError, match=r"index\.json: shard 'model-00002\.safetensors' is named but no file there"):
        load(untied)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b"{}", b'{"weight_map": 3}', b'{"weight_map": {"x": ["y"]}}', b'{"weight_map": {}}'],
)
def test_a_garbage_index_is_refused(untied, content):
    (untied / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: not (valid JSON|a safetensors index)"):
        load(untied)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_refused(untied, share):
    path = untied / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        load(untied)


def test_a_pickle_is_not_read(untied):
    tensors = load_file(untied / "model.safetensors")
    (untied / "model.safetensors").unlink()
    torch.save(tensors, untied / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor .*; only safetensors weights are read"):
        load(untied)
    torch.save(tensors, untied / "model.safetensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load(untied)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_by_file_and_tensor(untied, bad):
    down = load_file(untied / "model.safetensors")[DOWN]
    down[-1, -1] = bad
    edit(untied, {DOWN: down})
    message = rf"model\.safetensors: '{DOWN}' has values that are not finite as torch"
    with pytest.raises(ValueError, match=message):
        load(untied)
    with pytest.raises(ValueError, match=message):
        read_tensors(untied / "model.safetensors")


def test_a_number_that_the_dtype_of_the_run_cannot_hold_is_refused(untied):
    """65520 is the least that float16 rounds to infinity."""
    edit(untied, {DOWN: torch.full((16, 20), 65519.0)})
    load(untied, torch.float16)
    edit(untied, {DOWN: torch.full((16, 20), 65520.0)})
    with pytest.raises(ValueError, match=rf"{DOWN}' has values that are not finite as torch.float16"):
        load(untied, torch.float16)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_opened_is_refused_by_name(untied, name, monkeypatch):
    really_open = Path.open

    def refuse(path, *args, **options):
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return really_open(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=rf"{name}: not .* \(.*Permission denied\)"):
        load(untied)


def test_links_are_followed_as_in_the_cache_of_hugging_face(untied, tmp_path):
    """There every file of a snapshot is a link into a directory of blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1234"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(untied / name, blobs / f"hash-of-{name}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"hash-of-{name}")
    write_index(snapshot, {"x": "model.safetensors"})
    assert_same(parameters(snapshot), parameters(untied))


# Loads every directory (or reads every file) that it is given, one after the other in one process, and prints how each
# ended, its seconds of computing, and by how many MB the largest memory of the process grew.
ATTEMPTS = """
import json, sys, time, torch
from pathlib import Path
from models.weights import load_model, read_tensors

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024

for where in map(Path, sys.argv[1:]):
    before, started = peak(), time.process_time()
    try:
        if where.is_dir():
            load_model(where, dtype=torch.float32, device=torch.device("cpu"))
        else:
            read_tensors(where)
        outcome = "loaded"
    except ValueError as error:
        outcome = str(error)
    except BaseException as error:
        outcome = repr(error)
    print(json.dumps([outcome, time.process_time() - started, peak() - before]), flush=True)
"""


def attempt(places: list[Path]) -> list[tuple[str, float, int]]:
    """(outcome, seconds, MB) of ATTEMPTS at each place; a process of its own, so that no other memory is counted."""
    command = [sys.executable, "-c", ATTEMPTS, *map(str, places)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, cwd=root)
    return [(outcome, seconds, grown) for outcome, seconds, grown in map(json.loads, done.stdout.splitlines())]


def config(**changes):
    def apply(where: Path) -> None:
        (where / "config.json").write_text(json.dumps(json.loads((where / "config.json").read_text()) | changes))

    return apply


def file(name: str, content: bytes, zeros: int = 0):
    """A file of `content`, continued by a hole of `zeros` bytes."""

    def apply(where: Path) -> None:
        (where / name).write_bytes(content)
        os.truncate(where / name, len(content) + zeros)

    return apply


def header(length: int, text: bytes = b"", data: int = 0):
    return file("model.safetensors", length.to_bytes(8, "little") + text, data)


def shard(name: str, make=lambda path: None):
    def apply(where: Path) -> None:
        write_index(where, {"x": name})
        make(where / name)

    return apply


def entries(count: int) -> bytes:
    """A header of `count` tensors without elements."""
    one = '"n%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(one % i for i in range(count)) + "}").encode()


def both(*changes):
    return lambda where: [change(where) for change in changes]


MANY, MILLION = entries(50_000), entries(1_000_000)
BEYOND = b'{"n":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}'
SIX_BITS = b'{"n":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
HOSTILE = {
    "a-billion-layers": (config(num_hidden_layers=10**9), r"config\.json: asks for over 100 tensors of shape"),
    "a-billion-wide": (config(hidden_size=10**9), r"has shape .*, config\.json asks for .*1000000000"),
    "a-trillion-tokens": (config(vocab_size=10**12), r"vocab_size=1000000000000: .*below 2\^31"),
    "a-billion-tokens": (config(vocab_size=10**9), r"has shape .*, config\.json asks for .*1000000000"),
    "a-billion-experts": (
        config(model_type="qwen3_moe", num_experts=10**9, num_experts_per_tok=1, moe_intermediate_size=4),
        "asks for over 100 tensors of shape",
    ),
    "a-billion-in-the-mlp": (config(intermediate_size=10**9), "has shape .* asks for .*1000000000"),
    "a-billion-heads": (config(num_attention_heads=10**9), "has shape .* asks for .*6000000000"),
    "more-than-64-bits": (config(hidden_size=10**30), r"config\.json: hidden_size=10{30}: expected a whole number"),
    "more-than-memory": (config(hidden_size=2**31 - 1, vocab_size=2**31 - 1), "asks for a tensor that cannot exist"),
    "an-eps-beyond-floats": (config(rms_norm_eps=10**400), r"config\.json: rms_norm_eps=10000"),
    "a-long-word": (config(hidden_act="x" * 10**6), r"config\.json: hidden_act='x"),
    "a-nested-config": (file("config.json", b"[" * 10**6), r"config\.json: not valid JSON"),
    "a-huge-config": (file("config.json", b"{", 10**9), r"config\.json: not valid JSON \(longer than"),
    "a-number-of-a-million-digits": (file("config.json", b"1" * 10**6), r"config\.json: not valid JSON"),
    "a-nested-index": (file("model.safetensors.index.json", b'{"weight_map":' * 10**5), r"index\.json: not valid JSON"),
    "a-huge-index": (file("model.safetensors.index.json", b"{", 10**9), r"index\.json: not valid JSON \(longer than"),
    "a-header-of-gigabytes": (header(4 << 30, b"{", 5 << 30), r"safetensors: not a readable .*headers of 4294967296 b"),
    "a-header-of-2-to-64": (header(2**64 - 1), "not a readable .*headers of 18446744073709551615 bytes"),
    "a-header-beyond-its-file": (header(1 << 20, b"{}"), r"model\.safetensors: not a readable safetensors file"),
    "a-million-tensors": (header(len(MILLION), MILLION), "not a readable .*headers of"),
    "many-tensors": (both(header(len(MANY), MANY), config(num_hidden_layers=10**9)), "asks for over 100 tensors of"),
    "a-nested-header": (header(5 * 10**6, b'{"a":' * 10**6), "not a readable .*recursion"),
    "a-shape-beyond-64-bits": (header(len(BEYOND), BEYOND), "unexpected tensor 'n'"),
    "a-dtype-that-torch-has-not": (header(len(SIX_BITS), SIX_BITS, 3), "unexpected tensor 'n'"),
    "no-tensors": (header(2, b"{}"), "tensor .* is missing"),
    "a-shard-with-a-nul": (shard("a\0b"), r"index\.json: shard 'a\\x00b' is named but no file there"),
    "a-shard-of-a-long-name": (shard("x" * 10**6), r"index\.json: shard 'x{99} is named but no file there"),
    "a-shard-that-is-no-text": (shard("\ud800"), r"index\.json: shard '\\ud800' is named but no file there"),
    "a-directory-as-shard": (shard("sub", Path.mkdir), r"index\.json: shard 'sub' is named but no file there"),
    "a-pipe-as-shard": (shard("pipe", os.mkfifo), r"index\.json: shard 'pipe' is named but no file there"),
    "a-device-as-shard": (
        shard("zero", lambda path: path.symlink_to("/dev/zero")),
        "shard 'zero' is named but no file",
    ),
    "a-link-to-itself": (shard("loop", lambda path: path.symlink_to("loop")), "shard 'loop' is named but no file"),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the largest memory of a process from /proc")
def test_hostile_files_are_refused_in_one_line_within_a_second_and_200_mb(untied, tmp_path):
    expected = {untied: "^loaded", untied / "model.safetensors": "^loaded"}
    for name, (change, message) in HOSTILE.items():
        shutil.copytree(untied, tmp_path / name)
        change(tmp_path / name)
        expected[tmp_path / name] = f"^{tmp_path / name}.*{message}"
    # The same as an adapter or a trainer's state.
    unreadable = [name for name in HOSTILE if "header" in name]
    unreadable += ["a-million-tensors", "a-shape-beyond-64-bits", "a-dtype-that-torch-has-not", "absent"]
    files = [tmp_path / name / "model.safetensors" for name in unreadable]
    for path in (*files, tmp_path / "a-pipe-as-shard" / "pipe"):
        expected[path] = f"^{path}: not a readable safetensors file"
    outcomes = attempt(list(expected))
    for (place, message), (outcome, seconds, _) in zip(expected.items(), outcomes, strict=True):
        assert re.search(message, outcome), f"{place}: {outcome}"
        assert len(outcome.splitlines()) == 1 and len(outcome) < 1000, outcome
        assert seconds < 1, f"{place}: {seconds} s"
    assert sum(grown for *_, grown in outcomes) < 200


# --- writing ---


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_saved_model_has_equal_logits_here_and_in_transformers(kind, request, tmp_path):
    source, target = request.getfixturevalue(kind), tmp_path / "deep" / "saved"
    model = load(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    save_model(model, target, source_dir=source)
    assert torch.equal(logits(load(target)), logits(model))
    theirs = AutoModelForCausalLM.from_pretrained(target)(torch.tensor([IDS])).logits[0]
    # To 1e-5 of the largest logit: float32 rounding of two layers.
    assert (theirs - logits(model)).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_saved_config_says_the_dtype_and_is_otherwise_the_source(untied, tmp_path, key):
    path = untied / "config.json"
    config = json.loads(path.read_text())
    config.pop("dtype")
    path.write_text(json.dumps(config | {key: "float32"}))
    save_model(load(untied, torch.bfloat16), tmp_path / "saved", source_dir=untied)
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == config | {key: "bfloat16"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").dtype == torch.bfloat16


def test_tokenizer_and_template_travel_with_the_weights(untied, tmp_path):
    companions = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for name in companions:
        (untied / name).write_text(f"{name} of the source")
    save_model(load(untied), tmp_path / "saved", source_dir=untied)
    for name in companions:
        assert (tmp_path / "saved" / name).read_text() == f"{name} of the source"


def test_a_model_saved_over_shards_is_what_is_read_next(untied):
    sharded = save(untied.with_name("sharded"), AutoModelForCausalLM.from_pretrained(untied), max_shard_size="4KB")
    model = load(sharded)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    save_model(model, sharded, source_dir=sharded)
    assert torch.equal(load(sharded).model.norm.weight, model.model.norm.weight)


def test_tensors_come_back_as_written_and_nothing_else_is_left(tmp_path):
    tensors = {
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "narrow": torch.tensor([math.pi], dtype=torch.bfloat16),
        "step": torch.tensor(3),
        "trained": torch.ones(2, requires_grad=True),
        "empty": torch.ones(0, 3),
        "eight bits": torch.ones(2).to(torch.float8_e4m3fn),
    }
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors)
    assert_same(read_tensors(path), tensors)
    assert {name: t.dtype for name, t in read_tensors(path).items()} == {name: t.dtype for name, t in tensors.items()}
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    def save_half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    write_tensors(tmp_path / "x.safetensors", {"old": torch.ones(1)})
    monkeypatch.setattr(models.weights, "save_file", save_half)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(tmp_path / "x.safetensors", {"new": torch.ones(1)})
    assert read_tensors(tmp_path / "x.safetensors").keys() == {"old"}


# --- names ---


def test_a_directory_is_its_own_name(tmp_path):
    assert resolve_model_dir(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["/no/such/dir", "./no_such", "../no_such", "~/no_such", "a/b/c"])
def test_a_missing_path_is_refused_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match=f"model_name_or_path={name}: no such directory$"):
        resolve_model_dir(name)


def test_an_adapter_is_no_model_and_is_said_to_be_one(tmp_path):
    """Beside a model, whole or in shards, its file changes nothing."""
    (tmp_path / "adapter_config.json").write_text("{}")
    way_out = re.escape(f"pass adapter_name_or_path={tmp_path} and its base as model_name_or_path")
    with pytest.raises(ValueError, match=f"^model_name_or_path={tmp_path}: is an adapter; {way_out}$"):
        resolve_model_dir(str(tmp_path))
    for weights in ("model.safetensors", "model.safetensors.index.json"):
        (tmp_path / weights).touch()
        assert resolve_model_dir(str(tmp_path)) == tmp_path
        (tmp_path / weights).unlink()


@pytest.mark.parametrize(("name", "hinted"), [("wrld", True), ("World", True), ("gpt2", False), ("org/world", False)])
def test_a_name_close_to_world_that_the_hub_does_not_have_is_hinted_at(monkeypatch, name, hinted):
    def refuse(*_, **__):
        raise OSError("not found")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    end = r"\(not found\)" + ("; did you mean world\\?" if hinted else "")
    with pytest.raises(ValueError, match=f"^model_name_or_path={name}: no such directory, .*{end}$"):
        resolve_model_dir(name)


def test_the_hub_is_asked_for_safetensors_and_text_alone(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda n, **kw: asked.update(name=n, **kw) or tmp_path)
    assert resolve_model_dir("org/some-model") == tmp_path
    assert asked["name"] == "org/some-model"
    wanted = ["model-00001-of-00002.safetensors", "config.json", "chat_template.jinja", "tokenizer.model"]
    files = [*wanted, "pytorch_model.bin", "x.py"]
    allowed = [name for name in files if any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])]
    assert allowed == wanted


def test_a_name_that_the_hub_does_not_give_is_refused_with_its_reason(monkeypatch):
    def refuse(*_, **__):
        raise OSError("\nOffline mode is on\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"model_name_or_path=org/m: .*hub did not give it \(Offline mode is on\)"):
        resolve_model_dir("org/m")
