# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bytes of a disk; the only importer of libnbd. And the way that a read takes, from the kernel and back.

    kernel --read(2)--> op_read in _ops.c
                          '--> Window, Delta, ...   where on the disk it is
                                 '--> FrozenDisk    what may be read: zeros for holes, else EIO or the pieces of data
                                        '--> NbdDisk.read
      a small one, here and there       '--> _lane.c ----------------------------------------------> server
      where somebody reads on           '--> a block of readahead.py, which is there or on its way
      all else                          '--> Fetch --> Pool --> InFlight --> Connection -----------> server

    server --reply--> the socket's callable --> _lane.c, or Connection --> Fetch
                                                  '--> (Gather, of several) --> FrozenDisk --> Answer --> kernel

**Threads.** All of it runs in trio's thread, and no part of it waits: each calls the next one, with an answer to be
called once. An answer comes at once (zeros, a block that is there), or out of the socket's callable. That is called by
a task of each connection; and, so that small reads need no trip through the event loop, by _ops.c, which between two
requests of the kernel polls the same sockets. Only handshakes, goodbyes and what asks a file system have threads.

**What is in flight** never overlaps (inflight.py): a request that meets another one waits for it. The lane refuses
what meets a job that is in flight or waits, and the jobs wait for the lane's reads that they meet.

**A trim** first forbids its range: to FrozenDisk (zeros or EIO), to NbdDisk, to the lane, to readahead. Then it is a
job like a read: it waits for the reads that meet it, which were asked for before and get the bytes; what comes later is
never sent. Whoever punched waits in a task until the server has answered.

**The bandwidth** is paid by a task of the pool, in the order of the requests; there is no lane then. A read that still
has to pay when its range is trimmed is EIO.

**Something does not come.** From the lane or in a block: the disk asks again for just that range, as the error may be a
neighbour's. From a direct fetch: EIO for its reader alone. EINVAL of what was not trimmed is QEMU's word for a broken
snapshot (disk.py).

**The snapshot is broken.** Health knows. FrozenDisk sends nothing any more, and what the server answers from then on is
EIO, too.

**The server is lost.** Its connection fails all that it has in flight, the pool what waits and what pays, the lane what
it has; each asks again or is EIO at once. Health is broken by then.

**An unmount** with reads in flight waits for none. The session ends first: from then on an Answer does nothing, and
the kernel has told the readers. Then the disks are closed: what is not answered yet gets an error, which nobody hears.
"""
