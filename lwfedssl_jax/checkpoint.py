"""The work directory: the config it belongs to, metrics by line, checkpoints, the trained encoder."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import jax

from lwfedssl_jax.config import Config, ConfigError, to_dict
from lwfedssl_jax.devices import can_hold
from lwfedssl_jax.tree import Tree

KEPT_CHECKPOINTS = 3
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn", "lwfedssl_jax")


class WorkDir:
    """A directory that holds one run.

    ``WorkDir(path, config, code)`` only looks; nothing is written before ``open``. ``code`` stands for the text of
    the user's own config file, if there is one: it may hold more than the config.

    Attributes:
      path: the directory.
      summary: the finished run's summary, or None.

    Raises:
      ConfigError: the directory holds another config's run or other files, or cannot be read.
    """

    def __init__(self, path: Path, config: Config, code: str = "") -> None:
        self.path = path
        self.summary: dict[str, Any] | None = None
        self._config, self._code = config, code
        try:
            if path.exists() and not path.is_dir():
                raise ConfigError(
                    f"--workdir: {path} is not a directory; accepted: a new or empty directory, or a run's"
                )
            if path.is_dir() and any(path.iterdir()):
                self._check_same_run()
                summary = path / "summary.json"
                self.summary = json.loads(summary.read_text()) if summary.is_file() else None
                if summary.is_file() and "strategies" not in (self.summary or {}):
                    raise ConfigError(
                        f"--workdir: {summary} is no run's summary; accepted: remove it to continue the run"
                    )
            if self.summary is None and not can_hold(path):
                raise ConfigError(f"--workdir: {path} cannot be written; accepted: a directory you can write to")
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(
                f"--workdir: {path} cannot be read ({error}); accepted: a new or empty directory"
            ) from error

    def open(self, lanes: int, devices: int) -> None:
        """Make the directory and write ``config.json``; a run that continues keeps its own, but for what is given.

        Raises:
          ConfigError: the directory cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = self.path / "config.json"
            entries = (
                json.loads(file.read_text())
                if file.exists()
                else {
                    "config": to_dict(self._config),
                    "config_file": self._code,
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

    def restore(self) -> tuple[int, Tree] | None:
        """``(finished rounds, what was saved)`` of the last checkpoint; later metrics lines are dropped.

        Raises:
          ConfigError: the checkpoint cannot be read.
        """
        import orbax.checkpoint as ocp

        rounds = None
        if (self.path / "checkpoints").is_dir():
            with self._manager() as manager:
                rounds = manager.latest_step()
                if rounds is not None:
                    try:
                        saved = manager.restore(rounds, args=ocp.args.StandardRestore())
                    except Exception as error:  # orbax raises many kinds; all mean that it cannot be used
                        raise ConfigError(
                            f"--workdir: checkpoint {rounds} in {self.path} cannot be read ({type(error).__name__}); "
                            f"accepted: a whole checkpoint (remove checkpoints/{rounds} to continue before it)"
                        ) from error
        kept = [line for line in self.metrics() if rounds is not None and line["round"] <= rounds]
        if (self.path / "metrics.jsonl").exists():
            self._replace("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        return None if rounds is None else (rounds, saved)

    def save(self, rounds: int, state: Tree) -> None:
        """Checkpoint dicts and lists of arrays after so many rounds; the last ``KEPT_CHECKPOINTS`` are kept."""
        import orbax.checkpoint as ocp

        with self._manager() as manager:
            if manager.latest_step() != rounds:
                manager.save(rounds, args=ocp.args.StandardSave(jax.device_get(state)))

    def append(self, line: dict[str, Any]) -> None:
        """Add a line to ``metrics.jsonl``."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines of ``metrics.jsonl``, in order; an interrupted last line is left out."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def save_encoder(self, files: dict[str, bytes]) -> None:
        """What ``export.encoder_files`` gives."""
        for name, content in files.items():
            self._replace(name, content)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file whole or not at all."""
        self._replace(name, json.dumps(content, indent=1) + "\n")

    def _replace(self, name: str, content: str | bytes) -> None:
        temporary = self.path / f".{name}.new"
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(self.path / name)

    def _manager(self) -> Any:
        import orbax.checkpoint as ocp

        folder = (self.path / "checkpoints").absolute()
        folder.mkdir(exist_ok=True)
        return ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=KEPT_CHECKPOINTS,
                create=False,
                # Of several processes the first saves for all.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    active_processes={0}, barrier_sync_key_prefix="first"
                )
                if jax.process_count() > 1
                else ocp.options.MultiprocessingOptions(),
            ),
        )

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
        old, new = content["config"], to_dict(self._config)
        for section in new:
            for name, value in new[section].items():
                before = old.get(section, {}).get(name)
                if before != value:
                    raise ConfigError(
                        f"--workdir: {self.path} holds another config's run: {section}.{name} is {before!r} there, "
                        f"{value!r} here; accepted: the same config, or another directory"
                    )
