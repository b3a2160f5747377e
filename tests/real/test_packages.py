"""Fetching: whole or not at all, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from gauge import FetchError, making, packages


def test_index_that_cannot_be_reached(tmp_path, monkeypatch):
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, (tmp_path / "nowhere").as_uri())
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(FetchError, match=r"cannot be fetched from the Python Package Index; check the network"):
        packages.fetch_wheels(tmp_path / "wheels")
    assert not (tmp_path / "wheels").exists()


def test_debian_package_that_is_another(tmp_path, monkeypatch):
    [(path, digest), *_] = packages.DEBIAN_PACKAGES.items()
    wrong = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    monkeypatch.setattr(packages, "DEBIAN_PACKAGES", {path: wrong})
    with pytest.raises(FetchError, match=r"(?s)debian-reference-en_\S+ cannot be fetched.*Hash Sum mismatch"):
        packages.fetch_debian(tmp_path / "debian")
    assert not (tmp_path / "debian").exists()


def test_what_was_interrupted_is_made_anew_and_what_is_there_is_kept(tmp_path):
    target, calls = tmp_path / "part", []

    def make(folder: Path) -> None:
        calls.append(folder)
        folder.mkdir()
        (folder / "file").write_text(str(len(calls)))
        if len(calls) == 1:
            raise KeyboardInterrupt

    def call(key: str) -> str:
        making._make(target, key, make, lambda line: None)
        return (target / "file").read_text()

    with pytest.raises(KeyboardInterrupt):
        call("a")
    assert not target.exists()
    assert call("a") == "2"
    assert call("a") == "2"
    assert call("b") == "3"
