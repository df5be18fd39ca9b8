"""A server that speaks as much of W&B's protocol as a run and `wandb sync` need, and keeps what it is sent."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

RUN = {"id": "r", "displayName": "run", "config": "{}", "project": {"id": "p", "name": "p", "entity": {"name": "e"}}}


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data
        self.server.seen.append((self.path, data))
        return data

    def reply(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        data = self.body()
        if not self.path.startswith("/graphql"):
            return self.reply({"exitcode": None, "limits": {}})
        asked = json.loads(data)
        given = asked.get("variables") or {}
        if "upsertBucket" in asked["query"]:
            return self.reply({"data": {"upsertBucket": {"bucket": {**RUN, "name": given["name"]}, "inserted": True}}})
        if "createRunFiles" in asked["query"]:
            place = f"http://{self.headers['Host']}/upload/"
            files = [{"name": name, "uploadUrl": place + name} for name in given["files"]]
            return self.reply({"data": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}})
        if "viewer" in asked["query"]:
            return self.reply({"data": {"viewer": {"id": "v", "entity": "e", "username": "u", "flags": "{}"}}})
        return self.reply({"data": {}})

    def do_PUT(self) -> None:
        self.body()
        self.reply({})

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


class Server(ThreadingHTTPServer):
    """seen: (path, body) of every request; `address` is what WANDB_BASE_URL takes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.seen: list[tuple[str, bytes]] = []
        self.open: list[socket.socket] = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.append(request)
        super().process_request(request, client_address)

    def end(self) -> None:
        """Gone, with every connection that is open."""
        self.shutdown()
        self.server_close()
        for connection in self.open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def history(self) -> list[dict[str, Any]]:
        """Rows of metrics that were sent, in order."""
        rows: dict[int, dict[str, Any]] = {}
        for path, body in self.seen:
            if path.endswith("/file_stream"):
                part = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
                for number, line in enumerate(part["content"]):
                    rows[part["offset"] + number] = json.loads(line)
        return [rows[number] for number in sorted(rows)]

    def uploads(self) -> list[str]:
        return [m[1] for path, _ in self.seen if (m := re.fullmatch(r"/upload/(.*)", path))]
