"""The start certificate: what must hold before the first update, checked on the first rows, or the run does not begin.

    gradients of the trained weights     finite, and not all zero
    policy and reference the same        every log-ratio 0 and the loss at its closed form, to the dtype's rounding
    policy and reference two models      how far apart they start is said

Most runs that "do not learn" or "learn at once" fail one of these; the errors name the likely cause. It costs one
forward and backward pass over one micro-batch.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from dpo.preference import PreferenceObjective
from dpo.tokens import Encoded
from models.stream import Stream
from models.transformer import Transformer

SCALE = 2.0**10
# Nats per token by which a log-ratio may miss 0: a cached or another batch's reference is rounded differently.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.05}


def certify(
    policy: Transformer,
    trained: Sequence[nn.Parameter],
    objective: PreferenceObjective,
    stream: Stream,
    rows: Sequence[Encoded],
    *,
    same_weights: bool,
) -> str:
    """The certificate as a line of text; ValueError for what fails. `trained` have no gradients before or after.

    same_weights: whether policy and reference are the same model at this point.
    """
    policy.eval()
    measured = objective.measure(policy, stream, rows, rows)
    losses = objective.losses(measured)
    # Scaled by a power of 2, which is exact, so that fp16's gradients do not vanish.
    gradients = torch.autograd.grad(losses.mean() * SCALE, list(trained), allow_unused=True)
    squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
    loss, norm = losses.mean().item(), math.sqrt(sum(map(float, squares))) / SCALE
    where = f"on the rows from {rows[0].example.source}"
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise ValueError(
            f"start: loss {loss:.4g} and gradient norm {norm:.4g} {where}: not finite; are the weights sound, and does "
            "the model overflow in fp16 (bf16=true does not)?"
        )
    # A weight of 0 or a soft label of 1/2 asks for nothing, and has no closed form.
    plain = all((e.weight, e.margin, e.soft_label) == (1.0, 0.0, None) for e in (row.example for row in rows))
    if norm == 0 and plain and (same_weights or objective.reference is None):
        raise ValueError(
            f"start: the gradient {where} is 0, so nothing would be learned; does lora_target name layers that are "
            "used, and does the loss depend on the policy?"
        )
    line = f"start: loss {loss:.4f}, gradient norm {norm:.3g}"
    if objective.reference is None:
        return line
    apart = measured.avg_logratios.abs().max().item()
    line += f", policy and reference at most {apart:.1e} nats per token apart"
    if not same_weights:
        return line
    expected, tolerance = objective.loss.start() if plain else None, TOLERANCE[policy.dtype]
    if apart > tolerance:
        raise ValueError(
            f"start: policy and reference are the same weights, but {apart:.2g} nats per token apart {where}, more "
            f"than {tolerance:g}; is the reference's cache damaged, or does more than dropout change with the mode?"
        )
    # Where the log-ratios are exactly 0, so is the distance from the closed form, to the loss's own rounding.
    if expected is not None and apart == 0 and not math.isclose(loss, expected, rel_tol=1e-4):
        raise ValueError(
            f"start: the loss is {loss:.6g} {where}, where policy equals reference {expected:.6g} was expected; is the "
            "loss's row in the table right?"
        )
    return line if expected is None else line + f"; closed form of the loss {expected:.4f}"
