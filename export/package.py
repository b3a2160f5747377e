"""Package: metadata and tokenizer join the lowered methods, and the ``.pte`` is written."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.exir import ExecutorchBackendConfig

from mvlm.export.checkpoint import LoadedCheckpoint
from mvlm.export.contract import PROMPT_PLACEHOLDER, TOKENIZER, ImageProcessing, Metadata
from mvlm.export.files import atomic_write
from mvlm.export.lower import Lowered
from mvlm.export.recipe import Recipe

#: MobileVLM's conversation template "v1", one turn. There is no space after the last colon.
PROMPT_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    f"and polite answers to the user's questions. USER: {PROMPT_PLACEHOLDER} ASSISTANT:"
)
IMAGE_MARKER = "<image>"
IMAGE_PREFIX = IMAGE_MARKER + "\n"
STOP_STRINGS = ("</s>",)


def describe(checkpoint: LoadedCheckpoint, recipe: Recipe) -> Metadata:
    """What the .pte will say about itself."""
    config = checkpoint.model.config
    return Metadata(
        model_name=checkpoint.name,
        checkpoint_id=checkpoint.checkpoint_id,
        mvlm_version=version("mvlm"),
        recipe=recipe.to_json(),
        max_context_len=recipe.max_context_len,
        vocab_size=config.text.vocab_size,
        bos_id=checkpoint.bos_id,
        eos_ids=checkpoint.eos_ids,
        prompt_template=PROMPT_TEMPLATE,
        image_marker=IMAGE_MARKER,
        image_prefix=IMAGE_PREFIX,
        stop_strings=STOP_STRINGS,
        image=ImageProcessing(
            size=config.vision.image_size,
            mean=checkpoint.preprocessing.mean,
            std=checkpoint.preprocessing.std,
            pad_color=checkpoint.preprocessing.pad_color,
            tokens=config.num_image_tokens,
        ),
    )


def constant_methods(metadata: Metadata, tokenizer: bytes) -> dict[str, Any]:
    """All constant methods of the .pte, the tokenizer among them."""
    tokenizer_tensor = torch.from_numpy(np.frombuffer(tokenizer, dtype=np.uint8).copy())
    return metadata.to_constant_methods() | {TOKENIZER: tokenizer_tensor}


def write_pte(lowered: Lowered, path: Path) -> int:
    """Plans memory, serializes and writes the program; returns the file's size in bytes.

    Raises:
        OSError: the file could not be written; nothing is left of it.
    """
    program = lowered.edge.to_executorch(
        # Fuses the 8-bit embedding's dequantization and look-up into quantized_decomposed::embedding_byte.
        ExecutorchBackendConfig(do_quant_fusion_and_const_prop=True)
    )
    with atomic_write(path) as file:
        program.write_to_file(file)
    return path.stat().st_size


def write_artifacts(pte: Path, metadata: Metadata, tokenizer: bytes, sample_image: Path) -> list[Path]:
    """Writes beside the .pte what travels inside it, for programs that want files, and a picture to try it on."""
    folder = pte.parent
    contents = {
        folder / "tokenizer.model": tokenizer,
        folder / f"{pte.stem}.json": (json.dumps(asdict(metadata), indent=2) + "\n").encode(),
        folder / sample_image.name: sample_image.read_bytes(),
    }
    for path, content in contents.items():
        with atomic_write(path) as file:
            file.write(content)
    return list(contents)
