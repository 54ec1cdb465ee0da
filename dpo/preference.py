"""The preference objective: losses of dpo.losses, weighed and summed, with the terms that compose with them.

    L = sum_k loss_weights[k] loss_k(a', b') - pref_ftx u_w,    times the row's weight

The terms are off by default. They change the log-ratios that the losses on the margin see:

    f-divergence    a' = f(a), b' = f(b)                    Wang et al. 2023, arXiv:2309.16240, Tab. 1; chi-PO: Huang
                                                            et al. 2024, arXiv:2407.13399, phi(u) = u + log u
    DPOP            a' = a - dpop_lambda max(0, -a)         Pal et al. 2024, arXiv:2402.13228, Eq. 3
    R-DPO           a' = a + len_reg_alpha |y_w| / beta     Park et al. 2024, arXiv:2403.19159, Eq. 9; b' likewise
    ODPO            a' = a - margin / beta                  Amini et al. 2024, arXiv:2402.10571, Eq. 3; the row's margin

and, for every loss, LD-DPO (Liu et al. 2024, arXiv:2409.06411, Eq. 10): tokens beyond the length of the pair's shorter
response count ld_alpha times, in policy and reference alike (LLaMA-Factory weighs the policy alone, so its log-ratios
do not start at 0). R-DPO's sign is the one that its derivation gives: a reward less alpha |y| has the log-ratio
(r - alpha |y|) / beta. dpo.dr_dpo puts another mean over the batch in place of the plain one, dpo.beta_dpo another
beta for each batch in place of the losses' on the summed margin, and dpo.wpo weighs pairs.

What is set and read by none of the chosen losses is refused: an option that is ignored trains something else.

Shapes: B pairs; every quantity is (B,) unless said. R response tokens.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.beta_dpo import DynamicBeta
from dpo.coupled import Measured
from dpo.dr_dpo import dr_dpo_loss
from dpo.logprobs import sum_over_responses, token_logps, token_logps_and_log_sum_sq
from dpo.losses import OFF, OPTIONS, PREF_LOSSES, PrefLoss
from dpo.metrics import preference_metrics
from dpo.reference import MovingReference, Reference
from dpo.tokens import Encoded
from dpo.wpo import wpo_weights
from models.stream import Stream
from models.transformer import Transformer


@dataclass(frozen=True)
class Pairs(Measured):
    """B pairs as far as a loss can tell; log-probabilities are sums over response tokens, nats."""

    LOGPS: ClassVar = ("chosen_logps", "rejected_logps", "chosen_logratios", "rejected_logratios")

    @property
    def avg_logratios(self) -> Tensor:
        """Log-ratios per token of all responses, detached."""
        ratios = torch.cat([self.chosen_logratios, self.rejected_logratios])
        return ratios.detach() / torch.cat([self.chosen_lengths, self.rejected_lengths])

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_logratios: Tensor
    """log pi(y_w|x) - log pi_ref(y_w|x); without a reference, log pi(y_w|x)."""
    rejected_logratios: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    mean_chosen_length: Tensor
    """tokens of a chosen response, the mean over the logical batch, repeated for every pair."""
    weight: Tensor
    """what the pair's loss is multiplied by: the row's weight, 1 where it says nothing, and WPO's."""
    margin: Tensor
    """by how much the chosen reward shall exceed the rejected one (ODPO); 0 where the row says nothing."""
    soft_label: Tensor
    """the probability that chosen is the better one; NaN where the row says nothing."""


def shared_token_weights(lengths_B: Tensor, ld_alpha: float) -> Tensor:
    """(R,) 1 for the tokens up to the length of the pair's shorter response, ld_alpha for those beyond.

    lengths_B: tokens of every response, chosen and rejected in turn (so B is twice the pairs here).
    """
    shorter_B = torch.minimum(lengths_B[0::2], lengths_B[1::2]).repeat_interleave(2)
    end_B = lengths_B.cumsum(0)
    place_R = torch.arange(int(end_B[-1]), device=lengths_B.device) - (end_B - lengths_B).repeat_interleave(lengths_B)
    return torch.where(place_R < shorter_B.repeat_interleave(lengths_B), 1.0, ld_alpha)


F_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    # f'(u) at log u = a, shifted to 0 at a = 0; only the last reads alpha.
    "reverse_kl": lambda a, alpha: a,
    "forward_kl": lambda a, alpha: -(-a).expm1(),
    "js_divergence": lambda a, alpha: F.logsigmoid(a) + math.log(2),
    # log u + u - 1, of KL plus half of chi-squared (chi-PO). Beyond 20 nats u stays exp(20), so that it is finite.
    "chi_squared_kl": lambda a, alpha: a + a.clamp(max=20).expm1(),
    # (u^(alpha - 1) - 1) / (alpha - 1): reverse KL as alpha -> 1, forward KL at 0. Old TRL's coefficient is 1 - alpha.
    "alpha_divergence": lambda a, alpha: ((alpha - 1) * a).expm1() / (alpha - 1),
}
ALPHA = 0.5  # where f_alpha_divergence_coef is when nothing is said


def on_summed_margin(loss: PrefLoss) -> bool:
    return loss.on_margin and not loss.per_token


@dataclass(frozen=True)
class PreferenceLoss:
    """Pairs -> (B,) losses. Built by `preference_loss`, which checks that every option is read."""

    losses: tuple[tuple[PrefLoss, float], ...]
    """each with its weight."""
    options: Mapping[str, float]
    """by the names that the functions give them."""
    pref_ftx: float = 0.0
    dpop_lambda: float = 0.0
    len_reg_alpha: float = 0.0
    ld_alpha: float = 1.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = ALPHA
    dr_dpo_beta: float | None = None
    beta_dpo_alpha: float = 0.0
    use_weighting: bool = False

    @property
    def beta(self) -> float:
        return self.options["beta"]

    @property
    def couples(self) -> bool:
        coupling_terms = self.dr_dpo_beta is not None or self.beta_dpo_alpha
        return bool(coupling_terms) or any(loss.couples for loss, _ in self.losses)

    @property
    def needs_reference(self) -> bool:
        return any(loss.needs_reference for loss, _ in self.losses)

    @property
    def unpaired(self) -> bool:
        """Whether it is of rows with one response and a label, see dpo.unpaired."""
        return any(loss.unpaired for loss, _ in self.losses)

    def options_of(self, loss: PrefLoss) -> dict[str, float]:
        """The options that a loss takes, as its function names them."""
        return {name: self.options[name] for name in loss.options}

    def __call__(self, pairs: Pairs, margin_beta: Tensor | None = None) -> Tensor:
        """(B,) losses; margin_beta: what stands for beta in the losses on the summed margin; None: beta does."""
        total = sum(weight * self._one(loss, pairs, margin_beta) for loss, weight in self.losses)
        if self.pref_ftx:
            total = total - self.pref_ftx * pairs.chosen_logps / pairs.chosen_lengths
        total = pairs.weight * total
        # The mean of equal entries is the batch's loss.
        return total if self.dr_dpo_beta is None else dr_dpo_loss(total, dr_dpo_beta=self.dr_dpo_beta).expand_as(total)

    def _one(self, loss: PrefLoss, pairs: Pairs, margin_beta: Tensor | None) -> Tensor:
        beta = self.beta if margin_beta is None or not on_summed_margin(loss) else margin_beta
        chosen_ratios, rejected_ratios = pairs.chosen_logratios, pairs.rejected_logratios
        if loss.on_margin:
            chosen_ratios, rejected_ratios = self._with_terms(pairs, loss.per_token, beta)
        quantities = {
            "chosen_logps": pairs.chosen_logps, "rejected_logps": pairs.rejected_logps,
            "chosen_ref_logps": (pairs.chosen_logps - pairs.chosen_logratios).detach(),
            "rejected_ref_logps": (pairs.rejected_logps - pairs.rejected_logratios).detach(),
            "chosen_logratios": chosen_ratios, "rejected_logratios": rejected_ratios,
            "chosen_avg_logps": pairs.chosen_logps / pairs.chosen_lengths,
            "rejected_avg_logps": pairs.rejected_logps / pairs.rejected_lengths,
            "chosen_avg_logratios": chosen_ratios / pairs.chosen_lengths,
            "rejected_avg_logratios": rejected_ratios / pairs.rejected_lengths,
            "mean_chosen_length": pairs.mean_chosen_length,
        }  # fmt: skip
        options: dict[str, float | Tensor] = dict(self.options_of(loss))
        if "beta" in options:
            options["beta"] = beta
        if "label_smoothing" in options and not loss.couples:
            # A row's own label stands before the rate of wrong labels that holds for all.
            smoothing = torch.full_like(pairs.soft_label, float(options["label_smoothing"]))
            options["label_smoothing"] = torch.where(pairs.soft_label.isnan(), smoothing, 1 - pairs.soft_label)
        return loss.function(*(quantities[name] for name in loss.reads), **options)

    def _with_terms(self, pairs: Pairs, per_token: bool, beta: float | Tensor) -> tuple[Tensor, Tensor]:
        """(a', b') of the module's docstring; a loss on means per token takes the f-divergence alone."""
        f = F_DIVERGENCES[self.f_divergence_type]
        chosen, rejected = (
            f(ratios, self.f_alpha_divergence_coef) for ratios in (pairs.chosen_logratios, pairs.rejected_logratios)
        )
        if per_token:
            return chosen, rejected
        if self.dpop_lambda:
            chosen = chosen - self.dpop_lambda * F.relu(-pairs.chosen_logratios)
        if self.len_reg_alpha:
            chosen = chosen + self.len_reg_alpha * pairs.chosen_lengths / beta
            rejected = rejected + self.len_reg_alpha * pairs.rejected_lengths / beta
        return chosen - pairs.margin / beta, rejected

    def start(self) -> float | None:
        """The loss of a pair where policy equals reference, in closed form; None where it depends on the pair."""
        if self.pref_ftx or self.len_reg_alpha or self.use_weighting:
            return None
        total = 0.0
        for loss, weight in self.losses:
            one = loss.start and loss.start(**self.options_of(loss))
            if one is None:
                return None
            total += weight * one
        return total


TERMS: dict[str, tuple[object, Callable[[PrefLoss], bool], str]] = {
    # config key: (where it is off, the losses that can read it, what they have in common)
    "pref_ftx": (0.0, lambda loss: not loss.unpaired, "losses of pairs"),
    "ld_alpha": (1.0, lambda loss: not loss.unpaired, "losses of pairs"),
    "dr_dpo_beta": (None, lambda loss: not loss.unpaired, "losses of pairs"),
    "use_weighting": (False, lambda loss: not loss.unpaired, "losses of pairs"),
    "dpop_lambda": (0.0, on_summed_margin, "losses on the summed margin"),
    "len_reg_alpha": (0.0, on_summed_margin, "losses on the summed margin"),
    "beta_dpo_alpha": (0.0, on_summed_margin, "losses on the summed margin"),
    "f_divergence_type": ("reverse_kl", lambda loss: loss.on_margin, "losses on the margin"),
}


def preference_loss(
    names: Sequence[str], weights: Sequence[float] | None, options: Mapping[str, float], **terms: Any
) -> PreferenceLoss:
    """The PreferenceLoss of config values; ValueError where one is set that no chosen loss reads, or out of its range.

    options: every option by its name in dpo.losses.OPTIONS. terms: fields of PreferenceLoss by name.
    """
    shown = ",".join(map(str, names))
    if not names or any(name not in PREF_LOSSES for name in names):
        raise ValueError(f"pref_loss={shown}: expected one or several of {', '.join(PREF_LOSSES)}")
    losses = [PREF_LOSSES[name] for name in names]
    if weights is not None and len(weights) != len(losses):
        raise ValueError(f"loss_weights={list(weights)}: {len(weights)} for {len(losses)} losses; give one for each")
    if weights is not None and not all(map(math.isfinite, weights)):
        raise ValueError(f"loss_weights={list(weights)}: must be finite")
    if any(loss.unpaired for loss in losses) and not all(loss.unpaired for loss in losses):
        raise ValueError(f"pref_loss={shown}: losses of labelled rows and of pairs together; choose one kind")
    read = {option for loss in losses for option in loss.options}
    for option, off in OFF.items():
        if option not in read and options[option] != off:
            readers = ", ".join(name for name, loss in PREF_LOSSES.items() if option in loss.options)
            given = f"{OPTIONS[option]}={options[option]}"
            raise ValueError(f"{given}: not read by pref_loss={shown}, but by {readers}; leave it at {off}")
    for key, (default, can_read, readers) in TERMS.items():
        if terms.get(key, default) != default and not any(map(can_read, losses)):
            given = f"{key}={terms[key]}"
            raise ValueError(f"{given}: not read by pref_loss={shown}, but by {readers}; leave it at {default}")
    coefficient, divergence = terms.get("f_alpha_divergence_coef", ALPHA), terms.get("f_divergence_type", "reverse_kl")
    if coefficient != ALPHA and divergence != "alpha_divergence":
        given = f"f_alpha_divergence_coef={coefficient}"
        raise ValueError(f"{given}: not read by f_divergence_type={divergence}; leave it at {ALPHA}")
    smoothing = options["label_smoothing"]
    if "exo_pair" in names and not smoothing:
        raise ValueError("dpo_label_smoothing=0: exo_pair takes its logarithm; the paper's is 1e-3 (loss=exo_pair)")
    coupling = [name for name in names if PREF_LOSSES[name].couples]
    weighing = [f"{key}={terms[key]}" for key in ("dr_dpo_beta", "use_weighting") if terms.get(key)]
    if weighing and coupling:
        raise ValueError(
            f"{weighing[0]}: with {','.join(coupling)} a pair has no loss of its own to weigh; leave it out or choose "
            "another loss"
        )
    if len(weighing) == 2:
        raise ValueError(
            f"{' with '.join(weighing)}: a pair that is weighed down would look as if it fitted; choose one of the two"
        )
    return PreferenceLoss(tuple(zip(losses, weights or [1.0] * len(losses), strict=True)), dict(options), **terms)


# exo_pair takes the logarithms of e and 1 - e, robust divides by 1 - 2 e.
INFINITE_AT = {"exo_pair": (0.0, 1.0), "robust": (0.5,)}


class PreferenceObjective:
    """What a trainer does with preference rows: measure pairs, compute their losses, report them."""

    def __init__(self, loss: PreferenceLoss, reference: Reference | None):
        """reference: None where no loss compares with one."""
        self.loss, self.reference, self.couples = loss, reference, loss.couples
        alpha = loss.beta_dpo_alpha
        self.dynamic_beta = DynamicBeta(beta=loss.beta, alpha=alpha) if alpha else None

    @property
    def state(self) -> Mapping[str, Tensor]:
        state = dict(self.reference.tensors) if isinstance(self.reference, MovingReference) else {}
        return state if self.dynamic_beta is None else state | {"running_margin": self.dynamic_beta.running_margin}

    def updated(self, step: int) -> None:
        if isinstance(self.reference, MovingReference):
            self.reference.follow(step)
        if self.dynamic_beta is not None:
            self.dynamic_beta.updated()

    def check(self, rows: Iterable[Encoded]) -> None:
        """ValueError for a row whose weight, margin or soft label no chosen loss can honour."""
        losses = [loss for loss, _ in self.loss.losses]
        honoured = {
            "weight": (1.0, self.loss.dr_dpo_beta is None and not any(loss.couples for loss in losses)),
            "margin": (0.0, any(map(on_summed_margin, losses))),
            "soft_label": (None, any("label_smoothing" in loss.options and not loss.couples for loss in losses)),
        }
        names = [name for name, loss in PREF_LOSSES.items() if loss in losses]
        chosen = f"pref_loss={','.join(names)}"
        if self.loss.dr_dpo_beta is not None:
            chosen += f" with dr_dpo_beta={self.loss.dr_dpo_beta}"
        infinite_at = {label for name in names for label in INFINITE_AT.get(name, ())}
        for row in (row for row in rows if row.has_numbers):
            for key, (off, can) in honoured.items():
                value = getattr(row.example, key)
                if (value != off and not can) or (key == "soft_label" and value in infinite_at):
                    raise ValueError(
                        f"{row.example.source}: {key}={value}: {chosen} cannot honour it; remove it from the "
                        "rows or choose another loss"
                    )

    def units(self, rows: Sequence[Encoded]) -> int:
        """What a batch's loss is the mean over: pairs."""
        return len(rows)

    def logps_and_logratios(
        self, policy: Transformer, stream: Stream, rows: Sequence[Encoded]
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """(log pi, log pi - log pi_ref) of every response of a stream, and WPO's weight of every pair, or 1.

        Without a reference log pi twice.
        """
        reference_R = torch.zeros((), device=policy.device) if self.reference is None else self.reference(stream, rows)
        weight: Tensor | float = 1.0
        if self.loss.use_weighting:
            policy_R, log_sum_sq_R = token_logps_and_log_sum_sq(policy, stream)
            weight = wpo_weights(policy_R, log_sum_sq_R, stream.lengths_B)
        else:
            policy_R = token_logps(policy, stream)
        ratio_R = policy_R - reference_R
        if self.loss.ld_alpha != 1:
            weight_R = shared_token_weights(stream.lengths_B, self.loss.ld_alpha)
            policy_R, ratio_R = policy_R * weight_R, ratio_R * weight_R
        return sum_over_responses(policy_R, stream.lengths_B), sum_over_responses(ratio_R, stream.lengths_B), weight

    def measure(
        self, policy: Transformer, stream: Stream, rows: Sequence[Encoded], batch: Sequence[Encoded]
    ) -> Measured:
        """The pairs of a micro-batch `rows` of the logical batch: branches 2i and 2i + 1 are chosen and rejected."""
        logps, logratios, weight = self.logps_and_logratios(policy, stream, rows)
        examples = [row.example for row in rows]
        mean_length = sum(row.lengths[0] for row in batch) / len(batch)

        def of_rows(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=logps.dtype, device=logps.device)

        return Pairs(
            chosen_logps=logps[0::2],
            rejected_logps=logps[1::2],
            chosen_logratios=logratios[0::2],
            rejected_logratios=logratios[1::2],
            chosen_lengths=stream.lengths_B[0::2],
            rejected_lengths=stream.lengths_B[1::2],
            mean_chosen_length=of_rows([mean_length] * len(rows)),
            weight=weight * of_rows([example.weight for example in examples]),
            margin=of_rows([example.margin for example in examples]),
            soft_label=of_rows([math.nan if e.soft_label is None else e.soft_label for e in examples]),
        )

    def losses(self, measured: Any) -> Tensor:
        return self.loss(measured, self._margin_beta(measured))

    def _margin_beta(self, pairs: Pairs) -> Tensor | None:
        if self.dynamic_beta is None:
            return None
        return self.dynamic_beta(pairs.chosen_logratios, pairs.rejected_logratios)

    def margins(self, measured: Any) -> Tensor | None:
        chosen, rejected = self._reward_ratios(measured)
        return self.loss.beta * (chosen - rejected).detach()

    def _reward_ratios(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """What beta makes rewards of."""
        chosen, rejected = pairs.chosen_logratios, pairs.rejected_logratios
        if self.reference is None and any(loss.per_token for loss, _ in self.loss.losses):
            # Without a reference the reward is beta log pi, and of a loss on means, beta times the mean.
            return chosen / pairs.chosen_lengths, rejected / pairs.rejected_lengths
        return chosen, rejected

    def metrics(self, measured: Any, losses: Tensor) -> dict[str, Tensor]:
        pairs: Pairs = measured
        metrics = {"loss": losses} | preference_metrics(
            pairs.chosen_logps, pairs.rejected_logps, *self._reward_ratios(pairs), beta=self.loss.beta
        )
        beta = self._margin_beta(pairs)
        return metrics if beta is None else metrics | {"beta": beta.expand_as(losses)}
