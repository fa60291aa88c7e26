"""A hub of the test's own: one repository, served as huggingface.co serves it."""

import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

REVISION = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub_with(kind: str, name: str, files: Callable[[], dict[str, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """kind: models or datasets; files: by path, as they are at the moment. -> (its address, the files that were asked for)."""
    asked: list[str] = []
    resolve = f"/{'' if kind == 'models' else f'{kind}/'}{name}/resolve/{REVISION}/"

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

        def answer(self, whole: bool) -> None:
            path, headers, held = self.path.split("?")[0], {"X-Repo-Commit": REVISION}, files()
            file = path.removeprefix(resolve)
            if path.startswith(f"/api/{kind}/{name}/revision/"):
                data = json.dumps({"id": name, "sha": REVISION, "siblings": [{"rfilename": one} for one in held]}).encode()
            elif path.startswith(f"/api/{kind}/{name}/tree/"):
                tree = [{"type": "file", "path": one, "size": len(raw), "oid": _digest(raw)[:40]} for one, raw in held.items()]
                data = json.dumps(tree).encode()
            elif file in held:
                data = held[file]
                asked.append(file)
                headers |= {"ETag": f'"{_digest(data)}"', "Accept-Ranges": "bytes"}
            else:
                data, headers = b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self.send_response(404 if "X-Error-Code" in headers else 200)
            for key, value in (headers | {"Content-Length": str(len(data)), "Content-Type": "application/json"}).items():
                self.send_header(key, value)
            self.end_headers()
            if whole:
                self.wfile.write(data)

        def log_message(self, *arguments) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
