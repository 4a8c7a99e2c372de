# SPDX-License-Identifier: LGPL-2.1-or-later
"""qfsbackup: one frozen instant of a running QEMU VM, as ordinary files.

entry     where the programs begin               cli      the commands
restore   what becomes of a backup again         mount    one mount's life
fuse      the kernel side                        fs       what people see
sources   where a snapshot comes from            nbd      the bytes of a disk
state     checkpoints                            vm       what can be done to a running QEMU
backup    what a backup is as files

What they share stands beside them. docs/architecture.md shows how it all works together.
"""

__version__ = "0.1.0"
