"""Accuracy against epsilon."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lwfedssl_jax.analysis.settings import Setting, value_words
from lwfedssl_jax.analysis.style import STYLES, panels
from lwfedssl_jax.analysis.wording import protocol_words
from lwfedssl_jax.config.protocols import NOISE_ONLY

OF_PROMISE = ("privacy.epsilon", "privacy.noise_multiplier", "privacy.delta", "privacy.clip", "privacy.quantile",
              "privacy.count_noise", "federation.sampling")  # fmt: skip


def epsilons(runs: pd.DataFrame) -> list[float]:
    """Return the different epsilons of runs, rounded to three digits, in order; infinite for runs without noise."""
    return sorted(set(_stated(runs)))


def _stated(runs: pd.DataFrame) -> list[float]:
    """The epsilon of each run: as it was asked for, or as it is, rounded."""
    if "epsilon" not in runs:
        return []
    asked = runs["privacy.epsilon"] if "privacy.epsilon" in runs else 0 * runs["epsilon"]
    pairs = zip(asked.fillna(0), runs["epsilon"].fillna(np.inf), strict=True)
    return [float(a) if a and np.isfinite(e) else float(f"{e:.3g}") for a, e in pairs]


def plot_epsilon(runs: pd.DataFrame, settings: Sequence[Setting], protocol: str) -> Any:
    """Draw accuracy by a protocol against epsilon, with noise alone and the untrained encoder.

    Settings that differ only in what they promise and in their clip are one line; of several at one epsilon, it is that
    with the highest mean.

    Args:
      runs, settings: as ``settings.group_by_setting`` returns them.
      protocol: such as ``knn``.

    Returns:
      The matplotlib figure.
    """
    places = epsilons(runs)
    lines: dict[tuple[Any, ...], list[Setting]] = {}
    for setting in settings:
        rest = {field: value for field, value in setting.values.items() if field not in OF_PROMISE}
        lines.setdefault(tuple(rest.items()), []).append(setting)
    figure, ((panel,),) = panels(1, 1, size=(6.4, 4.2 + 0.2 * len(lines)))
    for style, (others, members) in zip(_styles(len(lines)), lines.items(), strict=True):
        best: dict[float, pd.DataFrame] = {}
        for setting in members:
            own = runs[runs["setting"] == setting.label]
            place = places.index(_stated(own)[0])
            known = best.get(place)
            if known is None or own[f"accuracy.{protocol}"].mean() > known[f"accuracy.{protocol}"].mean():
                best[place] = own
        label = ", ".join(value_words(field, value) for field, value in others) or "accuracy"
        at = sorted(best)
        _draw(panel, at, [best[x][f"accuracy.{protocol}"] for x in at], label, style | {"linestyle": "-"})
        if (name := f"{NOISE_ONLY}.{protocol}") in runs:
            noisy = [x for x in at if best[x][name].notna().any()]
            thin = style | {"linestyle": "--", "markerfacecolor": "white", "alpha": 0.7}
            _draw(panel, noisy, [best[x][name] for x in noisy], f"{label}: noise only", thin)
    if (name := f"untrained.{protocol}") in runs:
        panel.axhline(100 * runs[name].mean(), color="0.35", linestyle=":", label="untrained")
    panel.set_xticks(range(len(places)), ["no noise" if np.isinf(x) else f"{x:g}" for x in places])
    panel.set(xlabel="epsilon", ylabel=f"{protocol_words(protocol)}\naccuracy (%)")
    panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _styles(count: int) -> list[dict[str, Any]]:
    return [STYLES[i % len(STYLES)] for i in range(count)]


def _draw(panel: Any, at: Sequence[float], values: Sequence[pd.Series], label: str, style: dict[str, Any]) -> None:
    if not at:
        return
    spread = [100 * np.nan_to_num(x.std()) for x in values]
    panel.errorbar(at, [100 * x.mean() for x in values], spread, capsize=3, label=label, **style)
