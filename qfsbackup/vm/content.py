# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tells that a disk's content is still the one that its bitmap was made on.

A bitmap records writes. What shows other bytes without a write is not in it: `qemu-img rebase -u` puts another file
below an image, blockdev-reopen another one below a node. So the names of all that the content comes from are kept with
a commit and compared at the next backup. Where both names and generations are the same, the content is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from qfsbackup.vm.graph import Node

BELOW = ("backing", "data-file")  # a format node's children whose bytes the guest sees as if they were the image's own


def content_of(nodes: Mapping[str, Node], node: Node) -> str:
    """JSON: the format, the files below the image, and the image's own, as QEMU names them."""
    return json.dumps({"format": node.driver, "below": list(_below(nodes, node)), "file": node.filename})


def _below(nodes: Mapping[str, Node], node: Node) -> Iterator[str]:
    for role in BELOW:
        child = nodes.get(node.children.get(role, ""))
        if child:
            yield child.filename
            yield from _below(nodes, child)


def difference(old: str, new: str, *, stored_in_image: bool) -> str:
    """How two contents differ, for a person; empty where they do not.

    A bitmap that is stored in the image goes where the image goes, so the image's own name does not matter then.
    """
    before, after = json.loads(old or "{}"), json.loads(new or "{}")
    names = {"format": "its format", "below": "the files below it"} | ({} if stored_in_image else {"file": "its file"})
    for key, name in names.items():
        if before.get(key) != after.get(key):
            return f"{name} changed from {_text(before.get(key))} to {_text(after.get(key))}"
    return ""


def _text(value: object) -> str:
    return (", ".join(map(str, value)) if isinstance(value, list) else str(value or "")) or "none"
