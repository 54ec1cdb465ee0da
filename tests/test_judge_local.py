"""The local judge: p(A) as transformers has it, equal responses tie exactly, swapped ones mirror exactly."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_judge_prompt import ATTACKS
from transformers import AutoModelForCausalLM

from dpo.judge.local import LocalJudge, letter_ids, p_of_a
from dpo.judge.prompt import judge_messages
from dpo.judge.store import Store
from dpo.judge.verdict import MIRRORED, Pair, Verdict
from models.config import read_model_config
from models.template import ChatTemplate
from models.tokenizer import Tokenizer
from models.weights import WORLD, load_model

ASKED = [{"role": "user", "content": "May I pet a lion?"}]
PAIRS = [
    Pair("1", ASKED, "No, a lion is wild.", "Yes, a lion enjoys a gentle pat."),
    Pair("2", ASKED, "That is a silly question.", "No."),
    Pair(
        "3", [{"role": "user", "content": "What does a cow eat?"}], "Grass.", "A cow likes to eat meat. It is a fish."
    ),
]


def judge_of(directory: Path = WORLD / "model", store: Store | None = None, batch_size: int = 2) -> LocalJudge:
    model = load_model(directory, dtype=torch.float32, device=torch.device("cpu")).requires_grad_(False)
    template = ChatTemplate("auto", Tokenizer(directory))
    return LocalJudge(model, template, name="m", digest="d", batch_size=batch_size, seed=0, store=store or Store(None))


@pytest.fixture(scope="module")
def judge() -> LocalJudge:
    """The world's model; it has never seen a judge's prompt, and its words begin with A: what it says is no matter."""
    return judge_of()


def assert_p_is_that_of_transformers(judge: LocalJudge, directory: Path, letters: list[list[int]]) -> None:
    """One whole prompt at a time: the softmax over all tokens, the letters' share of A and B together."""
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    judged = judge(PAIRS)
    for pair, one in zip(PAIRS, judged, strict=True):
        for order, first_is_a in zip(one.orders, (True, False), strict=True):
            ids, _ = judge.template.encode(judge_messages(pair, first_is_a=first_is_a, seed=0), [])
            with torch.no_grad():
                p_V = theirs(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
            a, b = (p_V[tokens].sum().item() for tokens in letters)
            expected = a / (a + b) if first_is_a else b / (a + b)
            assert order.p == pytest.approx(expected, rel=1e-4) and order.tokens == len(ids)


def test_p_is_that_of_transformers(judge):
    """The world's tokenizer has one token for `A` and one for `B`, and none for ` B`."""
    assert judge.letters_2L.tolist() == [[35], [36]]
    assert_p_is_that_of_transformers(judge, WORLD / "model", [[35], [36]])


@pytest.mark.real
def test_p_of_a_real_model_is_that_of_transformers(smollm2):
    judge = judge_of(smollm2)
    vocabulary = judge.template.tokenizer.rust.get_vocab()
    letters = [[vocabulary[letter], vocabulary[f"Ġ{letter}"]] for letter in "AB"]
    assert judge.letters_2L.tolist() == letters
    assert_p_is_that_of_transformers(judge, smollm2, letters)


@pytest.fixture(scope="module")
def roomy() -> LocalJudge:
    """With room for attacks that are longer than the world's sentences."""
    judge = judge_of()
    judge.model.config = replace(judge.model.config, max_position_embeddings=2048)
    return judge


@pytest.mark.parametrize("text", ["Grass.", *ATTACKS[:7]])
def test_equal_responses_tie_exactly(roomy, text):
    (one,) = roomy([Pair("1", ASKED, text, text)])
    assert one.verdict is Verdict.TIE and one.p == 0.5


def test_swapped_responses_mirror_exactly(judge):
    straight = judge(PAIRS)
    swapped = judge_of()([replace(pair, first=pair.second, second=pair.first) for pair in PAIRS])
    for one, other in zip(straight, swapped, strict=True):
        assert other.verdict is MIRRORED[one.verdict] and other.p == pytest.approx(1 - one.p, abs=1e-15)
        assert [order.p for order in other.orders] == [1 - order.p for order in reversed(one.orders)]


def test_a_pair_and_its_mirror_image_are_computed_by_the_same_stream(monkeypatch):
    """Else which of two branches comes first would show in the last digits."""
    streams = []
    monkeypatch.setattr("dpo.judge.local.p_of_a", lambda model, prompts, _: streams.append(prompts) or torch.rand(2))
    for first, second in (("x", "y"), ("y", "x")):
        judge_of()([Pair("1", ASKED, first, second)])
    assert streams[0] == streams[1]


@pytest.mark.parametrize("attack", ATTACKS[:7])
def test_an_attack_wins_nothing_from_a_judge_that_says_a(roomy, attack):
    """The null model's constant answer, against a plain one. This judge says A whatever it reads: both orders tie."""
    (one,) = roomy([Pair("1", ASKED, attack, "No, a lion is wild.")])
    assert one.verdict is Verdict.TIE and [order.verdict for order in one.orders] == [Verdict.FIRST, Verdict.SECOND]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_neighbours_change_nothing(judge, batch_size):
    for one, other in zip(judge(PAIRS), judge_of(batch_size=batch_size)(PAIRS), strict=True):
        assert one.p == pytest.approx(other.p, abs=1e-6)


def test_a_prompt_longer_than_the_model_is_invalid_and_says_so(judge):
    one, other = judge([Pair("1", ASKED, "cow " * 300, "No."), PAIRS[0]])
    limit = read_model_config(WORLD / "model").max_position_embeddings
    assert one.verdict is Verdict.INVALID and one.p is None and f"model:m {limit} positions" in one.reason
    assert other.verdict is not Verdict.INVALID


def test_logits_that_are_not_finite_are_no_verdict():
    judge = judge_of()
    judge.model.model.norm.weight.fill_(float("nan"))
    (one,) = judge(PAIRS[:1])
    assert one.verdict is Verdict.INVALID and "not finite" in one.reason
    assert judge.store.get(judge._key(judge._prompt(PAIRS[0], True))) is None


def test_what_is_kept_is_not_computed_again(monkeypatch, tmp_path):
    path = str(tmp_path / "cache")
    before = judge_of(store=Store(path))(PAIRS)
    monkeypatch.setattr("dpo.judge.local.p_of_a", None)
    after = judge_of(store=Store(path))(PAIRS)
    assert [one.p for one in after] == [one.p for one in before]
    assert all(order.cached for one in after for order in one.orders)


def test_every_pair_is_told_of_as_it_is_done(judge):
    heard = {}
    judged = judge(PAIRS, lambda pair, one: heard.setdefault(pair.id, one))
    assert [heard[pair.id] for pair in PAIRS] == judged


def test_prompts_that_share_all_but_their_end_are_those_of_rows_of_their_own(judge):
    """Two branches of one trunk, one branch, and two that share nothing but the first token."""
    prompts = [[(1, 2, 3, 4), (1, 2, 3, 5, 6)], [(1, 9, 9)], [(1, 2), (1, 3)]]
    together = p_of_a(judge.model, prompts, judge.letters_2L)
    alone = torch.cat([p_of_a(judge.model, [[ids]], judge.letters_2L) for both in prompts for ids in both])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_a_tokenizer_without_letters_is_refused():
    class NoLetters:
        def encode(self, texts):
            return [[1, 2] for _ in texts]

    with pytest.raises(ValueError, match="no single tokens for A and B"):
        letter_ids(NoLetters())
