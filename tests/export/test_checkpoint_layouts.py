"""Kinds of checkpoints: each is told by config.json and names, is read as what it is, and nothing is mixed up."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
import transformers
from random_checkpoint import (
    HF_NAMES,
    MOBILEVLM_1_7B,
    MOBILEVLM_3B,
    VICUNA_7B,
    WEIGHT_FORMS,
    RandomCheckpoint,
    Shapes,
    Sizes,
    hf_llava_config,
    hf_llava_names,
    language_shapes,
    original_shapes,
    projector_shapes,
    save_tensors,
    tokenizer_model,
    tower_shapes,
    write_sparse,
)
from safetensors.torch import save_file

from mvlm.export.checkpoint import (
    LLAVA_TEMPLATE,
    MOBILEVLM_TEMPLATE,
    NAMED_MODELS,
    Checkpoint,
    configs,
    open_checkpoint,
    parameter_shapes,
)
from mvlm.export.contract import PROMPT_PLACEHOLDER
from mvlm.export.errors import ExportError

LLAVA_SIZES = Sizes(projector="mlp2x_gelu", num_hidden_layers=2)


def make_llava() -> RandomCheckpoint:
    checkpoint = RandomCheckpoint.make(LLAVA_SIZES)
    checkpoint.make_llava()
    return checkpoint


def make_text_only(sizes: Sizes = Sizes(num_hidden_layers=2)) -> RandomCheckpoint:  # noqa: B008  (frozen)
    checkpoint = RandomCheckpoint.make(sizes)
    checkpoint.make_text_only()
    return checkpoint


def change_config(folder: Path, **changes: object) -> None:
    """Sets keys of config.json; an ellipsis removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def error_of(folder: Path, vision_tower: str | None = None) -> str:
    with pytest.raises(ExportError) as caught:
        open_checkpoint(str(folder), vision_tower)
    return str(caught.value)


def assert_same_weights(ours: Checkpoint, theirs: Checkpoint) -> None:
    assert ours.config == theirs.config
    for name in parameter_shapes(ours.config):
        assert torch.equal(ours.read(name), theirs.read(name)), name


# -- reading one tensor at a time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", WEIGHT_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_read_gives_the_models_parameters(dtype, form, tmp_path):
    source = RandomCheckpoint.make()
    source.convert(dtype)
    checkpoint = open_checkpoint(str(source.write(tmp_path, form)))
    model = checkpoint.load_model()
    for name, parameter in reversed(list(model.named_parameters())):
        tensor = checkpoint.read(name)
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert tensor.shape == parameter.shape
        assert torch.equal(tensor, parameter)
        tensor.fill_(torch.nan)  # nobody else's
    for name, parameter in model.named_parameters():
        assert torch.equal(checkpoint.read(name), parameter)
    down = "layers.0.mlp.down_proj.weight"
    assert torch.equal(checkpoint.read(f"language_model.{down}"), source.language[f"model.{down}"].float())


@pytest.mark.parametrize("form", WEIGHT_FORMS)
def test_types_may_be_mixed(form, tmp_path):
    """Trained parts are often stored finer than frozen ones."""
    source = RandomCheckpoint.make(Sizes(projector="ldpnetv2"), own_tower=True)
    source.language = {name: tensor.half() for name, tensor in source.language.items()}
    source.tower = {name: tensor.bfloat16() for name, tensor in source.tower.items()}
    source.projector["mlp.mlp.0.bias"] = source.projector["mlp.mlp.0.bias"].double()
    checkpoint = open_checkpoint(str(source.write(tmp_path, form)))
    for name, stored in (
        ("language_model.norm.weight", source.language["model.norm.weight"]),
        ("vision_tower.embeddings.class_embedding", source.tower["embeddings.class_embedding"]),
        ("mm_projector.mlp.0.bias", source.projector["mlp.mlp.0.bias"]),
        ("mm_projector.mlp.0.weight", source.projector["mlp.mlp.0.weight"]),
    ):
        assert checkpoint.read(name).dtype == torch.float32
        assert torch.equal(checkpoint.read(name), stored.float()), name


def test_read_of_what_the_model_has_not(tmp_path):
    checkpoint = open_checkpoint(str(RandomCheckpoint.make().write(tmp_path)))
    with pytest.raises(KeyError, match=r"the model has no parameter 'model\.norm\.weight'"):
        checkpoint.read("model.norm.weight")


def test_opening_reads_no_weights(tmp_path, monkeypatch):
    from mvlm.export.checkpoint.weight_files import WeightFiles

    monkeypatch.setattr(WeightFiles, "read", lambda *_: pytest.fail("a weight was read"))
    checkpoint = open_checkpoint(str(RandomCheckpoint.make().write(tmp_path)))
    main, tower = (tmp_path / name / "model.safetensors" for name in ("", "tower"))
    assert checkpoint.size == main.stat().st_size + tower.stat().st_size


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_a_checkpoint_goes_to_another_process(form, tmp_path):
    """Worker processes are handed the checkpoint and read for themselves."""
    checkpoint = open_checkpoint(str(RandomCheckpoint.make().write(tmp_path, form)))
    name = "language_model.norm.weight"
    tensor = checkpoint.read(name)
    data = pickle.dumps(checkpoint)
    assert len(data) < len(checkpoint.tokenizer) + 20_000 < (tmp_path / form).stat().st_size  # without the weights
    assert torch.equal(pickle.loads(data).read(name), tensor)


# -- LLaVA, original --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_original_llava(model_type, tmp_path):
    source = make_llava()
    source.config["model_type"] = model_type
    checkpoint = open_checkpoint(str(source.write(tmp_path, "pytorch_model*.bin")))
    assert checkpoint.prompt_template == LLAVA_TEMPLATE
    assert checkpoint.config.projector_type == "mlp2x_gelu"
    assert checkpoint.config.num_image_tokens == LLAVA_SIZES.num_patches == 16
    assert torch.equal(checkpoint.read("mm_projector.2.bias"), source.projector["2.bias"])
    assert checkpoint.preprocessing.pad_color == (122, 116, 104)


def test_templates():
    """As in LLaVA's conversation.py, conv_llava_v1, and MobileVLM's, conv_vicuna_v1; the system prompt has no space
    at its end, and one comes between turns."""
    assert LLAVA_TEMPLATE == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: {prompt} ASSISTANT:"
    )
    assert LLAVA_TEMPLATE.replace("human", "user") == MOBILEVLM_TEMPLATE
    assert LLAVA_TEMPLATE.count(PROMPT_PLACEHOLDER) == 1


# -- LLaVA, Hugging Face ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model.safetensors", "model*.safetensors", "pytorch_model*.bin"])
@pytest.mark.parametrize("scheme", HF_NAMES)
def test_hf_llava_is_the_original_llava(scheme, form, tmp_path):
    source = make_llava()
    original = open_checkpoint(str(source.write(tmp_path / "original")))
    source.add_legacy_tensors()
    hf = open_checkpoint(str(source.write_hf_llava(tmp_path / "hf", scheme, form)))
    assert_same_weights(hf, original)
    assert hf.prompt_template == LLAVA_TEMPLATE
    assert (hf.bos_id, hf.eos_ids) == (1, (2,))
    assert any(name.endswith("rotary_emb.inv_freq") for name in hf.unused)
    assert any(name.endswith("post_layernorm.bias") for name in hf.unused)


@pytest.fixture(scope="module")
def hf_llava() -> transformers.LlavaForConditionalGeneration:
    """An oracle that no one here wrote, with the weights of :func:`make_llava`."""
    sizes = LLAVA_SIZES
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **sizes.vision()},
        text_config={"model_type": "llama", **sizes.text()},
        image_token_index=90,
        image_seq_length=sizes.num_patches,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    source = make_llava()
    names = hf_llava_names(source.language, source.projector, source.tower, "newest")
    model.load_state_dict({name: tensor.clone() for name, tensor in names.items()})
    return model


@pytest.mark.parametrize("names", ["as saved", "as in memory"])
def test_llava_saved_by_transformers_computes_the_same(names, hf_llava, tmp_path):
    hf_llava.save_pretrained(tmp_path)
    if names == "as in memory":
        save_file(
            {name: tensor.clone() for name, tensor in hf_llava.state_dict().items()}, tmp_path / "model.safetensors"
        )
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model())
    model = open_checkpoint(str(tmp_path)).load_model()

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 28, 28, generator=generator)
    before, after = (torch.randint(64, (1, length), generator=generator) for length in (3, 5))
    ids = torch.cat([before, torch.full((1, 16), 90), after], dim=1)
    with torch.no_grad():
        theirs = hf_llava(input_ids=ids, pixel_values=pixels).logits
        picture = model.encode_image(pixels)
        ours = model(torch.cat([model.embed_tokens(before), picture, model.embed_tokens(after)], dim=1))
    assert theirs.std() > 0.5  # a comparison of something
    assert (ours - theirs).abs().max() <= 1e-4


def test_hf_defaults_are_those_of_transformers():
    """transformers leaves out of a nested config what its own classes take anyway."""
    for ours, theirs in (
        (configs.LLAMA_DEFAULTS, transformers.LlamaConfig()),
        (configs.CLIP_VISION_DEFAULTS, transformers.CLIPVisionConfig()),
        (configs.LLAVA_VISION_DEFAULTS, transformers.LlavaConfig().vision_config),
    ):
        assert ours == {key: theirs.to_dict()[key] for key in ours}
    llama = transformers.LlamaConfig()
    assert llama.num_key_value_heads == llama.num_attention_heads  # which our default is
    assert llama.rope_parameters["rope_theta"] == 10000.0


def test_hf_llava_of_vicuna(tmp_path):
    """The text_config of llava-hf/llava-1.5-7b-hf states little more than that it is a Llama."""
    sizes = Sizes(**{**VICUNA_7B.text(), "vocab_size": 32064}, projector="mlp2x_gelu", **vision_arguments(VICUNA_7B))
    stated = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064, "torch_dtype": "float16"}
    write_large(tmp_path, hf_llava_config(sizes, **stated), hf_shapes(sizes, "old"))
    config = open_checkpoint(str(tmp_path)).config
    theirs = transformers.LlavaConfig.from_pretrained(tmp_path)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps"):
        assert getattr(config.text, key) == getattr(theirs.text_config, key), key
    assert (config.text.hidden_size, config.text.num_hidden_layers, config.text.vocab_size) == (4096, 32, 32064)
    assert config.num_image_tokens == 576


@pytest.mark.parametrize("nested", [False, True], ids=["preprocessor_config.json", "processor_config.json"])
def test_hf_llava_preprocessing(nested, tmp_path):
    """Mean and deviation are taken; that its processor crops to a square is not: pictures are padded."""
    folder = make_llava().write_hf_llava(tmp_path)
    processor = {
        "crop_size": {"height": 28, "width": 28},
        "do_center_crop": True,
        "image_mean": [0.5, 0.25, 0.125],
        "image_std": [0.1, 0.2, 0.3],
        "size": {"shortest_edge": 28},
    }
    plain = open_checkpoint(str(folder))
    if nested:
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": processor, "patch_size": 7}))
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.preprocessing.mean == (0.5, 0.25, 0.125)
    assert checkpoint.preprocessing.std == (0.1, 0.2, 0.3)
    assert checkpoint.preprocessing.pad_color == (127, 63, 31)
    assert checkpoint.checkpoint_id != plain.checkpoint_id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vision_feature_select_strategy": "full"},
            "vision_feature_select_strategy is 'full'; only 'default' is supp",
        ),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'; only 'gelu' is supported"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False; only True is supported"),
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer is [-2, -5]; a whole number is expected"),
        ({"image_seq_length": 576}, "image_seq_length is 576, but the vision tower makes 16 patches"),
        ({"text_config": {"model_type": "mistral"}}, "text_config.model_type is 'mistral'; only 'llama' is supported"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision_config.model_type is 'siglip_vision_model'"),
        ({"text_config": "llama"}, "text_config is 'llama'; an object is expected"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_hf_llava_that_asks_for_something_else(change, message, tmp_path):
    folder = make_llava().write_hf_llava(tmp_path)
    change_config(folder, **change)
    assert f"{folder}/config.json: {message}" in error_of(folder)


def test_hf_llava_with_a_tower_given(tmp_path):
    source = make_llava()
    folder = source.write_hf_llava(tmp_path / "hf")
    tower = source.write_tower(tmp_path / "tower")
    assert "carries its own vision tower" in error_of(folder, str(tower))


def test_hf_llava_with_names_of_two_schemes(tmp_path):
    source = make_llava()
    folder = source.write_hf_llava(tmp_path)
    parts = source.language, source.projector, source.tower
    tensors = hf_llava_names(*parts, "old")
    tensors["model.multi_modal_projector.linear_1.bias"] = torch.zeros(64)
    save_tensors(folder, tensors)
    message = error_of(folder)
    assert "1 tensors twice, by two names:" in message
    assert "model.multi_modal_projector.linear_1.bias" in message


def test_image_token_that_is_not_the_marker(tmp_path):
    folder = make_llava().write_hf_llava(tmp_path)
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": 94, "<pad>": 95}))
    assert b"<image>" in open_checkpoint(str(folder)).tokenizer
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 94, "<image>": 95}))
    assert "image_token_index 94 is the token '<pad>'; '<image>' is expected" in error_of(folder)


# -- MobileLLaMA ------------------------------------------------------------------------------------------------------


def test_text_only(tmp_path):
    checkpoint = open_checkpoint(str(make_text_only().write(tmp_path)))
    assert checkpoint.config.vision is None
    assert checkpoint.config.num_image_tokens == 0
    assert checkpoint.prompt_template == MOBILEVLM_TEMPLATE
    assert not hasattr(checkpoint.load_model(), "vision_tower")


def test_text_only_with_a_tower(tmp_path):
    folder = make_text_only().write(tmp_path)
    message = error_of(folder, "openai/clip-vit-large-patch14-336")
    assert "model_type is 'llama', a language model alone, which takes no pictures; leave out --vision-tower" in message


def test_llama_saved_by_transformers_computes_the_same(tmp_path):
    """Grouped keys and values, and tied embeddings, which transformers stores once."""
    sizes = Sizes(num_hidden_layers=2, num_attention_heads=4, rope_theta=5000.0).text()
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    config = transformers.LlamaConfig(**sizes, rope_parameters=rope, tie_word_embeddings=True)
    torch.manual_seed(0)
    oracle = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 64**-0.5)
    oracle.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model())
    model = open_checkpoint(str(tmp_path)).load_model()
    ids = torch.randint(64, (1, 9))
    with torch.no_grad():
        theirs, ours = oracle(ids).logits, model(model.embed_tokens(ids))
    assert theirs.std() > 0.5
    assert (ours - theirs).abs().max() <= 1e-4


# -- contradictions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "projector", "message"),
    [
        (
            "ldpnet",
            "ldpnetv2",
            "mm_projector_type is 'ldpnet', but the weights hold the projector 'ldpnetv2': model.mm",
        ),
        (
            "ldpnetv2",
            "ldpnet",
            "mm_projector_type is 'ldpnetv2', but the weights hold the projector 'ldpnet': model.mm",
        ),
        ("linear", "mlp2x_gelu", "mm_projector_type is 'linear', but the weights hold the projector 'mlp2x_gelu'"),
        ("mlp2x_gelu", "linear", "mm_projector_type is 'mlp2x_gelu', but the weights hold the projector 'linear'"),
    ],
)
def test_projector_of_another_kind(stated, projector, message, tmp_path):
    folder = RandomCheckpoint.make(Sizes(projector=projector)).write(tmp_path)
    change_config(folder, mm_projector_type=stated)
    assert f"{folder}/config.json: {message}" in error_of(folder)


@pytest.mark.parametrize("projector", ["ldpnet", "ldpnetv2", "mlp2x_gelu", "linear"])
def test_projector_that_config_does_not_state(projector, tmp_path):
    folder = RandomCheckpoint.make(Sizes(projector=projector)).write(tmp_path)
    change_config(folder, mm_projector_type=...)
    assert open_checkpoint(str(folder)).config.projector_type == projector


def test_projector_that_nothing_states(tmp_path):
    source = RandomCheckpoint.make()
    source.projector = {}
    folder = source.write(tmp_path)
    message = error_of(folder)
    assert "mm_projector_type is 'ldpnet', but the weights hold no projector (model.mm_projector.*)" in message
    assert "a language model alone has a config.json with model_type 'llama'" in message
    change_config(folder, mm_projector_type=...)
    assert "mm_projector_type is None; supported: ldpnet, ldpnetv2, mlp2x_gelu, linear" in error_of(folder)


@pytest.mark.parametrize("projector", ["ldpnet", "ldpnetv2"])
def test_llava_with_a_projector_of_mobilevlm(projector, tmp_path):
    folder = RandomCheckpoint.make(Sizes(projector=projector)).write(tmp_path)
    change_config(folder, model_type="llava")
    assert (
        f"model_type 'llava' (LLaVA-1.5, original) and mm_projector_type '{projector}' do not go together; its "
        "projectors are mlp2x_gelu, linear"
    ) in error_of(folder)


def _as_hf(folder: Path) -> None:
    make_llava().write_hf_llava(folder)


def _as_original(folder: Path) -> None:
    make_llava().write(folder)


def _as_v2(folder: Path) -> None:
    RandomCheckpoint.make(Sizes(projector="ldpnetv2"), own_tower=True).write(folder)


@pytest.mark.parametrize(
    ("write", "config", "message"),
    [
        (
            _as_hf,
            make_llava().config,
            "that of LLaVA-1.5, original (model_type 'llava'), but the weights are named as in",
        ),
        (
            _as_hf,
            RandomCheckpoint.make().config,
            "that of MobileVLM (model_type 'mobilevlm'), but the weights are named",
        ),
        (
            _as_hf,
            make_text_only().config,
            "that of MobileLLaMA, text only (model_type 'llama'), but the weights are na",
        ),
        (_as_original, hf_llava_config(LLAVA_SIZES), "that of LLaVA-1.5, Hugging Face (model_type 'llava'), but the"),
        (_as_original, make_text_only().config, "that of MobileLLaMA, text only (model_type 'llama'), but the weights"),
        (_as_v2, make_text_only().config, "that of MobileLLaMA, text only (model_type 'llama'), but the weights are"),
    ],
)
def test_config_of_another_layout(write, config, message, tmp_path):
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    error = error_of(tmp_path)
    assert f"{tmp_path}/config.json: is {message}" in error
    assert re.search(r": (model\.)?(language_model|vision_tower|multi_modal_projector|mm_projector)\.", error), error
    assert "fetch the config.json that belongs to them" in error


def test_text_only_config_that_speaks_of_a_projector(tmp_path):
    folder = make_text_only().write(tmp_path)
    change_config(folder, mm_projector_type="ldpnet")
    assert "model_type 'llama' is a language model alone, but mm_projector_type is 'ldpnet'" in error_of(folder)


def test_mobilevlm_config_with_parts_inside(tmp_path):
    folder = RandomCheckpoint.make().write(tmp_path)
    change_config(folder, text_config={})
    assert "model_type is 'mobilevlm', which has no text_config and vision_config" in error_of(folder)


def test_v2_without_its_tower(tmp_path):
    """The tower that its config names is the one that training began with: taken only when it is asked for."""
    source = RandomCheckpoint.make(Sizes(projector="ldpnetv2"), own_tower=False)
    source.config["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
    folder = source.write(tmp_path)
    message = error_of(folder)
    assert "a MobileVLM V2 (ldpnetv2) carries its own vision tower, but these weights hold none" in message
    assert "'openai/clip-vit-large-patch14-336', which config.json names, is not the one it was trained with" in message
    assert open_checkpoint(str(folder), str(folder / "tower")).config.projector_type == "ldpnetv2"


# -- the published models, at their full size -------------------------------------------------------------------------


def vision_arguments(sizes: Sizes) -> dict[str, object]:
    return {f"vision_{key}": value for key, value in sizes.vision().items()}


def resized(sizes: Sizes, projector: str) -> Sizes:
    return Sizes(**sizes.text(), projector=projector, **vision_arguments(sizes))


def hf_shapes(sizes: Sizes, scheme: str) -> Shapes:
    return hf_llava_names(language_shapes(sizes), projector_shapes(sizes), tower_shapes(sizes), scheme)


def write_large(folder: Path, config: dict[str, object], shapes: Shapes) -> None:
    """A checkpoint of any size that takes no room on the disk."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    write_sparse(folder / "model.safetensors", shapes)


def write_clip(folder: Path) -> str:
    write_large(folder, {"model_type": "clip_vision_model"} | MOBILEVLM_1_7B.vision(), tower_shapes(MOBILEVLM_1_7B))
    return str(folder)


@pytest.mark.parametrize(
    ("name", "sizes", "projector", "own_tower", "tensors"),
    [
        ("mobilevlm-1.7b", MOBILEVLM_1_7B, "ldpnet", False, 243),
        ("mobilevlm-3b", MOBILEVLM_3B, "ldpnet", False, 315),
        ("mobilevlm-v2-1.7b", MOBILEVLM_1_7B, "ldpnetv2", True, 616),
        ("mobilevlm-v2-3b", MOBILEVLM_3B, "ldpnetv2", True, 688),
        ("mobilevlm-v2-7b", VICUNA_7B, "ldpnetv2", True, 688),
        ("llava-1.5-7b", VICUNA_7B, "mlp2x_gelu", False, 295),
        ("mobilellama-1.4b", MOBILEVLM_1_7B, None, False, 219),
        ("mobilellama-2.7b", MOBILEVLM_3B, None, False, 291),
    ],
)
def test_published_checkpoints_fit(name, sizes, projector, own_tower, tensors, tmp_path):
    """The named models have the shapes, and the files the tensor counts, of what was published."""
    tower = None
    if projector is None:
        source, shapes = make_text_only(Sizes()).config | sizes.text(), language_shapes(sizes)
    else:
        sizes = resized(sizes, projector)
        toy = RandomCheckpoint.make(Sizes(projector=projector), own_tower)
        if name.startswith("llava"):
            toy.make_llava()
        source = toy.config | sizes.text() | {"mm_hidden_size": 1024}
        shapes = original_shapes(sizes, own_tower)
        tower = None if own_tower else write_clip(tmp_path / "clip")
    assert len(shapes) == tensors
    write_large(tmp_path / name, source, shapes)
    checkpoint = open_checkpoint(str(tmp_path / name), tower)
    assert checkpoint.config == NAMED_MODELS[name].config
    assert checkpoint.prompt_template == NAMED_MODELS[name].prompt_template
    assert len(checkpoint.unused) == (0 if projector is None else 16 + 2)  # the last block and post_layernorm
    assert checkpoint.size > 2 * NAMED_MODELS[name].num_parameters  # float16, and what is unused
    values = checkpoint.read("language_model.layers.23.self_attn.k_proj.weight")
    assert values.shape == (sizes.num_key_value_heads * sizes.head_dim, sizes.hidden_size)


@pytest.mark.parametrize("scheme", HF_NAMES)
def test_published_hf_llava_fits(scheme, tmp_path):
    sizes = Sizes(**VICUNA_7B.text() | {"vocab_size": 32064}, projector="mlp2x_gelu", **vision_arguments(VICUNA_7B))
    shapes = hf_shapes(sizes, scheme)
    assert len(shapes) == 291 + 4 + 391
    write_large(tmp_path, hf_llava_config(sizes), shapes)
    checkpoint = open_checkpoint(str(tmp_path))
    named = NAMED_MODELS["llava-1.5-7b"].config
    assert checkpoint.config.vision == named.vision
    assert checkpoint.config.text.vocab_size == named.text.vocab_size + 64
    assert checkpoint.config.num_image_tokens == 576


def test_named_models_have_the_published_numbers_of_parameters():
    """The papers' 1.4B and 2.7B language models, projectors of 18.94M and 6.32M, and CLIP's 303.5M."""
    count = {name: model.num_parameters for name, model in NAMED_MODELS.items()}
    assert count["mobilellama-1.4b"] == 1_364_297_728
    assert count["mobilellama-2.7b"] == 2_701_560_320
    block, post_layernorm = 12 * 1024**2 + 13 * 1024, 2 * 1024  # which are not exported
    tower = 303_507_456 - block - post_layernorm
    assert count["mobilevlm-1.7b"] == count["mobilellama-1.4b"] + tower + 18_936_832
    assert count["mobilevlm-v2-1.7b"] == count["mobilellama-1.4b"] + tower + 6_316_032
    assert {name: model.config.num_image_tokens for name, model in NAMED_MODELS.items()} == {
        name: 0 if "llama" in name else 576 if "llava" in name else 144 for name in NAMED_MODELS
    }
