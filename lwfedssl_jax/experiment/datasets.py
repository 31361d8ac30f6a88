"""The data sets on which a run's encoder is evaluated, and the fingerprint of all data of a run."""

import functools
import hashlib
from typing import NamedTuple

from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.data import sources
from lwfedssl_jax.data.fingerprint import fingerprint
from lwfedssl_jax.data.sources import Dataset
from lwfedssl_jax.evaluation import frozen
from lwfedssl_jax.evaluation.membership import check_membership
from lwfedssl_jax.simulation.events import Hear, Loading, Note
from lwfedssl_jax.simulation.setup import Cache, load_data
from lwfedssl_jax.system.devices import from_all


class RunData(NamedTuple):
    """What a run is evaluated on.

    Attributes:
      evaluated_on: data sets by name, the clients' own as ""; images for training are those whose labels are used
        (``evaluation.labelled_split``).
      fingerprint: of the clients' data set (``fingerprint``), and of each of ``evaluation.data`` by its name.
    """

    evaluated_on: dict[str, Dataset]
    fingerprint: dict[str, str]


def load_run_data(config: Config, hear: Hear, cache: Cache) -> RunData:
    """Load the clients' data set and those of ``evaluation.data``, and check that they allow the protocols.

    Raises:
      ConfigError: one cannot be found or used, or does not allow the protocols; processes of one run found different
        data.
    """
    own, data = load_data(config.data, hear, cache)
    evaluated_on, digests = {"": own}, dict(data)
    for number, name in enumerate(config.evaluation.data):
        load = functools.partial(_load_further, config, name, hear)
        key = config.data, name
        evaluated_on[name], found = cache.get_latest(f"evaluation data {number}", key, load)
        if found in (as_text(data), *digests.values()):
            raise ConfigError(f"evaluation.data: {name!r} has the images and labels of another one; accepted: others")
        digests[name] = found
    together = hashlib.sha256(repr(sorted(digests.items())).encode()).digest()
    if len(set(from_all(int.from_bytes(together[:7], "big")))) > 1:
        raise ConfigError(
            "data.name: the processes of this run found different data; accepted: the same on all machines"
        )
    check_membership(config, own)
    allowed = {name: _labelled(config, name, dataset) for name, dataset in evaluated_on.items()}
    return RunData(allowed, digests)


def _load_further(config: Config, name: str, hear: Hear) -> tuple[Dataset, str]:
    """Load one of ``evaluation.data``; return it and its fingerprint as one text."""
    try:
        dataset = sources.load_like(config.data, name, lambda s: hear(Loading(s)), lambda text: hear(Note(text)))
    except ConfigError as error:
        raise ConfigError(f"evaluation.data: {str(error).removeprefix('data.name: ')}") from error
    return dataset, as_text(fingerprint(dataset))


def as_text(data: dict[str, str]) -> str:
    """Return a fingerprint as one text."""
    return " ".join(f"{part} {digest}" for part, digest in data.items())


def _labelled(config: Config, name: str, dataset: Dataset) -> Dataset:
    """Return a data set with the labelled images that the protocols use as those for training.

    Raises:
      ConfigError: the data set does not allow the protocols (``frozen.check_protocols``), or lacks the split; naming
        the data set, if it is one of ``evaluation.data``.
    """
    try:
        dataset = sources.with_labels_of(dataset, config.evaluation.labelled_split)
        frozen.check_protocols(config.evaluation, dataset)
    except ConfigError as error:
        where = f"evaluation.data: {name!r}" if name else f"data.name: {config.data.name!r}"
        raise ConfigError(f"{where}: {error}" if name or "labelled_split" in str(error) else str(error)) from error
    if name and not len(dataset.labelled):
        raise ConfigError(f"evaluation.data: {name!r} has no labelled images; accepted: data sets with labels")
    return dataset
