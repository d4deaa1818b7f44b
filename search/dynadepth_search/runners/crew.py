"""Hands jobs to workers, hears their answers, and sees to it that a worker's death costs no job.

How a worker is started, asked and watched is a crew's to say: `processes` and `ray_actors` each have one.
"""

import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any, Protocol, TypeVar

from dynadepth.errors import DynadepthWarning, RunnerError
from dynadepth_search.runners.work import Job, Loaded, Work
from dynadepth_search.runners.worker import Call, Reply, result_of, what_runs

__all__ = ["Crew", "CrewRunner", "Gone", "Member"]

# A job that was with this many workers when they died is not given to another one: it may be what kills them.
_TRIES = 3
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Gone:
    """In place of an answer: the worker is dead.

    Args:
        why: What is known of its end.
    """

    why: str


class Member(Protocol):
    """A worker, as the driver sees it."""

    def ask(self, call: Call) -> None:
        """Send a call; one that has died is noticed when the answer is taken."""

    def answer(self) -> Reply | Gone:
        """Return the answer to the last call, or why there will be none."""

    def stop(self) -> None:
        """End the worker at once."""


M = TypeVar("M", bound=Member)


class Crew(Protocol[M]):
    """How workers are had."""

    def places(self) -> Sequence[str]:
        """Return a name for each worker that there is to be."""

    def hire(self, place: int, expected: dict[str, str]) -> M:
        """Start a worker, without waiting for it.

        Args:
            place: Index of its place.
            expected: What runs in the driver, see `what_runs`.
        """

    def wait(self, members: Sequence[M], seconds: float) -> Sequence[M]:
        """Wait until workers have answered or died, and return these; none if nothing happens in this time."""

    def close(self) -> None:
        """Give back what workers were started with."""


@dataclass(slots=True, eq=False)
class _Slot:
    """A place of the crew and who is there."""

    name: str
    place: int
    member: Any = None
    opened: bool = False
    work: int | None = None
    job: Job | None = None
    losses: int = 0
    process: int | None = None


class CrewRunner:
    """A runner whose workers are other processes.

    Every worker has one job at a time and gets the next one when its answer is there. A worker that dies is replaced,
    and its job is given again, with a warning. A place whose worker dies twice without finishing a job in between is
    given up.

    Args:
        crew: How workers are had.
    """

    def __init__(self, crew: Crew[Any]) -> None:
        self._crew = crew
        self._slots: list[_Slot] = []
        self._works = count()
        self._expected: dict[str, str] = {}
        self._machines: set[str] = set()

    def run(self, work: Work, jobs: Iterable[Job], loaded: Loaded) -> Iterator[tuple[int, Any]]:
        """Do jobs, as for `Runner`.

        Args:
            work: The settings.
            jobs: The jobs.
            loaded: What this process has loaded.

        Raises:
            DynadepthError: A job failed.
            RunnerError: Workers died, or do not run what this process runs.
        """
        source = iter(jobs)
        first = next(source, None)
        if first is None:
            return
        try:
            self._hire_all(loaded)
            yield from _Round(self, work, chain((first,), source)).results()
        except BaseException:
            # Whoever does not take all results will not take those of the jobs in flight either.
            self.close()
            raise

    @property
    def processes(self) -> tuple[int, ...]:
        """The ids of the workers' processes, each on its machine, of those that have loaded the model."""
        return tuple(slot.process for slot in self._slots if slot.opened and slot.process)

    def close(self) -> None:
        """End all workers."""
        for slot in self._slots:
            if slot.member is not None:
                slot.member.stop()
        self._slots = []
        self._crew.close()

    def __enter__(self) -> "CrewRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hire_all(self, loaded: Loaded) -> None:
        expected = what_runs(loaded)
        if self._slots and expected != self._expected:
            raise RunnerError(
                "a runner was given another model than the one that its workers have loaded; make a runner for each"
            )
        if not self._slots:
            self._expected, self._machines = expected, set()
            self._slots = [_Slot(name, place) for place, name in enumerate(self._crew.places())]
            for slot in self._slots:
                self._hire(slot)

    def _hire(self, slot: _Slot) -> None:
        slot.member = self._crew.hire(slot.place, self._expected)
        slot.opened, slot.work, slot.job = False, None, None
        slot.member.ask(("open",))

    def _note(self, machine: str) -> None:
        """Warn once if workers compute on machines of several types."""
        before = set(self._machines)
        self._machines.add(machine)
        if before and before < self._machines:
            kinds = " and ".join(sorted(self._machines))
            warnings.warn(
                f"workers run on machines of several types ({kinds}): the last bits of a result then depend on which "
                "of them found it; give machines of one type if runs must be equal byte for byte",
                DynadepthWarning,
                stacklevel=2,
            )


class _Round:
    """One work being done by the workers of a runner."""

    def __init__(self, runner: CrewRunner, work: Work, jobs: Iterator[Job]) -> None:
        self._runner, self._work, self._jobs = runner, work, jobs
        self._name = next(runner._works)
        # Jobs that a dead worker had, and one at most that was taken from the caller and not given yet.
        self._next: deque[Job] = deque()
        self._deaths: Counter[int] = Counter()
        self._impatient = False

    def results(self) -> Iterator[tuple[int, Any]]:
        """Yield results until no job is left."""
        runner = self._runner
        self._give()
        while any(slot.job is not None for slot in runner._slots) or self._more():
            waited = {
                id(slot.member): slot
                for slot in runner._slots
                if slot.member is not None and (slot.job is not None or not slot.opened)
            }
            members = [slot.member for slot in waited.values()]
            ready = runner._crew.wait(members, _PATIENCE_SECONDS)
            if not ready and not any(slot.opened for slot in runner._slots):
                self._say_that_nobody_came()
            heard = [self._hear(waited[id(member)]) for member in ready]
            # Workers go on while the driver deals with what they found.
            self._give()
            yield from (each for each in heard if each is not None)

    def _say_that_nobody_came(self) -> None:
        if not self._impatient:
            self._impatient = True
            warnings.warn(
                f"no worker has begun in {_PATIENCE_SECONDS:.0f} s; it still loads the model, or waits until others "
                "leave it a machine",
                DynadepthWarning,
                stacklevel=2,
            )

    def _more(self) -> bool:
        """Say whether there is a job to give."""
        if not self._next:
            self._next.extend(job for job in (next(self._jobs, None),) if job is not None)
        return bool(self._next)

    def _give(self) -> None:
        """Give a job to every worker that is ready and has none."""
        for slot in self._runner._slots:
            ready = slot.member is not None and slot.opened and slot.job is None
            if ready and self._more():
                new = slot.work != self._name
                slot.job, slot.work = self._next.popleft(), self._name
                slot.member.ask(("do", self._name, self._work if new else None, slot.job[1]))

    def _hear(self, slot: _Slot) -> tuple[int, Any] | None:
        """Take the answer of a worker; return the number and the result of a job that it has finished."""
        answer = slot.member.answer()
        if isinstance(answer, Gone):
            self._mourn(slot, answer.why)
            return None
        value = result_of(answer)
        if not slot.opened:
            slot.opened = True
            slot.process = value["process"]
            self._runner._note(value["machine"])
            return None
        job, slot.job, slot.losses = slot.job, None, 0
        return None if job is None else (job[0], value)

    def _mourn(self, slot: _Slot, why: str) -> None:
        """Replace a worker that has died, and keep its job for another one."""
        slot.member.stop()
        slot.member, job = None, slot.job
        slot.job, slot.losses = None, slot.losses + 1
        doing = "while it was starting" if job is None else f"in block {job[0]}"
        if job is not None:
            self._next.appendleft(job)
            self._deaths[job[0]] += 1
            if self._deaths[job[0]] >= _TRIES:
                raise RunnerError(
                    f"block {job[0]} was with {_TRIES} workers when they died; the last one was {slot.name} ({why}): "
                    "it may need more memory than they have; what was finished is kept, so run the same again"
                )
        if slot.losses < 2:
            warnings.warn(
                f"worker {slot.name} died {doing} ({why}); another one takes its place",
                DynadepthWarning,
                stacklevel=2,
            )
            self._runner._hire(slot)
        elif all(other.member is None for other in self._runner._slots):
            raise RunnerError(
                f"no worker is left; the last one was {slot.name}, which died {doing} ({why}): workers may need more "
                "memory than they have; what was finished is kept, so run the same again"
            )
        else:
            warnings.warn(
                f"worker {slot.name} died {doing} ({why}), like the one before it; the others go on without it",
                DynadepthWarning,
                stacklevel=2,
            )
