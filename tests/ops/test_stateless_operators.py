"""Norms, activations and depthwise convolution, eager and native, against torch's and transformers' own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import mvlm.ops

EPS = 1e-5


def random(*shape: int, seed: int = 0, mean: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean


# --- The operators as modules, and what they must equal, computed in float64 ---


class Norm(nn.Module):
    """One of the four norms, with random parameters."""

    def __init__(self, operator: Callable, width: int) -> None:
        super().__init__()
        self.operator = operator
        names = ("weight", "bias") if "layer" in operator.__name__ else ("weight",)
        for seed, name in enumerate(names):
            self.register_buffer(name, random(width, seed=100 + seed, mean=1.0))

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.operator(*tensors, *self.buffers(), EPS)


class Activation(nn.Module):
    def __init__(self, operator: Callable) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x)


def rms_oracle(x: Tensor, weight: Tensor) -> Tensor:
    """By transformers, which computes in float32 whatever it is given."""
    norm = LlamaRMSNorm(weight.numel(), EPS)
    norm.weight.data = weight
    return norm(x).detach()


def layer_oracle(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    parameters = (x.double(), weight.shape, weight.double(), bias.double())
    return nn.functional.layer_norm(*parameters, EPS).float()


def swiglu_oracle(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return (nn.functional.silu(gate) * up).float()


def quick_gelu_oracle(x: Tensor) -> Tensor:
    return QuickGELUActivation()(x.double()).float()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)


# --- Programs ---


def export(module: nn.Module, example: tuple[Tensor, ...], most_tokens: int | None) -> bytes:
    """The .pte of a module whose inputs have 1 to ``most_tokens`` tokens in dim 1, or as many as the example."""
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    shapes = None
    if most_tokens is not None:
        tokens = torch.export.Dim("tokens", min=1, max=most_tokens)
        shapes = tuple({1: tokens} for _ in example)
        if isinstance(module, Norm):
            shapes = (shapes,)  # its forward has one argument, of any number of tensors
    program = torch.export.export(module, example, dynamic_shapes=shapes)
    lowered = to_edge_transform_and_lower(program, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    config = ExecutorchBackendConfig(sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass())
    return lowered.to_executorch(config).buffer


def native(module: nn.Module, example: tuple[Tensor, ...], most_tokens: int | None = None) -> Callable:
    """The module's forward as an exported program on ExecuTorch's runtime; gives the list of its results."""
    from executorch.runtime import Runtime

    mvlm.ops.load_native_library()
    program = Runtime.get().load_program(export(module, example, most_tokens))
    method = program.load_method("forward")

    def forward(*inputs: Tensor) -> list[Tensor]:
        assert program is not None  # The method does not keep the program's bytes alive; we do.
        return [result.clone() for result in method.execute(inputs)]

    return forward


def eager(module: nn.Module, _example: tuple[Tensor, ...], _most_tokens: int | None = None) -> Callable:
    def forward(*inputs: Tensor) -> list[Tensor]:
        results = module(*inputs)
        return [results] if torch.is_tensor(results) else list(results)

    return forward


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [eager, native])
MOST_TOKENS = 300  # enough for the kernels to use every thread, at the largest width


@IMPLEMENTATIONS
@pytest.mark.parametrize("width", [1, 7, 64, 1030])
@pytest.mark.parametrize(("operator", "oracle"), [(mvlm.ops.rms_norm, rms_oracle), (mvlm.ops.layer_norm, layer_oracle)])
def test_norms(operator: Callable, oracle: Callable, width: int, implementation: Callable) -> None:
    module = Norm(operator, width)
    forward = implementation(module, (random(1, 2, width),), MOST_TOKENS)
    for tokens in (1, 5, MOST_TOKENS):
        x = random(1, tokens, width, seed=tokens)
        (result,) = forward(x)
        assert_close(result, oracle(x, *module.buffers()))


@IMPLEMENTATIONS
@pytest.mark.parametrize("width", [1, 7, 64, 1030])
@pytest.mark.parametrize(
    ("operator", "oracle"), [(mvlm.ops.add_rms_norm, rms_oracle), (mvlm.ops.add_layer_norm, layer_oracle)]
)
def test_norms_that_add(operator: Callable, oracle: Callable, width: int, implementation: Callable) -> None:
    module = Norm(operator, width)
    forward = implementation(module, (random(1, 2, width), random(1, 2, width)), MOST_TOKENS)
    for tokens in (1, 5, MOST_TOKENS):
        x, residual = (random(1, tokens, width, seed=tokens + i) for i in range(2))
        total, normalized = forward(x, residual)
        assert torch.equal(total, x + residual)
        assert_close(normalized, oracle(x + residual, *module.buffers()))


def test_native_layer_norm_is_precise_with_a_large_mean() -> None:
    """More so than torch's, which the eager reference is: its error is 60 times the tolerance here."""
    module = Norm(mvlm.ops.layer_norm, 1024)
    x = random(1, 50, 1024) * 0.1 + 1000
    (result,) = native(module, (x,))(x)
    assert_close(result, layer_oracle(x, *module.buffers()))


@IMPLEMENTATIONS
@pytest.mark.parametrize("width", [1, 7, 64, 1030])
def test_swiglu(width: int, implementation: Callable) -> None:
    forward = implementation(Activation(mvlm.ops.swiglu), (random(1, 2, 2 * width),), MOST_TOKENS)
    for tokens in (1, 5, MOST_TOKENS):
        x = 4 * random(1, tokens, 2 * width, seed=tokens)
        (result,) = forward(x)
        assert_close(result, swiglu_oracle(x))


@IMPLEMENTATIONS
@pytest.mark.parametrize("width", [1, 7, 64, 1030])
def test_quick_gelu(width: int, implementation: Callable) -> None:
    forward = implementation(Activation(mvlm.ops.quick_gelu), (random(1, 2, width),), MOST_TOKENS)
    for tokens in (1, 5, MOST_TOKENS):
        x = 4 * random(1, tokens, width, seed=tokens)
        (result,) = forward(x)
        assert_close(result, quick_gelu_oracle(x))


@IMPLEMENTATIONS
def test_quick_gelu_of_large_numbers(implementation: Callable) -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[[50.0, 1e3, 1e30, largest, -50.0, -1e3, -1e30, -largest, 0.0]]])
    (result,) = implementation(Activation(mvlm.ops.quick_gelu), (x,))(x)
    torch.testing.assert_close(result, x.clamp(min=0), atol=1e-34, rtol=0)


class Convolution(nn.Module):
    """The operator with torch's own convolution as the oracle."""

    def __init__(self, channels: int, grid: tuple[int, int], kernel: tuple[int, int], stride: int, padding: int):
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels, bias=padding > 0)
        self.weight = nn.Parameter(self.conv.weight.detach().squeeze(1).permute(1, 2, 0).contiguous())
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        stride, padding = self.conv.stride[0], self.conv.padding[0]
        return mvlm.ops.depthwise_conv2d(x, self.weight, self.conv.bias, self.grid[1], stride, padding)

    def oracle(self, x: Tensor) -> Tensor:
        channels_first = x.transpose(1, 2).unflatten(2, self.grid)
        return self.conv(channels_first).flatten(2).transpose(1, 2).contiguous()


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("channels", "grid", "kernel", "stride", "padding"),
    [
        (260, (24, 24), (3, 3), 1, 1),
        (260, (24, 24), (3, 3), 2, 1),
        (260, (24, 24), (2, 2), 2, 0),
        (260, (12, 12), (3, 3), 1, 1),
        (5, (3, 8), (3, 2), 1, 1),
        (1, (4, 9), (1, 5), 3, 0),
        (9, (1, 1), (3, 3), 1, 1),
    ],
    ids=str,
)
def test_depthwise_conv2d(channels, grid, kernel, stride, padding, implementation: Callable) -> None:
    torch.manual_seed(0)
    module = Convolution(channels, grid, kernel, stride, padding)
    x = random(1, grid[0] * grid[1], channels)
    (result,) = implementation(module, (x,))(x)
    assert_close(result, module.oracle(x))


def test_depthwise_conv2d_averages() -> None:
    x = random(2, 6 * 4, 10)
    result = mvlm.ops.depthwise_conv2d(x, torch.full((2, 2, 10), 0.25), None, 4, 2, 0)
    pooled = nn.functional.avg_pool2d(x.transpose(1, 2).unflatten(2, (6, 4)), 2)
    assert_close(result, pooled.flatten(2).transpose(1, 2).contiguous())


class Block(nn.Module):
    """The operators as a model uses them: on each other's results, each of the sum and the norm used later."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = Norm(mvlm.ops.rms_norm, width), Norm(mvlm.ops.add_rms_norm, width)
        self.last = Norm(mvlm.ops.add_layer_norm, width)
        self.up, self.down = nn.Linear(width, 6 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        branch = mvlm.ops.quick_gelu(self.first(x))
        x, normalized = self.second(branch, x)
        x, normalized = self.last(self.down(mvlm.ops.swiglu(self.up(normalized))), x)
        return normalized - x, x


def test_exported_model_equals_eager() -> None:
    torch.manual_seed(0)
    module = Block(24).eval()
    forward = native(module, (random(1, 3, 24),), 40)
    for tokens in (1, 17, 40, 2):
        x = random(1, tokens, 24, seed=tokens)
        with torch.no_grad():
            expected = module(x)
        for actual, wanted in zip(forward(x), expected, strict=True):
            torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "swiglu", "quick_gelu"])
def test_references_are_captured_in_place_of_operators(name: str) -> None:
    """What is captured holds torch's operators alone, and computes the same."""

    class Module(nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor | tuple[Tensor, ...]:
            return getattr(mvlm.ops, name)(*arguments, *(value for value in VALID[name] if value is EPS))

    tensors = tuple(value for value in VALID[name] if torch.is_tensor(value))
    with mvlm.ops.References():
        program = torch.export.export(Module(), tensors, strict=False)
    assert not [node for node in program.graph.nodes if str(node.target).startswith("mvlm")]
    results = program.module()(*tensors)
    for actual, wanted in zip([results] if torch.is_tensor(results) else results, call(name, VALID[name]), strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-6, rtol=1e-6)
    with mvlm.ops.References(), pytest.raises(ValueError, match=rf"mvlm::{name}: \w+ is torch\.float64"):
        getattr(mvlm.ops, name)(VALID[name][0].double(), *VALID[name][1:])


# --- Schemas, shapes and wrong arguments ---

VALID = {
    "rms_norm": (random(2, 3, 8), random(8), EPS),
    "layer_norm": (random(2, 3, 8), random(8), random(8), EPS),
    "add_rms_norm": (random(2, 3, 8), random(2, 3, 8), random(8), EPS),
    "add_layer_norm": (random(2, 3, 8), random(2, 3, 8), random(8), random(8), EPS),
    "swiglu": (random(2, 3, 8),),
    "quick_gelu": (random(2, 3, 8),),
    "depthwise_conv2d": (random(2, 6, 5), random(3, 2, 5), random(5), 2, 1, 1),
}
EVERY_OPERATOR = pytest.mark.parametrize("name", VALID)


def out_names(name: str) -> list[str]:
    return ["out0", "out1"] if name.startswith("add_") else ["out"]


def call(name: str, arguments: tuple) -> list[Tensor]:
    results = getattr(mvlm.ops, name)(*arguments)
    return [results] if torch.is_tensor(results) else list(results)


@EVERY_OPERATOR
def test_opcheck(name: str) -> None:
    operator = getattr(torch.ops.mvlm, name)
    torch.library.opcheck(operator.default, VALID[name])
    outs = {out: torch.empty_like(x) for out, x in zip(out_names(name), call(name, VALID[name]), strict=True)}
    # Out variants are not meant for tracing: torch.compile has no functional form of them.
    torch.library.opcheck(operator.out, VALID[name], outs, test_utils=("test_schema", "test_faketensor"))


@EVERY_OPERATOR
def test_out_variant(name: str) -> None:
    expected = call(name, VALID[name])
    operator = getattr(torch.ops.mvlm, name).out
    outs = {out: torch.empty_like(x) for out, x in zip(out_names(name), expected, strict=True)}
    operator(*VALID[name], **outs)
    for actual, wanted in zip(outs.values(), expected, strict=True):
        assert torch.equal(actual, wanted)
    for out in outs:
        with pytest.raises(ValueError, match=rf"mvlm::{name}: {out} has shape \[2, 1\]; it must be \[2, "):
            operator(*VALID[name], **(outs | {out: torch.empty(2, 1)}))
        with pytest.raises(ValueError, match=f"{out} is torch.float64"):
            operator(*VALID[name], **(outs | {out: outs[out].double()}))


@EVERY_OPERATOR
def test_fake_gives_the_shapes(name: str) -> None:
    on_meta = tuple(x.to("meta") if torch.is_tensor(x) else x for x in VALID[name])
    for actual, expected in zip(call(name, on_meta), call(name, VALID[name]), strict=True):
        assert (actual.shape, actual.dtype, actual.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [
        ("rms_norm", 0, random(2, 3, 8).double(), "input is torch.float64"),
        ("rms_norm", 0, torch.tensor(1.0), r"input has shape \[\]"),
        ("rms_norm", 0, random(2, 0), "last dimension of at least 1"),
        ("rms_norm", 1, random(7), r"weight has shape \[7\]; with input \[2, 3, 8\] it must be \[8\]"),
        ("rms_norm", 1, random(1, 8), r"weight has shape \[1, 8\]"),
        ("rms_norm", 1, random(8).half(), "weight is torch.float16"),
        ("rms_norm", 2, -1e-6, "eps is -1e-06"),
        ("rms_norm", 2, math.nan, "eps is nan"),
        ("layer_norm", 2, random(7), r"bias has shape \[7\]"),
        ("layer_norm", 2, random(8).double(), "bias is torch.float64"),
        ("layer_norm", 3, math.inf, "eps is inf"),
        ("add_rms_norm", 1, random(2, 2, 8), r"residual has shape \[2, 2, 8\]; it must be that of input, \[2, 3, 8\]"),
        ("add_rms_norm", 1, random(2, 3, 8).double(), "residual is torch.float64"),
        ("add_layer_norm", 1, random(8), r"residual has shape \[8\]"),
        ("add_layer_norm", 3, random(9), r"bias has shape \[9\]"),
        ("swiglu", 0, random(2, 3, 7), r"gate_up has shape \[2, 3, 7\]; .* even"),
        ("swiglu", 0, random(2, 0), "at least 2"),
        ("swiglu", 0, torch.tensor(1.0), r"gate_up has shape \[\]"),
        ("swiglu", 0, random(2, 8).double(), "gate_up is torch.float64"),
        ("quick_gelu", 0, random(2, 8).bfloat16(), "input is torch.bfloat16"),
        ("depthwise_conv2d", 0, random(6, 5), r"input has shape \[6, 5\]"),
        ("depthwise_conv2d", 0, random(1, 0, 5), r"input has shape \[1, 0, 5\]"),
        ("depthwise_conv2d", 0, random(2, 6, 5).double(), "input is torch.float64"),
        ("depthwise_conv2d", 1, random(3, 2, 4), r"weight has shape \[3, 2, 4\]; .* \[1 or more, 1 or more, 5\]"),
        ("depthwise_conv2d", 1, random(5, 1, 3, 2), r"weight has shape \[5, 1, 3, 2\]"),
        ("depthwise_conv2d", 2, random(4), r"bias has shape \[4\]"),
        ("depthwise_conv2d", 2, random(5).double(), "bias is torch.float64"),
        ("depthwise_conv2d", 3, 4, "grid_width is 4; with 6 tokens"),
        ("depthwise_conv2d", 3, 0, "grid_width is 0"),
        ("depthwise_conv2d", 4, 0, "stride is 0"),
        ("depthwise_conv2d", 5, -1, "padding is -1; .* from 0 to 1"),
        ("depthwise_conv2d", 5, 2, "padding is 2"),
        ("depthwise_conv2d", 1, random(6, 2, 5), "a kernel of 6 x 2 does not fit a grid of 3 x 2 with padding 1"),
    ],
)
def test_eager_and_fake_reject_wrong_arguments(name: str, position: int, value, message: str) -> None:
    arguments = (*VALID[name][:position], value, *VALID[name][position + 1 :])
    for given in (arguments, tuple(x.to("meta") if torch.is_tensor(x) else x for x in arguments)):
        with pytest.raises(ValueError, match=f"mvlm::{name}: .*{message}"):
            call(name, given)


def test_operators_take_any_leading_shape() -> None:
    for shape in [(8,), (0, 8), (2, 1, 3, 8)]:
        x = random(*shape)
        assert_close(mvlm.ops.rms_norm(x, random(8), EPS), rms_oracle(x, random(8)))
        assert_close(mvlm.ops.swiglu(x), swiglu_oracle(x))
        assert_close(mvlm.ops.quick_gelu(x), quick_gelu_oracle(x))
    assert_close(mvlm.ops.quick_gelu(torch.tensor(0.5)), quick_gelu_oracle(torch.tensor(0.5)))
