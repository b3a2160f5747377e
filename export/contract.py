"""The names inside an mvlm ``.pte``, and the metadata it carries about itself.

This is the one Python place for them; ``runner/contract.h`` is the one C++ place. It imports nothing of the exporter,
so that ``mvlm.runtime`` can read it without loading quantization and lowering.

The first group of constant methods is what ExecuTorch's own LLM runners read from a program; those named ``mvlm_*``
are ours, for all that such a runner leaves to the application.

A language model alone has no method :data:`VISION_ENCODER` and none of :data:`IMAGE_CONSTANT_METHODS`, marker and
prefix included: nothing in its prompt stands for a picture, and ``<image>`` in a question is text like any other.
All other models have all of them; a file with only some is broken.

Format 2: the language model reads a long prompt in steps of ``get_max_seq_len`` tokens, the operators are others, and
:data:`PROGRAM_ID` is new. Format 3: ``mvlm_next_turn_template`` is new. Format 4: :data:`TEXT_DECODER` gives the logits
of several positions, and ``mvlm_logit_positions`` says of how many.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

#: Version of this contract; a reader refuses a file with another one.
FORMAT_VERSION = 4

#: Constant method that gives the file's.
FORMAT = "mvlm_format_version"

#: Takes pixel_values float32 [1, 3, S, S]; in a file made with ``--attention-op llama`` the picture itself, uint8
#: [3, H, W] with sides up to S, as ExecuTorch's own programs hand it over.
VISION_ENCODER = "vision_encoder"
TOKEN_EMBEDDING = "token_embedding"
#: Takes embeddings float32 [1, n, hidden] and start_pos int64 [1]; gives the logits float32 [1, m, vocab] of the last
#: m = min(n, :attr:`Metadata.logit_positions`) positions, the last one's in the last row.
TEXT_DECODER = "text_decoder"

#: Constant method that holds the SentencePiece model file, a uint8 tensor [bytes].
TOKENIZER = "mvlm_tokenizer"

#: Constant method that tells one program from every other: ``sha256:`` and a hash over its delegates, the keys of their
#: weights (hashes themselves) and its metadata. What a runner derives from a program, it files under this.
PROGRAM_ID = "mvlm_program_id"

#: Constant method that holds a digest over the quantized linears, see :mod:`mvlm.export.stored_weights`.
WEIGHTS_DIGEST = "mvlm_weights_digest"

#: Constant method that a file has whose weights were smoothed before they were quantized, see
#: :mod:`mvlm.export.smoothing`: int8 [layers, 2 D + K H + F].
SMOOTHING = "mvlm_smoothing"

#: Where the question goes in :attr:`Metadata.prompt_template` and :attr:`Metadata.next_turn_template`.
PROMPT_PLACEHOLDER = "{prompt}"


def check_format_version(version: int) -> None:
    """Refuses files of another format than :data:`FORMAT_VERSION`, with advice.

    Raises:
        ValueError: ``version`` is another one.
    """
    if version != FORMAT_VERSION:
        advice = "install a newer mvlm" if version > FORMAT_VERSION else "export it again"
        raise ValueError(f"the file is of format {version}, this mvlm reads format {FORMAT_VERSION}: {advice}")


@dataclass(frozen=True)
class ImageProcessing:
    """How a picture becomes ``pixel_values`` [1, 3, size, size].

    Attributes:
        size: side S of the square the model sees, in pixels.
        mean: per channel, subtracted after scaling pixels to 0 .. 1.
        std: per channel, divided by afterwards.
        pad_color: RGB, 0 .. 255, with which a picture is padded to a centred square before it is resized.
        tokens: positions that one picture takes.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad_color: tuple[int, int, int]
    tokens: int


@dataclass(frozen=True)
class Metadata:
    """What an mvlm ``.pte`` says about itself, apart from its tokenizer and its id.

    Attributes:
        model_name: what people call the checkpoint.
        checkpoint_id: ``sha256:`` and the hash over the checkpoint's files.
        mvlm_version: version of the exporter.
        recipe: the recipe as a JSON object.
        max_seq_len: tokens that one call of ``text_decoder`` or ``token_embedding`` takes at the most.
        max_context_len: positions of the KV cache.
        logit_positions: of how many positions, the last ones, a call of ``text_decoder`` gives logits at the most.
        vocab_size: width of the logits.
        bos_id: token id that opens every prompt.
        eos_ids: token ids that end an answer.
        prompt_template: text around the question, with :data:`PROMPT_PLACEHOLDER` in it once.
        next_turn_template: the same for a question after the first of a conversation. What the model has read before
            it, is the conversation so far and the first of ``eos_ids``, which closes an answer.
        image_marker: stands in a prompt where the picture's embeddings go; "" for a language model alone.
        image_prefix: put before a question that comes with a picture and has no marker of its own; it contains the
            marker once. "" for a language model alone.
        stop_strings: an answer ends before the first of these.
        image: how pictures are prepared; None for a language model alone.
    """

    model_name: str
    checkpoint_id: str
    mvlm_version: str
    recipe: str
    max_seq_len: int
    max_context_len: int
    logit_positions: int
    vocab_size: int
    bos_id: int
    eos_ids: tuple[int, ...]
    prompt_template: str
    next_turn_template: str
    image_marker: str
    image_prefix: str
    stop_strings: tuple[str, ...]
    image: ImageProcessing | None

    def __post_init__(self) -> None:
        if not 1 <= self.logit_positions <= self.max_seq_len:
            raise ValueError(
                f"logit_positions {self.logit_positions} is not in 1 .. {self.max_seq_len} (max_seq_len): a call gives "
                "logits of no more positions than it takes"
            )
        for what, template in (("prompt", self.prompt_template), ("next turn's", self.next_turn_template)):
            if template.count(PROMPT_PLACEHOLDER) != 1:
                raise ValueError(f"the {what} template must contain {PROMPT_PLACEHOLDER} once: {template!r}")
        if self.image is None and (self.image_marker or self.image_prefix):
            raise ValueError(
                "a language model alone takes no picture, so its image marker and prefix must be empty, not "
                f"{self.image_marker!r} and {self.image_prefix!r}"
            )
        if self.image is not None and (not self.image_marker or self.image_prefix.count(self.image_marker) != 1):
            raise ValueError(
                f"the image prefix {self.image_prefix!r} must contain the image marker {self.image_marker!r} once"
            )

    def to_constant_methods(self) -> dict[str, Any]:
        """Name -> value of every constant method but the tokenizer and :data:`PROGRAM_ID`."""
        values = {
            "get_max_seq_len": self.max_seq_len,
            "get_max_context_len": self.max_context_len,
            "get_bos_id": self.bos_id,
            "get_eos_ids": list(self.eos_ids),
            "get_vocab_size": self.vocab_size,
            "use_kv_cache": True,
            "use_sdpa_with_kv_cache": True,
            "enable_dynamic_shape": True,
            FORMAT: FORMAT_VERSION,
            "mvlm_version": self.mvlm_version,
            "mvlm_model_name": self.model_name,
            "mvlm_checkpoint_id": self.checkpoint_id,
            "mvlm_recipe": self.recipe,
            "mvlm_prompt_template": self.prompt_template,
            "mvlm_next_turn_template": self.next_turn_template,
            "mvlm_logit_positions": self.logit_positions,
            "mvlm_stop_strings": list(self.stop_strings),
        }
        if self.image is not None:
            values |= {
                "mvlm_image_marker": self.image_marker,
                "mvlm_image_prefix": self.image_prefix,
                "mvlm_image_size": self.image.size,
                "mvlm_image_mean": list(self.image.mean),
                "mvlm_image_std": list(self.image.std),
                "mvlm_image_pad_color": list(self.image.pad_color),
                "mvlm_image_tokens": self.image.tokens,
            }
        return values

    @classmethod
    def from_constant_methods(cls, values: dict[str, Any]) -> Metadata:
        """The inverse of :meth:`to_constant_methods`; names that are not of the contract are ignored.

        Raises:
            ValueError: ``values`` lacks a name, has some but not all of :data:`IMAGE_CONSTANT_METHODS`, or the file is
                of another format.
        """
        # The version first: another format may lack what this one must have.
        check_format_version(values.get(FORMAT, FORMAT_VERSION))
        has_image = any(name in values for name in IMAGE_CONSTANT_METHODS)
        required = [name for name in CONSTANT_METHODS if has_image or name not in IMAGE_CONSTANT_METHODS]
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"constant methods missing: {', '.join(missing)}")
        image = None
        if has_image:
            image = ImageProcessing(
                size=values["mvlm_image_size"],
                mean=tuple(values["mvlm_image_mean"]),
                std=tuple(values["mvlm_image_std"]),
                pad_color=tuple(values["mvlm_image_pad_color"]),
                tokens=values["mvlm_image_tokens"],
            )
        return cls(
            model_name=values["mvlm_model_name"],
            checkpoint_id=values["mvlm_checkpoint_id"],
            mvlm_version=values["mvlm_version"],
            recipe=values["mvlm_recipe"],
            max_seq_len=values["get_max_seq_len"],
            max_context_len=values["get_max_context_len"],
            logit_positions=values["mvlm_logit_positions"],
            vocab_size=values["get_vocab_size"],
            bos_id=values["get_bos_id"],
            eos_ids=tuple(values["get_eos_ids"]),
            prompt_template=values["mvlm_prompt_template"],
            next_turn_template=values["mvlm_next_turn_template"],
            image_marker=values.get("mvlm_image_marker", ""),
            image_prefix=values.get("mvlm_image_prefix", ""),
            stop_strings=tuple(values["mvlm_stop_strings"]),
            image=image,
        )


def _constant_method_names(image: ImageProcessing | None) -> tuple[str, ...]:
    example = Metadata(
        **{f.name: 0 for f in fields(Metadata)}
        | {"max_seq_len": 1, "logit_positions": 1}
        | {"prompt_template": PROMPT_PLACEHOLDER, "next_turn_template": PROMPT_PLACEHOLDER}
        | {"eos_ids": (), "stop_strings": ()}
        | {"image": image, "image_marker": "i" if image else "", "image_prefix": "i" if image else ""}
    )
    return tuple(example.to_constant_methods())


#: Names of all constant methods but the tokenizer and :data:`PROGRAM_ID`.
CONSTANT_METHODS = _constant_method_names(ImageProcessing(0, (0, 0, 0), (1, 1, 1), (0, 0, 0), 0))

#: Those of them that a language model alone does not have.
IMAGE_CONSTANT_METHODS = tuple(name for name in CONSTANT_METHODS if name not in _constant_method_names(None))
