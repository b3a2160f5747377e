"""The whole way: the bundled checkpoint becomes a .pte whose answers about new pictures are right."""

from __future__ import annotations

import json
import random
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from mvlm.export.demo.world import draw, questions, sample_scene

#: Square and not, smaller and larger than the model's 112 pixels; up to 16:9, as the demo model was trained.
SIZES = [(112, 112), (60, 60), (320, 240), (240, 320), (480, 270), (180, 320)]


def ask(llava_main: Path, pte: Path, picture: Path, question: str) -> str:
    command = [llava_main, "--model_path", pte, "--image_path", picture, "--prompt", question]
    ran = subprocess.run([*map(str, command), "--temperature", "0", "--quiet"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.removesuffix("\n")


def test_answers_about_new_pictures_are_right(llava_main, demo_pte, tmp_path):
    """Questions of every kind about 36 pictures drawn anew; the bounds leave room for the smallness of the sample."""
    rng = random.Random(20261121)
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    wrong = []
    for index in range(36):
        scene = sample_scene(rng)
        picture = tmp_path / f"{index}.{'png' if index % 2 else 'jpg'}"
        draw(scene, *SIZES[index % len(SIZES)]).save(picture)
        asked_about = [question for question in questions(scene) if question.kind != "exists"]
        # There are 32 of this kind a picture, most of them with the answer "no".
        asked_about += rng.sample([question for question in questions(scene) if question.kind == "exists"], 3)
        for question, expected, kind in asked_about:
            answer = ask(llava_main, demo_pte, picture, question)
            asked[kind] += 1
            right[kind] += answer == expected
            if answer != expected:
                wrong.append(f"{question} expected {expected!r}, got {answer!r}")
    assert len(asked) == 6
    assert right.total() >= 0.95 * asked.total(), (right, asked, wrong)
    for kind, count in asked.items():
        assert right[kind] >= 0.85 * count, (kind, right[kind], count, wrong)


def test_color_of_the_circle_in_the_bundled_picture(llava_main, demo_pte, sample_image):
    assert ask(llava_main, demo_pte, sample_image, "What color is the circle?") == "red"


def test_artifacts_lie_beside_the_file(demo_pte, demo_checkpoint, sample_image):
    folder = demo_pte.parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["mobilevlm.pte", "mobilevlm.json", "tokenizer.model", sample_image.name]
    )
    assert (folder / "tokenizer.model").read_bytes() == (demo_checkpoint / "tokenizer.model").read_bytes()
    assert SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size() > 256
    assert (folder / sample_image.name).read_bytes() == sample_image.read_bytes()
    metadata = json.loads((folder / "mobilevlm.json").read_text())
    assert metadata["max_context_len"] == 768
    assert metadata["prompt_template"].count("{prompt}") == 1
    assert metadata["checkpoint_id"].startswith("sha256:")


def test_contract_of_the_file(demo_pte):
    """Methods, shapes and constants are those of the contract, as ExecuTorch's own runtime sees them."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(demo_pte)

    def sizes(method: str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        meta = program.metadata(method)
        inputs = [tuple(meta.input_tensor_meta(i).sizes()) for i in range(meta.num_inputs())]
        return inputs, [tuple(meta.output_tensor_meta(i).sizes()) for i in range(meta.num_outputs())]

    vocabulary = program.load_method("get_vocab_size").execute([])[0]
    # Dynamic dimensions are planned for their greatest extent.
    assert sizes("vision_encoder") == ([(1, 3, 112, 112)], [(1, 16, 256)])
    assert sizes("token_embedding") == ([(1, 256)], [(1, 256, 256)])
    assert sizes("text_decoder") == ([(1, 256, 256), (1,)], [(1, 8, vocabulary)])
    expected = {
        "get_max_seq_len": [256],
        "get_max_context_len": [768],
        "get_bos_id": [1],
        "get_eos_ids": [2],
        "use_kv_cache": [True],
        "use_sdpa_with_kv_cache": [True],
        "enable_dynamic_shape": [True],
        "mvlm_format_version": [4],
        "mvlm_logit_positions": [8],
        "mvlm_stop_strings": ["</s>"],
        "mvlm_image_size": [112],
        "mvlm_image_pad_color": [122, 116, 104],
        "mvlm_image_tokens": [16],
    }
    for name, value in expected.items():
        assert list(program.load_method(name).execute([])) == value, name


@pytest.mark.parametrize("length", [1, 2, 767, 768])
def test_decoder_takes_every_length(demo_pte, length):
    """1, 2, cap - 1 and cap tokens, in as many calls as they need; one more is refused."""
    import torch

    from mvlm.runtime import PteError, PteProgram

    program = PteProgram(demo_pte)
    embeddings = program.token_embedding(torch.full((1, length), 5))
    assert torch.isfinite(program.text_decoder(embeddings, 0)).all()
    with pytest.raises(PteError, match="text_decoder"):
        program.text_decoder(embeddings, 768 - length + 1)
