"""Answers of a server that means harm, each a function of the request's handler."""

import gzip
import time
from urllib.parse import parse_qs, urlsplit


def head(server, status=200, **headers):
    server.send_response(status)
    for name, value in {"Content_Type": "application/json", **headers}.items():
        server.send_header(name.replace("_", "-"), value)
    server.end_headers()
    server.close_connection = True


def send(server, pieces):
    try:
        for piece in pieces:
            server.wfile.write(piece)
            server.wfile.flush()
    except OSError:
        server.hung_up = True


def endless_pages(server):
    offset = int(parse_qs(urlsplit(server.path).query)["offset"][0])
    image = {"id": offset, "name": "A", "filename": "A", "width": 9, "height": 8, "mpp": 0.25, "image_set": 12}
    server.reply(200, {"count": 3, "next": "http://x/", "previous": None, "results": [image]})


def trickle(server):
    head(server, Content_Length=10**6)
    send(server, (time.sleep(0.05) or b" " for _ in range(200)))


def trickling_headers(server):
    send(server, [b"HTTP/1.0 200 OK\r\nX: ", *(time.sleep(0.05) or b"x" for _ in range(200))])


def gzip_bomb(server):
    head(server, Content_Encoding="gzip")
    send(server, [gzip.compress(b" " * 2**24)])


def brackets(server):
    head(server)
    send(server, [b"[" + b"[]," * 2**17 + b"[]]"])


def huge(server):
    head(server, Content_Length=50 * 2**30)
    send(server, [b" "] * 4)


def endless_body(server):
    head(server)
    send(server, [b" " * 2**16] * 2**10)


def redirect_with_a_large_body(server):
    head(server, 302, Location="/api/v1/again")
    send(server, [b" " * 2**16] * 2**10)


def circle(server):
    head(server, 302, Location=server.path, Content_Length=0)


def elsewhere(server):
    head(server, 302, Location="https://evil.example/api", Content_Length=0)
