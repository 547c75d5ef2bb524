"""A small Hub on 127.0.0.1: the endpoints that huggingface_hub calls to create, upload and download a repository.

Which they are was read off huggingface_hub (``hf_api.py``, ``_commit_api.py``, ``lfs.py``, ``file_download.py``).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

COMMIT = "c0ffee" + "0" * 34


class StandIn(ThreadingHTTPServer):
    """Serves until ``close``.

    Attributes:
        token: the only one that is accepted.
        files: repository -> path -> content, after the commits.
        private: repository -> visibility that was asked for.
        requests: (method, path) of every request, in order.
        failures: path pattern -> list of statuses to answer with, instead of serving, until the list is used up.
        lfs_above: files of more bytes go by the LFS protocol.
    """

    daemon_threads = True

    def __init__(self, token: str = "hf_secret", lfs_above: int = 10_000):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.lfs_above = token, lfs_above
        self.files: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, str | None] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.failures: dict[str, list[int]] = {}
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, path)) for _, path in self.requests)

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.read_chunks()
        path = self.path.split("?")[0]
        with self.server.lock:
            self.server.requests.append((self.command, path))
            for pattern, statuses in self.server.failures.items():
                if statuses and re.search(pattern, path):
                    return self.answer(statuses.pop(0), b"the server is not well", content_type="text/plain")
            for method, pattern, needs_token, function in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == self.command:
                    if needs_token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
                        return self.answer(401, {"error": "Invalid credentials"})
                    return function(self, body, *match.groups())
        return self.answer(404, {"error": f"no {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, content: Any = b"", content_type: str = "application/json", **headers: str) -> None:
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(payload)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.server.files:
            return self.answer(
                409, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"}
            )
        self.server.files[repo] = {}
        self.server.visibility[repo] = asked.get("visibility")
        return self.answer(200, {"url": f"{self.server.url}/{repo}"})

    def validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        _, header, _ = text.split("---\n", 2)
        problem = None if isinstance(yaml.safe_load(header).get("tags"), list) else "tags must be a list"
        if problem:
            return self.answer(400, {"errors": [{"message": problem}], "warnings": []})
        return self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str) -> None:
        if repo not in self.server.files:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] > self.server.lfs_above else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return self.answer(200, {"files": modes})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}}
            for item in json.loads(body)["objects"]
        ]
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "the content is not what its name says"})
        self.server.blobs[oid] = body
        return self.answer(200)

    def commit(self, body: bytes, repo: str) -> None:
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                self.server.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                self.server.files[repo][value["path"]] = self.server.blobs[value["oid"]]
        url = f"{self.server.url}/{repo}/commit/{COMMIT}"
        return self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})

    def info(self, body: bytes, repo: str) -> None:
        if repo not in self.server.files:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": path} for path in self.server.files[repo]]
        return self.answer(200, {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

    def tree(self, body: bytes, repo: str) -> None:
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in self.server.files.get(repo, {}).items()
        ]
        return self.answer(200, entries)

    def resolve(self, body: bytes, repo: str, path: str) -> None:
        content = self.server.files.get(repo, {}).get(path)
        if content is None:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.answer(200, content, "application/octet-stream", ETag=etag, X_Repo_Commit=COMMIT)


_REPO = r"([^/]+/[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", True, Handler.create),
    ("POST", "/api/validate-yaml", False, Handler.validate),
    ("POST", f"/api/models/{_REPO}/preupload/main", True, Handler.preupload),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", True, Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", False, Handler.lfs_put),
    ("POST", f"/api/models/{_REPO}/commit/main", True, Handler.commit),
    ("GET", f"/api/models/{_REPO}", False, Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/[^/]+", False, Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/[^/]+", False, Handler.tree),
    ("HEAD", f"/{_REPO}/resolve/[^/]+/(.+)", False, Handler.resolve),
    ("GET", f"/{_REPO}/resolve/[^/]+/(.+)", False, Handler.resolve),
]
