"""CUDA computes what the CPU does; skipped where there is none."""

import pytest
import torch

from dpo.build import WORLD
from dpo.checkpoint import optimizer_tensors
from dpo.logprobs import sum_over_responses, token_logps
from dpo.memory import Lengths, forecast
from dpo.optim import build_optimizer
from models.attention import attention, dense_attention
from models.compiled import compile_blocks
from models.config import parse_model_config
from models.flex import flex_attends
from models.lora import inject_lora
from models.stream import pack
from models.transformer import Transformer
from models.weights import load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this PyTorch sees no CUDA device"),
]


WAYS = ["sdpa", "flex_attention", "torch_compile"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_and_adapter_gradients_are_the_cpus(dtype, way):
    """bfloat16 keeps 8 bits of every activation, so about 1% of a log-probability of some nats."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(3, 800, (n,), generator=generator).tolist()
    stream = pack([draw(17), draw(5)], [[draw(9), draw(30)], [draw(1), draw(12), draw(4)]])
    results = {}
    for device in ("cpu", "cuda"):
        model = load_model(WORLD / "model", dtype=dtype, device=torch.device(device))
        layers = inject_lora(model, rank=4, alpha=8, dropout=0.0, use_rslora=False, target="all", seed=0)
        if device == "cuda" and way == "torch_compile":
            compile_blocks(model)
        elif device == "cuda":
            model.attn_implementation = way
        logps = sum_over_responses(token_logps(model, stream.to(model.device)), stream.lengths_B.to(device))
        logps.sum().backward()
        gradients = {name: layer.lora_B.grad.cpu() for name, layer in layers.items()}
        results[device] = logps.detach().cpu(), gradients
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}
    torch.testing.assert_close(results["cuda"][0], results["cpu"][0], **tolerance)
    for name, gradient in results["cpu"][1].items():
        difference = (results["cuda"][1][name] - gradient).norm() / gradient.norm()
        assert difference < (1e-3 if dtype == torch.float32 else 0.1), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_of_the_head_is_float64s_log_softmax(dtype):
    """A vocabulary of 50,257, logits of some units, targets at both ends; the residual is rounded once."""
    fused_triton = pytest.importorskip("dpo.fused_triton", reason="Triton is not installed")
    logits_CV = (4 * torch.randn(5, 50257, device="cuda")).to(dtype)
    target_C = torch.tensor([0, 50256, 7, 4096, 4095], device="cuda")
    exact_CV = logits_CV.double().log_softmax(-1)
    residual_CV = torch.nn.functional.one_hot(target_C, 50257) - exact_CV.exp()
    lse_exact_C = logits_CV.double().logsumexp(-1)
    logps_C, lse_C, log_sum_sq_C = fused_triton.log_softmax_of_target(logits_CV, target_C, sum_sq=True, residual=True)
    close = torch.testing.assert_close
    close(lse_C.double(), lse_exact_C, rtol=1e-5, atol=1e-5)
    close(logps_C.double(), exact_CV.gather(-1, target_C[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    close(log_sum_sq_C.double(), (2 * exact_CV).logsumexp(-1), rtol=1e-5, atol=1e-5)
    smallest = 1e-9 if dtype != torch.float16 else 1e-7
    close(logits_CV.double(), residual_CV, rtol=max(torch.finfo(dtype).eps, 2e-5), atol=smallest)


@pytest.mark.parametrize("window", [None, 100])
def test_every_attention_is_the_dense_formula_in_value_and_gradient(window):
    """bfloat16 against float64, streams of four lengths, 9 heads on 3; the index tensors of pack are on the GPU."""
    generator = torch.Generator().manual_seed(0)
    for shape in ([(200, [150, 70])], [(1, [1])], [(300, [7, 400, 129]), (64, [64])], [(90, []), (5, [500, 2])]):
        stream = pack([[0] * x for x, _ in shape], [[[0] * y for y in ys] for _, ys in shape])
        owner = [(p, j, t) for p, (x, ys) in enumerate(shape)
                 for j, n, start in ((-1, x, 0), *((j, y, x) for j, y in enumerate(ys)))
                 for t in range(start, start + n)]  # fmt: skip
        p_T, j_T, t_T = (torch.tensor(x) for x in zip(*owner, strict=True))
        behind_TT = t_T[:, None] - t_T
        visible_TT = (p_T[:, None] == p_T) & ((j_T == -1) | (j_T[:, None] == j_T)) & (behind_TT >= 0)
        visible_TT &= behind_TT < (window or len(owner))
        exact = [torch.randn(len(owner), heads, 64, generator=generator).bfloat16().double() for heads in (9, 3, 3)]
        exact = [x.requires_grad_() for x in exact]
        expected_THE = dense_attention(*exact, visible_TT)
        expected_THE.square().sum().backward()
        stream = stream.to(torch.device("cuda"))
        for attend in (lambda *qkv: attention(*qkv, stream, window), flex_attends(stream, [window])[0]):  # noqa: B023
            ours = [x.detach().cuda().bfloat16().requires_grad_() for x in exact]
            out_THE = attend(*ours)
            out_THE.float().square().sum().backward()
            for got, wanted in zip(
                [out_THE, *(x.grad for x in ours)], [expected_THE, *(x.grad for x in exact)], strict=True
            ):
                assert (got.detach().cpu().double() - wanted).norm() < 0.02 * wanted.norm()


def test_a_resumed_optimizer_takes_the_step_that_the_first_would_have_taken():
    """Its state goes over the CPU, as a checkpoint's does. `step` lies on the GPU, as the fused kernel wants it."""
    policies = [load_model(WORLD / "model", dtype=torch.float32, device=torch.device("cuda")) for _ in range(2)]
    for policy in policies:
        inject_lora(policy, rank=4, alpha=8, dropout=0.0, use_rslora=False, target="all", seed=0)
    optimizers = [build_optimizer("adamw_torch", p.named_parameters(), weight_decay=0.1) for p in policies]

    def step(number: int, which: int) -> None:
        generator = torch.Generator(device="cuda").manual_seed(number)
        for group in optimizers[which].param_groups:
            group["lr"] = 1e-3
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator, device="cuda")
        optimizers[which].step()

    step(0, 0)
    step(1, 0)
    parameters = [[x for x in policy.parameters() if x.requires_grad] for policy in policies]
    states = [optimizer_tensors(policy, o) for policy, o in zip(policies, optimizers, strict=True)]
    for before, after in ((states[0].values(), states[1].values()), parameters):
        for old, new in zip(before, after, strict=True):
            new.data.copy_(old.detach().cpu())
    step(2, 0)
    step(2, 1)
    assert all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))


@pytest.mark.parametrize("attn_implementation", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_predicted_peak_is_what_the_allocator_counts(dtype, full, checkpointing, attn_implementation):
    """Within 15%, of a model of 60 million weights and the second of two micro-batches."""
    shape = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1536,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
        "tie_word_embeddings": True,
    }  # fmt: skip
    torch.randn(8, 8, device="cuda", requires_grad=True).mm(torch.randn(8, 8, device="cuda")).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.device("cuda"):
        model = Transformer(parse_model_config(shape), dtype, checkpointing).to(torch.float32 if full else dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.attn_implementation = attn_implementation
    if full:
        model.requires_grad_(True)
    else:
        inject_lora(model, rank=8, alpha=16, dropout=0.0, use_rslora=False, target="all", seed=0)
    rows = [Lengths(200, (300, 250)), Lengths(150, (200, 400))]
    ids = lambda n: torch.randint(3, 32000, (n,)).tolist()
    stream = pack([ids(row.prompt) for row in rows], [[ids(n) for n in row.responses] for row in rows])
    for _ in range(2):
        token_logps(model, stream.to(model.device)).mean().backward()
    measured = torch.cuda.max_memory_allocated() - before
    predicted = forecast(model, rows, optim="sgd", reference=0, alone=False, evaluated=[], answers=[]).peak
    assert predicted == pytest.approx(measured, rel=0.15)
