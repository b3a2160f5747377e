"""Opening: a folder or hub id becomes a :class:`Checkpoint`.

Every check that needs no value of a weight is made here, before anything that takes long.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mvlm.export.checkpoint.checkpoint import Checkpoint, parameter_shapes
from mvlm.export.checkpoint.configs import (
    LLAMA_DEFAULTS,
    LLAVA_VISION_DEFAULTS,
    ImagePreprocessing,
    blaming,
    check_only,
    image_preprocessing,
    nested_config,
    read_json,
    text_config,
    token_ids,
    vision_config,
)
from mvlm.export.checkpoint.hub import resolve_folder
from mvlm.export.checkpoint.layouts import (
    CLIP_TABLES,
    HF_LLAVA_TABLES,
    LLAMA,
    LLAMA_TABLES,
    LLAVA_HF,
    VISION_PREFIX,
    Layout,
    NameTables,
    detect_layout,
    detect_projector,
    map_name,
    original_tables,
)
from mvlm.export.checkpoint.tokenizer import Tokenizer, read_tokenizer
from mvlm.export.checkpoint.weight_files import TensorInfo, WeightFiles
from mvlm.export.errors import ExportError
from mvlm.export.models import CLIPVisionConfig, MobileVLMConfig

#: Head width of every CLIP vision transformer (https://arxiv.org/abs/2103.00020, table 20): for a checkpoint that
#: carries a tower but not the tower's config.
CLIP_HEAD_DIM = 64

#: Options of MobileVLM and the original LLaVA that would change the computation.
ORIGINAL_OPTIONS = {
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "vision_tower_type": "clip",
}

#: The same of Hugging Face's LLaVA: "default" leaves the class token out, as "patch" does.
HF_LLAVA_OPTIONS = {
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
}


@dataclass
class _Parts:
    """What a layout says a checkpoint consists of.

    Attributes:
        config: sizes.
        llm: the language model's config, which also holds the ids of tokens.
        tensors: weight files, with the names in them.
        preprocessing: of pictures.
        paths: of files that were read, in the order in which they are hashed after config.json, the tokenizer and the
            checkpoint's own weights.
        image_token: id of the token that stands for a picture, where the layout has one.
    """

    config: MobileVLMConfig
    llm: Mapping[str, Any]
    tensors: list[tuple[WeightFiles, NameTables]]
    preprocessing: ImagePreprocessing = field(default_factory=ImagePreprocessing)
    paths: list[Path] = field(default_factory=list)
    image_token: int | None = None


def open_checkpoint(model: str, vision_tower: str | None = None, revision: str | None = None) -> Checkpoint:
    """Opens a checkpoint in one of the layouts of :data:`layouts.LAYOUTS`.

    Args:
        model: a folder or a hub id: config.json, tokenizer.model and weights.
        vision_tower: a folder or hub id of a CLIP model, for checkpoints without a tower of their own (MobileVLM V1,
            the original LLaVA). Without it the config's ``mm_vision_tower`` is taken, a path in which is relative to
            the folder.
        revision: branch, tag or commit of a hub id.

    Raises:
        ExportError: something is missing, superfluous, of another shape, or contradictory.
    """
    folder = resolve_folder(model, "model", revision)
    where = folder / "config.json"
    config = read_json(where)
    weights = WeightFiles(folder)
    layout = detect_layout(config, weights, where)
    if layout is LLAMA:
        parts = _text_only(config, weights, where, vision_tower)
    elif layout is LLAVA_HF:
        parts = _hf_llava(config, weights, where, vision_tower)
    else:
        parts = _original(layout, config, weights, where, vision_tower)

    vocab_size = parts.config.text.vocab_size
    tokenizer = read_tokenizer(folder, vocab_size, layout.base_model)
    _check_image_token(parts.image_token, tokenizer, where)
    with blaming(where):
        shapes = parameter_shapes(parts.config)
        _ = parts.config.num_image_tokens  # which refuses a grid of patches that the projector cannot halve
    account = _Account(shapes, parts.config)
    for files, tables in parts.tensors:
        for name, info in files.tensors.items():
            account.add(files, name, info, *map_name(name, tables))
    if parts.llm.get("tie_word_embeddings"):
        account.tie("language_model.lm_head.weight", "language_model.embed_tokens.weight")
    account.check(folder)

    tokenizer_model, *added_tokens = tokenizer.paths
    paths = [where, tokenizer_model, *weights.paths, *parts.paths, *added_tokens]
    return Checkpoint(
        name=folder.resolve().name if Path(model).expanduser().is_dir() else model,
        config=parts.config,
        preprocessing=parts.preprocessing,
        tokenizer=tokenizer.model,
        bos_id=token_ids(parts.llm, "bos_token_id", 1, vocab_size, where)[0],
        eos_ids=token_ids(parts.llm, "eos_token_id", 2, vocab_size, where),
        prompt_template=layout.template,
        unused=tuple(account.unused),
        size=sum(files.size for files, _ in parts.tensors),
        weights=FileWeights(account.sources, tuple(paths)),
    )


@dataclass(frozen=True)
class FileWeights:
    """Weights out of files.

    Attributes:
        sources: of each of the model's parameters, the files it is in and its name there.
        paths: of all files that the checkpoint was made of.
    """

    sources: Mapping[str, tuple[WeightFiles, str]]
    paths: tuple[Path, ...]

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        files, theirs = self.sources[name]
        return files.read(theirs).reshape(shape)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            with path.open("rb") as file:
                digest.update(f"{path.name}\0".encode())
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return f"sha256:{digest.hexdigest()}"


class _Account:
    """Finds the tensor of every parameter and keeps account of every name on both sides.

    Attributes:
        sources: of the parameters found so far, where they are.
        unused: names of tensors that are left out on purpose.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], config: MobileVLMConfig) -> None:
        self.shapes = shapes
        self.sources: dict[str, tuple[WeightFiles, str]] = {}
        self.unused: list[str] = []
        self._dead_blocks = range(0)
        if config.vision is not None:
            num_layers = config.vision.num_hidden_layers
            self._dead_blocks = range(config.vision_select_layer % (num_layers + 1), num_layers)
        self._unknown: list[str] = []
        self._misshapen: list[str] = []
        self._repeated: list[str] = []

    def add(self, files: WeightFiles, name: str, info: TensorInfo, known: bool, target: str | None) -> None:
        if known and (target is None or self._is_beyond_selected_block(target)):
            self.unused.append(name)
        elif target not in self.shapes:
            self._unknown.append(f"{name} {list(info.shape)}")
        elif target in self.sources:
            self._repeated.append(f"{name} and {self.sources[target][1]}")
        else:
            self.sources[target] = files, name
            shape = info.shape
            # A convolution's weight [out, in, size, size] is the weight of a linear over what it sees at once.
            if len(shape) == 4 and shape[2] == shape[3] and len(self.shapes[target]) == 2:
                shape = shape[0], math.prod(shape[1:])
            if shape != self.shapes[target] or not info.is_floating_point:
                self._misshapen.append(
                    f"{name} is {info.dtype} {list(info.shape)}, floating point {list(self.shapes[target])} is expected"
                )

    def tie(self, target: str, source: str) -> None:
        """Makes a parameter that no tensor provides the same as another."""
        if target not in self.sources and source in self.sources:
            self.sources[target] = self.sources[source]

    def _is_beyond_selected_block(self, target: str) -> bool:
        match = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", target)
        return match is not None and int(match[1]) in self._dead_blocks

    def check(self, where: Path) -> None:
        """Raises an ExportError that lists all that is wrong, if anything is."""
        missing = sorted(f"{name} {list(shape)}" for name, shape in self.shapes.items() if name not in self.sources)
        problems = [
            (f"{len(names)} tensors {what}", names)
            for what, names in (
                ("missing", missing),
                ("of another shape or type", self._misshapen),
                ("not known", self._unknown),
                ("twice, by two names", self._repeated),
            )
            if names
        ]
        if problems:
            listing = "".join(f"\n  {title}:\n    " + "\n    ".join(names) for title, names in problems)
            raise ExportError(f"{where}: the weights do not fit config.json{listing}")


def _text_only(config: Mapping[str, Any], weights: WeightFiles, where: Path, vision_tower: str | None) -> _Parts:
    if vision_tower is not None:
        raise ExportError(
            f"{where}: model_type is {config['model_type']!r}, a language model alone, which takes no pictures; leave "
            f"out --vision-tower (given: {vision_tower})"
        )
    return _Parts(MobileVLMConfig(text=text_config(config, where), vision=None), config, [(weights, LLAMA_TABLES)])


def _hf_llava(config: Mapping[str, Any], weights: WeightFiles, where: Path, vision_tower: str | None) -> _Parts:
    _refuse_tower(where.parent, vision_tower)
    check_only(config, HF_LLAVA_OPTIONS, where)
    llm = nested_config(config, "text_config", LLAMA_DEFAULTS, where)
    if "tie_word_embeddings" in config:
        llm["tie_word_embeddings"] = config["tie_word_embeddings"]
    vision = vision_config({"vision_config": config.get("vision_config") or LLAVA_VISION_DEFAULTS}, where)
    parts = _Parts(
        MobileVLMConfig(
            text=text_config(llm, where),
            vision=vision,
            projector_type="mlp2x_gelu",
            vision_select_layer=_select_layer(config, "vision_feature_layer", where),
        ),
        llm,
        [(weights, HF_LLAVA_TABLES)],
    )
    # transformers 5 nests it in processor_config.json.
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = where.parent / name
        if path.is_file():
            processor = read_json(path)
            if key is not None and not isinstance(processor.get(key), dict):
                continue
            parts.preprocessing = image_preprocessing(processor[key] if key else processor, vision.image_size, path)
            parts.paths.append(path)
            break
    tokens = config.get("image_seq_length", vision.num_patches)
    if tokens != vision.num_patches:
        raise ExportError(
            f"{where}: image_seq_length is {tokens!r}, but the vision tower makes {vision.num_patches} patches of a "
            "picture"
        )
    parts.image_token = config.get("image_token_index", config.get("image_token_id"))
    return parts


def _check_image_token(image_token: int | None, tokenizer: Tokenizer, where: Path) -> None:
    """The runner puts pictures where the text says ``<image>``, so the checkpoint's own marker must be that."""
    text = tokenizer.added.get(image_token, "<image>") if image_token is not None else "<image>"
    if text != "<image>":
        raise ExportError(f"{where}: image_token_index {image_token} is the token {text!r}; '<image>' is expected")


def _original(
    layout: Layout, config: Mapping[str, Any], weights: WeightFiles, where: Path, vision_tower: str | None
) -> _Parts:
    folder = where.parent
    check_only(config, ORIGINAL_OPTIONS, where)
    text = text_config(config, where)
    projector_type = detect_projector(layout, config, weights, where)
    tensors = [(weights, original_tables(projector_type))]
    preprocessing = ImagePreprocessing()
    paths: list[Path] = []
    if any(name.startswith(VISION_PREFIX) for name in weights):
        _refuse_tower(folder, vision_tower)
        vision = vision_config_from_shapes(weights, VISION_PREFIX)
    else:
        tower = _find_vision_tower(folder, config, projector_type, vision_tower)
        tower_config = tower / "config.json"
        vision = vision_config(read_json(tower_config), tower_config)
        tower_weights = WeightFiles(tower)
        tensors.append((tower_weights, CLIP_TABLES))
        paths += [tower_config, *tower_weights.paths]
        preprocessor = tower / "preprocessor_config.json"
        if preprocessor.is_file():
            preprocessing = image_preprocessing(read_json(preprocessor), vision.image_size, preprocessor)
            paths.append(preprocessor)
    if config.get("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
        raise ExportError(
            f"{where}: mm_hidden_size is {config['mm_hidden_size']}, but the vision tower is "
            f"{vision.hidden_size} wide; it is not the tower this checkpoint was trained with"
        )
    model = MobileVLMConfig(
        text=text,
        vision=vision,
        projector_type=projector_type,
        vision_select_layer=_select_layer(config, "mm_vision_select_layer", where),
    )
    return _Parts(model, config, tensors, preprocessing, paths)


def _refuse_tower(folder: Path, vision_tower: str | None) -> None:
    if vision_tower is not None:
        raise ExportError(
            f"{folder}: carries its own vision tower, which was trained with it; leave out --vision-tower "
            f"(given: {vision_tower})"
        )


def _select_layer(config: Mapping[str, Any], key: str, where: Path) -> int:
    layer = config.get(key, -2)
    if type(layer) is not int:
        raise ExportError(f"{where}: {key} is {layer!r}; a whole number is expected")
    return layer


def vision_config_from_shapes(weights: WeightFiles, prefix: str) -> CLIPVisionConfig:
    """The sizes of a tower whose config is not at hand, from its tensors; heads are :data:`CLIP_HEAD_DIM` wide.

    Raises:
        ExportError: the tensors that tell the sizes are missing or of other ranks, or the width is no multiple of a
            head's.
    """
    try:
        width, _, patch_size, _ = weights.tensors[f"{prefix}embeddings.patch_embedding.weight"].shape
        positions, _ = weights.tensors[f"{prefix}embeddings.position_embedding.weight"].shape
        intermediate_size, _ = weights.tensors[f"{prefix}encoder.layers.0.mlp.fc1.weight"].shape
    except (KeyError, ValueError) as error:
        raise ExportError(
            f"{weights.folder}: the vision tower in it lacks or misshapes a tensor that tells its sizes ({error})"
        ) from error
    if width % CLIP_HEAD_DIM:
        raise ExportError(
            f"{weights.folder}: the vision tower in it is {width} wide, which is no multiple of CLIP's head width "
            f"{CLIP_HEAD_DIM}; without a config of its own its heads are not known"
        )
    layers = {int(m[1]) for name in weights if (m := re.match(re.escape(prefix) + r"encoder\.layers\.(\d+)\.", name))}
    grid_size = round((positions - 1) ** 0.5)
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=intermediate_size,
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=width // CLIP_HEAD_DIM,
        image_size=grid_size * patch_size,
        patch_size=patch_size,
    )


def _find_vision_tower(folder: Path, config: Mapping[str, Any], projector_type: str, given: str | None) -> Path:
    if given is not None:
        return resolve_folder(given, "--vision-tower")
    named = config.get("mm_vision_tower")
    if not named:
        raise ExportError(
            f"{folder}: has no vision tower, and config.json names none; pass --vision-tower with the folder or hub id "
            "of the CLIP model it was trained with"
        )
    beside = folder / named
    if beside.is_dir():
        return beside
    if projector_type == "ldpnetv2":
        # MobileVLM V2 trained its tower further, so the one that it began with would be another model, silently.
        raise ExportError(
            f"{folder}: a MobileVLM V2 (ldpnetv2) carries its own vision tower, but these weights hold none "
            f"({VISION_PREFIX}*), and {named!r}, which config.json names, is not the one it was trained with; fetch "
            "all of its files, or pass --vision-tower to choose one all the same"
        )
    try:
        return resolve_folder(named, "vision tower")
    except ExportError as error:
        raise ExportError(
            f"{folder}: has no vision tower of its own (MobileVLM V1 has none); config.json names {named!r}; "
            f"pass its folder with --vision-tower. Tried: {error}"
        ) from error
