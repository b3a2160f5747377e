"""The bundled demo checkpoint: its world, its training, its evaluation.

The world is described in :mod:`mvlm.export.demo.world`; ``mobilevlm-demo/`` holds the trained model, in MobileVLM's
layout.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent

#: The trained model: config.json, model.safetensors, tokenizer.model, and vision_tower/.
CHECKPOINT = _FOLDER / "mobilevlm-demo"
#: A picture of the demo's world.
SAMPLE_IMAGE = _FOLDER / "sample.jpg"
