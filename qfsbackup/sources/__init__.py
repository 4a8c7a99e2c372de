# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where snapshots come from: one module a kind, and the table that tells by a SOURCE's scheme which kind it is.

A module has `source(text) -> contracts.Source`. The supervisor of a mount imports it, too: nothing heavy may come with
it. Where a library is missing it raises UserError, which names the package.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from qfsbackup.contracts import Source
from qfsbackup.errors import EXIT_USAGE, UserError
from qfsbackup.sources.guess import refuse_what_is_no_path

QEMU, URI, IMAGE, LIBVIRT = (f"{__name__}.{module}" for module in ("qemu", "uri", "image", "libvirt"))
TABLE = {"nbd": URI, "nbd+unix": URI, "nbds": URI, "nbds+unix": URI, "libvirt": LIBVIRT}


def find(text: str) -> Source:
    """The source that a person calls so. Raises UserError."""
    scheme, colon, _ = text.partition(":")
    if colon and scheme in TABLE:
        return _made(TABLE[scheme], text)
    known = (
        f"A source is the path of a VM's QMP socket, libvirt:NAME, or an NBD URI. The schemes are: {', '.join(TABLE)}."
    )
    text = text.removeprefix("qmp:")
    if not text:
        raise UserError("SOURCE is empty", known, EXIT_USAGE)
    path = Path(text)
    if not path.exists():
        refuse_what_is_no_path(text, known)
    return _made(IMAGE if path.is_file() or path.is_block_device() else QEMU, text)


def _made(module: str, text: str) -> Source:
    source: Source = import_module(module).source(text)
    return source
