"""Files that run the workbook on a cluster, checked as plans are, before anything is submitted.

    python -m nbutils check params/cluster/slurm.sh
    python -m nbutils check params/cluster/kuberay.yaml

Checked is what belongs to the workbook and what loses work where it is wrong: the commands, the plan they name, the
shared folder, GPUs, versions, time to save, what is done about each exit code. Whether a cluster takes the file is its
own to say: `kubectl apply --dry-run=server`, `sbatch --test-only`.
"""

from __future__ import annotations

from pathlib import Path

from nbutils.cluster_files.kubernetes import KINDS, check_manifest
from nbutils.cluster_files.pods import shown
from nbutils.cluster_files.slurm import check_script
from nbutils.errors import PlanError, did_you_mean
from nbutils.places import relative
from nbutils.plaintext import visible
from nbutils.yamlfile import read_yaml

__all__ = ["check_cluster_file", "is_cluster_file"]
SCRIPTS = (".sh", ".sbatch", ".slurm")


def is_cluster_file(path: Path) -> bool:
    """Whether `path` is no plan: a shell script, or YAML with a `kind` or an `apiVersion`."""
    path = Path(path)
    if path.suffix in SCRIPTS:
        return True
    try:
        content = read_yaml(path)
    except PlanError:
        return False  # whoever reads it as a plan says what is wrong with it
    return isinstance(content, dict) and bool({"kind", "apiVersion"} & content.keys())


def check_cluster_file(path: Path) -> str:
    """What the file would run, in a few lines. Raises PlanError with the place in it, the cause and the cure."""
    return visible(_check(Path(path)))


def _check(path: Path) -> str:
    if path.suffix in SCRIPTS:
        return check_script(path)
    content, where = read_yaml(path), relative(path)
    if not isinstance(content, dict):
        raise PlanError(f"{where} is no manifest of Kubernetes: it has no apiVersion and kind.")
    kind, version = content.get("kind"), content.get("apiVersion")
    if not isinstance(kind, str) or kind not in KINDS:
        raise PlanError(f"{where}: kind is {shown(kind)}. {did_you_mean(str(kind), KINDS)}")
    if version != KINDS[kind]:
        raise PlanError(f"{where}: apiVersion of a {kind} is {shown(version)}. Give {KINDS[kind]!r}.")
    return check_manifest(where, content)
