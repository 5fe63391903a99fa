#!/usr/bin/env bash
# One run on a GKE cluster through XPK.
#
#     CLUSTER=c ZONE=us-east5-b PROJECT=p IMAGE=region-docker.pkg.dev/p/r/poisonjax TPU=v5litepod-16 SLICES=1 \
#         launch/xpk.sh my-run --config configs/souly_dos.py:600m,250,1x --workdir gs://bucket/runs/a
#
# The image holds poisonjax and this repository's configs as its working folder. Options of XPK, such as --dry-run, go
# into XPK_OPTIONS. XPK restarts exit codes 42 and 127-255, and nothing unless --max-restarts is given.
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
