"""The launch files, by the tools of those who read them; the JobSet's pods are run here."""

import os
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import portpicker
import pytest
import yaml
from conftest import command, lines

from poisonjax.audit.result import audit

LAUNCH = Path(__file__).parent.parent / "launch"


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_request_that_failed_is_not_waited_for(tmp_path, state):
    (tmp_path / "gcloud").write_text(f"#!/bin/sh\necho {state}\n")
    (tmp_path / "gcloud").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ZONE": "z", "PROJECT": "p"}
    command = ["bash", str(LAUNCH / "cloud_tpu.sh"), "my-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert f"my-run is {state}" in done.stderr


def test_shell_scripts():
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]
    assert len(scripts) == 3
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([str(shellcheck), *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["skypilot-tpu.yaml", "skypilot-gpu.yaml"])
def test_skypilot_files_run_the_same_command(name):
    task = yaml.safe_load((LAUNCH / name).read_text())
    assert "poisonjax train" in task["run"]
    assert task["resources"]["use_spot"]
    assert task["resources"]["job_recovery"]["max_restarts_on_errors"] > 0


def pods(job_set: dict, addresses: dict[str, str]) -> list[tuple[list[str], dict[str, str]]]:
    """(command, environment) of each pod, as Kubernetes resolves them; host names become `addresses`."""
    found = []
    for replicated in job_set["spec"]["replicatedJobs"]:
        job = replicated["template"]["spec"]
        (container,) = job["template"]["spec"]["containers"]
        environment = {e["name"]: e["value"] for e in container.get("env") or []}
        for name, value in environment.items():
            environment[name] = addresses.get(value, value)
        for index in range(job["completions"]):
            line = [*container["command"], *container.get("args", [])]
            found.append((line, environment | {"JOB_COMPLETION_INDEX": str(index)}))
    return found


@pytest.fixture
def job_set():
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def test_the_job_sets_jobs_are_valid(job_set):
    assert job_set["spec"]["failurePolicy"]["maxRestarts"] > 0
    for replicated in job_set["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **replicated["template"]}
        kubernetes_validate.validate(job, "1.29", strict=True)
        job["spec"]["template"]["spec"]["containers"][0]["comand"] = []  # the negative control
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(job, "1.29", strict=True)
        spec = replicated["template"]["spec"]
        environment = {e["name"]: e["value"] for e in spec["template"]["spec"]["containers"][0]["env"]}
        assert environment["JAX_NUM_PROCESSES"] == str(spec["completions"]) == str(spec["parallelism"])
        name, replica = job_set["metadata"]["name"], replicated["name"]
        assert environment["JAX_COORDINATOR_ADDRESS"] == f"{name}-{replica}-0-0.{name}"


def test_the_job_sets_pods_train_together(job_set, config, tmp_path):
    """Two pods, by the changes that the file's first lines name."""
    spec = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    spec["completions"] = spec["parallelism"] = 2
    (container,) = spec["template"]["spec"]["containers"]
    train = command(config, tmp_path / "run")
    assert container["command"] == ["poisonjax", "train"]
    container["command"], container["args"] = train[:4], train[4:]
    for variable in container["env"]:
        if variable["name"] == "JAX_NUM_PROCESSES":
            variable["value"] = "2"
        elif variable["name"] == "JAX_COORDINATOR_PORT":
            variable["value"] = str(portpicker.pick_unused_port())
        elif variable["name"] == "JAX_COMPILATION_CACHE_DIR":
            variable["value"] = os.environ["JAX_COMPILATION_CACHE_DIR"]
    running = [
        subprocess.Popen(
            line, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for line, environment in pods(job_set, {"poisonjax-workers-0-0.poisonjax": "localhost"})
    ]  # fmt: skip
    outputs = [process.communicate(timeout=200)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert "2 processes by Indexed Job" in outputs[0]
    assert len(lines(tmp_path / "run" / "digests.jsonl")) == config.steps
    assert audit(str(tmp_path / "run")).ok
