#!/usr/bin/env bash
# Trains with N processes on this machine: launch/local.sh N CONFIG --run RUN [--train.steps 500 ...]
#
# Every process runs `mmfm train` with the same arguments and finds the others through the environment. SIGTERM or
# Ctrl-C reaches all of them, so the run saves and stops. When one fails the rest are stopped, since they would wait for
# it for ever; the exit status is that of the first to fail, or 0.
set -uo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  sed -n '2s/^# //p' "$0" >&2
  exit 2
fi
processes=$1
shift
grace_s=30 # between asking the rest to stop and killing them

PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH"
export PATH
if ! command -v mmfm >/dev/null; then
  echo "launch/local.sh: the mmfm command is not installed; run \`make demo\` first, or activate its environment" >&2
  exit 2
fi
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') || exit 2

pids=()
signal_all() { kill -s "$1" ${pids[@]+"${pids[@]}"} 2>/dev/null; }
trap 'signal_all TERM' TERM INT

for ((i = 0; i < processes; i++)); do
  JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES=$processes JAX_PROCESS_ID=$i mmfm train "$@" &
  pids+=($!)
done

failed=0
while ((${#pids[@]})); do
  sleep 0.2
  left=() first_failure=0
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
    else
      wait "$pid" # bash keeps the status of a process that has ended
      status=$?
      ((failed || !status)) || failed=$status first_failure=1
    fi
  done
  pids=(${left[@]+"${left[@]}"})
  if ((first_failure)); then
    signal_all TERM
    deadline=$((SECONDS + grace_s))
  elif ((failed && SECONDS >= deadline)); then
    signal_all KILL
  fi
done
exit "$failed"
