# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel side, and the only importer of pyfuse3.

`_ops` must be in the process, with its symbols global, before pyfuse3 is: see `_ops.c`.
"""

from __future__ import annotations

import os
import sys

if "pyfuse3" in sys.modules:
    raise ImportError(
        "qfsbackup.fuse must be imported before pyfuse3, or fallocate, ioctl and lseek would not be served"
    )

_flags = sys.getdlopenflags()
sys.setdlopenflags(_flags | os.RTLD_GLOBAL)
try:
    from qfsbackup.fuse import _ops as _ops
finally:
    sys.setdlopenflags(_flags)
