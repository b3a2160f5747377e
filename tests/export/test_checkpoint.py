"""Reading checkpoints: every form of the files gives the same model, and every fault is named."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from loaded import LoadedCheckpoint, load
from random_checkpoint import (
    PROJECTOR_PREFIX,
    VISION_PREFIX,
    WEIGHT_FORMS,
    RandomCheckpoint,
    Sizes,
    save_tensors,
    tokenizer_model,
)
from safetensors.torch import save_file
from torch import Tensor

from mvlm.export.errors import ExportError

V2_SIZES = Sizes(projector="ldpnetv2")


def make(own_tower: bool = False) -> RandomCheckpoint:
    return RandomCheckpoint.make(V2_SIZES if own_tower else Sizes(), own_tower)


def assert_same_weights(ours: LoadedCheckpoint, theirs: LoadedCheckpoint) -> None:
    assert ours.model.config == theirs.model.config
    state, expected = ours.model.state_dict(), theirs.model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> dict[bool, LoadedCheckpoint]:
    """The random checkpoints as read from float32 safetensors, V2 by True."""
    folder = tmp_path_factory.mktemp("references")
    return {own_tower: load(str(make(own_tower).write(folder / str(own_tower)))) for own_tower in (False, True)}


@pytest.fixture
def v1(tmp_path) -> Path:
    """A good checkpoint of version 1, for tests to spoil."""
    return make().write(tmp_path / "v1")


@pytest.fixture
def v2(tmp_path) -> Path:
    """A good checkpoint of version 2."""
    return make(own_tower=True).write(tmp_path / "v2")


@pytest.fixture
def offline(monkeypatch) -> None:
    """No network, whether the machine has one or not."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", os.devnull)


def change_config(folder: Path, **changes: object) -> None:
    """Sets keys of config.json; an ellipsis removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object], own_tower: bool = False) -> None:
    """Writes the weights of :func:`make` again with a change."""
    tensors = make(own_tower).main_tensors()
    change(tensors)
    save_tensors(folder, tensors)


def error_of(folder: Path | str, vision_tower: str | None = None) -> str:
    with pytest.raises(ExportError) as caught:
        load(str(folder), vision_tower)
    return str(caught.value)


# -- forms of the files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", WEIGHT_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("own_tower", [False, True], ids=["V1", "V2"])
def test_all_forms_give_the_same_model(own_tower, dtype, form, references, tmp_path):
    checkpoint = make(own_tower)
    checkpoint.convert(dtype)
    checkpoint.add_legacy_tensors()
    loaded = load(str(checkpoint.write(tmp_path / "some-name", form)))
    assert loaded.name == "some-name"
    expected = references[own_tower].model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, expected[name].to(dtype).float()), name
    assert loaded.model.config == references[own_tower].model.config
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not loaded.model.training


def test_bin_written_before_torch_1_6(references, tmp_path):
    folder = make().write(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(make().main_tensors(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same_weights(load(str(folder)), references[False])


def test_safetensors_come_before_bin(references, v1):
    (v1 / "pytorch_model.bin").write_bytes(b"not looked at")
    assert_same_weights(load(str(v1)), references[False])


@pytest.mark.parametrize("prefix", ["vision_model.", ""], ids=["as in old files", "as transformers 5 writes"])
@pytest.mark.parametrize("form", WEIGHT_FORMS)
def test_tower_of_its_own(prefix, form, references, v1, tmp_path):
    tower = make().write_tower(tmp_path / "clip", form, prefix)
    shutil.rmtree(v1 / "tower")
    assert_same_weights(load(str(v1), str(tower)), references[False])


@pytest.mark.parametrize("form", WEIGHT_FORMS)
def test_tower_in_a_whole_clip(form, references, v1, tmp_path):
    loaded = load(str(v1), str(make().write_clip(tmp_path / "clip", form)))
    assert_same_weights(loaded, references[False])
    assert {"text_projection.weight", "visual_projection.weight", "logit_scale"} <= set(loaded.unused)


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPModel"])
def test_tower_saved_by_transformers(kind, references, v1, tmp_path):
    """The very files that transformers writes, config.json included."""
    vision = transformers.CLIPVisionConfig(**Sizes().vision())
    if kind == "CLIPModel":
        text = transformers.CLIPTextConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, vocab_size=40
        )
        model = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
        )
        model.vision_model.load_state_dict(make().tower)
    else:
        model = transformers.CLIPVisionModel(vision)
        model.load_state_dict(make().tower)
    model.save_pretrained(tmp_path / "clip")
    assert_same_weights(load(str(v1), str(tmp_path / "clip")), references[False])


def test_language_model_saved_by_transformers(references, v1, tmp_path):
    """Its config.json states rope_theta where transformers 5 does."""
    checkpoint = make()
    text = Sizes(rope_theta=12345.0).text()
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text, rope_parameters=rope))
    llama.load_state_dict(checkpoint.language)
    llama.save_pretrained(tmp_path / "llama")
    written = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert "rope_theta" not in written
    change_config(v1, **written | {"model_type": "mobilevlm"}, rope_theta=...)
    loaded = load(str(v1))
    assert loaded.model.config.text == replace(references[False].model.config.text, rope_theta=12345.0)


def test_tied_embeddings(v1):
    """One tensor in the file is embedding and lm_head, if config.json says so."""
    change_tensors(v1, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lm_head.weight" in error_of(v1)
    change_config(v1, tie_word_embeddings=True)
    network = load(str(v1)).model.language_model
    assert torch.equal(network.lm_head.weight, network.embed_tokens.weight)
    assert torch.equal(network.lm_head.weight, make().language["model.embed_tokens.weight"])


def test_defaults_of_absent_keys(references, v1):
    """Old MobileVLM configs leave out what has one usual value."""
    change_config(
        v1,
        **dict.fromkeys(
            ("rope_theta", "rope_scaling", "tie_word_embeddings", "bos_token_id", "eos_token_id", "mm_hidden_size"), ...
        ),
        **dict.fromkeys(("mm_vision_select_feature", "mm_use_im_start_end", "mm_use_im_patch_token"), ...),
        **dict.fromkeys(("mm_vision_select_layer", "image_aspect_ratio", "vision_tower_type"), ...),
    )
    loaded = load(str(v1))
    assert_same_weights(loaded, references[False])
    assert (loaded.bos_id, loaded.eos_ids) == (1, (2,))


def test_token_ids_and_tokenizer(v1):
    change_config(v1, bos_token_id=5, eos_token_id=[6, 7])
    loaded = load(str(v1))
    assert (loaded.bos_id, loaded.eos_ids) == (5, (6, 7))
    assert loaded.tokenizer == tokenizer_model()


def test_heads_of_an_own_tower_are_64_wide(references):
    assert references[True].model.config.vision == references[False].model.config.vision
    assert references[True].model.config.vision.num_attention_heads == 128 // 64


# -- what is left out, and identity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("own_tower", [False, True], ids=["V1", "V2"])
def test_unused_tensors_are_reported(own_tower, tmp_path):
    checkpoint = make(own_tower)
    checkpoint.add_legacy_tensors()
    unused = load(str(checkpoint.write(tmp_path))).unused
    prefix = VISION_PREFIX if own_tower else "vision_model."
    dead = [name for name in checkpoint.tower if name.startswith(("encoder.layers.1.", "post_layernorm."))]
    assert len(dead) == 16 + 2
    expected = [prefix + name for name in (*dead, "embeddings.position_ids")]
    expected.append("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert sorted(unused) == sorted(expected)


def test_checkpoint_id_is_of_the_content(v1, tmp_path):
    checkpoint_id = load(str(v1)).checkpoint_id
    assert re.fullmatch("sha256:[0-9a-f]{64}", checkpoint_id)

    moved = v1.rename(tmp_path / "elsewhere")
    (moved / "README.md").write_text("says nothing")
    (moved / "training_args.bin").write_bytes(b"neither")
    assert load(str(moved)).checkpoint_id == checkpoint_id

    seen = {checkpoint_id}
    for file in ("model.safetensors", "tower/model.safetensors", "config.json", "tower/config.json", "tokenizer.model"):
        path = moved / file
        data = path.read_bytes()
        if path.suffix == ".safetensors":  # the last byte of the last weight
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        elif path.suffix == ".json":
            path.write_bytes(data + b"\n")
        else:
            path.write_bytes(tokenizer_model(65))
        seen.add(load(str(moved)).checkpoint_id)
        path.write_bytes(data)
    assert len(seen) == 6
    assert load(str(moved)).checkpoint_id == checkpoint_id


# -- weights that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model*.safetensors", "pytorch_model*.bin"])
def test_missing_shard(form, tmp_path):
    folder = make().write(tmp_path, form)
    shard = form.replace("*", "-00002-of-00003")
    (folder / shard).unlink()
    message = error_of(folder)
    assert f"1 of 3 shards missing: {shard}" in message
    assert f"{form.replace('*', '')}.index.json" in message
    assert "fetch them into the folder" in message


@pytest.mark.parametrize(
    ("index", "message"),
    [("{}", "no 'weight_map' in it"), ('{"weight_map": []}', "no 'weight_map' in it"), ("{", "cannot be read as JSON")],
)
def test_broken_index(index, message, tmp_path):
    folder = make().write(tmp_path, "model*.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    assert message in error_of(folder)


@pytest.mark.parametrize("own_tower", [False, True], ids=["V1", "V2"])
def test_missing_tensors_are_listed_with_their_shapes(own_tower, tmp_path):
    folder = make(own_tower).write(tmp_path)
    gone = {
        "model.layers.0.mlp.up_proj.weight": "language_model.layers.0.mlp.up_proj.weight [96, 64]",
        "model.norm.weight": "language_model.norm.weight [64]",
    }
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in gone], own_tower)
    message = error_of(folder)
    assert "the weights do not fit config.json" in message
    assert "2 tensors missing:" in message
    for listed in gone.values():
        assert f"\n    {listed}" in message


def test_missing_tower_and_projector_tensors(v1):
    change_tensors(v1, lambda tensors: tensors.pop(PROJECTOR_PREFIX + "model.mb_block.2.block.0.0.weight"))
    tower = make()
    del tower.tower["encoder.layers.0.self_attn.out_proj.bias"]
    tower.write_tower(v1 / "tower")
    message = error_of(v1)
    assert "2 tensors missing:" in message
    assert "mm_projector.blocks.1.depthwise.conv.weight [64, 1, 3, 3]" in message
    assert "vision_tower.encoder.layers.0.self_attn.out_proj.bias [128]" in message


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.input_layernorm.weight",
        "model.mm_projector.model.mlp.5.weight",
        "model.mm_projector.peg.peg.0.bias",
        "transformer.wte.weight",
    ],
)
def test_extra_tensor(name, v1):
    change_tensors(v1, lambda tensors: tensors.update({name: torch.ones(3, 4)}))
    assert f"1 tensors not known:\n    {name} [3, 4]" in error_of(v1)


def test_extra_tensor_in_the_tower(v1):
    tower = make()
    extra = ("embeddings.other", "encoder.layers.0.mlp.fc3.weight", "encoder.layers.2.layer_norm1.weight")
    tower.tower |= {name: torch.ones(2) for name in extra}
    tower.write_tower(v1 / "tower")
    message = error_of(v1)
    assert "3 tensors not known:" in message
    for name in extra:
        assert f"\n    vision_model.{name} [2]" in message


@pytest.mark.parametrize(
    ("name", "tensor", "given", "expected"),
    [
        ("lm_head.weight", torch.ones(95, 64), "float32 [95, 64]", "[96, 64]"),
        ("model.layers.0.mlp.down_proj.weight", torch.ones(96, 64), "float32 [96, 64]", "[64, 96]"),
        ("model.norm.weight", torch.ones(1).half(), "float16 [1]", "[64]"),
        ("model.norm.weight", torch.tensor(1.0), "float32 []", "[64]"),
        ("model.mm_projector.model.mb_block.1.block.2.0.weight", torch.ones(64, 64, 3, 3), "[64, 64, 3, 3]", "[64, 64"),
        ("model.norm.weight", torch.ones(64, dtype=torch.int32), "int32 [64]", "floating point [64]"),
        ("lm_head.weight", torch.ones(96, 64, dtype=torch.int8), "int8 [96, 64]", "floating point [96, 64]"),
    ],
    ids=["rows", "transposed", "broadcast", "scalar", "kernel", "integer", "quantized"],
)
def test_wrong_shape_or_type(name, tensor, given, expected, v1):
    change_tensors(v1, lambda tensors: tensors.update({name: tensor}))
    message = error_of(v1)
    assert "1 tensors of another shape or type:" in message
    listed = next(line for line in message.splitlines() if name in line)
    assert given in listed
    assert expected in listed


def test_all_faults_at_once(v1):
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["lm_head.weight"] = torch.ones(2, 2)
        tensors["other"] = torch.ones(1)

    change_tensors(v1, spoil)
    message = error_of(v1)
    for title in ("1 tensors missing:", "1 tensors of another shape or type:", "1 tensors not known:"):
        assert title in message


def test_config_of_another_depth(v1):
    """A V1-3B config over 1.7B weights, say: the layers that are missing and those that are too many are listed."""
    change_config(v1, num_hidden_layers=2)
    assert "9 tensors missing:" in error_of(v1)


# -- files that are not weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("keep", [0.6, 0.01, 0.0], ids=["half", "header", "empty"])
def test_truncated_weights(form, keep, tmp_path):
    folder = make().write(tmp_path, form)
    path = folder / form
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    message = error_of(folder)
    assert message.startswith(f"{path}: cannot be read as")
    assert "truncated" in message


@pytest.mark.parametrize("form", ["model*.safetensors", "pytorch_model*.bin"])
def test_truncated_shard_is_named(form, tmp_path):
    folder = make().write(tmp_path, form)
    path = folder / form.replace("*", "-00003-of-00003")
    path.write_bytes(path.read_bytes()[:-1000])
    assert error_of(folder).startswith(f"{path}: cannot be read as")


class MakesFolder:
    """A pickle of it makes a folder when it is loaded: a harmless stand-in for any command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["plain pickle", "torch.save", "old torch.save", "beside tensors"])
def test_pickled_code_does_not_run(how, tmp_path):
    folder = make().write(tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    trap = tmp_path / "sprung"
    path = folder / "pytorch_model.bin"
    match how:
        case "plain pickle":
            path.write_bytes(pickle.dumps(MakesFolder(trap)))
        case "torch.save":
            torch.save(MakesFolder(trap), path)
        case "old torch.save":
            torch.save(MakesFolder(trap), path, _use_new_zipfile_serialization=False)
        case _:
            torch.save(make().main_tensors() | {"extra": MakesFolder(trap)}, path)
    message = error_of(folder)
    assert not trap.exists()
    assert f"{path}: cannot be read as PyTorch weights" in message
    assert "refused because loading them could run code" in message
    pickle.loads(pickle.dumps(MakesFolder(trap)))
    assert trap.exists(), "the trap itself works"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ([torch.ones(2)], "list"),
        (torch.ones(2), "Tensor"),
        ({"model": {"lm_head.weight": torch.ones(2)}}, "dict"),
        ({1: torch.ones(2)}, "dict"),
        ({"step": 3}, "dict"),
        (None, "NoneType"),
    ],
)
def test_bin_that_is_no_state_dict(content, kind, tmp_path):
    folder = make().write(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    message = error_of(folder)
    assert f"pytorch_model.bin: holds {kind}, not a state dict" in message
    assert "torch.save(model.state_dict(), path)" in message


def test_empty_state_dict(v1):
    save_file({}, v1 / "model.safetensors")
    assert "tensors missing:" in error_of(v1)


def test_no_weights(v1):
    (v1 / "model.safetensors").unlink()
    message = error_of(v1)
    assert f"{v1}: no weights in it; looked for model.safetensors and pytorch_model.bin" in message
    assert ".index.json" in message


# -- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["", "tower/"], ids=["model", "tower"])
def test_no_config(where, v1):
    (v1 / f"{where}config.json").unlink()
    assert error_of(v1) == f"{v1}/{where}config.json: no such file"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"hidden_size": 64,', "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[1, 2]", "a JSON object is expected, this is a list"),
    ],
    ids=["cut", "empty", "binary", "list"],
)
def test_broken_config(content, message, v1):
    (v1 / "config.json").write_bytes(content)
    assert f"{v1}/config.json: {message}" in error_of(v1)


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "rms_norm_eps"])
def test_config_without_a_size(key, v1):
    change_config(v1, **{key: ...})
    assert error_of(v1) == f"{v1}/config.json: lacks {key}"


def test_tower_config_without_a_size(v1):
    change_config(v1 / "tower", patch_size=..., image_size=...)
    assert error_of(v1) == f"{v1}/tower/config.json: lacks image_size, patch_size of a CLIP vision tower"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type is 'mlp3x_gelu'; supported: ldpnet, ldpnetv2, mlp2x"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'; supported: mobilevlm, llava, llava_llama, llama .*--list"),
        ({"model_type": ...}, "model_type is None; supported: mobilevlm"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling .*'linear'.* is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling .*'yarn'.* is not supported"),
        ({"attention_bias": True}, "attention_bias and mlp_bias are not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; MobileLLaMA uses silu"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True; only False is supported"),
        ({"mm_use_im_patch_token": True}, "mm_use_im_patch_token is True; only False is supported"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'; only 'patch' is supp"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'; only 'pad' is supported"),
        ({"vision_tower_type": "siglip"}, "vision_tower_type is 'siglip'; only 'clip' is supported"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size is 1024, but the vision tower is 128 wide; it is not the tower"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_that_asks_for_something_else(change, message, v1):
    change_config(v1, **change)
    assert re.search(message, error := error_of(v1)), error
    assert error.startswith(f"{v1}/config.json: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 2 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 33}, "head_dim 33 is odd"),
        ({"mm_vision_select_layer": -9}, "select_layer -9 is out of range"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"eos_token_id": None}, "eos_token_id is None"),
        ({"bos_token_id": 96}, "bos_token_id is 96"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_with_impossible_numbers(change, message, v1):
    change_config(v1, **change)
    error = error_of(v1)
    assert message in error
    assert str(v1) in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 3}, "hidden_size 128 is not a multiple of num_attention_heads 3"),
        ({"image_size": 30}, "image_size 30 is not a multiple of patch_size 7"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not one of"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tower_config_with_impossible_numbers(change, message, v1):
    change_config(v1 / "tower", **change)
    error = error_of(v1)
    assert message in error
    assert f"{v1}/tower/config.json: " in error


def test_grid_that_the_projector_cannot_halve(tmp_path):
    folder = RandomCheckpoint.make(Sizes(vision_image_size=35)).write(tmp_path)
    error = error_of(folder)
    assert "ldpnet halves the grid of patches, but 5 x 5 is odd" in error
    assert str(folder) in error


# -- tokenizer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; the SentencePiece model of the checkpoint is required"),
        (b'{"version": "1.0", "model": {}}', "not a SentencePiece model"),
        (b"", "not a SentencePiece model"),
        (tokenizer_model(97), "has 97 pieces, more than the model's vocab_size 96; it belongs to another model"),
    ],
    ids=["missing", "tokenizer.json", "empty", "too many pieces"],
)
def test_unusable_tokenizer(content, message, v1):
    path = v1 / "tokenizer.model"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    assert f"{path}: {message}" in error_of(v1)


# -- the vision tower -------------------------------------------------------------------------------------------------


def test_v2_refuses_another_tower(v1, v2):
    message = error_of(v2, str(v1 / "tower"))
    assert "carries its own vision tower" in message
    assert "leave out --vision-tower" in message
    assert str(v1 / "tower") in message


def test_v2_with_half_a_tower(v2):
    name = VISION_PREFIX + "embeddings.patch_embedding.weight"
    change_tensors(v2, lambda tensors: tensors.pop(name), own_tower=True)
    message = error_of(v2)
    assert "lacks or misshapes a tensor that tells its sizes" in message
    assert name in message


def test_v2_whose_heads_cannot_be_told(tmp_path):
    sizes = Sizes(projector="ldpnetv2", vision_hidden_size=96)
    message = error_of(RandomCheckpoint.make(sizes, own_tower=True).write(tmp_path))
    assert message.startswith(f"{tmp_path}: ")
    assert "is 96 wide, which is no multiple of CLIP's head width 64" in message


def test_v1_without_tower(v1, offline):
    shutil.rmtree(v1 / "tower")
    change_config(v1, mm_vision_tower="openai/clip-vit-large-patch14-336")
    message = error_of(v1)
    assert "has no vision tower of its own" in message
    assert "config.json names 'openai/clip-vit-large-patch14-336'" in message
    assert "pass its folder with --vision-tower" in message

    change_config(v1, mm_vision_tower=...)
    message = error_of(v1)
    assert "config.json names none" in message
    assert "--vision-tower" in message


def test_tower_of_another_width(v1, tmp_path):
    sizes = Sizes(vision_hidden_size=64)
    tower = RandomCheckpoint.make(sizes).write_tower(tmp_path / "narrow")
    message = error_of(v1, str(tower))
    assert "mm_hidden_size is 128, but the vision tower is 64 wide" in message
    change_config(v1, mm_hidden_size=...)
    assert "float32 [64, 128], floating point [64, 64] is expected" in error_of(v1, str(tower))


def test_tower_that_is_a_language_model(v1, v2):
    assert "of a CLIP vision tower" in error_of(v1, str(v2))


def test_given_tower_is_taken_before_the_named_one(v1, tmp_path):
    other = RandomCheckpoint.make(seed=50)
    loaded = load(str(v1), str(other.write_tower(tmp_path / "other")))
    assert torch.equal(loaded.model.vision_tower.embeddings.class_embedding, other.tower["embeddings.class_embedding"])


def preprocessor(**changes: object) -> dict[str, object]:
    config = {
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
        "image_mean": [0.5, 0.25, 0.125],
        "image_std": [0.1, 0.2, 0.3],
    }
    return config | changes


@pytest.mark.parametrize("size", [28, {"shortest_edge": 28}, {"height": 28, "width": 28}], ids=str)
def test_preprocessing_is_read(size, v1):
    checkpoint = make()
    plain = load(str(v1))
    assert plain.preprocessing.pad_color == (122, 116, 104)
    checkpoint.preprocessor_config = preprocessor(size=size)
    checkpoint.write_tower(v1 / "tower")
    loaded = load(str(v1))
    assert loaded.preprocessing.mean == (0.5, 0.25, 0.125)
    assert loaded.preprocessing.std == (0.1, 0.2, 0.3)
    assert loaded.preprocessing.pad_color == (127, 63, 31)
    assert loaded.checkpoint_id != plain.checkpoint_id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 224}, "size 224 and the vision tower's image_size 28 disagree"),
        ({"size": {"shortest_edge": 224}}, "size 224 and the vision tower's image_size 28 disagree"),
        ({"size": {"height": 224, "width": 28}}, "size 224 and the vision tower's image_size 28 disagree"),
        ({"image_mean": [0.5]}, r"image_mean and image_std need 3 numbers each, got (0.5,)"),
    ],
)
def test_preprocessing_that_disagrees(change, message, v1):
    checkpoint = make()
    checkpoint.preprocessor_config = preprocessor(**change)
    checkpoint.write_tower(v1 / "tower")
    assert error_of(v1) == f"{v1}/tower/preprocessor_config.json: {message}" + (
        " and (0.1, 0.2, 0.3)" if "image_mean" in change else ""
    )


# -- where it is ------------------------------------------------------------------------------------------------------


def test_a_file_is_no_model(v1):
    message = error_of(v1 / "model.safetensors")
    assert message.startswith(f"model {v1}/model.safetensors: is a file; a folder")
    assert "hub id" in message
    assert error_of(v1, str(v1 / "config.json")).startswith(f"--vision-tower {v1}/config.json: is a file")


@pytest.mark.parametrize("name", ["/no/such/folder", "no-such-folder", "./no/such", "a/b/c", ""])
def test_no_such_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = error_of(name)
    assert "no such f" in message
    if name:
        assert f"model {name}: no such folder, and no hub id either" in message
        assert "mtgv/MobileVLM-1.7B" in message
