"""Serve a wrapped model over HTTP, each request with a budget of its own: python serve.py --model my-model.

curl -N localhost:8000/generate -d '{"prompt": "Why is the sky blue?", "budget": 0.7, "max_new_tokens": 64}'
curl localhost:8000/stats
"""

import argparse
import json
import signal
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from threading import Event
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from dynadepth import wrap_model

MOST_BYTES, MOST_NEW_TOKENS = 2**20, 1024
KEYS = {"prompt", "budget", "max_new_tokens"}


class StopWhenSet(StoppingCriteria):
    """Ends a generation that nobody reads any more."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Say for each row whether it is done."""
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class Server(ThreadingHTTPServer):
    """Reads and answers each request in a thread of its own; the answers are generated in the threads of a pool."""

    daemon_threads = False  # closing waits for the answers under way
    request_queue_size = 128

    def __init__(self, port: int, model: Any, tokenizer: Any, pool: ThreadPoolExecutor) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.tokenizer, self.pool = model, tokenizer, pool

    def stream(self, prompt: str, budget: Any, max_new_tokens: int) -> Generator[str, None, None]:
        """Yield an answer piece by piece, some of them empty; raises what its generation raises."""
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        unread = Event()

        def generate() -> None:
            # The block holds in the thread that opens it, so it is opened where `generate` runs.
            block = nullcontext() if budget is None else self.model.dynadepth.at_budget(budget)
            with block:
                self.model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([StopWhenSet(unread)]),
                )

        work = self.pool.submit(generate)
        # A generation that fails ends its stream too.
        work.add_done_callback(lambda _: streamer.text_queue.put(streamer.stop_signal))
        try:
            yield from streamer
            work.result()
        finally:
            unread.set()


class Handler(BaseHTTPRequestHandler):
    """Answers one request and closes the connection."""

    server: Server
    protocol_version = "HTTP/1.1"  # which has chunks
    timeout = 30  # seconds that a client may neither send nor read

    def do_GET(self) -> None:
        """Answer /stats."""
        if self.path != "/stats":
            return self.reply(404, "there are POST /generate and GET /stats")
        totals = self.server.model.dynadepth.totals
        return self.reply(200, json.dumps({**asdict(totals), "mean_depth": totals.mean_depth}))

    def do_POST(self) -> None:
        """Answer /generate."""
        if self.path != "/generate":
            return self.reply(404, "there are POST /generate and GET /stats")
        try:
            request = self.read_request()
        except ValueError as error:
            return self.reply(400, str(error))
        with closing(self.server.stream(*request)) as pieces:
            try:
                # With the first piece, the budget is accepted and the prompt has been planned.
                first = next(pieces, "")
            except ValueError as error:  # such as a BudgetError
                return self.reply(400, str(error))
            except Exception:
                self.reply(500, "the answer could not be generated")
                raise
            # A client that has gone ends its own answer and nothing else.
            with suppress(ConnectionError, TimeoutError):
                self.send_pieces(chain([first], pieces))
        return None

    def read_request(self) -> tuple[str, Any, int]:
        """Return the prompt, the budget (None for the model's own; checked later) and the number of new tokens."""
        length = int(self.headers.get("Content-Length", 0))
        if not 0 < length <= MOST_BYTES:
            raise ValueError(f"the body has {length} bytes; expected JSON of 1 to {MOST_BYTES}")
        request = json.loads(self.rfile.read(length))
        if not isinstance(request, dict) or not {"prompt"} <= set(request) <= KEYS:
            raise ValueError(f"expected a JSON object with prompt and no keys but {sorted(KEYS)}")
        prompt, num_tokens = request["prompt"], request.get("max_new_tokens", 64)
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"prompt is {prompt!r}; expected a text that is not empty")
        prompt.encode()  # half a character, which JSON can spell, is no text
        if type(num_tokens) is not int or not 1 <= num_tokens <= MOST_NEW_TOKENS:
            raise ValueError(
                f"max_new_tokens is {num_tokens!r}; expected a number from 1 to {MOST_NEW_TOKENS}"
            )
        return prompt, request.get("budget"), num_tokens

    def send_pieces(self, pieces: Iterable[str]) -> None:
        """Send each piece as a chunk of its own, at once."""
        self.start(200, ("Transfer-Encoding", "chunked"))
        for piece in pieces:
            if piece:  # a chunk of no bytes would end the answer
                data = piece.encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")

    def reply(self, status: int, text: str) -> None:
        """Send a whole text."""
        data = f"{text}\n".encode()
        self.start(status, ("Content-Length", str(len(data))))
        self.wfile.write(data)

    def start(self, status: int, body: tuple[str, str]) -> None:
        """Send the head of a response, with the header that says where its body ends."""
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Connection", "close")
        self.send_header(*body)
        self.end_headers()


def main() -> None:
    """Serve until Ctrl-C or SIGTERM; the answers under way are finished."""
    parser = argparse.ArgumentParser(description="Serve a wrapped model over HTTP.")
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--routers", help="folder or Hub id; without it, routers/ beside the model")
    parser.add_argument("--budget", type=float, default=0.8, help="of requests that name none")
    parser.add_argument("--threads", type=int, default=4, help="answers generated at a time")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).to(options.device)
    model = wrap_model(model, budget=options.budget, routers=options.routers)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        ThreadPoolExecutor(options.threads) as pool,
        Server(options.port, model, tokenizer, pool) as server,
        suppress(KeyboardInterrupt),
    ):
        print(f"serving on http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
