# SPDX-License-Identifier: LGPL-2.1-or-later
"""What each command does, one file a command; `cli` reads the arguments."""
