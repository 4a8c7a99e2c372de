# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which options fit which kind of source."""

from __future__ import annotations

from qfsbackup.errors import EXIT_USAGE, UserError
from qfsbackup.options import Options
from qfsbackup.sources.uri import is_nbd_uri


def check_fit(options: Options, source: str) -> None:
    """Raises UserError where an option asks for what this kind of source does not have."""
    mismatch = _server_mismatch(options) if is_nbd_uri(source) else _vm_mismatch(options)
    if mismatch:
        raise UserError(*mismatch, EXIT_USAGE)


def _server_mismatch(options: Options) -> tuple[str, str] | None:
    if options.target:
        return "an NBD server keeps no checkpoints", "target= needs a VM's QMP socket: leave it out here."
    if options.agent or options.freeze == "require":
        return "an NBD server has no guest to freeze", "agent= and freeze=require need a VM's QMP socket."
    if options.discard == "release" and not options.trim_server_data:
        return (
            "discard=release would trim the server's own data",
            "Leave it out, or say that this data may go once it was read: -o trim-server-data.",
        )
    return None


def _vm_mismatch(options: Options) -> tuple[str, str] | None:
    if options.bitmap:
        return "bitmap= is for an NBD URI", "A VM's bitmaps are kept for each target: -o target=NAME."
    if options.trim_server_data:
        return "trim-server-data is for an NBD URI", "A VM's snapshot is our own, and is trimmed without it."
    return None
