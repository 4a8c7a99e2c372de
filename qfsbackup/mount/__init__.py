# SPDX-License-Identifier: LGPL-2.1-or-later
"""One mount's life: from its source to its end, and what outlives it."""
