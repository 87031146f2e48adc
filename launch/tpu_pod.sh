#!/usr/bin/env bash
# Trains on a Cloud TPU slice: launch/tpu_pod.sh NAME CONFIG --run RUN [--train.steps 500 ...]
#
# Asks for the slice NAME as a queued resource, installs the committed state of this checkout on every worker and runs
# launch/host.sh there. When the slice is preempted it is asked for again and the run goes on. At the end, whatever it
# is, the slice is deleted, unless KEEP is set. Ctrl-C or SIGTERM: the run saves and stops, and this script ends with
# status 0.
#
#   ZONE=us-west4-a  ACCELERATOR=v5litepod-16  RUNTIME=v2-alpha-tpuv5-lite  PROVISIONING=--spot  POLL_S=30  KEEP=
set -uo pipefail

if [[ $# -lt 2 || $1 == -* ]]; then
  sed -n '2s/^# //p' "$0" >&2
  exit 2
fi
name=$1
shift
: "${ZONE:=us-west4-a}" "${ACCELERATOR:=v5litepod-16}" "${RUNTIME:=v2-alpha-tpuv5-lite}" "${PROVISIONING:=--spot}"
: "${POLL_S:=30}" "${KEEP:=}"
settle_polls=4 # a slice may still be called ACTIVE a little after its hosts went down
if ! command -v gcloud >/dev/null; then
  echo "launch/tpu_pod.sh: the gcloud command is not installed; install the Google Cloud CLI and log in" >&2
  exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d) || exit 2

resource() { gcloud compute tpus queued-resources "$1" "$name" --zone="$ZONE" "${@:2}"; }
workers() { gcloud compute tpus tpu-vm ssh "$name" --zone="$ZONE" --worker=all --command="$1"; }
state() { resource describe --format='value(state.state)' 2>/dev/null || echo ABSENT; }
delete() { resource delete --force --quiet; }
say() { echo "launch/tpu_pod.sh: $1"; }

stopping=0
# shellcheck disable=SC2329 # the trap calls it
stop() {
  stopping=1
  say "stopping; the run saves first"
  workers 'pkill -TERM -x mmfm'
}
trap stop TERM INT
trap '[[ $KEEP ]] || delete; rm -rf "$scratch"' EXIT

install() {
  git -C "$root" archive --format=tar.gz -o "$scratch/mmfm.tar.gz" HEAD || exit 2
  gcloud compute tpus tpu-vm scp "$scratch/mmfm.tar.gz" "$name:mmfm.tar.gz" --zone="$ZONE" --worker=all &&
    workers "mkdir -p mmfm && tar -xzf mmfm.tar.gz -C mmfm && cd mmfm && python3 -m venv .venv &&
      .venv/bin/pip install -q -c constraints.txt '.[tpu]'"
}

# Runs the command on every worker; the statuses that they end with, one a line, are in $scratch/statuses.
train() {
  local command
  command="cd mmfm && launch/host.sh$(printf ' %q' "$@"); echo \"launch/host.sh: status \$?\""
  workers "$command" </dev/null 2>&1 | tee "$scratch/output" &
  local pid=$!
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done # a signal ends `wait` early
  grep -oE 'launch/host.sh: status [0-9]+' "$scratch/output" | grep -oE '[0-9]+$' | sort -un >"$scratch/statuses"
}

# Whether the slice is still there once its state had time to change.
still_active() {
  for ((i = 0; i < settle_polls; i++)); do
    [[ $(state) == ACTIVE ]] || return 1
    sleep "$POLL_S"
  done
}

while ((!stopping)); do
  now=$(state)
  case $now in
    ABSENT)
      say "asking for $ACCELERATOR in $ZONE"
      resource create --node-id="$name" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" \
        ${PROVISIONING:+"$PROVISIONING"} || exit 1
      ;;
    ACTIVE)
      if install; then
        train "$@"
        statuses=$(paste -sd' ' "$scratch/statuses")
        if [[ $statuses == 0 ]]; then
          say "the run has finished"
          exit 0
        fi
        ((stopping)) && break
        if [[ " $statuses " == *" 2 "* ]]; then
          exit 2 # input to mend, said above
        fi
      fi
      if still_active && [[ " ${statuses:-} " != *" 75 "* ]]; then
        say "the workers failed (status ${statuses:-unknown}) and the slice is there, so it would happen again"
        exit 1
      fi
      say "the run was cut short and will go on"
      ;;
    SUSPENDING | SUSPENDED | PREEMPTED | FAILED)
      say "the slice is $now"
      delete || exit 1
      sleep "$POLL_S"
      ;;
    *) sleep "$POLL_S" ;; # WAITING_FOR_RESOURCES PROVISIONING CREATING DELETING ...
  esac
done
exit 0
