"""The reference pi_ref: what the policy is compared with. One idea, four sources.

    adapters off     LoRA on a fresh adapter: the base model is in memory already
    snapshot         LoRA that continues an adapter: a frozen copy of that adapter, as it was at the start
    frozen copy      full fine-tuning, or a ref_model that is another model than the policy's base
    moving           sync_ref_model: a copy of what is trained, which follows the policy from time to time

A Reference is a function from a stream to its response tokens' log-probabilities, without gradient. It is told the
stream's rows too, for dpo.reference_cache, which looks them up.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from dpo.checkpoint import trainable
from dpo.logprobs import token_logps
from dpo.tokens import Encoded
from models.lora import adapters_disabled, lora_layers, snapshot, using_adapter
from models.stream import Stream
from models.transformer import Transformer

Reference = Callable[[Stream, Sequence[Encoded]], Tensor]
"""(stream, the rows it was packed from) -> (R,) log pi_ref of its response tokens, nats."""


class LiveReference:
    """A reference whose model is in memory."""

    def __init__(self, model: Transformer, as_it: Callable[[], AbstractContextManager[None]] = nullcontext):
        """as_it: within it `model` computes as the reference."""
        self.model, self.as_it = model, as_it

    @contextmanager
    def as_model(self) -> Iterator[Transformer]:
        """The reference as a model, without gradient; and without dropout, or it would move under the policy's feet."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.as_it():
                yield self.model
        finally:
            self.model.train(training)

    def __call__(self, stream: Stream, rows: Sequence[Encoded] = ()) -> Tensor:
        with self.as_model() as model:
            return token_logps(model, stream)


def base_reference(policy: Transformer) -> LiveReference:
    """The policy without its adapter."""
    return LiveReference(policy, partial(adapters_disabled, policy))


def snapshot_reference(policy: Transformer) -> LiveReference:
    """The policy with its adapter as it is now, whatever becomes of it later."""
    return LiveReference(policy, partial(using_adapter, policy, snapshot(policy)))


def frozen_reference(model: Transformer) -> LiveReference:
    """Another model, which nobody trains."""
    return LiveReference(model)


class MovingReference(LiveReference):
    """The policy as it is now, moved towards what it becomes: ref <- alpha policy + (1 - alpha) ref.

    TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656): alpha below 1 is the paper's soft update, 1 its hard one. What
    moves are float32 masters like the policy's own, for bfloat16 would lose small moves; they compute as the policy's.

    With LoRA the factors A and B are mixed, not their products B A, whose mix has a rank that grows with every move. At
    alpha = 1 that is the same; else it differs by alpha (1 - alpha) (B - B_ref)(A - A_ref), second order in the drift.
    """

    def __init__(self, policy: Transformer, *, alpha: float, sync_steps: int):
        """alpha: in (0, 1]. sync_steps: updates from one move to the next."""
        self.policy, self.alpha, self.sync_steps = policy, alpha, sync_steps
        self.tensors: Mapping[str, Tensor]
        """what moves, by the names of the policy's trained weights; changed in place."""
        if lora_layers(policy):
            self.tensors = snapshot(policy)
            super().__init__(policy, partial(using_adapter, policy, self.tensors))
        else:
            model = copy.deepcopy(policy).requires_grad_(False)
            self.tensors = dict(model.named_parameters())
            super().__init__(model)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move, if it is time to after update `step`, counted from 1."""
        if step % self.sync_steps == 0:
            for name, weight in trainable(self.policy).items():
                self.tensors[name].lerp_(weight, self.alpha)
