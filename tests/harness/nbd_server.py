# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real NBD servers: qemu-nbd, qemu-storage-daemon and nbdkit, on a unix socket or on TCP with TLS.

    async with nbdkit(tmp_path, ["--filter=error", "memory", "64M", "error-pread-rate=1"]) as server:
        server.uri, server.socket, server.process

Every server inherits a socket that listens already, and is ready when it greets.
"""

import contextlib
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import trio

from .process import CrashError, Process, running
from .qemu import Qemu

GREETING = b"NBDMAGIC"


@dataclass(frozen=True)
class NbdServer:
    """A server that greets. `socket` is None on TCP, `port` is 0 on a unix socket."""

    process: Process
    socket: Path | None = None
    port: int = 0
    certificates: Path | None = None

    @property
    def uri(self) -> str:
        """The URI of the default export."""
        return self.export("")

    def export(self, name: str) -> str:
        """The URI of an export."""
        if self.socket is not None:
            return f"nbd+unix:///{name}?{urlencode({'socket': self.socket})}"
        if self.certificates is None:
            return f"nbd://localhost:{self.port}/{name}"
        query = urlencode({"tls-certificates": self.certificates / "client"})
        return f"nbds://localhost:{self.port}/{name}?{query}"


@contextlib.asynccontextmanager
async def qemu_nbd(
    qemu: Qemu,
    directory: Path,
    image: Path,
    *,
    image_format: str = "raw",
    certificates: Path | None = None,
    tcp: bool = False,
    options: Sequence[str] = (),
    name: str = "qemu-nbd",
) -> AsyncIterator[NbdServer]:
    """Serve `image` with qemu-nbd; `options` are its own (`-r`, `-B BITMAP`, `-x EXPORT`, ..)."""
    command: list[str | Path] = [qemu.nbd, "--persistent", "--shared=0", f"--format={image_format}"]
    if certificates is not None:
        command += [
            "--object",
            f"tls-creds-x509,id=tls0,endpoint=server,dir={certificates / 'server'}",
            "--tls-creds=tls0",
        ]
    command += [*options, image]
    async with _activated(command, directory, name, tcp=tcp, certificates=certificates) as server:
        yield server


@contextlib.asynccontextmanager
async def nbdkit(
    directory: Path,
    arguments: Sequence[str | Path],
    *,
    certificates: Path | None = None,
    tcp: bool = False,
    name: str = "nbdkit",
) -> AsyncIterator[NbdServer]:
    """Serve with nbdkit; `arguments` are options, filters, the plugin and its parameters."""
    tls = [] if certificates is None else ["--tls=require", f"--tls-certificates={certificates / 'server'}"]
    command: list[str | Path] = ["nbdkit", "--foreground", *tls, *arguments]
    async with _activated(command, directory, name, tcp=tcp, certificates=certificates) as server:
        yield server


@contextlib.asynccontextmanager
async def storage_daemon(
    qemu: Qemu, directory: Path, options: Sequence[str], *, name: str = "storage-daemon", connections: int = 100
) -> AsyncIterator[NbdServer]:
    """Run qemu-storage-daemon with an NBD server for so many connections; `options` say what is exported (`--blockdev
    ..`, `--export ..`)."""
    path = directory / f"{name}.sock"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listener(path))
        descriptor = listener.fileno()
        command: list[str | Path] = [
            qemu.storage_daemon,
            "--nbd-server",
            f"addr.type=fd,addr.str={descriptor},max-connections={connections}",
            *options,
        ]
        async with running(command, directory / f"{name}.log", pass_fds=[descriptor]) as process:
            stack.close()
            yield await _ready(NbdServer(process, path))


def make_certificates(directory: Path) -> Path:
    """Make `directory` with an authority and what it signed: folders `server` and `client` in QEMU's and nbdkit's
    layout (ca-cert.pem, {server,client}-{cert,key}.pem). Returns `directory`."""
    directory.mkdir()
    _certify(directory, "ca", "basicConstraints=critical,CA:TRUE", "keyUsage=keyCertSign")
    for end in ("server", "client"):
        leaf = ("basicConstraints=critical,CA:FALSE", "keyUsage=digitalSignature", f"extendedKeyUsage={end}Auth")
        _certify(
            directory, end, *leaf, "subjectAltName=DNS:localhost", signer=["-CA", "ca-cert.pem", "-CAkey", "ca-key.pem"]
        )
        (directory / end).mkdir()
        for file in ("ca-cert.pem", f"{end}-cert.pem", f"{end}-key.pem"):
            (directory / end / file).write_bytes((directory / file).read_bytes())
    return directory


def _certify(directory: Path, name: str, *extensions: str, signer: Sequence[str] = ()) -> None:
    # A configuration of our own: the system's one would make every certificate an authority.
    config = "\n".join(["[req]", "distinguished_name=none", "x509_extensions=all", "[none]", "[all]", *extensions, ""])
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}-key.pem"]
    command = ["openssl", "req", "-x509", "-config", "/dev/stdin", *key, "-out", f"{name}-cert.pem", "-days", "2"]
    command += ["-subj", f"/CN={name}", *signer]
    subprocess.run(command, cwd=directory, check=True, capture_output=True, input=config.encode())


@contextlib.asynccontextmanager
async def _activated(
    command: Sequence[str | Path], directory: Path, name: str, *, tcp: bool, certificates: Path | None
) -> AsyncIterator[NbdServer]:
    """Run a server that takes its socket by systemd's protocol: it is descriptor 3, LISTEN_PID is the server's pid."""
    path = None if tcp else directory / f"{name}.sock"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listener(path))
        port = listener.getsockname()[1] if tcp else 0
        descriptor = listener.fileno()
        inherit: list[str | Path] = [
            "bash",
            "-c",
            f'exec 3<&{descriptor}; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"',
            "bash",
        ]
        async with running(inherit + list(command), directory / f"{name}.log", pass_fds=[descriptor]) as process:
            stack.close()
            yield await _ready(NbdServer(process, path, port, certificates))


def _listener(path: Path | None) -> socket.socket:
    if path is None:
        return socket.create_server(("localhost", 0))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


async def _ready(server: NbdServer) -> NbdServer:
    with trio.fail_after(20):
        if server.socket is not None:
            stream = await trio.open_unix_socket(os.fspath(server.socket))
        else:
            stream = await trio.open_tcp_stream("localhost", server.port)
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError):
                if (await stream.receive_some(len(GREETING))) == GREETING:
                    return server
            await server.process.wait()
    raise CrashError(f"the NBD server ended before it greeted:\n{server.process.log}")
