"""Logits of several positions, against the eager model over the whole text at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mvlm.runtime import PteError, PteProgram

#: Positions of the tiny model.
POSITIONS = 256
#: Logits that the file gives of a call at the most.
K = 8


@pytest.fixture
def program(text_pte) -> PteProgram:
    return PteProgram(text_pte.path)


@pytest.fixture(scope="module")
def text(text_pte) -> tuple[Tensor, Tensor]:
    """Embeddings [1, 256, D] and the logits [256, V] of each position."""
    ids = torch.randint(0, text_pte.metadata.vocab_size, (1, POSITIONS), generator=torch.Generator().manual_seed(0))
    embeddings = text_pte.model.embed_tokens(ids)
    return embeddings, text_pte.model(embeddings)[0]


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Float32 both, sums in another order."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n", [1, 7, 8, 9, POSITIONS])
def test_logits_of_the_last_positions(program, text, n):
    embeddings, expected = text
    logits = program.text_decoder_logits(embeddings[:, :n], 0)
    assert_same(logits, expected[max(n - K, 0) : n])
    last = program.text_decoder(embeddings[:, :n], 0)
    assert torch.equal(logits[-1], last)
    assert_same(logits, torch.stack([program.text_decoder(embeddings[:, i : i + 1], i).clone() for i in range(n)])[-K:])


@pytest.mark.parametrize("step", [4, 100, 124])
def test_logits_of_a_text_of_several_calls(program, text, step):
    """Of which the last has two positions alone."""
    embeddings, expected = text
    program.metadata = replace(program.metadata, max_seq_len=step, logit_positions=min(K, step))
    n = 2 * step + 2
    assert_same(program.text_decoder_logits(embeddings[:, :n], 0), expected[n - min(K, step) : n])


@pytest.fixture
def calls(program, monkeypatch) -> list[tuple[int, int]]:
    """Where the calls of text_decoder began, and how many positions they had."""
    seen: list[tuple[int, int]] = []
    run = program._run

    def recorded(method: str, inputs: list[Tensor]) -> Tensor:
        seen.append((int(inputs[1]), inputs[0].shape[1]))
        return run(method, inputs)

    monkeypatch.setattr(program, "_run", recorded)
    return seen


@pytest.mark.parametrize(
    ("first", "n", "steps"),
    [
        (0, 1, [1]),
        (0, 8, [8]),
        (0, 9, [8, 1]),
        (3, 9, [9]),
        (3, 20, [11, 8, 1]),
        (91, 120, [99, 8, 8, 5]),
        (92, 120, [100, 8, 8, 4]),
        (93, 110, [100, 8, 2]),
        (100, 101, [100, 1]),
        (230, 250, [100, 100, 38, 8, 4]),
        (255, 256, [100, 100, 56]),
    ],
)
def test_score_gives_every_position_from_the_first_wanted_on(program, text, calls, first, n, steps):
    """In the longest steps before it, and 8 positions a step from there on."""
    embeddings, expected = text
    program.metadata = replace(program.metadata, max_seq_len=100)
    assert_same(program.score(embeddings[:, :n], first), expected[first:n])
    assert [count for _, count in calls] == steps
    assert [start for start, _ in calls] == [sum(steps[:i]) for i in range(len(steps))]


def test_score_goes_on_behind_what_was_read(program, text):
    """Several continuations of one beginning, each as if nothing but the beginning had been read."""
    embeddings, expected = text
    program.text_decoder(embeddings[:, :50], 0)
    others = embeddings[:, 200:220]
    first = program.score(others, 0, start_pos=50)
    assert_same(program.score(embeddings[:, 50:70], 0, start_pos=50), expected[50:70])
    assert torch.equal(program.score(others, 0, start_pos=50), first)


def test_score_refuses_what_it_cannot_do(program, text):
    embeddings, _ = text
    for first, n in ((-1, 5), (5, 5), (0, 0)):
        with pytest.raises(ValueError, match=rf"first {first} is not in 0 .. {n - 1}: there are {n} positions"):
            program.score(embeddings[:, :n], first)
    for start in (-1, 1):
        with pytest.raises(ValueError, match=rf"256 positions from position {start} on do not fit: .*0 .. 255$"):
            program.score(embeddings, 0, start)
    with pytest.raises(PteError, match="text_decoder"):
        program.text_decoder_logits(embeddings, 1)


@pytest.mark.parametrize("first", [0, 200, 290])
def test_score_of_the_demo_model_with_a_quantized_cache(demo_pte, first):
    """Steps of one token, of eight and of many: they agree but for what rounding makes of a last bit."""
    program = PteProgram(demo_pte)
    assert (program.metadata.max_seq_len, program.metadata.logit_positions) == (256, K)
    ids = torch.randint(3, program.metadata.vocab_size, (1, 300), generator=torch.Generator().manual_seed(1))
    embeddings = program.token_embedding(ids)
    scored = program.score(embeddings, first)
    assert scored.shape == (300 - first, program.metadata.vocab_size)
    if first:
        program.text_decoder(embeddings[:, :first], 0)
    single = torch.stack([program.text_decoder(embeddings[:, i : i + 1], i).clone() for i in range(first, 300)])
    error = (scored - single).norm() / single.norm()
    # 20 dB is the least that test_pte asks of two ways to compute the same; another position's logits have 0.
    assert error < 10 ** (-20 / 20)
