"""The files that hold a model's weights, in a folder or in the Hub's local cache."""

from __future__ import annotations

import json
from pathlib import Path

from nbutils.foundation import ModelError, resolve

# What from_pretrained reads, in its order; an index names the files that hold the parts.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def weight_files(folder: str | Path) -> list[Path]:
    """The files that hold a model's weights; [] of a Hub model that is not on this machine yet, or of no model.

    Raises ModelError where some of several files are missing.
    """
    for name in WEIGHT_FILES:
        path = _file(folder, name)
        if path is None:
            continue
        if path.suffix != ".json":
            return [path]
        parts = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        files = {part: _file(folder, part) for part in sorted(parts)}
        missing = [part for part, file in files.items() if file is None]
        if missing:
            raise ModelError(f"The model in {folder} lacks {', '.join(missing)}. Save or download it again.")
        return list(files.values())
    return []


def _file(folder: str | Path, name: str) -> Path | None:
    """A file of a model folder, or of a Hub name in the local cache; None where there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if resolve(str(folder)).is_dir():
        path = resolve(str(folder)) / name
        return path if path.is_file() else None
    try:
        cached = try_to_load_from_cache(str(folder), name)
    except HFValidationError:  # no name the Hub could have
        return None
    return Path(cached) if isinstance(cached, str) else None
