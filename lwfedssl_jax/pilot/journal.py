"""What a pilot leaves in its work directory in addition to a run's files: its roster and ``pilot.jsonl``."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.system.files import write_whole
from lwfedssl_jax.workdir.metrics import PILOT_LINES, read_lines, read_pilot

ROSTER = "roster.csv"


@dataclass
class Entry:
    """A device of the roster: its number in the run, and what it said of its images when it last joined."""

    number: int
    name: str
    images: int
    data: str


class Journal:
    """The roster, and lines of events and measurements; they are written once the work directory exists.

    Args:
      folder: the work directory.
      rounds: how many rounds are finished; what was measured in later ones is forgotten, since they are run again.
      names: of devices that have their numbers before they join.

    Attributes:
      roster: the devices, by name.
      measured: lines of the rounds that are finished, as they were written.

    Raises:
      ConfigError: the roster cannot be read.
    """

    def __init__(self, folder: Path, rounds: int, names: Sequence[str] = ()) -> None:
        self._folder = folder
        self.roster = {name: Entry(number, name, 0, "") for number, name in enumerate(names)}
        self._lines: list[str] = []
        self._is_open = False
        path = folder / ROSTER
        try:
            text = path.read_bytes().decode() if path.exists() else ""
            for row in csv.DictReader(io.StringIO(text, newline="")):
                entry = Entry(int(row["number"]), row["name"], int(row["images"]), row["data"])
                self.roster[entry.name] = entry
            if sorted(entry.number for entry in self.roster.values()) != list(range(len(self.roster))):
                raise ValueError("its numbers are not 0, 1, 2 and so on, each once")
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise ConfigError(f"--workdir: {path} cannot be read ({error}); accepted: as the pilot wrote it") from error
        for line in read_lines(folder, PILOT_LINES):
            if "event" in line or line["round"] <= rounds:
                self._lines.append(json.dumps(line))
        self.measured = [line for line in read_pilot(folder) if "measured" in line and line["round"] <= rounds]

    def enter(self, name: str, images: int, data: str, most: int) -> Entry | None:
        """Return a device's entry, which is made if it is new, or None if there are as many devices already."""
        entry = self.roster.get(name)
        if entry is None:
            if len(self.roster) >= most:
                return None
            entry = self.roster[name] = Entry(len(self.roster), name, images, data)
        entry.images, entry.data = images, data
        if self._is_open:
            self._write_roster()
        return entry

    def open(self) -> None:
        """Write what was collected before the work directory existed."""
        if not self._is_open:
            write_whole(self._folder / PILOT_LINES, "".join(f"{line}\n" for line in self._lines).encode())
            self._write_roster()
            self._lines, self._is_open = [], True

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line."""
        if not self._is_open:
            self._lines.append(json.dumps(line))
            return
        with (self._folder / PILOT_LINES).open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")

    def _write_roster(self) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["number", "name", "images", "data"])
        writer.writerows([e.number, e.name, e.images, e.data] for e in self.roster.values())
        write_whole(self._folder / ROSTER, text.getvalue().encode())
