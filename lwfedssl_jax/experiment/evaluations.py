"""Evaluates a run's encoder and writes each result as a line of ``metrics.jsonl``."""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lwfedssl_jax.config import Config
from lwfedssl_jax.config.protocols import FINE_TUNE, LABEL_FREE, NOISE_ONLY, protocol_on
from lwfedssl_jax.data.sources import Dataset
from lwfedssl_jax.evaluation import finetune, frozen, label_free
from lwfedssl_jax.evaluation.membership import Membership, members_and_others, membership
from lwfedssl_jax.experiment.active import ActiveRun
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.simulation.events import Described, Evaluated, FineTuning, Note
from lwfedssl_jax.simulation.setup import check_finite, initial_params
from lwfedssl_jax.system.devices import from_first
from lwfedssl_jax.system.interrupts import Interrupts
from lwfedssl_jax.tree import Tree


def log_evaluation(run: ActiveRun, depth: int, number: int, params: Tree, baseline: str = "") -> None:
    """Evaluate layers L1..L_depth and write a line per protocol; without labels, only the metrics that need none.

    Args:
      run: whose encoder it is.
      depth: how many layers are evaluated.
      number: of the round after which they are.
      params: the parameters.
      baseline: which encoder they are of, if it is not the run's own.

    Raises:
      FloatingPointError: a feature is not finite.
    """
    params = jax.device_get(params)  # on the mesh, every device would repeat the work
    of = {"baseline": baseline} if baseline else {}
    written = protocols_of(run, baseline) if baseline else set()
    if LABEL_FREE not in written:
        log_label_free(run, depth, number, params, of)
    for name, dataset in run.data.evaluated_on.items():
        if len(dataset.labelled) and (not name or _is_due(run.config, number)):
            features = _features(run, dataset, params, depth, number)
            for protocol, result in frozen.evaluate(run.config.evaluation, dataset, *features).items():
                on = protocol_on(protocol, name)
                if on not in written:
                    _write(run, {"round": number, **of, "depth": depth, "protocol": on, **result})


def protocols_of(run: ActiveRun, baseline: str) -> set[str]:
    """Return the protocols by which a baseline has been evaluated; "" is the untrained encoder."""
    lines = [line for line in _lines(run) if "event" in line and line.get("baseline", "") == baseline]
    return {line["protocol"] for line in lines if baseline or line["round"] == 0}


def lacks_noise_only(run: ActiveRun) -> bool:
    """Return whether the encoder of noise alone is to be evaluated as the untrained one was; alike in all processes."""
    lacking = run.workdir is not None and not protocols_of(run, "") <= protocols_of(run, NOISE_ONLY)
    return bool(from_first(np.array(lacking)))


def log_noise_only(run: ActiveRun, params: Tree) -> None:
    """Evaluate an encoder that has all of a run's noise and no client's training; if that fails, a note says so."""
    if not run.workdir:
        return
    try:
        log_evaluation(run, run.config.model.depth, run.config.federation.rounds, params, NOISE_ONLY)
    except FloatingPointError:
        run.hear(Note("the features of an encoder with the noise alone are not finite: it is not evaluated"))


def is_evaluated(stage: Stage, every: int, number: int) -> bool:
    """Return whether the encoder is evaluated after a round: a last one of a stage, or a multiple of ``every``."""
    return number == stage.last_round or bool(every and number % every == 0)


def _features(run: ActiveRun, dataset: Dataset, params: Tree, depth: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of all training images, of which only those are computed that a protocol uses, and of the test images.

    Raises:
      FloatingPointError: a feature is not finite.
    """
    used = frozen.used_images(run.config.evaluation, dataset)
    test_NxD = run.encode(params, dataset.test_images, depth)
    train_NxD = np.zeros((len(dataset.train_images), test_NxD.shape[1]), test_NxD.dtype)
    for first in range(0, len(used), frozen.BATCH):  # images may be mapped from a file that is larger than the memory
        rows = used[first : first + frozen.BATCH]
        train_NxD[rows] = run.encode(params, dataset.train_images[rows], depth)
    for x in (train_NxD, test_NxD):
        check_finite(run.config, "the encoder's features are not finite", number, x)
    return train_NxD, test_NxD


def _is_due(config: Config, number: int) -> bool:
    """Whether the encoder is evaluated on ``evaluation.data`` after a round."""
    return config.evaluation.data_when == "always" or number in (0, config.federation.rounds)


def log_label_free(run: ActiveRun, depth: int, number: int, params: Tree, of: Mapping[str, str]) -> None:
    """Write a line with the label-free metrics of layers L1..L_depth; a note says if the features have collapsed.

    Args:
      run, depth, number, params: as for ``log_evaluation``.
      of: the fields of a baseline's lines.

    Raises:
      FloatingPointError: a feature is not finite.
    """
    if not run.workdir:
        return
    x = np.stack([run.encode(params, images, depth) for images in run.images_with_views])
    check_finite(run.config, "the encoder's features are not finite", number, x)
    found = label_free.label_free(x)
    line = {"event": "evaluation", "round": number, **of, "depth": depth, "protocol": LABEL_FREE, **found}
    run.workdir.append(line)
    run.hear(Described(line))
    if number and not of and found["effective_rank"] < label_free.COLLAPSED:
        run.hear(
            Note(
                f"the encoder has collapsed after round {number}: its features have an effective rank of "
                f"{found['effective_rank']:.2f}; a lower optimizer.learning_rate or another objective may help"
            )
        )


def attack_membership(run: ActiveRun, encoders: Mapping[str, Tree]) -> dict[str, Membership]:
    """Tell the clients' images from test images by the features of encoders, whose parameters are given by name."""
    prepared, config = run.prepared, run.config
    images = members_and_others(config, prepared.dataset, prepared.clients)
    if len(images[0]) < config.evaluation.membership:
        run.hear(Note(f"membership inference: there are only {len(images[0])} images of clients, or test images"))
    found = {}
    for name, params in encoders.items():
        host = jax.device_get(params)
        features = functools.partial(run.encode, host, depth=config.model.depth)
        found[name] = membership(features, *images, prepared.task.recipe, config.runtime.seed)
        auc, error = found[name]["auc"], found[name]["auc_error"]
        run.hear(Note(f"membership inference, {name}: AUC {auc:.3f} ± {error:.3f} (chance 0.5)"))
    return found


def log_fine_tuning(run: ActiveRun, interrupts: Interrupts, params: Tree) -> None:
    """Fine-tune the trained encoder and, from scratch, the initial one; write a line for each that lacks one.

    Raises:
      FloatingPointError: the loss is not finite.
      KeyboardInterrupt: a signal arrived; checked at the start of each epoch.
    """
    config = run.config
    for name, labels in itertools.product(run.data.evaluated_on, config.evaluation.fine_tune_labels_per_class):
        protocol = protocol_on(f"{FINE_TUNE}_{labels}" if labels else FINE_TUNE, name)
        written = [line["round"] for line in _lines(run) if line.get("protocol") == protocol]
        if config.federation.rounds not in written:
            result = _fine_tune(run, interrupts, params, (name, labels), "")
            _write(run, {"round": config.federation.rounds, "protocol": protocol, **result})
        if 0 not in written:
            result = _fine_tune(run, interrupts, initial_params(run.prepared), (name, labels), "from scratch: ")
            _write(run, {"round": 0, "baseline": "scratch", "protocol": protocol, **result})


def _fine_tune(
    run: ActiveRun, interrupts: Interrupts, params: Tree, on: tuple[str, int], prefix: str
) -> dict[str, Any]:
    """Fine-tune on one of the data sets with a number of labels per class."""
    name, labels = on

    def notify(what: str) -> None:
        interrupts.check()
        run.hear(FineTuning(f"{name}: {prefix}{what}" if name else prefix + what))

    host = jax.device_get(params)  # on the mesh, every device would repeat the work
    evaluation, depth, seed = run.config.evaluation, run.config.model.depth, run.config.runtime.seed
    job = finetune.FineTuneJob(run.prepared.task, evaluation, run.data.evaluated_on[name], host, depth, seed, labels)
    return {"depth": depth, **finetune.fine_tune(job, run.encode, notify)}


def _lines(run: ActiveRun) -> list[dict[str, Any]]:
    return run.workdir.metrics() if run.workdir else []


def _write(run: ActiveRun, content: dict[str, Any]) -> None:
    line = {"event": "evaluation", **content}
    if run.workdir:
        run.workdir.append(line)
        run.hear(Evaluated(line))
