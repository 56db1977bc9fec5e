#!/bin/sh
# Runs a command as the container's main process, asks it again and again whether it lives, and kills it when it does not answer.
# Docker's restart policy then starts it anew: that policy acts on an end, never on "unhealthy".
#
#   watched.sh CHECK COMMAND [ARGUMENT…]        CHECK is a shell command; its exit status 0 means that COMMAND answers
#
# The first answer begins the watch, so a start may take as long as it needs. SIGTERM ends the watch and is passed on; the exit
# status is the command's. WATCH_EVERY_S, WATCH_TIMEOUT_S and WATCH_FAILURES say how often, how long, and how many in a row.
set -u
check=$1
shift
every=${WATCH_EVERY_S:-2}
bound=${WATCH_TIMEOUT_S:-3}
failures=${WATCH_FAILURES:-3}

"$@" &
child=$!

watch() {
    until timeout "$bound" sh -c "$check" >/dev/null 2>&1; do sleep "$every"; done
    failed=0
    while [ "$failed" -lt "$failures" ]; do
        sleep "$every"
        if timeout "$bound" sh -c "$check" >/dev/null 2>&1; then failed=0; else failed=$((failed + 1)); fi
    done
    echo "watched: no answer $failures times in a row, killing process $child" >&2
    kill -KILL "$child"
}

watch &
watcher=$!
trap 'kill "$watcher" 2>/dev/null; kill -TERM "$child" 2>/dev/null' TERM INT

wait "$child"
status=$?
while kill -0 "$child" 2>/dev/null; do # a signal ends the wait, not the child
    wait "$child"
    status=$?
done
kill "$watcher" 2>/dev/null
exit "$status"
