"""The JSON files of a work directory as types; each type is defined where it is produced."""

from typing import Any, NotRequired, TypedDict

from lwfedssl_jax.costs.ledger import Ledger
from lwfedssl_jax.costs.privacy import Promise
from lwfedssl_jax.evaluation.finetune import FineTuneResult
from lwfedssl_jax.evaluation.frozen import EvaluationLine, KnnResult, ProbeResult, Scores
from lwfedssl_jax.evaluation.label_free import LabelFree, LabelFreeLine
from lwfedssl_jax.evaluation.membership import Membership
from lwfedssl_jax.simulation.lines import RoundLine

__all__ = [
    "EvaluationLine", "FineTuneResult", "KnnResult", "LabelFree", "LabelFreeLine", "Ledger", "MeasuredCost",
    "Membership", "MetricsLine", "ProbeResult", "Promise", "RoundLine", "Scores", "Summary",
]  # fmt: skip

MetricsLine = RoundLine | EvaluationLine | LabelFreeLine


class MeasuredCost(TypedDict):
    """The costs of a run, as measured.

    Attributes:
      download_bytes, upload_bytes, seconds: of all clients in all rounds.
      rounds_per_stage: how many rounds each stage had.
      flops_executed: with depth dropout, multiply-adds per sample, as in the ledger.
      clients: in the population.
      scope: the above in words.
    """

    download_bytes: int
    upload_bytes: int
    seconds: float
    rounds_per_stage: list[int]
    flops_executed: NotRequired[int]
    clients: int
    scope: str


class Summary(TypedDict):
    """The content of ``summary.json``.

    Attributes:
      strategy, objective: their names.
      rounds: number of rounds.
      seconds: time of the rounds.
      evaluation: the trained encoder's results by protocol, which have the fields of ``ProbeResult``, ``KnnResult`` or
        ``FineTuneResult``; empty if no image has a label.
      transfer: the same on each data set of ``evaluation.data``, by its name.
      label_free: metrics that need no labels, of the ``trained`` and of the ``untrained`` encoder, with noise also of
        ``noise_only``.
      baselines: results by protocol, on ``evaluation.data`` by ``PROTOCOL@NAME``: ``untrained``, with fine-tuning
        ``scratch``, and with noise ``noise_only``, an encoder with all the noise and no client's training.
      resources: the ledger of the run's strategy, with adaptive pacing with the rounds that its stages had; and
        ``measured``, a ``MeasuredCost``.
      strategies: the ledger of every strategy that can run with the config, by name.
      membership: with ``evaluation.membership``, how well clients' images are told from test images by the features of
        the ``trained`` and of the ``untrained`` encoder.
      privacy: with a clip, what the run promises (``costs.privacy.Promise``).
      fleet: with ``fleet.devices``, one entry per device class (``costs.fleet.summary``).
    """

    strategy: str
    objective: str
    rounds: int
    seconds: float
    evaluation: dict[str, Scores]
    transfer: dict[str, dict[str, Scores]]
    label_free: dict[str, LabelFree]
    baselines: dict[str, dict[str, Scores]]
    resources: dict[str, Any]
    strategies: dict[str, Ledger]
    membership: NotRequired[dict[str, Membership]]
    privacy: NotRequired[Promise]
    fleet: NotRequired[list[dict[str, Any]]]
