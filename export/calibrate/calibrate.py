"""Calibrate: find out what the linears are given, and quantize them so that their outputs suffer least.

``full`` is GPTQ over the whole language model, layer by layer (:mod:`mvlm.export.calibrate.gptq`), and over the vision
encoder where its weights have 4 bits. ``quick`` only weights the search for scales with the power of each input, which
the float model alone tells.

The data are what the user gives, and else what the model writes itself: text from nothing, and answers about pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from mvlm.export.calibrate.branches import (
    Branch,
    Moments,
    Stream,
    decoder_branches,
    encoder_branches,
    pass_branch,
    token_weights,
)
from mvlm.export.calibrate.data import (
    BUNDLED_PICTURES,
    CalibrationData,
    CalibrationSequence,
    picture_questions,
    text_windows,
)
from mvlm.export.calibrate.gptq import corrected_target, damped, gptq
from mvlm.export.calibrate.sample import Prompt, continue_prompts
from mvlm.export.calibrate.sensitivity import TOKENS as SENSITIVITY_TOKENS
from mvlm.export.calibrate.sensitivity import sensitivities, widen
from mvlm.export.calibrate.work_folder import WorkFolder
from mvlm.export.checkpoint import Checkpoint
from mvlm.export.errors import ExportError
from mvlm.export.models import rope_tables
from mvlm.export.models.mobilellama import DecoderLayer
from mvlm.export.progress import Progress, return_freed_memory
from mvlm.export.quantize import Scheme, meta_model, quantize_weight, quantized_tensor, schemes_of
from mvlm.export.recipe import Recipe
from mvlm.export.scales import search_scales
from mvlm.export.smoothing import STRENGTH, Smoothing, find_smoothing, smoothed
from mvlm.export.streamed_model import FloatLanguageModel, read_sequences

#: Raised whenever the same work comes to give other weights, so that none is gone on with that was begun differently.
METHOD = 2

#: Share of the way to the weights that would undo what quantization has done to a linear's inputs. All of it fits what
#: is accidental in the calibration data: measured on a real Llama of 135 million parameters, half is best up to
#: some ten thousand tokens.
CORRECTION = 0.5

#: Tokens of text that ``full`` and ``quick`` use where a file is given, and that the model writes where none is, for
#: models of a billion parameters and more. More tokens are better; these are what half an hour on two cores allows.
TEXT_TOKENS = {"full": 16384, "quick": 4096}
WRITTEN_TOKENS = {"full": 8192, "quick": 4096}

#: For smaller models ``full`` uses more tokens, in proportion: times as many at the most.
MOST_TIMES_AS_MANY = 4

#: Tokens of each text that the model writes, and of an answer about a picture. The more texts there are, the fewer
#: steps it takes, of which each reads all weights.
WRITTEN_LENGTH = {"full": 128, "quick": 64}

LANGUAGE_MODEL = "language_model.layers"
VISION_TOWER = "vision_tower.encoder.layers"


@dataclass(frozen=True)
class CalibrationOptions:
    """What a user says about calibration.

    Attributes:
        mode: ``full`` or ``quick``.
        text: a file of text; without one the model writes its own.
        images: a folder of pictures, perhaps with questions; without one the bundled pictures are taken.
        tokens: of text; by default what is good for the mode.
        seed: of all that is drawn.
    """

    mode: str
    text: Path | None = None
    images: Path | None = None
    tokens: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class CalibrationResult:
    """What calibration found out; a :class:`mvlm.export.quantize.Calibration`.

    Attributes:
        checkpoint: whose weights are to be quantized: the one that was given, smoothed by ``full``.
        recipe: by which the checkpoint is to be quantized: the one that was given, and in it which linears get 8 bits.
        schemes: of the linears.
        importances: second moments of inputs, each token's scaled to a mean power of 1, by names of linears.
        folder: that holds the weights.
        smoothing: of the checkpoint; None where it is as it was given.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    schemes: Mapping[str, Scheme]
    importances: Mapping[str, Tensor] = field(default_factory=dict)
    folder: WorkFolder | None = None
    smoothing: Smoothing | None = None

    def weight(self, name: str) -> IntxUnpackedToInt8Tensor | None:
        stored = self.folder.load(name) if self.folder is not None else None
        if stored is None:
            return None
        return quantized_tensor(stored["values"], stored["scales"], self.schemes[name])

    def importance(self, name: str) -> Tensor | None:
        return self.importances.get(name)


def work_folder(checkpoint: Checkpoint, recipe: Recipe, options: CalibrationOptions, pte: Path) -> WorkFolder:
    """The folder beside a .pte in which calibration for it keeps its work.

    Raises:
        ExportError: something else is there, or a file of the options cannot be read.
    """
    inputs = {}
    for path in [
        options.text,
        *(sorted(options.images.iterdir()) if options.images and options.images.is_dir() else []),
    ]:
        if path is not None and path.is_file():
            with path.open("rb") as file:
                inputs[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    schemes = {name: str(scheme) for name, scheme in schemes_of(meta_model(checkpoint), recipe).items()}
    work = {
        "checkpoint": checkpoint.checkpoint_id,
        "schemes": schemes,
        "mode": options.mode,
        "bits_budget": recipe.bits_budget,
        "tokens": options.tokens,
        "seed": options.seed,
        "inputs": inputs,
        "method": METHOD,
        "correction": CORRECTION,
        "smoothing": STRENGTH,
    }
    fingerprint = hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()
    return WorkFolder(pte.with_name(f"{pte.name}.calibration"), fingerprint)


def calibrate(
    checkpoint: Checkpoint, recipe: Recipe, options: CalibrationOptions, folder: WorkFolder, progress: Progress
) -> CalibrationResult:
    """Calibrates a checkpoint for a recipe.

    Args:
        checkpoint: whose weights are read as they are needed.
        recipe: how they will be stored.
        options: on what, and how thoroughly.
        folder: where the work is kept, and found again after an interruption.
        progress: told what is done.

    Raises:
        ExportError: the data cannot be used, or the model makes no finite numbers of them.
        OSError: the disk is full.
    """
    with torch.no_grad():
        return _Calibrator(checkpoint, recipe, options, folder, progress).run()


class _Calibrator:
    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        options: CalibrationOptions,
        folder: WorkFolder,
        progress: Progress,
    ) -> None:
        self.checkpoint = checkpoint
        self.recipe = recipe
        self.options = options
        self.folder = folder
        self.progress = progress
        self.schemes = schemes_of(meta_model(checkpoint), recipe)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._importances: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def run(self) -> CalibrationResult:
        if self.folder.is_resumed:
            self.progress.say(f"  going on with the calibration in {self.folder.path}")
        data = self._given_data()
        pictures: Tensor | None = None
        quantized_pictures: Tensor | None = None
        if data.pixels is not None:
            with self.progress.stage("calibrate: pictures"):
                pictures, quantized_pictures = self._pictures(data.pixels)
        if self._is_to_be_continued(data) or self.options.mode == "quick":
            with self.progress.stage("calibrate: the model writes and reads"):
                data = self._write(data, pictures)
        if self.options.mode == "quick":
            moments = {name: total / self._tokens[name] for name, total in self._importances.items()}
            return CalibrationResult(self.checkpoint, self.recipe, self.schemes, moments)
        with self.progress.stage("calibrate: smooth"):
            smoothing = self._smoothing(data, pictures)
            self.checkpoint = smoothed(self.checkpoint, smoothing)
        if self.recipe.bits_budget > 0 and not self.recipe.eight_bit_linears:
            with self.progress.stage("calibrate: where bits matter"):
                self._choose_bits(self._embedded(data, pictures, quantized_pictures))
        with self.progress.stage("calibrate: language model"):
            self._language_model(data, pictures, quantized_pictures)
        return CalibrationResult(self.checkpoint, self.recipe, self.schemes, folder=self.folder, smoothing=smoothing)

    # ---- data -------------------------------------------------------------------------------------------------------

    def _given_data(self) -> CalibrationData:
        """Text and pictures without what the model will write."""
        options, checkpoint = self.options, self.checkpoint
        if options.images is not None and checkpoint.config.vision is None:
            raise ExportError(
                f"--calibration-images {options.images}: {checkpoint.name} is a language model alone, which takes no "
                "pictures; leave it out"
            )
        if options.text is not None:
            tokens = options.tokens or self._default_tokens(TEXT_TOKENS)
            texts = text_windows(options.text, checkpoint, tokens, self._generator("text")).sequences
        else:
            length = WRITTEN_LENGTH[options.mode]
            count = -(-(options.tokens or self._default_tokens(WRITTEN_TOKENS)) // length)
            texts = (CalibrationSequence(((checkpoint.bos_id,),)),) * count
        if checkpoint.config.vision is None:
            return CalibrationData(texts)
        pictures = picture_questions(options.images or BUNDLED_PICTURES, checkpoint)
        return CalibrationData((*texts, *pictures.sequences), pictures.pixels)

    def _default_tokens(self, of_large_models: Mapping[str, int]) -> int:
        """As many tokens as take about as long as those of a model of a billion parameters."""
        tokens = of_large_models[self.options.mode]
        if self.options.mode == "quick":
            return tokens
        text = self.checkpoint.config.text
        with torch.device("meta"):
            size = text.num_hidden_layers * sum(p.numel() for p in DecoderLayer(text).parameters())
        return tokens * max(1, min(MOST_TIMES_AS_MANY, round(1e9 / size)))

    def _is_unanswered(self, sequence: CalibrationSequence) -> bool:
        if not sequence.pictures:
            return len(sequence.pieces[0]) == 1
        return sequence.pieces[-1][-1] != self.checkpoint.eos_ids[0]

    def _is_to_be_continued(self, data: CalibrationData) -> bool:
        return any(self._is_unanswered(sequence) for sequence in data.sequences)

    def _write(self, data: CalibrationData, pictures: Tensor | None) -> CalibrationData:
        """Lets the model continue what is to be continued, and in ``quick`` watches it read and write."""
        stored = self.folder.load("written")
        if stored is not None and self.options.mode != "quick":
            continued = iter(stored["ids"].split(stored["lengths"].tolist()))
        else:
            watch = self._watch if self.options.mode == "quick" else lambda name, x: None
            model = FloatLanguageModel(self.checkpoint, self.device, watch)
            length = WRITTEN_LENGTH[self.options.mode]
            groups: dict[bool, list[Prompt]] = {False: [], True: []}
            whole: list[Tensor] = []
            for sequence in data.sequences:
                has_picture = bool(sequence.pictures)
                embeddings = self._embed(sequence, model.embedding, pictures)
                if self._is_unanswered(sequence):
                    ends = self.checkpoint.eos_ids if has_picture else ()
                    groups[has_picture].append(Prompt(embeddings, length, ends))
                else:
                    whole.append(embeddings)
            if self.options.mode == "quick" and whole:
                for x_LD in read_sequences(model, whole):
                    model.logits(x_LD)
            prompts = [group for group in groups.values() if group]
            written = continue_prompts(model, prompts, self._generator("written"), self.progress) if prompts else []
            continued = iter([torch.tensor(ids) for group in written for ids in group])
        # Texts come before pictures, among the sequences as among the groups.
        ids_of = [next(continued) if self._is_unanswered(sequence) else None for sequence in data.sequences]
        if stored is None and any(ids is not None for ids in ids_of):
            parts = [ids for ids in ids_of if ids is not None]
            self.folder.save("written", {"ids": torch.cat(parts), "lengths": torch.tensor([len(ids) for ids in parts])})
        return CalibrationData(
            tuple(
                sequence if ids is None else sequence.followed_by(ids.tolist())
                for sequence, ids in zip(data.sequences, ids_of, strict=True)
            ),
            data.pixels,
        )

    def _watch(self, name: str, x_TI: Tensor) -> None:
        total = (x_TI * token_weights(x_TI)).square().sum(0).cpu()
        self._importances[name] = self._importances[name] + total if name in self._importances else total
        self._tokens[name] = self._tokens.get(name, 0) + len(x_TI)

    def _embed(self, sequence: CalibrationSequence, table: Tensor, pictures: Tensor | None) -> Tensor:
        """Embeddings [L, D] of a sequence."""
        parts = [table[torch.tensor(sequence.pieces[0], device=table.device)]]
        for picture, piece in zip(sequence.pictures, sequence.pieces[1:], strict=True):
            assert pictures is not None
            parts += [pictures[picture], table[torch.tensor(piece, device=table.device)]]
        return torch.cat(parts)

    # ---- pictures ---------------------------------------------------------------------------------------------------

    def _pictures(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Image embeddings [P, T, D] of the float and of the quantized vision encoder, whose linears are quantized."""
        stored = self.folder.load("pictures")
        if stored is not None:
            return stored["float32"].to(self.device), stored["quantized"].to(self.device)
        empty = meta_model(self.checkpoint)
        heads = [
            self._module(empty.vision_tower.embeddings, "vision_tower.embeddings", which) for which in (False, True)
        ]
        norm = self._module(empty.vision_tower.pre_layrnorm, "vision_tower.pre_layrnorm", False)
        float32, quantized = (
            torch.cat([norm(head(picture[None].to(self.device))) for picture in pixels]) for head in heads
        )
        stream = Stream(float32.flatten(0, 1), quantized.flatten(0, 1), [float32.shape[1]] * len(pixels))
        num_layers = len(empty.vision_tower.encoder.layers)
        for index in range(num_layers):
            name = f"{VISION_TOWER}.{index}"
            layer = self.checkpoint.load_part(empty.vision_tower.encoder.layers[index], name, self.device)
            for branch in encoder_branches(layer):  # type: ignore[arg-type]
                self._pass(stream, layer, branch, name)
            self.progress.share((index + 1) / (num_layers + 1))
        features = [x.unflatten(0, (len(pixels), -1))[:, 1:] for x in (stream.float32, stream.quantized)]
        float32, quantized = self._project(empty.mm_projector, *features)
        self.folder.save("pictures", {"float32": float32.cpu(), "quantized": quantized.cpu()})
        return float32, quantized

    def _project(self, empty: nn.Module, float_BPV: Tensor, quantized_BPV: Tensor) -> tuple[Tensor, Tensor]:
        """Both projectors' outputs; linears of 4 bits are quantized one after another if there are inputs enough."""
        float32 = self._module(empty, "mm_projector", False)
        quantized = self._module(empty, "mm_projector", True)
        for path, linear in float32.named_modules():
            name = f"mm_projector.{path}" if path else "mm_projector"
            if not isinstance(linear, nn.Linear) or not self._is_calibrated(name):
                continue
            x, z = _inputs_of(path, float32, float_BPV), _inputs_of(path, quantized, quantized_BPV)
            if len(z) < linear.in_features:
                continue
            moments = Moments(linear.in_features, self.device)
            moments.add(x, z)
            moments.finish()
            weight = self._gptq(name, linear.weight, moments)
            quantized.get_submodule(path).weight = nn.Parameter(weight, requires_grad=False)
        return float32(float_BPV), quantized(quantized_BPV)

    def _module(self, empty: nn.Module, name: str, is_quantized: bool) -> nn.Module:
        """A part of the model with its weights, in float32 or as the recipe stores them."""
        module = self.checkpoint.load_part(empty, name, self.device)
        if is_quantized:
            for path, part in module.named_modules():
                scheme = self.schemes.get(f"{name}.{path}" if path else name)
                if scheme is not None:
                    weight, _ = quantize_weight(part.weight.detach().cpu(), scheme)
                    part.weight = nn.Parameter(_float32(weight).to(self.device), requires_grad=False)
        return module

    def _smoothing(self, data: CalibrationData, pictures: Tensor | None) -> Smoothing:
        """The scales that the inputs want which the float model's linears have for some of the sequences."""
        stored = self.folder.load("smoothing")
        if stored is None:
            model = FloatLanguageModel(self.checkpoint, self.device, self._watch)
            some: list[Tensor] = []
            for index in torch.randperm(len(data.sequences), generator=self._generator("smoothing")).tolist():
                sequence = self._embed(data.sequences[index], model.embedding, pictures)
                if not some or sum(map(len, some)) + len(sequence) <= SENSITIVITY_TOKENS:
                    some.append(sequence)
            read_sequences(model, some)
            found = find_smoothing(self._importances, self.checkpoint.config.text)
            stored = {"exponents": found.exponents}
            self.folder.save("smoothing", stored)
        return Smoothing(stored["exponents"])

    def _generator(self, purpose: str) -> torch.Generator:
        """Draws for one purpose, which do not depend on whether others were drawn before or found in the folder."""
        seed = hashlib.sha256(f"{self.options.seed} {purpose}".encode()).digest()[:6]
        return torch.Generator().manual_seed(int.from_bytes(seed, "little"))

    def _choose_bits(self, stream: Stream) -> None:
        """Finds out which linears get 8 bits, and changes recipe and schemes to that."""
        names = [
            name for name in self.schemes if name.startswith(LANGUAGE_MODEL + ".") and self.schemes[name].bits == 4
        ]
        stored = self.folder.load("sensitivities")
        if stored is None:
            # Whole sequences, drawn from all of them.
            some: list[Tensor] = []
            parts = stream.float32.split(list(stream.lengths))
            generator = self._generator("sensitivities")
            for index in torch.randperm(len(parts), generator=generator).tolist():
                if not some or sum(map(len, some)) + len(parts[index]) <= SENSITIVITY_TOKENS:
                    some.append(parts[index])
            part = Stream(torch.cat(some), torch.empty(0), [len(one) for one in some])
            rope = self._rope(max(part.lengths))
            found = sensitivities(self.checkpoint, self.schemes, part, rope, generator, self.progress)
            stored = {"nats": torch.tensor([found[name] for name in names])}
            self.folder.save("sensitivities", stored)
        shapes = {
            name: module.weight.shape for name, module in meta_model(self.checkpoint).named_modules() if name in names
        }
        nats = dict(zip(names, stored["nats"].tolist(), strict=True))
        chosen = widen(nats, self.schemes, shapes, self.recipe.bits_budget)
        share = sum(nats[name] for name in chosen) / (sum(nats.values()) or 1.0)
        self.progress.say(
            f"  8 bits for {len(chosen)} of {len(names)} linears of the language model, from which {share:.0%} of the "
            "damage would come"
        )
        self.recipe = replace(self.recipe, eight_bit_linears=chosen)
        self.schemes = schemes_of(meta_model(self.checkpoint), self.recipe)

    def _rope(self, positions: int) -> tuple[Tensor, Tensor]:
        config = self.checkpoint.config.text
        cos, sin = rope_tables(config.head_dim, positions, config.rope_theta)
        return cos.to(self.device), sin.to(self.device)

    # ---- layers -----------------------------------------------------------------------------------------------------

    def _is_calibrated(self, name: str) -> bool:
        """Whether GPTQ quantizes a linear: those of the language model, and all others that have 4 bits."""
        scheme = self.schemes.get(name)
        if self.options.mode != "full" or scheme is None:
            return False
        return scheme.bits == 4 or (scheme.bits == 8 and name.startswith("language_model."))

    def _pass(self, stream: Stream, layer: nn.Module, branch: Branch, name: str) -> None:
        """Quantizes a branch's linears and moves the streams behind it."""

        def quantize(path: str, linear: nn.Linear, moments: Moments | None) -> Tensor:
            full = f"{name}.{path}"
            if moments is not None:
                return self._gptq(full, linear.weight, moments)
            weight, _ = quantize_weight(linear.weight.detach().cpu(), self.schemes.get(full, Scheme(32)))
            return _float32(weight).to(self.device)

        first = f"{name}.{branch.first}"
        is_quantized = self.schemes.get(first, Scheme(32)).bits < 16
        pass_branch(stream, layer, branch, quantize, self._is_calibrated(first), is_quantized)

    def _gptq(self, name: str, weight: Tensor, moments: Moments) -> Tensor:
        """Quantizes a linear, keeps the result in the folder, and gives it back as float32 [out, in]."""
        scheme = self.schemes[name]
        group_size = scheme.group_size or weight.shape[1]
        hessian = damped(moments.hessian)
        try:
            target = corrected_target(weight, hessian, moments.cross, CORRECTION)
            stored_as = torch.bfloat16 if scheme.group_size else torch.float32
            scales = search_scales(target, hessian.diagonal(), group_size, scheme.bits, stored_as)
            values = gptq(target, hessian, scales, scheme.bits)
        except torch.linalg.LinAlgError as error:
            raise ExportError(
                f"{name}: its inputs for the calibration data are not finite numbers, or far too large; the checkpoint "
                "is damaged, or other calibration data are needed"
            ) from error
        self.folder.save(name, {"values": values.cpu(), "scales": scales.cpu()})
        return (values.view(*scales.shape, -1) * scales.unsqueeze(-1)).view(weight.shape)

    def _language_model(
        self, data: CalibrationData, pictures: Tensor | None, quantized_pictures: Tensor | None
    ) -> None:
        config = self.checkpoint.config.text
        done, stream = self._resume(data)
        if stream is None:
            stream = self._embedded(data, pictures, quantized_pictures)
        rope = self._rope(max(stream.lengths))
        layers = meta_model(self.checkpoint).language_model.layers
        # The head is as much work as a layer or so.
        total = config.num_hidden_layers + 1
        for index in range(done, config.num_hidden_layers):
            name = f"{LANGUAGE_MODEL}.{index}"
            layer = self.checkpoint.load_part(layers[index], name, self.device)
            for branch in decoder_branches(layer, *rope):  # type: ignore[arg-type]
                self._pass(stream, layer, branch, name)
            del layer
            self._keep(index + 1, stream)
            return_freed_memory()
            self.progress.share((index + 1) / total)
        head = "language_model.lm_head"
        if self._is_calibrated(head) and not self.folder.has(head):
            norm = self.checkpoint.read("language_model.norm.weight").to(self.device)
            moments = Moments(config.hidden_size, self.device)
            for at, _ in stream.chunks():
                x, z = (
                    torch.nn.functional.rms_norm(y[at], norm.shape, norm, config.rms_norm_eps)
                    for y in (stream.float32, stream.quantized)
                )
                moments.add(x, z)
            moments.finish()
            self._gptq(head, self.checkpoint.read(f"{head}.weight").to(self.device), moments)

    def _embedded(self, data: CalibrationData, pictures: Tensor | None, quantized_pictures: Tensor | None) -> Stream:
        name = "language_model.embed_tokens"
        table = self.checkpoint.read(f"{name}.weight")
        quantized_table = _float32(quantize_weight(table, self.schemes[name])[0])
        sides = [
            torch.cat([self._embed(sequence, side.to(self.device), embeddings) for sequence in data.sequences])
            for side, embeddings in ((table, pictures), (quantized_table, quantized_pictures))
        ]
        image_tokens = self.checkpoint.config.num_image_tokens
        lengths = [
            sum(map(len, sequence.pieces)) + image_tokens * len(sequence.pictures) for sequence in data.sequences
        ]
        return Stream(*sides, lengths)

    def _keep(self, done: int, stream: Stream) -> None:
        """Keeps the streams behind so many layers; a layer that is begun again begins with them."""
        self.folder.save(
            "stream",
            {
                "done": torch.tensor(done),
                "float32": stream.float32.cpu(),
                "quantized": stream.quantized.cpu(),
                "lengths": torch.tensor(stream.lengths),
            },
        )

    def _resume(self, data: CalibrationData) -> tuple[int, Stream | None]:
        stored = self.folder.load("stream")
        if stored is None:
            return 0, None
        done = int(stored["done"])
        self.progress.say(f"  {done} layers are done")
        sides = (stored[name].to(self.device) for name in ("float32", "quantized"))
        return done, Stream(*sides, stored["lengths"].tolist())


def _float32(weight: Tensor) -> Tensor:
    """A weight of :func:`quantize_weight` as plain float32."""
    return weight.dequantize() if isinstance(weight, IntxUnpackedToInt8Tensor) else weight.float()


def _inputs_of(path: str, module: nn.Module, features: Tensor) -> Tensor:
    """What a linear of a module is given when the module is given ``features``: [T, in]."""
    seen: list[Tensor] = []
    hook = module.get_submodule(path).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module(features)
    hook.remove()
    return seen[0].flatten(0, -2)
