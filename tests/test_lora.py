"""LoRA is the base model until its first step, changes nothing but its own tensors, and is read by PEFT and from it.

Shapes: T tokens, V vocabulary.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from models.lora import (
    adapter_tensors,
    adapters_disabled,
    inject_lora,
    load_adapter,
    lora_layers,
    merge,
    save_adapter,
    snapshot,
    using_adapter,
)
from models.stream import Stream, pack
from models.transformer import Transformer
from models.weights import load_model

IDS = [3, 1, 28, 7, 7, 11]
STREAM = pack([[3, 1, 28], [5]], [[[7, 7], [4, 2, 9]], [[6]]])
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A random Qwen2, large enough in its weights that every layer matters; its biases come with the base alone."""
    where = tmp_path_factory.mktemp("base")
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=29, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=3, num_key_value_heads=1,
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    model.save_pretrained(where)
    return where


def load(base: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    return load_model(base, dtype=dtype, device=torch.device("cpu"))


def injected(
    base: Path, target: str = "all", dtype: torch.dtype = torch.float32, dropout: float = 0.0, use_rslora: bool = False
) -> Transformer:
    model = load(base, dtype)
    inject_lora(model, rank=5, alpha=3.0, dropout=dropout, use_rslora=use_rslora, target=target, seed=7)
    return model


def trained(model: Transformer, seed: int = 0, size: float = 0.3) -> Transformer:
    """The model with random tensors in its adapter, as if training had moved both matrices."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_tensors(model).values():
        tensor.data = torch.randn(tensor.shape, generator=generator) * size
    return model


@torch.no_grad()
def hidden(model: Transformer, stream: Stream = STREAM) -> Tensor:
    return model(stream)


@torch.no_grad()
def logits(model: Transformer) -> Tensor:
    return model(pack([IDS], [[]])) @ model.head_weight_VD.T


@torch.no_grad()
def their_logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(torch.tensor([IDS])).logits[0]


def assert_close_to_largest(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-5 of the largest: float32 rounding of two layers."""
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# --- the layer ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_injected_model_is_the_base_bit_for_bit(base, dtype):
    assert torch.equal(hidden(injected(base, dtype=dtype)), hidden(load(base, dtype)))


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 3 / 5), (True, 3 / 5**0.5)])
def test_a_layer_adds_alpha_over_rank_or_its_root_times_x_A_B(base, use_rslora, scaling):
    """Hu et al. 2021, Eq. 3: y = x W^T + b + 3/5 x A^T B^T; rsLoRA divides by sqrt(5)."""
    layer = lora_layers(trained(injected(base, use_rslora=use_rslora)))["model.layers.1.self_attn.v_proj"]
    x = torch.randn(4, 24)
    product = layer.lora_B @ layer.lora_A
    expected = x @ layer.weight.T + layer.bias + scaling * x @ product.T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


def test_A_is_uniform_within_one_over_root_in_features_and_B_zero(base):
    """As kaiming_uniform_(a=sqrt(5)) makes it: bound sqrt(6 / ((1 + 5) in)) = 1 / sqrt(in)."""
    for name, tensor in adapter_tensors(injected(base)).items():
        if name.endswith("lora_B"):
            assert not tensor.any()
        else:
            assert 0.9 < tensor.abs().max() * tensor.shape[1] ** 0.5 <= 1
            assert abs(tensor.mean()) * tensor.shape[1] ** 0.5 < 0.3


def test_the_seed_decides_the_start(base):
    starts = [snapshot(injected(base)), snapshot(injected(base))]
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    other = load(base)
    inject_lora(other, rank=5, alpha=3.0, dropout=0.0, use_rslora=False, target="all", seed=8)
    assert not any(torch.equal(t, starts[0][name]) for name, t in adapter_tensors(other).items() if "lora_A" in name)


@pytest.mark.parametrize(("target", "leaves"), [("all", LEAVES), ("q_proj, down_proj", ("q_proj", "down_proj"))])
def test_target_names_layers_in_every_block_and_never_the_head(base, target, leaves):
    names = lora_layers(injected(base, target)).keys()
    assert {name.rpartition(".")[2] for name in names} == set(leaves)
    assert len(names) == 2 * len(leaves)


def test_target_may_name_layers_by_any_end_of_their_names(base):
    """Whole parts only: `up_proj` is no end of `x.gate_up_proj`."""
    names = lora_layers(injected(base, "self_attn.q_proj, layers.0.mlp.up_proj,model.layers.1.mlp.gate_proj")).keys()
    assert names == {
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate_proj",
    }  # fmt: skip


@pytest.mark.parametrize(
    "target",
    ["lm_head", "q_proj,qproj", "", "embed_tokens", "q_proj,all", "mlp", "attn.q_proj", "layers.2.mlp.up_proj"],
)
def test_an_unknown_target_is_refused_with_the_choices(base, target):
    wrong = target.rpartition(",")[2]
    message = f"lora_target={target}: no linear layer is '{wrong}'; choose all or down_proj, gate_proj, k_proj, o_proj"
    with pytest.raises(ValueError, match=message):
        injected(base, target)


def test_a_bfloat16_base_keeps_float32_adapters(base):
    model = injected(base, dtype=torch.bfloat16)
    assert {t.dtype for t in adapter_tensors(model).values()} == {torch.float32}
    model(STREAM).float().sum().backward()
    assert {t.grad.dtype for t in adapter_tensors(model).values()} == {torch.float32}
    assert hidden(trained(model)).dtype == torch.bfloat16


# --- training and switching ---


def step(model: Transformer) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(STREAM).sin().sum().backward()
    optimizer.step()


def test_a_step_changes_the_adapter_and_no_weight_of_the_base(base):
    model, before = injected(base), dict(load(base).named_parameters())
    for _ in range(2):  # B moves in the first step, A in the second
        step(model)
    adapter = adapter_tensors(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapter.keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name not in adapter)
    start = adapter_tensors(injected(base))
    assert not any(torch.equal(tensor, start[name]) for name, tensor in adapter.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_adapters_a_trained_model_is_the_base_bit_for_bit(base, dtype):
    model = trained(injected(base, dtype=dtype))
    after = hidden(model)
    with adapters_disabled(model):
        assert torch.equal(hidden(model), hidden(load(base, dtype)))
    assert not torch.equal(after, hidden(load(base, dtype)))
    assert torch.equal(hidden(model), after)


def test_a_snapshot_computes_what_the_adapter_did_however_it_was_trained_since(base):
    model = trained(injected(base))
    early, frozen = hidden(model), snapshot(model)
    step(model)
    late = hidden(model)
    with using_adapter(model, frozen):
        assert torch.equal(hidden(model), early)
    assert not torch.equal(late, early)
    assert torch.equal(hidden(model), late)


def test_an_error_inside_the_block_gives_the_adapter_back(base):
    model = trained(injected(base))
    after = hidden(model)
    with pytest.raises(ZeroDivisionError), adapters_disabled(model):
        raise ZeroDivisionError
    assert torch.equal(hidden(model), after)


def test_blocks_nest(base):
    """Leaving the inner block returns to the outer one's adapter, not to the live one."""
    model = trained(injected(base))
    frozen, early = snapshot(model), hidden(model)
    trained(model, seed=1)
    with using_adapter(model, frozen):
        with adapters_disabled(model):
            assert torch.equal(hidden(model), hidden(load(base)))
        assert torch.equal(hidden(model), early)


def test_an_adapter_that_lacks_a_tensor_changes_nothing(base):
    model = trained(injected(base))
    partial = snapshot(model)
    partial.pop("model.layers.1.mlp.down_proj.lora_B")
    after = hidden(trained(model, seed=1))
    with pytest.raises(KeyError, match=r"layers\.1\.mlp\.down_proj\.lora_B"), using_adapter(model, partial):
        pass
    assert torch.equal(hidden(model), after)


def test_eval_changes_dropout_and_nothing_else(base):
    model = trained(injected(base))
    model.train()
    without_dropout = hidden(model)
    model.eval()
    assert torch.equal(hidden(model), without_dropout)
    dropping = trained(injected(base, dropout=0.5))
    assert torch.equal(hidden(dropping.eval()), without_dropout)
    assert not torch.equal(hidden(dropping.train()), without_dropout)
    with adapters_disabled(dropping):
        assert torch.equal(hidden(dropping), hidden(load(base)))


def test_dropout_falls_on_the_input_of_A_and_keeps_the_mean(base):
    """Of x = 1 half is zero and half two; W x + b is untouched. Four standard errors of 4000 draws."""
    layer = lora_layers(trained(injected(base, dropout=0.5)).train())["model.layers.0.mlp.up_proj"]
    x = torch.ones(4000, 24)
    torch.manual_seed(0)
    added = layer(x) - x @ layer.weight.T
    columns = 3 / 5 * (layer.lora_B @ layer.lora_A)
    allowed = 4 * columns.square().sum(-1).sqrt() / 4000**0.5
    assert ((added.mean(0) - columns.sum(-1)).abs() < allowed).all()
    assert (added.std(0) > 0.5 * columns.square().sum(-1).sqrt()).all()


# --- PEFT's files ---


def peft_model(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("target", ["all", "q_proj,v_proj", "self_attn.q_proj,layers.0.mlp.up_proj"])
def test_peft_reads_what_we_write(base, tmp_path, target, use_rslora):
    model = trained(injected(base, target, use_rslora=use_rslora))
    save_adapter(model, tmp_path, base_model=str(base), dropout=0.1)
    theirs = peft_model(base, tmp_path)
    assert_close_to_largest(logits(model), their_logits(theirs))
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (5, 3.0, 0.1, use_rslora)
    assert config.base_model_name_or_path == str(base)
    adapted = {
        name.removesuffix(".lora_A.default") for name, _ in theirs.named_modules() if name.endswith("lora_A.default")
    }
    assert adapted == {f"base_model.model.{name}" for name in lora_layers(model)}


@pytest.mark.parametrize(
    ("target", "written"), [("all", LEAVES), ("layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"])]
)
def test_target_modules_are_the_short_names_where_these_say_it(base, tmp_path, target, written):
    save_adapter(injected(base, target), tmp_path, base_model="x", dropout=0.0)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(written)


def write_with_peft(
    base: Path, where: Path, targets: object = ("q_proj", "down_proj"), size: float = 0.3, **settings
) -> torch.nn.Module:
    """An adapter of PEFT's own making and saving, with random tensors."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **settings)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * size)
    theirs.save_pretrained(where)
    return theirs


@pytest.mark.parametrize(
    ("targets", "settings"),
    [
        (["q_proj", "down_proj"], {}),
        ("all-linear", {}),
        (r".*self_attn\.[kv]_proj", {}),
        (["self_attn.q_proj", "layers.0.mlp.up_proj", "model.layers.1.mlp.gate_proj"], {}),
        (["q_proj", "down_proj"], {"layers_to_transform": [1]}),
        (["q_proj", "down_proj"], {"layers_to_transform": 0, "layers_pattern": "layers"}),
        ("all-linear", {"exclude_modules": ["o_proj", "layers.1.mlp.up_proj"]}),
        (["q_proj", "down_proj"], {"use_rslora": True}),
        (["q_proj", "down_proj"], {"init_lora_weights": "gaussian"}),
    ],
    ids=str,
)
def test_we_read_what_peft_writes(base, tmp_path, targets, settings):
    theirs = write_with_peft(base, tmp_path, targets, **settings)
    ours = load(base)
    layers = load_adapter(ours, tmp_path, dropout=0.0)
    assert {layer.scaling for layer in layers.values()} == {6 / 2 if "use_rslora" in settings else 6 / 4}
    assert_close_to_largest(logits(ours), their_logits(theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_stored_in_half_precision_are_read_as_peft_reads_them(base, tmp_path, dtype):
    write_with_peft(base, tmp_path)
    save_file({name: t.to(dtype) for name, t in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS)
    ours = load(base)
    load_adapter(ours, tmp_path, dropout=0.0)
    assert {t.dtype for t in adapter_tensors(ours).values()} == {torch.float32}
    assert_close_to_largest(logits(ours), their_logits(peft_model(base, tmp_path)))


REAL_BASES = ["stories260K/hf", "stories260K/hf_bf16", "stories260K/hf_mistral", "stories260K/hf_untied_sharded3"]


@pytest.mark.real
@pytest.mark.parametrize("name", [*REAL_BASES, "smollm2"])
def test_adapters_of_real_models_go_both_ways(request, tmp_path, name):
    """Tied, untied, stored in shards or in bfloat16; all computed in float32.

    Smaller adapters than above: thirty layers of large ones amplify float32's rounding of any of them.
    """
    real_base = (
        request.getfixturevalue("smollm2") if name == "smollm2" else request.getfixturevalue("real") / "models" / name
    )
    theirs = write_with_peft(real_base, tmp_path / "theirs", "all-linear", size=0.03, use_rslora=True)
    ours = load(real_base)
    load_adapter(ours, tmp_path / "theirs", dropout=0.0)
    assert_close_to_largest(logits(ours), their_logits(theirs))
    save_adapter(trained(ours, size=0.03), tmp_path / "ours", base_model=str(real_base), dropout=0.0)
    assert_close_to_largest(logits(ours), their_logits(peft_model(real_base, tmp_path / "ours")))


def test_an_adapter_survives_a_round_trip_bit_for_bit(base, tmp_path):
    first, second = trained(injected(base, dtype=torch.bfloat16)), load(base, torch.bfloat16)
    save_adapter(first, tmp_path, base_model="x", dropout=0.0)
    load_adapter(second, tmp_path, dropout=0.0)
    assert snapshot(first).keys() == snapshot(second).keys()
    assert all(torch.equal(t, snapshot(second)[name]) for name, t in snapshot(first).items())
    assert torch.equal(hidden(first), hidden(second))


# --- merging ---


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_merged_model_computes_what_the_adapted_one_did(base, dtype, allowed, use_rslora):
    model = trained(injected(base, dtype=dtype, use_rslora=use_rslora))
    adapted = hidden(model)
    merge(model)
    assert not lora_layers(model) and not adapter_tensors(model)
    assert (hidden(model) - adapted).abs().max() <= allowed * adapted.abs().max()


def test_merging_gives_a_plain_frozen_model_that_differs_in_the_adapted_weights_alone(base):
    model, plain = trained(injected(base, "layers.1.self_attn.v_proj")), load(base)
    merge(model)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert not any(p.requires_grad for p in model.parameters())
    changed = {name for name, p in plain.named_parameters() if not torch.equal(p, model.get_parameter(name))}
    assert changed == {"model.layers.1.self_attn.v_proj.weight"}


def test_a_merged_bfloat16_weight_is_the_float32_sum_rounded_once(base):
    model = trained(injected(base, dtype=torch.bfloat16))
    layer = lora_layers(model)["model.layers.0.mlp.up_proj"]
    expected = (layer.weight.float() + 3 / 5 * (layer.lora_B @ layer.lora_A)).bfloat16()
    merge(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)


def test_merging_leaves_the_tensor_that_was_loaded_as_it_was(base):
    """The weight may be the file itself, mapped into memory, or shared with a frozen copy."""
    model = trained(injected(base))
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.clone()
    merge(model)
    assert torch.equal(weight, before)


# --- refusals ---


def edit_config(where: Path, **changes) -> None:
    path = where / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    save_adapter(trained(injected(base)), tmp_path, base_model=str(base), dropout=0.0)
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not computed here; only False is"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern={'q_proj': 2}"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern={'q_proj': 2}"),
        ({"bias": "all"}, "bias='all' is not computed here; only 'none' is"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\]"),
        ({"layer_replication": [[0, 2], [0, 2]]}, r"layer_replication=\[\[0, 2\], \[0, 2\]\]"),
        # PiSSA and OLoRA subtract their start from the base's weights, so the file and the base are not the model.
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"alora_invocation_tokens": [3, 1]}, r"alora_invocation_tokens=\[3, 1\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_adapter_of_pefts_that_computes_something_else_is_refused(base, tmp_path, settings, message):
    write_with_peft(base, tmp_path, **settings)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {message}"):
        load_adapter(load(base), tmp_path, dropout=0.0)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_pefts_on_the_head_or_the_embedding_is_refused(base, tmp_path, target):
    write_with_peft(base, tmp_path, ["q_proj", target])
    with pytest.raises(ValueError, match=rf"tensor base_model\.model.*\.{target}\.\S* is unexpected: .*linear layers"):
        load_adapter(load(base), tmp_path, dropout=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config="),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora="),
        ({"arrow_config": {"top_k": 2}}, "arrow_config="),
        ({"r": 0}, r"r=0, lora_alpha=3\.0: both must be positive"),
        ({"lora_alpha": -1}, r"r=5, lora_alpha=-1\.0: both must be positive"),
        ({"r": None}, "(not a LoRA adapter_config|r=None)"),
        ({"r": "five"}, "(not a LoRA adapter_config|r='five')"),
        ({"r": 5.5}, r"r=5\.5"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
    ],
)
def test_an_adapter_config_that_is_no_lora_is_refused(base, adapter, changes, message):
    edit_config(adapter, **changes)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{message}"):
        load_adapter(load(base), adapter, dropout=0.0)


def test_a_rank_that_no_memory_holds_is_compared_with_the_tensors_first(base, adapter):
    edit_config(adapter, r=10**9)
    with pytest.raises(ValueError, match=r"lora_A has shape \(5, \d+\), the model asks for \(1000000000, \d+\)"):
        load_adapter(load(base), adapter, dropout=0.0)


def test_numbers_in_quotes_are_numbers_or_refused(base, adapter):
    edit_config(adapter, r="5", lora_alpha="3")
    model = load(base)
    try:
        load_adapter(model, adapter, dropout=0.0)
    except ValueError as error:
        assert "r='5'" in str(error)
    else:
        assert torch.equal(hidden(model), hidden(trained(injected(base))))


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"{}", b"\xff"])
def test_an_unreadable_adapter_config_is_refused_by_path(base, adapter, content):
    path = adapter / "adapter_config.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json: (no such file|not a LoRA adapter_config)"):
        load_adapter(load(base), adapter, dropout=0.0)


PREFIX = "base_model.model.model.layers."
UP_A, UP_B = f"{PREFIX}1.mlp.up_proj.lora_A.weight", f"{PREFIX}1.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({UP_A: None}, "up_proj.lora_A.weight is missing; is this adapter of another base model"),
        ({UP_A: None, UP_B: None}, "up_proj.lora_A.weight is missing; is this adapter of another base model"),
        ({UP_A.replace("1", "2"): torch.ones(5, 24)}, "layers.2.mlp.up_proj.lora_A.weight is unexpected"),
        ({UP_A.replace("up", "x"): torch.ones(5, 24)}, "x_proj.lora_A.weight is unexpected"),
        ({UP_A: torch.ones(5, 23)}, r"layers.1.mlp.up_proj.lora_A.* has shape \(5, 23\), the model asks for \(5, 24\)"),
        ({UP_B: torch.ones(40, 6)}, r"layers.1.mlp.up_proj.lora_B.* has shape \(40, 6\), the model asks for \(40, 5\)"),
        ({UP_B: torch.ones(40, 5).int()}, "layers.1.mlp.up_proj.lora_B.* is torch.int32"),
    ],
)
def test_an_adapter_of_another_model_is_refused_by_file_and_tensor(base, adapter, changes, message):
    tensors = load_file(adapter / WEIGHTS) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, adapter / WEIGHTS)
    with pytest.raises(ValueError, match=message) as refused:
        load_adapter(load(base), adapter, dropout=0.0)
    assert str(refused.value).startswith(str(adapter / WEIGHTS))


@pytest.mark.parametrize("content", [None, b"", b"garbage garbage"])
def test_unreadable_adapter_weights_are_refused(base, adapter, content):
    (adapter / WEIGHTS).unlink() if content is None else (adapter / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: not a readable safetensors file"):
        load_adapter(load(base), adapter, dropout=0.0)


def test_an_adapter_without_tensors_is_refused(base, adapter):
    save_file({}, adapter / WEIGHTS)
    with pytest.raises(ValueError, match="holds no lora_A and lora_B tensors"):
        load_adapter(load(base), adapter, dropout=0.0)
