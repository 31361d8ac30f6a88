"""Sweeps: a grid of configs and seeds from one file."""

import collections
import dataclasses
import difflib
import hashlib
import itertools
import operator
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lwfedssl_jax.config import (
    CONFIG_DIR,
    MODELS,
    SWEEPS,
    Config,
    ConfigError,
    code_of,
    digest,
    load,
    override,
    resolve,
    run_file,
)
from lwfedssl_jax.costs.traffic import client_bytes
from lwfedssl_jax.data.views import RECIPES
from lwfedssl_jax.experiment.checks import check
from lwfedssl_jax.method.aggregation import AGGREGATORS
from lwfedssl_jax.method.objectives import OBJECTIVES
from lwfedssl_jax.method.stages import STRATEGIES
from lwfedssl_jax.method.terms import TERMS
from lwfedssl_jax.models import ARCHITECTURES
from lwfedssl_jax.system.files import with_home

LONGEST_SLUG = 80  # largest number of characters of a setting in a directory's name
SCHEDULE = ("strategy.rounds_per_stage", "strategy.first_stage_share", "strategy.pacing")
NEEDS_STAGES: dict[str, Any] = {"strategy.rounds_per_stage": (), "additions.depth_dropout": 0.0}  # off where one stage
TABLES: tuple[dict[str, Any], ...] = (TERMS, AGGREGATORS, OBJECTIVES, STRATEGIES, MODELS, ARCHITECTURES, RECIPES)


@dataclass(frozen=True)
class Sweep:
    """Runs around one config: each of ``runs`` x each row of ``zip`` x each combination of ``product`` x each seed.

    Fields are named as on the command line, ``{"section.field": values}``.

    Attributes:
      base: the config that every run starts from, or its name or file.
      product: the values of each field, all combined.
      zip: fields that change together: the first values, the second ones, and so on.
      runs: individual settings.
      seeds: of each setting; means and differences are taken over them.
      shallow_control: whether to train, for each setting of the strategy layerwise, also an encoder that has only the
        layers of its first stage, end to end: for as many rounds, and for as many as have the same traffic.
    """

    base: str | Config = "quickstart"
    product: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    zip: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    runs: Sequence[Mapping[str, Any]] = ({},)
    seeds: Sequence[int] = (0,)
    shallow_control: bool = False


class SweepRun(NamedTuple):
    """One run of a sweep.

    Attributes:
      directory: its work directory, relative to the sweep's directory.
      label: its setting in words, without the seed.
      overrides: of the base config, without the seed.
      seed: ``runtime.seed``.
      config: resolved.
      code: see ``WorkDir``.
    """

    directory: str
    label: str
    overrides: dict[str, Any]
    seed: int
    config: Config
    code: str


class SweepFile(NamedTuple):
    """A sweep as read from its file.

    Attributes:
      name: its name below ``configs/sweeps``, such as ``paper/beta``; for a user's own file, the file's name without
        folder and ``.py``.
      base: name or file of the config that replaces the sweep's own base, or an empty string.
      about: the first line of the file's docstring.
      source: the file's text.
      runs: see ``make_runs``.
    """

    name: str
    base: str
    about: str
    source: str
    runs: list[SweepRun]

    @property
    def default_directory(self) -> Path:
        """Where the sweep is stored unless the user names a directory."""
        base = f"-{Path(self.base.removesuffix('.py')).name}" if self.base else ""
        return Path("runs") / "sweeps" / f"{self.name}{base}"


def load_sweep(name: str, config_dir: Path = CONFIG_DIR, base: str = "") -> SweepFile:
    """Load the sweep ``config_dir/sweeps/NAME.py``, or that of a Python file.

    Args:
      name: of the sweep, or its file.
      config_dir: that ``sweeps`` is in.
      base: name or file of a config that replaces the sweep's own base.

    Raises:
      ConfigError: there is no such sweep, the file does not run or defines no ``sweep``, or a run is not valid.
    """
    path, name = find_sweep(name, config_dir)
    tables = [dict(table) for table in TABLES]
    form = ", ".join(f"{f.name}=..." for f in dataclasses.fields(Sweep))
    module = run_file(path, "SWEEP", f"sweep = Sweep({form})")
    sweep = getattr(module, "sweep", None)
    if not isinstance(sweep, Sweep):
        found = f"found {type(sweep).__name__}; accepted: `sweep = Sweep(...)`"
        raise ConfigError(f"SWEEP: {path} does not define `sweep`, {found}")
    if base:
        sweep = dataclasses.replace(sweep, base=base)
    about = (module.__doc__ or "").strip().split("\n")[0]
    # A file that adds entries to the tables contains more than the configs of its runs.
    code = code_of(str(path)) if tables != [dict(table) for table in TABLES] else b""
    return SweepFile(name, base, about, path.read_text(encoding="utf-8"), make_runs(sweep, code, path.parent))


def find_sweep(name: str, config_dir: Path) -> tuple[Path, str]:
    """Return the file of a sweep, and its name as in ``SweepFile``.

    Raises:
      ConfigError: there is no such file.
    """
    if name.endswith(".py") and os.path.isfile(with_home(name)):
        return with_home(name), Path(name).stem
    folder, short = config_dir / SWEEPS, name.removeprefix(f"{SWEEPS}/")
    sweeps = {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.py"))}
    if short not in sweeps:
        names = ", ".join(difflib.get_close_matches(name, sweeps) or sweeps)
        found = "is a config, not a sweep" if (config_dir / f"{name}.py").is_file() else "is not a sweep"
        raise ConfigError(f"SWEEP: {name!r} {found}; accepted: {names}, or the path of a .py file")
    return sweeps[short], short


def make_runs(sweep: Sweep, code: bytes = b"", folder: Path = Path()) -> list[SweepRun]:
    """Expand a sweep into its runs, those of a setting together, each checked as far as it can be without data.

    Args:
      sweep: the grid.
      code: text that the runs depend on in addition to their configs and the file of the base.
      folder: of the sweep's file, in which the file of the base is looked for first.

    Raises:
      ConfigError: an axis or a run is not valid, or two runs are the same.
    """
    sweep = in_python_numbers(sweep)
    base, base_code = load_base(sweep, folder)
    code_digest = hashlib.sha256(code + base_code).hexdigest() if code + base_code else ""
    settings = list(make_settings(sweep))
    if sweep.shallow_control:
        settings += shallow_controls(base, settings)
    fields = dict.fromkeys(itertools.chain(*settings))
    varied = [name for name in fields if len({repr(setting.get(name)) for setting in settings}) > 1]
    runs: list[SweepRun] = []
    for setting, seed in itertools.product(settings, sweep.seeds):
        label = ", ".join(field_text(name, setting[name]) for name in varied if name in setting) or "base"
        try:
            config = resolve(override(base, {**setting, "runtime.seed": seed}))
            check(config)
        except ConfigError as error:
            raise ConfigError(f"SWEEP: run {label!r}, seed {seed}: {error}") from error
        if same := [run for run in runs if run.config == config]:
            raise ConfigError(
                f"SWEEP: runs {same[0].label!r} and {label!r}, seed {seed}, are the same; accepted: different runs"
            )
        slug = re.sub(r"[^a-zA-Z0-9.=]+", "_", label)[:LONGEST_SLUG]
        directory = f"runs/{slug}-seed{seed}-{digest(config, code_digest)}"
        runs.append(SweepRun(directory, label, dict(setting), seed, config, code_digest))
    return runs


def in_python_numbers(sweep: Sweep) -> Sweep:
    """Return the sweep with NumPy's numbers and arrays replaced by Python's numbers and lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(entry) for name, entry in value.items()}
        value = value.tolist() if hasattr(value, "tolist") else value
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value

    parts = {name: plain(getattr(sweep, name)) for name in ("product", "zip", "runs", "seeds")}
    return dataclasses.replace(sweep, **parts)


def load_base(sweep: Sweep, folder: Path) -> tuple[Config, bytes]:
    """Return the config that a sweep starts from, and the text of its file if that is the user's own.

    Raises:
      ConfigError: the base is not a config, or cannot be loaded.
    """
    if isinstance(sweep.base, Config):
        return sweep.base, b""
    if not isinstance(sweep.base, str):
        raise ConfigError(f"SWEEP: base: {sweep.base!r} is not valid; accepted: a config, or its name or file")
    beside = folder / sweep.base
    name = str(beside) if sweep.base.endswith(".py") and beside.is_file() else sweep.base
    try:
        config = load(name)
    except ConfigError as error:
        raise ConfigError(f"SWEEP: base: {str(error).removeprefix('CONFIG: ')}") from None
    return config, code_of(name)


def make_settings(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Yield the overrides of each setting, without seeds.

    Raises:
      ConfigError: an axis is not valid.
    """
    check_types(sweep)
    check_axes(sweep)
    rows = [dict(zip(sweep.zip, row, strict=True)) for row in zip(*sweep.zip.values(), strict=True)] or [{}]
    combined = [dict(zip(sweep.product, values, strict=True)) for values in itertools.product(*sweep.product.values())]
    for own, row, values in itertools.product(sweep.runs, rows, combined):
        yield {**own, **row, **values}


def shallow_controls(base: Config, settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the settings that ``Sweep.shallow_control`` adds, each once.

    Raises:
      ConfigError: a setting is not valid.
    """
    controls: dict[Config, dict[str, Any]] = {}
    for setting in settings:
        config = resolve(override(base, setting))
        if config.strategy.name != "layerwise":
            continue
        layers = config.strategy.layers_per_stage
        control = {name: value for name, value in setting.items() if name not in SCHEDULE}
        control |= {"strategy.name": "end_to_end", "model.depth": layers}
        without = override(base, control)
        control |= {name: off for name, off in NEEDS_STAGES.items() if operator.attrgetter(name)(without) != off}
        rounds, shallow = config.federation.rounds, resolve(override(base, control))
        same_traffic = max(1, round(rounds * client_bytes(config) / client_bytes(shallow)))
        controls.setdefault(shallow, control)
        if same_traffic != rounds:
            control = control | {"federation.rounds": same_traffic}
            controls.setdefault(resolve(override(base, control)), control)
    return list(controls.values())


def check_types(sweep: Sweep) -> None:
    """Refuse fields of a sweep that are of the wrong type or empty.

    Raises:
      ConfigError: naming the field.
    """
    for name in ("product", "zip"):
        if not isinstance(value := getattr(sweep, name), Mapping):
            raise ConfigError(f"SWEEP: {name}: {value!r} is not valid; accepted: {{'section.field': [values]}}")
    if not isinstance(sweep.runs, list | tuple) or not all(isinstance(run, Mapping) for run in sweep.runs):
        raise ConfigError(f"SWEEP: runs: {sweep.runs!r} is not valid; accepted: a list of {{'section.field': value}}")
    if not isinstance(sweep.seeds, Sequence) or not all(type(seed) is int for seed in sweep.seeds):
        raise ConfigError(f"SWEEP: seeds: {sweep.seeds!r} is not valid; accepted: a list of whole numbers")
    axes = {**sweep.product, **sweep.zip}
    if unnamed := [name for name in itertools.chain(axes, *sweep.runs) if not isinstance(name, str)]:
        raise ConfigError(f"SWEEP: {unnamed[0]!r} is not a field; accepted: 'section.field'")
    for name, values in axes.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigError(f"SWEEP: {name}: {values!r} is not an axis; accepted: a list of at least one value")
    for name in ("runs", "seeds"):
        if not getattr(sweep, name):
            raise ConfigError(f"SWEEP: {name}: no entries; accepted: at least one entry, or leave it out")


def check_axes(sweep: Sweep) -> None:
    """Refuse axes that repeat a value or a field, or that do not fit together.

    Raises:
      ConfigError: naming the axis.
    """
    for name, values in {**sweep.product, "seeds": sweep.seeds}.items():
        (value, count), *_ = collections.Counter(map(repr, values)).most_common(1)
        if count > 1:
            raise ConfigError(f"SWEEP: {name}: {value} appears twice; accepted: each value once")
    for name in itertools.chain(sweep.product, sweep.zip, *sweep.runs):
        if name == "runtime.seed":
            raise ConfigError("SWEEP: runtime.seed is an axis of its own; accepted: Sweep(seeds=(0, 1, 2))")
        if name in sweep.product and (name in sweep.zip or any(name in run for run in sweep.runs)):
            raise ConfigError(f"SWEEP: {name} is on two axes; accepted: each field in one of product, zip and runs")
    lengths = {name: len(values) for name, values in sweep.zip.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"SWEEP: zip: fields must all have the same length, found {lengths}; accepted: one length")


def field_text(name: str, value: Any) -> str:
    """Return a field and its value in words: ``batch size 8``; the value alone for a field called ``name``."""
    shown = " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    plain = name.rpartition(".")[2].replace("_", " ")
    return shown if plain == "name" else f"{plain} {shown or 'none'}"
