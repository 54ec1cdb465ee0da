"""WPO: pairs that the policy would hardly write itself count less, so that old pairs weigh as if they were its own.

    L = w_w w_l loss          w = exp(1/|y| sum_t [log pi(y_t) - log sum_v pi(v)^2])

Zhou et al. 2024, arXiv:2406.11827, Eq. 2, with their aligned weights: a token counts by its probability beside the mean
probability of a token drawn from the policy. No gradient enters a weight. It is 1 where every draw is as likely as the
token written, and can exceed 1; as in TRL 1.16 nothing clamps it. Losses that couple a batch, and Dr.DPO, are refused:
a pair has no loss of its own there, or one that is weighed down would look as if it fitted.

Shapes: R response tokens, B branches, chosen and rejected in turn.
"""

from torch import Tensor

from dpo.logprobs import sum_over_responses


def wpo_weights(logps_R: Tensor, log_sum_sq_R: Tensor, lengths_B: Tensor) -> Tensor:
    """w_w w_l of every pair, detached.

    Args:
        logps_R: log pi(y_t), nats.
        log_sum_sq_R: log sum_v pi(v)^2 at the same positions.
    """
    aligned_R = (logps_R - log_sum_sq_R).detach()
    weight_B = (sum_over_responses(aligned_R, lengths_B) / lengths_B.clamp(min=1)).exp()
    return weight_B[0::2] * weight_B[1::2]
