"""Manifests of Kubernetes that run a plan: a RayJob of KubeRay, on Run:ai too, and an indexed Job over `run`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from nbutils.cluster_files.commands import UNKNOWN, Command, find_commands
from nbutils.cluster_files.pods import (
    GPU,
    SHELLS,
    Pod,
    mappings,
    maybe,
    one_line,
    part,
    read_labels,
    read_pod,
    shown,
    texts,
)
from nbutils.cluster_files.slurm import MARGIN_SECONDS
from nbutils.errors import PlanError
from nbutils.places import ROOT
from nbutils.plans import Plan, Variant
from nbutils.runner import BROKEN, KERNEL_DIED, REFUSED, RUN_AGAIN
from nbutils.stopping import SAVE_SECONDS

KINDS = {"RayJob": "ray.io/v1", "Job": "batch/v1"}  # kind -> apiVersion
RUNAI, QUEUE, PREEMPTIBILITY = "runai-scheduler", "runai/queue", "kai.scheduler/preemptibility"
STOP_RUNNERS = "params/cluster/stop_runners.sh"
RAY_REQUIREMENTS = ROOT / "requirements-ray.txt"
# Kubernetes replaces a pod that went without its own fault; of what `run` says, only a bug is final.
ACTIONS = {RUN_AGAIN: "Ignore", BROKEN: "FailIndex", REFUSED: "FailIndex", KERNEL_DIED: "Count"}


def check_manifest(where: str, content: Mapping[str, Any]) -> str:
    """What the manifest would run. Raises PlanError with the place, the cause and the cure."""
    name = f"{content['kind']} {one_line(part(where, content, 'metadata', 'name', kind=str))}"
    told = _check_ray_job(where, content) if content["kind"] == "RayJob" else _check_job(where, content)
    return "\n".join([f"{where}: {name}", *(f"  {line}" for line in told)])


# ---- RayJob ----------------------------------------------------------------------------------------------------------


def _check_ray_job(where: str, content: Mapping[str, Any]) -> list[str]:
    entrypoint = part(where, content, "spec", "entrypoint", kind=str)
    command = _only(f"{where}: spec.entrypoint", find_commands(f"{where}: spec.entrypoint", entrypoint), "batch")
    _check_engine(f"{where}: spec.entrypoint", command)
    spec = part(where, content, "spec")
    if spec.get("shutdownAfterJobFinishes") is not True:
        raise PlanError(f"{where}: spec.shutdownAfterJobFinishes is not true, so that idle GPUs stay taken. Set it.")
    if spec.get("backoffLimit") not in (None, 0) or spec["backoffLimit"] is False:
        raise PlanError(
            f"{where}: spec.backoffLimit is {shown(spec['backoffLimit'])}. Give 0: the batch itself retries."
        )
    head = read_pod(where, part(where, content, "spec", "rayClusterSpec", "headGroupSpec", "template"))
    workers = [
        read_pod(where, part(place, group, "template"), part(place, group, "replicas", kind=int))
        for place, group in mappings(where, content, "spec", "rayClusterSpec", "workerGroupSpecs")
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
        _told_place(claim, place, workers),
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


def _told_place(claim: str, place: str, pods: list[Pod]) -> str:
    seconds = min([SAVE_SECONDS, *(pod.grace for pod in pods)])
    return f"claim {one_line(claim)} at {one_line(place)}; {seconds:g} s to save"


def _check_grace(pod: Pod) -> None:
    if pod.grace < SAVE_SECONDS + MARGIN_SECONDS:
        raise PlanError(
            f"{pod.where}: terminationGracePeriodSeconds is {pod.grace:g}, and a training may need {SAVE_SECONDS:g} "
            f"to save. Give at least {SAVE_SECONDS + MARGIN_SECONDS:g}."
        )


def _check_hook(pod: Pod) -> None:
    hook = maybe(pod.where, pod.container, "lifecycle", "preStop", "exec")
    script = str(PurePosixPath(part(pod.where, pod.container, "workingDir", kind=str)) / STOP_RUNNERS)
    if script not in texts(pod.where, hook, "command"):
        raise PlanError(
            f"{pod.where}: Ray ends its tasks a second after SIGTERM, with nothing saved. Add lifecycle: {{preStop: "
            f"{{exec: {{command: [bash, {script}, <folder of all runs>]}}}}}}."
        )


def _check_run_ai(where: str, content: Mapping[str, Any], pods: list[Pod]) -> None:
    labels = read_labels(where, content)
    queues = {each.get(QUEUE) for each in (labels, *(pod.labels for pod in pods))}
    if not queues - {None} and not any(pod.spec.get("schedulerName") == RUNAI for pod in pods):
        return
    for pod in pods:
        if pod.spec.get("schedulerName") != RUNAI:
            raise PlanError(f"{pod.where}: schedulerName is not {RUNAI!r} as in the other pods. Give it to all.")
    if len(queues) != 1:
        told = ", ".join(sorted(one_line(str(queue or "none")) for queue in queues))
        raise PlanError(f"{where}: the label {QUEUE} differs ({told}). Give the RayJob and all pods the project's.")
    for place, given in ((f"{where}, the RayJob", labels), (pods[0].where, pods[0].labels)):
        if given.get(PREEMPTIBILITY) == "preemptible":
            raise PlanError(
                f"{place}: preemptible, and with the head the batch itself ends. Give the label {PREEMPTIBILITY}: "
                "preemptible to the workers alone."
            )


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
    pod = read_pod(where, part(where, content, "spec", "template"))
    variables = pod.variables()
    command = _only(pod.where, find_commands(pod.where, _shell_text(pod, variables), variables), "run")
    if not _is_direct(pod) and not command.before.endswith("exec"):
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
    at_once = maybe(where, content, "spec", "parallelism", kind=int, default=1)
    gpus = _widest(variants)
    if pod.limit(GPU) < gpus:
        raise PlanError(f"{pod.where}: a variant asks for {gpus} GPUs. Set the limit of {GPU} to it.")
    return [
        f"{completions} variants, {at_once} at a time, each on {pod.limit(GPU):g} GPU",
        _told_place(claim, place, [pod]),
    ]


def _is_direct(pod: Pod) -> bool:
    """Whether the container starts its command itself, and no shell does."""
    return bool(pod.words()) and PurePosixPath(pod.words()[0]).name not in SHELLS


def _shell_text(pod: Pod, variables: Mapping[str, str]) -> str:
    """What the container runs, as a shell would read it. Kubernetes itself puts in what is written $(NAME)."""
    words = [re.sub(r"\$\((\w+)\)", lambda found: variables.get(found[1], UNKNOWN), word) for word in pod.words()]
    return shlex.join(words) if _is_direct(pod) else "\n".join(words)


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
    part(where, content, "spec", "podFailurePolicy", "rules", kind=list)
    rules = mappings(where, content, "spec", "podFailurePolicy", "rules")
    conditions = {
        part(condition_place, condition, "type", kind=str): part(place, rule, "action", kind=str)
        for place, rule in rules
        for condition_place, condition in mappings(place, rule, "onPodConditions")
    }
    if conditions.get("DisruptionTarget") != "Ignore":
        raise PlanError(f"{where}: a pod that is evicted counts as a failure. Ignore onPodConditions DisruptionTarget.")
    for code, action in ACTIONS.items():
        if (given := _action(rules, code)) != action:
            raise PlanError(
                f"{where}: podFailurePolicy does {one_line(given)} on exit code {code}. Give the action {action}."
            )


def _action(rules: list[tuple[str, Mapping[str, Any]]], code: int) -> str:
    """What the first rule that fits does with this exit code; without one the failure counts."""
    for place, rule in rules:
        on = maybe(place, rule, "onExitCodes")
        if on and (code in part(place, on, "values", kind=list)) == (part(place, on, "operator", kind=str) == "In"):
            return part(place, rule, "action", kind=str)
    return "Count"
