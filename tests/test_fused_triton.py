"""The Triton kernel equals float64's log-softmax; in Triton's interpreter where there is no CUDA (see conftest.py).

Shapes: C tokens, V vocabulary.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: PyTorch's CUDA builds and the extra `test` bring it")

from dpo import fused
from dpo.fused import fused_logps, fused_logps_and_log_sum_sq
from dpo.fused_triton import BLOCK, log_softmax_of_target

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]
INF = torch.inf


def expected(logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p, the log-sum-exp, log sum p^2 and the residual, in float64."""
    logps_CV = logits_CV.double().log_softmax(-1)
    onehot_CV = torch.nn.functional.one_hot(target_C, logits_CV.shape[1])
    logps_C = logps_CV.gather(-1, target_C[:, None])[:, 0]
    return logps_C, logits_CV.double().logsumexp(-1), (2 * logps_CV).logsumexp(-1), onehot_CV - logps_CV.exp()


def compare(logits_CV: Tensor, target_C: Tensor, **tolerance: float) -> None:
    """What the kernel makes of the logits, all four results, against float64's."""
    ours_CV = logits_CV.clone().to(DEVICE)
    vectors = log_softmax_of_target(ours_CV, target_C.to(DEVICE), sum_sq=True, residual=True)
    for got, wanted in zip((*vectors, ours_CV), expected(logits_CV, target_C), strict=True):
        torch.testing.assert_close(got.cpu().double(), wanted, equal_nan=True, **tolerance)


@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_is_float64s_log_softmax_for_any_vocabulary(size):
    """Targets at both ends and in the middle; logits of some units, as a model's are, that rise from block to block."""
    generator = torch.Generator().manual_seed(size)
    logits_CV = 4 * torch.randn(3, size, generator=generator) + torch.linspace(0, 9, size)
    compare(logits_CV, torch.tensor([0, size - 1, size // 2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [7, BLOCK + 1])
@pytest.mark.parametrize("at", [0, -1], ids=["first", "last"])
def test_extreme_logits_neither_overflow_nor_become_nan(size, at):
    """One of +-10,000, of which the other p are 0 or this one is; a whole first block of -inf; a target of -inf."""
    logits_CV = torch.zeros(4, size)
    logits_CV[0, at], logits_CV[1, at] = 1e4, -1e4
    logits_CV[2, :-1] = -INF
    logits_CV[3, at] = -INF
    compare(logits_CV, torch.tensor([at % size, 1, size - 1, at % size]), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_is_not_hidden():
    """NaN, inf, and nothing but -inf have no softmax: every result is NaN, so that the update is skipped."""
    logits_CV = torch.zeros(3, BLOCK + 1)
    logits_CV[0, 3], logits_CV[1, 3] = torch.nan, INF
    logits_CV[2] = -INF
    logps_C, _, log_sum_sq_C = log_softmax_of_target(
        logits_CV.to(DEVICE), torch.tensor([0, 0, 0], device=DEVICE), sum_sq=True, residual=False
    )
    assert logps_C.isnan().all() and log_sum_sq_C is not None and log_sum_sq_C.isnan().all()


def test_without_the_residual_the_logits_stay_and_no_rows_give_nothing():
    logits_CV = torch.randn(2, 11, device=DEVICE)
    before_CV = logits_CV.clone()
    target_C = torch.tensor([0, 10], device=DEVICE)
    logps_C, _, nothing = log_softmax_of_target(logits_CV, target_C, sum_sq=False, residual=False)
    assert nothing is None and torch.equal(logits_CV, before_CV)
    torch.testing.assert_close(logps_C, before_CV.log_softmax(-1)[[0, 1], [0, 10]])
    none_C, _, _ = log_softmax_of_target(logits_CV[:0], target_C[:0], sum_sq=False, residual=True)
    assert none_C.shape == (0,)


@pytest.mark.parametrize("head_trained", [False, True])
def test_the_fused_log_probabilities_are_the_same_with_and_without_the_kernel(monkeypatch, head_trained):
    """Values, log sum p^2 and gradients, in chunks of two of five tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden_RD, head_VD = (torch.randn(n, 3, generator=generator).to(DEVICE) for n in (5, 23))
    target_R, slope_R = torch.arange(5, device=DEVICE) * 5, torch.randn(5, generator=generator).to(DEVICE)
    results = []
    for kernel in (log_softmax_of_target, None):
        module = sys.modules[kernel.__module__] if kernel else None
        monkeypatch.setattr(fused, "kernel_of", lambda *_, module=module: module)
        leaves = [hidden_RD.clone().requires_grad_(), head_VD.clone().requires_grad_(head_trained)]
        logps_R, log_sum_sq_R = fused_logps_and_log_sum_sq(*leaves, target_R, 2)
        (fused_logps(*leaves, target_R, 2) * slope_R).sum().backward()
        results.append([logps_R.detach(), log_sum_sq_R, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert len(results[0]) == 3 + head_trained
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_kernel_is_for_cuda_and_not_for_float64():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert fused.kernel_of(cpu, torch.float32) is None and fused.kernel_of(cuda, torch.float64) is None
    assert fused.kernel_of(cuda, torch.bfloat16) is sys.modules["dpo.fused_triton"]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dpo.fused_triton import BLOCK, _kernel

for dtype in ("bf16", "fp16", "fp32"):
    for architecture in (80, 90):
        for full in (False, True):
            types = {"logits": f"*{dtype}", "target": "*i64", "logps": "*fp32", "lse": "*fp32",
                     "log_sum_sq": "*fp32", "stride": "i32", "vocabulary": "i32", "RESIDUAL": "constexpr",
                     "BLOCK": "constexpr"}
            constants = {"RESIDUAL": full, "BLOCK": BLOCK}
            if not full:
                constants |= {"log_sum_sq": None}
                types |= {"log_sum_sq": "constexpr"}
            source = ASTSource(_kernel, types, constants)
            assert triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["cubin"]
"""


@pytest.mark.slow
def test_the_kernel_compiles_for_cuda_where_no_cuda_is(tmp_path):
    """For Ampere and Hopper, every dtype, with all of its parts and with none; in a process without interpreter."""
    environment = {"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    root = Path(__file__).parent.parent
    # From a file, because Triton reads a kernel's source and not what is passed with -c.
    script = tmp_path / "compile.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(root)!r})\n{COMPILE}")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
