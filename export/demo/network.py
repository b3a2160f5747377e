"""The demo model's sizes, its first weights, and the forward pass over packed questions that it is trained with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mvlm.export.demo import world
from mvlm.export.demo.data import Batch
from mvlm.export.models import CLIPVisionConfig, MobileLlamaConfig, MobileVLM, MobileVLMConfig, PatchEmbedding
from mvlm.export.models.mobilellama import DecoderLayer, apply_rope, rope_tables

EMBEDDING_STD = 0.06
PROJECTOR_NORM_WEIGHT = 0.3


def demo_config(vocab_size: int) -> MobileVLMConfig:
    """MobileVLM V1 at toy size: 112-pixel pictures, 16 image tokens, 4.8 million parameters."""
    return MobileVLMConfig(
        text=MobileLlamaConfig(
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=64,
            vocab_size=vocab_size,
        ),
        vision=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=112,
            patch_size=14,
        ),
        projector_type="ldpnet",
    )


def grid_positions(grid: int, width: int) -> Tensor:
    """Sines and cosines of row and column [grid * grid, width], a start from which places are easy to tell apart."""
    quarter = width // 4
    frequency = torch.arange(1, quarter + 1) * (math.pi / 2 / quarter * 2)
    angles = torch.outer(torch.linspace(-1, 1, grid), frequency)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = axis.repeat_interleave(grid, dim=0)
    columns = axis.repeat(grid, 1)
    return torch.cat([rows, columns], dim=1)


def build(config: MobileVLMConfig, seed: int) -> MobileVLM:
    """A model with its first weights; the token embedding and lm_head are one parameter while training."""
    torch.manual_seed(seed)
    model = MobileVLM(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not isinstance(module, PatchEmbedding):
            is_output = name.endswith(("o_proj", "down_proj", "out_proj", "fc2"))
            depth = len(model.language_model.layers) if "language" in name else len(model.vision_tower.encoder.layers)
            std = module.in_features**-0.5
            nn.init.normal_(module.weight, std=std / math.sqrt(2 * depth) if is_output else std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embeddings = model.vision_tower.embeddings
    with torch.no_grad():
        nn.init.normal_(embeddings.class_embedding, std=0.3)
        nn.init.normal_(embeddings.position_embedding.weight, std=0.02)
        embeddings.position_embedding.weight[1:] += 0.3 * grid_positions(
            config.vision.grid_size, config.vision.hidden_size
        )
    nn.init.normal_(model.language_model.embed_tokens.weight, std=EMBEDDING_STD)
    # Image tokens start no larger than a few words, or the words would drown in them.
    nn.init.constant_(model.mm_projector.blocks[-1].pointwise_norm.weight, PROJECTOR_NORM_WEIGHT)
    model.language_model.lm_head.weight = model.language_model.embed_tokens.weight
    return model


class ImageReader(nn.Module):
    """Reads off the image tokens, linearly, what is in each quadrant and where each token is. Used while training only.

    MobileVLM starts from a vision tower that CLIP has trained. Ours has to learn to see from nothing, which takes very
    long through the language model's answers and is quick with this. And "Where is the ...?" can be answered once a
    token that shows a shape also tells its own place.
    """

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.shape = nn.Linear(width, 1 + len(world.SHAPES))
        self.color = nn.Linear(width, 1 + len(world.COLORS))
        self.place = nn.Linear(width, tokens)

    def quadrants(self, image_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, 4, 5] of nothing or a shape, and [B, 4, 9] of nothing or a colour."""
        B, T, D = image_BTD.shape
        half = math.isqrt(T) // 2
        quadrants_B4D = image_BTD.view(B, 2, half, 2, half, D).mean(dim=(2, 4)).flatten(1, 2)
        return self.shape(quadrants_B4D), self.color(quadrants_B4D)

    def quadrant_loss(self, image_BTD: Tensor, batch: Batch) -> Tensor:
        shape, color = self.quadrants(image_BTD)
        return nn.functional.cross_entropy(shape.flatten(0, 1), batch.quadrant_shapes.flatten()) + (
            nn.functional.cross_entropy(color.flatten(0, 1), batch.quadrant_colors.flatten())
        )

    def place_loss(self, image_BTD: Tensor) -> Tensor:
        B, T, _ = image_BTD.shape
        return nn.functional.cross_entropy(self.place(image_BTD).flatten(0, 1), torch.arange(T).repeat(B))


def _attention_mask(batch: Batch, prefix: int, image: int) -> Tensor:
    """Which keys [prefix, image, questions] the queries [image, questions] may see: bool [B, 1, I + Q, P + I + Q].

    A question sees the prompt's start, the picture and its own earlier tokens; the picture sees none of them.
    """
    B, Q = batch.ids.shape
    mask = torch.zeros(B, image + Q, prefix + image + Q, dtype=torch.bool)
    mask[:, :, :prefix] = True
    mask[:, :image, prefix : prefix + image] = torch.ones(image, image, dtype=torch.bool).tril()
    mask[:, image:, prefix : prefix + image] = True
    same = batch.segments.unsqueeze(2) == batch.segments.unsqueeze(1)
    mask[:, image:, prefix + image :] = same & torch.ones(Q, Q, dtype=torch.bool).tril()
    return mask.unsqueeze(1)


def _block(
    layer: DecoderLayer,
    prefix_1PD: Tensor,
    x_BRD: Tensor,
    prefix_rope: tuple[Tensor, Tensor],
    rope: tuple[Tensor, Tensor],
    mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """One decoder block over the shared start of the prompt and what follows it in each row."""
    attention = layer.self_attn
    B = x_BRD.shape[0]

    def heads(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = layer.input_layernorm(x)
        q, k, v = attention.split_heads(attention.qkv_proj(x).flatten(0, 1).unsqueeze(0))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return tuple(y.reshape(*x.shape[:2], -1, attention.head_dim).transpose(1, 2) for y in (q, k, v))

    def attend(x: Tensor, q: Tensor, k: Tensor, v: Tensor, **mask: object) -> Tensor:
        y = nn.functional.scaled_dot_product_attention(q, k, v, **mask)
        x = x + attention.o_proj(y.transpose(1, 2).reshape(x.shape))
        return x + layer.mlp(layer.post_attention_layernorm(x))

    q0, k0, v0 = heads(prefix_1PD, *prefix_rope)
    q, k, v = heads(x_BRD, *rope)
    k = torch.cat([k0.expand(B, -1, -1, -1), k], dim=2)
    v = torch.cat([v0.expand(B, -1, -1, -1), v], dim=2)
    return attend(prefix_1PD, q0, k0, v0, is_causal=True), attend(x_BRD, q, k, v, attn_mask=mask)


def answer_logits(
    model: MobileVLM, prefix_ids: list[int], batch: Batch, image: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits of every answer token of a batch.

    The same numbers as running each question on its own, but the picture is encoded once for all its questions, and
    the prompt's start once for all pictures.

    Args:
        model: the model.
        prefix_ids: the prompt's start, up to the picture.
        batch: pictures and questions.
        image: the pictures' embeddings [B, T, D], if they were computed already.

    Returns:
        logits [A, V] and targets [A], for the A places with a target, in row-major order.
    """
    language = model.language_model
    config = language.config
    prefix = model.embed_tokens(torch.tensor([prefix_ids]))
    if image is None:
        image = model.encode_image(batch.pixels)
    x = torch.cat([image, model.embed_tokens(batch.ids)], dim=1)
    B, T, P = image.shape[0], image.shape[1], prefix.shape[1]
    positions = torch.cat([torch.arange(P, P + T).expand(B, T), batch.positions + P + T], dim=1)
    cos, sin = rope_tables(config.head_dim, int(positions.max()) + 1, config.rope_theta)
    prefix_rope = (cos[:P], sin[:P])
    rope = (cos[positions.flatten()], sin[positions.flatten()])
    mask = _attention_mask(batch, P, T)
    for layer in language.layers:
        prefix, x = _block(layer, prefix, x, prefix_rope, rope, mask)
    wanted = batch.targets >= 0
    return language.lm_head(language.norm(x[:, T:][wanted])), batch.targets[wanted]
