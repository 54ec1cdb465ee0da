"""Generation over the packed stream: the slow, obvious decoder.

Every step runs the whole stream again and appends one token to each prompt: the most likely one, or a draw from
softmax(logits / temperature). No cache of keys and values: a few dozen tokens of a few short prompts are what a
training run shows, and this is the decoder that a cached one is tested against.

Shapes: N open prompts, V vocabulary.
"""

from collections.abc import Collection, Sequence

import torch

from models.stream import pack
from models.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float,
    seeds: Sequence[int],
) -> list[list[int]]:
    """A continuation of every prompt, token ids, without the stop token that ended it.

    temperature: 0 takes the most likely token. seeds: one per prompt; each draws from a generator of its own, so its
    continuation does not depend on the other prompts.
    """
    texts = [list(prompt) for prompt in prompts]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    unfinished = list(range(len(texts)))
    for _ in range(max_new_tokens):
        if not unfinished:
            break
        stream = pack([texts[i] for i in unfinished], [[] for _ in unfinished]).to(model.device)
        ends = torch.tensor([len(texts[i]) for i in unfinished]).cumsum(0) - 1
        logits_NV = model(stream)[ends.to(model.device)] @ model.head_weight_VD.to(model.dtype).T
        if temperature == 0:
            following = logits_NV.argmax(-1).tolist()
        else:
            p_NV = (logits_NV.float() / temperature).softmax(-1).cpu()
            draws = [torch.multinomial(p, 1, generator=generators[i]) for p, i in zip(p_NV, unfinished, strict=True)]
            following = torch.cat(draws).tolist()
        for i, token in zip(unfinished, following, strict=True):
            texts[i].append(token)
        unfinished = [i for i, token in zip(unfinished, following, strict=True) if token not in stop_ids]
    answers = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    return [ids[:-1] if ids and ids[-1] in stop_ids else ids for ids in answers]
