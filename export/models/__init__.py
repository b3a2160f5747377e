"""The networks, as plain ``torch.nn.Module`` composition: no file access, no command-line flags.

Module and parameter names are those of the checkpoints wherever they can be, so that loading one is a table of
prefixes (``mvlm.export.checkpoint``) and not a translation.
"""

from mvlm.export.models.clip import CLIPVisionConfig, CLIPVisionTower
from mvlm.export.models.mobilellama import KVCache, MobileLlama, MobileLlamaConfig, TextDecoder, rope_tables
from mvlm.export.models.mobilevlm import MobileVLM, MobileVLMConfig
from mvlm.export.models.projector import PROJECTOR_TYPES, build_projector, image_token_count

__all__ = [
    "PROJECTOR_TYPES",
    "CLIPVisionConfig",
    "CLIPVisionTower",
    "KVCache",
    "MobileLlama",
    "MobileLlamaConfig",
    "MobileVLM",
    "MobileVLMConfig",
    "TextDecoder",
    "build_projector",
    "image_token_count",
    "rope_tables",
]
