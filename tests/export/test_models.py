"""The networks against transformers' and against LDP and LDPv2 written down a second time.

Weights always go through files in MobileVLM's original names and our reader, so the tables of names are tested too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from loaded import load
from PIL import Image
from random_checkpoint import (
    RandomCheckpoint,
    Sizes,
)
from torch import Tensor, nn

from mvlm.export import demo
from mvlm.export.checkpoint import open_checkpoint
from mvlm.export.contract import ImageProcessing
from mvlm.export.models import (
    LOGIT_POSITIONS,
    PROJECTOR_TYPES,
    CLIPVisionConfig,
    CLIPVisionTower,
    MobileLlamaConfig,
    MobileVLM,
    MobileVLMConfig,
    PictureInput,
    TextDecoder,
    build_projector,
    image_token_count,
    last_positions,
)
from mvlm.export.preprocess import preprocess
from mvlm.export.recipe import ATTENTION_OPS
from mvlm.runtime.fidelity import snr_db

#: Largest difference from the oracle, in float32, on outputs of the order of 1.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Equal to TOLERANCE, and neither is so small that everything would be equal."""
    assert ours.shape == theirs.shape
    assert 0.1 < theirs.std() < 100
    difference = (ours - theirs).abs().max().item()
    assert difference <= TOLERANCE


def load_written(checkpoint: RandomCheckpoint, folder: Path) -> MobileVLM:
    return load(str(checkpoint.write(folder))).model


def pixels(sizes: Sizes, pictures: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(pictures)
    return torch.randn(pictures, 3, sizes.vision_image_size, sizes.vision_image_size, generator=generator)


def token_ids(sizes: Sizes, length: int, sequences: int = 1) -> Tensor:
    return torch.randint(0, sizes.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(length))


# -- oracles ----------------------------------------------------------------------------------------------------------


def transformers_clip(checkpoint: RandomCheckpoint) -> transformers.CLIPVisionModel:
    config = transformers.CLIPVisionConfig(**checkpoint.sizes.vision(), attn_implementation="eager")
    model = transformers.CLIPVisionModel(config).eval()
    model.load_state_dict(checkpoint.tower)
    return model


def transformers_llama_config(sizes: Sizes) -> transformers.LlamaConfig:
    config = {key: value for key, value in sizes.text().items() if key != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": sizes.rope_theta}
    return transformers.LlamaConfig(**config, rope_parameters=rope, attn_implementation="eager")


def transformers_llama(checkpoint: RandomCheckpoint) -> transformers.LlamaForCausalLM:
    model = transformers.LlamaForCausalLM(transformers_llama_config(checkpoint.sizes)).eval()
    model.load_state_dict(checkpoint.language)
    return model


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, width // 4, 1)
        self.fc2 = nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)
        return x * nn.Hardsigmoid()(self.fc2(nn.ReLU()(self.fc1(mean))))


class InvertedResidual(nn.Module):
    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        depthwise = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        self.block = nn.Sequential(
            nn.Sequential(depthwise, ChannelNorm(width, eps=1e-5), nn.Hardswish()),
            SqueezeExcite(width),
            nn.Sequential(nn.Conv2d(width, width, 1, bias=False), ChannelNorm(width, eps=1e-5)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.stride == 1 else self.block(x)


def to_grid(x_BPD: Tensor) -> Tensor:
    side = round(x_BPD.shape[1] ** 0.5)
    return x_BPD.unflatten(1, (side, side)).permute(0, 3, 1, 2)


def to_tokens(x_BDGG: Tensor) -> Tensor:
    return x_BDGG.flatten(2).transpose(1, 2)


class ReferenceLDP(nn.Module):
    """LDP over [B, C, H, W], with the modules where the original names want them."""

    def __init__(self, vision: int, width: int) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "mlp": nn.Sequential(nn.Identity(), nn.Linear(vision, width), nn.GELU(), nn.Linear(width, width)),
                "mb_block": nn.Sequential(nn.Identity(), InvertedResidual(width, 1), InvertedResidual(width, 2)),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(self.model["mb_block"](to_grid(self.model["mlp"](x))))


class ReferenceLDPv2(nn.Module):
    def __init__(self, vision: int, width: int) -> None:
        super().__init__()
        two_linears = nn.Sequential(nn.Linear(vision, width), nn.GELU(), nn.Linear(width, width))
        self.mlp = nn.ModuleDict({"mlp": two_linears})
        self.peg = nn.ModuleDict({"peg": nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width))})

    def forward(self, x: Tensor) -> Tensor:
        x = nn.AvgPool2d(2)(to_grid(self.mlp["mlp"](x)))
        return to_tokens(self.peg["peg"](x) + x)


def reference_projector(checkpoint: RandomCheckpoint) -> nn.Module:
    vision, width = checkpoint.sizes.vision_hidden_size, checkpoint.sizes.hidden_size
    match checkpoint.sizes.projector:
        case "ldpnet":
            projector: nn.Module = ReferenceLDP(vision, width)
        case "ldpnetv2":
            projector = ReferenceLDPv2(vision, width)
        case "mlp2x_gelu":
            projector = nn.Sequential(nn.Linear(vision, width), nn.GELU(), nn.Linear(width, width))
        case _:
            projector = nn.Linear(vision, width)
    projector.load_state_dict(checkpoint.projector)
    return projector


# -- the vision tower -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "used_blocks"),
    [
        (Sizes(vision_num_hidden_layers=3), 2),
        (Sizes(vision_num_hidden_layers=3, select_layer=-1), 3),
        (Sizes(vision_num_hidden_layers=3, select_layer=-4), 0),
        (Sizes(vision_num_hidden_layers=3, select_layer=1, vision_hidden_act="gelu"), 1),
        (Sizes(vision_num_attention_heads=4, vision_layer_norm_eps=1e-3, vision_hidden_act="gelu"), 1),
        (Sizes(vision_hidden_size=96, vision_num_attention_heads=1, vision_image_size=42, vision_patch_size=3), 1),
    ],
    ids=["second to last", "last", "first", "counted from 0", "other heads, eps and activation", "many patches"],
)
def test_vision_tower_equals_transformers(sizes, used_blocks, tmp_path):
    checkpoint = RandomCheckpoint.make(sizes)
    tower = load_written(checkpoint, tmp_path).vision_tower
    x = pixels(sizes, pictures=2)
    theirs = transformers_clip(checkpoint)(x, output_hidden_states=True).hidden_states
    assert_same(tower(x), theirs[sizes.select_layer][:, 1:])
    assert len(tower.encoder.layers) == used_blocks
    assert not any("post_layernorm" in name for name, _ in tower.named_parameters())


@pytest.mark.parametrize("select_layer", [-4, 3])
def test_vision_tower_has_no_such_layer(select_layer):
    with pytest.raises(ValueError, match=rf"select_layer {select_layer} is out of range.* -3 \.\. 2"):
        CLIPVisionTower(CLIPVisionConfig(64, 64, 2, 1, 28, 7), select_layer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 3}, "hidden_size 1024 is not a multiple of num_attention_heads 3"),
        ({"image_size": 335}, "image_size 335 is not a multiple of patch_size 14"),
        ({"hidden_act": "relu"}, r"hidden_act 'relu' is not one of \['gelu', 'quick_gelu'\]"),
    ],
)
def test_impossible_vision_config(change, message):
    with pytest.raises(ValueError, match=message):
        CLIPVisionConfig(**change)


# -- projectors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", PROJECTOR_TYPES)
def test_image_features_equal_reference(projector, tmp_path):
    sizes = Sizes(projector=projector, vision_image_size=42)  # a 6 x 6 grid: the stride is not the whole of it
    checkpoint = RandomCheckpoint.make(sizes)
    model = load_written(checkpoint, tmp_path)
    x = pixels(sizes, pictures=2)
    features = transformers_clip(checkpoint)(x, output_hidden_states=True).hidden_states[-2][:, 1:]
    ours = model.encode_image(x)
    assert ours.shape == (2, model.config.num_image_tokens, sizes.hidden_size)
    assert_same(ours, reference_projector(checkpoint)(features))


@pytest.mark.parametrize(("projector", "parameters"), [("ldpnet", 18_936_832), ("ldpnetv2", 6_316_032)])
def test_projector_parameter_counts_of_the_papers(projector, parameters):
    with torch.device("meta"):
        module = build_projector(projector, 1024, 2048)
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters


@pytest.mark.parametrize(("projector", "tokens"), [("ldpnet", 144), ("ldpnetv2", 144), ("mlp2x_gelu", 576)])
def test_image_token_count(projector, tokens):
    assert image_token_count(projector, 576) == tokens
    assert MobileVLMConfig(projector_type=projector).num_image_tokens == tokens


@pytest.mark.parametrize(("patches", "message"), [(575, "a square grid.*575"), (625, "25 x 25 is odd")])
def test_downsampling_needs_an_even_square(patches, message):
    with pytest.raises(ValueError, match=message):
        image_token_count("ldpnet", patches)
    assert image_token_count("linear", patches) == patches


def test_unknown_projector():
    with pytest.raises(ValueError, match="'mlp3x_gelu' is not supported; supported: ldpnet, ldpnetv2, mlp2x_gelu, lin"):
        build_projector("mlp3x_gelu", 8, 8)


# -- the language model -----------------------------------------------------------------------------------------------

LLAMAS = {
    "heads of 64, rope_theta 5e5": Sizes(
        hidden_size=128, num_attention_heads=2, num_key_value_heads=2, head_dim=64, rope_theta=500000.0
    ),
    "heads of 128, grouped": Sizes(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=128),
    "heads of 80, as in 3B": Sizes(
        hidden_size=160, num_attention_heads=2, num_key_value_heads=2, head_dim=80, num_hidden_layers=3
    ),
    "one key head, large eps": Sizes(
        hidden_size=256, num_attention_heads=8, num_key_value_heads=1, head_dim=32, rms_norm_eps=1e-2
    ),
}


@pytest.fixture(params=LLAMAS, scope="module")
def llama(request, tmp_path_factory) -> tuple[RandomCheckpoint, MobileVLM, transformers.LlamaForCausalLM]:
    checkpoint = RandomCheckpoint.make(LLAMAS[request.param])
    model = load_written(checkpoint, tmp_path_factory.mktemp("llama"))
    return checkpoint, model, transformers_llama(checkpoint)


@pytest.mark.parametrize("length", [1, 2, 37])
def test_language_model_equals_transformers(llama, length):
    checkpoint, model, oracle = llama
    ids = token_ids(checkpoint.sizes, length, sequences=2)
    assert torch.equal(model.embed_tokens(ids), oracle.get_input_embeddings()(ids))
    assert_same(model(model.embed_tokens(ids)), oracle(ids).logits)


CAPACITY = 12


@pytest.mark.parametrize("attention_op", ATTENTION_OPS)
@pytest.mark.parametrize("prompt", [1, 2, 5, CAPACITY - 1, CAPACITY])
def test_text_decoder_with_cache_equals_transformers(llama, prompt, attention_op):
    """A prompt at once, then token by token up to the last position of the cache."""
    checkpoint, model, oracle = llama
    ids = token_ids(checkpoint.sizes, CAPACITY)
    expected = oracle(ids).logits
    embeddings = model.embed_tokens(ids)
    decoder = TextDecoder(model.language_model, CAPACITY, attention_op=attention_op)
    for cache in decoder.caches:  # on a device the cache begins with whatever was in memory
        cache.key.fill_(torch.nan)
        cache.value.fill_(torch.nan)

    position = 0
    for count in [prompt] + [1] * (CAPACITY - prompt):
        logits = decoder(embeddings[:, position : position + count], torch.tensor([position]))
        position += count
        assert_same(logits, expected[:, position - min(count, LOGIT_POSITIONS) : position])


@pytest.mark.parametrize("count", [1, 3, 8, 100])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 100])
def test_logits_of_the_last_positions(llama, length, count):
    """They are those of a decoder that gives one position at a time, and transformers'."""
    checkpoint, model, oracle = llama
    ids = token_ids(checkpoint.sizes, length)
    embeddings = model.embed_tokens(ids)
    rows = TextDecoder(model.language_model, length, logit_positions=count)(embeddings, torch.tensor([0]))
    assert_same(rows, oracle(ids).logits[:, -count:])
    single = TextDecoder(model.language_model, length, logit_positions=1)
    one_by_one = [single(embeddings[:, i : i + 1], torch.tensor([i])) for i in range(length)]
    assert all(logits.shape[1] == 1 for logits in one_by_one)
    assert_same(rows, torch.cat(one_by_one[-count:], dim=1))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 256])
def test_indices_of_the_last_positions(length):
    assert torch.equal(last_positions(length, 8), torch.arange(length)[-8:])


def test_text_decoder_in_chunks_and_from_the_start_again(llama):
    checkpoint, model, oracle = llama
    decoder = TextDecoder(model.language_model, CAPACITY)
    for length, chunks in ((CAPACITY, (5, 1, 4, 2)), (7, (3, 4))):
        ids = token_ids(checkpoint.sizes, length)
        expected = oracle(ids).logits
        position = 0
        for count in chunks:
            embeddings = model.embed_tokens(ids[:, position : position + count])
            logits = decoder(embeddings, torch.tensor([position]))
            position += count
            assert_same(logits, expected[:, position - min(count, LOGIT_POSITIONS) : position])


@pytest.mark.parametrize(("kv_type", "least_db"), [("fp16", 60), ("int8", 35)])
def test_what_a_smaller_cache_costs(kv_type, least_db):
    """Of the demo model, whose keys and values are a trained model's: logits of a prompt and of steps after it."""
    checkpoint = open_checkpoint(str(demo.CHECKPOINT))
    model = checkpoint.load_model().language_model
    ids = torch.randint(3, checkpoint.config.text.vocab_size, (1, 200), generator=torch.Generator().manual_seed(0))
    embeddings = model.embed_tokens(ids)

    def logits(kv_type: str) -> Tensor:
        decoder = TextDecoder(model, 200, kv_type)
        rows = [decoder(embeddings[:, :180], torch.tensor([0]))]
        rows += [decoder(embeddings[:, i : i + 1], torch.tensor([i])) for i in range(180, 200)]
        return torch.cat(rows, dim=1)

    expected = logits("fp32")
    assert least_db <= snr_db(expected, logits(kv_type)) < 120


def test_text_decoder_refuses_what_does_not_fit(llama):
    checkpoint, model, _ = llama
    decoder = TextDecoder(model.language_model, CAPACITY)
    embeddings = model.embed_tokens(token_ids(checkpoint.sizes, 2))
    for start in (-1, CAPACITY - 1, CAPACITY):
        with pytest.raises((ValueError, IndexError)):
            decoder(embeddings, torch.tensor([start]))
    limit = checkpoint.sizes.max_position_embeddings
    for capacity in (0, limit + 1):
        with pytest.raises(ValueError, match=f"max_context_len {capacity} is not in 1 .. {limit} .max_position_embed"):
            TextDecoder(model.language_model, capacity)
    with pytest.raises(ValueError, match="logit_positions 0 is below 1"):
        TextDecoder(model.language_model, CAPACITY, logit_positions=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 16 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
    ],
)
def test_impossible_text_config(change, message):
    with pytest.raises(ValueError, match=message):
        MobileLlamaConfig(**change)


# -- pictures as bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(28, 28), (28, 21), (21, 28), (27, 28), (1, 28), (5, 4), (1, 1)])
def test_picture_input_equals_the_image_processor(size):
    """Of pictures that need no resizing; wide, high, small, with odd borders."""
    processing = ImageProcessing(28, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), (122, 116, 104), 16)
    picture = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(0)).byte()
    square = Image.new("RGB", (28, 28), processing.pad_color)
    square.paste(Image.fromarray(picture.numpy()), ((28 - size[0]) // 2, (28 - size[1]) // 2))
    ours = PictureInput(28, processing.mean, processing.std, processing.pad_color)(picture.permute(2, 0, 1))
    torch.testing.assert_close(ours, preprocess(square, processing), atol=1e-6, rtol=1e-6)


# -- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_tower", [False, True], ids=["tower beside", "tower within"])
def test_llava_equals_transformers(own_tower, tmp_path):
    """LLaVA is MobileVLM with another projector: logits of a prompt with a picture in it, and the features."""
    sizes = Sizes(projector="mlp2x_gelu", num_hidden_layers=2, vision_num_hidden_layers=3)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes.vision()),
        text_config=transformers_llama_config(sizes),
        image_token_index=sizes.vocab_size - 1,
        image_seq_length=sizes.num_patches,
        attn_implementation="eager",
    )
    oracle = transformers.LlavaForConditionalGeneration(config).eval()
    checkpoint = RandomCheckpoint.make(sizes, own_tower)
    oracle.model.vision_tower.load_state_dict(checkpoint.tower)
    oracle.lm_head.weight.copy_(checkpoint.language["lm_head.weight"])
    oracle.model.language_model.load_state_dict(
        {name[len("model.") :]: tensor for name, tensor in checkpoint.language.items() if name != "lm_head.weight"}
    )
    oracle.model.multi_modal_projector.load_state_dict(
        {f"linear_{1 + (key[0] == '2')}{key[1:]}": tensor for key, tensor in checkpoint.projector.items()}
    )
    model = load_written(checkpoint, tmp_path)

    x = pixels(sizes)
    before, after = torch.tensor([[1, 17, 4]]), torch.tensor([[5, 6, 7, 8, 9]])
    image = torch.full((1, sizes.num_patches), config.image_token_index)
    embeddings = torch.cat([model.embed_tokens(before), model.encode_image(x), model.embed_tokens(after)], dim=1)
    theirs = oracle(input_ids=torch.cat([before, image, after], dim=1), pixel_values=x)
    assert_same(model.encode_image(x), theirs.image_hidden_states.reshape(1, -1, sizes.hidden_size))
    assert_same(model(embeddings), theirs.logits)
