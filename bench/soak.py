"""Does anything grow? python3 bench/soak.py [MINUTES, 10] (needs waitress, and wrk: apt-get install wrk)

Full load over several kinds of functions at once, with two workers; each minute memory, file descriptors and threads are read
from /proc. The table ends with what the second half of the time added: flat is 0, but for what the allocator keeps.
"""
from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from run import Candidate

MINUTES = float(sys.argv[1]) if sys.argv[1:] else 10
FUNCTIONS = {  # what runs, and how many connections ask for it
    "hello": ('def main(request):\n    return "Hello, world!"\n', 6),
    "fails": ('def main(request):\n    print(request.args)\n    return {}[request.path]\n', 1),
    "stream": ('def main(request):\n    for n in range(20):\n        yield f"data: {n}\\n\\n"\n', 2),
    "large": ('def main(request):\n    return "x" * 300_000\n', 1),
    "form": ('from flask import session\ndef main(request):\n    session["n"] = session.get("n", 0) + 1\n'
             '    return dict(request.args)\n', 2),
    "table": ('import sqlite3\ndef main(request):\n    with sqlite3.connect("serverless.db", timeout=9) as db:\n'
              '        rows = db.execute("SELECT count(*) FROM call_stats").fetchall()\n    db.close()\n    return rows\n', 1),
    "later": ('SETTINGS = {"async": True}\ndef main(request):\n    return "x"\n', 1),
    "thread": ('import threading\ndef main(request):\n    threading.Thread(target=len, args=("x",)).start()\n'
               '    return "x"\n', 1),
    "late": ('import time\nSETTINGS = {"timeout": 1}\ndef main(request):\n    time.sleep(3)\n', 1),
}


def read(pid: int) -> tuple[int, int, int]:
    """Return resident kB, open file descriptors and threads of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return (int(re.search(r"VmRSS:\s+(\d+)", text)[1]), len(os.listdir(f"/proc/{pid}/fd")),
            int(re.search(r"Threads:\s+(\d+)", text)[1]))


def workers(pid: int) -> list[int]:
    """Return the workers of a supervisor."""
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def main() -> None:
    """Drive it and print the table."""
    rows, answers = [], {}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        files = {f"functions/{key}.py": code for key, (code, _) in FUNCTIONS.items()}
        server = Candidate("fnserve", [sys.executable, "fnserve.py", "--port", "PORT", "--workers", "2"], Path(name), files)
        stack.callback(server.stop)
        first, began = workers(server.process.pid), time.monotonic()
        wrk = ["wrk", "-t1", f"-d{MINUTES * 60:.0f}s"]
        loads = {key: subprocess.Popen(wrk + [f"-c{count}", f"http://127.0.0.1:{server.port}/function/{key}"],
                                       stdout=subprocess.PIPE, text=True) for key, (_, count) in FUNCTIONS.items()}
        for load in loads.values():
            stack.callback(load.kill)
        for turn in range(1, max(2, int(MINUTES)) + 1):
            time.sleep(max(0.0, began + turn * MINUTES * 60 / max(2, int(MINUTES)) - 5 - time.monotonic()))
            rows.append([read(pid) for pid in [server.process.pid] + workers(server.process.pid)])
        for key, load in loads.items():
            out = load.communicate()[0]
            failed = re.search(r"Non-2xx or 3xx responses: (\d+)", out)
            broken = re.search(r"Socket errors: (.*)", out)
            count = re.search(r"(\d+) requests in", out)[1]
            answers[key] = (count, failed[1] if failed else 0, broken[1] if broken else "none")
        same = workers(server.process.pid) == first
        disk = sum(path.stat().st_size for path in server.directory.rglob("*") if path.is_file()) / 1e6
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {MINUTES:g} minutes, 2 workers\n")
    print("| minute | supervisor RSS MB | fds | threads | workers' RSS MB | fds | threads |")
    print("|---|---|---|---|---|---|---|")
    for turn, (head, *others) in enumerate(rows, 1):
        print(f"| {turn * MINUTES / len(rows):g} | {head[0] / 1024:.1f} | {head[1]} | {head[2]} | "
              + " + ".join(f"{row[0] / 1024:.1f}" for row in others) + " | "
              + " | ".join(" + ".join(str(row[at]) for row in others) for at in (1, 2)) + " |")
    grown = sum(row[0] for row in rows[-1]) - sum(row[0] for row in rows[len(rows) // 2 - 1])
    print(f"\nThe second half added {grown / 1024:.1f} MB. The workers are {'the same' if same else 'not the same'} as at the "
          f"start; {disk:.0f} MB lie on the disk.\n")
    print("| function | answers | not 2xx | socket errors |\n|---|---|---|---|")
    for key, (count, failed, broken) in answers.items():
        print(f"| {key} | {count} | {failed} | {broken} |")


if __name__ == "__main__":
    main()
