"""From a question to token ids, and from token ids back to text that can be shown as it comes."""

from __future__ import annotations

from sentencepiece import SentencePieceProcessor

from mvlm.export.contract import PROMPT_PLACEHOLDER, Metadata


def prompt_text(metadata: Metadata, question: str, has_image: bool, raw: bool) -> str:
    """The whole prompt, image marker included.

    For a language model alone no text stands for a picture: ``<image>`` in the question is text like any other.

    Raises:
        ValueError: the question is empty, or its markers and the picture do not fit each other.
    """
    if not question.strip():
        raise ValueError("the prompt is empty; ask something, such as 'Describe the image.'")
    markers = question.count(metadata.image_marker) if metadata.image else 0
    if markers > has_image:
        raise ValueError(
            f"the prompt has {markers} {metadata.image_marker} and there {'is one picture' if has_image else 'is none'}"
        )
    if raw:
        if has_image and not markers:
            raise ValueError(f"a raw prompt with a picture must say where it goes: put {metadata.image_marker} in it")
        return question
    if has_image and not markers:
        question = metadata.image_prefix + question
    return metadata.prompt_template.replace(PROMPT_PLACEHOLDER, question)


def prompt_ids(tokenizer: SentencePieceProcessor, metadata: Metadata, text: str) -> list[list[int]]:
    """Token ids of the pieces around the image marker, each tokenized by itself; BOS opens the first."""
    pieces = [tokenizer.encode(piece) for piece in (text.split(metadata.image_marker) if metadata.image else [text])]
    return [[metadata.bos_id, *pieces[0]], *pieces[1:]]


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
