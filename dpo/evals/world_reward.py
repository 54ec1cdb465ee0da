"""The built-in world's expected gold reward, exact by enumeration.

    E[r] = sum_y pi(y|x) r(y|x) + (1 - sum_y pi(y|x)) r_outside        y over the prompt's whole grammar

Every response of a prompt's grammar is a branch of one trunk, so one packed pass gives all of their probabilities. What
the policy puts on other texts (and on other tokenizations of these) is the mass outside; it earns the lowest reward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dpo.logprobs import sum_over_responses, token_logps
from experiments.world import world
from models.stream import pack
from models.template import ChatTemplate
from models.transformer import Transformer


@dataclass(frozen=True)
class WorldScore:
    expected_reward: float
    """mean over prompts of E[r]."""
    mass_outside: float
    """mean over prompts of the probability outside the grammar."""


@torch.no_grad()
def response_probabilities(policy: Transformer, template: ChatTemplate, prompt: str) -> dict[str, float]:
    """pi(y|x) of every response of the grammar, up to and including its end-of-turn token."""
    texts = world.responses(prompt)
    prompt_ids, responses = template.encode([{"role": "user", "content": prompt}], texts)
    # Generation stops at the end of the turn: what the template writes after it is not the policy's choice.
    stops = template.stop_ids
    ends = [next(i for i, token in enumerate(ids) if token in stops) + 1 for ids in responses]
    stream = pack([prompt_ids], [[ids[:end] for ids, end in zip(responses, ends, strict=True)]]).to(policy.device)
    logps = sum_over_responses(token_logps(policy, stream), stream.lengths_B)
    return dict(zip(texts, logps.double().exp().tolist(), strict=True))


def probe(template: ChatTemplate, prompts: Sequence[str]) -> Callable[[Transformer, int], dict[str, float]]:
    """The score as a probe of the trainer's."""

    def measure(policy: Transformer, step: int) -> dict[str, float]:
        now = score(policy, template, prompts)
        return {"eval_gold_reward": now.expected_reward, "eval_mass_outside": now.mass_outside}

    return measure


def score(policy: Transformer, template: ChatTemplate, prompts: Sequence[str]) -> WorldScore:
    policy.eval()
    rewards = outside = 0.0
    for prompt in prompts:
        probabilities = response_probabilities(policy, template, prompt)
        rewards += world.expected_reward(prompt, probabilities)
        outside += 1 - sum(probabilities.values())
    return WorldScore(rewards / len(prompts), outside / len(prompts))
