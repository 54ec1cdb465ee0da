"""Flipped labels: folds part prompts, margins are held out, and what was exchanged in the built-in world is found."""

import json
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dpo.doctor import flips
from dpo.doctor.flips import flipped_labels, folds
from dpo.doctor.with_model import encode_some, measure
from dpo.formats import Example
from experiments.flipped_labels.run import SETTINGS, auc, exchange, gold_margin, margins
from models.template import ChatTemplate
from models.tokenizer import Tokenizer
from models.weights import WORLD, load_model


def asking(prompt: str, chosen: str = "Yes.", rejected: str = "No.") -> Example:
    return Example(({"role": "user", "content": prompt},), (chosen, rejected), source="rows.json:1")


def settings(**changed: object):
    return OmegaConf.create(SETTINGS | {"flip_share": 0.05} | changed)


def test_auc_is_the_share_of_positive_and_negative_couples_in_order_with_ties_as_half():
    """Every couple counted, on scores with many ties."""
    generator = np.random.default_rng(0)
    scores, positive = generator.integers(0, 5, 40), generator.random(40) < 0.3
    couples = list(product(scores[positive], scores[~positive]))
    assert auc(scores, positive) == pytest.approx(np.mean([(p > n) + (p == n) / 2 for p, n in couples]))
    assert auc([1, 2, 3], [False, False, True]) == 1 and auc([1, 1], [True, False]) == 0.5


def test_folds_have_no_prompt_in_common_and_even_sizes():
    examples = [asking(f"{i % 17}?") for i in range(51)]
    fold = folds(examples, 5, seed=1)
    for prompt in range(17):
        assert len({fold[i] for i in range(51) if i % 17 == prompt}) == 1
    # 17 prompts of 3 rows: 3 or 4 prompts each.
    assert sorted(np.bincount(fold)) == [9, 9, 9, 12, 12]
    assert (fold == folds(examples, 5, seed=1)).all() and (fold != folds(examples, 5, seed=2)).any()


@pytest.mark.parametrize("count", [1, 4])
def test_folds_that_cannot_be_are_refused(count):
    with pytest.raises(ValueError, match=f"flip_folds={count}: .* number of prompts, 3; 0: no check"):
        folds([asking(prompt) for prompt in "abc"], count, seed=0)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate("auto", Tokenizer(WORLD / "model"), None)


def world_model():
    return load_model(WORLD / "model", dtype=torch.float32, device=torch.device("cpu"))


def held_out(examples, template, cfg) -> np.ndarray:
    _, rows = encode_some(examples, template, 100)
    model = world_model()
    return flips.held_out_margins(model, rows, measure(model, rows, 8).token_logps, cfg)


def test_a_margin_does_not_depend_on_its_own_label_but_for_its_sign(template):
    """Exchanging the responses of a whole fold changes not the policy that scores it, but the others' policies.

    Of one round: in the next, these policies say what the rows weigh that the first is trained on.
    """
    examples = [
        asking(f"What does {a} eat?", f"It eats {b}.", "I am not sure.")
        for a, b in zip("abcdef", "uvwxyz", strict=True)
    ]
    cfg = settings(flip_folds=2, flip_rounds=1, flip_batch_size=2, flip_epochs=1)
    own = folds(examples, 2, cfg.seed) == 1  # scored last, by an adapter that has to be fresh again
    exchanged = [replace(e, responses=e.responses[::-1]) if o else e for e, o in zip(examples, own, strict=True)]
    before, after = (held_out(rows, template, cfg) for rows in (examples, exchanged))
    np.testing.assert_allclose(after[own], -before[own], atol=1e-5)
    assert (np.abs(after[~own] - before[~own]) > 1e-3).all()
    assert (held_out(examples, template, cfg) == before).all()


def test_a_second_round_weighs_rows_by_what_the_first_made_of_their_labels(template, monkeypatch):
    seen = []
    monkeypatch.setattr(flips, "_one_round", lambda policy, start, rows, weight, *_: seen.append(weight) or MARGINS)
    assert held_out([asking("a"), asking("b")], template, settings(flip_folds=2, flip_rounds=2)) is MARGINS
    scale = flips.calibration(MARGINS)
    assert seen[0].tolist() == [1, 1]
    assert seen[1].tolist() == pytest.approx([1 / (1 + math.exp(-2 * scale)), 1 / (1 + math.exp(scale))])


MARGINS = np.array([2.0, -1.0])


def test_no_file_is_left(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held_out([asking("a"), asking("b")], template, settings(flip_folds=2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_calibration_undoes_a_policy_that_is_too_sure_or_not_sure_enough(scale):
    """Log-odds x hold of labels that are right with probability sigmoid(x); the policy says x / scale."""
    generator = np.random.default_rng(0)
    log_odds = generator.normal(size=20_000)
    right = generator.random(20_000) < 1 / (1 + np.exp(-log_odds))
    margin = np.where(right, log_odds, -log_odds) / scale
    assert flips.calibration(margin) == pytest.approx(scale, rel=0.1)


def test_flags_are_the_lowest_margins_below_0(monkeypatch):
    """Ten of 40 rows are against the label; a tenth of all may be flagged, so the four worst."""
    margin = np.array([-0.1 - i / 10 for i in range(10)] + [0.7] * 30)
    monkeypatch.setattr(flips, "held_out_margins", lambda *_: margin)
    monkeypatch.setattr(flips, "calibration", lambda _: 2.0)
    check = flipped_labels(None, [], [], settings(flip_share=0.1))
    assert list(check.rows) == [9, 8, 7, 6] and check.verdict == "warn"
    assert check.numbers["held_out_accuracy"] == 0.75
    # A quarter is sigmoid(-1.0986): twice the margin is below it from the sixth on, -0.6.
    assert check.numbers["doubtful_share"] == 5 / 40
    assert check.rows[6] == "margin -0.70, p(label) 20%"
    json.dumps(dict(check.numbers))


def test_a_policy_that_is_no_better_than_a_coin_flags_nothing(monkeypatch):
    """22 of 40: a coin gets 20 give or take 3."""
    monkeypatch.setattr(flips, "held_out_margins", lambda *_: np.array([-9.0] * 18 + [9.0] * 22))
    check = flipped_labels(None, [], [], settings())
    assert check.verdict == "note" and not check.rows and "no better than a coin" in check.summary


@pytest.mark.parametrize(("against", "verdict"), [(5, "note"), (6, "warn")])
def test_more_than_a_twentieth_of_doubtful_labels_is_a_warning(monkeypatch, against, verdict):
    monkeypatch.setattr(flips, "held_out_margins", lambda *_: np.array([-2.0] * against + [2.0] * (100 - against)))
    monkeypatch.setattr(flips, "calibration", lambda _: 1.0)
    assert flipped_labels(None, [], [], settings()).verdict == verdict


def test_labels_that_nothing_speaks_against_are_ok(monkeypatch):
    monkeypatch.setattr(flips, "held_out_margins", lambda *_: np.ones(40))
    check = flipped_labels(None, [], [], settings())
    assert check.verdict == "ok" and not check.rows and not check.advice


@pytest.mark.slow
def test_exchanged_pairs_of_the_world_are_found_in_a_few_hundred():
    """Two folds of 160 pairs: far fewer than a run has, and far better than a coin's 0.5."""
    margin, _, gold, flipped = margins(
        settings(flip_folds=2, flip_rounds=1, max_samples=320, flip_learning_rate=1e-3, flip_epochs=1)
    )
    assert flipped.sum() == 32
    assert auc(-margin, flipped) > 0.7 and auc(-gold, flipped) > 0.95


def test_exchange_turns_the_sign_of_the_gold_margin_of_its_share():
    examples = [asking("What does a cow eat?", "A cow eats grass.", "A cow eats meat.")] * 20
    changed, flipped = exchange(examples, 0.2, seed=3)
    assert flipped.sum() == 4
    sign = np.where(flipped, -1, 1)
    assert [gold_margin(e) for e in changed] == pytest.approx(list(sign * gold_margin(examples[0])))


@pytest.mark.slow
def test_more_pairs_find_more_with_the_doctors_own_settings():
    """A third of the world's pairs in two folds; experiments/flipped_labels has all of them in five."""
    margin, _, _, flipped = margins(settings(share=0.2, flip_folds=2, max_samples=1000))
    assert auc(-margin, flipped) > 0.8
