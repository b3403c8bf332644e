"""What the Hugging Face hub answers over HTTP, as far as models are made, put there and fetched: a local stand-in.

Kept in memory. Every file is sent within the commit, as the hub has small ones.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StandIn(ThreadingHTTPServer):
    """The models by name, each its files; and what was asked for."""

    def __init__(self, refuses: bool = False):
        super().__init__(("127.0.0.1", 0), Answers)
        self.models: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.tokens: list[str | None] = []
        self.refuses = refuses
        """Whether every token is refused, in words that repeat it."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, model: str) -> str:
        """The name of the last commit of a model: a hash of its files."""
        digest = hashlib.sha1()
        for path, content in sorted(self.models[model].items()):
            digest.update(path.encode() + content)
        return digest.hexdigest()


@contextmanager
def stand_in(refuses: bool = False) -> Iterator[StandIn]:
    with StandIn(refuses) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self._chunks())
        self.server.tokens.append(self.headers.get("Authorization"))
        if self.server.refuses:
            return self._answer(401, {"error": f"Invalid credentials {self.headers.get('Authorization')}"})
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        action = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path)
        if action is None or action[1] not in self.server.models:
            return self._answer(404, {"error": "Repository not found"})
        if action[2] == "preupload":
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return self._answer(200, {"files": [{"path": f["path"], **modes} for f in json.loads(body)["files"]]})
        for line in body.splitlines():
            operation = json.loads(line)
            if operation["key"] == "file":
                value = operation["value"]
                self.server.models[action[1]][value["path"]] = base64.b64decode(value["content"])
        name = self.server.commit(action[1])
        url = f"{self.server.url}/{action[1]}/commit/{name}"
        return self._answer(200, {"commitUrl": url, "commitOid": name, "success": True})

    def do_GET(self) -> None:
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/?]+)?(/tree/[^?]+)?(\?.*)?", self.path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        if info is not None and info[1] in self.server.models:
            files = self.server.models[info[1]]
            if info[3]:
                tree = [{"type": "file", "path": p, "size": len(c), "oid": _etag(c)} for p, c in files.items()]
                return self._answer(200, tree)
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
            described = {"id": info[1], "modelId": info[1], "sha": self.server.commit(info[1]), "siblings": siblings}
            return self._answer(200, {**described, "private": self.server.private[info[1]], "tags": [], "downloads": 0})
        if file is not None and file[2] in self.server.models.get(file[1], {}):
            content = self.server.models[file[1]][file[2]]
            headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": self.server.commit(file[1])}
            return self._answer(200, content, headers)
        return self._answer(404, {"error": "Repository not found"})

    do_HEAD = do_GET

    def _create(self, asked: dict[str, Any]) -> None:
        model = f"{asked['organization']}/{asked['name']}"
        if model in self.server.models:
            return self._answer(409, {"error": "You already created this model repo", "url": model})
        self.server.models[model] = {}
        self.server.private[model] = asked.get("visibility") == "private" or bool(asked.get("private"))
        return self._answer(200, {"url": f"{self.server.url}/{model}", "name": model, "id": model})

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


def _etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
