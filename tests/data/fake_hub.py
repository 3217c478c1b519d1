"""A hub on this machine: as much of ModelScope's and Hugging Face's APIs as their clients need for data."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class FakeHub:
    """Serves `files`.

    Attributes:
        sha256: overrides the published checksum of a file; None publishes none.
        breaks: after so many bytes of a body the connection is cut, once for each entry.
        ranges: the Range header of every request for a file.
        statuses: answers to the next requests that are no files.
        silent: connections are taken and never answered.
    """

    files: dict[str, bytes]
    sha256: dict[str, str | None] = field(default_factory=dict)
    breaks: list[int] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    silent: bool = False

    def __enter__(self) -> FakeHub:
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that was killed
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()

    def __post_init__(self) -> None:
        self.stopping = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def checksum(self, name: str) -> str | None:
        return self.sha256.get(name, hashlib.sha256(self.files[name]).hexdigest())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        hub = self.hub
        if hub.silent:
            hub.stopping.wait(60)
            return
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if url.path.endswith("/gongjy/minimind_dataset/repo"):
            self.send_content(query["FilePath"])
        elif resolved := re.fullmatch(r"/datasets/jingyaogong/minimind_dataset/resolve/main/(.*)", url.path):
            self.send_content(unquote(resolved[1]))
        elif hub.statuses:
            self.send_json({}, hub.statuses.pop(0))
        elif url.path == "/api/v1/datasets/gongjy/minimind_dataset/repo/tree":
            self.send_json({"Code": 200, "Success": True, "Data": {"Files": self.modelscope_entries()}})
        elif url.path == "/api/datasets/jingyaogong/minimind_dataset/tree/main":
            self.send_json(self.huggingface_entries())
        else:
            self.send_json({}, 404)

    def modelscope_entries(self) -> list[dict]:
        return [
            {
                "Path": name,
                "Name": name,
                "Size": len(content),
                "Type": "blob",
                "Sha256": self.hub.checksum(name) or "",
            }
            for name, content in self.hub.files.items()
        ] + [{"Path": "images", "Name": "images", "Size": 0, "Type": "tree"}]

    def huggingface_entries(self) -> list[dict]:
        entries = []
        for name, content in self.hub.files.items():
            entry = {"type": "file", "oid": "0" * 40, "size": len(content), "path": name}
            if checksum := self.hub.checksum(name):
                entry["lfs"] = {"oid": checksum, "size": len(content), "pointerSize": 135}
            entries.append(entry)
        return [*entries, {"type": "directory", "oid": "1" * 40, "path": "images"}]

    def send_json(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_content(self, name: str) -> None:
        hub, content = self.hub, self.hub.files[name]
        wanted = self.headers.get("Range")
        hub.ranges.append(wanted)
        start = int(re.fullmatch(r"bytes=(\d+)-\d*", wanted)[1]) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + hub.breaks.pop(0) if hub.breaks else len(content)
        self.wfile.write(content[start:end])
        if end < len(content):
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass
