"""What a model tells about preference data before any training: its own preference, and what DPO will push down.

    reference margin    log pi_ref(y_w|x) - log pi_ref(y_l|x), nats: summed, and of means per token
    CHES                <S_w, S_l> - |S_w|^2, and of means <S_w, S_l> / (n_w n_l) - |S_w|^2 / n_w^2
                        (centered hidden embedding similarity; Razin et al. 2024, arXiv:2410.08847)

S is the sum of the hidden states that predict a response's n tokens, so from the last prompt token to the one before
the response's last. A hidden state is what the head multiplies, after the final norm, as the authors' code reads it
(transformers' hidden_states[-1]). The higher a pair's CHES, the less does a DPO step lift its chosen response, which
may fall together with the rejected one. It ranks the pairs of one dataset under one model and has no scale of its own,
so the highest share is shown, by the score of means, which the paper filters by. It is no measure of likeness: a short
rejected response with large states scores above a near-duplicate, and responses with equal states score 0.

All of it is read from one pass over the packed stream, which also gives dpo.doctor.flips its reference.

Shapes: N rows, B branches (chosen and rejected in turn), R response tokens, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from dpo.build import model_dir
from dpo.doctor.check import Check
from dpo.doctor.flips import flipped_labels
from dpo.formats import BadRow, Example
from dpo.fused import fused_logps
from dpo.objective import to_stream
from dpo.tokens import Encoded, encode
from models.template import ChatTemplate
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from models.weights import choose_device, choose_dtype, load_model

# A reference margin per token is extreme this many robust standard deviations below the median.
EXTREME = 4.0


@dataclass(frozen=True)
class Measured:
    """One pass of a model over N pairs."""

    margin: np.ndarray
    """(N,) log pi(chosen) - log pi(rejected), sums over tokens, nats."""
    margin_per_token: np.ndarray
    """(N,) the same of means per token."""
    ches: np.ndarray
    """(N,) CHES of sums."""
    ches_per_token: np.ndarray
    """(N,) CHES of means: the length-normalised one."""
    token_logps: list[Tensor]
    """(R,) log pi of every response token of each row, on the CPU."""


def checks(examples: Sequence[Example], cfg: DictConfig) -> list[Check]:
    """The checks that need a model; a row that has no place in cutoff_len is passed over, with NaN in `values`."""
    template = ChatTemplate(cfg.template, Tokenizer(model_dir(cfg.model_name_or_path)), cfg.date_string)
    places, rows = encode_some(examples, template, cfg.cutoff_len)
    model = load_model(
        model_dir(cfg.model_name_or_path), dtype=choose_dtype(cfg.bf16, cfg.fp16), device=choose_device(cfg.device)
    )
    measured = measure(model, rows, cfg.per_device_eval_batch_size)
    found = [reference_margin(measured), likelihood_displacement(measured, cfg.displacement_share)]
    if cfg.flip_folds:
        found.append(flipped_labels(model, rows, measured.token_logps, cfg))
    return [of_all_rows(check, places, len(examples)) for check in found]


def encode_some(
    examples: Sequence[Example], template: ChatTemplate, cutoff_len: int
) -> tuple[list[int], list[Encoded]]:
    """(places in examples, rows) of those that can be encoded; ValueError where none can."""
    places, rows, bad = [], [], ""
    for place, example in enumerate(examples):
        try:
            rows.append(encode(example, template, cutoff_len))
            places.append(place)
        except BadRow as error:
            bad = bad or str(error)
    if not rows:
        raise ValueError(f"no row is left for the model to read: {bad}")
    return places, rows


@torch.no_grad()
def measure(model: Transformer, rows: Sequence[Encoded], batch_size: int) -> Measured:
    """Margins, CHES and token log-probabilities of pairs, in one pass."""
    model.eval()
    numbers_N4 = np.empty((len(rows), 4))
    token_logps: list[Tensor] = [torch.empty(0)] * len(rows)
    # By length: rows of one batch then share their attention's padding. Longest first: what does not fit into memory
    # is known at once.
    order = sorted(range(len(rows)), key=lambda i: rows[i].tokens, reverse=True)
    for start in tqdm(range(0, len(rows), batch_size), desc="model", unit="batch", disable=None, delay=2, leave=False):
        places = order[start : start + batch_size]
        stream = to_stream([rows[i] for i in places], model.device)
        hidden_RD = model(stream).index_select(0, stream.predictor_R)
        logps_R = fused_logps(hidden_RD, model.head_weight_VD, stream.target_R)
        numbers_N4[places] = torch.stack(
            [*_margins(logps_R, stream.lengths_B), *ches(hidden_RD, stream.lengths_B)], -1
        ).cpu()
        parts = logps_R.cpu().split((stream.lengths_B[0::2] + stream.lengths_B[1::2]).tolist())
        for i, part in zip(places, parts, strict=True):
            token_logps[i] = part
    margin, margin_per_token, score, score_per_token = numbers_N4.T
    return Measured(margin, margin_per_token, score, score_per_token, token_logps)


def _margins(logps_R: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen minus rejected log-probability of every pair: of sums, of means."""
    sums = _sums(logps_R[:, None], lengths_B)[:, 0]
    means = sums / lengths_B
    return sums[0::2] - sums[1::2], means[0::2] - means[1::2]


def ches(hidden_RD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """CHES of every pair: of sums, of means. hidden_RD: what predicts each response token, chosen and rejected in turn.

    0 where both responses have the same states. float64, for it is a small difference of large numbers.
    """
    sums_BD = _sums(hidden_RD, lengths_B)
    return _ches(sums_BD), _ches(sums_BD / lengths_B[:, None])


def _ches(state_BD: Tensor) -> Tensor:
    chosen_ND, rejected_ND = state_BD[0::2], state_BD[1::2]
    return (chosen_ND * rejected_ND).sum(-1) - chosen_ND.square().sum(-1)


def _sums(x_RD: Tensor, lengths_B: Tensor) -> Tensor:
    """(B, D) sums over each response's tokens, float64."""
    branch_R = torch.repeat_interleave(lengths_B, output_size=len(x_RD))
    return x_RD.new_zeros(len(lengths_B), x_RD.shape[1], dtype=torch.float64).index_add(0, branch_R, x_RD.double())


def reference_margin(measured: Measured) -> Check:
    """Which response the model prefers as it is, and the pairs where it is far from the label."""
    margin = measured.margin_per_token
    median = float(np.median(margin))
    # The median absolute deviation times 1.4826 is a normal distribution's standard deviation.
    spread = 1.4826 * float(np.median(np.abs(margin - median)))
    limit = min(median - EXTREME * spread, 0.0)
    rows = {int(i): f"{margin[i]:.2f} nats per token for the label" for i in np.argsort(margin) if margin[i] < limit}
    numbers = {
        "accuracy": float((measured.margin > 0).mean()),
        "accuracy_per_token": float((margin > 0).mean()),
        **_distribution("margin", measured.margin),
        **_distribution("margin_per_token", margin),
        "extreme_below": limit,
        "extreme_share": len(rows) / len(margin),
    }
    accuracy = numbers["accuracy_per_token"]
    advice = ""
    if accuracy < 0.2:
        advice = "Are chosen and rejected swapped? If not, rejected may be the model's own and chosen another writer's."
    elif accuracy > 0.9:
        advice = "Little is left to rank: harder pairs, sampled from this model, would teach more."
    elif rows:
        advice = "Read the flagged rows: a chosen response that the model finds so unlikely is often broken or flipped."
    return Check(
        "reference_margin", "Does the model prefer chosen already?", "note" if advice else "ok",
        f"prefers chosen in {numbers['accuracy']:.1%} of the rows by sums, {accuracy:.1%} by means per token; "
        f"{len(rows)} rows are below {limit:.2f} nats per token ({EXTREME:g} robust standard deviations)",
        advice, numbers, rows, values={"margin": measured.margin, "margin_per_token": margin},
    )  # fmt: skip


def likelihood_displacement(measured: Measured, share: float) -> Check:
    """The pairs of highest CHES, at most `share` of all."""
    score = measured.ches_per_token
    worst = np.argsort(-score)[: math.ceil(share * len(score))]
    rows = {int(i): f"CHES per token {score[i]:.4g}" for i in worst if score[i] > 0}
    positive = float((score > 0).mean())
    return Check(
        "likelihood_displacement", "Which pairs will lift the chosen response least, or push it down?",
        "note" if rows else "ok",
        f"length-normalised CHES is above 0 in {positive:.1%} of the rows; the highest {share:.0%} are shown",
        "Read the flagged rows; if logps/chosen falls in training, leave them out or set dpop_lambda or pref_ftx."
        if rows else "",
        {"positive_share": positive, **_distribution("ches", measured.ches), **_distribution("ches_per_token", score)},
        rows, values={"ches": measured.ches, "ches_per_token": score},
    )  # fmt: skip


def _distribution(name: str, values: np.ndarray) -> dict[str, float]:
    quantiles = {"p05": 0.05, "median": 0.5, "p95": 0.95}
    return {f"{name}_mean": float(values.mean())} | {
        f"{name}_{suffix}": float(np.quantile(values, q)) for suffix, q in quantiles.items()
    }


def of_all_rows(check: Check, places: Sequence[int], total: int) -> Check:
    """A check of the rows that could be encoded, with the indices of all of them."""

    def spread(values: np.ndarray) -> np.ndarray:
        whole = np.full(total, np.nan)
        whole[places] = values
        return whole

    rows = {places[i]: reason for i, reason in check.rows.items()}
    summary = check.summary + (f"; rows not measured: {total - len(places)}" if len(places) < total else "")
    values = {name: spread(values) for name, values in check.values.items()}
    return replace(check, rows=rows, summary=summary, values=values)
