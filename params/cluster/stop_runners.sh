#!/bin/bash
# Asks the runners of this pod to stop, and waits until they have saved and ended. A pod that has to go runs it first
# (preStop): Ray ends its tasks a second after its own SIGTERM, which is no time to save.
#
#     bash params/cluster/stop_runners.sh FOLDER_OF_ALL_RUNS [SECONDS to wait at most, 330]
#
# Whose runners they are is in the locks that they hold. Ray goes on giving work to this pod, so it looks until nobody has
# held one for a while. Each runner is asked once: a second SIGTERM would end it at once.
runs=${1:-runs}
most=${2:-330}
quiet=0
declare -A asked
while [ "$quiet" -lt 4 ] && [ "$SECONDS" -lt "$most" ]; do
    quiet=$((quiet + 1))
    while IFS= read -r lock; do
        flock --nonblock "$lock" true && continue
        quiet=0
        runner=$(sed -n 's/^process \([0-9]*\) on .*/\1/p' "$lock")
        if [ -n "$runner" ] && [ -z "${asked[$runner]:-}" ] && kill -TERM "$runner"; then asked[$runner]=yes; fi
    done < <(grep --no-messages --files-with-matches --line-regexp "process [0-9]* on $(uname -n)" "$runs"/*/.locks/*)
    sleep 1
done
