"""Sweeps: a grid of configs and seeds from one file, and the directory that its runs share."""

import collections
import dataclasses
import difflib
import hashlib
import itertools
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
    digest,
    load,
    override,
    resolve,
    run_file,
)
from lwfedssl_jax.data.views import RECIPES
from lwfedssl_jax.experiment.checks import check
from lwfedssl_jax.method.aggregation import AGGREGATORS
from lwfedssl_jax.method.objectives import OBJECTIVES
from lwfedssl_jax.method.stages import STRATEGIES
from lwfedssl_jax.method.terms import TERMS
from lwfedssl_jax.models import ARCHITECTURES

LONGEST_NAME = 80
TABLES: tuple[dict[str, Any], ...] = (TERMS, AGGREGATORS, OBJECTIVES, STRATEGIES, MODELS, ARCHITECTURES, RECIPES)


@dataclass(frozen=True)
class Sweep:
    """Runs around one config: each of ``runs`` x each row of ``zip`` x each combination of ``product`` x each seed.

    Fields are named as on the command line, ``{"section.field": values}``.

    Attributes:
      base: what all runs have in common: a config, or its name or file.
      product: each field's values, all combined.
      zip: fields that change together: the first values, the second ones, and so on.
      runs: whole settings, one by one.
      seeds: of each setting; averages and differences are over them.
    """

    base: str | Config = "quickstart"
    product: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    zip: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    runs: Sequence[Mapping[str, Any]] = ({},)
    seeds: Sequence[int] = (0,)


class SweepRun(NamedTuple):
    """One run of a sweep.

    Attributes:
      directory: of its work directory, below the sweep's.
      label: its setting, without the seed.
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
    """A sweep as its file has it.

    Attributes:
      name: as `sweep` takes it; of a user's own file, its name without folder and `.py`.
      about: the first line of its docstring.
      source: its text.
      runs: see ``runs_of``.
    """

    name: str
    about: str
    source: str
    runs: list[SweepRun]


def load_sweep(name: str, config_dir: Path = CONFIG_DIR) -> SweepFile:
    """The sweep in ``config_dir/sweeps/NAME.py``, or in a Python file.

    Raises:
      ConfigError: no such sweep, the file does not run, it defines no ``sweep``, or one of its runs is not valid.
    """
    folder, named = config_dir / SWEEPS, name.removeprefix(f"{SWEEPS}/")
    known = [path.relative_to(folder).with_suffix("").as_posix() for path in sorted(folder.rglob("*.py"))]
    own = name.endswith(".py")
    path = Path(name) if own else folder / f"{named}.py"
    if not os.path.isfile(path) or not (own or named in known):
        names = ", ".join(difflib.get_close_matches(name, known) or known)
        raise ConfigError(f"SWEEP: no sweep {name!r}; accepted: a path to a .py file, or one of {names}")
    before = [dict(table) for table in TABLES]
    form = ", ".join(f"{f.name}=..." for f in dataclasses.fields(Sweep))
    module = run_file(path, "SWEEP", f"sweep = Sweep({form})")
    sweep = getattr(module, "sweep", None)
    if not isinstance(sweep, Sweep):
        found = f"found {type(sweep).__name__}; accepted: `sweep = Sweep(...)`"
        raise ConfigError(f"SWEEP: {path} defines no sweep, {found}")
    about = (module.__doc__ or "").strip().split("\n")[0]
    # A file that adds entries to the tables holds more than the configs of its runs.
    code = path.read_bytes() if before != [dict(table) for table in TABLES] else b""
    return SweepFile(path.stem if own else named, about, path.read_text(), runs_of(sweep, code))


def runs_of(sweep: Sweep, code: bytes = b"") -> list[SweepRun]:
    """All runs, those of a setting together; each has been checked as far as it can be without data.

    Args:
      sweep: what they are.
      code: text that they depend on besides their configs (and the base's own file, if it has one).

    Raises:
      ConfigError: an axis that is not as it should be, a run that is not valid, or two that are the same.
    """
    if not isinstance(sweep.base, str | Config):
        raise ConfigError(f"SWEEP: base: {sweep.base!r} is not valid; accepted: a config, or its name or file")
    try:
        base = load(sweep.base) if isinstance(sweep.base, str) else sweep.base
    except ConfigError as error:
        raise ConfigError(f"SWEEP: base: {str(error).removeprefix('CONFIG: ')}") from None
    own_file = isinstance(sweep.base, str) and sweep.base.endswith(".py")
    code += Path(str(sweep.base)).read_bytes() if own_file else b""
    digest_of_code = hashlib.sha256(code).hexdigest() if code else ""
    settings = list(settings_of(sweep))
    varied = [f for f in dict.fromkeys(itertools.chain(*settings)) if len({repr(s.get(f)) for s in settings}) > 1]
    runs: list[SweepRun] = []
    for setting, seed in itertools.product(settings, sweep.seeds):
        label = ", ".join(words(f, setting[f]) for f in varied if f in setting) or "base"
        try:
            config = resolve(override(base, {**setting, "runtime.seed": seed}))
            check(config)
        except ConfigError as error:
            raise ConfigError(f"SWEEP: run {label!r}, seed {seed}: {error}") from error
        slug = re.sub(r"[^a-zA-Z0-9.=]+", "_", label)[:LONGEST_NAME]
        place = f"runs/{slug}-seed{seed}-{digest(config, digest_of_code)}"
        runs.append(SweepRun(place, label, dict(setting), seed, config, digest_of_code))
    for i, run in enumerate(runs):
        if same := [other for other in runs[:i] if other.config == run.config]:
            raise ConfigError(
                f"SWEEP: runs {same[0].label!r} and {run.label!r}, seed {run.seed}, are the same; "
                "accepted: each run once"
            )
    return runs


def settings_of(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """The overrides of each setting, without seeds."""
    for name in ("product", "zip"):
        if not isinstance(value := getattr(sweep, name), Mapping):
            raise ConfigError(f"SWEEP: {name}: {value!r} is not valid; accepted: {{'section.field': [values]}}")
    if not isinstance(sweep.runs, list | tuple) or not all(isinstance(run, Mapping) for run in sweep.runs):
        raise ConfigError(f"SWEEP: runs: {sweep.runs!r} is not valid; accepted: a list of {{'section.field': value}}")
    if not isinstance(sweep.seeds, Sequence) or not all(type(seed) is int for seed in sweep.seeds):
        raise ConfigError(f"SWEEP: seeds: {sweep.seeds!r} is not valid; accepted: a list of whole numbers")
    axes = {**sweep.product, **sweep.zip}
    if unnamed := [name for name in itertools.chain(axes, *sweep.runs) if not isinstance(name, str)]:
        raise ConfigError(f"SWEEP: {unnamed[0]!r} is no field; accepted: 'section.field'")
    for name, values in axes.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigError(f"SWEEP: {name}: {values!r} is no axis; accepted: a list of at least one value")
    for name in ("runs", "seeds"):
        if not getattr(sweep, name):
            raise ConfigError(f"SWEEP: {name}: it is empty; accepted: at least one entry, or leave it out")
    for name, values in {**sweep.product, "seeds": sweep.seeds}.items():
        (value, count), *_ = collections.Counter(map(repr, values)).most_common(1)
        if count > 1:
            raise ConfigError(f"SWEEP: {name}: {value} appears twice; accepted: each value once")
    for name in [*axes, *itertools.chain(*sweep.runs)]:
        if name == "runtime.seed":
            raise ConfigError("SWEEP: runtime.seed is an axis of its own; accepted: Sweep(seeds=(0, 1, 2))")
        if name in sweep.product and (name in sweep.zip or any(name in run for run in sweep.runs)):
            raise ConfigError(f"SWEEP: {name} is on two axes; accepted: each field in one of product, zip and runs")
    if len(lengths := {name: len(values) for name, values in sweep.zip.items()}) and len(set(lengths.values())) > 1:
        raise ConfigError(f"SWEEP: zip: its fields have unlike numbers of values ({lengths}); accepted: equally many")
    rows = [dict(zip(sweep.zip, row, strict=True)) for row in zip(*sweep.zip.values(), strict=True)] or [{}]
    combined = [dict(zip(sweep.product, values, strict=True)) for values in itertools.product(*sweep.product.values())]
    for own, row, values in itertools.product(sweep.runs, rows, combined):
        yield {**own, **row, **values}


def words(name: str, value: Any) -> str:
    """A field and its value as a person would say it: names stand for themselves."""
    shown = " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    plain = name.rpartition(".")[2].replace("_", " ")
    return shown if plain == "name" else f"{plain} {shown or 'none'}"
