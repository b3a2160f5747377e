"""What is done to a model on its way into a ``.pte``, as data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from mvlm.export.errors import ExportError

#: ``--scales``: how the scale of a group of weights is chosen -> torchao's name of the algorithm.
SCALE_ALGORITHMS = {"affine": "affine", "hqq": "hqq_scale_only"}


@dataclass(frozen=True)
class Recipe:
    """How to quantize and how long a sequence to plan for.

    Attributes:
        name: of the recipe, for people.
        group_size: weights that share a scale in the language model's 4-bit linears and lm_head, along the input
            width; a power of two, at least 32 (XNNPACK's smallest). Where it does not divide a layer's width, the
            largest halving of it that does is taken.
        scales: ``hqq`` chooses each group's scale to lower the weight error, ``affine`` takes it from the range.
        max_context_len: positions of the KV cache: prompt, picture and answer together.
    """

    name: str = "mobile"
    group_size: int = 128
    scales: str = "hqq"
    max_context_len: int = 768

    def __post_init__(self) -> None:
        if self.group_size < 32 or self.group_size & (self.group_size - 1):
            raise ExportError(
                f"group size {self.group_size} is not possible: XNNPACK takes powers of two from 32 on (32, 64, 128, …)"
            )
        if self.scales not in SCALE_ALGORITHMS:
            raise ExportError(f"scales {self.scales!r} is not one of: {', '.join(SCALE_ALGORITHMS)}")
        if self.max_context_len < 2:
            raise ExportError(
                f"max context length {self.max_context_len} is too short: a prompt and an answer need 2 at least"
            )

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: ``text`` is no JSON, or has other fields than a recipe.
        """
        try:
            return cls(**json.loads(text))
        except TypeError as error:
            raise ValueError(f"{text} is no recipe: {error}") from error


def mobile() -> Recipe:
    """For phones: 8da4w language model, 8-bit embedding, int8 vision, 768 positions."""
    return Recipe()


#: Named recipes, for the command line.
RECIPES = {"mobile": mobile}
