"""mvlm::sdpa_with_kv_cache, eager and native, against torch's scaled_dot_product_attention."""

from __future__ import annotations

import ctypes
import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import mvlm.ops
from mvlm.ops import sdpa_with_kv_cache

INT64_MAX = 2**63 - 1
TOLERANCE = 2e-6  # inputs and outputs are of magnitude 1


@dataclass(frozen=True)
class Shape:
    """Sizes that are fixed when a program is exported."""

    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    scale: float | None = None

    def __str__(self) -> str:
        scale = "" if self.scale is None else f"-scale{self.scale:g}"
        return f"{self.heads}over{self.kv_heads}x{self.head_dim}-cap{self.capacity}{scale}"

    def random(self, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value of ``tokens`` new tokens."""
        generator = torch.Generator().manual_seed(seed)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (torch.randn(1, tokens, h, self.head_dim, generator=generator) for h in heads)
        return q, k, v

    def caches(self, fill: float) -> tuple[torch.Tensor, torch.Tensor]:
        size = (1, self.kv_heads, self.capacity, self.head_dim)
        return tuple(torch.full(size, fill, dtype=torch.float32) for _ in range(2))


SHAPES = [
    Shape(heads=4, kv_heads=4, head_dim=64, capacity=97),
    Shape(heads=4, kv_heads=2, head_dim=80, capacity=70),
    Shape(heads=3, kv_heads=1, head_dim=128, capacity=130),
    Shape(heads=6, kv_heads=2, head_dim=33, capacity=40, scale=0.7),
    Shape(heads=1, kv_heads=1, head_dim=7, capacity=3),
]


class Attention(torch.nn.Module):
    """Nothing but the operator, over caches of its own: what a model's layer does."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        key_cache, value_cache = shape.caches(0)
        self.register_buffer("key_cache", key_cache)
        self.register_buffer("value_cache", value_cache)
        self.scale = shape.scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        start_pos: torch.Tensor,
    ) -> torch.Tensor:
        return torch.ops.mvlm.sdpa_with_kv_cache(
            query, key, value, self.key_cache, self.value_cache, start_pos, scale=self.scale
        )


def export(module: torch.nn.Module, example: tuple[torch.Tensor, ...], capacity: int) -> bytes:
    """The .pte of a module whose inputs but the last have 1 to ``capacity`` tokens in dim 1."""
    from executorch.exir import (
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    tokens = torch.export.Dim("tokens", min=1, max=capacity)
    program = torch.export.export(module, example, dynamic_shapes=({1: tokens},) * (len(example) - 1) + (None,))
    lowered = to_edge_transform_and_lower(program, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    config = ExecutorchBackendConfig(sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass())
    return lowered.to_executorch(config).buffer


def load(pte: bytes) -> Callable[..., torch.Tensor]:
    """The forward method, on the Python runtime. Its caches start out undefined."""
    from executorch.runtime import Runtime

    mvlm.ops.load_native_library()
    program = Runtime.get().load_program(pte)
    method = program.load_method("forward")

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        assert program is not None  # The method does not keep the program's bytes alive; we do.
        return method.execute(inputs)[0].clone()

    return forward


@functools.cache
def exported_attention(shape: Shape) -> bytes:
    example = (*shape.random(tokens=2, seed=0), torch.tensor([0]))
    return export(Attention(shape), example, shape.capacity)


def native(shape: Shape) -> Callable[..., torch.Tensor]:
    """A fresh native program: forward(query, key, value, start_pos)."""
    return load(exported_attention(shape))


def eager(shape: Shape) -> Callable[..., torch.Tensor]:
    """The eager operator over caches of NaN: forward(query, key, value, start_pos)."""
    key_cache, value_cache = shape.caches(math.nan)

    def forward(query, key, value, start_pos):
        return sdpa_with_kv_cache(query, key, value, key_cache, value_cache, start_pos, scale=shape.scale)

    return forward


class Reference:
    """The same by torch.nn.functional.scaled_dot_product_attention, over everything seen so far."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.keys, self.values = (cache.transpose(1, 2) for cache in shape.caches(math.nan))

    def __call__(self, query, key, value, start_pos):
        start, end = int(start_pos), int(start_pos) + query.shape[1]
        self.keys[:, start:end] = key
        self.values[:, start:end] = value
        return scaled_dot_product_attention(
            query.transpose(1, 2),
            self.keys[:, :end].transpose(1, 2),
            self.values[:, :end].transpose(1, 2),
            attn_mask=torch.ones(end - start, end, dtype=torch.bool).tril(start),
            scale=self.shape.scale,
            enable_gqa=True,
        ).transpose(1, 2)


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [eager, native])
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES, ids=str)


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


def step(shape: Shape, functions: list[Callable], start: int, tokens: int, seed: int) -> None:
    """One call of each function with the same inputs; all must agree."""
    inputs = (*shape.random(tokens, seed), torch.tensor([start]))
    expected, *actual = [function(*inputs) for function in functions]
    for result in actual:
        assert result.is_contiguous()
        assert_equal(result, expected)


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
            head_dim=rng.choice([1, 5, 17, 64, 80, 96, 128]),
            capacity=rng.randint(2, 60),
            scale=rng.choice([None, 0.05, 1.3]),
        )
        functions = [Reference(shape), eager(shape)]
        prefix = rng.randint(1, shape.capacity - 1)
        step(shape, functions, 0, prefix, seed)
        step(shape, functions, prefix, rng.randint(1, shape.capacity - prefix), seed + 1000)


@IMPLEMENTATIONS
@ALL_SHAPES
def test_nothing_past_the_written_positions_is_read(shape: Shape, implementation: Callable) -> None:
    function = implementation(shape)
    garbage = tuple(torch.full_like(x, math.nan) for x in shape.random(shape.capacity, seed=0))
    assert function(*garbage, torch.tensor([0])).isnan().all()
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


def test_eager_rejects_positions_out_of_range() -> None:
    shape = SHAPES[1]
    key_cache, value_cache = torch.randn(2, 1, shape.kv_heads, shape.capacity, shape.head_dim)
    before = key_cache.clone(), value_cache.clone()
    for start, tokens in out_of_range(shape.capacity):
        allowed = f"start_pos is {start}; .* must be from 0 to {shape.capacity - tokens}"
        with pytest.raises(ValueError, match=allowed):
            sdpa_with_kv_cache(*shape.random(tokens, seed=1), key_cache, value_cache, torch.tensor([start]))
        assert torch.equal(key_cache, before[0])
        assert torch.equal(value_cache, before[1])


@ALL_SHAPES
def test_native_rejects_positions_out_of_range(shape: Shape, capfd: pytest.CaptureFixture[str]) -> None:
    """A rejected call leaves no trace: its keys and values are NaN, and later answers are right."""
    reference, function = Reference(shape), native(shape)
    half = max(1, shape.capacity // 2)
    step(shape, [reference, function], 0, half, seed=1)
    for start, tokens in out_of_range(shape.capacity):
        poison = tuple(torch.full_like(x, math.nan) for x in shape.random(tokens, seed=2))
        capfd.readouterr()
        with pytest.raises(RuntimeError, match="0x12"):  # Error::InvalidArgument
            function(*poison, torch.tensor([start]))
        assert f"start_pos is {start}; with {tokens} tokens" in "".join(capfd.readouterr())
        # Rewrites the last position only, so that everything before it is what step 1 left.
        step(shape, [reference, function], half - 1, 1, seed=3)
    step(shape, [reference, function], half, shape.capacity - half, seed=4)


VALID = {
    "query": torch.zeros(1, 3, 4, 8),
    "key": torch.zeros(1, 3, 2, 8),
    "value": torch.zeros(1, 3, 2, 8),
    "key_cache": torch.zeros(1, 2, 10, 8),
    "value_cache": torch.zeros(1, 2, 10, 8),
    "start_pos": torch.tensor([0]),
    "scale": None,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(1, 3, 4, 8).double()}, "query is torch.float64"),
        ({"value_cache": torch.zeros(1, 2, 10, 8).half()}, "value_cache is torch.float16"),
        ({"query": torch.zeros(3, 4, 8)}, r"query has shape \[3, 4, 8\]"),
        ({"query": torch.zeros(2, 3, 4, 8)}, r"query has shape \[2, 3, 4, 8\]"),
        ({"query": torch.zeros(1, 0, 4, 8)}, "at least one token"),
        ({"query": torch.zeros(1, 3, 3, 8)}, "3 query heads cannot share 2"),
        ({"key": torch.zeros(1, 2, 2, 8)}, r"key has shape \[1, 2, 2, 8\]"),
        ({"key": torch.zeros(1, 3, 2, 4)}, r"key has shape \[1, 3, 2, 4\]"),
        ({"value": torch.zeros(1, 3, 1, 8)}, r"value has shape \[1, 3, 1, 8\]"),
        ({"key_cache": torch.zeros(1, 1, 10, 8)}, r"key_cache has shape \[1, 1, 10, 8\]"),
        ({"value_cache": torch.zeros(1, 2, 9, 8)}, r"value_cache has shape \[1, 2, 9, 8\]"),
        (
            {"key_cache": torch.zeros(1, 2, 2, 8), "value_cache": torch.zeros(1, 2, 2, 8)},
            "3 tokens do not fit a cache of 2 positions",
        ),
        ({"start_pos": torch.tensor([0], dtype=torch.int32)}, "start_pos is torch.int32"),
        ({"start_pos": torch.tensor(0)}, r"start_pos has shape \[\]"),
        ({"start_pos": torch.tensor([0, 1])}, r"start_pos has shape \[2\]"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": math.inf}, "scale is inf"),
    ],
)
def test_eager_and_fake_reject_wrong_arguments(changes: dict, message: str) -> None:
    arguments = VALID | changes
    with pytest.raises(ValueError, match=message):
        sdpa_with_kv_cache(**arguments)
    on_meta = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        sdpa_with_kv_cache(**on_meta)


def test_fake_gives_the_shape_and_reads_no_values() -> None:
    arguments = VALID | {"start_pos": torch.tensor([10**6])}  # out of range, if it were read
    on_meta = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in arguments.items()}
    out = sdpa_with_kv_cache(**on_meta)
    assert out.shape == (1, 3, 4, 8)
    assert out.dtype == torch.float32


def test_out_variant() -> None:
    shape = SHAPES[1]
    inputs = shape.random(5, seed=1)
    expected = sdpa_with_kv_cache(*inputs, *shape.caches(0), torch.tensor([4]), scale=0.3)
    out = torch.empty_like(inputs[0])
    result = torch.ops.mvlm.sdpa_with_kv_cache.out(*inputs, *shape.caches(0), torch.tensor([4]), scale=0.3, out=out)
    assert result is out
    assert torch.equal(out, expected)
    with pytest.raises(ValueError, match=r"out has shape \[1, 4, 4, 80\]"):
        torch.ops.mvlm.sdpa_with_kv_cache.out(
            *inputs, *shape.caches(0), torch.tensor([4]), out=torch.empty(1, 4, 4, 80)
        )


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_opcheck(tokens: int, scale: float | None) -> None:
    shape = replace(SHAPES[1], capacity=12)
    arguments = (*shape.random(tokens, seed=1), *shape.caches(0), torch.tensor([3]))
    torch.library.opcheck(torch.ops.mvlm.sdpa_with_kv_cache.default, arguments, {"scale": scale})
    torch.library.opcheck(
        torch.ops.mvlm.sdpa_with_kv_cache.out,
        arguments,
        {"scale": scale, "out": torch.empty_like(arguments[0])},
        # Out variants are not meant for tracing: torch.compile has no functional form of them.
        test_utils=("test_schema", "test_faketensor"),
    )


class TwoLayers(torch.nn.Module):
    """The operator as a model uses it: on views of other operators' results, with caches per layer."""

    WIDTH, HEADS, KV_HEADS, CAPACITY = 24, 4, 2, 20

    def __init__(self) -> None:
        super().__init__()
        head_dim = self.WIDTH // self.HEADS
        self.qkv = torch.nn.ModuleList(
            torch.nn.Linear(self.WIDTH, (self.HEADS + 2 * self.KV_HEADS) * head_dim) for _ in range(2)
        )
        for name in ("k0", "v0", "k1", "v1"):
            cache = torch.zeros(1, self.KV_HEADS, self.CAPACITY, head_dim)
            self.register_buffer(name, cache)

    def forward(self, x: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[1]
        caches = ((self.k0, self.v0), (self.k1, self.v1))
        for qkv, (key_cache, value_cache) in zip(self.qkv, caches, strict=True):
            q, k, v = (
                part.view(1, tokens, -1, self.WIDTH // self.HEADS) for part in qkv(x).split([24, 12, 12], dim=-1)
            )
            attended = torch.ops.mvlm.sdpa_with_kv_cache(q, k, v, key_cache, value_cache, start_pos)
            x = x + attended.flatten(2)
        return x


def test_exported_model_equals_eager() -> None:
    torch.manual_seed(0)
    model = TwoLayers().eval()
    example = (torch.randn(1, 3, model.WIDTH), torch.tensor([0]))
    function = load(export(model, example, model.CAPACITY))
    position = 0
    for tokens in [9, 1, 1, 2, 6, 1]:
        inputs = (torch.randn(1, tokens, model.WIDTH), torch.tensor([position]))
        with torch.no_grad():
            torch.testing.assert_close(function(*inputs), model(*inputs), atol=1e-5, rtol=1e-5)
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
