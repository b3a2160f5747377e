"""Which of KleidiAI's kernels multiply the quantized weights, counted as they are called."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

import pytest
from aarch64_run import BUILD, DOTPROD, I8MM, NEON, QEMU, SYSROOT, need

#: Tokens that are decoded after the first one, which prefill makes.
DECODED = 4

# In the names "4x8" and "1x8" say of how many rows the left side is: one when a token is decoded.
FOUR_BIT_I8MM = "kai_run_matmul_clamp_f32_qai8dxp4x8_qsi4c32p4x8_16x4x32_neon_i8mm"
EIGHT_BIT_I8MM = "kai_run_matmul_clamp_f32_qai8dxp4x8_qsi8cxp4x8_16x4_neon_i8mm"


def count(demo_pte: Path, sample_image: Path, folder: Path, cpu: str, new_tokens: int) -> Counter[str]:
    """Calls by kernel in an answer of ``new_tokens`` tokens about the sample picture."""
    preload = f"LD_PRELOAD={need(BUILD / 'tests' / 'aarch64' / 'libmvlm_count_kernels.so')}"
    counts = folder / "counts"
    command: list[object] = [QEMU, "-cpu", cpu, "-L", SYSROOT, "-E", preload, "-E", f"MVLM_KERNEL_COUNTS={counts}"]
    command += [BUILD / "runner" / "llava_main", "--model_path", demo_pte, "--image_path", sample_image]
    command += ["--prompt", "Describe the image.", "--temperature", 0, "--weight_cache", "off", "--ignore_eos"]
    command += ["--max_new_tokens", new_tokens, "--cpu_threads", 1]
    result = subprocess.run([str(part) for part in command], capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr.decode()
    lines = (line.split() for line in counts.read_text().splitlines())
    return Counter({name: int(calls) for name, calls in lines if int(calls)})


def kinds(calls: Counter[str]) -> set[str]:
    return {name.rpartition("_")[2] for name in calls}


@pytest.mark.parametrize("cpu", [I8MM, DOTPROD, NEON])
def test_kernels(demo_pte: Path, sample_image: Path, tmp_path: Path, cpu: str) -> None:
    prefill = count(demo_pte, sample_image, tmp_path, cpu, 1)
    decode = count(demo_pte, sample_image, tmp_path, cpu, 1 + DECODED) - prefill
    if cpu == NEON:
        assert not prefill
        assert not decode
        return
    four_bit = Counter({name: calls for name, calls in prefill.items() if "_qsi4c32p" in name})
    # Whatever is decoded takes a one-row kernel with dotprod, as often for each token: of 4-bit weights in the layers,
    # of 8-bit ones in lm_head.
    assert kinds(decode) == {"dotprod"}
    assert all("_qai8dxp1x" in name for name in decode)
    assert {"qsi4c32p" in name or "qsi8cxp" in name for name in decode} == {True}
    assert any("_qsi4c32p" in name for name in decode)
    assert any("_qsi8cxp" in name for name in decode)
    assert all(calls % DECODED == 0 for calls in decode.values())
    if cpu == I8MM:
        assert prefill[FOUR_BIT_I8MM] > 0
        assert prefill[EIGHT_BIT_I8MM] > 0
        # Rows that are left over.
        assert all("_qai8dxp1x" in name for name in four_bit if name != FOUR_BIT_I8MM)
        # The decoder's other linears have many rows.
        assert prefill[FOUR_BIT_I8MM] > sum(four_bit.values()) - prefill[FOUR_BIT_I8MM]
    else:
        assert kinds(prefill) == {"dotprod"}
        assert any("_qai8dxp4x" in name for name in four_bit)
