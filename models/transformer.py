"""The Llama/Qwen transformer over a packed stream; parameters wear their Hugging Face names, so weights load unmapped.

    h <- E[input_ids];  per block: h <- h + Attention(RMSNorm(h));  h <- h + SwiGLU(RMSNorm(h));  hidden = RMSNorm(h)

The model returns hidden states, never logits: what the head is needed for (a few response positions, one next token)
its callers know better. Norms compute in float32 at least, as the checkpoints were trained. `dtype` is the dtype of
the computation; a weight kept in a wider one (a trained float32 master) is cast where it is used.

Shapes: T tokens, D width, H query heads, G key-value heads, E head dim, V vocabulary.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import attention
from models.config import ModelConfig
from models.rope import rotary, rotate
from models.stream import Stream


class Linear(nn.Module):
    """x W^T + b in the dtype of x. Not nn.Linear: no random initialisation of what is loaded a moment later."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467, Eq. 4)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


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

    def forward(self, x_TD: Tensor, cos_TE: Tensor, sin_TE: Tensor, stream: Stream) -> Tensor:
        q_THE, k_TGE, v_TGE = (
            rearrange(projection(x_TD), "t (h e) -> t h e", e=self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_THE, k_TGE = self.q_norm(q_THE), self.k_norm(k_TGE)
        out_THE = attention(rotate(q_THE, cos_TE, sin_TE), rotate(k_TGE, cos_TE, sin_TE), v_TGE, stream)
        return self.o_proj(rearrange(out_THE, "t h e -> t (h e)"))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202, Eq. 6)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, h_TD: Tensor, cos_TE: Tensor, sin_TE: Tensor, stream: Stream) -> Tensor:
        h_TD = h_TD + self.self_attn(self.input_layernorm(h_TD), cos_TE, sin_TE, stream)
        return h_TD + self.mlp(self.post_attention_layernorm(h_TD))


class Decoder(nn.Module):
    """What checkpoints call `model`: everything below the head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A causal language model. Built on the meta device and filled by models.weights."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, gradient_checkpointing: bool = False):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.model = Decoder(config)
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
        h_TD = self.model.embed_tokens(stream.input_ids_T).to(self.dtype)
        cos_TE, sin_TE = rotary(stream.positions_T, self.config, self.dtype)
        for block in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h_TD = checkpoint(block, h_TD, cos_TE, sin_TE, stream, use_reentrant=False)
            else:
                h_TD = block(h_TD, cos_TE, sin_TE, stream)
        return self.model.norm(h_TD)
