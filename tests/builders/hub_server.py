"""A Hugging Face hub on this machine: enough of its API to make repositories, upload small files and fetch them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret_of_the_test"


@dataclass
class FakeHub:
    """What was asked of it, and what it holds."""

    endpoint: str = ""
    made: list[dict] = field(default_factory=list)  # bodies of the requests for new repositories
    kinds: dict[str, str] = field(default_factory=dict)  # repository -> "models" or "datasets"
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # repository -> path -> content
    commits: list[list[str]] = field(default_factory=list)  # paths of each
    tokens: set[str | None] = field(default_factory=set)  # that came with what was sent
    fail: int = 0  # status of the answers to commits; 0: they succeed
    gate: threading.Event | None = None  # that commits wait for; GET /release sets it


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


SHA = "1" * 40


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None: ...

    def do_POST(self) -> None:
        body, path = self._body(), self._path()
        self.hub.tokens.add(self.headers["Authorization"])
        if path == "/api/repos/create":
            told = json.loads(body)
            self.hub.made.append(told)
            repo = f"{told['organization']}/{told['name']}"
            known = repo in self.hub.files
            self.hub.files.setdefault(repo, {})
            self.hub.kinds.setdefault(repo, f"{told.get('type', 'model')}s")
            self._answer(409 if known else 200, {"url": f"{self.hub.endpoint}/{repo}"})
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/(preupload|commit)/main", path):
            kind, repo, what = found.groups()
            if self.hub.kinds.get(repo) != kind:
                self._answer(404, {})
            elif what == "preupload":
                files = [{"path": file["path"]} for file in json.loads(body)["files"]]
                self._answer(200, {"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]})
            elif self.hub.gate is not None and not self.hub.gate.wait(10):
                self._answer(403, {"error": "nobody let this commit in"})
            elif self.hub.fail:
                self._answer(self.hub.fail, {"error": "the disk of the hub is full"})
            else:
                self._commit(repo, body)
        else:
            self._answer(404, {})

    def do_GET(self) -> None:
        self._body()
        path = self._path()
        if path == "/release":
            self.hub.gate.set()
            self._answer(200, {})
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/revision/.+|/tree/.+)?", path):
            kind, repo, below = found.groups()
            names = self.hub.files.get(repo, {})
            if self.hub.kinds.get(repo) != kind:
                self._answer(404, {}, {"X-Error-Code": "RepoNotFound"})
            elif below and below.startswith("/tree"):
                rows = [{"type": "file", "path": n, "size": len(c), "oid": _oid(c)} for n, c in names.items()]
                self._answer(200, rows)
            elif below not in (None, "/revision/main", f"/revision/{SHA}"):
                self._answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
            else:
                self._answer(200, {"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in names]})
        elif found := re.fullmatch(r"(/datasets)?/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = self.hub.files.get(found[2], {}).get(unquote(found[3]))
            if content is None:
                self._answer(404, {}, {"X-Error-Code": "EntryNotFound"})
            else:
                self._answer(200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": SHA})
        else:
            self._answer(404, {})

    do_HEAD = do_GET

    def _commit(self, repo: str, body: bytes) -> None:
        rows = [json.loads(line) for line in body.splitlines()]
        new = {row["value"]["path"]: row["value"]["content"] for row in rows if row["key"] == "file"}
        self.hub.files[repo].update({path: base64.b64decode(content) for path, content in new.items()})
        self.hub.commits.append(sorted(new))
        self._answer(200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{SHA}", "commitOid": SHA})

    def _path(self) -> str:
        return unquote(urlsplit(self.path).path)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _answer(self, status: int, content: bytes | dict | list, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
