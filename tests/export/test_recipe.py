"""Recipes are checked where they are made, and survive JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mvlm.export.errors import ExportError
from mvlm.export.recipe import RECIPES, SCALE_ALGORITHMS, Recipe, mobile


def test_the_default_recipe():
    assert mobile() == Recipe("mobile", 128, "hqq", 768)
    assert all(make().name == name for name, make in RECIPES.items())


@pytest.mark.parametrize("group_size", [48, 96, 16, 1, 0, -32])
def test_impossible_group_size(group_size):
    with pytest.raises(ExportError, match=rf"group size {group_size} is not possible: .*powers of two from 32"):
        Recipe(group_size=group_size)


@pytest.mark.parametrize("max_context_len", [1, 0, -768])
def test_too_short_context(max_context_len):
    with pytest.raises(ExportError, match=f"max context length {max_context_len} is too short: .* need 2 at least"):
        Recipe(max_context_len=max_context_len)


def test_unknown_scales():
    with pytest.raises(ExportError, match="scales 'best' is not one of: affine, hqq"):
        Recipe(scales="best")


@pytest.mark.parametrize("scales", SCALE_ALGORITHMS)
def test_json_round_trip(scales):
    recipe = Recipe(name="other", group_size=32, scales=scales, max_context_len=2)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert json.loads(recipe.to_json()) == dataclasses.asdict(recipe)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "3", '{"groups": 3}', '{"group_size": 33}', '{"group_size": "64"}', "null"]
)
def test_json_that_is_no_recipe(text):
    with pytest.raises(ValueError):  # noqa: PT011  (of json, of from_json or of Recipe)
        Recipe.from_json(text)
