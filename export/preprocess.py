"""A picture becomes the pixels that ``vision_encoder`` takes, as MobileVLM prepares them.

RGB, centred on a square of the pad colour, resized by Pillow's antialiased bicubic filter, normalized. EXIF
orientation is not applied, as in the reference.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mvlm.export.contract import ImageProcessing


def load_image(path: str | Path) -> Image.Image:
    """Decodes a picture file to RGB.

    Raises:
        ValueError: there is no such file, or it is no whole picture.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: is no picture that Pillow knows") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be decoded: {error}") from error


def pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Centres a picture on a square with the side of its longer edge."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def preprocess(image: Image.Image, processing: ImageProcessing) -> Tensor:
    """pixel_values, float32 [1, 3, S, S], of an RGB picture of any size."""
    square = pad_to_square(image.convert("RGB"), processing.pad_color)
    resized = square.resize((processing.size, processing.size), Image.Resampling.BICUBIC)
    pixels_HW3 = np.asarray(resized, dtype=np.float32) / 255.0
    mean = np.asarray(processing.mean, dtype=np.float32)
    std = np.asarray(processing.std, dtype=np.float32)
    return torch.from_numpy(((pixels_HW3 - mean) / std).transpose(2, 0, 1)[None].copy())
