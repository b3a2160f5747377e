"""The .pte correctness test passes a healthy file and fails every kind of unfaithful one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvlm.export.calibrate import CalibrationOptions
from mvlm.export.checkpoint import MOBILEVLM_TEMPLATE, open_checkpoint, random_checkpoint
from mvlm.export.pipeline import export_checkpoint
from mvlm.export.preprocess import load_image
from mvlm.export.recipe import Recipe, mobile
from mvlm.export.stored_weights import read_stored_linears
from mvlm.runtime import PteProgram
from mvlm.runtime.fidelity import (
    DB_MARGIN,
    KL_FLOOR,
    LEAST_REACHABLE,
    Noise,
    check,
    compare_free,
    compare_logits,
    cosine,
    divergence,
    nudged,
    reachable,
    snr_db,
)
from mvlm.runtime.test_pte import main

#: Rows that look at the weights, not at what the file says about itself.
NUMERIC_ROWS = ("vision features", "token embeddings", "prefill logits", "forced tokens", "forced logits")


def run(capsys: pytest.CaptureFixture[str], pte: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code of the command line, its report, and the line that names the failed rows."""
    code = main([str(pte), "--quiet", *arguments])
    report = capsys.readouterr().out
    return code, report, report.strip().splitlines()[-1]


def failed_rows(models, pte: Path, image: Path) -> list[str]:
    """Names of the rows that fail for a file."""
    rows = check(
        PteProgram(pte),
        models.checkpoint,
        mobile(),
        load_image(image),
        "Describe the image.",
    )
    return [f"{row.name} ({row.compared})" for row in rows if not row.passed]


@pytest.fixture
def tampered(demo_pte: Path, tmp_path: Path) -> Callable[[Callable[[bytearray], None]], Path]:
    """Makes a copy of the demo .pte with some of its bytes changed."""

    def make(change: Callable[[bytearray], None]) -> Path:
        data = bytearray(demo_pte.read_bytes())
        change(data)
        path = tmp_path / "tampered.pte"
        path.write_bytes(data)
        return path

    return make


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def packed_int4(values: Tensor) -> bytes:
    """4-bit weights as XNNPACK's serializer writes them: two in a byte, offset by 8, the even column below."""
    unsigned = (values + 8).to(torch.uint8)
    return raw_bytes(unsigned[:, 0::2] | (unsigned[:, 1::2] << 4))


def find(data: bytearray, needle: bytes) -> int:
    """The offset of bytes that must be in the file exactly once."""
    assert data.count(needle) == 1
    return data.find(needle)


def replace_everywhere(data: bytearray, needle: bytes, other: bytes) -> None:
    """Once, or twice: an 8-bit lm_head that is tied to the embedding is in the file a second time, as the embedding."""
    assert len(needle) == len(other)
    assert data.count(needle) in (1, 2)
    data[:] = data.replace(needle, other)


def swap(data: bytearray, first: bytes, second: bytes) -> None:
    assert len(first) == len(second)
    at_first, at_second = find(data, first), find(data, second)
    data[at_first : at_first + len(first)] = second
    data[at_second : at_second + len(second)] = first


def test_passes_the_demo_file(capsys, demo_pte):
    code, report, verdict = run(capsys, demo_pte)
    assert code == 0, report
    assert "FAILED" not in report
    assert "faithful" in verdict
    for name in (*NUMERIC_ROWS, "pixels", "free tokens", "tokenizer"):
        assert name in report


def test_passes_with_another_picture_and_question(capsys, demo_pte, tmp_path):
    from PIL import Image

    picture = tmp_path / "wide.png"
    Image.linear_gradient("L").resize((301, 77)).convert("RGB").save(picture)
    code, report, _ = run(capsys, demo_pte, "--image", str(picture), "--prompt", "How many shapes are there?")
    assert code == 0, report


def test_fails_when_two_layers_are_swapped(tampered, models, sample_image):
    layers = models.quantized.language_model.layers

    def swap_layers(data: bytearray) -> None:
        first, second = dict(layers[1].named_modules()), dict(layers[2].named_modules())
        names = [name for name, module in first.items() if isinstance(module, torch.nn.Linear)]
        assert len(names) == 4
        for name in names:
            swap(data, packed_int4(first[name].weight.qdata), packed_int4(second[name].weight.qdata))
            swap(data, raw_bytes(first[name].weight.scale), raw_bytes(second[name].weight.scale))

    assert "prefill logits (pte/quantized)" in failed_rows(models, tampered(swap_layers), sample_image)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("language_model.layers.0.mlp.down_proj", "prefill logits (pte/quantized)"),
        ("language_model.lm_head", "prefill logits (pte/quantized)"),
        ("vision_tower.encoder.layers.3.mlp.fc1", "vision features (pte/quantized)"),
    ],
)
def test_fails_when_the_scales_of_one_tensor_are_doubled(tampered, models, sample_image, name, row):
    scale = models.quantized.get_submodule(name).weight.scale

    def double(data: bytearray) -> None:
        replace_everywhere(data, raw_bytes(scale), raw_bytes(scale * 2))

    assert row in failed_rows(models, tampered(double), sample_image)


@pytest.mark.parametrize(
    ("where", "row"),
    [
        ("language_model.layers.3.mlp.gate_up_proj", "prefill logits (pte/quantized)"),
        ("language_model.embed_tokens", "token embeddings (pte/quantized)"),
        ("vision_tower.encoder.layers.0.mlp.fc2", "vision features (pte/quantized)"),
    ],
)
def test_fails_when_2000_bytes_are_flipped(tampered, models, sample_image, where, row):
    weight = models.quantized.get_submodule(where).weight
    stored = packed_int4(weight.qdata) if "layers.3" in where else raw_bytes(weight.qdata)

    def flip(data: bytearray) -> None:
        flipped = bytes(byte ^ 0xFF for byte in stored[:2000])
        replace_everywhere(data, stored, flipped + stored[2000:])

    assert row in failed_rows(models, tampered(flip), sample_image)


def test_fails_when_the_scales_of_one_head_are_off_by_2_percent(tampered, models, sample_image):
    """Too little for any logit to tell; the weights themselves do, by a digest and against the checkpoint."""
    scale = models.quantized.language_model.layers[2].self_attn.qkv_proj.weight.scale
    changed = scale.clone()
    changed[64:128] = (changed[64:128].float() * 1.02).to(scale.dtype)
    assert not torch.equal(changed[64:128], scale[64:128])

    def change(data: bytearray) -> None:
        replace_everywhere(data, raw_bytes(scale), raw_bytes(changed))

    failed = failed_rows(models, tampered(change), sample_image)
    assert {"weights (pte/export)", "weights (pte/checkpoint)"} <= set(failed)


def test_a_calibrated_file_is_known_by_its_digest(capsys, demo_checkpoint, tmp_path):
    """Its weights cannot be made anew in a moment; what they were after calibration, the file says."""
    path = tmp_path / "calibrated.pte"
    recipe = replace(mobile(), calibration="full", bits_budget=0.1)
    options = CalibrationOptions("full", tokens=1024)
    export_checkpoint(open_checkpoint(str(demo_checkpoint)), path, recipe, calibration=options)
    assert not path.with_name(f"{path.name}.calibration").exists()
    code, report, _ = run(capsys, path, "--engine", "llava_main")
    assert code == 0, report
    assert "llava_main's tokens" in report
    linears = read_stored_linears(path)["text_decoder"]
    assert {linear.group_size for linear in linears[:-1]} == {0, 32}
    data = bytearray(path.read_bytes())
    stored = bytes(linears[0].scales)
    scales = torch.frombuffer(bytearray(stored), dtype=torch.bfloat16 if linears[0].group_size else torch.float32)
    scales[: len(scales) // 12] *= 1.02
    replace_everywhere(data, stored, raw_bytes(scales))
    path.write_bytes(data)
    code, report, verdict = run(capsys, path)
    assert code == 1, report
    assert "weights (pte/export)" in verdict
    assert "digest differs" in report


def test_fails_for_the_file_of_another_checkpoint(capsys, demo_pte, demo_checkpoint, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(demo_checkpoint, other)
    tensors = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * 0.3
            tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    code, report, verdict = run(capsys, demo_pte, "--model", str(other))
    assert code == 1, report
    assert "metadata.checkpoint_id" in verdict
    assert "prefill logits (pte/quantized)" in verdict


def test_fails_for_a_wrong_prompt_template(capsys, tampered):
    def rewrite(data: bytearray) -> None:
        at = find(data, MOBILEVLM_TEMPLATE.encode())
        data[at : at + len(MOBILEVLM_TEMPLATE)] = MOBILEVLM_TEMPLATE.replace("USER:", "HUMN:").encode()

    code, report, verdict = run(capsys, tampered(rewrite))
    assert code == 1, report
    assert verdict == "FAILED: metadata.prompt_template (pte/checkpoint)"
    assert "HUMN:" in report


def test_fails_for_another_tokenizer(tampered, models, sample_image):
    def rewrite(data: bytearray) -> None:
        at = find(data, models.checkpoint.tokenizer)
        data[at + 40] ^= 1

    assert failed_rows(models, tampered(rewrite), sample_image) == ["tokenizer (pte/checkpoint)"]


def test_a_language_model_alone_is_compared_without_pictures(tmp_path):
    """Through the real exporter, from a checkpoint of MobileLLaMA's layout with random weights."""
    checkpoint = random_checkpoint(
        "mobilellama-1.4b",
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=1024,
    )
    recipe = Recipe(max_context_len=256)
    path = tmp_path / "text.pte"
    export_checkpoint(checkpoint, path, recipe)
    rows = check(PteProgram(path), checkpoint, recipe, None, "Who are you?")
    assert [row for row in rows if not row.passed] == []
    names = {row.name for row in rows}
    assert {"token embeddings", "prefill logits", "forced logits", "free tokens"} <= names
    assert not {"pixels", "vision features"} & names


def test_unusable_input_exits_with_2(capsys, demo_pte, tmp_path):
    empty = tmp_path / "empty.pte"
    empty.touch()
    assert main([str(empty), "--quiet"]) == 2
    assert "no ExecuTorch program" in capsys.readouterr().err
    assert main([str(demo_pte), "--quiet", "--model", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main([str(demo_pte), "--quiet", "--image", str(empty)]) == 2
    assert "no picture" in capsys.readouterr().err


def test_snr_and_cosine():
    reference = torch.tensor([3.0, 4.0])
    assert snr_db(reference, reference) == float("inf")
    assert snr_db(reference, reference * 1.1) == pytest.approx(20)
    assert snr_db(reference, torch.tensor([3.0, float("nan")])) == -float("inf")
    assert cosine(reference, reference * 7) == pytest.approx(1)
    assert cosine(reference, torch.tensor([-4.0, 3.0])) == pytest.approx(0)


def test_what_can_be_asked_of_a_file():
    """No more than the reference's own repeatability, and never nothing."""
    assert reachable(math.inf, 35) == 35
    assert reachable(35 + DB_MARGIN, 35) == 35
    assert reachable(30, 35) == pytest.approx(30 - DB_MARGIN)
    assert reachable(1, 35) == LEAST_REACHABLE
    assert reachable(-math.inf, 35) == LEAST_REACHABLE


def test_divergence_and_noise():
    """Against torch's own, and what a distribution does not know of its logits counts for nothing."""
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 5, 40, generator=generator)
    theirs = torch.nn.functional.kl_div(
        other.log_softmax(-1), logits.log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert divergence(logits, other) == pytest.approx(float(theirs), rel=1e-5)
    assert divergence(logits, logits + 7) == pytest.approx(0, abs=1e-9)
    assert divergence(logits, other * math.nan) == math.inf
    noise = Noise.of(logits, [logits + 3, logits + 0.01 * other])
    assert noise.rms == pytest.approx(0.01 / 2**0.5, rel=0.1)
    assert Noise.of(logits, [logits]).max_kl == KL_FLOOR
    row = compare_logits("x", "y", logits, logits + 5, 1e-6, 60)
    assert row.passed
    assert not compare_logits("x", "y", logits, logits * 1.5, 1e-3).passed


def test_nudging_changes_the_last_bit():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    steps = nudged(x).view(torch.int32) - x.view(torch.int32)
    assert steps.unique().tolist() == [-1, 1]
    assert torch.equal(nudged(x), nudged(x))


@pytest.mark.parametrize(("lead", "passed"), [(0.05, True), (5.0, False)])
def test_free_tokens_may_part_only_at_a_tie(lead, passed):
    logits = torch.zeros(3, 4)
    logits[0, 1] = logits[2, 3] = 9.0
    logits[1, 2] = lead
    row = compare_free("free", "pte/quantized", logits, [1, 0, 3], Noise(40, 0, rms=0.01))
    assert row.passed is passed
    assert row.top1 == pytest.approx(2 / 3)
