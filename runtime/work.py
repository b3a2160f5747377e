"""What a ``.pte`` has to compute and to read: the multiply-adds of its linears, and the bytes of their weights.

Both are counted in the file itself, in the graphs of its XNNPACK delegates: a FullyConnected node with a weight [out,
in] and an input of n rows is ``n * out * in`` multiply-adds. The row counts in the file are the greatest: a call of
fewer tokens has no more rows than tokens (and the layer that makes logits runs for the last positions only). Attention,
norms, activations and convolutions are not counted: beside the linears they are small, and how much of the machine the
linears could use is the question. So a share of the machine's limit that is made of these numbers is a lower bound.

Knows nothing of torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# ExecuTorch's flatbuffers are read in one place, mvlm.export.inspect, whose facts do not go into single nodes; so this
# goes through what lies under those facts.
from mvlm.export import inspect
from mvlm.export.contract import TEXT_DECODER, TOKENIZER, VISION_ENCODER
from mvlm.export.errors import ExportError


@dataclass(frozen=True)
class Work:
    """What one file's methods have to do.

    Attributes:
        vision: linears of the vision encoder; none for a language model alone.
        text: linears of the text decoder.
        max_seq_len: tokens that one call of the text decoder takes.
        max_context_len: positions of the KV cache.
        cache_bytes: of the whole KV cache.
    """

    vision: tuple[inspect.Linear, ...]
    text: tuple[inspect.Linear, ...]
    max_seq_len: int
    max_context_len: int
    cache_bytes: int

    def encode_macs(self) -> Mapping[int, int]:
        """Multiply-adds of one picture, by bits of the weights."""
        return _sum_up((linear.weights, _macs(linear)) for linear in self.vision)

    def prefill_macs(self, tokens: int) -> Mapping[int, int]:
        """Multiply-adds of reading a prompt, by bits of the weights."""
        macs: Counter[int] = Counter()
        for step in _steps(tokens, self.max_seq_len):
            macs.update(_sum_up((linear.weights, _macs(linear, step)) for linear in self.text))
        return dict(macs)

    def decode_bytes(self, depth: float) -> float:
        """Bytes that a token at a depth of so many positions reads: all weights once, and the cache so far."""
        return sum(linear.num_bytes for linear in self.text) + self.cache_bytes * depth / self.max_context_len


@dataclass(frozen=True)
class PteSummary:
    """What a benchmark has to know of a file beforehand.

    Attributes:
        facts: see :class:`mvlm.export.inspect.PteFacts`.
        work: what it has to do.
        tokenizer: the SentencePiece model in it.
    """

    facts: inspect.PteFacts
    work: Work
    tokenizer: bytes


def read_pte(path: Path) -> PteSummary:
    """Reads an mvlm ``.pte``.

    Raises:
        ExportError: there is no such file, or it is not one of mvlm's.
    """
    facts = inspect.inspect_pte(path)
    names = {method.name for method in facts.methods}
    if facts.mvlm is None or facts.mvlm.tokenizer is None or TEXT_DECODER not in names:
        raise ExportError(
            f"{path}: is an ExecuTorch program, but not one of mvlm's; make one with: python -m mvlm.export"
        )
    with path.open("rb") as file:
        program = inspect._Program(path, file)
        plans = {inspect._text(plan.Name()): plan for plan in program.plans}
        try:
            linears = {name: tuple(_linears(program, plans[name])) for name in names & {VISION_ENCODER, TEXT_DECODER}}
            tokenizer = plans[TOKENIZER]
            _, tensor = program.values(tokenizer)[tokenizer.Outputs(0)]
            model = bytes(program.constant_bytes(tensor))
        except inspect._BROKEN as error:
            raise ExportError(f"{path}: its delegates cannot be read ({error})") from error
    decoder = next(method for method in facts.methods if method.name == TEXT_DECODER)
    return PteSummary(
        facts,
        Work(
            vision=linears.get(VISION_ENCODER, ()),
            text=linears[TEXT_DECODER],
            max_seq_len=facts.metadata["get_max_seq_len"],
            max_context_len=facts.metadata["get_max_context_len"],
            # What the decoder keeps from call to call is its KV cache and nothing else.
            cache_bytes=sum(arena.mutable_bytes for arena in decoder.memory),
        ),
        model,
    )


def _macs(linear: inspect.Linear, tokens: int | None = None) -> int:
    """Multiply-adds of a linear; of the text decoder's, in a call of so many ``tokens``."""
    rows = linear.rows if tokens is None else min(tokens, linear.rows)
    return rows * linear.in_features * linear.out_features


def _steps(tokens: int, longest: int) -> Iterator[int]:
    """How a prompt is cut into calls of the text decoder."""
    while tokens > 0:
        yield min(tokens, longest)
        tokens -= longest


def _sum_up(pairs: Iterator[tuple[int, int]]) -> dict[int, int]:
    sums: Counter[int] = Counter()
    for bits, macs in pairs:
        sums[bits] += macs
    return dict(sums)


def _linears(program: Any, plan: Any) -> Iterator[inspect.Linear]:
    delegates = list(inspect._items(plan.DelegatesLength(), plan.Delegates))
    for kind, call in program.instructions(plan):
        if kind != "DelegateCall":
            continue
        delegate = delegates[call.DelegateIndex()]
        if inspect._text(delegate.Id()) != inspect._XNNPACK:
            continue
        graph = program.graph(delegate)
        if graph is None:
            raise ValueError("no XNNPACK graph")
        yield from graph.linears
