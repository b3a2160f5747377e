"""Asks ExecuTorch's own MultimodalRunner, as a program of its own that knows nothing of mvlm.

    python multimodal_runner.py < job.json > answers.json

The job has the paths of the .pte and of the tokenizer, names of modules and paths of libraries to load first, and
questions: the text before the picture, the picture as a .npy or null, the text after it, and ``num_bos``. An answer is
the pieces of text that came, one a token, how many tokens the prompt had, or an error; with them comes the list of
shared libraries that the process has loaded.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from executorch.extension.llm.runner import GenerationConfig, MultimodalRunner, make_image_input, make_text_input


def ask(runner: MultimodalRunner, question: dict) -> dict:
    inputs = [make_text_input(question["before"])]
    if question["picture"]:
        inputs += [make_image_input(torch.from_numpy(np.load(question["picture"]))), make_text_input(question["after"])]
    config = GenerationConfig(echo=False, temperature=0, max_new_tokens=64, num_bos=question["num_bos"])
    pieces: list[str] = []
    stats: list = []
    runner.reset()
    try:
        if question.get("in_steps"):  # as apps do it that read the picture while the question is typed
            runner.prefill(inputs[:-2])
            runner.prefill(inputs[-2:-1])
            inputs = inputs[-1:]
        runner.generate(inputs, config, pieces.append, stats.append)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"pieces": pieces, "prompt_tokens": stats[0].num_prompt_tokens}


def main() -> None:
    job = json.load(sys.stdin)
    # ExecuTorch's logging goes to stdout.
    answers_to = os.dup(1)
    os.dup2(2, 1)
    for module in job["modules"]:
        importlib.import_module(module)
    for library in job["libraries"]:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    runner = MultimodalRunner(job["pte"], job["tokenizer"], None)
    answers = [ask(runner, question) for question in job["questions"]]
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    with os.fdopen(answers_to, "w") as file:
        json.dump({"answers": answers, "libraries": sorted(mapped)}, file)


if __name__ == "__main__":
    main()
