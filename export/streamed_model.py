"""The float32 language model, its layers read from the checkpoint when they are needed.

A model of billions of weights is never in memory as a whole, whatever is done with it: reading texts, or writing many
side by side. Whoever wants to know what the linears are given can watch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import mvlm.ops
from mvlm.export.checkpoint import Checkpoint
from mvlm.export.checkpoint.checkpoint import empty_model
from mvlm.export.models import rope_tables
from mvlm.export.models.mobilellama import DecoderLayer, apply_rope

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
        self._layers = empty_model(checkpoint.config).language_model.layers

    def layer(self, index: int) -> DecoderLayer:
        """A layer with its weights, as long as nobody asks for another."""
        if index in self._kept:
            return self._kept[index]
        layer = self._checkpoint.load_part(self._layers[index], f"language_model.layers.{index}", self._device)
        assert isinstance(layer, DecoderLayer)
        layer_bytes = sum(4 * parameter.numel() for parameter in layer.parameters())
        if layer_bytes * self.config.num_hidden_layers <= KEPT_BYTES:
            self._kept[index] = layer
        return layer

    def logits(self, x_TD: Tensor) -> Tensor:
        """Logits [T, V] of the last layer's outputs [T, D]."""
        y_TD = mvlm.ops.rms_norm(x_TD, self._norm, self.config.rms_norm_eps)
        self.watch("language_model.lm_head", y_TD)
        return y_TD @ self._lm_head.T


class SequenceGroup:
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


def pass_layers(
    model: FloatLanguageModel,
    groups: Sequence[SequenceGroup],
    counts: Sequence[int],
    x_TD: Tensor,
    attend: Callable[[SequenceGroup, int, DecoderLayer, Tensor], Tensor],
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


def read_sequences(model: FloatLanguageModel, sequences: Sequence[Tensor]) -> list[Tensor]:
    """The last layer's outputs [L, D] for each of some sequences of embeddings [L, D].

    Logits are made of them by :meth:`FloatLanguageModel.logits`, as many at a time as there is memory for.
    """
    outputs: list[Tensor] = []
    for start in range(0, len(sequences), READ_TOGETHER):
        part = sequences[start : start + READ_TOGETHER]
        lengths = [len(sequence) for sequence in part]
        group = SequenceGroup(model, lengths, 0)
        x_TD = pass_layers(model, [group], [sum(lengths)], torch.cat(list(part)), SequenceGroup.attend_to_prompts)
        outputs += x_TD.split(lengths)
    return outputs
