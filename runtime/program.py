"""An mvlm ``.pte`` as three functions and its metadata.

Knows the contract of the file; knows nothing of text, pictures or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import executorch.kernels.quantized  # noqa: F401  (registers the kernel of the 8-bit embedding)
import torch
from executorch.runtime import Program, Runtime
from torch import Tensor

import mvlm.ops
from mvlm.export.contract import (
    CONSTANT_METHODS,
    FORMAT,
    IMAGE_CONSTANT_METHODS,
    PROGRAM_ID,
    SMOOTHING,
    TEXT_DECODER,
    TOKEN_EMBEDDING,
    TOKENIZER,
    VISION_ENCODER,
    WEIGHTS_DIGEST,
    ImageProcessing,
    Metadata,
    check_format_version,
)
from mvlm.export.errors import ExportError
from mvlm.export.llama_operators import load_llama_operators
from mvlm.export.recipe import Recipe

#: Constant methods whose value is a sequence; ExecuTorch returns every element as an output of its own.
_SEQUENCES = {"get_eos_ids", "mvlm_stop_strings", "mvlm_image_mean", "mvlm_image_std", "mvlm_image_pad_color"}

#: ExecuTorch's ScalarType of uint8.
_BYTE = 0

#: "ET" and the version at byte 4 of the flatbuffer, "eh00" of the extended header at byte 8; the header's length at
#: byte 12 and its fields after it, little-endian 64-bit. From ExecuTorch's documentation of the PTE file format.
_HEADER_SIZE = 64


class PteError(ValueError):
    """The file is no usable mvlm ``.pte``; the message says why."""


def check_pte_file(path: Path) -> None:
    """Checks what can be told from a file's header: that it is a ``.pte``, and all of it.

    ExecuTorch maps the file into memory and would be killed on touching a page that a truncated file lacks.

    Raises:
        PteError: no such file, no ExecuTorch program, or shorter than its header says.
    """
    if not path.is_file():
        raise PteError(f"{path}: {'is no file' if path.exists() else 'no such file'}")
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER_SIZE)
    if len(header) < _HEADER_SIZE or header[4:6] != b"ET":
        raise PteError(f"{path}: is no ExecuTorch program; make one with: python -m mvlm.export --pte-name {path.name}")
    if header[8:12] != b"eh00":
        return  # a program without weights or delegates has no extended header, and nothing behind its flatbuffer

    def field(offset: int) -> int:
        return int.from_bytes(header[offset : offset + 8], "little")

    program_size, segment_base = field(16), field(24)
    header_length = int.from_bytes(header[12:16], "little")
    segment_size = field(32) if header_length >= 32 else 0
    expected = max(program_size, segment_base + segment_size)
    if size < expected:
        raise PteError(f"{path}: is truncated: {size:,} bytes, its header says {expected:,}; export or copy it again")


class PteProgram:
    """The methods of an mvlm ``.pte``.

    Every method is loaded from a program of its own, because ExecuTorch's Python runtime lets the methods of one
    program share their planned memory: a call of ``token_embedding`` would write over ``text_decoder``'s KV cache.

    Args:
        path: of the file.

    Attributes:
        metadata: what the file says about itself; its ``image`` is None for a language model alone.
        tokenizer: the SentencePiece model in the file.
        smoothing: exponents by which the exporter scaled weights, see :mod:`mvlm.export.smoothing`; None for none.
        weights_digest: over the quantized linears as the exporter made them, see :mod:`mvlm.export.stored_weights`.

    Raises:
        PteError: the file is missing, broken, or not made by ``mvlm.export``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_pte_file(self.path)
        mvlm.ops.load_native_library()
        program = self._load_program()
        # The version first: another format may lack what this one must have.
        if FORMAT in program.method_names:
            try:
                check_format_version(self._execute(program, FORMAT, [])[0])
            except ValueError as error:
                raise PteError(f"{self.path}: {error}") from error
        required = {TOKEN_EMBEDDING, TEXT_DECODER, TOKENIZER, PROGRAM_ID, WEIGHTS_DIGEST}
        required |= set(CONSTANT_METHODS) - set(IMAGE_CONSTANT_METHODS)
        missing = required - program.method_names
        if missing:
            raise PteError(
                f"{self.path}: is an ExecuTorch program, but not one of mvlm's: it lacks {', '.join(sorted(missing))} "
                f"and has {', '.join(sorted(program.method_names))}; make one with: python -m mvlm.export"
            )
        values: dict[str, Any] = {}
        for name in CONSTANT_METHODS:
            if name in program.method_names:  # from_constant_methods() knows which may be missing
                outputs = self._execute(program, name, [])
                values[name] = list(outputs) if name in _SEQUENCES else outputs[0]
        try:
            self.metadata = Metadata.from_constant_methods(values)
        except ValueError as error:
            raise PteError(f"{self.path}: {error}") from error
        if (VISION_ENCODER in program.method_names) != (self.metadata.image is not None):
            images = ", ".join(IMAGE_CONSTANT_METHODS)
            has, lacks = (images, VISION_ENCODER) if self.metadata.image else (VISION_ENCODER, images)
            raise PteError(f"{self.path}: contradicts itself: it has {has}, but lacks {lacks}; export it again")
        # Of files for ExecuTorch's own programs, vision_encoder takes the picture itself, uint8 [3, H, W].
        self._takes_bytes = False
        if self.metadata.image is not None:
            meta = program.metadata(VISION_ENCODER)
            self._takes_bytes = meta.num_inputs() > 0 and meta.input_tensor_meta(0).dtype() == _BYTE
        self._load_operators()
        self.tokenizer = bytes(self._execute(program, TOKENIZER, [])[0].numpy())
        self.smoothing: Tensor | None = None
        if SMOOTHING in program.method_names:
            self.smoothing = self._execute(program, SMOOTHING, [])[0].clone()
        self.weights_digest: str = self._execute(program, WEIGHTS_DIGEST, [])[0]
        self._programs: dict[str, Program] = {}

    def vision_encoder(self, pixel_values: Tensor) -> Tensor:
        """Image embeddings float32 [1, T, D] of pixels float32 [1, 3, S, S], as :func:`preprocess` makes them.

        Raises:
            PteError: the file is a language model alone.
        """
        processing = self.require_vision()
        if self._takes_bytes:
            # Made of bytes, they can be made bytes again without loss.
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processing.mean, processing.std))
            return self._run(VISION_ENCODER, [((pixel_values[0] * std + mean) * 255).round().to(torch.uint8)])
        return self._run(VISION_ENCODER, [pixel_values])

    def require_vision(self) -> ImageProcessing:
        """How pictures are prepared.

        Raises:
            PteError: the file is a language model alone.
        """
        if self.metadata.image is None:
            raise PteError(
                f"{self.path} ({self.metadata.model_name}) is a language model without a vision encoder and takes no "
                "picture; leave out the picture or use a .pte with a vision encoder"
            )
        return self.metadata.image

    def token_embedding(self, ids: Tensor) -> Tensor:
        """Token embeddings float32 [1, n, D] of ids int64 [1, n]; any n."""
        chunks = ids.split(self.metadata.max_seq_len, dim=1)
        return torch.cat([self._run(TOKEN_EMBEDDING, [chunk]).clone() for chunk in chunks], dim=1)

    def text_decoder(self, embeddings: Tensor, start_pos: int) -> Tensor:
        """Logits float32 [V] of the last of n positions, after running embeddings [1, n, D] from ``start_pos`` on.

        More than the file takes in one call, ``metadata.max_seq_len``, are run in several. The result lies in the
        program's memory and holds until the next call.
        """
        for chunk in embeddings.split(self.metadata.max_seq_len, dim=1):
            logits = self._run(TEXT_DECODER, [chunk, torch.tensor([start_pos])])
            start_pos += chunk.shape[1]
        return logits[0, -1]

    def text_decoder_logits(self, embeddings: Tensor, start_pos: int) -> Tensor:
        """As :meth:`text_decoder`, but of several positions.

        Returns:
            Logits float32 [min(n, k), V] of the last positions, k being ``metadata.logit_positions``; a copy.
        """
        rows = embeddings.new_empty(0, self.metadata.vocab_size)
        for chunk in embeddings.split(self.metadata.max_seq_len, dim=1):
            logits = self._run(TEXT_DECODER, [chunk, torch.tensor([start_pos])])
            start_pos += chunk.shape[1]
            # The last of several calls may have fewer positions than are wanted.
            rows = torch.cat([rows, logits[0]])[-self.metadata.logit_positions :]
        return rows

    def score(self, embeddings: Tensor, first: int, start_pos: int = 0) -> Tensor:
        """Logits of every position of a text from one of them on: what its perplexity is made of.

        What comes before is read in the longest steps that the file takes, then every step gives the logits of as many
        positions as a step can, ``metadata.logit_positions``.

        Args:
            embeddings: float32 [1, n, D], of tokens and pictures.
            first: the first position whose logits are wanted, 0 .. n - 1, counted in ``embeddings``.
            start_pos: where ``embeddings`` begin; what the KV cache holds before that is read.

        Returns:
            float32 [n - first, V]; row i is of position ``first + i`` and says what follows that position.

        Raises:
            ValueError: ``first`` is out of range, or the positions do not fit into the KV cache.
        """
        n = embeddings.shape[1]
        if not 0 <= first < n:
            raise ValueError(f"first {first} is not in 0 .. {n - 1}: there are {n} positions")
        if start_pos < 0 or start_pos + n > self.metadata.max_context_len:
            raise ValueError(
                f"{n} positions from position {start_pos} on do not fit: {self.path} has positions 0 .. "
                f"{self.metadata.max_context_len - 1}"
            )
        scored = []
        position = 0
        while position < n:
            unscored = max(first - position, 0)
            step = min(self.metadata.max_seq_len, unscored + self.metadata.logit_positions, n - position)
            chunk = embeddings[:, position : position + step]
            logits = self._run(TEXT_DECODER, [chunk, torch.tensor([start_pos + position])])[0]
            if step > unscored:
                scored.append(logits[unscored - step :].clone())
            position += step
        return torch.cat(scored)

    def _run(self, method: str, inputs: Sequence[Tensor]) -> Tensor:
        if method not in self._programs:
            self._programs[method] = self._load_program()
        return self._execute(self._programs[method], method, inputs)[0]

    def _load_operators(self) -> None:
        """Loads ExecuTorch's operators for language models if the file has them in place of ours."""
        try:
            recipe = Recipe.from_json(self.metadata.recipe)
        except ValueError:
            return  # what needs the rest of the recipe will say so
        if recipe.attention_op == "llama":
            try:
                load_llama_operators()
            except ExportError as error:
                raise PteError(f"{self.path}: {error}") from error

    def _load_program(self) -> Program:
        try:
            return Runtime.get().load_program(self.path)
        except RuntimeError as error:
            raise PteError(f"{self.path}: ExecuTorch cannot load it: {error}") from error

    def _execute(self, program: Program, name: str, inputs: Sequence[Tensor]) -> Sequence[Any]:
        try:
            method = program.load_method(name)
            assert method is not None
            return method.execute([tensor.contiguous() for tensor in inputs])
        except RuntimeError as error:
            raise PteError(f"{self.path}: method {name} failed: {error}") from error
