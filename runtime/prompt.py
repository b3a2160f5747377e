"""From a question to token ids, and from token ids back to text that can be shown as it comes."""

from __future__ import annotations

from collections.abc import Sequence

from sentencepiece import SentencePieceProcessor

from mvlm.export.contract import PROMPT_PLACEHOLDER, Metadata


def prompt_text(metadata: Metadata, question: str, images: int, raw: bool, follows: bool = False) -> str:
    """The whole text of a question, image markers included.

    For a language model alone no text stands for a picture: ``<image>`` in the question is text like any other.

    Args:
        metadata: of the file.
        question: what is asked.
        images: how many pictures go with it.
        raw: the question is the whole text already; it is put into no template and gets no image prefix.
        follows: others of its conversation came before it.

    Raises:
        ValueError: the question is empty or no Unicode text, or its markers and the pictures do not fit each other.
    """
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt is no Unicode text: character {error.start} is half of a surrogate pair; take it out"
        ) from error
    if not question.strip():
        raise ValueError("the prompt is empty; ask something, such as 'Describe the image.'")
    marker = metadata.image_marker
    markers = question.count(marker) if metadata.image else 0
    if markers and not images:
        raise ValueError(
            f"the prompt contains {marker}, which stands for a picture, but no picture was given; add one or take "
            f"{marker} out of the prompt"
        )
    if markers and markers != images:
        raise ValueError(
            f"the prompt contains {marker} {markers} times, but there "
            f"{'is 1 picture' if images == 1 else f'are {images} pictures'}; put it where each picture goes, or "
            "nowhere: then they go before the question"
        )
    if raw and images and not markers:
        raise ValueError(
            "a raw prompt is taken as it is, so it must say itself where "
            f"{'the picture goes' if images == 1 else 'the pictures go'}: put {marker} into it for each"
        )
    if not markers:
        question = metadata.image_prefix * images + question
    if raw:
        return question
    template = metadata.next_turn_template if follows else metadata.prompt_template
    return template.replace(PROMPT_PLACEHOLDER, question)


def prompt_ids(
    tokenizer: SentencePieceProcessor, metadata: Metadata, text: str, opening: Sequence[int] | None = None
) -> list[list[int]]:
    """Token ids of the pieces around the image markers, each tokenized by itself.

    Args:
        tokenizer: of the file.
        metadata: of the file.
        text: of :func:`prompt_text`.
        opening: ids before those of the first piece; BOS by default.
    """
    pieces = [tokenizer.encode(piece) for piece in (text.split(metadata.image_marker) if metadata.image else [text])]
    return [[*([metadata.bos_id] if opening is None else opening), *pieces[0]], *pieces[1:]]


class StreamingDecoder:
    """Text of a growing answer: whole characters only, without white space at its ends, up to a stop string.

    The text so far is decoded anew with every token, which is what makes it equal to decoding all of them at once.
    Ids that the tokenizer has no piece for have no text: a vocabulary is often padded, and a model, above all one with
    random weights, may choose any of its ids.
    """

    def __init__(self, tokenizer: SentencePieceProcessor, stop_strings: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._ids: list[int] = []
        self._shown = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Adds a token and returns what can be shown now, possibly nothing."""
        if not 0 <= token < len(self._tokenizer):
            return ""
        self._ids.append(token)
        text = self._text()
        for stop in self._stop_strings:
            if stop in text:
                self.stopped = True
                text = text[: text.index(stop)]
        if self.stopped:
            return self._show(text.strip())
        # An incomplete character decodes to U+FFFD, which a later token may still complete; white space and the
        # beginning of a stop string may turn out not to belong to the answer.
        held = text.rstrip("\ufffd").rstrip()
        for stop in self._stop_strings:
            for length in range(len(stop) - 1, 0, -1):
                if held.endswith(stop[:length]):
                    held = held[:-length].rstrip()
                    break
        return self._show(held.lstrip())

    def finish(self) -> str:
        """The rest of the answer, when no token follows."""
        return "" if self.stopped else self._show(self._text().strip())

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids)

    def _show(self, text: str) -> str:
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new
