"""Where a checkpoint is: a folder, or a download from the Hugging Face hub."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from mvlm.export.errors import ExportError

#: What is fetched of a repository; its weights are fetched in one form.
HUB_PATTERNS = ("*.json", "tokenizer.model")
SAFETENSORS_PATTERN = "model*.safetensors"
BIN_PATTERN = "pytorch_model*.bin"


def resolve_folder(name: str, role: str, revision: str | None = None) -> Path:
    """A folder for ``name``: itself if it is one, else a download of that id from the Hugging Face hub.

    A download that was interrupted goes on where it stopped; without a network, what an earlier one brought is taken.

    Args:
        name: a folder, or a hub id such as ``mtgv/MobileVLM-1.7B``.
        role: what it is, for messages.
        revision: branch, tag or commit on the hub; the main branch by default.

    Raises:
        ExportError: neither, with why the hub did not answer; or a revision of a folder.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ExportError(
                f"{role} {name}: is a folder, which has no revisions; leave out --revision {revision}, or give a hub id"
            )
        return folder
    if folder.exists():
        raise ExportError(f"{role} {name}: is a file; a folder with config.json and weights, or a hub id, is expected")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ExportError(f"{role} {name}: no such folder, and no hub id either (those look like mtgv/MobileVLM-1.7B)")
    import huggingface_hub  # here, because most runs never need it

    try:
        try:
            files = [file.rfilename for file in huggingface_hub.model_info(name, revision=revision).siblings or ()]
        except Exception:
            # No network, say: what an earlier download brought will do. It cannot be known any more in which form the
            # weights were, and asking for those of the .bin as well would call a safetensors download incomplete.
            patterns = [*HUB_PATTERNS, SAFETENSORS_PATTERN]
            with suppress(huggingface_hub.errors.LocalEntryNotFoundError):
                return Path(
                    huggingface_hub.snapshot_download(
                        name, revision=revision, allow_patterns=patterns, local_files_only=True
                    )
                )
            raise
        patterns = [*HUB_PATTERNS, _weight_pattern(files)]
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many types for "no network" and "no such repo"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = name if revision is None else f"{name} at revision {revision}"
        raise ExportError(
            f"{role} {where}: no such folder, and the Hugging Face hub did not provide it ({reason}); "
            "pass a folder, or check the id and the network"
        ) from error


def _weight_pattern(files: list[str]) -> str:
    """The one form of weights to fetch: safetensors if there are any, for many repositories hold both."""
    has_safetensors = "model.safetensors" in files or "model.safetensors.index.json" in files
    return SAFETENSORS_PATTERN if has_safetensors else BIN_PATTERN
