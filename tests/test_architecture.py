# SPDX-License-Identifier: LGPL-2.1-or-later
"""docs/architecture.md says nothing of what is not there."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text()
PACKAGE = ROOT / "qfsbackup"
NAMED = re.findall(r"`([^`\n]+)`", PAGE)


def test_every_file_and_folder_that_it_names_is_there() -> None:
    drawing = PAGE.split("```")[1]
    paths = [name for name in NAMED if re.fullmatch(r"[\w/]+(/|\.(py|c))", name)]
    paths += re.findall(r"\w+/(?:[\w.]+\.py)?(?=[ \n])", drawing)
    assert len(paths) > 40
    assert [path for path in paths if not any((folder / path).exists() for folder in (ROOT, PACKAGE))] == []


def test_every_class_that_it_names_is_there() -> None:
    classes = [name.partition(".")[0] for name in NAMED if re.match(r"[A-Z][a-z]", name)]
    assert len(set(classes)) > 5
    code = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert [name for name in classes if not re.search(rf"^class {name}\b", code, re.MULTILINE)] == []


def test_every_room_is_in_its_layer() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(one["layers"] for one in contracts if one["type"] == "layers")
    shown = PAGE.partition("```layers\n")[2].partition("```")[0].splitlines()
    assert shown == [layer for layer in layers if rooms.intersection(layer.split(" | "))]
    assert rooms == {room for layer in shown for room in layer.split(" | ")}
    assert [room for room in rooms if f"{room}/" not in PAGE] == []
