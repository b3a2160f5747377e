"""``python -m mvlm.export``: flags, exit codes and what is said; the export itself is tested elsewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from random_checkpoint import RandomCheckpoint, Sizes

from mvlm.export import demo, pipeline, preflight
from mvlm.export.__main__ import main, parse_arguments, recipe_of
from mvlm.export.calibrate import CalibrationOptions
from mvlm.export.checkpoint import Checkpoint
from mvlm.export.contract import ImageProcessing, Metadata
from mvlm.export.errors import ExportError
from mvlm.export.pipeline import Exported
from mvlm.export.progress import Progress
from mvlm.export.recipe import Recipe
from mvlm.export.report import QuantizationReport

FLAGS = (
    "--pte-name",
    "--model",
    "--random-weights",
    "--seed",
    "--revision",
    "--vision-tower",
    "--recipe",
    "--group-size",
    "--scales",
    "--lm-head-bits",
    "--embedding-bits",
    "--vision",
    "--max-context-len",
    "--calibrate",
    "--calibration-text",
    "--calibration-images",
    "--calibration-tokens",
    "--calibration-seed",
    "--bits-budget",
    "--attention-op",
    "--with-artifacts",
    "--report",
    "--force",
    "--quiet",
    "--list",
    "--version",
    "--help",
)

METADATA = Metadata(
    model_name="a model",
    checkpoint_id="sha256:0",
    mvlm_version="0",
    recipe="{}",
    max_seq_len=2,
    max_context_len=2,
    logit_positions=2,
    vocab_size=3,
    bos_id=1,
    eos_ids=(2,),
    prompt_template="{prompt}",
    next_turn_template="{prompt}",
    image_marker="<image>",
    image_prefix="<image>",
    stop_strings=(),
    image=ImageProcessing(1, (0, 0, 0), (1, 1, 1), (0, 0, 0), 1),
)


@pytest.fixture
def exports(monkeypatch) -> list[tuple[str, Path, Recipe, Path | None, bool]]:
    """What would have been exported; nothing is."""
    asked = []

    def export_checkpoint(
        checkpoint: Checkpoint,
        path: Path,
        recipe: Recipe,
        progress: Progress,
        report_path: Path | None,
        force: bool,
        calibration: CalibrationOptions | None,
    ) -> Exported:
        assert (calibration is None) == (recipe.calibration == "none")
        asked.append((checkpoint.name, path, recipe, report_path, force))
        if calibration is not None:
            asked.append(calibration)
        return Exported(path, 1234567, METADATA, b"tokenizer", QuantizationReport(checkpoint.name, recipe, ()))

    monkeypatch.setattr(pipeline, "export_checkpoint", export_checkpoint)
    return asked


def usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said about flags that argparse refuses, with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: python -m mvlm.export ")
    return captured.err


def input_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said about input that cannot be used: one line, exit code 2."""
    assert main([*arguments, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mvlm.export: ")
    return captured.err


# -- help and version -------------------------------------------------------------------------------------------------


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for flag in FLAGS:
        assert re.search(rf"^  (-h, )?{flag}\b", out, re.MULTILINE), flag
    words = " ".join(out.split())
    for default in ("768", "mobile", "0", "the bundled demo checkpoint"):
        assert f"(default: {default})" in words
    for field in ("group_size", "scales", "lm_head_bits", "embedding_bits", "vision"):
        assert f"(mobile: {getattr(Recipe(), field)})" in words
    examples = out[out.index("examples:") : out.index("then:")]
    assert len(re.findall("^  python -m mvlm.export ", examples, re.MULTILINE)) == 8
    assert "llava_main --model_path" in out


def test_examples_of_the_help_are_valid(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    for line in re.findall(r"python -m mvlm\.export (--.*)", capsys.readouterr().out):
        parse_arguments(line.split())


def test_program_answers_at_once():
    """--help and wrong flags do not wait for torch to be imported."""
    code = (
        "import sys\n"
        "from mvlm.export.__main__ import main\n"
        "try: main(['--help'])\n"
        "finally: assert 'torch' not in sys.modules\n"
    )
    assert "usage:" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    ran = subprocess.run([sys.executable, "-m", "mvlm.export"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "the following arguments are required: --pte-name" in ran.stderr


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"mvlm {version('mvlm')}\n"


# -- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "recipe"),
    [
        ("", Recipe()),
        ("--group-size 32", Recipe(group_size=32)),
        ("--scales affine --max-context-len 100", Recipe(scales="affine", max_context_len=100)),
        ("--recipe mobile --group-size 64", Recipe(group_size=64)),
        ("--recipe small", Recipe("small", 128, lm_head_bits=4, embedding_bits=4, vision="int4")),
        ("--recipe small --vision fp32", Recipe("small", 128, lm_head_bits=4, embedding_bits=4, vision="fp32")),
        ("--recipe accurate --lm-head-bits 4", Recipe("accurate", lm_head_bits=4, kv_cache="fp16", bits_budget=0.2)),
        ("--kv-cache fp32 --prefill-chunk 64", Recipe(kv_cache="fp32", prefill_chunk=64)),
        ("--embedding-bits 32", Recipe(embedding_bits=32)),
        ("--calibrate", Recipe(calibration="full")),
        ("--calibrate quick --group-size 64", Recipe(calibration="quick", group_size=64)),
        ("--calibrate --bits-budget +5%", Recipe(calibration="full", bits_budget=0.05)),
        ("--calibrate full --bits-budget 7.5%", Recipe(calibration="full", bits_budget=0.075)),
        ("--attention-op mvlm", Recipe()),
        ("--attention-op llama", Recipe(kv_cache="fp32", attention_op="llama")),
        ("--attention-op llama --kv-cache fp32", Recipe(kv_cache="fp32", attention_op="llama")),
        (
            "--attention-op llama --recipe accurate",
            Recipe("accurate", kv_cache="fp32", attention_op="llama", bits_budget=0.2),
        ),
    ],
)
def test_recipe_of_flags(flags, recipe):
    assert recipe_of(parse_arguments(["--pte-name", "x.pte", *flags.split()])) == recipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: --pte-name"),
        ("--model m", "the following arguments are required: --pte-name"),
        ("--pte-name x.pte --bit-width 3", "unrecognized arguments: --bit-width 3"),
        ("--pte-name x.pte stray", "unrecognized arguments: stray"),
        ("--pte-name x.pte --group-size many", "--group-size: invalid int value: 'many'"),
        ("--pte-name x.pte --max-context-len 1e3", "--max-context-len: invalid int value: '1e3'"),
        ("--pte-name x.pte --model", "--model: expected one argument"),
        ("--pte-name x.pte --seed x", "--seed: invalid int value: 'x'"),
        ("--pte-name x.pte --bits-budget 5", "--bits-budget: '5' is no share; give per cent, +5% for example"),
        ("--pte-name x.pte --calibration-tokens many", "--calibration-tokens: invalid int value: 'many'"),
        ("--pte-name x.pte --model m --random-weights r", "--random-weights: not allowed with argument --model"),
    ],
)
def test_wrong_flags(arguments, message, capsys, exports):
    assert message in usage_error(arguments.split(), capsys)
    assert not exports


@pytest.mark.parametrize(
    ("flag", "given", "allowed"),
    [
        ("--recipe", "desktop", "accurate, mobile, small"),
        ("--group-size", "48", "32, 64, 128, 256"),
        ("--scales", "best", "affine, hqq, search"),
        ("--lm-head-bits", "5", "4, 8"),
        ("--embedding-bits", "16", "4, 8, 32"),
        ("--vision", "fp16", "int4, int8, fp32"),
        ("--kv-cache", "int4", "fp32, fp16, int8"),
        ("--attention-op", "ours", "mvlm, llama"),
        ("--calibrate", "no", "none, quick, full"),
    ],
)
def test_values_that_are_no_choice(flag, given, allowed, capsys, exports):
    error = usage_error(["--pte-name", "x.pte", flag, given], capsys)
    # Which of the values argparse quotes differs between Python's versions, and within 3.12, 3.13 and 3.14 as well.
    words = error.splitlines()[-1].replace("'", "")
    assert words.endswith(f"error: argument {flag}: invalid choice: {given} (choose from {allowed})")
    assert not exports


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--max-context-len 0", "max context length 0 is too short: a prompt and an answer need 2 at least"),
        ("--max-context-len -1", "max context length -1 is too short"),
        ("--attention-op llama --kv-cache int8", "KV cache int8 is not possible with attention operator llama"),
        ("--vision-tower t", "--vision-tower goes with --model; the bundled demo checkpoint has its own"),
        ("--random-weights mobilevlm-3b --seed -1", "seed -1: a whole number from 0 to"),
        ("--calibration-text t.txt", "--calibration-text t.txt goes with --calibrate, which is not given"),
        ("--calibration-images d", "--calibration-images d goes with --calibrate"),
        ("--calibration-seed 3", "--calibration-seed 3 goes with --calibrate"),
        ("--calibrate --calibration-tokens 10", "--calibration-tokens 10 are too few to calibrate on: 1024 or more"),
        ("--bits-budget +5%", "--bits-budget +5% goes with --calibrate"),
        ("--calibrate quick --bits-budget +5%", "--bits-budget +5% goes with --calibrate"),
        ("--calibrate --bits-budget +101%", "bits budget +101% is not possible: +0% to +100%"),
        ("--calibrate --scales hqq", "scales hqq are not possible with calibration"),
        ("--report report.txt", "report.txt: a report is written as JSON"),
        ("--report no/such.json", "no/such.json: there is no folder no; make it first"),
    ],
)
def test_values_that_are_not_possible(flags, message, capsys, exports, tmp_path):
    assert message in input_error(["--pte-name", str(tmp_path / "x.pte"), *flags.split()], capsys)
    assert not exports
    assert not list(tmp_path.iterdir())


# -- where to write, what to read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none/x.pte", "there is no folder {}/none; make it first"),
        ("", "is a folder; give the name of a file in it"),
        ("file/x.pte", "there is no folder {}/file; make it first"),
    ],
)
def test_unusable_path_is_found_before_any_work(name, message, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr("mvlm.export.__main__.open_of", lambda *_: pytest.fail("began to work"))
    error = input_error(["--pte-name", str(tmp_path / name)], capsys)
    assert message.format(tmp_path) in error
    assert str(tmp_path / name) in error


def test_folder_that_cannot_be_written_to(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("mvlm.export.__main__.open_of", lambda *_: pytest.fail("began to work"))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    assert f"the folder {tmp_path} cannot be written to" in input_error(["--pte-name", str(tmp_path / "x")], capsys)


@pytest.mark.parametrize(
    ("pte", "flags", "message"),
    [
        ("m.json", "--report {}/m.json", "m.json: would be written for the file itself and again for --report;"),
        ("m.html", "--report {}/m.json", "m.html: would be written for the file itself and again for the page of"),
        ("m.json", "--with-artifacts", "m.json: would be written for the file itself and again for --with-artifacts;"),
        (
            "m.pte",
            "--report {}/../{}/m.json --with-artifacts",
            "m.json: would be written for --report and again for --with-artifacts; give one another name",
        ),
        ("m.pte", "--with-artifacts", "tokenizer.model: is a folder"),
    ],
)
def test_files_that_would_spoil_each_other(pte, flags, message, capsys, exports, tmp_path):
    if "folder" in message:
        (tmp_path / "tokenizer.model").mkdir()
    flags = flags.replace("{}", str(tmp_path), 1).replace("{}", tmp_path.name)
    assert message in input_error(["--pte-name", str(tmp_path / pte), *flags.split()], capsys)
    assert not exports


def test_unusable_paths_are_found_at_once(tmp_path):
    """Before torch is imported, which takes seconds."""
    code = (
        "import sys\n"
        "from mvlm.export.__main__ import main\n"
        "codes = [main(['--pte-name', *flags.split()]) for flags in sys.argv[1:]]\n"
        "print(codes, 'torch' in sys.modules)\n"
    )
    wrong = ["none/x.pte", ".", "x.pte --report x.txt", "x.pte --report none/x.json", "x.pte --max-context-len 0"]
    ran = subprocess.run([sys.executable, "-c", code, *wrong], capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout == "[2, 2, 2, 2, 2] False\n", ran.stderr
    assert not list(tmp_path.iterdir())


def test_model_that_is_not_there(capsys, tmp_path):
    error = input_error(["--model", str(tmp_path / "none"), "--pte-name", str(tmp_path / "x.pte")], capsys)
    assert f"model {tmp_path}/none: no such folder" in error
    assert not list(tmp_path.iterdir())


def test_spoiled_checkpoint(capsys, tmp_path):
    folder = RandomCheckpoint.make().write(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"")
    error = input_error(["--model", str(folder), "--pte-name", str(tmp_path / "x.pte")], capsys)
    assert "model.safetensors: cannot be read as safetensors" in error
    assert list(tmp_path.iterdir()) == [folder]


def test_context_beyond_what_the_model_was_trained_for(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "quantize_checkpoint", lambda *_: pytest.fail("went on with it"))
    folder = RandomCheckpoint.make(Sizes(max_position_embeddings=100)).write(tmp_path / "model")
    arguments = ["--model", str(folder), "--pte-name", str(tmp_path / "x.pte"), "--max-context-len", "101"]
    error = input_error(arguments, capsys)
    assert re.search(r"101\b.*\b100\b", error)
    assert "max_position_embeddings" in error
    assert list(tmp_path.iterdir()) == [folder]


def test_operators_of_executorch_that_are_not_there(capsys, monkeypatch, tmp_path):
    """Are missed before any work."""

    def refuse(name: str) -> None:
        raise OSError("libcustom_ops_aot_lib.so: cannot open shared object file")

    monkeypatch.setattr("mvlm.export.llama_operators.importlib", SimpleNamespace(import_module=refuse))
    monkeypatch.setattr(pipeline, "quantize_checkpoint", lambda *_: pytest.fail("went on with it"))
    error = input_error(["--attention-op", "llama", "--pte-name", str(tmp_path / "x.pte")], capsys)
    assert "executorch.extension.llm.custom_ops) cannot be loaded: libcustom_ops_aot_lib.so" in error
    assert "pyproject.toml" in error
    assert not list(tmp_path.iterdir())


def test_picture_that_leaves_no_room(capsys, monkeypatch, tmp_path):
    """16 image tokens do not fit into 16 positions with a question and an answer."""
    monkeypatch.setattr(pipeline, "quantize_checkpoint", lambda *_: pytest.fail("went on with it"))
    folder = RandomCheckpoint.make(Sizes(projector="linear")).write(tmp_path / "model")
    arguments = ["--model", str(folder), "--pte-name", str(tmp_path / "x.pte"), "--max-context-len", "16"]
    error = input_error(arguments, capsys)
    assert re.search(r"16\b.*\b16\b", error)


# -- what is done and said --------------------------------------------------------------------------------------------


def test_without_model_the_demo_checkpoint_is_exported(capsys, exports, tmp_path):
    path = tmp_path / "x.pte"
    assert main(["--pte-name", str(path), "--group-size", "64"]) == 0
    assert exports == [(demo.CHECKPOINT.name, path, Recipe(group_size=64), None, False)]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"no --model given: exporting the bundled demo checkpoint, {demo.CHECKPOINT}" in captured.err
    assert f"{path}: 1,234,567 bytes, a model, " in captured.err


def test_what_is_asked_for_is_handed_on(capsys, exports, tmp_path):
    path, report = tmp_path / "x.pte", tmp_path / "r.json"
    flags = ["--random-weights", "mobilellama-1.4b", "--seed", "3", "--report", str(report), "--force", "--quiet"]
    assert main(["--pte-name", str(path), *flags]) == 0
    assert exports == [("mobilellama-1.4b (random weights, seed 3)", path, Recipe(), report, True)]
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_calibration_is_handed_on(capsys, exports, tmp_path):
    flags = ["--calibration-text", "t.txt", "--calibration-images", "d", "--calibration-tokens", "2000"]
    assert main(["--pte-name", str(tmp_path / "x.pte"), "--calibrate", *flags, "--calibration-seed", "7"]) == 0
    assert exports[1] == CalibrationOptions("full", Path("t.txt"), Path("d"), 2000, 7)
    assert "not calibrated" not in capsys.readouterr().err


def test_what_calibration_would_bring_is_said(capsys, exports, tmp_path):
    assert main(["--pte-name", str(tmp_path / "x.pte")]) == 0
    assert "not calibrated: --calibrate would bring answers closer" in capsys.readouterr().err.splitlines()[-1]


def test_artifacts(capsys, exports, tmp_path, sample_image):
    assert main(["--pte-name", str(tmp_path / "x.pte"), "--with-artifacts"]) == 0
    names = {"tokenizer.model", "x.json", sample_image.name}
    assert {path.name for path in tmp_path.iterdir()} == names
    err = capsys.readouterr().err
    for name in names:
        assert f"{tmp_path / name}: " in err


@pytest.mark.parametrize(
    ("exception", "code", "message"),
    [
        (ExportError("this cannot be"), 2, "mvlm.export: this cannot be\n"),
        (OSError(28, "No space left on device"), 1, "could not be read or written: No space left on device\n"),
        (KeyboardInterrupt(), 130, "mvlm.export: interrupted; nothing was written\n"),
    ],
    ids=["ExportError", "OSError", "KeyboardInterrupt"],
)
def test_exit_codes(exception, code, message, capsys, monkeypatch, tmp_path):
    def export_checkpoint(*_: object) -> None:
        raise exception

    monkeypatch.setattr(pipeline, "export_checkpoint", export_checkpoint)
    assert main(["--pte-name", str(tmp_path / "x.pte"), "--quiet"]) == code
    assert capsys.readouterr().err.endswith(message)


def test_an_interrupted_calibration_is_kept(capsys, monkeypatch, tmp_path):
    path = tmp_path / "x.pte"

    def export_checkpoint(*_: object) -> None:
        (tmp_path / "x.pte.calibration").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "export_checkpoint", export_checkpoint)
    assert main(["--pte-name", str(path), "--calibrate", "--quiet"]) == 130
    assert "interrupted; the same command goes on where it was, with what is in" in capsys.readouterr().err


def test_progress_tells_the_time_left(capsys, monkeypatch):
    seconds = iter(range(0, 10_000, 40))
    monkeypatch.setattr("mvlm.export.progress.time.monotonic", lambda: float(next(seconds)))
    progress = Progress()
    with progress.stage("calibrate"):
        for done in range(1, 5):
            progress.share(done / 10)
    lines = capsys.readouterr().err.splitlines()
    # Once a minute; after 80 seconds, a fifth of it done, four fifths are left.
    assert lines[1:-1] == ["  20%, 5 min left", "  40%, 4 min left"]


def test_progress_says_time_and_memory(capsys):
    progress = Progress()
    with progress.stage("lower to XNNPACK"):
        progress.say("  a detail")
    begin, detail, end = capsys.readouterr().err.splitlines()
    assert begin == "lower to XNNPACK …"
    assert detail == "  a detail"
    assert re.fullmatch(r"lower to XNNPACK +\d+\.\d s +elapsed +\d+\.\d s +peak +[1-9]\d+ MiB", end)


def test_quiet_progress_says_nothing(capsys):
    progress = Progress(quiet=True)
    with progress.stage("lower to XNNPACK"):
        progress.say("  a detail")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_what_the_pipeline_says(tmp_path, capsys, monkeypatch):
    """Every stage is named, and so are unused tensors and smaller groups. Stopped before it takes long."""
    folder = RandomCheckpoint.make(Sizes(projector="linear")).write(tmp_path / "model")

    def stop(*_: object) -> None:
        raise ExportError("far enough")

    monkeypatch.setattr(pipeline, "capture", stop)
    arguments = ["--model", str(folder), "--pte-name", str(tmp_path / "x.pte"), "--max-context-len", "100"]
    assert main([*arguments, "--group-size", "128"]) == 2
    err = capsys.readouterr().err
    assert re.search(r"^model, recipe mobile: about \d+ MB of \.pte, [\d,]+ MiB of memory", err, re.MULTILINE)
    for stage in ("open checkpoint", "identify checkpoint", "read and quantize"):
        assert re.search(rf"^{stage} .* s   elapsed .* MiB$", err, re.MULTILINE), stage
    assert "\ncapture with torch.export …\nmvlm.export: far enough\n" in err
    assert re.search(
        r"^  18 tensors are not needed: vision_model\.encoder\.layers\.1\..* and 15 more$", err, re.MULTILINE
    )
    assert "group size 64 instead of 128 for" in err
    assert re.search(r"^  language_model mlp\.gate_up_proj +1  int4, groups of 64, search ", err, re.MULTILINE)
    assert "group size 32 instead of 128 for mlp.down_proj: their width wants it" in err
    assert list(tmp_path.iterdir()) == [folder]


def test_report_is_written(tmp_path, monkeypatch):
    """Before the long stages, which are left out here."""

    def stop(*_: object) -> None:
        raise ExportError("far enough")

    monkeypatch.setattr(pipeline, "capture", stop)
    report = tmp_path / "r.json"
    assert main(["--pte-name", str(tmp_path / "x.pte"), "--report", str(report), "--quiet"]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", "r.html"}
    written = json.loads(report.read_text())
    assert {"language_model.lm_head", "vision_tower.encoder.layers.4.mlp.fc2"} <= {
        layer["name"] for layer in written["layers"]
    }


@pytest.mark.parametrize(("flags", "code"), [([], 2), (["--force"], 0)])
def test_not_enough_memory(flags, code, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "available_memory", lambda: 1 << 20)
    monkeypatch.setattr(pipeline, "quantize_checkpoint", lambda *_: pytest.fail("went on with it"))
    if code == 2:
        error = input_error(["--pte-name", str(tmp_path / "x.pte"), *flags], capsys)
        assert re.search(r"not enough memory: .* [\d,]+ MiB and 1 MiB are available; .*--force", error)
    else:
        with pytest.raises(pytest.fail.Exception, match="went on with it"):
            main(["--pte-name", str(tmp_path / "x.pte"), "--quiet", *flags])
