"""A page on the loopback address, for those who cannot open files of this machine in a browser."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ADDRESS = "127.0.0.1"


def server_of(page: str, port: int = 0) -> ThreadingHTTPServer:
    """A server of this page alone, for this machine alone; `serve_forever` runs it.

    Requests by another name than the loopback's are refused, so that no site can read the page through a name that
    leads here.

    Args:
        page: HTML.
        port: 0: one that is free.

    Raises:
        ValueError: the port is in use.
    """
    content = page.encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            status = 403 if host not in (ADDRESS, "localhost") else 200 if self.path == "/" else 404
            body = content if status == 200 else b""
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Prints nothing."""

    try:
        return ThreadingHTTPServer((ADDRESS, port), Handler)
    except OSError as error:
        raise ValueError(f"--serve: port {port}: {error.strerror}; choose another") from None
