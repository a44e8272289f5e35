"""A page that shows pictures as they come, for a browser on this machine: no window system is needed."""

from __future__ import annotations

import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import TYPE_CHECKING, Self

from onnx_lrp.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

_PAGE = b"""<!doctype html><meta charset="utf-8"><title>onnx-lrp live</title>
<style>html{height:100%;background:#0d1117}body{margin:0;height:100%;display:grid;place-items:center}
img{max-width:100%;max-height:100vh}</style><img src="/frames" alt="frames and their relevance">"""
_PATIENCE = 1.0  # seconds between looks at whether the run is over


class Screen:
    """Serves the latest picture, as a stream of JPEGs, to whoever looks.

    Args:
        port: on 127.0.0.1; 0 for any that is free.

    Raises:
        InputError: the port is taken.
    """

    def __init__(self, port: int):
        self._news = threading.Condition()
        self._latest, self._number, self._open = b"", 0, True
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        except (OSError, OverflowError) as error:
            raise InputError(
                f"--serve {port}: {getattr(error, 'strerror', None) or error}; give another port"
            ) from None
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        """Where to look."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def show(self, image: Image.Image) -> None:
        """Show a picture in the place of the one before."""
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        with self._news:
            self._latest, self._number = buffer.getvalue(), self._number + 1
            self._news.notify_all()

    def next(self, seen: int) -> tuple[bytes, int] | None:
        """The picture after number `seen`, and its number, as soon as there is one; None when the run is over."""
        with self._news:
            while self._open and self._number <= seen:
                self._news.wait(_PATIENCE)
            return (self._latest, self._number) if self._number > seen else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._news:
            self._open = False
            self._news.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        screen = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path != "/frames":
                    self._begin("text/html; charset=utf-8")
                    self.wfile.write(_PAGE)
                    return
                self._begin("multipart/x-mixed-replace; boundary=frame")
                seen = 0
                try:
                    while (found := screen.next(seen)) is not None:
                        data, seen = found
                        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                        self.wfile.write(head.encode() + data + b"\r\n")
                except OSError:
                    return  # whoever looked has gone

            def _begin(self, kind: str) -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        return Handler
