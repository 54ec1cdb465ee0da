"""CUDA computes what the CPU does; skipped where there is none."""

import pytest
import torch

from dpo.build import WORLD
from dpo.logprobs import sum_over_responses, token_logps
from dpo.memory import Lengths, forecast
from models.config import parse_model_config
from models.lora import inject_lora
from models.stream import pack
from models.transformer import Transformer
from models.weights import load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this PyTorch sees no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_and_adapter_gradients_are_the_cpus(dtype):
    """bfloat16 keeps 8 bits of every activation, so about 1% of a log-probability of some nats."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(3, 800, (n,), generator=generator).tolist()
    stream = pack([draw(17), draw(5)], [[draw(9), draw(30)], [draw(1), draw(12), draw(4)]])
    results = {}
    for device in ("cpu", "cuda"):
        model = load_model(WORLD / "model", dtype=dtype, device=torch.device(device))
        layers = inject_lora(model, rank=4, alpha=8, dropout=0.0, use_rslora=False, target="all", seed=0)
        logps = sum_over_responses(token_logps(model, stream.to(model.device)), stream.lengths_B.to(device))
        logps.sum().backward()
        gradients = {name: layer.lora_B.grad.cpu() for name, layer in layers.items()}
        results[device] = logps.detach().cpu(), gradients
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}
    torch.testing.assert_close(results["cuda"][0], results["cpu"][0], **tolerance)
    for name, gradient in results["cpu"][1].items():
        difference = (results["cuda"][1][name] - gradient).norm() / gradient.norm()
        assert difference < (1e-3 if dtype == torch.float32 else 0.1), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_predicted_peak_is_what_the_allocator_counts(dtype, full, checkpointing):
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
