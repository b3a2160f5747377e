"""Asks the vision-language model about pictures it has not seen, in float32 or as a ``.pte``.

cd tests/real
python evaluate_vlm.py                                      # float32
python evaluate_vlm.py --calibration-images /tmp/pictures   # writes pictures of the training split, questions too
python -m mvlm.export --model ../../build/real/vlm --pte-name vlm.pte --calibrate --calibration-images /tmp/pictures
python evaluate_vlm.py --pte vlm.pte                        # what is left of it
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from gauge import DEFAULT_FOLDER, PictureQuestion, make_gauge, right_answers
from gauge.easy_vqa import write_calibration_pictures

from mvlm.export.checkpoint import open_checkpoint
from mvlm.runtime.mobilevlm import MobileVLM

#: Every answer is a word of at most three tokens; a longer one is wrong.
MAX_NEW_TOKENS = 8


def right_answers_of_pte(pte: Path, questions: Sequence[PictureQuestion]) -> Iterator[bool]:
    """Whether greedy generation answers each question with exactly the right word."""
    model = MobileVLM(pte)
    for item in questions:
        yield model.answer(item.path, item.question, max_new_tokens=MAX_NEW_TOKENS) == item.answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gauge", type=Path, default=DEFAULT_FOLDER, metavar="DIR", help="what it lacks is made")
    parser.add_argument("--questions", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--pte", type=Path, metavar="FILE", help="an export of the model; float32 by default")
    parser.add_argument(
        "--calibration-images", type=Path, metavar="DIR", help="write what to calibrate on, and ask nothing"
    )
    parser.add_argument(
        "--pictures", type=int, default=40, help="to write, about ten questions each (default: %(default)s)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    gauge = make_gauge(options.gauge)
    if options.calibration_images:
        write_calibration_pictures(gauge.easy_vqa, options.calibration_images, options.pictures)
        return 0
    checkpoint = open_checkpoint(str(gauge.vision_language_model))
    questions = gauge.questions(options.questions)
    started, right = time.monotonic(), defaultdict(list)
    if options.pte:
        answered = right_answers_of_pte(options.pte, questions)
    else:
        answered = right_answers(checkpoint.load_model(), checkpoint, questions)
    for item, hit in zip(questions, answered, strict=True):
        right[item.kind].append(hit)
    every = [hit for hits in right.values() for hit in hits]
    for kind, hits in {"all": every, **right}.items():
        print(f"{kind:8}{sum(hits):5} of {len(hits):5}  {100 * sum(hits) / len(hits):.1f} %")
    print(f"{time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
