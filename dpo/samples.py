"""Answers of the policy to fixed prompts, drawn at every evaluation from the same random numbers, and what they tell.

completions/mean_length      tokens of an answer, its end included
completions/length_se        the standard error of that mean
completions/clipped_ratio    share of answers that max_new_tokens cut off
completions/rep_4            share of a text's 4-grams that it has said before, of tokens; the mean over answers
completions/distinct_2       distinct pairs of neighbouring tokens by all of them, over all answers
completions/entropy          of the next token, nats per token
completions/kl               KL(policy || reference), nats per answer as far as max_new_tokens (dpo.kl)

They are drawn at temperature 1, so that the KL is the policy's own; what differs between two evaluations is the policy,
not the draw. samples.jsonl holds the texts.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from dpo.kl import kl_and_entropy_of_texts
from dpo.reference import LiveReference
from dpo.step_log import StepLog
from dpo.tokens import Encoded
from models.command import printable
from models.generate import Completion, generate
from models.sampling import DRAWN
from models.template import ChatTemplate
from models.transformer import Transformer

SHOWN = 3
BATCH_SIZE = 8
Sampled = Mapping[str, Any]


class Samples:
    """A probe of the trainer's: the policy's answers, logged, and their numbers."""

    def __init__(
        self, rows: Sequence[Encoded], template: ChatTemplate, reference: LiveReference | None, log: StepLog, *,
        number: int, max_new_tokens: int, seed: int,
    ):  # fmt: skip
        """rows: their distinct last turns are the prompts, `number` of them, or all that there are."""
        distinct = list({prompt_of(row): row for row in rows}.values())
        number = min(number, len(distinct))
        # Spread over the file: neighbours are often variations of one another.
        self.rows = [distinct[i * len(distinct) // number] for i in range(number)]
        self.template, self.reference, self.log = template, reference, log
        self.max_new_tokens, self.seed = max_new_tokens, seed

    def __call__(self, policy: Transformer, step: int) -> dict[str, float]:
        prompts = [row.prompt_ids for row in self.rows]
        answers = generate(
            policy, prompts, samples=1, max_new_tokens=self.max_new_tokens, stop_ids=self.template.stop_ids,
            sampling=DRAWN, seeds=range(self.seed, self.seed + len(prompts)), batch_size=BATCH_SIZE,
        )  # fmt: skip
        texts = [with_end(answer, self.template.stop_ids) for answer in answers]
        kl, entropy = kl_and_entropy_of_texts(policy, self.reference, prompts, texts, BATCH_SIZE)
        self.log.append(
            {
                "step": step, "prompt": prompt_of(row),
                "response": self.template.tokenizer.decode(answer.ids).strip(),
                "tokens": len(ids), "finish_reason": answer.finish_reason, "kl": one_kl,
            }
            for row, answer, ids, one_kl in zip(self.rows, answers, texts, kl, strict=True)
        )  # fmt: skip
        lengths = [len(ids) for ids in texts]
        metrics = {
            "mean_length": mean(lengths),
            "length_se": standard_error(lengths),
            "clipped_ratio": mean([answer.finish_reason == "length" for answer in answers]),
            "rep_4": mean([repeated(ids, 4) for ids in texts]),
            "distinct_2": distinct(texts, 2),
            "entropy": sum(entropy) / sum(lengths),
            "kl": mean(kl),
        }
        return {f"eval_completions/{name}": value for name, value in metrics.items() if not math.isnan(value)}

    def print_before_and_after(self, after: int) -> None:
        """The first answers before the first update and after update `after`, as they were logged."""
        for before, now in at_two_steps(self.log.rows(), 0, after)[:SHOWN]:
            prompt, old, new = (printable(text) for text in (before["prompt"], before["response"], now["response"]))
            print(f"\nprompt: {prompt}\n  before: {old}\n  after:  {new}")
        print()


def at_two_steps(rows: Sequence[Sampled], first: int, last: int) -> list[tuple[Sampled, Sampled]]:
    """Lines of samples.jsonl: each prompt that was answered at both steps."""
    # By prompt: a resume may have asked for other ones.
    then, now = ({row["prompt"]: row for row in rows if row["step"] == step} for step in (first, last))
    return [(then[prompt], now[prompt]) for prompt in then if prompt in now]


def prompt_of(row: Encoded) -> str:
    """The last turn before the response."""
    return row.example.messages[-1]["content"]


def with_end(answer: Completion, stop_ids: Collection[int]) -> list[int]:
    """The answer with the token that ended it: what the policy has chosen."""
    # Which of several ends it was does not count: a KL is of the whole distribution before it.
    return [*answer.ids, min(stop_ids)] if answer.finish_reason == "stop" else answer.ids


def repeated(ids: Sequence[int], n: int) -> float:
    """Share of the n-grams that were there before; 0 where there are none."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams by all (Li et al. 2016, arXiv:1510.03055, distinct-n); NaN without one."""
    grams = [tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 of a single value."""
    return float(torch.tensor(values, dtype=torch.float64).var(unbiased=len(values) > 1)) ** 0.5 / len(values) ** 0.5
