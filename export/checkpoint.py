"""Load: a checkpoint folder becomes an eager :class:`MobileVLM`, its tokenizer and what else it says.

Knows the file formats and tensor names of MobileVLM's and CLIP's checkpoints; knows nothing of quantization or export.

A name is mapped by the first pattern of a table that matches it whole; a target of ``None`` means "deliberately
unused". Whatever no pattern matches is an error, and so is whatever the model needs and no tensor provides.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mvlm.export.errors import ExportError
from mvlm.export.models import CLIPVisionConfig, MobileLlamaConfig, MobileVLM, MobileVLMConfig

NameTable = tuple[tuple[str, str | None], ...]

#: The language model, as in Hugging Face's Llama.
LANGUAGE_MODEL_NAMES: NameTable = (
    # Old files store the rotary frequencies, which are a function of the config.
    (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", None),
    (r"model\.((?:embed_tokens|layers|norm)\..*)", r"language_model.\1"),
    (r"(lm_head\..*)", r"language_model.\1"),
)

#: The vision tower, below its prefix.
VISION_TOWER_NAMES: NameTable = (
    (r"embeddings\.position_ids", None),
    (r"post_layernorm\..*", None),
    (r"(embeddings\..*|pre_layrnorm\..*|encoder\..*)", r"vision_tower.\1"),
)

#: What a CLIP checkpoint holds besides its vision tower.
CLIP_TEXT_NAMES: NameTable = ((r"text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale", None),)

#: Projectors by ``mm_projector_type``, below ``model.mm_projector.``.
PROJECTOR_NAMES: dict[str, NameTable] = {
    "ldpnet": (
        (r"model\.mlp\.1\.(.*)", r"mm_projector.mlp.0.\1"),
        (r"model\.mlp\.3\.(.*)", r"mm_projector.mlp.2.\1"),
        *(
            (rf"model\.mb_block\.{block + 1}\.block\.{theirs}\.(.*)", rf"mm_projector.blocks.{block}.{ours}.\1")
            for block in (0, 1)
            for theirs, ours in (
                (r"0\.0", "depthwise.conv"),
                (r"0\.1", "depthwise_norm"),
                (r"1\.fc1", "squeeze_excite.fc1"),
                (r"1\.fc2", "squeeze_excite.fc2"),
                (r"2\.0", "pointwise"),
                (r"2\.1", "pointwise_norm"),
            )
        ),
    ),
    "ldpnetv2": (
        (r"mlp\.mlp\.(.*)", r"mm_projector.mlp.\1"),
        (r"peg\.peg\.0\.(.*)", r"mm_projector.positional_encoding.conv.\1"),
    ),
    "mlp2x_gelu": ((r"(.*)", r"mm_projector.\1"),),
    "linear": ((r"(.*)", r"mm_projector.\1"),),
}

VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."
PROJECTOR_PREFIX = "model.mm_projector."

#: Head width of every CLIP vision transformer (https://arxiv.org/abs/2103.00020, table 20): for a checkpoint that
#: carries a tower but not the tower's config.
CLIP_HEAD_DIM = 64

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

HUB_PATTERNS = ["*.json", "*.safetensors", "*.bin", "tokenizer.model"]


def map_name(name: str, table: NameTable, prefix: str = "") -> tuple[bool, str | None]:
    """Looks a tensor's name up: (is it known, the model's name for it or None if it is deliberately unused)."""
    if not name.startswith(prefix):
        return False, None
    for pattern, target in table:
        match = re.fullmatch(pattern, name[len(prefix) :])
        if match:
            return True, match.expand(target) if target is not None else None
    return False, None


class WeightFiles:
    """The tensors of one folder by name, read when asked for.

    Reads ``model.safetensors`` or ``pytorch_model.bin``, or the shards that ``<file>.index.json`` lists; safetensors
    first if both are there. ``.bin`` files are memory-mapped and read with ``weights_only``: a pickle that holds
    anything but tensors is refused.

    Raises:
        ExportError: no weights in the folder, a shard missing, or a file that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = self._find_files()
        self._file_of: dict[str, Path] = {}
        self._bins: dict[Path, Mapping[str, Tensor]] = {}
        for path in self.paths:
            for name in self._names_in(path):
                self._file_of[name] = path

    def _find_files(self) -> list[Path]:
        for file_name in WEIGHT_FILES:
            index = self.folder / f"{file_name}.index.json"
            if index.exists():
                weight_map = read_json(index).get("weight_map")
                if not isinstance(weight_map, dict):
                    raise ExportError(f"{index}: no 'weight_map' in it; the index of a sharded checkpoint has one")
                shards = sorted(set(weight_map.values()))
                missing = [shard for shard in shards if not (self.folder / shard).is_file()]
                if missing:
                    raise ExportError(
                        f"{self.folder}: {len(missing)} of {len(shards)} shards missing: {', '.join(missing)} "
                        f"(listed in {index.name}); fetch them into the folder"
                    )
                return [self.folder / shard for shard in shards]
            if (self.folder / file_name).is_file():
                return [self.folder / file_name]
        raise ExportError(
            f"{self.folder}: no weights in it; looked for {' and '.join(WEIGHT_FILES)}, whole or sharded "
            "(with .index.json)"
        )

    def _names_in(self, path: Path) -> list[str]:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as file:
                    return list(file.keys())
            except (SafetensorError, OSError) as error:
                raise ExportError(f"{path}: cannot be read as safetensors ({error}); is it truncated?") from error
        return list(self._load_bin(path))

    def _load_bin(self, path: Path) -> Mapping[str, Tensor]:
        if path not in self._bins:
            try:
                try:
                    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                except RuntimeError as error:
                    if "mmap can only be used" not in str(error):
                        raise
                    # Files written before torch 1.6 are no zip archives and cannot be mapped.
                    tensors = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torch.load raises many types for broken or hostile files
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise ExportError(
                    f"{path}: cannot be read as PyTorch weights ({reason}); it is truncated, no checkpoint, or holds "
                    "Python objects other than tensors, which are refused because loading them could run code"
                ) from error
            if not isinstance(tensors, dict) or not all(
                isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()
            ):
                raise ExportError(
                    f"{path}: holds {type(tensors).__name__}, not a state dict (names and tensors); "
                    "save the model with torch.save(model.state_dict(), path)"
                )
            self._bins[path] = tensors
        return self._bins[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Every name with its tensor, file by file, one tensor in memory at a time."""
        for path in self.paths:
            names = [name for name, owner in self._file_of.items() if owner == path]
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    for name in names:
                        yield name, file.get_tensor(name)
            else:
                tensors = self._load_bin(path)
                for name in names:
                    yield name, tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        path = self._file_of[name]
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return tuple(file.get_slice(name).get_shape())
        return tuple(self._load_bin(path)[name].shape)


@dataclass(frozen=True)
class ImagePreprocessing:
    """Normalization of pixels. The defaults are CLIP's; both are on the 0 .. 1 scale."""

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def pad_color(self) -> tuple[int, int, int]:
        """MobileVLM pads with the mean, cut to whole numbers: (122, 116, 104) for CLIP's."""
        red, green, blue = (int(channel * 255) for channel in self.mean)
        return red, green, blue


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What the load stage hands on.

    Attributes:
        name: what people call it: the folder's name or the hub id.
        model: float32, in eval mode.
        preprocessing: of pictures.
        tokenizer: the bytes of tokenizer.model.
        bos_id: opens a prompt.
        eos_ids: end an answer.
        checkpoint_id: ``sha256:…`` over all files that were read.
        unused: tensors that were left out on purpose.
    """

    name: str
    model: MobileVLM
    preprocessing: ImagePreprocessing
    tokenizer: bytes
    bos_id: int
    eos_ids: tuple[int, ...]
    checkpoint_id: str
    unused: tuple[str, ...]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ExportError: no such file, no JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExportError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path}: a JSON object is expected, this is a {type(value).__name__}")
    return value


def resolve_folder(name: str, role: str) -> Path:
    """A folder for ``name``: itself if it is one, else a download of that id from the Hugging Face hub.

    Args:
        name: a folder, or a hub id such as ``mtgv/MobileVLM-1.7B``.
        role: what it is, for messages.

    Raises:
        ExportError: neither; the message says why the hub did not answer.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ExportError(f"{role} {name}: is a file; a folder with config.json and weights, or a hub id, is expected")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ExportError(f"{role} {name}: no such folder, and no hub id either (those look like mtgv/MobileVLM-1.7B)")
    import huggingface_hub  # here, because most runs never need it

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # the hub client raises many types for "no network" and "no such repo"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"{role} {name}: no such folder, and the Hugging Face hub did not provide it ({reason}); "
            "pass a folder, or check the id and the network"
        ) from error


@contextmanager
def _blaming(where: Path) -> Iterator[None]:
    """Says of a model that cannot be built which file asked for it."""
    try:
        yield
    except ExportError:
        raise
    except ValueError as error:
        raise ExportError(f"{where}: {error}") from error


def _check_sizes(config: Mapping[str, Any], keys: Iterable[str], where: Path) -> None:
    """Refuses sizes that are no whole numbers from 1 on; a key that is not there is not looked at."""
    for key in keys:
        value = config.get(key, 1)
        if type(value) is not int or value < 1:
            raise ExportError(f"{where}: {key} is {value!r}; a whole number from 1 on is expected")


def text_config(config: Mapping[str, Any], where: Path) -> MobileLlamaConfig:
    """The language model's sizes from config.json.

    Raises:
        ExportError: a size is missing, or the config asks for something a MobileLLaMA has not (RoPE scaling, biases).
    """
    required = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "rms_norm_eps",
    )
    missing = [key for key in required if key not in config]
    if missing:
        raise ExportError(f"{where}: lacks {', '.join(missing)}")
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
    if scaling:
        raise ExportError(f"{where}: rope_scaling {scaling} is not supported; MobileLLaMA has none")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ExportError(f"{where}: attention_bias and mlp_bias are not supported; MobileLLaMA has none")
    if config.get("hidden_act", "silu") != "silu":
        raise ExportError(f"{where}: hidden_act {config['hidden_act']!r} is not supported; MobileLLaMA uses silu")
    _check_sizes(config, (*(key for key in required if key != "rms_norm_eps"), "max_position_embeddings"), where)
    # These two may be null, which means the same as their absence.
    _check_sizes(config, (key for key in ("num_key_value_heads", "head_dim") if config.get(key) is not None), where)
    heads = config["num_attention_heads"]
    with _blaming(where):
        return MobileLlamaConfig(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or config.get("rope_theta", 10000.0),
        )


def vision_config(config: Mapping[str, Any], where: Path) -> CLIPVisionConfig:
    """The vision tower's sizes from the config.json of a CLIP model or a CLIP vision model."""
    config = config.get("vision_config", config)
    defaults = CLIPVisionConfig()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    missing = [key for key in names if key not in config]
    if missing:
        raise ExportError(f"{where}: lacks {', '.join(missing)} of a CLIP vision tower")
    _check_sizes(config, names, where)
    with _blaming(where):
        return CLIPVisionConfig(
            **{key: config[key] for key in names},
            layer_norm_eps=config.get("layer_norm_eps", defaults.layer_norm_eps),
            hidden_act=config.get("hidden_act", defaults.hidden_act),
        )


def vision_config_from_shapes(weights: WeightFiles, prefix: str) -> CLIPVisionConfig:
    """The sizes of a tower whose config is not at hand, from its tensors; heads are :data:`CLIP_HEAD_DIM` wide.

    Raises:
        ExportError: the tensors that tell the sizes are missing or of other ranks, or the width is no multiple of a
            head's.
    """
    try:
        width, _, patch_size, _ = weights.shape(f"{prefix}embeddings.patch_embedding.weight")
        positions, _ = weights.shape(f"{prefix}embeddings.position_embedding.weight")
        intermediate_size, _ = weights.shape(f"{prefix}encoder.layers.0.mlp.fc1.weight")
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


def _tokenizer_bytes(folder: Path, vocab_size: int) -> bytes:
    from sentencepiece import SentencePieceProcessor

    path = folder / "tokenizer.model"
    if not path.is_file():
        raise ExportError(f"{path}: no such file; the SentencePiece model of the checkpoint is required")
    data = path.read_bytes()
    if not data:
        raise ExportError(f"{path}: not a SentencePiece model (it is empty)")
    try:
        pieces = SentencePieceProcessor(model_proto=data).get_piece_size()
    except Exception as error:
        raise ExportError(f"{path}: not a SentencePiece model ({error})") from error
    if pieces > vocab_size:
        raise ExportError(
            f"{path}: has {pieces} pieces, more than the model's vocab_size {vocab_size}; it belongs to another model"
        )
    return data


def _token_ids(config: Mapping[str, Any], key: str, default: int, where: Path) -> tuple[int, ...]:
    """One id or a list of them under ``key``, each a row of the embedding."""
    value = config.get(key, default)
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not ids or not all(type(token) is int and 0 <= token < config["vocab_size"] for token in ids):
        raise ExportError(
            f"{where}: {key} is {value!r}; ids from 0 to {config['vocab_size'] - 1} (vocab_size - 1) are expected"
        )
    return ids


def _check_llava_options(config: Mapping[str, Any], where: Path) -> None:
    """Refuses options that would change the computation and that no MobileVLM checkpoint uses."""
    allowed = {
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "vision_tower_type": "clip",
    }
    for key, only in allowed.items():
        value = config.get(key, only)
        if value != only:
            raise ExportError(f"{where}: {key} is {value!r}; only {only!r} is supported")


def _file_hash(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name}\0".encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


class _Assembler:
    """Copies tensors into the model and keeps account of every name on both sides."""

    def __init__(self, model: MobileVLM) -> None:
        self.parameters = dict(model.named_parameters())
        self.dead_blocks = range(len(model.vision_tower.encoder.layers), model.config.vision.num_hidden_layers)
        self.missing = set(self.parameters)
        self.unused: list[str] = []
        self.unknown: list[str] = []
        self.misshapen: list[str] = []

    def add(self, name: str, tensor: Tensor, known: bool, target: str | None) -> None:
        if not known:
            self.unknown.append(f"{name} {list(tensor.shape)}")
        elif target is None or self._is_beyond_selected_block(target):
            self.unused.append(name)
        elif target not in self.parameters:
            self.unknown.append(f"{name} {list(tensor.shape)}")
        else:
            self._copy(name, tensor, target)

    def _is_beyond_selected_block(self, target: str) -> bool:
        match = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", target)
        return match is not None and int(match[1]) in self.dead_blocks

    def _copy(self, name: str, tensor: Tensor, target: str) -> None:
        parameter = self.parameters[target]
        self.missing.discard(target)
        shape = tuple(tensor.shape)
        # A 1x1 convolution's weight [out, in, 1, 1] is the weight of a linear over channels.
        if len(shape) == 4 and shape[2:] == (1, 1) and parameter.dim() == 2:
            shape = shape[:2]
        if shape != tuple(parameter.shape) or not tensor.is_floating_point():
            self.misshapen.append(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, "
                f"floating point {list(parameter.shape)} is expected"
            )
            return
        with torch.no_grad():
            parameter.copy_(tensor.reshape(shape))

    def check(self, where: Path) -> None:
        problems = [
            (f"{len(names)} tensors {what}", names)
            for what, names in (
                ("missing", sorted(f"{name} {list(self.parameters[name].shape)}" for name in self.missing)),
                ("of another shape or type", self.misshapen),
                ("not known", self.unknown),
            )
            if names
        ]
        if problems:
            listing = "".join(f"\n  {title}:\n    " + "\n    ".join(names) for title, names in problems)
            raise ExportError(f"{where}: the weights do not fit config.json{listing}")


def load(model: str, vision_tower: str | None = None) -> LoadedCheckpoint:
    """Reads a checkpoint in MobileVLM's layout.

    Args:
        model: a folder or a hub id: config.json, tokenizer.model and weights.
        vision_tower: a folder or hub id of a CLIP model, for checkpoints without a tower of their own (MobileVLM V1).
            Without it the config's ``mm_vision_tower`` is taken, a path in which is relative to the folder.

    Returns:
        The float32 model with every parameter filled, and what else was read.

    Raises:
        ExportError: something is missing, superfluous, of another shape, or contradictory.
    """
    folder = resolve_folder(model, "model")
    config_path = folder / "config.json"
    config = read_json(config_path)
    _check_llava_options(config, config_path)
    text = text_config(config, config_path)
    projector_type = config.get("mm_projector_type")
    if projector_type not in PROJECTOR_NAMES:
        raise ExportError(
            f"{config_path}: mm_projector_type is {projector_type!r}; supported: {', '.join(PROJECTOR_NAMES)}"
        )
    weights = WeightFiles(folder)
    tokenizer = _tokenizer_bytes(folder, text.vocab_size)
    read_paths = [config_path, folder / "tokenizer.model", *weights.paths]

    has_tower = any(name.startswith(VISION_PREFIX) for name in weights)
    tower_weights: WeightFiles | None = None
    preprocessing = ImagePreprocessing()
    if has_tower:
        if vision_tower is not None:
            raise ExportError(
                f"{folder}: carries its own vision tower, which was trained with it; leave out --vision-tower "
                f"(given: {vision_tower})"
            )
        vision = vision_config_from_shapes(weights, VISION_PREFIX)
    else:
        tower_folder = _find_vision_tower(folder, config, vision_tower)
        tower_config_path = tower_folder / "config.json"
        vision = vision_config(read_json(tower_config_path), tower_config_path)
        tower_weights = WeightFiles(tower_folder)
        read_paths += [tower_config_path, *tower_weights.paths]
        preprocessor_path = tower_folder / "preprocessor_config.json"
        if preprocessor_path.is_file():
            preprocessing = _read_preprocessing(preprocessor_path, vision.image_size)
            read_paths.append(preprocessor_path)
    if config.get("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
        raise ExportError(
            f"{config_path}: mm_hidden_size is {config['mm_hidden_size']}, but the vision tower is "
            f"{vision.hidden_size} wide; it is not the tower this checkpoint was trained with"
        )

    select_layer = config.get("mm_vision_select_layer", -2)
    if type(select_layer) is not int:
        raise ExportError(f"{config_path}: mm_vision_select_layer is {select_layer!r}; a whole number is expected")
    mobilevlm_config = MobileVLMConfig(
        text=text,
        vision=vision,
        projector_type=projector_type,
        vision_select_layer=select_layer,
    )
    with _blaming(config_path):
        network = _empty_model(mobilevlm_config)
        _ = mobilevlm_config.num_image_tokens  # which refuses a grid of patches that the projector cannot halve
    assembler = _Assembler(network)
    for name, tensor in weights.items():
        assembler.add(name, tensor, *_map_main_name(name, projector_type))
    if tower_weights is not None:
        for name, tensor in tower_weights.items():
            assembler.add(name, tensor, *_map_clip_name(name))
    if config.get("tie_word_embeddings") and "lm_head.weight" not in weights:
        embedding = network.language_model.embed_tokens.weight
        assembler.add("model.embed_tokens.weight", embedding, True, "language_model.lm_head.weight")
    assembler.check(folder)

    return LoadedCheckpoint(
        name=folder.resolve().name if Path(model).expanduser().is_dir() else model,
        model=network.eval(),
        preprocessing=preprocessing,
        tokenizer=tokenizer,
        bos_id=_token_ids(config, "bos_token_id", 1, config_path)[0],
        eos_ids=_token_ids(config, "eos_token_id", 2, config_path),
        checkpoint_id=_file_hash(read_paths),
        unused=tuple(assembler.unused),
    )


def _empty_model(config: MobileVLMConfig) -> MobileVLM:
    """The model with its parameters allocated but not initialized: they are all overwritten."""
    with torch.device("meta"):
        model = MobileVLM(config)
    return model.to_empty(device="cpu").requires_grad_(False)


def _map_main_name(name: str, projector_type: str) -> tuple[bool, str | None]:
    for table, prefix in (
        (LANGUAGE_MODEL_NAMES, ""),
        (PROJECTOR_NAMES[projector_type], PROJECTOR_PREFIX),
        (VISION_TOWER_NAMES, VISION_PREFIX),
    ):
        known, target = map_name(name, table, prefix)
        if known:
            return known, target
    return False, None


def _map_clip_name(name: str) -> tuple[bool, str | None]:
    # transformers 5 writes a CLIPVisionModel's names without the prefix, older files have it.
    for table, prefix in (
        (VISION_TOWER_NAMES, "vision_model."),
        (VISION_TOWER_NAMES, ""),
        (CLIP_TEXT_NAMES, ""),
    ):
        known, target = map_name(name, table, prefix)
        if known:
            return known, target
    return False, None


def _find_vision_tower(folder: Path, config: Mapping[str, Any], given: str | None) -> Path:
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
    try:
        return resolve_folder(named, "vision tower")
    except ExportError as error:
        raise ExportError(
            f"{folder}: has no vision tower of its own (MobileVLM V1 has none); config.json names {named!r}; "
            f"pass its folder with --vision-tower. Tried: {error}"
        ) from error


def _read_preprocessing(path: Path, image_size: int) -> ImagePreprocessing:
    config = read_json(path)
    size = config.get("size", image_size)
    side = (size.get("shortest_edge") or size.get("height")) if isinstance(size, dict) else size
    if side != image_size:
        raise ExportError(f"{path}: size {side} and the vision tower's image_size {image_size} disagree")
    defaults = ImagePreprocessing()
    mean = tuple(config.get("image_mean", defaults.mean))
    std = tuple(config.get("image_std", defaults.std))
    if len(mean) != 3 or len(std) != 3:
        raise ExportError(f"{path}: image_mean and image_std need 3 numbers each, got {mean} and {std}")
    return ImagePreprocessing(mean, std)
