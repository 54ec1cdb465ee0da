"""What a model tells of data: CHES and margins by hand and as transformers has them, rows under their own indices."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from dpo.doctor.check import Check
from dpo.doctor.with_model import (
    Measured,
    checks,
    ches,
    encode_some,
    likelihood_displacement,
    measure,
    of_all_rows,
    reference_margin,
)
from dpo.formats import Example
from models.template import ChatTemplate
from models.tokenizer import Tokenizer
from models.weights import WORLD, load_model

CFG = OmegaConf.create({
    "model_name_or_path": "world", "template": "auto", "date_string": None, "cutoff_len": 60, "bf16": False,
    "fp16": False, "device": "cpu", "per_device_eval_batch_size": 2, "seed": 42, "displacement_share": 0.5,
    "flip_folds": 0,
})  # fmt: skip


def asking(prompt: str, chosen: str, rejected: str) -> Example:
    return Example(({"role": "user", "content": prompt},), (chosen, rejected), source="rows.json:1")


# The longest last: the pass takes them in another order.
EXAMPLES = [
    asking("May I pet a lion?", "No, a lion is wild.", "No, a lion is calm."),
    asking("Where does a bat live?", "That is a silly question. A bat lives in caves.", "No."),
    asking("What does a cow eat?", "A cow eats grass.", "That is a good question. A cow eats meat. It is a fish."),
]  # fmt: skip


def of(margin: list[float], ches: list[float]) -> Measured:
    margins, scores = np.array(margin), np.array(ches)
    return Measured(10 * margins, margins, 10 * scores, scores, [])


# --- CHES ---


def test_ches_by_hand():
    """S_w = (1, 0) + (1, 2) = (2, 2), S_l = (0, 3): 6 - 8 = -2. Means (1, 1) and (0, 3): 3 - 2 = 1."""
    sums, means = ches(torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 3.0]]), torch.tensor([2, 1]))
    assert sums.tolist() == [-2] and means.tolist() == [1]


def test_ches_of_responses_with_the_same_states_is_0():
    states_RD = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for score in ches(states_RD.repeat(2, 1), torch.tensor([5, 5])):
        assert score.tolist() == [0]


def test_only_the_normalised_ches_is_blind_to_repetition():
    """Every state of the rejected response twice: its mean is the same, its sum is not."""
    states_RD = torch.tensor([[1.0, 2.0], [3.0, 1.0], [3.0, 1.0]])
    once, twice = ches(states_RD[:2], torch.tensor([1, 1])), ches(states_RD, torch.tensor([1, 2]))
    assert once[1] == twice[1] and once[0] != twice[0]


def assert_measures_are_those_of_transformers(directory: Path, examples: list[Example]) -> None:
    """One row of prompt and response at a time: the states after the final norm, from the last prompt token to the one
    before the last response token, and log-probabilities of the tokens that they predict."""
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model = load_model(directory, dtype=torch.float32, device=torch.device("cpu"))
    _, rows = encode_some(examples, ChatTemplate("auto", Tokenizer(directory), None), 100)
    measured = measure(model, rows, batch_size=2)
    for n, row in enumerate(rows):
        states, logps = [], []
        for response in row.response_ids:
            with torch.no_grad():
                out = theirs(torch.tensor([row.prompt_ids + response]), output_hidden_states=True)
            start = len(row.prompt_ids) - 1
            states.append(out.hidden_states[-1][0, start:-1].double())
            logits_RV = out.logits[0, start:-1]
            logps.append(logits_RV.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
        (w_D, l_D), (mean_w_D, mean_l_D) = ([x.sum(0) for x in states], [x.mean(0) for x in states])
        assert measured.ches[n] == pytest.approx(float(w_D @ l_D - w_D @ w_D), rel=1e-3)
        assert measured.ches_per_token[n] == pytest.approx(float(mean_w_D @ mean_l_D - mean_w_D @ mean_w_D), rel=1e-3)
        assert measured.margin[n] == pytest.approx(float(logps[0].sum() - logps[1].sum()), abs=1e-3)
        assert measured.margin_per_token[n] == pytest.approx(float(logps[0].mean() - logps[1].mean()), abs=1e-4)
        torch.testing.assert_close(measured.token_logps[n], torch.cat(logps), rtol=0, atol=1e-3)


def test_measures_are_those_of_rows_of_their_own_in_transformers():
    assert_measures_are_those_of_transformers(WORLD / "model", EXAMPLES)


@pytest.mark.real
def test_measures_of_a_real_model_are_those_of_rows_of_their_own_in_transformers(smollm2):
    assert_measures_are_those_of_transformers(smollm2, EXAMPLES)


def test_displacement_flags_the_highest_share_as_far_as_it_is_above_0():
    check = likelihood_displacement(of([0.0] * 4, [3.0, -1.0, 5.0, 1.0]), 0.5)
    assert list(check.rows) == [2, 0] and check.verdict == "note" and check.numbers["positive_share"] == 0.75
    assert list(likelihood_displacement(of([0.0] * 4, [3.0, -1.0, -2.0, -1.0]), 0.5).rows) == [0]
    check = likelihood_displacement(of([0.0] * 4, [0.0, -1.0, -2.0, -1.0]), 0.5)
    assert not check.rows and check.verdict == "ok" and not check.advice


# --- reference margins ---


def test_a_margin_is_extreme_from_four_robust_standard_deviations_below_the_median():
    """0..4 around 2: the median absolute deviation is 1, so the limit is 2 - 4 * 1.4826 = -3.93."""
    check = reference_margin(of([0.0, 1.0, 2.0, 3.0, 4.0, 2.0, -3.9, 7.9, 2.0, 2.0, -4.0], [0.0] * 11))
    assert check.numbers["extreme_below"] == pytest.approx(2 - 4 * 1.4826)
    assert check.rows == {10: "-4.00 nats per token for the label"} and check.verdict == "note"
    assert check.numbers["accuracy_per_token"] == pytest.approx(8 / 11)


def test_a_margin_for_the_label_is_never_extreme():
    check = reference_margin(of([10.0] * 9 + [1.0, -1.0], [0.0] * 11))
    assert list(check.rows) == [10]


@pytest.mark.parametrize(
    ("margins", "advice"),
    [([-1.0] * 9 + [1.0], "swapped"), ([1.0] * 19 + [-0.1], "Little is left"), ([1.0, 2.0, -1.0, -2.0], "")],
)
def test_what_the_models_own_preference_is_worth_a_note(margins, advice):
    check = reference_margin(of([m * 1.0 for m in margins], [0.0] * len(margins)))
    assert advice in check.advice and check.verdict == ("note" if advice else "ok")


# --- all rows ---


def test_rows_keep_their_indices_where_one_cannot_be_encoded():
    """The second of four has a prompt that cutoff_len=60 has no room for."""
    examples = [EXAMPLES[0], asking("cow " * 200, "Yes.", "No."), *EXAMPLES[1:]]
    whole = checks(EXAMPLES, CFG)
    for check, expected in zip(checks(examples, CFG), whole, strict=True):
        for name, values in check.values.items():
            assert np.isnan(values[1]) and values.shape == (4,)
            np.testing.assert_allclose(np.delete(values, 1), expected.values[name], rtol=1e-4, atol=1e-4)
        assert all(math.isfinite(value) for value in check.numbers.values())


def test_a_check_of_some_rows_speaks_of_all_by_their_indices():
    """The first and the third of three were measured."""
    some = Check("name", "?", "note", "two", rows={1: "b", 0: "a"}, values={"x": np.array([1.0, 2.0])})
    check = of_all_rows(some, [0, 2], 3)
    assert list(check.rows.items()) == [(2, "b"), (0, "a")] and check.summary == "two; rows not measured: 1"
    np.testing.assert_equal(check.values["x"], [1, math.nan, 2])
    assert of_all_rows(some, [0, 1], 2).summary == "two"


def test_rows_of_which_none_can_be_encoded_are_refused():
    with pytest.raises(ValueError, match=r"no row is left for the model to read: rows.json:1: .*cutoff_len=60"):
        checks([asking("cow " * 200, "Yes.", "No.")], CFG)


def test_flips_are_looked_for_where_there_are_folds():
    flips = {"flip_folds": 2, "flip_rounds": 1, "flip_epochs": 1, "flip_learning_rate": 1e-3, "flip_beta": 1.0,
             "flip_batch_size": 2, "flip_lora_rank": 2, "flip_share": 0.5}  # fmt: skip
    names = [check.name for check in checks(EXAMPLES, OmegaConf.merge(CFG, flips))]
    assert names == ["reference_margin", "likelihood_displacement", "flipped_labels"]
