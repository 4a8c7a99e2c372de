# SPDX-License-Identifier: LGPL-2.1-or-later
"""qfsbackup: one frozen instant of a running QEMU VM, as ordinary files.

entry     where the programs begin; cli the commands, arguments their words, console how they end
daemon    joins the pillars: source -> snapshot -> disks -> tree -> mount
fuse      the kernel side            fs       what people see
nbd       the bytes of a disk        sources  where a snapshot comes from
state     checkpoints                vm       what can be done to a running QEMU
model, status, log, errors, ranges   what all of them share
"""

__version__ = "0.1.0"
