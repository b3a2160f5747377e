"""The float model writes its own calibration text.

A model's own words are the closest there is to what it was trained on when no other text is at hand. Many sequences
grow side by side, because every step reads all weights anew: of a model of billions of weights no copy is kept.

Knows nothing of quantization; whoever wants to know what the linears are given can watch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import mvlm.ops
from mvlm.export.checkpoint import Checkpoint
from mvlm.export.models import rope_tables
from mvlm.export.models.mobilellama import DecoderLayer, apply_rope
from mvlm.export.progress import Progress, return_freed_memory

#: Layers are kept in memory if the float32 language model is not larger than this, in bytes.
KEPT_BYTES = 1 << 30

#: Type of the keys and values that are remembered: as wide as float32, half as large.
CACHE_TYPE = torch.bfloat16

#: Sequences that are read together, where nothing follows them.
READ_TOGETHER = 16

#: Told what each linear is given: its name in the model and inputs [T, in].
Watch = Callable[[str, Tensor], None]


class FloatLanguageModel:
    """The language model in float32, whose layers are read when they are needed.

    Args:
        checkpoint: of it.
        device: on which it computes.
        watch: told what each linear is given.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, watch: Watch = lambda name, x: None) -> None:
        self.config = checkpoint.config.text
        self.watch = watch
        self.embedding = checkpoint.read("language_model.embed_tokens.weight").to(device)
        self._checkpoint = checkpoint
        self._device = device
        self._norm = checkpoint.read("language_model.norm.weight").to(device)
        self._lm_head = checkpoint.read("language_model.lm_head.weight").to(device)
        self._kept: dict[int, DecoderLayer] = {}

    def layer(self, index: int) -> DecoderLayer:
        """A layer with its weights, as long as nobody asks for another."""
        if index in self._kept:
            return self._kept[index]
        layer = read_layer(self._checkpoint, "language_model.layers", index, DecoderLayer, self.config, self._device)
        layer_bytes = sum(4 * parameter.numel() for parameter in layer.parameters())
        if layer_bytes * self.config.num_hidden_layers <= KEPT_BYTES:
            self._kept[index] = layer
        return layer

    def logits(self, x_TD: Tensor) -> Tensor:
        """Logits [T, V] of the last layer's outputs [T, D]."""
        y_TD = mvlm.ops.rms_norm(x_TD, self._norm, self.config.rms_norm_eps)
        self.watch("language_model.lm_head", y_TD)
        return y_TD @ self._lm_head.T


def read_layer(
    checkpoint: Checkpoint, stack: str, index: int, layer_type: type[nn.Module], config: object, device: torch.device
) -> nn.Module:
    """One layer of a stack in float32, without gradients."""
    with torch.device("meta"):
        layer = layer_type(config).eval().requires_grad_(False)
    for name, _ in list(layer.named_parameters()):
        parent, _, own_name = name.rpartition(".")
        tensor = checkpoint.read(f"{stack}.{index}.{name}").to(device)
        setattr(layer.get_submodule(parent), own_name, nn.Parameter(tensor, requires_grad=False))
    return layer


class _Group:
    """Sequences of about the same length that grow side by side, and the keys and values of all their positions.

    Args:
        model: the language model.
        lengths: of the prompts.
        room: tokens that may come behind.
    """

    def __init__(self, model: FloatLanguageModel, lengths: Sequence[int], room: int) -> None:
        config = model.config
        device = model.embedding.device
        self.lengths_B = torch.tensor(lengths)
        longest = max(lengths) + room
        self._rope = tuple(table.to(device) for table in rope_tables(config.head_dim, longest, config.rope_theta))
        self._cache: Tensor | None = None
        if room:
            shape = (config.num_hidden_layers, 2, len(lengths), config.num_key_value_heads, longest, config.head_dim)
            self._cache = torch.zeros(shape, dtype=CACHE_TYPE, device=device)

    def attend_to_prompts(self, index: int, layer: DecoderLayer, qkv_TP: Tensor) -> Tensor:
        """Attention [T, N * H] of layer ``index`` for all prompts, which lie one after another."""
        parts = []
        for b, qkv_LP in enumerate(qkv_TP.split(self.lengths_B.tolist())):
            q_1LNH, k_1LKH, v_1LKH = layer.self_attn.split_heads(qkv_LP[None])
            cos, sin = (table[: len(qkv_LP)] for table in self._rope)
            heads = (apply_rope(q_1LNH, cos, sin), apply_rope(k_1LKH, cos, sin), v_1LKH)
            q, k, v = (x.transpose(1, 2) for x in heads)
            if self._cache is not None:
                self._cache[index, 0, b, :, : len(qkv_LP)] = k[0]
                self._cache[index, 1, b, :, : len(qkv_LP)] = v[0]
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            parts.append(y.transpose(1, 2).flatten(2)[0])
        return torch.cat(parts)

    def attend_to_token(self, index: int, layer: DecoderLayer, qkv_BP: Tensor) -> Tensor:
        """Attention [B, N * H] of layer ``index`` for one more token of each sequence, at position ``lengths_B``."""
        assert self._cache is not None
        q_1BNH, k_1BKH, v_1BKH = layer.self_attn.split_heads(qkv_BP[None])
        # Each sequence is at a position of its own; its row of the tables is that position's.
        cos, sin = (table[self.lengths_B] for table in self._rope)
        keys_BKCH, values_BKCH = self._cache[index]
        sequences_B = torch.arange(len(qkv_BP))
        keys_BKCH[sequences_B, :, self.lengths_B] = apply_rope(k_1BKH, cos, sin)[0].to(CACHE_TYPE)
        values_BKCH[sequences_B, :, self.lengths_B] = v_1BKH[0].to(CACHE_TYPE)
        longest = int(self.lengths_B.max()) + 1
        k, v = (cached[:, :, :longest].float() for cached in (keys_BKCH, values_BKCH))
        seen_B11C = (torch.arange(longest) <= self.lengths_B[:, None])[:, None, None].to(qkv_BP.device)
        q_BN1H = apply_rope(q_1BNH, cos, sin)[0].unsqueeze(2)
        return nn.functional.scaled_dot_product_attention(q_BN1H, k, v, attn_mask=seen_B11C, enable_gqa=True).flatten(1)


def _pass_layers(
    model: FloatLanguageModel,
    groups: Sequence[_Group],
    counts: Sequence[int],
    x_TD: Tensor,
    attend: Callable[[_Group, int, DecoderLayer, Tensor], Tensor],
    watched_T: Tensor | None = None,
) -> Tensor:
    """All layers, [T, D] to [T, D]; the tokens of each group lie together.

    Args:
        model: the language model.
        groups: whose tokens they are.
        counts: of the tokens of each.
        x_TD: what the first layer is given.
        attend: the attention of a group.
        watched_T: which tokens are to be watched; all by default.
    """
    for index in range(model.config.num_hidden_layers):
        layer, name = model.layer(index), f"language_model.layers.{index}."

        def linear(path: str, x: Tensor, layer: DecoderLayer = layer, name: str = name) -> Tensor:
            model.watch(name + path, x if watched_T is None else x[watched_T])
            return layer.get_submodule(path)(x)

        qkv_TP = linear("self_attn.qkv_proj", layer.input_layernorm(x_TD))
        parts = zip(groups, qkv_TP.split(list(counts)), strict=True)
        y_TP = torch.cat([attend(group, index, layer, part) for group, part in parts])
        x_TD = x_TD + linear("self_attn.o_proj", y_TP)
        gate_up_TF = linear("mlp.gate_up_proj", layer.post_attention_layernorm(x_TD))
        x_TD = x_TD + linear("mlp.down_proj", mvlm.ops.swiglu(gate_up_TF))
    return x_TD


@dataclass(frozen=True)
class Prompt:
    """The beginning of a sequence.

    Attributes:
        embeddings: float32 [L, D], one position at least.
        new_tokens: that may follow.
        end_ids: that end the sequence. Where there are none it goes on to the last token, and none of the ids that end
            others occurs in it.
    """

    embeddings: Tensor
    new_tokens: int
    end_ids: tuple[int, ...] = ()


def continue_prompts(
    model: FloatLanguageModel,
    groups: Sequence[Sequence[Prompt]],
    generator: torch.Generator,
    progress: Progress | None = None,
) -> list[list[list[int]]]:
    """Draws what follows each prompt from the model's own distribution.

    Args:
        model: that writes.
        groups: of prompts; those of about the same length belong together, for a group has memory for its longest.
        generator: of the draws; the same seed and number of threads give the same text.
        progress: told the share that is done.

    Returns:
        For each group and prompt the ids that followed, end ids included.
    """
    prompts = [prompt for group in groups for prompt in group]
    rooms = [max(prompt.new_tokens for prompt in group) for group in groups]
    state = [
        _Group(model, [len(prompt.embeddings) for prompt in group], room)
        for group, room in zip(groups, rooms, strict=True)
    ]
    lengths = torch.cat([group.lengths_B for group in state])
    x_TD = torch.cat([prompt.embeddings for prompt in prompts])
    x_TD = _pass_layers(model, state, [int(group.lengths_B.sum()) for group in state], x_TD, _Group.attend_to_prompts)
    x_BD = x_TD[lengths.cumsum(0) - 1]
    del x_TD
    return_freed_memory()
    written: list[list[int]] = [[] for _ in prompts]
    growing = torch.ones(len(prompts), dtype=torch.bool)
    all_ends = sorted({token for prompt in prompts for token in prompt.end_ids})
    for step in range(max(rooms)):
        logits_BV = model.logits(x_BD).cpu()
        for logits_V, prompt in zip(logits_BV, prompts, strict=True):
            if not prompt.end_ids:
                logits_V[all_ends] = -math.inf
        tokens_B = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]
        for index, (ids, token, prompt) in enumerate(zip(written, tokens_B.tolist(), prompts, strict=True)):
            if growing[index]:
                ids.append(token)
                growing[index] = len(ids) < prompt.new_tokens and token not in prompt.end_ids
        if progress is not None:
            progress.share((step + 1) / max(rooms))
        if not growing.any():
            break
        # A group has no memory for more than its longest sequence.
        going = [group for group, room in zip(state, rooms, strict=True) if step + 1 < room]
        counts = [len(group.lengths_B) for group in going]
        rows = torch.cat([torch.full((len(group.lengths_B),), group in going) for group in state])
        x_BD = torch.zeros(len(prompts), x_BD.shape[1], device=x_BD.device)
        x_BD[rows] = _pass_layers(
            model,
            going,
            counts,
            model.embedding[tokens_B[rows].to(model.embedding.device)],
            _Group.attend_to_token,
            growing[rows],
        )
        for group in going:
            group.lengths_B += 1
    flat = iter(written)
    return [[next(flat) for _ in group] for group in groups]


def read_sequences(model: FloatLanguageModel, sequences: Sequence[Tensor]) -> None:
    """Reads sequences of embeddings [L, D], for what there is to watch; nothing follows them."""
    for start in range(0, len(sequences), READ_TOGETHER):
        part = sequences[start : start + READ_TOGETHER]
        group = _Group(model, [len(sequence) for sequence in part], 0)
        x_TD = torch.cat(list(part))
        model.logits(_pass_layers(model, [group], [len(x_TD)], x_TD, _Group.attend_to_prompts))
