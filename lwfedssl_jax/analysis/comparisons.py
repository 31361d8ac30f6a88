"""All comparisons of a page, as one family of tests."""

from collections.abc import Sequence

import pandas as pd

from lwfedssl_jax.analysis.effects import by_data, main_effects, worlds
from lwfedssl_jax.analysis.settings import Setting
from lwfedssl_jax.analysis.statistics import ALL_PAIRS, Difference, adjust, paired, pairs_of


def compare_all(
    runs: pd.DataFrame, settings: Sequence[Setting], protocols: Sequence[str]
) -> dict[str, list[Difference]]:
    """Compare settings by each protocol; the p-values of all protocols are adjusted together by Holm's method.

    Of up to four settings on the same data, every pair of a world is compared. Of more, each level of each factor is
    compared with a reference (``effects.main_effects``) or, where no two settings differ in one factor alone, each
    setting with the end_to_end setting that is nearest in its world. Settings on different data are never compared.

    Args:
      runs, settings: as ``settings.group_by_setting`` returns them.
      protocols: such as ``knn``.
    """
    found = [d for p in protocols for members in by_data(settings) for d in compare_members(runs, members, p)]
    adjusted = adjust(found)
    return {p: [d for d in adjusted if d.protocol == p] for p in protocols}


def compare_members(runs: pd.DataFrame, settings: Sequence[Setting], protocol: str) -> list[Difference]:
    """Compare settings on the same data by one protocol, without adjustment (``compare_all``)."""
    if len(settings) > ALL_PAIRS and (effects := main_effects(runs, settings, protocol)):
        return effects
    pairs = [pair for world in worlds(settings) for pair in pairs_of(world.settings)]
    return [paired(runs, a.label, b.label, protocol) for a, b in pairs]
