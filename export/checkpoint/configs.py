"""The JSON files of a checkpoint: sizes of the parts, preprocessing of pictures, ids of tokens.

Knows what config.json and preprocessor_config.json say; knows nothing of weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvlm.export.errors import ExportError
from mvlm.export.models import CLIPVisionConfig, MobileLlamaConfig

#: What transformers' LlamaConfig takes for a key that is not there. Its nested configs leave out what is so.
LLAMA_DEFAULTS = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

#: The same of transformers' CLIPVisionConfig: a ViT-B/32.
CLIP_VISION_DEFAULTS = {
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}

#: What transformers' LlavaConfig takes where there is no vision_config at all: ViT-L/14-336.
LLAVA_VISION_DEFAULTS = CLIP_VISION_DEFAULTS | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


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


@contextmanager
def blaming(where: Path) -> Iterator[None]:
    """Says of a model that cannot be built which file asked for it."""
    try:
        yield
    except ExportError:
        raise
    except ValueError as error:
        raise ExportError(f"{where}: {error}") from error


def check_only(config: Mapping[str, Any], allowed: Mapping[str, object], where: Path) -> None:
    """Refuses options that would change the computation; a key that is not there means the one allowed value."""
    for key, only in allowed.items():
        value = config.get(key, only)
        if value != only:
            raise ExportError(f"{where}: {key} is {value!r}; only {only!r} is supported")


def _check_sizes(config: Mapping[str, Any], keys: Iterable[str], where: Path) -> None:
    """Refuses sizes that are no whole numbers from 1 on; a key that is not there is not looked at."""
    for key in keys:
        value = config.get(key, 1)
        if type(value) is not int or value < 1:
            raise ExportError(f"{where}: {key} is {value!r}; a whole number from 1 on is expected")


def _check_numbers(config: Mapping[str, Any], keys: Iterable[str], where: Path) -> None:
    """Refuses what should be a number above 0 and is not; a key that is not there is not looked at."""
    for key in keys:
        value = config.get(key, 1.0)
        if type(value) not in (int, float) or value <= 0:
            raise ExportError(f"{where}: {key} is {value!r}; a number above 0 is expected")


def nested_config(config: Mapping[str, Any], key: str, defaults: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """A config inside a config, with what it leaves out filled in.

    Raises:
        ExportError: it is not an object, or of another ``model_type`` than the defaults.
    """
    value = config.get(key)
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ExportError(f"{where}: {key} is {value!r}; an object is expected")
    if value.get("model_type", defaults["model_type"]) != defaults["model_type"]:
        raise ExportError(
            f"{where}: {key}.model_type is {value['model_type']!r}; only {defaults['model_type']!r} is supported"
        )
    return {**defaults, **value}


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
    rope_theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    _check_numbers({**config, "rope_theta": rope_theta}, ("rms_norm_eps", "rope_theta"), where)
    heads = config["num_attention_heads"]
    with blaming(where):
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
            rope_theta=rope_theta,
        )


def vision_config(config: Mapping[str, Any], where: Path) -> CLIPVisionConfig:
    """The vision tower's sizes from the config.json of a CLIP model or a CLIP vision model.

    Raises:
        ExportError: a size is missing or impossible, or it is no CLIP.
    """
    if "vision_config" in config:
        config = nested_config(config, "vision_config", CLIP_VISION_DEFAULTS, where)
    defaults = CLIPVisionConfig()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    missing = [key for key in names if key not in config]
    if missing:
        raise ExportError(f"{where}: lacks {', '.join(missing)} of a CLIP vision tower")
    check_only(config, {"model_type": CLIP_VISION_DEFAULTS["model_type"], "num_channels": 3}, where)
    _check_sizes(config, names, where)
    _check_numbers(config, ("layer_norm_eps",), where)
    with blaming(where):
        return CLIPVisionConfig(
            **{key: config[key] for key in names},
            layer_norm_eps=config.get("layer_norm_eps", defaults.layer_norm_eps),
            hidden_act=config.get("hidden_act", defaults.hidden_act),
        )


def token_ids(config: Mapping[str, Any], key: str, default: int, vocab_size: int, where: Path) -> tuple[int, ...]:
    """One id or a list of them under ``key``, each a row of the embedding.

    Raises:
        ExportError: it is neither, or an id is not below ``vocab_size``.
    """
    value = config.get(key, default)
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not ids or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise ExportError(f"{where}: {key} is {value!r}; ids from 0 to {vocab_size - 1} (vocab_size - 1) are expected")
    return ids


def image_preprocessing(config: Mapping[str, Any], image_size: int, where: Path) -> ImagePreprocessing:
    """Mean and standard deviation from the config of an image processor.

    Whether it crops to a square, as LLaVA's and CLIP's in Hugging Face's layout do, is not looked at: pictures are
    padded to a square, as MobileVLM and the original LLaVA-1.5 do (``image_aspect_ratio`` ``pad``) and were trained.

    Raises:
        ExportError: it makes pictures of another size than the tower takes, or does not state three channels.
    """
    size = config.get("size", image_size)
    side = (size.get("shortest_edge") or size.get("height")) if isinstance(size, dict) else size
    if side != image_size:
        raise ExportError(f"{where}: size {side} and the vision tower's image_size {image_size} disagree")
    defaults = ImagePreprocessing()
    mean = tuple(config.get("image_mean", defaults.mean))
    std = tuple(config.get("image_std", defaults.std))
    if len(mean) != 3 or len(std) != 3:
        raise ExportError(f"{where}: image_mean and image_std need 3 numbers each, got {mean} and {std}")
    return ImagePreprocessing(mean, std)
