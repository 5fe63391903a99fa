#!/usr/bin/env bash
# One run on Cloud TPU VMs, by a queued resource.
#
#     ZONE=us-east5-b PROJECT=p TPU=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite \
#         launch/cloud_tpu.sh my-run --config configs/souly_dos.py:600m,250,1x --workdir /shared/runs/a
#
# Asks for the slice, waits for it, puts this repository on every worker and starts the run there, in a folder on a disk
# that all workers share. After a preemption the same command asks again and the run goes on. When it is finished, give
# the slice back: `gcloud compute tpus queued-resources delete my-run`.
set -euo pipefail
: "${ZONE:?the zone}" "${PROJECT:?the project}"
name=${1:?name of the queued resource}
shift
printf -v arguments '%q ' "$@"
where=(--zone="$ZONE" --project="$PROJECT")

state() {
    gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null || true
}

case $(state) in
ACTIVE | ACCEPTED | PROVISIONING | WAITING_FOR_RESOURCES | CREATING) ;;
*)
    gcloud compute tpus queued-resources delete "$name" "${where[@]}" --quiet --force 2>/dev/null || true
    gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id="$name" \
        --accelerator-type="${TPU:-v5litepod-16}" --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" \
        ${SPOT:+--spot}
    ;;
esac
while now=$(state) && [ "$now" != ACTIVE ]; do
    case $now in
    FAILED | SUSPENDED | SUSPENDING | DELETING)
        echo "$name is $now: 'gcloud compute tpus queued-resources describe $name' tells why; call again to ask anew" >&2
        exit 1
        ;;
    esac
    echo "waiting for $name: $now"
    sleep 30
done

# The workers' places stand in their metadata.
start=$(cat <<'WORKER'
ask() { curl -sf -H 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"; }
endpoints=$(ask worker-network-endpoints)
export JAX_PROCESS_ID=$(ask agent-worker-number)
export JAX_NUM_PROCESSES=$(tr ',' '\n' <<<"$endpoints" | wc -l)
export JAX_COORDINATOR_ADDRESS=$(cut -d, -f1 <<<"$endpoints" | cut -d: -f3):8476
cd ~/poisonjax && python3 -m venv .venv && .venv/bin/pip install -q -e '.[text,gcs]' 'jax[tpu]'
WORKER
)
gcloud compute tpus tpu-vm scp --recurse --worker=all "${where[@]}" "$(dirname "$0")/.." "$name:poisonjax"
gcloud compute tpus tpu-vm ssh "$name" --worker=all "${where[@]}" \
    --command="$start"$'\n'".venv/bin/poisonjax train $arguments"
