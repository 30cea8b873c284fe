#!/usr/bin/env bash
# A run on a Cloud TPU slice of any number of hosts: requests it, starts the same command on every
# host, and when the slice is preempted requests a new one, where the run resumes.
#
# Needs:    gcloud, logged in, with TPU quota; an NFS export (Filestore) in the same network that
#           holds the runs; a committed working tree. This machine stays on for the whole run.
# Command:  PROJECT=my-project ZONE=us-east5-b NFS=10.0.0.2:/runs launch/tpu_vm.sh
# Options:  NAME, ACCELERATOR (v6e-16), RUNTIME (v2-alpha-tpuv6e); arguments go to the train command
set -euo pipefail

: "${PROJECT:?set PROJECT to your Google Cloud project}"
: "${ZONE:?set ZONE to one that has the TPU}"
: "${NFS:?set NFS to HOST:/EXPORT of the disk for runs}"
NAME=${NAME:-sora-jax}
ACCELERATOR=${ACCELERATOR:-v6e-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv6e}
MAX_FAILURES=5 # in a row, of a slice that is there: then it is no preemption

cd "$(dirname "${BASH_SOURCE[0]}")/.."
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --output="$archive" HEAD

tpus() {
  gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet
}

state() {
  tpus queued-resources describe "$NAME" --format='value(state.state)' 2>/dev/null || echo NONE
}

on_all_hosts() {
  tpus tpu-vm ssh "$NAME" --worker=all --command="$1"
}

prepare() {
  tpus tpu-vm scp "$archive" "$NAME:/tmp/sora_jax.tar.gz" --worker=all &&
    on_all_hosts "set -e
    sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common python3-venv
    sudo mkdir -p /runs && (mountpoint -q /runs || sudo mount -t nfs '$NFS' /runs)
    mkdir -p ~/sora_jax && cd ~/sora_jax && tar -xzf /tmp/sora_jax.tar.gz
    python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]' -c requirements.lock"
}

train() {
  on_all_hosts "cd ~/sora_jax && source .venv/bin/activate &&
    python -m sora_jax.train --config=configs/base.py --workdir=/runs/base ${*@Q}"
}

failures=0
while true; do
  now=$(state)
  case $now in
    NONE)
      tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
        --runtime-version="$RUNTIME" --spot
      ;;
    ACTIVE)
      if prepare && train "$@"; then
        tpus queued-resources delete "$NAME" --force
        exit 0
      fi
      failures=$((failures + 1))
      if [[ $(state) != ACTIVE ]]; then
        failures=0
      elif ((failures >= MAX_FAILURES)); then
        echo "error: $failures failures in a row on a slice that is there; it is kept: $NAME" >&2
        exit 1
      fi
      ;;
    SUSPENDED | FAILED)
      tpus queued-resources delete "$NAME" --force
      ;;
    *)
      echo "$(date +%H:%M:%S) $NAME is $now"
      ;;
  esac
  sleep 30
done
