"""What few bits cost on weights that nobody here made, through the ``.pte``; and that ruined answers are noticed.

The bounds are those that the project holds itself to, on a part of the evaluation text; ``measure.py`` takes the whole
and calibrates on more, for the figures in the README.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gauge import Gauge

from mvlm.export.__main__ import main as export
from mvlm.export.checkpoint import open_checkpoint
from mvlm.export.quantize import meta_model, quantize_parameters, schemes_of
from mvlm.export.recipe import Recipe
from mvlm.export.smoothing import Smoothing, smoothed
from mvlm.export.stored_weights import linear_names, read_stored_linears
from mvlm.runtime import PteProgram
from mvlm.runtime.fidelity import EagerStages, StoredWeights
from mvlm.runtime.perplexity import main as perplexity
from mvlm.runtime.test_pte import main as run_test_pte

#: Windows of the evaluation text that are read: 255 scored tokens each.
WINDOWS = 4

#: Tokens to calibrate on.
TOKENS = 8192


@pytest.fixture(scope="module")
def make(gauge: Gauge, tmp_path_factory: pytest.TempPathFactory):
    """Exports R with flags, once for the same flags."""
    made: dict[tuple[str, ...], Path] = {}

    def export_with(*flags: str) -> Path:
        if flags not in made:
            path = tmp_path_factory.mktemp("r") / "r.pte"
            assert export(["--model", str(gauge.language_model), "--pte-name", str(path), "--quiet", *flags]) == 0
            made[flags] = path
        return made[flags]

    return export_with


@pytest.fixture(scope="module")
def calibrated(make, gauge: Gauge) -> Path:
    """R by ``mobile``, calibrated on text."""
    flags = ("--calibrate", "--calibration-text", str(gauge.calibration_text), "--calibration-tokens", str(TOKENS))
    return make(*flags)


def score(pte: Path, gauge: Gauge) -> dict[str, float]:
    """What ``mvlm.runtime.perplexity`` says of a file of R."""
    out = pte.with_suffix(".json")
    arguments = [str(pte), "--text", str(gauge.evaluation_text), "--model", str(gauge.language_model)]
    assert perplexity([*arguments, "--limit", str(WINDOWS), "--json", str(out), "--quiet"]) == 0
    return json.loads(out.read_text())


def test_calibrated_answers_are_close_to_the_float_models(calibrated, gauge):
    found = score(calibrated, gauge)
    assert found["tokens"] == 255 * WINDOWS
    assert found["kl_mean"] <= 0.095 + 2 * found["kl_error"]
    assert found["top1"] >= 0.82 - 2 * found["top1_error"]
    assert found["perplexity"] <= 1.10 * found["float_perplexity"]


def test_better_scales_alone_help(make, gauge):
    """With what the model writes itself, in a fraction of the time."""
    assert score(make("--calibrate", "quick"), gauge)["kl_mean"] <= 0.30


def test_figures_are_those_of_quantized_eager(calibrated, gauge, r_model, evaluation_windows):
    """Perplexity within a percent, by torch's own losses."""
    program = PteProgram(calibrated)
    checkpoint = open_checkpoint(str(gauge.language_model))
    checkpoint = smoothed(checkpoint, Smoothing.read(program.smoothing, checkpoint.config.text))
    recipe = Recipe.from_json(program.metadata.recipe)
    names = linear_names(meta_model(checkpoint), schemes_of(meta_model(checkpoint), recipe), "text_decoder")
    linears = dict(zip(names, read_stored_linears(calibrated)["text_decoder"], strict=True))
    model = quantize_parameters(checkpoint, recipe, StoredWeights(linears))
    stages = EagerStages(model, recipe.max_context_len, recipe.kv_cache)
    losses, divergences = [], []
    for ids in evaluation_windows[:WINDOWS]:
        logp = stages.score(stages.token_embedding(ids[None, :-1]), 256).log_softmax(-1)
        expected = r_model(r_model.embed_tokens(ids[None, :-1]))[0, 256:].log_softmax(-1)
        losses.append(torch.nn.functional.nll_loss(logp, ids[257:], reduction="none"))
        divergences.append(torch.nn.functional.kl_div(logp, expected, reduction="none", log_target=True).sum(-1))
    found = score(calibrated, gauge)
    assert found["perplexity"] == pytest.approx(float(torch.cat(losses).mean().exp()), rel=0.01)
    # The divergence is small, and what rounding does to each token is not: its mean is as sure as its standard error.
    assert found["kl_mean"] == pytest.approx(float(torch.cat(divergences).mean()), abs=2 * found["kl_error"])


def test_a_right_file_is_found_faithful(calibrated, gauge, capsys):
    """Although in so deep a network the last bit of its input changes a fifth of the likeliest tokens."""
    code = run_test_pte([str(calibrated), "--model", str(gauge.language_model), "--quiet"])
    assert code == 0, capsys.readouterr().out


def test_a_recipe_that_ruins_answers_is_found_out(make, gauge, capsys):
    """``mobile`` as it was before there was calibration: large groups, HQQ, and a 4-bit lm_head."""
    pte = make("--group-size", "128", "--lm-head-bits", "4", "--scales", "hqq")
    code = run_test_pte([str(pte), "--model", str(gauge.language_model), "--quiet"])
    report = capsys.readouterr().out
    assert code == 1, report
    assert report.strip().splitlines()[-1] == "FAILED: forced tokens (quantized/float32), forced tokens (pte/float32)"
