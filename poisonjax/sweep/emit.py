"""Job arrays of a sweep for clusters: one task a run, each `poisonjax sweep run ... --index I`."""

import shlex
from collections.abc import Callable

from poisonjax.sweep.grid import Sweep


def _command(sweep: Sweep, workdir: str, index: str) -> str:
    return f"poisonjax sweep run {shlex.quote(sweep.spec)} --workdir {shlex.quote(workdir)} --index {index}"


def slurm(sweep: Sweep, workdir: str, image: str) -> str:
    """An array job; a task that is preempted, or runs out of time, saves, requeues and resumes."""
    del image
    return f"""\
#!/bin/bash
#SBATCH --job-name=poisonjax-sweep
#SBATCH --array=0-{len(sweep.runs) - 1}
#SBATCH --nodes=1 --ntasks=1
#SBATCH --requeue --open-mode=append
#SBATCH --signal=TERM@120
# First, once: poisonjax sweep run {shlex.quote(sweep.spec)} --workdir {shlex.quote(workdir)} --prepare
set -uo pipefail
srun {_command(sweep, workdir, '"$SLURM_ARRAY_TASK_ID"')}
code=$?
# 42: stopped, and saved.
if [ "$code" -eq 42 ]; then scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"; exit 0; fi
exit "$code"
"""


def k8s(sweep: Sweep, workdir: str, image: str) -> str:
    """An Indexed Job; a pod that stops with 42 is started again and resumes."""
    return f"""\
# First, once: poisonjax sweep run {shlex.quote(sweep.spec)} --workdir {shlex.quote(workdir)} --prepare
apiVersion: batch/v1
kind: Job
metadata:
  name: poisonjax-sweep
spec:
  completionMode: Indexed
  completions: {len(sweep.runs)}
  parallelism: {min(len(sweep.runs), 8)}
  backoffLimitPerIndex: 100
  maxFailedIndexes: {len(sweep.runs)}
  podFailurePolicy:
    rules:
      - action: FailIndex
        onExitCodes: {{containerName: run, operator: In, values: [1, 2]}}
  template:
    spec:
      restartPolicy: Never
      containers:
        - name: run
          image: {image}
          command: ["sh", "-c", {_quoted("exec " + _command(sweep, workdir, '"$JOB_COMPLETION_INDEX"'))}]
          volumeMounts: [{{name: shared, mountPath: {workdir}}}]
      volumes:
        - name: shared
          persistentVolumeClaim: {{claimName: poisonjax}}
"""


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


EMITTERS: dict[str, Callable[[Sweep, str, str], str]] = {"slurm": slurm, "k8s": k8s}
