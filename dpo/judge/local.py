"""A local model as a judge: which of the letters A and B it would write next, in both orders, without a network.

    p(A) = P(A) / (P(A) + P(B))      P(A): of the next token "A" or " A" after the whole prompt

The two orders of a pair are two branches of one trunk, which is what their prompts have in common, and several pairs
share a pass over the packed stream.

Shapes: B branches (orders), D width, V vocabulary, L letter tokens.
"""

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from dpo.judge.prompt import PROMPT_SHA256, judge_messages
from dpo.judge.store import Store, key_of
from dpo.judge.verdict import Judged, OnDone, Order, Pair, Verdict, decide, ignore, of_letter
from dpo.logprobs import predictors
from models.stream import pack
from models.template import ChatTemplate
from models.tokenizer import Tokenizer
from models.transformer import Transformer

VARIANTS = ("{}", " {}")
Ids = tuple[int, ...]


class LocalJudge:
    prompt_sha256 = PROMPT_SHA256

    def __init__(
        self, model: Transformer, template: ChatTemplate, *, name: str, digest: str, batch_size: int, seed: int,
        store: Store,
    ):  # fmt: skip
        """digest: of the model's files. batch_size: pairs per pass."""
        self.name = f"model:{name}"
        self.model, self.template, self.digest = model, template, digest
        self.batch_size, self.seed, self.store = batch_size, seed, store
        self.letters_2L = letter_ids(template.tokenizer).to(model.device)

    def __call__(self, pairs: Sequence[Pair], on_done: OnDone = ignore) -> list[Judged]:
        # The two orders by the responses, not by their places: then a pair is asked about as its mirror image is.
        prompts = [tuple(self._prompt(pair, first_is_a) for first_is_a in _orders(pair)) for pair in pairs]
        results: dict[int, Judged] = {}
        # By length, so that a pass wastes little on padding; the longest first, for what does not fit into memory.
        by_length = sorted(range(len(pairs)), key=lambda i: -sum(map(len, prompts[i])))
        for start in range(0, len(pairs), self.batch_size):
            places = by_length[start : start + self.batch_size]
            answers = self._answers([prompts[i] for i in places])
            for i in places:
                one, other = (
                    self._order(ids, answers.get(ids), first_is_a)
                    for ids, first_is_a in zip(prompts[i], _orders(pairs[i]), strict=True)
                )
                results[i] = decide((one, other) if _orders(pairs[i])[0] else (other, one))
                on_done(pairs[i], results[i])
        return [results[i] for i in range(len(pairs))]

    def _prompt(self, pair: Pair, first_is_a: bool) -> Ids:
        ids, _ = self.template.encode(judge_messages(pair, first_is_a=first_is_a, seed=self.seed), [])
        return tuple(ids)

    def _answers(self, prompts: Sequence[tuple[Ids, ...]]) -> dict[Ids, tuple[float, bool]]:
        """(p(A), whether it was kept) by prompt; without those of pairs that are too long for the model."""
        answers = {}
        for ids in chain.from_iterable(prompts):
            if kept := self.store.get(self._key(ids)):
                answers[ids] = (kept["p_a"], True)
        limit = self.model.config.max_position_embeddings
        # Equal responses make one prompt.
        fresh = [list(dict.fromkeys(both)) for both in prompts if max(map(len, both)) <= limit]
        fresh = [both for both in fresh if any(ids not in answers for ids in both)]
        if fresh:
            p_a = p_of_a(self.model, fresh, self.letters_2L).tolist()
            for ids, p in zip(chain.from_iterable(fresh), p_a, strict=True):
                answers[ids] = (p, False)
                if math.isfinite(p):
                    self.store.put(self._key(ids), {"outcome": "ok", "p_a": p})
        return answers

    def _order(self, ids: Ids, answer: tuple[float, bool] | None, first_is_a: bool) -> Order:
        p_a, kept = answer or (math.nan, False)
        if math.isnan(p_a):
            limit = self.model.config.max_position_embeddings
            long = f"the prompt has {len(ids)} tokens, or its mirror image has more, and {self.name} {limit} positions"
            reason = "the logits of A and B are not finite" if answer else long
            return Order(Verdict.INVALID, None, "", len(ids), False, 0, "malformed", reason)
        if p_a == 0.5:
            return Order(Verdict.TIE, 0.5, "", len(ids), kept, 1)
        letter = "A" if p_a > 0.5 else "B"
        return Order(of_letter(letter, first_is_a), p_a if first_is_a else 1 - p_a, letter, len(ids), kept, 1)

    def _key(self, ids: Ids) -> str:
        return key_of(kind="model", digest=self.digest, dtype=str(self.model.dtype), prompt=ids)


def _orders(pair: Pair) -> tuple[bool, bool]:
    """Whether the first response is A, in the order that is asked first and in the other."""
    straight = pair.first <= pair.second
    return straight, not straight


@torch.inference_mode()
def p_of_a(model: Transformer, prompts: Sequence[Sequence[Ids]], letters_2L: Tensor) -> Tensor:
    """(B,) P(A) / (P(A) + P(B)) of the next token after each prompt; prompts[i]: of one pair, all different."""
    trunks, branches = [], []
    for both in prompts:
        shared = _common_prefix(both)
        trunks.append(list(both[0][:shared]))
        # One more token, which is never read: the last that is predicted is the letter.
        branches.append([[*ids[shared:], int(letters_2L[0, 0])] for ids in both])
    stream = pack(trunks, branches).to(model.device)
    hidden_BD = predictors(model, stream)[stream.lengths_B.cumsum(0) - 1]
    weight_LD = model.head_weight_VD[letters_2L.flatten()]
    logits_BL = hidden_BD.float() @ weight_LD.float().T
    mass_B2 = logits_BL.unflatten(1, letters_2L.shape).logsumexp(-1)
    return mass_B2.double().softmax(-1)[:, 0]


def _common_prefix(both: Sequence[Ids]) -> int:
    """How many tokens all of them begin with."""
    shortest = min(map(len, both))
    return next((i for i in range(shortest) if len({ids[i] for ids in both}) > 1), shortest)


def letter_ids(tokenizer: Tokenizer) -> Tensor:
    """(2, L) the tokens that are the letter A, and those that are B, as far as both have one."""
    pairs = [tokenizer.encode([variant.format(letter) for letter in "AB"]) for variant in VARIANTS]
    single = [(a[0], b[0]) for a, b in pairs if len(a) == len(b) == 1]
    if not single:
        raise ValueError("judge=model: the tokenizer has no single tokens for A and B, so none can come next; "
                         "choose another judge_model")  # fmt: skip
    return torch.tensor(single).T
