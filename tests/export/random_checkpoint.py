"""Checkpoints in the layouts of MobileVLM, LLaVA and MobileLLaMA with random weights, at toy size.

Names and shapes are written down here once more, from the published checkpoints, and not taken from the reader that is
tested with them. Weights are scaled so that every layer's outputs are of the order of 1, so that a wrong layer shows.
"""

from __future__ import annotations

import functools
import io
import json
import struct
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

#: All files that weights come in; a * stands for a sharded one with its index.
WEIGHT_FORMS = ("model.safetensors", "pytorch_model.bin", "model*.safetensors", "pytorch_model*.bin")

VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."
PROJECTOR_PREFIX = "model.mm_projector."


@dataclass(frozen=True)
class Sizes:
    """Sizes of a checkpoint; the names are those of config.json, with ``vision_`` before the tower's.

    The default keeps lowering cheap: one decoder layer, one of two vision blocks used.
    """

    hidden_size: int = 64
    intermediate_size: int = 96
    num_hidden_layers: int = 1
    num_attention_heads: int = 2
    num_key_value_heads: int = 1
    head_dim: int = 32
    vocab_size: int = 96
    max_position_embeddings: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    projector: str = "ldpnet"
    vision_hidden_size: int = 128
    vision_intermediate_size: int = 96
    vision_num_hidden_layers: int = 2
    vision_num_attention_heads: int = 2
    vision_image_size: int = 28
    vision_patch_size: int = 7
    vision_hidden_act: str = "quick_gelu"
    vision_layer_norm_eps: float = 1e-5
    select_layer: int = -2

    @property
    def num_patches(self) -> int:
        return (self.vision_image_size // self.vision_patch_size) ** 2

    def text(self) -> dict[str, Any]:
        """The language model's part of config.json."""
        names = list(asdict(self))
        return {name: getattr(self, name) for name in names[: names.index("projector")]}

    def vision(self) -> dict[str, Any]:
        """The vision tower's config.json."""
        return {key.removeprefix("vision_"): value for key, value in asdict(self).items() if key.startswith("vision_")}


#: What was published, with 24 tower blocks; only names and shapes of these are ever made.
MOBILEVLM_1_7B = Sizes(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128,
    vocab_size=32000,
    max_position_embeddings=2048,
    vision_hidden_size=1024,
    vision_intermediate_size=4096,
    vision_num_hidden_layers=24,
    vision_num_attention_heads=16,
    vision_image_size=336,
    vision_patch_size=14,
)


MOBILEVLM_3B = replace(
    MOBILEVLM_1_7B,
    hidden_size=2560,
    intermediate_size=6912,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=80,
)
VICUNA_7B = replace(
    MOBILEVLM_1_7B,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)


def language_shapes(sizes: Sizes) -> Shapes:
    width, ffn = sizes.hidden_size, sizes.intermediate_size
    queries, keys = sizes.num_attention_heads * sizes.head_dim, sizes.num_key_value_heads * sizes.head_dim
    shapes: Shapes = {"model.embed_tokens.weight": (sizes.vocab_size, width)}
    for layer in range(sizes.num_hidden_layers):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (queries, width),
                "self_attn.k_proj": (keys, width),
                "self_attn.v_proj": (keys, width),
                "self_attn.o_proj": (width, queries),
                "mlp.gate_proj": (ffn, width),
                "mlp.up_proj": (ffn, width),
                "mlp.down_proj": (width, ffn),
                "input_layernorm": (width,),
                "post_attention_layernorm": (width,),
            }.items()
        }
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (sizes.vocab_size, width)}


def _with_bias(name: str, shape: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def tower_shapes(sizes: Sizes) -> Shapes:
    """Names below ``vision_model.``."""
    width, ffn, patch = sizes.vision_hidden_size, sizes.vision_intermediate_size, sizes.vision_patch_size
    shapes: Shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (sizes.num_patches + 1, width),
        **_with_bias("pre_layrnorm", (width,)),
    }
    for layer in range(sizes.vision_num_hidden_layers):
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _with_bias(f"encoder.layers.{layer}.self_attn.{projection}", (width, width))
        shapes |= _with_bias(f"encoder.layers.{layer}.layer_norm1", (width,))
        shapes |= _with_bias(f"encoder.layers.{layer}.layer_norm2", (width,))
        shapes |= _with_bias(f"encoder.layers.{layer}.mlp.fc1", (ffn, width))
        shapes |= _with_bias(f"encoder.layers.{layer}.mlp.fc2", (width, ffn))
    return shapes | _with_bias("post_layernorm", (width,))


def projector_shapes(sizes: Sizes) -> Shapes:
    """Names below ``model.mm_projector.``."""
    vision, width = sizes.vision_hidden_size, sizes.hidden_size
    match sizes.projector:
        case "ldpnet":
            shapes = _with_bias("model.mlp.1", (width, vision)) | _with_bias("model.mlp.3", (width, width))
            for block in ("model.mb_block.1.block", "model.mb_block.2.block"):
                shapes |= {f"{block}.0.0.weight": (width, 1, 3, 3)}
                shapes |= _with_bias(f"{block}.0.1", (width,))
                shapes |= _with_bias(f"{block}.1.fc1", (width // 4, width, 1, 1))
                shapes |= _with_bias(f"{block}.1.fc2", (width, width // 4, 1, 1))
                shapes |= {f"{block}.2.0.weight": (width, width, 1, 1)}
                shapes |= _with_bias(f"{block}.2.1", (width,))
            return shapes
        case "ldpnetv2":
            return (
                _with_bias("mlp.mlp.0", (width, vision))
                | _with_bias("mlp.mlp.2", (width, width))
                | _with_bias("peg.peg.0", (width, 1, 3, 3))
            )
        case "mlp2x_gelu":
            return _with_bias("0", (width, vision)) | _with_bias("2", (width, width))
        case "linear":
            return {"weight": (width, vision), "bias": (width,)}
        case other:
            raise ValueError(other)


def random_tensors(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Normal weights of variance 1 / fan-in, embeddings of variance 1, norms around 1, small biases."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator)
        if name.endswith(("embed_tokens.weight", "token_embedding.weight", "position_embedding.weight")):
            tensors[name] = tensor
        elif len(shape) > 1:
            tensors[name] = tensor * torch.Size(shape[1:]).numel() ** -0.5
        else:
            tensors[name] = tensor * 0.1 + (1.0 if name.endswith("weight") else 0.0)
    return tensors


def original_shapes(sizes: Sizes, own_tower: bool) -> Shapes:
    """All names of a checkpoint in MobileVLM's and the original LLaVA's layout."""
    shapes = language_shapes(sizes) | {PROJECTOR_PREFIX + k: shape for k, shape in projector_shapes(sizes).items()}
    if own_tower:
        shapes |= {VISION_PREFIX + k: shape for k, shape in tower_shapes(sizes).items()}
    return shapes


#: Prefixes in Hugging Face's LLaVA of the language model, its head, the projector and the tower: as written until
#: transformers 4.51, as in memory since then and in files of some, and as transformers 5 writes.
HF_NAMES = {
    "old": ("language_model.model.", "language_model.", "multi_modal_projector.", "vision_tower.vision_model."),
    "new": ("model.language_model.", "", "model.multi_modal_projector.", "model.vision_tower.vision_model."),
    "newest": ("model.language_model.", "", "model.multi_modal_projector.", "model.vision_tower."),
    "transformers 5": ("language_model.model.", "language_model.", "multi_modal_projector.", "vision_tower."),
}


def hf_llava_names(
    language: dict[str, Any], projector: dict[str, Any], tower: dict[str, Any], scheme: str
) -> dict[str, Any]:
    """Tensors or shapes by their names in Hugging Face's layout; ``projector`` is an ``mlp2x_gelu``."""
    model, head, middle, vision = HF_NAMES[scheme]
    return (
        {vision + name: value for name, value in tower.items()}
        | {middle + name.replace("0.", "linear_1.").replace("2.", "linear_2."): v for name, v in projector.items()}
        | {model + name.removeprefix("model."): v for name, v in language.items() if name.startswith("model.")}
        | {head + name: value for name, value in language.items() if name.startswith("lm_head.")}
    )


def hf_llava_config(sizes: Sizes, **text: object) -> dict[str, Any]:
    """config.json of Hugging Face's LLaVA; ``text`` stands in for the full text_config."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": sizes.vocab_size - 2,
        "model_type": "llava",
        "pad_token_id": sizes.vocab_size - 1,
        "projector_hidden_act": "gelu",
        "text_config": {"model_type": "llama", **(text or sizes.text())},
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": {
            "model_type": "clip_vision_model",
            "projection_dim": 768,
            "vocab_size": 32000,
            **sizes.vision(),
        },
        "vision_feature_layer": sizes.select_layer,
        "vision_feature_select_strategy": "default",
    }


def write_sparse(path: Path, shapes: Shapes) -> None:
    """A safetensors file of float16 zeros that takes no room on the disk, whatever its size.

    The format is 8 bytes with the length of the header, the header as JSON, and the values
    (https://huggingface.co/docs/safetensors).
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@functools.cache
def tokenizer_model(pieces: int = 64) -> bytes:
    """A SentencePiece model of exactly ``pieces`` single characters, unknown, begin and end among them."""
    model = io.BytesIO()
    characters = [chr(0x4E00 + i) for i in range(pieces - 4)]  # and ▁
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(characters)] * 2),
        model_writer=model,
        model_type="char",
        vocab_size=pieces,
        character_coverage=1.0,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def save_tensors(folder: Path, tensors: dict[str, Tensor], form: str = "model.safetensors", shards: int = 3) -> None:
    """Writes weights in one of :data:`WEIGHT_FORMS`."""
    if "*" not in form:
        _save_file(folder / form, tensors)
        return
    weight_map = {}
    names = list(tensors)
    for shard in range(shards):
        file_name = form.replace("*", f"-{shard + 1:05}-of-{shards:05}")
        in_shard = names[shard::shards]
        _save_file(folder / file_name, {name: tensors[name] for name in in_shard})
        weight_map |= dict.fromkeys(in_shard, file_name)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / f"{form.replace('*', '')}.index.json").write_text(json.dumps(index))


def _save_file(path: Path, tensors: dict[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file(tensors, path, {"format": "pt"})
    else:
        torch.save(tensors, path)


@dataclass
class RandomCheckpoint:
    """A checkpoint in memory; change its dictionaries, then :meth:`write` it.

    Attributes:
        sizes: of the model.
        own_tower: whether the tower travels in the checkpoint (MobileVLM V2) or in a folder of its own (V1).
        language: tensors by their full names.
        projector: tensors by their names below :data:`PROJECTOR_PREFIX`.
        tower: tensors by their names below ``vision_model.``.
        config: config.json of the checkpoint.
        tower_config: config.json of the tower, where it has one.
        preprocessor_config: of the tower, where it has one.
    """

    sizes: Sizes
    own_tower: bool
    language: dict[str, Tensor]
    projector: dict[str, Tensor]
    tower: dict[str, Tensor]
    config: dict[str, Any]
    tower_config: dict[str, Any]
    preprocessor_config: dict[str, Any] | None = None
    tokenizer: bytes = field(default_factory=tokenizer_model)

    @classmethod
    def make(cls, sizes: Sizes | None = None, own_tower: bool = False, seed: int = 0) -> RandomCheckpoint:
        sizes = sizes or Sizes()
        config = sizes.text() | {
            "architectures": ["MobileLlamaForCausalLM"],
            "model_type": "mobilevlm",
            "hidden_act": "silu",
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "mm_hidden_size": sizes.vision_hidden_size,
            "mm_projector_type": sizes.projector,
            "mm_vision_tower": "openai/clip-vit-large-patch14-336" if own_tower else "tower",
            "mm_vision_select_layer": sizes.select_layer,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "image_aspect_ratio": "pad",
            "vision_tower_type": "clip",
        }
        return cls(
            sizes,
            own_tower,
            random_tensors(language_shapes(sizes), seed + 1),
            random_tensors(projector_shapes(sizes), seed + 2),
            random_tensors(tower_shapes(sizes), seed + 3),
            config,
            {"model_type": "clip_vision_model"} | sizes.vision(),
        )

    def make_llava(self) -> None:
        """Turns config.json into that of the original LLaVA-1.5."""
        assert self.sizes.projector in ("mlp2x_gelu", "linear")
        del self.config["vision_tower_type"]
        self.config |= {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava",
            "freeze_mm_mlp_adapter": False,
            "pretraining_tp": 1,
            "use_mm_proj": True,
            "max_length": 4096,
        }

    def make_text_only(self) -> None:
        """Turns config.json into that of MobileLLaMA, and leaves projector and tower out."""
        self.config = self.sizes.text() | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "rope_scaling": None,
            "tie_word_embeddings": False,
        }
        self.projector, self.tower, self.own_tower = {}, {}, True

    def write_hf_llava(self, folder: Path, scheme: str = "old", form: str = "model.safetensors") -> Path:
        """Writes the checkpoint in Hugging Face's LLaVA layout; returns ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(hf_llava_config(self.sizes)))
        (folder / "tokenizer.model").write_bytes(self.tokenizer)
        save_tensors(folder, hf_llava_names(self.language, self.projector, self.tower, scheme), form)
        return folder

    def main_tensors(self) -> dict[str, Tensor]:
        """What the checkpoint's own weight files hold, by full name."""
        tensors = self.language | {PROJECTOR_PREFIX + name: tensor for name, tensor in self.projector.items()}
        if self.own_tower:
            tensors |= {VISION_PREFIX + name: tensor for name, tensor in self.tower.items()}
        return tensors

    def add_legacy_tensors(self) -> None:
        """Adds what old versions of transformers stored: functions of the config, not weights."""
        for layer in range(self.sizes.num_hidden_layers):
            name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            self.language[name] = torch.full((self.sizes.head_dim // 2,), torch.nan)
        self.tower["embeddings.position_ids"] = torch.arange(self.sizes.num_patches + 1)[None]

    def convert(self, dtype: torch.dtype) -> None:
        """Rounds all floating-point tensors."""
        for tensors in (self.language, self.projector, self.tower):
            for name, tensor in tensors.items():
                if tensor.is_floating_point():
                    tensors[name] = tensor.to(dtype)

    def write(self, folder: Path, form: str = "model.safetensors", tower_form: str | None = None) -> Path:
        """Writes the checkpoint, the tower of a V1 one into ``folder/tower``; returns ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        (folder / "tokenizer.model").write_bytes(self.tokenizer)
        save_tensors(folder, self.main_tensors(), form)
        if not self.own_tower:
            self.write_tower(folder / "tower", tower_form or form)
        return folder

    def write_tower(self, folder: Path, form: str = "model.safetensors", prefix: str = "vision_model.") -> Path:
        """Writes the tower as a CLIP vision model; returns ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.tower_config))
        if self.preprocessor_config is not None:
            (folder / "preprocessor_config.json").write_text(json.dumps(self.preprocessor_config))
        save_tensors(folder, {prefix + name: tensor for name, tensor in self.tower.items()}, form)
        return folder

    def write_clip(self, folder: Path, form: str = "pytorch_model.bin") -> Path:
        """Writes the tower inside a whole CLIP, as OpenAI published it: with a text tower; returns ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        width, projection = 32, 16
        text_shapes = {
            "text_model.embeddings.token_embedding.weight": (50, width),
            "text_model.embeddings.position_embedding.weight": (7, width),
            "text_model.final_layer_norm.weight": (width,),
            "text_model.final_layer_norm.bias": (width,),
            "text_model.encoder.layers.0.mlp.fc1.weight": (width, width),
            "text_projection.weight": (projection, width),
            "visual_projection.weight": (projection, self.sizes.vision_hidden_size),
            "logit_scale": (),
        }
        tensors = random_tensors(text_shapes, seed=9)
        tensors["text_model.embeddings.position_ids"] = torch.arange(7)[None]
        tensors["vision_model.embeddings.position_ids"] = torch.arange(self.sizes.num_patches + 1)[None]
        tensors |= {f"vision_model.{name}": tensor for name, tensor in self.tower.items()}
        config = {"model_type": "clip", "text_config": {"hidden_size": width}, "vision_config": self.tower_config}
        (folder / "config.json").write_text(json.dumps(config))
        save_tensors(folder, tensors, form)
        return folder
