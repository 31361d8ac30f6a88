"""The clients of a plan: how many images each has, and the class of its device."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lwfedssl_jax.analysis.wording import count_of, round_percent
from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.costs import fleet
from lwfedssl_jax.data import sources, tfds
from lwfedssl_jax.data.cache import Notify
from lwfedssl_jax.data.partition import partition
from lwfedssl_jax.method.task import make_task
from lwfedssl_jax.simulation.events import ignore
from lwfedssl_jax.simulation.setup import hear_short_batches

QUANTILE_CLIENTS = 1000  # clients of each class that stand for a distribution of sizes
SHOWN_QUANTILES = (0.1, 0.5, 0.9)
FORM = "a whole number of at least 1, or quantiles such as p10=200 p50=600 p90=3000"


class Clients(NamedTuple):
    """Clients, or in place of those that are not known, some that stand for them.

    Attributes:
      sizes: N, how many images each trains on.
      classes: N, the class of each, as an index.
      weights: N, how many clients of the run each stands for.
      dealt: whether these are the clients of a run with this config, dealt as ``train`` deals them.
      given: ``--examples`` in words, or an empty string.
    """

    sizes: np.ndarray
    classes: np.ndarray
    weights: np.ndarray
    dealt: bool
    given: str = ""

    @property
    def number(self) -> float:
        """Number of clients of the run."""
        return float(self.weights.sum())

    @property
    def mean(self) -> float:
        """Images per client."""
        return float(np.average(self.sizes, weights=self.weights))

    @property
    def quantiles(self) -> dict[str, float]:
        """Quantiles of the images per client; without dealt clients those that ``--examples`` gives."""
        if self.given:
            given = parse_examples(self.given.split())
            at = sorted(given)
            return {name_quantile(q): float(np.interp(q, at, [given[x] for x in at])) for q in SHOWN_QUANTILES}
        order = np.argsort(self.sizes)
        shares = (np.cumsum(self.weights[order]) - self.weights[order] / 2) / self.number
        return {name_quantile(q): float(np.interp(q, shares, self.sizes[order])) for q in SHOWN_QUANTILES}

    @property
    def words(self) -> str:
        """The images per client in words, such as "144 images per client (103 to 190)"."""
        low, high = self.sizes.min(), self.sizes.max()
        return f"{self.mean:,.0f} images per client" + (f" ({low:,.0f} to {high:,.0f})" if low != high else "")


class Left(NamedTuple):
    """Whom a stage leaves out: a number of clients, the share of them, and the share of all images that they have."""

    clients: float
    share: float
    images: float


def name_quantile(share: float) -> str:
    """Name a quantile as ``--examples`` does, such as "p10"."""
    return f"p{100 * share:.0f}"


def make_clients(config: Config, devices: Sequence[DeviceClass], given: Sequence[str], notify: Notify) -> Clients:
    """Make the clients of a plan: as ``--examples`` says or, without it, as ``train`` deals them.

    Args:
      config: resolved, with the fleet.
      devices: its classes.
      given: the words of ``--examples``, if any.
      notify: called with the progress of reading the data.

    Raises:
      ConfigError: ``--examples`` is not valid, or is missing and the data set is not on this machine.
    """
    if not given:
        sizes = dealt_sizes(config, notify)
        return Clients(sizes, fleet.deal(devices, len(sizes), config.partition_seed), np.ones(len(sizes)), True)
    sizes = sizes_of(parse_examples(given))
    counts = np.array([device.count for device in devices], float)
    each = config.partition.clients * counts / counts.sum() / len(sizes)
    classes = np.repeat(np.arange(len(devices)), len(sizes))
    return Clients(np.tile(sizes, len(devices)), classes, each[classes], False, " ".join(given))


def dealt_sizes(config: Config, notify: Notify) -> np.ndarray:
    """Return how many images each client of a run trains on; 0 if the objective learns nothing from so few.

    Raises:
      ConfigError: the data set is not on this machine, or no client has enough images.
    """
    name = config.data.name
    if name.startswith("tfds:") and not tfds.is_prepared(name.removeprefix("tfds:"), notify):
        raise missing(config, "it is not prepared on this machine")
    try:
        dataset = sources.find(config.data).load(config.data, notify)
    except ConfigError as error:
        raise missing(config, str(error)) from None
    clients = partition(config.partition, dataset.train_labels, config.partition_seed, dataset.train_clients)
    fewest = make_task(config).objective.fewest
    hear_short_batches(config, clients.sizes, fewest, ignore)
    return np.where(clients.sizes >= fewest, clients.sizes, 0)


def missing(config: Config, why: str) -> ConfigError:
    """Make the error for clients whose sizes cannot be known."""
    return ConfigError(
        f"--examples: missing, and the images of each client are not known: data.name {config.data.name}: {why}; "
        f"accepted: {FORM}"
    )


def parse_examples(given: Sequence[str]) -> dict[float, float]:
    """Parse ``--examples``: a number, or quantiles.

    Returns:
      Images per client by the share of clients that have at most as many; for a single number, by 0.5.

    Raises:
      ConfigError: it is neither, or larger quantiles are smaller numbers.
    """
    words, found = " ".join(given).split(), dict[float, float]()
    for word in words:
        quantile = re.fullmatch(r"p(\d{1,2}|100)=(\d{1,12})", word)
        if re.fullmatch(r"\d{1,12}", word) and len(words) == 1:
            found[0.5] = float(word)
        elif quantile and int(quantile[1]) / 100 not in found:
            found[int(quantile[1]) / 100] = float(quantile[2])
        else:
            raise ConfigError(f"--examples: {' '.join(words)!r} is not valid at {word!r}; accepted: {FORM}")
    in_order = [found[share] for share in sorted(found)]
    if in_order != sorted(in_order):
        raise ConfigError(f"--examples: {' '.join(words)!r} falls; accepted: numbers that grow with the quantile")
    if not in_order or in_order[0] < 1:
        raise ConfigError(f"--examples: {' '.join(words)!r} is out of range; accepted: {FORM}")
    return found


def sizes_of(quantiles: dict[float, float]) -> np.ndarray:
    """Return sizes that stand for a distribution: linear between its quantiles, and constant beyond the outer ones."""
    if len(quantiles) == 1:
        return np.array([*quantiles.values()])
    shares = sorted(quantiles)
    at = (np.arange(QUANTILE_CLIENTS) + 0.5) / QUANTILE_CLIENTS
    return np.round(np.interp(at, shares, [quantiles[share] for share in shares]))


def members(clients: Clients, number: int) -> np.ndarray:
    """Return the sizes of a class's clients that have images; those of all clients if it has none."""
    has_images = clients.sizes > 0
    own = clients.sizes[(clients.classes == number) & has_images]
    return own if len(own) else clients.sizes[has_images]


def left_out(clients: Clients, can: np.ndarray) -> Left:
    """Return whom a stage leaves out in which ``can`` of the N clients can take part."""
    out = clients.weights * ~can
    images = clients.weights * clients.sizes
    return Left(
        float(out.sum()), float(out.sum()) / clients.number, float((images * ~can).sum() / max(images.sum(), 1))
    )


def left_words(stages: Sequence[Left], dealt: bool) -> str:
    """Describe whom the stages of an option leave out, in a sentence; neighbouring stages that are alike together."""
    parts, first = list[str](), 0
    for number in range(1, len(stages) + 1):
        if number < len(stages) and stages[number] == stages[first]:
            continue
        which = f"stage {number}" if number == first + 1 else f"stages {first + 1} to {number}"
        parts.append(f"{which}: {_left(stages[first], dealt)}")
        first = number
    return "; ".join(parts)


def _left(left: Left, dealt: bool) -> str:
    if not left.clients:
        return "none"
    who = count_of(round(left.clients), "client") if dealt else f"about {round_percent(left.share)} of the clients"
    return f"{who} with {round_percent(left.images)} of the images"


def to_plain(clients: Clients) -> dict[str, Any]:
    """Return the clients as plain data for JSON."""
    return {
        "number": clients.number,
        "dealt_as_train_deals_them": clients.dealt,
        "mean_examples": clients.mean,
        "examples_quantiles": clients.quantiles,
    }
