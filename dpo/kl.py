"""KL(policy || reference) of texts that the policy has written, exact at every position.

    KL(pi || ref) = E_{y ~ pi} sum_t KL(pi(.|x, y_<t) || ref(.|x, y_<t))

The expectation is estimated by the policy's own samples; the inner KL is a sum over the whole vocabulary, so that this
one varies less than the usual estimators, which look at the token drawn alone (Rao-Blackwell). The log-ratio of texts
that others wrote, such as the chosen responses of a dataset, is no KL.

Shapes: R response tokens, C of them in a chunk, D width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from dpo.fused import CHUNK_ELEMENTS
from dpo.logprobs import next_token_logps, predictors, sum_over_responses
from dpo.reference import LiveReference
from models.stream import Stream, pack
from models.transformer import Transformer


@torch.no_grad()
def kl_and_entropy(policy: Transformer, reference: LiveReference | None, stream: Stream) -> tuple[Tensor, Tensor]:
    """(R,) KL(pi || ref) and (R,) entropy of pi at every position that predicts a response token, nats, at least 0.

    Without a reference the KL is NaN. Dropout is off meanwhile.
    """
    training = policy.training
    policy.eval()
    policy_RD = predictors(policy, stream)
    policy.train(training)
    reference_RD, reference_head_VD = policy_RD, policy.head_weight_VD
    if reference is not None:
        with reference.as_model() as model:
            reference_RD, reference_head_VD = predictors(model, stream), model.head_weight_VD
    # Heads of one vocabulary may be padded to different sizes: Qwen2.5's are.
    shared = slice(min(len(policy.head_weight_VD), len(reference_head_VD)))
    chunk = max(1, CHUNK_ELEMENTS // len(policy.head_weight_VD))
    kl, entropy = [], []
    for start in range(0, len(policy_RD), chunk):
        part = slice(start, start + chunk)
        logps_CV = next_token_logps(policy_RD[part], policy.head_weight_VD)
        p_CV = logps_CV.exp()
        reference_logps_CV = next_token_logps(reference_RD[part], reference_head_VD)
        kl.append((p_CV[:, shared] * (logps_CV[:, shared] - reference_logps_CV[:, shared])).sum(-1))
        entropy.append(-(p_CV * logps_CV).sum(-1))
    kl_R = torch.cat(kl)
    return kl_R if reference is not None else torch.full_like(kl_R, torch.nan), torch.cat(entropy)


def kl_and_entropy_of_texts(
    policy: Transformer, reference: LiveReference | None, prompts: Sequence[list[int]], texts: Sequence[list[int]],
    batch_size: int,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Sums over the tokens of each text, nats."""
    sums: list[list[float]] = [[], []]
    for i in tqdm(range(0, len(prompts), batch_size), desc="kl", unit="batch", disable=None, delay=5, leave=False):
        part = slice(i, i + batch_size)
        stream = pack(prompts[part], [[ids] for ids in texts[part]]).to(policy.device)
        for column, value_R in zip(sums, kl_and_entropy(policy, reference, stream), strict=True):
            column += sum_over_responses(value_R, stream.lengths_B).tolist()
    return sums[0], sums[1]
