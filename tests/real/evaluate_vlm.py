"""Asks the vision-language model in float32: ``python tests/real/evaluate_vlm.py --questions 1000``."""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from gauge import DEFAULT_FOLDER, make_gauge, right_answers

from mvlm.export.checkpoint import open_checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gauge", type=Path, default=DEFAULT_FOLDER, metavar="DIR", help="what it lacks is made")
    parser.add_argument("--questions", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    gauge = make_gauge(options.gauge)
    checkpoint = open_checkpoint(str(gauge.vision_language_model))
    questions = gauge.questions(options.questions)
    started, right = time.monotonic(), defaultdict(list)
    for item, hit in zip(questions, right_answers(checkpoint.load_model(), checkpoint, questions), strict=True):
        right[item.kind].append(hit)
    every = [hit for hits in right.values() for hit in hits]
    for kind, hits in {"all": every, **right}.items():
        print(f"{kind:8}{sum(hits):5} of {len(hits):5}  {100 * sum(hits) / len(hits):.1f} %")
    print(f"{time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
