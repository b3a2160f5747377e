"""How faithful a ``.pte`` is to its checkpoint: float32 eager, quantized eager and the file itself, stage by stage.

Every stage gets the same input on all three sides (what the quantized eager model made of the stage before), so that
a row judges its own stage alone and can be strict: quantization must stay within what 4 bits allow, and the ``.pte``
must compute what the quantized eager model computes, up to the rounding of activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from PIL import Image
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from mvlm.export.checkpoint import Checkpoint
from mvlm.export.contract import Metadata
from mvlm.export.errors import ExportError
from mvlm.export.models import MobileVLM as EagerMobileVLM
from mvlm.export.models import TextDecoder
from mvlm.export.package import describe
from mvlm.export.preprocess import preprocess
from mvlm.export.recipe import Recipe
from mvlm.runtime.program import PteProgram
from mvlm.runtime.prompt import prompt_ids, prompt_text

#: Tokens that are generated, teacher-forced and free.
GENERATED_TOKENS = 32


#: How much further from the quantized eager model a file may be than that is from itself, in dB.
REPEATABILITY_MARGIN = 3.0
#: Below this SNR in dB, no noise of rounding is an excuse.
LEAST_REACHABLE = 20.0


@dataclass(frozen=True)
class Thresholds:
    """What a healthy file reaches, with a margin.

    Measured on the demo model: file against quantized eager model, 40.7 dB and more for image embeddings of 32
    pictures, 42 dB and more for logits; both differ where rounding of an activation falls to the other side.

    Attributes:
        pixels: SNR of the file's preprocessing against the checkpoint's.
        quantized_vision: SNR of quantized against float32 image embeddings.
        quantized_embedding: the same for the token embedding.
        quantized_logits: the same for logits.
        quantized_top1: share of teacher-forced positions with the same likeliest token, quantized against float32.
        pte_vision: SNR of the file's image embeddings against the quantized ones; like ``pte_logits`` no more than
            what :func:`reachable` says.
        pte_embedding: the same for the token embedding.
        pte_logits: the same for logits.
        pte_top1: share of teacher-forced positions with the same likeliest token, file against quantized eager.
    """

    pixels: float = 80.0
    quantized_vision: float = 20.0
    quantized_embedding: float = 35.0
    quantized_logits: float = 8.0
    quantized_top1: float = 0.75
    pte_vision: float = 35.0
    pte_embedding: float = 80.0
    pte_logits: float = 35.0
    pte_top1: float = 0.96


class Stages(Protocol):
    """The three methods of a .pte, however they are computed; shapes as in the contract."""

    def vision_encoder(self, pixel_values: Tensor) -> Tensor: ...

    def token_embedding(self, ids: Tensor) -> Tensor: ...

    def text_decoder(self, embeddings: Tensor, start_pos: int) -> Tensor: ...


class EagerStages:
    """The methods of a .pte, computed by an eager model, with a KV cache of the type ``kv_type``."""

    def __init__(self, model: EagerMobileVLM, max_context_len: int, kv_type: str = "fp32") -> None:
        self._model = model
        self._decoder = TextDecoder(model.language_model, max_context_len, kv_type)

    def vision_encoder(self, pixel_values: Tensor) -> Tensor:
        return self._model.encode_image(pixel_values)

    def token_embedding(self, ids: Tensor) -> Tensor:
        return self._model.embed_tokens(ids)

    def text_decoder(self, embeddings: Tensor, start_pos: int) -> Tensor:
        return self._decoder(embeddings, torch.tensor([start_pos]))[0, -1]


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        name: of the stage.
        compared: which side against which.
        cosine: of the angle between the two, None where it means nothing.
        snr: in dB, likewise.
        top1: share of positions with the same likeliest token, likewise.
        passed: whether it reached its threshold.
        note: the threshold, or what differs.
    """

    name: str
    compared: str
    passed: bool
    cosine: float | None = None
    snr: float | None = None
    top1: float | None = None
    note: str = ""


def snr_db(reference: Tensor, other: Tensor) -> float:
    """Signal-to-noise ratio ``10 log10(sum(reference²) / sum((reference - other)²))`` in dB; -inf if not finite."""
    reference, other = reference.double(), other.double()
    if not bool(torch.isfinite(other).all()):
        return -math.inf
    noise = float(((reference - other) ** 2).sum())
    signal = float((reference**2).sum())
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def cosine(reference: Tensor, other: Tensor) -> float:
    a, b = reference.double().flatten(), other.double().flatten()
    return float(torch.dot(a, b) / (a.norm() * b.norm()).clamp_min(1e-300))


def nudged(x: Tensor) -> Tensor:
    """Every float32 value moved by its last bit, up or down at random, the same at each call."""
    up = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.bool)
    return torch.nextafter(x, torch.where(up, math.inf, -math.inf))


def reachable(expected: Tensor, again: Tensor, wanted: float) -> float:
    """The SNR in dB that can be asked of a file: ``wanted``, or what the quantized eager model reaches against itself.

    Activations are rounded to 8 bits, and where a value lies on the edge between two steps the last bit of a float
    decides. In a deep network every such decision brings about others, until the noise of rounding is another one,
    however small the first difference was. So where the quantized eager model is less than ``wanted`` from itself for
    an input whose last bits differ, a file cannot be asked for more.

    Args:
        expected: of the quantized eager model.
        again: of the same, from a :func:`nudged` input.
        wanted: the threshold for networks that are not as deep.
    """
    return min(wanted, max(snr_db(expected, again) - REPEATABILITY_MARGIN, LEAST_REACHABLE))


def compare(name: str, compared: str, reference: Tensor, other: Tensor, min_snr: float) -> Row:
    """A row that passes if ``other`` is within ``min_snr`` dB of ``reference``."""
    snr = snr_db(reference, other)
    return Row(name, compared, snr >= min_snr, cosine(reference, other), snr, None, f"at least {min_snr:.3g} dB")


def compare_tokens(name: str, compared: str, reference_LV: Tensor, other_LV: Tensor, min_top1: float) -> Row:
    """A row that passes if the likeliest tokens agree at ``min_top1`` of the positions."""
    top1 = float((reference_LV.argmax(-1) == other_LV.argmax(-1)).double().mean())
    return Row(
        name,
        compared,
        top1 >= min_top1,
        cosine(reference_LV, other_LV),
        snr_db(reference_LV, other_LV),
        top1,
        f"top-1 at least {min_top1:.0%}",
    )


def compare_metadata(expected: Metadata, actual: Metadata) -> list[Row]:
    """A row per field of the metadata; the exporter's version may differ."""
    rows = []
    for field in fields(Metadata):
        if field.name == "mvlm_version":
            continue
        want, have = getattr(expected, field.name), getattr(actual, field.name)
        same = want == have
        note = "" if same else f"the checkpoint says {want!r}, the file {have!r}"
        rows.append(Row(f"metadata.{field.name}", "pte/checkpoint", same, note=note))
    return rows


def embed_vocabulary(stages: Stages, vocab_size: int, max_context_len: int) -> Tensor:
    """The embedding of every token id: [V, D]."""
    parts = [
        stages.token_embedding(torch.arange(start, min(start + max_context_len, vocab_size))[None])[0].clone()
        for start in range(0, vocab_size, max_context_len)
    ]
    return torch.cat(parts)


def teacher_forced(stages: Stages, prompt_1LD: Tensor, tokens_1LD: Tensor) -> Tensor:
    """Logits [n + 1, V] after the prompt and after each of n given tokens, run one by one through the cache."""
    position = prompt_1LD.shape[1]
    logits = [stages.text_decoder(prompt_1LD, 0).clone()]
    for index in range(tokens_1LD.shape[1]):
        logits.append(stages.text_decoder(tokens_1LD[:, index : index + 1], position + index).clone())
    return torch.stack(logits)


def generate_greedily(stages: Stages, prompt_1LD: Tensor, count: int) -> tuple[list[int], Tensor]:
    """The ``count`` likeliest tokens after the prompt, end tokens included, and the logits [count, V] of each."""
    embeddings, position = prompt_1LD, 0
    tokens: list[int] = []
    logits: list[Tensor] = []
    for _ in range(count):
        logits.append(stages.text_decoder(embeddings, position).clone())
        position += embeddings.shape[1]
        tokens.append(int(logits[-1].argmax()))
        embeddings = stages.token_embedding(torch.tensor([[tokens[-1]]])).clone()
    return tokens, torch.stack(logits)


def compare_free(expected: list[int], logits_LV: Tensor, actual: list[int], noise: float) -> Row:
    """A row for freely generated tokens.

    Two right programs may part where two tokens are as good as equally likely; after that their inputs differ. So
    parting counts as a failure only where the expected token leads the other by more than rounding can undo.

    Args:
        expected: tokens of the quantized eager model.
        logits_LV: from which it took them.
        actual: tokens of the file.
        noise: root mean square difference of the two sides' logits on equal input.
    """
    agree = next((i for i, (a, b) in enumerate(zip(expected, actual, strict=True)) if a != b), len(expected))
    share = agree / len(expected)
    name, compared = "free tokens", "pte/quantized"
    if agree == len(expected):
        return Row(name, compared, True, top1=share, note=f"all {agree} equal")
    lead = float(logits_LV[agree, expected[agree]] - logits_LV[agree, actual[agree]])
    allowed = 6 * noise
    note = f"part after {agree} of {len(expected)}, where the lead was {lead:.3f} (a tie up to {allowed:.3f})"
    return Row(name, compared, lead <= allowed, top1=share, note=note)


def check(
    program: PteProgram,
    checkpoint: Checkpoint,
    float32: EagerMobileVLM,
    quantized: EagerMobileVLM,
    recipe: Recipe,
    image: Image.Image | None,
    question: str,
    thresholds: Thresholds,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Compares a file with the checkpoint it should have been made from.

    Args:
        program: the file.
        checkpoint: that one.
        float32: its model.
        quantized: the same, quantized by ``recipe``.
        recipe: with which the file was made.
        image: any picture; not looked at, and may be None, where the checkpoint is a language model alone.
        question: about it.
        thresholds: what to reach.
        say: told what is being done.

    Returns:
        All rows, in the order of the stages.
    """
    expected = describe(checkpoint, recipe)
    rows = compare_metadata(expected, program.metadata)
    same_tokenizer = checkpoint.tokenizer == program.tokenizer
    rows.append(
        Row(
            "tokenizer",
            "pte/checkpoint",
            same_tokenizer,
            note="" if same_tokenizer else "the bytes of tokenizer.model differ",
        )
    )
    eager = EagerStages(float32, recipe.max_context_len)
    reference = EagerStages(quantized, recipe.max_context_len, recipe.kv_cache)

    # Where only one side takes pictures, metadata.image has failed above, and nothing further can be compared.
    if (expected.image is None) != (program.metadata.image is None):
        return rows
    picture_1TD: list[Tensor] = []
    if expected.image is not None and program.metadata.image is not None:
        if image is None:
            raise ValueError("the checkpoint's model takes a picture, and none was given")
        say("pixels and vision features")
        pixels = preprocess(image, expected.image)
        program_pixels = preprocess(image, program.metadata.image)
        if program_pixels.shape != pixels.shape:
            note = f"{list(pixels.shape)} expected, the file makes {list(program_pixels.shape)}"
            return [*rows, Row("pixels", "pte/checkpoint", False, note=note)]
        rows.append(compare("pixels", "pte/checkpoint", pixels, program_pixels, thresholds.pixels))
        features = [stages.vision_encoder(pixels).clone() for stages in (eager, reference, program)]
        pte_vision = reachable(features[1], reference.vision_encoder(nudged(pixels)), thresholds.pte_vision)
        rows += _three_sides("vision features", features, thresholds.quantized_vision, pte_vision)
        picture_1TD = [features[1]]

    say("token embeddings")
    tables = [embed_vocabulary(s, expected.vocab_size, recipe.max_context_len) for s in (eager, reference, program)]
    rows += _three_sides("token embeddings", tables, thresholds.quantized_embedding, thresholds.pte_embedding)

    tokenizer = SentencePieceProcessor(model_proto=checkpoint.tokenizer)
    pieces = prompt_ids(tokenizer, expected, prompt_text(expected, question, bool(picture_1TD), raw=False))
    parts = [tables[1][torch.tensor(piece)][None] for piece in pieces]
    prompt = torch.cat([parts[0], *picture_1TD, *parts[1:]], dim=1)
    room = recipe.max_context_len - prompt.shape[1]
    if room < GENERATED_TOKENS:
        raise ExportError(
            f"the prompt takes {prompt.shape[1]} of {recipe.max_context_len} positions; "
            f"{GENERATED_TOKENS} must be left for tokens"
        )

    say("prefill")
    prefill = [stages.text_decoder(prompt, 0).clone() for stages in (eager, reference, program)]
    pte_logits = reachable(prefill[1], reference.text_decoder(nudged(prompt), 0), thresholds.pte_logits)
    rows += _three_sides("prefill logits", prefill, thresholds.quantized_logits, pte_logits)

    say(f"{GENERATED_TOKENS} tokens, free and teacher-forced")
    expected_tokens, expected_logits = generate_greedily(reference, prompt, GENERATED_TOKENS)
    forced = tables[1][torch.tensor(expected_tokens[:-1])][None]
    eager_logits = teacher_forced(eager, prompt, forced)
    program_logits = teacher_forced(program, prompt, forced)
    rows.append(
        compare_tokens("forced tokens", "quantized/float32", eager_logits, expected_logits, thresholds.quantized_top1)
    )
    rows.append(compare_tokens("forced tokens", "pte/quantized", expected_logits, program_logits, thresholds.pte_top1))
    rows.append(compare("forced logits", "pte/quantized", expected_logits, program_logits, pte_logits))
    rows.append(compare_tokens("forced tokens", "pte/float32", eager_logits, program_logits, thresholds.quantized_top1))
    free_tokens, _ = generate_greedily(program, prompt, GENERATED_TOKENS)
    noise = float((expected_logits - program_logits).double().square().mean().sqrt())
    rows.append(compare_free(expected_tokens, expected_logits, free_tokens, noise))
    return rows


def _three_sides(name: str, sides: Sequence[Tensor], quantized_snr: float, pte_snr: float) -> list[Row]:
    float32, quantized, pte = sides
    return [
        compare(name, "quantized/float32", float32, quantized, quantized_snr),
        compare(name, "pte/quantized", quantized, pte, pte_snr),
        # Both errors add up here; the tighter rows above say whose it is.
        compare(name, "pte/float32", float32, pte, quantized_snr - 1),
    ]


def table(rows: Iterable[Row]) -> str:
    """The report for people. Metadata that agrees is one line."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows = list(rows)
    metadata = [row for row in rows if row.name.startswith("metadata.")]
    shown = [row for row in rows if row not in metadata or not row.passed]
    lines = [f"{'stage':<28}{'compared':<20}{'cosine':>10}{'SNR dB':>9}{'top-1':>8}  result"]
    agreeing = sum(row.passed for row in metadata)
    verdict = "ok" if agreeing == len(metadata) else "FAILED"
    lines.append(f"{f'metadata, {agreeing} of {len(metadata)} fields':<75}  {verdict}")
    lines += [
        f"{row.name:<28}{row.compared:<20}{number(row.cosine, '.6f'):>10}{number(row.snr, '.1f'):>9}"
        f"{number(row.top1, '.1%'):>8}  {'ok' if row.passed else 'FAILED'}{f'  ({row.note})' if row.note else ''}"
        for row in shown
    ]
    return "\n".join(lines)
