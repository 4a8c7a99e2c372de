# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a person writes as SOURCE: a QMP socket's path or an NBD URI, and what it may be that is neither."""

from __future__ import annotations

import re
from pathlib import Path

from qfsbackup.errors import EXIT_USAGE, UserError
from qfsbackup.sources.uri import SCHEMES, is_nbd_uri
from qfsbackup.vm.monitors.socket_path import IMAGE_HINT

TWO_KINDS = f"A source is the path of a VM's QMP socket, or an NBD URI ({', '.join(SCHEMES)})."
MANAGED = "Give that VM a QMP socket for backups (README.md, Back up your first VM), and name the socket's path."
THOUGHT_OF = {"libvirt": MANAGED, "qemu": MANAGED, "pve": MANAGED, "image": IMAGE_HINT}


def absolute(text: str) -> str:
    """The source as it is called from every folder: `cleanup` must find what `mount` named. Raises UserError."""
    if is_nbd_uri(text):
        return text
    path = text.removeprefix("qmp:")
    if not path:
        raise UserError("SOURCE is empty", TWO_KINDS, EXIT_USAGE)
    if not Path(path).exists():
        _check_missing(path)
    return str(Path(path).absolute())


def _check_missing(text: str) -> None:
    """What stands under this name is looked at when we connect; where nothing does, it may not be meant as a path."""
    before, colon, after = text.partition(":")
    if (before in THOUGHT_OF and colon) or after.startswith("//"):
        raise UserError(f"no source is called {before}:", THOUGHT_OF.get(before, TWO_KINDS), EXIT_USAGE)
    host, _, port = text.removeprefix("tcp:").rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        raise UserError(
            f"{text} is a host and a port, not the path of a QMP socket",
            f"QMP is spoken through a unix socket only; an NBD server there would be nbd://{host}:{port}",
            EXIT_USAGE,
        )
    if re.fullmatch(r"[\w-]+", text):
        raise UserError(f"there is no socket {text} in this folder, and the name of a VM does not do", MANAGED)
