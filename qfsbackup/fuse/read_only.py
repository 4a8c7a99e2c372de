# SPDX-License-Identifier: LGPL-2.1-or-later
"""The requests that would change the tree: all of them are EROFS, where pyfuse3's own answer would be ENOSYS."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any, NoReturn

import pyfuse3


async def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise pyfuse3.FUSEError(errno.EROFS)


class ReadOnly(pyfuse3.Operations):
    """Operations of a file system that cannot be changed."""

    create = link = mkdir = mknod = rename = rmdir = symlink = unlink = _refuse
    setxattr = removexattr = _refuse

    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        """There are none; getxattr is left unanswered, so that the kernel answers it without us."""
        return []
