"""The built-in world's expected gold reward, exact by enumeration.

    E[r] = sum_y pi(y|x) r(y|x) + (1 - sum_y pi(y|x)) r_outside        y over the prompt's whole grammar

The 135 responses of a prompt's grammar are one tree of tokens: those that begin alike share their beginning. One pass
over 1,200 tokens, a third of those in branches of their own, gives all of their probabilities. What the policy puts on
other texts (and on other tokenizations of these) is the mass outside; it earns the lowest reward.

Shapes: T tokens of the tree with its prompt, R without.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from operator import eq

import torch

from dpo.logprobs import token_logps
from experiments.world import world
from models.stream import NOTHING, Row, Stream, attention_rows
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
    stream, places = _tree_of(_Encoder(template), prompt)
    logps_R = token_logps(policy, stream.to(policy.device)).double().cpu()
    return {text: float(logps_R[place].sum().exp()) for text, place in zip(texts, places, strict=True)}


class _Encoder:
    """A template as a key: equal to another that encodes alike, such as that of a sweep's next job."""

    def __init__(self, template: ChatTemplate):
        self.template = template
        files = [(str(file.resolve()), file.stat().st_mtime_ns) for file in template.tokenizer.files]
        self.key = (template.name, template.source, *files)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Encoder) and self.key == other.key


@lru_cache(maxsize=1024)
def _tree_of(encoder: _Encoder, prompt: str) -> tuple[Stream, list[list[int]]]:
    """The tree of a prompt's grammar. Half a second for 42 prompts, at every evaluation of every job of a sweep."""
    prompt_ids, responses = encoder.template.encode([{"role": "user", "content": prompt}], world.responses(prompt))
    # Generation stops at the end of the turn: what the template writes after it is not the policy's choice.
    stops = encoder.template.stop_ids
    ends = [next(i for i, token in enumerate(ids) if token in stops) + 1 for ids in responses]
    return tree(prompt_ids, [ids[:end] for ids, end in zip(responses, ends, strict=True)])


def tree(prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> tuple[Stream, list[list[int]]]:
    """(the stream of the tree, in which a token sees the path to itself; each response's places among the R)."""
    ids, positions, predictor = list(prompt), list(range(len(prompt))), list[int]()
    rows, places = list[Row](), [list[int]() for _ in responses]
    path: list[int] = list(range(len(prompt)))
    before: Sequence[int] = ()
    for i, response in sorted(enumerate(responses), key=lambda item: list(item[1])):  # neighbours share the most
        shared = len(list(takewhile(bool, map(eq, before, response))))
        path, before = path[: len(prompt) + shared], response
        branch = range(len(ids), len(ids) + len(response) - shared)
        rows.append((path, branch) if rows else (NOTHING, range(branch.stop)))
        ids += response[shared:]
        predictor += [path[-1], *branch[:-1]]
        path = [*path, *branch]
        positions += range(len(prompt) + shared, len(path))
        places[i] = [place - len(prompt) for place in path[len(prompt) :]]
    batches, slot_T = attention_rows(rows, len(ids))
    target = torch.tensor(ids[len(prompt) :])
    stream = Stream(
        torch.tensor(ids), torch.tensor(positions), torch.tensor(predictor), target, torch.tensor([len(target)]),
        batches, slot_T,
    )  # fmt: skip
    return stream, places


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
