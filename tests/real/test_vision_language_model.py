"""The vision-language model of real parts answers questions about pictures it has not seen."""

from __future__ import annotations

import pytest
from gauge import Gauge, right_answers
from gauge.easy_vqa import read_questions
from gauge.vlm import Prompts

from mvlm.runtime.mobilevlm import MobileVLM as PteModel
from mvlm.runtime.prompt import prompt_ids, prompt_text


@pytest.fixture(scope="module")
def pte(gauge: Gauge, tmp_path_factory) -> PteModel:
    """The model, exported with the default recipe through the command line."""
    from mvlm.export.__main__ import main

    path = tmp_path_factory.mktemp("vlm") / "vlm.pte"
    assert main(["--model", str(gauge.vision_language_model), "--pte-name", str(path), "--quiet"]) == 0
    return PteModel(path)


def test_questions_are_of_the_test_split_and_every_time_the_same(gauge):
    questions = gauge.questions(1000)
    assert gauge.questions(200) == questions[:200]
    assert len(set(questions)) == 1000
    assert set(questions) <= set(read_questions(gauge.easy_vqa, "test"))
    assert {item.kind for item in questions[:200]} == {"color", "shape", "yes/no"}


def test_float32_answers_nine_of_ten_questions(gauge, vlm, vlm_checkpoint):
    """Of 200 questions the share has a standard error of about 2 points; evaluate_vlm.py asks 1,000."""
    right = list(right_answers(vlm, vlm_checkpoint, gauge.questions(200)))
    assert len(right) == 200
    assert sum(right) >= 0.9 * len(right)


def test_exported_file_is_asked_in_the_same_words(gauge, pte, vlm_checkpoint):
    """What the model was trained and is judged with is what the runtime makes of a question."""
    prompts = Prompts(vlm_checkpoint)
    for item in gauge.questions(20):
        text = prompt_text(pte.metadata, item.question, images=1, raw=False)
        ids = prompt_ids(pte.tokenizer, pte.metadata, text)
        assert ids == [prompts.before, prompts.question(item.question)]
