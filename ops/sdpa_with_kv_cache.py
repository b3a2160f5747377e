"""``mvlm::sdpa_with_kv_cache``: causal attention that writes and reads a key/value cache.

The operator takes the queries, keys and values of ``n`` new tokens, stores the keys and values in
the caches at positions ``start_pos .. start_pos + n - 1``, and lets query ``i`` attend to positions
``0 .. start_pos + i``:

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j        (Vaswani et al., 2017, equation 1)

With fewer key/value heads than query heads (grouped-query attention, Ainslie et al., 2023), query
head ``h`` uses key/value head ``h // (heads // kv_heads)``.

Here are the schema, the eager reference and the shape function. The kernel that a .pte runs is in
``sdpa_with_kv_cache.cpp`` and ``cached_attention.cpp``.
"""

from __future__ import annotations

import math

import torch

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor start_pos, *, float? scale=None"
)

# Kept for the life of the process: the operators go away with it.
_library = torch.library.Library("mvlm", "FRAGMENT")
_library.define(f"sdpa_with_kv_cache({_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
# What ExecuTorch's memory planning turns the operator above into.
_library.define(f"sdpa_with_kv_cache.out({_ARGUMENTS}, Tensor(c!) out) -> Tensor(c!)")


def sdpa_with_kv_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    start_pos: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Writes ``key`` and ``value`` into the caches and attends causally over them.

    Args:
        query: float32 [1, n, heads, head_dim], n >= 1.
        key: float32 [1, n, kv_heads, head_dim]; kv_heads divides heads.
        value: as ``key``.
        key_cache: float32 [1, kv_heads, capacity, head_dim]; changed in place. What it holds past
            the written positions is never used.
        value_cache: as ``key_cache``, and not the same memory.
        start_pos: int64 [1], position of the first new token; 0 <= start_pos <= capacity - n.
        scale: what query-key products are multiplied by, positive; 1 / sqrt(head_dim) by default.

    Returns:
        float32 [1, n, heads, head_dim], contiguous.

    Raises:
        ValueError: an argument is not as described; the caches are then unchanged. (In a .pte the
            kernel fails with Error::InvalidArgument and logs the same.)
    """
    return torch.ops.mvlm.sdpa_with_kv_cache(query, key, value, key_cache, value_cache, start_pos, scale=scale)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"mvlm::sdpa_with_kv_cache: {message}")


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    start_pos: torch.Tensor,
    scale: float | None,
) -> None:
    """Checks everything but the value of ``start_pos``, which does not exist while exporting."""
    tensors = {
        "query": (query, "[1, tokens, heads, head_dim]"),
        "key": (key, "[1, tokens, kv_heads, head_dim]"),
        "value": (value, "[1, tokens, kv_heads, head_dim]"),
        "key_cache": (key_cache, "[1, kv_heads, capacity, head_dim]"),
        "value_cache": (value_cache, "[1, kv_heads, capacity, head_dim]"),
    }
    for name, (tensor, layout) in tensors.items():
        _require(tensor.dtype == torch.float32, f"{name} is {tensor.dtype}; it must be torch.float32")
        _require(
            tensor.dim() == 4 and tensor.shape[0] == 1,
            f"{name} has shape {list(tensor.shape)}; it must be {layout}",
        )
    _, tokens, heads, head_dim = query.shape
    kv_heads, capacity = key.shape[2], key_cache.shape[2]
    _require(
        tokens >= 1 and heads >= 1 and head_dim >= 1,
        f"query has shape {list(query.shape)}; it needs at least one token, head and component",
    )
    _require(
        key.shape[1] == tokens and key.shape[3] == head_dim,
        f"key has shape {list(key.shape)}; with query {list(query.shape)} it must be "
        f"[1, {tokens}, kv_heads, {head_dim}]",
    )
    _require(
        value.shape == key.shape,
        f"value has shape {list(value.shape)}; it must be that of key, {list(key.shape)}",
    )
    _require(
        kv_heads >= 1 and heads % kv_heads == 0,
        f"{heads} query heads cannot share {kv_heads} key/value heads; heads must be a multiple of kv_heads",
    )
    _require(
        key_cache.shape[1] == kv_heads and key_cache.shape[3] == head_dim,
        f"key_cache has shape {list(key_cache.shape)}; with key {list(key.shape)} it must be "
        f"[1, {kv_heads}, capacity, {head_dim}]",
    )
    _require(
        value_cache.shape == key_cache.shape,
        f"value_cache has shape {list(value_cache.shape)}; it must be that of key_cache, {list(key_cache.shape)}",
    )
    _require(tokens <= capacity, f"{tokens} tokens do not fit a cache of {capacity} positions")
    _require(start_pos.dtype == torch.int64, f"start_pos is {start_pos.dtype}; it must be torch.int64")
    _require(
        tuple(start_pos.shape) == (1,),
        f"start_pos has shape {list(start_pos.shape)}; it must be [1]",
    )
    _require(
        scale is None or (math.isfinite(scale) and scale > 0),
        f"scale is {scale}; it must be positive and finite",
    )


def _eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    start_pos: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """The reference: what the operator means, without any thought of speed."""
    _check(query, key, value, key_cache, value_cache, start_pos, scale)
    _, tokens, heads, head_dim = query.shape
    kv_heads, capacity = key_cache.shape[1:3]
    start = int(start_pos.item())
    end = start + tokens
    _require(
        0 <= start <= capacity - tokens,
        f"start_pos is {start}; with {tokens} tokens and a cache of {capacity} positions it must "
        f"be from 0 to {capacity - tokens}",
    )

    key_cache[:, :, start:end] = key.transpose(1, 2)
    value_cache[:, :, start:end] = value.transpose(1, 2)

    queries = query.transpose(1, 2)  # [1, heads, tokens, head_dim]
    keys = key_cache[:, :, :end].repeat_interleave(heads // kv_heads, dim=1)
    values = value_cache[:, :, :end].repeat_interleave(heads // kv_heads, dim=1)
    if scale is None:
        scale = 1 / math.sqrt(head_dim)
    scores = queries @ keys.transpose(-1, -2) * scale  # [1, heads, tokens, end]
    query_positions = torch.arange(start, end, device=query.device)
    key_positions = torch.arange(end, device=query.device)
    hidden = key_positions > query_positions[:, None]
    probabilities = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
    return (probabilities @ values).transpose(1, 2).contiguous()


def _eager_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    start_pos: torch.Tensor,
    *,
    scale: float | None = None,
    out: torch.Tensor,
) -> torch.Tensor:
    _require(out.dtype == torch.float32, f"out is {out.dtype}; it must be torch.float32")
    _require(
        out.shape == query.shape,
        f"out has shape {list(out.shape)}; it must be that of query, {list(query.shape)}",
    )
    return out.copy_(_eager(query, key, value, key_cache, value_cache, start_pos, scale=scale))


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    start_pos: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Shapes only, for tracing and memory planning: reads no tensor's values."""
    _check(query, key, value, key_cache, value_cache, start_pos, scale)
    return query.new_empty(query.shape)


def _fake_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    start_pos: torch.Tensor,
    *,
    scale: float | None = None,
    out: torch.Tensor,
) -> torch.Tensor:
    _check(query, key, value, key_cache, value_cache, start_pos, scale)
    return out


_library.impl("sdpa_with_kv_cache", _eager, "CompositeExplicitAutograd")
_library.impl("sdpa_with_kv_cache.out", _eager_out, "CompositeExplicitAutograd")
torch.library.register_fake("mvlm::sdpa_with_kv_cache", _fake, lib=_library)
torch.library.register_fake("mvlm::sdpa_with_kv_cache.out", _fake_out, lib=_library)
