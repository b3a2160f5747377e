"""Prompts of exactly so many positions, for benchmarks. Knows a tokenizer; knows nothing of models."""

from __future__ import annotations

from collections.abc import Callable

from sentencepiece import SentencePieceProcessor

#: Short and common, so that in most vocabularies many of them are one token each.
_TEXT = (
    "the picture shows a red house with a small garden and an old tree in front of it under a blue sky while two "
    "people walk to the river and look at the water because it is late in the day and the sun is low"
)
_WORDS = _TEXT.split()


def words_of_length(count: Callable[[str], int], wanted: int) -> str:
    """Words for which ``count`` returns exactly ``wanted``.

    Args:
        count: positions of a text; a longer text must not have fewer.
        wanted: at least what one word takes.

    Raises:
        ValueError: no such words were found; the message says which lengths are close.
    """
    words = [_WORDS[0]]
    if count(words[0]) > wanted:
        raise ValueError(f"{wanted} positions are too few: {count(words[0])} at least")
    # Fewer tokens than there are words and spaces in a text are not to be expected; so this overshoots at most once.
    while (now := count(" ".join(words))) < wanted:
        missing = wanted - now
        nexts = [_WORDS[(len(words) + shift) % len(_WORDS)] for shift in range(len(_WORDS))]
        for word in nexts if missing < 16 else nexts[:1]:
            if count(" ".join([*words, word])) <= wanted:
                words.append(word)
                break
        else:
            # Every word takes more than what is missing: single letters take the least.
            for letter in "aeiostnr":
                if count(" ".join([*words, letter])) <= wanted:
                    words.append(letter)
                    break
            else:
                raise ValueError(f"no text of {wanted} positions was found, but one of {now}; ask for {now}")
    return " ".join(words)


def text_prompt(tokenizer: SentencePieceProcessor, positions: int) -> str:
    """A raw prompt without a picture that takes exactly so many positions, BOS included."""
    return words_of_length(lambda text: 1 + len(tokenizer.encode(text)), positions)


def picture_prompt(tokenizer: SentencePieceProcessor, marker: str, positions: int) -> tuple[str, str]:
    """A raw prompt with a picture, whose text takes exactly so many positions, BOS included; and the words in it.

    The pieces around the marker are tokenized each by itself, as llava_main does it.
    """

    def prompt(words: str) -> str:
        return f"USER: {marker}\n{words} ASSISTANT:"

    def count(words: str) -> int:
        return 1 + sum(len(tokenizer.encode(piece)) for piece in prompt(words).split(marker))

    words = words_of_length(count, positions)
    return prompt(words), words
