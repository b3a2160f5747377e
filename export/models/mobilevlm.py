"""MobileVLM: vision tower, projector and language model, side by side.

LLaVA has the same composition with another projector, so this is its definition as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from mvlm.export.models.clip import CLIPVisionConfig, CLIPVisionTower
from mvlm.export.models.mobilellama import MobileLlama, MobileLlamaConfig
from mvlm.export.models.projector import build_projector, image_token_count


@dataclass(frozen=True)
class MobileVLMConfig:
    """Sizes of the three parts.

    Attributes:
        text: the language model.
        vision: the vision tower; None for a language model alone.
        projector_type: ``mm_projector_type`` of config.json, one of :data:`projector.PROJECTOR_TYPES`; without meaning
            where there is no tower.
        vision_select_layer: which hidden state of the tower is read, ``mm_vision_select_layer`` of config.json.
    """

    text: MobileLlamaConfig = field(default_factory=MobileLlamaConfig)
    vision: CLIPVisionConfig | None = field(default_factory=CLIPVisionConfig)
    projector_type: str = "ldpnet"
    vision_select_layer: int = -2

    @property
    def num_image_tokens(self) -> int:
        """Positions that one picture takes in the language model; 0 for a language model alone."""
        if self.vision is None:
            return 0
        return image_token_count(self.projector_type, self.vision.num_patches)


def mobilevlm_1_7b(projector_type: str = "ldpnet") -> MobileVLMConfig:
    """MobileVLM 1.7B: V1 with ``ldpnet``, V2 with ``ldpnetv2``."""
    return MobileVLMConfig(projector_type=projector_type)


def mobilevlm_3b(projector_type: str = "ldpnet") -> MobileVLMConfig:
    """MobileVLM 3B: V1 with ``ldpnet``, V2 with ``ldpnetv2``."""
    text = MobileLlamaConfig(
        hidden_size=2560,
        intermediate_size=6912,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=80,
    )
    return MobileVLMConfig(text=text, projector_type=projector_type)


class MobileVLM(nn.Module):
    """The whole model in float32, without a cache: what is trained, checked against, and exported from.

    A language model alone (``config.vision`` is None) has no ``vision_tower`` and no ``mm_projector``.
    """

    def __init__(self, config: MobileVLMConfig) -> None:
        super().__init__()
        self.config = config
        if config.vision is not None:
            self.vision_tower = CLIPVisionTower(config.vision, config.vision_select_layer)
            self.mm_projector = build_projector(
                config.projector_type, config.vision.hidden_size, config.text.hidden_size
            )
        self.language_model = MobileLlama(config.text)

    def encode_image(self, pixel_values_B3SS: Tensor) -> Tensor:
        """Image embeddings [B, T, D] of normalized pixels [B, 3, S, S]."""
        return self.mm_projector(self.vision_tower(pixel_values_B3SS))

    def embed_tokens(self, ids_BL: Tensor) -> Tensor:
        """Token embeddings [B, L, D] of ids int64 [B, L]."""
        return self.language_model.embed_tokens(ids_BL)

    def forward(self, embeddings_BLD: Tensor) -> Tensor:
        """Logits [B, L, V] of embeddings [B, L, D], pictures and tokens concatenated by the caller."""
        return self.language_model(embeddings_BLD)
