# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tells that a disk's content is still the one that its bitmap was made on.

A bitmap records writes. What shows other bytes without a write is not in it: `qemu-img rebase -u` puts another file
below an image, blockdev-reopen another one below a node, `qemu-img commit` of one clone writes to what all of them
stand on. So the names of all that the content comes from are kept with a commit, and of backing files, which nobody
should write to, inode, size and time; they are compared at the next backup. An external data file is the image's own
and always written to: what is written to it past QEMU goes unseen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import partial

from qfsbackup.patience import NoAnswerError, in_time
from qfsbackup.vm.look.graph import Node

BACKING, DATA = "backing", "data-file"  # children of a format node whose bytes the guest sees
LOCAL = frozenset(["file", "host_device"])  # drivers whose filename is a path here
LOOK_TIMEOUT = 5.0  # seconds; a dead NFS server answers to nobody


async def content_of(nodes: Mapping[str, Node], node: Node) -> str:
    """JSON: the format, the files below the image, when they were written to, and the image's own, as QEMU has them."""
    below = list(_below(nodes, node))
    names = [child.filename for _, child in below]
    written = [await _written(image_path(nodes, child)) if role == BACKING else None for role, child in below]
    return json.dumps({"format": node.driver, "below": names, "written": written, "file": node.filename})


def _below(nodes: Mapping[str, Node], node: Node) -> Iterator[tuple[str, Node]]:
    for role in (BACKING, DATA):
        child = nodes.get(node.children.get(role, ""))
        if child:
            yield role, child
            yield from _below(nodes, child)


def image_path(nodes: Mapping[str, Node], node: Node) -> str:
    """The local file below a format node; empty where it is something else."""
    node = nodes.get(node.children.get("file", ""), node)
    return node.filename if node.driver in LOCAL else ""


async def _written(path: str) -> list[int] | None:
    """None where that cannot be seen from here."""
    if not path:
        return None
    try:
        found = await in_time(partial(os.stat, path), LOOK_TIMEOUT)
    except (OSError, NoAnswerError):
        return None
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def difference(old: str, new: str, *, stored_in_image: bool) -> str:
    """How two contents differ, for a person; empty where they do not.

    A bitmap that is stored in the image goes where the image goes, so the image's own name does not matter then.
    """
    before, after = json.loads(old or "{}"), json.loads(new or "{}")
    names = {"format": "its format", "below": "the files below it"} | ({} if stored_in_image else {"file": "its file"})
    for key, name in names.items():
        if before.get(key) != after.get(key):
            return f"{name} changed from {_text(before.get(key))} to {_text(after.get(key))}"
    if before.get("written") != after.get("written"):
        return f"the files below it were replaced or written to ({_text(after.get('below'))})"
    return ""


def _text(value: object) -> str:
    return (", ".join(map(str, value)) if isinstance(value, list) else str(value or "")) or "none"
