"""Package: metadata and tokenizer join the lowered methods, and the ``.pte`` is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig
from executorch.exir.delegate import executorch_call_delegate

from mvlm.export.capture import logit_positions
from mvlm.export.checkpoint import Checkpoint
from mvlm.export.contract import (
    PROGRAM_ID,
    PROMPT_PLACEHOLDER,
    SMOOTHING,
    TOKENIZER,
    WEIGHTS_DIGEST,
    ImageProcessing,
    Metadata,
)
from mvlm.export.files import atomic_write
from mvlm.export.lower import EDGE_COMPILE_CONFIG, Lowered
from mvlm.export.recipe import Recipe
from mvlm.export.smoothing import Smoothing

IMAGE_MARKER = "<image>"
IMAGE_PREFIX = IMAGE_MARKER + "\n"
STOP_STRINGS = ("</s>",)
#: All checkpoints that are read here converse like Vicuna v1: what a person says first stands behind a preamble, what
#: follows behind the "</s>" of the answer before.
NEXT_TURN_TEMPLATE = f"USER: {PROMPT_PLACEHOLDER} ASSISTANT:"


def image_processing(checkpoint: Checkpoint) -> ImageProcessing | None:
    """How the checkpoint's model wants its pictures; None for a language model alone."""
    config = checkpoint.config
    if config.vision is None:
        return None
    return ImageProcessing(
        size=config.vision.image_size,
        mean=checkpoint.preprocessing.mean,
        std=checkpoint.preprocessing.std,
        pad_color=checkpoint.preprocessing.pad_color,
        tokens=config.num_image_tokens,
    )


def describe(checkpoint: Checkpoint, recipe: Recipe) -> Metadata:
    """What the .pte will say about itself. Hashes the checkpoint's files, which takes a second for one or two GB."""
    config = checkpoint.config
    image = image_processing(checkpoint)
    return Metadata(
        model_name=checkpoint.name,
        checkpoint_id=checkpoint.checkpoint_id,
        mvlm_version=version("mvlm"),
        recipe=recipe.to_json(),
        max_seq_len=recipe.max_seq_len(config),
        max_context_len=recipe.max_context_len,
        logit_positions=logit_positions(recipe, config),
        vocab_size=config.text.vocab_size,
        bos_id=checkpoint.bos_id,
        eos_ids=checkpoint.eos_ids,
        prompt_template=checkpoint.prompt_template,
        next_turn_template=NEXT_TURN_TEMPLATE,
        image_marker=IMAGE_MARKER if image else "",
        image_prefix=IMAGE_PREFIX if image else "",
        stop_strings=STOP_STRINGS,
        image=image,
    )


def program_id(lowered: Lowered, metadata: Metadata) -> str:
    """The value of :data:`PROGRAM_ID`: the same for the same checkpoint, recipe and versions."""
    digest = hashlib.sha256(json.dumps(asdict(metadata), sort_keys=True).encode())
    for package in ("executorch", "torch", "torchao"):
        digest.update(f"{package} {version(package)}\0".encode())
    for name, program in lowered.programs.items():
        digest.update(f"{name}\0".encode())
        for node in program.graph.nodes:
            if node.target is executorch_call_delegate:
                # The keys of its weights are in it.
                digest.update(getattr(program.graph_module, node.args[0].target).processed_bytes)
    return f"sha256:{digest.hexdigest()}"


def constant_methods(
    metadata: Metadata,
    tokenizer: bytes,
    program_id: str,
    weights_digest: str,
    smoothing: Smoothing | None = None,
) -> dict[str, Any]:
    """All constant methods of the .pte, the tokenizer among them."""
    tokenizer_tensor = torch.from_numpy(np.frombuffer(tokenizer, dtype=np.uint8).copy())
    others = {PROGRAM_ID: program_id, WEIGHTS_DIGEST: weights_digest, TOKENIZER: tokenizer_tensor}
    if smoothing is not None:
        others[SMOOTHING] = smoothing.exponents
    return metadata.to_constant_methods() | others


def write_pte(lowered: Lowered, constant_methods: Mapping[str, Any], path: Path) -> int:
    """Plans memory, serializes and writes the program; returns the file's size in bytes.

    Raises:
        OSError: the file could not be written; nothing is left of it.
    """
    edge = EdgeProgramManager(dict(lowered.programs), dict(constant_methods), EDGE_COMPILE_CONFIG)
    program = edge.to_executorch(ExecutorchBackendConfig())
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
