"""Files for clusters: each mistake is told with its place, cause and cure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbutils.cluster_files import check_cluster_file, is_cluster_file
from nbutils.errors import PlanError, WorkbookError
from nbutils.places import PARAMS
from nbutils.plans import load_plan
from nbutils.yamlfile import read_yaml

CLUSTER = PARAMS / "cluster"
SLURM = CLUSTER / "slurm.sh"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("slurm.sh", "stopped  TERM@360: a training has 300 s to save"),
        ("kuberay.yaml", "2 pods with 4 GPU"),
        ("kuberay.yaml", "claim workbook at /workbook; 300 s to save"),
        ("runai.yaml", "--engine ray --address auto"),
        ("job.yaml", "20 variants, 8 at a time"),
    ],
)
def test_the_example_files_pass(name, words):
    assert is_cluster_file(CLUSTER / name)
    assert words in check_cluster_file(CLUSTER / name)


def nodes(content: Any) -> Iterator[tuple[Any, Any]]:
    """(mapping or list, key) of each node within."""
    for key in content if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], dict | list):
            yield from nodes(content[key])


@pytest.mark.parametrize("name", ["kuberay.yaml", "runai.yaml", "job.yaml"])
def test_whatever_stands_there_is_told_without_a_traceback(tmp_path, name, monkeypatch):
    """Each node in turn is another thing, or is not there."""
    content = json.loads(json.dumps(read_yaml(CLUSTER / name)))  # nothing in it twice
    plan = load_plan(PARAMS / "babylm.yaml")
    monkeypatch.setattr("nbutils.cluster_files.commands.load_plan", lambda path: plan)  # read once
    monkeypatch.setattr("nbutils.cluster_files.read_yaml", lambda path: content)
    refused, others = (
        0,
        ["text", "6m", None, [], ["text"], [None], {}, {"name": "x"}, {"text": []}, {1: 2}, -1, 1.5, True],
    )
    for owner, key in list(nodes(content)):
        before = owner[key]
        for other in others:
            owner[key] = other
            try:
                check_cluster_file(tmp_path / name)
            except WorkbookError as error:
                assert str(error).startswith(str(tmp_path / name)) or "The pods share no claim" in str(error)
                refused += 1
        owner[key] = before
    assert refused > 150
    assert check_cluster_file(tmp_path / name)


def test_names_of_a_file_are_shown_as_they_are(tmp_path):
    path = tmp_path / "job.yaml"
    text = (CLUSTER / "job.yaml").read_text()
    path.write_text(text.replace("name: babylm-students", 'name: "x\\u202ey\\n  20 variants"'))
    assert check_cluster_file(path).splitlines()[0].endswith(r"Job x\u202ey 20 variants")


def test_a_command_without_a_shell_is_read(tmp_path):
    """Nothing stands between it and SIGTERM, and Kubernetes itself puts in what is written $(NAME)."""
    content = json.loads(json.dumps(read_yaml(CLUSTER / "job.yaml")))
    container = content["spec"]["template"]["spec"]["containers"][0]
    container["command"] = ["/usr/bin/python3.11", "-m", "nbutils", "run"]
    container["args"] = ["05_distillation", "--params", "$(PLAN)", "--variant", "a name"]
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(content))
    assert "20 variants" in check_cluster_file(path)
    container["args"][1] = "--parms"
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=r"is no command: .*--parms"):
        check_cluster_file(path)


def test_the_hook_of_a_pod_is_no_batch_script():
    assert "what a pod runs before it goes (preStop)" in check_cluster_file(CLUSTER / "stop_runners.sh")


def test_a_plan_is_no_cluster_file(tmp_path):
    assert not any(is_cluster_file(path) for path in PARAMS.glob("*.yaml"))
    (tmp_path / "torn.yaml").write_text("name: [\n")
    assert not is_cluster_file(tmp_path / "torn.yaml")
    assert not is_cluster_file(tmp_path / "none.yaml")


def refused(tmp_path: Path, name: str, old: str, new: str, words: str) -> None:
    """A copy of an example file with `new` in the place of `old`, everywhere, is refused with these words."""
    text = (CLUSTER / name).read_text()
    assert old in text
    path = tmp_path / name
    path.write_text(text.replace(old, new))
    with pytest.raises(WorkbookError) as refusal:
        check_cluster_file(path)
    assert words in str(refusal.value)
    assert "Traceback" not in str(refusal.value)


BATCH = "batch params/babylm.yaml --engine ray --address auto"
HOOK = "command: [bash, /workbook/params/cluster/stop_runners.sh, /workbook/runs]"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("kind: RayJob", "kind: RayJobs", "kind is 'RayJobs'. Did you mean 'RayJob'?"),
        ("ray.io/v1", "ray.io/v1alpha1", "apiVersion of a RayJob is 'ray.io/v1alpha1'. Give 'ray.io/v1'"),
        ("  name: babylm\n", "  label: x\n", "metadata.name is missing. Give text"),
        ("batch params", "bach params", "spec.entrypoint: `python -m nbutils bach params/babylm.yaml"),
        ("--engine", "--engin-e", "is no command: unrecognized arguments: --engin-e ray. See `python -m nbutils batch"),
        ("--engine ray", "--engine local", "the batch would stay in one pod. Add --engine ray"),
        (" --address auto", "", "starts a Ray of its own. Add --address auto"),
        ("babylm.yaml --", "babylmm.yaml --", "There is no file params/babylmm.yaml. Did you mean 'babylm.yaml'?"),
        (BATCH, "check quick", "`python -m nbutils batch` stands there 0 times"),
        ("shutdownAfterJobFinishes: true", "shutDownAfter: true", "idle GPUs stay taken. Set it"),
        ("backoffLimit: 0", "backoffLimit: 3", "spec.backoffLimit is 3. Give 0: the batch itself retries"),
        ('rayVersion: "2.60.0"', 'rayVersion: "2.9.0"', "rayVersion is '2.9.0'. Give '2.60.0'"),
        (":2.60.0-py311", ":2.9.0-py311", "is not of Ray 2.60.0. Name that version in its tag"),
        ("volumeMounts: *mounts", "volumeMounts: []", "ray-worker mounts no persistentVolumeClaim"),
        ("*mounts", "[{name: workbook, mountPath: /work}]", "share no claim at the same place"),
        ("*folder", "/home/ray", "workingDir is '/home/ray', not in the shared '/workbook'. Give that"),
        ("Seconds: *grace", "Seconds: 30", "terminationGracePeriodSeconds is 30, and a training may need 300"),
        (HOOK, "command: [ray, stop]", "Ray ends its tasks a second after SIGTERM, with nothing saved"),
        ("nvidia.com/gpu: 4", "nvidia.com/gpu: 0", "teacher asks for 1 GPUs and 0 cores, and no worker has both"),
        ("replicas: 2", "replicas: two", "workerGroupSpecs[0]: replicas is 'two'. Give a whole"),
        ("nvidia.com/gpu: 4", "nvidia.com/gpu: four", "the limit of nvidia.com/gpu is 'four'. Give a number"),
        (
            "containers:\n            - name: ray-head",
            "containers: []\n          x:\n            - name: x",
            "is []. Give",
        ),
    ],
)
def test_a_mistake_in_a_ray_job_is_told(tmp_path, old, new, words):
    refused(tmp_path, "kuberay.yaml", old, new, words)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "          schedulerName: runai-scheduler\n          term",
            "          term",
            "ray-head: schedulerName is not 'runai-scheduler'",
        ),
        ("labels: {runai/queue: team-a, ", "labels: {", "the label runai/queue differs (none, team-a)"),
        ("non-preemptible", "preemptible", "ray-head: preemptible, and with the head the batch itself ends"),
        ("  labels:\n", "  labels:\n    kai.scheduler/preemptibility: preemptible\n", "the RayJob: preemptible"),
    ],
)
def test_a_mistake_for_run_ai_is_told(tmp_path, old, new, words):
    refused(tmp_path, "runai.yaml", old, new, words)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("exec python", "python", "SIGTERM reaches the shell alone. Write `exec python -m nbutils run"),
        ("Indexed", "NonIndexed", "spec.completionMode is 'NonIndexed'. Give 'Indexed'"),
        ("completions: 20", "completions: 19", "spec.completions is 19, and there are 20 variants"),
        ("value: students", "value: student", "STAGE is 'student'. Give a stage of babylm: data, teacher"),
        ("restartPolicy: Never", "restartPolicy: OnFailure", "restartPolicy is not Never"),
        ("  backoffLimitPerIndex: 2", "  backoffLimit: 2", "spec.backoffLimitPerIndex is missing"),
        ("type: DisruptionTarget", "type: Ready", "evicted counts as a failure. Ignore onPodConditions"),
        ("values: [75]", "values: [76]", "podFailurePolicy does Count on exit code 75. Give the action Ignore"),
        ("values: [1, 2]", "values: [1]", "podFailurePolicy does Count on exit code 2. Give the action FailIndex"),
        ("values: [1, 2]", "values: [1, 2, 138]", "does FailIndex on exit code 138. Give the action Count"),
        ("nvidia.com/gpu: 1", "nvidia.com/gpu: 0", "a variant asks for 1 GPUs. Set the limit of nvidia.com/gpu"),
        ("--variant", "--varriant", "nbutils run $notebook --params $PLAN --varriant $variant` is no command"),
    ],
)
def test_a_mistake_in_an_indexed_job_is_told(tmp_path, old, new, words):
    refused(tmp_path, "job.yaml", old, new, words)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("submit() {", "submit() ", "is not bash: line"),
        ("#SBATCH --requeue", "#SBATCH --reque", "line 5: '--reque' is no option known here"),
        ("#SBATCH --requeue\n", "", "a task whose node fails is lost. Add #SBATCH --requeue"),
        ("#SBATCH --open-mode=append\n", "", "a requeued task empties its log"),
        ("#SBATCH --requeue\n", "set -e\n#SBATCH --requeue\n", "line 6: Slurm reads no #SBATCH line after the first"),
        ("#SBATCH", "# SBATCH", "has no #SBATCH line, so it is no batch script of Slurm"),
        ("TERM@360", "TERM@120", "--signal comes 120 s before the time limit. Give --signal=TERM@360"),
        ("TERM@360", "TERM", "--signal comes 60 s before the time limit"),
        ("#SBATCH --signal=TERM@360\n", "", "--signal is 'missing'. Give --signal=TERM@360"),
        ("=TERM@360", "=B:TERM@360", "--signal=B: comes to the shell alone, and srun passes no SIGTERM on"),
        ("=TERM@360", "=USR1@360", "--signal is USR1, and `run` saves its state at SIGTERM alone"),
        ("    trap : TERM\n", "", "SIGTERM ends the shell before the step has saved its state"),
        ("trap : TERM", "trap 'kill $!' TERM", "the trap kills srun, which passes no SIGTERM on"),
        ("srun --ntasks=1", "nice", "--signal goes to what srun starts. Write srun python -m nbutils run"),
        ("--time=12:00:00", "--time=5", "--time is 300 s, and the signal comes 360 s before it"),
        ("--time=12:00:00", "--time=soon", "--time is 'soon'. Give --time=hours:minutes:seconds"),
        ("75 | 143)", "143)", "nothing requeues a task that ends with exit code 75"),
        ("--params", "--parms", "is no command: unrecognized arguments: --parms"),
        ("nbutils run", "nbutils check", "no `python -m nbutils run`, so its tasks run no variant"),
    ],
)
def test_a_mistake_in_a_batch_script_is_told(tmp_path, old, new, words):
    if "nbutils check" in new:
        old, new = 'run "$notebook" --params "$plan" --variant "$variant" ${out:+--out "$out"}', 'check "$plan"'
    refused(tmp_path, "slurm.sh", old, new, words)


@pytest.mark.parametrize("option", ["dependency=singleton", "gpu-bind=closest", "threads-per-core=1", "begin=now"])
def test_what_slurm_knows_is_known(tmp_path, option):
    path = tmp_path / "slurm.sh"
    path.write_text(SLURM.read_text().replace("#SBATCH --requeue", f"#SBATCH --requeue\n#SBATCH --{option}"))
    assert f"--{option}" in check_cluster_file(path)


def test_a_script_that_is_not_there_is_told(tmp_path):
    with pytest.raises(PlanError, match=r"none\.sh cannot be read: No such file"):
        check_cluster_file(tmp_path / "none.sh")
