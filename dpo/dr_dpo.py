"""Dr.DPO: a batch's loss that leans towards the pairs that the policy fits, for the others may be labelled wrongly.

    L = -beta' log mean_i exp(-l_i / beta')          dL / dl_i = softmax_i(-l / beta')

Wu et al. 2024, arXiv:2407.07880; their beta' is 1. l_i is the whole loss of pair i, whatever it is made of. A pair that
asks for less than the others (a row's weight below 1) would look as if it fitted, so such weights are refused. A batch
is the logical one however it is cut; in an evaluation, all held-out pairs.
"""

import math

from torch import Tensor


def dr_dpo_loss(losses: Tensor, *, dr_dpo_beta: float) -> Tensor:
    """() the batch's loss: between the least of the pairs' (B,) losses (beta' -> 0) and their mean (beta' -> infinity).

    Args:
        dr_dpo_beta: beta' > 0; the smaller, the less a badly fitted pair counts.
    """
    return -dr_dpo_beta * ((-losses / dr_dpo_beta).logsumexp(0) - math.log(len(losses)))
