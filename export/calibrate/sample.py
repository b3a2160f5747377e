"""The float model writes its own calibration text.

A model's own words are the closest there is to what it was trained on when no other text is at hand. Many sequences
grow side by side, because every step reads all weights anew.

Knows nothing of quantization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mvlm.export.errors import ExportError
from mvlm.export.progress import Progress, return_freed_memory
from mvlm.export.streamed_model import FloatLanguageModel, SequenceGroup, pass_layers


@dataclass(frozen=True)
class Prompt:
    """The beginning of a sequence.

    Attributes:
        embeddings: float32 [L, D], one position at least.
        new_tokens: that may follow.
        end_ids: that end the sequence. Where there are none it goes on to the last token, and none of the ids that end
            others occurs in it.
    """

    embeddings: Tensor
    new_tokens: int
    end_ids: tuple[int, ...] = ()


def continue_prompts(
    model: FloatLanguageModel,
    groups: Sequence[Sequence[Prompt]],
    generator: torch.Generator,
    progress: Progress | None = None,
) -> list[list[list[int]]]:
    """Draws what follows each prompt from the model's own distribution.

    Args:
        model: that writes.
        groups: of prompts; those of about the same length belong together, for a group has memory for its longest.
        generator: of the draws; the same seed and number of threads give the same text.
        progress: told the share that is done.

    Returns:
        For each group and prompt the ids that followed, end ids included.

    Raises:
        ExportError: the model's logits are not finite.
    """
    prompts = [prompt for group in groups for prompt in group]
    rooms = [max(prompt.new_tokens for prompt in group) for group in groups]
    state = [
        SequenceGroup(model, [len(prompt.embeddings) for prompt in group], room)
        for group, room in zip(groups, rooms, strict=True)
    ]
    lengths = torch.cat([group.lengths_B for group in state])
    x_TD = torch.cat([prompt.embeddings for prompt in prompts])
    x_TD = pass_layers(
        model, state, [int(group.lengths_B.sum()) for group in state], x_TD, SequenceGroup.attend_to_prompts
    )
    x_BD = x_TD[lengths.cumsum(0) - 1]
    del x_TD
    return_freed_memory()
    written: list[list[int]] = [[] for _ in prompts]
    growing = torch.ones(len(prompts), dtype=torch.bool)
    all_ends = sorted({token for prompt in prompts for token in prompt.end_ids})
    for step in range(max(rooms)):
        logits_BV = model.logits(x_BD).cpu()
        if not bool(torch.isfinite(logits_BV).all()):
            raise ExportError("the float model's logits are not finite numbers: the checkpoint is damaged")
        for logits_V, prompt in zip(logits_BV, prompts, strict=True):
            if not prompt.end_ids:
                logits_V[all_ends] = -math.inf
        tokens_B = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]
        for index, (ids, token, prompt) in enumerate(zip(written, tokens_B.tolist(), prompts, strict=True)):
            if growing[index]:
                ids.append(token)
                growing[index] = len(ids) < prompt.new_tokens and token not in prompt.end_ids
        if progress is not None:
            progress.share((step + 1) / max(rooms))
        if not growing.any():
            break
        # A group has no memory for more than its longest sequence.
        going = [group for group, room in zip(state, rooms, strict=True) if step + 1 < room]
        counts = [len(group.lengths_B) for group in going]
        rows = torch.cat([torch.full((len(group.lengths_B),), group in going) for group in state])
        x_BD = torch.zeros(len(prompts), x_BD.shape[1], device=x_BD.device)
        x_BD[rows] = pass_layers(
            model,
            going,
            counts,
            model.embedding[tokens_B[rows].to(model.embedding.device)],
            SequenceGroup.attend_to_token,
            growing[rows],
        )
        for group in going:
            group.lengths_B += 1
    flat = iter(written)
    return [[next(flat) for _ in group] for group in groups]
