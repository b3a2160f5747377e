"""The next token from logits."""

from __future__ import annotations

import torch
from torch import Tensor


class Sampler:
    """Temperature, then top-k, then top-p, then one draw; temperature 0 takes the likeliest token.

    Args:
        temperature: ≥ 0.
        top_k: only the k likeliest tokens may be drawn; 0 means all.
        top_p: in (0, 1]; only the fewest likeliest tokens that together reach this probability may be drawn.
        seed: of the draws; None takes a random one.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None) -> None:
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature {temperature} is not possible: 0 (always the likeliest token) or more")
        if top_k < 0:
            raise ValueError(f"top_k {top_k} is not possible: 0 (all tokens) or more")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p {top_p} is not possible: more than 0, up to 1 (all tokens)")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, logits_V: Tensor) -> int:
        """A token id.

        Raises:
            RuntimeError: a logit is NaN or infinite: the program computed garbage.
        """
        if not bool(torch.isfinite(logits_V).all()):
            raise RuntimeError("the model's logits are not finite; the .pte is damaged or the model broken")
        if self.temperature == 0:
            return int(logits_V.argmax())
        probabilities, ids = torch.softmax(logits_V.double() / self.temperature, dim=-1).sort(
            descending=True, stable=True
        )
        if self.top_k:
            probabilities = probabilities[: self.top_k]
        if self.top_p < 1:
            # A token stays if those before it do not reach top_p yet; the first always stays.
            before = probabilities.cumsum(0) - probabilities
            probabilities = probabilities[before < self.top_p * probabilities.sum()]
        return int(ids[torch.multinomial(probabilities, 1, generator=self._generator)])
