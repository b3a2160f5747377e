"""The files in which ``llava_main`` keeps packed weights: that they are used, and that no state of them does harm."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from llava_run import QUESTION, answer, check_refused

METHODS = ["text_decoder", "vision_encoder"]
#: Our own kernels, which some processors use, want no packed weights.
XNNPACK = ["--linear_kernels", "xnnpack"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty folder for a weight cache; does not exist yet."""
    return tmp_path / "some" / "cache"


@pytest.fixture
def run(run):
    """With XNNPACK's kernels on every processor."""
    return lambda *arguments, **flags: run(*arguments, **{"linear_kernels": "xnnpack"} | flags)


@pytest.fixture
def run_pte(run_pte):
    return lambda *arguments, **flags: run_pte(*arguments, **{"linear_kernels": "xnnpack"} | flags)


@pytest.fixture
def ask(run, sample_image, tmp_path, cache):
    """Asks the demo model about a picture; gives the answer, what stats say of the cache, and stderr."""

    def call(*arguments: str, **flags: object) -> tuple[str, dict, str]:
        stats_path = tmp_path / "stats.json"
        flags = {"image_path": sample_image, "weight_cache": cache, "stats_path": stats_path} | flags
        result = run(*arguments, **flags)
        return answer(result), json.loads(stats_path.read_text())["weight_cache"], result.stderr.decode()

    return call


@pytest.fixture
def expected(ask) -> str:
    """The answer without a cache."""
    text, stats, _ = ask(weight_cache="off")
    assert stats["state"] == "off"
    return text


def files(cache: Path) -> dict[str, Path]:
    """The cache's files by method; there are no others."""
    found = {path.name.split("-")[1]: path for path in cache.iterdir()}
    assert len(found) == len(list(cache.iterdir()))
    assert all(path.suffix == ".packed" for path in found.values())
    return found


def test_the_first_run_fills_it_and_the_second_uses_it(ask, cache, expected):
    text, stats, stderr = ask()
    assert text == expected
    assert stats["state"] == "built"
    assert stats["mode"] == stats["path"] == str(cache)
    assert stderr.count("packed the weights of") == 2
    packed = files(cache)
    assert sorted(packed) == METHODS
    assert sorted(method["path"] for method in stats["methods"]) == sorted(map(str, packed.values()))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in packed.values()}

    text, stats, stderr = ask()
    assert text == expected
    assert stats["state"] == "hit"
    assert "packed" not in stderr
    assert [method["state"] for method in stats["methods"]] == ["hit", "hit"]
    assert all(method["bytes"] == Path(method["path"]).stat().st_size for method in stats["methods"])
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in files(cache).values()}
    assert after == before, "a run that only used the files changed them"


def test_by_default_it_is_in_the_users_folder(run, tmp_path, monkeypatch):
    stats_path = tmp_path / "stats.json"

    def folder() -> str | None:
        answer(run(stats_path=stats_path, max_new_tokens=1))
        return json.loads(stats_path.read_text())["weight_cache"]["path"]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == str(tmp_path / "xdg" / "mvlm")
    assert len(files(tmp_path / "xdg" / "mvlm")) == 1, "without a picture there is nothing to pack for one"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert folder() == str(tmp_path / "home" / ".cache" / "mvlm")
    monkeypatch.delenv("HOME")
    assert folder() is None


def test_off_leaves_nothing_behind(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    answer(run(weight_cache="off"))
    assert not (tmp_path / "xdg").exists()


def test_our_kernels_want_no_files(ask, run, cache, expected):
    """They read the weights as the .pte has them, and compute the same."""
    text, stats, _ = ask(linear_kernels="mvlm")
    assert (text, stats["state"]) == (expected, "none")
    assert list(cache.iterdir()) == []
    flags = {"prompt": None, "temperature": None, "weight_cache": cache, "linear_kernels": "mvlm"}
    assert b"there is nothing to prepare" in run("--prepare", **flags).stderr
    assert list(cache.iterdir()) == []


def test_other_settings_use_the_same_files(ask, expected):
    ask()
    for flags in ({"cpu_threads": 1}, {"cpu_threads": 3}, {"workspace_sharing": "off"}, {"workspace_sharing": "model"}):
        text, stats, _ = ask(**flags)
        assert (text, stats["state"]) == (expected, "hit"), flags
    assert ask("--low_memory")[:2] == (expected, ask()[1])


def test_a_language_model_alone_has_one_too(run_pte, text_pte, tmp_path, cache):
    stats_path = tmp_path / "stats.json"
    flags = {"model_path": text_pte.path, "max_new_tokens": 8, "weight_cache": cache, "stats_path": stats_path}
    texts, states = [], []
    for _ in range(2):
        texts.append(answer(run_pte("--ignore_eos", **flags)))
        states.append(json.loads(stats_path.read_text())["weight_cache"]["state"])
    assert states == ["built", "hit"]
    assert texts[0] == texts[1] == answer(run_pte("--ignore_eos", **flags | {"weight_cache": "off"}))


# Files that are of no use


def _spoil(packed: dict[str, Path], how: str) -> None:
    """Makes every file useless."""
    contents = {path: path.read_bytes() for path in packed.values()}
    for (path, whole), other in zip(contents.items(), reversed(list(contents.values())), strict=True):
        path.write_bytes(
            {
                "empty": b"",
                "half": whole[: len(whole) // 2],
                "a byte less": whole[:-1],
                "a byte more": whole + b"x",
                "without its first page": whole[4096:],
                "zeros": bytes(len(whole)),
                "weights changed": bytes([whole[0] ^ 1]) + whole[1:],
                "index changed": whole[:-300].replace(b"sha256", b"sha265") + whole[-300:]
                if b"sha256" in whole[:-300]
                else whole[:-900] + bytes([whole[-900] ^ 1]) + whole[-899:],
                "text": b"These are notes, not weights.\n",
                "of another method": other,
            }[how]
        )


@pytest.mark.parametrize(
    "how",
    [
        "empty",
        "half",
        "a byte less",
        "a byte more",
        "without its first page",
        "zeros",
        "weights changed",
        "index changed",
        "text",
        "of another method",
    ],
)
def test_a_spoiled_file_is_made_anew(ask, cache, expected, how):
    ask()
    good = {path: path.read_bytes() for path in files(cache).values()}
    _spoil(files(cache), how)
    text, stats, stderr = ask()
    assert text == expected
    assert stats["state"] == "built"
    assert stderr.count(", because ") == 2
    assert {path: path.stat().st_size for path in files(cache).values()} == {
        path: len(whole) for path, whole in good.items()
    }
    assert ask()[1]["state"] == "hit"


@pytest.mark.parametrize("field", ["cpu", "library", "program_id"])
def test_a_stale_file_is_made_anew(ask, cache, expected, field):
    """What its manifest says of itself is changed, but for its length."""
    ask()
    for path in files(cache).values():
        whole = path.read_bytes()
        at = whole.rindex(f'"{field}":"'.encode()) + len(field) + 4
        path.write_bytes(whole[:at] + (b"0" if whole[at : at + 1] != b"0" else b"1") + whole[at + 1 :])
    text, stats, stderr = ask()
    assert (text, stats["state"]) == (expected, "built")
    assert stderr.count("is stale (of another") == 2
    assert ask()[1]["state"] == "hit"


def test_files_for_an_older_library_go_and_those_for_another_processor_stay(ask, cache):
    ask()
    packed = files(cache)["text_decoder"]
    whole = packed.read_bytes()
    copies = {}
    for field in ("cpu", "library"):
        at = whole.rindex(f'"{field}":"'.encode()) + len(field) + 4
        copies[field] = packed.with_name(packed.name.rsplit("-", 1)[0] + f"-{field}.packed")
        copies[field].write_bytes(whole[:at] + b"zz" + whole[at + 2 :])
    packed.unlink()
    assert ask()[1]["state"] == "built"
    assert packed.exists()
    assert copies["cpu"].exists()
    assert not copies["library"].exists()


def test_a_pte_exported_anew_has_its_own_files(run_pte, demo_pte, tmp_path, cache):
    """The same file with bytes added at the end stands for another one."""
    other = tmp_path / "other.pte"
    other.write_bytes(demo_pte.read_bytes() + bytes(64))
    texts = [answer(run_pte(model_path=path, weight_cache=cache)) for path in (demo_pte, other, demo_pte)]
    assert len(set(texts)) == 1


def test_a_file_of_another_user_is_not_trusted(ask, cache, expected):
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    ask()
    for path in files(cache).values():
        os.chown(path, 12345, 12345)
    text, stats, _ = ask()
    assert (text, stats["state"]) == (expected, "built")


# Folders and disks that take nothing


@pytest.fixture
def ask_on_filesystem(llava_main, demo_pte, sample_image, cache, tmp_path):
    """The same as ``ask`` with an empty file system at ``cache``, in a mount namespace; and the names of what is left.

    Unlike permissions, a file system stops root too.
    """

    def call(options: str) -> tuple[str, dict, str, list[str]]:
        namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
        mount = f"mount -t tmpfs -o {options} tmpfs {cache}"
        cache.mkdir(parents=True)
        try:
            possible = subprocess.run([*namespace, mount], capture_output=True).returncode == 0
        except FileNotFoundError:
            possible = False
        if not possible:
            pytest.skip("file systems cannot be mounted here")
        stats_path, names_path = tmp_path / "stats.json", tmp_path / "names.txt"
        command = [llava_main, *XNNPACK, "--model_path", demo_pte, "--image_path", sample_image, "--prompt", QUESTION]
        command += ["--temperature", "0", "--weight_cache", cache, "--stats_path", stats_path]
        script = f'{mount} && "$@" && ls -A {cache} > {names_path}'
        result = subprocess.run([*namespace, script, "sh", *command], capture_output=True)
        text, stats = answer(result), json.loads(stats_path.read_text())["weight_cache"]
        return text, stats, result.stderr.decode(), names_path.read_text().split()

    return call


def test_a_full_disk(ask_on_filesystem, expected):
    text, stats, stderr, names = ask_on_filesystem("size=1m")
    assert (text, stats["state"]) == (expected, "fallback")
    assert "stay in memory: cannot write" in stderr
    assert "No space left on device" in stderr
    assert all(name.endswith(".packed") for name in names), "a part of a file was left"


def test_a_read_only_file_system(ask_on_filesystem, expected):
    text, stats, stderr, names = ask_on_filesystem("ro")
    assert (text, stats["state"], names) == (expected, "fallback", [])
    assert stderr.count("stay in memory: cannot write into") == 2


@pytest.mark.parametrize("limit", [0, 4096, 100_000, 1_000_000])
def test_a_limit_on_the_size_of_files(llava_main, demo_pte, sample_image, expected, cache, limit):
    command = [llava_main, *XNNPACK, "--model_path", demo_pte, "--image_path", sample_image, "--prompt", QUESTION]
    command += ["--temperature", "0", "--weight_cache", cache]
    result = subprocess.run(
        command, capture_output=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert answer(result) == expected
    assert b"stay in memory: " in result.stderr
    assert all(path.suffix == ".packed" for path in cache.iterdir())


@pytest.mark.parametrize("kind", ["below a file", "/proc"])
def test_a_folder_that_cannot_be_made(ask, run, tmp_path, expected, kind):
    (tmp_path / "file").write_text("x")
    folder = tmp_path / "file" / "cache" if kind == "below a file" else Path("/proc/none")
    text, stats, stderr = ask(weight_cache=folder)
    assert (text, stats["state"], stats["path"]) == (expected, "fallback", None)
    assert f"no weight cache: cannot make the folder {folder}" in stderr
    check_refused(run("--prepare", prompt=None, temperature=None, weight_cache=folder), "no weight cache", code=1)


def test_an_unwritable_folder(ask, cache, expected):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    cache.mkdir(parents=True)
    cache.chmod(0o500)
    text, stats, stderr = ask()
    assert (text, stats["state"]) == (expected, "fallback")
    assert stderr.count("stay in memory: cannot write into") == 2


def test_a_folder_in_place_of_a_file(ask, cache, expected):
    ask()
    for path in files(cache).values():
        path.unlink()
        path.mkdir()
    text, stats, _ = ask()
    assert (text, stats["state"]) == (expected, "fallback")
    assert all(path.is_dir() for path in cache.iterdir())


def test_a_file_is_no_folder(run, sample_image):
    check_refused(run(weight_cache=sample_image), str(sample_image), "is not a folder", "name a folder")


def test_a_long_path(ask, tmp_path, expected):
    """Longer than the names that XNNPACK takes."""
    folder = tmp_path.joinpath(*["a" * 60] * 6)
    assert len(str(folder)) > 256
    for state in ("built", "hit"):
        text, stats, _ = ask(weight_cache=folder)
        assert (text, stats["state"]) == (expected, state)


def test_many_at_once(llava_main, demo_pte, sample_image, cache, expected):
    command = [llava_main, *XNNPACK, "--model_path", demo_pte, "--image_path", sample_image, "--prompt", QUESTION]
    command += ["--temperature", "0", "--weight_cache", cache, "--quiet", "--cpu_threads", "1"]
    for _ in range(3):
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(6)]
        outputs = [process.communicate(timeout=120) for process in processes]
        assert outputs == [(expected.encode(), b"")] * len(processes)
        assert sorted(files(cache)) == METHODS
        shutil.rmtree(cache)


# --prepare


def test_prepare_fills_it_and_says_so(run, ask, cache, expected, tmp_path):
    stats_path = tmp_path / "prepare.json"
    flags = {"prompt": None, "temperature": None, "weight_cache": cache}
    result = run("--prepare", stats_path=stats_path, **flags)
    assert answer(result) == ""
    stderr = result.stderr.decode()
    for path in files(cache).values():
        assert str(path) in stderr
    assert "prepared" in stderr
    stats = json.loads(stats_path.read_text())
    assert stats["weight_cache"]["state"] == "built"
    assert stats["tokens"] == []
    assert ask()[:2] == (expected, ask()[1])
    assert ask()[1]["state"] == "hit"

    stderr = run("--prepare", **flags).stderr.decode()
    assert stderr.count("are there already") == 2
    assert answer(run("--prepare", "--quiet", **flags)) == ""


def test_prepare_answers_nothing(run, sample_image, cache):
    flags = {"temperature": None, "weight_cache": cache}
    check_refused(run("--prepare", **flags), "--prepare only fills", "leave out --prompt")
    check_refused(run("--prepare", prompt=None, image_path=sample_image, **flags), "leave out --image_path")
    check_refused(run("--prepare", prompt=None, temperature=None, weight_cache="off"), "--weight_cache off")
    check_refused(run("--prepare", prompt=None, model_path="none.pte", **flags), "none.pte")
    assert not cache.exists()


def test_prepare_fails_where_nothing_can_be_kept(run, cache):
    cache.mkdir(parents=True)
    result = run("--prepare", prompt=None, temperature=None, weight_cache="/proc/self")
    assert result.returncode == 1
    assert b"error: cannot keep the packed weights of vision_encoder: cannot write" in result.stderr
