"""Does a call cost more when there is more of everything? python3 bench/scale.py (needs wrk; flask and gunicorn for a row)

Requests/s with 1, 2 and 4 workers; with 1, 100 and 10,000 functions, 1,000 jobs, 1,000,000 lines in the journal, interleaved;
the fold of 100,000 lines; bytes written to disk per 1,000 calls; the time from start to the first answer.
"""
from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

from run import FLASK, HELLO, HERE, Candidate

ROUNDS, SECONDS = int(os.environ.get("ROUNDS", "5")), float(os.environ.get("SECONDS", "3"))
sys.path.insert(0, str(HERE.parent))


def functions(count: int) -> dict[str, str]:
    """Return the files of so many functions."""
    return {"functions/hello.py": HELLO, **{f"functions/f{number}.py": HELLO for number in range(count - 1)}}


def lines(count: int) -> str:
    """Return so many lines of a journal."""
    return "".join(f'\n{{"t":{1.7e9 + n / 100:.6f},"id":"{n:016x}","f":"hello","m":"GET","p":"/function/hello","s":200,'
                   f'"us":900,"n":13,"c":"127.0.0.1"}}\n' for n in range(count))


def add_jobs(server: Candidate, count: int) -> None:
    """Make jobs that fire in an hour, by the API."""
    import urllib.request
    token = re.search(r"SECRET_TOKEN=(\S+)", (server.directory / ".env.local").read_text())[1].strip("'\"")
    for number in range(count):
        body = json.dumps({"id": f"job{number}", "func": "hello", "trigger": "interval", "hours": 1 + number % 24})
        request = urllib.request.Request(f"http://127.0.0.1:{server.port}/scheduler/jobs", body.encode(), {
            "Content-Type": "application/json", "Authorization": "Bearer " + token})
        urllib.request.urlopen(request, timeout=30).read()


def written(server: Candidate) -> int:
    """Return the bytes that the processes of a server have caused to be written to disk, so far."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            if int(path.read_text().rpartition(")")[2].split()[3]) == server.process.pid:
                total += int(re.search(r"\nwrite_bytes: (\d+)", (path.parent / "io").read_text())[1])
    return total


def cpu_seconds(server: Candidate) -> float:
    """Return the CPU time that a server has taken, which the work of others spoils less than rates."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            fields = path.read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) * (int(fields[3]) == server.process.pid)
    return total / os.sysconf("SC_CLK_TCK")


def fold_seconds(directory: Path, count: int) -> float:
    """Return how long the fold of so many lines takes."""
    import fnserve
    app = fnserve.App(fnserve.Settings({"SECRET_TOKEN": "t", "SECRET_KEY": "k"}, str(directory)))
    (directory / "journal").mkdir(parents=True)
    (directory / "journal" / "1700000000.jsonl").write_text(lines(count))
    began = time.perf_counter()
    if app.folder.fold() != count:
        raise SystemExit("lines are missing")
    took = time.perf_counter() - began
    app.store.close()
    return took


def main() -> None:
    """Measure and print."""
    command = [sys.executable, "fnserve.py", "--port", "PORT", "--workers"]
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"median of {ROUNDS} interleaved rounds\n")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        root, servers = Path(name), {}

        def add(label: str, workers: str, files: dict[str, str]) -> None:
            servers[label] = Candidate(label, command + [workers], root, files)
            stack.callback(servers[label].stop)
        for workers in ("1", "2", "4"):
            add(f"{workers} workers", workers, functions(1))
        add("100 functions", "1", functions(100))
        add("10,000 functions", "1", functions(10_000))
        add("1,000 jobs", "1", functions(1))
        add_jobs(servers["1,000 jobs"], 1000)
        add("1,000,000 journal lines", "1", {**functions(1), "journal/1700000000.jsonl": lines(1_000_000)})
        for row in servers.values():
            row.round()  # nobody counts the first
            row.rates.clear()
        time.sleep(60)  # until the journal is folded and the directory of 10,000 was looked at
        costs: dict[str, list[float]] = {label: [] for label in servers}
        for _ in range(ROUNDS):
            for label, row in servers.items():
                before = cpu_seconds(row)
                row.round()
                costs[label].append((cpu_seconds(row) - before) / row.rates[-1] / SECONDS * 1e6)
        print("| platform | requests/s | us of CPU per call | of 1 worker, 1 function | first answer s |")
        print("|---|---|---|---|---|")
        for label, row in servers.items():
            ratio = statistics.median(a / b for a, b in zip(costs[label], costs["1 workers"]))
            print(f"| {label} | {statistics.median(row.rates):.0f} | {statistics.median(costs[label]):.0f} | {ratio:.2f} | "
                  f"{row.start:.2f} |")
        for row in servers.values():
            row.stop()
        times = [fold_seconds(root / f"fold{turn}", 100_000) for turn in range(ROUNDS)]
        print(f"\nA fold of 100,000 lines takes {statistics.median(times):.2f} s.\n")
        print("| platform | bytes written to disk per 1,000 calls |\n|---|---|")
        flask = [sys.executable, "-m", "gunicorn", "-w", "4", "-b", "127.0.0.1:PORT", "platform_app:app"]
        for label, start, files in (("fnserve", command + ["2"], functions(1)), ("Flask platform, gunicorn -w 4", flask, {
                "platform_app.py": FLASK, ".env": "", **functions(1)})):
            row = Candidate(label, start, root, files)
            stack.callback(row.stop)
            before, calls = written(row), 0.0
            for _ in range(ROUNDS):
                row.round()
                calls += row.rates[-1] * SECONDS
            time.sleep(70)  # until what was counted is folded, and the kernel has written
            print(f"| {label} | {(written(row) - before) / calls * 1000:,.0f} |")


if __name__ == "__main__":
    main()
