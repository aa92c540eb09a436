#!/bin/bash
# Asks the runners of this pod to stop, and waits until they have saved and ended. A pod that has to go runs it first
# (preStop): Ray ends its tasks a second after its own SIGTERM, which is no time to save.
#
# Whose runners they are is in the locks that they hold.
asked=()
for lock in "${1:-runs}"/*/.locks/*; do
    runner=$(sed -n "s/^process \([0-9]*\) on $(uname -n)\$/\1/p" "$lock" 2>/dev/null)
    if [ -n "$runner" ] && ! flock --nonblock "$lock" true && kill -TERM "$runner"; then
        asked+=("$lock")
    fi
done
for lock in "${asked[@]}"; do flock "$lock" true; done
