"""A stand-in for the hub: a real HTTP server on this machine that answers what the real libraries ask.

It knows what `huggingface_hub` and `datasets` call to read: information on a repository, its tree, the files
of a commit with their headers, and errors with theirs. A program finds it by `StandIn.environment()`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

Files = Mapping[str, bytes]
API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
    r"(/(?P<action>revision|tree)/(?P<revision>[^/]+)(/(?P<path>.*))?)?"
)
FILE = re.compile(
    r"/((?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)/(?P<action>resolve)/(?P<revision>[^/]+)/(?P<path>.+)"
)


class StandIn:
    """Repositories in memory, served while the block lasts: `with StandIn() as hub: hub.add(...)`."""

    def __init__(self) -> None:
        self.commits: dict[tuple[str, str], dict[str, Files]] = {}  # (kind, OWNER/NAME) -> {commit: files}
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def add(self, kind: str, name: str, files: Files, *, gated: bool = False) -> str:
        """Returns the commit that files (path -> content) now are the newest of a repository in.

        kind is "models" or "datasets".
        """
        content = b"".join(path.encode() + hashlib.sha1(files[path]).digest() for path in sorted(files))
        commit = hashlib.sha1(content).hexdigest()
        of_repository = self.commits.setdefault((kind, name), {})
        of_repository.pop(commit, None)
        of_repository[commit] = files
        if gated:
            self.gated.add(name)
        return commit

    def add_directory(self, kind: str, name: str, directory: Path, *, gated: bool = False) -> str:
        """Returns the commit of a repository that has the files of a directory."""
        files = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
        return self.add(kind, name, files, gated=gated)

    def environment(self, home: Path, *, offline: bool = False) -> dict[str, str | None]:
        """Returns the variables with which a program sees this hub, and keeps copies below `home`."""
        port = self._server.server_address[1]
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "1" if offline else None,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": None,
        }

    def __enter__(self) -> StandIn:
        """Starts to serve."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        self.hub.requests.append(f"{self.command} {path}")
        match = API.fullmatch(path) or FILE.fullmatch(path)
        if match is None:
            return self._error(404, "EntryNotFound", f"Nothing at {path}")
        found = {"action": "revision", "revision": "main"} | {k: v for k, v in match.groupdict().items() if v}
        kind, name, action, revision = (found.get(key, "") for key in ("kind", "name", "action", "revision"))
        path = found.get("path", "")
        repository = self.hub.commits.get((kind or "models", name))
        if repository is None:
            return self._error(401, "RepoNotFound", "Repository Not Found")
        commit = next(reversed(repository)) if revision == "main" else revision
        files = repository.get(commit)
        if files is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if action == "revision":
            siblings = [{"rfilename": file} for file in sorted(files)]
            info = {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
            return self._json(info | {"gated": "manual" if name in self.hub.gated else False, "downloads": 0})
        if action == "tree":
            asked = urllib.parse.parse_qs(url.query).get("recursive", [""])[0]
            return self._json(_tree(files, path, recursive=asked.lower() == "true"))
        if action == "resolve" and name in self.hub.gated:
            return self._error(401, "GatedRepo", f"Access to model {name} is restricted.")
        if action == "resolve" and path in files:
            return self._file(files[path], commit)
        return self._error(404, "EntryNotFound", "Entry not found")

    def _file(self, content: bytes, commit: str) -> None:
        total, start, end = len(content), 0, len(content)
        asked = self.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else total, total)
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
        self._send(206 if asked else 200, content[start:end], "application/octet-stream", headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), "application/json", {})

    def _error(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self._send(status, body, "application/json", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, body: bytes, kind: str, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def _tree(files: Files, below: str, *, recursive: bool) -> list[dict[str, object]]:
    """Returns the entries of a directory, or of all below it."""
    prefix = f"{below}/" if below else ""
    entries: dict[str, dict[str, object]] = {}
    for path, content in files.items():
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            directory = prefix + "/".join(parts[:depth])
            entries[directory] = {"type": "directory", "path": directory, "size": 0, "oid": "0" * 40}
        if recursive or len(parts) == 1:
            oid = hashlib.sha1(content).hexdigest()
            entries[path] = {"type": "file", "path": path, "size": len(content), "oid": oid}
    return list(entries.values())
