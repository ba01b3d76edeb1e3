"""A stand-in for the Hugging Face Hub: the routes of its HTTP API that push and download use."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import yaml

TOKEN = "hf_stand_in"
MAIN = "main"


class Hub:
    """A server with its repositories in memory.

    Attributes:
        address: for HF_ENDPOINT.
        private: by the name of a repository, whether it is.
        commits: of a repository: the files by name, by commit; the last one is the main branch.
        requests: method and path, in order.
        fail: returns a status, and perhaps an X-Error-Code, to fail a request with, given method
            and path.
        headers: changes the headers of a file before it is sent.
        cut: bytes to leave out at the end of a file.
    """

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        self.fail: Callable[[str, str], tuple[int, str] | None] = lambda method, path: None
        self.headers: Callable[[dict[str, str]], None] = lambda headers: None
        self.cut = 0
        self.uploads: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    hub.answer(self, self.command, unquote(self.path), body)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Go offline."""
        self.server.shutdown()
        self.server.server_close()

    def files(self, repository: str) -> dict[str, bytes]:
        """Return the files on the main branch."""
        return next(reversed(self.commits[repository].values()), {})

    def commit(self, repository: str, files: dict[str, bytes | None]) -> str:
        """Add a commit, None removes a file; return its name."""
        new = {**self.files(repository), **files} if self.commits.get(repository) else files
        kept = {name: content for name, content in new.items() if content is not None}
        name = hashlib.sha1(repr((kept, len(self.commits.get(repository, {})))).encode())
        self.commits.setdefault(repository, {})[name.hexdigest()] = kept
        return name.hexdigest()

    def answer(self, to: BaseHTTPRequestHandler, method: str, path: str, body: bytes) -> None:
        """Answer a request as the hub does."""
        if (failure := self.fail(method, path)) is not None:
            status, code = failure
            return send(to, status, b"", {"X-Error-Code": code} if code else {})
        if found := re.fullmatch(r"/(\w+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(to, *found.groups())
        if to.headers.get("Authorization") != f"Bearer {TOKEN}" and method != "PUT":
            return send(to, 401, b'{"error": "Invalid username or password."}')
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.commits:
                return reply(to, {"url": f"{self.address}/{name}"}, 409)
            self.commits[name] = {}
            self.private[name] = asked.get("visibility") == "private"
            return reply(to, {"url": f"{self.address}/{name}"})
        if path == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---\n")[1]
            assert isinstance(yaml.safe_load(front), dict)
            return reply(to, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(\w+/[\w.-]+)", path):
            name = found[1]
            sha = next(reversed(self.commits[name]), None)
            return reply(to, {"id": name, "private": self.private[name], "sha": sha})
        if re.fullmatch(r"/api/models/\w+/[\w.-]+/preupload/main", path):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            return reply(to, {"files": modes})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.address}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return reply(to, {"transfer": "basic", "objects": objects})
        if method == "PUT":
            oid = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            self.uploads[oid] = body
            return reply(to, {})
        if found := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/commit/main", path):
            lines = [json.loads(line) for line in body.splitlines()]
            files: dict[str, bytes | None] = {}
            for line in lines:
                value: dict[str, Any] = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.uploads[value["oid"]]
            name = self.commit(found[1], files)
            url = f"{self.address}/{found[1]}/commit/{name}"
            return reply(to, {"commitUrl": url, "commitOid": name})
        raise AssertionError(f"{method} {path} is not one of the stand-in's routes")

    def _resolve(
        self, to: BaseHTTPRequestHandler, repository: str, revision: str, name: str
    ) -> None:
        commits = self.commits.get(repository)
        if not commits or self.private.get(repository):
            return send(to, 401, b"", {"X-Error-Code": "RepoNotFound"})
        commit = next(reversed(commits)) if revision == MAIN else revision
        if commit not in commits:
            return send(to, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        if name not in commits[commit]:
            return send(to, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = commits[commit][name]
        large = name.endswith(".safetensors")
        etag = (hashlib.sha256 if large else hashlib.sha1)(content).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
        if large:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        self.headers(headers)
        sent = content[: len(content) - self.cut] if to.command == "GET" else content
        send(to, 200, sent, headers)


def reply(to: BaseHTTPRequestHandler, content: dict[str, Any], status: int = 200) -> None:
    """Answer with JSON."""
    send(to, status, json.dumps(content).encode(), {"Content-Type": "application/json"})


def send(
    to: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None
) -> None:
    """Answer; to HEAD with the size alone."""
    to.send_response(status)
    for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        to.send_header(key, value)
    to.end_headers()
    if to.command != "HEAD":
        to.wfile.write(body)
