"""Each conversation is answered once, by its own seed and temperature, as generate answers it."""

import pytest
import torch

import dpo.evals.answers
from dpo.evals.answers import Answer, answer_all
from dpo.evals.progress import Progress
from models.generate import generate
from models.sampling import DRAWN, GREEDY
from models.template import ChatTemplate
from models.tokenizer import Tokenizer
from models.weights import WORLD, load_model

TEXTS = ["What does a cow eat?", "May I pet a lion?", "Where does a bee live?", "How many legs does a scorpion have?"]
CONVERSATIONS = [[{"role": "user", "content": text}] for text in TEXTS]
IDS = list("abcd")


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate("auto", Tokenizer(WORLD / "model"))


@pytest.fixture(scope="module")
def policy():
    return load_model(WORLD / "model", dtype=torch.float64, device=torch.device("cpu"))


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """How many prompts each call of generate was given."""
    calls: list[int] = []

    def counted(model, prompts, **settings):
        calls.append(len(prompts))
        return generate(model, prompts, **settings)

    monkeypatch.setattr(dpo.evals.answers, "generate", counted)
    return calls


def answers(policy, template, path, ids=IDS, sampling=DRAWN, batch_size=2) -> list[Answer]:
    with Progress(path / "answers.jsonl", {}) as progress:
        return answer_all(
            policy, template, CONVERSATIONS[: len(ids)], seeds=range(7, 7 + len(ids)), sampling=sampling,
            max_new_tokens=12, batch_size=batch_size, progress=progress, ids=ids,
        )  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_answer_is_that_of_its_prompt_and_seed_alone(policy, template, tmp_path, batch_size):
    found = answers(policy, template, tmp_path, batch_size=batch_size)
    for i, answer in enumerate(found):
        prompt, _ = template.encode(CONVERSATIONS[i], [])
        (alone,) = generate(
            policy, [prompt], samples=1, max_new_tokens=12, stop_ids=template.stop_ids, sampling=DRAWN, seeds=[7 + i],
            batch_size=1,
        )  # fmt: skip
        assert answer == Answer(template.tokenizer.decode(alone.ids).strip(), alone.finish_reason, alone.ids)
        assert answer.tokens == len(alone.ids)


def test_each_conversation_has_its_temperature(policy, template, tmp_path, asked):
    """As MT-Bench's categories have; a batch has one."""
    mixed = answers(policy, template, tmp_path / "mixed", sampling=[GREEDY, DRAWN, GREEDY, GREEDY])
    greedy, drawn = (answers(policy, template, tmp_path / str(s.temperature), sampling=s) for s in (GREEDY, DRAWN))
    assert mixed == [greedy[0], drawn[1], *greedy[2:]] and greedy != drawn
    assert asked[:3] == [2, 1, 1]


def test_what_was_answered_is_not_asked_again(policy, template, tmp_path, asked):
    first = answers(policy, template, tmp_path, ids=IDS[:2])
    again = answers(policy, template, tmp_path)
    assert again[:2] == first and sum(asked) == 4
    assert answers(policy, template, tmp_path) == again and sum(asked) == 4


def test_a_prompt_that_the_model_cannot_see_whole_is_refused(policy, template, tmp_path):
    seen = policy.config.max_position_embeddings
    long = [[{"role": "user", "content": "cow " * seen}]]
    with Progress(tmp_path / "a.jsonl", {}) as progress, pytest.raises(ValueError, match=rf"^x: .* model sees {seen};"):
        answer_all(
            policy, template, long, seeds=[1], sampling=GREEDY, max_new_tokens=1, batch_size=1, progress=progress,
            ids=["x"],
        )  # fmt: skip
