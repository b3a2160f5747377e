"""Prose that nobody here wrote: one part to judge by, the rest to calibrate with.

*Debian Reference* by Osamu Aoki (GPL) and the *Jargon File* (public domain). Paragraphs of running prose alone: on
indented text and tables the SentencePiece model that R has now gives other tokens than its own tokenizer did.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

DEBIAN_REFERENCE = Path("usr/share/debian-reference/debian-reference.en.txt.gz")
JARGON_FILE = Path("usr/share/doc/jargon-text/jargon.txt.gz")

#: Tokens of a window; perplexity is that of its second half, as llama.cpp's program measures it.
WINDOW = 512
#: Windows of the evaluation text: so many from the start of Debian Reference, and from the end of the Jargon File.
REFERENCE_WINDOWS, JARGON_WINDOWS = 11, 1

#: Boxes of tables, markup and commands.
_NO_PROSE = re.compile(r"[\u2500-\u257f|{}<>=$#\\]")


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of running prose, each on one line: long, made of letters, and ending like a sentence."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = re.sub(r"\s+", " ", block).strip()
        letters = sum(character.isalpha() or character == " " for character in paragraph)
        if (
            len(paragraph) > 200
            and paragraph[-1] in ".!?"
            and not _NO_PROSE.search(paragraph)
            and letters > 0.93 * len(paragraph)
        ):
            yield paragraph


def _read(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        return list(paragraphs(file.read()))


def join(lines: Sequence[str]) -> str:
    """A text of paragraphs, one a line."""
    return "".join(line + "\n" for line in lines)


def split_texts(debian: Path, tokenizer: SentencePieceProcessor) -> tuple[str, str]:
    """Evaluation text, 12 windows and a little, and calibration text, which shares no paragraph with it.

    The calibration text begins with what remains of Debian Reference, 11,000 tokens, and goes on with the Jargon File,
    68,000 tokens.

    Args:
        debian: folder of the unpacked packages.
        tokenizer: by which tokens are counted.
    """

    def tokens(lines: Sequence[str]) -> int:
        return len(tokenizer.encode(join(lines)))

    reference, jargon = _read(debian / DEBIAN_REFERENCE), _read(debian / JARGON_FILE)
    first = next(n for n in range(len(reference)) if tokens(reference[:n]) >= REFERENCE_WINDOWS * WINDOW)
    begin = reference[:first]
    windows = REFERENCE_WINDOWS + JARGON_WINDOWS
    last = next(n for n in range(len(jargon)) if tokens(begin + jargon[len(jargon) - n :]) >= windows * WINDOW)
    cut = len(jargon) - last
    return join(begin + jargon[cut:]), join(reference[first:] + jargon[:cut])


def windows(text: str, tokenizer: SentencePieceProcessor, length: int = WINDOW) -> Tensor:
    """Token ids int64 [windows, length] of a text, without BOS; the rest that fills no window is left out."""
    ids = torch.tensor(tokenizer.encode(text))
    return ids[: len(ids) // length * length].view(-1, length)
