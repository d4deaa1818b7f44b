"""`examples/serve.py` over real HTTP: each of many answers at once is that of its request alone."""

import ast
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection, IncompleteRead
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynadepth.checkpoints.save_load import save_policy
from dynadepth.errors import BudgetError
from dynadepth.models.fingerprint import fingerprint
from dynadepth.policies.calibration import Calibration
from dynadepth.wrapping.wrap import wrap_model
from tests.tiny_folder import save_tiny_base
from tests.tiny_menus import random_menu
from tests.tiny_routers import random_routers

EXAMPLE = Path(__file__).parents[2] / "examples/serve.py"
PROMPTS = ("Why is the sky blue?", "Answer", "the A or the B", "1, 2, 3, 4, 5: what is next")
OWN, BUDGETS = 0.9, (None, 0.5, 0.6, 0.7, 1.0)
NEW, THREADS = 24, 8
# The token at which a hook stops a generation; by then the answer's first letters have been sent.
HELD = 12
# The scores of tiny models are of order 10, so that these penalties move them.
CALIBRATION = Calibration(
    lambdas=(200.0, 8.0, 3.0, 0.0, -200.0),
    depths=(0.5, 0.6, 0.7, 0.9, 1.0),
    lowest=0.5,
    highest=1.0,
)


@pytest.fixture(scope="module", params=["routers", "menu"])
def folder(request, tmp_path_factory):
    """A tiny model with random routers or a random menu beside it."""
    base = save_tiny_base(tmp_path_factory.mktemp("served") / "tiny-llama", num_layers=6)
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"fingerprint": fingerprint(model), "calibration": CALIBRATION, "hidden_size": 32}
    if request.param == "routers":
        trained = random_routers(num_layers=6, **settings)
    else:
        trained = random_menu(layers=(2, 4), windows=(3, 0), inner=(0, 0), seed=1, **settings)
    save_policy(base / "routers", trained)
    return base


def wrapped(folder, budget=OWN):
    return wrap_model(AutoModelForCausalLM.from_pretrained(folder), budget=budget)


def alone(folder, prompt, budget, num_tokens=NEW):
    """Return the answer of a model that is wrapped for this request and sees no other."""
    model, tokenizer = wrapped(folder, budget or OWN), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)[0]
    return tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@contextmanager
def asked(port, body, *, path="/generate", method="POST", headers=None):
    """Send a request, and yield the response before its body is read."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    with closing(HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request(method, path, data, headers or {})
        with closing(connection.getresponse()) as response:
            yield response


def answer(port, body, **request):
    with asked(port, body, **request) as response:
        return response.status, response.read().decode()


@contextmanager
def program(folder):
    """Run the example as it stands, and yield its process and port; it ends in order when it is told to."""
    command = [sys.executable, EXAMPLE, "--model", folder, "--port", "0"]
    command += ["--threads", str(THREADS), "--budget", str(OWN)]
    # Float sums stay in one order.
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        (folder / "errors.txt").open("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=settings
        ) as process,
    ):
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"serving on http://127\.0\.0\.1:(\d+)\n", line)
            assert found is not None, (folder / "errors.txt").read_text()
            yield process, int(found[1])
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
    assert "Traceback" not in (folder / "errors.txt").read_text()


@contextmanager
def running(folder):
    """Run the example's server in this process, and yield its port and its model."""
    names = runpy.run_path(str(EXAMPLE))
    model, tokenizer = wrapped(folder), AutoTokenizer.from_pretrained(folder)
    with ThreadPoolExecutor(THREADS) as pool, names["Server"](0, model, tokenizer, pool) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port, model
        finally:
            server.shutdown()
            thread.join()


def at_token(model, number, action):
    """Do something, once, before the token of this number of the model's next generation."""
    seen = []

    def hook(*_):
        seen.append(None)
        if len(seen) == number:
            action()

    return model.lm_head.register_forward_pre_hook(hook)


def test_twenty_requests_at_once_are_answered_as_each_alone(folder):
    requests = [(prompt, budget) for prompt in PROMPTS for budget in BUDGETS]
    expected = [alone(folder, *request) for request in requests]
    per_prompt = [expected[start : start + len(BUDGETS)] for start in range(0, 20, len(BUDGETS))]
    assert len(requests) == 20
    assert all(len(set(answers)) > 1 for answers in per_prompt)
    meet = threading.Barrier(len(requests))

    def ask(request):
        prompt, budget = request
        body = {"prompt": prompt, "max_new_tokens": NEW}
        meet.wait(timeout=60)
        return answer(port, body if budget is None else {**body, "budget": budget})

    with program(folder) as (_, port), ThreadPoolExecutor(len(requests)) as clients:
        found = list(clients.map(ask, requests))
        assert found == [(200, text) for text in expected]
        status, text = answer(port, None, path="/stats", method="GET")
        totals = json.loads(text)
        assert status == 200
        assert (totals["prompts"], totals["prefill_forwards"]) == (20, 20)
        assert totals["decode_forwards"] == 20 * (NEW - 1)
        assert 0.5 <= totals["mean_depth"] <= 2
        assert totals["visits"] < totals["plain_visits"]


WRONG = {
    "no JSON": (b"why?", "Expecting value"),
    "no text": (b"\xff\xfe\xfd", "codec can't decode"),
    "nothing": (b"", "the body has 0 bytes"),
    "no object": (["a"], "expected a JSON object with prompt"),
    "no prompt": ({"budget": 0.7}, "expected a JSON object with prompt"),
    "unknown key": ({"prompt": "a", "tokens": 3}, "no keys but"),
    "empty prompt": ({"prompt": ""}, "prompt is ''"),
    "prompt of numbers": ({"prompt": [1, 2]}, r"prompt is \[1, 2\]"),
    "half a character": ({"prompt": "\ud800"}, "surrogates not allowed"),
    "no tokens": ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens is 0"),
    "too many tokens": ({"prompt": "a", "max_new_tokens": 10**9}, "from 1 to 1024"),
    "tokens that are no number": ({"prompt": "a", "max_new_tokens": True}, "is True"),
}


def test_wrong_requests_are_told_what_is_wrong_and_run_nothing(folder):
    with running(folder) as (port, model):
        for budget in (0.2, 1.5, "0.7", True, float("nan")):
            with pytest.raises(BudgetError) as error, model.dynadepth.at_budget(budget):
                pass
            found = answer(port, {"prompt": "a", "budget": budget})
            assert found == (400, f"{error.value}\n")
        for name, (body, message) in WRONG.items():
            status, text = answer(port, body)
            assert status == 400, name
            assert re.search(message, text), name
        for length, message in ((2**20 + 1, "1048577 bytes"), (-1, "-1 bytes"), ("long", "'long'")):
            status, text = answer(port, b"", headers={"Content-Length": str(length)})
            assert status == 400
            assert message in text
        assert answer(port, {"prompt": "a"}, path="/other")[0] == 404
        assert answer(port, None, path="/generate", method="GET")[0] == 404
        assert model.dynadepth.totals.prompts == 0


def test_an_answer_arrives_in_pieces_while_it_is_generated(folder):
    body = {"prompt": PROMPTS[0], "max_new_tokens": NEW, "budget": 0.7}
    received = threading.Event()
    with running(folder) as (port, model):
        at_token(model, HELD, lambda: received.wait(60))
        with asked(port, body) as response:
            first = response.read1()
            assert not received.is_set()
            assert model.dynadepth.totals.decode_forwards < HELD
            received.set()
            rest = response.read()
    assert first
    assert rest
    assert (first + rest).decode() == alone(folder, PROMPTS[0], 0.7)


def test_a_client_that_goes_ends_its_own_answer_and_no_other(folder, capfd):
    gone, most = threading.Event(), 1000
    with running(folder) as (port, model):
        hook = at_token(model, HELD, lambda: gone.wait(60))
        with asked(port, {"prompt": PROMPTS[0], "max_new_tokens": most}) as response:
            assert response.read1()
        gone.set()
        body = {"prompt": PROMPTS[1], "max_new_tokens": NEW, "budget": 0.5}
        assert answer(port, body) == (200, alone(folder, PROMPTS[1], 0.5))
        hook.remove()
    # The server is closed, so that nothing runs any more.
    assert NEW - 1 <= model.dynadepth.totals.decode_forwards < most
    assert "Traceback" not in capfd.readouterr().err


def fail():
    raise RuntimeError("a layer has failed")


def test_a_generation_that_fails_is_not_taken_for_an_answer(folder):
    body = {"prompt": PROMPTS[0], "max_new_tokens": NEW, "budget": 0.7}
    with running(folder) as (port, model):
        hook = at_token(model, 1, fail)
        assert answer(port, body) == (500, "the answer could not be generated\n")
        hook.remove()
        hook = at_token(model, HELD, fail)
        with asked(port, body) as response, pytest.raises(IncompleteRead):
            response.read()
        hook.remove()
        assert answer(port, body) == (200, alone(folder, PROMPTS[0], 0.7))


def test_an_answer_under_way_is_finished_when_the_server_is_told_to_end(folder):
    most = 200
    body = {"prompt": PROMPTS[2], "max_new_tokens": most, "budget": 1.0}
    with program(folder) as (process, port), asked(port, body) as response:
        first = response.read1()
        process.send_signal(signal.SIGTERM)
        found = (first + response.read()).decode()
        process.wait(timeout=120)
    assert found == alone(folder, PROMPTS[2], 1.0, most)


def test_the_example_needs_nothing_but_the_standard_library_and_what_dynadepth_brings():
    nodes = list(ast.walk(ast.parse(EXAMPLE.read_text())))
    names = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    others = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert others == {"dynadepth", "torch", "transformers"}
