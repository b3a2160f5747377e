#!/usr/bin/env python3
"""What ci/peer_quality.sh found: reads its .gguf and the logs of llama-perplexity, and writes table and JSON.

    PYTHONPATH=tests/real python ci/peer_quality.py build/quality/llama Q4_0 Q4_0-imatrix --out build/quality/llama.json

Each entry has bits a weight of the layers' linears (without embedding and head), and what
``python -m mvlm.runtime.perplexity`` tells of a .pte, by the same names. That both read the same is checked: the tokens
that llama-perplexity wrote beside the probabilities of F16 have to be those of our windows.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
from gauge import make_gauge
from gguf import GGUFReader
from sentencepiece import SentencePieceProcessor

from mvlm.export.files import atomic_write
from mvlm.runtime.perplexity import WINDOW, windows

#: What llama-perplexity --kl-divergence prints. Its "Mean PPL(base)" is left: it is that of probabilities which were
#: stored in 16 bits, the smallest of them raised.
FIGURES = {
    "perplexity": r"Mean PPL\(Q\) +: +([\d.]+)",
    "kl_mean": r"Mean +KLD: +(-?[\d.]+)",
    "kl_error": r"Mean +KLD: +-?[\d.]+ ± +([\d.]+)",
    "kl_p99": r"99\.0% +KLD: +(-?[\d.]+)",
    "top1": r"Same top p: +([\d.]+)",
}
#: And without it.
FLOAT_FIGURES = {"float_perplexity": r"Final estimate: PPL = ([\d.]+)"}


def scored_tokens(path: Path) -> int:
    """How many tokens were scored.

    Args:
        path: what llama-perplexity wrote with F16: "_logits_", window, vocabulary, number of windows, and the tokens,
            all int32; log probabilities follow.
    """
    with path.open("rb") as file:
        magic = file.read(8)
        length, _, count = np.fromfile(file, np.int32, 3).tolist()
        theirs = np.fromfile(file, np.int32, length * count).reshape(count, length)
    if magic != b"_logits_" or length != WINDOW:
        sys.exit(f"{path}: is no file of llama-perplexity -c {WINDOW}; delete it")
    gauge = make_gauge()
    tokenizer = SentencePieceProcessor(model_file=str(gauge.language_model / "tokenizer.model"))
    found = list(windows(tokenizer.encode(gauge.evaluation_text.read_text(encoding="utf-8")), WINDOW, False))
    ours = np.array([ids for ids, _ in found])
    if ours.shape != theirs.shape or (ours != theirs).any():
        different = f"{(ours != theirs).mean():.2%} of the tokens" if ours.shape == theirs.shape else "the windows"
        sys.exit(f"{path}: llama.cpp reads another text than python -m mvlm.runtime.perplexity: {different} differ")
    return sum(len(ids) - first for ids, first in found)


def bits_of_linears(path: Path) -> float:
    """Bits a weight of the layers' matrices, scales included."""
    linears = [t for t in GGUFReader(path).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    return 8 * sum(int(t.n_bytes) for t in linears) / sum(int(t.n_elements) for t in linears)


def read_log(path: Path, figures: dict[str, str]) -> dict[str, float]:
    """Figures of a log, by the patterns that find them."""
    log = path.read_text(encoding="utf-8")
    found = {key: re.search(pattern, log) for key, pattern in figures.items()}
    if missing := [key for key, match in found.items() if match is None]:
        sys.exit(f"{path}: does not tell {', '.join(missing)}; delete it")
    return {key: float(match[1]) for key, match in found.items()}


def entry(folder: Path, name: str, tokens: int) -> dict[str, object]:
    """Of one type."""
    figures = read_log(folder / f"{name}.log", FIGURES)
    figures["top1"] /= 100
    return {
        "name": name.replace("-", ", "),
        "bits": round(bits_of_linears(folder / f"{name}.gguf"), 3),
        "bytes": (folder / f"{name}.gguf").stat().st_size,
        **read_log(folder / "f16.log", FLOAT_FIGURES),
        **figures,
        "tokens": tokens,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with NAME.gguf, NAME.log, f16.kld and f16.log")
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    tokens = scored_tokens(options.folder / "f16.kld")
    entries = [entry(options.folder, name, tokens) for name in options.names]
    with atomic_write(options.out) as file:
        file.write((json.dumps(entries, indent=2) + "\n").encode())
    print(f"{'':18}{'bits':>6}{'MB':>7}{'KL':>9}{'±':>9}{'99 %':>8}{'perplexity':>12}{'top-1':>8}")
    for row in entries:
        print(
            f"{row['name']:18}{row['bits']:>6.2f}{row['bytes'] / 1e6:>7.0f}{row['kl_mean']:>9.4f}"
            f"{row['kl_error']:>9.4f}{row['kl_p99']:>8.3f}{row['perplexity']:>12.2f}{row['top1']:>8.1%}"
        )
    print(f"{'F16':18}{'':39}{entries[0]['float_perplexity']:>18.2f}   ({tokens} tokens)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
