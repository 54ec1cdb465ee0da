"""Log-probabilities of responses under a model: log pi(y_t | x, y_<t) for every response token, and their sums.

`gather_logps` and `gather_log_sum_sq` are the definitions, `dpo.fused` computes the same without the (R, V) logits; the
tests hold them equal.
Two names, never one for both: `logps` are sums over a response's tokens, `avg_logps` means, both in nats.

Shapes: R response tokens, D width, V vocabulary, B branches (responses).
"""

import torch
from torch import Tensor

from dpo.fused import fused_logps, fused_logps_and_log_sum_sq
from models.stream import Stream
from models.transformer import Transformer


def gather_logps(hidden_RD: Tensor, head_weight_VD: Tensor, target_R: Tensor) -> Tensor:
    """(R,) log softmax(hidden W^T)[target], nats; float32, or float64 for float64 inputs."""
    return next_token_logps(hidden_RD, head_weight_VD).gather(-1, target_R[:, None])[:, 0]


def gather_log_sum_sq(hidden_RD: Tensor, head_weight_VD: Tensor) -> Tensor:
    """(R,) log sum_v softmax(hidden W^T)[v]^2: of the probability that two draws agree. Between -log V and 0."""
    return (2 * next_token_logps(hidden_RD, head_weight_VD)).logsumexp(-1)


def next_token_logps(hidden_RD: Tensor, head_weight_VD: Tensor) -> Tensor:
    """(R, V) log softmax(hidden W^T), nats; float32, or float64 for float64 inputs."""
    logits_RV = hidden_RD @ head_weight_VD.to(hidden_RD.dtype).T
    logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    return logits_RV.log_softmax(-1)


def token_logps(model: Transformer, stream: Stream) -> Tensor:
    """(R,) log pi of every response token of the stream, in its order; gradients flow to the model's trainables."""
    return fused_logps(predictors(model, stream), model.head_weight_VD, stream.target_R)


def token_logps_and_log_sum_sq(model: Transformer, stream: Stream) -> tuple[Tensor, Tensor]:
    """token_logps, and (R,) log sum_v pi(v)^2 at the same positions, without gradient."""
    return fused_logps_and_log_sum_sq(predictors(model, stream), model.head_weight_VD, stream.target_R)


def predictors(model: Transformer, stream: Stream) -> Tensor:
    """(R, D) the hidden states that predict the stream's response tokens."""
    hidden_TD = model(stream)
    # The head runs on these and on no other.
    return hidden_TD.index_select(0, stream.predictor_R)


def sum_over_responses(token_logps_R: Tensor, lengths_B: Tensor) -> Tensor:
    """(B,) logps: the sum of each response's token log-probabilities; 0 for an empty response."""
    branch_R = torch.repeat_interleave(lengths_B, output_size=len(token_logps_R))
    return token_logps_R.new_zeros(len(lengths_B)).index_add(0, branch_R, token_logps_R)
