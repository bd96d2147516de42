"""Compare fnserve with what people run today, side by side in one run: python3 bench/run.py

Needs wrk (apt-get install wrk) and, in this Python: pip install waitress flask gunicorn bottle functions-framework.
Rounds are interleaved; the figures are medians, and the ratios are what counts. Everything listens on 127.0.0.1.
"""
from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROUNDS, SECONDS, CONNECTIONS = int(os.environ.get("ROUNDS", "5")), os.environ.get("SECONDS", "3"), "16"
HELLO = 'def main(request):\n    return "Hello, world!"\n'
WAITRESS = '''
import os, sys, waitress
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/html; charset=utf-8"), ("Content-Length", "13")])
    return [b"Hello, world!"]
if sys.argv[2:]: os.sched_setaffinity(0, {int(sys.argv[2])})
waitress.serve(app, host="127.0.0.1", port=int(sys.argv[1]), threads=8, _quiet=True)
'''
FLASK = '''
import importlib, logging, os, sqlite3, sys
from dotenv import dotenv_values
from flask import Flask, jsonify, request
sys.path.insert(0, "functions")
app, config = Flask(__name__), dotenv_values(".env")
with sqlite3.connect("serverless.db") as db:
    db.execute("CREATE TABLE IF NOT EXISTS call_stats (func_name TEXT PRIMARY KEY, call_count INTEGER NOT NULL)")
@app.route("/function/<func_name>", methods=["GET", "POST"])
def call(func_name):
    try:
        module = importlib.reload(importlib.import_module(func_name))
        db = sqlite3.connect("serverless.db")
        db.execute("INSERT INTO call_stats VALUES (?, 1) ON CONFLICT (func_name) DO UPDATE SET call_count = call_count + 1",
                   (func_name,))
        db.commit()
        db.close()
        return module.main(request)
    except ModuleNotFoundError:
        return jsonify(error="not found"), 404
    except Exception:
        logging.exception("failed")
        return jsonify(error="Function execution failed"), 500
'''
BOTTLE = '''
import sys, bottle
@bottle.route("/function/hello")
def hello(): return "Hello, world!"
bottle.run(host="127.0.0.1", port=int(sys.argv[1]), server="waitress", quiet=True)
'''
GOOGLE = 'import functions_framework\n@functions_framework.http\ndef hello(request):\n    return "Hello, world!"\n'


def free_port() -> int:
    """Find a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Candidate:
    """One server in a directory of its own."""

    def __init__(self, name: str, command: list[str], root: Path, files: dict[str, str]) -> None:
        self.name, self.port, self.directory = name, free_port(), root / re.sub(r"\W+", "-", name)
        self.directory.mkdir()
        for path, text in files.items():
            (self.directory / path).parent.mkdir(exist_ok=True)
            (self.directory / path).write_text(text)
        shutil.copy(HERE.parent / "fnserve.py", self.directory)
        self.command = [part.replace("PORT", str(self.port)) for part in command]
        self.rates, self.p50, self.p99 = [], [], []  # type: list[float], list[str], list[str]
        self.launch()
        self.stop()
        self.start = self.launch()  # the second time, when Python has compiled what it keeps compiled

    def launch(self) -> float:
        """Start the server; return the seconds until its first answer."""
        env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        began = time.monotonic()
        self.process = subprocess.Popen(self.command, cwd=self.directory, env=env, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, start_new_session=True)
        return self.wait(began)

    def wait(self, began: float) -> float:
        """Wait for the first answer; return the seconds it took."""
        while time.monotonic() - began < 30:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/function/hello", timeout=5).read()
                return time.monotonic() - began
            time.sleep(.002)
        raise SystemExit(f"{self.name} did not start: {self.command}")

    def round(self) -> None:
        """Drive it with wrk once."""
        out = subprocess.run(["wrk", "-t1", "-c" + CONNECTIONS, f"-d{SECONDS}", "--latency",
                              f"http://127.0.0.1:{self.port}/function/hello"], capture_output=True, text=True).stdout
        if "Non-2xx" in out:
            raise SystemExit(f"{self.name} failed calls:\n{out}")
        self.rates.append(float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1]))
        self.p50.append(re.search(r"\n +50% +(\S+)", out)[1])
        self.p99.append(re.search(r"\n +99% +(\S+)", out)[1])

    def memory(self) -> float:
        """Return the PSS of the whole tree in MB."""
        total = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(path.read_text().rpartition(")")[2].split()[3]) == self.process.pid:  # its session
                    total += int(re.search(r"Pss:\s+(\d+)", (path.parent / "smaps_rollup").read_text())[1])
        return total / 1024

    def stop(self) -> None:
        """End the whole tree."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 15)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)


def main() -> None:
    """Run all candidates and print the table."""
    python, core = sys.executable, str(min(os.sched_getaffinity(0)))
    function = {"functions/hello.py": HELLO}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        root = Path(name)
        rows = {
            "waitress hello, pinned": ([python, "app.py", "PORT", core], {"app.py": WAITRESS}),
            "fnserve, 1 worker pinned": (["taskset", "-c", core, python, "fnserve.py", "--port", "PORT", "--workers", "1"],
                                         function),
            "waitress hello": ([python, "app.py", "PORT"], {"app.py": WAITRESS}),
            "fnserve": ([python, "fnserve.py", "--port", "PORT"], function),
            "Flask platform, gunicorn -w 4": ([python, "-m", "gunicorn", "-w", "4", "-b", "127.0.0.1:PORT", "platform_app:app"],
                                              {"platform_app.py": FLASK, ".env": "", **function}),
            "bottle + waitress": ([python, "app.py", "PORT"], {"app.py": BOTTLE}),
            "functions-framework": ([python, "-m", "functions_framework", "--target", "hello", "--port", "PORT", "--host",
                                     "127.0.0.1"], {"main.py": GOOGLE})}
        candidates = []
        for label, (command, files) in rows.items():
            candidates.append(Candidate(label, command, root, files))
            stack.callback(candidates[-1].stop)
        for _ in range(ROUNDS):
            for candidate in candidates:
                candidate.round()
        print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
              f"median of {ROUNDS} interleaved rounds of {SECONDS} s, wrk -t1 -c{CONNECTIONS}\n")
        print("| server | requests/s | p50 | p99 | PSS MB | first answer s |\n|---|---|---|---|---|---|")
        for row in candidates:
            middle = sorted(range(ROUNDS), key=lambda turn: row.rates[turn])[ROUNDS // 2]
            print(f"| {row.name} | {row.rates[middle]:.0f} | {row.p50[middle]} | {row.p99[middle]} | {row.memory():.0f} |"
                  f" {row.start:.2f} |")
        print()
        by_name = {row.name: row for row in candidates}
        for mine, other in (("fnserve, 1 worker pinned", "waitress hello, pinned"), ("fnserve", "waitress hello"),
                            ("fnserve", "Flask platform, gunicorn -w 4")):
            ratio = statistics.median(a / b for a, b in zip(by_name[mine].rates, by_name[other].rates))
            print(f"{mine} / {other}: {ratio:.2f} of its requests/s, "
                  f"{by_name[mine].memory() / by_name[other].memory():.2f} of its memory, "
                  f"{by_name[mine].start / by_name[other].start:.2f} of its time to the first answer")


if __name__ == "__main__":
    main()
