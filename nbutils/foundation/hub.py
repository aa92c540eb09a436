"""Models and tokenizers by folder or Hugging Face Hub name: known to be there before anything is loaded.

transformers retries an unreachable Hub for 47 s for each file; here the local cache is looked into first, and the Hub
is asked once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nbutils.foundation.errors import ModelError, UnreachableModelError
from nbutils.foundation.places import resolve

HUB_SECONDS = 5.0


@dataclass(frozen=True)
class Place:
    """What from_pretrained is called with: an absolute folder or a Hub name, and whether it lies on this machine."""

    name: str
    local: bool

    @property
    def settings(self) -> dict[str, bool]:
        """Keywords for from_pretrained. Code from outside is refused, not asked about on the terminal."""
        return {"local_files_only": self.local, "trust_remote_code": False}


def locate(name: str, files: Sequence[str], kind: str, cure: str) -> Place:
    """Where the `kind` ("tokenizer") called `name` lies; any of `files` in a folder, the first in the cache, tells it.

    Raises ModelError with the cause and `cure`.
    """
    folder = resolve(name)
    if folder.is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        if not any((folder / file).is_file() for file in files):
            raise ModelError(f"{folder} is not a {kind} folder, it has none of {', '.join(files)}. {cure}")
        return Place(str(folder), True)
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, files[0]), str):
            return Place(name, True)
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except Exception as error:  # whatever the Hub's HTTP client raises, the cause and the cure are the same
        answered = isinstance(error, HfHubHTTPError | HFValidationError)  # then there is no such thing
        raise (ModelError if answered else UnreachableModelError)(unusable(name, kind, error, cure)) from error
    return Place(name, False)


def unusable(name: str, kind: str, error: Exception, cure: str) -> str:
    """Why `name` cannot be loaded: the first line of `error`, and the cure."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return f"The {kind} {name!r} cannot be loaded ({reason}). {cure}"
