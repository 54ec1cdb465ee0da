"""The unpaired objective: rows of one response each, labelled desirable or undesirable (KTO).

KTO measures every response against z, an estimate of KL(policy || reference): the mean log-ratio of responses that
answer another prompt (Ethayarajh et al. 2024, arXiv:2402.01306, Sec. 4.1). Here each row's mismatched response is that
of the row before it in the file that has another prompt, always the same one: so the reference's log-probability of it
can be kept on disk, and the cut into micro-batches changes nothing. TRL takes it from within the batch. It is a second
branch on the row's prompt, so a packed stream of unpaired rows looks like one of pairs.

Shapes: B rows; every quantity is (B,).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dpo.coupled import Measured
from dpo.preference import PreferenceObjective
from dpo.tokens import Encoded
from models.stream import Stream
from models.transformer import Transformer


@dataclass(frozen=True)
class Labelled(Measured):
    """B rows as far as an unpaired loss can tell; log-probabilities are sums over response tokens, nats."""

    LOGPS: ClassVar = ("logratios",)

    logps: Tensor
    logratios: Tensor
    mismatched_logratios: Tensor
    """of a response to another prompt; no gradient."""
    lengths: Tensor
    desirable: Tensor
    """1 or 0."""
    weight: Tensor
    """what the row's loss is multiplied by; 1 where the row says nothing."""

    @property
    def avg_logratios(self) -> Tensor:
        """Log-ratios per token of the rows' own responses, detached."""
        return self.logratios.detach() / self.lengths


def with_mismatched(rows: Sequence[Encoded], cutoff_len: int) -> list[Encoded]:
    """The rows, each with a second response: that of the row before it (cyclic) that has another prompt.

    It is cut to what cutoff_len leaves. ValueError where all prompts are one: nothing is mismatched then.
    """
    if all(row.prompt_ids == rows[0].prompt_ids for row in rows):
        raise ValueError(
            f"{rows[0].example.source}: kto estimates a KL from responses to other prompts, and all {len(rows)} rows "
            "have the same prompt; add rows, or use pref_loss=apo_zero_unpaired"
        )
    # The last row's own is looked for; each other row has its predecessor, or shares its predecessor's.
    last = rows[-1]
    other = next(row for row in reversed(rows) if row.prompt_ids != last.prompt_ids)
    result, before = [], last
    for row in rows:
        if before.prompt_ids != row.prompt_ids:
            other = before
        before = row
        room = cutoff_len - len(row.prompt_ids)
        result.append(replace(row, response_ids=(row.response_ids[0], other.response_ids[0][:room])))
    return result


class UnpairedObjective(PreferenceObjective):
    """What a trainer does with labelled rows; those of a loss that needs it carry a mismatched response."""

    def check(self, rows: Iterable[Encoded]) -> None:
        """ValueError for a row whose margin or soft label cannot be honoured: both are of pairs."""
        for row in (row for row in rows if row.has_numbers):
            for key, off in (("margin", 0.0), ("soft_label", None)):
                if getattr(row.example, key) != off:
                    given = f"{row.example.source}: {key}={getattr(row.example, key)}"
                    raise ValueError(f"{given}: is of pairs, and pref_loss reads labelled rows; remove it")

    def measure(
        self, policy: Transformer, stream: Stream, rows: Sequence[Encoded], batch: Sequence[Encoded]
    ) -> Labelled:
        """The rows of a micro-batch: each has a branch of its own, and a second one where the loss reads it."""
        logps, logratios, _ = self.logps_and_logratios(policy, stream, rows)
        per_row = len(rows[0].response_ids)
        own = slice(0, None, per_row)

        def of_rows(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=logps.dtype, device=logps.device)

        return Labelled(
            logps=logps[own],
            logratios=logratios[own],
            mismatched_logratios=logratios[per_row - 1 :: per_row].detach(),
            lengths=stream.lengths_B[own],
            desirable=of_rows([float(row.example.label is True) for row in rows]),
            weight=of_rows([row.example.weight for row in rows]),
        )

    def losses(self, measured: Any) -> Tensor:
        total = sum(
            weight * loss.function(*(getattr(measured, name) for name in loss.reads), **self.loss.options_of(loss))
            for loss, weight in self.loss.losses
        )
        return measured.weight * total

    def margins(self, measured: Any) -> Tensor | None:
        return self.loss.beta * measured.logratios.detach() * (2 * measured.desirable - 1)

    def metrics(self, measured: Any, losses: Tensor) -> dict[str, Tensor]:
        desirable = measured.desirable > 0
        rewards = self.loss.beta * measured.logratios.detach()
        metrics = {
            "loss": losses,
            "rewards/chosen": rewards[desirable], "rewards/rejected": rewards[~desirable],
            "logps/chosen": measured.logps.detach()[desirable], "logps/rejected": measured.logps.detach()[~desirable],
        }  # fmt: skip
        if self.couples:
            metrics["kl"] = measured.mismatched_logratios.mean().clamp(min=0).expand(len(measured))
        return metrics
