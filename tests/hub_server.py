"""As much of the Hugging Face hub as uploads and downloads of small files need, on this machine."""

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"


class HubServer(http.server.ThreadingHTTPServer):
    """Repositories of files; whoever writes needs :data:`TOKEN`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no errors of ours."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        if path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            there = name in self.server.files
            self.server.files.setdefault(name, {})
            self.answer({"url": f"{self.server.url}/{name}", "error": "exists"}, 409 if there else 200)
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in path:
            name = "/".join(path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.server.commits.append(line["value"]["summary"])
                else:
                    self.server.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.unknown()

    def do_GET(self) -> None:
        owner, name, *rest = unquote(urlsplit(self.path).path).strip("/").split("/")
        files = self.server.files.get(f"{owner}/{name}")
        if rest[:1] != ["resolve"]:
            self.unknown()
        elif files is None:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif (content := files.get("/".join(rest[2:]))) is None:
            self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40})
        else:
            tag = {"X-Repo-Commit": "0" * 40, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            self.answer(content, 200, tag)

    def do_HEAD(self) -> None:
        self.do_GET()

    def unknown(self) -> None:
        self.answer({"error": f"this stand-in does not know {self.path}"}, 404)

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A server that answers until the block ends."""
    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
