# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m qfsbackup`."""

import sys

from qfsbackup.entry import main

sys.exit(main())
