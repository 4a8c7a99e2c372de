# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can be seen of a VM. Nothing is changed here."""
