# SPDX-License-Identifier: LGPL-2.1-or-later
from collections.abc import Callable, Mapping

from qfsbackup.contracts import Buffer
from qfsbackup.errors import FsError
from qfsbackup.fs.node import Handle

class Answer:
    def __call__(self, content: Buffer | int | FsError | None, /) -> None: ...

def install(
    fallocate: Callable[[Answer, int, int, int, int], None],
    ioctl: Callable[[Answer, int, int, bytes], None],
    lseek: Callable[[Answer, int, int, int], None],
    defect: Callable[[Exception], None],
    handles: Mapping[int, Handle],
    sockets: Mapping[int, Callable[[], None]],
) -> None: ...
def needs_loop(flag: bool, /) -> None: ...
def end() -> None: ...
def is_extended() -> bool: ...
