"""Job arrays of a sweep for clusters: one task a run, each `poisonjax sweep run ... --index I`."""

import json
import shlex
from collections.abc import Callable, Sequence

from poisonjax.sweep.planned import Sweep, SweepError


def _command(sweep: Sweep, workdir: str, fields: Sequence[str], *options: str) -> str:
    quoted = shlex.join([sweep.spec, "--workdir", workdir, *fields])
    return " ".join(["poisonjax sweep run", quoted, *options])


def slurm(sweep: Sweep, workdir: str, fields: Sequence[str], *, image: str, restart_code: int) -> str:
    """An array job; a task that is preempted, or runs out of time, saves, requeues and resumes."""
    del image
    return f"""\
#!/bin/bash
#SBATCH --job-name=poisonjax-sweep
#SBATCH --array=0-{sweep.slots - 1}
#SBATCH --nodes=1 --ntasks=1
#SBATCH --requeue --open-mode=append
#SBATCH --signal=TERM@120
# First, once: {_command(sweep, workdir, fields, "--prepare")}
set -uo pipefail
srun {_command(sweep, workdir, fields, '--index "$SLURM_ARRAY_TASK_ID"')}
code=$?
# {restart_code}: stopped, and saved.
if [ "$code" -eq {restart_code} ]; then scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"; exit 0; fi
exit "$code"
"""


def k8s(sweep: Sweep, workdir: str, fields: Sequence[str], *, image: str, restart_code: int) -> str:
    """An Indexed Job; a pod that stops with `restart_code` is started again and resumes.

    The volume holds the runs; put `corpus.store` on it too. Raises SweepError for a workdir that isn't absolute.
    """
    if not workdir.startswith("/"):
        raise SweepError(f"--workdir {workdir}: pods mount the volume there, so give an absolute path")
    task = "exec " + _command(sweep, workdir, fields, '--index "$JOB_COMPLETION_INDEX"')
    return f"""\
# First, once: {_command(sweep, workdir, fields, "--prepare")}
apiVersion: batch/v1
kind: Job
metadata:
  name: poisonjax-sweep
spec:
  completionMode: Indexed
  completions: {sweep.slots}
  parallelism: {min(sweep.slots, 8)}
  backoffLimitPerIndex: 100
  maxFailedIndexes: {sweep.slots}
  podFailurePolicy:
    rules:
      - action: Ignore  # stopped and saved, or to be looked at again: however often
        onExitCodes: {{containerName: run, operator: In, values: [{restart_code}]}}
      - action: FailIndex
        onExitCodes: {{containerName: run, operator: In, values: [1, 2]}}
  template:
    spec:
      restartPolicy: Never
      terminationGracePeriodSeconds: 300
      containers:
        - name: run
          image: {image}
          command: ["sh", "-c", {json.dumps(task)}]
          volumeMounts: [{{name: shared, mountPath: {json.dumps(workdir)}}}]
      volumes:
        - name: shared
          persistentVolumeClaim: {{claimName: poisonjax}}
"""


EMITTERS: dict[str, Callable[..., str]] = {"slurm": slurm, "k8s": k8s}
