"""A gauge made of real parts: weights, pictures, questions and text that nobody here made, to judge quantization by.

Random weights have no structure, and a model that is trained here is trained for the test. This package fetches parts
that others have trained and written, and makes of them

* R, a language model (``language_model.py``),
* a vision-language model of R, a DINOv2 tower (``dinov2.py``) and a projector between them that was trained here on
  easy-vqa, the other two as they are (``vlm.py``, ``../train_projector.py``),
* a text to evaluate with, another to calibrate with (``texts.py``), and picture questions (``easy_vqa.py``).
"""

from gauge.easy_vqa import PictureQuestion
from gauge.making import DEFAULT_FOLDER, Gauge, make_gauge
from gauge.packages import FetchError
from gauge.texts import WINDOW, windows
from gauge.vlm import right_answers

__all__ = [
    "DEFAULT_FOLDER",
    "WINDOW",
    "FetchError",
    "Gauge",
    "PictureQuestion",
    "make_gauge",
    "right_answers",
    "windows",
]
