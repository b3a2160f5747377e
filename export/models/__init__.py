"""The networks, as plain ``torch.nn.Module`` composition: no file access, no command-line flags.

Module and parameter names are those of the checkpoints wherever they can be, so that loading one is a table of
prefixes (``mvlm.export.checkpoint``) and not a translation. Linears of one input are fused (``fused_linear.py``).
"""

from mvlm.export.models.clip import CLIPVisionConfig, CLIPVisionTower, PatchEmbedding
from mvlm.export.models.fused_linear import FusedLinear, fused_parts, unfused
from mvlm.export.models.mobilellama import (
    KV_CACHE_TYPES,
    LOGIT_POSITIONS,
    KVCache,
    LlamaKVCache,
    MobileLlama,
    MobileLlamaConfig,
    TextDecoder,
    build_kv_cache,
    last_positions,
    rope_tables,
)
from mvlm.export.models.mobilevlm import MobileVLM, MobileVLMConfig
from mvlm.export.models.picture import PictureInput
from mvlm.export.models.projector import PROJECTOR_TYPES, build_projector, image_token_count

__all__ = [
    "KV_CACHE_TYPES",
    "LOGIT_POSITIONS",
    "PROJECTOR_TYPES",
    "CLIPVisionConfig",
    "CLIPVisionTower",
    "FusedLinear",
    "KVCache",
    "LlamaKVCache",
    "MobileLlama",
    "MobileLlamaConfig",
    "MobileVLM",
    "MobileVLMConfig",
    "PatchEmbedding",
    "PictureInput",
    "TextDecoder",
    "build_kv_cache",
    "build_projector",
    "fused_parts",
    "image_token_count",
    "last_positions",
    "rope_tables",
    "unfused",
]
