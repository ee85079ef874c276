"""A local HTTP server that answers as the Hugging Face hub does, or fails as networks do."""

import contextlib
import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`, by name after `/resolve/REVISION/`; `server.failure` selects a failure."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, with_body: bool) -> None:
        server, path = self.server, self.path
        server.requests.append((self.command, path, self.headers.get("Range")))
        match = re.fullmatch(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)", path)
        if path.startswith("/cdn/"):
            self.send_content(path.removeprefix("/cdn/"), with_body)
        elif server.failure == "portal":
            self.send_bytes(200, {"Content-Type": "text/html"}, b"<html>please log in</html>", with_body)
        elif server.failure == "broken":
            self.send_bytes(500, {"X-Repo-Commit": COMMIT}, b"", with_body)
        elif not match or match["repo"] not in server.repositories:
            self.send_bytes(404, {"X-Error-Code": "RepoNotFound"}, b"", with_body)
        elif match["revision"] not in (COMMIT, "main", *server.revisions):
            self.send_bytes(404, {"X-Error-Code": "RevisionNotFound"}, b"", with_body)
        elif match["name"] not in server.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            self.send_bytes(404, headers, b"", with_body)
        elif server.failure == "redirect":
            content = server.files[match["name"]]
            headers = {"Location": f"/cdn/{match['name']}", "X-Repo-Commit": COMMIT}
            headers |= {"X-Linked-Etag": get_etag(content), "X-Linked-Size": str(len(content))}
            self.send_bytes(302, headers, b"", with_body)
        else:
            self.send_content(match["name"], with_body)

    def send_content(self, name: str, with_body: bool) -> None:
        server, content = self.server, self.server.files[name]
        headers = {"ETag": get_etag(content), "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if server.failure == "wrong bytes":
            content = content[:-1] + b"?"
        if server.failure == "wrong size":
            if not with_body:
                self.send_bytes(200, headers, content, False)
                return
            content = content[:-7]
        start, status = 0, 200
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start, status = int(match[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send_bytes(status, headers, content[start:], with_body)

    def send_bytes(self, status: int, headers: dict, body: bytes, with_body: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and self.server.failure == "interrupt" and self.server.interruptions:
            self.server.interruptions -= 1
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif with_body:
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


class Hub(http.server.ThreadingHTTPServer):
    """The server, with what it serves."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.repositories = {"owner/name"}
        self.revisions: set[str] = set()
        self.failure = ""
        self.interruptions = 1
        self.requests: list[tuple[str, str, str | None]] = []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *arguments):
        pass  # a client that went away

    def build_environment(self, cache: Path, **more: str) -> dict[str, str]:
        """Return the variables that point huggingface_hub here."""
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "*"}
        return {"HF_ENDPOINT": self.address, "HF_HOME": str(cache)} | quiet | more


def get_etag(content: bytes) -> str:
    """Return the header of a large file: its SHA-256."""
    return f'"{hashlib.sha256(content).hexdigest()}"'


@contextlib.contextmanager
def run_hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
