"""Reading ``metrics.jsonl``, and ``pilot.jsonl``, whose lines have a round, too."""

import json
from pathlib import Path
from typing import Any

METRICS, PILOT_LINES = "metrics.jsonl", "pilot.jsonl"


def read_lines(path: Path, name: str = METRICS) -> list[dict[str, Any]]:
    """Return the complete lines of a file of a work directory, in order; none if there is no such file."""
    file = path / name
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return [content for line in lines if (content := whole_line(line))]


def read_pilot(path: Path) -> list[dict[str, Any]]:
    """Return the lines of ``pilot.jsonl``; what was measured after a round is put into the device's line of it."""
    found, rounds = list[dict[str, Any]](), dict[tuple[Any, Any], dict[str, Any]]()
    for line in read_lines(path, PILOT_LINES):
        key = line["round"], line.get("name")
        if "measured" not in line or "predicted" in line:
            found.append(line)
            if "measured" in line:
                rounds[key] = line
        elif key in rounds:
            rounds[key]["measured"] |= line["measured"]
    return found


def whole_line(line: bytes) -> dict[str, Any] | None:
    """Return the content of a line, or None if the line is truncated or damaged."""
    try:
        content = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return content if isinstance(content, dict) and "round" in content else None
