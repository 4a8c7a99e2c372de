# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where snapshots come from: one module a kind, and the table that tells by a SOURCE's scheme which kind it is.

A module has `source(text) -> contracts.Source`. The supervisor of a mount imports it, too: nothing heavy may come with
it. Where a library is missing it raises UserError, which names the package.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from qfsbackup.contracts import Source
from qfsbackup.errors import EXIT_USAGE, UserError
from qfsbackup.sources.image import SERVE_IT

# The module, how a person writes it, and its schemes; what has none of them is a path.
KINDS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("qemu", "a VM's QMP socket (/run/vm/web1.qmp)", ()),
    ("libvirt", "libvirt:NAME", ("libvirt",)),
    ("uri", "an NBD URI (nbd+unix:///disk?socket=/run/nbd.sock)", ("nbd", "nbd+unix", "nbds", "nbds+unix")),
    ("chunks", "a backup (chunks:/srv/restored)", ("chunks",)),
)
USAGE = ", ".join(usage for _, usage, _ in KINDS)
TABLE = {scheme: f"{__name__}.{module}" for module, _, schemes in KINDS for scheme in schemes}
MANAGED = "Give that VM a QMP socket for backups (README.md, Back up your first VM), and name the socket's path."
THOUGHT_OF = {"qemu": MANAGED, "pve": MANAGED, "image": SERVE_IT}


def find(text: str) -> Source:
    """The source that a person calls so. Raises UserError."""
    module = TABLE.get(text.partition(":")[0]) if ":" in text else None
    if module is None:
        text = text.removeprefix("qmp:")
        _check_path(text)
        is_image = Path(text).is_file() or Path(text).is_block_device()
        module = f"{__name__}.{'image' if is_image else 'qemu'}"
    source: Source = import_module(module).source(text)
    return source


def _check_path(text: str) -> None:
    """What stands under this name is looked at when we connect; where nothing does, it may not be meant as a path."""
    known = f"A source is one of: {USAGE}. The schemes are: {', '.join(TABLE)}."
    if not text:
        raise UserError("SOURCE is empty", known, EXIT_USAGE)
    if Path(text).exists():
        return
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
        what = f"there is no socket {text} in this folder, and the name of a VM does not do"
        raise UserError(what, f"If it is libvirt's: libvirt:{text}. {MANAGED}")
