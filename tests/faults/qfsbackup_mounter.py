# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes one background mount after the other, each with a supervisor and a worker of its own, from a process that has
imported everything already: a hundred mounts then take seconds, not minutes.

python tests/faults/qfsbackup_mounter.py MOUNTPOINT

A line of JSON in for each mount; a line out when it is ready or was refused.
"""

import contextlib
import json
import logging
import os
import sys
from pathlib import Path

import qfsbackup.mount.daemon
import qfsbackup.sources.vm_snapshot
import qfsbackup.vm.monitors.qmp_socket  # noqa: F401 - the worker would import these after its fork
from qfsbackup.cli.mount import MountRequest, mount_in_background
from qfsbackup.errors import UserError
from qfsbackup.sources import find


def main() -> None:
    """Until standard input ends."""
    for line in sys.stdin:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        source, mountpoint, *options = json.loads(line)
        error = None
        try:
            mount_in_background(MountRequest(find(source), Path(mountpoint), tuple(options), logging.INFO))
        except UserError as refusal:
            error = refusal.what
        print(json.dumps(error), flush=True)


if __name__ == "__main__":
    main()
