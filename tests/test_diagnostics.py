"""Each diagnostic is raised just beyond its thresholds and not just before them, once, whatever a row lacks."""

import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo import diagnostics
from dpo.diagnostics import DIAGNOSTICS, Alarm, Diagnosis, Facts

FEWER_ENDS, LESS_DISTINCT, REPEATS = diagnostics.FEWER_ENDS, diagnostics.LESS_DISTINCT, diagnostics.REPEATS
HARDLY_ORDERED, MOVED, NO_BETTER = diagnostics.HARDLY_ORDERED, diagnostics.MOVED, diagnostics.NO_BETTER
KL_PER_TOKEN, WORSE, LONGER = diagnostics.KL_PER_TOKEN, diagnostics.WORSE, diagnostics.LONGER
LITTLE_LEFT, REWARD_LOST, ENOUGH_ROWS = diagnostics.LITTLE_LEFT, diagnostics.REWARD_LOST, diagnostics.ENOUGH_ROWS
LOSS_SPIKE, NORM_SPIKE, NORMS_BEFORE = diagnostics.LOSS_SPIKE, diagnostics.NORM_SPIKE, diagnostics.NORMS_BEFORE
LOST_NATS, LOST_SHARE = diagnostics.LOST_NATS, diagnostics.LOST_SHARE

LOG_2 = math.log(2)
MORE, LESS = 1.001, 0.999
FACTS = Facts(beta=0.1, has_reference=True, start=LOG_2, total_steps=10, held_out=ENOUGH_ROWS)
Rows = list[dict[str, float]]


def training(step: int = 1, **changed: float) -> dict[str, float]:
    """A row that raises nothing."""
    return {"step": step, "loss": 0.5, "learning_rate": 1e-6, "grad_norm": 1.0} | changed


def evaluation(step: int, **changed: float) -> dict[str, float]:
    """Names without their eval_."""
    return {"step": step} | {f"eval_{name}": value for name, value in changed.items()}


def completions(step: int, **changed: float) -> dict[str, float]:
    """Of the samples; a healthy row but for what is changed."""
    healthy = {"mean_length": 10.0, "length_se": 0.1, "clipped_ratio": 0.0, "rep_4": 0.0, "distinct_2": 0.8, "kl": 0.0}
    return evaluation(step, **{f"completions/{name}": value for name, value in (healthy | changed).items()})


def pairs(margins: float = 1.0, chosen: float = 0.0, logps: float = -20.0, accuracies: float = 0.9) -> dict[str, float]:
    """What a row says of pairs."""
    rewards = {"chosen": chosen, "rejected": chosen - margins, "margins": margins, "accuracies": accuracies}
    return {f"rewards/{name}": value for name, value in rewards.items()} | {"logps/chosen": logps}


def raised(rows: Rows, facts: Facts = FACTS) -> list[str]:
    run = Diagnosis(facts)
    return [alarm.name for row in rows for alarm in run.read(row)]


def after(norm: float, before: list[float]) -> Rows:
    return [training(step, grad_norm=n) for step, n in enumerate([*before, norm], start=1)]


def lost(nats: float, before: float, margins: float = 1.0) -> dict[str, float]:
    """Chosen responses have lost so many nats of a log-likelihood."""
    return pairs(margins=margins, chosen=-nats * FACTS.beta, logps=before - nats)


def start_and_now(start: dict[str, float], now: dict[str, float]) -> Rows:
    return [completions(0, **start), completions(5, **now)]


def losses(*values: float) -> Rows:
    return [evaluation(step, loss=value) for step, value in enumerate(values)]


def ordered(accuracy: float, moved: float, step: int = 5, loss: float = 0.5) -> Rows:
    return [evaluation(step, loss=loss, **pairs(margins=moved * 2, chosen=moved, accuracies=accuracy))]


def gold(*rewards: float, margins: float = 1.0) -> Rows:
    rows = [evaluation(step, gold_reward=reward) for step, reward in enumerate(rewards)]
    return [rows[0], *(row | evaluation(0, **pairs(margins)) | {"step": row["step"]} for row in rows[1:])]


NORMS = [1.0] * NORMS_BEFORE
# name, what: (rows just beyond, rows just before)
EDGES: dict[tuple[str, str], tuple[Rows, Rows]] = {
    ("non_finite", "skipped"): ([training(skipped_steps=1)], [training(skipped_steps=0)]),
    ("training_instability", "grad_norm"): (after(NORM_SPIKE * MORE, NORMS), after(NORM_SPIKE * LESS, NORMS)),
    ("training_instability", "few before"): (after(1e3, NORMS), after(1e3, NORMS[1:])),
    ("training_instability", "fallen since the start"): (
        after(NORM_SPIKE * MORE, NORMS + [0.01] * 9), after(NORM_SPIKE * LESS, NORMS + [0.01] * 9)
    ),
    ("training_instability", "risen since the start"): (
        after(4 * NORM_SPIKE * MORE, NORMS + [4.0] * 25), after(4 * NORM_SPIKE * LESS, NORMS + [4.0] * 25)
    ),
    ("training_instability", "loss"): (
        [training(loss=LOSS_SPIKE * LOG_2 * MORE)], [training(loss=LOSS_SPIKE * LOG_2 * LESS)]
    ),
    ("likelihood_displacement", "share"): (
        [training(**lost(LOST_SHARE * 20 * MORE, -20))], [training(**lost(LOST_SHARE * 20 * LESS, -20))]
    ),
    ("likelihood_displacement", "nats"): (
        [training(**lost(LOST_NATS * MORE, -1))], [training(**lost(LOST_NATS * LESS, -1))]
    ),
    ("likelihood_displacement", "margins"): ([training(**lost(9, -20, 0.1))], [training(**lost(9, -20, 0.0))]),
    ("likelihood_displacement", "held out first"): (
        [evaluation(1, **lost(9, -20)), training()], [evaluation(1, **pairs()), training(**lost(9, -20))]
    ),
    ("length_exploitation", "longer"): (
        start_and_now({}, {"mean_length": 10 * LONGER * MORE}), start_and_now({}, {"mean_length": 10 * LONGER * LESS})
    ),
    # Two errors of 3 and 4 are one of 5, twice which is 10.
    ("length_exploitation", "than the draw"): (
        start_and_now({"length_se": 3.0}, {"mean_length": 20.01, "length_se": 4.0}),
        start_and_now({"length_se": 3.0}, {"mean_length": 19.99, "length_se": 4.0}),
    ),
    ("length_exploitation", "of answers that still end"): (
        start_and_now({}, {"mean_length": 30.0, "clipped_ratio": FEWER_ENDS * LESS}),
        start_and_now({}, {"mean_length": 30.0, "clipped_ratio": FEWER_ENDS * MORE}),
    ),
    ("model_degradation", "repeats"): (
        start_and_now({"rep_4": 0.01}, {"rep_4": 0.01 + REPEATS * MORE}),
        start_and_now({"rep_4": 0.01}, {"rep_4": 0.01 + REPEATS * LESS}),
    ),
    ("model_degradation", "twice as many"): (
        start_and_now({"rep_4": 0.3}, {"rep_4": 0.6 * MORE}), start_and_now({"rep_4": 0.3}, {"rep_4": 0.6 * LESS})
    ),
    ("model_degradation", "ends"): (
        start_and_now({"clipped_ratio": 0.1}, {"clipped_ratio": 0.1 + FEWER_ENDS * MORE}),
        start_and_now({"clipped_ratio": 0.1}, {"clipped_ratio": 0.1 + FEWER_ENDS * LESS}),
    ),
    ("model_degradation", "distinct"): (
        start_and_now({}, {"distinct_2": 0.8 * LESS_DISTINCT * LESS}),
        start_and_now({}, {"distinct_2": 0.8 * LESS_DISTINCT * MORE}),
    ),
    ("over_optimisation", "KL per token"): (
        start_and_now({}, {"kl": KL_PER_TOKEN * 10 * MORE}), start_and_now({}, {"kl": KL_PER_TOKEN * 10 * LESS})
    ),
    ("over_optimisation", "held-out loss"): (
        losses(0.5, 0.4, 0.4 * WORSE * MORE, 0.4 * WORSE * MORE), losses(0.5, 0.4, 0.4 * WORSE * LESS, 0.9)
    ),
    ("over_optimisation", "held-out loss, twice"): (losses(0.4, 0.9, 0.9), losses(0.4, 0.9)),
    ("saturation", "loss"): (
        [training(loss=LITTLE_LEFT * LOG_2 * LESS)], [training(loss=LITTLE_LEFT * LOG_2 * MORE)]
    ),
    ("noisy_labels", "accuracy"): (
        ordered(HARDLY_ORDERED * LESS, MOVED * 2), ordered(HARDLY_ORDERED * MORE, MOVED * 2)
    ),
    ("noisy_labels", "moved"): (ordered(0.5, MOVED * MORE), ordered(0.5, MOVED * LESS)),
    ("noisy_labels", "loss"): (ordered(0.5, 0.0, loss=LOG_2 * NO_BETTER * MORE), ordered(0.5, 0.0, loss=LOG_2)),
    ("noisy_labels", "half way"): (ordered(0.5, 1.0, step=5), ordered(0.5, 1.0, step=4)),
    ("reward_hacking", "reward"): (gold(3.0, 3.5, 3.5 - REWARD_LOST * MORE), gold(3.0, 3.5, 3.5 - REWARD_LOST * LESS)),
    ("reward_hacking", "margins"): (gold(3.0, 2.0, margins=0.1), gold(3.0, 2.0, margins=0.0)),
}  # fmt: skip


@pytest.mark.parametrize("edge", EDGES, ids=" ".join)
def test_it_is_raised_beyond_its_threshold_and_not_before(edge):
    beyond, before = EDGES[edge]
    assert edge[0] in raised(beyond)
    assert edge[0] not in raised(before)


def test_every_diagnostic_and_every_threshold_is_tested():
    assert {name for name, _ in EDGES} == set(DIAGNOSTICS)
    thresholds = {name for name in vars(diagnostics) if name.isupper() and name != "DIAGNOSTICS"}
    assert thresholds <= set(globals())


def late_accuracies(*values: float) -> Rows:
    """A run of 10 updates with too few held-out rows to say anything: the accuracies of its updates 1 to 10."""
    moved = pairs(margins=1.0, chosen=0.5)
    return [training(step, **moved | {"rewards/accuracies": value}) for step, value in enumerate(values, start=1)]


def test_with_few_held_out_rows_labels_are_judged_by_the_second_half_of_training_at_its_end():
    few = Facts(**vars(FACTS) | {"held_out": ENOUGH_ROWS - 1})
    early, late = [0.1] * 5, [0.55, 0.65, 0.55, 0.65]
    assert raised(late_accuracies(*early, *late, 0.59), few) == ["noisy_labels"]  # 2.99 of 5
    assert raised(late_accuracies(*early, *late, 0.61), few) == []  # 3.01 of 5
    assert raised(late_accuracies(*early, *late), few) == []  # not at its end
    assert raised(ordered(0.1, 0.5), few) == [] and raised(ordered(0.1, 0.5)) == ["noisy_labels"]


def test_labels_are_not_judged_by_one_line_of_training_where_held_out_rows_were_not_evaluated():
    """eval_strategy=no, or before the first evaluation; logging_steps=1 has lines of a few pairs."""
    assert raised(late_accuracies(*[0.5] * 9)) == []
    assert raised(late_accuracies(*[0.1] * 5, *[0.9] * 4, 0.2)) == []  # 0.76 in the second half
    assert raised(late_accuracies(*[0.1] * 10)) == ["noisy_labels"]


def test_a_line_that_began_in_the_first_half_says_nothing_of_labels():
    """logging_steps above half of a short run: at the first update all margins are 0, and none is above it."""
    few = Facts(**vars(FACTS) | {"held_out": 0})
    moved = pairs(margins=1.0, chosen=0.5, accuracies=0.4)
    assert raised([training(10, **moved)], few) == raised([training(4, **moved), training(10, **moved)], few) == []
    assert raised([training(5, **moved), training(10, **moved)], few) == ["noisy_labels"]


def test_an_evaluation_before_the_first_update_does_not_stand_before_training():
    """Of eval_on_start: until the next one it would say that nothing moves."""
    assert raised([evaluation(0, **pairs()), training(**lost(9, -20))]) == ["likelihood_displacement"]


def test_a_policy_that_has_broken_down_says_nothing_of_its_labels():
    assert raised([training(loss=9.0), *ordered(0.5, 1.0)]) == ["training_instability"]


def test_a_window_whose_updates_were_all_skipped_has_no_pairs_and_stops_nothing():
    """With few held-out rows, in the run's second half: what it lacks was asked for."""
    few = Facts(**vars(FACTS) | {"held_out": 0})
    rows = late_accuracies(*[0.5] * 10)
    rows[6] = training(7, loss=math.nan, grad_norm=math.nan, skipped_steps=1)
    assert raised(rows, few) == ["non_finite", "noisy_labels"]


def test_a_gradient_after_none_at_all_is_no_spike():
    """As of hinge, once all pairs are far enough apart: nothing is any number of times 0."""
    assert raised(after(1.0, [0.0] * 9)) == []


def test_nothing_is_compared_with_a_start_that_was_not_measured():
    """A run that drew no samples before its first update, because it was resumed with num_samples, say."""
    for beyond, _ in EDGES.values():
        rows = [row | {"step": row["step"] + 1} for row in beyond if "eval_completions/kl" in row]
        assert raised(rows) == raised([evaluation(0, loss=0.5), *rows]) == []


def test_nothing_is_compared_with_a_start_that_is_not_known_or_a_reference_that_there_is_not():
    unknown = Facts(**vars(FACTS) | {"start": None})
    assert raised([training(loss=99.0), training(2, loss=1e-9)], unknown) == []
    alone = Facts(**vars(FACTS) | {"has_reference": False})
    assert raised([training(**lost(9, -20))], alone) == []


def test_an_alarm_is_raised_once_and_says_where_what_and_what_to_do():
    run = Diagnosis(FACTS)
    (alarm,) = run.read(training(3, loss=0.002))
    assert run.read(training(4, loss=0.001)) == [] and run.alarms == {"saturation": alarm}
    assert (alarm.name, alarm.step) == ("saturation", 3)
    assert str(alarm).startswith(
        "saturation at step 3: the loss is 0.002, 0.3% of its start: hardly a gradient is left. T"
    )
    assert str(Alarm("a", 1, "b", "c")) == "a at step 1: b. c"


def test_reading_the_rows_again_raises_the_same_alarms():
    """As a resume does."""
    rows = [row for beyond, _ in EDGES.values() for row in beyond]
    first, second = Diagnosis(FACTS), Diagnosis(FACTS)
    for row in rows:
        first.read(row)
    for row in rows:
        second.read(row)
    assert first.alarms == second.alarms and len(first.alarms) > 5


NAMES = sorted({name for beyond, _ in EDGES.values() for row in beyond for name in row} - {"step"})
NUMBERS = st.sampled_from([0.0, -1.0, 0.5, 3.0, 1e-12, -1e300, math.nan, math.inf, -math.inf])


@settings(max_examples=int(os.environ.get("DPO_FUZZ", "60")), deadline=None, derandomize=True)
@given(
    st.lists(st.dictionaries(st.sampled_from(NAMES), NUMBERS), max_size=12),
    st.booleans(), st.sampled_from([None, 0.0, LOG_2, -1.0]),
)  # fmt: skip
def test_no_row_stops_a_run(given_rows, has_reference, start):
    """Numbers that are none, and rows that lack what others have. A row of training has what it always has."""
    run = Diagnosis(Facts(0.1, has_reference, start, total_steps=6, held_out=0))
    for step, row in enumerate(given_rows):
        whole = pairs() if any("rewards/" in name for name in row) else {}
        if any(name.startswith("eval_") for name in row):
            held_out = evaluation(step, loss=0.5, **whole)
            run.read(held_out | {name: value for name, value in row.items() if name.startswith("eval_")})
        else:
            run.read(training(step, **whole | row))


@pytest.mark.slow
def test_the_default_job_raises_nothing(tmp_path, capsys):
    """The whole of it: what a newcomer sees first is to be no false alarm."""
    from hydra import compose, initialize_config_dir
    from test_trainer import CONF

    from train import train

    with initialize_config_dir(CONF, version_base="1.3"):
        train(compose("config", [f"output_dir={tmp_path}", "device=cpu", "plot_loss=false"]))
    assert "warning" not in capsys.readouterr().out
    assert "## Alarms\n\nNone.\n" in (tmp_path / "report.md").read_text(encoding="utf-8")
