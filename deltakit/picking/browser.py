"""A picker on a page of the browser. A server on this machine answers it until the user is done, or has closed the page.

Only who has the token, which is made anew for each page, gets an answer, and only under the server's own address: a page of
somebody else that the user visits knows no token, and one that rebinds its name to this machine comes with another `Host`.
"""

import hmac
import json
import os
import secrets
import select
import sys
import threading
import time
from collections.abc import Callable
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from deltakit.errors import DeltaError, OptionError, printable
from deltakit.picking.page_script import PAGE_SCRIPT, SCRIPT, STYLE
from deltakit.picking.picker import Picker, act, state_of, tree_of

_MOST_BYTES = 100_000
"""Of a message. The longest of the page is a filter's text."""
_GRACE = 3.0
"""Seconds after which a page that was closed and not loaded again means that the user has gone."""
_PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 70rem; padding: 0 1rem 5rem; font: 14px/1.5 system-ui, sans-serif; }
footer { position: fixed; inset: auto 0 0 0; padding: .6em 1rem; background: Canvas; border-top: 1px solid #888; }
footer button { font: inherit; padding: .2em 1em; }
h1 { font-size: 1.2rem; }
.dk-head { position: sticky; top: 0; background: Canvas; border-bottom: 1px solid #888; margin-bottom: .5em; }
"""


def in_browser(picker: Picker, port: int = 0, *, show: Callable[[str], object] | None = None) -> bool:
    """Shows a picker on a page, and returns whether the user has submitted it; False if it was cancelled or closed.

    Args:
        port: the port of this machine to listen at; by default any that is free.
        show: opens an address in the user's browser; by default it is only printed.

    Raises:
        OptionError: if the port is taken or not allowed.
    """
    with PickerServer(picker, port) as server:
        print(f"deltakit: pick modules at {server.url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
        if show is not None:
            show(server.url)
        return server.wait()


class PickerServer(ThreadingHTTPServer):
    """Serves the page of one picker on the loopback address, from its start in a `with` block to the end of the block.

    Args:
        grace: seconds after which a page that was closed and not loaded again ends `wait`.
    """

    daemon_threads = True
    # Elsewhere than on Windows this allows a port that was used a minute ago, and none that is in use.
    allow_reuse_address = os.name != "nt"
    allow_reuse_port = False

    def __init__(self, picker: Picker, port: int = 0, *, grace: float = _GRACE) -> None:
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise OptionError(
                f"pick(port={port}): the page cannot be served there: {error}; omit port= for one that is free"
            ) from error
        self.picker, self.grace = picker, grace
        self.token = secrets.token_urlsafe(32)
        self.hosts = {f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}"}
        self.lock, self.ended, self.submitted = threading.Lock(), threading.Event(), False
        self.pages = 0
        self.left_at: float | None = None
        """When the last open page was closed; None while one is open, or before the first."""

    @property
    def url(self) -> str:
        """The address of the page, with the token."""
        return f"http://127.0.0.1:{self.server_port}/?token={self.token}"

    def __enter__(self) -> "PickerServer":
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()
        self._thread.join()

    def wait(self) -> bool:
        """Waits for the user. Returns whether the page was submitted; False if it was cancelled or closed."""
        # In short waits, so that Ctrl-C is heard on all systems.
        while not self.ended.wait(0.1):
            left = self.left_at
            if left is not None and time.monotonic() - left > self.grace:
                break
        return self.submitted

    def page_is_open(self, by: int) -> None:
        """Counts the pages that are open."""
        with self.lock:
            self.pages += by
            self.left_at = None if self.pages else time.monotonic()

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing of connections that broke off."""


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, why: str) -> None:
        self.status, self.why = status, why


class _Handler(BaseHTTPRequestHandler):
    server: PickerServer
    timeout = 60

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, *_: object) -> None:
        """Prints nothing."""

    def version_string(self) -> str:
        return "deltakit"

    def _answer(self, function: Callable[[], None]) -> None:
        try:
            function()
        except _Refused as refused:
            self._send_json({"error": refused.why}, refused.status)
        except DeltaError as error:
            self._send_json({"error": str(error)}, HTTPStatus.BAD_REQUEST)

    def _get(self) -> None:
        asked = urlsplit(self.path)
        token = parse_qs(asked.query).get("token", [""])[0] if asked.path == "/" else self.headers["X-Deltakit-Token"]
        self._check(token)
        if asked.path == "/":
            self._send_page()
        elif asked.path == "/open":
            self._stay_open()
        else:
            raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _post(self) -> None:
        self._check(self.headers["X-Deltakit-Token"])
        if urlsplit(self.path).path != "/act":
            raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing here")
        message = self._message()
        what = message.get("do") if isinstance(message, dict) else None
        with self.server.lock:
            if self.server.ended.is_set():
                raise _Refused(HTTPStatus.GONE, "the picker has ended")
            if what not in ("submit", "cancel"):
                act(self.server.picker, message)
            state = state_of(self.server.picker)
        self._send_json(state)
        if what in ("submit", "cancel"):
            # Behind the answer: the program may end at once.
            self.wfile.flush()
            self.server.submitted = what == "submit"
            self.server.ended.set()

    def _check(self, token: str | None) -> None:
        if self.headers["Host"] not in self.server.hosts:
            raise _Refused(HTTPStatus.FORBIDDEN, "this is served under the address that was printed, and no other")
        if not hmac.compare_digest((token or "").encode(), self.server.token.encode()):
            raise _Refused(
                HTTPStatus.FORBIDDEN, "the token is missing or wrong; open the whole address that was printed"
            )
        origin = self.headers["Origin"]
        if origin is not None and origin.removeprefix("http://") not in self.server.hosts:
            raise _Refused(HTTPStatus.FORBIDDEN, "pages from elsewhere get no answer")

    def _message(self) -> Any:
        kind = (self.headers["Content-Type"] or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected JSON, as Content-Type: application/json")
        length = self.headers["Content-Length"] or ""
        if not length.isdecimal() or len(length) > 9:
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        if int(length) > _MOST_BYTES:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected at most {_MOST_BYTES} bytes")
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise _Refused(HTTPStatus.BAD_REQUEST, "this is no JSON") from None

    def _stay_open(self) -> None:
        """Answers until the picker ends, or the page is closed, which closes the connection."""
        self.server.page_is_open(1)
        try:
            self._send_head({"Content-Type": "text/plain"}, HTTPStatus.OK)
            waits = 0
            while not self.server.ended.is_set():
                # A page says nothing more, so what can be read is the end of the connection.
                if select.select([self.connection], [], [], 0.1)[0]:
                    return
                waits += 1
                if waits % 100 == 0:
                    # Browsers give up after minutes in which nothing comes.
                    self.wfile.write(b" ")
        finally:
            self.server.page_is_open(-1)

    def _send_page(self) -> None:
        with self.server.lock:
            start = {"tree": tree_of(self.server.picker), "state": state_of(self.server.picker)}
        nonce = secrets.token_urlsafe(16)
        policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'"
        page = _page(self.server.picker.title, start, nonce)
        headers = {"Content-Security-Policy": f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}
        self._send(page.encode(), "text/html; charset=utf-8", HTTPStatus.OK, headers)

    def _send_json(self, data: object, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(data).encode(), "application/json", status, {})

    def _send(self, body: bytes, kind: str, status: HTTPStatus, headers: dict[str, str]) -> None:
        self._send_head({"Content-Type": kind, "Content-Length": str(len(body)), **headers}, status)
        self.wfile.write(body)

    def _send_head(self, headers: dict[str, str], status: HTTPStatus) -> None:
        self.send_response(status)
        always = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}
        for name, value in {**headers, **always}.items():
            self.send_header(name, value)
        self.end_headers()


def _page(title: str, start: object, nonce: str) -> str:
    # In a script only `<` could end it: `</script>` and `<!--`.
    data = json.dumps(start).replace("<", "\\u003c")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>deltakit: pick modules</title>'
        f'<style nonce="{nonce}">{_PAGE_STYLE}{STYLE}</style></head>\n<body><main>'
        f"<h1>Pick modules of {escape(printable(title))}</h1>"
        '<p>A tick stands for the modules of its row, not for those inside them. "everywhere" ticks or unticks all modules '
        'of that name.</p><div id="tree"></div></main>\n'
        '<footer><button type="button">Use these modules</button> <button type="button">Cancel</button> '
        '<span id="said" role="status"></span></footer><noscript>This page needs JavaScript.</noscript>\n'
        f'<script type="application/json" id="start" nonce="{nonce}">{data}</script>'
        f'<script nonce="{nonce}">{SCRIPT}{PAGE_SCRIPT}</script></body></html>\n'
    )
