# SPDX-License-Identifier: LGPL-2.1-or-later
"""A state machine over a real VM: whatever happens to it between backups, no backup is silently wrong.

    test_machine.py   which rules, for how long          world.py     the VM, its images, what is in QEMU
    <noun>s.py        a noun's rules, a class each       commands.py  qfsbackup's commands
    base.py           what all rules share               tools.py     what backup tools keep

A new noun is one more file with a class derived from `Base`, named among the bases of `Machine`.
"""
