"""Writes a trained demo model as a checkpoint in MobileVLM V1's layout, the format :mod:`mvlm.export.checkpoint` reads.

``python -m mvlm.export.demo.write_checkpoint --state build/demo/state.pt --checkpoint export/demo/mobilevlm-demo``
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mvlm.export.checkpoint import PROJECTOR_NAMES, PROJECTOR_PREFIX
from mvlm.export.demo.data import IMAGE_MEAN, IMAGE_STD
from mvlm.export.demo.tokenizer import BOS_ID, EOS_ID
from mvlm.export.models import CLIPVisionTower, MobileVLM, unfused

#: Projector weights that are 1x1 convolutions in the format and linears here: written with two axes more.
_CONVOLUTION = re.compile(r"mm_projector\.blocks\.\d\.(squeeze_excite\.fc[12]|pointwise)\.weight")

#: Where the vision tower goes, below the checkpoint's folder.
VISION_TOWER_FOLDER = "vision_tower"


def _projector_name(name: str, projector_type: str) -> str:
    """The format's name of a parameter of the projector: the reader's table, backwards."""
    for pattern, target in PROJECTOR_NAMES[projector_type]:
        match = re.fullmatch(re.escape(target).replace(r"\\1", "(.*)"), name)
        if match:
            return PROJECTOR_PREFIX + match.expand(pattern.replace("(.*)", r"\g<1>").replace(r"\.", "."))
    raise ValueError(f"the {projector_type} projector has no parameter {name}")


def main_tensors(model: MobileVLM) -> dict[str, Tensor]:
    """Names and float16 tensors of model.safetensors: language model and projector."""
    tensors = {}
    for name, tensor in unfused(model.language_model, model.language_model.state_dict()).items():
        tensors[name if name.startswith("lm_head.") else f"model.{name}"] = tensor
    for name, tensor in model.mm_projector.state_dict(prefix="mm_projector.").items():
        if _CONVOLUTION.fullmatch(name):
            tensor = tensor[:, :, None, None]
        tensors[_projector_name(name, model.config.projector_type)] = tensor
    # clone: lm_head and the embedding may be one parameter, and are two tensors in the file.
    return {name: tensor.to(torch.float16).clone() for name, tensor in tensors.items()}


def tower_tensors(model: MobileVLM) -> dict[str, Tensor]:
    """Names and float16 tensors of the vision tower's model.safetensors.

    The format holds the whole tower. What lies behind the selected block was never trained and is never computed; it
    keeps the values that a new tower has.
    """
    config = model.config.vision
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    whole = CLIPVisionTower(config, select_layer=config.num_hidden_layers)
    torch.set_rng_state(generator_state)
    tensors = unfused(whole, whole.state_dict() | model.vision_tower.state_dict())
    patch_embedding = tensors["embeddings.patch_embedding.weight"]
    tensors["embeddings.patch_embedding.weight"] = patch_embedding.unflatten(1, (3, *2 * [config.patch_size]))
    tensors["post_layernorm.weight"] = torch.ones(config.hidden_size)
    tensors["post_layernorm.bias"] = torch.zeros(config.hidden_size)
    return {f"vision_model.{name}": tensor.to(torch.float16).clone() for name, tensor in tensors.items()}


def main_config(model: MobileVLM) -> dict[str, Any]:
    """config.json, as MobileVLM writes it."""
    text = model.config.text
    return {
        "architectures": ["MobileLlamaForCausalLM"],
        "model_type": "mobilevlm",
        "attention_bias": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "max_sequence_length": text.max_position_embeddings,
        "mm_hidden_size": model.config.vision.hidden_size,
        "mm_projector_type": model.config.projector_type,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": model.config.vision_select_layer,
        "mm_vision_tower": f"./{VISION_TOWER_FOLDER}",
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vision_tower_type": "clip",
        "vocab_size": text.vocab_size,
    }


def tower_config(model: MobileVLM) -> dict[str, Any]:
    """The vision tower's config.json, for transformers' CLIPVisionModel."""
    vision = model.config.vision
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "attention_dropout": 0.0,
        "hidden_act": vision.hidden_act,
        "hidden_size": vision.hidden_size,
        "image_size": vision.image_size,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": vision.intermediate_size,
        "layer_norm_eps": vision.layer_norm_eps,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "num_hidden_layers": vision.num_hidden_layers,
        "patch_size": vision.patch_size,
        "projection_dim": vision.hidden_size,
        "torch_dtype": "float16",
    }


def preprocessor_config(model: MobileVLM) -> dict[str, Any]:
    """preprocessor_config.json, for transformers' CLIPImageProcessor."""
    side = model.config.vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }


def tokenizer_config(model: MobileVLM) -> dict[str, Any]:
    """tokenizer_config.json, for transformers' LlamaTokenizer."""
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": model.config.text.max_position_embeddings,
        "sp_model_kwargs": {},
    }


def write_checkpoint(model: MobileVLM, tokenizer_model: bytes, folder: Path) -> None:
    """Writes the checkpoint; files that are there already are replaced, each as a whole.

    Args:
        model: the trained model; weights are rounded to float16.
        tokenizer_model: the bytes of tokenizer.model.
        folder: created if need be.
    """
    tower = folder / VISION_TOWER_FOLDER
    tower.mkdir(parents=True, exist_ok=True)

    def replace(path: Path, data: bytes | dict[str, Any] | dict[str, Tensor]) -> None:
        partial = path.with_name(path.name + ".partial")
        if isinstance(data, bytes):
            partial.write_bytes(data)
        elif path.suffix == ".safetensors":
            save_file({name: tensor.contiguous() for name, tensor in data.items()}, partial, {"format": "pt"})
            partial.chmod(0o644)
        else:
            partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)

    replace(folder / "config.json", main_config(model))
    replace(folder / "model.safetensors", main_tensors(model))
    replace(folder / "tokenizer.model", tokenizer_model)
    replace(folder / "tokenizer_config.json", tokenizer_config(model))
    replace(tower / "config.json", tower_config(model))
    replace(tower / "model.safetensors", tower_tensors(model))
    replace(tower / "preprocessor_config.json", preprocessor_config(model))


def main() -> None:
    from mvlm.export.demo.train import Trainer  # which imports this module

    parser = argparse.ArgumentParser(prog="python -m mvlm.export.demo.write_checkpoint", description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="what the training saved; it need not be finished")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    trainer = Trainer.from_state(options.state)
    write_checkpoint(trainer.model, trainer.tokenizer_model, options.checkpoint)
    print(f"{options.checkpoint}: the model after {trainer.step} of {trainer.recipe.steps} steps")


if __name__ == "__main__":
    main()
