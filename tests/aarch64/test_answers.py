"""The demo model answers on 64-bit Arm as on the machine that runs the tests, token by token."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from aarch64_run import CPUS, DOTPROD, I8MM, NEON, RunArm, tokens

QUESTIONS = ("Describe the image.", "What color is the circle?", "How many shapes are there?")


def native_tokens(llava_main: Path, stats: Path, **flags: object) -> list[int]:
    command: list[object] = [llava_main, "--temperature", 0, "--weight_cache", "off", "--stats_path", stats]
    for name, value in flags.items():
        command += [f"--{name}", value]
    result = subprocess.run([str(part) for part in command], capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr.decode()
    return tokens(stats)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_same_tokens(
    llava_main: Path, run_arm: RunArm, demo_pte: Path, sample_image: Path, tmp_path: Path, question: str, cpu: str
) -> None:
    flags = {"model_path": demo_pte, "image_path": sample_image, "prompt": question}
    expected = native_tokens(llava_main, tmp_path / "native.json", **flags)
    result = run_arm(cpu=cpu, stats_path=tmp_path / "arm.json", **flags)
    assert result.returncode == 0, result.stderr.decode()
    assert tokens(tmp_path / "arm.json") == expected


@pytest.mark.parametrize("cpu", CPUS)
def test_our_linears(
    llava_main: Path, run_arm: RunArm, demo_pte: Path, sample_image: Path, tmp_path: Path, cpu: str
) -> None:
    """``--linear_kernels mvlm`` is not what Arm takes by itself, and right where it is asked for."""
    flags = {"model_path": demo_pte, "image_path": sample_image, "prompt": QUESTIONS[0]}
    expected = native_tokens(llava_main, tmp_path / "native.json", **flags)
    result = run_arm(cpu=cpu, stats_path=tmp_path / "arm.json", linear_kernels="mvlm", **flags)
    assert result.returncode == 0, result.stderr.decode()
    assert '"linear_kernels": "mvlm"' in (tmp_path / "arm.json").read_text()
    assert tokens(tmp_path / "arm.json") == expected
    result = run_arm(cpu=cpu, stats_path=tmp_path / "arm.json", max_new_tokens=2, **flags)
    assert '"linear_kernels": "xnnpack"' in (tmp_path / "arm.json").read_text()


def test_float32_model(llava_main: Path, run_arm: RunArm, text_pte, tmp_path: Path) -> None:
    """Without quantization and with a KV cache in float32."""
    flags = {"model_path": text_pte.path, "prompt": "circle", "max_new_tokens": 12}
    expected = native_tokens(llava_main, tmp_path / "native.json", **flags)
    for cpu in (I8MM, DOTPROD, NEON):
        result = run_arm(cpu=cpu, stats_path=tmp_path / "arm.json", **flags)
        assert result.returncode == 0, result.stderr.decode()
        assert tokens(tmp_path / "arm.json") == expected


def test_weight_cache(run_arm: RunArm, demo_pte: Path, sample_image: Path, tmp_path: Path) -> None:
    """Files of the cache are made and read, and a CPU of another kind does not take them for its own."""
    flags = {"model_path": demo_pte, "image_path": sample_image, "prompt": QUESTIONS[1]}
    folder = tmp_path / "cache"
    answers = []
    for cpu in (I8MM, I8MM, NEON):
        result = run_arm(cpu=cpu, weight_cache=folder, **flags)
        assert result.returncode == 0, result.stderr.decode()
        answers.append(result.stdout)
    assert len(list(folder.rglob("*"))) > 0
    assert answers[0] == answers[1] == answers[2]
