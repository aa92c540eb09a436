#!/bin/bash
#SBATCH --time=12:00:00
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@360
# All variants of a plan on a Slurm cluster: an array of jobs for each stage, and each task runs one variant.
#
#     bash params/cluster/slurm.sh params/babylm.yaml --partition=gpu --account=mine
#
# Type it in the repository's root, on a node that may submit; what follows the plan goes to sbatch. It assumes that all
# nodes see the repository at the same path, with what `make install` put into .venv. Type it again to go on: finished
# variants are skipped. `python -m nbutils status PLAN` shows where they stand; logs are in runs/<plan>/.slurm.
#
#     AT_ONCE=4  tasks of a stage that run at a time (8)
#     GPUS=0     of each task (what the plan asks for; one for each training process where it does not say)
#     OUT=...    folder of the plan's runs (runs/<plan>)
#
# The signal before the time limit, and that of a preemption with GraceTime, come from Slurm to what srun started: a
# training saves its state. `scancel`, and a preemption without GraceTime, end a task at once: `checkpoint_steps` helps.
# Was run with stand-ins for sbatch, squeue, srun and scontrol, on no real cluster.
set -euo pipefail
[ ! -d .venv/bin ] || PATH="$PWD/.venv/bin:$PATH"

# A stage starts when the stages it needs have ended, well or not (afterany): a variant whose needed run is not finished
# is refused by `run` with exit code 2, and the others run. After afterok one failure would hold back the whole stage.
submit() {
    local plan=$1 list folder stage names needs need gpus cpus options id
    local -A job
    shift
    list=$(python -m nbutils check "$plan" --names)
    folder=${OUT:-$(head -n 1 <<<"$list" | cut -f 7)}/.slurm/$(date +%Y-%m-%dT%H.%M.%S)
    mkdir -p "$folder"
    # Tasks read this list, so that an edit of the plan cannot change which variant a requeued task is.
    echo "$list" >"$folder/names"
    for stage in $(cut -f 1 "$folder/names" | uniq); do
        names=$folder/$stage.names
        awk -F '\t' -v stage="$stage" '$1 == stage' "$folder/names" >"$names"
        needs=$(head -n 1 "$names" | cut -f 4)
        gpus=$(cut -f 5 "$names" | sort -n | tail -n 1)
        cpus=$(cut -f 6 "$names" | sort -n | tail -n 1)
        options=(--job-name="$stage" --output="$folder/$stage-%a.log" --array="1-$(wc -l <"$names")%${AT_ONCE:-8}")
        [ "${GPUS:-$gpus}" = 0 ] || options+=(--gres="gpu:${GPUS:-$gpus}")
        [ "$cpus" = - ] || options+=(--cpus-per-task="$cpus")
        if [ "$needs" != - ]; then
            id=afterany
            for need in ${needs//,/ }; do id+=":${job[$need]}"; done
            options+=(--dependency="$id")
        fi
        id=$(sbatch --parsable "${options[@]}" "$@" "$0" "$plan" "${OUT:-}" "$names")
        job[$stage]=${id%%;*}
        echo "$stage: job ${job[$stage]}, $(wc -l <"$names") tasks, logs in $folder"
    done
}

# SIGTERM to srun, or the end of this shell, would end the step with SIGKILL: the shell hears it and goes on waiting.
run_task() {
    local plan=$1 out=$2 names=$3 notebook variant status=0 task kills again=""
    task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    kills=${names%.names}-$SLURM_ARRAY_TASK_ID.kills
    IFS=$'\t' read -r _ notebook variant _ < <(sed -n "${SLURM_ARRAY_TASK_ID}p" "$names")
    export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
    trap : TERM
    srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
        python -m nbutils run "$notebook" --params "$plan" --variant "$variant" ${out:+--out "$out"} || status=$?
    case $status in
        75 | 143) again=yes ;; # stopped, in its first moments too: it goes on from what it saved
        137 | 138)             # killed: a lost kernel may come back, but one that lacks memory dies each time
            echo "exit code $status" >>"$kills"
            [ "$(wc -l <"$kills")" -gt 2 ] || again=yes
            ;;
    esac
    if [ -n "$again" ] && is_wanted "$task"; then
        echo "$variant: exit code $status, back into the queue"
        scontrol requeue "$task"
    fi
    exit "$status"
}

# Whether the task is still to run: one that was cancelled or has been taken away is completing while this shell ends.
is_wanted() {
    case $(squeue --noheader --jobs="$1" --format=%T) in
        RUNNING | SIGNALING | "") ;; # nothing: the controller does not answer, and will not take a wrong request
        *) return 1 ;;
    esac
}

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    run_task "$@"
elif [ -f "${1:-}" ]; then
    submit "$@"
else
    echo "usage: bash params/cluster/slurm.sh PLAN.yaml [options of sbatch]" >&2
    exit 2
fi
