"""A local web server for tests of downloads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

Answer = Callable[[BaseHTTPRequestHandler], None]


class Web:
    """A server whose answers the test chooses.

    Attributes:
        address: of the server, without a slash at its end.
        requests: the requested paths, in order.
        answers: by path, used up one by one; the last one stays.
        gate: set it to release the answers that wait.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.answers: dict[str, list[Answer]] = {}
        self.gate = threading.Event()
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.requests.append(self.path)
                answers = web.answers[self.path]
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    answer(self)  # some clients hang up

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def serve(self, path: str, *answers: Answer | bytes) -> str:
        """Give answers, a file or something odd, to a path; return its address."""
        self.answers[path] = [
            self.sends(answer) if isinstance(answer, bytes) else answer for answer in answers
        ]
        return self.address + path

    def sends(
        self,
        body: bytes,
        *,
        status: int = 200,
        length: int | None = -1,
        kind: str = "application/octet-stream",
        waits_after: int | None = None,
        chunked: bool = False,
    ) -> Answer:
        """Return an answer.

        Args:
            body: the content.
            status: of the answer.
            length: the announced size; -1 for the true one, None for none.
            kind: the content type.
            waits_after: bytes to send before waiting for the gate.
            chunked: announce chunks, of which there may be any number.
        """

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            handler.send_header("Content-Type", kind)
            if length is not None:
                handler.send_header("Content-Length", str(len(body) if length < 0 else length))
            if chunked:
                handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            if waits_after is not None:
                handler.wfile.write(body[:waits_after])
                handler.wfile.flush()
                self.gate.wait(60)
            handler.wfile.write(body[waits_after or 0 :])

        return answer

    def redirects(self, target: str) -> Answer:
        """Return an answer that sends the client elsewhere."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(302)
            handler.send_header("Location", target)
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        return answer


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server that is closed after the test."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Web()
    yield running
    running.gate.set()
    running.server.shutdown()
    running.server.server_close()
