"""The reference pi_ref: what the policy is compared with. One idea, three sources.

    adapters off     LoRA on a fresh adapter: the base model is in memory already
    snapshot         LoRA that continues an adapter: a frozen copy of that adapter, as it was at the start
    frozen copy      full fine-tuning, or a ref_model that is another model than the policy's base

A Reference is a function from a stream to its response tokens' log-probabilities, without gradient. It is told the
stream's rows too, for dpo.reference_cache, which looks them up.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpo.data import Encoded
from dpo.logprobs import token_logps
from models.lora import adapters_disabled, snapshot, using_adapter
from models.stream import Stream
from models.transformer import Transformer

Reference = Callable[[Stream, Sequence[Encoded]], Tensor]
"""(stream, the rows it was packed from) -> (R,) log pi_ref of its response tokens, nats."""


def base_reference(policy: Transformer) -> Reference:
    """The policy without its adapter."""

    def compute(stream: Stream) -> Tensor:
        with adapters_disabled(policy):
            return token_logps(policy, stream)

    return _evaluating(policy, compute)


def snapshot_reference(policy: Transformer) -> Reference:
    """The policy with its adapter as it is now, whatever becomes of it later."""
    frozen = snapshot(policy)

    def compute(stream: Stream) -> Tensor:
        with using_adapter(policy, frozen):
            return token_logps(policy, stream)

    return _evaluating(policy, compute)


def frozen_reference(model: Transformer) -> Reference:
    """Another model, which nobody trains."""
    return _evaluating(model, lambda stream: token_logps(model, stream))


def _evaluating(model: Transformer, compute: Callable[[Stream], Tensor]) -> Reference:
    """Without gradient and without dropout: a reference that drops units would move under the policy's feet."""

    def reference(stream: Stream, rows: Sequence[Encoded] = ()) -> Tensor:
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return compute(stream)
        finally:
            model.train(training)

    return reference
