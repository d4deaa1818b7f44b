"""Trials of a study: drawn, run, stored, resumed after a kill, and shared by processes.

This is the room's only module that imports Optuna. Optuna is a dependency of this package because what it does would
otherwise be written again: samplers that learn from earlier trials, with one goal or two (TPE, NSGA-II), pruning,
importances of settings, and storage that any number of processes or machines share. It is used for settings alone,
never for the plans of a prompt.

What Optuna does not do is done here. A trial whose process was killed is taken up again under its own number: the
process that runs a trial holds a lock that the operating system releases when the process ends. What a sampler draws
follows from the study's seed and the trial's number, not from which process draws it. A line of the journal that a
kill tore is cut off before the next one is written; Optuna's own journal cannot be read after that.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from dynadepth.config import did_you_mean
from dynadepth.errors import ConfigError, LabelError, SearchError
from dynadepth_search.progress import Progress, silent
from dynadepth_search.tuning.space import Outcome, StudyTrial, Tunable
from dynadepth_search.tuning.study_files import JOURNAL, begin_study, study_name

__all__ = ["SAMPLERS", "Sampler", "run_study", "stored_trials", "trial_seed"]

Sampler = Literal["tpe", "nsga2", "random"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)

_TURN = ".turn.lock"
_FOLDER, _DEFAULT = "folder", "default"
# Trials that are drawn at random before a sampler learns, and before a trial can be pruned.
_STARTUP = 10
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


def run_study(
    folder: str | os.PathLike[str],
    tunable: Tunable,
    *,
    trials: int = 100,
    timeout: float | None = None,
    storage: str | None = None,
    sampler: str = "tpe",
    seed: int = 0,
    inputs: Mapping[str, Path | None] | None = None,
    progress: Progress = silent,
) -> "tuple[optuna.Study, list[StudyTrial]]":
    """Run trials until a study has a number of them, or go on with a study.

    Any number of processes may run the same study at once. The first trial of a study has the default settings.

    Args:
        folder: Folder of the study; it is made if it is missing.
        tunable: What is tuned.
        trials: Number of trials that the study has in the end, over all runs and processes; killed ones go on.
        timeout: Seconds after which this run starts no further trial; None: no limit.
        storage: URL of an Optuna storage; None: a journal in the folder. Machines that share no folder share a study
            by giving the same URL, each with a folder of its own.
        sampler: `tpe`, `nsga2` (two goals) or `random`.
        seed: Seed of what samplers draw.
        inputs: Folders that the work was read from, by name; they are named in the folder.
        progress: Called with the stage, the number of ended trials and the number of all.

    Returns:
        The study, and its trials in the order of their numbers.

    Raises:
        ConfigError: A number is out of range, the sampler is unknown or does not fit, or the storage cannot be opened.
        LabelError: The folder holds another study, or is damaged.
        SearchError: A value of a trial is not finite.
    """
    if trials < 1 or (timeout is not None and not timeout > 0):
        raise ConfigError(
            f"{trials} trials within {timeout} seconds were asked for; expected 1 or more, and a time above 0"
        )
    if sampler not in SAMPLERS:
        raise ConfigError(
            f"sampler {sampler!r} is unknown{did_you_mean(sampler, SAMPLERS)}; expected one of {', '.join(SAMPLERS)}"
        )
    if sampler == "nsga2" and len(tunable.goals) == 1:
        raise ConfigError("sampler 'nsga2' is for two goals; take 'tpe' for one")
    place = Path(folder)
    asked = {
        "kind": tunable.kind,
        **tunable.asked,
        "settings": [setting.to_dict() for setting in tunable.settings],
        "goals": [goal.name for goal in tunable.goals],
        "sampler": sampler,
        "seed": seed,
    }
    stop = None if timeout is None else time.monotonic() + timeout
    mark = begin_study(place, asked, inputs or {}, own_journal=storage is None)
    with _quiet():
        study = optuna.create_study(
            study_name=study_name(asked),
            storage=_storage(place, storage),
            directions=["maximize" if goal.maximise else "minimize" for goal in tunable.goals],
            sampler=_ByNumber(sampler, seed),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=_STARTUP, n_warmup_steps=1),
            load_if_exists=True,
        )
        worker = _Worker(study, place, mark, tunable, shared=storage is not None)
        while stop is None or time.monotonic() < stop:
            progress("trials", min(worker.ended(), trials), trials)
            if not worker.run_one(trials):
                break
        progress("trials", min(worker.ended(), trials), trials)
        return study, _records(study)


def stored_trials(
    folder: str | os.PathLike[str], asked: Mapping[str, Any], storage: str | None = None
) -> "tuple[optuna.Study, list[StudyTrial]]":
    """Return a study that exists, and its trials in the order of their numbers.

    Args:
        folder: Folder of the study.
        asked: What the study asked, see `dynadepth_search.tuning.study_files.read_study`.
        storage: As for `run_study`.

    Raises:
        ConfigError: The storage cannot be opened, or has no such study.
        LabelError: The journal is damaged.
    """
    place = Path(folder)
    if storage is None and not (place / JOURNAL).is_file():
        raise ConfigError(
            f"{place} has no {JOURNAL}; its trials are in another storage: give it (--storage)"
        )
    try:
        with _quiet():
            study = optuna.load_study(
                study_name=study_name(asked), storage=_storage(place, storage)
            )
            return study, _records(study)
    except KeyError as error:
        raise ConfigError(
            f"the storage has no study {study_name(asked)}, which {place} names; run the study, or give its storage"
        ) from error


def trial_seed(seed: int, number: int) -> int:
    """Return the seed of what a sampler draws for a trial.

    Args:
        seed: The study's.
        number: The trial's.
    """
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


class _Worker:
    """Runs trials of a study, one after the other, beside any other workers."""

    def __init__(
        self, study: optuna.Study, folder: Path, mark: str, tunable: Tunable, *, shared: bool
    ) -> None:
        self._study, self._folder, self._mark = study, folder, mark
        self._tunable, self._shared = tunable, shared

    def ended(self) -> int:
        return len(self._study.get_trials(deepcopy=False, states=_ENDED))

    def run_one(self, goal: int) -> bool:
        """Run a trial; return False if there is none left to run."""
        found = self._take(goal)
        if found is None:
            return False
        trial, params, lock = found
        try:
            outcome = self._evaluate(trial, params)
            if outcome is None:
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                for name, value in outcome.notes.items():
                    trial.set_user_attr(name, value)
                self._study.tell(trial, list(outcome.values))
            # Whoever opened it meanwhile finds that the trial has ended.
            with suppress(OSError):
                Path(lock.lock_file).unlink()
        finally:
            lock.release()
        return True

    def _evaluate(self, trial: optuna.Trial, params: dict[str, Any]) -> Outcome | None:
        one_goal = len(self._tunable.goals) == 1

        def report(step: int, value: float) -> bool:
            # Optuna prunes trials with one goal only.
            if not one_goal:
                return False
            trial.report(value, step)
            # The default is what the others are compared with.
            return bool(trial.should_prune()) and not trial.user_attrs.get(_DEFAULT, False)

        try:
            return _finite(self._tunable.evaluate(params, report), trial.number)
        except Exception:
            self._study.tell(trial, state=TrialState.FAIL)
            raise

    def _take(self, goal: int) -> tuple[optuna.Trial, dict[str, Any], FileLock] | None:
        """Take up a trial that a killed process left, or draw a new one; None if there are enough."""
        with FileLock(self._folder / _TURN):
            every = self._study.get_trials(deepcopy=False)
            at_work = 0
            for each in every:
                if each.state != TrialState.RUNNING:
                    continue
                if self._is_elsewhere(each):
                    at_work += _FOLDER in each.user_attrs
                    continue
                lock = self._lock(each.number)
                if lock is None:
                    at_work += 1
                    continue
                trial = optuna.Trial(self._study, each._trial_id)
                return trial, self._drawn(trial), lock
            ended = sum(each.state in _ENDED for each in every)
            if ended + at_work >= goal:
                return None
            if not every:
                self._study.enqueue_trial(
                    self._tunable.default(), user_attrs={_DEFAULT: True}, skip_if_exists=True
                )
            trial = self._study.ask()
            lock = self._lock(trial.number)
            if lock is None:
                raise LabelError(
                    f"{self._folder} has a lock for trial {trial.number}, which has just been made; another study's "
                    "processes run in this folder: use another one"
                )
            return trial, self._drawn(trial), lock

    def _drawn(self, trial: optuna.Trial) -> dict[str, Any]:
        if trial.user_attrs.get(_FOLDER) != self._mark:
            trial.set_user_attr(_FOLDER, self._mark)
        return {setting.name: setting.suggest(trial) for setting in self._tunable.settings}

    def _is_elsewhere(self, trial: FrozenTrial) -> bool:
        """Say whether a trial may run where its lock cannot be seen from here."""
        return self._shared and trial.user_attrs.get(_FOLDER) != self._mark

    def _lock(self, number: int) -> FileLock | None:
        """Return the lock of a trial, or None if a process that is alive holds it."""
        lock = FileLock(self._folder / f".trial-{number:05d}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return None
        return lock


class _ByNumber(BaseSampler):
    """A sampler that is made anew for each trial, with a seed of the trial's number."""

    def __init__(self, name: str, seed: int) -> None:
        self._make: Callable[[int], BaseSampler] = {
            # Settings depend on each other, as rank and ridge do.
            "tpe": lambda drawn: optuna.samplers.TPESampler(
                seed=drawn, multivariate=True, n_startup_trials=_STARTUP
            ),
            "nsga2": lambda drawn: optuna.samplers.NSGAIISampler(seed=drawn, population_size=20),
            "random": lambda drawn: optuna.samplers.RandomSampler(seed=drawn),
        }[name]
        self._seed = seed
        self._inner = self._make(seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._inner = self._make(trial_seed(self._seed, trial.number))
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        found: dict[str, BaseDistribution] = self._inner.infer_relative_search_space(study, trial)
        return found

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        found: dict[str, Any] = self._inner.sample_relative(study, trial, search_space)
        return found

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self._inner.after_trial(study, trial, state, values)


class _JournalLock(JournalFileOpenLock):
    """A lock that ends with its process; taking it cuts off a last line that a kill has torn."""

    def __init__(self, journal: Path) -> None:
        super().__init__(str(journal))
        self._journal = journal
        self._lock = FileLock(journal.with_name(f".{journal.name}.lock"))

    def acquire(self) -> bool:
        self._lock.acquire()
        with self._journal.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            whole = size
            while whole:
                start = max(0, whole - 65536)
                file.seek(start)
                at = file.read(whole - start).rfind(b"\n")
                if at >= 0:
                    whole = start + at + 1
                    break
                whole = start
            if whole < size:
                file.truncate(whole)
        return True

    def release(self) -> None:
        self._lock.release()


def _storage(folder: Path, url: str | None) -> Any:
    if url is None:
        path = folder / JOURNAL
        try:
            path.touch()
            backend = JournalFileBackend(str(path), lock_obj=_JournalLock(path))
            return optuna.storages.JournalStorage(backend)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LabelError(
                f"{path} is damaged ({error}): remove the folder of the study and run it again"
            ) from error
    try:
        return optuna.storages.get_storage(url)
    except (ValueError, ImportError, OSError, SQLAlchemyError) as error:
        # The URL may hold a password.
        raise ConfigError(
            f"the storage cannot be opened ({type(error).__name__}); expected a URL as Optuna takes it, such as "
            "sqlite:///study.db or postgresql://host/name, with its driver installed"
        ) from error


def _finite(outcome: Outcome | None, number: int) -> Outcome | None:
    if outcome is not None and not np.isfinite(outcome.values).all():
        raise SearchError(
            f"trial {number} came to {outcome.values}; expected finite numbers, so the scores are damaged"
        )
    return outcome


def _records(study: optuna.Study) -> list[StudyTrial]:
    own = (_FOLDER, _DEFAULT)
    return [
        StudyTrial(
            number=each.number,
            state=each.state.name.lower(),
            params=dict(each.params),
            values=tuple(each.values) if each.state == TrialState.COMPLETE else None,
            default=bool(each.user_attrs.get(_DEFAULT, False)),
            notes={name: value for name, value in each.user_attrs.items() if name not in own},
            seconds=None if each.duration is None else each.duration.total_seconds(),
        )
        for each in study.get_trials(deepcopy=False)
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's own messages off stderr, where the progress is."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
