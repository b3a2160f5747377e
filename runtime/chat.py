"""A conversation with an mvlm ``.pte``: every question after the first is read behind what the KV cache holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mvlm.runtime.prompt import StreamingDecoder
from mvlm.runtime.sampler import Sampler

if TYPE_CHECKING:
    from mvlm.runtime.mobilevlm import MobileVLM

#: A picture or its file.
Picture = str | Path | Image.Image

#: Any number of pictures.
Pictures = Picture | Sequence[Picture] | None


class Context:
    """What the language model has read, position by position.

    A model has one KV cache, and any number of contexts take turns in it. One that finds another's keys and values
    there is read anew from its first position on, which is why a context keeps its embeddings.

    Args:
        model: whose KV cache it is.
    """

    def __init__(self, model: MobileVLM) -> None:
        self._model = model
        self._read: list[Tensor] = []

    @property
    def position(self) -> int:
        """Positions that were read."""
        return sum(embeddings.shape[1] for embeddings in self._read)

    def run(self, embeddings: Tensor) -> Tensor:
        """Logits float32 [V] of the last position, after reading embeddings [1, n, D] behind what was read before."""
        position = self.position
        unread = embeddings
        if self._model.cached is not self and self._read:
            unread, position = torch.cat([*self._read, embeddings], dim=1), 0
        # A run that fails midway leaves a cache that is nobody's.
        self._model.cached = None
        logits = self._model.program.text_decoder(unread, position)
        self._read.append(embeddings)
        self._model.cached = self
        return logits

    def go_back(self, position: int) -> None:
        """Forgets what was read from a position on, at which a :meth:`run` began; the cache is written over there."""
        while self.position > position:
            self._read.pop()


class _State(NamedTuple):
    """Where a conversation is: positions that were read, and the ids that are its next, but were not run yet."""

    position: int = 0
    unread: tuple[int, ...] = ()


class Chat:
    """A conversation; made by :meth:`MobileVLM.chat`.

    Several conversations and :meth:`MobileVLM.generate` may take turns, even in the middle of answers: they share the
    model's one KV cache, and each is right, but reading on in a conversation after another was in the cache costs
    reading all of it anew. Only what runs ``model.program.text_decoder`` itself goes unnoticed.

    An answer that is abandoned, by ``close()`` or by the next question, counts as far as its tokens were chosen. A
    question that fails, or is abandoned before its answer's first token, leaves the conversation as it was.

    Args:
        model: to talk to.
    """

    def __init__(self, model: MobileVLM) -> None:
        self._model = model
        self.reset()

    def reset(self) -> None:
        """Begins a new conversation."""
        self._context = Context(self._model)
        self._state = _State()
        self._turn = object()

    @property
    def position(self) -> int:
        """Positions that the conversation has used, with the one or two that the next question reads first."""
        # An answer that goes on to the last position leaves none for the end token behind it.
        return min(self._state.position + len(self._state.unread), self._model.metadata.max_context_len)

    @property
    def room(self) -> int:
        """Positions left for questions, pictures and answers."""
        return self._model.metadata.max_context_len - self.position

    def ask(
        self,
        prompt: str,
        images: Pictures = (),
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        raw_prompt: bool = False,
    ) -> Iterator[str]:
        """Answers the next question, piece by piece as the answer grows.

        Args:
            prompt: the question. It may say where each picture goes with the file's image marker.
            images: new pictures; the model still knows those of earlier questions.
            max_new_tokens: see :meth:`MobileVLM.generate`, as all that follow.
            temperature: 0 takes the likeliest token each time, more draws.
            top_k: see :class:`Sampler`.
            top_p: see :class:`Sampler`.
            seed: of the draws; random by default.
            raw_prompt: take the prompt as it is, without the model's template.

        Yields:
            Text. Joined, it is the answer, without white space at its ends.

        Raises:
            ValueError: an argument is out of range, a picture cannot be read, or the question does not fit into the
                positions that are left.
            PteError: there are pictures, and the file is a language model alone.
            RuntimeError: on iterating over an answer after the next question, or :meth:`reset`.
        """
        sampler = Sampler(temperature, top_k, top_p, seed)
        embeddings, limit = self._model.read_question(
            images, prompt, raw_prompt, max_new_tokens, self._state.position, self._state.unread
        )
        self._turn = object()
        return self._answer(self._turn, embeddings, sampler, limit)

    def answer(self, prompt: str, images: Pictures = (), **options: object) -> str:
        """The whole answer at once; arguments as for :meth:`ask`."""
        return "".join(self.ask(prompt, images, **options))  # type: ignore[arg-type]

    def _answer(self, turn: object, embeddings: Tensor, sampler: Sampler, limit: int) -> Iterator[str]:
        metadata = self._model.metadata
        decoder = StreamingDecoder(self._model.tokenizer, metadata.stop_strings)
        self._check_current(turn)
        before = self._state
        # What an abandoned question left there.
        self._context.go_back(before.position)
        try:
            for _ in range(limit):
                token = sampler(self._context.run(embeddings))
                ended = token in metadata.eos_ids
                # In one step, so that an interrupt between any two instructions finds a conversation that is whole.
                self._state = _State(self._context.position, (token,) if ended else (token, metadata.eos_ids[0]))
                if ended:
                    break
                if text := decoder.push(token):
                    yield text
                    self._check_current(turn)
                if decoder.stopped:
                    return
                embeddings = self._model.program.token_embedding(torch.tensor([[token]]))
        except Exception:
            if turn is self._turn:
                self._state = before
            raise
        if text := decoder.finish():
            yield text

    def _check_current(self, turn: object) -> None:
        if turn is not self._turn:
            raise RuntimeError(
                "this answer was abandoned when the conversation got its next question or was reset; read an answer to "
                "its end before going on"
            )
