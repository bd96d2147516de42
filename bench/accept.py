"""What a durable call costs its sender: python3 bench/accept.py (needs waitress, and wrk: apt-get install wrk)

An acknowledged call is one commit with fsync. Measured by turns on the same disk, each after a rest as webhooks come: a plain
SQLite commit, accepting a call, a plain call, an acknowledged call; then calls of 16 clients at once, who share commits,
against those of one.
"""
from __future__ import annotations

import http.client
import os
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from run import HERE, Candidate

CALLS, ROUNDS = int(os.environ.get("CALLS", "500")), int(os.environ.get("ROUNDS", "5"))
PLAIN = 'def main(request):\n    return "x"\n'
FUNCTION = 'SETTINGS = {"async": True}\ndef main(request):\n    return "x"\n'


def seconds(action: Callable[[], object]) -> float:
    """Return how long an action takes that comes after a rest, as webhooks do."""
    time.sleep(.01)
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def make_commit(path: Path) -> Callable[[], object]:
    """Return what commits one row with fsync, in WAL mode."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, text TEXT)")
    return lambda: database.execute("INSERT INTO rows (text) VALUES (?)", ("x" * 300,))


def make_call(port: int, path: str) -> Callable[[], object]:
    """Return what makes a call over a connection that is kept."""
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def call() -> None:
        connection.request("POST", path, b"{}")
        connection.getresponse().read()
    return call


def make_accept(directory: Path) -> Callable[[], object]:
    """Return what accepts a call without a server in front: the pipeline and the commit."""
    (directory / "functions").mkdir(parents=True)
    (directory / "functions" / "hello.py").write_text(FUNCTION)
    sys.path.insert(0, str(HERE.parent))
    import fnserve
    app = fnserve.App(fnserve.Settings({"SECRET_TOKEN": "x", "SECRET_KEY": "y", "QUEUE_MAX": 10 ** 7}, str(directory)))
    app.runner.poke = lambda: None
    client = fnserve.Client(app)
    client.get("/health")
    app.background.drain()
    return lambda: client.post("/function/hello", data="{}")


def rate(port: int, clients: str) -> float:
    """Return acknowledged calls per second."""
    out = subprocess.run(["wrk", "-t1", "-c" + clients, "-d2", f"http://127.0.0.1:{port}/function/hello"], capture_output=True,
                         text=True).stdout
    return float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1])


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as name:
        command = [sys.executable, "fnserve.py", "--port", "PORT", "--workers", "1", "--queue-max", "10000000"]
        server = Candidate("fnserve", command, Path(name), {"functions/hello.py": FUNCTION, "functions/plain.py": PLAIN})
        try:
            actions = (make_commit(Path(name) / "plain.db"), make_accept(Path(name) / "in-process"),
                       make_call(server.port, "/function/plain"), make_call(server.port, "/function/hello"))
            found = [[seconds(action) for action in actions] for _ in range(CALLS)]
            rates = [(rate(server.port, "1"), rate(server.port, "16")) for _ in range(ROUNDS)]
        finally:
            server.stop()
    commit, accept, plain, durable = (statistics.median(column) for column in zip(*found))
    one, many = (statistics.median(column) for column in zip(*rates))
    print("| what | median |\n|---|---|")
    print(f"| a SQLite commit with fsync | {commit * 1e3:.2f} ms |")
    print(f"| accepting a call, without the server in front | {accept * 1e3:.2f} ms, {accept / commit:.2f} commits |")
    print(f"| a call of a function | {plain * 1e3:.2f} ms |")
    print(f"| an acknowledged call | {durable * 1e3:.2f} ms, {(durable - plain) / commit:.2f} commits more |")
    print(f"| acknowledged and run, one client, 16 clients at once | {one:.0f}/s, {many:.0f}/s |")


if __name__ == "__main__":
    main()
