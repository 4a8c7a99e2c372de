# SPDX-License-Identifier: LGPL-2.1-or-later
"""What outlives a mount: the committed generation of each target, and the times that its files have shown."""
