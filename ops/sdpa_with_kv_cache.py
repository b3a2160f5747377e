"""``mvlm::sdpa_with_kv_cache`` and ``mvlm::sdpa_with_int8_kv_cache``: causal attention that writes and reads a cache.

The operators take the packed projection (see ``packed_qkv.py``) of ``n`` new tokens, turn its queries and keys by
rotary embedding, store the turned keys and the values in the caches at positions ``start_pos .. start_pos + n - 1``,
and let query ``i`` attend to positions ``0 .. start_pos + i``:

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j        (Vaswani et al., 2017, equation 1)

Rotary embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864) pairs component ``i`` with component
``i + head_dim / 2``, the layout of Hugging Face checkpoints:

    x_i, x_j  <-  x_i cos_pi - x_j sin_pi,  x_j cos_pi + x_i sin_pi        (j = i + head_dim / 2, p the position)

With fewer key/value heads than query heads (grouped-query attention, Ainslie et al., 2023), query head ``h`` uses
key/value head ``h // (heads // kv_heads)``.

The int8 caches hold, per head and position, round(x * (127 / max|x|)), ties to even, and the scale max|x| / 127 that
brings them back (symmetric absmax quantization, Dettmers et al., 2022, https://arxiv.org/abs/2208.07339, section 2). A
vector without a component of 1e-30 or more counts as zero and gets scale 0; one with a NaN or an infinity gets scale
NaN, so that what attends to it is NaN.

Here are the schemas, the eager references and the shape functions. The kernels that a .pte runs are in
``sdpa_with_kv_cache.cpp`` and ``attention_kernel.cpp``.
"""

from __future__ import annotations

import math

import torch

from .definition import require
from .packed_qkv import check_out, check_scale, check_tensor, split_heads

_FLOAT_CACHE = "sdpa_with_kv_cache"
_INT8_CACHE = "sdpa_with_int8_kv_cache"
_COMMON_ARGUMENTS = "Tensor cos, Tensor sin, Tensor start_pos, int heads, *, float? scale=None"
_FLOAT_ARGUMENTS = f"Tensor qkv, Tensor(a!) key_cache, Tensor(b!) value_cache, {_COMMON_ARGUMENTS}"
_INT8_ARGUMENTS = (
    "Tensor qkv, Tensor(a!) key_cache, Tensor(b!) key_scales, Tensor(c!) value_cache, Tensor(d!) value_scales, "
    + _COMMON_ARGUMENTS
)

# Vectors whose largest component is smaller count as zero: 127 / max would overflow for the smallest ones.
_SMALLEST_MAXIMUM = 1e-30

# Kept for the life of the process: the operators go away with it.
_library = torch.library.Library("mvlm", "FRAGMENT")
for _name, _arguments in ((_FLOAT_CACHE, _FLOAT_ARGUMENTS), (_INT8_CACHE, _INT8_ARGUMENTS)):
    _library.define(f"{_name}({_arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    # What ExecuTorch's memory planning turns the operator above into.
    _library.define(f"{_name}.out({_arguments}, Tensor(e!) out) -> Tensor(e!)")


def sdpa_with_kv_cache(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    start_pos: torch.Tensor,
    heads: int,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Writes the new keys and values into the caches and attends causally over them.

    Args:
        qkv: float32 [1, n, (heads + 2 * kv_heads) * head_dim], n >= 1: per token all query heads, then all key heads,
            then all value heads.
        key_cache: float32 or float16 [1, kv_heads, capacity, head_dim], head_dim even; changed in place. What it holds
            past the written positions is never used.
        value_cache: as ``key_cache``, and not the same memory.
        cos: float32 [positions, head_dim / 2], positions >= capacity; row p belongs to position p.
        sin: as ``cos``.
        start_pos: int64 [1], position of the first new token; 0 <= start_pos <= capacity - n.
        heads: query heads, a multiple of kv_heads.
        scale: what query-key products are multiplied by, positive; 1 / sqrt(head_dim) by default.

    Returns:
        float32 [1, n, heads * head_dim], contiguous.

    Raises:
        ValueError: an argument is not as described; the caches are then unchanged. (In a .pte the kernel fails with
            Error::InvalidArgument and logs the same.)
    """
    return torch.ops.mvlm.sdpa_with_kv_cache(qkv, key_cache, value_cache, cos, sin, start_pos, heads, scale=scale)


def sdpa_with_int8_kv_cache(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    key_scales: torch.Tensor,
    value_cache: torch.Tensor,
    value_scales: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    start_pos: torch.Tensor,
    heads: int,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """:func:`sdpa_with_kv_cache` over caches of 8-bit integers with a scale per head and position.

    Args:
        qkv: as there.
        key_cache: int8 [1, kv_heads, capacity, head_dim], head_dim even; changed in place.
        key_scales: float32 [1, kv_heads, capacity]; changed in place.
        value_cache: as ``key_cache``, and not the same memory.
        value_scales: as ``key_scales``, and not the same memory.
        cos, sin, start_pos, heads, scale: as there.

    Returns:
        float32 [1, n, heads * head_dim], contiguous.

    Raises:
        ValueError: an argument is not as described; the caches are then unchanged. (In a .pte the kernel fails with
            Error::InvalidArgument and logs the same.)
    """
    return torch.ops.mvlm.sdpa_with_int8_kv_cache(
        qkv, key_cache, key_scales, value_cache, value_scales, cos, sin, start_pos, heads, scale=scale
    )


def _check(
    operator: str,
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_dtypes: tuple[torch.dtype, ...],
    cos: torch.Tensor,
    sin: torch.Tensor,
    start_pos: torch.Tensor,
    heads: int,
    scale: float | None,
) -> None:
    """Checks everything but scales of int8 caches and the value of ``start_pos``, unknown while exporting."""
    cache_layout = "[1, kv_heads, capacity, head_dim]"
    float32 = (torch.float32,)
    check_tensor(operator, "qkv", qkv, float32, 3, "[1, tokens, (heads + 2 * kv_heads) * head_dim]")
    check_tensor(operator, "key_cache", key_cache, cache_dtypes, 4, cache_layout)
    check_tensor(operator, "value_cache", value_cache, (key_cache.dtype,), 4, cache_layout)
    check_tensor(operator, "cos", cos, float32, 2, "[positions, head_dim / 2]")
    check_tensor(operator, "sin", sin, float32, 2, "[positions, head_dim / 2]")
    _, kv_heads, capacity, head_dim = key_cache.shape
    require(
        kv_heads >= 1 and head_dim >= 2 and head_dim % 2 == 0,
        operator,
        f"key_cache has shape {list(key_cache.shape)}; it needs at least one head and an even head_dim of at least 2",
    )
    require(
        value_cache.shape == key_cache.shape,
        operator,
        f"value_cache has shape {list(value_cache.shape)}; it must be that of key_cache, {list(key_cache.shape)}",
    )
    require(
        heads >= 1 and heads % kv_heads == 0,
        operator,
        f"{heads} query heads cannot share {kv_heads} key/value heads; heads must be a positive multiple of kv_heads",
    )
    tokens, width = qkv.shape[1], (heads + 2 * kv_heads) * head_dim
    require(
        tokens >= 1 and qkv.shape[2] == width,
        operator,
        f"qkv has shape {list(qkv.shape)}; with heads {heads} and key_cache {list(key_cache.shape)} it must be "
        f"[1, tokens, {width}], with at least one token",
    )
    for name, table in (("cos", cos), ("sin", sin)):
        require(
            table.shape[0] >= capacity and table.shape[1] == head_dim // 2,
            operator,
            f"{name} has shape {list(table.shape)}; with key_cache {list(key_cache.shape)} it must be "
            f"[{capacity} or more, {head_dim // 2}]",
        )
    require(tokens <= capacity, operator, f"{tokens} tokens do not fit a cache of {capacity} positions")
    check_tensor(operator, "start_pos", start_pos, (torch.int64,), 1, "[1]")
    require(
        start_pos.shape[0] == 1,
        operator,
        f"start_pos has shape {list(start_pos.shape)}; it must be [1]",
    )
    check_scale(operator, scale)


def _check_scales(key_cache: torch.Tensor, scales: dict[str, torch.Tensor]) -> None:
    """Checks the scales of int8 caches."""
    for name, tensor in scales.items():
        check_tensor(_INT8_CACHE, name, tensor, (torch.float32,), 3, "[1, kv_heads, capacity]")
        require(
            tensor.shape == key_cache.shape[:3],
            _INT8_CACHE,
            f"{name} has shape {list(tensor.shape)}; with key_cache {list(key_cache.shape)} it must be "
            f"{list(key_cache.shape[:3])}",
        )


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of heads [1, n, heads, head_dim] with tables [n, head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _new_heads(
    operator: str,
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    start_pos: torch.Tensor,
    heads: int,
) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Checks the value of ``start_pos`` and returns it with the new tokens' heads, rotated, [1, heads, n, head_dim]."""
    _, kv_heads, capacity, head_dim = key_cache.shape
    tokens = qkv.shape[1]
    start = int(start_pos.item())
    require(
        0 <= start <= capacity - tokens,
        operator,
        f"start_pos is {start}; with {tokens} tokens and a cache of {capacity} positions it must be from 0 to "
        f"{capacity - tokens}",
    )
    q, k, v = split_heads(qkv, heads, kv_heads, head_dim)
    rows = slice(start, start + tokens)
    q, k = _rotate(q, cos[rows], sin[rows]), _rotate(k, cos[rows], sin[rows])
    return start, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, scale: float | None
) -> torch.Tensor:
    """Causal attention of queries [1, heads, n, head_dim] at ``start`` over float32 [1, kv_heads, end, head_dim]."""
    heads, head_dim = queries.shape[1], queries.shape[3]
    kv_heads, end = keys.shape[1:3]
    keys = keys.repeat_interleave(heads // kv_heads, dim=1)
    values = values.repeat_interleave(heads // kv_heads, dim=1)
    if scale is None:
        scale = 1 / math.sqrt(head_dim)
    scores = queries @ keys.transpose(-1, -2) * scale  # [1, heads, n, end]
    query_positions = torch.arange(start, end, device=queries.device)
    key_positions = torch.arange(end, device=queries.device)
    hidden = key_positions > query_positions[:, None]
    probabilities = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
    return (probabilities @ values).transpose(1, 2).flatten(2).contiguous()


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values, as ``x``, and float32 scales, without the last dimension. The kernel rounds at the same places."""
    maximum = x.abs().amax(dim=-1)  # NaN if there is one
    usable = (maximum >= _SMALLEST_MAXIMUM) & maximum.isfinite()
    # Two tensors are divided: of a number and a tensor torch multiplies the tensor's reciprocal, which rounds twice.
    factor = torch.where(usable, torch.full_like(maximum, 127.0) / maximum, 0.0)
    integers = (x * factor.unsqueeze(-1)).round().nan_to_num(0.0).to(torch.int8)
    scales = torch.where(usable, maximum / 127.0, torch.where(maximum.isfinite(), 0.0, math.nan))
    return integers, scales


def _eager(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    start_pos: torch.Tensor,
    heads: int,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """The reference: what the operator means, without any thought of speed."""
    _check_float(qkv, key_cache, value_cache, cos, sin, start_pos, heads, scale)
    start, queries, keys, values = _new_heads(_FLOAT_CACHE, qkv, key_cache, cos, sin, start_pos, heads)
    end = start + qkv.shape[1]
    key_cache[:, :, start:end] = keys
    value_cache[:, :, start:end] = values
    return _attend(queries, key_cache[:, :, :end].float(), value_cache[:, :, :end].float(), start, scale)


def _eager_int8(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    key_scales: torch.Tensor,
    value_cache: torch.Tensor,
    value_scales: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    start_pos: torch.Tensor,
    heads: int,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """As :func:`_eager`. It multiplies keys and values by their scales, the kernel scores and probabilities."""
    _check_int8(qkv, key_cache, key_scales, value_cache, value_scales, cos, sin, start_pos, heads, scale)
    start, queries, keys, values = _new_heads(_INT8_CACHE, qkv, key_cache, cos, sin, start_pos, heads)
    end = start + qkv.shape[1]
    key_cache[:, :, start:end], key_scales[:, :, start:end] = _quantize(keys)
    value_cache[:, :, start:end], value_scales[:, :, start:end] = _quantize(values)
    keys, values = (
        cache[:, :, :end].float() * scales[:, :, :end].unsqueeze(-1)
        for cache, scales in ((key_cache, key_scales), (value_cache, value_scales))
    )
    return _attend(queries, keys, values, start, scale)


def _check_float(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    start_pos: torch.Tensor,
    heads: int,
    scale: float | None,
) -> None:
    dtypes = (torch.float32, torch.float16)
    _check(_FLOAT_CACHE, qkv, key_cache, value_cache, dtypes, cos, sin, start_pos, heads, scale)


def _check_int8(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    key_scales: torch.Tensor,
    value_cache: torch.Tensor,
    value_scales: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    start_pos: torch.Tensor,
    heads: int,
    scale: float | None,
) -> None:
    _check(_INT8_CACHE, qkv, key_cache, value_cache, (torch.int8,), cos, sin, start_pos, heads, scale)
    _check_scales(key_cache, {"key_scales": key_scales, "value_scales": value_scales})


def _new_result(qkv: torch.Tensor, key_cache: torch.Tensor, heads: int) -> torch.Tensor:
    return qkv.new_empty((1, qkv.shape[1], heads * key_cache.shape[3]))


def _register(operator: str, check, eager) -> None:
    """Registers the reference, the shape function and their ``.out`` variants.

    Args:
        operator: its name without ``mvlm::``.
        check: takes the operator's arguments, all by position, and raises ValueError.
        eager: takes the operator's arguments as its schema has them.
    """

    def fake(qkv, key_cache, *arguments, scale=None):
        """Shapes only, for tracing and memory planning: reads no tensor's values."""
        check(qkv, key_cache, *arguments, scale)
        return _new_result(qkv, key_cache, arguments[-1])

    def fake_out(*arguments, scale=None, out):
        check(*arguments, scale)
        return out

    def eager_out(*arguments, scale=None, out):
        check_out(operator, out, fake(*arguments, scale=scale))
        return out.copy_(eager(*arguments, scale=scale))

    _library.impl(operator, eager, "CompositeExplicitAutograd")
    _library.impl(f"{operator}.out", eager_out, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mvlm::{operator}", fake, lib=_library)
    torch.library.register_fake(f"mvlm::{operator}.out", fake_out, lib=_library)


_register(_FLOAT_CACHE, _check_float, _eager)
_register(_INT8_CACHE, _check_int8, _eager_int8)
