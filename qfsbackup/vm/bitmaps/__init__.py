# SPDX-License-Identifier: LGPL-2.1-or-later
"""Dirty bitmaps: what records, what each is worth, what is left of them."""
