"""The page of a picker over loopback: who gets an answer, what messages do, and how it ends."""

import http.client
import json
import re
import socket
import threading
import urllib.error
import urllib.request

import pytest

import deltakit as dk
from deltakit.picking.browser import PickerServer, in_browser
from deltakit.picking.picker import Picker
from support.models import Transformer


@pytest.fixture
def server():
    with PickerServer(Picker(Transformer()), grace=0.0) as found:
        yield found


def ask(server, path, *, body=None, **headers):
    """The status and the text of an answer. Without other headers they are those of the page itself."""
    own = {"X-Deltakit-Token": server.token} | ({"Content-Type": "application/json"} if body is not None else {})
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    sent = {name: value for name, value in {**own, **given}.items() if value is not None}
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{path}", data, sent)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_page_is_served_to_who_has_the_token(server):
    with urllib.request.urlopen(server.url, timeout=60) as answer:
        page, headers = answer.read().decode(), answer.headers
    start = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page)[1])
    assert start["tree"]["title"] == "Transformer"
    assert start["state"]["summary"] == "nothing is ticked yet"
    # Only scripts of this answer run, and the address with the token goes nowhere.
    nonce = re.search(r"script-src 'nonce-([^']+)'", headers["Content-Security-Policy"])[1]
    assert page.count(f'nonce="{nonce}"') == 3
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert (headers["Cache-Control"], headers["Referrer-Policy"]) == ("no-store", "no-referrer")
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("path", ["/", "/?token=", "/?token=wrong", "/?token=%ff", "/open", "/act"])
def test_without_the_token_there_is_no_answer(server, path):
    for body in (None, {"do": "submit"}):
        status, text = ask(server, path, body=body, X_Deltakit_Token="wr\xf6ng")
        assert status == 403, path
        assert "the token is missing or wrong" in text
        assert server.picker.title not in text
    assert not server.ended.is_set()


def test_other_hosts_and_pages_get_no_answer(server):
    port, good = server.server_port, {"do": "look"}
    assert ask(server, "/act", body=good, Host=f"localhost:{port}")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", f"0.0.0.0:{port}"):
        status, text = ask(server, "/act", body=good, Host=host)
        assert (status, "no other" in text) == (403, True), host
        assert ask(server, f"/?token={server.token}", Host=host)[0] == 403
    assert ask(server, "/act", body=good, Origin=f"http://127.0.0.1:{port}")[0] == 200
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{port}"):
        assert ask(server, "/act", body=good, Origin=origin)[0] == 403, origin


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"\xff\xfe", {}, 400),
        (b"[" * 50_000, {}, 400),
        (b"", {}, 400),
        (b"null", {}, 400),
        (b'"submit"', {}, 400),
        (b'{"do": "tick", "row": 1e9, "on": true}', {}, 400),
        (b'{"do": "tick", "row": 99999, "on": true}', {}, 400),
        (b'{"do": "submit"}', {"Content_Type": "text/plain"}, 415),
        (b'{"do": "submit"}', {"Content_Type": "application/x-www-form-urlencoded"}, 415),
        (b'{"do": "filter", "text": "' + b"x" * 100_000 + b'"}', {}, 413),
    ],
)
def test_bad_messages_change_nothing(server, body, headers, status):
    found, text = ask(server, "/act", body=body, **headers)
    assert found == status
    assert json.loads(text)["error"]
    assert (server.picker.ticked, server.picker.filter, server.ended.is_set()) == (set(), "", False)


def test_bad_requests(server):
    assert ask(server, "/nothing")[0] == 404
    assert ask(server, "/nothing", body={"do": "look"})[0] == 404
    for length in ("-1", "x", "9" * 30, None):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        connection.putrequest("POST", "/act")
        connection.putheader("X-Deltakit-Token", server.token)
        connection.putheader("Content-Type", "application/json")
        if length is not None:
            connection.putheader("Content-Length", length)
        connection.endheaders()
        assert connection.getresponse().status == 411
        connection.close()
    request = urllib.request.Request(server.url, method="DELETE")
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(request, timeout=60)


def number_of(server, path):
    return next(row.number for row in server.picker.rows if row.path == path)


def test_ticks_are_previewed_by_the_matcher_and_submitted(server):
    queries = number_of(server, "layers.{0-1}.self_attn.q_proj")
    status, text = ask(server, "/act", body={"do": "tick", "row": queries, "on": True})
    state = json.loads(text)
    assert (status, state["line"], state["ticked"]) == (200, 'dk.LoRA(at="q_proj")', {str(queries): 2})
    text = ask(server, "/act", body={"do": "filter", "text": "up_proj"})[1]
    assert json.loads(text)["matches"] == 2
    text = ask(server, "/act", body={"do": "everywhere", "row": queries, "on": False})[1]
    assert json.loads(text)["line"] == ""
    ask(server, "/act", body={"do": "tick", "row": queries, "on": True})
    assert not server.ended.is_set()
    assert ask(server, "/act", body={"do": "submit"})[0] == 200
    assert server.wait()
    assert server.picker.selection().names == ("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj")
    assert ask(server, "/act", body={"do": "clear"})[0] == 410


def test_cancelling(server):
    ask(server, "/act", body={"do": "tick", "row": 0, "on": True})
    assert ask(server, "/act", body={"do": "cancel"})[0] == 200
    assert not server.wait()


def test_a_page_that_is_closed_cancels(server):
    """The page keeps a request open; here the connection is closed, as browsers do when the page is."""
    opened = socket.create_connection(("127.0.0.1", server.server_port), timeout=60)
    head = f"GET /open HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\nX-Deltakit-Token: {server.token}\r\n\r\n"
    opened.sendall(head.encode())
    assert opened.recv(12) == b"HTTP/1.0 200"
    assert (server.pages, server.left_at) == (1, None)
    opened.close()
    assert not server.wait()
    assert server.pages == 0


def test_the_page_hears_that_the_program_has_ended():
    with PickerServer(Picker(Transformer())) as server:
        heard = []
        page = threading.Thread(target=lambda: heard.append(ask(server, "/open")))
        page.start()
        while not server.pages:
            server.ended.wait(0.01)
    page.join(60)
    assert heard == [(200, "")]


def test_from_the_call_to_the_result(capsys):
    backbone = Transformer()
    keys = list(backbone.state_dict())

    def user(action):
        def show(url):
            host, _, token = url.removeprefix("http://").partition("/?token=")
            for message in ({"do": "tick", "row": 2, "on": True}, {"do": action}):
                headers = {"X-Deltakit-Token": token, "Content-Type": "application/json"}
                request = urllib.request.Request(f"http://{host}/act", json.dumps(message).encode(), headers)
                urllib.request.urlopen(request, timeout=60).close()

        return show

    picker = Picker(backbone)
    assert in_browser(picker, show=user("submit"))
    assert picker.selection().selectors == ("@block",)
    assert not in_browser(Picker(backbone), show=user("cancel"))
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(
        r"(deltakit: pick modules at http://127\.0\.0\.1:\d+/\?token=\S{43} \(Ctrl-C ends it\)\n){2}", err
    )
    assert list(backbone.state_dict()) == keys


def test_ctrl_c_ends_it(monkeypatch, capsys):
    servers = []

    def interrupted(server):
        servers.append(server)
        raise KeyboardInterrupt

    monkeypatch.setattr(PickerServer, "wait", interrupted)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        in_browser(Picker(Transformer()))
    (server,) = servers
    assert server.socket.fileno() == -1
    assert threading.active_count() == before


def test_a_port_can_be_used_again():
    port = 0
    for _ in range(2):
        with PickerServer(Picker(Transformer()), port) as server:
            assert ask(server, "/act", body={"do": "cancel"})[0] == 200
            port = server.server_port


def test_a_port_that_is_taken(server):
    with pytest.raises(
        dk.OptionError, match=rf"pick\(port={server.server_port}\): the page cannot be served there: .*omit port="
    ):
        in_browser(Picker(Transformer()), server.server_port)
    with pytest.raises(dk.OptionError, match=r"pick\(port=70000\): the page cannot be served there"):
        in_browser(Picker(Transformer()), 70_000)
