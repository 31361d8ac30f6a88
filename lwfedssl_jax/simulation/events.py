"""What a run reports while it goes."""

from typing import TYPE_CHECKING, Any

from lwfedssl_jax.method.stages import Stage

if TYPE_CHECKING:
    from lwfedssl_jax.simulation.setup import Prepared


class Listener:
    """Hears how a run goes; every method may be overridden."""

    def loading(self, what: str) -> None:
        """So much of the data set is there."""

    def note(self, what: str) -> None:
        """Something that the user should know."""

    def start(self, run: "Prepared", finished_rounds: int) -> None:
        """The run begins, or continues after so many rounds."""

    def compiling(self, what: str) -> None:
        """A compilation begins."""

    def stage(self, stage: Stage) -> None:
        """A stage's rounds begin."""

    def steps(self, round_number: int, done: int, total: int) -> None:
        """So many of a round's steps are done."""

    def round(self, line: dict[str, Any]) -> None:
        """A round's line of ``metrics.jsonl``."""

    def fine_tuning(self, what: str) -> None:
        """An epoch of fine-tuning begins."""

    def evaluation(self, line: dict[str, Any]) -> None:
        """An evaluation's line of ``metrics.jsonl``."""

    def finished(self, summary: dict[str, Any]) -> None:
        """The run is over and its summary written."""
