"""A raw HTTP client for tests: it may send what no client library would."""

from __future__ import annotations

import http.client
import json
import socket
from urllib.parse import urlsplit


def ask(url, method="GET", path="/", body=None, headers=None):
    """Send one request; return status, headers and body."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def post_json(url, path, document):
    """Post a document; return status and the decoded answer."""
    status, _, body = ask(url, "POST", path, json.dumps(document), {"Content-Type": "application/json"})
    return status, json.loads(body)


def raw(url, data, *, half_close=False):
    """Send bytes as they are; return all that comes back."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(data)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
            if not half_close:
                break
        return answer
