"""Schedules equal transformers', gradients are clipped to their joint norm, fp16's scale adapts."""

import math

import pytest
import torch
from torch import nn

from dpo.optim import SCHEDULES, LossScale, build_optimizer, clip_gradients, learning_rate_at


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 1), (0, 7), (3, 11), (1, 1), (5, 5), (11, 7)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rates_are_transformers_step_for_step(schedule, warmup_steps, total_steps):
    """Also where the warm-up is as long as the run or longer; `constant` knows no warm-up there either."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    oracle = get_scheduler(schedule, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)
    settings = {"lr_scheduler_type": schedule, "warmup_steps": warmup_steps, "total_steps": total_steps}
    for step in range(total_steps):
        assert learning_rate_at(step, learning_rate=3e-4, **settings) == pytest.approx(
            oracle.get_last_lr()[0], rel=1e-12, abs=1e-18
        )
        optimizer.step()
        oracle.step()


def test_cosine_rates_by_hand():
    """Peak 8, 2 steps of warm-up, 6 in all: 0, 4 | 8, 8 (1 + cos 45)/2, 4, 8 (1 - cos 45)/2, and 0 at the end."""
    settings = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "total_steps": 6}
    half = math.sqrt(0.5)
    expected = [0, 4, 8, 4 + 4 * half, 4, 4 - 4 * half, 0]
    assert [learning_rate_at(s, learning_rate=8, **settings) for s in range(7)] == pytest.approx(expected)


def test_an_unknown_schedule_has_no_rate():
    with pytest.raises(KeyError, match="polynomial"):
        learning_rate_at(0, learning_rate=1, lr_scheduler_type="polynomial", warmup_steps=0, total_steps=1)


# --- what is decayed ---


def named(**shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    return [(name.replace("__", "."), nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]


def test_biases_and_norms_are_not_decayed_and_frozen_weights_not_trained():
    """A gradient of 0 leaves weight decay alone: what is decayed shrinks by lr * 0.5 = 5%."""
    parameters = named(
        layers__0__q_proj__weight=(3, 2), layers__0__q_proj__bias=(3,), layers__0__input_layernorm__weight=(2,),
        layers__0__q_norm__weight=(2,), norm__weight=(2,), layers__0__q_proj__lora_A=(1, 2), frozen__weight=(7,),
    )  # fmt: skip
    parameters[-1][1].requires_grad_(False)
    optimizer = build_optimizer("adamw_torch", parameters, weight_decay=0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for _, parameter in parameters[:-1]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    shrunk = {name for name, p in parameters if p[..., 0].detach().flatten()[0].item() == pytest.approx(0.95)}
    assert shrunk == {"layers.0.q_proj.weight", "layers.0.q_proj.lora_A"}
    assert all(torch.equal(p, torch.ones_like(p)) for name, p in parameters if name not in shrunk)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6


def test_nothing_moves_before_a_learning_rate_is_set():
    (entry,) = named(w=(3,))
    optimizer = build_optimizer("adamw_torch", [entry], weight_decay=0.5)
    entry[1].grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(entry[1], torch.ones(3))


# --- clipping ---


def with_gradients(*gradients: list[float]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(g))) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    return parameters


def test_gradients_are_scaled_to_the_joint_norm():
    """(3) and (0, 4) have norm 5 together; to 1 they become (0.6) and (0, 0.8), within torch's 1e-6 in the divisor."""
    parameters = with_gradients([3.0], [0.0, 4.0])
    assert clip_gradients(parameters, 1.0).item() == pytest.approx(5)
    assert [p.grad.tolist() for p in parameters] == [pytest.approx([0.6], rel=1e-5), pytest.approx([0, 0.8], rel=1e-5)]


@pytest.mark.parametrize("max_norm", [0, 5.1, 1e9])
def test_gradients_below_the_norm_and_with_norm_0_are_left(max_norm):
    parameters = with_gradients([3.0], [0.0, 4.0])
    assert clip_gradients(parameters, max_norm).item() == pytest.approx(5)
    assert [p.grad.tolist() for p in parameters] == [[3], [0, 4]]


# --- fp16's loss scale ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_other_dtypes_than_float16_are_not_scaled(dtype):
    """Even an infinite gradient is the trainer's to refuse, not the scale's to skip."""
    scale = LossScale(dtype)
    parameters = with_gradients([3.0, float("inf")])
    assert scale.unscale(parameters) and scale.scale == 1
    assert parameters[0].grad.tolist() == [3, float("inf")]


def test_gradients_are_divided_by_the_scale():
    scale = LossScale(torch.float16)
    assert scale.scale == 2**16
    parameters = [*with_gradients([2.0**16, -(2.0**17)]), nn.Parameter(torch.zeros(1))]  # the last has no gradient
    assert scale.unscale(parameters)
    assert parameters[0].grad.tolist() == [1, -2]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", [0, 1])
def test_an_overflow_halves_the_scale_and_skips_the_step(bad, where):
    scale = LossScale(torch.float16)
    scale.good_steps = 1999
    gradients = [[1.0, 1.0], [1.0, 1.0]]
    gradients[where][1] = bad
    assert not scale.unscale(with_gradients(*gradients))
    assert (scale.scale, scale.good_steps) == (2**15, 0)


def test_the_scale_doubles_after_2000_steps_without_an_overflow():
    scale = LossScale(torch.float16)
    scales = []
    for _ in range(4000):
        assert scale.unscale(with_gradients([1.0]))
        scales.append(scale.scale)
    assert (scales[1998], scales[1999], scales[3998], scales[3999]) == (2**16, 2**17, 2**17, 2**18)


def test_scale_and_skipped_steps_are_those_of_torchs_grad_scaler():
    """Overflows at the start, in a row, one step before the scale would have doubled, and right after it did."""
    overflows = {0, 1, 2001, 4002}
    ours_p, theirs_p = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    ours, theirs = (torch.optim.SGD([p], lr=1.0) for p in (ours_p, theirs_p))
    scale, scaler = LossScale(torch.float16), torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2000)
    scales = []
    for step in range(4010):
        scaler.scale(torch.zeros(1))  # creates its scale
        gradient = math.inf if step in overflows else 1.0
        for parameter, by in ((ours_p, scale.scale), (theirs_p, scaler.get_scale())):
            parameter.grad = torch.tensor([gradient * by])
        if scale.unscale([ours_p]):
            ours.step()
        scaler.step(theirs)
        scaler.update()
        assert (scale.scale, ours_p.item()) == (scaler.get_scale(), theirs_p.item()), step
        scales.append(scale.scale)
    assert [scales[step] for step in (0, 1, 2000, 2001, 4000, 4001, 4002)] == [
        2.0**power for power in (15, 14, 14, 13, 13, 14, 13)
    ]
