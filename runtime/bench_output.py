"""What other programs say about their speed: the figures in what llama.cpp's programs print, and in our own statistics.

Pure functions from text to numbers.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """Something that is measured.

    Attributes:
        title: for people.
        unit: likewise.
        higher_is_better: whether more of it is faster.
    """

    title: str
    unit: str
    higher_is_better: bool = False


#: Everything that is measured, in the order in which it is shown.
FIGURES = {
    "load": Figure("load", "ms"),
    "encode": Figure("image encode", "ms"),
    "prefill": Figure("prefill", "tok/s", higher_is_better=True),
    "decode": Figure("decode", "tok/s", higher_is_better=True),
    "first_token": Figure("time to first token", "ms"),
    "memory": Figure("peak resident", "MiB"),
    "anonymous": Figure("peak anonymous", "MiB"),
}


@dataclass(frozen=True)
class Output:
    """What a program said about one run.

    Attributes:
        figures: name in :data:`FIGURES` -> value, in its unit.
        counts: what it worked on, ``prompt_tokens``, ``depth`` (positions before the first token that was decoded) and
            ``decode_tokens``, as far as it says so.
    """

    figures: Mapping[str, float]
    counts: Mapping[str, int] = field(default_factory=dict)


def parse_stats(stats: Mapping[str, Any]) -> Output:
    """``llava_main --stats_path``; raises KeyError where something is missing."""
    figures = {
        "load": stats["load_ms"],
        "first_token": stats["time_to_first_token_ms"],
        "memory": stats["peak_rss_bytes"] / 2**20,
        "anonymous": stats["peak_anonymous_bytes"] / 2**20,
    }
    if stats["image_encode_ms"] is not None:
        figures["encode"] = stats["image_encode_ms"]
    if stats["prefill_ms"] > 0:
        figures["prefill"] = 1000 * stats["prompt_tokens"] / stats["prefill_ms"]
    if stats["decode_tokens"] > 0 and stats["decode_ms"] > 0:
        figures["decode"] = 1000 * stats["decode_tokens"] / stats["decode_ms"]
    counts = {
        "prompt_tokens": stats["prompt_tokens"],
        "depth": stats["prompt_tokens"],
        "decode_tokens": stats["decode_tokens"],
    }
    return Output(figures, counts)


def parse_llama_cpp(text: str) -> Output:
    """Anything that a program of llama.cpp's printed: llama-bench -o json, or the lines that --perf makes others print.

    Unknown text gives no figures.
    """
    table = _llama_bench(text)
    return table if table is not None else _perf_lines(text)


#: Of a picture: "mtmd batch encoding done in 1112 ms", "image slice encoded in 1112 ms", and of older versions "image
#: encoded in 1112.34 ms by CLIP". A picture may be cut into slices.
_ENCODED = re.compile(r"(?:mtmd batch encoding done|image (?:slice )?encoded|image/slice encoded) in\s+([\d.]+) ms")
#: Of a program that repeats it: "encode 0: 1112.3 ms".
_ENCODED_AGAIN = re.compile(r"^encode \d+:\s+([\d.]+) ms", re.MULTILINE)
_LOAD = re.compile(r"\bload time =\s+([\d.]+) ms")
_PROMPT = re.compile(r"prompt eval time =\s+([\d.]+) ms /\s+(\d+) tokens")
_EVAL = re.compile(r"(?<!prompt )eval time =\s+([\d.]+) ms /\s+(\d+) (?:runs|tokens)")


def _perf_lines(text: str) -> Output:
    figures: dict[str, float] = {}
    counts: dict[str, int] = {}
    slices = [float(ms) for ms in _ENCODED.findall(text)]
    again = [float(ms) for ms in _ENCODED_AGAIN.findall(text)]
    if slices:
        figures["encode"] = sum(slices)
    elif again:
        figures["encode"] = min(again)
    if match := _LOAD.search(text):
        figures["load"] = float(match[1])
    if match := _PROMPT.search(text):
        prompt_ms, tokens = float(match[1]), int(match[2])
        counts["prompt_tokens"] = counts["depth"] = tokens
        figures["first_token"] = prompt_ms
        # With a picture llama.cpp's clock runs on while it is encoded: that is no speed of reading a prompt.
        if not slices and prompt_ms > 0:
            figures["prefill"] = 1000 * tokens / prompt_ms
    if match := _EVAL.search(text):
        decode_ms, tokens = float(match[1]), int(match[2])
        counts["decode_tokens"] = tokens
        if decode_ms > 0 and tokens > 0:
            figures["decode"] = 1000 * tokens / decode_ms
    return Output(figures, counts)


def _llama_bench(text: str) -> Output | None:
    """The array that ``llama-bench -o json`` prints, with whatever else is around it; None if there is none."""
    start, end = text.find("[\n"), text.rfind("]")
    try:
        tests = json.loads(text[start : end + 1]) if 0 <= start < end else None
    except ValueError:
        return None
    if not isinstance(tests, list) or not all(isinstance(test, dict) and "samples_ts" in test for test in tests):
        return None
    prompts = [test for test in tests if test["n_prompt"] > 0 and test["n_gen"] == 0]
    answers = [test for test in tests if test["n_prompt"] == 0 and test["n_gen"] > 0]
    figures: dict[str, float] = {}
    counts: dict[str, int] = {}
    if prompts:
        test = min(prompts, key=lambda test: test.get("n_depth", 0))
        figures["prefill"] = statistics.median(test["samples_ts"])
        counts["prompt_tokens"] = test["n_prompt"]
    if answers:
        test = max(answers, key=lambda test: test.get("n_depth", 0))
        figures["decode"] = statistics.median(test["samples_ts"])
        counts["depth"], counts["decode_tokens"] = test.get("n_depth", 0), test["n_gen"]
    return Output(figures, counts)
