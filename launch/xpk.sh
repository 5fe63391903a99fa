#!/usr/bin/env bash
# One run on a GKE cluster through XPK.
#
#     CLUSTER=c ZONE=us-east5-b PROJECT=p IMAGE=region-docker.pkg.dev/p/r/poisonjax TPU=v5litepod-16 SLICES=1 \
#         launch/xpk.sh my-run --config configs/souly_dos.py:600m,250,1x --workdir /shared/runs/a
#
# The image holds poisonjax and the configs in its working folder; the run lies on a disk that all pods share. Options go
# into XPK_OPTIONS, such as --dry-run. XPK restarts exit codes 42 and 127-255, and nothing unless --max-restarts is given.
set -euo pipefail
: "${CLUSTER:?name of the cluster}" "${ZONE:?its zone}" "${PROJECT:?the project}" "${IMAGE:?the container image}"
workload=${1:?name of the workload}
shift

read -r -a options <<<"${XPK_OPTIONS:-}"
printf -v arguments '%q ' "$@"
exec xpk workload create \
    --cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT" \
    --workload="$workload" --docker-image="$IMAGE" \
    --tpu-type="${TPU:-v5litepod-16}" --num-slices="${SLICES:-1}" \
    --max-restarts="${RESTARTS:-20}" \
    --command="poisonjax train $arguments" \
    "${options[@]}"
