# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks of what the guest's writer (tests/guest/writer.c, which describes the format) left on raw images."""

import struct
from collections.abc import Sequence
from pathlib import Path

MAGIC = 0x5453455453465121
STRIDE = 2654435761
SECTOR = 512
RECORD = 4096
_HEADER = struct.Struct("<4Q")
_MASK = (1 << 64) - 1


class PatternError(AssertionError):
    """The images are no state that the writer's disks were in at any one instant."""


def last_of_prefix(images: Sequence[Path]) -> int:
    """The number K of records whose effect, and no other's, is on the raw `images` of `writer -o`, in its order.

    Raises PatternError if there is no such K: a record is missing, torn, misplaced, or newer than it may be.
    """
    contents = [image.read_bytes() for image in images]
    found = [_records(content, device) for device, content in enumerate(contents)]
    last = max((sequence for device in found for sequence in device), default=0)
    for device, sequences in enumerate(found):
        for block, expected in enumerate(_expected(device, len(images), len(sequences), last)):
            if sequences[block] != expected:
                raise PatternError(
                    f"{images[device]}: record {last} is there, so block {block} must hold record {expected}, "
                    f"but it holds {sequences[block]} (0: none)"
                )
    return last


def count_sectors(image: Path, device: int, start: int = 0) -> int:
    """Check every sector that the writer marked on the raw image of its `device`th disk; returns how many there are.

    Raises PatternError for a sector whose content is torn or belongs to another place. `start` is the first byte
    looked at (a multiple of 512).
    """
    content = image.read_bytes()
    return sum(_sequence(content, device, offset) > 0 for offset in range(start, len(content), SECTOR))


def _expected(device: int, devices: int, blocks: int, last: int) -> list[int]:
    """The record that each block holds after records 1..last: the newest that was written to it, 0 for none."""
    mine = (last - device + devices - 1) // devices  # how many of them went to this disk
    result = [0] * blocks
    for index in range(max(0, mine - blocks), mine):
        result[index % blocks * STRIDE % blocks] = index * devices + device + 1
    return result


def _records(content: bytes, device: int) -> list[int]:
    return [_record(content, device, block) for block in range(len(content) // RECORD)]


def _record(content: bytes, device: int, block: int) -> int:
    """The sequence number of a block's record, 0 if it holds none; PatternError if it is torn."""
    start = block * RECORD
    sequences = {_sequence(content, device, offset) for offset in range(start, start + RECORD, SECTOR)}
    if len(sequences) > 1:
        raise PatternError(f"disk {device}, block {block}: torn between the records {sorted(sequences)}")
    return sequences.pop()


def _sequence(content: bytes, device: int, offset: int) -> int:
    """The sequence number of a sector, 0 if the writer never marked it; PatternError if its content is not sound."""
    magic, number, place, sequence = _HEADER.unpack_from(content, offset)
    if magic != MAGIC:
        return 0
    if (number, place) != (device, offset):
        raise PatternError(f"disk {device}, byte {offset}: holds what was written to disk {number}, byte {place}")
    word = _mix((_mix((_mix(device) + offset) & _MASK) + sequence) & _MASK)
    if content[offset + _HEADER.size : offset + SECTOR] != word.to_bytes(8, "little") * 60:
        raise PatternError(f"disk {device}, byte {offset}: the sector of record {sequence} is torn")
    return int(sequence)


def _mix(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)
