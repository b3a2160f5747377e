"""How faithful a ``.pte`` is to its checkpoint: float32 eager, quantized eager and the file itself, stage by stage.

Two questions are kept apart. *Does the file compute what it should*, the quantized model: that is judged strictly, by
what the model itself makes of the last bit of its input, for no two right programs agree better than that. *What do few
bits cost*, against the float32 checkpoint: that is reported, with a bound that only a broken recipe misses.

Every stage gets the same input on all three sides, what the file made of the stage before, so that a row judges its own
stage alone. The sides take turns: the file, then the float32 model, whose layers are read one by one, then the
quantized eager model. No two are in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from torchao.quantization import IntxUnpackedToInt8Tensor

from mvlm.export.checkpoint import Checkpoint
from mvlm.export.checkpoint.checkpoint import empty_model
from mvlm.export.contract import TEXT_DECODER, VISION_ENCODER, Metadata
from mvlm.export.errors import ExportError
from mvlm.export.models import MobileVLM as EagerMobileVLM
from mvlm.export.models import TextDecoder
from mvlm.export.package import describe
from mvlm.export.preprocess import preprocess
from mvlm.export.progress import return_freed_memory
from mvlm.export.quantize import meta_model, quantize_linear, quantize_parameters, schemes_of
from mvlm.export.quantize import snr_db as weights_snr_db
from mvlm.export.recipe import Recipe
from mvlm.export.stored_weights import StoredLinear, linear_names, read_stored_linears, weights_digest
from mvlm.export.streamed_model import FloatLanguageModel, read_sequences
from mvlm.runtime.program import PteProgram
from mvlm.runtime.prompt import prompt_ids, prompt_text
from mvlm.runtime.sampler import Sampler

#: Tokens that the file is let write, the likeliest each time, and drawn as they are likely.
GREEDY_TOKENS = 32
DRAWN_TOKENS = 64

#: Times that the noise of rounding is measured, each with last bits of its own.
NUDGES = 2

#: How much further from the quantized eager model a file may be, in divergence or power, than that is from itself. The
#: noise is what last bits of one place do, the input; a file's kernels round otherwise in every linear and attention.
#: What comes of each place adds up in power, and none has more layers behind it than the input. In a deep network one
#: place does as much as all, for whatever is changed grows until it is as large as rounding can make it.
KL_MARGIN = 8.0
DB_MARGIN = 10 * math.log10(KL_MARGIN)
#: Divergences below this, in nats, are nothing that an answer could depend on.
KL_FLOOR = 1e-3
#: An SNR in dB below which no noise of rounding is an excuse: half of the power is something else.
LEAST_REACHABLE = 3.0
#: How many times the noise a likelier token must lead by to be expected from other kernels, too: three standard
#: deviations of a difference of two logits, each of which may have KL_MARGIN times the noise's power.
TIE = 3 * math.sqrt(2 * KL_MARGIN)


@dataclass(frozen=True)
class Thresholds:
    """What a healthy file reaches, with a margin.

    Attributes:
        pixels: SNR of the file's preprocessing against the checkpoint's.
        weights: SNR of the linears' stored weights against those made of the checkpoint anew; not infinite, for a
            weight in the middle between two values falls to either side.
        quantized_vision: SNR of quantized against float32 image embeddings.
        quantized_embedding: the same for the token embedding.
        quantized_kl: divergence of the quantized from the float32 model's distribution, mean over a text that the file
            writes itself, in nats. SmolLM2-135M, as fragile as real Llamas get, has 0.7 without calibration, and 1.5
            with a recipe that ruins its answers (groups of 128, a 4-bit lm_head).
        pte_vision: SNR of the file's image embeddings against the quantized ones; like ``pte_logits`` no more than
            what :func:`reachable` says.
        pte_embedding: the same for the token embedding.
        pte_logits: the same for logits, whose mean is taken off.
    """

    pixels: float = 80.0
    weights: float = 50.0
    quantized_vision: float = 20.0
    quantized_embedding: float = 35.0
    quantized_kl: float = 1.0
    pte_vision: float = 35.0
    pte_embedding: float = 80.0
    pte_logits: float = 35.0


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

    def score(self, embeddings: Tensor, first: int) -> Tensor:
        """Logits [n - first, V] of a text [1, n, D] from one of its positions on; as :meth:`PteProgram.score`."""
        self._decoder.logit_positions = embeddings.shape[1] - first
        return self._decoder(embeddings, torch.tensor([0]))[0]


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        name: of the stage.
        compared: which side against which.
        cosine: of the angle between the two, None where it means nothing.
        snr: in dB, likewise.
        top1: share of positions with the same likeliest token, likewise.
        kl: mean Kullback-Leibler divergence of the second named from the first, in nats, likewise.
        passed: whether it reached its threshold.
        note: the threshold, or what differs.
    """

    name: str
    compared: str
    passed: bool
    cosine: float | None = None
    snr: float | None = None
    top1: float | None = None
    kl: float | None = None
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


def nudged(x: Tensor, seed: int = 0) -> Tensor:
    """Every float32 value moved by its last bit, up or down at random, the same for the same seed."""
    up = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.bool)
    return torch.nextafter(x, torch.where(up, math.inf, -math.inf))


def centred(logits: Tensor) -> Tensor:
    """Logits [..., V] without their mean, of which a distribution knows nothing."""
    return logits - logits.mean(-1, keepdim=True)


def divergence(reference_LV: Tensor, other_LV: Tensor) -> float:
    """Mean Kullback-Leibler divergence KL(reference || other) of logits [L, V], in nats; inf if not finite."""
    p, q = reference_LV.double().log_softmax(-1), other_LV.double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    return kl if math.isfinite(kl) else math.inf


def reachable(noise_snr: float, wanted: float) -> float:
    """The SNR in dB that can be asked of a file: ``wanted``, or what the quantized eager model reaches against itself.

    Activations are rounded to 8 bits, and where a value lies on the edge between two steps the last bit of a float
    decides. In a deep network every such decision brings about others, until the noise of rounding is another one,
    however small the first difference was. So where the quantized eager model is less than ``wanted`` from itself for
    an input whose last bits differ, a file cannot be asked for more.

    Args:
        noise_snr: of the quantized eager model against itself, its input :func:`nudged`.
        wanted: the threshold for networks that are not as deep.
    """
    return min(wanted, max(noise_snr - DB_MARGIN, LEAST_REACHABLE))


def compare(name: str, compared: str, reference: Tensor, other: Tensor, min_snr: float) -> Row:
    """A row that passes if ``other`` is within ``min_snr`` dB of ``reference``."""
    snr = snr_db(reference, other)
    return Row(name, compared, snr >= min_snr, cosine(reference, other), snr, note=f"at least {min_snr:.3g} dB")


def compare_logits(
    name: str, compared: str, reference_LV: Tensor, other_LV: Tensor, max_kl: float, min_snr: float = -math.inf
) -> Row:
    """A row that passes if the distributions diverge by ``max_kl`` nats at the most, and the SNR suffices."""
    snr, kl = snr_db(centred(reference_LV), centred(other_LV)), divergence(reference_LV, other_LV)
    top1 = float((reference_LV.argmax(-1) == other_LV.argmax(-1)).double().mean())
    note = f"KL at most {max_kl:.2g}" + (f", at least {min_snr:.3g} dB" if min_snr > -math.inf else "")
    passed = kl <= max_kl and snr >= min_snr
    return Row(name, compared, passed, cosine(centred(reference_LV), centred(other_LV)), snr, top1, kl, note)


@dataclass(frozen=True)
class Noise:
    """What the last bits of its input do to a model's logits for a text.

    Attributes:
        snr: of the centred logits against themselves, in dB.
        kl: divergence from itself, in nats.
        rms: root mean square of the change of a logit, the mean of all taken off.
    """

    snr: float
    kl: float
    rms: float

    @classmethod
    def of(cls, expected_LV: Tensor, again: Sequence[Tensor]) -> Noise:
        """Of logits, and those from :func:`nudged` inputs."""
        changes = [centred(other) - centred(expected_LV) for other in again]
        power = sum(float(change.double().square().mean()) for change in changes) / len(changes)
        kl = sum(divergence(expected_LV, other) for other in again) / len(again)
        signal = float(centred(expected_LV).double().square().mean())
        snr = math.inf if power == 0 else 10 * math.log10(max(signal, 1e-300) / power)
        return cls(snr, kl, math.sqrt(power))

    @property
    def max_kl(self) -> float:
        """The divergence that can be allowed a file."""
        return max(KL_FLOOR, KL_MARGIN * self.kl)


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


def generate(stages: Stages, prompt_1LD: Tensor, count: int, sampler: Sampler) -> tuple[list[int], Tensor]:
    """``count`` tokens after the prompt, end tokens included, and the logits [count, V] that each was chosen by.

    Logits that are not finite are no reason to stop here; whoever compares them will see.
    """
    embeddings, position = prompt_1LD, 0
    tokens: list[int] = []
    logits: list[Tensor] = []
    for _ in range(count):
        logits.append(stages.text_decoder(embeddings, position).clone())
        position += embeddings.shape[1]
        tokens.append(sampler(logits[-1].nan_to_num(0.0, 0.0, 0.0)))
        embeddings = stages.token_embedding(torch.tensor([[tokens[-1]]])).clone()
    return tokens, torch.stack(logits)


def compare_free(name: str, compared: str, expected_LV: Tensor, tokens: Sequence[int], noise: Noise) -> Row:
    """A row for tokens that were chosen as the likeliest, each after all before it.

    Two right programs may part where two tokens are as good as equally likely. So a token that is not the likeliest
    counts as a failure only where the likeliest leads by more than rounding can undo.

    Args:
        name: of the row.
        compared: whose tokens against whose logits.
        expected_LV: logits of the quantized eager model, after the prompt and the tokens before each.
        tokens: that were chosen.
        noise: of those logits.
    """
    said = torch.tensor(list(tokens))[:, None]
    leads = (expected_LV.amax(-1) - expected_LV.gather(1, said)[:, 0]).nan_to_num(math.inf)
    share = float((leads == 0).double().mean())
    worst, allowed = float(leads.max()), TIE * noise.rms
    note = f"the likeliest led by {worst:.3f} at the most (a tie up to {allowed:.3f})" if worst else "all equal"
    return Row(name, compared, worst <= allowed, top1=share, note=note)


class StoredWeights:
    """A file's linears as what calibration found out: weights that cannot be made of the checkpoint in minutes."""

    def __init__(self, linears: Mapping[str, StoredLinear]) -> None:
        self._linears = linears

    def weight(self, name: str) -> IntxUnpackedToInt8Tensor | None:
        return self._linears[name].tensor() if name in self._linears else None

    def importance(self, name: str) -> Tensor | None:
        return None


def check_weights(
    path: Path, checkpoint: Checkpoint, recipe: Recipe, digest: str, exporter: str, min_snr: float
) -> tuple[list[Row], dict[str, StoredLinear]]:
    """Rows for the weights in a file, and the linears by name.

    That they are what the exporter made of the checkpoint is told by a digest. Where that can be made anew, because it
    was this version and without calibration, it is.

    Args:
        path: of the file.
        checkpoint: that it was made of.
        recipe: by which.
        digest: that is in it.
        exporter: version of mvlm that it was made with.
        min_snr: of the weights against those made anew.
    """
    model = meta_model(checkpoint)
    schemes = schemes_of(model, recipe)
    linears: dict[str, StoredLinear] = {}
    try:
        stored = read_stored_linears(path)
        for method in (VISION_ENCODER, TEXT_DECODER):
            names = linear_names(model, schemes, method)
            found = stored.get(method, [])
            if len(found) != len(names):
                raise ExportError(f"{method} has {len(found)} quantized linears, the checkpoint's {len(names)}")
            for name, linear in zip(names, found, strict=True):
                shape = tuple(model.get_submodule(name).weight.shape)
                if (linear.out_features, linear.in_features) != shape:
                    raise ExportError(f"{name} is {[linear.out_features, linear.in_features]}, not {list(shape)}")
                linears[name] = linear
    except ExportError as error:
        return [Row("weights", "pte/export", False, note=str(error))], {}
    same = weights_digest((name, (linear.weight, linear.scales)) for name, linear in linears.items()) == digest
    note = f"{len(linears)} linears" if same else "not those that the exporter made: their digest differs"
    rows = [Row("weights", "pte/export", same, note=note)]
    # Another version may choose scales otherwise.
    if recipe.calibration == "none" and exporter == version("mvlm"):
        worst, where = math.inf, ""
        for name, linear in linears.items():
            expected, _ = quantize_linear(name, checkpoint.read(f"{name}.weight"), schemes[name], None)
            snr = weights_snr_db(expected.dequantize(), linear.tensor())
            if not snr >= worst:
                worst, where = snr, name
            return_freed_memory()
        note = f"at least {min_snr:.3g} dB" + (f"; the worst is {where}" if worst < min_snr else "")
        rows.append(Row("weights", "pte/checkpoint", worst >= min_snr, snr=worst, note=note))
    return rows, linears


@dataclass(frozen=True)
class _Side:
    """What one side makes of the common inputs.

    Attributes:
        features: image embeddings [1, T, D]; None without a picture.
        table: embeddings [V, D] of all tokens.
        greedy: logits after the prompt and each greedy token, [GREEDY_TOKENS, V].
        drawn: the same for the drawn ones, [DRAWN_TOKENS, V].
    """

    features: Tensor | None
    table: Tensor
    greedy: Tensor
    drawn: Tensor


def check(
    program: PteProgram,
    checkpoint: Checkpoint,
    recipe: Recipe,
    image: Image.Image | None,
    question: str,
    thresholds: Thresholds | None = None,
    say: Callable[[str], None] = lambda text: None,
    other_engine: Callable[[], Sequence[int]] | None = None,
) -> list[Row]:
    """Compares a file with the checkpoint it should have been made from.

    Args:
        program: the file.
        checkpoint: that one.
        recipe: with which the file was made.
        image: any picture; not looked at, and may be None, where the checkpoint is a language model alone.
        question: about it.
        thresholds: what to reach.
        say: told what is being done.
        other_engine: gives the likeliest tokens after the same question and picture by another program that runs the
            file, :data:`GREEDY_TOKENS` of them.

    Returns:
        All rows, in the order of the stages.

    Raises:
        ExportError: the prompt leaves no room for tokens.
    """
    thresholds = thresholds or Thresholds()
    expected = describe(checkpoint, recipe)
    rows = compare_metadata(expected, program.metadata)
    same_tokenizer = checkpoint.tokenizer == program.tokenizer
    note = "" if same_tokenizer else "the bytes of tokenizer.model differ"
    rows.append(Row("tokenizer", "pte/checkpoint", same_tokenizer, note=note))
    # Where only one side takes pictures, metadata.image has failed above, and nothing further can be compared.
    if (expected.image is None) != (program.metadata.image is None):
        return rows
    pixels = None
    if expected.image is not None and program.metadata.image is not None:
        if image is None:
            raise ValueError("the checkpoint's model takes a picture, and none was given")
        pixels = preprocess(image, expected.image)
        program_pixels = preprocess(image, program.metadata.image)
        if program_pixels.shape != pixels.shape:
            note = f"{list(pixels.shape)} expected, the file makes {list(program_pixels.shape)}"
            return [*rows, Row("pixels", "pte/checkpoint", False, note=note)]
        rows.append(compare("pixels", "pte/checkpoint", pixels, program_pixels, thresholds.pixels))

    say("weights")
    found, linears = check_weights(
        program.path, checkpoint, recipe, program.weights_digest, program.metadata.mvlm_version, thresholds.weights
    )
    rows += found

    say("the file")
    features = None if pixels is None else program.vision_encoder(pixels).clone()
    table = embed_vocabulary(program, expected.vocab_size, recipe.max_context_len)
    tokenizer = SentencePieceProcessor(model_proto=checkpoint.tokenizer)
    pieces = prompt_ids(tokenizer, expected, prompt_text(expected, question, int(pixels is not None), raw=False))
    parts = [table[torch.tensor(piece)][None] for piece in pieces]
    prompt = torch.cat([parts[0], *([] if features is None else [features]), *parts[1:]], dim=1)
    positions = prompt.shape[1]
    if recipe.max_context_len - positions < DRAWN_TOKENS:
        raise ExportError(
            f"the prompt takes {positions} of {recipe.max_context_len} positions; {DRAWN_TOKENS} must be left for "
            "tokens"
        )
    greedy_tokens, steps = generate(program, prompt, GREEDY_TOKENS, Sampler())
    drawn_tokens, _ = generate(program, prompt, DRAWN_TOKENS, Sampler(temperature=1.0, seed=0))
    texts = [
        torch.cat([prompt, table[torch.tensor(tokens[:-1])][None]], dim=1) for tokens in (greedy_tokens, drawn_tokens)
    ]
    pte = _Side(features, table, steps, program.score(texts[1], positions - 1).clone())
    others = list(other_engine()) if other_engine is not None else None

    say("float32")
    float32 = _float32_side(checkpoint, pixels, texts, positions)

    say("quantized eager")
    model = quantize_parameters(checkpoint, recipe, StoredWeights(linears) if recipe.calibration != "none" else None)
    stages = EagerStages(model, recipe.max_context_len, recipe.kv_cache)
    quantized = _Side(
        None if pixels is None else stages.vision_encoder(pixels).clone(),
        embed_vocabulary(stages, expected.vocab_size, recipe.max_context_len),
        stages.score(texts[0], positions - 1),
        stages.score(texts[1], positions - 1),
    )
    noises = [
        Noise.of(logits, [stages.score(nudged(text, seed), positions - 1) for seed in range(NUDGES)])
        for text, logits in zip(texts, (quantized.greedy, quantized.drawn), strict=True)
    ]
    if pixels is not None:
        assert float32.features is not None
        assert quantized.features is not None
        assert pte.features is not None
        noise = snr_db(quantized.features, stages.vision_encoder(nudged(pixels)))
        rows += _three_sides(
            "vision features",
            [float32.features, quantized.features, pte.features],
            thresholds.quantized_vision,
            reachable(noise, thresholds.pte_vision),
        )
    rows += _three_sides(
        "token embeddings",
        [float32.table, quantized.table, pte.table],
        thresholds.quantized_embedding,
        thresholds.pte_embedding,
    )
    # After the prompt alone, which the file has read in its largest steps.
    max_kl, min_snr = thresholds.quantized_kl, reachable(noises[0].snr, thresholds.pte_logits)
    prefill = [side.greedy[:1] for side in (float32, quantized, pte)]
    rows.append(compare_logits("prefill logits", "pte/quantized", prefill[1], prefill[2], noises[0].max_kl, min_snr))
    rows.append(
        compare_logits("forced logits", "pte/quantized", quantized.greedy, pte.greedy, noises[0].max_kl, min_snr)
    )
    rows.append(compare_free("free tokens", "pte/quantized", quantized.greedy, greedy_tokens, noises[0]))
    if others is not None:
        rows.append(_other_engine(others, greedy_tokens, stages, prompt, table, noises[0]))
    min_snr = reachable(noises[1].snr, thresholds.pte_logits)
    rows.append(compare_logits("forced tokens", "pte/quantized", quantized.drawn, pte.drawn, noises[1].max_kl, min_snr))
    rows.append(compare_logits("forced tokens", "quantized/float32", float32.drawn, quantized.drawn, max_kl))
    rows.append(compare_logits("forced tokens", "pte/float32", float32.drawn, pte.drawn, max_kl))
    return rows


def _other_engine(
    tokens: Sequence[int],
    known: Sequence[int],
    stages: EagerStages,
    prompt: Tensor,
    table: Tensor,
    noise: Noise,
) -> Row:
    """A row for the tokens of another engine, which are judged by logits after its own tokens."""
    name = "llava_main's tokens"
    if len(tokens) != len(known):
        return Row(name, "pte/quantized", False, note=f"{len(tokens)} instead of {len(known)}")
    text = torch.cat([prompt, table[torch.tensor(list(tokens[:-1]))][None]], dim=1)
    return compare_free(name, "pte/quantized", stages.score(text, prompt.shape[1] - 1), tokens, noise)


def _float32_side(checkpoint: Checkpoint, pixels: Tensor | None, texts: Sequence[Tensor], positions: int) -> _Side:
    """What the float32 model makes of the inputs; its language model passes through memory layer by layer."""
    features = None
    if pixels is not None:
        empty = empty_model(checkpoint.config)
        tower = checkpoint.load_part(empty.vision_tower, "vision_tower")
        features = checkpoint.load_part(empty.mm_projector, "mm_projector")(tower(pixels))
        del tower
        return_freed_memory()
    model = FloatLanguageModel(checkpoint, torch.device("cpu"))
    greedy, drawn = (
        model.logits(output[positions - 1 :]) for output in read_sequences(model, [text[0] for text in texts])
    )
    return _Side(features, model.embedding, greedy, drawn)


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
    lines = [f"{'stage':<24}{'compared':<19}{'cosine':>10}{'SNR dB':>9}{'KL':>9}{'top-1':>8}  result"]
    agreeing = sum(row.passed for row in metadata)
    verdict = "ok" if agreeing == len(metadata) else "FAILED"
    lines.append(f"{f'metadata, {agreeing} of {len(metadata)} fields':<79}  {verdict}")
    for row in shown:
        numbers = f"{number(row.cosine, '.6f'):>10}{number(row.snr, '.1f'):>9}{number(row.kl, '.2g'):>9}"
        verdict = ("ok" if row.passed else "FAILED") + (f"  ({row.note})" if row.note else "")
        lines.append(f"{row.name:<24}{row.compared:<19}{numbers}{number(row.top1, '.1%'):>8}  {verdict}")
    return "\n".join(lines)
