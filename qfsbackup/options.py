# SPDX-License-Identifier: LGPL-2.1-or-later
"""The options behind `-o`, as mount(8), fstab and our own commands hand them over.

Unknown ones are refused by name: a misspelt `exclude=` must not silently back up what should stay out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from qfsbackup.errors import EXIT_USAGE, UserError
from qfsbackup.facts import CLUSTER
from qfsbackup.fs.grid import is_chunk_size
from qfsbackup.sources.uri import is_nbd_uri
from qfsbackup.state.files import FOLDER

Freeze = Literal["auto", "require", "off"]
Access = Literal["full", "dirty"]
Discard = Literal["off", "release"]
Bitmaps = Literal["persistent", "transient"]

# What mount(8), fstab(5) and systemd.mount(5) put there for themselves.
MOUNT_OWN = re.compile(
    r"auto|noauto|nofail|_netdev|defaults|user|users|nouser|owner|group|x-.*|X-.*|comment=.*|"
    r"(no)?(exec|suid|dev|atime|diratime|relatime|strictatime|lazytime)|(a)?sync|loud|silent"
)

SIZES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True, slots=True)
class Options:
    """What a mount is asked to be; sizes in bytes."""

    fleece: Path = Path("/var/tmp")  # noqa: S108  # files there have no name, so nobody can guess or replace them
    fleece_limit: int | None = None  # over all disks
    freeze: Freeze = "auto"
    agent: Path | None = None  # the guest agent's socket
    disks: tuple[str, ...] = ()  # empty: all that are written to
    exclude: tuple[str, ...] = ()
    bwlimit: int | None = None  # bytes per second
    connections: int = 4  # for each disk
    uid: int = 0
    gid: int = 0
    mode: int | None = None
    read_only: bool = False  # `ro`; of `ro` and `rw` the later one counts, as mount(8) has it
    vm: str | None = None
    bitmap: str | None = None  # NBD sources: the dirty bitmap that is the map
    target: str | None = None  # the backup destination whose chain this mount continues
    state: Path = FOLDER  # where chains are kept
    bitmaps: Bitmaps = "persistent"
    chunk: int | None = None  # bytes
    access: Access = "full"
    discard: Discard = "off"
    trim_server_data: bool = False  # NBD sources: may what is given back be trimmed on the server


def parse_size(text: str) -> int:
    """`text` in bytes; a suffix k, M, G or T (also KiB and so on) counts in powers of 1024. Raises ValueError."""
    match = re.fullmatch(r"(\d+)([kmgt]?)(i?b)?", text.strip().lower())
    if not match:
        raise ValueError("a size is a number, with k, M, G or T behind it for KiB, MiB, GiB, TiB")
    return int(match[1]) * SIZES[match[2]]


def _positive_size(text: str) -> int:
    size = parse_size(text)
    if not size:
        raise ValueError("it must be more than 0")
    return size


def _limit(text: str) -> int:
    size = parse_size(text)
    if size < CLUSTER:
        raise ValueError("it is 64k or more: the guest's first write already takes so much")
    return size


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"it is one of {', '.join(choices)}")
        return text

    return parse


def _target(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", text):
        raise ValueError("it is up to 64 letters, digits and _.- and begins with a letter or a digit")
    return text


def _chunk(text: str) -> int:
    size = parse_size(text)
    if not is_chunk_size(size):
        raise ValueError("it is a power of two, from 64k to 1T")
    return size


def _connections(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 16:
        raise ValueError("it is a number from 1 to 16")
    return int(text)


def _identity(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("it is a number, as `id -u` and `id -g` print it")
    return int(text)


def _mode(text: str) -> int:
    if not re.fullmatch(r"0?[0-7]{3}", text):
        raise ValueError("it is three octal digits, as in 440")
    return int(text, 8)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(":") if name)
    if not names:
        raise ValueError("name one disk, or several with : between them")
    return names


def _path(text: str) -> Path:
    if not text:
        raise ValueError("it is a path")
    return Path(text).absolute()


def _text(text: str) -> str:
    if not text:
        raise ValueError("it must not be empty")
    return text


def _flag(text: str) -> bool:
    if text:
        raise ValueError("it has no value")
    return True


PARSERS: dict[str, Callable[[str], object]] = {
    "fleece": _path,
    "fleece-limit": _limit,
    "freeze": _one_of(*get_args(Freeze)),
    "agent": _path,
    "disks": _names,
    "exclude": _names,
    "bwlimit": _positive_size,
    "connections": _connections,
    "uid": _identity,
    "gid": _identity,
    "mode": _mode,
    "vm": _text,
    "bitmap": _text,
    "target": _target,
    "state": _path,
    "bitmaps": _one_of(*get_args(Bitmaps)),
    "chunk": _chunk,
    "access": _one_of(*get_args(Access)),
    "discard": _one_of(*get_args(Discard)),
    "trim-server-data": _flag,
}


# What people try, and what they want.
MEANT = {
    "allow_other": "Others may read the files where uid=, gid= or mode= says so; it needs no option of its own.",
    "allow_root": "Root may always read the files.",
    "default_permissions": "The kernel always checks permissions; uid=, gid= and mode= set them.",
}


def parse_options(texts: list[str]) -> Options:
    """`texts` are the arguments of each `-o`. Raises UserError."""
    found: dict[str, object] = {}
    last = ""
    words = ",".join(texts).split(",")
    if "remount" in words:
        raise UserError(
            "a snapshot cannot be mounted again with other options",
            "Unmount it (qfsbackup umount DIR) and mount it anew, which takes a new snapshot.",
            EXIT_USAGE,
        )
    for text in words:
        if text in ("ro", "rw"):
            found["read-only"] = text == "ro"
        elif text and not MOUNT_OWN.fullmatch(text):
            last, value = _parse(text, last)
            if last in found:
                raise UserError(
                    f"the option {last} is given twice",
                    "Say it once. mount(8) puts what fstab says and what -o says together.",
                    EXIT_USAGE,
                )
            found[last] = value
    return Options(**{name.replace("-", "_"): value for name, value in found.items()})  # type: ignore[arg-type]  # each parser fits its field


def _parse(text: str, last: str) -> tuple[str, object]:
    """The option's name, and what its value means; `last` is the option before it."""
    name, _, value = text.partition("=")
    parser = PARSERS.get(name)
    if parser is None:
        raise UserError(f"unknown option: {name}", _hint(text, last), EXIT_USAGE)
    try:
        return name, parser(value)
    except ValueError as error:
        raise UserError(f"option {text} cannot be understood", f"For {name}: {error}.", EXIT_USAGE) from None


def _hint(text: str, last: str) -> str:
    if text in MEANT:
        return MEANT[text]
    if last in ("disks", "exclude") and "=" not in text:
        return f"Several disks have : between them, as in {last}=vda:{text}; a comma begins another option."
    return f"The options are: {', '.join(sorted(PARSERS))}."


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
