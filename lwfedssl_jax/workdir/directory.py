"""The work directory: the config it belongs to, metrics by line, checkpoints, the trained encoder."""

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from lwfedssl_jax.config import INERT_FIELDS, Config, ConfigError, digest, flat, from_dict, to_dict
from lwfedssl_jax.system.files import DirectoryLock, can_write, is_leftover, write_whole
from lwfedssl_jax.tree import Tree
from lwfedssl_jax.workdir import checkpoint
from lwfedssl_jax.workdir.checkpoint import Checkpoint
from lwfedssl_jax.workdir.metrics import METRICS, read_lines, whole_line

if TYPE_CHECKING:
    from lwfedssl_jax.workdir.schema import Summary

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn", "lwfedssl_jax")
LOCK = ".lock"


class WorkDir:
    """A directory that holds one run.

    ``WorkDir(path, config, code)`` only looks; nothing is written before ``open``. ``code`` stands for the text of
    the user's own config file, if there is one: it may hold more than the config. ``patience``: seconds to wait for
    another process to let go of the directory. ``command``: the words of the ``train`` command, for the reader of
    ``config.json``. Where a process is killed,
    ``metrics.jsonl`` and the plots may be cut, which a run that continues mends; all else is whole or not there.

    Attributes:
      path: the directory.
      summary: the finished run's summary, or None.

    Raises:
      ConfigError: the directory holds another config's run or other files, or cannot be read.
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
            if path.is_dir() and any(p.name != LOCK and not is_leftover(p) for p in path.iterdir()):
                self._check_same_run()
                self._is_new = False
                summary = path / "summary.json"
                self.summary = json.loads(summary.read_text()) if summary.is_file() else None
                if summary.is_file() and "strategies" not in (self.summary or {}):
                    raise ConfigError(
                        f"--workdir: {summary} is no run's summary; accepted: remove it to continue the run"
                    )
            if self.summary is None and not can_write(path):
                raise ConfigError(f"--workdir: {path} cannot be written; accepted: a directory you can write to")
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
            raise ConfigError(
                f"--workdir: {path} cannot be read ({error}); accepted: a new or empty directory"
            ) from error

    def take(self) -> None:
        """Make a run's directory this process's until ``close``; that of a new run is from ``open`` on.

        Raises:
          ConfigError: another process is using it.
        """
        if not self._is_new:
            self._lock.acquire()

    def restore(self) -> tuple[Checkpoint | None, dict[int, str]]:
        """The last whole checkpoint, and what is wrong with newer ones; ``metrics.jsonl`` is as it was then.

        Only what has been written since without a further round, of fine-tuning, stays.

        Raises:
          ConfigError: none of the checkpoints is whole.
          OSError: see ``checkpoint.load``; the directory cannot be written.
        """
        if self._is_new:
            return None, {}
        found, faults = checkpoint.load(self._checkpoints)
        if faults and not found:
            raise ConfigError(
                f"--workdir: no checkpoint in {self._checkpoints} is whole ({_listed(faults)}); accepted: one put "
                "back from a copy, or the folder removed to begin the run again"
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

    def open(self, lanes: int, devices: int) -> None:
        """Make the directory and write ``config.json``; a run that continues keeps its own, but for what is given.

        Raises:
          ConfigError: the directory cannot be written, or another process has taken it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            file = self.path / "config.json"
            if self._is_new and file.exists():
                raise self._lock.in_use()
            entries = (
                json.loads(file.read_text())
                if file.exists()
                else {
                    "config": to_dict(self._config),
                    "config_file": self._code,
                    "command": self._command,
                    "device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}",
                    "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
                    | {"python": platform.python_version()},
                }
            )
            self.write_json("config.json", entries | {"lanes": lanes, "devices": devices})
        except OSError as error:
            raise ConfigError(
                f"--workdir: {self.path} cannot be written ({error.strerror}); accepted: a directory you can write to"
            ) from error

    def close(self) -> None:
        """Let other processes use the directory."""
        self._lock.release()

    def save(self, rounds: int, state: Tree, always_kept: Collection[int]) -> None:
        """See ``checkpoint.save``; lines of a later round, which was given up, are left out."""
        with self.writing(f"checkpoint {rounds}"):
            file = self.path / METRICS
            lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
            metrics = b"".join(line for line in lines if (content := whole_line(line)) and content["round"] <= rounds)
            checkpoint.save(self._checkpoints, rounds, state, metrics, always_kept)

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line to ``metrics.jsonl``."""
        with self.writing(METRICS), (self.path / METRICS).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All complete lines of ``metrics.jsonl``, in order; ``schema.MetricsLine`` has their fields."""
        return read_lines(self.path)

    def save_encoder(self, files: dict[str, bytes]) -> None:
        """What ``export.encoder_files`` gives."""
        for name, content in files.items():
            self._write(name, content)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file whole or not at all."""
        self._write(name, f"{json.dumps(content, indent=1)}\n".encode())

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def _write(self, name: str, content: bytes) -> None:
        with self.writing(name):
            write_whole(self.path / name, content)

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Names what cannot be written, and where, in an OSError raised within."""
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"--workdir: {what} cannot be written in {self.path} ({error.strerror or error}); what was saved "
                "before is whole, and the same command continues from it",
            ) from error

    def _check_same_run(self) -> None:
        file = self.path / "config.json"
        if not file.is_file():
            raise ConfigError(f"--workdir: {self.path} holds files but no run; accepted: a new or empty directory")
        content = json.loads(file.read_text())
        if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
            raise ConfigError(f"--workdir: {self.path} holds files but no run; accepted: a new or empty directory")
        if content.get("config_file", "") != self._code:
            raise ConfigError(
                f"--workdir: {self.path} holds the run of another config file, or of this one before it was changed; "
                "accepted: the file as it was, or another directory"
            )
        old, new = (flat(to_dict(config)) for config in (from_dict(content["config"]), self._config))
        for name, value in new.items():
            if old[name] != value and name not in INERT_FIELDS:
                raise ConfigError(
                    f"--workdir: {self.path} holds another config's run: {name} is {old[name]!r} there, "
                    f"{value!r} here; accepted: the same config, or another directory"
                )


def _listed(faults: dict[int, str]) -> str:
    return "; ".join(f"{rounds}: {why}" for rounds, why in faults.items())


def default_workdir(name: str, config: Config, code: str = "") -> Path:
    """``runs/CONFIG-HASH``: another seed or override is another directory, the same command the same one."""
    stem = Path(name).with_suffix("").name if name.endswith(".py") else name
    return Path("runs") / f"{stem}-{digest(config, code)}"
