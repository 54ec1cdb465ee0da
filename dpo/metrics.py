"""What a run reports: the guide's and TRL's metrics of preference pairs, and means over everything between two logs.

rewards/chosen, rewards/rejected    beta * log-ratio of the response, summed over its tokens whatever the loss reads;
                                    without a reference beta * log pi(y|x), of simpo and orpo per token
rewards/margins                     chosen minus rejected reward; of unpaired rows the difference of the two means
rewards/accuracies                  share of pairs with margin > 0; a tie counts 0, so it is 0 at step 0; a cached
                                    reference's ties are ties but for rounding, and there it is any number
beta                                under beta-DPO alone: the beta of the batch; rewards keep the configured one
logps/chosen, logps/rejected        log pi(y|x) of the policy, nats, summed over the response's tokens
kl                                  kto's estimate of KL(policy || reference), nats per response, at least 0

Of unpaired rows chosen means desirable and rejected undesirable.
"""

from typing import Any

import torch
from torch import Tensor

# Keys of metrics.jsonl that differ between two runs of the same config and seed; everything else is equal.
TIMING_KEYS = frozenset({"pairs_per_second", "tokens_per_second", "eval_runtime"})


def preference_metrics(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float
) -> dict[str, Tensor]:
    """Per-pair metrics under TRL's names, each (P,), detached; all four inputs are sums over response tokens, nats."""
    chosen, rejected = beta * chosen_logratios.detach(), beta * rejected_logratios.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": chosen_logps.detach(),
        "logps/rejected": rejected_logps.detach(),
    }


class Means:
    """Sums and counts by name, so that a mean is over every pair (or token) of a window, never a mean of means."""

    def __init__(self, state: dict[str, list[float]] | None = None):
        self._sums: dict[str, list[Any]] = {name: list(entry) for name, entry in (state or {}).items()}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, vector in values.items():
            entry = self._sums.setdefault(name, [0.0, 0])
            # float64, so that the cut into micro-batches does not show. No .item(): it would wait for the device.
            entry[0] = entry[0] + vector.detach().sum(dtype=torch.float64)
            entry[1] += vector.numel()

    def copy(self) -> "Means":
        """As it is now, whatever is added later; the device is not waited for."""
        return Means(self._sums)

    def means(self, prefix: str = "") -> dict[str, float]:
        means = {name: float(total) / count for name, (total, count) in self._sums.items() if count}
        if "rewards/margins" not in means and {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return {prefix + name: mean for name, mean in means.items()}

    def state(self) -> dict[str, list[float]]:
        return {name: [float(total), count] for name, (total, count) in self._sums.items()}


def one_line(metrics: dict[str, float]) -> str:
    """A metrics.jsonl object as one short line for a terminal."""
    shown = {k: v for k, v in metrics.items() if k not in ("step", "epoch", "tokens_per_second")}
    return "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
