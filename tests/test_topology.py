"""Changes of topology in flight, and what happens when one of several processes stops, dies or hangs."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import portpicker
import pytest
from conftest import command, lines

from poisonjax.audit.result import audit
from poisonjax.training import loop

RESTART = 42


class Launch:
    """`poisonjax train` as one or more processes on this machine."""

    def __init__(self, config, folder, processes=1, devices=1, **mesh):
        fields = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{portpicker.pick_unused_port()}",
                "JAX_NUM_PROCESSES": str(processes),
            }
        self.digests = folder / "digests.jsonl"
        self.processes = [
            subprocess.Popen(
                [*command(config, folder), *fields],
                env=environment | ({"JAX_PROCESS_ID": str(i)} if processes > 1 else {}),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for i in range(processes)
        ]  # fmt: skip

    def steps(self):
        return self.digests.read_bytes().count(b"\n") if self.digests.exists() else 0

    def wait_for(self, steps):
        """Until this launch has written a digest of its own, and there are so many."""
        before = self.digests.stat().st_mtime_ns if self.digests.exists() else 0
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and all(p.poll() is None for p in self.processes):
            if self.digests.exists() and self.digests.stat().st_mtime_ns > before and self.steps() >= steps:
                return
            time.sleep(0.005)
        raise AssertionError(f"{self.steps()} steps: {self.end(0)}")

    def end(self, seconds=120):
        """Exit codes and outputs."""

        def output(process):
            try:
                return process.communicate(timeout=seconds)[0]
            except subprocess.TimeoutExpired:
                process.kill()
                return f"{process.communicate()[0]}\nDID NOT END"

        # Read together: one whose pipe is full stands still, and the others wait for it.
        with ThreadPoolExecutor(len(self.processes)) as threads:
            outputs = list(threads.map(output, self.processes))
        return [process.returncode for process in self.processes], outputs


@pytest.fixture(scope="module")
def base(store):
    from conftest import tiny_config

    config = tiny_config(store)
    config.steps, config.checkpoint.every, config.eval.every, config.poison.documents = 600, 100, 600, 60
    return config


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """An uninterrupted run on four devices."""
    folder = tmp_path_factory.mktemp("whole")
    loop.train(base, str(folder))
    return folder


LEGS = [
    dict(),
    dict(devices=2),
    dict(processes=2),
    dict(devices=4, tensor=2),
    dict(processes=2, devices=2, fsdp=2),
    dict(devices=2, fsdp=2),
    dict(),
    dict(processes=2, devices=2, fsdp=2),
    dict(devices=4, tensor=2),
    dict(processes=2),
    dict(devices=2),
]


def test_interrupted_and_resumed_each_time_on_another_topology(base, whole, tmp_path, thorough):
    """I1, I2, I5: the digests, ledger and dose of an uninterrupted run, its loss curve to tolerance."""
    random_, folder, stops = random.Random(0), tmp_path / "run", []
    legs = LEGS if thorough else LEGS[2:5]
    for number, leg in enumerate(legs):
        launch = Launch(base, folder, **leg)
        if number < len(legs) - 1:
            launch.wait_for((number + 1) * 600 // len(legs))
            random_.choice(launch.processes).send_signal(signal.SIGTERM)
        codes, outputs = launch.end()
        if number < len(legs) - 1:
            assert codes == [RESTART] * len(codes), outputs
            stopped = {line for output in outputs for line in output.splitlines() if "stopped after step" in line}
            assert len(stopped) == 1, outputs  # all processes at the same step
            stops.append(launch.steps())
            assert f"stopped after step {stops[-1]} of 600" in stopped.pop()
        else:
            assert codes == [0] * len(codes), outputs
    assert len(stops) == len(legs) - 1
    assert stops == sorted(set(stops))
    assert stops[-1] < 600
    for name in ("digests.jsonl", "ledger.jsonl"):
        assert (folder / name).read_text() == (whole / name).read_text()
    summaries = [json.loads((path / "summary.json").read_text()) for path in (folder, whole)]
    for name in ("digest_chain", "dose_planned", "dose_seen", "steps", "tokens"):
        assert summaries[0][name] == summaries[1][name]
    losses = [
        [row["loss"] for row in lines(path / "metrics.jsonl") if row["kind"] == "train"] for path in (folder, whole)
    ]
    assert len(losses[0]) == 600
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert audit(str(folder)).sentence().startswith("steps 0-599 verified; 60 of 60 poison documents seen exactly")


WAITS = """
import sys, time
from poisonjax import processes
from poisonjax.startup import start_jax
start_jax(1)
processes.join(10, 42)
print("joined", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("index", "how"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_process_outside_of_collectives_is_told_of_anothers_end(index, how):
    """JAX aborts then (134 for a shell), which no controller takes for "start again"."""
    where = {"JAX_COORDINATOR_ADDRESS": f"localhost:{portpicker.pick_unused_port()}", "JAX_NUM_PROCESSES": "2"}
    started = [
        subprocess.Popen([sys.executable, "-c", WAITS], env=os.environ | where | {"JAX_PROCESS_ID": str(i)},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i in (0, 1)
    ]  # fmt: skip
    for line in started[1 - index].stdout:
        if line.startswith("joined"):
            break
    started[index].send_signal(how)
    output = started[1 - index].communicate(timeout=50)[0]
    started[index].kill()
    started[index].communicate()
    assert started[1 - index].returncode == RESTART, output
    assert "another process is dead, or doesn't answer" in output


@pytest.mark.parametrize("dies", [0, 1])
def test_a_dead_process_ends_the_others_with_a_message(base, tmp_path, dies):
    launch = Launch(base, tmp_path / "run", processes=2)
    launch.wait_for(5)
    launch.processes[dies].kill()
    killed = time.monotonic()
    codes, outputs = launch.end(60)
    assert time.monotonic() - killed < 60
    assert codes[1 - dies] == RESTART, outputs
    assert f"process {1 - dies} of 2 stops" in outputs[1 - dies]
    assert "Another process is dead" in outputs[1 - dies]


def test_a_hung_process_ends_the_others_with_a_message(base, tmp_path):
    """One that is stopped still has open connections: nothing fails, so only the watchdog tells."""
    config = base.copy_and_resolve_references()
    config.watchdog_seconds = 40  # compiling on a busy machine takes most of that
    launch = Launch(config, tmp_path / "run", processes=2)
    launch.wait_for(5)
    launch.processes[1].send_signal(signal.SIGSTOP)
    try:
        output, _ = launch.processes[0].communicate(timeout=120)
    finally:
        launch.processes[1].kill()
        launch.end()
    assert launch.processes[0].returncode == RESTART, output  # by the watchdog, or JAX's heartbeat where that is faster
    assert "made no progress for 40 s while step" in output or "another process is dead, or doesn't answer" in output


def test_all_processes_leave_a_damaged_checkpoint_alone(base, tmp_path):
    config = base.copy_and_resolve_references()
    config.steps, config.checkpoint.every, config.checkpoint.keep_last = 30, 10, 3
    loop.train(config, str(tmp_path / "run"))
    digests = (tmp_path / "run" / "digests.jsonl").read_text()
    for data in (tmp_path / "run" / "checkpoints" / "30").glob("**/d/*"):
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 0xFF
        data.write_bytes(content)
    codes, outputs = Launch(config, tmp_path / "run", processes=2).end()
    assert codes == [0, 0], outputs
    assert "resuming after step 20 of 30" in outputs[0]
    assert not any("exception was never retrieved" in output for output in outputs)  # an error for each array
    assert (tmp_path / "run" / "damaged" / "30").exists()
    assert (tmp_path / "run" / "digests.jsonl").read_text() == digests
    assert audit(str(tmp_path / "run")).ok


WATCHED = """
import sys, time
from poisonjax.training.watchdog import Watchdog
with Watchdog(1, exit_code=42) as watchdog:
    watchdog.start()
    for i in range(8):
        watchdog.progress(f"turn {i}")
        time.sleep(0.3)
    print("alive", flush=True)
    time.sleep(float(sys.argv[1]))
print("done")
"""


@pytest.mark.parametrize(("sleep", "code"), [("0.2", 0), ("30", RESTART)])
def test_the_watchdog_ends_what_makes_no_progress_and_nothing_else(sleep, code):
    done = subprocess.run([sys.executable, "-c", WATCHED, sleep], capture_output=True, text=True, timeout=25)
    assert done.returncode == code
    assert done.stdout.split() == (["alive"] if code else ["alive", "done"])
    if code:
        assert "made no progress for 1 s while turn 7" in done.stderr
        assert 'File "<string>", line 10' in done.stderr  # where it stands
