"""Whether a finished run is what would be made now, and what has changed where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbutils.batch.runner import place_needs
from nbutils.foundation import WorkbookError
from nbutils.runs import CodeOf, Manifest, Place, Variant, made_of, run_key, was_made_of, what_changed


def is_finished(variant: Variant, plan_folder: Path, code: CodeOf | None = None) -> bool:
    """Whether a run of exactly this variant is published and finished, its needs included; starts nothing.

    code: one for all, where many variants are looked at.
    """
    made = made_now(variant, plan_folder, code)
    return made is not None and Place(plan_folder, variant.name).is_finished(run_key(made))


def made_now(variant: Variant, plan_folder: Path, code: CodeOf | None = None) -> dict[str, Any] | None:
    """What a run of this variant would be made of now, None where something it reads is not there."""
    try:
        variant = place_needs(variant, plan_folder)
        return made_of(variant.notebook, variant.params, code=(code or CodeOf())(variant.notebook, variant.params))
    except WorkbookError:
        return None


def stale_of(manifest: Manifest, variant: Variant, plan_folder: Path, code: CodeOf | None = None) -> str:
    """What has changed since a finished run of this variant; empty where it is what would be made now."""
    made = made_now(variant, plan_folder, code)
    if made is None:
        return "something it reads is not there any more"
    return "" if run_key(made) == manifest["key"] else what_changed(was_made_of(manifest), made)
