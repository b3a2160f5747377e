"""MobileLLaMA: a small Llama, and the KV-cached decoder that is exported from it.

Shape letters: B sequences, L tokens in this call, C positions of the cache, D width, N query heads, K key/value heads,
H head width, F width of the MLP, V vocabulary, M last positions of a call whose logits are made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import mvlm.ops
from mvlm.export.llama_operators import load_llama_operators
from mvlm.export.models.fused_linear import FusedLinear
from mvlm.export.models.norms import RMSNorm


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


#: Types of a KV cache, by the names that recipes give them.
KV_CACHE_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}


class KVCache(nn.Module):
    """Keys and values of the positions seen so far, and attention over them by our operators.

    The buffers [1, K, C, H] are state of the exported program; with int8 there is a scale per head and position, too.
    Their initial contents are not stored in the .pte: the operators read no position that was not written before.

    Args:
        config: sizes.
        max_context_len: positions C.
        kv_type: a key of :data:`KV_CACHE_TYPES`.
    """

    def __init__(self, config: MobileLlamaConfig, max_context_len: int, kv_type: str = "fp32") -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.is_int8 = kv_type == "int8"
        shape = (1, config.num_key_value_heads, max_context_len, config.head_dim)
        dtype = KV_CACHE_TYPES[kv_type]
        self.register_buffer("key", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("value", torch.zeros(shape, dtype=dtype), persistent=False)
        if self.is_int8:
            self.register_buffer("key_scales", torch.zeros(shape[:-1]), persistent=False)
            self.register_buffer("value_scales", torch.zeros(shape[:-1]), persistent=False)

    def forward(self, qkv_1LP: Tensor, cos_CR: Tensor, sin_CR: Tensor, start_pos: Tensor) -> Tensor:
        """Attention [1, L, N * H] of L tokens whose queries, keys and values are [1, L, (N + 2 K) * H]."""
        if self.is_int8:
            return mvlm.ops.sdpa_with_int8_kv_cache(
                qkv_1LP,
                self.key,
                self.key_scales,
                self.value,
                self.value_scales,
                cos_CR,
                sin_CR,
                start_pos,
                self.num_heads,
            )
        return mvlm.ops.sdpa_with_kv_cache(qkv_1LP, self.key, self.value, cos_CR, sin_CR, start_pos, self.num_heads)


class LlamaKVCache(nn.Module):
    """The same by the operators that ExecuTorch's own programs have: ``llama::update_cache``, ``llama::custom_sdpa``.

    The buffers [1, C, K, H] are laid out as those operators want them, in float32.

    Args:
        config: sizes.
        max_context_len: positions C.

    Raises:
        ExportError: the operators are not at hand; see :func:`load_llama_operators`.
    """

    def __init__(self, config: MobileLlamaConfig, max_context_len: int) -> None:
        super().__init__()
        load_llama_operators()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        shape = (1, max_context_len, config.num_key_value_heads, config.head_dim)
        self.register_buffer("key", torch.zeros(shape), persistent=False)
        self.register_buffer("value", torch.zeros(shape), persistent=False)

    def forward(self, qkv_1LP: Tensor, cos_CR: Tensor, sin_CR: Tensor, start_pos: Tensor) -> Tensor:
        """As :meth:`KVCache.forward`."""
        N, K = self.num_heads, self.num_kv_heads
        positions_L = torch.arange(qkv_1LP.shape[1]) + start_pos
        qk_1LNH, v_1LKH = qkv_1LP.unflatten(-1, (N + 2 * K, -1)).split([N + K, K], dim=2)
        qk_1LNH = apply_rope(qk_1LNH, cos_CR.index_select(0, positions_L), sin_CR.index_select(0, positions_L))
        q_1LNH, k_1LKH = qk_1LNH.split([N, K], dim=2)
        start = start_pos.item()
        torch.ops.llama.update_cache(k_1LKH, self.key, start)
        torch.ops.llama.update_cache(v_1LKH, self.value, start)
        # No mask and no dropout; causal.
        return torch.ops.llama.custom_sdpa(q_1LNH, self.key, self.value, start, None, 0.0, True).flatten(2)


def build_kv_cache(config: MobileLlamaConfig, max_context_len: int, kv_type: str, attention_op: str) -> nn.Module:
    """A cache of the type and with the operators that a recipe names."""
    if attention_op == "llama":
        return LlamaKVCache(config, max_context_len)
    return KVCache(config, max_context_len, kv_type)


class Attention(nn.Module):
    def __init__(self, config: MobileLlamaConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        width = config.hidden_size
        self.qkv_proj = FusedLinear(width, {"q_proj": queries, "k_proj": keys, "v_proj": keys}, bias=False)
        self.o_proj = nn.Linear(queries, width, bias=False)

    def split_heads(self, qkv_BLP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, L, N, H], keys and values [B, L, K, H] out of the projection [B, L, (N + 2 K) * H]."""
        qkv_BLNH = qkv_BLP.unflatten(-1, (-1, self.head_dim))
        return qkv_BLNH.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)

    def forward(
        self,
        x_BLD: Tensor,
        cos_CR: Tensor,
        sin_CR: Tensor,
        cache: KVCache | None = None,
        start_pos: Tensor | None = None,
    ) -> Tensor:
        qkv_BLP = self.qkv_proj(x_BLD)
        if cache is not None:
            return self.o_proj(cache(qkv_BLP, cos_CR, sin_CR, start_pos))
        return self.o_proj(causal_attention(*self.split_heads(qkv_BLP), cos_CR, sin_CR))


def causal_attention(q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, cos_CR: Tensor, sin_CR: Tensor) -> Tensor:
    """Attention of whole sequences to themselves, without a cache: [B, L, N * H]."""
    L = q_BLNH.shape[1]
    y_BNLH = nn.functional.scaled_dot_product_attention(
        apply_rope(q_BLNH, cos_CR[:L], sin_CR[:L]).transpose(1, 2),
        apply_rope(k_BLKH, cos_CR[:L], sin_CR[:L]).transpose(1, 2),
        v_BLKH.transpose(1, 2),
        is_causal=True,
        enable_gqa=True,
    )
    return y_BNLH.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))`` (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: MobileLlamaConfig) -> None:
        super().__init__()
        width = config.intermediate_size
        self.gate_up_proj = FusedLinear(config.hidden_size, {"gate_proj": width, "up_proj": width}, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down_proj(mvlm.ops.swiglu(self.gate_up_proj(x_BLD)))


class DecoderLayer(nn.Module):
    """One pre-norm block: attention and MLP, each with a skip.

    What the block before it adds to the token stream is given apart from the stream, and so is what this one adds, so
    that every addition is made together with the norm that follows it, in one pass over memory.
    """

    def __init__(self, config: MobileLlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BLD: Tensor,
        branch_BLD: Tensor,
        cos_CR: Tensor,
        sin_CR: Tensor,
        cache: KVCache | None = None,
        start_pos: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Token stream and what is still to be added to it, both [B, L, D], to the same after this block."""
        x_BLD, y_BLD = self.input_layernorm.add(x_BLD, branch_BLD)
        y_BLD = self.self_attn(y_BLD, cos_CR, sin_CR, cache, start_pos)
        x_BLD, y_BLD = self.post_attention_layernorm.add(x_BLD, y_BLD)
        return x_BLD, self.mlp(y_BLD)


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
        x_BLD, branch_BLD = embeddings_BLD, torch.zeros_like(embeddings_BLD)
        for layer in self.layers:
            x_BLD, branch_BLD = layer(x_BLD, branch_BLD, cos_LR, sin_LR)
        return self.lm_head(self.norm.add(x_BLD, branch_BLD)[1])


#: The last positions of a call whose logits a decoder gives, unless it is told otherwise. A step of decoding makes one
#: row all the same; a long text whose every position is scored is read in steps of so many tokens.
LOGIT_POSITIONS = 8


def last_positions(length: int, count: int) -> Tensor:
    """Indices int64 [min(length, count)] of the last positions of a sequence, for ``index_select``.

    A slice would not do: ``torch.export`` takes ``x[:, -8:]`` of a dynamic length only if it is always less than 8 or
    never. An index asks nothing of the length.
    """
    rows = torch.sym_min(length, count)
    return torch.arange(length - rows, length)


class TextDecoder(nn.Module):
    """A :class:`MobileLlama` with a KV cache: the ``text_decoder`` method of the .pte. Shares the model's weights.

    Args:
        model: the language model.
        max_context_len: positions C of the cache; more than ``max_position_embeddings`` is an error.
        kv_type: of the cache, a key of :data:`KV_CACHE_TYPES`.
        attention_op: whose operators read and write it: ``mvlm`` or ``llama``.
        logit_positions: logits are given of so many positions of a call at the most; 1 or more.

    Raises:
        ValueError: ``max_context_len`` is not in 1 .. ``max_position_embeddings``, or ``logit_positions`` is below 1.
    """

    def __init__(
        self,
        model: MobileLlama,
        max_context_len: int,
        kv_type: str = "fp32",
        attention_op: str = "mvlm",
        logit_positions: int = LOGIT_POSITIONS,
    ) -> None:
        super().__init__()
        config = model.config
        if not 1 <= max_context_len <= config.max_position_embeddings:
            raise ValueError(
                f"max_context_len {max_context_len} is not in 1 .. {config.max_position_embeddings} "
                "(max_position_embeddings of the language model)"
            )
        if logit_positions < 1:
            raise ValueError(f"logit_positions {logit_positions} is below 1")
        self.logit_positions = logit_positions
        self.layers = model.layers
        self.norm = model.norm
        self.lm_head = model.lm_head
        self.caches = nn.ModuleList(
            build_kv_cache(config, max_context_len, kv_type, attention_op) for _ in model.layers
        )
        cos_CR, sin_CR = rope_tables(config.head_dim, max_context_len, config.rope_theta)
        self.register_buffer("cos", cos_CR, persistent=False)
        self.register_buffer("sin", sin_CR, persistent=False)

    def forward(self, embeddings_1LD: Tensor, start_pos: Tensor) -> Tensor:
        """Runs L tokens at positions start_pos .. start_pos + L - 1 and remembers them in the cache.

        Args:
            embeddings_1LD: float32 [1, L, D].
            start_pos: int64 [1]; how many positions were already run, ``start_pos + L <= C``.

        Returns:
            float32 [1, M, V], M = min(L, logit_positions): the logits of the last M positions, in their order.
        """
        x_1LD, branch_1LD = embeddings_1LD, torch.zeros_like(embeddings_1LD)
        for layer, cache in zip(self.layers, self.caches, strict=True):
            x_1LD, branch_1LD = layer(x_1LD, branch_1LD, self.cos, self.sin, cache, start_pos)
        last_M = last_positions(x_1LD.shape[1], self.logit_positions)
        _, y_1MD = self.norm.add(x_1LD.index_select(1, last_M), branch_1LD.index_select(1, last_M))
        # Of two dimensions: of three, linear would make a view, and torch.export ask whether M is always 1 or never.
        return self.lm_head(y_1MD[0])[None]
