# SPDX-License-Identifier: LGPL-2.1-or-later
"""The signals that mean something to a mount: the supervisor hands them on, the worker acts on them."""

from __future__ import annotations

import signal

ENDING = (signal.SIGTERM, signal.SIGINT)  # it ends in order
TELLING = signal.SIGUSR1  # it logs where each of its tasks stands
HANDED_ON = (*ENDING, TELLING)
