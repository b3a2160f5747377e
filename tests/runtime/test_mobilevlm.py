"""The Python runtime: prompts, sampling, streaming, errors, and the same tokens as llava_main."""

from __future__ import annotations

import io
import random
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from rounding import TIE, least_lead, rounding_noise
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tiny_pte import VOCAB_SIZE, hollow_constants, write_hollow_pte

from mvlm.export.demo.world import draw, questions, sample_scene
from mvlm.runtime import MobileVLM, PteError, PteProgram
from mvlm.runtime.prompt import StreamingDecoder, prompt_ids, prompt_text
from mvlm.runtime.sampler import Sampler


@pytest.fixture(scope="module")
def model(demo_pte: Path) -> MobileVLM:
    return MobileVLM(demo_pte)


@pytest.mark.parametrize("size", [(112, 112), (300, 180), (135, 240)])
def test_same_answers_as_llava_main(model, demo_pte, llava_main, tmp_path, monkeypatch, size):
    """Also where ``llava_main`` takes other kernels than Python has: each answer is one that no rounding decides.

    Of pictures higher or wider than 16:9, which the demo model was not trained with, some answers hang by a thread.
    """
    scene = sample_scene(random.Random(sum(size)))
    picture = tmp_path / "picture.png"
    draw(scene, *size).save(picture)
    noise = rounding_noise(model.program.text_decoder, [model.embed(picture, "Describe the image.")])
    run, leads = model.program.text_decoder, []

    def watched(embeddings: torch.Tensor, start_pos: int) -> torch.Tensor:
        logits = run(embeddings, start_pos)
        leads.append(least_lead(logits))
        return logits

    monkeypatch.setattr(model.program, "text_decoder", watched)
    for question in {question for question, *_ in questions(scene)} | {"A question nobody asked, é?"}:
        command = [llava_main, "--model_path", demo_pte, "--image_path", picture, "--prompt", question]
        ran = subprocess.run(
            [*map(str, command), "--temperature", "0", "--quiet"], capture_output=True, text=True, check=True
        )
        assert ran.stdout == model.answer(picture, question) + "\n"
        assert min(leads) > TIE * noise, question


def test_streams_what_it_answers(model, sample_image):
    pieces = list(model.generate(sample_image, "Describe the image."))
    assert len(pieces) > 1
    assert "".join(pieces) == model.answer(sample_image, "Describe the image.")


def test_cache_is_not_overwritten_between_tokens(model, sample_image, models):
    """Decoding token by token gives what one pass over the whole sequence gives."""
    embeddings = model.embed(sample_image, "Describe the image.")
    tokens = list(model.generate_tokens(embeddings, Sampler(), 12))
    whole = torch.cat([embeddings, model.program.token_embedding(torch.tensor([tokens]))], dim=1)
    logits = models.quantized(whole)[0, embeddings.shape[1] - 1 : -1]
    agreement = (logits.argmax(-1) == torch.tensor(tokens)).double().mean()
    assert agreement >= 0.9


def test_a_seed_repeats_and_seeds_differ(model, sample_image):
    def sample(seed: int) -> str:
        return model.answer(sample_image, "Describe the image.", temperature=3.0, seed=seed, max_new_tokens=12)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_accepts_an_image_object_and_no_image(model, sample_image):
    with Image.open(sample_image) as image:
        assert model.answer(image, "How many shapes are there?") == model.answer(
            sample_image, "How many shapes are there?"
        )
    assert isinstance(model.answer(None, "How many shapes are there?", max_new_tokens=3), str)


def test_prompt_follows_the_template(model):
    text = prompt_text(model.metadata, "What is it?", images=1, raw=False)
    assert text.endswith("USER: <image>\nWhat is it? ASSISTANT:")
    pieces = prompt_ids(model.tokenizer, model.metadata, text)
    assert len(pieces) == 2
    assert pieces[0][0] == model.metadata.bos_id
    before, after = text.split("<image>")
    assert pieces[0][1:] == model.tokenizer.encode(before)
    assert pieces[1] == model.tokenizer.encode(after)


def test_a_template_inside_the_question_stays_text(model):
    text = prompt_text(model.metadata, "say {prompt}", images=0, raw=False)
    assert text.count("say {prompt}") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(image=None, prompt="  "), "prompt is empty"),
        (dict(image=None, prompt="<image> what?"), "no picture was given"),
        (dict(image="SAMPLE", prompt="<image> and <image>?"), "<image> 2 times, but there is 1 picture;"),
        (dict(image="SAMPLE", prompt="what?", raw_prompt=True), "must say itself where the picture goes"),
        (dict(image=None, prompt="what\ud800?"), "character 4 is half of a surrogate pair"),
        (dict(image="SAMPLE", prompt="what?", temperature=-1), "temperature"),
        (dict(image="SAMPLE", prompt="what?", top_p=0), "top_p"),
        (dict(image="SAMPLE", prompt="what?", top_k=-2), "top_k"),
        (dict(image="SAMPLE", prompt="what?", max_new_tokens=0), "max_new_tokens"),
        (dict(image="nowhere.jpg", prompt="what?"), "no such file"),
        (dict(image="SAMPLE", prompt="shape " * 1000), "768"),
    ],
)
def test_bad_arguments(model, sample_image, arguments, message):
    if arguments["image"] == "SAMPLE":
        arguments = {**arguments, "image": sample_image}
    with pytest.raises(ValueError, match=message):
        list(model.generate(**arguments))


def test_bad_files(demo_pte, tmp_path):
    whole = demo_pte.read_bytes()
    cases = {
        "nothing.pte": (None, "no such file"),
        "empty.pte": (b"", "no ExecuTorch program"),
        "random.pte": (random.Random(0).randbytes(5000), "no ExecuTorch program"),
        "half.pte": (whole[: len(whole) // 2], "truncated"),
        "short.pte": (whole[:-1000], "truncated"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(PteError, match=message):
            MobileVLM(tmp_path / name)


def test_a_language_model_alone_takes_no_picture(text_pte, sample_image):
    model = MobileVLM(text_pte.path)
    assert model.metadata == text_pte.metadata
    assert model.metadata.image is None
    expected = r"text\.pte \(tiny\) is a language model without a vision encoder and takes no picture; leave out"
    with pytest.raises(PteError, match=expected):
        model.generate(sample_image, "What is it?")
    with pytest.raises(PteError, match=expected):
        model.program.vision_encoder(torch.zeros(1, 3, 336, 336))


def test_to_a_language_model_alone_an_image_marker_is_text(text_pte):
    model = MobileVLM(text_pte.path)
    text = prompt_text(model.metadata, "<image> and <image>", images=0, raw=False)
    assert text == "USER: <image> and <image> ASSISTANT:"
    assert prompt_ids(model.tokenizer, model.metadata, text) == [[1, *model.tokenizer.encode(text)]]


@pytest.mark.parametrize(
    ("with_vision", "left_out", "expected"),
    [
        (True, None, "has vision_encoder, but lacks mvlm_image_marker, mvlm_image_prefix, mvlm_image_size"),
        (False, (), "has mvlm_image_marker, .*, but lacks vision_encoder"),
        (True, ("mvlm_image_size", "mvlm_image_tokens"), "missing: mvlm_image_size, mvlm_image_tokens$"),
        (False, ("mvlm_image_prefix",), "missing: mvlm_image_prefix$"),
    ],
    ids=["encoder without constants", "constants without encoder", "some constants", "some constants, no encoder"],
)
def test_a_file_that_contradicts_itself(tmp_path, demo_tokenizer, with_vision, left_out, expected):
    """``left_out``: image constants that the file lacks; None for all."""
    path = write_hollow_pte(tmp_path / "hollow.pte", hollow_constants(demo_tokenizer, left_out), with_vision)
    with pytest.raises(PteError, match=expected):
        PteProgram(path)


@pytest.mark.parametrize(("version", "advice"), [(3, "export it again"), (5, "install a newer mvlm")])
def test_a_file_of_another_format(tmp_path, demo_tokenizer, version, advice):
    """It is said before what such a file lacks."""
    constants = hollow_constants(demo_tokenizer, ("mvlm_logit_positions",)) | {"mvlm_format_version": version}
    path = write_hollow_pte(tmp_path / "other.pte", constants, with_vision=True)
    with pytest.raises(PteError, match=rf"other\.pte: the file is of format {version}, .* reads format 4: {advice}$"):
        PteProgram(path)


def test_a_tokenizer_of_another_model(text_pte, tmp_path):
    buffer = io.BytesIO()
    words = random.Random(1)
    SentencePieceTrainer.train(
        sentence_iterator=iter(["".join(words.choices("abcdefghij", k=6)) for _ in range(4000)]),
        model_writer=buffer,
        vocab_size=VOCAB_SIZE + 1,
        model_type="bpe",
        minloglevel=2,
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(PteError, match=r"tokenizer has 1025 pieces, but the model's vocabulary only 1024"):
        MobileVLM(text_pte.path, path)


def test_ids_without_a_piece_have_no_text(demo_tokenizer):
    """Not even between the bytes of one character."""
    tokenizer = SentencePieceProcessor(model_proto=demo_tokenizer)
    ids = tokenizer.encode("a 😀 b")
    padded = [id_ for known in ids for id_ in (known, len(tokenizer), VOCAB_SIZE)]
    decoder = StreamingDecoder(tokenizer, ("</s>",))
    assert "".join([*map(decoder.push, padded), decoder.finish()]) == "a 😀 b"


def test_a_program_that_is_not_ours(tmp_path):
    from executorch.exir import to_edge

    program = to_edge(torch.export.export(torch.nn.ReLU(), (torch.ones(2),))).to_executorch()
    path = tmp_path / "relu.pte"
    path.write_bytes(program.buffer)
    with pytest.raises(PteError, match=r"not one of mvlm's: it lacks .*text_decoder.* and has forward"):
        MobileVLM(path)


def test_sampler_follows_the_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sampler = Sampler(temperature=1.0, seed=5)
    counts = torch.bincount(torch.tensor([sampler(logits) for _ in range(4000)]), minlength=4) / 4000
    torch.testing.assert_close(counts.double(), torch.softmax(logits.double(), 0), atol=0.03, rtol=0)
    assert {Sampler(temperature=5.0, top_k=1, seed=s)(logits) for s in range(20)} == {2}
    assert {Sampler(temperature=1.0, top_p=0.7, seed=s)(logits) for s in range(60)} == {1, 2}
    with pytest.raises(RuntimeError, match="not finite"):
        sampler(torch.tensor([0.0, float("nan")]))


def test_streaming_equals_decoding_at_once(model):
    tokenizer = model.tokenizer
    for text in ["A red circle is at the top left.", "naïve café 日本語 🙂 end", "a\n b  c", "   "]:
        ids = tokenizer.encode(text)
        decoder = StreamingDecoder(tokenizer, ("</s>",))
        pieces = [decoder.push(token) for token in ids] + [decoder.finish()]
        assert "".join(pieces) == tokenizer.decode(ids).strip()
        assert not any("\ufffd" in piece for piece in pieces)


def test_streaming_stops_before_the_stop_string(model):
    ids = model.tokenizer.encode("a red circle</s> and more")
    decoder = StreamingDecoder(model.tokenizer, ("</s>",))
    pieces = [decoder.push(token) for token in ids]
    assert decoder.stopped
    assert "".join(pieces) + decoder.finish() == "a red circle"
