"""Studies: the same trials whoever runs them and however often they are killed."""

import json
import multiprocessing
import os
import signal
from typing import Any

import optuna
import pytest

from dynadepth.errors import ConfigError, LabelError, SearchError
from dynadepth_search.tuning.space import Goal, Outcome, Setting
from dynadepth_search.tuning.studies import run_study, stored_trials
from dynadepth_search.tuning.study_files import input_folder, read_study


class Toy:
    """A hill over two settings."""

    kind = "toy"
    settings = (
        Setting(name="x", low=-1.0, high=1.0),
        Setting(name="size", low=1, high=64, whole=True, log=True),
        Setting(name="way", choices=("up", "down")),
    )
    goals: tuple[Goal, ...] = (Goal("height"),)

    def __init__(self, name: str = "hill") -> None:
        self.asked = {"hill": name}
        self.defaults = 0
        self.seen: list[dict[str, Any]] = []

    def default(self) -> dict[str, Any]:
        self.defaults += 1
        return {"x": 0.5, "size": 8, "way": "down"}

    def evaluate(self, params: Any, report: Any) -> Outcome | None:
        self.seen.append(params)
        return Outcome((height(params),), {"half": height(params) / 2})

    def findings(self, trials: Any) -> dict[str, Any]:
        return {"comparison": None, "curve": None}


class TwoGoals(Toy):
    goals = (Goal("cost", maximise=False), Goal("height"))

    def evaluate(self, params: Any, report: Any) -> Outcome | None:
        assert not report(0, 1.0)
        return Outcome((float(params["size"]), height(params)))


class Fatal(Toy):
    """Kills its process in the middle of the trial with a given number."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def evaluate(self, params: Any, report: Any) -> Outcome | None:
        if len(self.seen) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().evaluate(params, report)


def height(params: Any) -> float:
    return -((params["x"] - 0.3) ** 2) - 0.01 * params["size"] + 0.1 * (params["way"] == "up")


def plain(trials: Any) -> list[Any]:
    return [(each.number, each.state, each.params, each.values, each.default) for each in trials]


def beside(folder: Any, tunable: Any, trials: int) -> Any:
    """Start a process that runs a study."""
    process = multiprocessing.get_context("fork").Process(
        target=run_study, args=(folder, tunable), kwargs={"trials": trials}
    )
    process.start()
    return process


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The trials of a study that nothing disturbed; the last ones are drawn by what earlier ones came to."""
    return run_study(tmp_path_factory.mktemp("study"), Toy(), trials=14)[1]


def test_the_first_trial_has_the_default_settings_and_the_best_is_better(whole: list[Any]) -> None:
    assert [each.number for each in whole] == list(range(14))
    assert [each.default for each in whole] == [True] + 13 * [False]
    assert whole[0].params == Toy().default()
    assert {each.state for each in whole} == {"complete"}
    assert all(each.values == (height(each.params),) for each in whole)
    assert all(each.notes == {"half": height(each.params) / 2} for each in whole)
    assert max(each.values for each in whole) > whole[0].values
    assert len({each.params["x"] for each in whole}) == 14


def test_a_study_in_parts_is_the_study_in_one_go(whole: list[Any], tmp_path: Any) -> None:
    told: list[Any] = []
    for trials in (3, 3, 12, 14):
        toy = Toy()
        found = run_study(tmp_path, toy, trials=trials, progress=lambda *step: told.append(step))[1]
        assert len(found) == trials
        # What has ended is not run again, and the default is asked for once.
        assert toy.defaults == (trials == 3 and len(told) < 6)
    assert plain(found) == plain(whole)
    assert told[0] == ("trials", 0, 3)
    assert told[-1] == ("trials", 14, 14)


@pytest.mark.parametrize("at", [0, 4, 12])
def test_a_killed_trial_goes_on_under_its_own_number(
    whole: list[Any], tmp_path: Any, at: int
) -> None:
    process = beside(tmp_path, Fatal(at), 14)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    killed = stored_trials(tmp_path, read_study(tmp_path)["asked"])[1]
    assert [each.state for each in killed] == at * ["complete"] + ["running"]
    assert killed[at].params == whole[at].params
    assert plain(run_study(tmp_path, Toy(), trials=14)[1]) == plain(whole)


def test_two_processes_share_a_study(whole: list[Any], tmp_path: Any) -> None:
    workers = [beside(tmp_path, Toy(), 14) for _ in range(2)]
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    _, found = stored_trials(tmp_path, read_study(tmp_path)["asked"])
    assert [each.number for each in found] == list(range(14))
    assert {each.state for each in found} == {"complete"}
    assert [each.default for each in found] == [True] + 13 * [False]
    assert all(each.values == (height(each.params),) for each in found)
    # Until the sampler learns from what has ended, a number fixes the settings.
    assert plain(found)[:10] == plain(whole)[:10]
    assert not list(tmp_path.glob(".trial-*"))


def test_a_trial_that_another_process_runs_is_left_alone(tmp_path: Any) -> None:
    ready = multiprocessing.get_context("fork").Event()
    go_on = multiprocessing.get_context("fork").Event()

    class Slow(Toy):
        def evaluate(self, params: Any, report: Any) -> Outcome | None:
            if not self.seen:
                ready.set()
                go_on.wait(120)
            return super().evaluate(params, report)

    process = beside(tmp_path, Slow(), 3)
    assert ready.wait(120)
    # The first of three is at work elsewhere, so two are left.
    found = run_study(tmp_path, Toy(), trials=3)[1]
    assert [each.state for each in found] == ["running", "complete", "complete"]
    go_on.set()
    process.join(120)
    _, found = stored_trials(tmp_path, read_study(tmp_path)["asked"])
    assert [each.state for each in found] == 3 * ["complete"]


def test_a_torn_line_of_the_journal_is_cut_off(whole: list[Any], tmp_path: Any) -> None:
    run_study(tmp_path, Toy(), trials=3)
    journal = tmp_path / "journal.log"
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"worker_')
    assert len(stored_trials(tmp_path, read_study(tmp_path)["asked"])[1]) == 3
    assert plain(run_study(tmp_path, Toy(), trials=14)[1]) == plain(whole)
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_timeout_starts_nothing_and_keeps_what_there_is(tmp_path: Any) -> None:
    run_study(tmp_path, Toy(), trials=2)
    toy = Toy()
    assert len(run_study(tmp_path, toy, trials=50, timeout=1e-9)[1]) == 2
    assert toy.seen == []


def test_what_is_not_worth_going_on_with_is_pruned_but_never_the_default(tmp_path: Any) -> None:
    class Stepwise(Toy):
        def evaluate(self, params: Any, report: Any) -> Outcome | None:
            value = -1.0 if params == self.default() else height(params)
            for step in range(4):
                if report(step, value):
                    return None
            return Outcome((value,))

    found = run_study(tmp_path, Stepwise(), trials=40)[1]
    assert {each.state for each in found} == {"complete", "pruned"}
    assert found[0].state == "complete"
    assert all(each.values is None for each in found if each.state == "pruned")
    pruned = [height(each.params) for each in found if each.state == "pruned"]
    complete = [height(each.params) for each in found[1:] if each.state == "complete"]
    assert sum(pruned) / len(pruned) < sum(complete) / len(complete)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_two_goals(tmp_path: Any, sampler: str) -> None:
    study, found = run_study(tmp_path, TwoGoals(), trials=25, sampler=sampler)
    assert {len(each.values) for each in found} == {2}
    assert [way.name for way in study.directions] == ["MINIMIZE", "MAXIMIZE"]
    assert len({each.params["x"] for each in found}) > 10


def test_a_trial_that_fails_says_so_and_the_next_run_goes_on(tmp_path: Any) -> None:
    class Broken(Toy):
        def evaluate(self, params: Any, report: Any) -> Outcome | None:
            return Outcome((float("nan"),)) if self.seen else super().evaluate(params, report)

    with pytest.raises(SearchError, match="trial 1 came to"):
        run_study(tmp_path, Broken(), trials=3)
    found = run_study(tmp_path, Toy(), trials=3)[1]
    assert [each.state for each in found] == ["complete", "fail", "complete", "complete"]


def test_a_url_is_shared_by_folders(tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    run_study(tmp_path / "a", Toy(), trials=3, storage=url)
    found = run_study(tmp_path / "b", Toy(), trials=5, storage=url)[1]
    assert [each.number for each in found] == list(range(5))
    assert [each.default for each in found] == [True] + 4 * [False]
    assert not (tmp_path / "a" / "journal.log").exists()
    # A trial that was begun from a folder that is not here may be at work elsewhere.
    study = optuna.load_study(study_name=None, storage=url)
    study.ask().set_user_attr("folder", "elsewhere")
    found = run_study(tmp_path / "b", Toy(), trials=6, storage=url)[1]
    assert [each.state for each in found] == 5 * ["complete"] + ["running"]


def test_inputs_are_named_as_they_lie_from_the_folder(tmp_path: Any) -> None:
    (tmp_path / "scores").mkdir()
    run_study(tmp_path / "study", Toy(), trials=1, inputs={"scores": tmp_path / "scores"})
    content = read_study(tmp_path / "study")
    assert content["inputs"] == {"scores": "../scores"}
    assert input_folder(tmp_path / "study", content, "scores") == tmp_path / "scores"
    with pytest.raises(ConfigError, match="does not say where its plans are; give --plans"):
        input_folder(tmp_path / "study", content, "plans")
    (tmp_path / "scores").rmdir()
    with pytest.raises(ConfigError, match="not there; give --scores"):
        input_folder(tmp_path / "study", content, "scores")


class TestWrongInput:
    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            ({"trials": 0}, "0 trials"),
            ({"timeout": 0.0}, "within 0.0 seconds"),
            ({"timeout": float("nan")}, "within nan seconds"),
            ({"sampler": "tpee"}, "did you mean 'tpe'"),
            ({"sampler": "nsga2"}, "for two goals"),
            ({"storage": "no-url"}, "the storage cannot be opened"),
            ({"storage": "nothing+here://user:secret@host/x"}, "the storage cannot be opened"),
        ],
    )
    def test_is_refused(self, tmp_path: Any, wrong: dict[str, Any], says: str) -> None:
        with pytest.raises(ConfigError, match=says) as caught:
            run_study(tmp_path / "study", Toy(), **wrong)
        assert "secret" not in str(caught.value)

    def test_another_study_in_the_folder(self, tmp_path: Any) -> None:
        run_study(tmp_path, Toy(), trials=1)
        for other in ({"tunable": Toy("other")}, {"seed": 1}, {"sampler": "random"}):
            with pytest.raises(LabelError, match="use another folder"):
                run_study(tmp_path, **{"tunable": Toy(), "trials": 1, **other})

    def test_another_storage_than_before(self, tmp_path: Any) -> None:
        run_study(tmp_path, Toy(), trials=1)
        with pytest.raises(ConfigError, match="its own journal; give --storage as"):
            run_study(tmp_path, Toy(), trials=1, storage="sqlite://")
        with pytest.raises(ConfigError, match="the storage has no study dynadepth-toy-"):
            stored_trials(tmp_path, read_study(tmp_path)["asked"], "sqlite://")
        (tmp_path / "journal.log").unlink()
        with pytest.raises(ConfigError, match=r"has no journal\.log"):
            stored_trials(tmp_path, read_study(tmp_path)["asked"])

    def test_a_folder_that_is_a_file_or_has_no_study(self, tmp_path: Any) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(LabelError, match="is no folder"):
            run_study(tmp_path / "file", Toy())
        with pytest.raises(FileNotFoundError, match="tune menu"):
            read_study(tmp_path)

    def test_damaged_files(self, tmp_path: Any) -> None:
        run_study(tmp_path, Toy(), trials=2)
        asked = read_study(tmp_path)["asked"]
        path, journal = tmp_path / "study.json", tmp_path / "journal.log"
        lines = journal.read_text().splitlines(keepends=True)
        journal.write_text("".join(["{\n", *lines]))
        with pytest.raises(LabelError, match=r"journal\.log is damaged"):
            stored_trials(tmp_path, asked)
        path.write_text(path.read_text().replace("hill", "hole"))
        with pytest.raises(LabelError, match="damaged"):
            read_study(tmp_path)
        path.write_text(json.dumps({"schema_version": 2}))
        with pytest.raises(LabelError, match="update dynadepth"):
            read_study(tmp_path)
