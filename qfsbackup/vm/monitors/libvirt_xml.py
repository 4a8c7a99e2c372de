# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a domain's XML says of its disks, and of its guest's agent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree as ET


def targets(xml: str) -> Mapping[str, str]:
    """Alias, which is the id of the device in QEMU -> target, such as vda. Of a domain that runs."""
    names = {}
    for disk in ET.fromstring(xml).iterfind("devices/disk"):  # noqa: S314 - it is libvirt's own
        alias, target = disk.find("alias"), disk.find("target")
        if alias is not None and target is not None:
            names[alias.get("name", "")] = target.get("dev", "")
    return names


def agent_socket(xml: str) -> Path | None:
    """The guest agent's socket, which is libvirtd's for as long as that lives."""
    for channel in ET.fromstring(xml).iterfind("devices/channel"):  # noqa: S314 - it is libvirt's own
        source, target = channel.find("source"), channel.find("target")
        if source is not None and target is not None and target.get("name") == "org.qemu.guest_agent.0":
            return Path(source.get("path", ""))
    return None
