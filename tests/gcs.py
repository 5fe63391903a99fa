"""A Google Cloud Storage on this machine, in memory: what gcsfs and tensorstore ask of its JSON API.

Objects have generations, preconditions hold, ranges and pages work, all as documented at
cloud.google.com/storage/docs/json_api; there are no accounts. `python tests/gcs.py PORT` runs one.
"""

import base64
import contextlib
import dataclasses
import datetime
import email
import hashlib
import http.server
import itertools
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

PAGE = 50  # names in one page of a listing, few, so that tests see several


@dataclasses.dataclass(frozen=True)
class Stored:
    content: bytes
    generation: int
    updated: str


class Server(http.server.ThreadingHTTPServer):
    """All buckets exist. `objects` is {(bucket, name): Stored}; `writes` counts what was written."""

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("localhost", port), Handler)
        self.objects: dict[tuple[str, str], Stored] = {}
        self.uploads: dict[str, tuple[str, str, dict, bytearray]] = {}
        self.lock = threading.RLock()
        self.generations = itertools.count(1)
        self.writes = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # of clients that were killed
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://localhost:{self.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """For gcsfs and tensorstore to come here, without looking for accounts."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GCE_METADATA_ROOT": "localhost:1",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def put(self, bucket: str, name: str, content: bytes, query: dict[str, str]) -> Stored | None:
        """None: a precondition fails."""
        with self.lock:
            if not self.allowed(self.objects.get((bucket, name)), query):
                return None
            self.writes += 1
            now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%S.%f}Z"
            stored = self.objects[bucket, name] = Stored(bytes(content), next(self.generations), now)
            return stored

    @staticmethod
    def allowed(stored: Stored | None, query: dict[str, str]) -> bool:
        expected = query.get("ifGenerationMatch")
        return expected is None or int(expected) == (stored.generation if stored else 0)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        # These have no body: a client that keeps the connection would take it for the next answer.
        if status in (204, 304):
            content = b""
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def error(self, status: int) -> None:
        self.answer(status, {"error": {"code": status, "message": http.HTTPStatus(status).phrase}})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def handle_one(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        body = self.body()
        path = re.sub("/+", "/", address.path)
        if path.startswith("/batch/"):
            return self.batch(body)
        if found := re.fullmatch(r"(?:/resumable)?/upload/storage/v1/b/([^/]+)/o", path):
            return self.upload(found[1], query, body)
        found = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", path)
        if not found:
            return self.error(501)
        bucket, rest = found[1], found[2]
        if rest:
            return self.object(bucket, rest, query)
        if path.endswith("/o"):
            return self.listing(bucket, query)
        return self.answer(200, {"name": bucket, "kind": "storage#bucket", "id": bucket})

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_one

    def object(self, bucket: str, rest: str, query: dict[str, str]) -> None:
        name, *verb = re.split(r"/(rewriteTo|copyTo|moveTo)/", rest)
        name = urllib.parse.unquote(name)
        with self.server.lock:
            stored = self.server.objects.get((bucket, name))
            if stored is None:
                return self.error(404)
            if verb:
                to = re.fullmatch(r"(?:b/([^/]+)/)?o/(.+)", verb[1])
                assert to
                target = to[1] or bucket, urllib.parse.unquote(to[2])
                made = self.server.put(*target, stored.content, query)
                if made is None:
                    return self.error(412)
                if verb[0] == "moveTo":
                    del self.server.objects[bucket, name]
                resource = self.resource(*target, made)
                return self.answer(200, {"done": True, "resource": resource} | resource)
            if not self.server.allowed(stored, query):
                return self.error(412)
            if self.command == "DELETE":
                del self.server.objects[bucket, name]
                return self.answer(204)
        if query.get("ifGenerationNotMatch") == str(stored.generation):
            return self.error(304)
        if query.get("alt") != "media":
            return self.answer(200, self.resource(bucket, name, stored))
        return self.media(stored)

    def media(self, stored: Stored) -> None:
        size = len(stored.content)
        headers = {
            "x_goog_generation": str(stored.generation),
            "x_goog_stored_content_length": str(size),
            "x_goog_hash": f"md5={_md5(stored.content)}",
        }
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return self.answer(200, stored.content, **headers)
        if wanted[1]:
            start, stop = int(wanted[1]), min(int(wanted[2] or size) + 1, size)
        else:  # the last bytes
            start, stop = max(0, size - int(wanted[2])), size
        if start >= size:
            return self.error(416)
        span = f"bytes {start}-{stop - 1}/{size}"
        return self.answer(206, stored.content[start:stop], Content_Range=span, **headers)

    def listing(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        first = max(query.get("startOffset", ""), query.get("pageToken", ""))
        items, prefixes, after = [], [], None
        with self.server.lock:
            for owner, name in sorted(self.server.objects):
                if owner != bucket or not name.startswith(prefix) or name < first:
                    continue
                if "endOffset" in query and name >= query["endOffset"]:
                    continue
                below = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                if below[1]:
                    if (folder := prefix + below[0] + below[1]) not in prefixes:
                        prefixes.append(folder)
                    continue
                if len(items) == PAGE:
                    after = name
                    break
                items.append(self.resource(bucket, name, self.server.objects[owner, name]))
        page = {"nextPageToken": after} if after else {}
        self.answer(200, {"kind": "storage#objects", "items": items, "prefixes": prefixes} | page)

    def upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        kind, name = query.get("uploadType"), query.get("name", "")
        if "upload_id" in query:  # the next piece; gcsfs posts it, others put it
            return self.resumed(query["upload_id"], body)
        if kind == "resumable":
            name = name or json.loads(body)["name"]
            number = str(next(self.server.generations))
            self.server.uploads[number] = bucket, name, query, bytearray()
            where = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
            return self.answer(200, {}, Location=where)
        if kind == "multipart":
            about, content = _parts(self.headers["Content-Type"], body)
            name, body = name or json.loads(about)["name"], content
        return self.stored(bucket, name, self.server.put(bucket, name, body, query))

    def resumed(self, number: str, body: bytes) -> None:
        bucket, name, query, so_far = self.server.uploads[number]
        so_far += body
        if self.headers.get("Content-Range", "").endswith("/*"):
            return self.answer(308, Range=f"bytes=0-{len(so_far) - 1}")
        return self.stored(bucket, name, self.server.put(bucket, name, so_far, query))

    def stored(self, bucket: str, name: str, stored: Stored | None) -> None:
        if stored is None:
            return self.error(412)
        generation = str(stored.generation)
        return self.answer(200, self.resource(bucket, name, stored), x_goog_generation=generation)

    def batch(self, body: bytes) -> None:
        """Deletions, many in one request."""
        answers = []
        for number, part in enumerate(_parts(self.headers["Content-Type"], body), 1):
            found = re.search(rb"DELETE \S*?/b/([^/]+)/o/(\S+)", part)
            assert found, part
            key = found[1].decode(), urllib.parse.unquote(found[2].decode())
            with self.server.lock:
                status = "204 No Content" if self.server.objects.pop(key, None) else "404 Not Found"
            answers.append(
                f"--b\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
                f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        content = ("".join(answers) + "--b--\r\n").encode()
        self.answer(200, content, Content_Type="multipart/mixed; boundary=b")

    @staticmethod
    def resource(bucket: str, name: str, stored: Stored) -> dict[str, Any]:
        return {
            "kind": "storage#object", "bucket": bucket, "name": name, "id": f"{bucket}/{name}/{stored.generation}",
            "size": str(len(stored.content)), "generation": str(stored.generation), "metageneration": "1",
            "updated": stored.updated, "timeCreated": stored.updated, "md5Hash": _md5(stored.content),
            "contentType": "application/octet-stream", "etag": str(stored.generation),
        }  # fmt: skip


def _parts(content_type: str, body: bytes) -> list[bytes]:
    message = email.message_from_bytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    boundary = message.get_boundary()
    assert boundary
    pieces = body.split(b"--" + boundary.encode())[1:-1]
    return [re.split(rb"\r?\n\r?\n", piece.lstrip(b"\r\n"), maxsplit=1)[1].removesuffix(b"\r\n") for piece in pieces]


def _md5(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()


@contextlib.contextmanager
def running(port: int = 0) -> Iterator[Server]:
    """A server while the block runs."""
    with Server(port) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


if __name__ == "__main__":
    Server(int(sys.argv[1])).serve_forever()
