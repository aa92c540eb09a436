"""When is a run the same run? Its key is a hash of all that decides its numbers; a finished run with that key is kept.

In the key: the notebook's code, the resolved parameters, the content of the files and folders the parameters name, and
the nbutils files that the notebook imports (dependencies.py). Machine and package versions are in the manifest, not in
the key: an upgrade repeats no run, except that of packages whose documentation is the embedded corpus.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbutils.data import CorpusRequest, corpus_versions, fingerprint, locate_corpus, output_fingerprint
from nbutils.foundation import ROOT, file_sha256, relative, resolve, sha256_of_hashes
from nbutils.runs.dependencies import code_hashes
from nbutils.runs.params import RUN_FOLDER, source_sha256

FOLDER_SUFFIX = "_folder"  # a parameter that ends so names a folder the run reads
FILES_NAMED = 4  # of the code, where a message says what changed
BROUGHT_ALONG = [("blimp_folder", "embedded")]  # what stands for a folder and is part of the workbook


def run_key(made_of: Mapping[str, Any]) -> str:
    """The key of a run that is made of this: a hash of what `made_of` returns."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def made_of(
    notebook: Path,
    params: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, str]] | None = None,
    code: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """All that decides the numbers of `notebook` with `params`, by kind.

    inputs: what `read_inputs` finds; code: what `code_hashes` finds. Give them where they are at hand already.
    """
    inputs = read_inputs(params) if inputs is None else inputs
    return {
        "notebook": source_sha256(notebook),
        "params": {name: value for name, value in params.items() if name not in inputs and name != RUN_FOLDER},
        "inputs": {name: each["fingerprint"] for name, each in inputs.items()},
        "corpus": corpus_content(params),
        "prompts": prompts_content(params),
        "nbutils": dict(code_hashes(notebook, params) if code is None else code),
    }


def what_changed(recorded: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """What a finished run is stale of, from what it was made of and what it would be made of now.

    Names parameters with both values, files of the code, and data. recorded: None of a run by an earlier version.
    """
    if not recorded:
        return "it was made by an earlier version of the workbook, which did not record of what"
    found = [f"{name} was {old!r} and is {new!r}" for name, old, new in _apart(recorded["params"], now["params"])]
    if recorded["notebook"] != now["notebook"]:
        found.append("the notebook's code")
    files = [name.removeprefix("nbutils/") for name, _, _ in _apart(recorded["nbutils"], now["nbutils"])]
    if files:
        more = f" and {len(files) - FILES_NAMED} more" if len(files) > FILES_NAMED else ""
        found.append(f"code: {', '.join(files[:FILES_NAMED])}{more}")
    found += [f"the content of {name}" for name, _, _ in _apart(recorded["inputs"], now["inputs"])]
    found += [f"the corpus: {name}" for name, _, _ in _apart(recorded["corpus"], now["corpus"])]
    found += [f"the prompt: {name}" for name, _, _ in _apart(recorded["prompts"], now["prompts"])]
    return "; ".join(found)


def _apart(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, old, new) of what differs, in the order of names; None stands for what is not there."""
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return [(name, old.get(name), new.get(name)) for name in names]


def read_inputs(params: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """{parameter: {folder, fingerprint}} for every parameter that names a folder with a run, data or a model.

    A parameter called `..._folder` must, but for those of BROUGHT_ALONG; others do where a folder lies at the path they
    hold (model_name, say). Not run_folder, where the run writes, nor data_files, whose content is the corpus.
    Raises RunError where the folder does not exist or holds a run that did not finish.
    """
    return {
        name: {"folder": relative(resolve(value)), "fingerprint": fingerprint(name, resolve(value))}
        for name, value in params.items()
        if name not in (RUN_FOLDER, "data_files") and value and _names_folder(name, value)
    }


def _names_folder(name: str, value: Any) -> bool:
    if (name, value) in BROUGHT_ALONG:
        return False
    return name.endswith(FOLDER_SUFFIX) or (isinstance(value, str) and resolve(value).is_dir())


def data_fingerprint(folder: Path, inputs: Mapping[str, Mapping[str, str]]) -> str | None:
    """The fingerprint of the data a run made in `folder` or read from one of `inputs`, None where there is none."""
    if (folder / "data" / "card.json").is_file():
        return output_fingerprint(folder)
    read = [each for each in inputs.values() if (resolve(each["folder"]) / "data" / "card.json").is_file()]
    return read[0]["fingerprint"] if read else None


def corpus_content(params: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies the documents that a data-preparation run reads; {} where `params` name no corpus.

    Of a Hub data set its configuration and commit (of the fallback, where that would be read). Raises CorpusError
    where the files do not exist or the Hub cannot be reached.
    """
    if not {"dataset_name", "data_files"} <= params.keys():
        return {}
    taken, located, _ = locate_corpus(CorpusRequest.of(params))
    hashes = {relative(path): file_sha256(path) for path in located.files if path.is_file()}
    hub = {"name": located.hub_name, "config": located.config, "revision": located.revision}
    return {"versions": corpus_versions(taken.dataset_name), "files": hashes, "hub": hub}


def prompts_content(params: Mapping[str, Any]) -> dict[str, str]:
    """A hash of each prompt file that judges, teachers and stories are made of; {} where `params` name no judge.

    The rubrics of what every arm is asked at last are among them, whatever it learned by.
    Where a server judges or corrects, server_model, too: the model it is asked for, which no parameter names. Its
    address may change from one machine to the next.
    """
    if not {"rubric", "judge"} <= params.keys():
        return {}
    from nbutils.interaction import RUBRICS, prompts

    rubrics = {"rubric": params["rubric"], **{f"held_out_{kind}": name for kind, name in RUBRICS.items()}}
    files = {name: prompts.read_rubric(rubric) for name, rubric in rubrics.items()}
    files |= {"correction": prompts.read_correction(), "story": prompts.read_story()}
    content = {name: prompts.digest(each) for name, each in files.items()}
    if "server" in (params.get(name) for name in ("judge", "second_judge", "correcting_teacher")):
        content["server_model"] = os.environ.get("WORKBOOK_JUDGE_MODEL", "").strip()
    return content


def nbutils_sha256() -> str:
    """A hash of all nbutils files: whether two machines have the same workbook."""
    files = sorted((ROOT / "nbutils").rglob("*.py"))
    return sha256_of_hashes((path.relative_to(ROOT).as_posix(), file_sha256(path)) for path in files)
