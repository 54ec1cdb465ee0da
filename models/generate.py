"""Generation: prompts in, sampled continuations out, in batches over a key-value cache.

One pass over the prompts as a packed stream, then a pass per step with one token of every sample. Each sample draws
from a seed of its own, so what it becomes does not depend on its batch (to rounding). Left out: beam search,
repetition penalties, speculative decoding.

Shapes: T tokens, P prompts, N = P n samples, D width, V vocabulary, M new tokens.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from models.cache import Cache
from models.packed import packed
from models.sampling import Sampling, choose
from models.stream import pack
from models.tokenizer import Tokenizer
from models.transformer import Transformer

Watch = Callable[[int, list[int]], bool]
"""(sample, its tokens so far) -> whether it ends here: called after every token, stop tokens excepted."""


@dataclass
class Completion:
    ids: list[int]
    """without the stop token that ended it."""
    finish_reason: str
    """stop (a stop token, or watch said so) or length."""


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling,
    seeds: Sequence[int],
    batch_size: int,
    watch: Watch | None = None,
) -> list[Completion]:
    """`samples` continuations of every prompt, prompt after prompt, each with its seed of `seeds`.

    batch_size: prompts computed at once; those of similar length go together. Dropout is off meanwhile.
    """
    check_counts(samples=(samples, 1), max_new_tokens=(max_new_tokens, 0), batch_size=(batch_size, 1))
    if len(seeds) != len(prompts) * samples:
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts of {samples} samples: expected one for each")
    check_ids(model, prompts)
    results = [Completion([], "length") for _ in seeds]
    by_length = sorted(range(len(prompts)), key=lambda p: len(prompts[p]))

    def ends(sample: int, token: int) -> bool:
        """Take a token into its sample's result; whether the sample ends with it."""
        result = results[sample]
        if token not in stop_ids:
            result.ids.append(token)
            if watch is None or not watch(sample, result.ids):
                return False
        result.finish_reason = "stop"
        return True

    with _decoding(model):
        for first in range(0, len(prompts), batch_size):
            batch = by_length[first : first + batch_size]
            # Of each prompt in the batch, its samples' places in results.
            rows = [range(p * samples, (p + 1) * samples) for p in batch]
            row_seeds = [[seeds[sample] for sample in row] for row in rows]
            decoding = Decoding(model, [prompts[p] for p in batch], row_seeds, sampling, max_new_tokens)
            unfinished = {sample for row in rows for sample in row}
            for _ in range(max_new_tokens):
                tokens = iter(decoding.next_tokens())
                chosen = [(sample, next(tokens)) for row in rows for sample in row]
                unfinished -= {sample for sample, token in chosen if sample in unfinished and ends(sample, token)}
                # Prompts whose samples have all ended leave the batch; by halves, because it copies the cache.
                alive = [r for r, row in enumerate(rows) if not unfinished.isdisjoint(row)]
                if not alive:
                    break
                if len(alive) <= len(rows) / 2:
                    decoding.keep(alive)
                    rows = [rows[r] for r in alive]
    return results


def stream_tokens(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling,
    seed: int,
) -> Iterator[int]:
    """The tokens of one continuation as they are chosen."""
    check_counts(max_new_tokens=(max_new_tokens, 0))
    check_ids(model, [prompt])
    with _decoding(model):
        decoding = Decoding(model, [prompt], [[seed]], sampling, max_new_tokens)
        for _ in range(max_new_tokens):
            (token,) = decoding.next_tokens()
            if token in stop_ids:
                return
            yield token


@contextmanager
def _decoding(model: Transformer) -> Iterator[None]:
    """Weights packed and dropout off: with it, a sample would come from another model at each of its tokens."""
    training = model.training
    model.eval()
    try:
        with packed(model):
            yield
    finally:
        model.train(training)


def check_counts(**counts: tuple[int, int]) -> None:
    """Each name's value and the least that it may be."""
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")


def check_ids(model: Transformer, prompts: Sequence[Sequence[int]]) -> None:
    """Raises ValueError for a token id that the model has no embedding for."""
    size = model.config.vocab_size
    outside = [token for prompt in prompts for token in prompt if not 0 <= token < size]
    if outside:
        raise ValueError(
            f"token id {outside[0]} in a prompt: the model has 0 to {size - 1}; is the tokenizer another model's?"
        )


class StopStrings:
    """A Watch that ends a sample as soon as its text holds one of some strings."""

    def __init__(self, strings: Sequence[str], tokenizer: Tokenizer):
        if not all(strings):
            raise ValueError("stop string '': must not be empty, every text holds it")
        self.strings, self.tokenizer = strings, tokenizer

    def __call__(self, sample: int, ids: list[int]) -> bool:
        # All is decoded anew, as in Tokenizer.decode_stream: what a token means can hang on any before it.
        text = self.tokenizer.decode(ids)
        return any(string in text for string in self.strings)

    def cut(self, text: str) -> str:
        """`text` up to its first stop string."""
        return text[: min((text.find(string) for string in self.strings if string in text), default=len(text))]


class Decoding:
    """One batch of P prompts with n samples each, a token further at every call of next_tokens."""

    @torch.inference_mode()
    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int,
    ):
        """seeds: n of them for each prompt."""
        self.model, self.sampling, self.samples = model, sampling, len(seeds[0])
        stream = pack(prompts, [[] for _ in prompts]).to(model.device)
        lengths_P = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        self.cache = Cache(model, lengths_P, self.samples, max_new_tokens)
        hidden_TD = model.run(stream.input_ids_T, stream.positions_T, self.cache.prefill(stream))
        self.hidden_ND = hidden_TD[lengths_P.cumsum(0) - 1].repeat_interleave(self.samples, dim=0)
        # A generator for each sample, so that its draws do not depend on its neighbours'.
        generators = [torch.Generator().manual_seed(seed) for row in seeds for seed in row]
        draws = [torch.rand(max_new_tokens, generator=generator) for generator in generators]
        self.uniform_NM = torch.stack(draws).to(model.device)
        self.tokens_N = torch.empty(0, dtype=torch.long)
        self.step = 0

    @torch.inference_mode()
    def next_tokens(self) -> list[int]:
        """One more token id of every sample, prompt after prompt."""
        if self.step > 0:
            positions_N, attends = self.cache.step()
            self.hidden_ND = self.model.run(self.tokens_N, positions_N, attends)
        logits_NV = self.model.logits(self.hidden_ND)
        self.tokens_N = choose(logits_NV, self.sampling, self.uniform_NM[:, self.step])
        self.step += 1
        return self.tokens_N.tolist()

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these of the P prompts alone; not before the first call of next_tokens."""
        kept_P = torch.tensor(rows, device=self.model.device)
        kept_N = (kept_P[:, None] * self.samples + torch.arange(self.samples, device=self.model.device)).flatten()
        self.cache.keep(kept_P)
        self.uniform_NM, self.tokens_N = self.uniform_NM[kept_N], self.tokens_N[kept_N]
