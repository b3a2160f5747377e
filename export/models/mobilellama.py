"""MobileLLaMA: a small Llama, and the KV-cached decoder that is exported from it.

Shape letters: B sequences, L tokens in this call, C positions of the cache, D width, N query heads, K key/value heads,
H head width, F width of the MLP, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import mvlm.ops  # noqa: F401  (registers torch.ops.mvlm.sdpa_with_kv_cache)


@dataclass(frozen=True)
class MobileLlamaConfig:
    """Sizes of a Llama. The defaults are those of MobileLLaMA-1.4B.

    Attributes:
        hidden_size: width D of the token stream.
        intermediate_size: width F of the gated MLP.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads N; a multiple of ``num_key_value_heads``.
        num_key_value_heads: key/value heads K.
        head_dim: width H of a head; even, because rotary embedding pairs its halves.
        vocab_size: rows V of the embedding and of lm_head.
        max_position_embeddings: positions the model was trained for.
        rms_norm_eps: added to the mean square in every RMSNorm.
        rope_theta: base of the rotary frequencies.
    """

    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 128
    vocab_size: int = 32000
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"Llama: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"Llama: head_dim {self.head_dim} is odd; rotary embedding needs an even one")


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        mean_square_BL1 = (x_BLD * x_BLD).mean(dim=-1, keepdim=True)
        return x_BLD * torch.rsqrt(mean_square_BL1 + self.eps) * self.weight


def rope_tables(head_dim: int, positions: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [positions, head_dim / 2] of rotary embedding (https://arxiv.org/abs/2104.09864).

    The angle of pair i at position p is ``p * theta^(-2i / head_dim)``, in float32 as in transformers.
    """
    inverse_frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), inverse_frequency)
    return angles.cos(), angles.sin()


def apply_rope(x_BLNH: Tensor, cos_LR: Tensor, sin_LR: Tensor) -> Tensor:
    """Rotates each head; element i is paired with element i + H/2 (the layout of Hugging Face checkpoints)."""
    first, second = x_BLNH.chunk(2, dim=-1)
    cos, sin = cos_LR.unsqueeze(1), sin_LR.unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class KVCache(nn.Module):
    """Keys and values of the positions seen so far, and attention over them by ``mvlm::sdpa_with_kv_cache``.

    The buffers [1, K, C, H] are state of the exported program. Their initial contents are not stored in the .pte:
    the operator reads no position that was not written before.
    """

    def __init__(self, config: MobileLlamaConfig, max_context_len: int) -> None:
        super().__init__()
        shape = (1, config.num_key_value_heads, max_context_len, config.head_dim)
        self.register_buffer("key", torch.zeros(shape), persistent=False)
        self.register_buffer("value", torch.zeros(shape), persistent=False)

    def forward(self, q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, start_pos: Tensor) -> Tensor:
        return torch.ops.mvlm.sdpa_with_kv_cache(q_BLNH, k_BLKH, v_BLKH, self.key, self.value, start_pos)


def causal_attention(q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor) -> Tensor:
    """Attention of a whole sequence to itself, without a cache: [B, L, N, H]."""
    y_BNLH = nn.functional.scaled_dot_product_attention(
        q_BLNH.transpose(1, 2),
        k_BLKH.transpose(1, 2),
        v_BLKH.transpose(1, 2),
        is_causal=True,
        enable_gqa=True,
    )
    return y_BNLH.transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, config: MobileLlamaConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        width = config.hidden_size
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=False)

    def forward(
        self,
        x_BLD: Tensor,
        cos_LR: Tensor,
        sin_LR: Tensor,
        cache: KVCache | None = None,
        start_pos: Tensor | None = None,
    ) -> Tensor:
        B, L, _ = x_BLD.shape
        q_BLNH = self.q_proj(x_BLD).view(B, L, self.num_heads, self.head_dim)
        k_BLKH = self.k_proj(x_BLD).view(B, L, self.num_kv_heads, self.head_dim)
        v_BLKH = self.v_proj(x_BLD).view(B, L, self.num_kv_heads, self.head_dim)
        q_BLNH = apply_rope(q_BLNH, cos_LR, sin_LR)
        k_BLKH = apply_rope(k_BLKH, cos_LR, sin_LR)
        attend = causal_attention if cache is None else partial(cache, start_pos=start_pos)
        y_BLNH = attend(q_BLNH, k_BLKH, v_BLKH)
        return self.o_proj(y_BLNH.reshape(B, L, self.num_heads * self.head_dim))


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))`` (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: MobileLlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x_BLD)) * self.up_proj(x_BLD))


class DecoderLayer(nn.Module):
    """One pre-norm block: attention and MLP, each with a skip."""

    def __init__(self, config: MobileLlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BLD: Tensor,
        cos_LR: Tensor,
        sin_LR: Tensor,
        cache: KVCache | None = None,
        start_pos: Tensor | None = None,
    ) -> Tensor:
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), cos_LR, sin_LR, cache, start_pos)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


class MobileLlama(nn.Module):
    """The language model: embeddings in, logits out. Embedding lookup is separate, for pictures are embeddings too."""

    def __init__(self, config: MobileLlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, embeddings_BLD: Tensor) -> Tensor:
        """Logits [B, L, V] of whole sequences of embeddings [B, L, D] that start at position 0."""
        cos_LR, sin_LR = rope_tables(self.config.head_dim, embeddings_BLD.shape[1], self.config.rope_theta)
        x_BLD = embeddings_BLD
        for layer in self.layers:
            x_BLD = layer(x_BLD, cos_LR, sin_LR)
        return self.lm_head(self.norm(x_BLD))


class TextDecoder(nn.Module):
    """A :class:`MobileLlama` with a KV cache: the ``text_decoder`` method of the .pte. Shares the model's weights.

    Args:
        model: the language model.
        max_context_len: positions C of the cache; more than ``max_position_embeddings`` is an error.

    Raises:
        ValueError: ``max_context_len`` is not in 1 .. ``max_position_embeddings``.
    """

    def __init__(self, model: MobileLlama, max_context_len: int) -> None:
        super().__init__()
        config = model.config
        if not 1 <= max_context_len <= config.max_position_embeddings:
            raise ValueError(
                f"max_context_len {max_context_len} is not in 1 .. {config.max_position_embeddings} "
                "(max_position_embeddings of the language model)"
            )
        self.layers = model.layers
        self.norm = model.norm
        self.lm_head = model.lm_head
        self.caches = nn.ModuleList(KVCache(config, max_context_len) for _ in model.layers)
        cos_CR, sin_CR = rope_tables(config.head_dim, max_context_len, config.rope_theta)
        self.register_buffer("cos", cos_CR, persistent=False)
        self.register_buffer("sin", sin_CR, persistent=False)

    def forward(self, embeddings_1LD: Tensor, start_pos: Tensor) -> Tensor:
        """Runs L tokens at positions start_pos .. start_pos + L - 1 and remembers them in the cache.

        Args:
            embeddings_1LD: float32 [1, L, D].
            start_pos: int64 [1]; how many positions were already run, ``start_pos + L <= C``.

        Returns:
            float32 [1, 1, V]: the logits of the last position.
        """
        positions_L = start_pos + torch.arange(embeddings_1LD.shape[1])
        cos_LR, sin_LR = self.cos[positions_L], self.sin[positions_L]
        x_1LD = embeddings_1LD
        for layer, cache in zip(self.layers, self.caches, strict=True):
            x_1LD = layer(x_1LD, cos_LR, sin_LR, cache, start_pos)
        return self.lm_head(self.norm(x_1LD[:, -1:]))
