# SPDX-License-Identifier: LGPL-2.1-or-later
"""The options behind `-o`, as mount(8), fstab and our own commands hand them over.

An option is one field of Options: its name with - for _, its parser, what --help and README.md say of it. Unknown ones
are refused by name: a misspelt `exclude=` must not silently back up what should stay out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from qfsbackup.errors import EXIT_USAGE, UserError
from qfsbackup.facts import CLUSTER, is_chunk_size
from qfsbackup.sizes import parse_size

Freeze = Literal["auto", "require", "off"]
Access = Literal["full", "dirty"]
Discard = Literal["off", "release"]
Bitmaps = Literal["persistent", "transient"]
Recipe = Literal["filters", "jobs"]
Parse = Callable[[str], object]  # raises ValueError with what the value should be

STATES = Path("/var/lib/qfsbackup")  # where chains are kept unless somebody says otherwise
FLEECE = Path("/var/tmp")  # noqa: S108  # files there have no name, so nobody can guess or replace them

# What mount(8), fstab(5) and systemd.mount(5) put there for themselves.
MOUNT_OWN = re.compile(
    r"auto|noauto|nofail|_netdev|defaults|user|users|nouser|owner|group|x-.*|X-.*|comment=.*|"
    r"(no)?(exec|suid|dev|atime|diratime|relatime|strictatime|lazytime)|(a)?sync|loud|silent"
)


def _like(pattern: str, made: Callable[[str], object], otherwise: str) -> Parse:
    """A parser of what matches as a whole."""

    def parse(text: str) -> object:
        if not re.fullmatch(pattern, text, re.DOTALL):
            raise ValueError(otherwise)
        return made(text)

    return parse


def _one_of(choices: object) -> Parse:
    words = get_args(choices)
    return _like("|".join(words), str, f"it is one of {', '.join(words)}")


def _size(fits: Callable[[int], bool], otherwise: str) -> Parse:
    def parse(text: str) -> int:
        size = parse_size(text)
        if not fits(size):
            raise ValueError(otherwise)
        return size

    return parse


def _split(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(":") if name)


_flag = _like("", lambda _: True, "it has no value")
_text = _like(".+", str, "it must not be empty")
_path = _like(".+", lambda text: Path(text).absolute(), "it is a path")
_names = _like(".*[^:].*", _split, "name one disk, or several with : between them")
_identity = _like(r"\d+", int, "it is a number, as `id -u` and `id -g` print it")
_target = _like(
    r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}",
    str,
    "it is up to 64 letters, digits and _.- and begins with a letter or a digit",
)


@dataclass(frozen=True, slots=True)
class Option:
    """`usage` is what stands behind the name; `heeded` are the commands that do something with it, `mount` aside."""

    usage: str
    parse: Parse
    help: str
    heeded: tuple[str, ...] = ()


def _option(usage: str, parse: Parse, *lines: str, heeded: tuple[str, ...] = ()) -> dict[str, Option]:
    return {"option": Option(usage, parse, " ".join(lines), heeded)}


# An option's first lines are the program's, the next ones people's.
# fmt: off
@dataclass(frozen=True, slots=True)
class Options:
    """What a mount is asked to be; sizes in bytes."""

    target: str | None = field(default=None, metadata=_option(
        "=NAME", _target,
        "the backup destination whose chain this mount continues: incremental, once it was committed",
    ))
    state: Path = field(default=STATES, metadata=_option(
        "=DIR", _path,
        f"where chains are kept; default {STATES}. It must belong to who mounts, and to nobody else; one that you name",
        "must exist. Losing it costs one full backup",
        heeded=("cleanup", "checkpoints"),
    ))
    bitmaps: Bitmaps = field(default="persistent", metadata=_option(
        "=transient", _one_of(Bitmaps),
        "nothing is stored in the disks' images: a restart of QEMU costs one full backup, and internal snapshots can",
        "be gone back to then",
    ))
    chunk: int | None = field(default=None, metadata=_option(
        "=SIZE", _size(is_chunk_size, "it is a power of two, from 64k to 1T"),
        "size of the chunks, a power of two from 64k; default 4M, more where a disk would have over 65,536",
    ))
    access: Access = field(default="full", metadata=_option(
        "=dirty", _one_of(Access),
        "only chunks that changed can be read (EIO for others), there is no images/; what the guest writes elsewhere",
        "costs no copying",
    ))
    discard: Discard = field(default="off", metadata=_option(
        "=release", _one_of(Discard),
        "a chunk that was read whole and closed is given back; reading it again is EIO, so not for tools that read",
        "twice (rclone and unison do)",
    ))
    disks: tuple[str, ...] = field(default=(), metadata=_option("=A:B", _names, "only these disks, by name"))
    exclude: tuple[str, ...] = field(default=(), metadata=_option("=A:B", _names, "all but these"))
    agent: Path | None = field(default=None, metadata=_option(
        "=SOCKET", _path, "the guest agent's socket, to freeze and to thaw", heeded=("cleanup",)
    ))
    freeze: Freeze = field(default="auto", metadata=_option(
        "=WHEN", _one_of(Freeze),
        "when to freeze the guest's file systems: auto (default: with agent=, if it answers), require (fail if it does",
        "not), off",
    ))
    recipe: Recipe = field(default="filters", metadata=_option(
        "=HOW", _one_of(Recipe),
        "filters (default), or jobs: from QEMU 10.1 on all disks at one instant without a pause, but a store in",
        "fleece= that hangs then holds the guest's writes up, and what the guest trims meanwhile stays allocated",
    ))
    fleece: Path = field(default=FLEECE, metadata=_option(
        "=DIR", _path,
        f"where old data goes that the guest overwrites; default {FLEECE}. The files there have no name and vanish",
        "with the mount",
    ))
    fleece_limit: int | None = field(default=None, metadata=_option(
        "=SIZE",
        _size(lambda size: size >= CLUSTER, "it is 64k or more: the guest's first write already takes so much"),
        "break the snapshot, not the guest, when they hold more than this, over all disks",
    ))
    bwlimit: int | None = field(default=None, metadata=_option(
        "=SIZE", _size(bool, "it must be more than 0"), "bytes read per second, over all disks"
    ))
    connections: int = field(default=4, metadata=_option(
        "=N", _like("0*([1-9]|1[0-6])", int, "it is a number from 1 to 16"),
        "NBD connections for each disk; default 4, fewer where all disks together would have more than 96 or the",
        "server takes no more. Of two or more, one is kept for small random reads",
    ))
    ro: bool = field(default=False, metadata=_option(
        "", _flag, "nothing can be punched through the mount; of ro and rw the later one counts"
    ))
    uid: int = field(default=0, metadata=_option("=N", _identity, "whose the files are; default root's"))
    gid: int = field(default=0, metadata=_option("=N", _identity, "the same for their group"))
    mode: int | None = field(default=None, metadata=_option(
        "=OCTAL", _like("0?[0-7]{3}", partial(int, base=8), "it is three octal digits, as in 440"),
        "their permissions; default 0400, 0600 where a hole can be punched. With ro nobody has w",
    ))
    vm: str | None = field(default=None, metadata=_option(
        "=NAME", _text, "the VM's name, in vm.json and for the state", heeded=("cleanup", "checkpoints")
    ))
    bitmap: str | None = field(default=None, metadata=_option(
        "=NAME", _text, "NBD URI: the dirty bitmap that is the map"
    ))
    trim_server_data: bool = field(default=False, metadata=_option(
        "", _flag,
        "NBD URI: punching, discard=release and access=dirty trim the export, and with it the server's own data.",
        "Without it access=dirty only refuses reads, and the other two are refused",
    ))
# fmt: on

OPTIONS: dict[str, Option] = {one.name.replace("_", "-"): one.metadata["option"] for one in fields(Options)}

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
            found["ro"] = text == "ro"
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
    if name not in OPTIONS:
        raise UserError(f"unknown option: {name}", _hint(text, last), EXIT_USAGE)
    try:
        return name, OPTIONS[name].parse(value)
    except ValueError as error:
        raise UserError(f"option {text} cannot be understood", f"For {name}: {error}.", EXIT_USAGE) from None


def _hint(text: str, last: str) -> str:
    if text in MEANT:
        return MEANT[text]
    if last in ("disks", "exclude") and "=" not in text:
        return f"Several disks have : between them, as in {last}=vda:{text}; a comma begins another option."
    return f"The options are: {', '.join(sorted(OPTIONS))}."
