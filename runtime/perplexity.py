"""How well a ``.pte`` predicts a text, and how far it is from the float32 model it was made of.

    python -m mvlm.runtime.perplexity mobilevlm.pte --text text.txt --model ./MobileVLM-1.7B

Perplexity alone says little about quantization: rounding may make it better on a text by accident. With the checkpoint
the Kullback-Leibler divergence of the file's distribution from the float32 model's is told, token by token, and how
often both think the same token the likeliest.

The text is cut into windows, each read from position 0 on by itself, and only the second half of a window is scored,
so that every token that is has much before it. llama.cpp's llama-perplexity does it so, too; but it puts a BOS in place
of a window's first token if the .gguf says that the model wants one, and here there is none. With pictures, each window
stands behind a BOS, the beginning of the model's prompt template, and a picture.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mvlm.export.command_line import add_checkpoint_arguments, open_of
from mvlm.export.errors import ExportError
from mvlm.export.files import atomic_write, check_writable
from mvlm.export.progress import Progress, quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor

    from mvlm.export.checkpoint import Checkpoint
    from mvlm.runtime.program import PteProgram

#: Tokens of a window, as in most published figures of llama.cpp.
WINDOW = 512

#: Tokens of the smallest one: two of them are scored, the fewest that have a standard error.
LEAST_WINDOW = 5

EPILOG = """\
examples:
  # perplexity of a file
  python -m mvlm.runtime.perplexity mobilevlm.pte --text text.txt

  # and how far it is from the float32 checkpoint, as JSON too
  python -m mvlm.runtime.perplexity mobilevlm.pte --text text.txt --model ./MobileVLM-1.7B --json out.json

  # the same behind pictures, which take turns
  python -m mvlm.runtime.perplexity mobilevlm.pte --text text.txt --images a.jpg b.jpg --model ./MobileVLM-1.7B
"""


@dataclass(frozen=True)
class Score:
    """What was measured.

    Attributes:
        perplexity: exp of the mean negative log probability of the text's tokens.
        perplexity_error: its standard error.
        tokens: that were scored.
        float_perplexity: of the float32 model on the same tokens; None without a checkpoint, as all that follow.
        kl_mean: mean Kullback-Leibler divergence KL(float32 || file), in nats per token.
        kl_error: its standard error.
        kl_p99: the 99th percentile of it.
        top1: share of the tokens where both have the same likeliest token.
        top1_error: its standard error.
    """

    perplexity: float
    perplexity_error: float
    tokens: int
    float_perplexity: float | None = None
    kl_mean: float | None = None
    kl_error: float | None = None
    kl_p99: float | None = None
    top1: float | None = None
    top1_error: float | None = None


@dataclass(frozen=True)
class Text:
    """What is read from position 0 on, and what of it is scored.

    Attributes:
        opening: ids that come first; none without a picture.
        picture: number of the picture behind them; None without one.
        ids: of the window.
        first: number of the first of ``ids`` that is predicted; 1 at least, for the first has nothing before it.
    """

    opening: tuple[int, ...]
    picture: int | None
    ids: tuple[int, ...]
    first: int


def windows(ids: Sequence[int], length: int, score_all: bool) -> Iterator[tuple[tuple[int, ...], int]]:
    """Whole windows of a text's ids, and the first token of each that is predicted; what is left over is not read."""
    for start in range(0, len(ids) - length + 1, length):
        # llama-perplexity's first scored token is the one behind position length / 2.
        yield tuple(ids[start : start + length]), 1 if score_all else length // 2 + 1


def texts_of(program: PteProgram, ids: Sequence[int], length: int, score_all: bool, pictures: int) -> list[Text]:
    """The windows of a text as they are read, pictures in turns before them.

    Raises:
        ExportError: the text has not one window, or the file has not as many positions.
        PteError: there are pictures, and the file is a language model alone.
    """
    from sentencepiece import SentencePieceProcessor

    from mvlm.export.contract import PROMPT_PLACEHOLDER

    metadata = program.metadata
    opening: tuple[int, ...] = ()
    image_tokens = 0
    if pictures:
        image_tokens = program.require_vision().tokens
        tokenizer = SentencePieceProcessor(model_proto=program.tokenizer)
        before = (metadata.prompt_template.split(PROMPT_PLACEHOLDER)[0] + metadata.image_prefix).split(
            metadata.image_marker
        )[0]
        opening = (metadata.bos_id, *tokenizer.encode(before))
    needed = len(opening) + image_tokens + length
    if needed > metadata.max_context_len:
        room = metadata.max_context_len - needed + length
        mend = f"choose --window {room} or less"
        if room < LEAST_WINDOW:
            mend = "leave out the pictures, or export with more positions (--max-context-len)"
        raise ExportError(
            f"a window of {length} tokens {'behind a picture ' if pictures else ''}takes {needed} positions, and "
            f"{program.path} has {metadata.max_context_len}; {mend}"
        )
    found = [
        Text(opening, number % pictures if pictures else None, window, first)
        for number, (window, first) in enumerate(windows(ids, length, score_all))
    ]
    if not found:
        mend = f"more text, or --window {len(ids)} or less" if len(ids) >= LEAST_WINDOW else "more text"
        raise ExportError(f"the text has {len(ids)} tokens, less than a window of {length}; give {mend}")
    return found


def measure(
    program: PteProgram,
    texts: Sequence[Text],
    pixels: Sequence[Tensor],
    checkpoint: Checkpoint | None,
    progress: Progress,
) -> Score:
    """Scores texts through a file and, if there is a checkpoint, compares it with the float32 model.

    Args:
        program: the file.
        texts: to score.
        pixels: of the pictures, float32 [1, 3, S, S] each.
        checkpoint: that the file was made of.
        progress: told the share that is done.
    """
    import torch

    with torch.no_grad():
        reference = _Float32(checkpoint, texts, pixels, progress) if checkpoint is not None else None
        with progress.stage("read through the file"):
            pictures = [program.vision_encoder(picture)[0].clone() for picture in pixels]
            losses, float_losses, divergences, agreements = [], [], [], []
            for number, text in enumerate(texts):
                before = [program.token_embedding(torch.tensor([text.opening]))[0]] if text.opening else []
                if text.picture is not None:
                    before.append(pictures[text.picture])
                embeddings = torch.cat([*before, program.token_embedding(torch.tensor([text.ids]))[0]])
                # The last token predicts nothing that is in the window.
                first = len(embeddings) - len(text.ids) + text.first - 1
                logp = program.score(embeddings[None, :-1], first).log_softmax(-1)
                said = torch.tensor(text.ids[text.first :])[:, None]
                losses.append(-logp.gather(1, said)[:, 0])
                if reference is not None:
                    expected = reference.log_probabilities(number)
                    float_losses.append(-expected.gather(1, said)[:, 0])
                    divergences.append((expected.exp() * (expected - logp)).sum(-1))
                    agreements.append(expected.argmax(-1) == logp.argmax(-1))
                progress.share((number + 1) / len(texts))

    def mean(parts: list[Tensor]) -> tuple[float, float]:
        values = torch.cat(parts).double()
        return float(values.mean()), float(values.std() / len(values) ** 0.5)

    loss, loss_error = mean(losses)
    score = Score(math.exp(loss), math.exp(loss) * loss_error, sum(map(len, losses)))
    if reference is None:
        return score
    kl, kl_error = mean(divergences)
    top1, top1_error = mean(agreements)
    return Score(
        score.perplexity,
        score.perplexity_error,
        score.tokens,
        math.exp(mean(float_losses)[0]),
        kl,
        kl_error,
        float(torch.cat(divergences).quantile(0.99)),
        top1,
        top1_error,
    )


class _Float32:
    """What the float32 model thinks of all texts, read before the file is; no more than a layer of it is in memory."""

    def __init__(
        self, checkpoint: Checkpoint, texts: Sequence[Text], pixels: Sequence[Tensor], progress: Progress
    ) -> None:
        import torch

        from mvlm.export.checkpoint.checkpoint import empty_model
        from mvlm.export.streamed_model import FloatLanguageModel, read_sequences

        self._model = FloatLanguageModel(checkpoint, torch.device("cpu"))
        pictures = []
        if pixels:
            with progress.stage("encode pictures in float32"):
                empty = empty_model(checkpoint.config)
                tower = checkpoint.load_part(empty.vision_tower, "vision_tower")
                projector = checkpoint.load_part(empty.mm_projector, "mm_projector")
                pictures = [projector(tower(picture))[0] for picture in pixels]
                del tower, projector
        table = self._model.embedding
        sequences = []
        for text in texts:
            picture = [] if text.picture is None else [pictures[text.picture]]
            sequences.append(torch.cat([table[list(text.opening)], *picture, table[list(text.ids)]])[:-1])
        with progress.stage("read in float32"):
            # Clones, so that what is not scored goes.
            self._outputs = [
                output[len(output) + text.first - len(text.ids) :].clone()
                for text, output in zip(texts, read_sequences(self._model, sequences), strict=True)
            ]

    def log_probabilities(self, number: int) -> Tensor:
        """Log probabilities [n, V] of every scored token of a text."""
        return self._model.logits(self._outputs[number]).log_softmax(-1)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mvlm.runtime.perplexity",
        description="Perplexity of a .pte on a text and, with its checkpoint, how far it is from float32.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pte", type=Path, metavar="FILE.pte", help="a file made by mvlm.export")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument(
        "--images", type=Path, nargs="+", default=[], metavar="FILE", help="pictures that come before windows, in turns"
    )
    parser.add_argument(
        "--window", type=int, default=WINDOW, metavar="N", help="tokens of a window (default: %(default)s)"
    )
    parser.add_argument(
        "--score",
        choices=("second-half", "all"),
        default="second-half",
        help="which tokens of a window are scored (default: %(default)s)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="windows to read at the most (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    add_checkpoint_arguments(parser, default="none, and no comparison with float32")
    return parser.parse_args(arguments)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ExportError(f"--text {path}: is no UTF-8 text ({error}); convert it") from error
    except (FileNotFoundError, IsADirectoryError) as error:
        what = "is a folder" if path.is_dir() else "no such file"
        raise ExportError(f"--text {path}: {what}; give the name of a file of UTF-8 text") from error


def run(options: argparse.Namespace) -> Score:
    """Measures what the flags say.

    Raises:
        ValueError: something that was given cannot be used.
    """
    for name, value, least in (("--window", options.window, LEAST_WINDOW), ("--limit", options.limit, 1)):
        if value is not None and value < least:
            raise ExportError(f"{name} {value} is not possible: choose {least} or more")
    if options.json is not None:
        check_writable(options.json)
    text = _read_text(options.text)
    # Late, so that --help and wrong flags answer at once.
    from sentencepiece import SentencePieceProcessor

    from mvlm.export.preprocess import load_image, preprocess
    from mvlm.runtime.program import PteProgram

    progress = Progress(options.quiet)
    program = PteProgram(options.pte)
    ids = SentencePieceProcessor(model_proto=program.tokenizer).encode(text)
    texts = texts_of(program, ids, options.window, options.score == "all", len(options.images))[: options.limit]
    pixels = [preprocess(load_image(path), program.require_vision()) for path in options.images]
    checkpoint = None
    flags = (options.model, options.random_weights, options.seed, options.revision, options.vision_tower)
    if any(flag is not None for flag in flags):  # without the first two of them, open_of says what is amiss
        checkpoint = open_of(options)
        if checkpoint.checkpoint_id != program.metadata.checkpoint_id:
            raise ExportError(
                f"{options.pte} was not made of {checkpoint.name} as it is now (it says {program.metadata.model_name}, "
                f"{program.metadata.checkpoint_id[:19]}…; the checkpoint is {checkpoint.checkpoint_id[:19]}…); "
                "give the checkpoint that it was made of, or export it again"
            )
    return measure(program, texts, pixels, checkpoint, progress)


def report(score: Score) -> str:
    """The figures for people."""
    lines = [f"perplexity      {score.perplexity:10.3f} ± {score.perplexity_error:.3f}   ({score.tokens} tokens)"]
    if score.kl_mean is not None:
        lines += [
            f"of float32      {score.float_perplexity:10.3f}",
            f"KL to float32   {score.kl_mean:10.4f} ± {score.kl_error:.4f}   (nats a token)",
            f"  99 % below    {score.kl_p99:10.3f}",
            f"same top token  {score.top1:10.1%} ± {score.top1_error:.1%}",
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 for unusable input, 1 for a failure, 130 for Ctrl-C."""
    options = parse_arguments(arguments)
    quiet_libraries()
    try:
        score = run(options)
        print(report(score))
        if options.json is not None:
            with atomic_write(options.json) as file:
                file.write((json.dumps(asdict(score), indent=2) + "\n").encode())
    except ValueError as error:  # ExportError and PteError are such
        print(f"mvlm.runtime.perplexity: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"mvlm.runtime.perplexity: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mvlm.runtime.perplexity: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
