"""Calibration: streams are the model, results do not depend on interruptions, and answers are better for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from mvlm.export import demo
from mvlm.export import streamed_model as streaming
from mvlm.export.calibrate import CalibrationOptions, calibrate, work_folder
from mvlm.export.calibrate import calibrate as run_calibrate
from mvlm.export.calibrate.branches import (
    Moments,
    Stream,
    decoder_branches,
    encoder_branches,
    fake_quantized_activations,
    pass_branch,
)
from mvlm.export.calibrate.data import WINDOW, picture_questions, text_windows
from mvlm.export.calibrate.sample import Prompt, continue_prompts
from mvlm.export.calibrate.sensitivity import sensitivities, widen
from mvlm.export.checkpoint import Checkpoint, open_checkpoint, random_checkpoint
from mvlm.export.errors import ExportError
from mvlm.export.models import MobileVLM, rope_tables
from mvlm.export.progress import Progress
from mvlm.export.quantize import Scheme, meta_model, quantize, quantize_weight, schemes_of
from mvlm.export.recipe import Recipe
from mvlm.export.smoothing import STRENGTH, Smoothing, find_smoothing, smoothed
from mvlm.export.streamed_model import FloatLanguageModel, read_sequences

#: Of which two query heads share a key-value head.
SMALL_LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1024,
}

QUIET = Progress(quiet=True)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(str(demo.CHECKPOINT))


@pytest.fixture(scope="module")
def float32(checkpoint) -> MobileVLM:
    return checkpoint.load_model()


def inputs_of(checkpoint: Checkpoint, lengths=(20, 33, 7), seed=0) -> list[Tensor]:
    """Embeddings [L, D] of some random texts."""
    generator = torch.Generator().manual_seed(seed)
    table = checkpoint.read("language_model.embed_tokens.weight")
    return [table[torch.randint(3, len(table), (length,), generator=generator)] for length in lengths]


def stream_of(sequences: list[Tensor]) -> Stream:
    return Stream(torch.cat(sequences), torch.cat(sequences), [len(one) for one in sequences])


# ---- streams --------------------------------------------------------------------------------------------------------


def test_rounded_inputs_are_what_a_quantized_linear_sees():
    """Against torchao's linear, which rounds its input itself."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    quantized, _ = quantize_weight(weight, Scheme(4, 32, "search"))
    for shift in (0.0, 3.0, -5.0):  # zero is in the range whatever the values are
        x = torch.randn(10, 64, generator=generator) + shift
        theirs = nn.functional.linear(x, quantized)
        ours = fake_quantized_activations(x) @ quantized.dequantize().T
        assert torch.allclose(ours, theirs, atol=1e-4)
        assert not torch.allclose(x @ quantized.dequantize().T, theirs, atol=1e-3)


def test_streams_are_the_float_and_the_quantized_model(checkpoint, float32):
    """What the whole models compute, that of torchao's tensors too."""
    recipe = Recipe(group_size=32)
    quantized = checkpoint.load_model()
    quantize(quantized, recipe)
    sequences = inputs_of(checkpoint)
    stream = stream_of(sequences)
    cos, sin = rope_tables(64, 33, 10000.0)
    for index, (layer, rounded) in enumerate(
        zip(float32.language_model.layers, quantized.language_model.layers, strict=True)
    ):
        for branch in decoder_branches(layer, cos, sin):

            def weight_of(
                name: str, linear: nn.Linear, moments: Moments | None, rounded: nn.Module = rounded
            ) -> Tensor:
                assert moments is None
                return rounded.get_submodule(name).weight.dequantize()

            pass_branch(stream, layer, branch, weight_of, with_moments=False, with_int8_activations=True)
        assert index < 4
    for model, side in ((float32, stream.float32), (quantized, stream.quantized)):
        llm = model.language_model
        for x, sequence in zip(side.split(stream.lengths), sequences, strict=True):
            expected = llm(sequence[None])[0]
            found = llm.lm_head(llm.norm(x))
            error = (found - expected).square().mean() / expected.square().mean()
            # Rounded inputs fall to either side where they lie between two steps; 30 dB is far from any other model.
            assert error < (1e-9 if model is float32 else 1e-3)
    assert not torch.allclose(stream.float32, stream.quantized, atol=0.01)


def test_streams_of_the_vision_tower(checkpoint, float32):
    pixels = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    tower = float32.vision_tower
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    stream = Stream(x.flatten(0, 1).clone(), x.flatten(0, 1).clone(), [x.shape[1]] * 2)
    for layer in tower.encoder.layers:
        for branch in encoder_branches(layer):
            pass_branch(stream, layer, branch, lambda name, linear, moments: linear.weight, False, False)
    for side in (stream.float32, stream.quantized):
        assert torch.allclose(side.unflatten(0, (2, -1))[:, 1:], tower(pixels), atol=1e-4)


def test_moments_are_sums_over_all_inputs(checkpoint, float32):
    """Z'Z and (X - Z)'Z of what the linears are really given, each token with the same power, in chunks and at once."""
    sequences = inputs_of(checkpoint)
    layer = float32.language_model.layers[0]
    branch = decoder_branches(layer, *rope_tables(64, 33, 10000.0))[1]
    found: dict[str, Moments] = {}

    def remember(name: str, linear: nn.Linear, moments: Moments | None) -> Tensor:
        found[name] = moments
        return linear.weight * 0.9

    def check(moments: Moments, x: Tensor, z: Tensor) -> None:
        power = x.pow(2).mean(1)
        expected = torch.einsum("ti,tj,t->ij", z, z, 1 / power), torch.einsum("ti,tj,t->ij", x - z, z, 1 / power)
        for sums, right in zip((moments.hessian, moments.cross), expected, strict=True):
            assert torch.allclose(sums, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))

    stream = stream_of(sequences)
    stream.quantized += 0.1
    x, z = layer.post_attention_layernorm(stream.float32), layer.post_attention_layernorm(stream.quantized)
    pass_branch(stream, layer, branch, remember, True, False)
    check(found["mlp.gate_up_proj"], x, z)
    x = branch.between(layer.mlp.gate_up_proj(x), [])
    z = branch.between(z @ (layer.mlp.gate_up_proj.weight * 0.9).T, [])
    check(found["mlp.down_proj"], x, z)


def test_no_token_counts_more_than_another():
    """A token of 10,000 times the power of the others would else be all that the sums know; zeros do no harm."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator)
    even, uneven = Moments(16, CPU), Moments(16, CPU)
    even.add(x, x + 0.01)
    scale = torch.ones(64, 1)
    scale[0] = 100
    uneven.add(x * scale, (x + 0.01) * scale)
    uneven.add(torch.zeros(3, 16), torch.zeros(3, 16))
    for moments in (even, uneven):
        moments.finish()
    assert torch.allclose(uneven.hessian, even.hessian, rtol=1e-4, atol=1e-4)
    assert torch.allclose(uneven.cross, even.cross, rtol=1e-4, atol=1e-4)


def test_no_token_counts_more_than_another_in_quick(checkpoint, tmp_path):
    """Every token has a mean power of 1 in what the search for scales is weighted with."""
    result = run(checkpoint, Recipe(), options_for(tmp_path, "quick"), tmp_path / "x.pte")
    assert len(result.importances) == 4 * 4 + 1
    for name, importance in result.importances.items():
        assert float(importance.mean()) == pytest.approx(1, rel=1e-4), name


# ---- the float model, layer by layer --------------------------------------------------------------------------------


def test_layers_read_when_they_are_needed_are_the_model(checkpoint, float32, monkeypatch):
    """Kept in memory or not; and against transformers, which has the same weights."""
    sequences = inputs_of(checkpoint)
    config = checkpoint.config.text
    theirs = LlamaForCausalLM.from_pretrained(demo.CHECKPOINT, dtype=torch.float32).eval()
    for kept in (0, 1 << 30):
        monkeypatch.setattr(streaming, "KEPT_BYTES", kept)
        model = FloatLanguageModel(checkpoint, CPU)
        for x, sequence in zip(read_sequences(model, sequences), sequences, strict=True):
            logits = model.logits(x)
            assert torch.allclose(logits, float32.language_model(sequence[None])[0], atol=1e-3)
            assert torch.allclose(logits, theirs(inputs_embeds=sequence[None]).logits[0], atol=1e-3)
        assert len(model._kept) == (config.num_hidden_layers if kept else 0)


def test_what_follows_is_drawn_from_the_models_own_distribution(checkpoint, float32, monkeypatch):
    """The same ids as drawing from the whole model's logits, every sequence read anew for each token."""
    monkeypatch.setattr(streaming, "CACHE_TYPE", torch.float32)
    table = checkpoint.read("language_model.embed_tokens.weight")
    texts, pictures = inputs_of(checkpoint, (1, 1, 1)), inputs_of(checkpoint, (12, 9), seed=1)
    groups = [[Prompt(x, 6) for x in texts], [Prompt(x, 9, (2,)) for x in pictures]]
    found = continue_prompts(FloatLanguageModel(checkpoint, CPU), groups, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    flat = [prompt for group in groups for prompt in group]
    sequences = [prompt.embeddings for prompt in flat]
    written: list[list[int]] = [[] for _ in flat]
    for step in range(9):
        logits = torch.stack([float32.language_model(x[None])[0, -1] for x in sequences])
        logits[:3, 2] = -torch.inf  # what ends others does not occur where nothing ends
        tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].tolist()
        for i, token in enumerate(tokens):
            if (
                len(written[i]) == step
                and step < flat[i].new_tokens
                and not (written[i] and written[i][-1] == 2 and i > 2)
            ):
                written[i].append(token)
            sequences[i] = torch.cat([sequences[i], table[token][None]])
        if step == 5:
            # Those that have their tokens are not run on, and draw from equal logits.
            break
    assert [ids[:6] for group in found for ids in group] == [ids[:6] for ids in written]
    assert [len(ids) for ids in found[0]] == [6, 6, 6]
    assert all(len(ids) == 9 or ids[-1] == 2 for ids in found[1])


def test_watching_sees_every_input_of_every_linear(checkpoint, float32):
    seen: dict[str, int] = {}

    def watch(name: str, x: Tensor) -> None:
        seen[name] = seen.get(name, 0) + len(x)

    model = FloatLanguageModel(checkpoint, CPU, watch)
    for x in read_sequences(model, inputs_of(checkpoint)):
        model.logits(x)
    linears = {name for name in schemes_of(meta_model(checkpoint), Recipe()) if name.startswith("language_model.")}
    assert set(seen) == linears - {"language_model.embed_tokens"}
    assert set(seen.values()) == {20 + 33 + 7}


# ---- data -----------------------------------------------------------------------------------------------------------


def write_text(path: Path, words: int = 6000) -> Path:
    """Sentences of the demo's world."""
    generator = torch.Generator().manual_seed(0)
    shapes, colors = ("circle", "square", "triangle", "star"), ("red", "green", "blue", "yellow")
    lines = [
        f"A {colors[c]} {shapes[s]} is at the top left."
        for s, c in torch.randint(0, 4, (words // 8, 2), generator=generator).tolist()
    ]
    path.write_text("\n".join(lines))
    return path


def test_windows_of_text(checkpoint, tmp_path):
    text = write_text(tmp_path / "text.txt")
    data = text_windows(text, checkpoint, 4 * WINDOW, torch.Generator().manual_seed(0))
    assert [len(sequence.pieces[0]) for sequence in data.sequences] == [WINDOW] * 4
    assert {sequence.pieces[0][0] for sequence in data.sequences} == {checkpoint.bos_id}
    assert len({sequence.pieces for sequence in data.sequences}) == 4
    again = text_windows(text, checkpoint, 4 * WINDOW, torch.Generator().manual_seed(0))
    assert again.digest() == data.digest()
    other = text_windows(text, checkpoint, 4 * WINDOW, torch.Generator().manual_seed(1))
    assert other.digest() != data.digest()


def test_pictures_come_in_the_models_template(checkpoint, tmp_path):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "b.png")
    Image.new("RGB", (40, 60), "blue").save(tmp_path / "a.jpg")
    (tmp_path / "b.txt").write_text("What color is it?\tred\n\nIs it <image> red?\n")
    data = picture_questions(tmp_path, checkpoint)
    assert data.pixels.shape == (2, 3, 112, 112)
    assert [sequence.pictures for sequence in data.sequences] == [(0,), (1,), (1,)]
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor(model_proto=checkpoint.tokenizer)
    before, behind = data.sequences[1].pieces
    assert before[0] == checkpoint.bos_id
    assert tokenizer.decode(list(before)).endswith("USER:") or tokenizer.decode(list(before)).endswith("USER: ")
    assert tokenizer.decode(list(behind)).strip() == "What color is it? ASSISTANT: red"
    assert behind[-1] == checkpoint.eos_ids[0]
    assert tokenizer.decode(list(data.sequences[2].pieces[1])).strip() == "Is it red? ASSISTANT:".replace(
        "it red", "it  red"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "none.txt", "no such file"),
        (lambda path: (path / "x.txt", (path / "x.txt").write_bytes(b"\xff\xfe\xff"))[0], "is no UTF-8 text"),
        (lambda path: (path / "x.txt", (path / "x.txt").write_text("short"))[0], r"has \d+ tokens; at least 2048"),
    ],
)
def test_text_that_cannot_be_used(checkpoint, tmp_path, make, message):
    with pytest.raises(ExportError, match=message):
        text_windows(make(tmp_path), checkpoint, 4096, torch.Generator())


def test_pictures_that_cannot_be_used(checkpoint, tmp_path):
    with pytest.raises(ExportError, match="no such folder"):
        picture_questions(tmp_path / "none", checkpoint)
    with pytest.raises(ExportError, match=r"no pictures in it; looked for \.jpg"):
        picture_questions(tmp_path, checkpoint)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(ExportError, match=r"broken\.jpg"):
        picture_questions(tmp_path, checkpoint)


# ---- the whole ------------------------------------------------------------------------------------------------------


def options_for(tmp_path: Path, mode: str = "full", **given) -> CalibrationOptions:
    return CalibrationOptions(mode, write_text(tmp_path / "text.txt"), tokens=2048, **given)


def run(checkpoint: Checkpoint, recipe: Recipe, options: CalibrationOptions, pte: Path, progress: Progress = QUIET):
    recipe = replace(recipe, calibration=options.mode)
    return calibrate(checkpoint, recipe, options, work_folder(checkpoint, recipe, options, pte), progress)


def weights_of(result) -> dict[str, tuple[Tensor, Tensor]]:
    found = {name: result.weight(name) for name in result.schemes}
    return {name: (weight.qdata, weight.scale) for name, weight in found.items() if weight is not None}


def logits_error(checkpoint: Checkpoint, float32: MobileVLM, recipe: Recipe, result, text: Path) -> float:
    """Mean KL of a quantized model to the float one on text that was not calibrated on."""
    model = (result.checkpoint if result else checkpoint).load_model()
    quantize(model, recipe, result)
    windows = text_windows(text, checkpoint, 2048, torch.Generator().manual_seed(9)).sequences
    total = 0.0
    for window in windows:
        ids = torch.tensor(window.pieces[0])[None]
        expected, found = (m(m.embed_tokens(ids))[0].log_softmax(-1) for m in (float32, model))
        total += float((expected.exp() * (expected - found)).sum(-1).mean()) / len(windows)
    return total


def test_answers_are_closer_for_it(checkpoint, float32, tmp_path):
    """GPTQ is far ahead. (What the other kind gains, tests/real sees: the demo was trained to bear being rounded.)"""
    recipe = Recipe(group_size=128)
    text = write_text(tmp_path / "other.txt", 12000)
    options = options_for(tmp_path)
    errors = [logits_error(checkpoint, float32, recipe, None, text)]
    for mode in ("quick", "full"):
        result = run(checkpoint, recipe, replace(options, mode=mode), tmp_path / f"{mode}.pte")
        errors.append(logits_error(checkpoint, float32, recipe, result, text))
    assert errors[1] != errors[0]
    assert errors[2] < 0.5 * min(errors[:2])


class _Watching(Progress):
    """Counts how often each stage says how far it is, and stops the work at the second time of one of them."""

    def __init__(self, stop_in: str = "") -> None:
        super().__init__(quiet=True)
        self.stop_in = stop_in
        self.counts: dict[str, int] = {}

    @contextmanager
    def stage(self, title: str, counts: bool = True) -> Iterator[None]:
        self.title = title
        self.counts[title] = 0
        yield

    def share(self, done: float) -> None:
        self.counts[self.title] += 1
        if self.title == self.stop_in and self.counts[self.title] == 2:
            raise KeyboardInterrupt


def test_goes_on_where_it_was_interrupted(checkpoint, tmp_path):
    """With the same result, bit for bit, and without doing again what was done."""
    recipe = Recipe(group_size=64, bits_budget=0.1)
    options = options_for(tmp_path)
    whole = weights_of(run(checkpoint, recipe, options, tmp_path / "whole.pte"))
    for stage in ("pictures", "the model writes and reads", "where bits matter", "language model"):
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, recipe, options, tmp_path / "parts.pte", _Watching(f"calibrate: {stage}"))
    progress = _Watching()
    parts = weights_of(run(checkpoint, recipe, options, tmp_path / "parts.pte", progress))
    assert whole.keys() == parts.keys()
    for name in whole:
        assert all(torch.equal(a, b) for a, b in zip(whole[name], parts[name], strict=True)), name
    # Two of four layers were left.
    assert list(progress.counts.values()) == [0, 0, 0, 0, 2]


def test_seeds_tell_runs_apart(checkpoint, tmp_path):
    options = options_for(tmp_path)
    first = weights_of(run(checkpoint, Recipe(), options, tmp_path / "a.pte"))
    same = weights_of(run(checkpoint, Recipe(), options, tmp_path / "b.pte"))
    other = weights_of(run(checkpoint, Recipe(), replace(options, seed=1), tmp_path / "c.pte"))
    name = "language_model.layers.2.mlp.down_proj"
    assert torch.equal(first[name][0], same[name][0])
    assert not torch.equal(first[name][0], other[name][0])


def test_the_model_writes_what_it_is_not_given(checkpoint, tmp_path):
    """Texts without an end, and answers about the bundled pictures."""
    options = CalibrationOptions("full", tokens=1024)
    result = run(checkpoint, Recipe(), options, tmp_path / "x.pte")
    written = result.folder.load("written")
    lengths = written["lengths"].tolist()
    assert lengths[:8] == [128] * 8
    assert len(lengths) == 8 + 6
    ids = written["ids"][: 8 * 128]
    assert int((ids == checkpoint.eos_ids[0]).sum()) == 0
    assert len(weights_of(result)) == 4 * 4 + 1


def test_four_bit_vision_is_calibrated_too(checkpoint, float32, tmp_path):
    """And closer for it, on pictures that it was not calibrated on."""
    recipe = Recipe(group_size=64, vision="int4")
    result = run(checkpoint, recipe, options_for(tmp_path), tmp_path / "x.pte")
    pixels = torch.stack([torch.rand(3, 112, 112, generator=torch.Generator().manual_seed(i)) for i in range(4)])
    expected = float32.encode_image(pixels)
    errors = []
    for calibration in (None, result):
        model = checkpoint.load_model()
        quantize(model, recipe, calibration)
        errors.append(float((model.encode_image(pixels) - expected).square().mean()))
    assert {name for name in weights_of(result) if name.startswith("vision_tower.")}
    assert errors[1] < errors[0]


def test_other_peoples_folders_are_not_touched(checkpoint, tmp_path):
    folder = tmp_path / "x.pte.calibration"
    folder.mkdir()
    (folder / "precious").write_text("mine")
    with pytest.raises(ExportError, match="is in the way"):
        run(checkpoint, Recipe(), options_for(tmp_path), tmp_path / "x.pte")
    assert (folder / "precious").read_text() == "mine"


def test_work_of_another_calibration_is_not_taken(checkpoint, tmp_path):
    options = options_for(tmp_path)
    run(checkpoint, Recipe(group_size=64), options, tmp_path / "x.pte")
    fresh = weights_of(run(checkpoint, Recipe(group_size=32), options, tmp_path / "x.pte"))
    assert fresh["language_model.layers.0.mlp.gate_up_proj"][1].shape[1] == 256 // 32


def test_weights_that_are_not_finite_are_an_error(checkpoint, tmp_path, monkeypatch):
    read = Checkpoint.read

    def spoiled(self: Checkpoint, name: str) -> Tensor:
        tensor = read(self, name)
        return tensor * torch.nan if name == "language_model.layers.1.mlp.down_proj.weight" else tensor

    monkeypatch.setattr(Checkpoint, "read", spoiled)
    with pytest.raises(ExportError, match="not finite numbers"):
        run_calibrate(
            checkpoint,
            Recipe(calibration="full"),
            options_for(tmp_path),
            work_folder(checkpoint, Recipe(calibration="full"), options_for(tmp_path), tmp_path / "x.pte"),
            QUIET,
        )


# ---- smoothing ------------------------------------------------------------------------------------------------------


def test_a_smoothed_model_is_the_same_model(checkpoint, float32):
    """Bit for bit, whatever the scales are; with heads that share keys and values, too."""
    generator = torch.Generator().manual_seed(0)
    shared = random_checkpoint("mobilellama-1.4b", **SMALL_LLAMA)
    for one in (checkpoint, shared):
        config = one.config.text
        width = 2 * config.hidden_size + config.num_key_value_heads * config.head_dim + config.intermediate_size
        exponents = torch.randint(-3, 4, (config.num_hidden_layers, width), generator=generator).to(torch.int8)
        other = smoothed(one, Smoothing.read(exponents, config))
        model, changed = one.load_model().language_model, other.load_model().language_model
        x = torch.randn(1, 24, config.hidden_size, generator=generator)
        assert torch.equal(model(x), changed(x))
        for a, b in zip(model.layers, changed.layers, strict=True):
            for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
                assert not torch.equal(a.get_submodule(name).weight, b.get_submodule(name).weight)
        assert other.checkpoint_id == one.checkpoint_id


def test_smoothing_makes_large_inputs_smaller(checkpoint):
    """Of each linear; the powers that the smoothed model's inputs have are closer to each other."""
    config = checkpoint.config.text

    def powers(one: Checkpoint) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        model = FloatLanguageModel(one, CPU, lambda name, x: found.update({name: x.square().mean(0)}))
        read_sequences(model, inputs_of(one, (200,)))
        return found

    def spread(power: Tensor) -> float:
        return float(power.clamp_min(1e-9).log().std())

    before = powers(checkpoint)
    for strength in (STRENGTH, 1.0):
        after = powers(smoothed(checkpoint, find_smoothing(before, config, strength)))
        assert any(not torch.equal(after[name], before[name]) for name in before)
        for name in before:
            if "layers" not in name:
                assert torch.equal(after[name], before[name])
            # Inputs whose powers are less than a step of the scales apart stay as they are.
            elif strength == 1 or not torch.equal(after[name], before[name]):
                assert spread(after[name]) < spread(before[name]), name


def test_smoothing_of_another_model_is_refused(checkpoint):
    with pytest.raises(ExportError, match="made of another checkpoint"):
        Smoothing.read(torch.zeros(4, 7, dtype=torch.int8), checkpoint.config.text)


# ---- bits where they matter -----------------------------------------------------------------------------------------


def test_sensitivities_foretell_what_rounding_one_linear_does(checkpoint, float32, tmp_path):
    """Against the divergence that is seen when each linear is rounded alone."""
    recipe = Recipe(group_size=128)
    schemes = schemes_of(meta_model(checkpoint), recipe)
    windows = text_windows(write_text(tmp_path / "text.txt"), checkpoint, 4096, torch.Generator().manual_seed(0))
    ids = torch.tensor([window.pieces[0] for window in windows.sequences])
    table = float32.language_model.embed_tokens.weight
    stream = stream_of(list(table[ids[:4]]))
    rope = rope_tables(64, WINDOW, 10000.0)
    found = sensitivities(checkpoint, schemes, stream, rope, torch.Generator().manual_seed(0), QUIET)
    expected = float32(table[ids[4:]]).log_softmax(-1)
    seen = {}
    for name in found:
        linear = float32.get_submodule(name)
        weight = linear.weight
        linear.weight = nn.Parameter(
            quantize_weight(weight.detach(), schemes[name])[0].dequantize(), requires_grad=False
        )
        logp = float32(table[ids[4:]]).log_softmax(-1)
        linear.weight = weight
        seen[name] = float((expected.exp() * (expected - logp)).sum(-1).mean())
    ranks = [torch.tensor(list(values)).argsort().argsort().double() for values in (found.values(), seen.values())]
    correlation = float(torch.corrcoef(torch.stack(ranks))[0, 1])
    assert correlation > 0.7
    assert 0.2 < sum(found.values()) / sum(seen.values()) < 5


def test_bits_go_where_most_damage_per_byte_comes_from():
    schemes = {name: Scheme(4, 32, "search") for name in "abcd"}
    shapes = {
        "a": torch.Size([64, 64]),
        "b": torch.Size([64, 64]),
        "c": torch.Size([128, 64]),
        "d": torch.Size([64, 64]),
    }
    nats = {"a": 1.0, "b": 3.0, "c": 5.0, "d": 0.1}
    all_bytes = 5 * 64 * 64 * 4.5 / 8
    extra = 64 * 64 * (8 - 4.5) / 8 + 64 * 4
    assert widen(nats, schemes, shapes, 0.0) == ()
    assert widen(nats, schemes, shapes, extra / all_bytes + 1e-6) == ("b",)
    assert widen(nats, schemes, shapes, 3 * extra / all_bytes + 1e-6) == ("b", "c")
    # What is too large for the rest of the budget is passed over.
    assert widen(nats, schemes, shapes, 2 * extra / all_bytes + 1e-6) == ("a", "b")
    assert widen(nats, schemes, shapes, 1.0) == ("a", "b", "c", "d")
