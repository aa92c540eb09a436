"""What identifies the content of a folder that a run reads: prepared data, a model, another run."""

from __future__ import annotations

import json
from pathlib import Path

from nbutils.foundation import CorpusError, RunError, read_json, relative, sha256_of_hashes, tree_sha256

MODELS = ("model", "model_best")  # what a run leaves for others to read
DATA_FOLDER = "data_folder"  # the parameter that names the run folder with the prepared data


def fingerprint(parameter: str, folder: Path) -> str:
    """What identifies the content of a folder a run reads.

    Of a data-preparation run its data's fingerprint; of a run that made a model, or of a model folder, a hash of the
    model's files; of any other finished run its key. Raises RunError where the folder is missing or its run unfinished,
    CorpusError where it is to hold data and is no run's and has none: then nothing in it is read.
    """
    if not folder.is_dir():
        raise RunError(
            f"{parameter}: there is no folder {relative(folder)}. Make the run first, or give another folder."
        )
    manifest = folder / "manifest.json"
    if parameter == DATA_FOLDER and not manifest.is_file():
        check_prepared(folder)
    if manifest.is_file():
        record = json.loads(manifest.read_text(encoding="utf-8"))
        if record["plan"] != "interactive" and record["status"] != "finished":
            raise RunError(
                f"{parameter}: the run in {relative(folder)} is {record['status']}, not finished. Run it again first."
            )
        if record.get("fingerprint"):
            return record["fingerprint"]
    return output_fingerprint(folder) or tree_sha256(folder)


def check_prepared(folder: Path) -> None:
    """Raise CorpusError, as the notebook would, where no prepared data lie in `folder`."""
    try:
        fingerprint = read_json(folder / "data" / "card.json").get("fingerprint")
    except (OSError, ValueError, AttributeError):
        fingerprint = None
    if not fingerprint:
        raise CorpusError(
            f"{relative(folder)} holds no prepared data (data/card.json is missing or damaged). "
            f"Run 01_data_prep first and give its run folder, or leave {DATA_FOLDER} empty for a small corpus."
        )


def output_fingerprint(folder: Path) -> str | None:
    """The fingerprint of the data or the model in a run folder, None where it made neither."""
    card = folder / "data" / "card.json"
    if card.is_file():
        return json.loads(card.read_text(encoding="utf-8"))["fingerprint"]
    models = [each for name in MODELS if (each := folder / name).is_dir()]
    return sha256_of_hashes((each.name, tree_sha256(each)) for each in models) if models else None
