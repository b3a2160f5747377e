"""What ``python -m mvlm.export --list`` prints."""

from __future__ import annotations

from collections.abc import Sequence

from mvlm.export.checkpoint.layouts import LAYOUTS
from mvlm.export.checkpoint.named_models import NAMED_MODELS


def listing() -> str:
    """The layouts that can be read, and the models that ``--random-weights`` knows, as two tables."""
    layouts = [
        (layout.name, " or ".join(layout.model_types), ", ".join(layout.projector_types) or "-", layout.tower)
        for layout in LAYOUTS
    ]
    models = [
        (
            name,
            f"{model.num_parameters / 1e9:.2f} G",
            str(model.config.num_image_tokens or "-"),
            model.description,
            ", ".join(model.hub_ids),
        )
        for name, model in NAMED_MODELS.items()
    ]
    return "\n".join(
        (
            "Checkpoints for --model, each as safetensors or .bin, whole or sharded, in float16, bfloat16 or float32,",
            "with tokenizer.model:",
            "",
            *_table(("layout", "model_type", "mm_projector_type", "vision tower"), layouts),
            "",
            "Named models, for --random-weights NAME, or for --model with a hub id. MobileVLM V1 and the original",
            "LLaVA take --vision-tower openai/clip-vit-large-patch14-336, or by default what their config.json names.",
            "",
            *_table(("name", "parameters", "image tokens", "", "hub ids"), models),
        )
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as they need to be."""
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = [heads, ["-" * width if head else "" for head, width in zip(heads, widths, strict=True)], *rows]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
