"""An exported model is the adapted one, as others read it; a directory that holds something else is not touched.

Shapes: T tokens, V vocabulary.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import models.weights
from models.command import expand_arguments
from models.export import PROBE, ExportConfig, describe, export, log_probabilities, mean_kl, size_of
from models.lora import adapter_tensors, inject_lora, load_adapter, save_adapter
from models.stream import pack
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from models.weights import load_model, save_model, shards, weight_files

ROOT = Path(__file__).parent.parent
WORLD = ROOT / "experiments" / "world" / "model"
IDS = [3, 1, 28, 7, 7, 11]


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    """A random Qwen2 in bfloat16, with a head of its own, under the world's tokenizer."""
    where = tmp_path_factory.mktemp("untied")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=800, num_key_value_heads=1, tie_word_embeddings=False, **sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.bfloat16().save_pretrained(where)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(WORLD / name, where / name)
    return where


@pytest.fixture
def base(request, untied) -> Path:
    return {"tied": WORLD, "untied": untied}[request.param]


def load(where: Path) -> Transformer:
    return load_model(where, dtype=torch.float32, device=torch.device("cpu"))


def write_adapter(base: Path, where: Path, size: float = 0.1, use_rslora: bool = False) -> Path:
    model = load(base)
    inject_lora(model, rank=4, alpha=8, dropout=0.0, use_rslora=use_rslora, target="all", seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in adapter_tensors(model).items():
        if name.endswith("lora_B"):
            tensor.data = torch.randn(tensor.shape, generator=generator) * size
    save_adapter(model, where, base_model=str(base), dropout=0.0)
    return where


def adapted(base: Path, adapter: Path) -> Transformer:
    model = load(base)
    load_adapter(model, adapter, dropout=0.0)
    return model


@torch.no_grad()
def their_logits(where: Path) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)(torch.tensor([IDS])).logits[0]


@torch.no_grad()
def logits(model: Transformer) -> Tensor:
    return model(pack([IDS], [[]])) @ model.head_weight_VD.T


def run(*arguments: object) -> None:
    """What `python -m models.export` does in this process; a mistake is a ValueError."""
    expanded, _ = expand_arguments([*map(str, arguments)], ExportConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        export(compose("export", expanded))


def named(base: Path, adapter: Path, target: Path) -> list[str]:
    return [f"model_name_or_path={base}", f"adapter_name_or_path={adapter}", f"export_dir={target}"]


def bytes_of(where: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in where.iterdir()}


# --- what is written ---


@pytest.mark.parametrize("base", ["tied", "untied"], indirect=True)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_float32_export_is_the_adapted_model_in_transformers(base, tmp_path, use_rslora):
    adapter = write_adapter(base, tmp_path / "adapter", use_rslora=use_rslora)
    before = bytes_of(base)
    run(*named(base, adapter, tmp_path / "out"), "infer_dtype=float32", "export_size=0.0001")
    ours = logits(adapted(base, adapter))
    # To 1e-5 of the largest logit: float32 rounding.
    assert (their_logits(tmp_path / "out") - ours).abs().max() < 1e-5 * ours.abs().max()
    assert (ours - logits(load(base))).abs().max() > 0.01 * ours.abs().max()
    assert bytes_of(base) == before


@pytest.mark.parametrize(("given", "written"), [("auto", "bfloat16"), ("float16", "float16"), ("float32", "float32")])
def test_auto_keeps_the_checkpoints_dtype_and_a_name_changes_it(untied, tmp_path, given, written):
    adapter = write_adapter(untied, tmp_path / "adapter")
    run(*named(untied, adapter, tmp_path / "out"), f"infer_dtype={given}")
    assert {str(t.dtype) for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {f"torch.{written}"}
    assert str(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype) == f"torch.{written}"


@pytest.mark.parametrize(("base", "dtype"), [("untied", "float16"), ("tied", "bfloat16")], indirect=["base"])
def test_every_weight_is_the_exact_sum_rounded_once(base, tmp_path, dtype):
    """A bfloat16 base becomes float16 without a sum in bfloat16, a float32 base bfloat16 without being it before."""
    adapter = write_adapter(base, tmp_path / "adapter")
    run(*named(base, adapter, tmp_path / "out"), f"infer_dtype={dtype}")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, layer in adapted(base, adapter).named_modules():
        if hasattr(layer, "lora_A"):
            exact = layer.weight + layer.scaling * (layer.lora_B @ layer.lora_A)
            assert torch.equal(written[f"{name}.weight"], exact.to(getattr(torch, dtype))), name


def test_without_an_adapter_the_base_is_written_anew(untied, tmp_path):
    run(f"model_name_or_path={untied}", f"export_dir={tmp_path / 'out'}", "export_size=0.00001")
    assert len(weight_files(tmp_path / "out")) > 2
    assert torch.equal(their_logits(tmp_path / "out"), their_logits(untied))


def test_the_directory_holds_what_servers_read(untied, tmp_path):
    """vLLM and llama.cpp choose the model by architectures, and read the tokenizer's files as they are."""
    run(f"model_name_or_path={untied}", f"export_dir={tmp_path / 'out'}")
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    for name in names - {"config.json", "model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (untied / name).read_bytes()


def test_a_tied_embedding_is_written_once(tmp_path):
    run(f"model_name_or_path={WORLD}", f"export_dir={tmp_path}")
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(WORLD / "model.safetensors").keys()
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


# --- files ---


def test_no_shard_is_larger_than_asked_but_for_a_single_tensor():
    """12, 4, 4, 20 and 4 bytes, ten at most: each but the two fours alone."""
    tensors = {name: torch.zeros(n) for name, n in (("a", 3), ("b", 1), ("c", 1), ("d", 5), ("e", 1))}
    assert [list(part) for part in shards(tensors, 10)] == [["a"], ["b", "c"], ["d"], ["e"]]
    assert [list(part) for part in shards(tensors, 16)] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [list(part) for part in shards(tensors, 44)] == [["a", "b", "c", "d", "e"]]


def test_the_index_names_every_tensor_once_with_its_file_and_the_bytes_of_all(untied, tmp_path):
    model = load(untied)
    save_model(model, tmp_path, source_dir=untied, shard_bytes=10_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    count = len(weight_files(tmp_path))
    assert sorted(set(index["weight_map"].values())) == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    stored = {name: tensor for path in weight_files(tmp_path) for name, tensor in load_file(path).items()}
    assert index["weight_map"].keys() == stored.keys() == dict(model.named_parameters()).keys()
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())


def test_weights_can_be_read_by_whoever_can_read_the_config(untied, tmp_path):
    save_model(load(untied), tmp_path, source_dir=untied)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


@pytest.mark.parametrize(("first", "second"), [(10_000, 1e9), (1e9, 10_000), (10_000, 20_000)])
def test_a_model_written_over_another_leaves_nothing_of_it(untied, tmp_path, first, second):
    (tmp_path / "notes.txt").write_text("the user's own")
    save_model(load(WORLD), tmp_path, source_dir=WORLD, shard_bytes=first)
    (tmp_path / "chat_template.jinja").write_text("of another model")
    (tmp_path / "model-00007-of-00008.safetensors.tmp").write_text("half a file")
    save_model(load(untied), tmp_path, source_dir=untied, shard_bytes=second)
    save_model(load(untied), tmp_path / "alone", source_dir=untied, shard_bytes=second)
    alone = bytes_of(tmp_path / "alone")
    shutil.rmtree(tmp_path / "alone")
    assert bytes_of(tmp_path) == alone | {"notes.txt": hashlib.sha256(b"the user's own").hexdigest()}


def test_a_model_saved_in_its_own_directory_keeps_its_tokenizer(untied, tmp_path):
    copy = shutil.copytree(untied, tmp_path / "copy")
    save_model(load(untied).bfloat16(), copy, source_dir=copy)
    assert bytes_of(copy) == bytes_of(untied)


@pytest.mark.parametrize("earlier", [False, True])
def test_an_export_that_is_cut_short_is_no_model(untied, tmp_path, monkeypatch, earlier):
    """Even where an earlier model lay: half of one and half of the other would load."""
    if earlier:
        save_model(load(untied), tmp_path, source_dir=untied, shard_bytes=10_000)
    saved = []

    def full_disk(tensors, path, metadata):
        if len(saved) == 2:
            raise OSError("No space left on device")
        saved.append(path)
        original(tensors, path, metadata)

    original = models.weights.save_file
    monkeypatch.setattr(models.weights, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(load(untied), tmp_path, source_dir=untied, shard_bytes=10_000)
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        load(tmp_path)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# --- what rounding costs ---


def test_kl_of_a_biased_coin():
    """KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 ln 2 + 1/2 ln 2/3; of equal distributions 0."""
    p_TV, q_TV = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert mean_kl(p_TV, q_TV) == pytest.approx(0.5 * 0.6931472 - 0.5 * 0.4054651, abs=1e-6)
    assert mean_kl(torch.cat([p_TV, p_TV]), torch.cat([q_TV, p_TV])) == pytest.approx(0.0719205, abs=1e-6)


def test_log_probabilities_are_of_the_next_token(untied):
    ours_TV = log_probabilities(load(untied), IDS)
    torch.testing.assert_close(ours_TV, their_logits(untied).double().log_softmax(-1), rtol=0, atol=1e-4)


def test_a_size_is_shown_in_a_unit_that_shows_something():
    sizes = {1_230: "1.23 kB", 456_000: "456.00 kB", 1_000_000: "1.00 MB", 269_060_552: "269.06 MB", 10**9: "1.00 GB"}
    assert {size: size_of(size) for size in sizes} == sizes


def test_the_line_says_the_cost_its_share_and_warns_where_it_is_large():
    line = "rounding to bfloat16 costs 1.0e-06 nats per token, 0.1% of the 1.0e-03 that the adapter does (KL over 9 "
    assert describe(1e-6, 1e-3, "bfloat16", 9) == line + "tokens of text)"
    assert ", 0.1% of the" in describe(6e-7, 1e-3, "bfloat16", 9)
    assert ", less than 0.1% of the 1.0e-03 that" in describe(4e-7, 1e-3, "bfloat16", 9)
    line = "warning: rounding to bfloat16 costs 2.0e-04 nats per token, 20.0% of the 1.0e-03"
    assert describe(2e-4, 1e-3, "bfloat16", 9).startswith(line)
    line = "rounding to float16 costs 2.0e-04 nats per token (KL over 9 tokens of text)"
    assert describe(2e-4, 0.0, "float16", 9) == line


@pytest.mark.parametrize(("size", "warns"), [(0.3, False), (0.001, True)])
def test_bfloat16_costs_a_small_share_of_a_large_adapter_and_a_large_one_of_a_small(
    untied, tmp_path, capsys, size, warns
):
    adapter = write_adapter(untied, tmp_path / "adapter", size)
    run(*named(untied, adapter, tmp_path / "out"))
    assert capsys.readouterr().out.startswith("warning: rounding to bfloat16") == warns
    run(*named(untied, adapter, tmp_path / "out"), "infer_dtype=float32", "overwrite_output_dir=true")
    cost = re.match(r"rounding to float32 costs (\S+) nats", capsys.readouterr().out)
    assert float(cost[1]) < 1e-8


def test_the_cost_printed_is_that_of_the_weights_written_computed_in_float32(untied, tmp_path, capsys):
    """The base is bfloat16: computing in that would add its own noise to what the weights cost."""
    adapter = write_adapter(untied, tmp_path / "adapter")
    run(*named(untied, adapter, tmp_path / "out"))
    (ids,) = Tokenizer(WORLD).encode([PROBE])
    adapted_TV, written_TV, base_TV = (
        log_probabilities(model, ids) for model in (adapted(untied, adapter), load(tmp_path / "out"), load(untied))
    )
    numbers = re.search(r"costs (\S+) nats per token, .+% of the (\S+) that", capsys.readouterr().out)
    # Two digits are printed.
    assert float(numbers[1]) == pytest.approx(mean_kl(adapted_TV, written_TV), rel=0.05)
    assert float(numbers[2]) == pytest.approx(mean_kl(adapted_TV, base_TV), rel=0.05)


# --- the command ---


@pytest.mark.slow
def test_a_llama_factory_file_runs_as_it_is(untied, tmp_path):
    adapter = write_adapter(untied, tmp_path / "adapter")
    (tmp_path / "merge_lora.yaml").write_text(f"""\
### model
model_name_or_path: {untied}
adapter_name_or_path: {adapter}
template: qwen
finetuning_type: lora
### export
export_dir: {tmp_path / "out"}
export_size: 2
export_device: cpu  # choices: [cpu, auto]
export_legacy_format: false
""")
    done = subprocess.run(
        [sys.executable, "-m", "models.export", f"config_file={tmp_path / 'merge_lora.yaml'}", "infer_dtype=float32"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    note, cost, written = done.stdout.splitlines()
    assert note.endswith("left out: template, finetuning_type, export_device, export_legacy_format")
    assert cost.startswith("rounding to float32 costs ")
    size = f"{weight_files(tmp_path / 'out')[0].stat().st_size / 1000:.2f} kB"
    assert written == f"export: {tmp_path / 'out'} ({size} of weights in 1 file)"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == 800


def test_the_schema_and_the_yaml_have_the_same_keys():
    shown = OmegaConf.load(ROOT / "conf" / "export.yaml").keys() - {"defaults", "hydra"}
    assert shown == {f.name for f in fields(ExportConfig)}


MISTAKES = [
    ("infer_dtype=int8", "infer_dtype=int8: expected one of auto, float32, bfloat16, float16"),
    ("export_size=0", "export_size=0.0: must be above 0"),
    ("export_size=nan", "export_size=nan: must be above 0"),
    ("export_dir=FILE", "FILE: is a file; name a directory"),
    ("export_dir=BASE", "is model_name_or_path itself, which is never written to"),
    ("export_dir=ADAPTER", "holds an adapter, which readers would add once more"),
    ("export_dir=MODEL", "holds a model already; name another, or pass overwrite_output_dir=true"),
    ("adapter_name_or_path=EMPTY", "adapter_config.json: no such file"),
    ("model_name_or_path=/no/such/model", "model_name_or_path=/no/such/model: no such directory"),
    ("model_name_or_path=EMPTY", "config.json: no such file"),
    ("export_quantization_bit=4", "export_quantization_bit=4: is not done here; only export_quantization_bit=null"),
    ("export_legacy_format=true", "export_legacy_format=True: is not done here"),
    ("export_dri=x", "export_dri=x: unknown key; did you mean export_dir?"),
]


@pytest.mark.parametrize(("argument", "message"), MISTAKES, ids=[argument for argument, _ in MISTAKES])
def test_a_mistake_is_refused_before_weights_are_read_or_written(untied, tmp_path, monkeypatch, argument, message):
    places = {name: tmp_path / name.lower() for name in ("FILE", "ADAPTER", "MODEL", "EMPTY")} | {"BASE": untied}
    places["FILE"].write_text("")
    places["EMPTY"].mkdir()
    places["MODEL"].mkdir()
    (places["MODEL"] / "config.json").write_text("{}")
    write_adapter(untied, places["ADAPTER"])
    monkeypatch.setattr("models.export.load_model", lambda *_, **__: pytest.fail("weights were read"))
    key, _, value = argument.partition("=")
    value = str(places.get(value, value))
    before = {name: bytes_of(place) for name, place in places.items() if place.is_dir()}
    with pytest.raises(ValueError, match=re.escape(message.replace("FILE", value))):
        run(*named(untied, places["ADAPTER"], tmp_path / "out"), f"{key}={value}")
    assert not (tmp_path / "out").exists()
    assert {name: bytes_of(place) for name, place in places.items() if place.is_dir()} == before


@pytest.mark.parametrize("missing", ["model_name_or_path", "export_dir"])
def test_a_key_without_which_nothing_can_be_done_is_asked_for(untied, tmp_path, missing):
    given = [f"model_name_or_path={untied}", f"export_dir={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match=rf"^{missing} is not set; pass {missing}=\.\.\.$"):
        run(*(argument for argument in given if not argument.startswith(missing)))


def test_a_config_without_a_dtype_leaves_the_choice_to_the_user(untied, tmp_path):
    copy = shutil.copytree(untied, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    with pytest.raises(ValueError, match=r"infer_dtype=auto: \S*config\.json says dtype=None; name one of float32"):
        run(f"model_name_or_path={copy}", f"export_dir={tmp_path / 'out'}")
    run(f"model_name_or_path={copy}", f"export_dir={tmp_path / 'out'}", "infer_dtype=bfloat16")
    assert torch.equal(their_logits(tmp_path / "out"), their_logits(untied))


def test_weights_that_the_dtype_does_not_hold_are_refused(untied, tmp_path):
    """2e5 is a bfloat16 and no float16, which ends at 65504."""
    adapter = write_adapter(untied, tmp_path / "adapter", size=2e5)
    with pytest.raises(ValueError, match=r"infer_dtype=float16: model\.layers\.0\S* is not finite in float16"):
        run(*named(untied, adapter, tmp_path / "out"), "infer_dtype=float16")
    assert not (tmp_path / "out").exists()


# --- a real model ---


@pytest.mark.real
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_with_an_adapter_is_the_same_model_in_transformers(smollm2, tmp_path, dtype):
    """To 1e-5 of the largest logit that of what was written; of the adapted model, what rounding 210 sums leaves."""
    adapter = write_adapter(smollm2, tmp_path / "adapter", size=0.03)
    run(*named(smollm2, adapter, tmp_path / "out"), f"infer_dtype={dtype}", "export_size=0.1")
    theirs = their_logits(tmp_path / "out")
    assert len(weight_files(tmp_path / "out")) > 2
    assert (logits(load(tmp_path / "out")) - theirs).abs().max() < 1e-5 * theirs.abs().max()
    difference = (logits(adapted(smollm2, adapter)) - theirs).abs().max() / theirs.abs().max()
    assert difference < (5e-5 if dtype == "float32" else 0.02)


def test_weights_of_the_users_own_are_neither_taken_nor_removed(untied, tmp_path):
    mine = tmp_path / "out" / "model_of_mine.safetensors"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    save_model(load(untied), mine.parent, source_dir=untied)
    assert mine.read_bytes() == b"mine"


def test_the_stored_dtype_is_the_files_and_not_the_configs(tmp_path):
    """The world's weights are float32; a config that says bfloat16 does not round them before they are summed."""
    shutil.copytree(WORLD, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}))
    assert models.weights.stored_dtype(weight_files(tmp_path)) == torch.float32
