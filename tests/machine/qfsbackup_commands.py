# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs `qfsbackup` commands, each in a process of its own, forked from one that has imported everything already: a
command then takes milliseconds to start.

python qfsbackup_commands.py FOLDER

A line of JSON in: {"words": [...], "clock": S, "environment": {...}} starts a command whose clock is S seconds ahead;
its process id is the answer, and its output goes to FOLDER/<pid>.out and .err. {"wait": PID} is answered with its exit
status.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import qfsbackup.mount.daemon
import qfsbackup.sources.vm_checkpoints
import qfsbackup.vm.monitors.qmp_socket  # noqa: F401 - every command would import these after its fork
from qfsbackup.cli.main import main
from qfsbackup.mount import rescue

rescue.PAUSE, rescue.LONGEST_PAUSE = 0.2, 0.5  # seconds; what is left is looked for more often


def start(folder: Path, request: dict[str, Any]) -> int:
    """The process id of a command."""
    pid = os.fork()
    if pid:
        return pid
    for descriptor, suffix in ((1, "out"), (2, "err")):
        output = os.open(folder / f"{os.getpid()}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        os.dup2(output, descriptor)
        os.close(output)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.environ.update(request["environment"])
    set_clock(request["clock"])
    code = 70
    try:
        code = main(request["words"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def set_clock(seconds: int) -> None:
    """The real-time clock cannot be set for one process (time namespaces have the others only), so that what the
    product asks for the time is another function. What the kernel stamps is not changed."""
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + seconds
    time.time_ns = lambda: real_ns() + seconds * 10**9


def serve(folder: Path) -> None:
    """Until standard input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = start(folder, request)
        print(answer, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
