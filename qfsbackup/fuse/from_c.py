# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `_ops` calls: nobody above can catch what it raises, and the request must be answered all the same."""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from qfsbackup.fuse import _ops

log = logging.getLogger(__name__)

Owner = TypeVar("Owner")
P = ParamSpec("P")


def called_from_c(
    handler: Callable[Concatenate[Owner, int, P], None],
) -> Callable[Concatenate[Owner, int, P], None]:
    """Log what a handler of a request raises, and answer EIO, as for those that pyfuse3 calls."""

    @functools.wraps(handler)
    def wrapper(self: Owner, request: int, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            handler(self, request, *args, **kwargs)
        except Exception:
            log.exception("%s failed", handler.__name__)
            _ops.reply_errno(request, errno.EIO)

    return wrapper
