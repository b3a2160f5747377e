#!/usr/bin/env python3
"""What an export costs: exports models of the published shapes with random weights, and asks each .pte a question.

    ci/export_costs.py mobilevlm-1.7b mobilevlm-3b --folder build/costs

Prints a row of a Markdown table per model: seconds of each stage, peak resident memory of the exporting process as the
kernel counts it, bytes of the file, and what llava_main needs to run it. The .pte stay in the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from mvlm.export import demo

STAGES = {
    "read and quantize": "quantize",
    "capture with torch.export": "capture",
    "lower to XNNPACK": "lower",
    "plan memory and write": "write",
}


def export(name: str, path: Path) -> dict[str, float]:
    """Seconds of each stage and of all, and the peak in MiB."""
    command = [sys.executable, "-m", "mvlm.export", "--random-weights", name, "--pte-name", str(path)]
    begin = time.monotonic()
    with path.with_suffix(".log").open("w+") as log:
        process = subprocess.Popen(command, stderr=log)
        # Of this child alone, unlike resource.getrusage.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        said = log.read()
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{said}")
    costs = {
        short: float(re.search(rf"^{title} +([\d.]+) s", said, re.MULTILINE)[1]) for title, short in STAGES.items()
    }
    return costs | {"all": time.monotonic() - begin, "peak": usage.ru_maxrss / 1024}


def ask(name: str, path: Path) -> dict[str, float]:
    """llava_main's own figures for one question."""
    stats = path.with_suffix(".stats.json")
    command = [str(Path(sys.executable).with_name("llava_main")), "--model_path", str(path)]
    if not name.startswith("mobilellama"):
        command += ["--image_path", str(demo.SAMPLE_IMAGE)]
    command += ["--prompt", "What is in the picture?", "--temperature", "0", "--max_new_tokens", "16"]
    subprocess.run([*command, "--stats_path", str(stats), "--quiet"], check=True, stdout=subprocess.DEVNULL)
    return json.loads(stats.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help="a model that `python -m mvlm.export --list` names")
    parser.add_argument("--folder", type=Path, default=Path("build/costs"), help="for the files (default: %(default)s)")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print("| model | quantize | capture | lower | write | all | peak memory | .pte | running it |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for name in options.names:
        path = options.folder / f"{name}.pte"
        costs = export(name, path)
        stats = ask(name, path)
        seconds = " | ".join(f"{costs[column]:.0f} s" for column in (*STAGES.values(), "all"))
        print(
            f"| `{name}` | {seconds} | {costs['peak']:,.0f} MiB | {path.stat().st_size:,} | "
            f"{stats['peak_rss_bytes'] / 2**20:,.0f} MiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
