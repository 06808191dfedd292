"""A Google Cloud Storage of one process: enough of its JSON API for gcsfs, and for TensorStore under Orbax.

Objects live in memory, with generations. https://cloud.google.com/storage/docs/json_api/v1 has the calls: objects' get
(with Range and `alt=media`), list, insert (media, multipart, resumable), delete, copyTo/rewriteTo, and conditions on
generations. Resumable uploads are taken in one or more pieces.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import re
import sys
import threading
import urllib.parse
from typing import Any

BUCKET = "bucket"
# gcsfs reads it when it is imported; without it, it first asks by gRPC for a minute what kind of bucket this is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


class Store:
    """The objects: name -> (content, generation)."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.clock = 1
        self.lock = threading.Lock()

    def put(self, name: str, content: bytes) -> dict[str, Any]:
        self.clock += 1
        self.objects[name] = (content, self.clock)
        return self.describe(name)

    def describe(self, name: str) -> dict[str, Any]:
        content, generation = self.objects[name]
        return {
            "kind": "storage#object",
            "id": f"{BUCKET}/{name}/{generation}",
            "name": name,
            "bucket": BUCKET,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(content)),
            "contentType": "application/octet-stream",
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "etag": str(generation),
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
            "storageClass": "STANDARD",
        }


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def do_GET(self) -> None:
        path, query = self._split()
        with self.store.lock:
            if path.endswith(f"/b/{BUCKET}"):
                return self._json({"kind": "storage#bucket", "name": BUCKET, "id": BUCKET, "locationType": "region"})
            if path.endswith(f"/b/{BUCKET}/o"):
                return self._json(self._list(query))
            name = self._name(path)
            if name not in self.store.objects:
                return self._error(404, "No such object")
            content, generation = self.store.objects[name]
            if query.get("ifGenerationNotMatch") == str(generation):
                return self._send(304, b"")
            if query.get("ifGenerationMatch") not in (None, str(generation)):
                return self._error(412, "Precondition")
            if query.get("alt") != "media" and "/download/" not in path:
                return self._json(self.store.describe(name))
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        extra = {"X-Goog-Generation": str(generation), "x-goog-stored-content-length": str(len(content))}
        if not asked:
            return self._send(200, content, extra)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first >= len(content):
            return self._error(416, "Range")
        extra["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], extra)

    def do_POST(self) -> None:
        path, query = self._split()
        body = self._body()
        if not re.search(rf"^/batch/|/b/{BUCKET}/o", path):
            return self._error(404, "The specified bucket does not exist.")
        with self.store.lock:
            if path.startswith("/upload/") or path.startswith("/resumable/upload/"):
                return self._upload(query, body)
            if path.startswith("/batch/"):
                return self._batch(body)
            copied = re.search(r"/o/([^/]+)/(?:copyTo|rewriteTo)/b/[^/]+/o/([^/]+)$", path)
            if copied:
                source, target = map(urllib.parse.unquote, copied.groups())
                if source not in self.store.objects:
                    return self._error(404, "No such object")
                made = self.store.put(target, self.store.objects[source][0])
                return self._json({"done": True, "resource": made, **made})
        self._error(501, f"POST {path}")

    def do_PUT(self) -> None:
        _, query = self._split()
        body = self._body()
        with self.store.lock:
            self._piece(query, body)

    def _piece(self, query: dict[str, str], body: bytes) -> None:
        name, held = self.store.uploads[query["upload_id"]]
        held += body
        if self.headers.get("Content-Range", "").endswith("/*"):
            return self._send(308, b"", {"Range": f"bytes=0-{len(held) - 1}"})
        self._json(self.store.put(name, bytes(held)))

    def do_DELETE(self) -> None:
        path, query = self._split()
        with self.store.lock:
            name = self._name(path)
            if name not in self.store.objects:
                return self._error(404, "No such object")
            if query.get("ifGenerationMatch") not in (None, str(self.store.objects[name][1])):
                return self._error(412, "Precondition")
            del self.store.objects[name]
        self._send(204, b"")

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        kind, name = query.get("uploadType"), query.get("name", "")
        if "upload_id" in query:  # gcsfs posts the pieces where others put them
            return self._piece(query, body)
        if kind == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1].encode()
            parts = body.split(b"--" + boundary)[1:3]
            meta, content = (part.partition(b"\r\n\r\n" if b"\r\n\r\n" in part else b"\n\n")[2] for part in parts)
            name = name or json.loads(meta)["name"]
            body = content[: -2 if content.endswith(b"\r\n") else -1]
        elif kind == "resumable":
            name = name or json.loads(body)["name"]
            place = str(len(self.store.uploads))
            self.store.uploads[place] = (name, bytearray())
            address = (
                f"http://{self.headers['Host']}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={place}"
            )
            return self._send(200, b"{}", {"Location": address})
        wanted = query.get("ifGenerationMatch")
        if wanted is not None and int(wanted) != self.store.objects.get(name, (b"", 0))[1]:
            return self._error(412, "Precondition")
        self._json(self.store.put(name, body))

    def _batch(self, body: bytes) -> None:
        answers = []
        for number, path in re.findall(rb"Content-ID: <?([^>\r\n]+)>?.*?DELETE (\S+)", body, re.S):
            name = self._name(path.decode())
            found = self.store.objects.pop(name, None) is not None
            head = "HTTP/1.1 204 No Content" if found else "HTTP/1.1 404 Not Found"
            answers.append(
                f"--x\r\nContent-Type: application/http\r\nContent-ID: <response-{number.decode()}>\r\n\r\n"
                f"{head}\r\nContent-Length: 0\r\n\r\n"
            )
        self._send(200, ("".join(answers) + "--x--\r\n").encode(), {"Content-Type": "multipart/mixed; boundary=x"})

    def _list(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for name in sorted(self.store.objects):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if query.get("endOffset") and name >= query["endOffset"]:
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(self.store.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _split(self) -> tuple[str, dict[str, str]]:
        split = urllib.parse.urlsplit(self.path)
        return split.path, dict(urllib.parse.parse_qsl(split.query, keep_blank_values=True))

    def _name(self, path: str) -> str:
        return urllib.parse.unquote(path.partition("/o/")[2].partition("?")[0])

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            whole = b""
            while size := int(self.rfile.readline(), 16):
                whole += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return whole
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, value: dict[str, Any]) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, code: int, text: str) -> None:
        self._send(
            code, json.dumps({"error": {"code": code, "message": text}}).encode(), {"Content-Type": "application/json"}
        )

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if code not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if code not in (204, 304):
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """Bears with clients that are killed, or close what they no longer need."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def serve() -> tuple[http.server.ThreadingHTTPServer, Store]:
    """Return a server, running in a thread, and what it holds."""
    store = Store()
    server = Server(("localhost", 0), type("Bound", (Handler,), {"store": store}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, store


def environment(server: http.server.ThreadingHTTPServer) -> dict[str, str]:
    """Return the environment in which gcsfs and TensorStore find the server."""
    address = f"http://localhost:{server.server_address[1]}"
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "FSSPEC_GS_TOKEN": "anon",
        "FSSPEC_GCS_TOKEN": "anon",
    }
