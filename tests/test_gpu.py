"""CUDA computes what the CPU does; skipped where there is none."""

import pytest
import torch

from dpo.build import WORLD
from dpo.logprobs import sum_over_responses, token_logps
from models.lora import inject_lora
from models.stream import pack
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
