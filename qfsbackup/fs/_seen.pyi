# SPDX-License-Identifier: LGPL-2.1-or-later
MOST: int
UNIT: int

class Seen:
    def add(self, start: int, end: int, /) -> None: ...
    def borders(self) -> bytes: ...
