"""What the projector was trained with is the model that is asked, and the answers are the data set's."""

from __future__ import annotations

import random

import torch
import train_projector
from gauge.easy_vqa import read_questions
from gauge.vlm import Prompts, pixel_values


def test_packed_questions_are_answered_as_each_alone(gauge, vlm, vlm_checkpoint):
    prompts, picture = Prompts(vlm_checkpoint), 5
    questions = [item for item in read_questions(gauge.easy_vqa, "train") if item.picture == picture]
    image = vlm.encode_image(pixel_values(questions[0].path, vlm_checkpoint))
    language = train_projector.FrozenLlama(vlm.language_model, prompts.before)
    language.block = train_projector._block  # compiling takes longer than computing once
    batch, [taken] = train_projector.pack(prompts, [questions])
    assert len(taken) >= 5
    logits, targets = language.answer_logits(image, batch)
    expected = []
    for item in taken:
        answer = prompts.answer(item.answer)
        ids = [*prompts.question(item.question), *answer[:-1]]
        before, after = (vlm.embed_tokens(torch.tensor([part])) for part in (prompts.before, ids))
        expected.append(vlm(torch.cat([before, image, after], dim=1))[0, -len(answer) :])
    expected = torch.cat(expected)
    assert targets.tolist() == [token for item in taken for token in prompts.answer(item.answer)]
    # bfloat16 keeps 8 bits, and a wrong position or mask changes logits by about as much as they are.
    centred, error = expected - expected.mean(dim=1, keepdim=True), logits - expected
    assert (error - error.mean(dim=1, keepdim=True)).norm() < 0.1 * centred.norm()


def test_answers_for_other_pictures_of_the_same_kind_are_the_data_sets(gauge):
    """Of pictures of the test split, whose answers the table does not know, the data set says the same."""
    training = train_projector.Asker(read_questions(gauge.easy_vqa, "train"))
    unseen = train_projector.Asker(read_questions(gauge.easy_vqa, "test"))
    table = {
        scene: {pair[0]: pair[1] for pairs in groups.values() for pair in pairs}
        for scene, groups in training.sorted.items()
    }
    assert len(table) == 24
    compared = 0
    for picture, scene in unseen.scenes.items():
        for item in unseen.own[picture]:
            if item.question in table[scene]:
                assert table[scene][item.question] == item.answer
                compared += 1
    assert compared > 5000
    rng = random.Random(0)
    picture = next(iter(training.scenes))
    fits = training.mixed(picture, 20, (0, 1, 0, 1, 0), rng)
    assert all(any(word in item.question for word in training.scenes[picture]) for item in fits)
