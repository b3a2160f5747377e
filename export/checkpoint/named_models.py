"""The published models by name: their shapes, what they converse in, and where their weights are."""

from __future__ import annotations

from dataclasses import dataclass

from mvlm.export.checkpoint.checkpoint import parameter_shapes
from mvlm.export.checkpoint.layouts import LLAMA, LLAVA, MOBILEVLM
from mvlm.export.models import MobileLlamaConfig, MobileVLMConfig
from mvlm.export.models.mobilevlm import mobilevlm_1_7b, mobilevlm_3b


@dataclass(frozen=True)
class NamedModel:
    """A published model.

    Attributes:
        config: its sizes.
        prompt_template: text around a question, with ``{prompt}`` in it once.
        hub_ids: where its weights are on the Hugging Face hub; the first is the original.
        description: one line.
        revision: commit of the first hub id that our facts are from, where it is known.
    """

    config: MobileVLMConfig
    prompt_template: str
    hub_ids: tuple[str, ...]
    description: str
    revision: str | None = None

    @property
    def num_parameters(self) -> int:
        """Parameters that are exported: without the vision tower's last block, which nothing reads."""
        total = 0
        for shape in parameter_shapes(self.config).values():
            count = 1
            for size in shape:
                count *= size
            total += count
        return total


def vicuna_7b() -> MobileLlamaConfig:
    """Vicuna-7B v1.5, a Llama 2."""
    return MobileLlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


NAMED_MODELS: dict[str, NamedModel] = {
    "mobilevlm-1.7b": NamedModel(
        mobilevlm_1_7b("ldpnet"),
        MOBILEVLM.template,
        ("mtgv/MobileVLM-1.7B",),
        "MobileVLM V1 on MobileLLaMA-1.4B",
    ),
    "mobilevlm-3b": NamedModel(
        mobilevlm_3b("ldpnet"),
        MOBILEVLM.template,
        ("mtgv/MobileVLM-3B",),
        "MobileVLM V1 on MobileLLaMA-2.7B",
    ),
    "mobilevlm-v2-1.7b": NamedModel(
        mobilevlm_1_7b("ldpnetv2"),
        MOBILEVLM.template,
        ("mtgv/MobileVLM_V2-1.7B",),
        "MobileVLM V2 on MobileLLaMA-1.4B",
        "9a5b623a83feae6a6b2ecad7a843334ccc119ce1",
    ),
    "mobilevlm-v2-3b": NamedModel(
        mobilevlm_3b("ldpnetv2"),
        MOBILEVLM.template,
        ("mtgv/MobileVLM_V2-3B",),
        "MobileVLM V2 on MobileLLaMA-2.7B",
        "a985787d31160f7f847cdb88a59e6954bbc421aa",
    ),
    "mobilevlm-v2-7b": NamedModel(
        MobileVLMConfig(text=vicuna_7b(), projector_type="ldpnetv2"),
        MOBILEVLM.template,
        ("mtgv/MobileVLM_V2-7B",),
        "MobileVLM V2 on Vicuna-7B",
    ),
    "llava-1.5-7b": NamedModel(
        MobileVLMConfig(text=vicuna_7b(), projector_type="mlp2x_gelu"),
        LLAVA.template,
        ("liuhaotian/llava-v1.5-7b", "llava-hf/llava-1.5-7b-hf"),
        "LLaVA-1.5 on Vicuna-7B",
    ),
    "mobilellama-1.4b": NamedModel(
        MobileVLMConfig(text=mobilevlm_1_7b().text, vision=None),
        LLAMA.template,
        ("mtgv/MobileLLaMA-1.4B-Chat",),
        "MobileVLM 1.7B's language model",
    ),
    "mobilellama-2.7b": NamedModel(
        MobileVLMConfig(text=mobilevlm_3b().text, vision=None),
        LLAMA.template,
        ("mtgv/MobileLLaMA-2.7B-Chat",),
        "MobileVLM 3B's language model",
    ),
}
