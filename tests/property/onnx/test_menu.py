"""The mixture of penalties that a menu's graph computes is `Calibration.mix_for`'s, bit for bit."""

import functools

import numpy as np
import onnx
import onnxruntime
from hypothesis import given
from hypothesis import strategies as st

from dynadepth.onnx.menu_graph import build_menu_onnx
from dynadepth.policies.calibration import Calibration
from tests.tiny_menus import random_menu

MENU = random_menu(hidden_size=2).menu
PARTS = ("deep", "shallow", "share", "prices")


@st.composite
def calibrations(draw):
    """Tables of every spacing, also of neighbours that are one depth in float32."""
    count = draw(st.integers(1, 8))
    numbers = functools.partial(st.lists, min_size=count, max_size=count, unique=True)
    places = st.floats(0.01, 2.0) | st.integers(1, 60).map(lambda step: 0.5 + 1e-9 * step)
    depths = sorted(draw(numbers(places)))
    lambdas = sorted(draw(numbers(st.floats(-1e5, 1e5))), reverse=True)
    lowest, highest = sorted(
        draw(
            st.tuples(st.floats(depths[0], depths[-1]), st.floats(depths[0], depths[-1]))
            | st.just((depths[0], depths[-1]))
        )
    )
    return Calibration(lambdas=tuple(lambdas), depths=tuple(depths), lowest=lowest, highest=highest)


def session_of(calibration):
    """Return a session of a menu's graph that also puts out what it computes of the budget."""
    trained = random_menu(hidden_size=2, menu=MENU, calibration=calibration)
    model = onnx.load_from_string(build_menu_onnx(trained))
    for name in PARTS:
        shape = ["batch"] if name == "prices" else []
        info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        model.graph.output.append(info)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


@given(calibrations(), st.lists(st.floats(0.0, 1.0), max_size=5))
def test_the_penalties_of_the_graph_are_those_of_the_table(calibration, places):
    session = session_of(calibration)
    low, high = (float(np.float32(end)) for end in calibration.range)
    within = [low + place * (high - low) for place in places]
    entries = [depth for depth in calibration.depths if low <= np.float32(depth) <= high]
    for budget in (low, high, *entries, *within):
        mix = calibration.mix_for(budget)
        share = np.float32(mix.share)
        ends = np.float32(0.0), np.float32(1.0)
        mixes = np.array(
            [0.0, *(np.nextafter(share, end) for end in ends), share, 1 - 2**-24], np.float32
        )
        feed = {
            "hidden_states": np.zeros((len(mixes), 1, 2), np.float32),
            "attention_mask": np.ones((len(mixes), 1), np.int64),
            "budget": np.asarray(budget, np.float32),
            "mix": mixes,
        }
        deep, shallow, given_share, prices, plans = session.run([*PARTS, "plan"], feed)
        wanted = np.float32(mix.deep), np.float32(mix.shallow), share
        assert (deep, shallow, given_share) == wanted
        assert (prices == np.where(mixes < mix.share, wanted[0], wanted[1])).all()
        assert (plans >= 0).all()
