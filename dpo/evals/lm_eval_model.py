"""A policy as a model of lm-evaluation-harness: its hundreds of tasks by the packed stream and the cache of this code.

lm_eval asks three things of a model: log pi(continuation | context) and whether greedy decoding would say it, the
log-probability of a whole text, and a text that continues a context. Requests that share a context are branches of one
trunk. Results are those of lm_eval's own Hugging Face model, but for one: where the tokenizer puts a BOS before a text,
that model reads a whole text after two of them, and counts the second as predicted; here there is one.

lm_eval gives a chat as one string, in which the template's special tokens and the text of a question look alike. As in
its own model a special's string is read as that token; in messages that went through apply_chat_template it stays text.
"""

import json
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from dpo.evals.choices import Choices, batches, first_ids, lone_id, score
from dpo.evals.perplexity import text_logps
from models.generate import StopStrings, generate
from models.sampling import Sampling
from models.template import ChatTemplate, Message
from models.tokenizer import Tokenizer
from models.transformer import Transformer

# How to sample, under the names that tasks give to transformers.
SAMPLING = ("top_k", "top_p", "min_p")


class PolicyLM(TemplateLM):
    def __init__(
        self, policy: Transformer, tokenizer: Tokenizer, template: ChatTemplate | None, *, name: str,
        max_length: int, max_tokens: int, batch_size: int, seed: int,
    ):  # fmt: skip
        """template: of chats; None where there are none. max_length: tokens that the policy reads at once.

        max_tokens: of one packed stream; batch_size: contexts that are continued at once.
        """
        super().__init__()
        self.policy, self.tokens, self.template, self.name = policy, tokenizer, template, name
        self.max_length, self.max_tokens, self.batch_size, self.seed = max_length, max_tokens, batch_size, seed
        self._device = policy.device

    @property
    def eot_token_id(self) -> int:
        return self.tokens.special_ids[str(self.tokens.eos_token)]

    @property
    def prefix_token_id(self) -> int:
        return lone_id(self.tokens)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids; with the tokenizer's BOS unless the text brings one, or add_special_tokens is False."""
        (ids,) = self.tokens.encode_rendered([string])
        first = first_ids(self.tokens) if add_special_tokens is not False else []
        return ids if ids[: len(first)] == first else first + ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        trunks: dict[tuple[int, ...], list[int]] = {}
        for i, ((_, text), context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens ({text!r:.40}): must have at least one and at most "
                    f"max_length={self.max_length}"
                )
            # The last token is predicted and not read, so there is room for one more.
            trunks.setdefault(tuple(context[-(self.max_length + 1 - len(continuation)) :]), []).append(i)
        questions = [Choices(list(trunk), [requests[i][2] for i in of_trunk]) for trunk, of_trunk in trunks.items()]
        places = list(trunks.values())
        results: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm or None, leave=False) as bar:
            for batch in batches(questions, self.max_tokens):
                for q, (logps, greedy) in zip(batch, score(self.policy, [questions[q] for q in batch]), strict=True):
                    for i, logp, is_greedy in zip(places[q], logps.tolist(), greedy.tolist(), strict=True):
                        results[i] = logp, is_greedy
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
                    bar.update(len(places[q]))
        return [results[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        ids = [self.tok_encode(text, add_special_tokens=False) for text in texts]
        first, length = self.prefix_token_id, self.max_length
        # The text of a chat begins with the BOS that is put before others.
        ids = [tokens[1:] if tokens[:1] == [first] else tokens for tokens in ids]
        logps = text_logps(self.policy, ids, first, length, length, self.max_tokens)
        for text, logp in zip(texts, logps, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), logp)
        return logps

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm or None, leave=False) as bar:
            for same in alike.values():
                # By length: those of a batch then share their padding.
                same.sort(key=lambda i: len(requests[i].args[0]))
                for start in range(0, len(same), self.batch_size):
                    batch = same[start : start + self.batch_size]
                    texts |= zip(batch, self._continue(requests, batch), strict=True)
                    for i in batch:
                        self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                    bar.update(len(batch))
        return [texts[i] for i in range(len(requests))]

    def _continue(self, requests: list[Instance], batch: Sequence[int]) -> list[str]:
        """Texts that continue some contexts, all asked for in the same way."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(requests[batch[0]].args[1], default_max_gen_toks=256))
        until, most = [stop for stop in kwargs.pop("until") if stop], kwargs.pop("max_gen_toks")
        draws, temperature = kwargs.pop("do_sample"), kwargs.pop("temperature", 1.0)
        off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        sampling = Sampling(temperature if draws else 0.0, **{name: kwargs.pop(name, off[name]) for name in SAMPLING})
        if kwargs:
            raise ValueError(f"generation_kwargs of a task: {', '.join(kwargs)} are not done here; leave them out")
        room = self.max_length - most
        if room < 1:
            raise ValueError(
                f"max_gen_toks={most} of a task: leaves no room for a context in max_length={self.max_length}"
            )
        stops = StopStrings(until, self.tokens)
        completions = generate(
            self.policy, [self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id] for i in batch],
            samples=1, max_new_tokens=most, sampling=sampling, seeds=[self.seed + i for i in batch],
            stop_ids=self.template.stop_ids if self.template else self.tokens.stop_ids,
            batch_size=self.batch_size, watch=stops,
        )  # fmt: skip
        return [stops.cut(self.tokens.decode(completion.ids)) for completion in completions]

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """The rendered chat; without a generation prompt the last message is one that the policy is to go on with."""
        assert self.template is not None
        if add_generation_prompt:
            return self.template.parts(chat_history, [])[0]
        *before, last = chat_history
        return self.template.parts(before, [])[0] + self.tokens.escape(last["content"])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.template.source if self.template and chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Names lm_eval's cache of requests."""
        return self.name.replace("/", "__") + ("__" + self.template.name if self.template else "")
