"""task=world: the built-in world's gold reward of a policy, before and after, and its KL, all by enumeration.

    kl = sum_y pi(y|x) log(pi(y|x) / ref(y|x)) + pi(outside) log(pi(outside) / ref(outside))    nats, mean over prompts

y runs over the prompt's grammar; all texts outside it are one lump, so this is at most the KL over all texts.
"""

import math
from collections.abc import Mapping

from omegaconf import DictConfig

from dpo.build import build_finished_policy, build_live_reference, build_template, has_reference
from dpo.evals import provenance
from dpo.evals.prompts import prompts_of
from dpo.evals.results import Result
from dpo.evals.statistics import bootstrap
from dpo.evals.world_reward import response_probabilities
from dpo.samples import mean
from experiments.world import world
from models.weights import choose_device

LEAST = 1e-9  # what is left of 1 by a sum of float32 probabilities tells no less


def run(cfg: DictConfig) -> Result:
    template = build_template(cfg)
    prompts = prompts_of(cfg)
    asked = [prompt.messages[-1]["content"] for prompt in prompts]
    for prompt, text in zip(prompts, asked, strict=True):
        if len(prompt.messages) > 1 or text not in world.FACT_OF:
            raise ValueError(f"eval_dataset={cfg.eval_dataset}: {text!r:.60} is no question of the world; use world's")
    policy = build_finished_policy(cfg, choose_device(cfg.device)).eval()
    after = [response_probabilities(policy, template, text) for text in asked]
    columns = {"expected_reward": _rewards(asked, after), "mass_outside": list(map(outside, after))}
    facts = provenance.of_policy(cfg)
    if has_reference(cfg):
        reference, description = build_live_reference(cfg, policy)
        print(f"before: {description}")
        with reference.as_model() as model:
            before = [response_probabilities(model, template, text) for text in asked]
        columns |= {
            "expected_reward_before": _rewards(asked, before),
            "mass_outside_before": list(map(outside, before)),
            "kl": [lumped_kl(new, old) for new, old in zip(after, before, strict=True)],
        }
        columns["gain"] = [
            a - b for a, b in zip(columns["expected_reward"], columns["expected_reward_before"], strict=True)
        ]
        facts |= provenance.of_reference(cfg)
    settings = {"resamples": cfg.resamples, "seed": cfg.seed}
    return Result(
        "world",
        {name: mean(values) for name, values in columns.items()},
        {name: bootstrap(values, method="bca", **settings) for name, values in columns.items()},
        {"prompts": len(prompts)},
        provenance.of_data(cfg, prompts) | facts | {"seed": cfg.seed},
        samples=[
            {"id": prompt.id, "prompt": prompt.text, **{name: values[i] for name, values in columns.items()}}
            for i, prompt in enumerate(prompts)
        ],
    )


def _rewards(asked: list[str], probabilities: list[dict[str, float]]) -> list[float]:
    return [world.expected_reward(text, p) for text, p in zip(asked, probabilities, strict=True)]


def outside(probabilities: Mapping[str, float]) -> float:
    return 1 - sum(probabilities.values())


def lumped_kl(policy: Mapping[str, float], reference: Mapping[str, float]) -> float:
    pairs = [(p, reference[text]) for text, p in policy.items()] + [
        (max(outside(policy), LEAST), max(outside(reference), LEAST))
    ]
    return sum(p * math.log(p / q) for p, q in pairs if p > 0)
