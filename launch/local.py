#!/usr/bin/env python3
"""Runs a command as N processes of one run on this machine.

    launch/local.py 2 poisonjax train --config configs/quickstart.py --workdir runs/two

Output lines carry their process's number. SIGTERM and Ctrl-C go to all processes; where one fails, the others end by
themselves (config.watchdog_seconds), or are killed after --grace seconds. The exit code is that of the first process
that failed; --restarts K starts all again up to K times after exit code 42, which asks for that.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

RESTART = 42


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("processes", type=int)
    parser.add_argument("--restarts", type=int, default=0, metavar="K")
    parser.add_argument("--grace", type=float, default=120, metavar="SECONDS")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if arguments.processes < 1 or not arguments.command:
        parser.error("give a number of processes, at least 1, and a command")
    for attempt in range(arguments.restarts + 1):
        code = launch(arguments.processes, arguments.command, arguments.grace)
        if code != RESTART or attempt == arguments.restarts:
            return code
        print(f"launch: exit code {code}, start {attempt + 2}", flush=True)
    raise AssertionError


def launch(count: int, command: list[str], grace: float) -> int:
    """One start of all processes; returns the first failure's exit code, or 0."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    running = []
    for index in range(count):
        place = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
            "PYTHONUNBUFFERED": "1",
        }
        process = subprocess.Popen(
            command, env=os.environ | place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        running.append(process)
        threading.Thread(target=_prefix, args=(index, process), daemon=True).start()

    def forward(number, frame):
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    first, deadline = 0, float("inf")
    while any(process.poll() is None for process in running):
        time.sleep(0.1)
        failed = [process.returncode for process in running if process.returncode]
        if failed and not first:
            first, deadline = failed[0], time.monotonic() + grace
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
    codes = [process.returncode for process in running if process.returncode]
    code = first or (codes[0] if codes else 0)
    return 128 - code if code < 0 else code  # killed by a signal, as shells say it


def _prefix(index: int, process: subprocess.Popen) -> None:
    assert process.stdout
    for line in process.stdout:
        print(f"[{index}] {line}", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
