"""Packed weights compute what `Linear` does, to rounding; adapters stay apart; nothing is left after the block.

Shapes: T tokens, D width, V vocabulary, O outputs and I inputs of a layer.
"""

import pytest
import torch
from test_transformer import PROMPTS, RESPONSES, build, load, logits_of

from models.generate import generate
from models.lora import inject_lora, lora_layers
from models.packed import packed
from models.sampling import GREEDY
from models.stream import pack
from models.transformer import Linear, Transformer, project

FAMILIES = ("llama-biases", "llama-tied", "qwen2", "qwen3", "qwen3-moe")
# Of the largest logit: some ten roundings of the dtype, one after the other.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {family: build(family, tmp_path_factory.mktemp(family))[1] for family in FAMILIES}


def is_packed(model: Transformer) -> bool:
    """Whether anything is; asserts that it is all or nothing."""
    layers = [module for name, module in model.named_modules() if isinstance(module, Linear) and name != "lm_head"]
    firsts = [layer for layer in layers if layer.packed is not None]
    # q k v, gate up: of the seven layers of a block four hold a product, whatever the experts.
    assert len(firsts) in (0, len([m for m in model.modules() if hasattr(m, "q_proj") or hasattr(m, "gate_proj")]) * 2)
    assert bool(firsts) == (model.packed_head is not None)
    return bool(firsts)


@torch.no_grad()
def assert_packs_to_rounding(model: Transformer) -> None:
    stream = pack(PROMPTS, RESPONSES)
    plain_TV = model.logits(model(stream))
    with packed(model):
        assert is_packed(model)
        packed_TV = model.logits(model(stream))
    assert packed_TV.dtype == plain_TV.dtype == model.dtype
    assert (packed_TV - plain_TV).abs().max() <= TOLERANCE[model.dtype] * plain_TV.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_are_the_unpacked_ones_to_rounding(directories, family, dtype):
    assert_packs_to_rounding(load(directories[family], dtype))


def test_float32_masters_of_a_bfloat16_model_are_packed_in_bfloat16(directories):
    model = load(directories["llama-biases"])
    model.dtype = torch.bfloat16
    assert_packs_to_rounding(model)
    assert model.head_weight_VD.dtype == torch.float32


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_adapted_layers_pack_to_rounding(directories, dtype):
    model = load(directories["qwen2"], dtype)
    inject_lora(model, rank=2, alpha=4, dropout=0.0, use_rslora=False, target="q_proj,up_proj,v_proj", seed=0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(0))
    assert_packs_to_rounding(model)


@torch.no_grad()
def test_an_update_too_small_for_a_bfloat16_weight_is_not_lost(directories):
    """Weights of +-0.75 cancel over x = 1, so 32 updates of 0.001 are all that is left; 0.751 rounds to 0.75."""
    model = load(directories["qwen2"], torch.bfloat16)
    inject_lora(model, rank=1, alpha=1, dropout=0.0, use_rslora=False, target="k_proj", seed=0)
    attention = model.model.layers[0].self_attn
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    for layer in layers:
        layer.weight.copy_(torch.tensor([0.75, -0.75]).repeat(16))
        layer.bias.zero_()
    layers[1].lora_A.fill_(1)
    layers[1].lora_B.fill_(0.001)
    with packed(model):
        assert is_packed(model)
        q_TD, k_TD, v_TD = project(torch.ones(1, 32, dtype=torch.bfloat16), *layers)
    assert k_TD.float().flatten().tolist() == pytest.approx([0.032] * 16, rel=2**-8)
    assert not q_TD.any() and not v_TD.any()


def test_an_inner_block_packs_nothing_anew_and_the_outer_one_ends_it(directories):
    model = load(directories["qwen3"])
    with packed(model):
        head = model.packed_head
        with packed(model):
            assert model.packed_head is head
        assert is_packed(model)
        assert model.packed_head is head
    assert not is_packed(model)


def test_nothing_is_left_after_an_error(directories):
    model = load(directories["qwen3-moe"])
    with pytest.raises(KeyboardInterrupt), packed(model):
        assert is_packed(model)
        raise KeyboardInterrupt
    assert not is_packed(model)


def test_nothing_is_left_after_an_error_while_packing(directories, monkeypatch):
    model = load(directories["qwen3"])
    monkeypatch.setattr(Transformer, "head_weight_VD", property(lambda model: 1 / 0))
    with pytest.raises(ZeroDivisionError), packed(model):
        pass
    assert not is_packed(model)


def test_after_the_block_weights_count_again(directories):
    model = load(directories["qwen3"])
    stream = pack(PROMPTS, RESPONSES)
    with packed(model):
        before_TV = model.logits(model(stream))
    model.model.layers[0].mlp.down_proj.weight.data.mul_(2)
    changed_TV = model.logits(model(stream))
    assert (changed_TV - before_TV).abs().max() > 0.1
    with packed(model):
        assert (model.logits(model(stream)) - changed_TV).abs().max() <= 1e-5 * changed_TV.abs().max()


def test_gradients_after_the_block_are_those_of_a_model_never_packed(directories):
    gradients = []
    for blocks in (0, 1):
        model = load(directories["qwen2"]).requires_grad_()
        for _ in range(blocks):
            with packed(model), torch.no_grad():
                model(pack(PROMPTS, RESPONSES))
        logits_of(model, pack(PROMPTS, RESPONSES)).sin().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def answers(model: Transformer, **options) -> list[list[int]]:
    options |= {
        "samples": 1,
        "max_new_tokens": 6,
        "stop_ids": (),
        "sampling": GREEDY,
        "batch_size": 3,
        "seeds": [0] * 3,
    }
    return [completion.ids for completion in generate(model, PROMPTS, **options)]


def test_generating_packs_for_its_length(directories):
    model = load(directories["qwen3"])
    seen = []
    answers(model, watch=lambda *_: seen.append(is_packed(model)) is not None)
    assert seen == [True] * 18
    assert not is_packed(model)


# --- where there is no kernel ---


def test_float64_stays_unpacked(directories):
    model = load(directories["qwen2"], torch.float64)
    with packed(model):
        assert not is_packed(model)


def test_float16_generates_on_a_cpu_with_or_without_a_kernel_for_it(directories):
    assert [len(ids) for ids in answers(load(directories["qwen2"], torch.float16))] == [6, 6, 6]


@pytest.mark.parametrize("missing", [AttributeError, RuntimeError])
def test_a_pytorch_without_the_kernel_generates_the_same_unpacked(directories, monkeypatch, missing):
    """Without oneDNN, or a later PyTorch without these private functions; a CPU too old for oneDNN's bfloat16."""
    model = load(directories["qwen2"])
    expected = answers(model)

    class Without:
        def __getattr__(self, name):
            raise missing(name)

    monkeypatch.setattr(torch.ops, "mkldnn", Without())
    with packed(model):
        assert not is_packed(model)
    assert answers(model) == expected


def test_a_packed_head_lets_gradients_through(directories):
    model = load(directories["qwen2"])
    hidden_ND = torch.randn(3, model.config.hidden_size, requires_grad=True)
    (expected_ND,) = torch.autograd.grad(model.logits(hidden_ND).sin().sum(), hidden_ND)
    with packed(model):
        (gradient_ND,) = torch.autograd.grad(model.logits(hidden_ND).sin().sum(), hidden_ND)
    assert torch.equal(gradient_ND, expected_ND)
