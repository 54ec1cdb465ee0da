"""beta-DPO: a beta for each batch, larger where its pairs are told apart more easily than usual.

    beta_batch = max(1e-3, beta (1 + alpha (mean_i M_i - M_0)))          M_i = beta (a_i - b_i)
    M_0 <- 0.9 M_0 + 0.1 mean_i M_i                                      after the update, from 0

Wu et al. 2024, arXiv:2407.08639; their alpha is 0.6. beta_batch carries no gradient. It stands for beta in the losses
on the summed margin, and in the terms that they read; rewards are reported with the configured beta. A batch is the
logical one however it is cut; in an evaluation, all held-out pairs against the M_0 of training, which does not move
(eval.py knows none, and starts it at 0). Left out: the paper's filter, which draws a batch's pairs by their margins.

The authors' code leaves beta out of M and moves M_0 before it is read: an alpha there is 0.9 alpha / beta here.
"""

import torch
from torch import Tensor

MOMENTUM = 0.9
LEAST_BETA = 1e-3


class DynamicBeta:
    """The beta of a batch, and the running margin M_0 that the batch is compared with."""

    def __init__(self, *, beta: float, alpha: float):
        self.beta, self.alpha = beta, alpha
        self.running_margin = torch.zeros((), dtype=torch.float64)
        self.batch_margin = self.running_margin

    def __call__(self, chosen_logratios: Tensor, rejected_logratios: Tensor) -> Tensor:
        """() beta_batch of the (B,) log-ratios of a whole batch, nats."""
        self.batch_margin = self.beta * (chosen_logratios - rejected_logratios).detach().double().mean()
        return (self.beta * (1 + self.alpha * (self.batch_margin - self.running_margin))).clamp(min=LEAST_BETA)

    def updated(self) -> None:
        """Move M_0 towards the margin of the batch that was last asked about."""
        self.running_margin += (1 - MOMENTUM) * (self.batch_margin.cpu() - self.running_margin)
