"""How far two right computations of one model may be apart: as far as its own rounding takes it, measured in the test.

Kernels for one row and for many, and those of two CPUs, add up in different orders, so that their results differ in the
last bits of a float. Where activations or the KV cache have 8 bits, such a bit decides now and then to which step a
value is rounded, and what comes of it in the logits is as large as a step. No bound in bits of a float holds then, and
what one CPU was seen to do says nothing of another. What holds on every CPU is that such a difference is no larger than
the one that the model makes of a last bit of its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mvlm.export.checkpoint import Checkpoint
from mvlm.export.models import MobileVLM
from mvlm.export.quantize import meta_model
from mvlm.runtime.fidelity import snr_db

#: Logits [V] after embeddings [1, n, D] at a position and all that was read before.
TextDecoder = Callable[[Tensor, int], Tensor]

#: Runs of which the noise is the root mean square. A last bit may be without consequences in one run; each of these has
#: bits of its own.
RUNS = 8

#: How many times its own noise a model's logits may be away from those of other kernels. The noise is what last bits of
#: one place do, the input. Other kernels change last bits of every linear's result and every attention's: 8 places in
#: each of the demo's 4 layers. What comes of each adds up in power, and none has more layers behind it than the input,
#: so together they do at most sqrt(8 * 4) = 5.7 times as much. The rest is for results that differ by a few last bits
#: instead of one, sqrt(3) times as much.
MARGIN = 10.0

#: How many times its noise the likeliest token must lead by to be the likeliest for other kernels, too. Each of the two
#: logits is away by up to MARGIN times the noise, so their difference by sqrt(2) times that, as a standard deviation;
#: three of them are all but certain.
TIE = 3 * math.sqrt(2) * MARGIN


def root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def nudged(x: Tensor, seed: int = 0) -> Tensor:
    """Every float32 value moved by its last bit, up or down at random."""
    up = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.bool)
    return torch.nextafter(x, torch.where(up, math.inf, -math.inf))


def read(text_decoder: TextDecoder, parts: Sequence[Tensor]) -> Tensor:
    """Logits [n, V] after each of n parts, embeddings [1, l, D] that are read one behind another from position 0 on."""
    position, logits = 0, []
    for part in parts:
        logits.append(text_decoder(part, position).clone())
        position += part.shape[1]
    return torch.stack(logits)


def rounding_noise(text_decoder: TextDecoder, parts: Sequence[Tensor]) -> float:
    """Root mean square of what the logits after the parts change by when the last bit of every embedding does."""
    expected = read(text_decoder, parts)
    changes = [
        read(text_decoder, [nudged(part, RUNS * index + run) for index, part in enumerate(parts)]) - expected
        for run in range(RUNS)
    ]
    return root_mean_square(torch.stack(changes))


def least_lead(logits: Tensor) -> float:
    """The least by which the likeliest token leads the next one, of logits [..., V]."""
    first, second = logits.topk(2).values.unbind(-1)
    return float((first - second).min())


#: Between two computations whose roundings have nothing in common is the sum of both their noises, in dB; and by what
#: the power of one may differ from the other's.
TWO_ROUNDINGS = 3.0 + 0.5

#: MARGIN times as large last bits are 20 dB before the first rounding, and half of that behind it: a noise of e before
#: a rounding of step s moves a share of e / s of the values by s, so its power becomes e * s.
LAST_BITS = 10.0


def unrounded(model: MobileVLM, checkpoint: Checkpoint) -> MobileVLM:
    """What a quantized model would compute if activations were not rounded: the same weights, dequantized."""
    smooth = meta_model(checkpoint)
    for name, parameter in model.named_parameters():
        module_name, _, part = name.rpartition(".")
        values = parameter.dequantize() if hasattr(parameter, "qdata") else parameter
        setattr(smooth.get_submodule(module_name), part, nn.Parameter(values, requires_grad=False))
    return smooth


def two_roundings(smooth: Tensor, expected: Tensor) -> float:
    """The SNR in dB that any right program reaches against ``expected``, of quantized eager, however it rounds.

    Args:
        smooth: the same without rounding of activations.
        expected: with it.
    """
    return snr_db(smooth, expected) - TWO_ROUNDINGS


def last_bits(expected: Tensor, again: Tensor) -> float:
    """The SNR in dB that a right program reaches whose values differ in their last bits, where there are many of them.

    Args:
        expected: of quantized eager.
        again: the same from :func:`nudged` inputs.
    """
    return snr_db(expected, again) - LAST_BITS
