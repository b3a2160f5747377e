"""Metadata as constant methods and back, of models with pictures and of language models alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mvlm.export.contract import (
    CONSTANT_METHODS,
    FORMAT_VERSION,
    IMAGE_CONSTANT_METHODS,
    ImageProcessing,
    Metadata,
)

WITH_PICTURES = Metadata(
    model_name="toy",
    checkpoint_id="sha256:0",
    mvlm_version="0.1.0",
    recipe="{}",
    max_seq_len=256,
    max_context_len=768,
    logit_positions=8,
    vocab_size=32064,
    bos_id=1,
    eos_ids=(2, 7),
    prompt_template="USER: {prompt} ASSISTANT:",
    next_turn_template="USER: {prompt} ASSISTANT:",
    image_marker="<image>",
    image_prefix="<image>\n",
    stop_strings=("</s>",),
    image=ImageProcessing(336, (0.5, 0.25, 0.125), (0.5, 0.5, 1.0), (122, 116, 104), 576),
)
LANGUAGE_MODEL = replace(WITH_PICTURES, image=None, image_marker="", image_prefix="")


def test_a_model_with_pictures_has_all_constants():
    values = WITH_PICTURES.to_constant_methods()
    assert tuple(values) == CONSTANT_METHODS
    assert Metadata.from_constant_methods(values) == WITH_PICTURES


def test_a_language_model_alone_has_none_about_pictures():
    values = LANGUAGE_MODEL.to_constant_methods()
    assert tuple(values) == tuple(name for name in CONSTANT_METHODS if name not in IMAGE_CONSTANT_METHODS)
    assert not any("image" in name for name in values)
    assert Metadata.from_constant_methods(values) == LANGUAGE_MODEL


def test_other_constants_are_ignored():
    assert Metadata.from_constant_methods(LANGUAGE_MODEL.to_constant_methods() | {"forward": 1}) == LANGUAGE_MODEL


@pytest.mark.parametrize("name", IMAGE_CONSTANT_METHODS)
def test_image_constants_come_all_or_none(name):
    whole = WITH_PICTURES.to_constant_methods()
    with pytest.raises(ValueError, match=f"^constant methods missing: {name}$"):
        Metadata.from_constant_methods({key: value for key, value in whole.items() if key != name})
    others = [other for other in IMAGE_CONSTANT_METHODS if other != name]
    with pytest.raises(ValueError, match=f"^constant methods missing: {', '.join(others)}$"):
        Metadata.from_constant_methods({key: value for key, value in whole.items() if key not in others})


@pytest.mark.parametrize(("version", "advice"), [(FORMAT_VERSION + 1, "install a newer mvlm"), (3, "export it again")])
def test_another_format_is_said_before_what_it_lacks(version, advice):
    with pytest.raises(ValueError, match=f"of format {version}, this mvlm reads format {FORMAT_VERSION}: {advice}"):
        Metadata.from_constant_methods({"mvlm_format_version": version})


@pytest.mark.parametrize(
    ("metadata", "changes", "message"),
    [
        (WITH_PICTURES, {"prompt_template": "no place for it"}, "must contain {prompt} once"),
        (WITH_PICTURES, {"next_turn_template": "no place for it"}, "must contain {prompt} once"),
        (WITH_PICTURES, {"image_prefix": "no marker"}, "'no marker' must contain the image marker '<image>' once"),
        (WITH_PICTURES, {"image_prefix": "<image><image>"}, "must contain the image marker '<image>' once"),
        (WITH_PICTURES, {"image_marker": ""}, "must contain the image marker '' once"),
        (LANGUAGE_MODEL, {"image_marker": "<image>"}, "must be empty, not '<image>' and ''"),
        (LANGUAGE_MODEL, {"image_prefix": "<image>\n"}, "must be empty"),
        (LANGUAGE_MODEL, {"logit_positions": 0}, "logit_positions 0 is not in 1 .. 256"),
        (LANGUAGE_MODEL, {"logit_positions": 257}, "logit_positions 257 is not in 1 .. 256"),
    ],
)
def test_refuses_what_contradicts_itself(metadata, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(metadata, **changes)
