"""How examples become tokens and sweeps; that the numbers are right is `tests/parity/test_scoring.py`."""

from itertools import combinations, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynadepth.errors import ConfigError, PlanError, TaskError, UnsupportedModelError, WrapError
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from dynadepth_search.data.encoding import encode_example, prompt_text
from dynadepth_search.data.tasks import Example
from dynadepth_search.scoring.batching import Work, batches_of, cheapest_groups, pack
from dynadepth_search.scoring.objectives import check_objective, plan_values
from dynadepth_search.scoring.scorer import Scorer
from tests.tiny import tiny_model
from tests.tiny_text import word_tokenizer


def text_of(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(ids))


@pytest.fixture(scope="module")
def scorer():
    return Scorer(tiny_model(), word_tokenizer(bos=True))


class TestEncoding:
    def test_answers_share_rows_and_places(self):
        tokenizer = word_tokenizer(bos=True)
        item = encode_example(tokenizer, Example("Q", ("yes", "yes!", "no")), "raw")
        assert text_of(tokenizer, item.prompt_ids) == "<s>Q"
        # " yes" ends where " yes!" goes on, and all three are read at the prompt's last token.
        assert [text_of(tokenizer, row) for row in item.rows] == ["<s>Q yes"]
        assert item.places.tolist() == [[0, 1], [0, 2]]
        assert item.entry_place.tolist() == [0, 0, 1, 0]
        assert tokenizer.convert_ids_to_tokens(item.entry_token) == [" yes", " yes", "!", " no"]
        assert item.starts.tolist() == [0, 1, 3]
        assert item.divisors.tolist() == [1, 1, 1]

    def test_a_row_for_every_answer_that_no_other_one_begins(self):
        tokenizer = word_tokenizer()
        item = encode_example(tokenizer, Example("Q", ("ab", "ac", "xyz")), "raw")
        rows = [text_of(tokenizer, row) for row in item.rows]
        assert rows == ["Q xy", "Q a"]
        where = [rows[row][place] for row, place in item.places.tolist()]
        assert [where[place] for place in item.entry_place] == [
            "Q",
            " ",
            "a",
            "Q",
            " ",
            "a",
            "Q",
            " ",
            "x",
            "y",
        ]

    def test_divisors(self):
        tokenizer = word_tokenizer()
        assert encode_example(
            tokenizer, Example("Q", ("né", "no")), "normalized"
        ).divisors.tolist() == [3, 2]
        assert encode_example(
            tokenizer, Example("Q", completion="no way"), "raw"
        ).divisors.tolist() == [5]
        alone = encode_example(tokenizer, Example("Q"), "raw")
        assert (alone.num_answers, alone.places.tolist(), alone.longest) == (0, [[0, 0]], 1)

    def test_no_second_space(self):
        tokenizer = word_tokenizer()
        for prompt, answer in [("Q\n", "no"), ("Q ", "no"), ("Q", "\nno")]:
            item = encode_example(tokenizer, Example(prompt, completion=answer), "raw")
            tail = [*item.rows[0][len(item.prompt_ids) :].tolist(), item.entry_token[-1]]
            assert text_of(tokenizer, item.prompt_ids) == prompt
            assert text_of(tokenizer, tail) == answer

    def test_the_prompt_is_a_prefix_when_tokens_merge_across_the_border(self):
        tokenizer = word_tokenizer()
        # Together they are the one token " no"; the prompt keeps its own token " ".
        item = encode_example(tokenizer, Example("Q ", completion="no"), "raw")
        assert tokenizer("Q no")["input_ids"][:2] != item.prompt_ids.tolist()
        assert item.prompt_ids.tolist() == tokenizer("Q ")["input_ids"]

    def test_letters(self):
        tokenizer = word_tokenizer(bos=True)
        example = Example("Q?", ("yes", "no"), 0)
        text = "Q?\nA. yes\nB. no\nAnswer:"
        assert prompt_text(example, "letter") == text
        assert prompt_text(example, "raw") == "Q?"
        item = encode_example(tokenizer, example, "letter")
        assert text_of(tokenizer, item.prompt_ids) == f"<s>{text}"
        assert [row.tolist() for row in item.rows] == [item.prompt_ids.tolist()]
        assert tokenizer.convert_ids_to_tokens(item.entry_token) == [" A", " B"]
        assert item.places.tolist() == [[0, len(item.prompt_ids) - 1]]

    def test_letters_must_be_single_tokens(self):
        with pytest.raises(
            TaskError,
            match="letter 'E' is 2 tokens to this tokenizer; letter scoring needs one token",
        ):
            encode_example(word_tokenizer(), Example("Q", tuple("vwxyz"), 0), "letter")

    def test_letters_must_differ(self):
        class Blind:
            def __call__(self, text, **_):
                return {
                    "input_ids": [1] * max(1, text.count("Answer:"))
                    + [9] * text.endswith((" A", " B"))
                }

        with pytest.raises(TaskError, match="two letters are the same token"):
            encode_example(Blind(), Example("Q", ("x", "y"), 0), "letter")

    def test_no_tokens(self):
        class Mute:
            def __call__(self, text, **_):
                return {"input_ids": [1] if text.startswith("Q") else []}

        with pytest.raises(TaskError, match="the prompt 'x' has no tokens"):
            encode_example(Mute(), Example("x"), "raw")
        with pytest.raises(TaskError, match="the answer 'y' has no tokens"):
            encode_example(Mute(), Example("Q", completion="y"), "raw")


def work(lengths, *, plans, number=0):
    """Rows of these lengths, two places a row."""
    item = encode_example(word_tokenizer(), Example("Q"), "raw")
    rows = tuple(np.arange(length) for length in lengths)
    places = np.array([[row, 0] for row in range(len(rows)) for _ in range(2)])
    encoded = type(item)(rows[0][:1], rows, places, *[np.empty(0, np.int64)] * 3, np.empty(0))
    return Work(number, encoded, np.ones((plans, 3), np.uint8), np.arange(plans))


class TestPacking:
    def check(self, works, *, max_scored, max_tokens, aim=10**9, sweep_cost=10**9):
        groups = list(
            pack(
                works,
                max_scored=max_scored,
                max_tokens=max_tokens,
                aim=aim,
                sweep_cost=sweep_cost,
            )
        )
        flat = [
            (piece.example, row)
            for group in groups
            for piece in group
            for row in piece.rows.tolist()
        ]
        assert flat == [(item.example, row) for item in works for row in item.rows.tolist()]
        whole = {item.example: len(item.plans) for item in works}
        for group in groups:
            plans = sum(len(piece.plans) for piece in group)
            width = max(piece.encoded.longest for piece in group)
            scored = sum(len(piece.plans) * len(piece.encoded.places) for piece in group)
            tokens = sum(len(piece.plans) * len(piece.encoded.rows) for piece in group) * width
            assert plans == 1 or (scored <= max_scored and tokens <= max_tokens)
            assert len(group) == 1 or tokens <= aim
            # Only work that is over a bound by itself is cut.
            for piece in group:
                alone = whole[piece.example]
                if len(piece.plans) < alone:
                    encoded = piece.encoded
                    over = alone * len(encoded.rows) * encoded.longest > max_tokens
                    assert over or alone * len(encoded.places) > max_scored
        return groups

    def test_everything_in_one_sweep_if_it_fits(self):
        works = [work([3, 5], plans=2, number=0), work([6], plans=3, number=1)]
        assert len(self.check(works, max_scored=14, max_tokens=42)) == 1
        assert len(self.check(works, max_scored=13, max_tokens=42)) == 2
        # The first example's rows get as long as the second's.
        assert len(self.check(works, max_scored=14, max_tokens=41)) == 2
        assert len(self.check(works, max_scored=14, max_tokens=42, aim=41)) == 2

    def test_a_large_example_is_cut_between_plans(self):
        groups = self.check([work([4, 4], plans=7)], max_scored=8, max_tokens=1000)
        assert [len(group[0].plans) for group in groups] == [2, 2, 2, 1]
        groups = self.check([work([4, 4], plans=3)], max_scored=1, max_tokens=1)
        assert [len(group[0].plans) for group in groups] == [1, 1, 1]

    def test_the_aim_parts_examples_but_not_the_plans_of_one(self):
        works = [work([4], plans=9, number=0), work([4], plans=9, number=1)]
        groups = self.check(works, max_scored=1000, max_tokens=1000, aim=1)
        assert [len(group[0].plans) for group in groups] == [9, 9]

    def test_many(self):
        generator = np.random.default_rng(0)
        for _ in range(50):
            works = [
                work(
                    generator.integers(1, 9, size=generator.integers(1, 4)),
                    plans=int(generator.integers(1, 9)),
                    number=n,
                )
                for n in range(6)
            ]
            limits = dict(
                zip(
                    ("max_scored", "max_tokens", "aim", "sweep_cost"),
                    generator.integers(1, (60, 200, 200, 90)),
                    strict=True,
                )
            )
            self.check(works, **limits)

    def test_nothing(self):
        assert list(pack([], max_scored=1, max_tokens=1, aim=1, sweep_cost=1)) == []

    def test_unlike_lengths_part_where_padding_costs_more_than_a_sweep(self):
        works = [work([4], plans=2, number=0), work([10], plans=2, number=1)]
        # Together, 12 of the 40 tokens are padding.
        assert len(self.check(works, max_scored=99, max_tokens=99, sweep_cost=12)) == 1
        assert len(self.check(works, max_scored=99, max_tokens=99, sweep_cost=11)) == 2

    @given(st.lists(st.tuples(*[st.integers(1, 9)] * 3), max_size=7), st.data())
    def test_no_other_groups_cost_less(self, pieces, data):
        rows, widths, places = ([piece[column] for piece in pieces] for column in range(3))
        limits = {
            "max_scored": data.draw(st.integers(1, 40)),
            "max_tokens": data.draw(st.integers(1, 200)),
        }
        sweep_cost = data.draw(st.integers(1, 60))

        def cost(group):
            tokens = sum(rows[group]) * max(widths[group])
            alone = group.stop - group.start == 1
            fits = sum(places[group]) <= limits["max_scored"] and tokens <= limits["max_tokens"]
            return tokens + sweep_cost if alone or fits else np.inf

        def costs(cuts):
            bounds = pairwise([0, *cuts, len(pieces)])
            return sum(cost(slice(*each)) for each in bounds)

        found = cheapest_groups(rows, widths, places, sweep_cost=sweep_cost, **limits)
        assert [row for group in found for row in range(group.start, group.stop)] == list(
            range(len(pieces))
        )
        inner = range(1, len(pieces))
        ways = [cuts for count in range(len(pieces)) for cuts in combinations(inner, count)]
        if pieces:
            assert sum(map(cost, found)) == min(map(costs, ways))


class TestBatches:
    def test_rows_of_similar_length_share_one(self):
        assert batches_of([5, 2, 9, 3, 1], 2) == [[4, 1], [3, 0], [2]]
        assert batches_of([3, 3, 3], 2) == [[0, 1], [2]]
        assert batches_of([], 2) == []

    def test_prompts_come_with_their_indices(self, scorer):
        examples = [Example("Is it so"), Example("Is"), Example("Is it")]
        batches = list(scorer.prompt_batches(examples, 2))
        assert [rows for rows, _, _ in batches] == [[1, 2], [0]]
        for rows, *encoded in batches:
            expected = scorer.encode_prompts([examples[row] for row in rows])
            assert all(map(torch.equal, encoded, expected))


class TestScorer:
    def test_prompts_are_what_a_user_tokenises(self, scorer):
        examples = [
            Example("Is it", ("yes", "no"), 0),
            Example("Answer the question", ("a", "b"), 1),
        ]
        ids, mask = scorer.encode_prompts(examples)
        tokenizer = word_tokenizer(bos=True)
        tokenizer.padding_side = "left"
        expected = tokenizer([item.prompt for item in examples], padding=True, return_tensors="pt")
        assert torch.equal(ids, expected["input_ids"])
        assert torch.equal(mask, expected["attention_mask"])
        for item, row, real in zip(examples, ids, mask, strict=True):
            for scored in scorer.encode(item).rows:
                prompt = row[real.bool()]
                assert scored[: len(prompt)].tolist() == prompt.tolist()

    def test_policies_see_letters_too(self):
        lettered = Scorer(tiny_model(), word_tokenizer(), "letter")
        ids, mask = lettered.encode_prompts([Example("Q", ("yes", "no"), 0)])
        assert mask.all()
        assert text_of(word_tokenizer(), ids[0]).endswith("\nB. no\nAnswer:")

    def test_chunks_and_order_do_not_matter(self, scorer):
        examples = [
            Example(f"Question {'very ' * n}long", ("yes", "no", "the end"), 0) for n in range(3)
        ]
        generator = np.random.default_rng(0)
        plans = generator.integers(0, 3, size=(20, 4)).astype(np.uint8)
        plans[:, 0] = 1
        example = generator.integers(3, size=20)
        one = scorer.outcomes(examples, plans, example)
        order = generator.permutation(20)
        small = Scorer(scorer.model, scorer.tokenizer, max_logit_bytes=4 * 97 * 12, max_tokens=80)
        other = small.outcomes(examples, plans[order], example[order])
        np.testing.assert_allclose(other.preserve, one.preserve[order], atol=1e-12)
        np.testing.assert_allclose(other.reward, one.reward[order], atol=1e-12)
        np.testing.assert_array_equal(other.answer, one.answer[order])
        # Sharing is lost where sweeps are cut, and gained from nothing else.
        assert one.executed_visits < other.executed_visits <= other.naive_visits == one.naive_visits

    def test_no_pairs(self, scorer):
        out = scorer.outcomes(
            [Example("Q", ("a", "b"), 0)], np.empty((0, 4), np.uint8), np.empty(0, np.int64)
        )
        assert (len(out.scores), out.reward.shape, out.naive_visits) == (0, (0,), 0)

    def test_what_is_kept_of_the_base_is_bounded(self):
        scorer = Scorer(tiny_model(), word_tokenizer(), max_base_bytes=2 * 97 * 8)
        examples = [Example(f"{n}") for n in range(5)]
        first = scorer.base(examples)
        assert scorer.base(examples[3:]).executed_visits == 0
        assert scorer.base(examples[:2]).executed_visits == 2 * 4
        assert (first.preserve == 0).all()
        assert np.isnan(first.of("reward")).all()
        assert first.of("preserve") is first.preserve

    def test_kinds_do_not_mix(self, scorer):
        examples = [Example("Q", ("a", "b"), 0), Example("a much longer question")]
        with pytest.raises(TaskError, match="examples of different kinds were scored in one call"):
            scorer.base(examples)

    def test_bad_input(self, scorer):
        example = Example("Q", ("a", "b"), 0)
        with pytest.raises(PlanError, match="a plan names 3 layers, but the model has 4"):
            scorer.outcomes([example], np.ones((1, 3), np.uint8), np.array([0]))
        with pytest.raises(PlanError, match="1 plans were given for 2 rows"):
            scorer.outcomes([example], np.ones((1, 4), np.uint8), np.array([0, 0]))
        with pytest.raises(
            TaskError, match="is 202 tokens long; the model has positions for 128: leave it out"
        ):
            scorer.base([Example("x" * 200, ("a", "b"), 0)])
        with pytest.raises(
            TaskError, match=r"scoring 'letters' is unknown \(did you mean 'letter'\?\)"
        ):
            Scorer(scorer.model, scorer.tokenizer, "letters")
        with pytest.raises(
            ConfigError, match=r"objective 'preserved' is unknown \(did you mean 'preserve'\?\)"
        ):
            check_objective("preserved")
        with pytest.raises(
            TaskError, match=r"ends every text with '</s>'.*load it with add_eos_token=False"
        ):
            Scorer(scorer.model, word_tokenizer(bos=True, eos=True))
        with pytest.raises(UnsupportedModelError):
            Scorer(torch.nn.Linear(2, 2), scorer.tokenizer)

    def test_a_wrapped_model_is_refused_and_left_wrapped(self):
        model = tiny_model()
        scorer = Scorer(model, word_tokenizer())
        wrap_model(model, plan=[1, 0, 1, 1])
        with pytest.raises(WrapError):
            scorer.base([Example("Q")])
        assert "dynadepth" in model.__dict__
        unwrap_model(model)
        assert scorer.base([Example("Q")]).agrees.all()


class TestPlanValues:
    SCORED = SimpleNamespace(
        agreement=np.array([[1.0, 0.0], [1.0, 0.5]]),
        total_variation=np.array([[0.0, 0.8], [0.4, 0.0]]),
        reward=np.log([[0.5, 0.25], [1.0, 0.125]]),
    )

    def test_to_preserve_is_agreement_before_closeness(self):
        expected = [[1.0, 0.05], [0.9, 0.625]]
        np.testing.assert_allclose(plan_values(self.SCORED, "preserve"), expected)

    def test_the_reward_is_the_probability_of_the_right_answer(self):
        expected = [[0.5, 0.25], [1.0, 0.125]]
        np.testing.assert_allclose(plan_values(self.SCORED, "reward"), expected)

    def test_rounding_makes_no_probability_above_one(self):
        scored = SimpleNamespace(**{**vars(self.SCORED), "reward": np.array([1e-7, -np.inf])})
        assert plan_values(scored, "reward").tolist() == [1.0, 0.0]

    def test_prompts_alone_have_no_reward(self):
        scored = SimpleNamespace(**{**vars(self.SCORED), "reward": np.full((2, 2), np.nan)})
        assert np.isfinite(plan_values(scored, "preserve")).all()
        with pytest.raises(ConfigError, match="objective 'reward' needs prompts with right ans"):
            plan_values(scored, "reward")
