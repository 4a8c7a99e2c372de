# SPDX-License-Identifier: LGPL-2.1-or-later
from array import array
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

class Lane:
    in_flight: int
    requests: int
    asked: int
    answered: int

    def __init__(
        self,
        handle: Any,
        blocked: Callable[[], None],
        running: dict[Any, None],
        waiting: list[Any],
        advance: Callable[[], None],
        status: Any,
        data: array[int],
        told: Callable[[int, int], None],
        size: int,
        unit: int,
        border: int,
        /,
    ) -> None: ...
    def read(
        self, answer: Callable[[T, bytes | bytearray | memoryview | None], None], token: T, start: int, length: int, /
    ) -> bool:
        """`answer(token, content)` may keep `content`, and with it 64 KiB."""

    def receive(self) -> bool: ...
    def meets(self, start: int, end: int, /) -> bool: ...
    def close(self) -> None: ...
