# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a backup is as files: how they are called, what vm.json says of them, and whether they are all there."""
