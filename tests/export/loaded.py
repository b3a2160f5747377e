"""A checkpoint with its whole model in memory, for tests that look at weights."""

from __future__ import annotations

from dataclasses import dataclass

from mvlm.export.checkpoint import Checkpoint, open_checkpoint
from mvlm.export.checkpoint.configs import ImagePreprocessing
from mvlm.export.models import MobileVLM


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What a :class:`Checkpoint` says, and its model in float32."""

    name: str
    model: MobileVLM
    preprocessing: ImagePreprocessing
    tokenizer: bytes
    bos_id: int
    eos_ids: tuple[int, ...]
    checkpoint_id: str
    unused: tuple[str, ...]


def load(model: str, vision_tower: str | None = None) -> LoadedCheckpoint:
    """Opens a checkpoint and reads all of it."""
    checkpoint: Checkpoint = open_checkpoint(model, vision_tower)
    return LoadedCheckpoint(
        name=checkpoint.name,
        model=checkpoint.load_model(),
        preprocessing=checkpoint.preprocessing,
        tokenizer=checkpoint.tokenizer,
        bos_id=checkpoint.bos_id,
        eos_ids=checkpoint.eos_ids,
        checkpoint_id=checkpoint.checkpoint_id,
        unused=checkpoint.unused,
    )
