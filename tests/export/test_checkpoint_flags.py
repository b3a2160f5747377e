"""Flags of ``python -m mvlm.export`` that say which checkpoint, and --list."""

from __future__ import annotations

import re

import huggingface_hub
import pytest
from random_checkpoint import RandomCheckpoint, Sizes

from mvlm.export import demo
from mvlm.export.__main__ import main, open_of, parse_arguments
from mvlm.export.checkpoint import LAYOUTS, NAMED_MODELS, Checkpoint
from mvlm.export.errors import ExportError


def open_with(*flags: str) -> Checkpoint:
    return open_of(parse_arguments(["--pte-name", "x.pte", *flags]))


def test_the_demo_by_default():
    checkpoint = open_with()
    assert checkpoint.name == demo.CHECKPOINT.name
    assert checkpoint.tokenizer == (demo.CHECKPOINT / "tokenizer.model").read_bytes()


def test_random_weights():
    first, again, other = (
        open_with("--random-weights", "mobilevlm-v2-3b", *flags) for flags in ((), (), ("--seed", "7"))
    )
    assert first.name == "mobilevlm-v2-3b (random weights, seed 0)"
    assert other.name == "mobilevlm-v2-3b (random weights, seed 7)"
    assert first.checkpoint_id == again.checkpoint_id != other.checkpoint_id


def test_model_and_tower(tmp_path):
    source = RandomCheckpoint.make()
    source.config["mm_vision_tower"] = "no/such"
    model, tower = source.write(tmp_path / "model"), source.write_tower(tmp_path / "clip")
    assert open_with("--model", str(model), "--vision-tower", str(tower)).name == "model"


@pytest.mark.parametrize("quiet", [False, True])
def test_revision_and_progress(quiet, tmp_path, monkeypatch):
    folder = RandomCheckpoint.make(Sizes(projector="ldpnetv2"), own_tower=True).write(tmp_path)
    asked = []

    def snapshot_download(name: str, revision: str | None, **_: object) -> str:
        asked.append((name, revision, huggingface_hub.utils.are_progress_bars_disabled()))
        return str(folder)

    def model_info(name: str, revision: str | None) -> object:
        raise OSError("not asked")

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    huggingface_hub.utils.enable_progress_bars()
    try:
        open_with("--model", "someone/Model-1B", "--revision", "abc", *(["--quiet"] if quiet else []))
    finally:
        huggingface_hub.utils.enable_progress_bars()
    assert asked == [("someone/Model-1B", "abc", quiet)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--vision-tower clip", "--vision-tower goes with --model; the bundled demo checkpoint has its own"),
        (
            "--random-weights mobilevlm-3b --vision-tower x",
            "--vision-tower goes with --model; random weights have their",
        ),
        ("--revision abc", "--revision abc goes with --model and the id of a model on the hub"),
        ("--random-weights mobilevlm-3b --revision abc", "--revision abc goes with --model and the id of a model on"),
        ("--seed 3", "--seed 3 goes with --random-weights"),
        ("--model some/model --seed 0", "--seed 0 goes with --random-weights"),
        ("--random-weights mobilevlm-3b --seed -1", "seed -1: a whole number from 0 to"),
        ("--random-weights mobilevlm", "random weights of 'mobilevlm': no such model; supported: mobilevlm-1.7b, mo"),
        (f"--model {demo.CHECKPOINT} --revision abc", "is a folder, which has no revisions; leave out --revision abc"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(ExportError, match=re.escape(message)):
        open_with(*flags.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model a --random-weights mobilevlm-3b", "argument --random-weights: not allowed with argument --model"),
        ("--random-weights mobilevlm-3b --seed x", "argument --seed: invalid int value: 'x'"),
    ],
)
def test_flags_that_argparse_refuses(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        open_with(*flags.split())
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_list(capsys):
    """Prints and exits, without asking for a file to write."""
    with pytest.raises(SystemExit) as caught:
        main(["--list"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 140
    for layout in LAYOUTS:
        assert re.search(rf"^{re.escape(layout.name)}  ", out, re.MULTILINE)
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(tuple(NAMED_MODELS))}
    assert rows.keys() == NAMED_MODELS.keys()
    for name, model in NAMED_MODELS.items():
        assert all(hub_id in rows[name] for hub_id in model.hub_ids)
    assert re.search(r"^llava-1\.5-7b +7\.05 G +576 ", rows["llava-1.5-7b"])
    assert re.search(r"^mobilellama-1\.4b +1\.36 G +- ", rows["mobilellama-1.4b"])
