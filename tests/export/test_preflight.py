"""What an export needs is estimated well enough to refuse what will not do."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mvlm.export import preflight
from mvlm.export.calibrate import CalibrationOptions
from mvlm.export.calibrate.calibrate import _Calibrator
from mvlm.export.checkpoint import open_checkpoint, parameter_shapes, random_checkpoint
from mvlm.export.errors import ExportError
from mvlm.export.preflight import Estimate, available_memory, check, estimate
from mvlm.export.progress import Progress
from mvlm.export.recipe import Recipe, accurate, small

MIB = 1 << 20

#: The recipe of the exports that were measured, which was the default then.
MEASURED_WITH = Recipe(group_size=128, lm_head_bits=4, scales="hqq")

#: Measured: the least and the greatest peak of resident memory in MiB, and bytes of the .pte (README, "What an export
#: costs").
MEASURED = {
    ("mobilevlm-1.7b", MEASURED_WITH): (1113, 1282, 1_047_614_592),
    ("mobilevlm-v2-1.7b", MEASURED_WITH): (1091, 1213, 1_036_875_648),
    ("mobilevlm-3b", MEASURED_WITH): (1294, 1340, 1_754_111_616),
    ("llava-1.5-7b", MEASURED_WITH): (2063, 2063, 3_854_918_912),
    ("mobilellama-1.4b", MEASURED_WITH): (1120, 1175, 736_970_880),
    ("mobilellama-1.4b", replace(MEASURED_WITH, embedding_bits=32)): (1328, 1328, 933_586_560),
    ("mobilevlm-1.7b", replace(MEASURED_WITH, embedding_bits=32, vision="fp32")): (1568, 1568, 2_173_192_320),
}

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("name", "recipe"), MEASURED)
def test_estimates_of_true_sizes(name, recipe):
    least, greatest, size = MEASURED[name, recipe]
    estimated = estimate(random_checkpoint(name), recipe)
    assert estimated.output == pytest.approx(size, rel=0.003)
    assert 1.05 * greatest * MIB <= estimated.memory <= 1.25 * least * MIB


def test_needs_of_the_demo(demo_pte, demo_checkpoint):
    """A small file, of which the program without weights is a good part; and 441 MiB at the peak were measured."""
    estimated = estimate(open_checkpoint(str(demo_checkpoint)), Recipe())
    assert estimated.output == pytest.approx(demo_pte.stat().st_size, rel=0.03)
    assert estimated.spool < estimated.output
    assert 1.05 * 441 * MIB <= estimated.memory <= 1.25 * 441 * MIB


def test_recipes_change_the_size():
    checkpoint = random_checkpoint("mobilevlm-1.7b")
    usual = estimate(checkpoint, Recipe()).output
    # A vocabulary of 32000 rows of 2048: half a byte less each, and a float32 scale per 32 in place of one per row.
    less = 32000 * 2048 // 2 - 32000 * (2048 // 32 - 1) * 4
    assert usual - estimate(checkpoint, Recipe(embedding_bits=4)).output == less
    assert estimate(checkpoint, Recipe(embedding_bits=32)).output - usual == 32000 * 2048 * 3 - 32000 * 4
    assert estimate(checkpoint, small()).output < usual < estimate(checkpoint, Recipe(vision="fp32")).output


@pytest.mark.parametrize(("name", "greatest"), [("mobilevlm-1.7b", 1319), ("mobilevlm-v2-1.7b", 1233)])
def test_a_file_is_mapped_while_it_is_read(name, greatest):
    """Measured with checkpoints in the published layouts, 2 bytes a weight."""
    checkpoint = random_checkpoint(name)
    weights = sum(math.prod(shape) for shape in parameter_shapes(checkpoint.config).values())
    estimated = estimate(replace(checkpoint, size=2 * weights), Recipe()).memory
    assert estimated - estimate(checkpoint, Recipe()).memory == pytest.approx(2 * 32000 * 2048, abs=1)
    assert 1.05 * greatest * MIB <= estimated <= 1.25 * greatest * MIB


def test_what_is_said():
    text = str(Estimate(output=2_000_000_000, spool=1_500_000_000, memory=3 * 1024 * MIB, seconds=150))
    assert text == (
        "about 2,000 MB of .pte, 3,072 MiB of memory at the peak, 3,500 MB of disk while it is written, "
        "2 minutes on two cores"
    )
    assert str(Estimate(1, 1, 1, 42)).endswith("42 seconds on two cores")


# -- calibration ------------------------------------------------------------------------------------------------------

#: Small, but wide enough that tensors weigh more than what a process of torch takes by itself.
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 8000,
}
WITH_VISION = {"num_hidden_layers": 1, "vision_num_hidden_layers": 2}

#: Calibrates random weights and prints the peak of its resident memory, see test_memory.py, and the size of its folder.
PROGRAM = """
import json, sys
from pathlib import Path
from mvlm.export.calibrate import CalibrationOptions, calibrate, work_folder
from mvlm.export.checkpoint import random_checkpoint
from mvlm.export.progress import Progress
from mvlm.export.recipe import Recipe

model, sizes, recipe, tokens, pte = json.loads(sys.argv[1])
checkpoint, recipe = random_checkpoint(model, **sizes), Recipe(**recipe)
options = CalibrationOptions(recipe.calibration, tokens=tokens)
folder = work_folder(checkpoint, recipe, options, Path(pte))
calibrate(checkpoint, recipe, options, folder, Progress(quiet=True))
[peak] = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
print(json.dumps({"peak": int(peak) * 1024, "disk": sum(path.stat().st_size for path in folder.path.iterdir())}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("model", "sizes", "recipe", "tokens"),
    [
        ("mobilellama-1.4b", SIZES, {"calibration": "full", "bits_budget": 0.2}, 2048),
        ("mobilellama-1.4b", SIZES, {"calibration": "quick"}, 4096),
        ("mobilevlm-v2-1.7b", SIZES | WITH_VISION, {"calibration": "full", "vision": "int4"}, 1024),
    ],
    ids=["where bits matter", "quick", "pictures"],
)
def test_needs_of_calibration(model, sizes, recipe, tokens, tmp_path):
    """What it really takes is less, but not by far."""
    arguments = json.dumps([model, sizes, recipe, tokens, str(tmp_path / "x.pte")])
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, arguments]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    needed: dict[str, int] = json.loads(ran.stdout)
    checkpoint = random_checkpoint(model, **sizes)
    options = CalibrationOptions(recipe["calibration"], tokens=tokens)
    estimated = estimate(checkpoint, Recipe(**recipe), options)
    export = estimate(checkpoint, Recipe(**recipe | {"calibration": "none"}))
    print(
        f"peak {needed['peak'] / MIB:.0f} MiB, estimated {estimated.memory / MIB:.0f}, export {export.memory / MIB:.0f}"
    )
    assert estimated.memory > 1.1 * export.memory, "calibration is what takes most"
    assert needed["peak"] <= estimated.memory <= 1.4 * needed["peak"]
    if options.mode == "full":
        # What is on disk at the end, and for a while the streams twice.
        assert needed["disk"] <= estimated.spool - export.spool <= 2 * needed["disk"]


def needs(model: str, recipe: Recipe, **options: Any) -> Estimate:
    return estimate(random_checkpoint(model), recipe, CalibrationOptions(recipe.calibration, **options))


def test_what_calibration_needs_more():
    """Of 1.7B: minutes, more memory, and an int8 copy of all linears on the disk; more tokens, more of all."""
    mobile, full = Recipe(), Recipe(calibration="full")
    export, calibrated = needs("mobilevlm-v2-1.7b", mobile), needs("mobilevlm-v2-1.7b", full)
    assert calibrated.output == export.output
    linears = 24 * (4 * 2048**2 + 3 * 2048 * 5632) + 32000 * 2048
    assert 1.0 < (calibrated.spool - export.spool) / linears < 1.5
    assert 600 < calibrated.seconds < 3600
    assert export.seconds < needs("mobilevlm-v2-1.7b", replace(full, calibration="quick")).seconds < calibrated.seconds
    more = needs("mobilevlm-v2-1.7b", full, tokens=32768)
    for field, value in asdict(more).items():
        assert value > asdict(calibrated)[field] or field == "output", field
    larger = needs("mobilevlm-v2-3b", full)
    assert 1.5 < larger.seconds / calibrated.seconds < 3
    assert calibrated.memory < larger.memory < needs("mobilevlm-v2-7b", full).memory


def test_bits_that_are_added_are_counted():
    """A fifth of the layers' 4-bit weights and scales, in the file and in the spool."""
    plain, wide = (
        needs("mobilellama-1.4b", replace(accurate(), calibration="full", bits_budget=budget)) for budget in (0, 0.2)
    )
    layers = 24 * (4 * 2048**2 + 3 * 2048 * 5632) * (1 / 2 + 2 / 32)
    assert wide.output - plain.output == pytest.approx(0.2 * layers, abs=1)
    assert wide.spool - plain.spool == wide.output - plain.output
    assert wide.seconds > plain.seconds
    without = needs("mobilellama-1.4b", accurate())
    assert without.output == plain.output, "only calibration finds out where they matter"


@pytest.mark.parametrize("mode", ["full", "quick"])
@pytest.mark.parametrize("sizes", [{}, {"num_hidden_layers": 8}, SIZES], ids=["1.4B", "a third", "small"])
def test_tokens_are_those_of_calibration(mode, sizes, tmp_path):
    checkpoint = random_checkpoint("mobilellama-1.4b", **sizes)
    recipe = Recipe(calibration=mode)
    calibrator = _Calibrator(checkpoint, recipe, CalibrationOptions(mode), None, Progress(quiet=True))
    by_default = estimate(checkpoint, recipe)
    assert by_default == estimate(checkpoint, recipe, CalibrationOptions(mode))
    for text, table in ((None, preflight.WRITTEN_TOKENS), (tmp_path / "text.txt", preflight.TEXT_TOKENS)):
        tokens = calibrator._default_tokens(table)
        chosen = estimate(checkpoint, recipe, CalibrationOptions(mode, text))
        assert chosen == estimate(checkpoint, recipe, CalibrationOptions(mode, text, tokens=tokens))
        assert chosen.seconds < estimate(checkpoint, recipe, CalibrationOptions(mode, text, tokens=2 * tokens)).seconds


def test_pictures_and_questions_are_counted(tmp_path):
    """Neither other files nor empty lines; what is no folder is for calibration to refuse."""
    for name in ("a.jpg", "b.PNG", "c.jpeg", "notes.md"):
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_text("What is this?\tA cat.\n\nWhere is it?\n")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    assert preflight._pictures_and_questions(tmp_path) == (3, 4)
    assert preflight._pictures_and_questions(tmp_path / "none") == (0, 0)
    full = Recipe(calibration="full")
    fewer, bundled = (needs("mobilevlm-v2-1.7b", full, images=images) for images in (tmp_path, None))
    assert fewer.memory < bundled.memory, "there are six"
    assert fewer.seconds < bundled.seconds


# -- memory that is available -----------------------------------------------------------------------------------------


def system(root: Path, available_kib: int, cgroup: str, files: dict[str, str]) -> Path:
    """A tree like that of a Linux machine."""
    for name, text in {
        "proc/meminfo": f"MemTotal:  99999999 kB\nMemFree:  1 kB\nMemAvailable:  {available_kib} kB\n",
        "proc/self/cgroup": cgroup,
        **files,
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_memory_of_the_machine(tmp_path):
    assert available_memory(system(tmp_path, 5000, "0::/\n", {})) == 5000 * 1024


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {"memory.max": "max\n", "memory.current": "7\n"}, 5000 * 1024),
        ("0::/\n", {"memory.max": "3000000\n", "memory.current": "1000000\n"}, 2000000),
        ("0::/a/b\n", {"a/memory.max": "3000000\n", "a/memory.current": "1000000\n"}, 2000000),
        ("0::/a/b\n", {"a/b/memory.max": "10\n", "a/b/memory.current": "30\n"}, 0),
        (
            "3:cpu,cpuacct:/x\n2:memory:/x\n",
            {"memory/x/memory.limit_in_bytes": "900\n", "memory/x/memory.usage_in_bytes": "100\n"},
            800,
        ),
        (
            "0::/a\n",
            {
                "a/memory.max": "3000000\n",
                "a/memory.current": "2900000\n",
                "a/memory.stat": "anon 400000\nfile 2500000\ninactive_file 2000000\nactive_file 300000\nshmem 200000\n",
            },
            2400000,
        ),
        (
            "2:memory:/docker/x\n",
            {
                "memory/memory.limit_in_bytes": "900\n",
                "memory/memory.usage_in_bytes": "850\n",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 300\ntotal_active_file 200\n",
            },
            550,
        ),
        (
            "2:memory:/\n",
            {"memory/memory.limit_in_bytes": f"{2**63 - 4096}\n", "memory/memory.usage_in_bytes": "1\n"},
            5000 * 1024,
        ),
        (
            "0::/a/b\n",
            {"a/b/memory.max": "100\n", "a/memory.max": "3000000\n", "a/memory.current": "1000000\n"},
            2000000,
        ),
        ("0::/\n", {"memory.max": "nonsense\n", "memory.current": "1\n"}, 5000 * 1024),
    ],
    ids=[
        "no limit",
        "limit",
        "limit of the group above",
        "exceeded",
        "version 1",
        "cached files",
        "version 1, cached files, seen from inside",
        "version 1, no limit",
        "part of it unreadable",
        "unreadable",
    ],
)
def test_memory_of_a_control_group(cgroup, files, expected, tmp_path):
    tree = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    assert available_memory(system(tmp_path, 5000, cgroup, tree)) == expected


def test_memory_of_an_unknown_system(tmp_path):
    assert available_memory(tmp_path) is None


def test_memory_of_this_machine():
    available = available_memory()
    if Path("/proc/meminfo").exists():
        assert 10 * MIB < available < 1 << 50


# -- refusals ---------------------------------------------------------------------------------------------------------

NEEDS = Estimate(output=2_000_000_000, spool=1_500_000_000, memory=3072 * MIB, seconds=1)


def test_enough(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "available_memory", lambda: 3072 * MIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 3_500_000_000))
    check(NEEDS, tmp_path / "x.pte")
    monkeypatch.setattr(preflight, "available_memory", lambda: None)
    check(NEEDS, tmp_path / "x.pte")


def test_not_enough_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "available_memory", lambda: 2000 * MIB)
    with pytest.raises(ExportError, match=r"not enough memory: .* 3,072 MiB and 2,000 MiB are available; .*--force"):
        check(NEEDS, tmp_path / "x.pte")


def test_not_enough_disk(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(preflight, "available_memory", lambda: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage(0, 0, 3_499_999_999))
    with pytest.raises(ExportError, match=r"not enough disk space in .*: .* 3,500 MB .* 3,500 MB are free; .*--force"):
        check(NEEDS, tmp_path / "x.pte")
    assert asked == [tmp_path], "the disk on which the file and the spool will lie"
