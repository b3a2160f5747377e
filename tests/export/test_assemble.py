"""Methods put together from pieces compute what methods lowered at once compute, and wrong pieces are noticed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import executorch.kernels.quantized  # noqa: F401  (the quantized embedding's kernel)
import pytest
import torch
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.runtime import Runtime
from random_checkpoint import RandomCheckpoint, Sizes
from rounding import two_roundings, unrounded
from torch import Tensor
from torch.export import ExportedProgram

from mvlm.export import lower as lowering
from mvlm.export.assemble import _check_completeness, assemble, instantiate, template_keys
from mvlm.export.capture import capture, capture_text_decoder, capture_token_embedding, capture_vision_encoder
from mvlm.export.checkpoint import open_checkpoint
from mvlm.export.checkpoint.configs import ImagePreprocessing
from mvlm.export.contract import TEXT_DECODER, TOKEN_EMBEDDING, VISION_ENCODER
from mvlm.export.errors import ExportError
from mvlm.export.lower import Lowered, lower, lower_program
from mvlm.export.models import TextDecoder
from mvlm.export.package import write_pte
from mvlm.export.progress import Progress
from mvlm.export.quantize import quantize, quantize_checkpoint, schemes_of
from mvlm.export.recipe import Recipe
from mvlm.export.spool import Spool
from mvlm.export.stored_weights import digest_of_quantized, linear_names, read_stored_linears, weights_digest
from mvlm.ops.native import load_native_library
from mvlm.runtime.fidelity import snr_db

pytestmark = pytest.mark.filterwarnings("ignore:Mutation on a buffer")  # the KV cache; it is meant

STEPS = 4

#: In dB, of methods as small as these, unless the noise of rounding is more.
MIN_SNR = 40.0


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    load_native_library()
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def assembled_pte(lowered: Lowered, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("assembled") / "x.pte"
    write_pte(lowered, {}, path)
    return path


def lowered_at_once(model, preprocessing: ImagePreprocessing, recipe: Recipe) -> Lowered:
    """The untuned way: every method captured and lowered as a whole."""
    programs, delegation = {}, []
    for name, program in (
        (VISION_ENCODER, capture_vision_encoder(model, preprocessing, recipe)),
        (TOKEN_EMBEDDING, capture_token_embedding(model, recipe)),
        (TEXT_DECODER, capture_text_decoder(model, recipe)),
    ):
        programs[name], counts = lower_program(name, program)
        delegation.append(counts)
    return Lowered(programs, tuple(delegation))


def run(path: Path, image_size: int, hidden_size: int, takes_bytes: bool = False) -> list[Tensor]:
    """What all methods compute of fixed inputs, the decoder over several steps."""
    generator = torch.Generator().manual_seed(0)

    def method(name: str):
        # A program each: ExecuTorch's Python runtime lets methods of one program share their planned memory.
        return Runtime.get().load_program(path).load_method(name)

    pixels = torch.randn(1, 3, image_size, image_size, generator=generator)
    if takes_bytes:
        pixels = torch.randint(0, 256, (3, image_size - 7, image_size), dtype=torch.uint8, generator=generator)
    results = [method(VISION_ENCODER).execute([pixels])[0].clone()]
    results.append(method(TOKEN_EMBEDDING).execute([torch.arange(20)[None]])[0].clone())
    decoder = method(TEXT_DECODER)
    position = 0
    for length in (7, *[1] * STEPS, 5):
        embeddings = torch.randn(1, length, hidden_size, generator=generator)
        results.append(decoder.execute([embeddings, torch.tensor([position])])[0].clone())
        position += length
    return results


#: What every piece asks for again.
SYMBOLS = {"aten.sym_size", "aten._local_scalar_dense"}


def check_same_delegation(lowered: Lowered, whole: Lowered) -> None:
    for ours, theirs in zip(lowered.delegation, whole.delegation, strict=True):
        assert (ours.quantized, ours.quantized_linears) == (theirs.quantized, theirs.quantized_linears)
        assert ours.float32_operators == theirs.float32_operators
        # Between pieces a partition ends and a symbol is asked for again.
        assert 0 <= ours.float32 - theirs.float32 <= 4
        assert {name: n for name, n in ours.left.items() if name not in SYMBOLS} == {
            name: n for name, n in theirs.left.items() if name not in SYMBOLS
        }


def check_same_results(results: tuple[list[Tensor], list[Tensor]]) -> None:
    assert len(results[0]) == 2 + 1 + STEPS + 1
    for ours, theirs in zip(*results, strict=True):
        assert bool(torch.isfinite(ours).all())
        assert ours.std() > 0
        assert torch.equal(ours, theirs)


def test_same_results_as_lowered_at_once(
    assembled_pte, lowered, small_checkpoint, small_quantized_model, small_recipe, tmp_path
):
    """Bit for bit, cache and all; and the same operators are delegated."""
    whole = lowered_at_once(small_quantized_model, small_checkpoint.preprocessing, small_recipe)
    check_same_delegation(lowered, whole)
    path = tmp_path / "whole.pte"
    write_pte(whole, {}, path)
    check_same_results((run(assembled_pte, 28, 64), run(path, 28, 64)))


def test_same_results_with_operators_of_executorch(small_checkpoint, tmp_path):
    """A layer then has more than one mutable argument of more than one operator, and a symbol of its own."""
    recipe = Recipe(max_context_len=32, kv_cache="fp32", attention_op="llama")
    with Spool(tmp_path) as spool:
        quantized = quantize_checkpoint(small_checkpoint, recipe, spool, Progress(quiet=True))
        assembled = lower(capture(quantized), Progress(quiet=True))
        write_pte(assembled, {}, tmp_path / "assembled.pte")
    model = small_checkpoint.load_model()
    quantize(model, recipe)
    whole = lowered_at_once(model, small_checkpoint.preprocessing, recipe)
    write_pte(whole, {}, tmp_path / "whole.pte")
    results = tuple(run(tmp_path / f"{name}.pte", 28, 64, takes_bytes=True) for name in ("assembled", "whole"))
    check_same_results(results)
    check_same_delegation(assembled, whole)


def test_layers_that_are_stored_in_different_ways(tmp_path, monkeypatch):
    """Of 8 bits here and 4 there: the same as lowered at once, bit for bit, with one lowering for each way."""
    checkpoint = open_checkpoint(
        str(RandomCheckpoint.make(Sizes(projector="linear", num_hidden_layers=3)).write(tmp_path / "model"))
    )
    stack = "language_model.layers"
    wide = (f"{stack}.1.self_attn.qkv_proj", f"{stack}.1.mlp.down_proj")
    recipe = Recipe(max_context_len=32, eight_bit_linears=wide)
    lowered_pieces = []
    lower_one = lowering.lower_program

    def counting(method, program):
        lowered_pieces.append(method)
        return lower_one(method, program)

    monkeypatch.setattr(lowering, "lower_program", counting)
    with Spool(tmp_path) as spool:
        quantized = quantize_checkpoint(checkpoint, recipe, spool, Progress(quiet=True))
        methods = capture(quantized)
        # The first and the last are alike.
        runs = [(piece.first_layer, len(piece.layers)) for piece in methods[-1].pieces if piece.layers]
        assert runs == [(0, 1), (1, 1), (2, 1)]
        assembled = lower(methods, Progress(quiet=True))
        assert lowered_pieces.count(TEXT_DECODER) == 2 + 2  # head and tail, two kinds of layers
        write_pte(assembled, {}, tmp_path / "assembled.pte")
    model = checkpoint.load_model()
    quantize(model, recipe)
    whole = lowered_at_once(model, checkpoint.preprocessing, recipe)
    write_pte(whole, {}, tmp_path / "whole.pte")
    check_same_results(tuple(run(tmp_path / f"{name}.pte", 28, 64) for name in ("assembled", "whole")))
    linears = read_stored_linears(tmp_path / "assembled.pte")[TEXT_DECODER]
    names = linear_names(model, schemes_of(model, recipe), TEXT_DECODER)
    assert [name for name, linear in zip(names, linears, strict=True) if linear.group_size == 0] == [
        *wide,
        "language_model.lm_head",
    ]
    for name, linear in zip(names, linears, strict=True):
        weight, stored = model.get_submodule(name).weight, linear.tensor()
        assert torch.equal(weight.qdata, stored.qdata)
        assert torch.equal(weight.scale, stored.scale)
        assert weight.block_size == stored.block_size


def test_weights_of_a_file_have_the_digest_of_the_export(small_quantized, small_recipe, lowered, assembled_pte):
    """Read and hashed anew; one bit makes another."""
    schemes = schemes_of(small_quantized.model, small_recipe)
    stored = read_stored_linears(assembled_pte)
    found = [
        (name, [linear.weight, linear.scales])
        for method in (VISION_ENCODER, TEXT_DECODER)
        for name, linear in zip(linear_names(small_quantized.model, schemes, method), stored[method], strict=True)
    ]
    assert weights_digest(found) == digest_of_quantized(small_quantized, schemes)
    name, (weight, scales) = found[3]
    changed = bytearray(weight)
    changed[17] ^= 1
    found[3] = (name, [changed, scales])
    assert weights_digest(found) != digest_of_quantized(small_quantized, schemes)


def test_a_broken_file_has_no_weights(assembled_pte, tmp_path):
    data = assembled_pte.read_bytes()
    path = tmp_path / "broken.pte"
    for broken, message in ((data[: len(data) // 2], "is truncated"), (b"\0" * 4096, "no ExecuTorch program")):
        path.write_bytes(broken)
        with pytest.raises(ExportError, match=message):
            read_stored_linears(path)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(
            max_context_len=32,
            group_size=32,
            scales="affine",
            lm_head_bits=8,
            embedding_bits=4,
            vision="int4",
        ),
        Recipe(max_context_len=32, group_size=64, embedding_bits=32, vision="fp32", kv_cache="fp16"),
    ],
    ids=["4 bits", "float32 vision"],
)
def test_other_recipes_compute_what_eager_computes(recipe, small_checkpoint, tmp_path):
    with Spool(tmp_path) as spool:
        quantized = quantize_checkpoint(small_checkpoint, recipe, spool, Progress(quiet=True))
        path = tmp_path / "x.pte"
        write_pte(lower(capture(quantized), Progress(quiet=True)), {}, path)
    model = small_checkpoint.load_model()
    quantize(model, recipe)
    vision, embeddings, prefill, *_ = run(path, 28, 64)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 28, 28, generator=generator)
    prompt = torch.randn(1, 7, 64, generator=generator)
    assert torch.equal(model.embed_tokens(torch.arange(20)[None]), embeddings)
    of_eager, of_smooth = (
        (m.encode_image(pixels), decoder(prompt, torch.tensor([0])))
        for m in (model, unrounded(model, small_checkpoint))
        for decoder in [TextDecoder(m.language_model, recipe.max_context_len, recipe.kv_cache)]
    )
    for ours, theirs, smooth in zip((vision, prefill), of_eager, of_smooth, strict=True):
        assert snr_db(theirs, ours) >= min(MIN_SNR, two_roundings(smooth, theirs))


# -- what could go wrong ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layer_piece(captured):
    """The decoder's layer, lowered."""
    [piece] = [piece for piece in captured[-1].pieces if piece.layers]
    program, _ = lower_program(TEXT_DECODER, piece.program)
    return replace(piece, program=program)


def delegates(program: ExportedProgram) -> list[LoweredBackendModule]:
    module = program.graph_module
    return [
        getattr(module, node.args[0].target) for node in module.graph.nodes if node.target is executorch_call_delegate
    ]


def test_layers_hold_their_own_weights(captured, lowered, small_quantized):
    """Every spooled weight of the checkpoint is in the assembled program, and no template's is left."""
    for method in captured:
        stored = {
            key
            for node in lowered.programs[method.name].graph.nodes
            if node.target is executorch_call_delegate
            and (
                data := getattr(lowered.programs[method.name].graph_module, node.args[0].target).named_data_store_output
            )
            for key in data.pte_data
        }
        for piece in method.pieces:
            assert not stored & set(template_keys(piece))
            for layer in piece.layers:
                assert {part.key for parts in layer.weights.values() for part in parts} <= stored
    assert {name for name, layers in small_quantized.stacks.items() if layers} == {
        piece.name for method in captured for piece in method.pieces if piece.layers
    }


def test_data_that_are_no_weight_are_noticed(layer_piece):
    holder = next(delegate for delegate in delegates(layer_piece.program) if delegate.named_data_store_output.pte_data)
    with pytest.raises(ExportError, match=r"holds .* bytes that are no weight .* versions that pyproject\.toml names"):
        instantiate(holder, {}, layer_piece.layers[0], [])


def test_weight_of_another_size_is_noticed(layer_piece):
    holder = next(delegate for delegate in delegates(layer_piece.program) if delegate.named_data_store_output.pte_data)
    weights = layer_piece.layers[0].weights
    layer = {name: [replace(part, data=b"short") for part in parts] for name, parts in weights.items()}
    with pytest.raises(ExportError, match="was not found, or is of another size"):
        instantiate(holder, template_keys(layer_piece), replace(layer_piece.layers[0], weights=layer), [])


def test_weight_that_was_lost_is_noticed(layer_piece):
    more = replace(layer_piece, parameter_bytes=layer_piece.parameter_bytes | {"self_attn.gate.weight": [b"lost"]})
    with pytest.raises(ExportError, match=r"nothing holds self_attn\.gate\.weight"):
        _check_completeness([more])


def test_template_with_equal_weights_is_refused(layer_piece):
    twice = dict(layer_piece.parameter_bytes)
    twice["self_attn.o_proj.weight"] = twice["self_attn.qkv_proj.weight"]
    with pytest.raises(ExportError, match=r"self_attn\.\w+_proj\.weight and self_attn\.\w+_proj\.weight .* are equal"):
        template_keys(replace(layer_piece, parameter_bytes=twice))


def test_method_of_one_piece_is_itself(captured):
    embedding = captured[1]
    assert embedding.name == TOKEN_EMBEDDING
    assert assemble(embedding) is embedding.pieces[0].program
