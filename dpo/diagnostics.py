"""What goes wrong in preference training, each with its sign in the metrics, a threshold, and what to do about it.

A diagnostic is a function of the rows of metrics.jsonl up to now; it is said once, when it first holds. None is proof:
each says what was seen and what it was compared with. Sources: the guide's common issues, and those beside each.

Left out: what needs a judge; its verdicts come with the evaluation that asks one.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

Row = Mapping[str, float]


@dataclass(frozen=True)
class Facts:
    """What the metrics do not say of a run."""

    beta: float
    """rewards are beta times log-ratios."""
    has_reference: bool
    start: float | None
    """the loss where policy equals reference, where that is one number."""
    total_steps: int
    held_out: int
    """rows of an evaluation."""


@dataclass(frozen=True)
class Alarm:
    name: str
    step: int
    found: str
    advice: str

    def __str__(self) -> str:
        return f"{self.name} at step {self.step}: {self.found}. {self.advice}"


class Diagnosis:
    """The rows of a run as far as it has come, and the alarms that they have raised."""

    def __init__(self, facts: Facts):
        self.facts = facts
        self.training: list[Row] = []
        self.evaluations: list[Row] = []
        self.alarms: dict[str, Alarm] = {}

    def read(self, row: Row) -> list[Alarm]:
        """Take a row of metrics.jsonl in; the alarms that it is the first to raise."""
        (self.training if "learning_rate" in row else self.evaluations).append(row)
        new = []
        for name, (check, advice) in DIAGNOSTICS.items():
            if name not in self.alarms and (found := check(self)):
                self.alarms[name] = Alarm(name, int(row["step"]), found, advice)
                new.append(self.alarms[name])
        return new

    def start_and_now(self, metric: str) -> tuple[float, float] | None:
        """A metric of the samples before the first update, and in the newest evaluation that has it."""
        key = f"eval_completions/{metric}"
        rows = [row for row in self.evaluations if key in row]
        return (rows[0][key], rows[-1][key]) if len(rows) > 1 and rows[0]["step"] == 0 else None

    def pairs(self) -> Row | None:
        """What is known of rows that are not trained on, or else of those that are: the newest."""
        # Before the first update (eval_on_start) nothing has moved.
        held_out = [row for row in self.evaluations if "eval_rewards/margins" in row and row["step"] > 0]
        if held_out:
            return {name.removeprefix("eval_"): value for name, value in held_out[-1].items()}
        return self.training[-1] if self.training and "rewards/margins" in self.training[-1] else None


def non_finite(run: Diagnosis) -> str | None:
    skipped = run.training[-1].get("skipped_steps", 0) if run.training else 0
    return f"{skipped:.0f} updates were skipped, for their loss or gradient was not finite" if skipped else None


# Beyond the typical norm so far, and beyond the start's: it falls as pairs are learned, and one hard pair is no spike.
NORM_SPIKE, NORMS_BEFORE = 10.0, 5
LOSS_SPIKE = 1.5


def training_instability(run: Diagnosis) -> str | None:
    norms = [row["grad_norm"] for row in run.training[-21:]]
    start = [row["grad_norm"] for row in run.training[:NORMS_BEFORE]]
    if len(run.training) > NORMS_BEFORE and math.isfinite(norms[-1]):
        before = [norm for norm in norms[:-1] if math.isfinite(norm)]
        typical = max(median(before), median(start)) if before else math.inf
        if norms[-1] > NORM_SPIKE * typical > 0:
            return f"grad_norm {norms[-1]:.3g}, {norms[-1] / typical:.0f} times what was usual"
    loss, first = (run.training[-1]["loss"] if run.training else math.nan), run.facts.start
    if first is not None and first > 0 and loss > LOSS_SPIKE * first:
        return f"the loss is {loss:.3g}, {loss / first:.1f} times the {first:.3g} of a policy that has learned nothing"
    return None


# Share of the chosen responses' log-likelihood under the reference.
LOST_SHARE, LOST_NATS = 0.25, 1.0


def likelihood_displacement(run: Diagnosis) -> str | None:
    """Razin et al. 2024, arXiv:2410.08847."""
    pairs = run.pairs()
    if pairs is None or not run.facts.has_reference or pairs["rewards/margins"] <= 0:
        return None
    ratio = pairs["rewards/chosen"] / run.facts.beta
    before = pairs["logps/chosen"] - ratio
    if ratio < -LOST_NATS and ratio < LOST_SHARE * before < 0:
        lost = f"{-ratio:.3g} nats of log-likelihood, {ratio / before:.0%} on top of the reference's {before:.3g}"
        return f"chosen responses have lost {lost}, while margins are {pairs['rewards/margins']:.3g}"
    return None


REPEATS, FEWER_ENDS, LESS_DISTINCT = 0.1, 0.25, 0.5
LONGER = 1.3


def length_exploitation(run: Diagnosis) -> str | None:
    """Park et al. 2024, arXiv:2403.19159."""
    lengths, errors = run.start_and_now("mean_length"), run.start_and_now("length_se")
    clipped = run.start_and_now("clipped_ratio")
    if lengths is None or errors is None or clipped is None or clipped[1] > clipped[0] + FEWER_ENDS:
        return None  # answers that no longer end are another failure
    # Two standard errors: more than the draw of a few answers does.
    if lengths[1] > LONGER * lengths[0] > 0 and lengths[1] - lengths[0] > 2 * math.hypot(*errors):
        return f"answers have {lengths[1]:.1f} tokens, {lengths[1] / lengths[0]:.2f} times as many as at the start"
    return None


def model_degradation(run: Diagnosis) -> str | None:
    repeats, clipped = run.start_and_now("rep_4"), run.start_and_now("clipped_ratio")
    distinct = run.start_and_now("distinct_2")
    if repeats and repeats[1] > 2 * repeats[0] and repeats[1] > repeats[0] + REPEATS:
        return f"{repeats[1]:.0%} of an answer's 4-grams repeat earlier ones, {repeats[0]:.0%} at the start"
    if clipped and clipped[1] > clipped[0] + FEWER_ENDS:
        return f"{1 - clipped[1]:.0%} of answers come to an end, {1 - clipped[0]:.0%} at the start"
    if distinct and distinct[1] < LESS_DISTINCT * distinct[0]:
        return f"answers have {distinct[1]:.0%} distinct pairs of tokens, {distinct[0]:.0%} at the start"
    return None


KL_PER_TOKEN, WORSE = 0.3, 1.1


def over_optimisation(run: Diagnosis) -> str | None:
    """Rafailov et al. 2024, arXiv:2406.02900."""
    kl, length = run.start_and_now("kl"), run.start_and_now("mean_length")
    if kl and length and kl[1] > KL_PER_TOKEN * length[1] > 0:
        return f"KL(policy || reference) is {kl[1]:.1f} nats per answer, {kl[1] / length[1]:.2f} per token"
    losses = [row["eval_loss"] for row in run.evaluations if "eval_loss" in row]
    if len(losses) >= 3 and 0 < min(losses) * WORSE < min(losses[-2:]):
        best = losses.index(min(losses)) + 1
        return f"the held-out loss has risen to {losses[-1]:.3g} from {min(losses):.3g} in evaluation {best}"
    return None


LITTLE_LEFT = 0.03


def saturation(run: Diagnosis) -> str | None:
    loss = run.training[-1]["loss"] if run.training else math.nan
    if run.facts.start is not None and run.facts.start > 0 and loss < LITTLE_LEFT * run.facts.start:
        return f"the loss is {loss:.2g}, {loss / run.facts.start:.1%} of its start: hardly a gradient is left"
    return None


HARDLY_ORDERED, MOVED, NO_BETTER, ENOUGH_ROWS = 0.6, 0.1, 1.01, 50


def noisy_labels(run: Diagnosis) -> str | None:
    pairs, total = run.pairs(), run.facts.total_steps
    if pairs is None or "rewards/accuracies" not in pairs or pairs["step"] < total / 2:
        return None
    if "training_instability" in run.alarms:  # a policy that has broken down orders no pairs, whatever their labels
        return None
    accuracy, loss = pairs["rewards/accuracies"], pairs["loss"]
    training_alone = bool(run.training) and pairs is run.training[-1]
    # Then by all rows of the run's second half, before they were learned from: a line may be of one small batch.
    if training_alone or run.facts.held_out < ENOUGH_ROWS:
        # Without those whose updates were all skipped: they have nothing to say of pairs.
        begins = [0, *(row["step"] for row in run.training[:-1])]
        late = [
            row for begin, row in zip(begins, run.training, strict=False)
            if begin >= total / 2 and "rewards/accuracies" in row
        ]  # fmt: skip
        if not late or run.training[-1]["step"] < total:
            return None
        accuracy, loss = (sum(row[name] for row in late) / len(late) for name in ("rewards/accuracies", "loss"))
    moved = max(abs(pairs["rewards/chosen"]), abs(pairs["rewards/rejected"]))
    # Labels that contradict one another may leave rewards where they are: the loss is then no better than at the start.
    worse = run.facts.start is not None and run.facts.start > 0 and loss > NO_BETTER * run.facts.start
    if accuracy < HARDLY_ORDERED and (moved > MOVED or worse):
        return f"{accuracy:.0%} of pairs are ordered as labelled, the loss is {loss:.3g}, rewards moved by {moved:.2g}"
    return None


REWARD_LOST = 0.1


def reward_hacking(run: Diagnosis) -> str | None:
    rows = [row for row in run.evaluations if "eval_gold_reward" in row]
    pairs = run.pairs()
    if len(rows) < 2 or pairs is None or pairs["rewards/margins"] <= 0:
        return None
    best, now = max(row["eval_gold_reward"] for row in rows), rows[-1]["eval_gold_reward"]
    if now < best - REWARD_LOST:
        return (
            f"the gold reward has fallen from {best:.2f} to {now:.2f}, while margins are {pairs['rewards/margins']:.3g}"
        )
    return None


Check = Callable[[Diagnosis], str | None]
DIAGNOSTICS: dict[str, tuple[Check, str]] = {
    "non_finite": (
        non_finite,
        "Lower learning_rate, raise pref_beta or lower max_grad_norm; with fp16 try bf16; read the rows it names",
    ),
    "training_instability": (
        training_instability, "Lower learning_rate (the guide: 1e-7), raise pref_beta (0.2), lower max_grad_norm (0.5)"
    ),
    "likelihood_displacement": (
        likelihood_displacement,
        "Raise pref_beta or lower learning_rate; pref_ftx or dpop_lambda hold the chosen side up; look for pairs that "
        "hardly differ (python -m dpo.doctor)",
    ),
    "length_exploitation": (
        length_exploitation,
        "Is chosen the longer one in the data (python -m dpo.doctor)? len_reg_alpha, ld_alpha or a loss on means "
        "(sigmoid_norm, simpo) take length out",
    ),
    "model_degradation": (
        model_degradation,
        "Fewer epochs (num_train_epochs=0.5), a larger pref_beta, a lower learning_rate; check the pairs' quality",
    ),
    "over_optimisation": (
        over_optimisation,
        "Stop earlier (load_best_model_at_end, early_stopping_steps), raise pref_beta, or let the reference follow "
        "(sync_ref_model)",
    ),
    "saturation": (
        saturation, "The pairs are too easy or pref_beta is too large: stop here, lower pref_beta, or take harder pairs"
    ),
    "noisy_labels": (
        noisy_labels,
        "Labels contradict one another, or hang on what the model cannot see: python -m dpo.doctor with a model finds "
        "rows to look at; loss=robust or dpo_label_smoothing allow for wrong ones",
    ),
    "reward_hacking": (
        reward_hacking,
        "The implicit reward rises and the true one falls: more diverse pairs from several sources, held-out "
        "evaluations, a larger pref_beta",
    ),
}  # fmt: skip
