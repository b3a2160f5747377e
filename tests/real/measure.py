"""The table of README's "Calibrate": R by each recipe, with and without calibration, through the ``.pte``.

    .venv/bin/python tests/real/measure.py --out build/quality

Exports each, reads the whole evaluation text through it, and writes what came of it to ``mvlm.json`` in the folder, one
entry for each: what ``ci/quality_curve.py`` draws. What is there already is not made anew. Takes about an hour on two
cores.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from gauge import make_gauge, windows
from sentencepiece import SentencePieceProcessor
from torch.nn.functional import kl_div

from mvlm.export.checkpoint import open_checkpoint
from mvlm.export.inspect import inspect_pte
from mvlm.export.quantize import meta_model, schemes_of
from mvlm.export.recipe import Recipe
from mvlm.export.smoothing import Smoothing, smoothed
from mvlm.export.stored_weights import linear_names, read_stored_linears
from mvlm.runtime import PteProgram

#: What is measured: a name, and flags of mvlm.export; {text} stands for the calibration text.
RUNS = {
    "mobile": "",
    "mobile, quick": "--calibrate quick",
    "mobile, calibrated on its own text": "--calibrate",
    "mobile, calibrated": "--calibrate --calibration-text {text}",
    "small": "--recipe small",
    "small, calibrated": "--recipe small --calibrate --calibration-text {text}",
    "mobile in groups of 64, calibrated": "--group-size 64 --calibrate --calibration-text {text}",
    "accurate": "--recipe accurate",
    "accurate, calibrated": "--recipe accurate --calibrate --calibration-text {text}",
}


def bits_of_linears(pte: Path) -> float:
    """Bits a weight of the language model's layers, scales included; without lm_head, which is the last linear."""
    linears = read_stored_linears(pte)["text_decoder"][:-1]
    stored = sum(len(linear.weight) + len(linear.scales) for linear in linears)
    return 8 * stored / sum(linear.in_features * linear.out_features for linear in linears)


@torch.no_grad()
def kl_of_linears(pte: Path) -> float:
    """KL to float32 of the float32 model with the layers' stored weights: without rounded inputs, cache and tables."""
    gauge, program = make_gauge(), PteProgram(pte)
    checkpoint = open_checkpoint(str(gauge.language_model))
    tokenizer = SentencePieceProcessor(model_proto=checkpoint.tokenizer)
    texts = windows(gauge.evaluation_text.read_text(encoding="utf-8"), tokenizer)
    right = checkpoint.load_model().language_model
    if program.smoothing is not None:
        checkpoint = smoothed(checkpoint, Smoothing.read(program.smoothing, checkpoint.config.text))
    model, meta = checkpoint.load_model(), meta_model(checkpoint)
    names = linear_names(meta, schemes_of(meta, Recipe.from_json(program.metadata.recipe)), "text_decoder")
    for name, linear in zip(names, read_stored_linears(pte)["text_decoder"], strict=True):
        if "layers" in name:
            model.get_submodule(name).weight.copy_(linear.tensor().dequantize())
    found = []
    for ids in texts:
        x, first = right.embed_tokens(ids[None, :-1]), len(ids) // 2
        logp, expected = (which(x)[0, first:].log_softmax(-1) for which in (model.language_model, right))
        found.append(kl_div(logp, expected, reduction="none", log_target=True).sum(-1))
    return float(torch.cat(found).mean())


def measure(name: str, flags: str, folder: Path) -> dict[str, object]:
    """Exports and reads; what is there is taken."""
    gauge = make_gauge()
    stem = name.replace(", ", "-").replace(" ", "-")
    pte, scores = folder / f"{stem}.pte", folder / f"{stem}.json"
    model, text = ["--model", str(gauge.language_model)], str(gauge.calibration_text)
    if not pte.exists():
        command = [sys.executable, "-m", "mvlm.export", *model, "--pte-name", str(pte)]
        subprocess.run([*command, *shlex.split(flags.format(text=shlex.quote(text)))], check=True)
    if not scores.exists():
        command = [sys.executable, "-m", "mvlm.runtime.perplexity", str(pte), "--text", str(gauge.evaluation_text)]
        subprocess.run([*command, *model, "--json", str(scores)], check=True)
    found = json.loads(scores.read_text())
    return {
        "name": name,
        "flags": flags.format(text="calibration.txt"),
        "bits": round(bits_of_linears(pte), 3),
        "bytes": inspect_pte(pte).size,
        "kl_linears": kl_of_linears(pte),
        **{key: found[key] for key in ("perplexity", "kl_mean", "kl_error", "kl_p99", "top1", "tokens")},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for files and figures, about 1 GB")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME", help=", ".join(RUNS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for name in options.only:
        results.append(measure(name, RUNS[name], options.out))
        (options.out / "mvlm.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"{'':38}{'bits':>6}{'MB':>7}{'KL':>9}{'linears':>9}{'perplexity':>12}{'top-1':>8}")
    for row in results:
        print(
            f"{row['name']:38}{row['bits']:>6.2f}{row['bytes'] / 1e6:>7.0f}"
            f"{row['kl_mean']:>9.4f}{row['kl_linears']:>9.4f}{row['perplexity']:>12.2f}{row['top1']:>8.1%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
