"""Recipes are checked where they are made, and survive JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mvlm.export.errors import ExportError
from mvlm.export.models import KV_CACHE_TYPES, MobileVLMConfig
from mvlm.export.recipe import KV_CACHES, RECIPES, SCALE_ALGORITHMS, Recipe, mobile


def test_the_default_recipe():
    assert mobile() == Recipe("mobile", 32, "search", 8, 8, "int8", "int8", 768, 256, "mvlm", "none", 0.0, ())
    assert all(make().name == name for name, make in RECIPES.items())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("group_size", 48, "group size: 48 is not possible; choose one of 32, 64, 128, 256$"),
        ("group_size", 512, "group size: 512 is not possible"),
        ("group_size", -32, "group size: -32 is not possible"),
        ("scales", "best", "scales: 'best' is not possible; choose one of affine, hqq, search$"),
        ("lm_head_bits", 5, "bits of lm_head: 5 is not possible; choose one of 4, 8$"),
        ("embedding_bits", 16, "bits of the embedding: 16 is not possible; choose one of 4, 8, 32$"),
        ("vision", "fp16", "vision weights: 'fp16' is not possible; choose one of int4, int8, fp32$"),
        ("kv_cache", "int4", "KV cache: 'int4' is not possible; choose one of fp32, fp16, int8$"),
        ("attention_op", "ours", "attention operator: 'ours' is not possible; choose one of mvlm, llama$"),
        ("prefill_chunk", 0, "prefill chunk 0 is not possible: one token at least is read at once$"),
    ],
)
def test_impossible_values(field, value, message):
    with pytest.raises(ExportError, match=message):
        Recipe(**{field: value})


@pytest.mark.parametrize("kv_cache", ["int8", "fp16"])
def test_attention_of_executorch_has_a_float32_cache(kv_cache):
    with pytest.raises(ExportError, match=f"KV cache {kv_cache} is not possible with attention operator llama: .*fp32"):
        Recipe(attention_op="llama", kv_cache=kv_cache)
    assert Recipe(attention_op="llama", kv_cache="fp32").attention_op == "llama"


@pytest.mark.parametrize("calibration", ["quick", "full"])
def test_calibration_chooses_scales_itself(calibration):
    with pytest.raises(ExportError, match="scales hqq are not possible with calibration"):
        Recipe(scales="hqq", calibration=calibration)
    with pytest.raises(ExportError, match="bits budget -10% is not possible"):
        Recipe(bits_budget=-0.1)


@pytest.mark.parametrize("max_context_len", [1, 0, -768])
def test_too_short_context(max_context_len):
    with pytest.raises(ExportError, match=f"max context length {max_context_len} is too short: .* need 2 at least"):
        Recipe(max_context_len=max_context_len)


@pytest.mark.parametrize(
    ("max_context_len", "prefill_chunk", "projector", "max_seq_len"),
    [
        (768, 256, "ldpnet", 256),
        (768, 100, "ldpnet", 144),  # a picture is read at once
        (768, 256, "mlp2x_gelu", 576),
        (200, 256, "ldpnet", 200),
        (768, 1024, "ldpnet", 768),
    ],
)
def test_tokens_read_at_once(max_context_len, prefill_chunk, projector, max_seq_len):
    recipe = Recipe(max_context_len=max_context_len, prefill_chunk=prefill_chunk)
    assert recipe.max_seq_len(MobileVLMConfig(projector_type=projector)) == max_seq_len
    alone = MobileVLMConfig(vision=None)
    assert recipe.max_seq_len(alone) == min(max_context_len, prefill_chunk)


def test_kv_cache_types_are_those_of_the_model():
    assert tuple(KV_CACHE_TYPES) == KV_CACHES


def test_recipe_of_an_older_file():
    text = '{"group_size": 64, "max_context_len": 256, "name": "mobile", "scales": "affine"}'
    assert Recipe.from_json(text) == Recipe(group_size=64, scales="affine", max_context_len=256)


@pytest.mark.parametrize("scales", SCALE_ALGORITHMS)
def test_json_round_trip(scales):
    wide = ("language_model.layers.0.mlp.down_proj", "language_model.layers.3.self_attn.qkv_proj")
    recipe = Recipe(name="other", group_size=32, scales=scales, max_context_len=2, eight_bit_linears=wide)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert json.loads(recipe.to_json()) == dataclasses.asdict(recipe) | {"eight_bit_linears": list(wide)}


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "3", '{"groups": 3}', '{"group_size": 33}', '{"group_size": "64"}', "null"]
)
def test_json_that_is_no_recipe(text):
    with pytest.raises(ValueError):  # noqa: PT011  (of json, of from_json or of Recipe)
        Recipe.from_json(text)
