#!/usr/bin/env bash
# What an engine starts on every host: launch/host.sh CONFIG --run RUN [--train.steps 500 ...]
#
# Runs `mmfm train` with these arguments. A run that was stopped saves and ends with status 0, as a finished one does, so
# that nobody takes a stop for a failure; an engine must tell them apart. mmfm writes `finished` or `stopped` to the file
# named by MMFM_OUTCOME, and this script turns `stopped` into status 75 (try again). SIGTERM is passed on.
set -uo pipefail
again=75

PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH"
export PATH
if ! command -v mmfm >/dev/null; then
  echo "launch/host.sh: the mmfm command is not installed; run \`make demo\` first, or activate its environment" >&2
  exit 2
fi
MMFM_OUTCOME=$(mktemp) || exit 2
export MMFM_OUTCOME
trap 'rm -f "$MMFM_OUTCOME"' EXIT

mmfm train "$@" &
pid=$!
trap 'kill -s TERM "$pid" 2>/dev/null' TERM INT
while kill -0 "$pid" 2>/dev/null; do # a signal ends `wait` before the process ends
  wait "$pid"
done
wait "$pid" # bash keeps the status of a process that has ended

status=$?
case $status in
  0) [[ $(<"$MMFM_OUTCOME") == stopped ]] && exit $again ;;
  143) exit $again ;; # SIGTERM before the first step: there was nothing to save
esac
exit "$status"
