"""Greedy generation over the packed stream: the slow, obvious decoder.

Every step runs the whole stream again and appends each prompt's most likely next token. No cache of keys and values: a
few dozen tokens of a few prompts are what a training run shows, and this is the decoder that a cached one is tested
against.
"""

from collections.abc import Collection, Sequence

import torch

from models.stream import pack
from models.transformer import Transformer


@torch.no_grad()
def generate_greedy(
    model: Transformer, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Collection[int]
) -> list[list[int]]:
    """The most likely continuation of every prompt, token ids, without the stop token that ended it."""
    texts = [list(prompt) for prompt in prompts]
    open_ = list(range(len(texts)))
    for _ in range(max_new_tokens):
        if not open_:
            break
        stream = pack([texts[i] for i in open_], [[] for _ in open_]).to(model.device)
        ends = torch.tensor([len(texts[i]) for i in open_]).cumsum(0) - 1
        logits_NV = model(stream)[ends.to(model.device)] @ model.head_weight_VD.to(model.dtype).T
        following = logits_NV.argmax(-1).tolist()
        for i, token in zip(open_, following, strict=True):
            texts[i].append(token)
        open_ = [i for i, token in zip(open_, following, strict=True) if token not in stop_ids]
    answers = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    return [ids[:-1] if ids and ids[-1] in stop_ids else ids for ids in answers]
