"""Shards behind a real web server: ranges over HTTP, a server that stumbles, and processes that connect anew."""

import os
import re
import socket
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

from dsvlm.data import remote
from dsvlm.data.adopt import index_set
from dsvlm.data.manifest import check_files, load_manifest
from dsvlm.data.reader import ShardReader
from dsvlm.data.shard import ShardWriter

pytest.importorskip("aiohttp")


class Handler(BaseHTTPRequestHandler):
    """Serves files of a directory by ranges; every fifth answer is 503."""

    protocol_version = "HTTP/1.1"
    asked: list[str] = []

    def __init__(self, *args, directory: Path):
        self.directory = directory
        super().__init__(*args)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append(f"{self.command} {self.path}")
        path = self.directory / self.path.lstrip("/")
        if len(self.asked) % 5 == 0:
            return self.answer(503, b"")
        if not path.is_file():
            return self.answer(404, b"")
        data = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found is None:
            return self.answer(200, data)
        start, stop = int(found[1]), min(int(found[2]) + 1, len(data))
        self.answer(206, data[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def answer(self, status: int, data: bytes, headers=None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(data), "Accept-Ranges": "bytes", **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def url(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_shards_at_a_web_server(url, tmp_path):
    samples = [(f"k{i}", {"json": b'{"caption":"%d"}' % i, "jpg": bytes([i]) * (500 + i)}) for i in range(40)]
    with ShardWriter(tmp_path / "set", "caption", shard_bytes=20_000) as writer:
        for key, members in samples:
            writer.write(key, members)
    manifest = load_manifest(f"{url}/set", str(tmp_path / "cache"))
    assert len(manifest.names) > 2 and manifest.hash == load_manifest(tmp_path / "set").hash
    check_files(manifest)
    reader = ShardReader(manifest, str(tmp_path / "cache"))
    reader.fetch(np.arange(40), 0)
    assert all(reader.read(i, ext) == data for i, (_, members) in enumerate(samples) for ext, data in members.items())
    asked = len(Handler.asked)
    assert [reader.image(i) for i in range(40)] == [members["jpg"] for _, members in samples]
    assert len(Handler.asked) == asked
    bare = ShardReader(manifest, "", 0)           # no cache: it has a connection now
    assert bare.image(6) == samples[6][1]["jpg"]
    child = os.fork()
    if child == 0:                                # a forked process cannot use the parent's
        os._exit(0 if bare.image(7) == samples[7][1]["jpg"] else 1)
    assert os.waitpid(child, 0)[1] == 0
    index_set([f"{url}/set/{manifest.names[0]}"], "caption", tmp_path / "foreign")
    foreign = ShardReader(load_manifest(tmp_path / "foreign"), str(tmp_path / "cache2"))
    assert foreign.record(1) == {"caption": "1"} and foreign.image(1) == samples[1][1]["jpg"]
    with pytest.raises(ValueError, match="no shard set at .*nowhere"):
        load_manifest(f"{url}/nowhere", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="no file http"):
        index_set([f"{url}/absent.tar"], "caption", tmp_path / "none")


def test_no_connection_is_not_no_file(url, tmp_path, monkeypatch):
    """A server that refuses is asked again and then named; only its word that there is no file is believed."""
    waits = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    with socket.socket() as closed:               # bound and not listening: connections to it are refused
        closed.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{closed.getsockname()[1]}/x.tar"
        with pytest.raises(OSError, match=f"{gone} cannot be read .* after {remote.ATTEMPTS} attempts"):
            remote.sizes([gone])
    assert len(waits) == remote.ATTEMPTS - 1
    (tmp_path / "x.tar").write_bytes(bytes(1000))
    assert remote.sizes([f"{url}/x.tar", f"{url}/y.tar"]) == {f"{url}/x.tar": 1000, f"{url}/y.tar": None}


def test_a_server_that_never_answers_is_given_up(tmp_path, monkeypatch):
    """It takes the connection and is silent."""
    for name, value in {"SILENCE": 0.2, "ATTEMPTS": 2, "FIRST_WAIT": 0.01}.items():
        monkeypatch.setattr(remote, name, value)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(ValueError, match="no shard set at .*after 2 attempts: .*Timeout"):
            load_manifest(f"http://127.0.0.1:{silent.getsockname()[1]}/set", str(tmp_path / "cache"))
        with pytest.raises(OSError, match="x.tar cannot be read .* after 2 attempts"):
            remote.sizes([f"http://127.0.0.1:{silent.getsockname()[1]}/x.tar"])
    assert time.monotonic() - start < 20


def test_what_the_user_set_for_web_servers_stays(monkeypatch):
    monkeypatch.setattr(fsspec.config, "conf", {"https": {"client_kwargs": {"trust_env": True}}})
    found = remote.Stores().connect("https://h/x")[0].client_kwargs
    assert found["trust_env"] and found["timeout"].sock_read == remote.SILENCE
    monkeypatch.setattr(fsspec.config, "conf", {"http": {"client_kwargs": {"timeout": 7}}})
    assert remote.Stores().connect("http://h/x")[0].client_kwargs == {"timeout": 7}
