"""Ask an mvlm ``.pte`` about a picture: the Python twin of ``llava_main``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from mvlm.export.preprocess import load_image, preprocess
from mvlm.runtime.chat import Chat, Context, Picture, Pictures
from mvlm.runtime.program import PteError, PteProgram
from mvlm.runtime.prompt import prompt_ids, prompt_text
from mvlm.runtime.sampler import Sampler

#: New tokens at the most when nobody says otherwise, as in the MobileVLM reference.
DEFAULT_MAX_NEW_TOKENS = 512


class MobileVLM:
    """A ``.pte`` made by ``mvlm.export``, ready to answer.

    Args:
        path: of the ``.pte``.
        tokenizer_path: a SentencePiece model to use in place of the one in the file.

    Attributes:
        program: the methods of the file.
        metadata: what the file says about itself.
        tokenizer: SentencePiece.
        cached: whose keys and values the KV cache holds; None for nobody's.

    Raises:
        PteError: the file or the tokenizer cannot be used.
    """

    def __init__(self, path: str | Path, tokenizer_path: str | Path | None = None) -> None:
        self.program = PteProgram(path)
        self.metadata = self.program.metadata
        self.cached: Context | None = None
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
        image: Pictures,
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
            image: a picture or its file, or a sequence of them; None for a question without one. A language model alone
                takes none.
            prompt: the question. It may say where each picture goes with the file's image marker.
            max_new_tokens: stop after so many tokens (default 512, or what the cache has room for).
            temperature: 0 takes the likeliest token each time, more draws.
            top_k: see :class:`Sampler`.
            top_p: see :class:`Sampler`.
            seed: of the draws; random by default.
            raw_prompt: take the prompt as it is, without the model's template.

        Yields:
            Text. Joined, it is the answer, without white space at its ends.

        Raises:
            ValueError: an argument is out of range, a picture cannot be read, or the prompt is too long.
            PteError: there is a picture, and the file is a language model alone.
        """
        return self.chat().ask(
            prompt,
            image,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            raw_prompt=raw_prompt,
        )

    def answer(self, image: Pictures, prompt: str, **options: object) -> str:
        """The whole answer at once; arguments as for :meth:`generate`."""
        return "".join(self.generate(image, prompt, **options))  # type: ignore[arg-type]

    def chat(self) -> Chat:
        """A new conversation, in which questions follow each other."""
        return Chat(self)

    def generate_tokens(self, embeddings: Tensor, sampler: Sampler, max_new_tokens: int) -> Iterator[int]:
        """The tokens that follow a prompt, up to but without an end token.

        Args:
            embeddings: of the whole prompt, float32 [1, n, D].
            sampler: chooses each token.
            max_new_tokens: at the most; ``n + max_new_tokens`` must fit the cache.
        """
        context = Context(self)
        for _ in range(max_new_tokens):
            token = sampler(context.run(embeddings))
            if token in self.metadata.eos_ids:
                return
            yield token
            embeddings = self.program.token_embedding(torch.tensor([[token]]))

    def embed(self, image: Pictures, prompt: str, raw_prompt: bool = False) -> Tensor:
        """Embeddings of the whole prompt, the pictures' in their places: float32 [1, n, D].

        Raises:
            ValueError: a picture cannot be read, or the prompt is unusable or longer than the cache.
            PteError: there is a picture, and the file is a language model alone.
        """
        return self.read_question(image, prompt, raw_prompt)[0]

    def embed_image(self, image: Picture) -> Tensor:
        """Embeddings of a picture, float32 [1, T, D]; the caller's own, whatever is encoded next.

        Raises:
            ValueError: the picture cannot be read.
            PteError: the file is a language model alone.
        """
        processing = self.program.require_vision()
        if not isinstance(image, Image.Image):
            image = load_image(image)
        # ExecuTorch's Python runtime has copied it out of planned memory, over which the next picture is written.
        return self.program.vision_encoder(preprocess(image, processing))

    def read_question(
        self,
        images: Pictures,
        prompt: str,
        raw_prompt: bool,
        max_new_tokens: int | None = None,
        start_pos: int = 0,
        unread: Sequence[int] = (),
    ) -> tuple[Tensor, int]:
        """What the language model reads of a question, and how many tokens may follow it.

        Args:
            images: the question's.
            prompt: the question.
            raw_prompt: take it as it is, without a template.
            max_new_tokens: the most that is wanted; None for the default.
            start_pos: positions of its conversation that were read before.
            unread: ids of its conversation that were not; with none, the question opens a conversation.

        Returns:
            Embeddings float32 [1, n, D], and the limit of new tokens.

        Raises:
            ValueError: a picture cannot be read, the prompt is unusable, or there are not positions enough.
            PteError: there are pictures, and the file is a language model alone.
        """
        pictures = _pictures(images)
        image_tokens = self.program.require_vision().tokens if pictures else 0
        text = prompt_text(self.metadata, prompt, len(pictures), raw_prompt, follows=bool(unread))
        pieces = prompt_ids(self.tokenizer, self.metadata, text, unread or None)
        length = sum(len(piece) for piece in pieces) + image_tokens * len(pictures)
        limit = self.resolve_max_new_tokens(max_new_tokens, length, start_pos)
        # A piece may be empty: of no tokens there are no embeddings.
        parts = [[self.program.token_embedding(torch.tensor([piece]))] if piece else [] for piece in pieces]
        for part, picture in zip(parts, pictures, strict=False):
            part.append(self.embed_image(picture))
        return torch.cat([embeddings for part in parts for embeddings in part], dim=1), limit

    def resolve_max_new_tokens(self, requested: int | None, prompt_length: int, start_pos: int = 0) -> int:
        """How many tokens may follow a prompt of so many positions that begins at ``start_pos``.

        Raises:
            ValueError: the prompt fills the cache, or fewer than 1 was requested.
        """
        if requested is not None and requested < 1:
            raise ValueError(f"max_new_tokens {requested} is not possible: 1 at least")
        positions = self.metadata.max_context_len
        room = positions - start_pos - prompt_length
        if room < 1 and start_pos:
            raise ValueError(
                f"the conversation has used {start_pos} of {positions} positions, and this question takes "
                f"{prompt_length} (pictures and template included) and its answer 1 at least; begin a new conversation "
                "or ask something shorter"
            )
        if room < 1:
            raise ValueError(
                f"the prompt takes {prompt_length} positions (pictures and template included), but the model has "
                f"{positions} and the answer needs 1 at least; shorten the prompt, or export with a larger "
                "--max-context-len"
            )
        return min(requested if requested is not None else DEFAULT_MAX_NEW_TOKENS, room)


def _pictures(images: Pictures) -> Sequence[Picture]:
    if images is None:
        return ()
    # A path is a sequence, too: of characters.
    return (images,) if isinstance(images, str | os.PathLike | Image.Image) else tuple(images)
