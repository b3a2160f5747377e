"""Which linears the model's answers depend on most, and to which of them more bits should go.

What rounding the weights of one linear does to the model's distribution is estimated before anything is rounded, with
one backward pass: of the change d that rounding brings to the linear's output for a token, the part that counts is its
product with the gradient g of the log probability of what the model itself would say. To second order the
Kullback-Leibler divergence is half the mean of (g d)^2, for g g' is the Fisher information
(https://arxiv.org/abs/2306.07629 weights single weights with its diagonal; here it is asked for whole linears).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mvlm.export.calibrate.branches import Stream, decoder_branches, token_weights
from mvlm.export.checkpoint import Checkpoint
from mvlm.export.models.mobilellama import DecoderLayer
from mvlm.export.progress import Progress, return_freed_memory
from mvlm.export.quantize import Scheme, meta_model, quantize_weight, stored_bytes

#: Tokens that are enough to rank some hundred linears; the streams of all layers are in memory at once.
TOKENS = 2048

#: How a linear is stored that gets more bits: as XNNPACK's other kind of quantized linear, with a scale per channel.
WIDE = Scheme(8)


def sensitivities(
    checkpoint: Checkpoint,
    schemes: Mapping[str, Scheme],
    stream: Stream,
    rope: tuple[Tensor, Tensor],
    generator: torch.Generator,
    progress: Progress,
) -> dict[str, float]:
    """Name of every linear in the language model's layers -> the divergence that its rounding alone would bring.

    Args:
        checkpoint: whose weights are read layer by layer, twice.
        schemes: of the linears.
        stream: some thousand tokens before the first layer; it is left as it is.
        rope: tables of cosines and sines, as long as the longest sequence.
        generator: of what the model says.
        progress: told the share that is done.

    Returns:
        Nats per token.
    """
    config = checkpoint.config.text
    device = stream.float32.device
    lengths = list(stream.lengths)

    layers = meta_model(checkpoint).language_model.layers

    def layer_of(index: int) -> DecoderLayer:
        return checkpoint.load_part(layers[index], f"language_model.layers.{index}", device)  # type: ignore[return-value]

    inputs = [stream.float32]
    with torch.no_grad():
        for index in range(config.num_hidden_layers):
            layer, x_TD = layer_of(index), inputs[-1]
            for branch in decoder_branches(layer, *rope):
                hidden = layer.get_submodule(branch.first)(branch.before(x_TD))
                x_TD = x_TD + layer.get_submodule(branch.second)(branch.between(hidden, lengths))
            inputs.append(x_TD)
            progress.share((index + 1) / (2 * config.num_hidden_layers))
    gradient_TD = _gradient_of_what_is_said(checkpoint, inputs.pop(), generator)

    result: dict[str, float] = {}
    for index in reversed(range(config.num_hidden_layers)):
        layer, x_TD = layer_of(index), inputs.pop()
        with torch.enable_grad():
            x_TD.requires_grad_()
            y_TD, watched = x_TD, []
            for branch in decoder_branches(layer, *rope):
                z = branch.before(y_TD)
                first = layer.get_submodule(branch.first)(z)
                watched.append((branch.first, z.detach(), first))
                z = branch.between(first, lengths)
                second = layer.get_submodule(branch.second)(z)
                watched.append((branch.second, z.detach(), second))
                y_TD = y_TD + second
            outputs = [output for _, _, output in watched]
            gradients = torch.autograd.grad(y_TD, [x_TD, *outputs], gradient_TD)
        gradient_TD = gradients[0]
        with torch.no_grad():
            for (path, z, _), gradient in zip(watched, gradients[1:], strict=True):
                name = f"language_model.layers.{index}.{path}"
                linear: nn.Linear = layer.get_submodule(path)  # type: ignore[assignment]
                weight = linear.weight.detach().cpu()
                importance = (z * token_weights(z)).square().mean(0).cpu()
                rounded, _ = quantize_weight(weight, schemes[name], importance)
                change = z @ (rounded.dequantize() - weight).to(device).T
                result[name] = float((gradient * change).sum(-1).square().mean()) / 2
        del layer, watched, outputs, gradients, y_TD, first, second, z
        return_freed_memory()
        progress.share(1 - index / (2 * config.num_hidden_layers))
    return dict(reversed(result.items()))


def _gradient_of_what_is_said(checkpoint: Checkpoint, x_TD: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient, by the last layer's outputs [T, D], of the log probability of a token drawn at each position."""
    device = x_TD.device
    norm = checkpoint.read("language_model.norm.weight").to(device)
    lm_head = checkpoint.read("language_model.lm_head.weight").to(device)
    result = torch.empty_like(x_TD)
    for part_TD, gradient_TD in zip(x_TD.split(256), result.split(256), strict=True):
        with torch.enable_grad():
            part_TD = part_TD.detach().requires_grad_()
            y_TD = nn.functional.rms_norm(part_TD, norm.shape, norm, checkpoint.config.text.rms_norm_eps)
            logp_TV = (y_TD @ lm_head.T).log_softmax(-1)
            said_T1 = torch.multinomial(logp_TV.detach().exp().cpu(), 1, generator=generator).to(device)
            gradient_TD.copy_(torch.autograd.grad(logp_TV.gather(1, said_T1).sum(), part_TD)[0])
    return result


def widen(
    sensitivity: Mapping[str, float],
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, torch.Size],
    budget: float,
) -> tuple[str, ...]:
    """The linears that should be :data:`WIDE`: those with most divergence per byte, as far as the budget goes.

    Args:
        sensitivity: of :func:`sensitivities`.
        schemes: of the linears as they are.
        shapes: of their weights.
        budget: bytes that may be added, as a share of the bytes of all of them.

    Returns:
        Their names, in the order of ``sensitivity``.
    """

    def bytes_of(name: str, scheme: Scheme) -> int:
        return stored_bytes(scheme, torch.empty(shapes[name], device="meta"))

    extra = {name: bytes_of(name, WIDE) - bytes_of(name, schemes[name]) for name in sensitivity}
    left = budget * sum(bytes_of(name, schemes[name]) for name in sensitivity)
    chosen = set()
    for name in sorted(sensitivity, key=lambda name: sensitivity[name] / extra[name], reverse=True):
        if extra[name] <= left:
            chosen.add(name)
            left -= extra[name]
    return tuple(name for name in sensitivity if name in chosen)
