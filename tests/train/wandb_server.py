"""As much of a Weights & Biases server as one run needs: it keeps the history that is sent to it."""

from __future__ import annotations

import gzip
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class WandbServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.run_id = ""
        self.history: list[str] = []  # lines of JSON
        self.url = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"name": "MiniMind", "entity": {"name": "someone"}}
        bucket = {"id": "1", "name": self.run_id, "project": project, "historyLineCount": len(self.history)}
        if query == "UpsertBucket":
            self.run_id = bucket["name"] = variables["name"]
            return {"upsertBucket": {"bucket": bucket, "inserted": not self.history}}
        if query == "RunResumeStatus" and variables["name"] == self.run_id:
            lines = {"historyTail": json.dumps(self.history[-1:]), "eventsTail": "[]", "summaryMetrics": "{}"}
            counts = {"eventsLineCount": 0, "logLineCount": 0}
            config = {"config": "{}", "wandbConfig": '{"t": 1}', "tags": []}
            return {"model": project | {"id": "1", "bucket": bucket | lines | counts | config}}
        if query == "CreateRunFiles":
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}}
        return {}


class Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        reply: dict[str, Any] = {}
        if self.path.endswith("/file_stream"):
            if sent := json.loads(body).get("files", {}).get("wandb-history.jsonl"):
                self.server.history[sent["offset"] :] = sent["content"]
        elif self.path == "/graphql":
            request = json.loads(body)
            query = re.search(r"(?:query|mutation) (\w+)", request["query"])
            reply = {"data": self.server.answer(query[1] if query else "", request.get("variables") or {})}
        text = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass
