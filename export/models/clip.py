"""CLIP's vision transformer, up to the block whose features MobileVLM reads.

Shape letters: B pictures, S side in pixels, P patches, L = P + 1 tokens (the class token comes first), D width,
N attention heads, H = D / N, F width of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import mvlm.ops
from mvlm.export.models.fused_linear import FusedLinear
from mvlm.export.models.norms import LayerNorm

#: ``quick_gelu`` is ``x * sigmoid(1.702 x)``, the approximation of GELU that OpenAI trained CLIP with.
ACTIVATIONS = {"quick_gelu": mvlm.ops.quick_gelu, "gelu": nn.functional.gelu}


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of a CLIP vision tower. The defaults are those of ViT-L/14-336.

    Attributes:
        hidden_size: width D of the token stream.
        intermediate_size: width F of the MLP.
        num_hidden_layers: blocks in the checkpoint; fewer may be built, see :class:`CLIPVisionTower`.
        num_attention_heads: heads N; must divide ``hidden_size``.
        image_size: side S of the square picture, in pixels; a multiple of ``patch_size``.
        patch_size: side of a patch, in pixels.
        layer_norm_eps: added to the variance in every LayerNorm.
        hidden_act: ``quick_gelu`` (OpenAI's weights) or ``gelu``.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"CLIP: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"CLIP: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"CLIP: hidden_act {self.hidden_act!r} is not one of {sorted(ACTIVATIONS)}")

    @property
    def grid_size(self) -> int:
        """Patches along one side of the picture."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_size**2


class PatchEmbedding(nn.Linear):
    """Pictures [B, 3, S, S] to patches [B, P, D].

    A convolution whose stride is its size, held as a linear over a patch's numbers, which is the same arithmetic, so
    that it can be quantized like any linear. Its weight is the convolution's, flattened: [D, 3 * patch * patch].
    """

    def __init__(self, hidden_size: int, patch_size: int) -> None:
        super().__init__(3 * patch_size**2, hidden_size, bias=False)
        self.patch_size = patch_size

    def forward(self, pixel_values_B3SS: Tensor) -> Tensor:
        B, channels, S, _ = pixel_values_B3SS.shape
        size, grid = self.patch_size, S // self.patch_size
        patches = pixel_values_B3SS.reshape(B, channels, grid, size, grid, size).permute(0, 2, 4, 1, 3, 5)
        return super().forward(patches.reshape(B, grid * grid, channels * size * size))


class CLIPVisionEmbeddings(nn.Module):
    """Patches, a class token in front of them, and learned positions, which may be kept in a smaller type."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = PatchEmbedding(config.hidden_size, config.patch_size)
        self.position_embedding = nn.Embedding(config.num_patches + 1, config.hidden_size)

    def forward(self, pixel_values_B3SS: Tensor) -> Tensor:
        x_BPD = self.patch_embedding(pixel_values_B3SS)
        class_B1D = self.class_embedding.view(1, 1, -1)
        if x_BPD.shape[0] > 1:  # else there would be a copy in the .pte
            class_B1D = class_B1D.expand(x_BPD.shape[0], -1, -1)
        return torch.cat([class_B1D, x_BPD], dim=1) + self.position_embedding.weight.to(x_BPD.dtype)


class CLIPAttention(nn.Module):
    """Multi-head self-attention without a mask."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.qkv_proj = FusedLinear(width, {"q_proj": width, "k_proj": width, "v_proj": width}, bias=True)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.out_proj(mvlm.ops.attention(self.qkv_proj(x_BLD), self.num_heads))


class CLIPMLP(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x_BLD)))


class CLIPEncoderLayer(nn.Module):
    """One pre-norm transformer block.

    What the block before it adds to the token stream is given apart from the stream, and so is what this one adds, so
    that every addition is made together with the norm that follows it, in one pass over memory.
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CLIPAttention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)

    def forward(self, x_BLD: Tensor, branch_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Token stream and what is still to be added to it, both [B, L, D], to the same after this block."""
        x_BLD, y_BLD = self.layer_norm1.add(x_BLD, branch_BLD)
        x_BLD, y_BLD = self.layer_norm2.add(x_BLD, self.self_attn(y_BLD))
        return x_BLD, self.mlp(y_BLD)


class CLIPEncoder(nn.Module):
    def __init__(self, config: CLIPVisionConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(num_layers))

    def forward(self, x_BLD: Tensor) -> Tensor:
        branch_BLD = torch.zeros_like(x_BLD)
        for layer in self.layers:
            x_BLD, branch_BLD = layer(x_BLD, branch_BLD)
        return x_BLD + branch_BLD


class CLIPVisionTower(nn.Module):
    """Pixels to patch features, as transformers' ``CLIPVisionModel(...).hidden_states[select_layer][:, 1:]``.

    Only the blocks that reach the selected hidden state are built: for ``select_layer=-2`` all but the last, and
    ``post_layernorm`` never.

    Args:
        config: sizes of the whole tower.
        select_layer: index into the ``num_hidden_layers + 1`` hidden states, negative from the end as in LLaVA's
            ``mm_vision_select_layer``. 0 is the input of the first block.

    Raises:
        ValueError: ``select_layer`` names no hidden state.
    """

    def __init__(self, config: CLIPVisionConfig, select_layer: int = -2) -> None:
        super().__init__()
        num_states = config.num_hidden_layers + 1
        if not -num_states <= select_layer < num_states:
            raise ValueError(
                f"select_layer {select_layer} is out of range: a tower of {config.num_hidden_layers} blocks has "
                f"hidden states {-num_states} .. {num_states - 1}"
            )
        self.config = config
        self.embeddings = CLIPVisionEmbeddings(config)
        # "pre_layrnorm" is how the checkpoints spell it.
        self.pre_layrnorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = CLIPEncoder(config, num_layers=select_layer % num_states)

    def forward(self, pixel_values_B3SS: Tensor) -> Tensor:
        """Maps normalized pixels [B, 3, S, S] to patch features [B, P, D], in row-major patch order."""
        x_BLD = self.encoder(self.pre_layrnorm(self.embeddings(pixel_values_B3SS)))
        return x_BLD[:, 1:]
