# SPDX-License-Identifier: LGPL-2.1-or-later
from array import array
from collections.abc import Callable
from typing import Any

from qfsbackup.contracts import Answer

class Lane:
    def __init__(
        self,
        handle: Any,
        blocked: Callable[[], None],
        running: dict[Any, None],
        waiting: list[Any],
        advance: Callable[[], None],
        failed: Callable[[int, int, Answer], None],
        size: int,
        unit: int,
        border: int,
        /,
    ) -> None: ...
    def read(self, start: int, length: int, answer: Answer, /) -> int: ...
    def receive(self) -> bool: ...
    def meets(self, start: int, end: int, /) -> bool: ...
    def allow(self, borders: array[int] | None, /) -> None: ...
    def close(self) -> None: ...
