"""Generated answers are compared by the value that they end with."""

import threading

import pytest

from dynadepth.errors import SearchError, TaskError
from dynadepth_search.data.solutions import check_solutions, is_right
from dynadepth_search.data.tasks import Example


@pytest.mark.parametrize(
    ("answer", "solution"),
    [
        ("18", "18 apples"),
        ("There are 3 * 6 = 18 apples.", "18"),
        ("I think 17; no, 18.", "18.0"),
        ("1,200 dollars", "$1200"),
        (r"so it is \boxed{\frac{1}{2}}", "0.5"),
        ("50%", "1/2"),
        ("Tim", " tim "),
    ],
)
def test_equal_values_are_right(answer, solution):
    assert is_right(answer, solution)


@pytest.mark.parametrize(
    ("answer", "solution"),
    [
        ("", "18"),
        ("many", "18"),
        ("18 apples were there, 7 are left", "18"),
        ("180", "18"),
        ("-18", "18"),
        ("Tom", "Tim"),
    ],
)
def test_others_are_wrong(answer, solution):
    assert not is_right(answer, solution)


def test_a_tower_of_powers_ends_in_time():
    assert not is_right("9**9**9**9", "18")


def test_a_solution_without_a_value_names_its_line():
    good = Example("p", completion="four", solution="3/4")
    bad = Example("q", completion="a", solution="Tim", where="task.jsonl, line 7")
    check_solutions([good, Example("no solution")])
    with pytest.raises(TaskError, match=r"^task\.jsonl, line 7: `solution` is 'Tim', which has no"):
        check_solutions([good, bad])


def test_beside_the_main_thread_it_says_so():
    raised = []

    def compare():
        try:
            is_right("18", "18")
        except SearchError as error:
            raised.append(str(error))

    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
    assert "main thread" in raised[0]
