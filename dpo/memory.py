"""The memory of a training run, predicted from shapes alone before its first update.

    peak = weights + reference + optimizer + gradients  +  activations + temporaries, of the largest micro-batch

Activations are what autograd keeps of a micro-batch for its backward pass; a test holds them equal, byte for byte, to
what it does keep. Temporaries are the largest tensors that live beside them for a moment.

All of this is derived. Two parts are measured instead, and stand in experiments/memory/README.md: on the CPU a process
grows by PyTorch's own code, whatever the model, and by holes in the heap between tensors that are kept. Left out: rows
and their texts, and what a reference that is larger than the policy computes with.

Shapes: T tokens, R response tokens, C of them in a chunk of the head, D width, V vocabulary; N rows of attention with
Q queries and K keys.
"""

import ctypes
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dpo.fused import BLOCK_ELEMENTS, CHUNK_ELEMENTS, kernel_of
from dpo.optimizers import OPTIMIZERS
from dpo.tokens import Encoded
from models.attention import by_products
from models.attention_gradient import BLOCK
from models.lora import LoRALinear
from models.stream import NOTHING, batch_by_length
from models.transformer import MLP, Attention, Block, Linear, MixtureOfExperts, RMSNorm, Transformer

M_MMAP_THRESHOLD = -3  # of malloc.h
MEMINFO = Path("/proc/meminfo")
# Of what is free, what max_tokens_per_micro_batch=auto takes: the rest is for what is left out, and for others.
SHARE = 0.8
# Micro-batches of the most tokens, whose peaks are predicted: of as many tokens, fewer and longer rows keep more.
LOOKED_AT = 8
# Measured on the CPU, see experiments/memory: modules that PyTorch imports and kernels that it loads at the first
# update; and what glibc wastes, as a share of the activations: where an aligned block was freed, no equal one fits.
PYTORCH = 120_000_000
HOLES = 0.6


class Lengths(NamedTuple):
    """A row as far as memory can tell."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.responses)

    @classmethod
    def of(cls, row: Encoded) -> "Lengths":
        lengths = row.lengths
        return cls(row.tokens - sum(lengths), lengths)  # a row of the token cache reads no ids for that


def attention_shapes(rows: Sequence[Lengths]) -> list[tuple[int, int, int, bool]]:
    """(N, Q, K, masked) of each of the AttentionRows that models.stream.pack makes of these rows."""
    causal = [(NOTHING, range(row.prompt + row.responses[0])) for row in rows]
    branching = [(range(row.prompt), range(length)) for row in rows for length in row.responses[1:] if length]
    return [
        (len(group), max(len(query) for _, query in group), max(len(context) + len(query) for context, query in group),
         masked)
        for masked, kind in ((False, causal), (True, branching)) for group in batch_by_length(kind)
    ]  # fmt: skip


class Activations:
    """What autograd keeps of one micro-batch, bytes, walked in the order in which the policy computes."""

    def __init__(self, policy: Transformer, rows: Sequence[Lengths]):
        self.policy = policy
        self.tokens, self.predicted = sum(row.tokens for row in rows), sum(sum(row.responses) for row in rows)
        self.attention = attention_shapes(rows)
        self.size = policy.dtype.itemsize
        self.wide = max(self.size, 4)  # float32 at least: norms, softmaxes
        # Does what has been computed so far depend on a trained weight? What does not is not kept.
        self.flows = _trained(policy.model.embed_tokens)
        config = policy.config
        self.hidden = self.tokens * config.hidden_size * self.size
        """of one (T, D)."""
        self.rotary = 2 * self.tokens * config.head_dim * self.size
        self.before_mlp = 0
        """kept by a block before its MLP, at most."""
        self.blocks = [self._block(b, w) for b, w in zip(policy.model.layers, policy.windows, strict=True)]
        """kept by each block."""
        self.logits = self._logits()
        """kept by the head, of what its forward pass computes in."""
        statistics = 0 if self.logits or not policy.head_weight_VD.requires_grad else 2 * self.predicted * self.wide
        self.end = self._norm(policy.model.norm, self.tokens) + self.predicted * config.hidden_size * self.size
        self.end += self.logits + statistics
        """kept after the blocks: by the last norm, and a (R, D) by the head, and what a trained one adds."""

    def _logits(self) -> int:
        """A trained head keeps a chunk that is the only one."""
        weight_VD = self.policy.head_weight_VD
        alone = self.predicted <= _chunk_rows(weight_VD)
        return self.predicted * len(weight_VD) * self.size if weight_VD.requires_grad and alone else 0

    def _block(self, block: nn.Module, window: int | None) -> int:
        assert isinstance(block, Block)
        kept = self._norm(block.input_layernorm, self.tokens) + self._attention(block.self_attn, window)
        self.before_mlp = max(self.before_mlp, kept)
        kept += self._norm(block.post_attention_layernorm, self.tokens)
        if isinstance(block.mlp, MixtureOfExperts):
            return kept + self._experts(block.mlp)
        return kept + self._mlp(block.mlp, self.tokens)

    def _norm(self, norm: nn.Module, vectors: int) -> int:
        """The input, and a number per vector."""
        if not isinstance(norm, RMSNorm):
            return 0
        self.flows = self.flows or _trained(norm)
        return vectors * (len(norm.weight) * self.size + self.wide) if self.flows else 0

    def _cast(self, weight: nn.Parameter) -> int:
        """A weight in the dtype of the computation, where it is not so itself."""
        return 0 if weight.dtype == self.policy.dtype else weight.numel() * self.size

    def _linear(self, vectors: int, *layers: Linear) -> int:
        """Of layers that read one input: the input, each low-rank product, and weights that were cast."""
        kept, keeps_input = 0, False
        inputs = vectors * layers[0].weight.shape[1] * self.size
        # By models.low_rank, which casts again where it needs to.
        fused = all(isinstance(layer, LoRALinear) and not layer.dropout for layer in layers)
        for layer in layers:
            kept += self._cast(layer.weight) if self.flows else 0
            keeps_input |= layer.weight.requires_grad
            if isinstance(layer, LoRALinear):
                kept += vectors * len(layer.lora_A) * self.size
                if not fused:
                    kept += self._cast(layer.lora_B) + (self._cast(layer.lora_A) if self.flows else 0)
                if layer.dropout:  # each its own input, and what that was multiplied by
                    noise = inputs if self.policy.device.type == "cpu" else inputs // self.size
                    kept += inputs + (noise if self.flows else 0)
                else:
                    keeps_input = True
        self.flows = self.flows or any(map(_trained, layers))
        return kept + (inputs if keeps_input else 0)

    def _attention(self, attention: Attention, window: int | None) -> int:
        config = self.policy.config
        heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        kept = self._linear(self.tokens, attention.q_proj, attention.k_proj, attention.v_proj)
        kept += self._norm(attention.q_norm, self.tokens * heads) + self._norm(attention.k_norm, self.tokens * groups)
        if self.flows and self.policy.attn_implementation == "flex_attention":
            # As below, of tokens that are neither gathered nor padded, and without masks.
            kept += self.tokens * (heads * (2 * head_dim * self.size + self.wide) + groups * 2 * head_dim * self.size)
            return kept + self._linear(self.tokens, attention.o_proj)
        for n, q, k, masked in self.attention if self.flows else ():
            # Gathered queries, keys and values, the output and its log-sum-exp.
            kept += n * (q * heads * (2 * head_dim * self.size + self.wide) + k * groups * 2 * head_dim * self.size)
            windowed = window is not None and k > window
            if by_products(self.policy.device, self.policy.dtype):
                kept += n * q * k if windowed else 0  # a mask of booleans, unless it is the stream's
            else:
                kept += n * q * k * self.size if masked or windowed else 0  # a mask as numbers to add
        return kept + self._linear(self.tokens, attention.o_proj)

    def _mlp(self, mlp: MLP, vectors: int) -> int:
        kept = self._linear(vectors, mlp.gate_proj, mlp.up_proj)
        # Both sides of the product.
        kept += 2 * vectors * len(mlp.gate_proj.weight) * self.size if self.flows else 0
        return kept + self._linear(vectors, mlp.down_proj)

    def _experts(self, mixture: MixtureOfExperts) -> int:
        """A token passes per_token experts; that each expert has some is taken for granted."""
        gate, choices = mixture.gate, self.tokens * mixture.gate.per_token
        index, scores = torch.int64.itemsize, self.tokens * len(gate.weight) * self.wide
        kept = (self.hidden if _trained(gate) else 0) + (self._cast(gate.weight) if self.flows else 0)
        routed = self.flows or _trained(gate)
        if routed:
            kept += scores + choices * index + (choices + self.tokens) * self.wide * gate.normalise
        share, before = -(-choices // len(mixture.experts)), self.flows
        for expert in mixture.experts:
            assert isinstance(expert, MLP)
            self.flows = before
            kept += self._mlp(expert, share)
        self.flows = self.flows or routed
        outputs = choices * self.policy.config.hidden_size * self.size
        if self.flows:  # which token, which of its choices; what an output is multiplied by, and the product
            kept += choices * (2 * index + self.size) + outputs
        return kept + (outputs if routed else 0)

    @property
    def attention_backward(self) -> int:
        """Of models.attention_gradient, the largest rows: p and ds of a block, what is lengthened, the gradients."""
        if not by_products(self.policy.device, self.policy.dtype):
            return 0
        config = self.policy.config
        heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        most = 0
        for n, q, k, masked in self.attention:
            block, longer = min(q, BLOCK), head_dim + 2
            numbers = 2 * heads * block * (k + longer) + 2 * groups * k * longer + 2 * heads * q * head_dim
            most = max(most, n * (self.size * (numbers + masked * q * k) + self.wide * 2 * groups * k * head_dim))
        return most

    @property
    def total(self) -> int:
        """Without gradient_checkpointing."""
        return sum(self.blocks) + self.rotary + self.end

    @property
    def checkpointed(self) -> int:
        """With it: of every block its input."""
        return len(self.blocks) * self.hidden + self.rotary + self.end

    @property
    def recomputed(self) -> int:
        """One block's, beyond its input: in float32 that is what its first norm keeps."""
        return max(self.blocks) - (self.hidden if self.size == self.wide else 0)


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def bytes_of(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.dtype.itemsize for p in parameters)


def _chunk_rows(weight_VD: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // len(weight_VD))


def _head(policy: Transformer, predicted: int, backward: bool) -> int:
    """The head's temporaries: a chunk, and float32 blocks of it; see dpo.fused."""
    weight_VD = policy.head_weight_VD
    size, wide = policy.dtype.itemsize, max(policy.dtype.itemsize, 4)
    vocabulary, width = weight_VD.shape
    chunk = min(predicted, _chunk_rows(weight_VD)) * vocabulary
    block = min(chunk, max(BLOCK_ELEMENTS, vocabulary)) if weight_VD.device.type == "cpu" else chunk
    cast = 0 if weight_VD.dtype == policy.dtype else weight_VD.numel() * size
    if not (backward and weight_VD.requires_grad):
        more = block < chunk  # then the last block lives until the next one is there
        in_place = kernel_of(weight_VD.device, policy.dtype) is not None
        return cast + chunk * size + (0 if in_place else block * wide * (1 + more))
    # Both gradients; a block, the one before, and what it adds: to hidden states' gradient that is widened.
    hidden, narrow = predicted * width, size if size < wide else 0
    share = max(hidden * (size + (wide if narrow else 0)), block // max(1, predicted) * width * size)
    before = block * size * (predicted * vocabulary > block)
    return cast + bytes_of([weight_VD]) + hidden * wide + max(block * (wide + narrow) + before, block * size + share)


def _block_backward(policy: Transformer, tokens: int) -> int:
    """The gradients that live at once where the last block's backward pass begins.

    Those of the MLP's product, of silu's output and of one projection, of which one takes the product's place; and
    a weight's own, before it is added and, where the weight is a float32 master, cast.
    """
    config, size = policy.config, policy.dtype.itemsize
    inner = config.moe_intermediate_size if config.num_experts else config.intermediate_size
    weights = [p for p in policy.model.layers.parameters() if p.requires_grad]
    largest = max(weights, key=torch.numel, default=None)
    own = (
        0 if largest is None else bytes_of([largest]) + (0 if largest.dtype == policy.dtype else largest.numel() * size)
    )
    return 2 * tokens * inner * size + own


@dataclass(frozen=True)
class Forecast:
    """The predicted peak: named parts, in bytes, that add up to it; and the tokens of the micro-batch that has it."""

    parts: dict[str, int]
    tokens: int

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {amount(value)}" for name, value in self.parts.items() if value)
        return f"{amount(self.peak)} at the largest micro-batch ({self.tokens:,} tokens): {parts}"


def amount(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


def forecast(
    policy: Transformer, rows: Sequence[Lengths], *, optim: str, reference: int, alone: bool,
    evaluated: Sequence[Lengths], answers: Sequence[Lengths],
) -> Forecast:  # fmt: skip
    """The peak of a run whose largest micro-batch is `rows`.

    reference: bytes of a reference with weights of its own. alone: whether every logical batch is one micro-batch, so
    that gradients come as activations go. evaluated: the largest evaluation batch, or nothing. answers: the prompts of
    the largest batch of answers, each with as many tokens as it may have, or nothing.
    """
    trained = bytes_of(p for p in policy.parameters() if p.requires_grad)
    kept = Activations(policy, rows)
    head = max(_head(policy, kept.predicted, False) - kept.logits, _head(policy, kept.predicted, True))
    matrix = policy.head_weight_VD
    # A tied embedding's gradient of the head waits for the one of the input.
    waits = bytes_of([matrix]) if matrix.requires_grad and policy.config.tie_word_embeddings else 0
    block = _block_backward(policy, kept.tokens) + waits
    # Two moments: the head, and the last block's backward pass, for which checkpointing computes the block again.
    # By then the head has let go of its logits.
    activations, temporaries = max((kept.total, head), (kept.total - kept.logits, block), key=sum)
    if policy.gradient_checkpointing:
        inputs = kept.checkpointed - kept.logits
        blocks, attentions = inputs + kept.recomputed, inputs + kept.before_mlp
        activations, temporaries = max(
            (kept.checkpointed, head), (blocks, block), (attentions, kept.attention_backward + waits), key=sum
        )
    gradients = max(0, trained - activations - temporaries) if alone else trained
    evaluation = 0
    if evaluated:
        # Without gradient one block lives at a time, and holds at its end what it would keep.
        passing = Activations(policy, evaluated)
        evaluation = passing.hidden + max(passing.blocks) + _head(policy, passing.predicted, False)
    decoding = 0
    if answers:
        passing = Activations(policy, answers)
        decoding = passing.hidden + max(passing.blocks) + _cache(policy, kept=sum(row.tokens for row in answers))
        # The copy of the weights that models.packed decodes with.
        decoding += bytes_packed(policy) if policy.device.type == "cpu" else 0
    state = len({*OPTIMIZERS[optim].keeps} - {"step"})
    parts = {
        "weights": bytes_of(policy.parameters()), "reference": reference, "optimizer": state * trained,
        "gradients": gradients, "activations": activations, "temporaries": temporaries,
        "evaluation": max(0, max(evaluation, decoding) - gradients - activations - temporaries),
    }  # fmt: skip
    if policy.device.type != "cuda":
        holes = 0 if policy.gradient_checkpointing else round(HOLES * activations)  # see give_back_at_once
        parts |= {"holes in the heap": holes, "PyTorch itself": PYTORCH}
    return Forecast(parts, kept.tokens)


def _cache(policy: Transformer, *, kept: int) -> int:
    """Keys and values of `kept` tokens in every layer."""
    config = policy.config
    width = 2 * config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * width * kept * policy.dtype.itemsize


def bytes_packed(policy: Transformer) -> int:
    weights = [layer.weight for layer in policy.modules() if isinstance(layer, Linear) and layer.weight.ndim == 2]
    return policy.dtype.itemsize * sum(
        w.numel() for w in {id(w): w for w in [*weights, policy.head_weight_VD]}.values()
    )


def forecast_of_all(predict: Callable[..., Forecast], batches: Sequence[Sequence[Sequence[Lengths]]]) -> Forecast:
    """The highest peak of logical batches, each cut into micro-batches."""
    largest = nlargest(LOOKED_AT, chain(*batches), key=lambda rows: sum(row.tokens for row in rows))
    alone = all(len(parts) == 1 for parts in batches)
    return max((predict(rows=rows, alone=alone) for rows in largest), key=lambda forecast: forecast.peak)


def largest_budget(peak: Callable[[int], int], low: int, high: int, limit: float) -> int:
    """The largest number of tokens, by bisection, whose peak is within the limit; `low` where none is."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if peak(middle) <= limit else (low, middle - 1)
    return low


def give_back_at_once() -> None:
    """From now on a freed tensor of over 128 KiB leaves the process, and leaves no hole in glibc's heap.

    glibc starts so, but raises the size with every larger tensor that is freed. It is a matter of page faults: a
    quarter more CPU time. gradient_checkpointing would save little without it, and pays time for memory anyway.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 << 10)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on the device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not MEMINFO.exists():
        return None
    lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
