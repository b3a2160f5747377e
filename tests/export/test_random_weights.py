"""Random weights of named shapes: always the same, of the right sizes, and such that activations stay sane."""

from __future__ import annotations

import re
import time

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from mvlm.export import demo
from mvlm.export.checkpoint import NAMED_MODELS, parameter_shapes, random_checkpoint, random_weights
from mvlm.export.errors import ExportError

#: Of one tensor, by generator version 1.
PINNED = (0.0552, 0.1106, 0.0627)

#: As deep as the real models, and narrow.
NARROW = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 600,
}
NARROW_VISION = {
    "vision_hidden_size": 128,
    "vision_intermediate_size": 256,
    "vision_num_attention_heads": 4,
    "vision_image_size": 112,
}


@pytest.mark.parametrize("name", NAMED_MODELS)
def test_named_models(name):
    checkpoint = random_checkpoint(name, seed=5)
    assert checkpoint.name == f"{name} (random weights, seed 5)"
    assert checkpoint.config == NAMED_MODELS[name].config
    assert checkpoint.prompt_template == NAMED_MODELS[name].prompt_template
    assert (checkpoint.bos_id, checkpoint.eos_ids, checkpoint.size, checkpoint.unused) == (1, (2,), 0, ())
    assert re.fullmatch("sha256:[0-9a-f]{64}", checkpoint.checkpoint_id)
    tokenizer = SentencePieceProcessor(model_proto=checkpoint.tokenizer)
    assert tokenizer.get_piece_size() == checkpoint.config.text.vocab_size == 32000
    assert (tokenizer.bos_id(), tokenizer.eos_id()) == (1, 2)
    plain = SentencePieceProcessor(model_file=str(demo.CHECKPOINT / "tokenizer.model"))
    prompt = checkpoint.prompt_template.replace("{prompt}", "What is in the picture?")
    assert tokenizer.encode(prompt) == plain.encode(prompt)
    bias_or_norm = [name for name, shape in parameter_shapes(checkpoint.config).items() if len(shape) == 1]
    for parameter in bias_or_norm[:9]:
        assert checkpoint.read(parameter).shape == parameter_shapes(checkpoint.config)[parameter]


def test_a_tensor_depends_on_seed_and_name_alone():
    checkpoint = random_checkpoint("mobilevlm-1.7b", **NARROW, num_hidden_layers=2)
    names = [f"language_model.layers.{layer}.mlp.{part}_proj.weight" for layer in (0, 1) for part in ("gate", "up")]
    names.append("language_model.embed_tokens.weight")
    first = {name: checkpoint.read(name) for name in names}
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    torch.manual_seed(99)
    try:
        for name in reversed(names):
            again = random_checkpoint("mobilevlm-1.7b", **NARROW, num_hidden_layers=2).read(name)
            assert torch.equal(again, first[name]), name
    finally:
        torch.set_num_threads(threads)
    assert len({tensor.sum().item() for tensor in first.values()}) == len(names)  # all different
    other = random_checkpoint("mobilevlm-1.7b", 1, **NARROW, num_hidden_layers=2)
    assert not torch.equal(other.read(names[0]), first[names[0]])


def test_values_do_not_change_between_versions():
    """These values belong to GENERATOR_VERSION 1: who changes them counts it up."""
    assert random_weights.GENERATOR_VERSION == 1
    checkpoint = random_checkpoint("mobilevlm-1.7b", **NARROW)
    values = checkpoint.read("language_model.layers.3.self_attn.q_proj.weight").flatten()[[0, 1, -1]]
    assert values.tolist() == pytest.approx(PINNED, abs=1e-3)


def test_values_are_those_of_float16():
    checkpoint = random_checkpoint("mobilevlm-v2-1.7b", **NARROW, **NARROW_VISION)
    for name in list(parameter_shapes(checkpoint.config))[::17]:
        tensor = checkpoint.read(name)
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert torch.equal(tensor, tensor.half().float()), name
        assert tensor.std() > 0, name


def test_chunks_do_not_repeat():
    """A tensor of more than one chunk is not the same chunk over and over."""
    tensor = random_checkpoint("mobilellama-1.4b", **NARROW | {"vocab_size": 3 * 2048}).read(
        "language_model.lm_head.weight"
    )
    assert tensor.numel() == 3 * random_weights._CHUNK
    chunks = tensor.view(3, -1)
    assert abs(torch.corrcoef(chunks)[0, 1]) < 0.01
    assert chunks.std(dim=1) == pytest.approx(128**-0.5, rel=0.01)


@pytest.mark.parametrize("name", ["mobilevlm-1.7b", "mobilevlm-v2-3b", "llava-1.5-7b"])
def test_activations_stay_of_the_order_of_one(name):
    checkpoint = random_checkpoint(name, **NARROW, **NARROW_VISION)
    model = checkpoint.load_model()
    outputs = {}
    for part, module in model.named_modules():
        if re.search(r"(layers\.\d+|mm_projector|lm_head|pre_layrnorm)$", part):
            module.register_forward_hook(lambda _, __, out, part=part: outputs.update({part: out}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        picture = model.encode_image(torch.randn(1, 3, 112, 112, generator=generator))
        words = model.embed_tokens(torch.randint(600, (1, 20), generator=generator))
        model(torch.cat([words, picture, words], dim=1))
    assert len(outputs) > 40
    for part, out in outputs.items():
        # Of a layer, the token stream and what is still to be added to it.
        assert 0.1 < (sum(out) if isinstance(out, tuple) else out).std() < 3, part
    logits = outputs["language_model.lm_head"][0]
    assert logits.argmax(dim=-1).unique().numel() > 5  # not one answer to everything


def test_identity():
    ids = {
        random_checkpoint(name, seed, **sizes).checkpoint_id
        for name, seed, sizes in (
            ("mobilevlm-1.7b", 0, {}),
            ("mobilevlm-1.7b", 1, {}),
            ("mobilevlm-v2-1.7b", 0, {}),
            ("mobilevlm-1.7b", 0, {"num_hidden_layers": 2}),
            ("mobilevlm-1.7b", 0, {"vision_num_hidden_layers": 3}),
        )
    }
    assert len(ids) == 5
    assert random_checkpoint("mobilevlm-1.7b").checkpoint_id in ids


@pytest.mark.parametrize(
    ("name", "seed", "sizes", "message"),
    [
        ("mobilevlm-2b", 0, {}, "'mobilevlm-2b': no such model; supported: mobilevlm-1.7b, mobilevlm-3b, mobilevlm-v2"),
        ("mobilevlm-3b", -1, {}, "seed -1: a whole number from 0 to"),
        ("mobilevlm-3b", 2**64, {}, "a whole number from 0 to"),
        ("mobilevlm-3b", 1.5, {}, "seed 1.5: a whole number"),
        ("mobilevlm-3b", 0, {"layers": 2}, "layers: no such size"),
        ("mobilellama-1.4b", 0, {"vision_hidden_size": 64}, "vision_hidden_size: no such size"),
        ("mobilevlm-3b", 0, {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ("mobilevlm-3b", 0, {"vision_select_layer": -99}, "select_layer -99 is out of range"),
        ("mobilevlm-3b", 0, {"vocab_size": 500}, "vocab_size 500 is less than the 518 pieces"),
    ],
)
def test_unusable_arguments(name, seed, sizes, message):
    with pytest.raises(ExportError, match=re.escape(message)):
        random_checkpoint(name, seed, **sizes)


def test_fast_enough():
    """The whole of 1.7B in well under a minute: here 50 million values, which take half a second on one core."""
    checkpoint = random_checkpoint("mobilevlm-1.7b", vocab_size=24000)
    begin = time.process_time()
    checkpoint.read("language_model.embed_tokens.weight")
    assert time.process_time() - begin < 2
