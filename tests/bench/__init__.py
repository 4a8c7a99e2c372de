# SPDX-License-Identifier: LGPL-2.1-or-later
"""`./run bench`: how fast a mount is read, side by side with the neighbouring tools, in one run on one machine."""
