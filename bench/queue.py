"""What a durable call costs its sender: python3 bench/queue.py (needs waitress, and wrk: apt-get install wrk)

An acknowledged call is one commit with fsync. Measured side by side on the same disk: plain SQLite commits and calls of one
client, each every 10 ms as webhooks may come; calls of 16 clients at once, who share commits, against those of one.
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
from pathlib import Path

from run import HERE, Candidate

ROUNDS = int(os.environ.get("ROUNDS", "5"))
PLAIN = 'def main(request):\n    return "x"\n'
FUNCTION = 'SETTINGS = {"async": True}\ndef main(request):\n    return "x"\n'


def commit_seconds(path: Path) -> float:
    """Return the median time of a commit with fsync of one row, in WAL mode."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE IF NOT EXISTS rows (id INTEGER PRIMARY KEY, text TEXT)")
    times = []
    for number in range(150):
        time.sleep(.01)
        began = time.perf_counter()
        database.execute("INSERT INTO rows (text) VALUES (?)", (str(number) * 100,))
        times.append(time.perf_counter() - began)
    database.close()
    return statistics.median(times)


def call_seconds(port: int, path: str) -> float:
    """Return the median time of a call over a connection that is kept."""
    connection, times = http.client.HTTPConnection("127.0.0.1", port), []
    for _ in range(150):
        time.sleep(.01)
        began = time.perf_counter()
        connection.request("POST", path, b"{}")
        connection.getresponse().read()
        times.append(time.perf_counter() - began)
    connection.close()
    return statistics.median(times)


def accept_seconds(directory: Path) -> float:
    """Return the median time of an acknowledged call without a server in front: the pipeline and the commit."""
    (directory / "functions").mkdir(parents=True)
    (directory / "functions" / "hello.py").write_text(FUNCTION)
    sys.path.insert(0, str(HERE.parent))
    import fnserve
    app = fnserve.App(fnserve.Settings({"SECRET_TOKEN": "x", "SECRET_KEY": "y", "QUEUE_MAX": 10 ** 7}, str(directory)))
    app.runner.poke = lambda: None
    client, times = fnserve.Client(app), []
    for _ in range(150):
        time.sleep(.01)
        began = time.perf_counter()
        client.post("/function/hello", data="{}")
        times.append(time.perf_counter() - began)
    app.background.stop()
    return statistics.median(times)


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
        found = []
        try:
            for _ in range(ROUNDS):
                found.append((commit_seconds(Path(name) / "plain.db"), accept_seconds(Path(name) / f"in-process-{len(found)}"),
                              call_seconds(server.port, "/function/plain"),
                              call_seconds(server.port, "/function/hello"), rate(server.port, "1"), rate(server.port, "16")))
        finally:
            server.stop()
    commit, accept, plain, durable, one, many = (statistics.median(column) for column in zip(*found))
    print("| what | median |\n|---|---|")
    print(f"| a SQLite commit with fsync | {commit * 1e3:.2f} ms |")
    print(f"| accepting a call, without the server in front | {accept * 1e3:.2f} ms, {accept / commit:.2f} commits |")
    print(f"| a call of a function | {plain * 1e3:.2f} ms |")
    print(f"| an acknowledged call | {durable * 1e3:.2f} ms, {(durable - plain) / commit:.2f} commits more |")
    print(f"| acknowledged and run, one client, 16 clients at once | {one:.0f}/s, {many:.0f}/s |")


if __name__ == "__main__":
    main()
