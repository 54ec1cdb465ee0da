"""The Llama/Qwen transformer over a packed stream; parameters wear their Hugging Face names, so weights load unmapped.

    h <- E[input_ids];  per block: h <- h + Attention(RMSNorm(h));  h <- h + SwiGLU(RMSNorm(h));  hidden = RMSNorm(h)

A block's SwiGLU may be a mixture of experts. The model returns hidden states, never logits: what the head is needed for
(a few response positions, one next token) its callers know better. Norms compute in float32 at least, as checkpoints
were trained. `dtype` is the dtype of the computation; a weight kept in a wider one (a trained float32 master) is cast
where it is used.

Shapes: T tokens, D width, F inner width, H query heads, G key-value heads, E head dim, V vocabulary, X experts, K of
a token.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import attention
from models.config import ModelConfig
from models.flex import flex_attends
from models.rms_norm import rms_norm
from models.rope import rotary, rotate
from models.stream import Stream
from models.swiglu import swiglu

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_THE, k_TGE, v_TGE) -> (T, H, E): what the tokens of one layer make of each other."""


class Linear(nn.Module):
    """x W^T + b in the dtype of x. Not nn.Linear: no random initialisation of what is loaded a moment later."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.packed: Callable[[Tensor], list[Tensor]] | None = None
        """computes this layer, and those that read the same input, from a faster layout: see models.packed."""

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self)[0]

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """y = x W^T + b as it leaves the layer; an adapter adds to it."""
        return y

    def together(self, x: Tensor, layers: "Sequence[Linear]") -> list[Tensor] | None:
        """What `project` gives of layers of which this is the first, where there is a faster way; else None."""
        return None


def project(x: Tensor, *layers: Linear) -> list[Tensor]:
    """The outputs of layers that read the same input."""
    if layers[0].packed is not None and not torch.is_grad_enabled():
        ys = layers[0].packed(x)
    elif (fused := layers[0].together(x, layers)) is not None:
        return fused
    else:
        ys = [F.linear(x, w.weight.to(x.dtype), None if w.bias is None else w.bias.to(x.dtype)) for w in layers]
    return [layer.adapt(x, y) for layer, y in zip(layers, ys, strict=True)]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; see models.rms_norm."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, input_ids_T: Tensor) -> Tensor:
        return F.embedding(input_ids_T, self.weight)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries, config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, keys, config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, keys, config.qkv_bias)
        self.o_proj = Linear(queries, config.hidden_size, config.o_bias)
        # Qwen3 normalises every head's query and key; the other families have no such weights.
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def before(self, x_TD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned, and values."""
        q_THE, k_TGE, v_TGE = (
            rearrange(y, "t (h e) -> t h e", e=self.head_dim)
            for y in project(x_TD, self.q_proj, self.k_proj, self.v_proj)
        )
        q_THE, k_TGE = self.q_norm(q_THE), self.k_norm(k_TGE)
        return rotate(q_THE, cos_TE, sin_TE), rotate(k_TGE, cos_TE, sin_TE), v_TGE

    def after(self, out_THE: Tensor) -> Tensor:
        return self.o_proj(rearrange(out_THE, "t h e -> t (h e)"))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)); see models.swiglu."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = project(x_TD, self.gate_proj, self.up_proj)
        return self.down_proj(swiglu(gate_TF, up_TF))


class Router(nn.Module):
    """The K experts that each token goes to and their weights: the largest of softmax(x W^T), in float32 at least."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.per_token, self.normalise = config.num_experts_per_tok, config.norm_topk_prob

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        logits_TX = F.linear(x_TD, self.weight.to(x_TD.dtype))
        wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        p_TK, expert_TK = logits_TX.softmax(-1, dtype=wide).topk(self.per_token)
        if self.normalise:
            p_TK = p_TK / p_TK.sum(-1, keepdim=True)
        return p_TK.to(x_TD.dtype), expert_TK


class MixtureOfExperts(nn.Module):
    """sum over a token's K experts of p_e SwiGLU_e(x) (Qwen3, arXiv:2505.09388, Sec. 2); no token is dropped."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        size = config.moe_intermediate_size
        self.experts = nn.ModuleList(MLP(config.hidden_size, size, False) for _ in range(config.num_experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        p_TK, expert_TK = self.gate(x_TD)
        out_TD = torch.zeros_like(x_TD)
        for expert in expert_TK.unique().tolist():
            token, choice = (expert_TK == expert).nonzero(as_tuple=True)
            out_TD = out_TD.index_add(0, token, self.experts[expert](x_TD[token]) * p_TK[token, choice, None])
        return out_TD


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = (
            MixtureOfExperts(config)
            if config.has_experts(layer)
            else MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, h_TD: Tensor, cos_TE: Tensor, sin_TE: Tensor, attend: Attend) -> Tensor:
        # In two parts, because what lies between them is not compiled; see models.compiled.
        q_THE, k_TGE, v_TGE = self.before_attention(h_TD, cos_TE, sin_TE)
        return self.after_attention(h_TD, attend(q_THE, k_TGE, v_TGE))

    def before_attention(self, h_TD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.before(self.input_layernorm(h_TD), cos_TE, sin_TE)

    def after_attention(self, h_TD: Tensor, out_THE: Tensor) -> Tensor:
        h_TD = h_TD + self.self_attn.after(out_THE)
        return h_TD + self.mlp(self.post_attention_layernorm(h_TD))


class Decoder(nn.Module):
    """What checkpoints call `model`: everything below the head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A causal language model. Built on the meta device and filled by models.weights."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, gradient_checkpointing: bool = False):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = "sdpa"
        self.packed_head: Callable[[Tensor], list[Tensor]] | None = None
        self.model = Decoder(config)
        self.windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight_VD(self) -> Tensor:
        """The output embedding: lm_head's weight, or the input embedding's where the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def forward(self, stream: Stream) -> Tensor:
        """(T, D) final hidden states; logits are hidden_TD @ head_weight_VD.T."""
        if self.attn_implementation == "flex_attention":
            attends = flex_attends(stream, self.windows)
        else:
            attends = [partial(attention, stream=stream, window=window) for window in self.windows]
        return self.run(stream.input_ids_T, stream.positions_T, attends)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """(N, V) next-token logits of a few final hidden states."""
        if self.packed_head is not None and not torch.is_grad_enabled():
            return self.packed_head(hidden_ND)[0]
        return F.linear(hidden_ND, self.head_weight_VD.to(hidden_ND.dtype))

    def run(self, input_ids_T: Tensor, positions_T: Tensor, attends: Sequence[Attend]) -> Tensor:
        """(T, D) final hidden states of tokens that see each other, and maybe a cache, through each layer's attend."""
        h_TD = self.model.embed_tokens(input_ids_T).to(self.dtype)
        cos_TE, sin_TE = rotary(positions_T, self.config, self.dtype)
        for block, attend in zip(self.model.layers, attends, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h_TD = checkpoint(block, h_TD, cos_TE, sin_TE, attend, use_reentrant=False)
            else:
                h_TD = block(h_TD, cos_TE, sin_TE, attend)
        return self.model.norm(h_TD)
