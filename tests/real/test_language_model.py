"""R, its tokenizer and its texts, against libraries that no one here wrote."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gauge.language_model import FourBitGroups
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def negative_log_likelihoods(logits_LV: torch.Tensor, ids_L: torch.Tensor) -> torch.Tensor:
    """Of each token of the second half of a window, in nats."""
    half = len(ids_L) // 2
    return torch.nn.functional.cross_entropy(logits_LV[half:-1], ids_L[half + 1 :], reduction="none")


@pytest.fixture(scope="module")
def losses(r_model, evaluation_windows):
    """Negative log-likelihoods [12, 255] by our eager model."""
    rows = []
    for ids in evaluation_windows:
        logits = r_model(r_model.embed_tokens(ids.unsqueeze(0)))[0]
        rows.append(negative_log_likelihoods(logits, ids))
    return torch.stack(rows)


def test_perplexity_is_that_which_figures_are_quoted_for(losses):
    """Weights, noise, tokenizer and text are the same everywhere, so the rest is float32's rounding."""
    assert losses.shape == (12, 255)
    assert math.exp(losses.mean()) == pytest.approx(37.568, rel=1e-3)


def test_likelihoods_equal_those_of_transformers(gauge, losses, evaluation_windows):
    """The oracle also checks RoPE's base, the norms' epsilon and grouped queries, which are those of the config."""
    from transformers import LlamaForCausalLM

    oracle = LlamaForCausalLM.from_pretrained(gauge.language_model, dtype=torch.float32).eval()
    for window in (0, 11):
        ids = evaluation_windows[window]
        expected = negative_log_likelihoods(oracle(ids.unsqueeze(0)).logits[0], ids)
        # float32 keeps 24 bits; sums of 1536 products in another order, through 30 layers, lose about ten of them.
        torch.testing.assert_close(losses[window], expected, rtol=0, atol=2e-3)
        assert math.exp(losses[window].mean()) == pytest.approx(math.exp(expected.mean()), rel=1e-4)


def test_llama_cpp_gets_the_same_weights(gauge):
    """But for the order of rows of queries and keys, whose heads llama.cpp wants interleaved."""
    in_gguf = {tensor.name: np.asarray(tensor.data) for tensor in GGUFReader(gauge.gguf).tensors}
    with safe_open(gauge.language_model / "model.safetensors", "np") as ours:
        for theirs, name in {
            "token_embd": "model.embed_tokens",
            "output_norm": "model.norm",
            "blk.7.attn_norm": "model.layers.7.input_layernorm",
            "blk.7.ffn_norm": "model.layers.7.post_attention_layernorm",
            "blk.7.attn_v": "model.layers.7.self_attn.v_proj",
            "blk.7.attn_output": "model.layers.7.self_attn.o_proj",
            "blk.29.ffn_gate": "model.layers.29.mlp.gate_proj",
            "blk.29.ffn_up": "model.layers.29.mlp.up_proj",
            "blk.29.ffn_down": "model.layers.29.mlp.down_proj",
        }.items():
            np.testing.assert_array_equal(
                in_gguf[f"{theirs}.weight"].astype(np.float16), ours.get_tensor(f"{name}.weight")
            )
        for letter in "qk":
            rows = in_gguf[f"blk.7.attn_{letter}.weight"].reshape(-1, 32, 2, 576)
            halves = ours.get_tensor(f"model.layers.7.self_attn.{letter}_proj.weight").reshape(-1, 2, 32, 576)
            np.testing.assert_array_equal(rows[:, :, 0], halves[:, 0])
            np.testing.assert_array_equal(rows[:, :, 1], halves[:, 1])


def test_every_weight_is_in_the_cell_it_was_rounded_to(gauge):
    source, roughened = GGUFReader(gauge.source_gguf), GGUFReader(gauge.gguf)
    rounded = {tensor.name: tensor for tensor in source.tensors}
    noise, signal = 0.0, 0.0
    assert sum(tensor.tensor_type == GGMLQuantizationType.Q4_1 for tensor in source.tensors) == 210
    for tensor in roughened.tensors:
        before = rounded[tensor.name]
        old = dequantize(before.data, before.tensor_type).reshape(-1)
        new = np.asarray(tensor.data, dtype=np.float32).reshape(-1)
        if before.tensor_type != GGMLQuantizationType.Q4_1:
            # The embedding is Q8_0, and float16 cannot hold all of its values.
            np.testing.assert_allclose(new, old, rtol=2**-11, atol=2**-25)
            continue
        groups = FourBitGroups.unpack(before.data)
        cells = (new - old).reshape(groups.codes.shape) / groups.scale
        # Rounding to float16 moves a weight by up to 2^-11 of itself, and weights reach about 16 cells from 0.
        assert np.abs(cells).max() < 0.52, tensor.name
        assert cells[groups.codes == 0].min() > -0.02, tensor.name
        assert cells[groups.codes == 15].max() < 0.02, tensor.name
        noise += float(np.square(new - old).sum())
        signal += float(np.square(old).sum())
    assert 10 * math.log10(signal / noise) == pytest.approx(21.7, abs=0.05)


@pytest.fixture(scope="module")
def original_tokenizer(gauge):
    """The model's own: byte-level BPE with digits apart, as the package's file describes it, in Hugging Face's Rust."""
    fields = GGUFReader(gauge.source_gguf).fields
    tokens, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    tokenizer = Tokenizer(
        models.BPE({token: index for index, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize("text", ["evaluation_text", "calibration_text"])
def test_tokenizer_gives_the_original_ids_on_prose(gauge, original_tokenizer, r_tokenizer, text):
    """On all paragraphs of the evaluation text, and on nearly all of the calibration text (measured: 99.6 %)."""
    lines = getattr(gauge, text).read_text(encoding="utf-8").splitlines()
    equal = [original_tokenizer.encode(line).ids == r_tokenizer.encode(line) for line in lines]
    assert len(equal) > 80
    assert sum(equal) >= (1.0 if text == "evaluation_text" else 0.99) * len(equal)


def test_tokenizer_keeps_chat_tokens_whole(r_tokenizer):
    assert r_tokenizer.encode("<|im_start|>user\nHi<|im_end|>")[0] == 1
    assert r_tokenizer.encode("<|im_start|>user\nHi<|im_end|>")[-1] == 2


def test_texts_share_no_paragraph(gauge, r_tokenizer):
    evaluation, calibration = (
        path.read_text(encoding="utf-8").splitlines() for path in (gauge.evaluation_text, gauge.calibration_text)
    )
    assert not set(evaluation) & set(calibration)
    assert len(r_tokenizer.encode(" ".join(calibration))) > 64_000
