"""Who the processes of a run are, for every launcher; that they agree; the local launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import command, lines
from hypothesis import given
from hypothesis import strategies as st

from poisonjax.audit.result import audit
from poisonjax.processes import Place, resolve

LOCAL = str(Path(__file__).parent.parent / "launch" / "local.py")


def slurm(nodes="n1", **more):
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": nodes}
    return job | {"SLURM_NTASKS": "4", "SLURM_PROCID": "3"} | more


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"HOME": "/", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}, None),  # a batch script, outside of srun
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),  # one host
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            Place("a:1", 2, 1, "JAX's variables"),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "job-0.job", "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"},
            Place("job-0.job:8476", 2, 1, "Indexed Job"),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "job-0.job", "JAX_COORDINATOR_PORT": "1234", "NNODES": "2", "NODE_RANK": "1"},
            Place("job-0.job:1234", 2, 1, "XPK"),
        ),
        (
            {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "0"},
            Place("10.0.0.1:8476", 2, 0, "SkyPilot"),
        ),
        (
            {"TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3", "TPU_WORKER_ID": "2"},
            Place("t0:8476", 4, 2, "TPU VMs"),
        ),
        (
            {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "3",
             "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "s0:8080"},
            Place("s0:8476", 6, 5, "TPU slices"),
        ),
        (slurm("n1"), Place("n1:61447", 4, 3, "SLURM")),
        (slurm("n[03-10,12],m1"), Place("n03:61447", 4, 3, "SLURM")),
        (slurm("gpu-a-[7,9]", JAX_COORDINATOR_PORT="99"), Place("gpu-a-7:99", 4, 3, "SLURM")),
        (slurm("c1,c2"), Place("c1:61447", 4, 3, "SLURM")),
        (slurm("rack[1-2]-node[03-10,12]-ib,m1"), Place("rack1-node03-ib:61447", 4, 3, "SLURM")),
        (slurm("r[2,4]n[7],x[1-3]"), Place("r2n7:61447", 4, 3, "SLURM")),
        (slurm("n[1-4]", SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0"), Place("n1:61447", 1, 0, "SLURM")),  # salloc
        *(
            (
                {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
                Place(there, 2, 1, "JAX's variables"),
            )
            for address, there in (
                ("fe80::1", "[fe80::1]:8476"),
                ("2001:db8::8:800", "[2001:db8::8:800]:8476"),
                ("[::1]", "[::1]:8476"),
                ("[fe80::1]:99", "[fe80::1]:99"),
            )
        ),
        # The more explicit wins.
        (
            slurm() | {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
            Place("a:1", 1, 0, "JAX's variables"),
        ),
    ],
)  # fmt: skip
def test_each_launchers_variables(environment, place):
    assert resolve(environment) == place


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_PROCESS_ID": "0"}, "set all of JAX_COORDINATOR_ADDRESS"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "two"}, "whole numbers"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "isn't among 0 to 1"),
        ({"JOB_COMPLETION_INDEX": "0", "JAX_NUM_PROCESSES": "2"}, "not JAX_COORDINATOR_ADDRESS"),
        ({"SKYPILOT_NODE_IPS": "a b", "SKYPILOT_NUM_NODES": "2"}, "SKYPILOT_NODE_RANK is None"),
        (
            {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "2"}
            | {"MEGASCALE_SLICE_ID": "0"},
            "not MEGASCALE_COORDINATOR_ADDRESS",
        ),
        (slurm(SLURM_NTASKS="x"), "SLURM_NTASKS is 'x'"),
    ],
)  # fmt: skip
def test_an_environment_that_makes_no_sense_is_refused(environment, message):
    with pytest.raises(ValueError, match=message):
        resolve(environment)


@given(st.integers(1, 50), st.integers(1, 8), st.data())
def test_the_processes_of_slices_are_numbered_once_each(slices, workers, data):
    hosts = ",".join(f"h{i}" for i in range(workers + 1))
    places = [
        resolve({"TPU_WORKER_HOSTNAMES": hosts, "TPU_WORKER_ID": str(worker), "MEGASCALE_NUM_SLICES": str(slices),
                 "MEGASCALE_SLICE_ID": str(this), "MEGASCALE_COORDINATOR_ADDRESS": "s0"})
        for this in range(slices)
        for worker in range(workers + 1)
    ]  # fmt: skip
    assert [place.index for place in places] == list(range(slices * (workers + 1)))
    assert len({(place.coordinator, place.count) for place in places}) == 1


@pytest.fixture
def one_device():
    return os.environ | {"JAX_NUM_CPU_DEVICES": "1"}


def test_the_local_launcher_trains_as_two_processes(config, tmp_path, one_device):
    done = subprocess.run(
        [sys.executable, LOCAL, "2", *command(config, tmp_path / "run")],
        env=one_device, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[0] 2 processes by JAX's variables" in done.stdout
    assert len(lines(tmp_path / "run" / "digests.jsonl")) == 12
    assert audit(str(tmp_path / "run")).ok


def test_processes_that_disagree_stop_with_both_values(config, tmp_path, one_device):
    arguments = command(config, tmp_path / "run")
    source = tmp_path / "config.py"
    source.write_text(
        "import os\n" + source.read_text().replace("return", "config =")
        + "    config.seeds.poison = int(os.environ['JAX_PROCESS_ID'])\n"
        "    config.checkpoint.every = 4 + config.seeds.poison\n    return config\n"
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, LOCAL, "2", *arguments], env=one_device, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2, done.stdout + done.stderr
    for process in (0, 1):
        assert f"[{process}] poisonjax train: process {process} of 2 stops: Disagreement" in done.stdout
    assert "config: " in done.stdout
    assert "poison plan: " in done.stdout
    assert "checkpoint.every: 4 in process 0; 5 in process 1" in done.stdout
    assert "token store: " not in done.stdout  # that is the same
    assert " in process 0; " in done.stdout
    assert not (tmp_path / "run").exists()


def test_the_local_launcher_starts_again_where_that_is_asked_for(tmp_path):
    script = (
        "import os, pathlib, sys; p = pathlib.Path(sys.argv[1], os.environ['JAX_PROCESS_ID']); "
        "n = len(p.read_text()) if p.exists() else 0; p.write_text('x' * (n + 1)); sys.exit(0 if n == 2 else 42)"
    )
    arguments = [sys.executable, LOCAL, "--restarts", "5", "2", sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(arguments, timeout=60).returncode == 0
    assert (tmp_path / "1").read_text() == "xxx"
