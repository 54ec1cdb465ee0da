"""Multiple choice by log-likelihood: log pi(option | context) of every option of many questions.

    score_j = sum_t log pi(y_jt | x, y_j,<t)      nats; x: the context's tokens, y_j: those of option j

A context is a trunk of the packed stream and its options are the branches, so the context is read once however many
options it has. Base-model form: plain text, no chat template; what the tokenizer puts before a text (its BOS, where it
has one to put) stands there once.

Where an option begins is lm-eval's rule: context and option are encoded together, the context's last spaces belong to
the option, and its tokens are those after the context's own. A tokenizer may join the two, as Llama 2's does `(` and
`A`. Then the options of that question begin where their texts first differ from the context in tokens, all of them at
the same place, so that they stay comparable. (lm-eval scores the context's own ids and then what is left of the joint
ones: another text.) With no token before an option, BOS is its context, or EOS where there is no BOS.

Shapes: R option tokens, C of them in a chunk, D width, V vocabulary, B options.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo.fused import CHUNK_ELEMENTS
from dpo.logprobs import next_token_logps, predictors, sum_over_responses
from dpo.plan import cut_by_tokens
from models.stream import Stream, pack
from models.tokenizer import Tokenizer
from models.transformer import Transformer

Question = tuple[str, Sequence[str]]
"""(context, options)"""


@dataclass(frozen=True)
class Choices:
    """One question in tokens."""

    context_ids: list[int]
    option_ids: list[list[int]]
    dropped: int = 0
    """tokens that the context's start lost to cutoff_len."""

    @property
    def tokens(self) -> int:
        return len(self.context_ids) + sum(map(len, self.option_ids))


def encode_choices(tokenizer: Tokenizer, questions: Sequence[Question], cutoff_len: int) -> list[Choices]:
    """Each (context, options) in tokens, at most cutoff_len of them in a context and its longest option."""
    start = first_ids(tokenizer)
    texts = [text for context, options in questions for text in (context.rstrip(), *(context + o for o in options))]
    encoded = (start + ids for ids in tokenizer.encode(texts))
    return [
        _cut(*_part(next(encoded), [next(encoded) for _ in options], tokenizer), len(start), cutoff_len)
        for _, options in questions
    ]


def first_ids(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text: its BOS, or nothing."""
    (text,) = tokenizer.encode(["a"])
    whole = tokenizer.rust.encode("a", add_special_tokens=True).ids
    return whole[: whole.index(text[0])]


def lone_id(tokenizer: Tokenizer) -> int:
    """What stands before a text that has nothing before it: BOS, or EOS where there is none."""
    for token in (tokenizer.bos_token, tokenizer.eos_token):
        if token in tokenizer.special_ids:
            return tokenizer.special_ids[token]
    raise ValueError("an empty context: the tokenizer names neither a bos_token nor an eos_token to stand there")


def _part(
    context_ids: list[int], whole_ids: list[list[int]], tokenizer: Tokenizer
) -> tuple[list[int], list[list[int]]]:
    """(context, options): parted after the context's own tokens, or before the first that an option has changed."""
    shared = 0
    for tokens in zip(context_ids, *whole_ids, strict=False):
        if len(set(tokens)) > 1:
            break
        shared += 1
    return context_ids[:shared] or [lone_id(tokenizer)], [ids[shared:] for ids in whole_ids]


def _cut(context_ids: list[int], option_ids: list[list[int]], start: int, cutoff_len: int) -> Choices:
    """The question without what is too much of the context's start; its first `start` tokens stay."""
    longest = max(map(len, option_ids))
    dropped = max(0, len(context_ids) + longest - cutoff_len)
    kept = context_ids[:start] + context_ids[start + dropped :]
    if dropped and len(context_ids) <= start + dropped:
        raise ValueError(
            f"cutoff_len={cutoff_len}: an option of {longest} tokens leaves no room for its context; raise cutoff_len"
        )
    return Choices(kept, option_ids, dropped)


def option_logps(
    policy: Transformer, contexts: Sequence[list[int]], options: Sequence[list[list[int]]], max_tokens: int
) -> list[Tensor]:
    """(options,) summed log-probabilities of each context's options, nats, float64 on the CPU.

    max_tokens: of one packed stream. Which questions share a stream changes a sum by rounding alone.
    """
    questions = [Choices(context, list(branches)) for context, branches in zip(contexts, options, strict=True)]
    results: dict[int, Tensor] = {}
    for batch in batches(questions, max_tokens):
        results |= zip(batch, (logps for logps, _ in score(policy, [questions[i] for i in batch])), strict=True)
    return [results[i] for i in range(len(questions))]


def batches(questions: Sequence[Choices], max_tokens: int) -> list[list[int]]:
    """Indices of the questions that share a stream of at most max_tokens; a longer one has a stream of its own."""
    # Longest first, so that what does not fit into memory is known at once; similar lengths share attention's padding.
    order = sorted(range(len(questions)), key=lambda i: questions[i].tokens, reverse=True)
    indices = iter(order)
    parts = cut_by_tokens([questions[i] for i in order], max_tokens)
    return [[next(indices) for _ in part] for part in parts if part]


@torch.no_grad()
def score(policy: Transformer, questions: Sequence[Choices]) -> list[tuple[Tensor, Tensor]]:
    """Of each question (options,) summed log-probabilities, and (options,) whether greedy decoding would say it."""
    policy.eval()
    stream = pack([q.context_ids for q in questions], [q.option_ids for q in questions]).to(policy.device)
    sizes = [len(q.option_ids) for q in questions]
    logps_B, greedy_B = sums_and_greedy(policy, stream)
    return list(zip(logps_B.cpu().split(sizes), greedy_B.cpu().split(sizes), strict=True))


def sums_and_greedy(policy: Transformer, stream: Stream) -> tuple[Tensor, Tensor]:
    """(B,) log-probabilities of the stream's branches, float64, and (B,) whether each token is the likeliest there."""
    hidden_RD = predictors(policy, stream)
    chunk = max(1, CHUNK_ELEMENTS // len(policy.head_weight_VD))
    logps, misses = [hidden_RD.new_empty(0, dtype=torch.float64)], [hidden_RD.new_empty(0, dtype=torch.float64)]
    for hidden_CD, target_C in zip(hidden_RD.split(chunk), stream.target_R.split(chunk), strict=True):
        logps_CV = next_token_logps(hidden_CD, policy.head_weight_VD)
        logps.append(logps_CV.gather(-1, target_C[:, None])[:, 0].double())
        misses.append((logps_CV.argmax(-1) != target_C).double())
    missed_B = sum_over_responses(torch.cat(misses), stream.lengths_B)
    return sum_over_responses(torch.cat(logps), stream.lengths_B), missed_B == 0
