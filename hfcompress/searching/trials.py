"""Keeps the trials of a search with Optuna, so that a killed search goes on and several workers share one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.searching.candidate import MACS, STEPS, Candidate
from hfcompress.searching.outcome import Outcome
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.lock import HeldError, hold, require_free, wait_for

if TYPE_CHECKING:
    import optuna

JOURNAL = "trials.log"
"""The file of the trials, in the directory of the search."""
OUTCOME, WORKER = "outcome", "worker"


@dataclass(frozen=True)
class Claim:
    """A candidate that this worker tries, and no other one.

    Attributes:
        trial: Its trial.
        candidate: The candidate.
    """

    trial: optuna.Trial
    candidate: Candidate


class Trials:
    """The trials of a search.

    Args:
        folder: The directory of the search; it exists.
        name: Names the study: everything that outcomes depend on, hashed, so that another recipe, other data or other
            versions make another study.
        storage: The URL of a database that Optuna knows, such as `sqlite:///trials.db`; by default a journal file in
            `folder`.
    """

    def __init__(self, folder: Path, name: str, storage: str | None = None) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.folder, self.worker = folder, f"{os.getpid()}-{secrets.token_hex(4)}"
        with self._one_at_a_time():  # two workers that make the tables of a database at once are in each other's way
            self._study = optuna.create_study(
                storage=_open_storage(folder, storage), study_name=name, direction="maximize", load_if_exists=True
            )

    @contextmanager
    def work(self) -> Iterator[None]:
        """Marks this worker as alive while the block runs, and ends the trials of workers that died."""
        (self.folder / "workers").mkdir(exist_ok=True)
        with hold(self._mark(self.worker)):
            self._end_trials_of_the_dead()
            yield

    def list_outcomes(self) -> list[Outcome]:
        """Reads the outcomes so far, in the order of their trials; of a candidate that was tried again, the last."""
        found: dict[Candidate, Outcome] = {}
        for trial in self._study.get_trials(deepcopy=False):
            if OUTCOME in trial.user_attrs:
                outcome = Outcome.from_json(trial.user_attrs[OUTCOME])
                found[outcome.candidate] = outcome
        return list(found.values())

    def claim(self, wanted: Sequence[Candidate], backends: Sequence[str]) -> Claim | None:
        """Claims the first of these candidates that no worker has tried or is trying; None if there is none left."""
        with self._one_at_a_time():
            taken = {Candidate(**trial.params) for trial in self._list_running()}
            taken |= {outcome.candidate for outcome in self.list_outcomes() if not outcome.error}  # done meanwhile
            candidate = next((candidate for candidate in wanted if candidate not in taken), None)
            if candidate is None:
                return None
            self._study.enqueue_trial(candidate.to_json())
            trial = self._study.ask(_make_distributions(backends))
            trial.set_user_attr(WORKER, self.worker)
            return Claim(trial, Candidate(**trial.params))

    def finish(self, claim: Claim, outcome: Outcome, value: float | None) -> None:
        """Records the outcome of a trial.

        Args:
            claim: The trial.
            outcome: What was measured.
            value: What the search maximizes; None for a trial that failed.
        """
        from optuna.trial import TrialState

        claim.trial.set_user_attr(OUTCOME, outcome.to_json())
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        self._study.tell(claim.trial, value, state=state)

    @property
    def seconds(self) -> float:
        """The time that the search has taken so far, in earlier calls too."""
        return float(self._study.user_attrs.get("seconds", 0.0))

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._study.set_user_attr("seconds", value)

    def _one_at_a_time(self) -> AbstractContextManager[None]:
        """Lets one worker at a time choose what it tries."""
        return wait_for(self.folder / "choosing")

    def _list_running(self) -> list[Any]:
        return [trial for trial in self._study.get_trials(deepcopy=False) if trial.state.name == "RUNNING"]

    def _end_trials_of_the_dead(self) -> None:
        from optuna.trial import TrialState

        for trial in self._list_running():
            if not self._is_alive(trial.user_attrs.get(WORKER, "")):
                self._study.tell(trial.number, state=TrialState.FAIL)

    def _is_alive(self, worker: str) -> bool:
        try:
            require_free(self._mark(worker))
        except HeldError:
            return True
        return False

    def _mark(self, worker: str) -> Path:
        return self.folder / "workers" / (worker or "none")


def _make_distributions(backends: Sequence[str]) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    return {
        "backend": CategoricalDistribution(sorted(backends)),
        "macs": FloatDistribution(MACS[-1], MACS[0]),
        "steps": IntDistribution(STEPS[0], STEPS[-1]),
        "vocabulary": CategoricalDistribution(["keep", "corpus"]),
    }


def _open_storage(folder: Path, storage: str | None) -> Any:
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    try:
        if storage is not None:
            return RDBStorage(storage)
        file = str(folder / JOURNAL)
        return JournalStorage(JournalFileBackend(file, lock_obj=JournalFileOpenLock(file)))
    except Exception as error:  # a database that is not there, a driver that is not installed, a journal of Optuna 4
        name = storage or folder / JOURNAL
        raise HfcompressError(
            f"the trials in {name} cannot be read: {str(error).splitlines()[0]}",
            "name another --storage, or another directory with --output",
        ) from error
