"""The expected gold reward is a sum over the whole grammar, and what the model puts elsewhere counts as outside."""

from pathlib import Path

import pytest
import torch

from dpo.build import WORLD
from dpo.evals.world_reward import response_probabilities, score
from dpo.logprobs import sum_over_responses, token_logps
from experiments.world import world
from models.generate import generate
from models.sampling import GREEDY
from models.stream import pack
from models.template import ChatTemplate
from models.tokenizer import Tokenizer
from models.weights import load_model

PROMPT = "What does a cow eat?"


@pytest.fixture(scope="module")
def model():
    return load_model(WORLD / "model", dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate("auto", Tokenizer(WORLD / "model"))


def test_a_responses_probability_is_the_product_of_its_next_token_probabilities(model, template):
    """Token by token with the plain decoder's forward pass, up to and including <|im_end|>."""
    response = world.responses(PROMPT)[7]
    prompt_ids, (ids,) = template.encode([{"role": "user", "content": PROMPT}], [response])
    expected = 0.0
    for i, token in enumerate(ids[:-1]):  # the newline after <|im_end|> is the template's
        with torch.no_grad():
            logits_V = model(pack([prompt_ids + ids[:i]], [[]]))[-1] @ model.head_weight_VD.T
        expected += float(logits_V.log_softmax(-1)[token])
    assert response_probabilities(model, template, PROMPT)[response] == pytest.approx(
        torch.tensor(expected).exp().item(), rel=1e-4
    )


def test_the_tree_gives_every_response_the_probability_that_it_has_as_a_branch_of_its_own(template):
    """In float64, all 135 responses against models.stream.pack."""
    model = load_model(WORLD / "model", dtype=torch.float64, device=torch.device("cpu"))
    prompt_ids, responses = template.encode([{"role": "user", "content": PROMPT}], world.responses(PROMPT))
    stream = pack([prompt_ids], [[ids[:-1] for ids in responses]])  # the newline after <|im_end|> is the template's
    with torch.no_grad():
        logps = sum_over_responses(token_logps(model, stream), stream.lengths_B)
    found = response_probabilities(model, template, PROMPT)
    torch.testing.assert_close(torch.tensor(list(found.values()), dtype=torch.float64).log(), logps, rtol=1e-10, atol=0)


def test_the_score_is_the_mean_of_the_worlds_sums(model, template):
    prompts = [PROMPT, "May I pet a lion?"]
    tables = [response_probabilities(model, template, prompt) for prompt in prompts]
    expected = sum(world.expected_reward(p, t) for p, t in zip(prompts, tables, strict=True)) / 2
    result = score(model, template, prompts)
    assert result.expected_reward == pytest.approx(expected, rel=1e-12)
    assert result.mass_outside == pytest.approx(1 - sum(sum(t.values()) for t in tables) / 2, abs=1e-12)


def test_the_committed_model_speaks_the_worlds_language(model, template):
    """It was fitted to the base distribution: its reward is near that distribution's, and little mass is outside."""
    _, held_out = world.split()
    result = score(model, template, held_out[::12])
    assert 3.1 < result.expected_reward < 3.4 and result.mass_outside < 0.1
    prompt_ids, _ = template.encode([{"role": "user", "content": PROMPT}], [])
    (answer,) = generate(
        model, [prompt_ids], samples=1, max_new_tokens=60, stop_ids=template.stop_ids, sampling=GREEDY, seeds=[0],
        batch_size=1,
    )  # fmt: skip
    assert template.tokenizer.decode(answer.ids).strip() in world.responses(PROMPT)


def test_the_committed_files_are_small():
    size = lambda folder: sum(path.stat().st_size for path in Path(WORLD / folder).iterdir())
    assert size("model") < 5e6 and size("data") < 3e6
