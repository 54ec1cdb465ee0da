"""The loss family: pure functions of log-ratios, and the one table that names them.

With h = log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x), the difference of the two log-ratios:

    sigmoid   -log sigmoid(beta h)        DPO
    hinge     max(0, 1 - beta h)          SLiC/RSO
    ipo       (h - 1/(2 beta))^2          IPO, h from per-token means

A loss reads log-ratios summed over a response's tokens, or their means: the table says which, and the trainer obeys it.
Adding one is a function here and a row below.

Shapes: every argument and result is (B,), one entry per pair, float32 or float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def sigmoid_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """DPO: -log sigmoid(beta (chosen_logratios - rejected_logratios)).

    Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.

    Args:
        chosen_logratios: log pi(y_w|x) - log pi_ref(y_w|x), nats, summed over tokens.
        rejected_logratios: the same of y_l.
        beta: > 0; the price of leaving the reference. Larger beta keeps the policy closer to it.
    Returns:
        losses > 0; log 2 where policy equals reference, towards 0 as the margin grows, -beta h as it falls.
    """
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))


def hinge_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Hinge: max(0, 1 - beta (chosen_logratios - rejected_logratios)).

    Zhao et al. 2023 (SLiC), arXiv:2305.10425; on log-ratios as in Liu et al. 2023 (RSO), arXiv:2309.06657,
    where it is called hinge-norm; their gamma is our beta.

    Returns:
        losses >= 0; 1 where policy equals reference, exactly 0 (and no gradient) once the margin beta h reaches 1.
    """
    return F.relu(1 - beta * (chosen_logratios - rejected_logratios))


def ipo_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """IPO: (h - 1/(2 beta))^2, h the difference of the *mean* log-ratios.

    Azar et al. 2023, arXiv:2310.12036, Eq. 17; their tau is our beta. The paper writes log-ratios of whole responses;
    its authors confirmed per-token means as the intended reading (TRL pull request 1265), and TRL does the same.

    Args:
        chosen_logratios, rejected_logratios: nats per token, means over the response.
        beta: > 0; larger beta asks for a smaller margin.
    Returns:
        losses >= 0; 1/(4 beta^2) where policy equals reference, 0 at h = 1/(2 beta), growing again beyond it.
    """
    return (chosen_logratios - rejected_logratios - 1 / (2 * beta)).square()


@dataclass(frozen=True)
class PrefLoss:
    function: Callable[..., Tensor]
    reads: Literal["sum", "mean"]
    """whether its log-ratios are sums over a response's tokens or means per token."""
    equation: str
    paper: str


PREF_LOSSES = {
    "sigmoid": PrefLoss(sigmoid_loss, "sum", "-log sigmoid(beta h)", "DPO, arXiv:2305.18290, Eq. 7"),
    "hinge": PrefLoss(hinge_loss, "sum", "max(0, 1 - beta h)", "RSO, arXiv:2309.06657, hinge-norm"),
    "ipo": PrefLoss(ipo_loss, "mean", "(h - 1/(2 beta))^2", "IPO, arXiv:2310.12036, Eq. 17"),
}
