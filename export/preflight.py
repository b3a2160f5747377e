"""Preflight: what an export will need, said and checked before it starts.

Output size follows from the recipe. Memory and time are fits to exports that were measured (README, "What an export
costs"): what a process of torch, torchao and ExecuTorch takes by itself; the weights outside the stacks of layers,
which stay in memory once they are quantized; and the most that is worked on at once, the largest tensor while it is
quantized or one layer while it is captured.

What calibration needs is counted out, stage by stage: the tensors that it has in memory together, and its
multiplications.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mvlm.export.calibrate import CalibrationOptions
from mvlm.export.calibrate.branches import CHUNK_TOKENS
from mvlm.export.calibrate.calibrate import MOST_TIMES_AS_MANY, TEXT_TOKENS, WRITTEN_LENGTH, WRITTEN_TOKENS
from mvlm.export.calibrate.data import BUNDLED_PICTURES, PICTURE_SUFFIXES, WINDOW
from mvlm.export.calibrate.sensitivity import TOKENS as SENSITIVITY_TOKENS
from mvlm.export.checkpoint import Checkpoint
from mvlm.export.errors import ExportError
from mvlm.export.models import MobileVLM
from mvlm.export.quantize import Scheme, meta_model, place_in_stack, schemes_of, stored_bytes
from mvlm.export.recipe import Recipe
from mvlm.export.streamed_model import KEPT_BYTES, READ_TOGETHER

_MIB = 1 << 20

#: Resident memory of a process that has imported what an export needs.
BASE_MEMORY = 366 * _MIB
#: Bytes for each float32 weight outside the stacks: itself and, at the end, a copy of some while the file is written.
BYTES_PER_HELD_FLOAT = 5
#: Bytes for each weight of the largest tensor while it is quantized and packed, another one beside it on another core.
BYTES_PER_LARGEST_WEIGHT = 11
#: Bytes for each weight of the largest layer while it is lowered: the template, as torchao and as XNNPACK hold it.
BYTES_PER_LAYER_WEIGHT = 5
#: What capturing and lowering take whatever the size: graphs, passes, delegates.
LOWERING_MEMORY = 80 * _MIB
#: Peaks of one and the same export differ by some percent; what is estimated is meant to be above them all.
MEMORY_MARGIN = 1.13
#: Seconds on two cores of 2021 (Zen 3): whatever the size, for each weight, and for each whose scale is searched for.
BASE_SECONDS = 40.0
SECONDS_PER_WEIGHT = 28e-9
SECONDS_PER_SEARCHED_WEIGHT = 30e-9
#: The program without weights: instructions, delegates and padding, of all that is no layer, and of each layer.
PROGRAM_BYTES = 64 << 10
PROGRAM_BYTES_PER_LAYER = 12 << 10

#: What malloc keeps of the many tensors that come and go in GPTQ's stages, as a share of the most that they have
#: together. Those of 32 MB and more are given back at once, so it is not more than so much.
RETAINED_SHARE = 0.4
RETAINED_MEMORY = 250 * _MIB
#: Float operations a second of calibration on two cores: half of what two cores with AVX-512 do of its products, since
#: those of Zen 3 are half as wide.
CALIBRATION_FLOPS = 120e9
#: How many times as long a product takes when texts are written: there are some tens of rows, each step reads the keys
#: and values of all positions.
WRITING_SLOWNESS = 3
#: Seconds to read a weight from a checkpoint's file; writing reads a large model once for each token of its texts.
SECONDS_PER_READ_WEIGHT = 1.5e-9
#: Tokens of a question about a picture, with the template around it.
QUESTION_TOKENS = 64


@dataclass(frozen=True)
class Estimate:
    """What an export will need.

    Attributes:
        output: size of the .pte in bytes.
        spool: bytes of temporary files on the same disk, those of calibration too.
        memory: peak resident memory in bytes.
        seconds: on two cores.
    """

    output: int
    spool: int
    memory: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"about {self.output / 1e6:,.0f} MB of .pte, {self.memory / _MIB:,.0f} MiB of memory at the peak, "
            f"{(self.output + self.spool) / 1e6:,.0f} MB of disk while it is written, "
            f"{_duration(self.seconds)} on two cores"
        )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def estimate(checkpoint: Checkpoint, recipe: Recipe, calibration: CalibrationOptions | None = None) -> Estimate:
    """What it will need to export ``checkpoint`` by ``recipe``.

    Args:
        checkpoint: opened.
        recipe: how it will be stored, and whether it is calibrated.
        calibration: on what; by default on what the model writes itself.

    Raises:
        ExportError: a weight whose width no group size divides.
    """
    model = meta_model(checkpoint)
    schemes = schemes_of(model, recipe)
    text = checkpoint.config.text
    rope_tables = 4 * recipe.max_context_len * text.head_dim
    output = PROGRAM_BYTES + len(checkpoint.tokenizer) + rope_tables
    layers: Counter[tuple[str, int]] = Counter()
    spool = held = largest = weights = searched = 0
    for name, parameter in model.named_parameters():
        scheme = schemes.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        count = parameter.numel()
        size = stored_bytes(scheme, parameter) if scheme else 4 * count
        output += size
        weights += count
        largest = max(largest, count)
        if scheme is not None and scheme.scales == "search":
            searched += count
        place = place_in_stack(name)
        if place is not None:
            layers[place[:2]] += count
        if place is not None and scheme is not None:
            spool += size
        else:
            # torchao holds integers of any width as int8.
            held += count if scheme and scheme.bits < 32 else BYTES_PER_HELD_FLOAT * count
    output += PROGRAM_BYTES_PER_LAYER * len(layers)
    quantizing = BYTES_PER_LARGEST_WEIGHT * largest
    lowering = LOWERING_MEMORY + BYTES_PER_LAYER_WEIGHT * max(layers.values(), default=0)
    memory = held + max(quantizing, lowering)
    seconds = BASE_SECONDS + SECONDS_PER_WEIGHT * weights + SECONDS_PER_SEARCHED_WEIGHT * searched
    if recipe.calibration != "none":
        work = _CalibrationWork(
            checkpoint, recipe, calibration or CalibrationOptions(recipe.calibration), schemes, model
        )
        most = max(work.memory().values())
        memory = max(memory, most + (min(RETAINED_SHARE * most, RETAINED_MEMORY) if work.is_full else 0))
        seconds += work.seconds()
        output += work.more_output
        spool += work.more_output + work.disk()
    memory = MEMORY_MARGIN * (BASE_MEMORY + memory)
    if checkpoint.size:
        # The file's pages that the largest tensor is read from, 2 bytes a weight in float16.
        memory += largest * checkpoint.size / weights
    return Estimate(output, spool, int(memory), seconds)


class _CalibrationWork:
    """What calibration will have in memory and on disk, and what it will compute.

    Letters of sizes: T tokens of all sequences, D width of the language model, F of its feed-forward, L its layers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        options: CalibrationOptions,
        schemes: dict[str, Scheme],
        model: MobileVLM,
    ) -> None:
        self.config = checkpoint.config
        self.is_full = recipe.calibration == "full"
        self.finds_bits = self.is_full and recipe.bits_budget > 0 and not recipe.eight_bit_linears
        text = model.language_model
        self.layer_weights = sum(p.numel() for p in text.layers[0].parameters())
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        #: Those that GPTQ quantizes: the language model's, and all others that have 4 bits.
        self.calibrated = {
            name: linear
            for name, linear in linears.items()
            if schemes[name].bits == 4 or (schemes[name].bits == 8 and name.startswith("language_model."))
        }
        in_layers = [name for name in self.calibrated if name.startswith("language_model.layers.")]
        self.first_layer = [linears[name] for name in in_layers if name.startswith("language_model.layers.0.")]
        self.lm_head = text.lm_head
        vision_layers = model.vision_tower.encoder.layers if self.config.vision is not None else ()
        self.vision_layer_weights = sum(p.numel() for layer in vision_layers[:1] for p in layer.parameters())
        #: What ``bits_budget`` adds to the file.
        self.more_output = (
            int(recipe.bits_budget * sum(stored_bytes(schemes[name], linears[name].weight) for name in in_layers))
            if self.finds_bits
            else 0
        )

        length = WRITTEN_LENGTH[options.mode]
        wanted = options.tokens or self._default_tokens(options)
        #: Of texts that are written: how many, and tokens of each.
        self.written = (0, 0) if options.text is not None else (-(-wanted // length), 1 + length)
        self.read = wanted if options.text is not None else 0
        self.pictures = self.questions = self.picture_tokens = 0
        if self.config.vision is not None:
            self.pictures, self.questions = _pictures_and_questions(options.images or BUNDLED_PICTURES)
            self.picture_tokens = self.config.num_image_tokens + QUESTION_TOKENS + length
        self.new_tokens = length if self.written[0] or self.questions else 0
        self.tokens = self.read + self.written[0] * self.written[1] + self.questions * self.picture_tokens

    def _default_tokens(self, options: CalibrationOptions) -> int:
        """As calibration chooses them."""
        tokens = (WRITTEN_TOKENS if options.text is None else TEXT_TOKENS)[options.mode]
        if not self.is_full:
            return tokens
        size = self.config.text.num_hidden_layers * self.layer_weights
        return tokens * max(1, min(MOST_TIMES_AS_MANY, round(1e9 / size)))

    def memory(self) -> dict[str, int]:
        """Bytes of the tensors that the stages have together, by stage."""
        text = self.config.text
        D, F, L = text.hidden_size, text.intermediate_size, text.num_hidden_layers
        layer = 4 * self.layer_weights
        table = 4 * text.vocab_size * D
        # One layer is still held when the next is read.
        float_model = 2 * table + (L * layer if L * layer <= KEPT_BYTES else 2 * layer)
        some = min(SENSITIVITY_TOKENS, self.tokens)
        streams = 2 * 4 * self.tokens * D

        def reading(tokens: int) -> int:
            """Outputs of the norms, of attention and of the linears while a layer reads so many tokens."""
            return 4 * tokens * (3 * F + 12 * D)

        held = 0
        stages = {}
        if self.config.vision is not None:
            vision = self.config.vision
            pixels = 4 * 3 * vision.image_size**2 * self.pictures
            patches = self.pictures * (vision.num_patches + 1)
            chunk = min(CHUNK_TOKENS, patches)
            # Both streams; a layer; and a part of the streams in the feed-forward, or the projector with all of them.
            passing = 8 * chunk * vision.intermediate_size + self.vision_layer_weights
            if any(name.startswith("vision_tower.") for name in self.calibrated):
                passing += 2 * vision.intermediate_size**2
            stages["pictures"] = pixels + 4 * (2 * patches * vision.hidden_size + max(passing, 10 * patches * D))
            held = pixels + 2 * 4 * self.pictures * self.config.num_image_tokens * D

        count, length = self.written
        prompts = count + self.questions
        per_position = 2 * text.num_key_value_heads * text.head_dim
        positions = (count * length, self.questions * self.picture_tokens)
        # Keys and values in bfloat16, of one layer in float32 too; logits and their softmax.
        writing = 2 * per_position * L * sum(positions) + 4 * per_position * max(positions)
        writing = max(writing + 3 * 4 * prompts * text.vocab_size, reading(prompts + sum(positions[1:])))
        if not self.is_full:
            writing = max(writing, reading(min(READ_TOGETHER * WINDOW, self.read)))
        if self.new_tokens or not self.is_full:
            stages["write"] = float_model + writing
        if self.is_full:
            stages["smooth"] = float_model + reading(some)
            # The embedding as it is, as int8, and as float32 again, in two steps.
            stages["embed"] = streams + table // 4 * 13
            # A part of both streams, the second linear's two moments, the first one's weight.
            chunk = 8 * 4 * min(CHUNK_TOKENS, self.tokens) * F
            widest = max(linear.in_features for linear in self.first_layer)
            heaviest = max(linear.weight.numel() for linear in self.first_layer)
            stages["pass"] = streams + layer + chunk + 2 * 4 * widest**2 + 4 * heaviest
            stages["gptq"] = streams + layer + max(map(_gptq_bytes, self.first_layer))
            stages["lm_head"] = streams + table + _gptq_bytes(self.lm_head)
        if self.finds_bits:
            # What each layer is given; of one layer all that its gradient needs, and a weight rounded, restored and
            # subtracted; or, before that, the logits of some tokens and their gradient.
            backward = layer + 4 * some * (8 * F + 20 * D) + 9 * heaviest
            stages["bits"] = streams + 4 * (L + 1) * some * D + max(backward, table + 6 * 4 * 256 * text.vocab_size)
        return {name: held + size for name, size in stages.items()}

    def disk(self) -> int:
        """Bytes of the work folder: weights as int8 with float32 scales, and the streams, for a while twice."""
        if not self.is_full:
            return 0
        # Groups of 32 at the least.
        weights = sum(linear.weight.numel() + linear.weight.numel() // 8 for linear in self.calibrated.values())
        pictures = 2 * 4 * self.pictures * self.config.num_image_tokens * self.config.text.hidden_size
        return weights + pictures + 2 * 2 * 4 * self.tokens * self.config.text.hidden_size

    def seconds(self) -> float:
        """On two cores; of vision only what its 4-bit weights take."""
        text = self.config.text
        L = text.num_hidden_layers
        weights = L * self.layer_weights + self.lm_head.weight.numel()
        written = self.written[0] * self.written[1] + self.questions * self.new_tokens
        flops = 2.0 * weights * (WRITING_SLOWNESS * written + self.questions * self.picture_tokens)
        read = 0
        if L * 4 * self.layer_weights > KEPT_BYTES:
            read += weights * self.new_tokens
        if not self.is_full:
            return (flops + 2.0 * weights * self.read) / CALIBRATION_FLOPS + SECONDS_PER_READ_WEIGHT * read
        some = min(SENSITIVITY_TOKENS, self.tokens)
        flops += 2.0 * weights * some + sum(
            _gptq_flops(linear, self._tokens_of(name)) for name, linear in self.calibrated.items()
        )
        searched = 0
        if self.finds_bits:
            # Forward, and twice as much backward and for the change that rounding brings.
            flops += 8.0 * weights * some
            searched = L * self.layer_weights
        return (
            flops / CALIBRATION_FLOPS
            + SECONDS_PER_READ_WEIGHT * (read + 4 * weights)
            + SECONDS_PER_SEARCHED_WEIGHT * searched
        )

    def _tokens_of(self, name: str) -> int:
        if name.startswith("language_model."):
            return self.tokens
        assert self.config.vision is not None
        return self.pictures * (self.config.vision.num_patches + 1)


def _gptq_bytes(linear: nn.Linear) -> int:
    """Of a linear while it is quantized.

    Squares: both moments, and a matrix and its factor. As large as its weight: what is wanted of it, what is left of
    that, and what the solver makes of them.
    """
    return 4 * 4 * linear.in_features**2 + 4 * 4 * linear.weight.numel()


def _gptq_flops(linear: nn.Linear, tokens: int) -> float:
    """Of a linear: its outputs some three times, both moments, the Hessian's inverse, and columns for each other."""
    width, weights = float(linear.in_features), linear.weight.numel()
    return 6.0 * tokens * weights + 3.0 * tokens * width**2 + 5.0 / 3.0 * width**3 + 5.0 * weights * width


def _pictures_and_questions(folder: Path) -> tuple[int, int]:
    """How many pictures lie in a folder, and how many questions about them."""
    pictures = questions = 0
    # What is no folder calibration refuses.
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix.lower() in PICTURE_SUFFIXES:
            try:
                lines = path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError):
                lines = []
            pictures += 1
            questions += sum(bool(line.strip()) for line in lines) or 1
    return pictures, questions


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take: of the machine and of its control groups; None where nothing tells."""
    limits = [_left_in_machine(root), *map(_left_in_control_group, _control_groups(root))]
    known = [limit for limit in limits if limit is not None]
    return max(0, min(known)) if known else None


def _left_in_machine(root: Path) -> int | None:
    kib = _table(root / "proc/meminfo").get("MemAvailable:")
    return None if kib is None else kib * 1024


def _left_in_control_group(group: Path) -> int | None:
    """What a group counts includes cached files, a checkpoint just downloaded say; they give way when need be."""
    for limit_name, used_name, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        limit, used = _number(group / limit_name), _number(group / used_name)
        if limit is not None and used is not None:
            stat = _table(group / "memory.stat")
            cached = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
            return limit - used + cached
    return None


def _number(path: Path) -> int | None:
    """The one number in a file; None where there is no such file, or a word such as ``max``."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _table(path: Path) -> dict[str, int]:
    """Names and numbers, a line each; units behind them are left out."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
        return {words[0]: int(words[1]) for words in lines if len(words) > 1}
    except (OSError, ValueError):
        return {}


def _control_groups(system: Path) -> list[Path]:
    """The folders of this process's memory control groups: its own and those above it, version 2 and 1."""
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            root = system / "sys/fs/cgroup" / controllers
            folder = root / path.lstrip("/")
            folders += [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]
    return list(dict.fromkeys(folders))


def check(estimated: Estimate, path: Path) -> None:
    """Refuses an export that will not get through.

    Raises:
        ExportError: there is not enough memory, or not enough space on the disk of ``path``.
    """
    advice = "; --force tries nevertheless"
    memory = available_memory()
    if memory is not None and memory < estimated.memory:
        raise ExportError(
            f"not enough memory: the export will need about {estimated.memory / _MIB:,.0f} MiB and "
            f"{memory / _MIB:,.0f} MiB are available; close other programs, or use a machine with more{advice}"
        )
    folder = path.absolute().parent
    free = shutil.disk_usage(folder).free
    needed = estimated.output + estimated.spool
    if free < needed:
        raise ExportError(
            f"not enough disk space in {folder}: the export will need about {needed / 1e6:,.0f} MB there while it "
            f"writes and {free / 1e6:,.0f} MB are free; free some, or choose another --pte-name{advice}"
        )
