"""mvlm::sdpa_with_kv_cache and its int8 twin, eager and native.

They are compared with torch's scaled_dot_product_attention of keys that transformers rotated.
"""

from __future__ import annotations

import ctypes
import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from attention_programs import export, load
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import mvlm.ops
from mvlm.ops import sdpa_with_int8_kv_cache, sdpa_with_kv_cache

INT64_MAX = 2**63 - 1
TOLERANCE = 2e-6  # inputs and outputs are of magnitude 1
F32, F16, I8 = torch.float32, torch.float16, torch.int8


@dataclass(frozen=True)
class Shape:
    """What is fixed when a program is exported."""

    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    scale: float | None = None
    cache: torch.dtype = F32

    def __str__(self) -> str:
        scale = "" if self.scale is None else f"-scale{self.scale:g}"
        return f"{self.heads}over{self.kv_heads}x{self.head_dim}-cap{self.capacity}{scale}-{self.cache}"

    def random(self, tokens: int, seed: int) -> torch.Tensor:
        """The packed projection of ``tokens`` new tokens."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(1, tokens, (self.heads + 2 * self.kv_heads) * self.head_dim, generator=generator)

    def caches(self, fill: float) -> list[torch.Tensor]:
        """The operator's caches, in its order. Integers are 99: their scales are ``fill``."""
        size = (1, self.kv_heads, self.capacity, self.head_dim)
        if self.cache is I8:
            return [
                x for _ in range(2) for x in (torch.full(size, 99, dtype=I8), torch.full(size[:3], fill, dtype=F32))
            ]
        return [torch.full(size, fill, dtype=self.cache) for _ in range(2)]

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of more positions than are needed."""
        frequencies = 10000.0 ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = torch.outer(torch.arange(self.capacity + 3), frequencies)
        return angles.cos(), angles.sin()

    def run(self, qkv: torch.Tensor, caches: list[torch.Tensor], start_pos: torch.Tensor) -> torch.Tensor:
        """The operator."""
        operator = sdpa_with_int8_kv_cache if self.cache is I8 else sdpa_with_kv_cache
        return operator(qkv, *caches, *self.tables(), start_pos, self.heads, scale=self.scale)


SHAPES = [
    Shape(heads=4, kv_heads=4, head_dim=64, capacity=97),
    Shape(heads=4, kv_heads=2, head_dim=80, capacity=70),
    Shape(heads=3, kv_heads=1, head_dim=128, capacity=130),
    Shape(heads=6, kv_heads=2, head_dim=34, capacity=40, scale=0.3),
    Shape(heads=1, kv_heads=1, head_dim=2, capacity=3),
]
SHAPES += [replace(shape, cache=F16) for shape in SHAPES[1:4]] + [replace(shape, cache=I8) for shape in SHAPES]


class Attention(torch.nn.Module):
    """Nothing but the operator, over caches of its own, which it shows."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        for i, cache in enumerate(shape.caches(0)):
            self.register_buffer(f"cache{i}", cache)
        cos, sin = shape.tables()
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, qkv: torch.Tensor, start_pos: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shape = self.shape
        operator = torch.ops.mvlm.sdpa_with_int8_kv_cache if shape.cache is I8 else torch.ops.mvlm.sdpa_with_kv_cache
        caches = [getattr(self, f"cache{i}") for i in range(4 if shape.cache is I8 else 2)]
        result = operator(qkv, *caches, self.cos, self.sin, start_pos, shape.heads, scale=shape.scale)
        return (result, *(cache.clone() for cache in caches))


@functools.cache
def exported_attention(shape: Shape) -> bytes:
    return export(Attention(shape), (shape.random(tokens=2, seed=0), torch.tensor([0])), shape.capacity)


def native_with_caches(shape: Shape) -> Callable[..., list[torch.Tensor]]:
    """A fresh native program: forward(qkv, start_pos) gives the result and the caches."""
    return load(exported_attention(shape))


def native(shape: Shape) -> Callable[..., torch.Tensor]:
    """A fresh native program: forward(qkv, start_pos)."""
    function = native_with_caches(shape)
    return lambda qkv, start_pos: function(qkv, start_pos)[0]


def eager(shape: Shape) -> Callable[..., torch.Tensor]:
    """The eager operator over caches of NaN: forward(qkv, start_pos)."""
    caches = shape.caches(math.nan)
    return lambda qkv, start_pos: shape.run(qkv, caches, start_pos)


def stored(x: torch.Tensor, cache: torch.dtype) -> torch.Tensor:
    """What comes back from a cache: [..., head_dim] with a scale per vector, if it is of integers."""
    if cache is not I8:
        return x.to(cache).float()
    maximum = x.abs().amax(-1, keepdim=True)
    integers = torch.round(x * torch.div(torch.tensor([127.0]), maximum))
    return integers.clamp(-127, 127) * (maximum / 127)


class Reference:
    """The same by transformers' rotation and torch's attention, over everything seen so far."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        size = (1, shape.kv_heads, shape.capacity, shape.head_dim)
        self.keys, self.values = torch.full(size, math.nan), torch.full(size, math.nan)

    def __call__(self, qkv: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        shape, tokens = self.shape, qkv.shape[1]
        start, end = int(start_pos), int(start_pos) + tokens
        widths = [n * shape.head_dim for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
        q, k, v = (x.view(1, tokens, -1, shape.head_dim).transpose(1, 2) for x in qkv.split(widths, dim=-1))
        cos, sin = (torch.cat([table, table], dim=-1)[None, start:end] for table in shape.tables())
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        self.keys[:, :, start:end] = stored(k, shape.cache)
        self.values[:, :, start:end] = stored(v, shape.cache)
        attended = scaled_dot_product_attention(
            q.double(),
            self.keys[:, :, :end].double(),
            self.values[:, :, :end].double(),
            attn_mask=torch.ones(tokens, end, dtype=torch.bool).tril(start),
            scale=shape.scale,
            enable_gqa=True,
        )
        return attended.transpose(1, 2).flatten(2).float()


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [eager, native])
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES, ids=str)


def step(shape: Shape, functions: list[Callable], start: int, tokens: int, seed: int) -> None:
    """One call of each function with the same inputs; all must agree."""
    inputs = (shape.random(tokens, seed), torch.tensor([start]))
    expected, *actual = [function(*inputs) for function in functions]
    for result in actual:
        assert result.is_contiguous()
        torch.testing.assert_close(result, expected, atol=TOLERANCE, rtol=TOLERANCE)


@IMPLEMENTATIONS
@ALL_SHAPES
def test_prefill_then_decode(shape: Shape, implementation: Callable) -> None:
    functions = [Reference(shape), implementation(shape)]
    prefill = max(1, shape.capacity * 2 // 3)
    step(shape, functions, 0, prefill, seed=1)
    for position in range(prefill, min(shape.capacity, prefill + 20)):
        step(shape, functions, position, 1, seed=position)


@IMPLEMENTATIONS
@ALL_SHAPES
def test_shortest_and_longest(shape: Shape, implementation: Callable) -> None:
    cap = shape.capacity
    functions = [Reference(shape), implementation(shape)]
    for seed, tokens in enumerate([1, 2, cap - 1, cap]):
        step(shape, functions, 0, tokens, seed)
    for seed, tokens in enumerate([1, 2, cap - 1]):  # ends at the last position
        step(shape, functions, cap - tokens, tokens, seed + 10)


@IMPLEMENTATIONS
@ALL_SHAPES
def test_random_walk(shape: Shape, implementation: Callable) -> None:
    """Chunks of any length, sometimes going back and overwriting."""
    functions = [Reference(shape), implementation(shape)]
    rng = random.Random(str(shape))
    written = 0
    for seed in range(15):
        start = rng.randint(0, min(written, shape.capacity - 1))
        tokens = rng.randint(1, shape.capacity - start)
        step(shape, functions, start, tokens, seed)
        written = max(written, start + tokens)


def test_eager_matches_on_random_shapes() -> None:
    rng = random.Random(3)
    for seed in range(40):
        kv_heads = rng.randint(1, 4)
        shape = Shape(
            heads=kv_heads * rng.randint(1, 4),
            kv_heads=kv_heads,
            head_dim=rng.choice([2, 6, 18, 64, 80, 96, 128]),
            capacity=rng.randint(2, 60),
            scale=rng.choice([None, 0.05, 0.15]),
            cache=rng.choice([F32, F16, I8]),
        )
        functions = [Reference(shape), eager(shape)]
        prefix = rng.randint(1, shape.capacity - 1)
        step(shape, functions, 0, prefix, seed)
        step(shape, functions, prefix, rng.randint(1, shape.capacity - prefix), seed + 1000)


@ALL_SHAPES
def test_native_caches_equal_eager_ones_bit_for_bit(shape: Shape) -> None:
    function, caches = native_with_caches(shape), shape.caches(0)
    # Many vectors, because ways of rounding that differ agree on most.
    calls = [(0, shape.capacity)] * 10 + [(1, 2), (shape.capacity - 1, 1)]
    for seed, (start, tokens) in enumerate(calls):
        magnitudes = 10.0 ** torch.arange(-3, tokens - 3).clamp(max=3)
        qkv = shape.random(tokens, seed) * magnitudes[None, :, None]
        qkv[:, 0, -shape.head_dim :] = 0  # the last head's value
        _, *native_caches = function(qkv, torch.tensor([start]))
        shape.run(qkv, caches, torch.tensor([start]))
        for actual, expected in zip(native_caches, caches, strict=True):
            assert torch.equal(actual, expected)


def test_int8_cache_holds_rounded_multiples_of_the_scale() -> None:
    shape = Shape(heads=1, kv_heads=1, head_dim=4, capacity=3, cache=I8)
    caches = shape.caches(5.0)
    value = [1.27, -0.635, 0.3, -1.0]
    shape.run(torch.tensor([[[0.0] * 8 + value]]), caches, torch.tensor([1]))
    assert caches[0][0, 0].tolist() == [[99] * 4, [0] * 4, [99] * 4]
    assert caches[1].tolist() == [[[5.0, 0.0, 5.0]]]
    assert caches[2][0, 0, 1].tolist() == [127, -64, 30, -100]  # -63.5 goes to the even neighbour
    assert caches[3][0, 0, 1].item() == pytest.approx(0.01)


@IMPLEMENTATIONS
@pytest.mark.parametrize(("cache", "bound"), [(F16, 60), (I8, 35)])
def test_narrow_caches_lose_little(cache: torch.dtype, bound: float, implementation: Callable) -> None:
    shape = Shape(heads=4, kv_heads=2, head_dim=80, capacity=70, cache=cache)
    inputs = shape.random(shape.capacity, seed=5), torch.tensor([0])
    exact = Reference(replace(shape, cache=F32))(*inputs)
    noise = implementation(shape)(*inputs) - exact
    ratio = 20 * math.log10(exact.norm() / noise.norm())
    assert bound <= ratio < bound + 30  # more would mean that the cache is not narrow


@IMPLEMENTATIONS
@ALL_SHAPES
def test_nothing_past_the_written_positions_is_read(shape: Shape, implementation: Callable) -> None:
    function = implementation(shape)
    garbage = torch.full_like(shape.random(shape.capacity, seed=0), math.nan)
    assert function(garbage, torch.tensor([0])).isnan().all()
    functions = [Reference(shape), function]
    done = 0
    for tokens in [1, 1, 30, 1, 2]:
        tokens = min(tokens, shape.capacity - done)
        if tokens > 0:
            step(shape, functions, done, tokens, seed=done)
        done += tokens


def out_of_range(capacity: int) -> list[tuple[int, int]]:
    """Pairs of (start_pos, tokens) that do not fit."""
    return [
        (-1, 1),
        (-1, capacity),
        (-capacity, 1),
        (-INT64_MAX - 1, 1),
        (1, capacity),
        (capacity - 1, 2),
        (capacity, 1),
        (capacity + 5, 1),
        (INT64_MAX, 1),
        (INT64_MAX - 1, 2),
    ]


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[-4]], ids=str)
def test_eager_rejects_positions_out_of_range(shape: Shape) -> None:
    caches = shape.caches(3.0)
    before = [cache.clone() for cache in caches]
    for start, tokens in out_of_range(shape.capacity):
        allowed = f"start_pos is {start}; .* must be from 0 to {shape.capacity - tokens}"
        with pytest.raises(ValueError, match=allowed):
            shape.run(shape.random(tokens, seed=1), caches, torch.tensor([start]))
        for cache, same in zip(caches, before, strict=True):
            assert torch.equal(cache, same)


@ALL_SHAPES
def test_native_rejects_positions_out_of_range(shape: Shape, capfd: pytest.CaptureFixture[str]) -> None:
    """A rejected call leaves no trace: its keys and values are NaN, and later answers are right."""
    reference, function = Reference(shape), native(shape)
    half = max(1, shape.capacity // 2)
    step(shape, [reference, function], 0, half, seed=1)
    for start, tokens in out_of_range(shape.capacity):
        poison = torch.full_like(shape.random(tokens, seed=2), math.nan)
        capfd.readouterr()
        with pytest.raises(RuntimeError, match="0x12"):  # Error::InvalidArgument
            function(poison, torch.tensor([start]))
        assert f"start_pos is {start}; with {tokens} tokens" in "".join(capfd.readouterr())
        # Rewrites the last position only, so that everything before it is what step 1 left.
        step(shape, [reference, function], half - 1, 1, seed=3)
    step(shape, [reference, function], half, shape.capacity - half, seed=4)


VALID = {
    "qkv": torch.zeros(1, 3, 64),
    "key_cache": torch.zeros(1, 2, 10, 8),
    "value_cache": torch.zeros(1, 2, 10, 8),
    "cos": torch.zeros(12, 4),
    "sin": torch.zeros(12, 4),
    "start_pos": torch.tensor([0]),
    "heads": 4,
    "scale": None,
}
VALID_INT8 = VALID | {
    "key_cache": torch.zeros(1, 2, 10, 8, dtype=I8),
    "key_scales": torch.zeros(1, 2, 10),
    "value_cache": torch.zeros(1, 2, 10, 8, dtype=I8),
    "value_scales": torch.zeros(1, 2, 10),
}


def both_caches(*size: int) -> dict[str, torch.Tensor]:
    return {"key_cache": torch.zeros(size), "value_cache": torch.zeros(size)}


MISTAKES = [
    ({"qkv": torch.zeros(1, 3, 64).double()}, "qkv is torch.float64"),
    ({"qkv": torch.zeros(3, 64)}, r"qkv has shape \[3, 64\]"),
    ({"qkv": torch.zeros(2, 3, 64)}, r"qkv has shape \[2, 3, 64\]"),
    ({"qkv": torch.zeros(1, 0, 64)}, "at least one token"),
    ({"qkv": torch.zeros(1, 3, 56)}, r"must be \[1, tokens, 64\]"),
    ({"heads": 2}, r"must be \[1, tokens, 48\]"),
    ({"heads": 3}, "3 query heads cannot share 2"),
    ({"heads": 0}, "0 query heads cannot share 2"),
    ({"key_cache": torch.zeros(1, 2, 10, 8).double()}, "key_cache is torch.float64"),
    ({"value_cache": torch.zeros(1, 2, 10, 8).half()}, "value_cache is torch.float16; it must be torch.float32"),
    ({"value_cache": torch.zeros(1, 2, 9, 8)}, r"value_cache has shape \[1, 2, 9, 8\]"),
    (both_caches(2, 10, 8), r"key_cache has shape \[2, 10, 8\]"),
    (both_caches(1, 2, 10, 7), "an even head_dim"),
    (both_caches(1, 0, 10, 8), "at least one head"),
    (both_caches(1, 2, 2, 8), "3 tokens do not fit a cache of 2 positions"),
    ({"cos": torch.zeros(12, 4).half()}, "cos is torch.float16"),
    ({"cos": torch.zeros(9, 4)}, r"cos has shape \[9, 4\]; .* \[10 or more, 4\]"),
    ({"sin": torch.zeros(12, 8)}, r"sin has shape \[12, 8\]"),
    ({"sin": torch.zeros(1, 12, 4)}, r"sin has shape \[1, 12, 4\]"),
    ({"start_pos": torch.tensor([0], dtype=torch.int32)}, "start_pos is torch.int32"),
    ({"start_pos": torch.tensor(0)}, r"start_pos has shape \[\]"),
    ({"start_pos": torch.tensor([0, 1])}, r"start_pos has shape \[2\]"),
    ({"scale": 0.0}, "scale is 0.0"),
    ({"scale": math.inf}, "scale is inf"),
]
INT8_MISTAKES = [
    ({"heads": 3}, "sdpa_with_int8_kv_cache: 3 query heads cannot share 2"),
    ({"key_cache": torch.zeros(1, 2, 10, 8)}, "key_cache is torch.float32"),
    ({"value_cache": torch.zeros(1, 2, 10, 8, dtype=torch.uint8)}, "value_cache is torch.uint8"),
    ({"key_scales": torch.zeros(1, 2, 10).half()}, "key_scales is torch.float16"),
    ({"key_scales": torch.zeros(1, 2, 9)}, r"key_scales has shape \[1, 2, 9\]"),
    ({"value_scales": torch.zeros(1, 2, 10, 1)}, r"value_scales has shape \[1, 2, 10, 1\]"),
]


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [(sdpa_with_kv_cache, VALID | changes, message) for changes, message in MISTAKES]
    + [(sdpa_with_int8_kv_cache, VALID_INT8 | changes, message) for changes, message in INT8_MISTAKES],
)
def test_eager_and_fake_reject_wrong_arguments(operator: Callable, arguments: dict, message: str) -> None:
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=message):
            operator(**on(device, arguments))


def on(device: str, arguments: dict) -> dict:
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in arguments.items()}


@pytest.mark.parametrize(
    ("operator", "valid"), [(sdpa_with_kv_cache, VALID), (sdpa_with_int8_kv_cache, VALID_INT8)], ids=["float", "int8"]
)
def test_fake_gives_the_shape_and_reads_no_values(operator: Callable, valid: dict) -> None:
    arguments = valid | {"start_pos": torch.tensor([10**6])}  # out of range, if it were read
    out = operator(**on("meta", arguments))
    assert out.shape == (1, 3, 32)
    assert out.dtype == torch.float32


def overload_and_arguments(shape: Shape, tokens: int) -> tuple:
    operator = torch.ops.mvlm.sdpa_with_int8_kv_cache if shape.cache is I8 else torch.ops.mvlm.sdpa_with_kv_cache
    qkv = shape.random(tokens, seed=1)
    return operator, (qkv, *shape.caches(0), *shape.tables(), torch.tensor([3]), shape.heads)


@pytest.mark.parametrize("cache", [F32, I8])
def test_out_variant(cache: torch.dtype) -> None:
    shape = replace(SHAPES[1], cache=cache, scale=0.3)
    operator, arguments = overload_and_arguments(shape, 5)
    out = torch.empty(1, 5, shape.heads * shape.head_dim)
    assert operator.out(*arguments, scale=0.3, out=out) is out
    assert torch.equal(out, shape.run(arguments[0], shape.caches(0), torch.tensor([3])))
    with pytest.raises(ValueError, match=r"out has shape \[1, 4, 320\]"):
        operator.out(*arguments, out=torch.empty(1, 4, 320))


@pytest.mark.parametrize("cache", [F32, F16, I8])
@pytest.mark.parametrize(("tokens", "scale"), [(1, None), (6, 0.5)])
def test_opcheck(tokens: int, scale: float | None, cache: torch.dtype) -> None:
    shape = replace(SHAPES[1], capacity=12, cache=cache)
    operator, arguments = overload_and_arguments(shape, tokens)
    torch.library.opcheck(operator.default, arguments, {"scale": scale})
    torch.library.opcheck(
        operator.out,
        arguments,
        {"scale": scale, "out": torch.empty(1, tokens, shape.heads * shape.head_dim)},
        # Out variants are not meant for tracing: torch.compile has no functional form of them.
        test_utils=("test_schema", "test_faketensor"),
    )


class TwoLayers(torch.nn.Module):
    """The operator as a model uses it: on other operators' results, with caches per layer."""

    WIDTH, HEADS, KV_HEADS, CAPACITY = 24, 4, 2, 20

    def __init__(self) -> None:
        super().__init__()
        shape = Shape(self.HEADS, self.KV_HEADS, self.WIDTH // self.HEADS, self.CAPACITY)
        width = (self.HEADS + 2 * self.KV_HEADS) * shape.head_dim
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(self.WIDTH, width) for _ in range(2))
        cos, sin = shape.tables()
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        for layer in range(2):
            for name, cache in zip("kv", shape.caches(0), strict=True):
                self.register_buffer(f"{name}{layer}", cache)

    def forward(self, x: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        caches = ((self.k0, self.v0), (self.k1, self.v1))
        for qkv, layer_caches in zip(self.qkv, caches, strict=True):
            x = x + torch.ops.mvlm.sdpa_with_kv_cache(qkv(x), *layer_caches, self.cos, self.sin, start_pos, self.HEADS)
        return x


def test_exported_model_equals_eager() -> None:
    torch.manual_seed(0)
    model = TwoLayers().eval()
    function = load(export(model, (torch.randn(1, 3, model.WIDTH), torch.tensor([0])), model.CAPACITY))
    position = 0
    for tokens in [9, 1, 1, 2, 6, 1]:
        inputs = (torch.randn(1, tokens, model.WIDTH), torch.tensor([position]))
        with torch.no_grad():
            torch.testing.assert_close(function(*inputs)[0], model(*inputs), atol=1e-5, rtol=1e-5)
        position += tokens
    assert position == model.CAPACITY


def test_native_library_is_found_beside_the_package_or_elsewhere_on_its_path(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = mvlm.ops.native_library_path().name
    sources, installed = tmp_path / "sources", tmp_path / "installed"
    sources.mkdir()
    installed.mkdir()
    monkeypatch.setattr(mvlm.ops, "__path__", [str(sources), str(installed)])
    with pytest.raises(FileNotFoundError) as error:
        mvlm.ops.native_library_path()
    assert str(sources) in str(error.value)
    assert str(installed) in str(error.value)
    assert "pip install" in str(error.value)
    (installed / name).touch()
    assert mvlm.ops.native_library_path() == installed / name


def test_native_library_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    path = mvlm.ops.load_native_library()
    assert path == mvlm.ops.native_library_path()

    def fail(*_args, **_kwargs):
        raise AssertionError("loaded again: the operator would be registered twice")

    monkeypatch.setattr(ctypes, "CDLL", fail)
    assert mvlm.ops.load_native_library() == path
