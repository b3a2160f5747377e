"""Makes the gauge: ``python tests/real/make_gauge.py --out build/real``; fetches 190 MB at the first call.

Needs what ``ci/setup.sh test`` installs, and apt on Debian 12 or later for the texts; see ``gauge/__init__.py``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gauge import DEFAULT_FOLDER, FetchError, make_gauge


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_FOLDER, metavar="DIR", help="where it goes; what is there is kept"
    )
    parser.add_argument("--gguf", action="store_true", help="R for llama.cpp as well")
    options = parser.parse_args()
    try:
        gauge = make_gauge(options.out, options.gguf)
    except (FetchError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    for what, path in (
        ("language model R", gauge.language_model),
        ("R for llama.cpp", gauge.gguf),
        ("vision-language model", gauge.vision_language_model),
        ("evaluation text", gauge.evaluation_text),
        ("calibration text", gauge.calibration_text),
        ("picture questions", gauge.easy_vqa),
    ):
        if path.exists():
            print(f"{what:22}{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
