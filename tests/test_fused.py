"""The fused log-softmax equals its slow twin in value and gradient, and never holds more than a chunk of logits.

Shapes: R response tokens, D width, V vocabulary, C tokens of a chunk.
"""

from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dpo.fused
from dpo.fused import fused_logps, fused_logps_and_log_sum_sq
from dpo.logprobs import gather_log_sum_sq, gather_logps

R, V, D = 7, 11, 3
CHUNKS = [1, 2, 3, 7, 100, None]


def random_inputs(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (7, 3), head (11, 3), targets (7,), and a weight for each log-probability, as a loss gives them."""
    generator = torch.Generator().manual_seed(0)
    hidden_RD = scale * torch.randn(R, D, generator=generator, dtype=torch.float64)
    head_VD = torch.randn(V, D, generator=generator, dtype=torch.float64)
    weight_R = torch.randn(R, generator=generator, dtype=torch.float64)
    return hidden_RD.to(dtype), head_VD.to(dtype), torch.randint(V, (R,), generator=generator), weight_R


# --- the slow twin ---


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("trained", ["hidden", "head", "both"])
def test_value_and_gradients_equal_gather_logps(trained, chunk):
    """trained: hidden alone is LoRA (the head is frozen), both is full fine-tuning."""
    hidden_RD, head_VD, target_R, weight_R = random_inputs()
    hidden_RD.requires_grad_(trained != "head")
    head_VD.requires_grad_(trained != "hidden")
    leaves = [leaf for leaf in (hidden_RD, head_VD) if leaf.requires_grad]
    fast_R, slow_R = fused_logps(hidden_RD, head_VD, target_R, chunk), gather_logps(hidden_RD, head_VD, target_R)
    torch.testing.assert_close(fast_R, slow_R)
    fast = torch.autograd.grad((weight_R * fast_R).sum(), leaves)
    slow = torch.autograd.grad((weight_R * slow_R).sum(), leaves)
    for got, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("block", [1, 25, 40])
@pytest.mark.parametrize("head_trained", [False, True])
def test_blocks_of_a_chunk_change_nothing(head_trained, block, monkeypatch):
    """Of 5 x 11: one, two or three rows at a time in the forward pass; one, three or five columns in the backward."""
    hidden_RD, head_VD, target_R, weight_R = random_inputs()
    leaves = [hidden_RD.requires_grad_(), head_VD.requires_grad_(head_trained)][: 1 + head_trained]
    whole_R, slow_R = (
        fused_logps_and_log_sum_sq(hidden_RD, head_VD, target_R, 5),
        gather_logps(hidden_RD, head_VD, target_R),
    )
    monkeypatch.setattr(dpo.fused, "BLOCK_ELEMENTS", block)
    fast_R = fused_logps_and_log_sum_sq(hidden_RD, head_VD, target_R, 5)
    assert torch.equal(torch.stack(fast_R), torch.stack(whole_R))
    fast, slow = (torch.autograd.grad((weight_R * x_R).sum(), leaves) for x_R in (fast_R[0], slow_R))
    torch.testing.assert_close(fast, slow)


def test_what_is_kept_survives_a_backward_pass():
    hidden_RD, head_VD, target_R, weight_R = random_inputs()
    head_VD.requires_grad_()
    loss = (weight_R * fused_logps(hidden_RD, head_VD, target_R)).sum()
    first, second = (torch.autograd.grad(loss, head_VD, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("head_trained", [False, True])
def test_log_sum_sq_equals_its_definition_has_no_gradient_and_leaves_the_logps_theirs(head_trained, chunk):
    hidden_RD, head_VD, target_R, weight_R = random_inputs()
    leaves = [hidden_RD.requires_grad_(), head_VD.requires_grad_(head_trained)][: 1 + head_trained]
    logps_R, log_sum_sq_R = fused_logps_and_log_sum_sq(hidden_RD, head_VD, target_R, chunk)
    torch.testing.assert_close(log_sum_sq_R, gather_log_sum_sq(hidden_RD, head_VD).detach())
    assert not log_sum_sq_R.requires_grad
    plain_R = fused_logps(hidden_RD, head_VD, target_R, chunk)
    assert torch.equal(logps_R, plain_R)
    both = [torch.autograd.grad((weight_R * x_R).sum(), leaves) for x_R in (logps_R, plain_R)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_a_tied_head_gets_both_of_its_gradients(chunk):
    """The embedding is the head: hidden = 2 E[ids], logits = hidden E^T."""
    _, head_VD, target_R, weight_R = random_inputs()
    head_VD.requires_grad_()
    hidden_RD = 2 * head_VD[torch.tensor([0, 5, 5, 10, 1, 2, 3])]
    (fast_VD,) = torch.autograd.grad((weight_R * fused_logps(hidden_RD, head_VD, target_R, chunk)).sum(), head_VD)
    hidden_RD = 2 * head_VD[torch.tensor([0, 5, 5, 10, 1, 2, 3])]
    (slow_VD,) = torch.autograd.grad((weight_R * gather_logps(hidden_RD, head_VD, target_R)).sum(), head_VD)
    torch.testing.assert_close(fast_VD, slow_VD)


@pytest.mark.parametrize("chunk", [2, 100])
@pytest.mark.parametrize("head_trained", [False, True])
def test_gradients_equal_finite_differences(head_trained, chunk):
    hidden_RD, head_VD, target_R, _ = random_inputs()
    hidden_RD.requires_grad_()
    head_VD.requires_grad_(head_trained)
    assert torch.autograd.gradcheck(lambda h, w: fused_logps(h, w, target_R, chunk), (hidden_RD, head_VD))


def test_no_response_tokens_give_no_logps_and_no_gradient():
    hidden_RD, head_VD = torch.zeros(0, D, requires_grad=True), torch.ones(V, D, requires_grad=True)
    logps_R = fused_logps(hidden_RD, head_VD, torch.empty(0, dtype=torch.long))
    logps_R.sum().backward()
    assert logps_R.shape == (0,) and head_VD.grad is not None and not head_VD.grad.any()


# --- precision ---


def test_bfloat16_stays_within_its_precision_of_float64():
    """Unit roundoff u = 2^-8. Only the logits are rounded: each by u |z|, so that
    |error of log p| = |error of z_y - error of logsumexp| <= 2 u max|z|, and nothing else in float32 (1e-5 allows it).

    The gradient (onehot - p) W: p is wrong by p (exp(2 u max|z|) - 1), the residual is rounded once more, then the sum.
    """
    hidden_RD, head_VD, target_R, _ = random_inputs(torch.bfloat16, scale=4)
    hidden_RD.requires_grad_()
    logps_R = fused_logps(hidden_RD, head_VD, target_R, 3)
    (slope_RD,) = torch.autograd.grad(logps_R.sum(), hidden_RD)

    exact_RD, exact_VD = hidden_RD.detach().double(), head_VD.double()
    logits_RV = exact_RD @ exact_VD.T
    logit_error_R = 2 * 2**-8 * logits_RV.abs().amax(-1)
    error_R = (logps_R.double() - logits_RV.log_softmax(-1)[torch.arange(R), target_R]).abs()
    assert (error_R <= logit_error_R + 1e-5).all()

    p_RV = logits_RV.softmax(-1)
    residual_RV = torch.nn.functional.one_hot(target_R, V) - p_RV
    residual_error_RV = p_RV * (logit_error_R.exp() - 1)[:, None] + 2**-8 * residual_RV.abs()
    exact_slope_RD = residual_RV @ exact_VD
    bound_RD = residual_error_RV @ exact_VD.abs() + 2**-8 * exact_slope_RD.abs()
    assert ((slope_RD.double() - exact_slope_RD).abs() <= 1.02 * bound_RD + 1e-5).all()  # 2%: products of roundings


@pytest.mark.parametrize("head_trained", [False, True])
def test_a_confident_token_keeps_its_gradient_in_bfloat16(head_trained):
    """h = 1, W = (8.25, 0, 0): p = 1 / (1 + 2 exp(-8.25)) = 0.9995, and d log p / dh = (1 - p) 8.25 = 0.0043.

    bfloat16 rounds p to 1. A softmax rounded before it is subtracted from the one-hot would leave a gradient of 0.
    """
    hidden_RD = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    head_VD = torch.tensor([[8.25], [0.0], [0.0]], dtype=torch.bfloat16, requires_grad=head_trained)
    logps_R = fused_logps(hidden_RD, head_VD, torch.tensor([0]))
    (slope_RD,) = torch.autograd.grad(logps_R.sum(), hidden_RD)
    p = 1 / (1 + 2 * torch.tensor(-8.25).exp().item())
    assert torch.tensor(p).bfloat16() == 1
    assert slope_RD.item() == pytest.approx((1 - p) * 8.25, rel=2 * 2**-8)


def test_the_heads_gradient_is_summed_in_float32_over_chunks():
    """1,024 equal tokens, one a chunk. A bfloat16 sum of equal terms stops growing at 256 of them."""
    hidden_RD = torch.ones(1024, 1, dtype=torch.bfloat16)
    head_VD = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logps_R = fused_logps(hidden_RD, head_VD, torch.zeros(1024, dtype=torch.long), 1)
    (slope_VD,) = torch.autograd.grad(logps_R.sum(), head_VD)
    assert slope_VD.flatten().tolist() == [512, -512]  # p = 1/2, so each token adds 1/2 and -1/2


def test_the_hidden_states_gradient_is_summed_in_float32_over_blocks(monkeypatch):
    """h = 0, W = (0, 1, ..., 1): d log p_0 / dh = -1023 / 1024, in 1,023 equal parts, one a block."""
    monkeypatch.setattr(dpo.fused, "BLOCK_ELEMENTS", 1)
    hidden_RD = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    head_VD = torch.ones(1024, 1, dtype=torch.bfloat16)
    head_VD[0] = 0
    logps_R = fused_logps(hidden_RD, head_VD.requires_grad_(), torch.tensor([0]))
    (slope_RD,) = torch.autograd.grad(logps_R.sum(), hidden_RD)
    assert slope_RD.item() == -1  # the nearest bfloat16


def test_a_float32_head_under_bfloat16_hidden_states_keeps_a_float32_gradient():
    """A trained head is a float32 master: it is cast where it multiplies, and its gradient is not."""
    hidden_RD, _, target_R, _ = random_inputs(torch.bfloat16)
    head_VD = random_inputs(torch.float32)[1].requires_grad_()
    logps_R = fused_logps(hidden_RD.requires_grad_(), head_VD, target_R, 2)
    hidden_slope_RD, head_slope_VD = torch.autograd.grad(logps_R.sum(), (hidden_RD, head_VD))
    assert (logps_R.dtype, hidden_slope_RD.dtype, head_slope_VD.dtype) == (
        torch.float32, torch.bfloat16, torch.float32
    )  # fmt: skip
    rounded_VD = head_VD.detach().bfloat16().float().requires_grad_()
    slow_R = gather_logps(hidden_RD.detach().float(), rounded_VD, target_R)
    (expected_VD,) = torch.autograd.grad(slow_R.sum(), rounded_VD)
    # Logits of a few units are off by 2^-8 of themselves, so softmax and residual by a few times 2^-8.
    torch.testing.assert_close(head_slope_VD, expected_VD, rtol=0, atol=0.05)


# --- memory ---


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, in forward and backward."""

    def __init__(self):
        super().__init__()
        self.elements, self.operations = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *(t.numel() for t in tensors)])
        self.operations += 1
        return result


def largest_tensor(function, head_trained: bool) -> int:
    """R = 61, V = 97, D = 3: the whole logits have 5,917 elements, the largest input 291."""
    torch.manual_seed(0)
    hidden_RD = torch.randn(61, 3, requires_grad=True)
    head_VD = torch.randn(97, 3, requires_grad=head_trained)
    with LargestTensor() as watch:
        logps_R = function(hidden_RD, head_VD, torch.arange(61))
        forward = watch.operations
        logps_R.sum().backward()
    assert watch.operations > forward > 0
    return watch.elements


@pytest.mark.parametrize("head_trained", [False, True])
def test_nothing_larger_than_one_chunk_of_logits_ever_exists(head_trained, monkeypatch):
    """5 x 97 elements, of 61 x 97 in all; asked for, or by CHUNK_ELEMENTS, which here has room for 5.9 rows."""
    assert largest_tensor(lambda h, w, y: fused_logps(h, w, y, 5), head_trained) == 5 * 97
    monkeypatch.setattr(dpo.fused, "CHUNK_ELEMENTS", 580)
    assert largest_tensor(fused_logps, head_trained) == 5 * 97
    assert largest_tensor(lambda *a: fused_logps_and_log_sum_sq(*a)[0], head_trained) == 5 * 97
    assert largest_tensor(gather_logps, head_trained) == 61 * 97  # the watch sees what the slow twin does


def test_a_vocabulary_larger_than_a_chunk_goes_row_by_row(monkeypatch):
    monkeypatch.setattr(dpo.fused, "CHUNK_ELEMENTS", 96)
    assert largest_tensor(fused_logps, head_trained=False) == 291  # the head itself, then 97 logits at a time


def most_at_once(tokens: int, head_trained: bool) -> int:
    """The most elements that tensors take at once in forward and backward, beyond the inputs; V = 97, D = 3."""
    hidden_RD = torch.randn(tokens, 3, requires_grad=True)
    head_VD = torch.randn(97, 3, requires_grad=head_trained)
    target_R = torch.zeros(tokens, dtype=torch.long)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        fused_logps(hidden_RD, head_VD, target_R, 20).sum().backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes)) // torch.float32.itemsize


@pytest.mark.parametrize("head_trained", [False, True])
def test_memory_grows_with_the_tokens_by_their_gradient_alone(head_trained):
    """A token more: 3 elements of the gradient, 3 of what is added to it or kept for it, and some single numbers.

    Its 97 logits would be 97.
    """
    per_token = (most_at_once(900, head_trained) - most_at_once(300, head_trained)) / 600
    assert 3 <= per_token <= 2 * 3 + 10
