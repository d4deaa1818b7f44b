"""The example server: concurrent requests of mixed budgets, each answered as alone."""

import http.client
import importlib.util
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynadepth import load_policy, wrap_model

EXAMPLE = Path(__file__).parents[2] / "examples/serve.py"
BUDGETS = (0.5, 0.7, 0.9, None)
WORDS = ("the river", "snow falls on the hill", "why", "a cat sat there", "blue")
NUM_REQUESTS, NEW_TOKENS = 20, 12

pytestmark = pytest.mark.filterwarnings("ignore::dynadepth.errors.DynadepthWarning")


@pytest.fixture(scope="module")
def serve():
    spec = importlib.util.spec_from_file_location("serve", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wrapped(folder, budget=0.7):
    return wrap_model(AutoModelForCausalLM.from_pretrained(folder).eval(), budget=budget)


@pytest.fixture
def server(serve, tiny_routed):
    tokenizer = AutoTokenizer.from_pretrained(tiny_routed)
    with serve.Server(("127.0.0.1", 0), wrapped(tiny_routed), tokenizer) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server, body, *, method="POST", path="/generate"):
    """Return status, text and the pieces in which the text came."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body))
    response = connection.getresponse()
    pieces = iter(lambda: response.read1(), b"")
    pieces = [piece.decode() for piece in pieces]
    connection.close()
    return response.status, "".join(pieces), pieces


def alone(folder, prompt, budget):
    """Return what a model wrapped for this budget alone says, and the plan it follows."""
    model, tokenizer = wrapped(folder, budget or 0.7), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    names = ("input_ids", "attention_mask")
    tokens = model.generate(
        **{name: inputs[name] for name in names}, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text, model.dynadepth.last_plans[0].tobytes()


def test_twenty_requests_at_a_time_are_answered_as_alone(server, tiny_routed):
    requests = [
        {
            "prompt": f"{WORDS[number % len(WORDS)]} {number}",
            "budget": BUDGETS[number % len(BUDGETS)],
            "max_new_tokens": NEW_TOKENS,
        }
        for number in range(NUM_REQUESTS)
    ]
    expected = [alone(tiny_routed, each["prompt"], each["budget"]) for each in requests]
    # Another budget gives another plan, and that another answer: or the test would see nothing.
    assert len({plan for _, plan in expected}) > 2
    together = threading.Barrier(NUM_REQUESTS)

    def request(body):
        together.wait()
        return ask(server, body)

    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        answers = list(pool.map(request, requests))
    wrong = [
        number
        for number, (status, text, _) in enumerate(answers)
        if (status, text) != (200, expected[number][0])
    ]
    assert wrong == []
    status, stats, _ = ask(server, b"", method="GET", path="/stats")
    assert (status, json.loads(stats)["prompts"]) == (200, NUM_REQUESTS)


def test_an_answer_comes_piece_by_piece(server):
    body = {"prompt": "the river runs", "max_new_tokens": 64, "budget": 0.9}
    status, text, pieces = ask(server, body)
    assert status == 200
    assert len(pieces) > 1 or len(text) < 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "a", "budget": 7}, "expected a mean depth within the calibrated range"),
        ({"prompt": "a", "budget": "0.7"}, "not a number"),
        ({"prompt": "a", "max_new_tokens": 0}, "expected 1 to"),
        ({"prompt": "a", "max_new_tokens": True}, "expected 1 to"),
        ({"prompt": ""}, "expected `prompt`"),
        ({"prompt": "a", "temperature": 2}, "temperature"),
        ([], "expected a JSON object"),
        (b"{", "Expecting"),
        (b"", "expected 1 to"),
    ],
)
def test_what_cannot_be_answered_is_told(server, tiny_routed, body, message):
    status, text, _ = ask(server, body)
    assert status == 400
    assert message in text
    # And the next request is answered.
    status, text, _ = ask(server, {"prompt": "why", "max_new_tokens": NEW_TOKENS})
    assert (status, text) == (200, alone(tiny_routed, "why", None)[0])


def test_other_paths_and_clients_that_go(server, tiny_routed):
    assert ask(server, {"prompt": "a"}, path="/")[0] == 404
    assert ask(server, b"", method="GET", path="/generate")[0] == 404
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    connection.request("POST", "/generate", json.dumps({"prompt": "a", "max_new_tokens": 1024}))
    connection.close()
    assert load_policy(tiny_routed / "routers").kind == "routers"
    status, text, _ = ask(server, {"prompt": "why", "max_new_tokens": NEW_TOKENS})
    assert (status, text) == (200, alone(tiny_routed, "why", None)[0])
