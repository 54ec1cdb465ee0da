"""The loss family: pure functions of log-probabilities, and the one table that names them.

For a pair, a = log pi(y_w|x)/pi_ref(y_w|x) is the chosen log-ratio and b the rejected one, h = a - b, x = beta h;
u = log pi(y|x) / |y| is a mean log-probability per token. With label smoothing e, a label is wrong with probability e:

    sigmoid   -(1 - e) log sigmoid(x) - e log sigmoid(-x)        DPO; cDPO where e > 0

The other equations stand at their functions; `python -m dpo.losses` prints all of them and draws them.

A loss is a function whose arguments say what it reads. Positional ones, each (B,), are named in QUANTITIES: `logps` and
`logratios` are sums over a response's tokens, `avg_...` means per token, so one name never means both. Keyword ones are
options, named in OPTIONS with their config keys. A loss of one's own is such a function and a row of the table.

Shapes: every quantity and result is (B,), one entry per pair, float32 or float64.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

QUANTITIES = {
    f"{side}_{quantity}": meaning.format(side=side)
    for side in ("chosen", "rejected")
    for quantity, meaning in {
        "logps": "log pi(y|x) of the {side} response, nats, summed over its tokens",
        "ref_logps": "the same under the reference",
        "avg_logps": "log pi(y|x) per token",
        "logratios": "log pi(y|x) - log pi_ref(y|x), summed",
        "avg_logratios": "the same per token",
    }.items()
} | {
    "mean_chosen_length": "tokens of a chosen response, the mean over the logical batch; one number",
    # Of unpaired rows, one response each:
    "logratios": "log pi(y|x) - log pi_ref(y|x) of the row's response, summed",
    "mismatched_logratios": "the same of a response to another prompt, for the KL estimate; no gradient",
    "desirable": "the row's label: 1 for a desirable response, 0 for an undesirable one",
}
OPTIONS = {
    "beta": "pref_beta",
    "label_smoothing": "dpo_label_smoothing",
    "tau": "discopop_tau",
    "gamma": "simpo_gamma",
    "chosen_weight": "kto_chosen_weight",
    "rejected_weight": "kto_rejected_weight",
}
# What the options that not every loss reads are where nothing is said: only then may a loss pass them over.
OFF = {"label_smoothing": 0.0, "tau": 0.05, "gamma": 0.5, "chosen_weight": 1.0, "rejected_weight": 1.0}


# --- on the margin: functions of a - b alone ---


def sigmoid_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, label_smoothing: float | Tensor
) -> Tensor:
    """DPO: -log sigmoid(beta (chosen_logratios - rejected_logratios)); with label smoothing e, cDPO.

    -(1 - e) log sigmoid(x) - e log sigmoid(-x), x = beta h. Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; Mitchell
    2023, "A note on DPO with noisy preferences", Eq. 3.

    Args:
        chosen_logratios: log pi(y_w|x) - log pi_ref(y_w|x), nats, summed over tokens.
        rejected_logratios: the same of y_l.
        beta: > 0; the price of leaving the reference. Larger beta keeps the policy closer to it.
        label_smoothing: in [0, 1/2), the probability that a label is wrong; one number, or one for each pair.
    Returns:
        losses > 0; log 2 where policy equals reference. Without smoothing towards 0 as the margin grows; with it least
        at x = log((1 - e)/e), so that a margin is never worth more than the label.
    """
    x = beta * (chosen_logratios - rejected_logratios)
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def robust_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, label_smoothing: float | Tensor
) -> Tensor:
    """rDPO: (-(1 - e) log sigmoid(x) + e log sigmoid(-x)) / (1 - 2 e), x = beta h.

    Chowdhury et al. 2024, arXiv:2403.00409, Eq. 12: unbiased for labels that are flipped with probability e. Unbounded
    below for e > 0: a margin that grows for ever is rewarded for ever. log 2 where policy equals reference.
    """
    x = beta * (chosen_logratios - rejected_logratios)
    return (label_smoothing * F.logsigmoid(-x) - (1 - label_smoothing) * F.logsigmoid(x)) / (1 - 2 * label_smoothing)


def hinge_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Hinge: max(0, 1 - beta (chosen_logratios - rejected_logratios)).

    Zhao et al. 2023 (SLiC), arXiv:2305.10425; on log-ratios as in Liu et al. 2023 (RSO), arXiv:2309.06657,
    where it is called hinge-norm; their gamma is our beta.

    Returns:
        losses >= 0; 1 where policy equals reference, exactly 0 (and no gradient) once the margin beta h reaches 1.
    """
    return F.relu(1 - beta * (chosen_logratios - rejected_logratios))


def ipo_loss(chosen_avg_logratios: Tensor, rejected_avg_logratios: Tensor, *, beta: float) -> Tensor:
    """IPO: (h - 1/(2 beta))^2, h the difference of the *mean* log-ratios.

    Azar et al. 2023, arXiv:2310.12036, Eq. 17; their tau is our beta. The paper writes log-ratios of whole responses;
    its authors confirmed per-token means as the intended reading (TRL pull request 1265), and TRL does the same.

    Args:
        chosen_avg_logratios, rejected_avg_logratios: nats per token, means over the response.
        beta: > 0; larger beta asks for a smaller margin.
    Returns:
        losses >= 0; 1/(4 beta^2) where policy equals reference, 0 at h = 1/(2 beta), growing again beyond it.
    """
    return (chosen_avg_logratios - rejected_avg_logratios - 1 / (2 * beta)).square()


def ipo_sum_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """IPO as the paper writes it: (h - 1/(2 beta))^2, h the difference of the *summed* log-ratios. See ipo_loss."""
    return (chosen_logratios - rejected_logratios - 1 / (2 * beta)).square()


def exo_pair_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, label_smoothing: float | Tensor
) -> Tensor:
    """EXO: KL( (q, 1 - q) || (1 - e, e) ), q = sigmoid(beta h): the reverse of the KL that cDPO minimises.

    Ji et al. 2024, arXiv:2402.00856, Eq. 16 for two responses. Needs 0 < e < 1/2 (the paper's is 1e-3).

    Returns:
        losses >= 0; -log(2 sqrt(e (1 - e))) where policy equals reference, 0 at beta h = log((1 - e)/e).
    """
    x = beta * (chosen_logratios - rejected_logratios)
    e = torch.as_tensor(label_smoothing, dtype=x.dtype, device=x.device)
    return x.sigmoid() * (F.logsigmoid(x) - (-e).log1p()) + (-x).sigmoid() * (F.logsigmoid(-x) - e.log())


def discopop_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, tau: float) -> Tensor:
    """DiscoPOP: (1 - m) (-log sigmoid(x)) + m exp(-x), m = sigmoid(x / tau), x = beta h.

    Lu et al. 2024, arXiv:2406.08414, Eq. 5; the paper's tau is 0.05. m exp(-x) is computed as exp(log m - x), or it
    would be 0 times infinity at a large negative margin. (log 2 + 1)/2 where policy equals reference; not convex.
    """
    x = beta * (chosen_logratios - rejected_logratios)
    return (-x / tau).sigmoid() * -F.logsigmoid(x) + (F.logsigmoid(x / tau) - x).exp()


def sigmoid_norm_loss(chosen_avg_logratios: Tensor, rejected_avg_logratios: Tensor, *, beta: float) -> Tensor:
    """Length-normalised DPO: -log sigmoid(beta (chosen_avg_logratios - rejected_avg_logratios)).

    Meng et al. 2024, arXiv:2405.14734, App. I; Lambert et al. 2024 (Tulu 3), arXiv:2411.15124, Eq. 6, where beta is 5.
    """
    return -F.logsigmoid(beta * (chosen_avg_logratios - rejected_avg_logratios))


# --- on both sides: each response is also compared with the reference ---


def nca_pair_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """NCA: -log sigmoid(r_w) - log sigmoid(-r_w) / 2 - log sigmoid(-r_l) / 2, r = beta log-ratio.

    Chen et al. 2024, arXiv:2402.05369, Eq. 11 for two responses. 2 log 2 where policy equals reference; the chosen
    reward has an optimum (r_w = log 2), so the chosen likelihood does not fall without end.
    """
    r_w, r_l = beta * chosen_logratios, beta * rejected_logratios
    return -F.logsigmoid(r_w) - F.logsigmoid(-r_w) / 2 - F.logsigmoid(-r_l) / 2


def bco_pair_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """BCO: -log sigmoid(r_w) - log sigmoid(-r_l), r = beta log-ratio: a classifier of good against bad responses.

    Jung et al. 2024, arXiv:2404.04656, Eq. 8, without the paper's shift of all rewards by their running mean, as in
    TRL. 2 log 2 where policy equals reference.
    """
    return -F.logsigmoid(beta * chosen_logratios) - F.logsigmoid(-beta * rejected_logratios)


def sppo_hard_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """SPPO with certain labels: (a - 1/(2 beta))^2 + (b + 1/(2 beta))^2.

    Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 with P = 1 for the winner and 0 for the loser; their 1/eta is our beta,
    0.001 there. 1/(2 beta^2) where policy equals reference.
    """
    half = 1 / (2 * beta)
    return (chosen_logratios - half).square() + (rejected_logratios + half).square()


def apo_zero_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """APO-zero: 1 - sigmoid(beta a) + sigmoid(beta b): the chosen likelihood up, the rejected one down.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7; for chosen responses that are better than the model's own.
    1 where policy equals reference; between 0 and 2.
    """
    return (-beta * chosen_logratios).sigmoid() + (beta * rejected_logratios).sigmoid()


def apo_down_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """APO-down: sigmoid(beta a) + 1 - sigmoid(beta (a - b)): both down, the rejected one further.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8; for chosen responses that are worse than the model's own.
    1 where policy equals reference.
    """
    return (beta * chosen_logratios).sigmoid() + (-beta * (chosen_logratios - rejected_logratios)).sigmoid()


# --- on the batch: each pair's loss depends on the others of the logical batch ---


def aot_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_ref_logps: Tensor,
    rejected_ref_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """AOT: cDPO on the differences between the batch's sorted policy margins and its sorted reference margins.

    Melnyk et al. 2024, arXiv:2406.05882, Eq. 9, for paired data: the policy's distribution of margins shall dominate
    the reference's. The k-th result belongs to the k-th largest margin, not to the k-th pair.
    """
    policy = (chosen_logps - rejected_logps).sort().values
    reference = (chosen_ref_logps - rejected_ref_logps).sort().values
    return sigmoid_loss(policy, reference, beta=beta, label_smoothing=label_smoothing)


def aot_unpaired_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """AOT, unpaired: cDPO on the differences between the sorted chosen and the sorted rejected log-ratios.

    Melnyk et al. 2024, arXiv:2406.05882, Eq. 8.
    """
    chosen, rejected = chosen_logratios.sort().values, rejected_logratios.sort().values
    return sigmoid_loss(chosen, rejected, beta=beta, label_smoothing=label_smoothing)


def kto_pair_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """KTO on pairs: half of 1 - sigmoid(beta (a - z_l)) + 1 - sigmoid(beta (z_w - b)), z = max(0, batch mean).

    Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 8, in the early form for paired data: z_w and z_l, the means of the
    chosen and of the rejected log-ratios, stand for the KL from the reference and carry no gradient.
    """
    z_w, z_l = (ratios.mean().clamp(min=0).detach() for ratios in (chosen_logratios, rejected_logratios))
    return ((beta * (z_l - chosen_logratios)).sigmoid() + (beta * (rejected_logratios - z_w)).sigmoid()) / 2


# --- on unpaired rows: one response with a label ---


def kto_loss(
    logratios: Tensor, mismatched_logratios: Tensor, desirable: Tensor, *,
    beta: float, chosen_weight: float, rejected_weight: float,
) -> Tensor:  # fmt: skip
    """KTO: chosen_weight (1 - sigmoid(beta (a - z))), or rejected_weight (1 - sigmoid(beta (z - b))).

    Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 8. a and b are log-ratios of desirable and undesirable responses; z,
    the KL from the reference, is max(0, mean log-ratio of mismatched responses) over the batch, without gradient.

    Args:
        desirable: 1 or 0.
        chosen_weight, rejected_weight: the paper's lambda_D and lambda_U; chosen_weight times the desirable rows should
            be 1 to 4/3 of rejected_weight times the undesirable ones.
    Returns:
        losses between 0 and the weight; half the weight where policy equals reference.
    """
    z = mismatched_logratios.mean().clamp(min=0).detach()
    weight = chosen_weight * desirable + rejected_weight * (1 - desirable)
    return weight * (beta * (1 - 2 * desirable) * (logratios - z)).sigmoid()


def apo_zero_unpaired_loss(
    logratios: Tensor, desirable: Tensor, *, beta: float, chosen_weight: float, rejected_weight: float
) -> Tensor:
    """APO-zero on unpaired rows: chosen_weight (1 - sigmoid(beta a)), or rejected_weight sigmoid(beta b).

    D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7, term by term as in TRL: KTO with z = 0.
    """
    weight = chosen_weight * desirable + rejected_weight * (1 - desirable)
    return weight * (beta * (1 - 2 * desirable) * logratios).sigmoid()


# --- without a reference ---


def simpo_loss(chosen_avg_logps: Tensor, rejected_avg_logps: Tensor, *, beta: float, gamma: float) -> Tensor:
    """SimPO: -log sigmoid(beta (u_w - u_l) - gamma), u the mean log-probability per token.

    Meng et al. 2024, arXiv:2405.14734, Eq. 6. gamma is the target margin in the sigmoid's argument, as the paper and
    LLaMA-Factory have it; SimPO's own code is given gamma / beta. beta is 2 to 10 here, not 0.1.
    """
    return -F.logsigmoid(beta * (chosen_avg_logps - rejected_avg_logps) - gamma)


def orpo_loss(chosen_avg_logps: Tensor, rejected_avg_logps: Tensor, *, beta: float) -> Tensor:
    """ORPO: -u_w - beta log sigmoid(log odds_w - log odds_l), odds = p / (1 - p), p = exp(u).

    Hong et al. 2024, arXiv:2403.07691, Eq. 6; their lambda is our beta. u_w, the SFT term, is over the response's
    tokens as in LLaMA-Factory (TRL's is over the prompt's too). log(1 - p) is computed by log1mexp: log1p(-exp(u)) is
    minus infinity once float32 rounds exp(u) to 1.
    """
    log_odds = chosen_avg_logps - rejected_avg_logps - (log1mexp(chosen_avg_logps) - log1mexp(rejected_avg_logps))
    return -chosen_avg_logps - beta * F.logsigmoid(log_odds)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact near 0 and far from it (Maechler 2012); x = 0 counts as the number below it."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    # Each branch sees arguments of its own range, for the gradient of the unused one must not be NaN.
    return torch.where(near, (-torch.where(near, x, -1.0).expm1()).log(), (-torch.where(near, -1.0, x).exp()).log1p())


def cpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, *, beta: float) -> Tensor:
    """CPO: -log sigmoid(beta (log pi(y_w|x) - log pi(y_l|x))): DPO with a uniform reference.

    Xu et al. 2024, arXiv:2401.08417, Eq. 4. The paper adds the chosen response's negative log-likelihood: pref_ftx=1.
    """
    return -F.logsigmoid(beta * (chosen_logps - rejected_logps))


def sft_loss(chosen_logps: Tensor, mean_chosen_length: Tensor) -> Tensor:
    """Negative log-likelihood of the chosen response; the mean over the batch is nats per chosen token, as in TRL.

    For combinations such as MPO, pref_loss=[sigmoid,bco_pair,sft] (Wang et al. 2024, arXiv:2411.10442, Eq. 2).
    """
    return -chosen_logps / mean_chosen_length


# --- the table ---


@dataclass(frozen=True)
class PrefLoss:
    function: Callable[..., Tensor]
    equation: str
    paper: str
    start: Callable[..., float | None] | None = None
    """of the options: the loss where policy equals reference; None where that depends on more than the options."""
    pushes: tuple[int, int] = (1, -1)
    """whether a step from there raises (1), leaves (0) or lowers (-1) the chosen and the rejected log-probability."""
    falls: bool = True
    """whether it never grows as the chosen log-probability rises or the rejected one falls."""
    on_margin: bool = False
    """whether it reads the two log-ratios by their difference alone, so that terms on the margin apply."""
    couples: bool = False
    """whether a pair's loss depends on the other pairs of its logical batch."""
    usual_beta: tuple[float, float] = (0.001, 1.0)
    """a beta outside is warned about: means per token want larger ones than sums."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The quantities it reads."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)

    @property
    def options(self) -> tuple[str, ...]:
        """The options it takes, as its function names them."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)

    @property
    def needs_reference(self) -> bool:
        return any("logratios" in name or "ref_" in name for name in self.reads)

    @property
    def unpaired(self) -> bool:
        """Whether it is of rows with one response and a label."""
        return "desirable" in self.reads

    @property
    def per_token(self) -> bool:
        """Whether it reads means per token, which want a beta of 1 to 10 where sums want 0.01 to 0.5."""
        return any("avg_" in name for name in self.reads)


LOG2 = math.log(2)


def _half_of_equal(chosen_weight: float, rejected_weight: float) -> float | None:
    return chosen_weight / 2 if chosen_weight == rejected_weight else None


PREF_LOSSES = {
    "sigmoid": PrefLoss(
        sigmoid_loss, "-(1 - e) log sigmoid(x) - e log sigmoid(-x)", "DPO, arXiv:2305.18290, Eq. 7",
        start=lambda beta, label_smoothing: LOG2, falls=False, on_margin=True,
    ),
    "robust": PrefLoss(
        robust_loss, "(-(1 - e) log sigmoid(x) + e log sigmoid(-x)) / (1 - 2 e)", "rDPO, arXiv:2403.00409, Eq. 12",
        start=lambda beta, label_smoothing: LOG2, on_margin=True,
    ),
    "hinge": PrefLoss(
        hinge_loss, "max(0, 1 - x)", "RSO, arXiv:2309.06657, hinge-norm",
        start=lambda beta: 1.0, on_margin=True,
    ),
    "ipo": PrefLoss(
        ipo_loss, "(a/|y_w| - b/|y_l| - 1/(2 beta))^2", "IPO, arXiv:2310.12036, Eq. 17",
        start=lambda beta: 1 / (4 * beta**2), falls=False, on_margin=True,
    ),
    "ipo_sum": PrefLoss(
        ipo_sum_loss, "(h - 1/(2 beta))^2", "IPO, arXiv:2310.12036, Eq. 17, sums",
        start=lambda beta: 1 / (4 * beta**2), falls=False, on_margin=True,
    ),
    "exo_pair": PrefLoss(
        exo_pair_loss, "KL((sigmoid(x), sigmoid(-x)) || (1 - e, e))", "EXO, arXiv:2402.00856, Eq. 16",
        start=lambda beta, label_smoothing: -math.log(2 * math.sqrt(label_smoothing * (1 - label_smoothing))),
        falls=False, on_margin=True,
    ),
    "discopop": PrefLoss(
        discopop_loss, "-(1 - m) log sigmoid(x) + m exp(-x), m = sigmoid(x/tau)", "DiscoPOP, arXiv:2406.08414, Eq. 5",
        start=lambda beta, tau: (LOG2 + 1) / 2, falls=False, on_margin=True,
    ),
    "sigmoid_norm": PrefLoss(
        sigmoid_norm_loss, "-log sigmoid(beta (a/|y_w| - b/|y_l|))", "Tulu 3, arXiv:2411.15124, Eq. 6",
        start=lambda beta: LOG2, on_margin=True, usual_beta=(1.0, 20.0),
    ),
    "nca_pair": PrefLoss(
        nca_pair_loss, "-log sigmoid(r_w) - log sigmoid(-r_w)/2 - log sigmoid(-r_l)/2", "NCA, arXiv:2402.05369, Eq. 11",
        start=lambda beta: 2 * LOG2, falls=False,
    ),
    "bco_pair": PrefLoss(
        bco_pair_loss, "-log sigmoid(r_w) - log sigmoid(-r_l)", "BCO, arXiv:2404.04656, Eq. 8",
        start=lambda beta: 2 * LOG2,
    ),
    "sppo_hard": PrefLoss(
        sppo_hard_loss, "(a - 1/(2 beta))^2 + (b + 1/(2 beta))^2", "SPPO, arXiv:2405.00675, Eq. 4.7",
        start=lambda beta: 1 / (2 * beta**2), falls=False,
    ),
    "apo_zero": PrefLoss(
        apo_zero_loss, "1 - sigmoid(r_w) + sigmoid(r_l)", "APO, arXiv:2408.06266, Eq. 7",
        start=lambda beta: 1.0,
    ),
    "apo_down": PrefLoss(
        apo_down_loss, "sigmoid(r_w) + 1 - sigmoid(x)", "APO, arXiv:2408.06266, Eq. 8",
        start=lambda beta: 1.0, pushes=(0, -1), falls=False,
    ),
    "aot": PrefLoss(
        aot_loss, "cDPO on sorted policy margins minus sorted reference margins", "AOT, arXiv:2406.05882, Eq. 9",
        start=lambda beta, label_smoothing: LOG2, falls=False, couples=True,
    ),
    "aot_unpaired": PrefLoss(
        aot_unpaired_loss, "cDPO on sorted a minus sorted b", "AOT, arXiv:2406.05882, Eq. 8",
        start=lambda beta, label_smoothing: LOG2, falls=False, couples=True,
    ),
    "kto_pair": PrefLoss(
        kto_pair_loss, "(2 - sigmoid(beta (a - z_l)) - sigmoid(beta (z_w - b))) / 2", "KTO, arXiv:2402.01306, Eq. 8",
        start=lambda beta: 0.5, couples=True,
    ),
    "kto": PrefLoss(
        kto_loss, "w_D (1 - sigmoid(beta (a - z))) or w_U (1 - sigmoid(beta (z - b)))", "KTO, arXiv:2402.01306, Eq. 8",
        start=lambda beta, chosen_weight, rejected_weight: _half_of_equal(chosen_weight, rejected_weight), couples=True,
    ),
    "apo_zero_unpaired": PrefLoss(
        apo_zero_unpaired_loss, "w_D (1 - sigmoid(r_w)) or w_U sigmoid(r_l)", "APO, arXiv:2408.06266, Eq. 7",
        start=lambda beta, chosen_weight, rejected_weight: _half_of_equal(chosen_weight, rejected_weight),
    ),
    "simpo": PrefLoss(
        simpo_loss, "-log sigmoid(beta (u_w - u_l) - gamma)", "SimPO, arXiv:2405.14734, Eq. 6",
        usual_beta=(1.0, 20.0),
    ),
    "orpo": PrefLoss(
        orpo_loss, "-u_w - beta log sigmoid(log odds_w - log odds_l)", "ORPO, arXiv:2403.07691, Eq. 6",
    ),
    "cpo": PrefLoss(
        cpo_loss, "-log sigmoid(beta (log pi(y_w) - log pi(y_l)))", "CPO, arXiv:2401.08417, Eq. 4",
    ),
    "sft": PrefLoss(
        sft_loss, "-log pi(y_w), per chosen token of the batch", "MPO, arXiv:2411.10442, Eq. 2",
        pushes=(1, 0),
    ),
}  # fmt: skip


# --- `python -m dpo.losses`: the family as a table, and drawn ---


def table() -> str:
    """The family in Markdown; README.md holds this text."""
    lines = ["| pref_loss | a row's loss | reads | reference | couples | source |", "|---|---|---|---|---|---|"]
    for name, loss in PREF_LOSSES.items():
        reads = "means per token" if loss.per_token else "sums, of labelled rows" if loss.unpaired else "sums"
        marks = ["yes" if flag else "" for flag in (loss.needs_reference, loss.couples)]
        equation = loss.equation.replace("|", "\\|")
        lines.append(f"| `{name}` | {equation} | {reads} | {marks[0]} | {marks[1]} | {loss.paper} |")
    return "\n".join(lines)


def over_margins(loss: PrefLoss, h: Tensor, options: dict[str, float]) -> Tensor:
    """The loss of one row at each h, apart: responses of 10 tokens at -40 nats, moved by h/2 and -h/2.

    Of an unpaired loss a desirable response, moved by h.
    """
    quantities = {"mean_chosen_length": torch.full_like(h, 10.0), "logratios": h}
    quantities |= {"mismatched_logratios": torch.zeros_like(h), "desirable": torch.ones_like(h)}
    for side, moved in (("chosen", h / 2), ("rejected", -h / 2)):
        sums = {"logps": moved - 40, "ref_logps": torch.full_like(h, -40.0), "logratios": moved}
        quantities |= {f"{side}_{name}": value for name, value in sums.items()}
        quantities |= {f"{side}_avg_{name}": value / 10 for name, value in sums.items()}
    read = torch.stack([quantities[name] for name in loss.reads], dim=1)
    chosen = {name: options[name] for name in loss.options}
    return torch.cat([loss.function(*pair.unsqueeze(1), **chosen) for pair in read])


def draw(path: str) -> None:
    """Each loss and its gradient over h, at beta 0.1 (means: 1), label smoothing 0.1, tau 0.05 and gamma 0.5."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError('drawing needs matplotlib: pip install -e ".[plot]"') from None
    columns = 5
    figure, axes = plt.subplots(-(-len(PREF_LOSSES) // columns), columns, figsize=(16, 12), layout="constrained")
    for axis in axes.flat[len(PREF_LOSSES) :]:
        axis.remove()
    for (name, loss), axis in zip(PREF_LOSSES.items(), axes.flat, strict=False):
        beta = 1.0 if loss.per_token else 0.1
        h = torch.linspace(-60, 60, 601, dtype=torch.float64, requires_grad=True)
        values = over_margins(loss, h, OFF | {"beta": beta, "label_smoothing": 0.1})
        (slopes,) = torch.autograd.grad(values.sum(), h)
        axis.plot(h.detach(), values.detach(), color="tab:blue")
        axis.twinx().plot(h.detach(), slopes, "--", color="tab:orange")
        axis.axvline(0, color="grey", linewidth=0.5)
        axis.set_title(name)
    figure.supxlabel("h = a - b, nats; loss (blue, left), its gradient (orange, right)")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    import sys

    print(table())
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if key != "figure" or not value:
            sys.exit(f"error: {argument}: expected figure=FILE.png")
        try:
            draw(value)
        except ValueError as error:
            sys.exit(f"error: {error}")
        print(f"figure: {value}")
