"""Ask an mvlm ``.pte`` about a picture: the Python twin of ``llava_main``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from mvlm.runtime.preprocess import load_image, preprocess
from mvlm.runtime.program import PteError, PteProgram
from mvlm.runtime.prompt import StreamingDecoder, prompt_ids, prompt_text
from mvlm.runtime.sampler import Sampler

#: New tokens at the most when nobody says otherwise, as in the MobileVLM reference.
DEFAULT_MAX_NEW_TOKENS = 512


class MobileVLM:
    """A ``.pte`` made by ``mvlm.export``, ready to answer.

    Args:
        path: of the ``.pte``.
        tokenizer_path: a SentencePiece model to use in place of the one in the file.

    Raises:
        PteError: the file or the tokenizer cannot be used.
    """

    def __init__(self, path: str | Path, tokenizer_path: str | Path | None = None) -> None:
        self.program = PteProgram(path)
        self.metadata = self.program.metadata
        try:
            model = Path(tokenizer_path).read_bytes() if tokenizer_path else self.program.tokenizer
            self.tokenizer = SentencePieceProcessor(model_proto=model)
        except (OSError, RuntimeError) as error:
            raise PteError(f"{tokenizer_path or path}: its tokenizer cannot be loaded: {error}") from error
        # Its ids would be no rows of the embedding table. Fewer pieces are normal: tables get padded.
        if len(self.tokenizer) > self.metadata.vocab_size:
            raise PteError(
                f"{tokenizer_path or path}: the tokenizer has {len(self.tokenizer)} pieces, but the model's vocabulary "
                f"only {self.metadata.vocab_size}: it belongs to another model"
            )

    def generate(
        self,
        image: str | Path | Image.Image | None,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        raw_prompt: bool = False,
    ) -> Iterator[str]:
        """Answers a question, piece by piece as the answer grows.

        Args:
            image: a picture or its file; None for a question without one. A language model alone takes none.
            prompt: the question. It may say where the picture goes with the file's image marker.
            max_new_tokens: stop after so many tokens (default 512, or what the cache has room for).
            temperature: 0 takes the likeliest token each time, more draws.
            top_k: see :class:`Sampler`.
            top_p: see :class:`Sampler`.
            seed: of the draws; random by default.
            raw_prompt: take the prompt as it is, without the model's template.

        Yields:
            Text. Joined, it is the answer, without white space at its ends.

        Raises:
            ValueError: an argument is out of range, the picture cannot be read, or the prompt is too long.
            PteError: there is a picture, and the file is a language model alone.
        """
        sampler = Sampler(temperature, top_k, top_p, seed)
        embeddings = self.embed(image, prompt, raw_prompt)
        limit = self.resolve_max_new_tokens(max_new_tokens, embeddings.shape[1])
        return self._stream(embeddings, sampler, limit)

    def answer(self, image: str | Path | Image.Image | None, prompt: str, **options: object) -> str:
        """The whole answer at once; arguments as for :meth:`generate`."""
        return "".join(self.generate(image, prompt, **options))  # type: ignore[arg-type]

    def generate_tokens(self, embeddings: Tensor, sampler: Sampler, max_new_tokens: int) -> Iterator[int]:
        """The tokens that follow a prompt, up to but without an end token.

        Args:
            embeddings: of the whole prompt, float32 [1, n, D].
            sampler: chooses each token.
            max_new_tokens: at the most; ``n + max_new_tokens`` must fit the cache.
        """
        position = 0
        for _ in range(max_new_tokens):
            logits = self.program.text_decoder(embeddings, position)
            position += embeddings.shape[1]
            token = sampler(logits)
            if token in self.metadata.eos_ids:
                return
            yield token
            embeddings = self.program.token_embedding(torch.tensor([[token]]))

    def embed(self, image: str | Path | Image.Image | None, prompt: str, raw_prompt: bool = False) -> Tensor:
        """Embeddings of the whole prompt, the picture's in their place: float32 [1, n, D].

        Raises:
            ValueError: the picture cannot be read, or the prompt is unusable or longer than the cache.
            PteError: there is a picture, and the file is a language model alone.
        """
        metadata = self.metadata
        processing = self.program.require_vision() if image is not None else None
        text = prompt_text(metadata, prompt, image is not None, raw_prompt)
        pieces = prompt_ids(self.tokenizer, metadata, text)
        length = sum(len(piece) for piece in pieces) + (processing.tokens if processing else 0)
        self.resolve_max_new_tokens(None, length)
        parts = [self.program.token_embedding(torch.tensor([piece])) for piece in pieces if piece]
        if image is not None and processing is not None:
            if not isinstance(image, Image.Image):
                image = load_image(image)
            parts.insert(1, self.program.vision_encoder(preprocess(image, processing)))
        return torch.cat(parts, dim=1)

    def resolve_max_new_tokens(self, requested: int | None, prompt_length: int) -> int:
        """How many tokens may follow a prompt of so many positions.

        Raises:
            ValueError: the prompt fills the cache, or fewer than 1 was requested.
        """
        if requested is not None and requested < 1:
            raise ValueError(f"max_new_tokens {requested} is not possible: 1 at least")
        room = self.metadata.max_context_len - prompt_length
        if room < 1:
            raise ValueError(
                f"the prompt takes {prompt_length} positions, but the model has {self.metadata.max_context_len} and "
                "the answer needs 1 at least; shorten the prompt"
            )
        return min(requested if requested is not None else DEFAULT_MAX_NEW_TOKENS, room)

    def _stream(self, embeddings: Tensor, sampler: Sampler, limit: int) -> Iterator[str]:
        decoder = StreamingDecoder(self.tokenizer, self.metadata.stop_strings)
        for token in self.generate_tokens(embeddings, sampler, limit):
            if text := decoder.push(token):
                yield text
            if decoder.stopped:
                return
        if text := decoder.finish():
            yield text
