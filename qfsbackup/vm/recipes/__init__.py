# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a snapshot stands in QEMU and how it is taken down: one module a recipe, and nobody else knows what is in it.

All of them put a node above each disk's root node that copies what the guest overwrites, and what they leave when they
are killed is found in QEMU by its names (see ours), whichever recipe is the choice then.
"""

from __future__ import annotations

from collections.abc import Mapping

from qfsbackup.vm.recipes import filters, jobs
from qfsbackup.vm.recipes.recipe import Recipe

RECIPES: Mapping[str, Recipe] = {"filters": filters, "jobs": jobs}
