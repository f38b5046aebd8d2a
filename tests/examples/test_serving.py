"""The serving example: three tasks, one backbone, many clients at once."""

import importlib.util
import json
import socket
import urllib.error
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

import deltakit as dk
from support.models import randomize
from support.tiny_transformers import build

EXAMPLE = Path(__file__).parents[2] / "examples" / "serving.py"
METHODS = {"spelling": dk.LoRA(r=3), "topic": dk.Adapter(size=5), "answer": dk.Prefix(tokens=3)}
WORDS = ["who", "wrote", "faust", "a", "poet", "in", "weimar", "?"]
# Seconds. Only a server that hangs takes them, on the slowest machine, too.
LONG = 600
TEXTS = ["who wrote faust ?", "a poet", "in weimar a poet wrote faust", "who ?", "wrote wrote wrote"]


@pytest.fixture(scope="module")
def serving():
    spec = importlib.util.spec_from_file_location("serving", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fresh(kind):
    return build(kind, AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM).eval()


def tokenizer_for(kind):
    names = ["[PAD]", "[UNK]", *WORDS]
    vocabulary = {word: place for place, word in enumerate([*names, *(f"w{place}" for place in range(len(names), 97))])}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    side = "right" if kind == "t5" else "left"
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="[PAD]", unk_token="[UNK]", padding_side=side)


def alone(kind, tokenizer, folder, text):
    """The answer of a fresh model with one delta, to one text."""
    model = fresh(kind)
    if folder is not None:
        dk.load(folder, model)
    inputs = tokenizer([text], return_tensors="pt")
    found = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=6, do_sample=False
    )
    skipped = 0 if kind == "t5" else inputs["input_ids"].shape[1]
    return tokenizer.batch_decode(found[:, skipped:], skip_special_tokens=True)[0]


@pytest.fixture(params=["t5", "llama"])
def kind(request):
    return request.param


@pytest.fixture
def folders(kind, tmp_path):
    found = {}
    for task, method in METHODS.items():
        delta = randomize(dk.attach(fresh(kind), method, name=task), 1.0)
        found[task] = delta.save(tmp_path / task)
    return found


@pytest.fixture
def start(serving, kind, request):
    """Starts a server, and returns it with a function that asks it over HTTP."""

    def started(sources, **options):
        server = serving.Server(fresh(kind), tokenizer_for(kind), sources, new_tokens=6, **options)
        web = ThreadingHTTPServer(("127.0.0.1", 0), serving.handler(server))
        Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()

        def stop():
            server.stop()
            web.shutdown()
            web.server_close()

        request.addfinalizer(stop)

        def ask(body):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{web.server_address[1]}", data) as answer:
                    return answer.status, json.loads(answer.read())
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, json.loads(error.read())

        ask.port = web.server_address[1]
        return server, ask

    return started


def test_clients_at_once(start, kind, folders, hub):
    """Each gets what its delta gives alone, two deltas at most are attached, and some batches have several tasks."""
    dk.load(folders["topic"], fresh(kind)).push("me/topic", token=hub.TOKEN)
    server, ask = start({**folders, "topic": "me/topic"}, most_deltas=2, most_examples=4)
    tokenizer = tokenizer_for(kind)
    wanted = {(task, text): alone(kind, tokenizer, folders[task], text) for task in METHODS for text in TEXTS}
    assert len(set(wanted.values())) > len(TEXTS)
    most, generate = [], server.generate

    def after_all_asked(requests):
        with server.changed:
            server.changed.wait_for(lambda: server.batches or len(requests) + len(server.waiting) >= 12, LONG)
        return generate(requests)

    server.generate = after_all_asked

    def one(key):
        found = ask({"task": key[0], "text": key[1]})
        most.append(len(dk.deltas(server.deltas.model)))
        return found

    with ThreadPoolExecutor(12) as clients:
        found = list(clients.map(one, 2 * sorted(wanted)))
    assert found == [(200, {"text": wanted[key]}) for key in 2 * sorted(wanted)]
    assert max(most) <= 2
    assert max(map(len, server.batches)) <= 4
    assert any(len(set(batch)) == 2 for batch in server.batches)


def test_a_delta_is_loaded_with_its_first_request(start, folders):
    server, ask = start(folders, most_deltas=2)
    assert not dk.deltas(server.deltas.model)
    for task, attached in (("topic", ["topic"]), ("answer", ["topic", "answer"]), ("spelling", ["answer", "spelling"])):
        assert ask({"task": task, "text": "a poet"})[0] == 200
        assert [delta.name for delta in dk.deltas(server.deltas.model)] == attached


def test_bad_requests(start, folders):
    _, ask = start({**folders, "lost": "no-such-folder"})
    assert ask({"task": "other", "text": "a"}) == (
        404,
        {"error": "no task 'other'; there are answer, lost, spelling, topic"},
    )
    for body in (b"", b"[]", b"{", {"task": "topic"}, {"task": 7, "text": "a"}, {"task": "topic", "text": None}):
        assert ask(body) == (400, {"error": 'expected {"task": "...", "text": "..."}'})
    assert ask(b"x" * 100_001)[0] == 413
    status, answer = ask({"task": "lost", "text": "a"})
    assert status == 500
    assert "no such folder" in answer["error"]
    assert ask({"task": "topic", "text": "a poet"})[0] == 200


def together(server, requests):
    """Asks all requests in one batch, and returns the answers or errors."""
    asked = [(*request, Future()) for request in requests]
    with server.changed:
        server.waiting.extend(asked)
        server.changed.notify()
    return [answer.exception(timeout=LONG) or answer.result() for _, _, answer in asked]


def test_a_delta_that_cannot_be_in_a_mixed_batch_fails_alone(start, kind, folders, tmp_path):
    """Attached it would make every request of every task fail. It evicts no other."""
    head = dk.attach(fresh(kind), dk.LoRA(r=2), train="@head" if kind == "llama" else "final_layer_norm", name="head")
    sources = {**folders, "head": randomize(head).save(tmp_path / "head")}
    server, ask = start(sources, most_deltas=1)
    assert ask({"task": "topic", "text": "a poet"})[0] == 200
    for _ in range(2):
        status, answer = ask({"task": "head", "text": "a poet"})
        assert status == 500
        assert answer["error"].startswith(
            "task 'head' cannot be served in batches with others: rows: delta 'head' fully"
        )
        assert [delta.name for delta in dk.deltas(server.deltas.model)] == list(server.deltas.attached) == ["topic"]
    assert ask({"task": "topic", "text": "a poet"})[0] == ask({"task": "answer", "text": "a"})[0] == 200


def test_a_source_that_fails_evicts_no_delta(start, folders):
    server, ask = start({**folders, "lost": "no-such-folder"}, most_deltas=1)
    assert ask({"task": "topic", "text": "a poet"})[0] == 200
    assert ask({"task": "lost", "text": "a poet"})[0] == 500
    assert list(server.deltas.attached) == ["topic"]


def test_a_tokenizer_without_padding_token(serving, start, folders, kind, monkeypatch):
    tokenizer = tokenizer_for(kind)
    tokenizer.pad_token, tokenizer.eos_token = None, "[UNK]"
    monkeypatch.setitem(globals(), "tokenizer_for", lambda _: tokenizer)
    server, ask = start(folders)
    assert ask({"task": "topic", "text": "a poet"})[0] == 200
    texts = together(server, [("topic", "a poet"), ("spelling", "in weimar a poet")])
    assert texts == [
        alone(kind, tokenizer, folders[task], text)
        for task, text in [("topic", "a poet"), ("spelling", "in weimar a poet")]
    ]
    assert ask({"task": "topic", "text": " "}) == (400, {"error": "the text is empty"})


@pytest.mark.parametrize("task", ["topic", "=folder", "topic="])
def test_a_task_without_a_source(serving, monkeypatch, capsys, task):
    monkeypatch.setattr("sys.argv", ["serving.py", "--model", "none", task])
    with pytest.raises(SystemExit):
        serving.main()
    assert f"expected TASK=FOLDER_OR_HUB_ID, found {task!r}" in capsys.readouterr().err


def test_one_bad_text_fails_alone(start, folders):
    server, _ = start(folders)
    generate = server.generate

    def refusing(requests):
        if any(text == "bad" for _, text, _ in requests):
            raise IndexError("too long")
        return generate(requests)

    server.generate = refusing
    texts = ["a poet", "bad", "who ?"]
    first, bad, last = together(server, list(zip(METHODS, texts, strict=True)))
    assert isinstance(first, str)
    assert isinstance(last, str)
    assert isinstance(bad, IndexError)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory"), SystemExit()])
@pytest.mark.parametrize("place", ["load", "need", "generate"])
def test_the_server_goes_on_after_any_error(serving, start, folders, monkeypatch, error, place):
    server, ask = start(folders)
    owner = {"load": serving.dk, "need": server.deltas, "generate": server}[place]
    with monkeypatch.context() as patch:

        def failing(*_, **__):
            raise error

        patch.setattr(owner, place, failing)
        (found,) = together(server, [("topic", "a poet")])
        assert type(found) in (type(error), RuntimeError)
    assert ask({"task": "topic", "text": "a poet"})[0] == 200


@pytest.mark.parametrize("length", ["x", "-1", "1.5", "9" * 5000])
def test_a_length_that_is_no_number(start, folders, length):
    _, ask = start(folders)
    with socket.create_connection(("127.0.0.1", ask.port), timeout=LONG) as client:
        client.sendall(f"POST / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode())
        found = client.makefile("rb").read()
    assert found.startswith(b"HTTP/1.1 400 ")
    assert found.endswith(b'{"error": "Content-Length must be a number of bytes"}')


@pytest.mark.parametrize("option", ["--deltas", "--batch", "--waiting"])
def test_no_room_at_all_is_refused(serving, monkeypatch, capsys, option):
    monkeypatch.setattr("sys.argv", ["serving.py", "--model", "none", option, "0", "a=b"])
    with pytest.raises(SystemExit):
        serving.main()
    assert f"argument {option}: expected at least 1, found 0" in capsys.readouterr().err


def test_what_waits_at_stop_is_answered(start, folders):
    server, _ = start(folders, most_examples=1)
    asked = [("topic", "a poet", Future()) for _ in range(2)]
    with server.changed:
        server.waiting.extend(asked)
        server.stopped = True
        server.changed.notify()
    assert all(isinstance(answer.result(timeout=LONG), str) for _, _, answer in asked)
    server.thread.join()


def test_a_bound_on_what_waits(start, folders):
    server, ask = start(folders, most_waiting=1)
    go, begun = Event(), Event()
    generate = server.generate

    def slow(requests):
        begun.set()
        go.wait(LONG)
        return generate(requests)

    server.generate = slow
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(ask, {"task": "topic", "text": "a"})
        assert begun.wait(LONG)
        second = clients.submit(ask, {"task": "topic", "text": "a"})
        with server.changed:
            assert server.changed.wait_for(lambda: server.waiting, LONG)
        assert ask({"task": "topic", "text": "a"}) == (503, {"error": "too many requests wait; try again later"})
        go.set()
        assert first.result()[0] == second.result()[0] == 200


def test_the_model_is_left_as_it_was(start, kind, folders):
    server, ask = start(folders)
    assert ask({"task": "topic", "text": "a poet"})[0] == 200
    for delta in dk.deltas(server.deltas.model):
        delta.detach()
    plain = fresh(kind).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in server.deltas.model.state_dict().items())
