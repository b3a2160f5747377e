"""What an export needs is estimated well enough to refuse what will not do."""

from __future__ import annotations

import math
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from mvlm.export import preflight
from mvlm.export.checkpoint import open_checkpoint, parameter_shapes, random_checkpoint
from mvlm.export.errors import ExportError
from mvlm.export.preflight import Estimate, available_memory, check, estimate
from mvlm.export.recipe import Recipe, small

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
