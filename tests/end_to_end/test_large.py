"""MobileVLM-1.7B at its real size with random weights: pytest -m large. About 25 minutes and 10 GiB on 2 cores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mvlm.export import demo
from mvlm.export.demo.write_checkpoint import write_checkpoint
from mvlm.export.models import MobileVLM
from mvlm.export.models.mobilevlm import mobilevlm_1_7b


def write_random_checkpoint(folder: Path) -> None:
    """A float16 checkpoint in MobileVLM V1's layout, its weights drawn so that activations keep their size."""
    with torch.device("meta"):
        model = MobileVLM(mobilevlm_1_7b()).half()
    model = model.to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                width = parameter.shape[1:].numel() if isinstance(module, nn.Linear | nn.Conv2d) else 2500
                parameter.normal_(0, width**-0.5, generator=generator)
            else:
                parameter.fill_(name == "weight")
    write_checkpoint(model, (demo.CHECKPOINT / "tokenizer.model").read_bytes(), folder)


@pytest.mark.large
def test_real_size_exports_and_answers(tmp_path, llava_main, sample_image):
    checkpoint, pte, stats = tmp_path / "mobilevlm-1.7b", tmp_path / "mobilevlm-1.7b.pte", tmp_path / "stats.json"
    write_random_checkpoint(checkpoint)
    subprocess.run(
        [sys.executable, "-m", "mvlm.export", "--model", str(checkpoint), "--pte-name", str(pte)], check=True
    )
    assert 900e6 < pte.stat().st_size < 1100e6
    command = [llava_main, "--model_path", pte, "--image_path", sample_image, "--prompt", "What is in the picture?"]
    options = ["--temperature", "0", "--max_new_tokens", "16", "--stats_path", stats]
    subprocess.run([str(word) for word in [*command, *options]], check=True)
    measured = json.loads(stats.read_text())
    print(json.dumps(measured, indent=2))
    assert measured["prompt_tokens"] > 144
    assert measured["peak_rss_bytes"] < 3 * 2**30
