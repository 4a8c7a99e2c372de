# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every implementation of a seam must do, run against each of them."""
