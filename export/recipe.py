"""What is done to a model on its way into a ``.pte``, as data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from mvlm.export.errors import ExportError

if TYPE_CHECKING:
    from mvlm.export.models import MobileVLMConfig

#: ``--scales``: how the scale of a group of weights is chosen.
SCALE_ALGORITHMS = ("affine", "hqq", "search")
GROUP_SIZES = (32, 64, 128, 256)
LM_HEAD_BITS = (4, 8)
EMBEDDING_BITS = (4, 8, 32)
VISION_WEIGHTS = ("int4", "int8", "fp32")
KV_CACHES = ("fp32", "fp16", "int8")
ATTENTION_OPS = ("mvlm", "llama")
CALIBRATIONS = ("none", "quick", "full")


@dataclass(frozen=True)
class Recipe:
    """How to quantize and how long a sequence to plan for.

    Attributes:
        name: of the recipe, for people.
        group_size: weights that share a scale where weights have 4 bits, along the input width: 32, 64, 128 or 256.
            Where it does not divide a layer's width, the largest halving of it that does is taken.
        scales: ``search`` tries scales for each group and takes the one with the least error, weighted by what
            calibration knows of the inputs; ``hqq`` improves one scale until it stands still; ``affine`` takes it from
            the range.
        lm_head_bits: 4 (in groups) or 8 (one scale per vocabulary entry).
        embedding_bits: of the token embedding: 8 (one scale per token), 4 (in groups of 32) or 32 (float32).
        vision: weights of the vision tower's and the projector's linears: ``int8`` (one scale per output channel),
            ``int4`` (in groups) or ``fp32``.
        kv_cache: how keys and values are remembered: ``int8`` (one scale per token and head), ``fp16`` or ``fp32``.
        max_context_len: positions of the KV cache: prompt, picture and answer together.
        prefill_chunk: tokens that the language model reads at once; a longer prompt is read in several steps. Memory
            for activations grows with it.
        attention_op: ``mvlm`` for our fused operators; ``llama`` for ExecuTorch's attention and none of ours, so that
            programs without our kernels run the file. ExecuTorch's keeps keys and values in float32.
        bits_budget: bytes that may be added to the language model's layers, as a share of theirs, to give 8 bits to
            those linears that need them most; which they are, calibration finds out, and only ``full`` looks for them.
        eight_bit_linears: names of the language model's linears that have 8 bits instead of 4, with a scale per output
            channel: ``language_model.layers.3.mlp.down_proj`` for example.
        calibration: what is known of the linears' inputs when their weights are quantized: ``none``; with ``quick``
            how much power each has, which weights the search for scales; with ``full`` what GPTQ wants.
    """

    name: str = "mobile"
    group_size: int = 32
    scales: str = "search"
    lm_head_bits: int = 8
    embedding_bits: int = 8
    vision: str = "int8"
    kv_cache: str = "int8"
    max_context_len: int = 768
    prefill_chunk: int = 256
    attention_op: str = "mvlm"
    calibration: str = "none"
    bits_budget: float = 0.0
    eight_bit_linears: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, value, allowed in (
            ("group size", self.group_size, GROUP_SIZES),
            ("scales", self.scales, SCALE_ALGORITHMS),
            ("bits of lm_head", self.lm_head_bits, LM_HEAD_BITS),
            ("bits of the embedding", self.embedding_bits, EMBEDDING_BITS),
            ("vision weights", self.vision, VISION_WEIGHTS),
            ("KV cache", self.kv_cache, KV_CACHES),
            ("attention operator", self.attention_op, ATTENTION_OPS),
            ("calibration", self.calibration, CALIBRATIONS),
        ):
            if value not in allowed:
                raise ExportError(f"{what}: {value!r} is not possible; choose one of {', '.join(map(str, allowed))}")
        if self.attention_op == "llama" and self.kv_cache != "fp32":
            raise ExportError(
                f"KV cache {self.kv_cache} is not possible with attention operator llama: ExecuTorch's own attention "
                "reads float32; choose fp32, or attention operator mvlm"
            )
        if self.calibration != "none" and self.scales != "search":
            raise ExportError(
                f"scales {self.scales} are not possible with calibration, which searches for scales itself; leave "
                "--scales out, or --calibrate"
            )
        if not 0 <= self.bits_budget <= 1:
            raise ExportError(f"bits budget {self.bits_budget:+.0%} is not possible: +0% to +100%")
        if self.max_context_len < 2:
            raise ExportError(
                f"max context length {self.max_context_len} is too short: a prompt and an answer need 2 at least"
            )
        if self.prefill_chunk < 1:
            raise ExportError(f"prefill chunk {self.prefill_chunk} is not possible: one token at least is read at once")

    def max_seq_len(self, config: MobileVLMConfig) -> int:
        """Tokens of a call of ``text_decoder`` at the most.

        A picture's fit at least, because ExecuTorch's own multimodal runner hands them over in one call.
        """
        return min(self.max_context_len, max(self.prefill_chunk, config.num_image_tokens))

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: ``text`` is no JSON, or has other fields than a recipe.
        """
        try:
            values = json.loads(text)
            return cls(**values | {"eight_bit_linears": tuple(values.get("eight_bit_linears", ()))})
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{text} is no recipe: {error}") from error


def mobile() -> Recipe:
    """For phones: 8da4w language model with 8-bit lm_head, 8-bit embedding, int8 vision and KV cache, 768 positions."""
    return Recipe()


def small() -> Recipe:
    """The smallest file: 4 bits everywhere, in large groups."""
    return Recipe(name="small", group_size=128, lm_head_bits=4, embedding_bits=4, vision="int4")


def accurate() -> Recipe:
    """The closest to float32 that is still fast: when calibrated, 8 bits where they matter most; an fp16 KV cache."""
    return Recipe(name="accurate", kv_cache="fp16", bits_budget=0.2)


#: Named recipes, for the command line.
RECIPES = {recipe.__name__: recipe for recipe in (mobile, small, accurate)}
