# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup checkpoints`: what each target has committed of a VM, and how much has changed since; and an end of it."""

from __future__ import annotations

from functools import partial

from qfsbackup.contracts import Source
from qfsbackup.options import parse_options


def checkpoints(source: Source, option_texts: list[str], delete: str | None, *, others: bool) -> list[str]:
    """A line for each target and disk, or for what of the target `delete` was removed. Raises UserError.

    Of the options only `state=` and `vm=` matter. `others`: see contracts.Source.
    """
    from qfsbackup.cli import interruptible  # needs trio, which the supervisor must not have in it

    options = parse_options(option_texts)
    if delete is None:
        return interruptible.run(partial(source.checkpoints, options))
    return interruptible.run(partial(source.forget, options, delete, others=others))
