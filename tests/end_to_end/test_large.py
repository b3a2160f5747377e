"""Models at their real size with random weights: pytest -m large. About 20 minutes on 2 cores, 8 GiB, 8 GB of disk."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rounding import nudged
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

from mvlm.export.checkpoint import Checkpoint, parameter_shapes, random_checkpoint
from mvlm.export.checkpoint.checkpoint import empty_model
from mvlm.export.models import MobileVLM
from mvlm.export.package import describe
from mvlm.export.preprocess import load_image, preprocess
from mvlm.export.quantize import quantize_weight, schemes_of
from mvlm.export.recipe import Recipe, mobile
from mvlm.runtime.fidelity import EagerStages, Stages, snr_db, teacher_forced
from mvlm.runtime.program import PteProgram
from mvlm.runtime.prompt import prompt_ids, prompt_text

pytestmark = pytest.mark.large

QUESTION = "What is in the picture?"
TOKENS = 16

#: After 23 blocks and 24 layers the rounding of activations is another one on each side (test_real_width.py says why):
#: the file can be as close to quantized eager as that is to itself when the last bits of its input change, but for so
#: many dB.
REPEATABILITY_MARGIN = 3.0
#: No noise of rounding alone is more than so many dB below the signal; what is, is wrong.
LEAST_SNR = 20.0
#: Random weights make 32000 logits of a normal distribution, whose largest lead by 0.15 deviations on average, four
#: times that noise. So a token counts as equal, too, if eager has it behind by less than so many times the noise.
TIE = 3.0

#: Runs a command and says how much memory it took. Being small itself matters: a process counts as its own what the
#: one that started it had resident at that moment.
MEASURE = (
    "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
    "print('peak KiB', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr); sys.exit(code)"
)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def export(pte: Path, *arguments: object) -> float:
    """Exports through the command line; returns the peak of resident memory in GiB."""
    command = [sys.executable, "-m", "mvlm.export", *map(str, arguments), "--pte-name", str(pte)]
    ran = subprocess.run([sys.executable, "-c", MEASURE, *command], stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 0, ran.stderr
    print("\n".join(line for line in ran.stderr.splitlines() if "elapsed" in line))
    [peak] = re.findall(r"^peak KiB (\d+)$", ran.stderr, re.MULTILINE)
    print(f"{pte.name}: {pte.stat().st_size:,} bytes, export's peak {int(peak) / 2**20:.2f} GiB")
    return int(peak) / 2**20


def ask(llava_main: Path, pte: Path, image: Path) -> dict:
    """llava_main's statistics of a greedy answer."""
    stats = pte.with_suffix(".stats.json")
    command = [llava_main, "--model_path", pte, "--image_path", image, "--prompt", QUESTION]
    options = ["--temperature", "0", "--max_new_tokens", TOKENS, "--stats_path", stats]
    subprocess.run([str(word) for word in [*command, *options]], check=True)
    return json.loads(stats.read_text())


@pytest.mark.parametrize(
    ("name", "export_gib", "run_gib", "size"),
    [
        ("mobilevlm-1.7b", 3.0, 2.0, (1.00e9, 1.10e9)),
        ("mobilevlm-v2-1.7b", 3.0, 2.0, (1.00e9, 1.10e9)),
        ("mobilevlm-3b", 4.5, 3.0, (1.65e9, 1.85e9)),
    ],
)
def test_named_model_exports_in_bounded_memory_and_answers(
    name, export_gib, run_gib, size, tmp_path, llava_main, sample_image
):
    pte = tmp_path / "x.pte"
    assert export(pte, "--random-weights", name) <= export_gib
    assert size[0] < pte.stat().st_size < size[1]
    stats = ask(llava_main, pte, sample_image)
    pte.unlink()
    print(json.dumps(stats, indent=2))
    assert len(stats["tokens"]) == TOKENS
    assert stats["prompt_tokens"] > 144
    assert stats["peak_rss_bytes"] < run_gib * 2**30


# -- as published -----------------------------------------------------------------------------------------------------


def published_name(name: str, projector: str) -> str:
    """The name in MobileVLM's files of a parameter of :class:`MobileVLM`."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    if name.startswith("language_model."):
        return "model." + name.removeprefix("language_model.")
    if name.startswith("vision_tower."):
        return "model.vision_tower.vision_tower.vision_model." + name.removeprefix("vision_tower.")
    if projector == "ldpnetv2":
        name = name.replace("mm_projector.mlp.", "mm_projector.mlp.mlp.")
        return "model." + name.replace("positional_encoding.conv.", "peg.peg.0.")
    for ours, theirs in (
        ("mm_projector.mlp.0.", "mm_projector.model.mlp.1."),
        ("mm_projector.mlp.2.", "mm_projector.model.mlp.3."),
        ("mm_projector.blocks.0.", "mm_projector.model.mb_block.1.block."),
        ("mm_projector.blocks.1.", "mm_projector.model.mb_block.2.block."),
        ("depthwise.conv.", "0.0."),
        ("depthwise_norm.", "0.1."),
        ("squeeze_excite.", "1."),
        ("pointwise.", "2.0."),
        ("pointwise_norm.", "2.1."),
    ):
        name = name.replace(ours, theirs)
    return "model." + name


def published_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All of MobileVLM's float16 tensors by their published names, those among them that nothing reads."""
    projector, tower = checkpoint.config.projector_type, "model.vision_tower.vision_tower.vision_model."
    tensors = {}
    for name in parameter_shapes(checkpoint.config):
        tensor = checkpoint.read(name).half()
        if re.search(r"(squeeze_excite\.fc\d|pointwise)\.weight", name):
            tensor = tensor[:, :, None, None]  # a 1x1 convolution
        if name.endswith("patch_embedding.weight"):
            tensor = tensor.unflatten(1, (3, *2 * [checkpoint.config.vision.patch_size]))
        tensors[published_name(name, projector)] = tensor
    last = checkpoint.config.vision.num_hidden_layers - 1
    for name in [name for name in tensors if name.startswith(f"{tower}encoder.layers.0.")]:
        tensors[name.replace("layers.0.", f"layers.{last}.")] = tensors[name].flip(0).clone()
    for part in ("weight", "bias"):
        tensors[f"{tower}post_layernorm.{part}"] = torch.ones(checkpoint.config.vision.hidden_size).half()
    return tensors


def write_published(checkpoint: Checkpoint, folder: Path) -> None:
    """MobileVLM as on the hub: V2 is one .bin with its tower in it, V1 shards with CLIP in a folder beside them."""
    folder.mkdir()
    text, has_tower = checkpoint.config.text, checkpoint.config.projector_type == "ldpnetv2"
    config = asdict(text) | {
        "architectures": ["MobileLlamaForCausalLM"],
        "model_type": "mobilevlm",
        "hidden_act": "silu",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": checkpoint.config.vision.hidden_size,
        "mm_projector_type": checkpoint.config.projector_type,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": checkpoint.config.vision_select_layer,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_tower_type": "clip",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(checkpoint.tokenizer)
    tensors = published_tensors(checkpoint)
    if has_tower:
        assert len(tensors) == 616
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    prefix = "model.vision_tower.vision_tower."
    tower = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
    assert len(tensors) == 243
    shards = [f"pytorch_model-{number:05}-of-00002.bin" for number in (1, 2)]
    weight_map = {name: shards[2 * index // len(tensors)] for index, name in enumerate(tensors)}
    for shard in shards:
        torch.save({name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    clip = folder / "clip"
    clip.mkdir()
    vision = {"model_type": "clip_vision_model"} | asdict(checkpoint.config.vision)
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    tower["vision_model.embeddings.position_ids"] = torch.arange(577)[None]
    tower["logit_scale"] = torch.tensor(4.6)
    torch.save(tower, clip / "pytorch_model.bin")


def quantized_eager(checkpoint: Checkpoint, recipe: Recipe) -> MobileVLM:
    """The quantized model for eager execution, made weight by weight: a byte for each, and never all in float32."""
    model = empty_model(checkpoint.config).requires_grad_(False).eval()
    schemes = schemes_of(model, recipe)
    for name, _ in list(model.named_parameters()):
        module_name, _, part = name.rpartition(".")
        weight = checkpoint.read(name)
        if part == "weight" and module_name in schemes:
            weight, _ = quantize_weight(weight, schemes[module_name])
        setattr(model.get_submodule(module_name), part, nn.Parameter(weight, requires_grad=False))
    return model


@pytest.mark.parametrize("name", ["mobilevlm-1.7b", "mobilevlm-v2-1.7b"])
def test_published_layout_computes_what_quantized_eager_computes(name, tmp_path, llava_main, sample_image):
    """From files as they are on the hub to 16 tokens about a picture."""
    checkpoint, recipe, pte = random_checkpoint(name), mobile(), tmp_path / "x.pte"
    folder = tmp_path / name
    write_published(checkpoint, folder)
    tower = ["--vision-tower", folder / "clip"] if (folder / "clip").exists() else []
    peak = export(pte, "--model", folder, *tower)
    shutil.rmtree(folder)  # pytest keeps the folders of its last three runs
    try:
        tokens = ask(llava_main, pte, sample_image)["tokens"]
        assert len(tokens) == TOKENS
        eager = EagerStages(quantized_eager(checkpoint, recipe), recipe.max_context_len, recipe.kv_cache)
        measured = compare(PteProgram(pte), eager, checkpoint, recipe, sample_image, tokens)
    finally:
        pte.unlink()
    print(json.dumps(measured, indent=2))
    assert peak <= 3.0
    assert measured["embedding SNR dB"] >= 100
    for what in ("vision", "logits"):
        repeated = measured[f"{what} SNR dB of eager to itself"]
        assert measured[f"{what} SNR dB"] >= max(repeated - REPEATABILITY_MARGIN, LEAST_SNR), what
    assert min(measured["logits SNR dB, each"]) >= LEAST_SNR
    assert measured["equal tokens or ties"] >= TOKENS - 1


def compare(
    program: PteProgram, eager: Stages, checkpoint: Checkpoint, recipe: Recipe, picture: Path, tokens: list[int]
) -> dict:
    """The file's stages against eager ones, on equal inputs, and how many of llava_main's tokens eager agrees with."""
    metadata = describe(checkpoint, recipe)
    tokenizer = SentencePieceProcessor(model_proto=checkpoint.tokenizer)
    pieces = prompt_ids(tokenizer, metadata, prompt_text(metadata, QUESTION, True, raw=False))
    before, after = (eager.token_embedding(torch.tensor([piece])) for piece in pieces)
    pixels = preprocess(load_image(picture), metadata.image)
    features = eager.vision_encoder(pixels)
    prompt = torch.cat([before, features, after], dim=1)
    forced = eager.token_embedding(torch.tensor([tokens[:-1]]))
    logits, theirs = (teacher_forced(stages, prompt, forced) for stages in (eager, program))
    again = teacher_forced(eager, nudged(prompt), nudged(forced, seed=1))
    likeliest = logits.max(-1)
    lead = likeliest.values - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    noise = (logits - theirs).square().mean().sqrt()
    return {
        "equal tokens": int((likeliest.indices == torch.tensor(tokens)).sum()),
        "equal tokens or ties": int((lead <= TIE * noise).sum()),
        "equal tokens on equal prompts": int((likeliest.indices == theirs.argmax(-1)).sum()),
        "leads where tokens differ": [round(x, 4) for x in lead.tolist() if x > 0],
        "leads of the likeliest": [round(float(x[0] - x[1]), 4) for x in logits.topk(2).values],
        "tokens": tokens,
        "logits' noise": float(noise),
        "vision SNR dB": snr_db(features, program.vision_encoder(pixels)),
        "vision SNR dB of eager to itself": snr_db(features, eager.vision_encoder(nudged(pixels))),
        "embedding SNR dB": snr_db(forced, program.token_embedding(torch.tensor([tokens[:-1]]))),
        "logits SNR dB": snr_db(logits, theirs),
        "logits SNR dB of eager to itself": snr_db(logits, again),
        "logits SNR dB, each": [round(snr_db(x, y), 1) for x, y in zip(logits, theirs, strict=True)],
    }
