"""The optimisers are PyTorch's to the bit, AdamW its paper's; and a run imports no compiler."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dpo.optim import build_optimizer
from dpo.optimizers import OPTIMIZERS

THEIRS = {
    "rmsprop": lambda groups: torch.optim.RMSprop(groups), "sgd": lambda groups: torch.optim.SGD(groups),
    "adamw_torch": lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True),
}  # fmt: skip


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_are_torchs_to_the_bit(name, dtype, decay):
    """Rates that change, gradients of many sizes, a weight that has none for a while and one that never has."""
    draw = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=draw, dtype=dtype) for shape in ((7, 5), (3,), (4,))]
    ours_p, theirs_p = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    ours = build_optimizer(name, [(f"{i}.q_proj", p) for i, p in enumerate(ours_p)], weight_decay=decay)
    theirs = THEIRS[name]([{"params": theirs_p, "weight_decay": decay}])
    for step in range(50):
        for which, parameters in ((ours, ours_p), (theirs, theirs_p)):
            draw.manual_seed(step)
            which.param_groups[0]["lr"] = 0.01 / (1 + step)
            which.zero_grad()
            for i, parameter in enumerate(parameters[:2]):
                gradient = torch.randn(parameter.shape, generator=draw, dtype=dtype) * 10 ** (step % 7 - 4)
                parameter.grad = gradient if i == 0 or step > 20 else None
            which.step()
        assert all(torch.equal(a, b) for a, b in zip(ours_p, theirs_p, strict=True)), step
    for ours_one, theirs_one in zip(ours_p[:2], theirs_p[:2], strict=True):
        for key in ours.keeps:
            assert torch.equal(ours.state[ours_one][key], theirs.state[theirs_one][key])
    assert {key for key, value in theirs.state[theirs_p[0]].items() if value is not None} - {"step"} == {
        *ours.keeps
    } - {"step"}
    assert ours_p[2] not in ours.state and torch.equal(ours_p[2], starts[2])


def test_two_adamw_steps_by_hand():
    """Loshchilov & Hutter 2019, Algorithm 2, with betas 0.9 and 0.999, epsilon 1e-8: gradients 0.5, then -0.25."""
    parameter = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = build_optimizer("adamw_torch", [("w", parameter)], weight_decay=0.01)
    w, m, v = 1.0, 0.0, 0.0
    for step, gradient in enumerate((0.5, -0.25), start=1):
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        w -= 0.1 * 0.01 * w
        w -= 0.1 * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.999**step)) + 1e-8)
        assert parameter.item() == pytest.approx(w, rel=1e-12)


@pytest.mark.slow
def test_a_run_imports_no_compiler():
    """A second of every start; torch_compile=true is what brings it."""
    code = "import sys, train, dpo.trainer\nfrom dpo.optimizers import AdamW\nprint('torch._dynamo' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
