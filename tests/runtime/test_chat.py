"""Conversations and several pictures: what the language model reads, the one KV cache, interruptions, refusals."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from rounding import MARGIN, TIE, least_lead, read, root_mean_square, rounding_noise
from torch import Tensor

from mvlm.export.demo.world import draw, sample_scene
from mvlm.runtime import MobileVLM, PteError, PteProgram
from mvlm.runtime.sampler import Sampler

FIRST, SECOND = "What color is the circle?", "Describe the image."

#: Texts around the questions, as the prompt of LLaVA and MobileVLM has them (conversation "v1").
BEFORE_FIRST = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: "
)
BEFORE_SECOND, BEHIND = "USER: ", " ASSISTANT:"
BOS, EOS = 1, 2


class Recorder:
    """Stands before a program's text_decoder and keeps what passes."""

    def __init__(self, program: PteProgram) -> None:
        self._run = program.text_decoder
        self.calls: list[tuple[Tensor, int, Tensor]] = []

    def __call__(self, embeddings: Tensor, start_pos: int) -> Tensor:
        logits = self._run(embeddings, start_pos)
        self.calls.append((embeddings.clone(), start_pos, logits.clone()))
        return logits

    @property
    def positions(self) -> list[tuple[int, int]]:
        """First position and number of positions of each call."""
        return [(start_pos, embeddings.shape[1]) for embeddings, start_pos, _ in self.calls]


@pytest.fixture(scope="module")
def model(demo_pte: Path) -> MobileVLM:
    return MobileVLM(demo_pte)


@pytest.fixture
def recorder(model, monkeypatch) -> Recorder:
    recorder = Recorder(model.program)
    monkeypatch.setattr(model.program, "text_decoder", recorder)
    return recorder


def drawn(*seeds: int) -> list[Image.Image]:
    return [draw(sample_scene(random.Random(seed), count=3), 224, 224) for seed in seeds]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return drawn(1, 2)


def ids_embedded(program: PteProgram, *ids: int) -> Tensor:
    return program.token_embedding(torch.tensor([ids]))


def greedy(program: PteProgram, embeddings: Tensor, most: int) -> Iterator[tuple[int, Tensor]]:
    """Tokens, the end token too, each with the logits it was chosen from."""
    position = 0
    for _ in range(most):
        logits = program.text_decoder(embeddings, position).clone()
        position += embeddings.shape[1]
        token = int(logits.argmax())
        yield token, logits
        if token == EOS:
            return
        embeddings = ids_embedded(program, token)


def check_read_anew(recorder: Recorder, fresh: PteProgram, conversation: Tensor) -> list[int]:
    """Compares a conversation through one KV cache with its reading anew, by a program that has read nothing yet.

    Args:
        recorder: what a chat read and got.
        fresh: the same file.
        conversation: embeddings [1, n, D] of all that is before the last answer.

    Returns:
        The last answer's tokens, the end token too.
    """
    # In the same steps the same kernels run, and any cache that holds what it should gives the same bits.
    for embeddings, start_pos, logits in recorder.calls:
        assert torch.equal(fresh.text_decoder(embeddings, start_pos), logits)

    # All at once, kernels for many rows run where those for one row did.
    first = next(i for i, (start, n) in enumerate(recorder.positions) if start + n == conversation.shape[1])
    answer = recorder.calls[first:]
    parts = [conversation, *(embeddings for embeddings, *_ in answer[1:])]
    logits, kept_logits = read(fresh.text_decoder, parts), torch.stack([logits for *_, logits in answer])
    noise = rounding_noise(fresh.text_decoder, parts)
    assert root_mean_square(logits - kept_logits) <= MARGIN * noise
    assert least_lead(logits) > TIE * noise, "a tie, which rounding may decide: ask something else"
    assert torch.equal(logits.argmax(-1), kept_logits.argmax(-1))
    return logits.argmax(-1).tolist()


def test_a_second_picture_leaves_the_first_ones_embeddings(model, pictures):
    first = model.embed_image(pictures[0])
    kept = first.clone()
    second = model.embed_image(pictures[1])
    assert not torch.equal(second, kept)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("marked", [True, False])
def test_pictures_go_where_their_marks_are(model, pictures, marked):
    encode = model.tokenizer.encode
    if marked:
        question = "One <image>, two <image>?"
        texts = [BEFORE_FIRST + "One ", ", two ", "?" + BEHIND]
    else:
        question = "Which?"
        texts = [BEFORE_FIRST, "\n", "\nWhich?" + BEHIND]
    # A program of its own for each picture: nothing can be overwritten.
    features = [MobileVLM(model.program.path).embed_image(picture) for picture in pictures]
    texts_1LD = [ids_embedded(model.program, *ids) if ids else None for ids in map(encode, texts)]
    expected = [ids_embedded(model.program, BOS), texts_1LD[0], features[0], texts_1LD[1], features[1], texts_1LD[2]]
    embeddings = model.embed(pictures, question)
    assert torch.equal(embeddings, torch.cat([part for part in expected if part is not None], dim=1))

    swapped = model.embed(pictures[::-1], question)
    assert swapped.shape == embeddings.shape
    logits = [model.program.text_decoder(prompt, 0).clone() for prompt in (embeddings, swapped)]
    assert (logits[0] - logits[1]).abs().max() > 0.01 * logits[0].abs().max()


def test_one_picture_is_a_sequence_of_one(model, sample_image):
    expected = model.embed(sample_image, FIRST)
    for images in ([sample_image], (str(sample_image),), Image.open(sample_image)):
        assert torch.equal(model.embed(images, FIRST), expected)
    assert torch.equal(model.embed(None, FIRST), model.embed([], FIRST))


@pytest.mark.parametrize(
    ("questions", "count", "most"),
    [((FIRST, SECOND), 1, 40), ((SECOND, FIRST), 1, 3), ((FIRST, SECOND), 15, 40)],
    ids=["ended by the model", "ended by max_new_tokens", "longer than one call takes"],
)
def test_two_turns_equal_the_whole_conversation_read_anew(model, recorder, pictures, questions, count, most):
    chat = model.chat()
    answers = [chat.answer(questions[0], pictures[:1] * count, max_new_tokens=most)]
    used = chat.position
    answers.append(chat.answer(questions[1], pictures[1], max_new_tokens=40))

    # What SentencePiece makes of the parts, picture by picture and turn by turn.
    encode = model.tokenizer.encode
    fresh = PteProgram(model.program.path)
    features = [MobileVLM(model.program.path).embed_image(picture) for picture in pictures]
    opening = [ids_embedded(fresh, BOS, *encode(BEFORE_FIRST)), features[0]]
    for _ in range(count - 1):
        opening += [ids_embedded(fresh, *encode("\n")), features[0]]
    opening.append(ids_embedded(fresh, *encode(f"\n{questions[0]}{BEHIND}")))
    told = [token for token, _ in greedy(fresh, torch.cat(opening, dim=1), most)]
    assert (told[-1] == EOS) == (most > 3)
    told = [token for token in told if token != EOS]
    assert model.tokenizer.decode(told) == answers[0]
    following = [ids_embedded(fresh, *told, EOS, *encode(BEFORE_SECOND)), features[1]]
    following.append(ids_embedded(fresh, *encode(f"\n{questions[1]}{BEHIND}")))
    conversation = torch.cat(opening + following, dim=1)

    # All that was read, in the order of its positions, and each position once.
    length = conversation.shape[1]
    assert torch.equal(torch.cat([embeddings for embeddings, *_ in recorder.calls], dim=1)[:, :length], conversation)
    starts = [start for start, _ in recorder.positions]
    assert starts == [sum(n for _, n in recorder.positions[:i]) for i in range(len(starts))]
    assert used == torch.cat(opening, dim=1).shape[1] + len(told) + 1

    anew = check_read_anew(recorder, PteProgram(model.program.path), conversation)
    assert anew[-1] == EOS
    assert model.tokenizer.decode(anew[:-1]) == answers[1]


def test_two_turns_of_a_float32_model_read_anew(text_pte, monkeypatch):
    """Where nothing is rounded to 8 bits, the noise is a few last bits, and no fault is small enough to hide in it."""
    model = MobileVLM(text_pte.path)
    recorder = Recorder(model.program)
    monkeypatch.setattr(model.program, "text_decoder", recorder)
    chat = model.chat()
    chat.answer("One question, of as many tokens as it takes?", max_new_tokens=5)
    chat.answer("And the next?", max_new_tokens=5)
    # The second answer's first token comes after the question, the others after one token each.
    length = recorder.calls[-4][1]
    conversation = torch.cat([embeddings for embeddings, *_ in recorder.calls], dim=1)[:, :length]
    assert len(check_read_anew(recorder, PteProgram(text_pte.path), conversation)) == 5


def test_conversations_and_questions_take_turns(model, recorder, pictures):
    alone = []
    for picture in pictures:
        chat = model.chat()
        alone.append([chat.answer(FIRST, picture), chat.answer(SECOND)])
    chats = [model.chat(), model.chat()]
    firsts = [chat.answer(FIRST, picture) for chat, picture in zip(chats, pictures, strict=True)]
    model.answer(pictures[0], "How many shapes are there?")
    assert [[first, chat.answer(SECOND)] for first, chat in zip(firsts, chats, strict=True)] == alone
    # One that has the cache to itself reads nothing twice.
    recorder.calls.clear()
    position = chats[1].position
    chats[1].answer(FIRST)
    assert recorder.positions[0][0] == position - 1


def test_answers_take_turns_token_by_token(model, recorder):
    pictures = drawn(2, 7)
    alone = [list(model.generate(picture, SECOND)) for picture in pictures]
    # Each turn reads all that was there anew, by other kernels: rounding must not decide any token.
    for picture in pictures:
        noise = rounding_noise(PteProgram(model.program.path).text_decoder, [model.embed(picture, SECOND)])
        assert least_lead(torch.stack([logits for *_, logits in recorder.calls])) > TIE * noise
    streams = [model.generate(picture, SECOND) for picture in pictures]
    together: list[list[str]] = [[], []]
    while streams_left := [i for i in range(2) if len(together[i]) < len(alone[i])]:
        for i in streams_left:
            together[i].append(next(streams[i]))
    assert together == alone
    assert [next(stream, None) for stream in streams] == [None, None]


def test_an_abandoned_answer_counts_as_far_as_it_came(model, recorder, pictures):
    chat = model.chat()
    stream = chat.ask(SECOND, pictures[0])
    next(stream)
    stream.close()
    tokens = len(recorder.calls)
    position = chat.position
    assert position == model.embed(pictures[0], SECOND).shape[1] + tokens + 1

    same = model.chat()
    same.answer(SECOND, pictures[0], max_new_tokens=tokens)
    assert same.position == position
    assert chat.answer(FIRST) == same.answer(FIRST)
    assert chat.position == same.position


def test_the_next_question_abandons_an_answer(model, pictures):
    chat = model.chat()
    stream = chat.ask(SECOND, pictures[0])
    next(stream)
    second = chat.answer(FIRST)
    position = chat.position
    with pytest.raises(RuntimeError, match="was abandoned when the conversation got its next question"):
        next(stream)
    assert chat.position == position
    assert second

    stream = chat.ask(SECOND)
    chat.reset()
    assert (chat.position, chat.room) == (0, 768)
    with pytest.raises(RuntimeError, match="abandoned"):
        next(stream)
    assert chat.answer(FIRST, pictures[1]) == model.answer(pictures[1], FIRST)


def test_what_fails_leaves_the_conversation_as_it_was(model, monkeypatch, pictures):
    expected = model.chat()
    expected.answer(FIRST, pictures[0])
    expected_answer = expected.answer(SECOND)

    chat = model.chat()
    chat.answer(FIRST, pictures[0])
    position = chat.position
    chat.ask(SECOND).close()
    for arguments in ({"prompt": " "}, {"prompt": "<image>?"}, {"prompt": "x", "images": "nowhere.jpg"}):
        with pytest.raises(ValueError, match=r"empty|no picture|no such file"):
            chat.ask(**arguments)

    for fails_at in (1, 2):
        calls = 0

        def sometimes(self, logits, fails_at=fails_at):
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise RuntimeError("not finite")
            return int(logits.argmax())

        with monkeypatch.context() as patch:
            patch.setattr(Sampler, "__call__", sometimes)
            with pytest.raises(RuntimeError, match="not finite"):
                chat.answer(SECOND, pictures[1])
        assert chat.position == position
    assert chat.answer(SECOND) == expected_answer
    assert chat.position == expected.position


@pytest.mark.parametrize("at", [1, 4])
def test_ctrl_c_while_the_model_runs(model, monkeypatch, pictures, at):
    chat = model.chat()
    run = model.program.text_decoder
    calls = 0

    def interrupted(embeddings, start_pos):
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return run(embeddings, start_pos)

    with monkeypatch.context() as patch:
        patch.setattr(model.program, "text_decoder", interrupted)
        with pytest.raises(KeyboardInterrupt):
            chat.answer(SECOND, pictures[0])
    if at == 1:
        assert chat.position == 0
        return
    same = model.chat()
    same.answer(SECOND, pictures[0], max_new_tokens=at - 1)
    assert chat.position == same.position
    assert chat.answer(FIRST) == same.answer(FIRST)


def test_refuses_when_the_positions_are_used_up(model, pictures):
    chat = model.chat()
    chat.answer(FIRST, [pictures[0]] * 38)
    position, room = chat.position, chat.room
    assert position + room == 768
    needed = 1 + len(model.tokenizer.encode(f"{BEFORE_SECOND}{'shape ' * 40}{BEHIND}"))
    # The end token of the answer is the question's first position.
    expected = (
        rf"has used {position - 1} of 768 positions, and this question takes {needed} .* begin a new conversation"
    )
    with pytest.raises(ValueError, match=expected):
        chat.ask("shape " * 40)
    assert chat.position == position
    with pytest.raises(ValueError, match=r"the prompt takes \d+ positions .* has 768 .* shorten the prompt"):
        model.chat().ask(FIRST, [pictures[0]] * 60)


def test_an_answer_to_the_last_position(text_pte):
    model = MobileVLM(text_pte.path)
    chat = model.chat()
    chat.answer("one?", temperature=1.0, seed=1)
    assert (chat.position, chat.room) == (256, 0)
    with pytest.raises(ValueError, match=r"has used 255 of 256 positions, and this question takes \d+ "):
        chat.ask("two?")
    chat.reset()
    assert chat.room == 256
    assert chat.answer("two?", max_new_tokens=3) == model.answer(None, "two?", max_new_tokens=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(prompt="<image>?", images=2),
            "<image> 1 times, but there are 2 pictures; put it where each",
        ),
        (dict(prompt="<image><image><image>?", images=2), "3 times, but there are 2 pictures"),
        (dict(prompt="?", images=2, raw_prompt=True), "must say itself where the pictures go"),
    ],
)
def test_marks_and_pictures_must_agree(model, pictures, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.chat().ask(**{**arguments, "images": pictures})


def test_a_language_model_alone_converses_without_pictures(text_pte, pictures):
    model = MobileVLM(text_pte.path)
    chat = model.chat()
    with pytest.raises(PteError, match="takes no picture"):
        chat.ask(FIRST, pictures)
    chat.answer("<image> one?", max_new_tokens=4)
    # BOS and the question, four tokens, of which the last was not run, and the end token.
    position = 1 + len(model.tokenizer.encode("USER: <image> one? ASSISTANT:")) + 4 + 1
    assert chat.position == position
    chat.answer("two?", max_new_tokens=2)
    assert chat.position == position + len(model.tokenizer.encode("USER: two? ASSISTANT:")) + 2 + 1
