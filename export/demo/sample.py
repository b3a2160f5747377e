"""The bundled sample picture: ``python -m mvlm.export.demo.sample`` draws sample.jpg and sample.json anew."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mvlm.export.demo.world import COLORS, Scene, SceneObject, draw, questions

#: What the README and ci/demo.sh ask about the picture.
SAMPLE_QUESTION = "What color is the circle?"

SAMPLE_SIZE = (480, 360)

SAMPLE_SCENE = Scene(
    background=(190, 210, 225),
    objects=(
        SceneObject("star", "yellow", COLORS["yellow"], "top left", (0.01, 0.02), 0.18, 0.4),
        SceneObject("circle", "red", COLORS["red"], "top right", (-0.01, 0.0), 0.16, 0.0),
        SceneObject("triangle", "green", COLORS["green"], "bottom left", (0.02, -0.01), 0.17, 0.6),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mvlm.export.demo.sample", description=__doc__)
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path(__file__).parent, help="where to (default: beside this module)"
    )
    folder = parser.parse_args().folder
    draw(SAMPLE_SCENE, *SAMPLE_SIZE).save(folder / "sample.jpg", quality=92)
    answers = {item.question: item.answer for item in questions(SAMPLE_SCENE) if item.kind != "exists"}
    answers |= {
        item.question: item.answer
        for item in questions(SAMPLE_SCENE)
        if item.question in ("Is there a red circle?", "Is there a green star?")
    }
    (folder / "sample.json").write_text(json.dumps(answers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
