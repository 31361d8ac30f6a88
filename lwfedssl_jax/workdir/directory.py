"""The work directory of a run: its config, metrics, checkpoints and trained encoder."""

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from lwfedssl_jax.config import INERT_FIELDS, Config, ConfigError, digest, flat, from_dict, to_dict
from lwfedssl_jax.system import seeds
from lwfedssl_jax.system.files import DirectoryLock, can_write, is_leftover, write_whole
from lwfedssl_jax.tree import Tree
from lwfedssl_jax.workdir import checkpoint
from lwfedssl_jax.workdir.checkpoint import Checkpoint
from lwfedssl_jax.workdir.metrics import METRICS, read_lines, whole_line

if TYPE_CHECKING:
    from lwfedssl_jax.workdir.schema import Summary

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn", "lwfedssl_jax")
LOCK, PILOT = ".lock", "pilot"  # the latter is the folder of a pilot's processes


class WorkDir:
    """A directory that holds one run.

    The constructor only reads; nothing is written before ``open``. If a process is killed, ``metrics.jsonl`` and the
    plots may be truncated, which is repaired when the run continues; every other file is complete or missing.

    Args:
      path: the directory, which need not exist.
      config: of the run, resolved.
      code: identifies the text of the user's own config file, which may define more than a config; empty without one.
      patience: seconds to wait for another process that uses the directory.
      command: the words after ``train`` on the command line, for the reader of ``config.json``.

    Attributes:
      path: the directory.
      summary: the content of ``summary.json``, or None if the run is not finished.

    Raises:
      ConfigError: the directory contains another run or other files, or cannot be read or written.
    """

    def __init__(
        self, path: Path, config: Config, code: str = "", patience: float = 0, command: Sequence[str] = ()
    ) -> None:
        self.path = path
        self.summary: Summary | None = None
        self._config, self._code, self._command = config, code, list(command)
        self._lock = DirectoryLock(path / LOCK, patience)
        self._is_new = True
        try:
            if path.exists() and not path.is_dir():
                raise ConfigError(
                    f"--workdir: {path} is not a directory; accepted: a new or empty directory, or a run's"
                )
            if path.is_dir() and any(p.name not in (LOCK, PILOT) and not is_leftover(p) for p in path.iterdir()):
                self._check_same_run()
                self._is_new = False
                summary = path / "summary.json"
                self.summary = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else None
                if summary.is_file() and "strategies" not in (self.summary or {}):
                    raise ConfigError(
                        f"--workdir: {summary} is not the summary of a run; accepted: remove it to continue the run"
                    )
            if self.summary is None and not can_write(path):
                raise ConfigError(f"--workdir: {path} cannot be written; accepted: a directory you can write to")
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
            raise ConfigError(
                f"--workdir: {path} cannot be read ({error}); accepted: a new or empty directory"
            ) from error

    def take(self) -> None:
        """Lock an existing run's directory for this process until ``close``; for a new run, ``open`` does so.

        Raises:
          ConfigError: another process is using it.
        """
        if not self._is_new:
            self._lock.acquire()

    def restore(self) -> tuple[Checkpoint | None, dict[int, str]]:
        """Load the newest intact checkpoint and truncate ``metrics.jsonl`` to what it was then.

        Later lines that do not belong to a later round, which are those of fine-tuning, are kept.

        Returns:
          The checkpoint or None, and by number of rounds what is wrong with each that is newer.

        Raises:
          ConfigError: there are checkpoints, but none of them is intact; the run is of a version with other random
            streams.
          OSError: see ``checkpoint.load``; the directory cannot be written.
        """
        if self._is_new:
            return None, {}
        self._check_streams()
        found, faults = checkpoint.load(self._checkpoints)
        if faults and not found:
            reasons = "; ".join(f"{rounds}: {fault}" for rounds, fault in faults.items())
            raise ConfigError(
                f"--workdir: no checkpoint in {self._checkpoints} is intact ({reasons}); accepted: one restored "
                "from a copy, or remove the folder to begin the run again"
            )
        kept, file = found.metrics if found else b"", self.path / METRICS
        written = file.read_bytes() if file.exists() else b""
        if found and written.startswith(kept):
            for line in written[len(kept) :].splitlines(keepends=True):
                if not (content := whole_line(line)) or content["round"] > found.rounds:
                    break
                kept += line
        self._write(METRICS, kept)
        return found, faults

    def _check_streams(self) -> None:
        """Refuse to continue a run that was begun with other random streams: it would be neither run."""
        file = self.path / "config.json"
        begun_with = (
            json.loads(file.read_text(encoding="utf-8")).get("random_streams", 1) if file.exists() else seeds.VERSION
        )
        if begun_with != seeds.VERSION and checkpoint.load(self._checkpoints)[0]:
            raise ConfigError(
                f"--workdir: {self.path} contains an unfinished run of a version with random streams {begun_with}, and "
                f"this version has {seeds.VERSION}; accepted: another directory, or the version that began it"
            )

    @property
    def data(self) -> dict[str, str]:
        """Fingerprint of the data that the run in this directory was begun on; empty for a new or an old one."""
        file = self.path / "config.json"
        return dict((json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}).get("data") or {})

    def check_data(self, data: Mapping[str, str]) -> None:
        """Refuse data that are not those that the run in this directory was begun on.

        Args:
          data: their fingerprint.

        Raises:
          ConfigError: images, labels or clients differ.
        """
        begun_on = self.data
        differing = [name for name in {**begun_on, **data} if begun_on.get(name) != data.get(name)]
        if begun_on and differing:  # a run of an earlier version has no fingerprint
            further = [name for name in differing if name in self._config.evaluation.data]
            own = [name for name in differing if name not in further]
            what = f"data.name {self._config.data.name!r}" if own else f"evaluation.data {further[0]!r}"
            there, here = (
                " ".join(f"{k} {v.get(k, 'none')}" for k in own) if own else v.get(further[0], "none")
                for v in (begun_on, data)
            )
            raise ConfigError(
                f"--workdir: {self.path} contains a run that was begun on other data: {what} had {there} there and has "
                f"{here} now; accepted: the same data, or another directory"
            )

    def open(self, lanes: int, devices: int, data: Mapping[str, str]) -> None:
        """Make the directory and write ``config.json``; of a run that continues, all except its arguments stay.

        Args:
          lanes, devices: that are used.
          data: the fingerprint of the data.

        Raises:
          ConfigError: the directory cannot be written, or another process uses it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            file = self.path / "config.json"
            if self._is_new and file.exists():
                raise self._lock.in_use()
            entries = (
                json.loads(file.read_text(encoding="utf-8"))
                if file.exists()
                else self._describe() | {"data": dict(data)}
            )
            self.write_json(
                "config.json", entries | {"lanes": lanes, "devices": devices, "random_streams": seeds.VERSION}
            )
        except OSError as error:
            raise ConfigError(
                f"--workdir: {self.path} cannot be written ({error.strerror}); accepted: a directory you can write to"
            ) from error

    def close(self) -> None:
        """Let other processes use the directory."""
        self._lock.release()

    def save(self, rounds: int, state: Tree, always_kept: Collection[int]) -> None:
        """Save a checkpoint (``checkpoint.save``) without the lines of a later round, which was not finished."""
        with self.writing(f"checkpoint {rounds}"):
            file = self.path / METRICS
            lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
            metrics = b"".join(line for line in lines if (content := whole_line(line)) and content["round"] <= rounds)
            checkpoint.save(self._checkpoints, rounds, state, metrics, always_kept)

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line to ``metrics.jsonl``."""
        with self.writing(METRICS), (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Return all complete lines of ``metrics.jsonl``, in order; ``schema.MetricsLine`` has their fields."""
        return read_lines(self.path)

    def save_encoder(self, files: dict[str, bytes]) -> None:
        """Write the files, by name, that ``export.encoder_files`` returns."""
        for name, content in files.items():
            self._write(name, content)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file completely or not at all."""
        self._write(name, f"{json.dumps(content, indent=1)}\n".encode())

    @property
    def saved_rounds(self) -> int:
        """How many rounds the newest checkpoint has, intact or not; 0 without one."""
        return max(checkpoint.saved_rounds(self._checkpoints), default=0)

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def _describe(self) -> dict[str, Any]:
        """Return the entries of a new run's ``config.json``."""
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        return {
            "config": to_dict(self._config),
            "config_file": self._code,
            "command": self._command,
            "device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}",
            "versions": versions | {"python": platform.python_version()},
        }

    def _write(self, name: str, content: bytes) -> None:
        with self.writing(name):
            write_whole(self.path / name, content)

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Add what cannot be written, and where, to an OSError that is raised within this context."""
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"--workdir: {what} cannot be written in {self.path} ({error.strerror or error}); what was saved "
                "before is intact, and the same command continues from it",
            ) from error

    def _check_same_run(self) -> None:
        file = self.path / "config.json"
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
            raise ConfigError(f"--workdir: {self.path} contains files but no run; accepted: a new or empty directory")
        if content.get("config_file", "") != self._code:
            raise ConfigError(
                f"--workdir: {self.path} contains a run of another config file, or of this one before it was changed; "
                "accepted: the file as it was, or another directory"
            )
        old, new = (flat(to_dict(config)) for config in (from_dict(content["config"]), self._config))
        for name, value in new.items():
            if old[name] != value and name not in INERT_FIELDS:
                raise ConfigError(
                    f"--workdir: {self.path} contains a run of another config: {name} is {old[name]!r} there, "
                    f"{value!r} here; accepted: the same config, or another directory"
                )


def default_workdir(name: str, config: Config, code: str = "") -> Path:
    """Return ``runs/CONFIG-HASH``, one path per config and text of its file (``code``), see ``config.digest``."""
    stem = Path(name).with_suffix("").name if name.endswith(".py") else name
    return Path("runs") / f"{stem}-{digest(config, code)}"
