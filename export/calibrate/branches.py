"""A stack of transformer layers, twice over: as it is, and as it becomes when it is quantized.

What flows through are two streams of the same calibration tokens. The float one says what each linear should give; the
quantized one, what it will be given. Linears are quantized one after another, each with inputs that all those before
it, quantized already, have made. In memory are the layer at work and the two streams, nothing else.

Layers of MobileLLaMA and of CLIP are alike from here: two branches after each other, each a norm, a linear, something
without weights, and a second linear whose outputs are added to the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import mvlm.ops
from mvlm.export.models.clip import CLIPEncoderLayer
from mvlm.export.models.mobilellama import DecoderLayer, causal_attention

#: Tokens that pass through a layer together: enough for matrix products at full speed, and little memory.
CHUNK_TOKENS = 2048


@dataclass
class Stream:
    """Calibration tokens on their way through a stack, in the float and in the quantized model.

    Attributes:
        float32: [T, D], all sequences one after another.
        quantized: the same in the quantized model.
        lengths: of the sequences, whose sum is T; each begins at position 0 and sees none of the others.
    """

    float32: Tensor
    quantized: Tensor
    lengths: Sequence[int]

    def chunks(self) -> Iterator[tuple[slice, list[int]]]:
        """Parts of whole sequences, of about :data:`CHUNK_TOKENS`: where they lie, and their lengths."""
        start = stop = 0
        lengths: list[int] = []
        for length in self.lengths:
            if lengths and stop - start + length > CHUNK_TOKENS:
                yield slice(start, stop), lengths
                start, lengths = stop, []
            stop += length
            lengths.append(length)
        if lengths:
            yield slice(start, stop), lengths


def token_weights(x_TI: Tensor) -> Tensor:
    """By what each token's inputs are multiplied so that all tokens count the same: [T, 1].

    A few tokens of a Llama, the first of a text above all, have inputs with thousands of times the power of the others'
    ("massive activations", https://arxiv.org/abs/2402.17762). Without weights the sums over tokens are almost theirs
    alone, and weights would be rounded for the sake of the one token that says nothing.
    """
    return x_TI.square().mean(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny).rsqrt_()


class Moments:
    """Sums over tokens of what a linear's inputs are: Z'Z and, for the correction of targets, (X - Z)'Z.

    X are the float model's inputs and Z those of the quantized model, both [tokens, in], each token with the weight
    that :func:`token_weights` gives it in the float model.

    Attributes:
        hessian: Z'Z [in, in]; complete after :meth:`finish`.
        cross: (X - Z)'Z [in, in].
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.hessian = torch.zeros(width, width, device=device)
        self.cross = torch.zeros(width, width, device=device)

    def add(self, x_TI: Tensor, z_TI: Tensor) -> None:
        weights_T1 = token_weights(x_TI)
        z_TI = z_TI * weights_T1
        # It is symmetric: of each strip of columns only what is not below the diagonal is summed.
        width = self.hessian.shape[0]
        strip = max(256, width // 8)
        for start in range(0, width, strip):
            stop = min(start + strip, width)
            self.hessian[:stop, start:stop].addmm_(z_TI[:, :stop].T, z_TI[:, start:stop])
        self.cross.addmm_((x_TI * weights_T1 - z_TI).T, z_TI)

    def finish(self) -> None:
        self.hessian = self.hessian.triu_() + self.hessian.triu(1).T


#: Takes a linear's name in its layer, the linear, and the moments of its inputs unless nobody wants them; gives the
#: float32 weight that the linear has when it is quantized.
Quantize = Callable[[str, nn.Linear, Moments | None], Tensor]


@dataclass(frozen=True)
class Branch:
    """One of the two branches of a layer: ``stream += second(between(first(before(stream))))``.

    Attributes:
        first: name of the first linear in the layer.
        second: name of the second.
        before: the norm.
        between: from outputs [T, ...] of the first linear, and the lengths of the sequences, to inputs of the second.
    """

    first: str
    second: str
    before: Callable[[Tensor], Tensor]
    between: Callable[[Tensor, Sequence[int]], Tensor]


def decoder_branches(layer: DecoderLayer, cos_CR: Tensor, sin_CR: Tensor) -> tuple[Branch, Branch]:
    """Those of a layer of MobileLLaMA, with rotary tables as long as the longest sequence."""

    def attention(qkv_TP: Tensor, lengths: Sequence[int]) -> Tensor:
        parts = qkv_TP.split(list(lengths))
        return torch.cat(
            [causal_attention(*layer.self_attn.split_heads(one[None]), cos_CR, sin_CR)[0] for one in parts]
        )

    def swiglu(gate_up_TP: Tensor, lengths: Sequence[int]) -> Tensor:
        return mvlm.ops.swiglu(gate_up_TP)

    return (
        Branch("self_attn.qkv_proj", "self_attn.o_proj", layer.input_layernorm, attention),
        Branch("mlp.gate_up_proj", "mlp.down_proj", layer.post_attention_layernorm, swiglu),
    )


def encoder_branches(layer: CLIPEncoderLayer) -> tuple[Branch, Branch]:
    """Those of a layer of CLIP; all sequences have the same length, a picture's patches and the class token."""

    def attention(qkv_TP: Tensor, lengths: Sequence[int]) -> Tensor:
        qkv_BLP = qkv_TP.unflatten(0, (len(lengths), -1))
        return mvlm.ops.attention(qkv_BLP, layer.self_attn.num_heads).flatten(0, 1)

    def activation(x_TF: Tensor, lengths: Sequence[int]) -> Tensor:
        return layer.mlp.activation(x_TF)

    return (
        Branch("self_attn.qkv_proj", "self_attn.out_proj", layer.layer_norm1, attention),
        Branch("mlp.fc1", "mlp.fc2", layer.layer_norm2, activation),
    )


def fake_quantized_activations(x_TI: Tensor) -> Tensor:
    """Inputs as an 8-bit dynamically quantized linear sees them: with a scale and a zero point for each token.

    The same as torchao's ``int8_asym_per_token``, in whose range there is always zero.
    """
    low = x_TI.amin(-1, keepdim=True).clamp_max_(0)
    high = x_TI.amax(-1, keepdim=True).clamp_min_(0)
    scale = ((high - low) / 255).clamp_min_(torch.finfo(torch.float32).eps)
    zero = (-128 - (low / scale).round_()).clamp_(-128, 127)
    return (x_TI / scale).round_().add_(zero).clamp_(-128, 127).sub_(zero).mul_(scale)


def pass_branch(
    stream: Stream,
    layer: nn.Module,
    branch: Branch,
    quantize: Quantize,
    with_moments: bool,
    with_int8_activations: bool,
) -> None:
    """Quantizes both linears of a branch, and moves both streams behind it, in place.

    What the second linear gets is computed again when it is needed again: it may be several times as wide as a stream,
    and remembering it would take more memory than all else.

    Args:
        stream: before the branch.
        layer: whose branch it is, float32.
        branch: of it.
        quantize: called for the first linear, then for the second.
        with_moments: whether it wants moments.
        with_int8_activations: whether the quantized linears round their inputs to 8 bits. The moments are of inputs
            that are not rounded: with them the result is as good, and they cost less.
    """

    def given(z: Tensor) -> Tensor:
        return fake_quantized_activations(z) if with_int8_activations else z

    device = stream.float32.device
    first: nn.Linear = layer.get_submodule(branch.first)  # type: ignore[assignment]
    second: nn.Linear = layer.get_submodule(branch.second)  # type: ignore[assignment]

    moments = Moments(first.in_features, device) if with_moments else None
    if moments is not None:
        for at, _ in stream.chunks():
            moments.add(branch.before(stream.float32[at]), branch.before(stream.quantized[at]))
        moments.finish()
    first_weight = quantize(branch.first, first, moments)
    del moments

    def input_of_second(at: slice, lengths: Sequence[int]) -> Tensor:
        z = given(branch.before(stream.quantized[at]))
        return branch.between(nn.functional.linear(z, first_weight, first.bias), lengths)

    moments = Moments(second.in_features, device) if with_moments else None
    for at, lengths in stream.chunks():
        x = branch.between(first(branch.before(stream.float32[at])), lengths)
        if moments is not None:
            moments.add(x, input_of_second(at, lengths))
        stream.float32[at] += second(x)
    if moments is not None:
        moments.finish()
    second_weight = quantize(branch.second, second, moments)
    del moments
    for at, lengths in stream.chunks():
        z = given(input_of_second(at, lengths))
        stream.quantized[at] += nn.functional.linear(z, second_weight, second.bias)
