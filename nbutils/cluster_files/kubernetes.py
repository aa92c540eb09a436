"""Manifests of Kubernetes that run a plan: a RayJob of KubeRay, on Run:ai too, and an indexed Job over `run`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from nbutils.cluster_files.commands import Command, find_commands
from nbutils.cluster_files.slurm import MARGIN_SECONDS
from nbutils.errors import PlanError
from nbutils.places import ROOT
from nbutils.plans import Plan, Variant
from nbutils.runner import BROKEN, KERNEL_DIED, REFUSED, RUN_AGAIN
from nbutils.stopping import SAVE_SECONDS

KINDS = {"RayJob": "ray.io/v1", "Job": "batch/v1"}  # kind -> apiVersion
GPU = "nvidia.com/gpu"
RUNAI, QUEUE = "runai-scheduler", "runai/queue"
STOP_RUNNERS = "params/cluster/stop_runners.sh"
RAY_REQUIREMENTS = ROOT / "requirements-ray.txt"
# Kubernetes replaces a pod that went without its own fault; of what `run` says, only a bug is final.
ACTIONS = {RUN_AGAIN: "Ignore", BROKEN: "FailIndex", REFUSED: "FailIndex", KERNEL_DIED: "Count"}
_TYPES = {dict: "a mapping", list: "a list", str: "text", int: "a whole number", bool: "true or false"}


@dataclass(frozen=True)
class Pod:
    """One pod template of a manifest: where it stands, how many there are of it, its first container."""

    where: str
    replicas: int
    labels: Mapping[str, str]
    spec: Mapping[str, Any]
    container: Mapping[str, Any]

    def limit(self, name: str) -> float:
        """The container's limit of a resource, in units of it; 0 where there is none."""
        given = str(((self.container.get("resources") or {}).get("limits") or {}).get(name, 0))
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(m?)", given)
        if not found:
            raise PlanError(f"{self.where}: the limit of {name} is {given!r}. Give a number.")
        return float(found[1]) / (1000 if found[2] else 1)

    def shared(self) -> dict[str, str]:
        """{place in the container: claim} of the volumes that outlive the pod."""
        claims = {
            volume.get("name"): volume["persistentVolumeClaim"].get("claimName")
            for volume in self.spec.get("volumes") or []
            if volume.get("persistentVolumeClaim")
        }
        mounts = self.container.get("volumeMounts") or []
        return {each["mountPath"]: claims[each.get("name")] for each in mounts if each.get("name") in claims}


def check_manifest(where: str, content: Mapping[str, Any]) -> str:
    """What the manifest would run. Raises PlanError with the place, the cause and the cure."""
    name = f"{content['kind']} {part(where, content, 'metadata', 'name', kind=str)}"
    told = _check_ray_job(where, content) if content["kind"] == "RayJob" else _check_job(where, content)
    return "\n".join([f"{where}: {name}", *(f"  {line}" for line in told)])


def part(where: str, content: Any, *names: str, kind: type = dict) -> Any:
    """What stands at `names`, one within the other. Raises PlanError where there is nothing, or not such a thing."""
    for position, name in enumerate(names, 1):
        place = ".".join(names[:position])
        content = content.get(name) if isinstance(content, Mapping) else None
        if content is None:
            raise PlanError(f"{where}: {place} is missing. Give {_TYPES[kind if position == len(names) else dict]}.")
    if not isinstance(content, kind) or (kind is int and isinstance(content, bool)):
        raise PlanError(f"{where}: {place} is {content!r}. Give {_TYPES[kind]}.")
    return content


def _pod(where: str, template: Any, replicas: int = 1) -> Pod:
    spec = part(where, template, "spec")
    containers = part(where, spec, "containers", kind=list)
    if not containers or not isinstance(containers[0], dict):
        raise PlanError(f"{where}: containers is {containers!r}. Give a list of one container.")
    labels = (template.get("metadata") or {}).get("labels") or {}
    return Pod(f"{where}, {containers[0].get('name')}", replicas, labels, spec, containers[0])


# ---- RayJob ----------------------------------------------------------------------------------------------------------


def _check_ray_job(where: str, content: Mapping[str, Any]) -> list[str]:
    entrypoint = part(where, content, "spec", "entrypoint", kind=str)
    command = _only(f"{where}: spec.entrypoint", find_commands(f"{where}: spec.entrypoint", entrypoint), "batch")
    _check_engine(f"{where}: spec.entrypoint", command)
    spec = content["spec"]
    if spec.get("shutdownAfterJobFinishes") is not True:
        raise PlanError(f"{where}: spec.shutdownAfterJobFinishes is not true, so that idle GPUs stay taken. Set it.")
    if spec.get("backoffLimit", 0) != 0:
        raise PlanError(f"{where}: spec.backoffLimit is {spec['backoffLimit']!r}. Give 0: the batch itself retries.")
    head = _pod(where, part(where, content, "spec", "rayClusterSpec", "headGroupSpec", "template"))
    groups = part(where, content, "spec", "rayClusterSpec", "workerGroupSpecs", kind=list)
    places = [f"{where}: spec.rayClusterSpec.workerGroupSpecs[{position}]" for position in range(len(groups))]
    workers = [
        _pod(where, part(place, group, "template"), part(place, group, "replicas", kind=int))
        for place, group in zip(places, groups, strict=True)
    ]
    pods = [head, *workers]
    version = _check_versions(where, content, pods)
    claim, place = _check_shared(pods)
    for pod in pods:
        _check_grace(pod)
    for pod in workers:
        _check_hook(pod)
    _check_run_ai(where, content, pods)
    plan = command.plan(where)
    variants = list(plan.variants) if plan else []
    _check_room(where, variants, workers)
    return [
        f"Ray {version}: {shlex.join(['python', '-m', 'nbutils', *command.words])}",
        f"{len(variants)} variants, at most {_widest(variants):g} GPU each; "
        + ", ".join(f"{pod.replicas} pods with {pod.limit(GPU):g} GPU" for pod in workers),
        f"claim {claim} at {place}; {_grace(head):g} s to save",
    ]


def _only(where: str, commands: list[Command], name: str) -> Command:
    found = [command for command in commands if command.name == name]
    if len(found) != 1:
        raise PlanError(f"{where}: `python -m nbutils {name}` stands there {len(found)} times. Give it once.")
    return found[0]


def _check_engine(where: str, command: Command) -> None:
    if getattr(command.args, "engine", None) != "ray":
        raise PlanError(f"{where}: the batch would stay in one pod. Add --engine ray.")
    if not getattr(command.args, "address", None):
        raise PlanError(f"{where}: without an address the batch starts a Ray of its own. Add --address auto.")


def _check_versions(where: str, content: Mapping[str, Any], pods: list[Pod]) -> str:
    version = re.search(r"^ray(?:\[[^]]*\])?==(\S+)", RAY_REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE)[1]
    given = part(where, content, "spec", "rayClusterSpec", "rayVersion", kind=str)
    if given != version:
        raise PlanError(f"{where}: rayVersion is {given!r}. Give {version!r}, as {RAY_REQUIREMENTS.name} does.")
    for pod in pods:
        image = part(pod.where, pod.container, "image", kind=str)
        if version not in re.split(r"[-_]", image.rpartition(":")[2]):
            raise PlanError(f"{pod.where}: the image {image!r} is not of Ray {version}. Name that version in its tag.")
    return version


def _check_shared(pods: list[Pod]) -> tuple[str, str]:
    """(claim, place) of the volume that all pods share. Raises PlanError where the repository is not on it."""
    for pod in pods:
        if not pod.shared():
            raise PlanError(f"{pod.where} mounts no persistentVolumeClaim, so that its runs are lost with it. Add it.")
    common = set.intersection(*(set(pod.shared().items()) for pod in pods))
    if not common:
        told = "; ".join(f"{pod.where}: {_told_mounts(pod)}" for pod in pods)
        raise PlanError(f"The pods share no claim at the same place ({told}). Mount one claim at one path in all.")
    for pod in pods:
        folder = PurePosixPath(part(pod.where, pod.container, "workingDir", kind=str))
        if not any(folder.is_relative_to(place) for place, _ in common):
            place = next(iter(common))[0]
            raise PlanError(f"{pod.where}: workingDir is {str(folder)!r}, not in the shared {place!r}. Give that.")
    place, claim = sorted(common)[0]
    return claim, place


def _told_mounts(pod: Pod) -> str:
    return ", ".join(f"{claim} at {place}" for place, claim in pod.shared().items())


def _grace(pod: Pod) -> float:
    return float(pod.spec.get("terminationGracePeriodSeconds", 30))


def _check_grace(pod: Pod) -> None:
    if _grace(pod) < SAVE_SECONDS + MARGIN_SECONDS:
        raise PlanError(
            f"{pod.where}: terminationGracePeriodSeconds is {_grace(pod):g}, and a training may need {SAVE_SECONDS:g} "
            f"to save. Give at least {SAVE_SECONDS + MARGIN_SECONDS:g}."
        )


def _check_hook(pod: Pod) -> None:
    hook = ((pod.container.get("lifecycle") or {}).get("preStop") or {}).get("exec") or {}
    script = str(PurePosixPath(pod.container["workingDir"]) / STOP_RUNNERS)
    if script not in (hook.get("command") or []):
        raise PlanError(
            f"{pod.where}: Ray ends its tasks a second after SIGTERM, with nothing saved. Add lifecycle: {{preStop: "
            f"{{exec: {{command: [bash, {script}, <folder of all runs>]}}}}}}."
        )


def _check_run_ai(where: str, content: Mapping[str, Any], pods: list[Pod]) -> None:
    queues = {pod.labels.get(QUEUE) for pod in pods} | {(content["metadata"].get("labels") or {}).get(QUEUE)}
    schedulers = {pod.spec.get("schedulerName") for pod in pods}
    if not queues - {None} and RUNAI not in schedulers:
        return
    for pod in pods:
        if pod.spec.get("schedulerName") != RUNAI:
            raise PlanError(f"{pod.where}: schedulerName is not {RUNAI!r} as in the other pods. Give it to all.")
    if len(queues) != 1:
        told = ", ".join(sorted(str(queue or "none") for queue in queues))
        raise PlanError(f"{where}: the label {QUEUE} differs ({told}). Give the RayJob and all pods the project's.")


def _check_room(where: str, variants: list[Variant], workers: list[Pod]) -> None:
    """Raise PlanError where no worker has the GPUs and cores that a variant asks for."""
    for variant in variants:
        asked = {GPU: variant.resources.gpus_for(variant.params, there=1), "cpu": variant.resources.cpus or 0}
        if not any(pod.replicas and all(pod.limit(name) >= asked[name] for name in asked) for pod in workers):
            most = max((pod.limit(GPU) for pod in workers), default=0)
            raise PlanError(
                f"{where}: {variant.name} asks for {asked[GPU]} GPUs and {asked['cpu']} cores, and no worker has both "
                f"({GPU}: {most:g} at most). Raise limits in workerGroupSpecs, or ask for less in the plan's resources."
            )


def _widest(variants: list[Variant]) -> int:
    """GPUs that one of them asks for at most."""
    return max((variant.resources.gpus_for(variant.params, there=1) for variant in variants), default=0)


# ---- indexed Job -----------------------------------------------------------------------------------------------------


def _check_job(where: str, content: Mapping[str, Any]) -> list[str]:
    pod = _pod(where, part(where, content, "spec", "template"))
    variables = {each.get("name"): str(each.get("value", "")) for each in pod.container.get("env") or []}
    text = "\n".join(map(str, [*(pod.container.get("command") or []), *(pod.container.get("args") or [])]))
    command = _only(pod.where, find_commands(pod.where, text, variables), "run")
    if not command.before.endswith("exec"):
        raise PlanError(f"{pod.where}: SIGTERM reaches the shell alone. Write `exec python -m nbutils run ...`.")
    if part(where, content, "spec", "completionMode", kind=str) != "Indexed":
        raise PlanError(f"{where}: spec.completionMode is {content['spec']['completionMode']!r}. Give 'Indexed'.")
    _check_failure_policy(where, content, pod)
    claim, place = _check_shared([pod])
    _check_grace(pod)
    plan = command.plan(where)
    variants = _job_variants(where, plan, variables.get("STAGE")) if plan else []
    completions = part(where, content, "spec", "completions", kind=int)
    if plan and completions != len(variants):
        raise PlanError(
            f"{where}: spec.completions is {completions}, and there are {len(variants)} variants. Give that number."
        )
    gpus = _widest(variants)
    if pod.limit(GPU) < gpus:
        raise PlanError(f"{pod.where}: a variant asks for {gpus} GPUs. Set the limit of {GPU} to it.")
    return [
        f"{completions} variants, {content['spec'].get('parallelism', 1)} at a time, each on {pod.limit(GPU):g} GPU",
        f"claim {claim} at {place}; {_grace(pod):g} s to save",
    ]


def _job_variants(where: str, plan: Plan, stage: str | None) -> list[Variant]:
    """The variants of one stage: an indexed Job knows no order, and a stage's variants need none of one another."""
    names = [each.name for each in plan.stages]
    if stage not in names:
        raise PlanError(f"{where}: the variable STAGE is {stage!r}. Give a stage of {plan.name}: {', '.join(names)}.")
    return [variant for variant in plan.variants if variant.stage == stage]


def _check_failure_policy(where: str, content: Mapping[str, Any], pod: Pod) -> None:
    if pod.spec.get("restartPolicy") != "Never":
        raise PlanError(f"{pod.where}: restartPolicy is not Never, which podFailurePolicy needs. Give Never.")
    part(where, content, "spec", "backoffLimitPerIndex", kind=int)
    rules = part(where, content, "spec", "podFailurePolicy", "rules", kind=list)
    conditions = {each.get("type"): rule.get("action") for rule in rules for each in rule.get("onPodConditions") or []}
    if conditions.get("DisruptionTarget") != "Ignore":
        raise PlanError(f"{where}: a pod that is evicted counts as a failure. Ignore onPodConditions DisruptionTarget.")
    for code, action in ACTIONS.items():
        if (given := _action(rules, code)) != action:
            raise PlanError(f"{where}: podFailurePolicy does {given} on exit code {code}. Give the action {action}.")


def _action(rules: list[Mapping[str, Any]], code: int) -> str:
    """What the first rule that fits does with this exit code; without one the failure counts."""
    for rule in rules:
        on = rule.get("onExitCodes") or {}
        if on and (code in on.get("values", [])) == (on.get("operator") == "In"):
            return rule["action"]
    return "Count"
