# SPDX-License-Identifier: LGPL-2.1-or-later
"""What else is needed to rebuild a VM, as files: what QEMU tells about its machine, and its command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from qfsbackup.patience import NoAnswerError, in_time
from qfsbackup.vm.monitor import Monitor, QmpRefusedError

PROC_TIMEOUT = 5.0  # seconds
QUERIES = {
    "version": "query-version",
    "name": "query-name",
    "uuid": "query-uuid",
    "status": "query-status",
    "machine": "query-current-machine",
    "memory": "query-memory-size-summary",
    "memory-devices": "query-memory-devices",
    "cpus": "query-cpus-fast",
    "block": "query-block",
    "block-nodes": "query-named-block-nodes",
    "chardevs": "query-chardev",
    "pci": "query-pci",
    "iothreads": "query-iothreads",
}


async def config_files(qmp: Monitor) -> Mapping[str, bytes]:
    """File name -> content. What a QEMU cannot tell, or what we may not see, is just absent. Raises QmpError."""
    facts: dict[str, object] = {}
    for name, query in QUERIES.items():
        try:
            facts[name] = await qmp.execute(query)
        except QmpRefusedError:
            continue
    machine = await _machine_type(qmp)
    if machine:
        facts["machine-type"] = machine
    command = await _command_line(qmp.peer_pid)
    if command:
        facts["command-line"] = command
    return {"qemu.json": json.dumps(facts, indent=2, sort_keys=True).encode() + b"\n", **await qmp.config()}


async def _machine_type(qmp: Monitor) -> object:
    try:
        return await qmp.execute("qom-get", {"path": "/machine", "property": "type"})
    except QmpRefusedError:
        return None


async def _command_line(pid: int) -> list[str]:
    """The arguments of a process, empty where it cannot be seen; reading them may wait for its memory (proc(5))."""
    try:
        content = await in_time(Path(f"/proc/{pid}/cmdline").read_bytes, PROC_TIMEOUT) if pid else b""
    except (OSError, NoAnswerError):
        return []
    return content.decode(errors="replace").rstrip("\0").split("\0") if content else []
