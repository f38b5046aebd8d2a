"""Serve several tasks from one backbone over HTTP. Requests of different tasks run in one batch.

    python examples/serving.py --model google-t5/t5-small spelling=me/spelling topic=me/topic answer=folders/answer
    curl -d '{"task": "topic", "text": "Who wrote Faust?"}' localhost:8000

A delta is loaded when its first request comes, from a folder or the Hub. At most `--deltas` are attached: the one that was
used least recently makes room. At most `--batch` requests run together, and at most `--waiting` wait.
"""

import argparse
import json
from collections import OrderedDict, deque
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Condition, Thread

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import deltakit as dk


class Full(Exception):
    """Too many requests wait."""


class Deltas:
    """The deltas of the tasks, each loaded when it is first needed, and at most `most` attached."""

    def __init__(self, model, sources, most):
        self.model, self.sources, self.most = model, sources, most
        self.attached = OrderedDict()

    def need(self, task, others):
        """Attaches the delta of a task. The tasks in `others` stay. After an error all is as before."""
        if task not in self.attached:
            delta = dk.load(self.sources[task], self.model, name=task, attach=False)
            too_many = max(0, len(self.attached) + 1 - self.most)
            leaving = [name for name in self.attached if name not in others][:too_many]
            for name in leaving:
                self.attached[name].detach()
            try:
                self.attach(task, delta)
            except BaseException:
                for name in leaving:
                    self.attached[name].attach()
                raise
            for name in leaving:
                del self.attached[name]
        self.attached.move_to_end(task)

    def attach(self, task, delta):
        """Attaches a delta that can be one of several in a batch."""
        try:
            delta.attach()
            # It checks the delta before any forward. A delta that changes the backbone itself would stop all tasks.
            with dk.rows(self.model, [task]):
                self.attached[task] = delta
        except BaseException as error:
            delta.detach()
            if isinstance(error, dk.StateError):
                raise RuntimeError(f"task {task!r} cannot be served in batches with others: {error}") from error
            raise


class Server:
    """One thread that owns the model: it takes what waits, and runs it as one batch."""

    def __init__(self, model, tokenizer, sources, *, most_deltas=8, most_examples=16, most_waiting=256, new_tokens=32):
        self.model, self.tokenizer, self.new_tokens = model.eval(), tokenizer, new_tokens
        if tokenizer.pad_token is None:
            # Those of GPT-2 and Llama have none. The attention mask hides what is padded.
            tokenizer.pad_token = tokenizer.eos_token
        self.deltas = Deltas(model, sources, most_deltas)
        self.most_examples, self.most_waiting = most_examples, most_waiting
        self.waiting, self.changed, self.stopped = deque(), Condition(), False
        self.batches = []
        self.thread = Thread(target=self.run, daemon=True)
        self.thread.start()

    def ask(self, task, text):
        """Returns the answer to a request, when it is there."""
        answer = Future()
        with self.changed:
            if self.stopped or len(self.waiting) >= self.most_waiting:
                raise Full
            self.waiting.append((task, text, answer))
            self.changed.notify()
        return answer.result()

    def run(self):
        while batch := self.take():
            try:
                self.answer(self.ready(batch))
            except BaseException as error:
                # The thread goes on whatever happens, and no client waits for ever.
                for _, _, answer in batch:
                    if not answer.done():
                        answer.set_exception(RuntimeError(repr(error)))

    def ready(self, batch):
        """Returns the requests of a batch whose deltas are attached. The others have failed."""
        ready, tasks = [], set()
        for task, text, answer in batch:
            try:
                self.deltas.need(task, tasks)
            except Exception as error:
                answer.set_exception(error)
                continue
            tasks.add(task)
            ready.append((task, text, answer))
        return ready

    def answer(self, requests):
        """Answers requests together; if that fails, each by itself, so that one bad text fails alone."""
        if not requests:
            return
        try:
            texts = self.generate(requests)
        except Exception as error:
            if len(requests) == 1:
                requests[0][2].set_exception(error)
                return
            texts = None
        if texts is None:
            # Outside of the handler: what it holds of the failed batch is freed.
            for request in requests:
                self.answer([request])
            return
        for (_, _, answer), text in zip(requests, texts, strict=True):
            answer.set_result(text)

    def take(self):
        """Waits for requests, and takes those that fit into one batch, in their order.

        After `stop` it takes what still waits, and then nothing.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.stopped)
            batch, left, tasks = [], deque(), set()
            for request in self.waiting:
                fits = len(batch) < self.most_examples and len(tasks | {request[0]}) <= self.deltas.most
                (batch if fits else left).append(request)
                tasks |= {request[0]} if fits else set()
            self.waiting = left
            return batch

    @torch.no_grad()
    def generate(self, requests):
        self.batches.append([task for task, _, _ in requests])
        inputs = self.tokenizer([text for _, text, _ in requests], return_tensors="pt", padding=True)
        inputs = {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        with dk.rows(self.model, [task for task, _, _ in requests]):
            found = self.model.generate(**inputs, max_new_tokens=self.new_tokens, do_sample=False)
        skipped = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        return self.tokenizer.batch_decode(found[:, skipped:], skip_special_tokens=True)

    def stop(self):
        with self.changed:
            self.stopped = True
            self.changed.notify()
        self.thread.join()


def handler(server):
    """The HTTP side: `POST {"task": ..., "text": ...}` gives `{"text": ...}`, or an error as `{"error": ...}`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            status, answer = self.answer()
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def answer(self):
            try:
                length = int(self.headers.get("Content-Length") or 0)
            except ValueError:
                length = -1
            if length < 0:
                self.close_connection = True
                return 400, {"error": "Content-Length must be a number of bytes"}
            if length > 100_000:
                self.close_connection = True
                return 413, {"error": "a request has at most 100,000 bytes"}
            try:
                request = json.loads(self.rfile.read(length))
                task, text = request["task"], request["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                task = text = None
            if not isinstance(task, str) or not isinstance(text, str):
                return 400, {"error": 'expected {"task": "...", "text": "..."}'}
            if not text.strip():
                return 400, {"error": "the text is empty"}
            if task not in server.deltas.sources:
                return 404, {"error": f"no task {task!r}; there are {', '.join(sorted(server.deltas.sources))}"}
            try:
                return 200, {"text": server.ask(task, text)}
            except Full:
                return 503, {"error": "too many requests wait; try again later"}
            except Exception as error:
                return 500, {"error": str(error)}

        def log_message(self, *_):
            pass

    return Handler


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {text}")
    return int(text)


def source(text):
    """Returns a task and its folder or Hub id."""
    task, _, place = text.partition("=")
    if not task or not place:
        raise argparse.ArgumentTypeError(f"expected TASK=FOLDER_OR_HUB_ID, found {text!r}")
    return task, place


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or Hub id of a model that generates text")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--deltas", type=positive, default=8, help="how many deltas are attached at once (%(default)s)")
    parser.add_argument("--batch", type=positive, default=16, help="how many requests run together (%(default)s)")
    parser.add_argument("--waiting", type=positive, default=256, help="how many requests may wait (%(default)s)")
    parser.add_argument("tasks", nargs="+", type=source, metavar="TASK=FOLDER_OR_HUB_ID")
    options = parser.parse_args()
    seq2seq = AutoConfig.from_pretrained(options.model).is_encoder_decoder
    model = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(options.model)
    # A model with a decoder alone goes on writing at the end of each text.
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="right" if seq2seq else "left")
    sources = dict(options.tasks)
    server = Server(
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        tokenizer,
        sources,
        most_deltas=options.deltas,
        most_examples=options.batch,
        most_waiting=options.waiting,
    )
    web = ThreadingHTTPServer(("127.0.0.1", options.port), handler(server))
    print(f"serving {', '.join(sources)} at http://127.0.0.1:{web.server_address[1]}", flush=True)
    try:
        web.serve_forever()
    finally:
        server.stop()


if __name__ == "__main__":
    main()
