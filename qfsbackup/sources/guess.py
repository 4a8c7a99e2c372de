# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a person may have meant by a SOURCE that has no scheme of ours and stands for no file."""

from __future__ import annotations

import re

from qfsbackup.errors import EXIT_USAGE, UserError
from qfsbackup.sources.image import SERVE_IT

MANAGED = "Give that VM a QMP socket for backups (README.md, Back up your first VM), and name the socket's path."
THOUGHT_OF = {"qemu": MANAGED, "pve": MANAGED, "image": SERVE_IT}


def refuse_what_is_no_path(text: str, known: str) -> None:
    """Raises UserError where it is not meant as a path; `known` says what a source may be."""
    before, colon, after = text.partition(":")
    if (before in THOUGHT_OF and colon) or after.startswith("//"):
        raise UserError(f"no source is called {before}:", THOUGHT_OF.get(before, known), EXIT_USAGE)
    host, _, port = text.removeprefix("tcp:").rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        raise UserError(
            f"{text} is a host and a port, not the path of a QMP socket",
            f"QMP is spoken through a unix socket only; an NBD server there would be nbd://{host}:{port}",
            EXIT_USAGE,
        )
    if re.fullmatch(r"[\w-]+", text):
        raise UserError(f"there is no socket {text} in this folder, and the name of a VM does not do", MANAGED)
