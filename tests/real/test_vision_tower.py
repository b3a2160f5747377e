"""The vision tower against transformers' models, of CLIP and of what it was made of."""

from __future__ import annotations

import pytest
import torch
from gauge.dinov2 import read_backbone
from gauge.vlm import pixel_values
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionModel, Dinov2Config, Dinov2Model


@pytest.fixture(scope="module")
def pixels(sample_image, vlm_checkpoint):
    return pixel_values(sample_image, vlm_checkpoint)


@pytest.fixture(scope="module")
def clip(gauge):
    return CLIPVisionModel.from_pretrained(gauge.vision_tower, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def dinov2_states(gauge, pixels, tmp_path_factory):
    """Hidden states of transformers' DINOv2 with the package's weights."""
    folder = tmp_path_factory.mktemp("dinov2")
    backbone = {name: tensor.contiguous() for name, tensor in read_backbone(gauge.source_onnx).items()}
    backbone["embeddings.mask_token"] = torch.zeros(1, 384)  # of its training; not in the package
    save_file(backbone, folder / "model.safetensors", metadata={"format": "pt"})
    Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14, layer_norm_eps=1e-6
    ).save_pretrained(folder)
    oracle, report = Dinov2Model.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    with torch.inference_mode():
        return oracle.eval()(pixels, output_hidden_states=True).hidden_states


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def test_features_equal_those_of_transformers_clip(vlm, clip, pixels):
    expected = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    features = vlm.vision_tower(pixels)
    assert features.shape == (1, 256, 384)
    # float32 keeps 24 bits, of which sums in another order through 11 layers lose a few.
    assert relative_error(features, expected) < 1e-4


def test_conversion_is_exact_but_for_the_norm_that_dinov2_lacks(clip, dinov2_states, pixels):
    norm = clip.vision_model.pre_layrnorm if hasattr(clip, "vision_model") else clip.pre_layrnorm
    handle = norm.register_forward_hook(lambda module, inputs, output: inputs[0])
    try:
        states = clip(pixels, output_hidden_states=True).hidden_states
    finally:
        handle.remove()
    assert len(states) == len(dinov2_states) == 13
    for ours, theirs in zip(states, dinov2_states, strict=True):
        assert relative_error(ours, theirs) < 1e-4


def test_norm_leaves_the_features_much_as_they_are(vlm, dinov2_states, pixels):
    similarity = nn.functional.cosine_similarity(vlm.vision_tower(pixels), dinov2_states[-2][:, 1:], dim=-1)
    assert similarity.mean() > 0.75
