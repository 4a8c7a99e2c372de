# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a domain's XML says of its disks."""

from __future__ import annotations

from collections.abc import Mapping
from xml.etree import ElementTree as ET


def targets(xml: str) -> Mapping[str, str]:
    """Alias, which is the id of the device in QEMU -> target, such as vda. Of a domain that runs."""
    names = {}
    for disk in ET.fromstring(xml).iterfind("devices/disk"):  # noqa: S314 - it is libvirt's own
        alias, target = disk.find("alias"), disk.find("target")
        if alias is not None and target is not None:
            names[alias.get("name", "")] = target.get("dev", "")
    return names
