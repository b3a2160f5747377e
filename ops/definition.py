"""How the operators without state are defined: schema, eager reference and shape function from one description."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

#: Operators that a :class:`References` mode replaces, by what it calls in their place.
_references: dict[Callable[..., Any], Callable[..., Any]] = {}

#: Kept for the life of the process: the operators go away with it.
_library = torch.library.Library("mvlm", "FRAGMENT")


def require(condition: bool, operator: str, message: str) -> None:
    """Raises ValueError, which says what was given and what is allowed, unless the condition holds."""
    if not condition:
        raise ValueError(f"mvlm::{operator}: {message}")


def require_float32(operator: str, **tensors: torch.Tensor | None) -> None:
    """Checks the type of every tensor given, by the name it is given under."""
    for name, tensor in tensors.items():
        if tensor is not None:
            require(tensor.dtype == torch.float32, operator, f"{name} is {tensor.dtype}; it must be torch.float32")


def require_eps(operator: str, eps: float) -> None:
    """Checks what norms add to a variance or mean square."""
    require(math.isfinite(eps) and eps >= 0, operator, f"eps is {eps}; it must be finite and not negative")


def make_differentiable(operator: str, eager: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]) -> None:
    """Gives ``mvlm::<operator>`` a gradient, that of its eager reference, which is run again for it.

    Models are trained through the operators they are exported with.
    """

    def remember(ctx, inputs, output, keyword_only_inputs=None):
        ctx.arguments, ctx.keywords = inputs, keyword_only_inputs or {}

    def backward(ctx, *gradients):
        inputs = [value.detach() if isinstance(value, torch.Tensor) else value for value in ctx.arguments]
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad) if needed]
        with torch.enable_grad():
            for index in wanted:
                inputs[index].requires_grad_()
            results = eager(*inputs, **ctx.keywords)
            results = results if isinstance(results, tuple) else (results,)
            computed = torch.autograd.grad(results, [inputs[index] for index in wanted], gradients)
        found = dict(zip(wanted, computed, strict=True))
        return tuple(found.get(index) for index in range(len(inputs)))

    torch.library.register_autograd(f"mvlm::{operator}", backward, setup_context=remember, lib=_library)


class References(TorchFunctionMode):
    """While it is active, calls of the operators without state run their eager references instead.

    What ``torch.export`` captures in it holds torch's own operators in place of ours, for programs that run where our
    kernels are not.
    """

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        return _references.get(function, function)(*arguments, **(keywords or {}))


def add_reference(operator: str, eager: Callable[..., Any]) -> None:
    """Makes :class:`References` know ``mvlm::<operator>``."""
    _references[getattr(torch.ops.mvlm, operator)] = eager


def define(
    operator: str,
    arguments: str,
    shapes: Callable[..., Sequence[Sequence[int]]],
    eager: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    results: Sequence[str] = ("",),
) -> None:
    """Registers ``mvlm::<operator>`` and ``mvlm::<operator>.out``.

    The kernel of the second is what a .pte runs: ExecuTorch's memory planning turns the first into it. Its outputs are
    called ``out``, or, if there are several, ``out0``, ``out1`` and so on, as those of torch's own operators are.

    Args:
        operator: its name without ``mvlm::``.
        arguments: of the schema. They are positional and without defaults; the first is a float32 tensor.
        shapes: takes the arguments, raises ValueError unless they are allowed, and returns the shape of each result.
        eager: takes the arguments, once they are checked, and returns the result or the results.
        results: a name for each result; the name of a single one may be empty.
    """
    outs = ["out"] if len(results) == 1 else [f"out{i}" for i in range(len(results))]
    aliases = [f"Tensor({letter}!)" for letter, _ in zip("abcdefgh", outs, strict=False)]
    declared = ", ".join(f"{alias} {out}" for alias, out in zip(aliases, outs, strict=True))
    returned = ", ".join(f"Tensor {name}".rstrip() for name in results)
    _library.define(f"{operator}({arguments}) -> ({returned})", tags=(torch.Tag.pt2_compliant_tag,))
    _library.define(f"{operator}.out({arguments}, *, {declared}) -> ({', '.join(aliases)})")

    def checked_eager(*inputs):
        shapes(*inputs)
        return eager(*inputs)

    def fake(*inputs):
        """Shapes only, for tracing and memory planning."""
        tensors = tuple(inputs[0].new_empty(shape) for shape in shapes(*inputs))
        return tensors[0] if len(tensors) == 1 else tensors

    def checked_outs(inputs, tensors):
        """The tensors that the results go to, in order."""
        for name, shape in zip(outs, shapes(*inputs), strict=True):
            require_float32(operator, **{name: tensors[name]})
            require(
                tensors[name].shape == torch.Size(shape),
                operator,
                f"{name} has shape {list(tensors[name].shape)}; it must be {list(shape)}",
            )
        return tuple(tensors[name] for name in outs)

    def eager_out(*inputs, **tensors):
        given = checked_outs(inputs, tensors)
        computed = eager(*inputs)
        for tensor, result in zip(given, (computed,) if len(given) == 1 else computed, strict=True):
            tensor.copy_(result)
        return given[0] if len(given) == 1 else given

    def fake_out(*inputs, **tensors):
        given = checked_outs(inputs, tensors)
        return given[0] if len(given) == 1 else given

    _library.impl(operator, checked_eager, "CompositeExplicitAutograd")
    _library.impl(f"{operator}.out", eager_out, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mvlm::{operator}", fake, lib=_library)
    torch.library.register_fake(f"mvlm::{operator}.out", fake_out, lib=_library)
    make_differentiable(operator, eager)
    add_reference(operator, checked_eager)
