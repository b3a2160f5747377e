"""Real widths, few layers: float32 against transformers, and the lowered program against quantized eager.

How close can a file be to quantized eager? Each operator of it alone gives what PyTorch gives, to 1e-6. But activations
are rounded to 8 bits, and where a value lies on the edge between two steps, the last bit of a float decides. A noise of
e before such a rounding, of step s, moves a share e / s of the values by s: its power becomes e * s. So one value in a
million that falls to the other side (-63 dB of a token) is -48 dB after the next linear and -36 dB after the one behind
that: within a layer or two the noise of rounding, 30 to 45 dB below the signal, is another one, whoever computes.
Quantized eager itself is no closer to itself when its input changes by the last bit. Hence two tests: whole methods
must be as close to eager as eager is to itself, and no noisier than eager; and pieces (a block, a projector, a decoder
layer) on equal inputs must agree to 40 dB, or where that is less, to the noise of rounding: two computations whose
roundings have nothing in common are 3 dB further from each other than from what they would compute without rounding.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from executorch.runtime import Runtime
from rounding import last_bits, nudged, two_roundings, unrounded
from torch import Tensor, nn

from mvlm.export import demo
from mvlm.export.assemble import assemble
from mvlm.export.capture import CapturedMethod, capture
from mvlm.export.checkpoint import Checkpoint, open_checkpoint, random_checkpoint
from mvlm.export.contract import TEXT_DECODER, TOKEN_EMBEDDING, VISION_ENCODER
from mvlm.export.lower import Lowered, lower_program
from mvlm.export.models import LOGIT_POSITIONS, MobileVLM, TextDecoder
from mvlm.export.package import describe, write_pte
from mvlm.export.preprocess import load_image, pad_to_square, preprocess
from mvlm.export.progress import Progress
from mvlm.export.quantize import quantize, quantize_checkpoint
from mvlm.export.recipe import Recipe
from mvlm.export.spool import Spool
from mvlm.ops.native import load_native_library
from mvlm.runtime.fidelity import snr_db

pytestmark = pytest.mark.filterwarnings("ignore:Mutation on a buffer")  # the KV cache; it is meant

#: Largest difference from transformers in float32, on outputs of the order of 1.
TOLERANCE = 1e-3

#: The vocabulary is no width. This one is quicker than the real 32000.
VOCAB_SIZE = 8000


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
    gc.collect()  # models are large here


# -- float32 against transformers -------------------------------------------------------------------------------------


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert 0.1 < theirs.std() < 100
    assert (ours - theirs).abs().max() <= TOLERANCE


def llama_config(checkpoint: Checkpoint) -> transformers.LlamaConfig:
    text = checkpoint.config.text
    return transformers.LlamaConfig(
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        vocab_size=text.vocab_size,
        max_position_embeddings=text.max_position_embeddings,
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
    )


def clip_config(checkpoint: Checkpoint) -> transformers.CLIPVisionConfig:
    vision = checkpoint.config.vision
    return transformers.CLIPVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_hidden_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        layer_norm_eps=vision.layer_norm_eps,
        hidden_act=vision.hidden_act,
    )


def fill(oracle: nn.Module, checkpoint: Checkpoint, name_of: Callable[[str], str | None]) -> None:
    """Puts a checkpoint's weights into transformers' model.

    Args:
        name_of: our name of one of its parameters; None for one that nothing of ours reads.
    """
    for name, parameter in oracle.named_parameters():
        if (ours := name_of(name)) is not None:
            # The patches' convolution is a linear of ours.
            parameter.copy_(checkpoint.read(ours).reshape(parameter.shape))


def vision_name(name: str, num_blocks: int) -> str | None:
    """Our name of a parameter of CLIPVisionModel; the last block and the norm behind it are dead."""
    if name.startswith(("post_layernorm.", f"encoder.layers.{num_blocks - 1}.")):
        return None
    return f"vision_tower.{name}"


def saved(oracle: nn.Module, folder: Path) -> Checkpoint:
    """What transformers writes of it, in float16, opened by us. The values are float16 already."""
    copy.deepcopy(oracle).half().save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((demo.CHECKPOINT / "tokenizer.model").read_bytes())
    return open_checkpoint(str(folder))


def test_vision_tower_equals_transformers():
    """ViT-L/14 at 336 pixels, two blocks of three."""
    checkpoint = random_checkpoint("mobilevlm-1.7b", vision_num_hidden_layers=3, num_hidden_layers=1, vocab_size=600)
    oracle = transformers.CLIPVisionModel(clip_config(checkpoint)).eval()
    fill(oracle, checkpoint, lambda name: vision_name(name.removeprefix("vision_model."), 3))
    tower = checkpoint.load_model().vision_tower
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    theirs = oracle(pixels, output_hidden_states=True).hidden_states
    assert len(theirs) == 4
    assert theirs[-2].shape == (1, 577, 1024)
    assert_same(tower(pixels), theirs[-2][:, 1:])


@pytest.mark.parametrize(
    ("name", "head_dim"), [("mobilellama-1.4b", 128), ("mobilellama-2.7b", 80)], ids=["1.4B", "2.7B"]
)
def test_language_model_equals_transformers(name, head_dim, tmp_path):
    """A prompt at once, and through the cache as prefill and steps; the weights go through transformers' files."""
    source = random_checkpoint(name, num_hidden_layers=1, vocab_size=VOCAB_SIZE)
    assert source.config.text.head_dim == head_dim
    oracle = transformers.LlamaForCausalLM(llama_config(source)).eval()
    fill(oracle, source, lambda theirs: f"language_model.{theirs.removeprefix('model.')}")
    model = saved(oracle, tmp_path).load_model()

    prompt, steps = 32, 4
    ids = torch.randint(0, VOCAB_SIZE, (1, prompt + steps), generator=torch.Generator().manual_seed(0))
    theirs = oracle(ids[:, :prompt], use_cache=True)
    embeddings = model.embed_tokens(ids)
    assert_same(model(embeddings[:, :prompt]), theirs.logits)
    decoder = TextDecoder(model.language_model, prompt + steps)
    assert_same(decoder(embeddings[:, :prompt], torch.tensor([0])), theirs.logits[:, -LOGIT_POSITIONS:])
    for position in range(prompt, prompt + steps):
        one = slice(position, position + 1)
        theirs = oracle(ids[:, one], past_key_values=theirs.past_key_values, use_cache=True)
        assert_same(decoder(embeddings[:, one], torch.tensor([position])), theirs.logits)


@pytest.mark.parametrize(
    "sizes",
    [
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "vocab_size": VOCAB_SIZE,
        },
        pytest.param({"vocab_size": 32064}, marks=pytest.mark.large),
    ],
    ids=["2048", "4096"],
)
def test_llava_equals_transformers(sizes, sample_image, tmp_path):
    """A prompt with a picture of 576 tokens in it; 4096 is LLaVA-1.5-7B's width."""
    source = random_checkpoint("llava-1.5-7b", num_hidden_layers=1, vision_num_hidden_layers=3, **sizes)
    image_token = source.config.text.vocab_size - 1
    oracle = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=clip_config(source),
            text_config=llama_config(source),
            image_token_index=image_token,
            image_seq_length=576,
        )
    ).eval()

    def name_of(name: str) -> str | None:
        name = name.removeprefix("model.")
        if name.startswith("vision_tower."):
            return vision_name(name.removeprefix("vision_tower.").removeprefix("vision_model."), 3)
        name = name.replace("multi_modal_projector.linear_1", "mm_projector.0")
        name = name.replace("multi_modal_projector.linear_2", "mm_projector.2")
        return f"language_model.{name}" if name.startswith("lm_head.") else name

    fill(oracle, source, name_of)
    checkpoint = saved(oracle, tmp_path)
    model = checkpoint.load_model()
    image = describe(checkpoint, Recipe()).image
    assert image.tokens == 576

    picture = load_image(sample_image)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size=336, image_mean=list(image.mean), image_std=list(image.std)
    )
    their_pixels = processor(pad_to_square(picture, image.pad_color), return_tensors="pt")["pixel_values"]
    before, after = torch.tensor([[1, 319, 1356, 2990]]), torch.tensor([[2987, 13, 5618, 338, 7997]])
    ids = torch.cat([before, torch.full((1, 576), image_token), after], dim=1)
    theirs = oracle(input_ids=ids, pixel_values=their_pixels)
    features = model.encode_image(preprocess(picture, image))
    assert_same(features, theirs.image_hidden_states.reshape(1, 576, -1))
    embeddings = torch.cat([model.embed_tokens(before), features, model.embed_tokens(after)], dim=1)
    assert_same(model(embeddings), theirs.logits)


# -- the lowered program against quantized eager ----------------------------------------------------------------------

#: SNR in dB that a piece must reach on the inputs of quantized eager, unless the noise of rounding is more.
MIN_PIECE_SNR = 40.0
#: The same of pieces in which few roundings follow one another, or whose noise is small beside a residual.
MIN_SIMPLE_PIECE_SNR = 60.0
#: By how much a whole method may be further from eager than eager is from itself, and from what it would compute if
#: activations were not rounded.
REPEATABILITY_MARGIN = 3.0
NOISE_MARGIN = 0.5

TEXT_STEPS = 4
MAX_CONTEXT_LEN = 256
#: The tokens around the picture.
TEXT_LENGTHS = (35, 15)


@dataclass
class AtWidth:
    """A checkpoint's methods lowered, whole and in pieces, and the eager model beside them.

    Attributes:
        path: of the .pte.
        checkpoint: that was lowered.
        model: the same, quantized for eager execution.
        smooth: the same weights, dequantized: activations are not rounded.
    """

    path: Path
    checkpoint: Checkpoint
    model: MobileVLM
    smooth: MobileVLM

    def method(self, name: str) -> Callable[..., Tensor]:
        # A program each: ExecuTorch's Python runtime lets methods of one program share their planned memory.
        program = Runtime.get().load_program(self.path)
        method = program.load_method(name)

        def run(*inputs: Tensor, _program: Any = program) -> Tensor:
            return method.execute([tensor.contiguous() for tensor in inputs])[0].clone()

        return run

    def layer(self, name: str) -> Callable[..., Tensor]:
        """Of a layer, the token stream with all that the layer adds to it."""
        hidden, branch = self.method(f"{name}.hidden"), self.method(f"{name}.branch")
        return lambda *inputs: hidden(*inputs) + branch(*inputs)


def slices(method: CapturedMethod) -> Iterator[CapturedMethod]:
    """Each piece of a method as a method of its own, of a stack each layer."""
    for piece in method.pieces:
        for index, layer in enumerate(piece.layers):
            part = replace(piece, layers=(layer,))
            for output in piece.outputs:
                yield CapturedMethod(f"{piece.name}.{index}.{output}", (part,), piece.inputs, output)
        if not piece.layers and piece.name != "text_head":  # which only makes zeros
            yield CapturedMethod(piece.name, (piece,), piece.inputs, piece.outputs[0])


def lower_at_width(name: str, methods: set[str], folder: Path, **sizes: int) -> AtWidth:
    """Through the exporter's stages: each piece is lowered once, and the method assembled whole and in slices."""
    checkpoint = random_checkpoint(name, **sizes)
    recipe = Recipe(max_context_len=MAX_CONTEXT_LEN)
    programs = {}
    path = folder / "x.pte"
    with torch.no_grad():
        with Spool(folder) as spool:
            quantized = quantize_checkpoint(checkpoint, recipe, spool, Progress(quiet=True))
            for method in capture(quantized):
                if method.name in methods:
                    pieces = tuple(replace(p, program=lower_program(method.name, p.program)[0]) for p in method.pieces)
                    method = replace(method, pieces=pieces)
                    programs[method.name] = assemble(method)
                    if len(pieces) > 1:
                        programs |= {part.name: assemble(part) for part in slices(method)}
            write_pte(Lowered(programs, ()), {}, path)
        model = checkpoint.load_model()
        quantize(model, recipe)
        smooth = unrounded(model, checkpoint)
    load_native_library()
    return AtWidth(path, checkpoint, model, smooth)


@pytest.fixture(scope="module")
def v1(tmp_path_factory) -> AtWidth:
    """MobileVLM-1.7B V1's width, two layers in each stack."""
    methods = {VISION_ENCODER, TOKEN_EMBEDDING, TEXT_DECODER}
    sizes = {"vision_num_hidden_layers": 3, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE}
    return lower_at_width("mobilevlm-1.7b", methods, tmp_path_factory.mktemp("v1"), **sizes)


@pytest.fixture(scope="module")
def v2(tmp_path_factory) -> AtWidth:
    """The vision half of V2's; its language model is V1's."""
    sizes = {"vision_num_hidden_layers": 3, "num_hidden_layers": 1, "intermediate_size": 256, "vocab_size": 600}
    return lower_at_width("mobilevlm-v2-1.7b", {VISION_ENCODER}, tmp_path_factory.mktemp("v2"), **sizes)


def random_pixels(seed: int) -> Tensor:
    return torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(seed))


def prompt_and_steps(at: AtWidth) -> list[tuple[Tensor, Tensor]]:
    """Calls of text_decoder: a prompt with a picture in it, 194 positions, then single tokens."""
    before, after = TEXT_LENGTHS
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, at.checkpoint.config.text.vocab_size, (1, before + after + TEXT_STEPS), generator=generator)
    tokens = at.model.embed_tokens(ids)
    features = at.model.encode_image(random_pixels(0))
    prompt = torch.cat([tokens[:, :before], features, tokens[:, before : before + after]], dim=1)
    assert prompt.shape[1] == 194
    calls = [(prompt, torch.tensor([0]))]
    for index in range(TEXT_STEPS):
        calls.append((tokens[:, before + after + index][:, None], torch.tensor([194 + index])))
    return calls


def recorded(watched: dict[str, nn.Module], run: Callable[[], object]) -> dict[str, list]:
    """Arguments and result of each call of the watched modules while ``run`` runs."""
    calls: dict[str, list] = {name: [] for name in watched}
    hooks = [
        child.register_forward_hook(lambda _, inputs, output, name=name: calls[name].append((inputs, output)))
        for name, child in watched.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@pytest.mark.parametrize("which", ["v1", "v2"])
def test_pieces_of_the_vision_encoder(which, request):
    at: AtWidth = request.getfixturevalue(which)
    tower = at.model.vision_tower
    watched = {
        "vision_tower.encoder.layers.0": tower.encoder.layers[0],
        "vision_tower.encoder.layers.1": tower.encoder.layers[1],
        "vision_tail": at.model.mm_projector,
    }
    pixels = random_pixels(1)
    calls = recorded(watched, lambda: at.model.encode_image(pixels))

    def head(model: MobileVLM, x: Tensor) -> Tensor:
        return model.vision_tower.pre_layrnorm(model.vision_tower.embeddings(x))

    check_piece(
        f"{which} vision_head",
        MIN_SIMPLE_PIECE_SNR,
        expected=head(at.model, pixels),
        again=head(at.model, nudged(pixels)),
        smooth=head(at.smooth, pixels),
        actual=at.method("vision_head")(pixels),
    )
    for index, name in enumerate(("vision_tower.encoder.layers.0", "vision_tower.encoder.layers.1")):
        [(stream, after)] = calls[name]
        check_piece(
            f"{which} {name}",
            MIN_SIMPLE_PIECE_SNR,
            expected=sum(after),
            again=sum(tower.encoder.layers[index](*map(nudged, stream))),
            smooth=sum(at.smooth.vision_tower.encoder.layers[index](*stream)),
            actual=at.layer(name)(*stream),
        )
    # The tail adds up what the last layer leaves, and takes the class token away.
    [((features,), expected)] = calls["vision_tail"]
    check_piece(
        f"{which} vision_tail",
        # The first projector rounds the mean over all tokens, on which all tokens of its result depend.
        MIN_PIECE_SNR if which == "v1" else MIN_SIMPLE_PIECE_SNR,
        expected=expected,
        again=at.model.mm_projector(nudged(features)),
        smooth=at.smooth.mm_projector(features),
        actual=at.method("vision_tail")(*after),
    )


def test_pieces_of_the_text_decoder(v1):
    """Prefill of 194 positions with a picture among them, then steps; each layer fills a cache of its own."""
    decoder, again_decoder, smooth_decoder = (
        TextDecoder(model.language_model, MAX_CONTEXT_LEN, Recipe().kv_cache)
        for model in (v1.model, v1.model, v1.smooth)
    )
    watched = {
        "language_model.layers.0": decoder.layers[0],
        "language_model.layers.1": decoder.layers[1],
        "text_tail": decoder.lm_head,
    }
    inputs = prompt_and_steps(v1)
    calls = recorded(watched, lambda: [decoder(*call) for call in inputs])
    for index, name in enumerate(watched):
        if name == "text_tail":
            method = v1.method(name)
            expected = [logits[None] for _, logits in calls[name]]
            assert [logits.shape[1] for logits in expected] == [LOGIT_POSITIONS] + [1] * TEXT_STEPS
            actual = [method(*after) for _, after in calls["language_model.layers.1"]]
            again = [again_decoder.lm_head(nudged(hidden))[None] for (hidden,), _ in calls[name]]
            smooth = [smooth_decoder.lm_head(hidden)[None] for (hidden,), _ in calls[name]]
        else:
            method, again_layer, smooth_layer = (
                v1.layer(name),
                again_decoder.layers[index],
                smooth_decoder.layers[index],
            )
            expected = [sum(after) for _, after in calls[name]]
            # Token stream, what is to be added, and where it starts; the rotary tables are in the file.
            actual = [method(x, branch, start) for (x, branch, *_, start), _ in calls[name]]
            again = [sum(again_layer(nudged(x), nudged(branch), *rest)) for (x, branch, *rest), _ in calls[name]]
            smooth = [sum(smooth_layer(*arguments)) for arguments, _ in calls[name]]
        assert len(expected) == 1 + TEXT_STEPS
        wanted = MIN_SIMPLE_PIECE_SNR if name == "text_tail" else MIN_PIECE_SNR
        sides = {"expected": expected, "again": again, "smooth": smooth, "actual": actual}
        check_piece(name, wanted, **{side: torch.cat(parts, dim=1) for side, parts in sides.items()})
        # The rounding of a single token falls to the other side as a whole or not at all: another one says nothing.
        for step in range(1, 1 + TEXT_STEPS):
            check_piece(f"{name}, step {step}", wanted, expected[step], None, smooth[step], actual[step])


def check_piece(
    name: str, wanted: float, expected: Tensor, again: Tensor | None, smooth: Tensor, actual: Tensor
) -> None:
    """A piece of the file is ``wanted`` dB from eager's, or as close as rounding lets any right program be.

    Args:
        name: to be told.
        wanted: where hardly any value falls to the other side of a rounding.
        expected: of quantized eager.
        again: the same for inputs whose last bits differ; None if it cannot be relied upon.
        smooth: without rounding of activations.
        actual: of the file.
    """
    least = two_roundings(smooth, expected)
    if again is not None:
        least = max(least, last_bits(expected, again))
    least, snr = min(wanted, least), snr_db(expected, actual)
    print(f"{name}: {snr:.1f} dB, at least {least:.1f}")
    assert snr >= least, name


def assert_as_repeatable(expected: Tensor, again: Tensor, smooth: Tensor, actual: Tensor) -> None:
    """The file's result is as close to eager's as eager's own next to it, and no noisier.

    Args:
        expected: of quantized eager.
        again: the same for inputs whose last bits differ.
        smooth: without rounding of activations.
        actual: of the file.
    """
    noise, repeated = snr_db(smooth, expected), snr_db(expected, again)
    print(
        f"file/eager {snr_db(expected, actual):.1f} dB, eager/eager nudged {repeated:.1f}, "
        f"file/smooth {snr_db(smooth, actual):.1f}, eager/smooth {noise:.1f}"
    )
    assert snr_db(expected, actual) >= min(MIN_PIECE_SNR, repeated - REPEATABILITY_MARGIN)
    assert snr_db(smooth, actual) >= noise - NOISE_MARGIN


@pytest.mark.parametrize("which", ["v1", "v2"])
def test_vision_encoder_as_a_whole(which, request):
    at: AtWidth = request.getfixturevalue(which)
    pixels = random_pixels(2)
    again, smooth = at.model.encode_image(nudged(pixels)), at.smooth.encode_image(pixels)
    assert_as_repeatable(at.model.encode_image(pixels), again, smooth, at.method(VISION_ENCODER)(pixels))


def test_token_embedding_is_the_same(v1):
    ids = torch.randint(0, VOCAB_SIZE, (1, MAX_CONTEXT_LEN), generator=torch.Generator().manual_seed(0))
    assert torch.equal(v1.method(TOKEN_EMBEDDING)(ids), v1.model.embed_tokens(ids))


def test_text_decoder_as_a_whole(v1):
    calls = prompt_and_steps(v1)

    def run(decoder: Callable[[Tensor, Tensor], Tensor], change: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        return torch.cat([decoder(change(x), start) for x, start in calls], dim=1)

    def eager(model: MobileVLM) -> TextDecoder:
        return TextDecoder(model.language_model, MAX_CONTEXT_LEN, Recipe().kv_cache)

    expected, again, smooth = run(eager(v1.model)), run(eager(v1.model), nudged), run(eager(v1.smooth))
    assert_as_repeatable(expected, again, smooth, run(v1.method(TEXT_DECODER)))
