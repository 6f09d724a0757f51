"""A web server over a folder, with Range, on loopback: over HTTP or HTTPS, and as bad as a test wants it."""

import contextlib
import http.server
import re
import ssl
import threading
import urllib.parse


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        web = self.server.web
        span = self.headers["Range"] or "bytes=0-"
        start, end = re.fullmatch(r"bytes=(\d+)-(\d*)", span).groups()
        path = urllib.parse.unquote(self.path).lstrip("/")
        web.asked.append((path, int(start)))
        with contextlib.suppress(OSError):  # the client went away
            self._answer(web, web.folder / path, int(start), int(end) + 1 if end else None)

    def _answer(self, web, path, start, end):
        if web.location:
            self._say(302, b"", (("Location", web.location),))
            return
        if web.status or not path.is_file():
            self._say(web.status or 404, b"")
            return
        data = web.change(path.read_bytes())
        body = data[start:end]
        if not body:
            self._say(416, b"")
            return
        self._say(206, body, (("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(data)}"),))

    def _say(self, status, body, headers=()):
        web = self.server.web
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        cut = web.cuts.pop(0) if web.cuts and len(body) > web.cuts[0] else None
        if cut is not None:
            self.close_connection, web.status = True, web.status_after_cut
        self.wfile.write(body[:cut])
        web.given += len(body[:cut])


class Web:
    """Serves ``folder``; ``asked`` are paths and offsets, ``given`` the bytes of bodies so far.

    ``location`` is where everything redirects to, ``status`` answers everything, ``change`` changes what is served, the
    next body that is longer is cut off after ``cuts[0]`` bytes, and then everything is answered with
    ``status_after_cut``.
    """

    def __init__(self, folder, tls=None):
        self.folder, self.asked, self.given, self.cuts, self.status = folder, [], 0, [], 0
        self.status_after_cut, self.location = 0, ""
        self.change = lambda data: data
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.web = self
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        """Stop; the port answers nobody any more."""
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def serving(folder, tls=None):
    """Serve a folder while the block runs."""
    web = Web(folder, tls)
    try:
        yield web
    finally:
        web.stop()


def mutual(authority):
    """Return the server's side of TLS that asks everybody for a certificate of an authority."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(*authority.issue("127.0.0.1"))
    made.load_verify_locations(authority.certificate)
    made.verify_mode = ssl.CERT_REQUIRED
    return made
