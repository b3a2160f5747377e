"""Pictures as ExecuTorch's own programs hand them over: bytes, up to the model's size, not yet padded or normalized.

Shape letters: H and W height and width of the picture, S side of the square that the model sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PictureInput(nn.Module):
    """Centres a picture on a square of the pad colour and normalizes it, as MobileVLM's image processor does.

    What that does before, resizing so that the longer side is S, is left to the program.

    Args:
        size: S.
        mean: per channel, subtracted after scaling bytes to 0 .. 1.
        std: per channel, divided by afterwards.
        pad_color: RGB, 0 .. 255.
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float], pad_color: Sequence[int]) -> None:
        super().__init__()
        self.size = size
        for name, values in (("mean", mean), ("std", std), ("pad_color", pad_color)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1), persistent=False)

    def forward(self, picture_3HW: Tensor) -> Tensor:
        """uint8 [3, H, W], both at most S, to pixel_values float32 [1, 3, S, S]."""
        S = self.size
        _, H, W = picture_3HW.shape
        top, left = (S - H) // 2, (S - W) // 2
        # Padded with zeros around the pad colour.
        x_3HW = picture_3HW.float() - self.pad_color
        x_3SS = nn.functional.pad(x_3HW, (left, S - W - left, top, S - H - top)) + self.pad_color
        return ((x_3SS / 255 - self.mean) / self.std).unsqueeze(0)
