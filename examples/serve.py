"""Serve one wrapped model over HTTP: many requests at a time, each with a budget of its own, answers as they come.

    python serve.py --model my-model --budget 0.8 --port 8000
    curl -N localhost:8000/generate -d '{"prompt": "Why is the sky blue?", "budget": 0.9, "max_new_tokens": 32}'
    curl localhost:8000/stats

Needs dynadepth and the standard library. For the public it lacks what such servers lack: limits, logs, authentication.
"""

import argparse
import json
from contextlib import nullcontext
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from dynadepth import DynadepthError, wrap_model

LONGEST_BODY, MOST_NEW_TOKENS = 1_000_000, 1024


class Server(ThreadingHTTPServer):
    """Runs every request in a thread of its own; all of them share the model."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], model: Any, tokenizer: Any) -> None:
        super().__init__(address, Handler)
        self.model, self.tokenizer = model, tokenizer


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    server: Server
    streaming = False

    def do_GET(self) -> None:
        """Tell what the model has done so far."""
        if self.path != "/stats":
            return self.answer(404, "there is /stats to get and /generate to post to")
        return self.answer(200, json.dumps(asdict(self.server.model.dynadepth.totals)))

    def do_POST(self) -> None:
        """Answer a prompt."""
        if self.path != "/generate":
            return self.answer(404, "there is /stats to get and /generate to post to")
        try:
            request = read_request(self)
            # A block holds in its own thread, so it is opened in the one that generates.
            budget = request["budget"]
            block = (
                nullcontext() if budget is None else self.server.model.dynadepth.at_budget(budget)
            )
            with block:
                return self.generate(request["prompt"], request["max_new_tokens"])
        except (ValueError, DynadepthError) as error:
            if not self.streaming:
                return self.answer(400, str(error))
            self.close_connection = True
        except ConnectionError:
            # The client has gone; writing to it has ended the generation.
            self.close_connection = True

    def generate(self, prompt: str, max_new_tokens: int) -> None:
        """Generate an answer and send it as it comes."""
        inputs = self.server.tokenizer(prompt, return_tensors="pt").to(self.server.model.device)
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.streaming = True
        self.server.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=Chunks(self.server.tokenizer, self.wfile),
        )
        self.streaming = False

    def answer(self, status: int, text: str) -> None:
        """Send a text as a whole."""
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


class Chunks(TextStreamer):
    """Writes text to a client as chunks of HTTP, as soon as it is final."""

    def __init__(self, tokenizer: Any, client: BinaryIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.client = client

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: FBT001, FBT002 - as the base
        """Send what has become final since the last call."""
        content = text.encode()
        if content:
            self.client.write(b"%x\r\n%s\r\n" % (len(content), content))
        if stream_end:
            self.client.write(b"0\r\n\r\n")


def read_request(handler: Handler) -> dict[str, Any]:
    """Return prompt, budget and max_new_tokens of a request, or raise ValueError with what is wrong."""
    length = int(handler.headers.get("Content-Length") or 0)
    if not 0 < length <= LONGEST_BODY:
        handler.close_connection = True
        raise ValueError(f"the body has {length} bytes; expected 1 to {LONGEST_BODY}")
    request = json.loads(handler.rfile.read(length))
    if not isinstance(request, dict):
        raise ValueError(  # noqa: TRY004 - wrong input of a client, as all else here
            "expected a JSON object with `prompt`, and perhaps `budget` and `max_new_tokens`"
        )
    unknown = set(request) - {"prompt", "budget", "max_new_tokens"}
    prompt, most = request.get("prompt"), request.get("max_new_tokens", 64)
    if unknown or not isinstance(prompt, str) or not prompt:
        raise ValueError(f"expected `prompt`, a text, and no {sorted(unknown) or 'empty one'}")
    if type(most) is not int or not 1 <= most <= MOST_NEW_TOKENS:
        raise ValueError(f"max_new_tokens is {most!r}; expected 1 to {MOST_NEW_TOKENS}")
    return {"prompt": prompt, "budget": request.get("budget"), "max_new_tokens": most}


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or Hub id, with routers beside it")
    parser.add_argument("--budget", type=float, default=0.8, help="of requests that name none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model).to(given.device).eval()
    with Server(
        ("127.0.0.1", given.port), wrap_model(model, budget=given.budget), tokenizer
    ) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
