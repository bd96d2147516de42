"""Tests of fnserve, by its sections. Run them with: python3 test_fnserve.py

They need waitress and nothing else; what needs a tool that is missing is skipped with the tool's name, or fails
where FNSERVE_REQUIRE_ALL=1.
"""
from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import html
import http.client
import importlib.util
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import unittest.mock
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from wsgiref.validate import validator

sys.dont_write_bytecode = True
import fnserve  # noqa: E402

HERE = Path(__file__).resolve().parent
TOKEN = "correct horse battery staple"
logging.getLogger("fnserve").propagate = False


def need(what: str, found: object) -> None:
    """Skip a test that needs something this machine lacks; fail it where everything must be there."""
    if not found:
        if os.environ.get("FNSERVE_REQUIRE_ALL"):
            raise AssertionError(f"{what} is missing")
        raise unittest.SkipTest(f"needs {what}")


def module(name: str):
    """Import an oracle, or skip."""
    try:
        return __import__(name, fromlist=["_"])
    except ImportError:
        need(name, None)


class FakeClock:
    """A clock that tests set."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Case(unittest.TestCase):
    """A temporary running directory, and an app in it."""

    def setUp(self) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="fnserve-test-"))
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        (self.dir / "functions").mkdir()
        self.clock = FakeClock()
        kept = dict(os.environ)
        self.addCleanup(lambda: (os.environ.clear(), os.environ.update(kept)))
        where = os.getcwd()
        self.addCleanup(os.chdir, where)

    def write(self, name: str, code: str) -> Path:
        """Write a function file."""
        path = self.dir / "functions" / (name + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code, encoding="utf-8")
        return path

    def make_app(self, **settings: object):
        """Make an app of the temporary directory."""
        os.chdir(self.dir)
        options = {"SECRET_TOKEN": TOKEN, "SECRET_KEY": "k" * 32, **settings}
        app = fnserve.App(fnserve.Settings(options, str(self.dir)), self.clock)
        real = sys.stdout, sys.stderr
        sys.stdout = io.StringIO()
        app.start()
        self.addCleanup(setattr, sys, "stderr", real[1])
        self.addCleanup(setattr, sys, "stdout", real[0])
        self.addCleanup(self.stop, app)
        self.addCleanup(app.store.close)
        return app

    def stop(self, app) -> None:
        """End an app's threads."""
        app.background.drain()
        app.watch.step = sys.exit

    def client(self, app, **headers: str):
        """Return a client whose every call is checked by wsgiref.validate."""
        checked = validator(app)

        def strict(environ, start_response):
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read())
            environ["SERVER_PORT"] = str(environ["SERVER_PORT"])
            return checked(environ, start_response)
        return fnserve.Client(strict, headers={name.replace("_", "-"): value for name, value in headers.items()})

    def admin(self, app):
        """Return a client that is the admin and asks for JSON."""
        return self.client(app, Authorization="Bearer " + TOKEN, Accept="application/json")

    def call(self, app, method: str, path: str, **options: object):
        """Make one call."""
        return self.client(app).open(path, method, **options)


def unexpired(case: unittest.TestCase, one: str, other: str) -> list[str]:
    """Blank the Expires of cookies in two texts, once they are seen to be the same but for a second that passed between them."""
    from email.utils import parsedate_to_datetime
    pattern = r"Expires=(\w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT)"
    moments = [[parsedate_to_datetime(text) for text in re.findall(pattern, whole)] for whole in (one, other)]
    case.assertEqual(*map(len, moments))
    case.assertTrue(all(abs((a - b).total_seconds()) <= 2 for a, b in zip(*moments)), moments)
    return [re.sub(pattern, "Expires=", whole) for whole in (one, other)]


def set_limits(limits: dict) -> None:
    """Set resource limits, by their names."""
    import resource
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, name), (most, most))


class Server:
    """A real fnserve in a process of its own, in a directory, on a free port."""

    def __init__(self, directory: Path, *options: str, python: str = sys.executable, script: str = "fnserve.py",
                 limits: object = None, change: object = None, **environ: str) -> None:
        if not (directory / script).is_symlink():
            code = (HERE / "fnserve.py").read_text(encoding="utf-8")
            (directory / script).write_text(code.replace(*change) if change else code, encoding="utf-8")
        self.directory = directory
        env = {key: value for key, value in os.environ.items() if not key.startswith("FNSERVE_") and key != "PORT"}
        self.stderr = open(directory / "stderr.txt", "ab")
        self.process = subprocess.Popen(
            [python, "-B", script, "--port", "0", *options], cwd=directory, env={**env, **environ},
            stdout=subprocess.PIPE, stderr=self.stderr, text=True, start_new_session=True,
            preexec_fn=functools.partial(set_limits, limits) if limits else None)
        self.port = 0
        for line in self.process.stdout:
            found = re.search(r"http://[\d.]+:(\d+)/", line)
            if found:
                self.port = int(found[1])
                break
        if not self.port:
            raise AssertionError((directory / "stderr.txt").read_text())
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def get(self, path: str, method: str = "GET", body: object = None, **headers: str):
        """Make one request; return status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def workers(self) -> list[int]:
        """Return the process ids of the workers."""
        path = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        return [int(pid) for pid in Path(path).read_text().split()]

    def session(self) -> list[int]:
        """Return the processes that are there of all that it started."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    found.append(int(path.parent.name))
        return found

    def kill_all(self) -> None:
        """Kill the whole tree with -9."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)
        self.stderr.close()

    def stop(self) -> int:
        """Stop it politely; return its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(20)
        finally:
            self.kill_all()


def wait_until(true, seconds: float = 20.0) -> None:
    """Wait for something that another process does."""
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            raise AssertionError("it did not happen")
        time.sleep(.02)


# == 02 SETTINGS ==========================================================


class SettingsTest(Case):
    ENV = ["A=1", "export A=1", "A='x # y' # c", 'A="a\\nb"', "A=a # c", "A=a#c", "A=", "A", "A='it\\'s'", 'A="x',
           "A=1\nA=2", "A=1\nB=${A}x", "B=${NOPE:-d}", "B=${NOPE}", 'A="two\nlines"', "# c\n\nA=b", "A = b ", "'A B'=c",
           "A=b\r\nB=c\r\n", "=x\nA=1", "A==x", 'A="\\"q\\""', "A=ä", "A b=c\nC=d", "A='${HOME}'", 'A="b" x\nC=1', "A=$B"]

    def dotenv(self):
        """Import python-dotenv, of the version whose comments are as we have them."""
        found = module("dotenv")
        need("a newer python-dotenv", found.dotenv_values(stream=io.StringIO("A= # c"))["A"] == "")
        return found

    def test_values_that_would_do_nothing(self):
        for name, value in (("LOKI_URL", "foo"), ("LOKI_URL", "ftp://x"), ("TRUSTED_PROXY", "localhost"), ("TRUSTED_PROXY", "127.0.0.0/8"),
                            ("TRUSTED_PROXY", "127.0.0.1, 10.0.0.1"), ("TRUSTED_PROXY", "999.1.1.1")):
            with self.assertRaisesRegex(fnserve.SettingError, name):
                fnserve.Settings({name: value}, str(self.dir))
        self.assertEqual([fnserve.Settings({"TRUSTED_PROXY": value}, str(self.dir)).TRUSTED_PROXY for value in ("", "::1", "10.0.0.1")],
                         ["", "::1", "10.0.0.1"])

    def test_the_local_file_overrides_and_may_use_the_other(self):
        (self.dir / ".env").write_text("P=48123\nAPI_TOKENS=t1,t2\n")
        (self.dir / ".env.local").write_text("PORT=${P}\nAPI_TOKENS=\n")
        settings = fnserve.Settings({}, str(self.dir))
        self.assertEqual((settings.PORT, settings.API_TOKENS), (48123, ()))
        self.assertEqual(fnserve.Config([str(self.dir / name) for name in (".env", ".env.local")]).current()["PORT"], "48123")

    def test_env_agrees_with_python_dotenv(self):
        dotenv = self.dotenv()
        logging.getLogger("dotenv").setLevel(logging.ERROR)
        for text in self.ENV:
            with self.subTest(text=text):
                expected = dict(dotenv.dotenv_values(stream=io.StringIO(text)))
                self.assertEqual(fnserve.parse_env(text, os.environ), expected)

    def test_generated_env_agrees_with_python_dotenv(self):
        dotenv, pieces, seeded = self.dotenv(), [
            "A", "B", "key", "=", "=", " = ", "'", '"', "\\", "\\n", "\n", "\n", "\r\n", "#", " # ", " ", "\t", "${A}", "${B:-x}", "${", "}",
            "$", "export ", "v", "漢", "\\'", '\\"', ":", "'q'", '"d"', "1"], random.Random(20260101)
        logging.getLogger("dotenv").setLevel(logging.CRITICAL)
        for number in range(400):
            text = "".join(seeded.choice(pieces) for _ in range(seeded.randrange(1, 30)))
            with self.subTest(number=number, text=text):
                expected = dict(dotenv.dotenv_values(stream=io.StringIO(text)))
                self.assertEqual(fnserve.parse_env(text, os.environ), expected)

    def test_priority(self):
        (self.dir / ".env").write_text("PORT=1\nTHREADS=2\nGRACE=3\nTIMEOUT=4\n")
        (self.dir / ".env.local").write_text("THREADS=5\n")
        os.environ.update(FNSERVE_GRACE="6", FNSERVE_PORT="7", PORT="9")
        settings = fnserve.Settings({"TIMEOUT": 8}, str(self.dir))
        self.assertEqual((settings.PORT, settings.THREADS, settings.GRACE, settings.TIMEOUT), (9, 5, 6, 8))
        self.assertEqual(settings.sources["THREADS"], ".env.local")

    def test_bad_values_name_the_setting(self):
        for name, value in (("PORT", "x"), ("PORT", "70000"), ("THREADS", "0"), ("MAX_BODY", "big"), ("ADMIN", "maybe"),
                            ("WORKERS", "-1"), ("UI_LANG", "x"), ("TIMEOUT", "-1"), ("NOPE", "1")):
            with self.subTest(name=name, value=value), self.assertRaisesRegex(fnserve.SettingError, name):
                fnserve.Settings({name: value}, str(self.dir))

    def test_sizes(self):
        for text, value in (("16MiB", 16 << 20), ("500kB", 500_000), ("1024", 1024), ("2G", 2 * 10**9), ("1 KiB", 1024)):
            self.assertEqual(fnserve.size(text), value)

    def test_secrets_are_made_once_and_kept_private(self):
        (self.dir / ".env").write_text("SECRET_TOKEN=\nSECRET_KEY=\n")
        first = fnserve.Settings({}, str(self.dir))
        made = fnserve.make_secrets(first)
        self.assertEqual(set(made), {"SECRET_TOKEN", "SECRET_KEY"})
        self.assertGreaterEqual(len(made["SECRET_TOKEN"]), 32)
        self.assertEqual((self.dir / ".env.local").stat().st_mode & 0o777, 0o600)
        again = fnserve.Settings({}, str(self.dir))
        self.assertEqual(again.SECRET_TOKEN, made["SECRET_TOKEN"])
        self.assertEqual(fnserve.make_secrets(again), {})

    def test_exposed_secrets_are_noticed(self):
        (self.dir / ".env").write_text("SECRET_TOKEN=x\n")
        os.chmod(self.dir / ".env", 0o644)
        self.assertEqual(fnserve.exposed_files(fnserve.Settings({}, str(self.dir))), [str(self.dir / ".env")])

    def test_config_follows_the_file(self):
        (self.dir / ".env").write_text("GREETING=hi\n")
        self.write("f", "import os\ndef main(request, config):\n    return [config['GREETING'], os.environ['GREETING']]")
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/function/f").json, ["hi", "hi"])
        (self.dir / ".env.local").write_text("GREETING=hello there\n")
        self.assertEqual(self.call(app, "GET", "/function/f").json, ["hello there", "hello there"])

    def test_readme_has_the_table(self):
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        for row in fnserve.SETTINGS_TABLE:
            with self.subTest(setting=row.name):
                self.assertIn(f"| {row.name} | {row.default} | {row.help} |", readme)

    def test_the_chinese_readme_says_the_same(self):
        english, chinese = ((HERE / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-TW.md"))
        self.assertEqual(("(README.zh-TW.md)" in english, "(README.md)" in chinese), (True, True))
        for row in fnserve.SETTINGS_TABLE:
            self.assertRegex(chinese, rf"\| {row.name} \| {re.escape(row.default)} \| [^|\n]*[\u4e00-\u9fff][^|\n]* \|")
        blocks = re.findall(r"(?s)```\w+\n.*?```", chinese)
        self.assertGreater(len(blocks), 6)
        for block in blocks:
            self.assertIn(block, english)
        for table in ("methods", "/login"):  # the first columns of SETTINGS and of the pages
            columns = [re.findall(r"(?m)^\| (`.*?) \|", re.search(rf"(?ms)^\| `{table}`.*?\n\n", text)[0]) for text in (english, chinese)]
            self.assertEqual(*columns)
        commands = [re.findall(r"`([^`]+)`", re.search(rf"(?s)## {title}\n\n(.*?)\n\n", text)[1]) for title, text in (
            ("Commands", english), ("指令", chinese))]
        self.assertEqual(commands[0][:len(commands[1])], commands[1])
        self.assertEqual({text.split()[0] for text in commands[1]}, {command.__name__[4:] for command in fnserve.COMMANDS})
        self.assertEqual({name for name in re.findall(r"[A-Z]+(?:_[A-Z]+)+", english) if "SECRET" in name and name in str(fnserve.SCHEMES)},
                         {name for name in re.findall(r"[A-Z]+(?:_[A-Z]+)+", chinese) if "SECRET" in name and name in str(fnserve.SCHEMES)})

    def test_env_file_explains_every_setting_and_holds_no_secret(self):
        text = (HERE / ".env").read_text(encoding="utf-8")
        values = fnserve.parse_env(text, {})
        for row in fnserve.SETTINGS_TABLE:
            self.assertRegex(text, rf"(?m)^#? ?{row.name}=")
            if row.secret:
                self.assertFalse(values.get(row.name))


# == 03 HTTP ==============================================================


class HttpTest(Case):
    def test_multidict(self):
        values = fnserve.MultiDict([("a", "1"), ("a", "2"), ("b", "x")])
        self.assertEqual((values["a"], values.getlist("a"), values.get("b", 7, type=int)), ("1", ["1", "2"], 7))
        self.assertEqual((dict(values), json.dumps(values)), ({"a": "1", "b": "x"}, '{"a": "1", "b": "x"}'))
        self.assertEqual(values.to_dict(flat=False), {"a": ["1", "2"], "b": ["x"]})
        self.assertEqual((next(values.values()), fnserve.MultiDict(values).getlist("a")), ("1", ["1", "2"]))
        self.assertEqual(fnserve.MultiDict([("a", (1, 2))]).getlist("a"), [(1, 2)])

    def test_header_door(self):
        for name, value in (("X", "a\r\nSet-Cookie: b"), ("X\n", "a"), ("X Y", "a"), ("X", "a\0"), ("X", "漢")):
            with self.subTest(name=name, value=value), self.assertRaises(ValueError):
                fnserve.Headers([(name, value)])

    def test_cookies_agree_with_werkzeug(self):
        werkzeug = module("werkzeug.http")
        for value in ("plain", "a b", "a;b", 'q"q', "漢字", "back\\slash", "", "a,b"):
            with self.subTest(value=value):
                mine = fnserve.dump_cookie("k", value, max_age=5, httponly=True, samesite="lax", path="/x")
                theirs = werkzeug.dump_cookie("k", value, max_age=5, httponly=True, samesite="lax", path="/x")
                self.assertEqual(mine.partition(";")[0], theirs.partition(";")[0])
                self.assertEqual(*(set(text.split("; ")) for text in unexpired(self, mine, theirs)))
                header = mine.partition(";")[0]
                self.assertEqual(fnserve.parse_cookies(header)["k"], werkzeug.parse_cookie(header)["k"])

    MULTIPART = (b"--B\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\none\r\n--B\r\nContent-Disposition: form-data; "
                 b"name=\"f\"; filename=\"x.txt\"\r\nContent-Type: text/plain\r\n\r\nline\r\n--b\r\n--B--\r\n")

    def test_multipart(self):
        form, files = fnserve.parse_multipart(io.BytesIO(self.MULTIPART), b"B")
        self.assertEqual(dict(form), {"a": "one"})
        self.assertEqual((files["f"].filename, files["f"].content_type, files["f"].read()), ("x.txt", "text/plain",
                                                                                             b"line\r\n--b"))

    def test_multipart_cut_off_anywhere_is_400(self):
        for end in range(0, len(self.MULTIPART) - 5):
            with self.assertRaises(fnserve.HTTPException) as caught:
                fnserve.parse_multipart(io.BytesIO(self.MULTIPART[:end]), b"B")
            self.assertEqual(caught.exception.code, 400)

    def test_request_attributes_agree_with_werkzeug(self):
        werkzeug = module("werkzeug.wrappers")
        names = ("method path full_path url base_url url_root root_url host host_url scheme is_secure remote_addr"
                 " query_string content_type mimetype mimetype_params content_length is_json referrer access_route"
                 ).split()
        for path, method, options in (
                ("/a%20b/c?x=1&x=2&y=%E6%BC%A2", "GET", {}), ("/p", "POST", {"data": {"a": "1", "b": "&="}}),
                ("/p", "POST", {"json": {"a": [1]}}), ("/x", "PUT", {"data": b"raw", "headers": {"Content-Type": "a/b; c=d"}})):
            seen = []
            fnserve.Client(lambda e, s: (seen.append(dict(e)), s("200 OK", []), [b""])[2]).open(path, method, **options)
            environ = seen[0]
            body = environ["wsgi.input"].getvalue()
            mine = fnserve.Request({**environ, "wsgi.input": io.BytesIO(body)})
            theirs = werkzeug.Request({**environ, "wsgi.input": io.BytesIO(body)})
            for name in names:
                with self.subTest(path=path, name=name):
                    self.assertEqual(getattr(mine, name), getattr(theirs, name))
            self.assertEqual(mine.args.to_dict(flat=False), theirs.args.to_dict(flat=False))
            self.assertEqual(mine.form.to_dict(flat=False), theirs.form.to_dict(flat=False))
            self.assertEqual(mine.get_json(silent=True), theirs.get_json(silent=True))

    def test_lazy(self):
        request = fnserve.Request({"REQUEST_METHOD": "POST", "QUERY_STRING": "a=1", "wsgi.input": None})
        self.assertEqual(request.args["a"], "1")  # a body that can't be read was not touched


# == 04 SESSIONS ==========================================================


class SessionTest(Case):
    def test_round_trip_and_lies(self):
        signer, other = fnserve.Signer("key", "token"), fnserve.Signer("other", "token")
        text = signer.sign('{"a":1}', 1000)
        self.assertEqual(signer.unsign(text, 1001), '{"a":1}')
        for lie in (text[:-1], text + "x", "", ".", "..", "a.b.c", "漢.1.x", other.sign("{}", 1000), text.replace(".", "..")):
            self.assertIsNone(signer.unsign(lie, 1001), lie)
        self.assertIsNone(signer.unsign(text, 1000 + 32 * 86400))
        self.assertIsNone(signer.unsign(text, 100))

    def test_login_ends_with_the_token(self):
        mark = fnserve.Signer("key", "token").login_mark(2000)
        self.assertTrue(fnserve.Signer("key", "token").is_login(mark, 1000))
        for signer in (fnserve.Signer("key", "new"), fnserve.Signer("new", "token"), fnserve.Signer("key", "")):
            self.assertFalse(signer.is_login(mark, 1000))
        self.assertFalse(fnserve.Signer("key", "token").is_login(mark, 2001))
        for lie in (True, [3000, mark[1]], ["x", "y"], None, [2000, 5]):
            self.assertFalse(fnserve.Signer("key", "token").is_login(lie, 1000))

    def test_session_of_functions(self):
        self.write("count", "from flask import session\ndef main(request):\n"
                            "    session['n'] = session.get('n', 0) + 1\n    return str(session['n'])")
        app = self.make_app()
        client = self.client(app)
        self.assertEqual([client.get("/function/count").data for _ in range(3)], [b"1", b"2", b"3"])
        cookie = client.get("/function/count").headers["Set-Cookie"]
        self.assertIn("HttpOnly", cookie)
        self.assertIn("SameSite=Lax", cookie)
        client.cookies["session"] = "forged"
        self.assertEqual(client.get("/function/count").data, b"1")


# == 06 JOURNAL ===========================================================


class JournalTest(Case):
    def test_counts_are_exact_and_folded_once(self):
        self.write("hello", "def main(request): return 'x'")
        self.write("bad", "def main(request): 1/0")
        app = self.make_app()
        for _ in range(5):
            self.call(app, "GET", "/function/hello")
        self.call(app, "GET", "/function/bad")
        self.call(app, "GET", "/function/nope")
        other = fnserve.Folder(app.journal, fnserve.Store(app.settings.DB_PATH, fnserve.TABLES), app.settings, app.protected.__contains__)
        self.assertEqual(other.fold() + app.folder.fold() + app.folder.fold(), 7)
        self.assertEqual(self.admin(app).get("/function/show_stats").json["stats"], {"hello": 5, "bad": 1})

    def test_existing_counts_go_on(self):
        with contextlib.closing(sqlite3.connect(self.dir / "serverless.db")) as db, db:
            db.execute("CREATE TABLE call_stats (func_name TEXT PRIMARY KEY, call_count INTEGER NOT NULL)")
            db.execute("INSERT INTO call_stats VALUES ('hello', 41)")
        self.write("hello", "def main(request): return 'x'")
        app = self.make_app()
        self.call(app, "GET", "/function/hello")
        self.assertEqual(self.admin(app).get("/function/show_stats").json["stats"], {"hello": 42})

    def test_torn_and_foreign_lines_lose_nothing_else(self):
        self.write("hello", "def main(request): return 'x'")
        app = self.make_app()
        self.call(app, "GET", "/function/hello")
        path = next((self.dir / "journal").glob("*.jsonl"))
        with open(path, "ab") as file:
            file.write(b'\n{"t":1,"id":"torn","f":"hel')
        self.assertEqual(app.folder.fold(), 1)
        self.call(app, "GET", "/function/hello")
        with open(path, "ab") as file:
            file.write(b'\n[]\n{"m":1}\n\xff\xfe\n' + b'{"t":"x","f":"hello","m":"GET","s":"y","us":1}\n')
        self.assertEqual(app.folder.fold(), 1)
        self.assertEqual(self.admin(app).get("/function/show_stats").json["stats"], {"hello": 2})

    def test_segments_rotate_and_are_pruned_once_folded(self):
        self.write("hello", "def main(request): return 'x'")
        app = self.make_app(KEEP_DAYS=1)
        size, fnserve.SEGMENT_BYTES = fnserve.SEGMENT_BYTES, 2000
        self.addCleanup(setattr, fnserve, "SEGMENT_BYTES", size)
        for _ in range(300):
            self.call(app, "GET", "/function/hello")
        self.assertGreater(len(fnserve.segments(app.settings.JOURNAL_DIR)), 2)
        for number in fnserve.segments(app.settings.JOURNAL_DIR):
            os.utime(fnserve.segment_path(app.settings.JOURNAL_DIR, number), (1, 1))
        app.folder.prune(self.clock.now)  # nothing is folded yet
        self.assertEqual(self.admin(app).get("/function/show_stats").json["stats"], {"hello": 300})
        app.folder.prune(self.clock.now)
        self.assertEqual(len(fnserve.segments(app.settings.JOURNAL_DIR)), 1)
        self.call(app, "GET", "/function/hello")
        self.assertEqual(self.admin(app).get("/function/show_stats").json["stats"], {"hello": 301})

    def test_a_segment_that_a_writer_holds_is_not_pruned(self):
        app = self.make_app(KEEP_DAYS=0)
        app.journal.append('{"t":1,"id":"a","f":"x","m":"GET","s":200,"us":1}')
        [number] = fnserve.segments(app.settings.JOURNAL_DIR)
        Path(fnserve.segment_path(app.settings.JOURNAL_DIR, number + 1)).touch()
        app.folder.fold()
        os.utime(fnserve.segment_path(app.settings.JOURNAL_DIR, number), (1, 1))
        app.folder.prune(self.clock.now)
        self.assertIn(number, fnserve.segments(app.settings.JOURNAL_DIR))

    def test_broken_database_or_journal_never_fails_a_call(self):
        self.write("hello", "def main(request): return 'x'")
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/function/hello").code, 200)
        app.store.close()
        for name in os.listdir(self.dir):
            if name.startswith("serverless.db"):
                os.unlink(self.dir / name)
        (self.dir / "serverless.db").write_bytes(b"this is no database, but it is long enough to be looked at" * 20)
        self.assertEqual(self.call(app, "GET", "/function/hello").code, 200)
        self.write("fresh", "def main(request): return 'new'")
        self.assertEqual(self.call(app, "GET", "/function/fresh").data, b"new")
        shutil.rmtree(self.dir / "journal")
        (self.dir / "journal").write_text("in the way")
        app.journal.handle = -1
        self.assertEqual(self.call(app, "GET", "/function/hello").code, 200)
        self.assertGreater(app.journal.lost, 0)

    def test_secrets_in_queries_are_blanked(self):
        for query in ("token=S3CRET", "a=1&api_key=S3CRET", "Password=S3CRET", "X-Signature=S3CRET", "to%6Ben=S3CRET"):
            with self.subTest(query=query):
                self.assertNotIn("S3CRET", fnserve.scrub(query))
        self.assertEqual(fnserve.scrub("name=Tony&x=%41"), "name=Tony&x=%41")

    def test_records_that_sqlite_refuses(self):
        self.write("prn", "def main(request):\n    print(request.json['m'])\n    raise ValueError(request.json['m'])")
        app = self.make_app()
        self.call(app, "POST", "/function/prn", data=b'{"m": "\\ud800"}', headers={"Content-Type": "application/json"})
        for line in ('{"t":Infinity,"f":"x","m":"GET","s":200,"us":1}', '{"t":1,"id":{},"f":"x","m":"GET","s":200,"us":1}',
                     '{"t":1,"f":"x","m":"GET","s":200,"us":99999999999999999999999999}', '{"t":1,"f":[],"m":[],"s":2,"us":1}',
                     '{"t":1e300,"f":"x","m":"GET","s":200,"us":1}', '{"t":1,"f":"x","m":"GET","s":99999999999999999999,"us":1}',
                     '{"t":1,"f":"x","m":"GET","s":200,"us":-99999999999999999999}'):
            app.journal.append(line)
        for method in ("FOO1", "FOO2"):
            self.call(app, method, "/function/prn")
        self.assertEqual(self.admin(app).get("/function/show_stats").json["stats"]["prn"], 3)
        self.assertIn("?", self.admin(app).get("/admin/logs?function=prn").json["invocations"][-1]["output"])
        self.assertEqual({row[0] for row in app.store.read("SELECT method FROM fn_requests WHERE endpoint LIKE '%prn'")},
                         {"POST", "OTHER"})

    def test_keep_invocations(self):
        self.write("hello", "def main(request): print('p' * 9000); return 'x'")
        app = self.make_app(KEEP_INVOCATIONS=3)
        for _ in range(5):
            self.call(app, "GET", "/function/hello")
        rows = self.admin(app).get("/admin/logs").json["invocations"]
        self.assertEqual(len(rows), 3)
        self.assertIn("more characters", rows[0]["output"])
        self.assertLess(len(rows[0]["output"]), 8300)


# == 08 FUNCTION API, against Flask ========================================

ECHO = """
from flask import request, jsonify
NAMES = '''method path full_path url base_url url_root root_url host host_url scheme is_secure remote_addr access_route
query_string content_type mimetype mimetype_params content_length content_encoding referrer origin is_json endpoint_ script_root
root_path remote_user date if_modified_since'''.split()
def show(value):
    return value.decode('latin-1') if isinstance(value, bytes) else str(list(value) if isinstance(value, list) else value)
def main(request_):
    found = {name: show(getattr(request, name, None)) for name in NAMES}
    found['args'], found['lists'] = request.args.to_dict(), request.args.to_dict(flat=False)
    found['cookies'] = request.cookies.to_dict()
    found['view'] = request.view_args.get('subpath', '')
    found['agent'] = [str(request.user_agent), request.user_agent.string]
    found['auth'] = request.authorization and [request.authorization.type, request.authorization.username,
                                               request.authorization.password, request.authorization.token
                                               if request.authorization.type != 'basic' else None]
    found['accept'] = [str(request.accept_mimetypes), request.accept_mimetypes.best_match(['text/html', 'application/json']),
                       request.accept_mimetypes.accept_html, request.accept_mimetypes['text/plain'],
                       'image/png' in request.accept_mimetypes, request.accept_languages.best]
    found['headers'] = [request.headers.get('X-One'), request.headers.get('x-one', 'none'), 'X-One' in request.headers,
                        request.headers.get('X-Number', 5, type=int)]
    found['cache'] = [str(request.cache_control.no_cache), str(request.cache_control.max_age)]
    found['etags'] = ['a' in request.if_none_match, request.if_none_match.contains_weak('b'), request.if_match.star_tag]
    order = request.args.get('order', 'form')
    if order == 'data':
        found['data'] = show(request.get_data())
    found['json'] = request.get_json(silent=True)
    found['forced'] = request.get_json(force=True, silent=True)
    found['form'], found['forms'] = request.form.to_dict(), request.form.to_dict(flat=False)
    found['files'] = {key: [file.filename, file.name, file.content_type, file.mimetype, show(file.read())]
                      for key, file in request.files.items()}
    found['values'] = request.values.to_dict(flat=False)
    found['after'] = show(request.data)
    return jsonify(found)
"""

ANSWERS = {
    "text": "return 'héllo'", "bytes_": "return b'\\x00\\xff'", "dict_": "return {'b': 1, 'a': [None, True, 1.5, 'ü']}",
    "list_": "return [1, 'a', None]", "status": "return 'made', 201", "pair": "return 'x', {'X-A': 'b', 'Content-Type': 'text/csv'}",
    "triple": "return {'a': 1}, 418, {'X-A': 'b'}", "triple_list": "return 'x', 202, [('X-A', '1')]",
    "text_status": "return 'x', '299 Odd'", "generator": "return (c for c in ('a', 'b'))",
    "response": "return Response('x', status=203, headers={'X-A': 'b'}, mimetype='text/plain')",
    "response_type": "return Response('{}', content_type='application/x-thing; charset=latin-1')",
    "response_xml": "return Response('<a/>', mimetype='application/xml')",
    "response_json": "return Response(json.dumps({'a': 1}), mimetype='application/json')",
    "response_bytes": "return Response([b'a', 'b'], 200)", "response_in_tuple": "return Response('x', 404), 201, {'X-B': 'c'}",
    "jsonify_args": "return jsonify(1, 'b')", "jsonify_kw": "return jsonify(b=1, a=datetime.datetime(2020, 1, 2, 3, 4, 5))",
    "jsonify_types": "return jsonify([datetime.date(2020, 1, 2), decimal.Decimal('1.50'), uuid.UUID(int=5), D(1, 'x')])",
    "jsonify_nothing": "return jsonify()", "jsonify_none": "return jsonify(None)", "jsonify_text": "return jsonify('ü<>&')",
    "cookies": "r = make_response('x'); r.set_cookie('a', 'b c', max_age=60, path='/p', secure=True, httponly=True,"
               " samesite='Lax'); r.set_cookie('u', '漢'); r.delete_cookie('gone'); return r",
    "cookie_domain": "r = make_response('x'); r.set_cookie('a', '1', domain='example.com', expires=0); return r",
    "redirect_": "return redirect('/elsewhere?a=ü&b=c')", "redirect_301": "return redirect('https://example.com/漢', 301)",
    "redirect_307": "return redirect('/x', code=307)", "teapot": "abort(418)", "forbidden": "abort(403, 'why')",
    "abort_response": "abort(Response('no', 409, {'X-A': 'b'}))", "abort_made": "abort(make_response(jsonify(e=1), 422))",
    "caught": "import werkzeug.exceptions\n    try:\n        abort(404)\n    except NotFound as e:\n        return [e.code, e.name]",
    "raised": "raise Conflict('twice')", "missing_form": "return request.form['nope']", "missing_arg": "return request.args['nope']",
    "need_json": "return request.json", "make": "r = make_response({'a': 1}, 201); r.headers['X-A'] = 'b'; return r",
    "make_tuple": "return make_response(('x', 404))", "after": "after_this_request(lambda r: (r.headers.add('X-A', 'b'), r)[1]); return 'x'",
    "headers": "r = Response('x'); r.headers['X-A'] = 1; r.headers.add('X-A', 2); r.headers.add('Link', '/a', rel='next'); return r",
    "props": "r = Response('x'); r.content_type = 'text/css'; r.location = '/ü'; r.cache_control.max_age = 60;"
             " r.cache_control.no_store = True; r.last_modified = datetime.datetime(2020, 1, 2, tzinfo=datetime.timezone.utc);"
             " r.set_etag('tag'); r.mimetype = 'text/plain'; r.age = 5; r.vary = 'Accept'; return r",
    "status_set": "r = Response('x'); r.status_code = 404; r.data = 'changed'; return r", "status_text": "r = Response(); r.status = '201 Made';"
    " r.set_data('y'); return r", "read": "r = jsonify(a=1); return [r.get_json(), r.json, r.is_json, r.get_data(as_text=True),"
    " r.mimetype, r.status, r.status_code, r.content_length]", "conditional": "r = Response('hello'); r.add_etag();"
    " return r.make_conditional(request)", "etag_odd": "r = Response('hello'); r.set_etag('a', weak=True); return r.make_conditional(request)",
    "modified": "r = Response('x'); r.last_modified = datetime.datetime(2020, 1, 2, tzinfo=datetime.timezone.utc);"
                " return r.make_conditional(request)",
    "ranged": "r = Response(b'0123456789'); return r.make_conditional(request, accept_ranges=True, complete_length=10)",
    "file": "return send_file(__file__, mimetype='text/plain')", "file_down": "return send_file(__file__, as_attachment=True,"
    " download_name='報告 1.txt', max_age=60)", "file_io": "return send_file(io.BytesIO(b'0123456789'), mimetype='image/png',"
    " download_name='a.png', last_modified=1577934245)", "file_quote": "return send_file(io.BytesIO(b'x'), download_name='a \\'b\\\\ü.bin')",
    "directory": "return send_from_directory(os.path.dirname(__file__), 'text.py')", "directory_out":
    "return send_from_directory(os.path.dirname(__file__), '../../etc/passwd')", "directory_none":
    "return send_from_directory(os.path.dirname(__file__), 'nope.txt')", "escaped": "return escape('<a href=\\'x\\'>&\"</a>')",
    "markup": "return Markup('<b>') + escape('<') if True else ''", "template": "return render_template_string('{{ a }}{{ request.path }}', a='<x>')",
    "template_file": "return render_template('hello.html', name='<Tony>')",
    "globals_": "g.a = 1; return [g.a, g.get('b', 2), 'a' in g, g.pop('a'), hasattr(g, 'a')]", "stream_ctx":
    "return Response(stream_with_context(request.path[i] for i in range(4)), mimetype='text/plain')",
    "not_found": "raise NotFound()", "exc_str": "\n    try:\n        abort(400, 'no')\n    except BadRequest as e:\n        return str(e)",
    "secure": "return secure_filename('../../My résumé (1).txt')", "empty": "return ''", "nothing_204": "return '', 204",
    "head_none": "return 'x', None, {'X-A': 'b'}", "session_set": "session['a'] = {'b': [1, 'ü']}; session.permanent = False; return dict(session)",
    "after_several": "after_this_request(lambda r: Response(r.data + b'1')); after_this_request(lambda r: Response(r.data + b'2')); return 'x'",
    "after_failed": "after_this_request(lambda r: (r.headers.add('X-A', 'b'), r)[1]); 1/0", "after_decorator":
    "\n    @after_this_request\n    def add(response):\n        response.set_cookie('a', 'b')\n        return response\n    return 'x'",
    "abort_405": "abort(405, valid_methods=['GET', 'PUT'])", "abort_429": "abort(429, retry_after=5)", "abort_unknown": "abort(299)",
    "abort_redirect": "abort(redirect('/x'))", "abort_status": "abort(http.HTTPStatus.GONE)", "caught_json":
    "\n    try:\n        return request.get_json(force=True)\n    except BadRequest as e:\n        return [type(e).__name__, e.code]",
    "caught_type": "\n    try:\n        return request.json\n    except (BadRequest, UnsupportedMediaType) as e:\n        return [type(e).__name__, e.code]",
    "caught_key": "\n    try:\n        return request.form['nope']\n    except BadRequest as e:\n        return [type(e).__name__, isinstance(e, KeyError)]",
    "caught_all": "\n    try:\n        abort(404, 'why')\n    except HTTPException as e:\n        return [e.code, e.name, e.description, str(e), e.response]",
    "stream_decorator": "\n    @stream_with_context\n    def made(n):\n        yield from request.path[:n]\n    return Response(made(5))",
    "stream_own": "\n    def made():\n        session.get('a')\n        for line in request.stream: yield line\n        yield g.get('x', 'end')"
                  "\n    return Response(stream_with_context(made()), mimetype='text/plain')",
    "in_thread": "seen = []; t = threading.Thread(target=copy_current_request_context(lambda: seen.append(request.path))); t.start(); t.join(); return seen",
    "flashes": "flash('one'); flash('two', 'bad'); return [get_flashed_messages(with_categories=True), get_flashed_messages()]",
}
HEAD = """import datetime, decimal, http, io, json, os, threading, uuid, dataclasses
from flask import (request, session, g, jsonify, abort, redirect, Response, make_response, send_file, send_from_directory,
                   stream_with_context, after_this_request, render_template, render_template_string, flash, get_flashed_messages,
                   copy_current_request_context)
from markupsafe import escape, Markup
from werkzeug.exceptions import HTTPException, NotFound, Conflict, BadRequest, UnsupportedMediaType
from werkzeug.utils import secure_filename
@dataclasses.dataclass
class D:
    a: int
    b: str
def main(request_):
    """
COMPARED = ("Content-Type", "Location", "Content-Disposition", "Content-Range", "Accept-Ranges", "ETag", "Cache-Control",
            "Last-Modified", "Vary", "X-A", "X-B", "Link", "Content-Length", "Age", "Retry-After", "Allow")
#: what differs on purpose stands in the README; here: which parts of which answers
ERRORS_ARE_JSON = {"teapot", "forbidden", "raised", "missing_form", "missing_arg", "need_json", "directory_out",
                   "directory_none", "not_found", "after_failed", "abort_405", "abort_429", "abort_unknown", "abort_status"}


#: SPEC 3's names, by what they are names of. Each of them, and whatever else fnserve's classes have, must be asked for in PROBES.
SPEC_NAMES = {
    "": "request session g current_app jsonify abort redirect url_for Response Request make_response send_file send_from_directory"
        " stream_with_context after_this_request render_template render_template_string escape Markup",
    "request": "method args form files values json is_json get_json data get_data headers cookies view_args path full_path url base_url"
               " url_root root_url host host_url scheme is_secure remote_addr access_route query_string environ endpoint content_type"
               " mimetype mimetype_params content_length stream user_agent authorization referrer accept_mimetypes max_content_length",
    "m": "get getlist to_dict", "file": "filename name content_type stream read save", "headers": "get getlist", "accept": "best_match",
    "r": "status status_code headers data get_data set_data json mimetype content_type content_length set_cookie delete_cookie"}
BEYOND_FLASK = {"enqueue", "counter", "histogram", "Client", "CloudEvent"}
#: What Werkzeug's classes have and fnserve's have not: rare, inner or outdated.
ABSENT = {
    "request": "access_control_request_headers access_control_request_method application blueprint blueprints content_md5"
               " dict_storage_class form_data_parser_class from_values if_range input_stream is_multiprocess is_multithread is_run_once"
               " json_module list_storage_class make_form_data_parser max_form_memory_size max_form_parts max_forwards"
               " on_json_loading_failed parameter_storage_class pragma range routing_exception server shallow trusted_hosts url_rule user_agent_class"
               " want_form_data_parsed",
    "r": "access_control_allow_credentials access_control_allow_headers access_control_allow_methods"
                " access_control_expose_headers access_control_max_age autocorrect_location_header automatically_set_content_length"
                " calculate_content_length content_md5 content_range content_security_policy content_security_policy_report_only"
                " cross_origin_embedder_policy cross_origin_opener_policy default_status force_type freeze from_app get_app_iter"
                " get_wsgi_headers get_wsgi_response implicit_sequence_conversion is_sequence iter_encoded json_module make_sequence"
                " max_cookie_size stream www_authenticate",
    "m": "deepcopy popitemlist setlistdefault", "headers": "copy setlistdefault", "file": "close", "accept": "accept_xhtml find provided to_header", "session": "on_update"}
INHERITED = {"accept": dir([]), "session": ["fromkeys"]}  # and of no use there
#: Probes, evaluated in a call on both sides: one a line or between ||, statements and then the value compared.
PROBES = {
    "request": """
        request.method || request.args || request.form || request.files || request.values || request.json || request.is_json
        request.data || request.headers || request.cookies || request.path || request.full_path || request.url || request.base_url
        request.url_root || request.root_url || request.host || request.host_url || request.scheme || request.is_secure
        request.remote_addr || request.access_route || request.query_string || request.content_type || request.mimetype
        request.mimetype_params || request.content_length || request.user_agent || request.referrer || request.accept_mimetypes
        request.max_content_length || request.accept_charsets || request.accept_encodings || request.accept_languages
        request.cache_control.max_age, request.cache_control.no_cache || request.content_encoding || request.date
        request.if_modified_since || request.if_unmodified_since || 'a' in request.if_none_match, bool(request.if_match)
        request.origin || request.remote_user || request.root_path || request.script_root || request.close() || repr(request)
        request.get_json(force=True) || request.get_json(silent=True) || request.get_json(True, True)
        request.get_json(cache=False), request.get_data() || request.get_data(as_text=True) || request.get_data(parse_form_data=True)
        request.get_data(cache=False); request.get_data() || request.get_data(); request.form, request.get_json(silent=True)
        request.form; request.get_data() || request.data; request.stream.read() || request.stream.read(3), request.stream.read()
        request.stream.readline() || list(request.stream) || request.stream.read(); request.data
        request.stream.read(); request.form || request.environ['PATH_INFO'], request.environ.get('HTTP_X_ONE'), type(request.environ).__name__
        request.environ['wsgi.input'].read(2) || bool(request.endpoint) || request.view_args || request.view_args['func_name']
        url_for(request.endpoint, **request.view_args) || dict(request.headers) || request.headers['content-TYPE'] || request.headers['Nope']
        request.user_agent.string, str(request.user_agent), request.user_agent.browser || bool(request.user_agent)
        request.cookies.get('a', type=int), request.cookies['b'] || request.authorization is None
        request.authorization.username, request.authorization.password || request.authorization.type, request.authorization.token
        isinstance(request, Request), isinstance(request_, Request), request == request_, bool(request), hasattr(request, 'nope')
        request.nope || request.mark = 1; request.mark || request.form['nope'] || request.args['nope'] || request.files['nope']""",
    "headers": """
        headers['content-TYPE'] || headers['Nope'] || sorted(headers.keys()) || sorted(headers.values()) || sorted(headers.items())
        headers.getlist('x-one'), headers.get_all('X-One') || headers.get('X-One', type=int), headers.get('Nope', 5), headers.get('Nope')
        sorted(headers) || 'x-one' in headers, 'nope' in headers, 5 in headers || len(headers) || sorted(headers.to_wsgi_list())
        headers.set('X-One', '2') || headers['X-One'] = '2'; 0 || del headers['X-One']; 0 || headers.add('X-One', '2')
        headers.add_header('A', 'b') || headers.setlist('A', ['b']) || headers.remove('X-One') || headers.pop('X-One')
        headers.extend({'A': 'b'}) || headers.update({'A': 'b'}) || headers.setdefault('A', 'b') || headers.popitem()""",
    "accept": """
        accept.best_match(['application/json', 'text/html']) || accept.best_match(['text/plain', 'image/png'], 'none')
        accept.best_match([]) || accept.best || accept.accept_html, accept.accept_json || accept.quality('text/html'), accept['image/png']
        list(accept.values()) || list(accept) || str(accept) || 'text/html' in accept, 'x/y' in accept, bool(accept), len(accept)""",
    "file": """
        file.filename, file.name, file.content_type, file.mimetype, file.mimetype_params, file.content_length, bool(file)
        file.read(2), file.stream.read(), file.read() || list(file) || sorted(file.headers) || repr(file) || file.close()
        file.seek(0, 2); file.tell(), file.seek(1), file.stream.tell(), file.readline() || request.files.getlist('f')[1].filename
        file.save(PATH); open(PATH, 'rb').read() || file.save(pathlib.Path(PATH)); open(PATH, 'rb').read() || file.save('/no/such/path')
        out = io.BytesIO(); file.save(out, buffer_size=2); out.getvalue(), file.read() || out = io.BytesIO(); file.save(out, 3); out.tell()""",
    "m": """
        m || m['a'] || m['nope'] || m.get('a'), m.get('nope'), m.get('nope', 1), m.get('b', type=int), m.get('n', 0, int), m.get('b', -1, int)
        m.getlist('a'), m.getlist('n', int), m.getlist('nope'), m.getlist('b', type=int) || m.to_dict(), m.to_dict(flat=False)
        list(m), len(m), bool(m) || list(m.keys()), list(m.values()), list(m.items()), list(m.items(multi=True)), list(m.lists())
        list(m.listvalues()) || dict(m) || {**m} || m.add('a', 9); m.getlist('a') || m['a'] = 9; m.getlist('a')
        m.pop('a'), m.getlist('a') || m.pop('nope') || m.pop('nope', 5) || m.poplist('a'), m.poplist('nope'), list(m) || m.popitem()
        m.setlist('a', [7, 8]); m.getlist('a') || m.setdefault('a', 5), m.setdefault('new', 6), m.getlist('new')
        m.update({'a': 9, 'z': [1, 2]}); m || m.update([('a', 8)]); m || m.update([], z=3) || m | {'z': 1, 'a': [2]} || m |= {'z': 1}; m
        c = m.copy(); c.add('a', 9); m.getlist('a') || m == m.copy(), m == {}, m != request.args || del m['a']; 'a' in m, m.getlist('a')
        m.clear(); m || m.fromkeys(['k'], 1)['k'] || repr(m) || sorted(m.items()) || json.dumps(m) || [f'{k}={v}' for k, v in m.items(True)]
        type(m)([('x', 1), ('x', 2)]) || type(m)({'x': [1, 2], 'y': 3}) || request.args.pop('a') || request.form.add('a', 1)
        request.values.getlist('a') || request.args.to_dict() || 'nope' in m""",
    "r": """
        r.status, r.status_code, r.data, r.get_data(), r.get_data(as_text=True), r.mimetype, r.mimetype_params, r.content_type
        r.content_length || r.status = 404; r.status, r.status_code || r.status = '418 Odd'; r.status, r.status_code
        r.status_code = 503; r.status || r.status = '201'; r.status || r.status_code = 299; r.status || r.status = http.HTTPStatus.GONE; r.status
        r.data = 'é'; r.data || r.data = b'x'; r || r.set_data('y'); r || r.json || r.get_json() || r.get_json(silent=True)
        r.get_json(force=True) || r.is_json || r.mimetype = 'application/json'; r || r.mimetype = 'text/x'; r || r.content_type = 'a/b'; r
        r.content_length = 5; r.headers['Content-Length'] || r.response = ['a', b'b']; r.data || r.is_streamed
        r.direct_passthrough || r.default_mimetype || 'Content-Type' in r.headers || r.headers['X-A'] = 5; r.headers['x-a'] || r.headers['Nope']
        r.headers.add('X-A', 'b', c='d e'); r.headers.add('X-A', 2); r.headers.getlist('x-A') || r.headers.extend({'X-A': ['b', 'c']}); r
        r.headers.update({'X-A': 'b', 'content-type': 'a/b'}); r || r.headers.update(Response('x', headers={'X-B': 'c'}).headers); r
        r.headers.set('X-A', 'b'); r.headers.pop('X-A'), r.headers.get('X-A', 5), 'X-A' in r.headers || r.headers.clear(); len(r.headers)
        r.headers.setdefault('X-A', 'b'), r.headers.setdefault('X-A', 'c') || r.headers.remove('Content-Type'); r.content_type, r.mimetype
        del r.headers['content-type']; r || r.headers.setlist('X-A', ['b', 'c']); r.headers.get_all('X-A') || r.headers['X-A'] = 'b\\r\\nc'; 0
        r.headers['X-A'] = 'é'; r.headers['X-A'] || r.headers.add_header('X-A', 'b'); r || r.headers.get('X-A', type=int)
        r.location = '/x?a=b'; r.location, r.headers['Location'] || r.location = '/ü'; r.location || r.content_encoding = 'gzip'; r.content_encoding
        r.content_language = 'de'; r.content_language.add('en'); r || r.content_location = '/a'; r.content_location, r || r.vary = 'A'; r
        r.accept_ranges = 'bytes'; r.accept_ranges || r.age = 5; r || r.age = 5; r.age || r.retry_after = 7; r.retry_after || r.allow = ['GET', 'PUT']; r.allow.discard('get'); r || r.age, r.retry_after
        r.vary.add('Cookie'); r.vary.add('cookie'); r.headers['Vary'], 'COOKIE' in r.vary, 'x' in r.vary || r.retry_after = 7; r
        r.date = datetime.datetime(2020, 1, 2); r.date, r || r.expires = 0; r.expires, r || r.last_modified
        r.last_modified = datetime.datetime(2020, 1, 2); r.last_modified, r || r.cache_control.max_age = 5; r.cache_control.public = True; r
        r.cache_control.no_cache = True; bool(r.cache_control.no_cache), r || r.set_etag('a'); r.get_etag() || r.set_etag('a', weak=True); r
        r.get_etag() || r.add_etag(); r || r.access_control_allow_origin = '*'; r || r.call_on_close(len) is len || r.close()
        r.make_conditional(request) is r || isinstance(r, Response) || repr(r).startswith('<Response') || r.get_json(True, True)
        r.set_cookie('a'); r || r.set_cookie('a', 'b'); r || r.set_cookie('a', 'b c,d;e"f\\\\'); r || r.set_cookie('a', '漢'); r
        r.set_cookie('a', 'b', max_age=0); r || r.set_cookie('a', 'b', 60); r || r.set_cookie('a', 'b', datetime.timedelta(days=1)); r
        r.set_cookie('a', 'b', expires=0); r || r.set_cookie('a', 'b', expires=datetime.datetime(2020, 1, 2)); r
        r.set_cookie('a', 'b', expires='Thu, 01 Jan 1970 00:00:00 GMT'); r || r.set_cookie('a', 'b', path='/x'); r
        r.set_cookie('a', 'b', path=None); r || r.set_cookie('a', 'b', path='/ü?;'); r || r.set_cookie('a', 'b', domain='example.com'); r
        r.set_cookie('a', 'b', domain='.example.com'); r || r.set_cookie('a', 'b', domain='é.example'); r
        r.set_cookie('a', 'b', secure=True, httponly=True); r || r.set_cookie('a', 'b', samesite='strict'); r
        r.set_cookie('a', 'b', samesite='None', secure=True, partitioned=True); r || r.set_cookie('a', 'b', partitioned=True); r
        r.set_cookie('a', 'b', samesite='odd') || r.set_cookie('a b', 'c') || r.set_cookie('a', 'x=y&z+/'); r
        r.set_cookie('a', 'b', None, None, '/p', None, True, True, 'Lax'); r || r.set_cookie('a', 'b\\nc'); r || r.delete_cookie('a'); r
        r.delete_cookie('a', '/p', 'example.com', secure=True, httponly=True, samesite='Lax', partitioned=True); r
        r.set_cookie('a', '1'); r.set_cookie('b', '2'); r.headers.getlist('Set-Cookie') || r = jsonify(a=1); r.json, r.get_json(), r.is_json
        r = Response('{bad', mimetype='application/json'); r.get_json(silent=True) || r = Response('{', mimetype='application/json'); r.json
        r = Response(c for c in 'ab'); r.is_streamed, r.data, r.is_streamed || r.content_length = None; r""",
    "": """
        Response() || Response('x', 404) || Response(b'x', '299 Odd') || Response(['a', b'b']) || Response(c for c in 'ab')
        Response('x', headers={'X-A': 'b'}) || Response('x', headers=[('X-A', 'b'), ('X-A', 'c')]) || Response('x', mimetype='text/plain')
        Response('{}', mimetype='application/json') || Response('x', content_type='text/x; a=b') || Response('x', 200, {'Content-Type': 'a/b'})
        Response('x', mimetype='image/svg+xml') || Response('x', headers={'Content-Type': 'a/b'}, mimetype='text/css') || Response(None, 204)
        Response('x', status=http.HTTPStatus.CREATED) || Response(5) || Response({'a': 1}) || Response('x', mimetype='application/javascript')
        Response('x', headers={'X-A': 'b\\nc'}) || Response('x', 'nonsense') || Response.__name__, Request.__name__
        Request({**request.environ, 'QUERY_STRING': 'q=1', 'REQUEST_METHOD': 'PUT'}).args['q']
        abort(404) || abort(404, 'why') || abort(404, description='why') || abort(Response('no', 409)) || abort(make_response(jsonify(e=1), 422))
        abort(jsonify(e=1)) || abort(401, response=Response('x', 402)) || abort(499) || abort(200) || abort(302) || abort(99) || abort('404')
        abort(http.HTTPStatus.GONE) || abort(405, valid_methods=['GET', 'PUT']) || abort(429, retry_after=5) || abort(400, {'a': 1})
        abort(None) || abort() || abort(500) || abort(503, 'later') || abort(451)
        sorted(default_exceptions), [default_exceptions[code]().name for code in sorted(default_exceptions)]
        redirect('/x').status, redirect('/x').mimetype, redirect('/x').location || redirect('/x', 301).status || redirect('/x', code=308).status
        redirect('/x', 200).status || redirect(location='//x').headers['Location'] || redirect('/x', 302, Response).status
        url_for('hello') || url_for('hello', subpath='a/b') || url_for('hello', a=1, b='x y&', c=None) || url_for('hello', a=[1, 2])
        url_for('hello', _external=True) || url_for('hello', _external=False) || url_for('hello', _anchor='x y', q=1) || url_for('v1', subpath='us:e@r')
        url_for('hello', _external=True, _scheme='https') || url_for('hello', _scheme='https') || url_for('hello', q='ü', subpath='漢 字')
        url_for('hello', _method='GET') || url_for('hello', b=2, a=1) || url_for('hello', q=True, r='') || url_for('hello', q='/:@!$()*,;?~\\'')
        url_for('hello', subpath='a?b#c%') || url_for('any', func_name='hello') || url_for()
        jsonify({'b': 1, 'a': 2}) || jsonify([]) || jsonify(a=1, b=[2]) || jsonify(1, 2) || jsonify({'a': 1}, b=2) || jsonify(object())
        jsonify(datetime.datetime(2020, 1, 2)) || jsonify({1: 2, 'a': 3}) || jsonify(float('nan')) || jsonify({'x'}) || jsonify(Markup('<b>'))
        jsonify('漢') || jsonify({2: 1, 1: 2}) || jsonify((1, 2)) || jsonify(decimal.Decimal('1.10'), uuid.UUID(int=1)) || jsonify(b'x')
        jsonify({(1, 2): 3}) || jsonify(r=D(1, 'x')) || jsonify(datetime.time(1, 2)) || jsonify(datetime.timedelta(1)) || jsonify(PATH)
        flask.json.dumps({'b': datetime.date(2020, 1, 2), 'a': 'ü'}) || flask.json.loads('[1]') || flask.json.jsonify(1) || flask.request is request
        has_request_context(), flask.has_app_context() || make_response() || make_response('x') || make_response('x', 201)
        make_response('x', 201, {'X-A': 'b'}) || make_response('x', {'X-A': 'b'}) || make_response(('x', 404)) || make_response({'a': 1}, 201)
        make_response([1]) || make_response(Response('x'), 404) || make_response(b'x', [('X-A', 'b')]) || make_response(5)
        make_response(c for c in 'ab') || make_response('x', '201 Odd') || make_response('x', 200, {'Content-Type': 'a/b'})
        g.a = 1; g.a, g.get('a'), g.get('b'), g.get('b', 2), 'a' in g, 'b' in g, list(g) || g.nope || g.pop('nope') || g.pop('nope', 3)
        g.setdefault('a', 4), g.a || g.a = 1; del g.a; hasattr(g, 'a') || getattr(g, 'x', 5) || 'request' in g || isinstance(g, str)
        current_app.config['SECRET_KEY'] || current_app.config.get('NOPE', 1), 'NOPE' in current_app.config || current_app.config['NOPE']
        dict(current_app.config)['SECRET_KEY'] || type(current_app.logger).__name__ || current_app.logger.info('x %s', 1) || bool(current_app)
        current_app.logger.warning('x'), current_app.logger.exception('x') || current_app.debug, current_app.testing || current_app.nope
        current_app.config.get('TESTING')
        escape('<&>"\\'') || escape(5) || escape(None) || escape(Markup('<b>')) || isinstance(escape('x'), Markup) || escape()
        Markup('<b>') + '<' || '<' + Markup('<b>') || Markup('<b>%s</b>%d') % ('<', 5) || Markup('%s') % '<' || Markup('%(a)s') % {'a': '<'}
        Markup('{}{a}').format('<', a='>') || Markup('{0[x]}|{1:.2f}').format({'x': '<'}, 1.5) || Markup('<br>').join(['<', Markup('<i>')])
        Markup('a') * 2 || type(Markup('a') + 'b') is Markup, type('a' + Markup('b')) is Markup || Markup('a').__html__() || Markup(5)
        type(Markup('a').upper()) is Markup || f'{Markup("<b>")}', str(Markup('<')), Markup('<') == '<' || Markup('%s%s') % (Markup('<b>'), 1.5)
        render_template('hello.html', name='<b>') || render_template(['none.html', 'hello.html'], name=Markup('<b>')) || render_template('none.html')
        render_template('text.txt', name='<b>') || render_template('child.html', name='n') || render_template_string('{{ a }}', a='<')
        render_template_string('{{ request.args.a }}{{ g.x }}{{ session.y }}{{ config.SECRET_KEY }}') || render_template_string('{{ a')
        render_template_string('{{ url_for("hello", a=1) }}{{ get_flashed_messages() }}{{ request.path }}') || render_template_string('{{ nope }}')
        render_template_string('{{ x|tojson }}', x={'d': datetime.date(2020, 1, 2), 'a': '<'}) || render_template_string('{{ nope.more }}')
        g.x = 1; render_template_string('{{ g.x }}{{ "x" in g }}') || session['y'] = 2; render_template_string('{{ session.y }}{{ session["y"] }}')
        render_template_string('{% for k, v in request.args.items() %}{{ k }}={{ v }}{% endfor %}') || render_template_string('{{ config.x }}', config={'x': 1})
        send_from_directory(HERE, 'probe.txt').status || send_from_directory(HERE, '../x') || send_from_directory(HERE, 'nope')
        send_from_directory(HERE, '/etc/passwd') || send_from_directory(HERE, '.') || send_from_directory(directory=HERE, path='probe.txt').mimetype
        send_from_directory(HERE, 'probe.txt', as_attachment=True, download_name='ü.txt', mimetype='text/x').headers['Content-Disposition']
        send_from_directory(pathlib.Path(HERE), 'probe.txt').status_code || send_file(os.path.join(HERE, 'nope')) || send_file(io.BytesIO(b'x'))
        send_file(pathlib.Path(HERE) / 'probe.txt').mimetype || send_file(io.BytesIO(b'x'), 'a/b', etag='t').headers['ETag']
        send_file(io.BytesIO(b'x'), 'a/b', True) || send_file(io.BytesIO(b'x'), 'a/b', True, 'n').headers['Content-Disposition']
        send_file(io.BytesIO(b'x'), 'a/b', max_age=5).headers['Cache-Control'] || send_file(io.BytesIO(b'x'), 'a/b', max_age=0).headers['Cache-Control']
        send_file(io.BytesIO(b'x'), 'a/b', max_age=lambda n: 7).headers['Cache-Control'] || send_file(io.BytesIO(b'x'), 'a/b').headers['Cache-Control']
        list(stream_with_context(c for c in request.path)) || [*stream_with_context(lambda n: iter(request.path[:n]))(3)]
        ''.join(stream_with_context(iter(['a', 'b']))) || callable(after_this_request(lambda response: response))
        copy_current_request_context(lambda: request.path)() || flash('a'); get_flashed_messages()
        session['a'] = 1; session['a'], session.get('b'), 'a' in session, len(session), dict(session), session.modified, session.accessed
        session.new, session.permanent, session.modified, bool(session) || session.permanent = True; dict(session) || session['nope']
        session.update(a=1); session.pop('a'), session.modified || session.pop('nope', 3), session.pop('nope') || session.update(a=1); session.pop('a'), dict(session) || session.clear(); dict(session)
        session.setdefault('a', []).append(1); dict(session), session.modified || session | {'b': 1} || isinstance(session, dict)
        del session['nope']; 0 || session['a'] = 1; del session['a']; 'a' in session || list(session.items()), list(session.keys()), list(session.values()) || session.nope
        session.popitem() || session.copy() == {}""",
}
PREFIXES = {"m": "m = request.args.copy()", "r": "r = Response('héllo')", "file": "file = request.files['f']",
            "headers": "headers = request.headers", "accept": "accept = request.accept_mimetypes"}
#: Those that differ, and how the row of the README's table begins that says so.
DIFFERENT = {
    "request.view_args": "`view_args", "request.stream.read(); request.form": "a multipart body without its end",
    "request.stream.read(); request.data": "a multipart body without its end",
    "bool(request.user_agent)": "`bool(request.user_agent)`", "request.args.pop('a')": "`request.args`", "request.form.add('a', 1)": "`request.args`",
    "r.headers['Nope']": "a wrong status", "r.set_cookie('a b', 'c')": "a wrong status", "Response('x', 'nonsense')": "a wrong status",
    "r.age = 5; r.age": "`response.age`", "r.retry_after = 7; r.retry_after": "`response.age`", "r.location = '/ü'; r.location": "`Location` is encoded", "type(Markup('a').upper()) is Markup": "`Markup`'s",
    "current_app.config.get('TESTING')": "`current_app.config`", "session.update(a=1); session.pop('a'), session.modified": "`session`",
}
PROBE = """
import dataclasses, datetime, decimal, flask, http, io, os, pathlib, uuid
from flask import (request, session, g, current_app, jsonify, abort, redirect, url_for, Response, Request, make_response, send_file,
                   send_from_directory, stream_with_context, after_this_request, render_template, render_template_string, json,
                   flash, get_flashed_messages, copy_current_request_context, has_request_context)
from werkzeug.exceptions import HTTPException, default_exceptions
try:
    from flask import Markup, escape  # fnserve's own
except ImportError:
    from markupsafe import Markup, escape
HERE = os.path.dirname(__file__)
PATH = os.path.join(HERE, "saved.txt")
@dataclasses.dataclass
class D:
    a: int
    b: str
def show(value):
    if isinstance(value, Response):  # a Content-Length is added when it is sent, see the README
        return [value.status, show(value.get_data()), sorted(list(pair) for pair in value.headers if pair[0] != "Content-Length")]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, bytes):
        return "b" + value.decode("latin-1")
    if hasattr(value, "lists"):
        return {key: show(items) for key, items in value.lists()}
    if hasattr(value, "to_wsgi_list"):
        return sorted(list(pair) for pair in value if pair[0] != "X-Probe")
    if isinstance(value, dict):
        return {str(key): show(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "best_match") or hasattr(value, "__next__"):
        return [show(item) for item in value]
    return str(value)
def main(request_):
    try:
        found = show(globals()["probe_" + request.headers["X-Probe"]](request_))
    except HTTPException as error:
        found = ["HTTPException", error.response and show(error.response) or error.code]
    except Exception as error:
        found = type(error).__name__
    return {"found": found}
"""
#: One visitor's calls, in this order, with the cookies that came of those before.
VISITS = {
    "new": "return [dict(session), session.new, bool(session), session.modified]",
    "set": "session['a'] = {'b': [1, 'ü']}; session['n'] = None; return [session.modified, session.permanent]",
    "read": "return [dict(session), session.modified]", "inside": "session['a']['b'].append(2); session.modified = True; return 'x'",
    "template": "return render_template_string('{{ session.a.b }}{{ session.get(\"n\") }}')", "again": "return dict(session)",
    "untouched": "return 'x'", "permanent": "session.permanent = True; return [session.permanent, session.modified]",
    "renewed": "return [session.permanent, dict(session), session.modified]", "for_now": "session.permanent = False; return dict(session)",
    "pop": "return [session.pop('a'), session.setdefault('c', 1), session.get('zz', 5), list(session)]", "popped": "return dict(session)",
    "flash": "flash('one'); flash('two', 'bad'); return 'x'", "flashed": "return [get_flashed_messages(True), get_flashed_messages()]",
    "flashed_again": "return get_flashed_messages(category_filter=['bad'])", "odd": "session['k\"\\n'] = '\\x00<漢>'; return 'x'",
    "odd_read": "return dict(session)", "failed": "session['lost'] = 1; 1/0", "after_failure": "return session.get('lost')",
    "aborted": "session['kept'] = 1; abort(409)", "after_abort": "return session.get('kept')",
    "late": "after_this_request(lambda r: (session.update(late=1), r)[1]); return 'x'", "was_late": "return session.get('late')",
    "clear": "session.clear(); return [dict(session), bool(session)]", "cleared": "return dict(session)", "FORGED": "return dict(session)"}


class FlaskTest(Case):
    """The same files and requests through real Flask and through fnserve."""

    def setUp(self) -> None:
        super().setUp()
        flask, self.loaded = module("flask"), {}
        module("jinja2")
        (self.dir / "templates").mkdir()
        for name, text in {"hello.html": "<h1>{{ name }} {{ request.method }} {{ session.get('a') }}</h1>", "text.txt": "{{ name }}",
                           "base.html": "<{% block b %}{% endblock %}>",
                           "child.html": "{% extends 'base.html' %}{% block b %}{{ name }}{% endblock %}"}.items():
            (self.dir / "templates" / name).write_text(text)
        self.flask = flask.Flask("platform", template_folder=str(self.dir / "templates"))
        self.flask.secret_key = "k" * 32
        self.flask.url_build_error_handlers.append(lambda error, name, values: self.flask.url_for(
            "b" if values.get("subpath") else "a", **{"func_name": name, **values}))
        self.flask.config["MAX_CONTENT_LENGTH"] = 16 << 20
        methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
        self.flask.add_url_rule("/function/<func_name>", view_func=self.serve, methods=methods, endpoint="a",
                                provide_automatic_options=False)
        self.flask.add_url_rule("/function/<func_name>/<path:subpath>", view_func=self.serve, methods=methods, endpoint="b",
                                provide_automatic_options=False)
        logging.getLogger("platform").setLevel(logging.CRITICAL)

    def serve(self, func_name: str, subpath: str = ""):
        """Run a function file as a Flask platform does."""
        import flask
        if func_name not in self.loaded:
            self.loaded[func_name] = {"__file__": str(self.dir / "functions" / (func_name + ".py")), "__name__": func_name}
            types = __import__("types")
            made = sys.modules[func_name] = types.ModuleType(func_name)
            self.addCleanup(sys.modules.pop, func_name, None)
            made.__dict__.update(self.loaded[func_name])
            exec((self.dir / "functions" / (func_name + ".py")).read_text(encoding="utf-8"), made.__dict__)
            self.loaded[func_name] = made.__dict__
        return self.loaded[func_name]["main"](flask.request)

    def both(self, app, path: str, method: str = "GET", **options: object):
        """Make one call to Flask and to fnserve."""
        return fnserve.Client(self.flask).open(path, method, **options), self.client(app).open(path, method, **options)

    def agree(self, name: str, theirs, mine) -> None:
        """Compare two answers field by field."""
        self.assertEqual(theirs.status_code, mine.status_code, name)
        skipped = {"Content-Type", "Content-Length"} if name in ERRORS_ARE_JSON or theirs.status_code == 416 else set()
        if theirs.status_code in (204, 304, 412):
            skipped |= {"Content-Type", "Content-Length"}
        if "redirect" in name:
            skipped |= {"Content-Length"}  # the text of the page is ours
        if name.startswith(("file", "directory")):
            skipped |= {"ETag", "Content-Type"}  # an ETag is ours to choose; charset and type by the machine's table
        if theirs.headers.get("Content-Type") == "application/json":
            self.assertEqual(theirs.data and theirs.json, mine.data and mine.json, name)
            skipped |= {"Content-Length"}
        elif name not in ERRORS_ARE_JSON and "redirect" not in name and theirs.status_code not in (204, 304, 412, 416):
            self.assertEqual(theirs.data, mine.data, name)
        for header in COMPARED:
            if header not in skipped:
                self.assertEqual(theirs.headers.get(header), mine.headers.get(header), f"{name}: {header}")
        for one, other in zip(theirs.headers.getlist("Set-Cookie"), mine.headers.getlist("Set-Cookie")):
            if not one.startswith("session="):
                one, other = unexpired(self, one, other)
                self.assertEqual(set(one.split("; ")), set(other.split("; ")), name)

    def test_answers(self):
        for name, code in ANSWERS.items():
            self.write(name, HEAD + code + "\n")
        app = self.make_app()
        variants = [("GET", {}), ("POST", {"json": [1]}), ("GET", {"headers": {"If-None-Match": '"a", W/"b"', "Range": "bytes=2-4"}}),
                    ("GET", {"headers": {"Range": "bytes=-3"}}), ("GET", {"headers": {"Range": "bytes=99-"}}), ("HEAD", {}),
                    ("GET", {"headers": {"Range": "bytes=0-1,3-4"}}), ("GET", {"headers": {"Range": "nonsense"}}),
                    ("GET", {"headers": {"Range": "bytes=5-", "If-Range": '"no"'}}),
                    ("GET", {"headers": {"If-Match": '"other"'}}), ("GET", {"headers": {"If-None-Match": "*"}}),
                    ("GET", {"headers": {"If-Modified-Since": "Fri, 03 Jan 2020 00:00:00 GMT"}}),
                    ("GET", {"headers": {"If-Modified-Since": "nonsense"}})]
        for name in ANSWERS:
            for number, (method, options) in enumerate(variants):
                with self.subTest(name=name, variant=number):
                    self.agree(name, *self.both(app, f"/function/{name}", method, **options))

    MULTIPART = {"Content-Type": "multipart/form-data; boundary=B"}

    def test_requests(self):
        self.write("echo", ECHO)
        app = self.make_app()
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        part = 'Content-Disposition: form-data; name="{}"'
        bodies = [({}, b""), (form, b"a=1&a=2&b=&=x&c&d=%E6%BC%A2&e=%FF"), (form, "f=漢+x".encode()), (form, b"%"),
                  ({"Content-Type": "application/json"}, b'{"a": [1, null]}'), ({"Content-Type": "application/json"}, b"{bad"),
                  ({"Content-Type": "application/vnd.x+json; charset=utf-8"}, b'"x"'), ({"Content-Type": "text/plain"}, b"\xff\x00raw"),
                  (self.MULTIPART, f"--B\r\n{part.format('a')}\r\n\r\n1\r\n--B--\r\n".encode()),
                  (self.MULTIPART, (f"--B\r\n{part.format('f')}; filename=\"../x/漢.txt\"\r\nContent-Type: text/x\r\n\r\nline\r\n"
                                    f"--B\r\n{part.format('a')}\r\n\r\n漢\r\n--B--").encode()),
                  (self.MULTIPART, f"--B\r\n{part.format('g')}; filename=\"\"\r\n\r\n\r\n--B--\r\n".encode())]
        heads = [{}, {"Cookie": 'a=1; b="x y"; c=%20; a=2; bad; =no'}, {"Accept": "application/json;q=0.5, text/html, */*;q=0.1"},
                 {"Authorization": "Basic dXNlcjpwYXNzOndvcmQ="}, {"Authorization": "Bearer abc.def"}, {"User-Agent": "x/1 (y)"},
                 {"X-One": "1", "X-Number": "x"}, {"X-Forwarded-For": "1.2.3.4, 5.6.7.8"}, {"Host": "example.com:8080"},
                 {"Referer": "http://r/", "Origin": "http://o", "Content-Encoding": "gzip"}, {"Cache-Control": "no-cache, max-age=5"},
                 {"If-None-Match": '"a", W/"b"', "If-Match": "*"}, {"If-Modified-Since": "Fri, 03 Jan 2020 00:00:00 GMT"},
                 {"Accept-Language": "de;q=0.3, zh-TW, en;q=0.8"}, {"Authorization": "Basic !!!"}, {"Date": "nonsense"}]
        paths = ["", "/sub/path", "?x=1&x=2&y=%E6%BC%A2&z", "?order=data", "/a%20b%3Fc?q=a+b%26c", "/%E6%BC%A2", "?e=%FF&=1&a=b=c", "?a&&b=%zz",
                 "/x//y/", "?a=1;b=2"]
        count = 0
        for path in paths:
            for headers, body in bodies:
                count += self.compare(app, path, "POST", body, headers)
            for headers in heads:
                count += self.compare(app, path, "GET", b"", headers)
        self.assertGreater(count, 250)

    def test_names(self):
        """All that PROBES ask is answered as by Flask, or differs as the README says."""
        probes = [(group, probe.strip()) for group, text in PROBES.items() for probe in re.split(r"\|\||\n", text) if probe.strip()]
        source = PROBE
        for number, (group, probe) in enumerate(probes):
            *before, value = filter(None, [PREFIXES.get(group), *probe.split("; ")])
            source += f"def probe_{number}(request_): {'; '.join([*before, 'return ' + value])}\n"
        self.write("probe", source)
        compile(source, "probe", "exec")
        (self.dir / "functions" / "probe.txt").write_text("probe")
        form, jsons = {"Content-Type": "application/x-www-form-urlencoded"}, {"Content-Type": "application/json"}
        part = '--B\r\nContent-Disposition: form-data; name="{}"'
        upload = (f"{part.format('f')}; filename=\"a.txt\"\r\nContent-Type: text/x; a=b\r\nX-Part: 1\r\n\r\nline\r\ntwo\r\n"
                  f"{part.format('f')}; filename=\"b.txt\"\r\n\r\n\r\n{part.format('a')}\r\n\r\n1\r\n--B--\r\n").encode()
        heads = {"X-One": "1", "Cookie": "a=1; b=x", "Authorization": "Basic dXNlcjpwYXNz", "Accept": "text/html, application/json;q=0.5",
                 "User-Agent": "x/1", "Referer": "http://r/", "X-Forwarded-For": "1.2.3.4, 5.6.7.8", "Origin": "http://o",
                 "If-None-Match": '"a"', "Cache-Control": "no-cache, max-age=5"}
        requests = [("GET", "?a=1&a=2&b=x&n=7", b"", heads), ("POST", "/sub/p%C3%A4th", b'{"a": [1]}', jsons), ("POST", "?a=1", b"{bad", jsons),
                    ("POST", "?a=3", b"a=1&a=2&b=%E6%BC%A2", form), ("PUT", "", upload, self.MULTIPART),
                    ("DELETE", "", b"one\ntwo\n\xff", {"Content-Type": "text/plain", "Authorization": "Bearer x.y"}),
                    ("PATCH", "", b"raw", {"Host": "example.com:8080", "Accept": "*/*;q=0.1, image/*"})]
        app, count = self.make_app(), 0
        for number, (group, probe) in enumerate(probes):
            agreed = True
            for method, path, body, headers in requests if group in ("request", "headers", "accept", "file") else requests[:1]:
                headers, count = {**headers, "X-Probe": str(number)}, count + 1
                theirs, mine = self.both(app, "/function/probe" + path, method, data=body, headers=headers)
                self.assertEqual((theirs.status_code, mine.status_code, "NameError" in theirs.text), (200, 200, False), app.functions.get("probe").error)
                with self.subTest(probe=probe, method=method, path=path):
                    one, other = json.dumps(theirs.json), json.dumps(mine.json)
                    if "cookie(" in probe and probe not in DIFFERENT:
                        one, other = unexpired(self, one, other)
                    agreed = agreed and json.loads(one) == json.loads(other)
                    if probe not in DIFFERENT:
                        self.assertEqual(json.loads(one)["found"], json.loads(other)["found"])
            with self.subTest(probe=probe):
                self.assertEqual(agreed, probe not in DIFFERENT)
        self.assertGreater(count, 1200)
        self.assertEqual(set(DIFFERENT) - {probe for _, probe in probes}, set())
        for row in DIFFERENT.values():
            self.assertRegex((HERE / "README.md").read_text(encoding="utf-8"), rf"(?m)^\| {re.escape(row)}")

    def test_no_name_is_left_out(self):
        """PROBES ask for SPEC 3's names, and for whatever of Werkzeug's classes fnserve has; ABSENT says what it has not."""
        structures, wrappers, sessions = module("werkzeug.datastructures"), module("flask.wrappers"), module("flask.sessions")
        pairs = {"request": (wrappers.Request({}), fnserve.Request({"REQUEST_METHOD": "GET"})), "r": (wrappers.Response(), fnserve.Response()),
                 "m": (structures.MultiDict(), fnserve.MultiDict()), "headers": (structures.Headers(), fnserve.Headers()),
                 "file": (structures.FileStorage(), fnserve.FileStorage(io.BytesIO())), "accept": (structures.MIMEAccept(), fnserve.Accept("")),
                 "session": (sessions.SecureCookieSession(), fnserve.Session(None)), "g": (module("flask.ctx")._AppCtxGlobals(), fnserve.Globals())}
        text = " ".join([*PROBES.values(), *ANSWERS.values(), *VISITS.values()])
        self.assertEqual((set(SPEC_NAMES[""].split()) | set(fnserve.PUBLIC)) - BEYOND_FLASK - set(re.findall(r"\w+", text)), set())
        for group, (theirs, mine) in pairs.items():
            with self.subTest(group=group):
                theirs, mine = ({name for name in dir(one) if name[0] != "_"} - set(INHERITED.get(group, ())) for one in (theirs, mine))
                asked = set(re.findall(rf"\b{group}\.(\w+)", text))
                self.assertEqual((set(SPEC_NAMES.get(group, "").split()) | theirs & mine) - asked, set(), "not asked for")
                self.assertEqual(theirs - mine, set(ABSENT.get(group, "").split()), "what fnserve has not")

    def test_sessions(self):
        for name, code in VISITS.items():
            self.write("visit_" + name, HEAD + code + "\n")
        app = self.make_app()
        clients = fnserve.Client(self.flask), self.client(app)
        for name in VISITS:
            if name == "FORGED":
                for client in clients:
                    client.cookies["session"] = "eyJhIjoxfQ.aaaa.bbbb"
            with self.subTest(visit=name):
                theirs, mine = (client.get("/function/visit_" + name) for client in clients)
                self.assertEqual(theirs.status_code, mine.status_code)
                if theirs.status_code < 400:
                    self.assertEqual(theirs.data, mine.data)
                self.assertEqual(theirs.headers.get("Vary"), mine.headers.get("Vary"))
                self.assertEqual(self.attributes(theirs), self.attributes(mine))

    def attributes(self, response) -> list:
        """Return the attributes of the session's cookie that both should have; a time only by its name."""
        return [sorted(part.partition("=")[0] for part in cookie.split("; ") if not part.startswith(("SameSite", "Max-Age")))
                + [cookie.startswith("session=;"), "Path=/" in cookie] for cookie in response.headers.getlist("Set-Cookie")]

    def compare(self, app, path: str, method: str, body: bytes, headers: dict) -> int:
        """Compare one request; the fields of the echo are JSON."""
        with self.subTest(path=path, body=body, headers=headers):
            theirs, mine = self.both(app, "/function/echo" + path, method, data=body, headers=headers)
            self.assertEqual(theirs.status_code, mine.status_code, mine.data)
            for name, value in (theirs.json or {}).items():
                self.assertEqual(value, mine.json[name], name)
        return 1


class SettingsOfFunctionsTest(Case):
    def settings(self, app, name: str, settings: str, body: str = "return 'x'") -> None:
        self.write(name, f"SETTINGS = {settings}\ndef main(request):\n    {body}\n")

    def test_bad_settings_are_load_errors_that_name_the_key(self):
        app = self.make_app()
        for settings, wanted in (
                ("{'nope': 1}", "nope"), ("{'methods': 'FLY'}", "methods"), ("{'methods': []}", "methods"), ("{'auth': 'x'}", "auth"),
                ("{'rate': '5'}", "rate"), ("{'rate': '0/min'}", "rate"), ("{'cors': 'example'}", "cors"), ("{'timeout': -1}", "timeout"),
                ("{'concurrency': 0}", "concurrency"), ("{'max_body': 'much'}", "max_body"), ("{'entry': 'no name'}", "entry"),
                ("{'entry': 'missing'}", "entry"), ("{'parameters': 1}", "parameters"), ("[]", "SETTINGS"), ("{1: 2}", "SETTINGS")):
            with self.subTest(settings=settings):
                name = f"f{abs(hash(settings))}"
                self.settings(app, name, settings)
                self.assertEqual(self.call(app, "GET", f"/function/{name}").status_code, 500)
                error = str(app.functions.get(name).error)
                self.assertIn("SETTINGS", error)
                self.assertIn(wanted, error)

    def test_methods(self):
        app = self.make_app()
        self.settings(app, "f", "{'methods': ['GET', 'post']}")
        self.assertEqual([self.call(app, m, "/function/f").status_code for m in ("GET", "HEAD", "POST", "PUT", "OPTIONS")],
                         [200, 200, 200, 405, 405])
        self.assertEqual(self.call(app, "DELETE", "/function/f").headers["Allow"], "GET, POST, HEAD")

    def test_auth(self):
        app = self.make_app(API_TOKENS="one,two")
        for auth in ("public", "login", "token", "internal"):
            self.settings(app, auth, f"{{'auth': '{auth}'}}")
        tokens = {"": {}, "wrong": {"Authorization": "Bearer nope"}, "api": {"Authorization": "Bearer two"},
                  "admin": {"Authorization": "Bearer " + TOKEN}}
        seen = {auth: [self.call(app, "GET", f"/function/{auth}", headers=headers).status_code for headers in tokens.values()]
                for auth in ("public", "login", "token", "internal")}
        self.assertEqual(seen, {"public": [200] * 4, "login": [401, 401, 401, 200], "token": [401, 401, 200, 200],
                                "internal": [404] * 4})
        self.assertEqual(self.call(app, "GET", "/function/login").json["error"], "Authentication required")

    def test_rate(self):
        app = self.make_app()
        self.settings(app, "f", "{'rate': '2/min'}")
        self.assertEqual([self.call(app, "GET", "/function/f").status_code for _ in range(3)], [200, 200, 429])
        wait = int(self.call(app, "GET", "/function/f").headers["Retry-After"])
        self.assertTrue(1 <= wait <= 61)
        other = fnserve.Client(app, address="10.0.0.9")
        self.assertEqual(other.get("/function/f").status_code, 200)
        self.clock.now += wait
        self.assertEqual(self.call(app, "GET", "/function/f").status_code, 200)

    def test_cors(self):
        app = self.make_app()
        self.settings(app, "some", "{'cors': ['https://a.example'], 'methods': ['POST']}", "1/0")
        self.settings(app, "all_", "{'cors': '*'}")
        ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "X-A"}
        answer = self.call(app, "OPTIONS", "/function/some", headers=ask)
        self.assertEqual((answer.status_code, answer.headers["Access-Control-Allow-Origin"], answer.headers["Access-Control-Allow-Methods"],
                          answer.headers["Access-Control-Allow-Headers"]), (204, "https://a.example", "POST", "X-A"))
        failed = self.call(app, "POST", "/function/some", headers={"Origin": "https://a.example"})  # scripts may read errors
        self.assertEqual((failed.status_code, failed.headers["Access-Control-Allow-Origin"], failed.headers["Vary"]),
                         (500, "https://a.example", "Origin"))
        self.assertNotIn("Access-Control-Allow-Origin", self.call(app, "POST", "/function/some", headers={"Origin": "https://b"}).headers)
        self.assertEqual(self.call(app, "GET", "/function/all_", headers={"Origin": "null"}).headers["Access-Control-Allow-Origin"], "*")

    def test_size_timeout_entry(self):
        app = self.make_app()
        self.settings(app, "f", "{'max_body': '10B', 'timeout': 5, 'entry': 'other'}")
        self.write("f", (self.dir / "functions" / "f.py").read_text() + "def other(request, context):\n    return [len(request.data),"
                        " context.deadline]\n")
        self.assertEqual(self.call(app, "POST", "/function/f", data=b"x" * 10).json, [10, self.clock.now + 5])
        self.assertEqual(self.call(app, "POST", "/function/f", data=b"x" * 11).status_code, 413)


class GuardTest(Case):
    GOOD, BAD = "SETTINGS = {'guard': True}\ndef main(request): return 'good'", "SETTINGS = {'guard': True}\ndef main(request): 1/0"

    def calls(self, app, count: int, name: str = "f") -> list[int]:
        statuses = []
        for _ in range(count):
            self.clock.now += 1
            statuses.append(self.call(app, "GET", "/function/" + name).status_code)
        self.clock.now += 1
        return statuses

    def test_a_version_that_fails_its_first_calls_is_taken_back(self):
        path = self.write("f", self.GOOD)
        app = self.make_app()
        other = fnserve.App(app.settings, self.clock)  # another worker
        self.calls(app, 3)
        self.write("f", self.BAD)
        self.assertEqual(self.calls(app, 2) + self.calls(other, 3), [500] * 5)  # counted over all workers
        self.assertEqual(path.read_text(), self.GOOD)
        self.assertEqual((self.calls(app, 2), self.calls(other, 1)), ([200, 200], [200]))
        self.assertIn("version 2 failed 5 of its first 5 calls; version 1 serves again", (self.dir / "serverless_error.log").read_text())
        admin = self.admin(app)
        row = admin.get("/function/list_functions").json["functions"][0]
        self.assertEqual(row["status"], "broken")
        self.assertIn("version 2 failed its first calls", row["reason"])
        rows = admin.get("/admin/versions?module_name=f").json["versions"]
        self.assertEqual([(row["version"], row["rolled_back"], row["current"]) for row in rows],
                         [(3, False, True), (2, True, False), (1, False, False)])
        html = fnserve.Client(app, headers={"Authorization": "Bearer " + TOKEN, "Accept": "text/html"})
        self.assertIn("failed its first calls", html.get("/function/edit_function?module_name=f").text)
        self.write("f", self.GOOD + "  # mended")
        self.calls(app, 1)
        self.assertEqual(admin.get("/function/list_functions").json["functions"][0]["status"], "fine")
        self.write("f", self.BAD + "  # again")  # and that soon after, though the calls before it include failures
        self.assertEqual(self.calls(app, 6), [500] * 5 + [200])

    def test_what_it_counts(self):
        path = self.write("f", self.GOOD)
        app = self.make_app(KEEP_INVOCATIONS=40)
        self.calls(app, 3)
        self.write("f", "SETTINGS = {'guard': True}\ndef main(request): yield str(1/0)")  # fails once the pipeline is through
        self.assertEqual((self.calls(app, 5), path.read_text()), ([500] * 5, self.GOOD))
        self.write("f", self.BAD)
        self.calls(app, 4)
        for _ in range(2):
            self.assertEqual(self.admin(app).post("/admin/try", json={"module_name": "f"}).json["status"], 500)
        self.assertEqual(path.read_text(), self.BAD)  # a trial is none of its calls
        flag = self.dir / "outage"
        guarded = f"import os\nSETTINGS = {{'guard': True}}\ndef main(request): return 'x', 500 if os.path.exists({str(flag)!r}) else 200"
        self.write("f", guarded)
        self.write("g", "def main(request): return 'x'")
        self.calls(app, 6)
        self.calls(app, 60, "g")  # its first calls are not kept any more: it is proven
        flag.write_text("")
        self.assertEqual((self.calls(app, 8), path.read_text()), ([500] * 8, guarded))

    def test_what_is_left_alone(self):
        for what, before, after, old, new in (
                ("not asked for", "def main(request): return 'x'", "def main(request): 1/0", 3, 8),
                ("it failed before too", self.BAD, self.BAD + "  # 2", 4, 8),
                ("half of its calls fail", self.GOOD, "SETTINGS = {'guard': True}\nn = 0\ndef main(request):\n    global n\n"
                 "    n += 1\n    return 'x', 200 if n % 2 else 500", 3, 12),
                ("refusals are no failures", self.GOOD, "from flask import abort\nSETTINGS = {'guard': True}\n"
                 "def main(request): abort(400)", 3, 8),
                ("it is proven", self.GOOD, "SETTINGS = {'guard': True}\nn = 0\ndef main(request):\n    global n\n"
                 "    n += 1\n    return 'x', 200 if n < 21 else 500", 3, 60),
                ("the first version", None, self.BAD, 0, 8)):
            with self.subTest(what):
                shutil.rmtree(self.dir / "journal", ignore_errors=True)
                for path in self.dir.glob("serverless.db*"):
                    path.unlink()
                if before:
                    self.write("f", before)
                app = self.make_app()
                self.calls(app, old)
                path = self.write("f", after)
                self.calls(app, new)
                self.assertEqual(path.read_text(), after)
                path.unlink()


class HooksTest(Case):
    def test_what_comes_after_a_function_has_a_deadline_too(self):
        wait = "import time\ndef spin():\n    until = time.monotonic() + 30\n    while time.monotonic() < until: time.sleep(.01)\n"
        self.write("after/_hooks", wait + "def after_request(request, response):\n    spin()\n    return response\n")
        self.write("tear/_hooks", wait + "def teardown_request(request, error): spin()\n")
        self.write("handler/_hooks", wait + "def errorhandler(request, error): spin()\n")
        for name in ("after", "tear", "handler"):
            self.write(name + "/f", "SETTINGS = {'timeout': .3}\ndef main(request):\n    if request.path.startswith('/function/handler'): 1/0\n    return 'x'")
        self.write("itself", wait + "from flask import after_this_request\nSETTINGS = {'timeout': .3}\ndef main(request):\n"
                                    "    after_this_request(lambda response: spin())\n    return 'x'")
        app = self.make_app()
        for name in ("after/f", "tear/f", "handler/f", "itself"):
            began = time.monotonic()
            self.assertIn(self.call(app, "GET", "/function/" + name).code, (500, 504), name)
            self.assertLess(time.monotonic() - began, 15, name)
            self.assertEqual(app.watch._late, {})

    def test_a_handler_of_what_comes_after(self):
        """And a function that calls others as a client: both run code of functions within code of functions."""
        self.write("h/_hooks", "def after_request(request, response): 1/0\ndef errorhandler(request, error): return 'handled', 418\n")
        self.write("h/f", "def main(request): return 'x'")
        self.write("inner", "def main(request): return 'inner'")
        self.write("outer", "from fnserve import Client\ndef main(request):\n    from functions import keep\n"
                            "    return Client(keep.app).get('/function/inner').get_data(as_text=True) + ' outer'")
        self.write("keep", "app = None")
        app = self.make_app()
        self.assertEqual((self.call(app, "GET", "/function/h/f").code, self.call(app, "GET", "/function/h/f").data), (418, b"handled"))
        self.call(app, "GET", "/function/outer")
        sys.modules["functions.keep"].app = app
        self.assertEqual(self.call(app, "GET", "/function/outer").data, b"inner outer")
        self.assertEqual(app.watch._late, {})

    def test_a_late_stream_asks_its_handlers(self):
        self.write("h/_hooks", "def errorhandler(request, error): return 'handled', 418\n")
        self.write("h/late", "import time\nSETTINGS = {'timeout': 0.3}\ndef main(request):\n    for _ in range(500): time.sleep(.01)\n    yield 'x'")
        answer = self.call(self.make_app(), "GET", "/function/h/late")
        self.assertEqual((answer.code, answer.data), (418, b"handled"))

    def test_on_start_at_start(self):
        self.write("_hooks", "def on_start(): open('started', 'w').close()\n")
        app = self.make_app()
        self.call(app, "GET", "/health")  # the first request of any kind starts the app
        wait_until((self.dir / "started").exists)

    def test_hooks(self):
        self.write("_hooks", "seen = []\ndef on_start(): seen.append('start')\n"
                   "def before_request(request):\n    if request.args.get('stop'): return 'stopped', 403\n"
                   "def after_request(request, response):\n    response.headers.add('X-Order', 'outer'); return response\n"
                   "def teardown_request(request, error): seen.append(type(error).__name__)\n"
                   "def errorhandler(request, error):\n    if isinstance(error, ZeroDivisionError): return {'handled': 1}, 422\n")
        self.write("worse", "def main(request): [][0]")
        self.write("v1/_hooks", "def after_request(request, response):\n    response.headers.add('X-Order', 'inner'); return response\n")
        self.write("v1/f", "def main(request): return 'x'")
        self.write("bad", "def main(request): 1/0")
        self.write("seen", "from functions import _hooks\ndef main(request): return _hooks.seen")
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/function/v1/f").headers.getlist("X-Order"), ["inner", "outer"])
        self.assertEqual(self.call(app, "GET", "/function/v1/f?stop=1").status_code, 403)
        answer = self.call(app, "GET", "/function/bad")
        self.assertEqual((answer.status_code, answer.json, answer.headers["X-Order"]), (422, {"handled": 1}, "outer"))
        self.assertEqual(self.call(app, "GET", "/function/worse").status_code, 500)
        self.assertEqual(self.call(app, "GET", "/function/seen").json, ["start", "NoneType", "NoneType", "NoneType", "IndexError"])
        self.write("_hooks", "def before_request(request): return 'new'")
        self.assertEqual(self.call(app, "GET", "/function/bad").data, b"new")
        self.write("_hooks", "def before_request(request:")
        self.assertEqual(self.call(app, "GET", "/function/bad").data, b"new")  # the last good ones go on
        (self.dir / "functions" / "_hooks.py").unlink()
        self.assertEqual(self.call(app, "GET", "/function/bad").status_code, 500)
        self.assertEqual(self.call(app, "GET", "/function/_hooks").status_code, 404)

    def test_broken_hooks_fail_closed(self):
        self.write("_hooks", "1/0")
        self.write("f", "def main(request): return 'x'")
        self.assertEqual(self.call(self.make_app(), "GET", "/function/f").status_code, 500)


class FrameworkTest(Case):
    """Functions written for Google's functions-framework, through it and through fnserve."""

    FUNCTIONS = {  # the shapes of Google's HTTP samples that need no cloud account
        "hello_get": "return 'Hello World!'",
        "hello_http": "j = request.get_json(silent=True); a = request.args\n    name = j['name'] if j and 'name' in j else a.get('name', 'World')"
                      "\n    return f'Hello {escape(name)}!'",
        "hello_content": "t = request.headers['content-type']\n    if t == 'application/json': name = request.get_json(silent=True)['name']"
                         "\n    elif t == 'application/octet-stream': name = request.data.decode()"
                         "\n    elif t == 'application/x-www-form-urlencoded': name = request.form.get('name')"
                         "\n    else: raise ValueError(t)\n    return f'Hello {escape(name)}!'",
        "hello_method": "\n    if request.method == 'GET': return 'Hello World!'\n    elif request.method == 'PUT': return abort(403)"
                        "\n    else: return abort(405)",
        "cors_enabled": "\n    if request.method == 'OPTIONS': return ('', 204, {'Access-Control-Allow-Origin': '*',"
                        " 'Access-Control-Allow-Methods': 'GET', 'Access-Control-Max-Age': '3600'})\n    return ('Hello World!', 200,"
                        " {'Access-Control-Allow-Origin': '*'})",
        "parse_multipart": "data = request.form.to_dict(); files = request.files.to_dict()\n    return '|'.join([*data, *data.values(),"
                           " *(n + f.filename + f.read().decode() for n, f in files.items())])",
        "hello_error_1": "return '', 418", "path_": "return request.path.rpartition('/')[2], 200", "stream": "return (c for c in 'abc')",
        "env_": "return os.environ.get('FOO', 'unset')", "header": "return request.headers.get('X-A', 'none')",
        "hello_error_2": "import logging\n    try: raise RuntimeError('an error')\n    except RuntimeError: logging.error('caught', exc_info=True)"
                         "\n    return abort(500)", "raises": "raise RuntimeError('not caught')",
        "cors_with_login": "where = {'Access-Control-Allow-Origin': 'https://example.com', 'Access-Control-Allow-Credentials': 'true'}"
                           "\n    if request.method == 'OPTIONS': return '', 204, {**where, 'Access-Control-Allow-Headers': 'Authorization'}"
                           "\n    return 'Hello World!', 200, where",
        "counts": "globals()['calls'] = globals().get('calls', 0) + 1\n    return f'call number {calls}'",
        "lazy_global": "global made\n    if 'made' not in globals(): made = sum(range(10))\n    return f'lazily {made}'",
        "parse_xml": "import xml.etree.ElementTree as tree\n    if not request.data.startswith(b'<'): return 'no XML', 415"
                     "\n    return {part.tag: part.text for part in tree.fromstring(request.data)}",
        "scratch_file": "import pathlib, tempfile\n    with tempfile.TemporaryDirectory() as kept:\n        path = pathlib.Path(kept, 'x')"
                        "\n        path.write_bytes(request.get_data())\n        return [entry.name for entry in path.parent.iterdir()] + [path.stat().st_size]",
        "own_files": "import pathlib\n    return pathlib.Path(__file__).with_name('sibling.txt').read_text()",
        "status_only": "return 'x', 404", "list_body": "return jsonify([1, {'a': None}])"}

    def test_http_functions(self):
        framework = module("functions_framework")
        app = self.make_app()
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        multipart = (b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--B\r\nContent-Disposition: form-data; name="f"; '
                     b'filename="x.txt"\r\nContent-Type: text/plain\r\n\r\nbody\r\n--B--\r\n')
        requests = [("GET", "", {}), ("GET", "?name=<b>", {}), ("POST", "", {"json": {"name": "J"}}), ("PUT", "", {"json": {}}),
                    ("POST", "", {"data": b"name=F", "headers": form}), ("OPTIONS", "", {}), ("GET", "", {"headers": {"X-A": "b"}}),
                    ("POST", "", {"data": b"raw", "headers": {"Content-Type": "application/octet-stream"}}), ("DELETE", "", {}),
                    ("POST", "", {"data": b"<a><b>1</b><c/></a>", "headers": {"Content-Type": "application/xml"}}),
                    ("POST", "", {"data": multipart, "headers": {"Content-Type": "multipart/form-data; boundary=B"}}), ("HEAD", "", {})]
        (self.dir / "functions" / "sibling.txt").write_text("beside")
        for name, code in self.FUNCTIONS.items():
            source = ("import os\nimport functions_framework\nfrom flask import abort, jsonify\nfrom markupsafe import escape\n"
                      f"@functions_framework.http\ndef {name}(request):\n    {code}\n")
            path = self.write(name, source)
            google = fnserve.Client(framework.create_app(name, str(path)))
            for method, query, options in requests:
                with self.subTest(name=name, method=method, query=query, options=options):
                    theirs = google.open("/" + query, method, **options)
                    mine = self.call(app, method, f"/function/{name}{query}", **options)
                    self.assertEqual(theirs.status_code, mine.status_code)
                    if theirs.status_code < 400 and name != "path_":
                        self.assertEqual(theirs.data, mine.data)
                        for header in ("Content-Type", *(f"Access-Control-Allow-{what}" for what in ("Origin", "Headers", "Credentials"))):
                            if mine.status_code != 204 or header != "Content-Type":
                                self.assertEqual(theirs.headers.get(header), mine.headers.get(header))

    #: What functions-framework's own HTTP test functions do, each in a file that names no entry point: `handle` is the target.
    FILES = {
        "chosen": "import flask\ndef handle(request):\n    wanted = request.get_json()['wanted']\n    print('wanted: ' + wanted)\n"
                  "    if wanted == 'good': return 'done', 201\n    if wanted == 'refused': return flask.abort(flask.Response('no', 422))\n"
                  "    if wanted == 'crash': raise RuntimeError('boom')\n    return 'what?', 400",
        "environment": "import os\ndef handle(request): return os.environ[request.get_json()['wanted']]",
        "method": "def handle(request): return request.method",
        "place": "def handle(request):\n    names = request.args.getlist('of')\n    return '|'.join(str(getattr(request, n)) for n in names) or ('none', 400)",
        "says": "import logging, sys\ndef handle(request):\n    how = (request.get_json(silent=True) or {}).get('wanted', 'out')\n"
                "    {'out': print, 'err': lambda t: print(t, file=sys.stderr), 'bad': logging.error}.get(how, logging.info)('said')\n    return how",
        "logs": "import logging\ndef handle(request):\n    try: {}['x']\n    except KeyError: logging.exception('caught')\n    return 'logged'",
        "page": "from flask import render_template\ndef handle(request):\n    text = request.args.get('message') or (request.get_json(silent=True) or {})"
                ".get('message', 'nobody')\n    return render_template('greet.html', name=text)",
        "sums": "from flask import Response, stream_with_context\ndef handle(request):\n    def made():\n        total = 0\n        for line in"
                " request.stream:\n            total += int(line)\n            yield f'{total}\\n'\n    return Response(stream_with_context(made()))",
        "imports": "from sibling import WORD\ndef handle(request): return WORD", "relative": "from .sibling import WORD\ndef handle(request): return WORD",
        "own_types": "import os, pickle, typing\nclass Thing:\n    size: 'int' = 1\ndef handle(request):\n    here = os.path.splitext(os.path.basename(__file__))[0]"
                     "\n    return [Thing.__module__ == __name__, here == __name__.rpartition('.')[2], list(typing.get_type_hints(Thing)), pickle.loads(pickle.dumps(Thing())).size]",
        "early": "from flask import current_app\nwith current_app.app_context():\n    ready = True\ndef handle(request): return str(ready)",
        "failing": "import functions_framework as f\n@f.errorhandler(Exception)\ndef any_(error): return 'any ' + type(error).__name__, 418\n"
                   "@f.errorhandler(ArithmeticError)\ndef sums(error): return 'sums ' + type(error).__name__, 419\n@f.errorhandler(404)\n"
                   "def gone(error): return f'gone {error.code} {error.description}', 410\n@f.errorhandler(500)\ndef never(error): return 'never'\n"
                   "from flask import abort\ndef handle(request):\n    how = request.args.get('how')\n    if how in ('404', '409'): abort(int(how), 'why')\n"
                   "    return {'a': lambda: 1 / 0, 'b': lambda: {}['x'], 'c': lambda: 'fine'}.get(how, lambda: 10.0 ** 1000)()",
        "last_resort": "import functions_framework as f\n@f.errorhandler(500)\ndef last(error): return type(error).__name__ + ' ' +"
                       " repr(error.original_exception), 500\ndef handle(request): return request.args['x'][5]",
        "refused": "import functions_framework as f\nfrom werkzeug.exceptions import HTTPException, Conflict\n@f.errorhandler(HTTPException)\n"
                   "def all_(error): return f'all {error.code} {error.name}', error.code\n@f.errorhandler(Conflict)\ndef one(error): return 'one', 409\n"
                   "from flask import abort\ndef handle(request): return abort(int(request.args.get('how', 500)))",
        "decorated": "import functions_framework\n@functions_framework.http\ndef handle(request):\n    return request.get_json()['wanted'], 202",
        "started": "import time\nSTARTED = time.time()\ndef handle(request): return str(STARTED < time.time())", "typed": "def handle(request) -> dict: return {'b': 1, 'a': [2]}",
        "headers": "def handle(request): return 'x', 203, {'X-A': request.headers.get('X-B', 'none'), 'Content-Type': 'text/csv'}"}
    NOTHING = "def handle(request): return None\n", "import logging\ndef handle(request): logging.warning('said')\n"
    BROKEN = {"no_such_file": None, "no_handle": "x = 1", "no_syntax": "def handle(request)", "no_import": "import there_is_no_such_module",
              "no_sense": "raise ValueError('at import')", "no_function": "handle = 5"}

    def google(self, framework, name: str, source: str):
        """Return a client of the real framework, with a directory of its own as it wants it."""
        directory = self.dir / "google" / name
        (directory / "templates").mkdir(parents=True)
        (directory / "templates" / "greet.html").write_text("<p>Hello {{ name }}!</p>")
        (directory / "sibling.py").write_text("WORD = 'from beside'")
        (directory / f"{name}.py").write_text(source)
        for loaded in ("sibling", name):
            self.addCleanup(sys.modules.pop, loaded, None)
        path = list(sys.path)
        self.addCleanup(lambda: sys.path.__setitem__(slice(None), path))
        return framework.create_app("handle", str(directory / f"{name}.py"))

    def write_for_both(self, name: str, source: str) -> None:
        self.write(name, source + '\nSETTINGS = {"entry": "handle"}\n')

    def agree(self, name: str, theirs, mine) -> None:
        """Compare two answers; what the platforms themselves say of an error differs, and the URL that a function has."""
        self.assertEqual(theirs.status_code, mine.status_code, mine.data)
        if mine.status_code < 400 or mine.content_type != "application/json":
            self.assertEqual(theirs.text, mine.text.replace(f"/function/{name}/", "/").replace(f"/function/{name}", "/"))
            self.assertEqual([theirs.headers.get(key) for key in ("Content-Type", "X-A")], [mine.headers.get(key) for key in ("Content-Type", "X-A")])

    def test_shapes_of_the_frameworks_own_tests(self):
        framework = module("functions_framework")
        module("jinja2")
        os.environ["FNSERVE_TEST_WORD"] = "word"
        (self.dir / "templates").mkdir()
        (self.dir / "templates" / "greet.html").write_text("<p>Hello {{ name }}!</p>")
        self.write("sibling", "WORD = 'from beside'")
        app = self.make_app()
        posts = [("POST", "", {"json": {"wanted": wanted}}) for wanted in ("good", "refused", "crash", "x", "FNSERVE_TEST_WORD", "err", "bad")]
        requests = [*posts, ("GET", "", {}), ("PUT", "", {"json": {}}), ("DELETE", "", {}), ("HEAD", "", {}), ("PATCH", "", {"data": b"{bad"}),
                    ("GET", "?message=<b>", {}), ("POST", "", {"json": {"message": "漢"}}), ("POST", "", {"data": b"1\n2\n30\n", "headers": {"X-B": "c"}}),
                    *(("GET", f"{path}?of=path&of=url&of=base_url&of=full_path&of=query_string&of=root_path", {}) for path in ("", "/a/b%20c", "/漢")),
                    *(("GET", f"?how={how}", {}) for how in ("a", "b", "c", "d", "404", "409", "500", "503")), ("GET", "?x=y", {}), ("OPTIONS", "", {})]
        for name, source in self.FILES.items():
            google = fnserve.Client(self.google(framework, name, source))
            self.write_for_both(name, source)
            for method, path, options in requests:
                with self.subTest(name=name, method=method, path=path, options=options):
                    with contextlib.redirect_stderr(io.StringIO()):
                        mine = self.call(app, method, f"/function/{name}{path}", **options)
                        try:
                            theirs = google.open("/" + path.lstrip("/"), method, **options)
                        except ValueError:  # a stream that fails at once, which its server turns into a 500
                            theirs = fnserve.Response(status=500)
                    self.agree(name, theirs, mine)

    def test_what_differs_from_the_framework(self):
        """None is 204, and a module is one of the package `functions`: both stand in the README."""
        framework, app = module("functions_framework"), self.make_app()
        name = "def handle(request): return __name__"
        for number, (source, theirs, mine) in enumerate([*((source, (500,), (204, "")) for source in self.NOTHING),
                                                         (name, (200, "f2"), (200, "functions.f2"))]):
            google = fnserve.Client(self.google(framework, f"f{number}", source))
            self.write_for_both(f"f{number}", source)
            for answer, expected in (google.get("/"), theirs), (self.call(app, "GET", f"/function/f{number}"), mine):
                self.assertEqual((answer.status_code, answer.text)[:len(expected)], expected)

    def test_what_the_framework_refuses_to_start(self):
        framework, app = module("functions_framework"), self.make_app()
        for name, source in self.BROKEN.items():
            with self.subTest(name=name):
                if source is not None:
                    self.write_for_both(name, source)
                with self.assertRaises(BaseException):
                    framework.create_app("handle", str(self.dir / "functions" / f"{name}.py"))
                self.assertEqual(self.call(app, "GET", f"/function/{name}").status_code, 404 if source is None else 500)

    def test_async_functions(self):
        """Those that use only what Flask's and Starlette's requests have in common."""
        aio, app = module("functions_framework.aio"), self.make_app()
        for name, body in {"text": "return 'x'", "pair": "return 'x', 201", "dict_": "return {'b': 1, 'a': [None]}", "crash": "1/0",
                           "waits": "await asyncio.sleep(0)\n    return request.method", "gathers": "return {'all': await asyncio.gather(*map(double, [1, 2]))}",
                           "headers": "return request.headers.get('x-a', 'none')"}.items():
            self.write_for_both(name, f"import asyncio\nasync def double(n): return 2 * n\nasync def handle(request):\n    {body}\n")
            google = aio.create_asgi_app("handle", str(self.dir / "functions" / f"{name}.py"))
            for method in ("GET", "POST"):
                with self.subTest(name=name, method=method):
                    status, kind, data = self.ask_asgi(google, method, [(b"x-a", b"b")])
                    mine = self.call(app, method, f"/function/{name}", headers={"X-A": "b"})
                    self.assertEqual(status, mine.status_code)
                    if status < 400:
                        self.assertEqual(*((data, mine.data) if kind != "application/json" else (json.loads(data), mine.json)))

    def ask_asgi(self, app, method: str, headers: list) -> tuple:
        """Make one call to an ASGI application: the status, the content type, the body."""
        import asyncio
        sent: list = []
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": "/", "raw_path": b"/", "root_path": "",
                 "query_string": b"", "headers": headers, "scheme": "http", "server": ("localhost", 80), "client": ("127.0.0.1", 1)}

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            sent.append(message)
        with contextlib.suppress(ZeroDivisionError):  # Starlette answers, then raises for its server's log
            asyncio.run(app(scope, receive, send))
        return sent[0]["status"], dict(sent[0]["headers"]).get(b"content-type", b"").decode(), b"".join(part.get("body", b"") for part in sent[1:])

    EVENT = ("import functions_framework\nseen = []\n@functions_framework.cloud_event\ndef main(event):\n"
             "    print(event['id'], event['type'], event['source'], event.get('subject'), repr(event.data), sorted(event.get_attributes()))\n")

    def test_cloud_events(self):
        self.write("event", self.EVENT)
        app = self.make_app()
        binary = {"ce-id": "1", "ce-type": "t", "ce-source": "/s", "ce-specversion": "1.0", "ce-subject": "x", "Content-Type": "application/json"}
        full = {"id": "1", "type": "t", "source": "/s", "specversion": "1.0", "data": {"a": 1}}
        structured = {"Content-Type": "application/cloudevents+json"}
        for headers, body, status, printed in (
                (binary, b'{"a": 1}', 200, "1 t /s x {'a': 1} ['datacontenttype', 'id', 'source', 'specversion', 'subject', 'type']\n"),
                (structured, json.dumps(full).encode(), 200, "1 t /s None {'a': 1} ['id', 'source', 'specversion', 'type']\n"),
                (structured, json.dumps({**full, "data": None, "data_base64": "aGk="}).encode(), 200,
                 "1 t /s None b'hi' ['id', 'source', 'specversion', 'type']\n"),
                ({}, b"x", 400, None), (structured, b"{}", 400, None), (structured, b"[]", 400, None), (structured, b"{bad", 400, None)):
            with self.subTest(headers=headers, body=body):
                answer = self.call(app, "POST", "/function/event", data=body, headers=headers)
                self.assertEqual(answer.status_code, status)
                if printed:
                    self.assertEqual(answer.data, b"OK")
                    self.assertEqual(self.admin(app).get("/admin/logs?limit=1").json["invocations"][0]["output"], printed)

    def test_async_cloud_events(self):
        self.write("event", "import functions_framework\n@functions_framework.cloud_event\nasync def main(event): print('ran', event['id'])")
        app = self.make_app()
        answer = self.call(app, "POST", "/function/event", data=b"{}", headers={"ce-id": "1", "ce-type": "t", "ce-source": "s"})
        self.assertEqual((answer.status_code, answer.data), (200, b"OK"))
        self.assertEqual(self.admin(app).get("/admin/logs?limit=1").json["invocations"][0]["output"], "ran 1\n")

    def test_several_functions_and_error_handlers(self):
        self.write("many", "import functions_framework\n@functions_framework.http\ndef one(request): return request.view_args['subpath']\n"
                           "@functions_framework.http\ndef two(request): raise KeyError('k')\n"
                           "@functions_framework.errorhandler(KeyError)\ndef wrong(error): return f'no {error}', 409\n"
                           "@functions_framework.errorhandler(404)\ndef gone(error): return 'gone', 404\n")
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/function/many/one/a/b").data, b"a/b")
        answer = self.call(app, "GET", "/function/many/two")
        self.assertEqual((answer.status_code, answer.data), (409, b"no 'k'"))
        self.assertEqual(self.call(app, "GET", "/function/many").data, b"gone")
        self.write("pair", "import functions_framework\n@functions_framework.http\ndef one(request): return '1'\n"
                           "@functions_framework.http\ndef two(request): return '2'\n")
        answer = self.call(app, "GET", "/function/pair")
        self.assertEqual((answer.status_code, answer.json["functions"]), (404, ["/function/pair/one", "/function/pair/two"]))

    def test_exported(self):
        framework = module("functions_framework")
        self.write("v1/hi", "from fnserve import jsonify\nfrom . import tool\ndef main(request, config):\n    if 'none' in request.args:"
                            " return None\n    return jsonify(sub=request.view_args['subpath'], key=config['MY_KEY'], own='SECRET_TOKEN' in"
                            " config, tool=tool.x, form=request.form, method=request.method)")
        self.write("v1/tool", "x = 3")
        (self.dir / ".env").write_text("MY_KEY=\"it's \\\\ two\nlines\"\nSECRET_TOKEN=s\nSECRET_KEY=k\n")
        done = subprocess.run([sys.executable, "-B", HERE / "fnserve.py", "export", "v1/hi", "--to", "out"], cwd=self.dir, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        port = socket.socket()
        port.bind(("127.0.0.1", 0))
        number = str(port.getsockname()[1])
        port.close()
        server = subprocess.Popen([sys.executable, "-B", "-m", "functions_framework", "--target", "main", "--port", number, "--host",
                                   "127.0.0.1"], cwd=self.dir / "out", env={**os.environ, "FNSERVE_STATE": str(self.dir / "state")},
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        self.addCleanup(server.wait)
        self.addCleanup(os.killpg, server.pid, signal.SIGKILL)
        self.assertTrue(framework)

        def get(path: str, data: object = None):
            with urllib.request.urlopen(f"http://127.0.0.1:{number}{path}", data, timeout=20) as answer:
                return answer.status, answer.read()
        wait_until(lambda: self.answers(number))
        app = self.make_app()
        for path, data in (("/a/b", None), ("/", None), ("/x?y=1", b"f=1")):
            status, body = get(path, data)
            mine = self.call(app, "POST" if data else "GET", "/function/v1/hi" + path.rstrip("/"), data=data,
                             headers={"Content-Type": "application/x-www-form-urlencoded"} if data else {})
            theirs = json.loads(body)
            self.assertEqual((status, {**theirs, "own": True}), (mine.status_code, mine.json))
            self.assertFalse(theirs["own"])
        self.assertEqual(get("/?none=1"), (204, b""))

    def answers(self, port: str) -> bool:
        """Tell whether something listens."""
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", int(port)), 1).close()
            return True
        return False


# == 07 FUNCTIONS =========================================================


class FunctionsTest(Case):
    def test_one_last_good_version_in_every_process(self):
        self.write("a", "def main(request): return 'v1'")
        one = self.make_app()
        other = fnserve.App(one.settings, self.clock)
        self.assertEqual([fnserve.Client(app).get("/function/a").data for app in (one, other)], [b"v1", b"v1"])
        self.write("a", "def main(request): return 'v2'")
        self.assertEqual(fnserve.Client(one).get("/function/a").data, b"v2")
        self.write("a", "def main(")
        self.assertEqual([fnserve.Client(app).get("/function/a").data for app in (one, other)], [b"v2", b"v2"])

    def test_only_files_are_functions(self):
        self.write("v1/users", "def main(request): return 'users'")
        for name in ("dir.py", "v1.py"):
            (self.dir / "functions" / name).mkdir()
        os.mkfifo(self.dir / "functions" / "pipe.py")  # whose opening would wait for a writer
        app = self.make_app()
        self.assertEqual([self.call(app, "GET", f"/function/{name}").code for name in ("dir", "pipe", "v1", "v1/users")], [404, 404, 404, 200])

    def test_a_helper_that_is_a_kind_of_module(self):
        code = "import sys, types\nclass Kind(types.ModuleType): pass\nvalue = '{}'\nsys.modules[__name__].__class__ = Kind"
        helper = self.write("kinds", code.format("old"))
        self.write("uses", "import kinds\ndef main(request): return kinds.value")
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/function/uses").data, b"old")
        helper.write_text(code.format("newer"))
        wait_until(lambda: self.call(app, "GET", "/function/uses").data == b"newer", 5)

    def test_what_could_not_be_stored_still_serves(self):
        """A version that this process serves, but that a locked database did not take, is not replaced by the one before."""
        self.write("a", "def main(request): return 'v1'")
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/function/a").data, b"v1")
        with unittest.mock.patch.object(app.functions.versions, "remember", return_value=0):
            self.write("a", "def main(request): return 'v2'")
            self.assertEqual(self.call(app, "GET", "/function/a").data, b"v2")
            self.write("a", "def main(")
            self.assertEqual(self.call(app, "GET", "/function/a").data, b"v2")
        self.write("a", "def main(:")
        self.assertEqual(self.call(app, "GET", "/function/a").data, b"v2")
        self.assertEqual(app.functions.versions.last_good("a"), b"def main(request): return 'v2'")  # by now

    def test_what_was_mended_while_nobody_served_is_fine(self):
        self.write("f", "import nowhere\ndef main(request): return 'x'")
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/function/f").status_code, 500)
        self.write("f", "def main(request): return 'x'")
        later = self.make_app()
        self.assertEqual(list(later.functions.versions.broken()), ["f"])
        self.assertEqual((self.call(later, "GET", "/function/f").status_code, later.functions.versions.broken()), (200, {}))

    def test_a_changed_helper_leaves_others_alone(self):
        self.write("helper", "X = 1")
        self.write("u", "from helper import X\ndef main(request): return str(X)")
        self.write("pk", "import pickle\nclass A: pass\ndef main(request): return str(len(pickle.dumps(A())) > 0)")
        app = self.make_app()
        self.assertEqual([self.call(app, "GET", "/function/" + name).data for name in ("u", "pk")], [b"1", b"True"])
        self.write("helper", "X = 22")
        wait_until(lambda: self.call(app, "GET", "/function/u").data == b"22")
        self.assertEqual(self.call(app, "GET", "/function/pk").data, b"True")  # a class that is another now can't be pickled

    def test_decorators_and_aliases(self):
        self.write("deco", "import functools\ndef d(f):\n    @functools.wraps(f)\n    def w(request): return f(request, config={'a': 1})\n    return w\n"
                           "@d\ndef main(request, config): return config")
        self.write("hands_on", "import functools\ndef d(f):\n    @functools.wraps(f)\n    def w(*args, **kwargs): return f(*args, **kwargs)\n    return w\n"
                               "@d\ndef main(request, protected): return str('show_stats' in protected)")
        self.write("two", "import functions_framework\ndef d(f):\n    def wrapper(request): return 'w:' + f(request)\n    return wrapper\n"
                          "@functions_framework.http\n@d\ndef a(request): return 'a'\n@functions_framework.http\n@d\ndef b(request): return 'b'")
        self.write("alias", "import functions_framework\n@functions_framework.http\ndef hello(request): return 'hello'\nmain = hello")
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/function/deco").json, {"a": 1})
        self.assertEqual([self.call(app, "GET", "/function/" + name).data for name in ("hands_on", "alias", "two/a", "two/b")],
                         [b"True", b"hello", b"w:a", b"w:b"])

    def test_helpers_beside_the_directory(self):
        (self.dir / "beside_it.py").write_text("from flask import jsonify, request\ndef answer(): return jsonify(a=request.args['a'])\n")
        self.write("f", "from beside_it import answer\ndef main(request): return answer()")
        (self.dir / "platform_app.py").write_text("from flask import Flask, Blueprint\nfrom werkzeug.exceptions import NotFound\n")
        self.write("g", "import platform_app\nfrom flask import Response\ndef main(request): return [platform_app.Flask.__module__, Response.__module__]")
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/function/f?a=1").json, {"a": "1"})
        need("flask", importlib.util.find_spec("flask"))
        self.assertEqual(self.call(app, "GET", "/function/g").json, ["flask.app", "fnserve"])  # it asks for more than fnserve has

    def test_async_generators(self):
        self.write("tokens", "import asyncio\nasync def main(request):\n    for part in 'abc':\n        await asyncio.sleep(0)\n        yield part")
        self.write("made", "async def parts():\n    yield 'x'\n    yield b'y'\ndef main(request): return parts()")
        app = self.make_app()
        self.assertEqual([self.call(app, "GET", "/function/" + name).data for name in ("tokens", "made")], [b"abc", b"xy"])

    def test_an_async_generator_whose_client_leaves(self):
        self.write("tokens", "import asyncio\nENDED = []\nasync def wait():\n    try:\n        await asyncio.sleep(60)\n    finally:\n        ENDED.append('task')\n"
                             "async def main(request):\n    task = asyncio.ensure_future(wait())\n    try:\n        while True:\n            await asyncio.sleep(0)\n"
                             "            yield 'x'\n    finally:\n        await asyncio.sleep(0)\n        ENDED.append('generator')\n        task.cancel()")
        app = self.make_app()
        parts = iter(app({**fnserve.make_environ("GET", b"/function/tokens", "", b"", [])}, lambda *_: None))
        self.assertEqual(next(parts), b"x")
        parts.close()
        self.assertEqual(sorted(app.functions.get("tokens").code.module.ENDED), ["generator", "task"])

    def test_a_client_leaves_a_body_that_is_an_iterable(self):
        self.write("f", "ENDED = []\nfrom flask import request, Response\nclass Body:\n    def __iter__(self):\n        try:\n            while True: yield 'x'\n"
                        "        finally: ENDED.append(request.path)\ndef main(request): return Response(Body())")
        app = self.make_app()
        parts = iter(app(fnserve.make_environ("GET", b"/function/f", "", b"", []), lambda *_: None))
        next(parts)
        parts.close()
        self.assertEqual(app.functions.get("f").code.module.ENDED, ["/function/f"])  # within its call

    def test_a_late_call_in_a_call(self):
        """The deadline comes within the inner one, in C; neither ends the process, which a child that a function forks does."""
        self.write("inner", "import time\nSETTINGS = {'timeout': .3}\ndef main(request): time.sleep(.8)")
        self.write("outer", "def main(request, config):\n    from fnserve import Client, current_app\n"
                            "    return [APP[0].get('/function/inner').status_code for _ in range(2)]\nAPP = []")
        app = self.make_app()
        app.functions.get("outer").code.module.APP.append(fnserve.Client(app))
        self.assertEqual(self.call(app, "GET", "/function/outer").json, [504, 504])

    def test_groups_and_subpaths(self):
        self.write("v1/users", "def main(request): return dict(request.view_args)")
        self.write("a", "def main(request): return dict(request.view_args)")
        self.write("a/b", "def main(request): return 'hidden'")
        self.write("漢字", "def main(request): return 'han'")
        app = self.make_app()
        for path, expected in (("v1/users", ["v1/users", ""]), ("v1/users/7/x", ["v1/users", "7/x"]), ("a/b", ["a", "b"])):
            answer = self.call(app, "GET", "/function/" + path).json
            self.assertEqual([answer["func_name"], answer["subpath"]], expected)
        self.assertEqual(self.call(app, "GET", "/function/%E6%BC%A2%E5%AD%97").data, b"han")
        self.assertEqual(self.make_app(FUNCTIONS_DIR="functions/").functions.names(), ["a", "a/b", "v1/users", "漢字"])

    def test_names_that_reach_no_file(self):
        (self.dir / "secret.py").write_text("def main(request): return 'leak'")
        self.write("_hidden", "def main(request): return 'leak'")
        app = self.make_app()
        for name in ("..%2fsecret", "../secret", "_hidden", "%00", "a.b", "hello.py", "", "/secret", "..", "a" * 3000,
                     "%ff%fe", "a%0d%0ab", "/".join("x" * 50)):
            with self.subTest(name=name):
                self.assertEqual(self.call(app, "GET", "/function/" + name).code, 404)

    def test_new_code_answers_the_next_call(self):
        path = self.write("f", "def main(request): return 'one'")
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/function/f").data, b"one")
        for word in ("two", "six", "ten"):  # the same size, within one tick of the clock
            self.write("f", f"def main(request): return '{word}'")
            self.assertEqual(self.call(app, "GET", "/function/f").data, word.encode())
        path.unlink()
        self.assertEqual(self.call(app, "GET", "/function/f").code, 404)
        self.write("f", "def main(request): return 'git'")
        self.assertEqual(self.call(app, "GET", "/function/f").data, b"git")

    def test_a_broken_version_leaves_the_last_good_one(self):
        self.write("f", "def main(request): return 'good'")
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/function/f").data, b"good")
        for code in ("", "def main(", "x = 1", "import sys; sys.exit(3)", "raise KeyboardInterrupt", "import nothing_here",
                     "def main(request): return '\0'"):
            with self.subTest(code=code):
                self.write("f", code)
                self.assertEqual(self.call(app, "GET", "/function/f").data, b"good")
                [row] = self.admin(app).get("/function/list_functions").json["functions"]
                self.assertEqual(row["status"], "broken")
        restarted = fnserve.App(app.settings, self.clock)
        self.assertEqual(self.call(restarted, "GET", "/function/f").data, b"good")
        self.write("f", "def main(request): return 'mended'")
        self.assertEqual(self.call(app, "GET", "/function/f").data, b"mended")
        self.assertEqual(self.admin(app).get("/function/list_functions").json["functions"][0]["status"], "fine")

    def test_without_a_good_version(self):
        self.write("f", "def main(")
        self.write("g", "x = 1")
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/function/f").json["error"], "Function execution failed")
        answer = self.call(app, "GET", "/function/g")
        self.assertEqual((answer.code, answer.json["error"]), (400, 'Module "g" has no main()'))

    def test_globals_stay_warm_and_are_loaded_once(self):
        self.write("f", "import time\ntime.sleep(.05)\nopen('loads', 'a').write('x')\nn = 0\ndef main(request):\n"
                        "    global n\n    n += 1\n    return str(n)")
        app = self.make_app()
        threads = [threading.Thread(target=self.call, args=(app, "GET", "/function/f")) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        self.assertEqual((self.dir / "loads").read_text(), "x")
        self.assertEqual(self.call(app, "GET", "/function/f").data, b"9")

    def test_helpers(self):
        self.write("helper_a", "from . import helper_b\nfrom flask import jsonify\nWORD = helper_b.WORD")
        self.write("helper_b", "WORD = 'one'")
        self.write("f", "import helper_a\nfrom functions.helper_b import WORD\nfrom . import helper_b\n"
                        "def main(request): return [helper_a.WORD, WORD, helper_b.WORD]")
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/function/f").json, ["one"] * 3)
        self.write("helper_b", "WORD = 'other'")
        wait_until(lambda: self.call(app, "GET", "/function/f").json == ["other"] * 3, 1.5)
        self.assertEqual(list(self.dir.rglob("*.pyc")), [])

    def test_entry_points(self):
        self.write("kw", "def main(request, **kwargs): return sorted(kwargs)")
        self.write("some", "def main(request, context, config): return [context.function, context.trigger]")
        self.write("none", "def main(): return 'x'")
        self.write("later", "import asyncio\nasync def main(request):\n    await asyncio.sleep(0)\n    return 'async'")
        self.write("google", "import functions_framework\n@functions_framework.http\ndef hi(request): return 'google'")
        self.write("named", "SETTINGS = {'entry': 'go'}\ndef go(request): return 'go'")
        self.write("wrapped", "import functools\ndef deco(f):\n    @functools.wraps(f)\n    def inner(*a, **k):\n"
                              "        return f(*a, **k)\n    return inner\n@deco\ndef main(request, config): return 'w'")
        app = self.make_app()
        for name, expected in (("kw", ["config", "context", "protected"]), ("some", ["some", "http"])):
            self.assertEqual(self.call(app, "GET", "/function/" + name).json, expected)
        for name, body in (("none", b"x"), ("later", b"async"), ("google", b"google"), ("named", b"go"), ("wrapped", b"w")):
            self.assertEqual(self.call(app, "GET", "/function/" + name).data, body)

    def test_flask_means_fnserve_inside_functions_only(self):
        self.write("f", "import flask, sys\nfrom flask import request as r\nfrom fnserve import request as s\n"
                        "def main(request): return [r is s, 'flask' in sys.modules and sys.modules['flask'] is flask]")
        self.write("g", "import flask.views")
        self.write("helper", "from flask import request, session, g\ndef who(): return request.path")
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/function/helper").code, 400)
        self.assertEqual(self.call(app, "GET", "/function/f").json, [True, False])
        self.assertEqual(self.call(app, "GET", "/function/g").code, 500)

    def test_what_main_returns(self):
        cases = {"'a'": (200, b"a", "text/html; charset=utf-8"), "b'a'": (200, b"a", "text/html; charset=utf-8"),
                 "{'b': 1, 'a': 2}": (200, b'{"a":2,"b":1}\n', "application/json"), "[1]": (200, b"[1]\n", "application/json"),
                 "None": (204, b"", None), "('a', 201)": (201, b"a", "text/html; charset=utf-8"),
                 "('a', {'Content-Type': 'x/y'})": (200, b"a", "x/y"),
                 "('a', 404, {'Content-Type': 'x/y'})": (404, b"a", "x/y"),
                 "iter(['a', b'b'])": (200, b"ab", "text/html; charset=utf-8"), "('a', '299 Odd')": (299, b"a",
                                                                                                "text/html; charset=utf-8")}
        for code in ("5", "object()", "('a', 'b', 'c', 'd')", "('a', 'nonsense')", "('a', {'X': 'a\\r\\nb'})"):
            cases[code] = (500, None, "application/json")
        app = self.make_app()
        for number, (code, (status, body, kind)) in enumerate(cases.items()):
            self.write(f"f{number}", f"def main(request): return {code}")
            with self.subTest(returned=code):
                answer = self.call(app, "GET", f"/function/f{number}")
                self.assertEqual((answer.code, answer.headers.get("Content-Type")), (status, kind))
                if body is not None:
                    self.assertEqual(answer.data, body)


class DropInTest(Case):
    """A directory of function files written for Flask runs as it is, with Flask installed and without."""

    FILES = {
        "args": "from flask import request\ndef main(request):\n    return 'Hi ' + request.args.get('name', 'you')",
        "proxy": "from flask import request as r\ndef main(request):\n    return r.args['name']",
        "posted": "from flask import jsonify\ndef main(request):\n    data = request.get_json()\n"
                  "    return jsonify({'sum': data['a'] + data['b']})",
        "form": "def main(request):\n    if request.method == 'POST':\n        return request.form.get('name')\n"
                "    return '<form method=post><input name=name></form>'",
        "sess": "from flask import session, redirect, url_for\ndef main(request):\n    if 'user' in session:\n"
                "        return 'user ' + session['user']\n    session['user'] = 'tony'\n    session.permanent = True\n"
                "    return redirect('/function/sess')",
        "aborts": "from flask import abort, Response\ndef main(request):\n    if not request.args.get('ok'):\n"
                  "        abort(400)\n    return Response('{\"ok\": true}', status=202, mimetype='application/json')",
        "template": "from flask import render_template_string\ndef main(request):\n"
                    "    return render_template_string('<p>{{ name }}</p>', name='<b>')",
        "database": "import sqlite3\ndef main(request):\n    conn = sqlite3.connect('./serverless.db')\n"
                    "    conn.execute('CREATE TABLE IF NOT EXISTS notes (text TEXT)')\n"
                    "    conn.execute('INSERT INTO notes VALUES (?)', ('n',))\n    conn.commit()\n"
                    "    count = conn.execute('SELECT count(*) FROM notes').fetchone()[0]\n    conn.close()\n"
                    "    return {'notes': count}",
        "threads": "import threading\ndef main(request):\n    seen = []\n"
                   "    ts = [threading.Thread(target=seen.append, args=(i,)) for i in range(4)]\n"
                   "    [t.start() for t in ts]\n    [t.join() for t in ts]\n    return {'seen': sorted(seen)}",
        "aio": "import asyncio\nasync def work():\n    await asyncio.sleep(0)\n    return 'done'\n"
               "def main(request):\n    return asyncio.run(work())",
        "cfg": "import os\ndef main(request, config=None, **kwargs):\n    return [config['MY_KEY'], os.getenv('MY_KEY')]",
        "whole": "import flask\ndef main(request):\n    response = flask.make_response('made', 201)\n"
                 "    response.set_cookie('a', 'b')\n    flask.current_app.logger.info('said')\n    return response",
    }
    CALLS = [("args?name=A", None, 200, "Hi A"), ("proxy?name=B", None, 200, "B"), ("posted", {"a": 1, "b": 2}, 200, '{"sum":3}\n'),
             ("form", None, 200, "<form method=post><input name=name></form>"), ("aborts", None, 400, None),
             ("aborts?ok=1", None, 202, '{"ok": true}'), ("database", None, 200, '{"notes":1}\n'),
             ("threads", None, 200, '{"seen":[0,1,2,3]}\n'), ("aio", None, 200, "done"), ("cfg", None, 200, '["v","v"]\n'),
             ("whole", None, 201, "made")]

    def use(self, **environ: str) -> None:
        """Start in the directory, and call everything."""
        module("waitress")
        (self.dir / ".env").write_text(f"SECRET_TOKEN={TOKEN}\nSECRET_KEY=k\nMY_KEY=v\n")
        with contextlib.closing(sqlite3.connect(self.dir / "serverless.db")) as db, db:
            db.execute("CREATE TABLE call_stats (func_name TEXT PRIMARY KEY, call_count INTEGER NOT NULL)")
            db.execute("INSERT INTO call_stats VALUES ('args', 100)")
        for name, code in self.FILES.items():
            self.write(name, code)
        before = {path: path.read_bytes() for path in [self.dir / ".env", *(self.dir / "functions").iterdir()]}
        server = Server(self.dir, "--workers", "2", **environ)
        self.addCleanup(server.kill_all)
        for path, sent, status, body in self.CALLS:
            with self.subTest(path=path):
                answer = server.get("/function/" + path, "POST" if sent else "GET", json.dumps(sent) if sent else None,
                                    **({"Content_Type": "application/json"} if sent else {}))
                self.assertEqual(answer[0], status)
                if body is not None:
                    self.assertEqual(answer[2].decode(), body)
        first = server.get("/function/sess")
        cookie = first[1]["Set-Cookie"].partition(";")[0]
        self.assertEqual((first[0], server.get("/function/sess", Cookie=cookie)[2]), (302, b"user tony"))
        self.more(server)
        stats = json.loads(server.get("/function/show_stats", Authorization="Bearer " + TOKEN,
                                      Accept="application/json")[2])["stats"]
        self.assertEqual((stats["args"], stats["sess"]), (101, 2))
        self.assertEqual(server.stop(), 0)
        self.assertEqual({path: path.read_bytes() for path in before}, before)

    def more(self, server: Server) -> None:
        """Call what needs packages that this test asks for."""

    def test_without_flask(self):
        blocked = self.dir / "blocked"
        for name in ("flask", "werkzeug", "markupsafe"):
            (blocked / name).mkdir(parents=True)
            (blocked / name / "__init__.py").write_text("raise ImportError('not here')")
        self.use(PYTHONPATH=str(blocked))


class DropInWithFlaskTest(DropInTest):
    def test_without_flask(self):
        module("flask")
        module("linebot")
        self.write("line_bot", (HERE / "examples/line_bot.py").read_text())
        self.use(LINE_CHANNEL_SECRET="s", LINE_CHANNEL_ACCESS_TOKEN="t")

    def more(self, server: Server) -> None:
        import base64
        import hashlib
        import hmac
        self.assertEqual(server.get("/function/template")[2], b"<p>&lt;b&gt;</p>")
        with open(self.dir / ".env.local", "a") as file:
            file.write("LINE_CHANNEL_SECRET=s\nLINE_CHANNEL_ACCESS_TOKEN=t\n")
        body = b'{"destination": "x", "events": []}'
        signature = base64.b64encode(hmac.new(b"s", body, hashlib.sha256).digest()).decode()
        self.assertEqual(server.get("/function/line_bot", "POST", body, X_Line_Signature=signature)[2], b"OK")
        self.assertEqual(server.get("/function/line_bot", "POST", body, X_Line_Signature="AAAA")[0], 400)


class ExamplesTest(Case):
    def test_examples(self):
        for name in ("todo", "clock", "upload"):
            self.write(name, (HERE / f"examples/{name}.py").read_text())
        self.write("add", (HERE / "functions/add.py").read_text())
        app = self.make_app()
        client = self.client(app)
        self.assertEqual(client.post("/function/todo", json={"text": "milk"}).json, {"done": 0, "id": 1, "text": "milk"})
        self.assertEqual(client.put("/function/todo/1", json={"done": True}).json["done"], 1)
        self.assertEqual(len(client.get("/function/todo").json), 1)
        self.assertEqual([client.delete("/function/todo/1").code, client.get("/function/todo/1").code], [204, 404])
        self.assertEqual(client.get("/function/add?a=1&b=2").json, {"sum": 3.0})
        self.assertEqual(client.post("/function/add", json={"a": 1, "b": "x"}).code, 400)
        self.assertRegex(client.get("/function/clock?n=1").get_data(as_text=True), r"^data: [\d:]+\n\n$")
        body = b'--B\r\nContent-Disposition: form-data; name="file"; filename="../a b.txt"\r\n\r\nhi\r\n--B--\r\n'
        kind = {"Content-Type": "multipart/form-data; boundary=B"}
        self.assertEqual(client.post("/function/upload", data=body, headers=kind).json, {"name": "a_b.txt", "size": 2})
        self.assertEqual(client.get("/function/upload/a_b.txt").data, b"hi")


# == 09 SIGNATURES ========================================================


class SignatureTest(Case):
    """Requests signed by the providers' own libraries, and tampered with."""

    BODY = b'{"events": [], "text": "\xe6\xbc\xa2"}'

    def signed(self, scheme: str, key: str, now: int) -> dict:
        """Return the headers that the provider would send, made by its own library where there is one."""
        body, text = self.BODY, self.BODY.decode()
        if scheme == "line":
            validator_ = module("linebot.v3.webhook").SignatureValidator(key)
            import base64
            import hashlib
            import hmac
            made = base64.b64encode(hmac.new(key.encode(), body, hashlib.sha256).digest()).decode()
            self.assertTrue(validator_.validate(text, made))
            return {"X-Line-Signature": made}
        if scheme == "stripe":
            signature = module("stripe").WebhookSignature._compute_signature(f"{now}.{text}", key)
            return {"Stripe-Signature": f"t={now},v0=x,v1={'0' * 64},v1={signature}"}
        if scheme == "slack":
            verifier = module("slack_sdk.signature").SignatureVerifier(key)
            return {"X-Slack-Request-Timestamp": str(now), "X-Slack-Signature": verifier.generate_signature(timestamp=str(now), body=text)}
        if scheme == "standard":
            import datetime
            made = module("standardwebhooks").Webhook(key).sign("msg_1", datetime.datetime.fromtimestamp(now, datetime.timezone.utc), text)
            return {"webhook-id": "msg_1", "webhook-timestamp": str(now), "webhook-signature": "v1,bm8= " + made}
        if scheme == "discord":
            signer = module("nacl.signing").SigningKey(bytes(range(32)))
            return {"X-Signature-Timestamp": str(now), "X-Signature-Ed25519": signer.sign(str(now).encode() + body).signature.hex()}
        import hashlib
        import hmac
        if scheme == "github":
            return {"X-Hub-Signature-256": "sha256=" + hmac.new(key.encode(), body, hashlib.sha256).hexdigest()}
        if scheme == "custom":
            return {"X-Sig": "v=" + hmac.new(key.encode(), body, hashlib.sha512).hexdigest()}
        if scheme == "shopify":
            import base64
            return {"X-Shopify-Hmac-Sha256": base64.b64encode(hmac.new(key.encode(), body, hashlib.sha256).digest()).decode()}
        return {{"gitlab": "X-Gitlab-Token", "telegram": "X-Telegram-Bot-Api-Secret-Token"}[scheme]: key}

    KEYS = {"line": "LINE_CHANNEL_SECRET", "github": "GITHUB_WEBHOOK_SECRET", "stripe": "STRIPE_WEBHOOK_SECRET",
            "slack": "SLACK_SIGNING_SECRET", "standard": "STANDARD_WEBHOOK_SECRET", "shopify": "SHOPIFY_WEBHOOK_SECRET",
            "gitlab": "GITLAB_WEBHOOK_TOKEN", "telegram": "TELEGRAM_SECRET_TOKEN", "discord": "DISCORD_PUBLIC_KEY",
            "custom": "MY_SECRET"}

    def test_every_scheme(self):
        now = int(self.clock.now)
        ran = self.dir / "ran"
        for scheme, name in self.KEYS.items():
            key = {"standard": "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIz", "stripe": "whsec_abc", "discord":
                   "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"}.get(scheme, "s3cret")
            shown = repr(scheme) if scheme != "custom" else repr({"header": "X-Sig", "secret": name, "algorithm": "sha512",
                                                                  "encoding": "hex", "prefix": "v="})
            self.write(scheme, f"SETTINGS = {{'verify': {shown}}}\ndef main(request):\n    open({str(ran)!r}, 'a').write('x')\n"
                               "    return request.get_data()")
            (self.dir / ".env").write_text(f"{name}=0ld,{key}\n" if scheme not in ("standard", "discord") else f"{name}={key}\n")
            app = self.make_app()
            sent = {"Content-Type": "application/json"}
            headers = {**sent, **self.signed(scheme, key, now)}

            def post(body: bytes, headers: dict) -> int:
                return self.call(app, "POST", f"/function/{scheme}", data=body, headers=headers).status_code
            with self.subTest(scheme=scheme):
                self.assertEqual(post(self.BODY, headers), 200)
                ran.write_text("")
                wrong = [(self.BODY, sent)]
                if scheme not in ("gitlab", "telegram"):
                    wrong.append((self.BODY + b" ", headers))
                for header in headers.keys() - {"Content-Type"}:
                    for value in ("", "x", headers[header][:-1], headers[header] + "0", "\xe6\xbc\xa2"):
                        if not (header == "webhook-id" and value == headers[header]):
                            wrong.append((self.BODY, {**headers, header: value}))
                for body, tampered in wrong:
                    self.assertEqual(post(body, tampered), 401, tampered)
                if scheme in ("stripe", "slack", "standard"):
                    self.clock.now = now + 412
                    self.assertEqual(post(self.BODY, headers), 401)
                    self.assertIn("412 s old", self.admin(app).get("/admin/logs?limit=1").json["invocations"][0]["error"])
                    self.clock.now = now
                self.assertEqual(ran.read_text(), "")  # the function never ran
                (self.dir / ".env").write_text("")
                self.assertEqual(post(self.BODY, headers), 401)

    def test_twilio(self):
        request = module("twilio.request_validator")
        self.write("sms", "SETTINGS = {'verify': 'twilio'}\ndef main(request): return 'ok'")
        (self.dir / ".env").write_text("TWILIO_AUTH_TOKEN=tok\n")
        app, signer = self.make_app(), request.RequestValidator("tok")
        form = {"Body": "Hi there", "From": "+1555", "A": "漢"}
        for url, host in (("http://example.com/function/sms?a=1", "example.com"), ("http://example.com:80/function/sms?a=1", "example.com"),
                          ("http://example.com:8080/function/sms?a=1", "example.com:8080")):
            made = signer.compute_signature(url, form)
            answer = self.call(app, "POST", "/function/sms?a=1", data=form, headers={"Host": host, "X-Twilio-Signature": made})
            self.assertEqual(answer.status_code, 200, url)
        self.assertEqual(self.call(app, "POST", "/function/sms?a=2", data=form, headers={"Host": host, "X-Twilio-Signature": made})
                         .status_code, 401)
        body = b'{"a": 1}'
        query = "?bodySHA256=" + signer.compute_hash(body.decode())
        made = signer.compute_signature("http://example.com/function/sms" + query, {})
        headers = {"Host": "example.com", "X-Twilio-Signature": made, "Content-Type": "application/json"}
        self.assertEqual(self.call(app, "POST", "/function/sms" + query, data=body, headers=headers).status_code, 200)
        self.assertEqual(self.call(app, "POST", "/function/sms" + query, data=body + b" ", headers=headers).status_code, 401)

    def test_published_vectors(self):
        for public, message, signature in (  # RFC 8032 7.1, TEST 1 to 3
                ("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a", "",
                 "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"),
                ("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c", "72",
                 "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"),
                ("fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025", "af82",
                 "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a")):
            data = bytes.fromhex(public), bytes.fromhex(message), bytes.fromhex(signature)
            self.assertTrue(fnserve.verify_ed25519(*data))
            self.assertFalse(fnserve.verify_ed25519(data[0], data[1] + b"x", data[2]))
            self.assertFalse(fnserve.verify_ed25519(data[0], data[1], data[2][:63] + b"\xff"))

    def test_blank_headers(self):
        """A header that holds nothing but a no-break space is none."""
        (self.dir / ".env").write_text("DISCORD_PUBLIC_KEY=03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8\nLINE_CHANNEL_SECRET=s\n")
        app = self.make_app()
        for scheme, names in (("discord", ("X-Signature-Ed25519", "X-Signature-Timestamp")), ("line", ("X-Line-Signature",))):
            self.write(scheme, f"SETTINGS = {{'verify': {scheme!r}}}\ndef main(request): 1/0")
            answer = self.call(app, "POST", f"/function/{scheme}", data=b"{}", headers=dict.fromkeys(names, "\xa0"))
            self.assertEqual(answer.code, 401, scheme)

    def test_challenges(self):
        self.write("slack", "SETTINGS = {'verify': 'slack'}\ndef main(request): 1/0")
        self.write("discord", "SETTINGS = {'verify': 'discord'}\ndef main(request): 1/0")
        module("slack_sdk"), module("nacl")
        (self.dir / ".env").write_text("SLACK_SIGNING_SECRET=s\nDISCORD_PUBLIC_KEY=03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8\n")
        app = self.make_app()
        for scheme, body, answer in (("slack", {"type": "url_verification", "challenge": "abc"}, {"challenge": "abc"}),
                                     ("discord", {"type": 1}, {"type": 1})):
            self.BODY = json.dumps(body).encode()
            headers = {"Content-Type": "application/json", **self.signed(scheme, "s", int(self.clock.now))}
            answered = self.call(app, "POST", f"/function/{scheme}", data=self.BODY, headers=headers)
            self.assertEqual((answered.status_code, answered.json), (200, answer))


# == 10 TRIGGERS ==========================================================


class TriggerTest(Case):
    ZONES = ("UTC", "Asia/Taipei", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe")
    CRONTABS = """* * * * *|*/5 * * * *|0 * * * *|30 2 * * *|30 1 * * *|0 0 1 * *|0 0 * * 0|0 0 * * 7|0 9 * * mon-fri|0 9 1 jan *
        0 0 29 2 *|0 0 13 * 5|0 0 1,15 * 3|*/30 * * * *|15 1-3 * * *|0 */2 * * *|59 23 31 12 *|0 12 * * 1-5|0 8-18/2 * * *|5,35 6,18 * * *
        0 0 * * 6-7|10-20/3 4 * * *|0 0 31 * *|0 22 * * 1,3,5|1 1 1 1 1|0 0 30 4 *|0 3 * * sun|*/7 */5 * * *|45 23 * * sat|0 5 10-20 * *""".replace("|", "\n").split("\n")
    FIELDS = ({"hour": 3}, {"day": "last"}, {"day": "last fri"}, {"day": "3rd wed", "hour": 6}, {"day_of_week": "mon-fri", "hour": "8-18/2"},
              {"week": 1}, {"week": "*/4", "day_of_week": 0}, {"month": "*/3"}, {"second": "*/10"}, {"minute": "1,2,3", "second": 5},
              {"year": "2027-2028", "month": 6}, {"day": "1st mon, 15, last"}, {"hour": "*", "minute": "59"}, {"day": "2nd sun", "month": 3,
              "hour": 2, "minute": 30}, {"day": "*/10"}, {"month": "jan-mar", "day": 31}, {"day_of_week": "sun"}, {"day": 29, "month": 2})

    @staticmethod
    def mine(trigger, start: float, count: int) -> list:
        """Return the next times."""
        found = []
        while len(found) < count and (start := trigger.next(start)) is not None:
            found.append(start)
        return found

    def starts(self, zone) -> list[float]:
        """Return moments on ordinary days and around each change of the clock in 2026."""
        import datetime
        moments = [datetime.datetime(2026, month, day, hour, tzinfo=zone).timestamp() for month, day, hour in
                   ((1, 31, 23), (2, 27, 5), (3, 7, 23), (3, 28, 22), (4, 4, 20), (6, 15, 12), (10, 3, 22), (10, 24, 22), (10, 31, 22), (12, 31, 23))]
        return moments

    def test_jitter_fires_once_each_time(self):
        start = 1_767_225_600.0
        for fields, most in (({"trigger": "cron", "hour": 6, "jitter": 600}, 60), ({"minute": "*", "jitter": 10}, 86_400)):
            trigger, moment, count = fnserve.parse_schedule(fields, "UTC", start), start, 0
            while count < 200 and (moment := trigger.next(moment)) < start + 60 * 86_400:
                count += 1
                late = moment % (86_400 if most == 60 else 60) - (21_600 if most == 60 else 0)
                self.assertTrue(0 <= late < fields["jitter"], late)
            self.assertEqual(count, min(most, 200))

    def test_dates_are_read_as_apscheduler_does(self):
        for text, seconds in (("2030-05-01 8:00:00", 0), ("2030-5-1 8:00:00", 0), ("2030-05-01T08:00:00.5Z", .5), ("2030-05-01T10:00+0200", 0),
                              ("2030-05-01T08:00:00+00:00", 0), ("2030-05-01+0800", -57_600), ("2030-05-01 Z", -28_800)):
            self.assertEqual(fnserve.read_moment("run_date", text, datetime.timezone.utc), 1_903_852_800 + seconds, text)
        for text in ("2030-13-01", "tomorrow", "2030-05-01 08:00:00 Z+1"):
            with self.assertRaises(fnserve.TriggerError):
                fnserve.read_moment("run_date", text, datetime.timezone.utc)

    def test_decades_ahead_and_weekdays_by_steps(self):
        start = 1_767_225_600.0  # Thursday, 1 January 2026
        [found] = self.mine(fnserve.parse_schedule({"year": "*/50"}, "UTC", start), start, 1)
        self.assertEqual(time.gmtime(found)[:3], (2070, 1, 1))
        found = self.mine(fnserve.parse_schedule("0 8 * * 1/2", "UTC", start), start, 6)
        self.assertEqual([time.strftime("%a", time.gmtime(moment)) for moment in found], ["Fri", "Mon", "Wed"] * 2)

    def test_crontab_agrees_with_croniter(self):
        """But for a local time in the gap of a spring, which croniter moves to the gap's end and APScheduler by its length."""
        croniter = module("croniter").croniter
        import datetime
        import zoneinfo
        count = 0
        generated = random.Random(20260501)
        days = [(day, "*") for day in ("*", "1", "15,28")] + [("*", weekday) for weekday in ("mon-fri", "0,6")]
        table = [f"{minute} {hour} {day} {month} {weekday}" for minute in ("0", "*/10", "5-55/25", "7,37") for hour in ("*", "3", "8-18/5")
                 for day, weekday in days for month in ("*", "1-3", "dec")]
        lines = [line.strip() for line in self.CRONTABS] + table + [self.generated_crontab(generated) for _ in range(200)]
        for index, line in enumerate(lines):
            zones = self.ZONES if index < len(self.CRONTABS) else [self.ZONES[index % 5]]
            for name in zones:
                zone = zoneinfo.ZoneInfo(name)
                for start in self.starts(zone) if index < len(self.CRONTABS) else self.starts(zone)[index % 10:index % 10 + 1]:
                    with self.subTest(line=line, zone=name, start=start):
                        theirs = croniter(line, datetime.datetime.fromtimestamp(start, zone))
                        wanted = [theirs.get_next(datetime.datetime).timestamp() for _ in range(5)]
                        trigger = fnserve.parse_schedule(line, name, start)
                        mine = self.mine(trigger, start, 5)
                        count += 1
                        if mine != wanted:
                            self.assertTrue(any(self.in_gap(moment, zone) for moment in mine + wanted), (mine, wanted))
        self.assertGreater(count, 600)

    @staticmethod
    def in_gap(moment: float, zone) -> bool:
        """Tell whether the clock was put forward within the hours before."""
        import datetime
        offsets = [datetime.datetime.fromtimestamp(moment - back, zone).utcoffset() for back in (0, 4 * 3600)]
        return offsets[0] > offsets[1]

    @staticmethod
    def generated_crontab(seeded: random.Random) -> str:
        """Make a crontab line that both read alike: no a-a, no */n beside the other kind of day."""
        parts = [TriggerTest.generated_field(seeded, *span) for span in ((0, 59), (0, 23), (1, 28), (1, 12), (0, 6))]
        for index in (2, 3, 4):
            if seeded.random() < .6 or index == 4 and parts[2].startswith("*/") or index == 4 and parts[4].startswith("*/") and parts[2] != "*":
                parts[index] = "*"
        return " ".join(parts)

    @staticmethod
    def generated_field(seeded: random.Random, least: int, most: int) -> str:
        """Make one field."""
        first = seeded.randint(least, most - 1)
        last = seeded.randint(first + 1, most)
        return seeded.choice(["*", "*", f"*/{seeded.randint(1, (most - least) // 2)}", str(first), f"{first}-{last}",
                              f"{first}-{last}/{seeded.randint(1, max(1, min(5, last - first)))}", f"{first},{last}"])

    def test_fields_agree_with_apscheduler(self):
        cron = module("apscheduler.triggers.cron").CronTrigger
        import datetime
        import zoneinfo
        seeded, cases = random.Random(20260502), [(fields, name) for fields in self.FIELDS for name in self.ZONES]
        spans = {"month": (1, 12), "day": (1, 28), "week": (1, 53), "day_of_week": (0, 6), "hour": (0, 23), "minute": (0, 59), "second": (0, 59)}
        for number in range(220):
            fields = {name: self.generated_field(seeded, *span) for name, span in spans.items()
                      if seeded.random() < (.15 if name == "week" else .45)}
            cases.append((fields or {"minute": 5}, self.ZONES[number % 5]))
        for index, (fields, name) in enumerate(cases):
            zone = zoneinfo.ZoneInfo(name)
            for start in self.starts(zone) if index < 20 else [self.starts(zone)[index % 10]]:
                theirs, previous, now, wanted = cron(timezone=zone, **fields), None, datetime.datetime.fromtimestamp(start + 1e-6, zone), []
                while len(wanted) < 5 and (previous := theirs.get_next_fire_time(previous, now)):
                    wanted.append(previous.timestamp())
                    now = previous
                with self.subTest(fields=fields, zone=name, start=start):
                    self.assertEqual(self.mine(fnserve.Trigger("cron", fields, name, start), start, 5), wanted)

    def test_intervals_and_dates(self):
        interval = module("apscheduler.triggers.interval").IntervalTrigger
        import datetime
        import zoneinfo
        zone = zoneinfo.ZoneInfo("Europe/Berlin")
        start = datetime.datetime(2026, 10, 24, 12, tzinfo=zone)
        theirs, wanted, previous = interval(hours=7, minutes=30, start_date=start, timezone=zone), [], None
        for _ in range(6):
            previous = theirs.get_next_fire_time(previous, previous or start)
            wanted.append(previous.timestamp())
        trigger = fnserve.Trigger("interval", {"hours": 7, "minutes": 30, "start_date": "2026-10-24 12:00"}, "Europe/Berlin", 0)
        self.assertEqual(self.mine(trigger, start.timestamp() - 1, 6), wanted)
        self.assertEqual(self.mine(fnserve.parse_schedule("every 30s", "UTC", 1000), 1000, 3), [1030, 1060, 1090])
        once = fnserve.Trigger("date", {"run_date": "2026-01-01T00:00:00Z"}, "UTC", 0)
        self.assertEqual((once.next(0), once.next(1767225600)), (1767225600, None))
        bounded = fnserve.Trigger("interval", {"seconds": 10, "end_date": 35}, "UTC", 0)
        self.assertEqual(self.mine(bounded, 0, 9), [10, 20, 30])

    def test_never_and_nonsense(self):
        self.assertIsNone(fnserve.parse_schedule("0 0 31 2 *", "UTC", 0).next(self.clock.now))
        for value, field in (("61 * * * *", "minute"), ("* 24 * * *", "hour"), ("* * 0 * *", "day"), ("* * * 13 *", "month"), ("* * * * 8", "day_of_week"),
                             ("* * * * moon", "day_of_week"), ("*/0 * * * *", "minute"), ("5-1 * * * *", "minute"), ("* * * *", "schedule"),
                             ("every 0s", "schedule"), ("sometimes", "schedule"), ({"minutes": "x"}, "minutes"), ({"hour": 25}, "hour"),
                             ({"nope": 1, "hour": 1}, "nope"), ({"trigger": "moon"}, "trigger"), ({"run_date": "tomorrow"}, "run_date"),
                             ({"hour": 1, "timezone": "Mars/Base"}, "timezone"), ({"day": "6th mon"}, "day"), ({"seconds": -1}, "seconds"),
                             ({"day": "last moonday"}, "day_of_week"), ({"hour": 1, "jitter": "much"}, "jitter"), (5, "schedule")):
            with self.subTest(value=value), self.assertRaises(fnserve.TriggerError) as caught:
                fnserve.parse_schedule(value, "UTC", 0)
            self.assertEqual(caught.exception.field, field, value)


# == 11 QUEUE =============================================================


class QueueCase(Case):
    """An app whose queue is only run by `drain`."""

    def drain(self, app, seconds: float = 0) -> None:
        """Let everything that is due run, as the threads would."""
        self.clock.now += seconds
        while (row := app.queue.claim(self.clock.now)) is not None:
            fnserve.run_queued(app, row)

    def make_app(self, **settings: object):
        """Make an app whose queue is only run by `drain`."""
        app = super().make_app(**settings)
        self.stop(app)
        app.runner.poke = lambda: None
        return app


class RunnerTest(Case):
    def test_calls_of_one_function_follow_each_other(self):
        """A thread that finds nothing, since a function has its share, is not asked again: who has run a call looks for the next."""
        self.write("f", "import os, time\nSETTINGS = {'async': True}\ndef main(request):\n    while not os.path.exists('looked'): time.sleep(.01)")
        app = self.make_app(THREADS=4)  # two threads of the queue, of which one function has one
        claim = app.queue.claim
        app.queue.claim = lambda *args: claim(*args) or (self.dir / "looked").touch()
        app.runner.poke = lambda: None
        for _ in range(5):
            self.assertEqual(self.call(app, "POST", "/function/f").status_code, 202)
        app.background.stopping.set()  # nobody pokes them later
        del app.runner.poke
        app.runner.poke()
        wait_until(lambda: {row["state"] for row in self.admin(app).get("/admin/queue").json["calls"]} == {"done"})


class QueueTest(QueueCase):
    def test_charts_count_a_queued_call_once(self):
        self.write("f", "SETTINGS = {'async': True}\ndef main(request): return 'x'")
        app = self.make_app()
        for _ in range(3):
            self.assertEqual(self.call(app, "POST", "/function/f").status_code, 202)
        self.drain(app)
        self.assertEqual(self.admin(app).get("/function/show_stats").json["stats"], {"f": 3})
        page = self.client(app, Authorization="Bearer " + TOKEN, Accept="text/html", Accept_Language="en").get("/function/list_functions").text
        self.assertIn("Last hour: 3<", page)

    def test_a_call_is_accepted_and_run(self):
        self.write("slow", "def main(request):\n    return {'got': request.get_json(), 'path': request.full_path, 'x': request.headers['X-A'],"
                           " 'host': request.host}, 201")
        app = self.make_app()
        answer = self.call(app, "POST", "/function/slow/sub?a=1", json={"b": 2}, headers={"Prefer": "respond-async", "X-A": "y"})
        self.assertEqual((answer.status_code, answer.headers["Preference-Applied"]), (202, "respond-async"))
        self.assertEqual(answer.headers["Location"], "/invocations/" + answer.json["id"])
        self.assertEqual(answer.json["status_url"], "http://localhost/invocations/" + answer.json["id"])
        url = answer.headers["Location"]
        self.assertEqual(self.call(app, "GET", url).json["state"], "waiting")
        self.drain(app)
        shown = self.call(app, "GET", url).json
        self.assertEqual((shown["state"], shown["attempts"], shown["status"], shown["function"], shown["error"]), ("done", 1, 201, "slow", None))
        self.assertEqual(json.loads(shown["body"]), {"got": {"b": 2}, "path": "/function/slow/sub?a=1", "x": "y", "host": "localhost"})
        self.assertEqual(self.call(app, "GET", "/invocations/" + "0" * 32).status_code, 404)
        self.assertEqual(self.admin(app).get("/function/show_stats").json["stats"], {"slow": 1})  # accepted and run is one call

    def test_failures_are_retried_and_then_dead(self):
        self.write("bad", "SETTINGS = {'async': True}\ndef main(request, context):\n    print(context.trigger, context.attempt)\n    1/0")
        app = self.make_app()
        url = self.call(app, "POST", "/function/bad").headers["Location"]
        waits = []
        for attempt in range(1, 5):
            self.drain(app)
            shown = self.call(app, "GET", url).json
            self.assertEqual((shown["state"], shown["attempts"]), ("waiting" if attempt < 4 else "dead", attempt))
            if attempt < 4:
                waits.append(app.queue.next_due() - self.clock.now)
                self.clock.now += waits[-1]
        for wait, middle in zip(waits, (1, 2, 4)):
            self.assertTrue(middle / 2 <= wait <= middle * 1.5, waits)
        self.assertEqual(shown["error"], "Function execution failed")  # the traceback is for the admin
        [row] = self.admin(app).get("/admin/queue?state=dead").json["calls"]
        self.assertIn("ZeroDivisionError", row["error"])
        outputs = [row["output"] for row in self.admin(app).get("/admin/logs").json["invocations"] if row["output"]]
        self.assertEqual(outputs, [f"async {n}\n" for n in (4, 3, 2, 1)])

    def test_retry_replay_discard(self):
        self.write("flaky", "SETTINGS = {'async': True, 'retries': 0}\ndef main(request): 1/0")
        app = self.make_app()
        number = self.call(app, "POST", "/function/flaky", data=b"x").json["id"]
        self.drain(app)
        admin = self.admin(app)
        self.assertEqual(admin.get("/admin/queue").json["calls"][0]["state"], "dead")
        self.write("flaky", "SETTINGS = {'async': True}\ndef main(request): return request.data")
        self.assertEqual(admin.post("/admin/queue", json={"id": number, "action": "retry"}).status_code, 200)
        self.drain(app)
        self.assertEqual(self.call(app, "GET", f"/invocations/{number}").json["attempts"], 2)
        again = admin.post("/admin/queue", json={"id": number, "action": "replay"}).json["id"]
        self.assertNotEqual(again, number)
        self.drain(app)
        self.assertEqual(self.call(app, "GET", f"/invocations/{again}").json["body"], "x")
        self.assertEqual(admin.post("/admin/queue", json={"id": number, "action": "discard"}).status_code, 200)
        self.assertEqual(admin.post("/admin/queue", json={"id": number, "action": "discard"}).status_code, 404)
        self.assertEqual(admin.post("/admin/queue", json={"id": number, "action": "eat"}).status_code, 400)

    def test_repeats_within_a_day_are_the_first_call(self):
        self.write("hook", "SETTINGS = {'async': True, 'dedupe': 'X-GitHub-Delivery'}\ndef main(request): return 'x'")
        app = self.make_app()

        def post(**headers: str) -> str:
            return self.call(app, "POST", "/function/hook", headers={k.replace("_", "-"): v for k, v in headers.items()}).json["id"]
        first = post(X_GitHub_Delivery="1")
        self.assertEqual(post(X_GitHub_Delivery="1"), first)
        self.drain(app)
        self.assertEqual(post(X_GitHub_Delivery="1"), first)
        self.assertNotEqual(post(X_GitHub_Delivery="2"), first)
        self.assertEqual(post(Idempotency_Key="k"), post(Idempotency_Key="k"))
        self.clock.now += 86401
        self.assertNotEqual(post(X_GitHub_Delivery="1"), first)

    def test_limits_and_refusals(self):
        self.write("f", "def main(request): return 'x'")
        self.write("never", "SETTINGS = {'async': False}\ndef main(request): return 'x'")
        app = self.make_app(QUEUE_MAX=2)
        ask = {"headers": {"Prefer": "respond-async, wait=5"}}
        self.assertEqual([self.call(app, "POST", "/function/f", **ask).status_code for _ in range(3)], [202, 202, 503])
        self.assertIn("Retry-After", self.call(app, "POST", "/function/f", **ask).headers)
        self.assertEqual(self.call(app, "POST", "/function/never", **ask).status_code, 200)
        self.assertEqual(self.call(app, "POST", "/function/nope", **ask).status_code, 404)
        self.assertEqual(self.call(app, "POST", "/function/f", data=b"x" * 10, headers={**ask["headers"], "Content-Length": "99999999"}).status_code, 413)

    def test_a_full_disk_passes(self):
        self.write("f", "SETTINGS = {'async': True}\ndef main(request): return 'x'")
        app, real, failed = Case.make_app(self), fnserve.lock_file, []

        def lock_file(path):
            if "runner" in path and len(failed) < 20:
                failed.append(path)
                raise OSError("no space left on device")
            return real(path)
        with unittest.mock.patch.object(fnserve, "lock_file", lock_file):
            self.assertEqual({self.call(app, "POST", "/function/f").code for _ in range(20)}, {202})
            wait_until(lambda: not app.store.read("SELECT 1 FROM fn_queue WHERE state <> 'done'"), 60)

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "needs /proc")
    def test_nothing_drops_the_locks_of_the_database(self):
        """Who closes a file of SQLite's drops its locks; the next process that leaves would delete what is in the WAL."""
        self.write("f", "SETTINGS = {'async': True}\ndef main(request): return 'x'")
        app = self.make_app()
        self.assertEqual(self.call(app, "POST", "/function/f").code, 202)
        for path in ("/admin/data", "/admin/data?table=call_stats", "/function/list_functions", "/admin/queue", "/health"):
            self.assertEqual(self.admin(app).get(path).code, 200, path)
        other = "import sqlite3; db = sqlite3.connect('serverless.db'); db.execute('SELECT 1 FROM call_stats').fetchall(); db.close()"
        subprocess.run([sys.executable, "-c", other], cwd=self.dir, check=True)
        opened = []
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # that of the listing itself
                opened.append(os.readlink(entry))
        self.assertEqual([path for path in opened if str(self.dir) in path and path.endswith("(deleted)")], [])
        (self.dir / "serverless.db").read_bytes()  # as a function may
        subprocess.run([sys.executable, "-c", other], cwd=self.dir, check=True)
        app.store.follow()
        self.assertEqual(self.call(app, "POST", "/function/f").code, 202)
        count = "import sqlite3; print(sqlite3.connect('serverless.db').execute('SELECT count(*) FROM fn_queue').fetchone()[0])"
        self.assertEqual(subprocess.run([sys.executable, "-c", count], cwd=self.dir, capture_output=True).stdout, b"2\n")

    def test_a_shortage_of_threads_passes(self):
        self.write("f", "SETTINGS = {'async': True}\ndef main(request): return 'x'")
        app = Case.make_app(self)
        real = threading.Thread.start

        def start(thread):
            if thread.name == "fnserve queue":
                raise RuntimeError("can't start new thread")
            real(thread)
        with unittest.mock.patch.object(threading.Thread, "start", start):
            self.assertEqual({self.call(app, "POST", "/function/f").code for _ in range(20)}, {202})
        wait_until(lambda: not app.store.read("SELECT 1 FROM fn_queue WHERE state <> 'done'"))

    def test_enqueue(self):
        self.write("fan", "from fnserve import enqueue\ndef main(request):\n    return [enqueue('leaf', json={'n': n}, query={'q': 1},"
                          " headers={'X-A': 'b'}, delay=n) for n in range(3)]")
        self.write("leaf", "def main(request): return [request.json['n'], request.args['q'], request.headers['X-A'], request.method]")
        app = self.make_app()
        ids = self.call(app, "GET", "/function/fan").json
        self.drain(app)
        states = lambda: [self.call(app, "GET", f"/invocations/{number}").json["state"] for number in ids]  # noqa: E731
        self.assertEqual(states(), ["done", "waiting", "waiting"])
        self.drain(app, 3)
        self.assertEqual(states(), ["done"] * 3)
        self.assertEqual(json.loads(self.call(app, "GET", f"/invocations/{ids[2]}").json["body"]), [2, "1", "b", "POST"])
        self.write("odd", "from fnserve import enqueue\ndef main(request): enqueue('nope')")
        self.assertEqual(self.call(app, "GET", "/function/odd").status_code, 500)

    def test_order_is_by_due_time(self):
        self.write("f", "SETTINGS = {'async': True}\nseen = []\ndef main(request):\n    seen.append(request.args['n']); return seen")
        app = self.make_app()
        for number in range(5):
            self.clock.now += 1
            last = self.call(app, "POST", f"/function/f?n={number}")
        self.drain(app)
        self.assertEqual(json.loads(self.call(app, "GET", last.headers["Location"]).json["body"]), list("01234"))

    def test_calls_of_a_dead_process_are_given_back_at_once(self):
        self.write("f", "SETTINGS = {'async': True}\ndef main(request): return 'x'")
        app = self.make_app()
        url = self.call(app, "POST", "/function/f").headers["Location"]
        child = os.fork()
        if not child:
            app.queue.claim(self.clock.now)
            os._exit(0)
        os.waitpid(child, 0)
        self.assertEqual(self.call(app, "GET", url).json["state"], "running")
        app.background.step(self.clock.now)
        self.assertEqual(self.call(app, "GET", url).json["state"], "waiting")

    def test_auth_is_checked_before_a_call_is_queued(self):
        self.write("f", "SETTINGS = {'async': True, 'auth': 'login', 'methods': ['POST'], 'rate': '1/day'}\ndef main(request): return 'x'")
        self.write("inner", "SETTINGS = {'auth': 'internal'}\ndef main(request, context): return context.trigger")
        self.write("go", "from fnserve import enqueue\ndef main(request): return enqueue('inner')")
        app = self.make_app()
        self.assertEqual(self.call(app, "POST", "/function/f").status_code, 401)
        answer = self.admin(app).post("/function/f")
        self.assertEqual(answer.status_code, 202)
        self.drain(app)
        self.assertEqual(self.call(app, "GET", answer.headers["Location"]).json["state"], "done")
        number = self.call(app, "GET", "/function/go").data.decode()
        self.drain(app)
        self.assertEqual(self.call(app, "GET", f"/invocations/{number}").json["body"], "async")

    def test_odd_failures_end_as_failures(self):
        self.write("breaks", "SETTINGS = {'async': True, 'retries': 0}\ndef main(request):\n    yield 'a'\n    1/0")
        self.write("odd", "SETTINGS = {'async': True, 'retries': 0}\ndef main(request): raise ValueError(request.get_json()['n'])")
        self.write("endless", "SETTINGS = {'async': True}\ndef main(request):\n    while True: yield 'x' * 100_000")
        app = self.make_app()
        urls = [self.call(app, "POST", f"/function/{name}", data=b'{"n": "\\ud800"}', headers={"Content-Type": "application/json"})
                .headers["Location"] for name in ("breaks", "odd", "endless")]
        self.drain(app)
        found = [self.call(app, "GET", url).json for url in urls]
        self.assertEqual([row["state"] for row in found], ["dead", "dead", "done"])
        self.assertEqual(len(found[2]["body"]), fnserve.ANSWER_BYTES)

    def test_a_call_that_kills_its_process_is_dead_in_the_end(self):
        self.write("f", "SETTINGS = {'async': True}\ndef main(request): return 'x'")
        app = self.make_app()
        url = self.call(app, "POST", "/function/f").headers["Location"]
        for _ in range(4):
            child = os.fork()
            if not child:
                app.queue.claim(self.clock.now)
                os._exit(0)
            os.waitpid(child, 0)
            app.queue.reclaim(app.functions.retries)
        answer = self.call(app, "GET", url).json
        self.assertEqual((answer["state"], answer["error"]), ("dead", "Function execution failed"))

    def test_a_dead_process_costs_no_more_than_a_failure(self):
        """The function's own retries count, whatever ended the run."""
        self.write("often", "SETTINGS = {'async': True, 'retries': 6}\ndef main(request): return 'x'")
        self.write("never", "SETTINGS = {'async': True, 'retries': 0}\ndef main(request): return 'x'")
        app = self.make_app()
        for name, runs in (("often", 7), ("never", 1)):
            url, tried = self.call(app, "POST", f"/function/{name}").headers["Location"], 0
            while self.call(app, "GET", url).json["state"] == "waiting":
                child = os.fork()
                if not child:
                    app.queue.claim(self.clock.now)
                    os._exit(0)
                os.waitpid(child, 0)
                app.queue.reclaim(app.functions.retries)
                tried += 1
            self.assertEqual((name, tried), (name, runs))

    def test_only_the_admins_login_is_left_out(self):
        self.write("f", "from flask import session\nSETTINGS = {'async': True}\ndef main(request):\n"
                        "    return [session.get('n'), sorted(request.cookies), '_login' in session]")
        self.write("in", "from flask import session\ndef main(request):\n    session['n'] = 1\n    return 'x'")
        app = self.make_app()
        visitor, admin = self.client(app), self.client(app)
        visitor.get("/function/in")
        admin.post("/login", json={"token": TOKEN})
        for client, seen in ((visitor, [1, ["mine", "session"], False]), (admin, [None, ["mine"], False])):
            client.cookies["mine"] = "1"
            url = client.post("/function/f").headers["Location"]
            self.drain(app)
            self.assertEqual(json.loads(self.call(app, "GET", url).json["body"]), seen)

    def test_why_a_call_failed_is_for_the_admin(self):
        self.write("f", "SETTINGS = {'async': True}\nclass Parts:\n    def __iter__(self): return iter(['x'])\n"
                        "    def close(self): raise RuntimeError('hunter2')\ndef main(request):\n    from fnserve import Response\n    return Response(Parts())")
        app = self.make_app()
        url = self.call(app, "POST", "/function/f").headers["Location"]
        self.drain(app)
        self.assertNotIn("hunter2", self.call(app, "GET", url).text)

    def test_what_is_not_kept_of_a_call_is_said(self):
        self.write("f", "SETTINGS = {'async': True}\ndef main(request): return 'x' * 3_000_000")
        app = self.make_app()
        admin = self.admin(app)
        url = admin.post("/function/f", data="y" * 70_000).headers["Location"]
        self.drain(app)
        answer = admin.get(url).json
        self.assertEqual((answer["state"], len(answer["body"])), ("done", fnserve.ANSWER_BYTES))
        self.assertIn("is not kept", answer["error"])
        for action, status in (("replay", 409), ("retry", 409), ("discard", 200), ("discard", 404)):
            self.assertEqual(admin.post("/admin/queue", json={"id": answer["id"], "action": action}).status_code, status, action)

    def test_a_key_is_of_its_request(self):
        self.write("f", "SETTINGS = {'async': True}\ndef main(request): return 'x'")
        app = self.make_app()
        ids = {self.call(app, method, path, headers={"Idempotency-Key": "1", **more}).json["id"] for method, path, more in (
            ("POST", "/function/f/a", {}), ("POST", "/function/f/b", {}), ("DELETE", "/function/f/a", {}),
            ("POST", "/function/f/a", {"Authorization": "Bearer other"}))}
        self.assertEqual(len(ids), 4)

    def test_secrets_are_not_shown_nor_kept(self):
        self.write("f", "SETTINGS = {'async': True}\ndef main(request): return 'x', 200, {'X-Api-Key': 'hidden1', 'Set-Cookie': 'a=hidden2'}")
        app = self.make_app()
        number = self.admin(app).post("/function/f?token=hidden3", headers={"X-Shopify-Hmac-Sha256": "hidden4",
                                                                          "Referer": "http://x/?key=hidden5"}).json["id"]
        self.drain(app)
        shown = self.admin(app).get(f"/admin/queue?id={number}").text
        self.assertNotIn("hidden", shown)
        self.assertNotIn("hidden", self.admin(app).get("/admin/data/fn_queue").text)
        self.assertIn("X-Shopify-Hmac-Sha256", shown)
        self.assertNotIn(TOKEN.encode(), b"".join(path.read_bytes() for path in self.dir.glob("serverless.db*")))
        self.assertEqual((self.dir / "serverless.db").stat().st_mode & 0o077, 0)

    def test_answers_of_the_gate_are_not_the_functions_errors(self):
        self.write("f", "import functions_framework\nSETTINGS = {'cors': '*', 'auth': 'login'}\ndef main(request): 1/0\n"
                        "@functions_framework.errorhandler(Exception)\ndef all_(error): return 'mine', 418")
        app = self.make_app()
        ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        self.assertEqual(self.call(app, "OPTIONS", "/function/f", headers=ask).status_code, 204)
        self.assertEqual(self.call(app, "GET", "/function/f").status_code, 401)
        self.assertEqual(self.admin(app).get("/function/f").status_code, 418)

    def test_calls_that_come_together_share_a_commit(self):
        self.write("f", "SETTINGS = {'async': True}\ndef main(request): return 'x'")
        app = self.make_app(THREADS=32)
        real, count, codes = app.store.write, [], []

        def write(durable: bool = False):
            count.append(durable)
            return real(durable)
        app.store.write = write
        senders = [threading.Thread(target=lambda: codes.append(fnserve.Client(app).post("/function/f").status_code)) for _ in range(16)]
        self.call(app, "POST", "/function/f")
        with real():  # one commit under way, as on a slow disk: the others come meanwhile
            for sender in senders:
                sender.start()
            wait_until(lambda: len(app.queue._waiting) == 15)
        for sender in senders:
            sender.join()
        self.assertEqual(codes, [202] * 16)
        self.assertEqual(count.count(True), 3)  # the first call; the one that waited for the lock; the other fifteen at once

    def test_binary_answers(self):
        self.write("f", "SETTINGS = {'async': True}\ndef main(request): return b'\\xff\\x00'")
        app = self.make_app()
        url = self.call(app, "POST", "/function/f").headers["Location"]
        self.drain(app)
        self.assertEqual(self.call(app, "GET", url).json["body_base64"], "/wA=")


# == 12 SCHEDULE ==========================================================


class ScheduleTest(QueueCase):
    def test_settings_schedule(self):
        self.write("tick", "SETTINGS = {'schedule': 'every 30s'}\ndef main(request, context): return context.trigger")
        app = self.make_app()
        app.background.step(self.clock.now)
        [job] = self.admin(app).get("/scheduler/jobs").json
        self.assertEqual((job["id"], job["func"], job["trigger"], job["seconds"], job["source"]), ("tick", "tick", "interval", 30, "code"))
        for _ in range(3):
            self.clock.now += 30
            app.background.step(self.clock.now)
            self.drain(app)
        runs = self.admin(app).get("/admin/queue").json["calls"]
        self.assertEqual([run["state"] for run in runs], ["done"] * 3)
        self.write("tick", "SETTINGS = {'schedule': '0 5 * * *'}\ndef main(request): return 'x'")
        self.clock.now += 600  # functions are looked at the less often the longer that takes
        app.background.step(self.clock.now)
        self.assertEqual(self.admin(app).get("/scheduler/jobs/tick").json["hour"], "5")
        (self.dir / "functions" / "tick.py").unlink()
        self.clock.now += 600
        app.background.step(self.clock.now)
        self.assertEqual(self.admin(app).get("/scheduler/jobs").json, [])

    def test_a_bad_schedule_is_a_load_error(self):
        self.write("f", "SETTINGS = {'schedule': '99 * * * *'}\ndef main(request): return 'x'")
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/function/f").status_code, 500)
        self.assertIn("minute", str(app.functions.get("f").error))

    def test_rest(self):
        self.write("reports", "import json\ndef main(request): return request.json\ndef daily(a, b=0): return {'sum': a + b}")
        app = self.make_app()
        admin = self.admin(app)
        self.assertEqual(admin.get("/scheduler").json, {"current_host": socket.gethostname(), "allowed_hosts": ["*"], "running": True})
        made = admin.post("/scheduler/jobs", json={"id": "a", "func": "reports:daily", "args": [1], "kwargs": {"b": 2}, "trigger": "cron",
                                                   "hour": 5, "timezone": "UTC"})
        self.assertEqual(made.status_code, 200)
        self.assertEqual({name: made.json[name] for name in ("id", "name", "func", "args", "kwargs", "trigger", "hour", "max_instances", "coalesce")},
                         {"id": "a", "name": "a", "func": "reports:daily", "args": [1], "kwargs": {"b": 2}, "trigger": "cron", "hour": 5,
                          "max_instances": 1, "coalesce": True})
        self.assertTrue(made.json["next_run_time"].endswith("T05:00:00+00:00"))
        self.assertEqual(admin.post("/scheduler/jobs", json={"id": "a", "func": "reports", "trigger": "interval", "seconds": 5}).status_code, 409)
        for sent, field in (({"func": "1x", "trigger": "interval"}, "func"), ({"func": "reports", "trigger": "cron", "hour": 77}, "hour"),
                            ({"func": "reports"}, "trigger"), ({"func": "reports", "trigger": "cron", "moon": 1}, "moon"),
                            ({"func": "reports", "trigger": "date", "run_date": "x"}, "run_date"), ({"func": "reports", "args": 5}, "args"),
                            ({"func": "reports", "trigger": "interval", "seconds": 5, "max_instances": 0}, "max_instances")):
            answer = admin.post("/scheduler/jobs", json=sent)
            self.assertEqual((answer.status_code, answer.json["field"]), (400, field), answer.json)
        self.assertEqual(admin.patch("/scheduler/jobs/a", json={"hour": 6}).json["hour"], 6)
        self.assertEqual(admin.patch("/scheduler/jobs/a", json={"name": "b"}).json["name"], "b")
        self.assertIsNone(admin.post("/scheduler/jobs/a/pause").json["next_run_time"])
        self.assertIsNotNone(admin.post("/scheduler/jobs/a/resume").json["next_run_time"])
        self.assertEqual(admin.post("/scheduler/jobs/a/run").status_code, 200)
        self.drain(app)
        [run] = admin.get("/admin/queue").json["calls"]
        self.assertEqual(json.loads(self.call(app, "GET", "/invocations/" + run["id"]).json["body"]), {"sum": 3})
        self.assertEqual(admin.delete("/scheduler/jobs/a").status_code, 204)
        for method, path in (("GET", ""), ("DELETE", ""), ("PATCH", ""), ("POST", "/pause"), ("POST", "/run")):
            self.assertEqual(admin.open("/scheduler/jobs/a" + path, method, json={}).status_code, 404)
        self.assertEqual(self.call(app, "GET", "/scheduler/jobs").status_code, 401)
        import base64
        basic = {"Authorization": "Basic " + base64.b64encode(f"any:{TOKEN}".encode()).decode()}
        self.assertEqual(self.call(app, "GET", "/scheduler/jobs", headers=basic).status_code, 200)
        self.assertEqual(self.call(app, "GET", "/scheduler/jobs", headers={**basic, "Sec-Fetch-Site": "cross-site"}).status_code, 403)
        self.assertEqual(self.call(app, "GET", "/admin/logs", headers=basic).status_code, 401)

    def test_a_date_that_is_now_or_just_past(self):
        self.write("f", "def main(request): return 'x'")
        app = self.make_app()
        admin = self.admin(app)
        past = datetime.datetime.fromtimestamp(self.clock.now - 20, datetime.timezone.utc).isoformat()
        for fields, calls, missed in (({}, 1, 0), ({"run_date": past}, 2, 0), ({"run_date": past, "misfire_grace_time": 10}, 2, 1)):
            self.assertEqual(admin.post("/scheduler/jobs", json={"id": "j", "func": "f", "trigger": "date", **fields}).status_code, 200)
            app.schedule.step(self.clock.now)
            self.drain(app)
            self.assertEqual(admin.get("/scheduler/jobs/j").status_code, 404)  # it never fires again
            self.assertEqual(len(admin.get("/admin/queue").json["calls"]), calls)
            self.assertIn(f"fnserve_job_runs_missed_total {missed}\n", self.call(app, "GET", "/metrics").text)

    def test_started_and_late_are_of_the_start(self):
        self.write("f", "def main(request): return 'x'")
        app = self.make_app()
        admin = self.admin(app)
        admin.post("/scheduler/jobs", json={"id": "j", "func": "f", "trigger": "interval", "seconds": 10})
        for wait in (1, 9):
            self.clock.now += 10
            app.schedule.step(self.clock.now)
            self.drain(app, wait)
        job = admin.get("/scheduler/jobs/j").json
        self.assertEqual([job[name] for name in ("planned", "started", "late", "skipped", "missed")], [2, 2, 1, 0, 0])

    def test_a_run_begins_though_the_database_is_locked(self):
        self.write("f", "def main(request): return 'x'")
        app = self.make_app()
        self.admin(app).post("/scheduler/jobs", json={"id": "j", "func": "f", "trigger": "interval", "seconds": 10})
        self.clock.now += 10
        app.schedule.step(self.clock.now)
        row = app.queue.claim(self.clock.now)
        with unittest.mock.patch.object(app.schedule, "count_start", side_effect=sqlite3.OperationalError("database is locked")):
            fnserve.run_queued(app, row)
        self.assertEqual(self.admin(app).get("/admin/queue").json["calls"][0]["state"], "done")

    def test_a_database_from_before_a_column(self):
        with contextlib.closing(sqlite3.connect(self.dir / "serverless.db")) as db, db:
            db.execute("CREATE TABLE fn_jobs " + fnserve.SCHEDULE_TABLES["fn_jobs"].replace(" started INTEGER NOT NULL DEFAULT 0,", ""))
        self.assertEqual(self.admin(self.make_app()).get("/scheduler/jobs").json, [])

    def test_a_job_is_sent_back_as_it_came(self):
        self.write("f", "def main(request): return 'x'")
        app = self.make_app()
        admin = self.admin(app)
        job = admin.post("/scheduler/jobs", json={"id": "j", "func": "f", "trigger": "cron", "hour": 4}).json
        self.assertEqual(admin.patch("/scheduler/jobs/j", json=job).json, job)
        self.assertEqual(admin.post("/scheduler/jobs", json={**job, "id": "k"}).json["next_run_time"], job["next_run_time"])
        self.assertTrue(admin.post("/scheduler/jobs", json={**job, "id": "p", "next_run_time": None}).json["paused"])
        changed = admin.patch("/scheduler/jobs/j", json={"minute": 5}).json
        self.assertEqual((changed["hour"], changed["minute"]), (4, 5))  # the others stay
        refused = admin.patch("/scheduler/jobs/j", json={"bogus": 5})
        self.assertEqual((refused.status_code, refused.json["field"]), (400, "bogus"))
        self.assertEqual(admin.post("/scheduler/jobs/j/run", headers={"Content-Type": "application/json"}).status_code, 200)
        refused = admin.get("/scheduler/jobs/j/run")
        self.assertEqual((refused.status_code, refused.headers["Allow"]), (405, "POST"))

    def test_a_schedule_that_is_wrong_is_seen_though_nobody_calls(self):
        self.write("wrong", "SETTINGS = {'schedule': '61 * * * *'}\ndef main(request): return 'x'")
        self.write("misspelt", "SETTINGS = {'shedule': '@hourly'}\ndef main(request): return 'x'")
        app = self.make_app()
        self.call(app, "GET", "/health")
        app.background.step(self.clock.now)
        found = {row["name"]: row for row in self.admin(app).get("/function/list_functions").json["functions"]}
        self.assertEqual([found[name]["status"] for name in ("wrong", "misspelt")], ["broken", "broken"])
        self.assertIn("shedule", found["misspelt"]["reason"])
        self.assertIn("wrong: its SETTINGS['schedule'] can't be used: minute", (self.dir / "serverless_error.log").read_text())

    def test_missed_skipped_coalesced(self):
        self.write("f", "def main(request): return 'x'")
        app = self.make_app()
        admin = self.admin(app)
        admin.post("/scheduler/jobs", json={"id": "j", "func": "f", "trigger": "interval", "seconds": 10, "misfire_grace_time": 25})
        self.clock.now += 100.5
        app.schedule.step(self.clock.now)  # 10 were due: the last three within the grace become one
        job = admin.get("/scheduler/jobs/j").json
        self.assertEqual([job[name] for name in ("planned", "missed", "skipped", "late")], [10, 7, 0, 0])
        self.clock.now += 10
        app.schedule.step(self.clock.now)  # that one still waits
        self.assertEqual(admin.get("/scheduler/jobs/j").json["skipped"], 1)
        self.drain(app)
        self.clock.now += 10
        app.schedule.step(self.clock.now)
        self.drain(app)
        self.assertEqual(len(admin.get("/admin/queue").json["calls"]), 2)
        self.clock.now -= 7200  # the clock is put back by two hours: the job does not wait for them
        app.schedule.step(self.clock.now)
        self.clock.now += 10
        app.schedule.step(self.clock.now)
        self.assertEqual(admin.get("/scheduler/jobs/j").json["planned"], 13)
        self.clock.now += 50 * 365 * 86400  # and put forward by years
        began = time.monotonic()
        app.schedule.step(self.clock.now)
        self.assertLess(time.monotonic() - began, 5)
        self.assertGreater(admin.get("/scheduler/jobs/j").json["missed"], 500)

    def test_times_that_no_calendar_has(self):
        self.write("f", "def main(request): return 'x'")
        self.write("bad", "SETTINGS = {'schedule': {'hour': 1, 'start_date': 1763700000000}}\ndef main(request): return 'x'")
        self.write("good", "SETTINGS = {'schedule': 'every 1s'}\ndef main(request): return 'x'")
        app = self.make_app()
        admin = self.admin(app)
        for fields in ({"trigger": "interval", "weeks": 999999999}, {"trigger": "date", "run_date": 1e300}, {"trigger": "date", "run_date": 1e12},
                       {"trigger": "cron", "hour": 1, "start_date": "9999-12-31T23:59:59-12:00"}, {"trigger": "cron", "second": "9" * 5000},
                       {"trigger": "interval", "seconds": "0.0000001"}, {"trigger": "interval", "seconds": 5, "misfire_grace_time": 0},
                       {"trigger": "cron", "year": "1970-9999", "day": "1st mon", "day_of_week": "tue"}):
            with self.subTest(fields=fields):
                answer = admin.post("/scheduler/jobs", json={"func": "f", **fields})
                self.assertIn(answer.status_code, (200, 400))
                self.assertEqual(admin.get("/scheduler/jobs").status_code, 200)
        app.background.step(self.clock.now)
        self.clock.now += 1.5
        app.background.step(self.clock.now)
        self.assertEqual(admin.get("/scheduler/jobs/good").json["planned"], 1)
        for number in (".", "..", " ", "a/b"):
            self.assertEqual(admin.post("/scheduler/jobs", json={"id": number, "func": "f", "trigger": "interval", "seconds": 5}).status_code, 400)
        self.assertEqual([admin.get(path).status_code for path in ("/scheduler/xyz", "/scheduler/AAAA/good")], [404, 404])
        self.assertEqual(admin.delete("/scheduler/jobs").status_code, 405)

    def test_changes_keep_what_they_do_not_name(self):
        self.write("tick", "SETTINGS = {'schedule': '*/5 1 1 * 1'}\ndef main(request): return 'x'")
        app = self.make_app()
        admin = self.admin(app)
        app.background.step(self.clock.now)
        before = admin.get("/scheduler/jobs/tick").json
        self.assertEqual(admin.patch("/scheduler/jobs/tick", json={"name": "x"}).status_code, 409)  # the file says what it is
        self.assertEqual(admin.delete("/scheduler/jobs/tick").status_code, 409)
        made = admin.post("/scheduler/jobs", json={"id": "j", "func": "tick", "trigger": "interval", "hours": 1}).json
        self.clock.now += 10
        self.assertEqual(admin.patch("/scheduler/jobs/j", json={"name": "x"}).json, {**made, "name": "x"})
        self.assertEqual(admin.get("/scheduler/jobs/tick").json, before)
        admin.post("/scheduler/jobs/tick/pause")
        (self.dir / "functions" / "tick.py").write_text("SETTINGS = {'schedule': ")  # half saved: the job stays, paused as it was
        self.clock.now += 2
        app.background.step(self.clock.now)
        self.assertTrue(admin.get("/scheduler/jobs/tick").json["paused"])

    def test_catching_up_counts_all_and_runs_the_last(self):
        self.write("f", "def main(request): return 'x'")
        app = self.make_app()
        self.admin(app).post("/scheduler/jobs", json={"id": "j", "func": "f", "trigger": "interval", "seconds": 1, "misfire_grace_time": 60})
        self.clock.now += 1800.5
        app.schedule.step(self.clock.now)
        job = self.admin(app).get("/scheduler/jobs/j").json
        self.assertEqual((job["planned"], job["missed"]), (1800, 1740))
        self.assertEqual(len(self.admin(app).get("/admin/queue").json["calls"]), 1)
        self.clock.now += 10 * 365 * 86400  # a board without a clock of its own starts with a wrong one
        app.schedule.step(self.clock.now)
        self.clock.now -= 10 * 365 * 86400
        again = fnserve.Schedule(app.store, app.queue, "UTC", self.clock)
        again.step(self.clock.now)
        self.assertLess(app.store.read("SELECT next FROM fn_jobs")[0][0] - self.clock.now, 2)

    def test_protected_functions_run_by_the_schedule(self):
        self.write("list_tables", "def main(request): return 'ran'")
        app = self.make_app()
        self.admin(app).post("/scheduler/jobs", json={"id": "j", "func": "list_tables", "trigger": "interval", "seconds": 10})
        self.clock.now += 11
        app.schedule.step(self.clock.now)
        self.drain(app)
        [run] = self.admin(app).get("/admin/queue").json["calls"]
        self.assertEqual((run["state"], run["status"]), ("done", 200))

    def test_files_without_main_as_jobs(self):
        self.write("only", "loads = []\nloads.append(1)\ndef daily(n): return {'n': n, 'loads': len(loads)}")
        app = self.make_app()
        admin = self.admin(app)
        self.assertEqual(admin.post("/scheduler/jobs", json={"id": "x", "func": "only:nosuch", "trigger": "interval"}).json["field"], "func")
        self.assertEqual(admin.post("/scheduler/jobs", json={"id": "x", "func": "nosuch", "trigger": "interval"}).status_code, 400)
        admin.post("/scheduler/jobs", json={"id": "j", "func": "only:daily", "args": [7], "trigger": "interval", "seconds": 10})
        for turn in range(3):
            app.functions.get("only").tried = -9  # as if a while had passed
            self.assertEqual(self.call(app, "GET", "/function/only").status_code, 400)
            admin.post("/scheduler/jobs/j/run")
            self.drain(app)
        runs = admin.get("/admin/queue").json["calls"]
        self.assertEqual([run["status"] for run in runs], [200] * 3)

    def test_schedules_that_can_not_be_read_are_load_errors(self):
        app = self.make_app()
        for code, wanted in (("SETTINGS = {'schedule': '*/%d * * * *' % 5}\ndef main(request): return 'x'", "literal"),
                             ("SETTINGS = dict(schedule='@hourly')\ndef main(request): return 'x'", "literal"),
                             ("import functions_framework as f\nSETTINGS = {'schedule': '@hourly'}\n@f.http\ndef a(r): return 'x'\n"
                              "@f.http\ndef b(r): return 'x'", "entry"),
                             ("SETTINGS = {'schedule': '1 2'}\ndef main(request): return 'x'", "five crontab fields")):
            self.write("f", code)
            self.call(app, "GET", "/function/f")
            self.assertIn(wanted, str(app.functions.get("f").error), code)
        self.write("g", "SETTINGS: dict = {'schedule': {'minute': 5, 'misfire_grace_time': 7, 'max_instances': 2}}\ndef main(request): return 'x'")
        self.assertEqual(self.call(app, "GET", "/function/g").status_code, 200)
        app.background.step(self.clock.now)
        job = self.admin(app).get("/scheduler/jobs/g").json
        self.assertEqual((job["minute"], job["misfire_grace_time"], job["max_instances"]), (5, 7, 2))

    def test_a_job_whose_function_is_gone(self):
        path = self.write("gone", "def main(request): return 'x'")
        app = self.make_app()
        self.admin(app).post("/scheduler/jobs", json={"id": "j", "func": "gone", "trigger": "interval", "seconds": 10})
        path.unlink()
        self.clock.now += 11
        app.schedule.step(self.clock.now)
        for _ in range(4):  # it may be about to be uploaded again
            self.drain(app, 10)
        [run] = self.admin(app).get("/admin/queue").json["calls"]
        self.assertEqual((run["state"], run["status"], run["attempts"]), ("dead", 404, 4))


# == 13 PIPELINE ==========================================================


class PipelineTest(Case):
    def test_errors(self):
        self.write("bad", "def main(request):\n    print('before')\n    raise ValueError('secret detail')")
        self.write("exits", "def main(request): raise SystemExit(4)")
        self.write("says", "from flask import abort\ndef main(request): abort(403, 'why')")
        self.write("body", "def main(request): return str(len(request.get_data()))")
        self.write("js", "def main(request): return request.json")
        self.write("need", "def main(request): return request.form['x']")
        app = self.make_app(MAX_BODY="1kB")
        for path, options, status, error in (
                ("bad", {}, 500, "Function execution failed"), ("exits", {}, 500, "Function execution failed"),
                ("says", {}, 403, "why"), ("body", {"data": b"x" * 2000}, 413, None), ("js", {"data": b"{"}, 415, None),
                ("js", {"data": b"{", "headers": {"Content-Type": "application/json"}}, 400, None),
                ("js", {"data": b"[" * 900, "headers": {"Content-Type": "application/json"}}, 400, None),
                ("need", {"data": {"y": "1"}}, 400, None), ("nope", {}, 404, 'Function "nope" not found')):
            with self.subTest(path=path, status=status):
                answer = self.call(app, "POST", "/function/" + path, **options)
                self.assertEqual(answer.code, status)
                self.assertEqual(answer.json["request_id"], answer.headers["X-Request-Id"])
                self.assertNotIn(b"secret detail", answer.data)
                if error:
                    self.assertEqual(answer.json["error"], error)
        row = self.admin(app).get("/admin/logs?function=bad").json["invocations"][0]
        self.assertEqual((row["status"], row["output"]), (500, "before\n"))
        self.assertIn("secret detail", row["error"])
        self.assertNotIn("fnserve.py", row["error"])
        log = (self.dir / "serverless_error.log").read_text()
        self.assertIn(row["id"], log)
        self.assertIn("secret detail", log)

    def test_order_of_the_gate(self):
        """Method, login, signature, rate and size come before the bulkhead, and none of them costs a place in it."""
        self.write("one", "import os, time\nSETTINGS = {'concurrency': 1, 'methods': ['POST'], 'auth': 'token', 'async': False}\n"
                          "def main(request):\n    open('begun', 'w').close()\n    while not os.path.exists('free'):\n        time.sleep(.01)\n    return 'x'")
        self.write("queued", "import os, time\nSETTINGS = {'concurrency': 1, 'async': True}\ndef main(request): return 'x'")
        self.write("signed", "SETTINGS = {'verify': 'github', 'rate': '1/min'}\ndef main(request): return 'x'")
        (self.dir / ".env").write_text("GITHUB_WEBHOOK_SECRET=s\n")
        app = self.make_app(API_TOKENS="caller")
        caller, answers = {"Authorization": "Bearer caller"}, []
        first = threading.Thread(target=lambda: answers.append(fnserve.Client(app).post("/function/one", headers=caller).code))
        first.start()
        wait_until((self.dir / "begun").exists)
        (self.dir / "functions" / "one.py").touch()  # to be looked at again, which takes none of its places either
        self.assertEqual([self.call(app, method, "/function/one", headers=headers).code for method, headers in (
            ("GET", caller), ("POST", {}))], [405, 401])  # though its only place is taken
        for _ in range(3):
            self.assertEqual(self.call(app, "POST", "/function/queued").code, 202)
        (self.dir / "free").touch()
        first.join(20)
        self.assertEqual(answers, [200])
        signature = {"X-Hub-Signature-256": "sha256=" + fnserve.make_mac(b"s", b"{}")}
        self.assertEqual([self.call(app, "POST", "/function/signed", data="{}", headers=headers).code for headers in (
            {}, {}, signature, signature)], [401, 401, 200, 429])  # forged ones don't use up the sender's rate

    def test_protected_groups_and_unsafe_methods(self):
        self.write("prot/x", "def main(request): return 'x'")
        app = self.make_app(PROTECTED_FUNCTIONS="prot")
        self.assertEqual((self.call(app, "GET", "/function/prot/x").code, self.admin(app).get("/function/prot/x").code), (401, 200))
        for path in ("/function/save_function", "/function/update_function", "/admin/try", "/admin/backup"):
            self.assertEqual((self.call(app, "GET", path).code, self.admin(app).get(path).code), (401, 405), path)
        for path in ("/login", "/admin/queue", "/admin/data", "/function/add_function", "/function/delete_function?module_name=prot/x",
                     "/function/clear_stats"):
            self.assertEqual(self.admin(app).head(path).code, 200, path)
        self.assertEqual(self.admin(app).get("/function/prot/x").code, 200)  # HEAD has deleted nothing

    def test_wrong_api_tokens_do_not_lock_the_admin_out(self):
        self.write("f", "SETTINGS = {'auth': 'token'}\ndef main(request): return 'x'")
        app = self.make_app(API_TOKENS="caller")
        codes = [self.call(app, "GET", "/function/f", headers={"Authorization": "Bearer old"}).code for _ in range(7)]
        self.assertEqual(codes, [401] * 5 + [429] * 2)  # nobody guesses SECRET_TOKEN here either
        self.assertEqual(self.call(app, "GET", "/function/f", headers={"Authorization": "Bearer caller"}).code, 200)
        self.assertEqual(self.admin(app).get("/function/show_stats").code, 200)

    def test_a_database_that_is_locked_is_a_503_of_the_pages(self):
        app = self.make_app()
        visitor = self.client(app)
        visitor.post("/login", json={"token": TOKEN})
        connect = sqlite3.connect
        with unittest.mock.patch("sqlite3.connect", lambda path, **options: connect(path, **{**options, "timeout": .01})), \
                contextlib.closing(connect(app.settings.DB_PATH, isolation_level=None)) as other:
            app.store.close()
            self.stop(app)
            self.write("f", "def main(request): return 'one'")
            self.assertEqual(self.call(app, "GET", "/function/f").data, b"one")
            other.execute("BEGIN IMMEDIATE")
            self.write("f", "def main(request): return 'two'")
            self.assertEqual(self.call(app, "GET", "/function/f").data, b"two")  # though its version can't be stored
            self.assertEqual(visitor.get("/function/show_stats").code, 503)
            self.assertEqual(self.call(app, "GET", "/metrics").code, 200)  # figures of a moment ago
            other.execute("ROLLBACK")
        self.assertEqual(self.call(app, "GET", "/function/f").data, b"two")

    def test_nothing_of_a_failed_call_stays(self):
        """Its traceback holds the function's locals, which would wait for the garbage collector: 350 MB after nine calls."""
        self.write("f", "import weakref\nclass Big: pass\nseen = []\ndef main(request):\n    if request.args.get('seen'):\n"
                        "        return [ref() is None for ref in seen]\n    big = Big()\n    seen.append(weakref.ref(big))\n    1/0")
        app = self.make_app()
        self.stop(app)
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        self.assertEqual(self.call(app, "GET", "/function/f").code, 500)
        self.assertEqual(self.call(app, "GET", "/function/f?seen=1").json, [True])

    def test_secrets_in_urls_within_urls(self):
        self.write("f", "def main(request): return 'x'")
        app = self.make_app()
        for query, kept in (("authorization=hidden", "authorization=***"), ("sig=hidden&pwd=hidden&pass=hidden", "sig=***&pwd=***&pass=***"),
                            ("redirect=http%3A%2F%2Fx%2F%3Ftoken%3Dhidden", "redirect=***"), ("next=/function/x?token=hidden", "next=***"),
                            ("author=a&authors=b&design=c&passage=d&author_id=5", "author=a&authors=b&design=c&passage=d&author_id=5")):
            self.call(app, "GET", "/function/f?" + query)
            self.assertEqual(self.admin(app).get("/admin/logs?function=f&limit=1").json["invocations"][0]["path"], "/function/f?" + kept)

    def test_the_logs_are_the_functions(self):
        """Pages and probes that go well, and what scanners look for, would drive the functions' calls out."""
        self.write("f", "def main(request): return 'x'")
        app = self.make_app()
        ids = [self.call(app, "GET", path).headers["X-Request-Id"] for path in ("/function/f", "/health", "/nowhere", "/admin/logs", "/function/f")]
        rows = self.admin(app).get("/admin/logs").json["invocations"]
        self.assertEqual([row["id"] for row in rows], [ids[4], ids[3], ids[0]])  # the refused one of /admin/logs, too
        self.assertEqual([row["id"] for row in self.admin(app).get(f"/admin/logs?after={ids[0]}&limit=1").json["invocations"]], [ids[3]])
        self.assertEqual([row["id"] for row in self.admin(app).get(f"/admin/logs?after={ids[0]}").json["invocations"]], [ids[4], ids[3]])

    def test_repeated_headers_and_odd_bodies(self):
        self.write("twice", "def main(request): return 'x', 200, [('Set-Cookie', 'a=1'), ('Set-Cookie', 'b=2'), ('Content-Type', 'text/x')]")
        self.write("empty", "def main(request): return None, [('Set-Cookie', 'a=1'), ('Set-Cookie', 'b=2')]")
        self.write("ints", "def main(request): return (x for x in [1, 2])")
        self.write("early", "def main(request): return 'x', 100")
        self.write("own_id", "def main(request): return 'x', 200, {'X-Request-Id': 'mine'}")
        self.write("visits", "from flask import session\ndef main(request): return dict(session)")
        app = self.make_app()
        answer = self.call(app, "GET", "/function/twice")
        self.assertEqual((answer.headers.getlist("Set-Cookie"), answer.headers.getlist("Content-Type")), (["a=1", "b=2"], ["text/x"]))
        answer = self.call(app, "GET", "/function/empty")
        self.assertEqual((answer.code, answer.headers.getlist("Set-Cookie")), (204, ["a=1", "b=2"]))
        self.assertEqual([self.call(app, "GET", f"/function/{name}").code for name in ("ints", "early")], [500, 500])
        found = self.call(app, "GET", "/function/own_id").headers.getlist("X-Request-Id")
        self.assertEqual((len(found), found[0] != "mine"), (1, True))
        for payload in ("not json", "[1]", "5", '"x"'):
            cookie = "session=" + app.signer.sign(payload, self.clock.now)
            self.assertEqual(self.call(app, "GET", "/function/visits", headers={"Cookie": cookie}).json, {})

    def test_what_waits_for_the_end_of_a_plain_answer(self):
        self.write("f", "from flask import Response\nended = []\ndef main(request):\n    if request.args: return ended\n"
                        "    response = Response('x')\n    response.call_on_close(lambda: ended.append(1))\n    return response")
        self.write("bad", "from flask import Response\ndef main(request):\n    response = Response('x')\n"
                          "    response.call_on_close(lambda: 1/0)\n    return response")
        app = self.make_app()
        for method, body in (("GET", b"x"), ("HEAD", b"")):
            answer = self.call(app, method, "/function/f")
            self.assertEqual((answer.data, answer.headers["Content-Length"]), (body, "1"))
        self.assertEqual(self.call(app, "GET", "/function/f?a=b").json, [1, 1])
        self.assertEqual(self.call(app, "GET", "/function/bad").data, b"x")
        self.assertIn("ZeroDivisionError", (self.dir / "serverless_error.log").read_text())

    def test_headers_that_are_the_servers_are_left_out(self):
        self.write("proxy", "from fnserve import Response\ndef main(request):\n"
                            "    return Response(iter(['x']) if request.args else 'x', 200, {'Connection': 'keep-alive', 'transfer-encoding': 'chunked',\n"
                            "        'Content-Length': 'abc', 'Trailer': 'a', 'X-Own': '1', 'Upgrade': 'h2c'})")
        for path in ("/function/proxy", "/function/proxy?stream=1"):
            answer = self.call(self.make_app(), "GET", path)
            self.assertEqual((answer.status_code, answer.text, answer.headers["X-Own"]), (200, "x", "1"))
            self.assertEqual({name.lower() for name in answer.headers.keys()} - {"content-length"}, {"x-own", "content-type", "x-request-id"})

    def test_a_refused_answer_gives_its_place_back(self):
        self.write("f", "SETTINGS = {'concurrency': 2}\ndef main(request):\n    return 'x'")
        app, taken = self.make_app(), []

        def refuse(status, headers, exc_info=None):
            taken.append(status)
            if exc_info is None or "often" in environ:
                raise ValueError("a header that this server does not take")
        for environ in ({}, {}, {}, {"often": 1}, {"often": 1}, {"often": 1}):
            environ.update(REQUEST_METHOD="GET", PATH_INFO="/function/f", **{"wsgi.input": io.BytesIO()})
            with contextlib.suppress(ValueError):
                list(app(environ, refuse))
        self.assertEqual(taken, ["200 OK", "500 INTERNAL SERVER ERROR"] * 6)
        self.assertEqual(self.call(app, "GET", "/function/f").status_code, 200)

    def test_answers_that_cannot_be_sent_are_500_and_recorded(self):
        app = self.make_app()
        for number, code in enumerate((
                "from flask import Response\ndef main(request): return Response(5)",
                "from flask import session\ndef main(request):\n    session['x'] = object()\n    return ''",
                "from flask import abort\ndef main(request): abort(400, b'x')",
                "from flask import abort\ndef main(request): abort(99)",
                "class Bad:\n    def __iter__(self): return self\n    def __next__(self): 1/0\n    def close(self): 1/0\n"
                "def main(request): return Bad()")):
            with self.subTest(code=code):
                self.write(f"f{number}", code)
                answer = self.call(app, "GET", f"/function/f{number}")
                self.assertEqual((answer.code, answer.json["error"]), (500, "Function execution failed"))
                row = self.admin(app).get(f"/admin/logs?function=f{number}").json["invocations"][0]
                self.assertEqual(row["id"], answer.headers["X-Request-Id"])
        self.write("after", "from flask import after_this_request\ndef main(request):\n"
                            "    after_this_request(lambda response: 'replaced')\n    return ''")
        self.assertEqual(self.call(app, "GET", "/function/after").data, b"replaced")

    def test_odd_requests(self):
        self.write("form", "def main(request): return dict(request.form)")
        app = self.make_app()
        part = b'--B\r\nContent-Disposition: form-data; name="a"\r\nContent-Type: text/plain; charset=idna\r\n\r\nx\r\n--B--'
        for headers, data, status in (
                ({"Accept": "text/html;q*=idna''abc"}, b"", 200), ({"Content-Type": "x/y;q*=idna''abc"}, b"", 200),
                ({"Content-Type": "multipart/form-data"}, b"x", 400), ({"Content-Type": "multipart/form-data; boundary=B"}, part, 200),
                ({"Content-Type": "application/x-www-form-urlencoded"}, b"a=1&" * 30000, 413),
                ({"Content-Type": "application/x-www-form-urlencoded"}, b"%ff=%fe&&=&=x", 200),
                ({"Cookie": "=;;a=\x01;session=%00"}, b"", 200), ({"Host": "a b"}, b"", 200), ({"Range": "bytes=9-1"}, b"", 200)):
            with self.subTest(headers=headers):
                answer = fnserve.Client(app).post("/function/form", data=data, headers=headers)
                self.assertEqual(answer.code, status)
        self.assertLessEqual(len(fnserve.scrub("key" * 80000)), 1000)  # cut before it is looked at
        self.assertEqual(fnserve.Client(app).post("/login", data=b"a&" * 100_000).code, 413)

    def test_unread_and_cut_bodies(self):
        self.write("body", "def main(request): return str(len(request.get_data()))")
        app = self.make_app()
        environ = fnserve.make_environ("POST", b"/function/body", "", b"abc", [])
        environ["CONTENT_LENGTH"] = "10"
        self.assertEqual(fnserve.Client(app).run(environ).code, 400)
        environ.update(CONTENT_LENGTH="nonsense")
        self.assertEqual(fnserve.Client(app).run(environ).code, 200)

    def test_streams(self):
        self.write("s", "from flask import request as r, stream_with_context\ndef main(request):\n"
                        "    def make():\n        yield r.args['a']\n        yield ''\n        yield r.method\n"
                        "    return stream_with_context(make())")
        self.write("early", "def main(request):\n    raise ValueError\n    yield 'x'")
        self.write("late", "def main(request):\n    yield 'x'\n    raise ValueError('late')")
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/function/s?a=1").data, b"1GET")
        self.assertEqual(self.call(app, "GET", "/function/early").code, 500)
        with self.assertRaises(ConnectionAbortedError):
            self.call(app, "GET", "/function/late")
        rows = self.admin(app).get("/admin/logs").json["invocations"]
        self.assertEqual([(row["function"], row["status"]) for row in rows[:3]], [("late", 500), ("early", 500), ("s", 200)])
        self.assertEqual(self.call(app, "HEAD", "/function/s?a=1").data, b"")

    def test_output_reaches_its_own_call(self):
        self.write("p", "import logging\ndef main(request):\n    print('out', request.args['n'])\n"
                        "    logging.getLogger('x').info('logged')\n    return ''")
        app = self.make_app()
        threads = [threading.Thread(target=self.call, args=(app, "GET", f"/function/p?n={n}")) for n in range(6)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        for row in self.admin(app).get("/admin/logs?function=p").json["invocations"]:
            self.assertEqual(row["output"], f"out {row['path'][-1]}\nINFO x: logged\n")

    def test_protected_names(self):
        self.write("execute_sql", "def main(request, protected): return 'sql' in protected and 'x' or 'ran'")
        self.write("mine", "def main(request): return 'mine'")
        self.write("list_functions", "def main(request): return 'shadow'")
        app = self.make_app(PROTECTED_FUNCTIONS="mine")
        for name in ("execute_sql", "mine", "list_functions", "drop_table"):
            with self.subTest(name=name):
                answer = self.call(app, "GET", "/function/" + name)
                self.assertEqual((answer.code, answer.json["error"], answer.json["login_url"]),
                                 (401, "Authentication required", "/login"))
        self.assertEqual(self.admin(app).get("/function/mine").data, b"mine")
        self.assertIn("functions", self.admin(app).get("/function/list_functions").json)
        self.assertEqual(self.admin(app).get("/function/show_stats").json["stats"], {})  # protected ones don't count

    def test_admin_off(self):
        app = self.make_app(ADMIN="off")
        for path in ("/login", "/function/list_functions", "/admin/logs", "/function/drop_table"):
            if path != "/login":
                self.assertEqual(self.admin(app).get(path).code, 404, path)

    def test_api(self):
        self.write("r", "from flask import redirect, url_for, after_this_request, make_response, g, current_app\n"
                        "def main(request):\n    g.x = 1\n    @after_this_request\n    def add(response):\n"
                        "        response.headers['X-G'] = str(g.x)\n        return response\n"
                        "    return redirect(url_for('hello', name='漢', subpath='a/b'))")
        self.write("file", "from flask import send_file, send_from_directory\nimport io\ndef main(request):\n"
                           "    if request.view_args['subpath']:\n"
                           "        return send_from_directory('functions', request.view_args['subpath'])\n"
                           "    return send_file(io.BytesIO(b'data'), download_name='漢.txt', as_attachment=True)")
        app = self.make_app()
        answer = self.call(app, "GET", "/function/r")
        self.assertEqual((answer.code, answer.headers["Location"], answer.headers["X-G"]),
                         (302, "/function/hello/a/b?name=%E6%BC%A2", "1"))
        answer = self.call(app, "GET", "/function/file")
        self.assertEqual((answer.data, answer.headers["Content-Type"]), (b"data", "text/plain; charset=utf-8"))
        self.assertIn("filename*=UTF-8''%E6%BC%A2.txt", answer.headers["Content-Disposition"])
        self.assertIn(b"send_file", self.call(app, "GET", "/function/file/file.py").data)
        self.assertEqual(self.call(app, "GET", "/function/file/..%2f.env").code, 404)


# == 14 MONITORING ========================================================


class LokiReceiver:
    """A strict Loki: takes what is right, and answers as it is told."""

    def __init__(self) -> None:
        import gzip
        import http.server
        self.lines, self.streams, self.answers, receiver = [], [], [], self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = gzip.decompress(self.rfile.read(int(self.headers["Content-Length"])))
                status = receiver.answers.pop(0) if receiver.answers else 204
                right = self.path == "/loki/api/v1/push" and self.headers["Content-Type"] == "application/json"
                if status == 204 and right:
                    for stream in json.loads(body)["streams"]:
                        assert set(stream["stream"]) == {"service", "level", "endpoint"}, stream
                        assert all(isinstance(at, str) and at.isdigit() for at, _ in stream["values"]), stream
                        receiver.lines += [json.loads(line) for _, line in stream["values"]]
                        receiver.streams.append(stream["stream"])
                self.send_response(status if right else 404)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class MonitoringTest(Case):
    def test_health(self):
        app = self.make_app()
        self.write("bad", "def main(")
        self.call(app, "GET", "/function/bad")
        answer = self.call(app, "GET", "/health")
        self.assertEqual((answer.status_code, answer.json["status"], set(answer.json["checks"].values()), answer.json["broken_functions"]),
                         (200, "healthy", {"ok"}, 1))
        shutil.rmtree(self.dir / "functions")
        answer = self.call(app, "GET", "/health")
        self.assertEqual((answer.status_code, answer.json["status"]), (503, "unhealthy"))
        self.assertEqual([name for name, found in answer.json["checks"].items() if found != "ok"], ["functions"])
        (self.dir / "functions").mkdir()
        locker = sqlite3.connect(self.dir / "serverless.db", isolation_level=None)
        self.addCleanup(locker.close)
        app.store._open().execute("PRAGMA busy_timeout = 50")
        locker.execute("BEGIN IMMEDIATE")
        answer = self.call(app, "GET", "/health")
        self.assertEqual((answer.status_code, answer.json["checks"]["database"]), (503, "database is locked"))

    def test_monitoring_health(self):
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/monitoring/health").status_code, 401)
        found = self.admin(app).get("/monitoring/health").json
        self.assertEqual(found["status"], "healthy")
        figures = found["system_metrics"]
        self.assertLessEqual({"cpu_percent", "memory_rss_mb", "memory_percent", "threads", "uptime_seconds"}, figures.keys())
        self.assertGreater(figures["memory_rss_mb"], 5)

    COUNTING = ("from fnserve import counter, histogram\nseen = counter('logins_total', 'Logins \\\\ so\\nfar')\n"
                "size = histogram('size_bytes', 'Sizes', buckets=(10, 100))\n"
                "def main(request):\n    seen.inc(user=request.args['u'])\n    seen.labels(user='x').inc(2)\n    size.observe(float(request.args['n']))\n"
                "    return 'x'")

    def metrics(self, app, accept: str = "") -> str:
        answer = self.call(app, "GET", "/metrics", headers={"Accept": accept})
        self.assertEqual(answer.status_code, 200)
        return answer.text

    def test_metrics_are_read_by_prometheus_client(self):
        parser = module("prometheus_client.parser")
        newer = module("prometheus_client.openmetrics.parser")
        self.write("count", self.COUNTING)
        self.write("bad", "def main(request): 1/0")
        app = self.make_app()
        users = ['a"b', "back\\slash", "two\nlines", "🐍", "plain"]
        for number, user in enumerate(users):
            self.call(app, "GET", "/function/count", query={"u": user, "n": number * 30})
        for path in ("/function/bad", "/function/nope1", "/function/nope2", "/nowhere", "/health"):
            self.call(app, "GET", path)
        self.call(app, "BREW", "/function/count?u=x&n=0")
        for text, read in ((self.metrics(app), parser.text_string_to_metric_families),
                           (self.metrics(app, "application/openmetrics-text"), newer.text_string_to_metric_families)):
            samples = {(sample.name, *sorted(sample.labels.items())): sample.value for family in read(text) for sample in family.samples}
            ok = ("endpoint", "/function/count"), ("method", "GET"), ("status", "200")
            self.assertEqual(samples[("fnserve_requests_total", *ok)], 5)
            self.assertEqual(samples[("fnserve_requests_total", ("endpoint", "(unknown)"), ("method", "GET"), ("status", "404"))], 3)
            self.assertEqual(samples[("fnserve_requests_total", ("endpoint", "/function/count"), ("method", "OTHER"), ("status", "200"))], 1)
            self.assertEqual(samples[("fnserve_function_errors_total", ("function", "bad"))], 1)
            for user in users:
                self.assertEqual(samples[("logins_total", ("user", user))], 1)
            self.assertEqual(samples[("logins_total", ("user", "x"))], 13)
            self.assertEqual([samples[("size_bytes_bucket", ("le", bound))] for bound in ("10.0", "100.0", "+Inf")], [2, 5, 6])
            self.assertEqual(samples[("size_bytes_sum",)], 300)
            self.assertEqual(samples[("fnserve_request_latency_seconds_count", *ok[:2])], 5)
            self.assertGreater(samples[("process_resident_memory_bytes",)], 5e6)

    def test_bad_metrics_fail_the_function_that_made_them(self):
        self.write("f", "from fnserve import counter\ndef main(request):\n    counter(request.args['n']).inc(float(request.args['v']), **{request.args['l']: 1})")
        app = self.make_app()
        for name, value, label in (("1x", "1", "a"), ("fnserve_x", "1", "a"), ("x", "-1", "a"), ("x", "1", "le"), ("x", "1", "a-b")):
            self.assertEqual(self.call(app, "GET", f"/function/f?n={name}&v={value}&l={label}").status_code, 500)
        self.assertNotIn("\nx_total", self.metrics(app))

    def test_no_counted_value_stops_the_counting(self):
        self.write("f", "from fnserve import counter, histogram\ndef main(request):\n"
                        "    counter('c', {'a': 1}).inc(user=request.json['user'])\n    histogram('h').observe(float(request.json['v']))\n    return 'x'")
        self.write("many", "from fnserve import counter\ndef main(request):\n    [counter('pages').inc() for _ in range(9000)]\n    return 'x'")
        self.write("wide", "from fnserve import counter\ndef main(request):\n    [counter('w').inc(a=str(n) * 200) for n in range(900)]\n    return 'x'")
        app = self.make_app()
        for user, value, status in (("\ud800", 1, 200), ("a", "nan", 500), ("a", "inf", 500), ("a", "1e308", 200), ("b", "1e308", 200)):
            self.assertEqual(self.call(app, "POST", "/function/f", json={"user": user, "v": value}).status_code, status)
        for name in ("many", "wide"):
            self.assertEqual(self.call(app, "GET", f"/function/{name}").status_code, 200)
        text = self.metrics(app)
        self.assertRegex(text, r"(?m)^c_total\{user=.\?.\} 1(\.0)?$")
        self.assertRegex(text, r"(?m)^pages_total 9000(\.0)?$")
        self.assertNotIn("\nw_total{", text)
        self.assertIn(" series are too many", (self.dir / "serverless_error.log").read_text())
        self.assertEqual(self.admin(app).get("/function/show_stats", headers={"Accept": "application/json"}).json["stats"], {"f": 5, "many": 1, "wide": 1})

    def test_series_are_bounded(self):
        self.write("f", "from fnserve import counter\ndef main(request):\n    [counter('c').inc(n=n) for n in range(1200)]\n    return 'x'")
        app = self.make_app()
        self.call(app, "GET", "/function/f")
        for number in range(50):
            self.call(app, "GET", f"/x{number}")
            self.call(app, "GET", f"/function/y{number}")
        text = self.metrics(app)
        self.assertEqual(text.count("\nc_total{"), 1000)
        self.assertEqual(text.count("(unknown)"), 1 + len(fnserve.BUCKETS) + 3)

    def test_metrics_token(self):
        app = self.make_app(METRICS_TOKEN="m")
        self.assertEqual(self.call(app, "GET", "/metrics").status_code, 401)
        self.assertEqual(self.call(app, "GET", "/metrics", headers={"Authorization": "Bearer x"}).status_code, 401)
        self.assertEqual(self.call(app, "GET", "/metrics", headers={"Authorization": "Bearer m"}).status_code, 200)

    def test_promtool(self):
        need("promtool (apt-get install prometheus)", shutil.which("promtool"))
        self.write("count", self.COUNTING)
        app = self.make_app()
        self.call(app, "GET", "/function/count?u=x&n=1")
        for accept in ("", "application/openmetrics-text"):
            done = subprocess.run(["promtool", "check", "metrics"], input=self.metrics(app).encode(), capture_output=True)
            self.assertEqual((done.returncode, done.stdout + done.stderr), (0, b""))

    def test_loki_misses_nothing(self):
        receiver = LokiReceiver()
        self.addCleanup(receiver.stop)
        self.write("f", "def main(request):\n    print('hi')\n    return 'x'")
        self.write("bad", "def main(request): 1/0")
        app = self.make_app(LOKI_URL=receiver.url, LOKI_USER="u", LOKI_PASSWORD="p", LOKI_TENANT="t")
        sent = []

        def calls(count: int) -> None:
            for _ in range(count):
                sent.append(self.call(app, "GET", "/function/f?token=hidden").headers["X-Request-Id"])
        calls(3)
        app.journal.append("[1]")  # no record of ours
        sent.append(self.call(app, "GET", "/function/bad").headers["X-Request-Id"])

        def push() -> None:
            app.loki._wait = .01
            app.loki.keep_up()
            app.loki._thread.join(20)
        for status in (429, 500, 503):
            receiver.answers = [status]
            push()
            self.assertEqual(receiver.lines, [])
        push()
        self.assertEqual(sorted(line["request_id"] for line in receiver.lines), sorted(sent))
        calls(5)
        receiver.stop()  # away for a while, and fnserve restarts meanwhile
        push()
        self.stop(app)
        again = LokiReceiver()
        self.addCleanup(again.stop)
        app = self.make_app(LOKI_URL=again.url)
        push()
        lines = receiver.lines + again.lines
        self.assertEqual(sorted(line["request_id"] for line in lines), sorted(sent))
        self.assertEqual({stream["level"] for stream in receiver.streams}, {"info", "error"})
        failed = [line for line in lines if line["response"]["status"] == 500][0]
        self.assertIn("ZeroDivisionError", failed["error"])
        self.assertGreater(failed["performance"]["duration_ms"], 0)
        self.assertNotIn("hidden", json.dumps(lines))

    def test_segments_wait_for_loki(self):
        self.write("f", "def main(request): return 'x'")
        app = self.make_app(KEEP_DAYS=0, LOKI_URL="http://127.0.0.1:9")
        self.call(app, "GET", "/function/f")
        [number] = fnserve.segments(app.settings.JOURNAL_DIR)
        Path(fnserve.segment_path(app.settings.JOURNAL_DIR, number + 1)).touch()
        app.journal.refresh()
        app.folder.fold()
        os.utime(fnserve.segment_path(app.settings.JOURNAL_DIR, number), (1, 1))
        app.folder.prune(self.clock.now, app.loki.position())
        self.assertIn(number, fnserve.segments(app.settings.JOURNAL_DIR))
        app.folder.prune(self.clock.now, {number: 10 ** 9})
        self.assertNotIn(number, fnserve.segments(app.settings.JOURNAL_DIR))

    def test_a_flood_of_failures_is_summed_up(self):
        self.write("bad", "def main(request): 1/0")
        app = self.make_app()
        self.stop(app)  # its loop would sum up in between
        for _ in range(100):
            self.call(app, "GET", "/function/bad")
        app.background._sum_up(self.clock.now)
        text = (self.dir / "serverless_error.log").read_text()
        self.assertEqual(text.count("Traceback"), fnserve.FLOOD_COUNT)
        self.assertIn(f"{100 - fnserve.FLOOD_COUNT} more: ZeroDivisionError", text)

    def test_dashboard_and_stream(self):
        self.write("bad", "def main(request): raise ValueError('<b>')")
        app = self.make_app()
        for _ in range(3):
            self.call(app, "GET", "/function/bad")
        app.background._sample(self.clock.now)
        html = fnserve.Client(app, headers={"Authorization": "Bearer " + TOKEN, "Accept": "text/html"}).get("/monitoring/dashboard").text
        self.assertIn("ValueError: &lt;b&gt;", html)
        self.assertIn("<svg", html)
        self.assertEqual(self.call(app, "GET", "/monitoring/stream").status_code, 401)
        bodies = []
        for _ in range(fnserve.MOST_VIEWERS + 1):
            environ = fnserve.make_environ("GET", b"/monitoring/stream", "", b"", [("Authorization", "Bearer " + TOKEN)])
            statuses = []
            bodies.append((app(environ, lambda status, headers: statuses.append(status)), statuses))
        self.assertEqual([statuses[0][:3] for _, statuses in bodies], ["200", "200", "503"])
        first = next(iter(bodies[0][0]))
        self.assertTrue(first.startswith(b"data: {"))
        for body, _ in bodies[:2]:
            body.close()
        self.assertTrue(app.viewers.acquire(blocking=False))  # a viewer who goes makes room


# == 16 ADMIN =============================================================


class OpenApiTest(Case):
    """What others make of /openapi.json: a validator of its form, and a fuzzer that calls what it describes."""
    FUNCTIONS = {  # several kinds; none of them fails by itself
        "reads": "SETTINGS = {'parameters': {'n': {'type': 'integer', 'required': True}, 'x-h': {'in': 'header'}, 'c': {'in': 'cookie'}}}\n"
                 "def main(request):\n    return {'n': request.args.get('n', 0, type=int), 'json': request.get_json(silent=True),\n"
                 "        'all': request.values.to_dict(flat=False), 'h': dict(request.headers), 'c': dict(request.cookies),\n"
                 "        'data': request.get_data(as_text=True), 'files': list(request.files), 'url': request.url}",
        "strict": "def main(request): return {'got': request.get_json()}",
        "v1/users": "SETTINGS = {'methods': ['GET', 'PUT', 'PATCH', 'DELETE', 'OPTIONS', 'HEAD'], 'cors': '*', 'max_body': '1kB'}\n"
                    "def main(request): return None if request.method == 'DELETE' else (request.args.to_dict(), 200, {'X-A': 'b'})",
        "v1_users": "SETTINGS = {'methods': 'GET', 'parameters': {'p': {'in': 'path', 'type': 5}, 'q': 'text', 7: []}}\n"
                    "def main(request): return 'x'",
        "token": "SETTINGS = {'auth': 'token', 'methods': 'POST', 'rate': '5/s'}\ndef main(request): return 'in'",
        "signed": "SETTINGS = {'verify': 'github', 'methods': 'POST'}\ndef main(request): return 'never'",
        "later": "SETTINGS = {'async': True, 'methods': 'POST'}\ndef main(request): return 'done'",
        "stream": "SETTINGS = {'methods': 'GET'}\ndef main(request):\n    yield 'a'\n    yield request.full_path",
        "keeps": "from flask import session, redirect, url_for\nSETTINGS = {'methods': 'GET'}\ndef main(request):\n"
                 "    session['q'] = request.query_string.decode('latin-1')\n    return redirect(url_for('keeps', subpath='x'))",
        "漢字": "SETTINGS = {'methods': 'GET'}\nasync def main(request): return request.view_args['subpath']"}

    def test_fuzzed(self):
        schemathesis, hypothesis = module("schemathesis"), module("hypothesis")
        validate = module("openapi_spec_validator").validate
        for name, code in self.FUNCTIONS.items():
            self.write(name, code)
        (self.dir / ".env").write_text("GITHUB_WEBHOOK_SECRET=s\n")
        app = self.make_app(DOCS="public", API_TOKENS="caller")
        document = self.call(app, "GET", "/openapi.json").json
        self.stop(app)  # it reads the functions' syntax, as hypothesis does its own: too much for Python 3.11 (gh-106905)
        validate(document)
        self.assertEqual(len(document["paths"]), len(self.FUNCTIONS))
        seen: dict[str, set[int]] = {}
        for found in schemathesis.openapi.from_wsgi("/openapi.json", app).get_all_operations():
            operation = found.ok()

            @hypothesis.settings(max_examples=8, derandomize=True, database=None, deadline=None, phases=[hypothesis.Phase.generate],
                                 suppress_health_check=list(hypothesis.HealthCheck))
            @hypothesis.given(case=operation.as_strategy())
            def fuzz(case):
                answer = case.call(headers={"Authorization": "Bearer caller"})
                seen.setdefault(case.operation.label, set()).add(answer.status_code)
            fuzz()
        self.assertEqual({label: codes for label, codes in seen.items() if max(codes) >= 500}, {})
        self.assertLessEqual({"GET /function/reads", "POST /function/strict", "DELETE /function/v1/users"}, seen.keys())
        self.assertEqual((seen["POST /function/signed"], seen["POST /function/later"]), ({401}, {202}))


EVIL = """"><img src=x onerror="window.evil=1"><script>window.evil=1</script>'"""
EVIL_TABLE = "/admin/data/" + urllib.parse.quote(EVIL, safe="")
PAGES = [  # every page there is, for who is logged in
    "/", "/login", "/function/list_functions", "/function/list_functions?sort=broken&q=e", 
    "/function/add_function", "/function/show_stats", "/function/show_stats?function=evil", "/function/clear_stats",
    "/function/edit_function?module_name=evil", "/function/delete_function?module_name=evil", "/admin/logs?limit=9",
    "/admin/logs?status=5xx&q=" + urllib.parse.quote(EVIL), "/admin/versions?module_name=evil", "/admin/versions?module_name=evil&version=1",
    "/admin/jobs", "/admin/queue", "/monitoring/dashboard", "/admin/data", "/admin/data/fn_requests", EVIL_TABLE, EVIL_TABLE + "?key=[1]",
    "/admin/settings", "/docs", "/function/edit_function?module_name=nope" + urllib.parse.quote(EVIL)]


def fill(case: Case, ask) -> None:
    """Put HTML into every field there is; `ask(method, path, json=, headers=)` is the admin's."""
    case.write("evil", f"{EVIL!r}\nSETTINGS = {{'async': True, 'retries': 0, 'parameters': {{{EVIL!r}: {{'description': {EVIL!r}}}}}}}\n"
                       f"def main(request):\n    print({EVIL!r})\n    raise ValueError({EVIL!r})")
    case.write("v1/users", "def main(request): return 'x'")
    case.write("v1/broken", f"{EVIL!r}\ndef main(:")
    case.write("tick", "SETTINGS = {'schedule': '@hourly'}\ndef main(request): return 'x'")
    case.write("plain", f"def main(request):\n    print({EVIL!r})\n    raise ValueError({EVIL!r})")
    ask("GET", "/function/plain?q=" + urllib.parse.quote(EVIL), headers={"User-Agent": EVIL})
    ask("GET", "/function/v1/broken")
    ask("POST", "/function/evil?q=" + urllib.parse.quote(EVIL), json={EVIL: EVIL}, headers={"X-Evil": EVIL})
    case.assertEqual(ask("POST", "/scheduler/jobs", json={"id": "evil", "name": EVIL, "func": "plain", "kwargs": {EVIL: EVIL},
                                                          "trigger": "interval", "hours": 1}).status_code, 200)
    quoted = EVIL.replace('"', '""')
    text = EVIL.replace("'", "''")
    for sent in ({"action": "create", "columns": f'"{quoted}" TEXT, n INTEGER, b BLOB'},
                 {"action": "sql", "sql": f"""INSERT INTO "{quoted}" VALUES ('{text}', 1, NULL)"""}):
        case.assertEqual(ask("POST", "/admin/data", json={"table": EVIL, **sent}).status_code, 200)
    ask("GET", "/function/edit_function?module_name=evil")


class AdminTest(Case):
    def login(self, app, **headers: str):
        client = self.client(app, **headers)
        self.assertEqual(client.post("/login", json={"token": TOKEN}).json, {"message": "登入成功"})
        return client

    def test_login_logout(self):
        app = self.make_app()
        client = self.client(app)
        answer = client.post("/login", json={"token": "wrong"})
        self.assertEqual((answer.code, answer.json), (401, {"message": "登入失敗"}))
        answer = client.get("/function/show_stats?x=1", headers={"Accept": "text/html"})
        self.assertEqual(answer.code, 401)
        self.assertIn('value="/function/show_stats?x=1"', answer.get_data(as_text=True))
        answer = client.post("/login", data={"token": TOKEN, "next": "/function/show_stats?x=1"})
        self.assertEqual((answer.code, answer.headers["Location"]), (303, "/function/show_stats?x=1"))
        self.assertEqual(client.get("/function/list_functions").code, 200)
        client.get("/logout")
        self.assertEqual(client.get("/function/list_functions").code, 401)

    def test_next_stays_here(self):
        for text in ("//evil.example", "https://evil.example", "/\\evil.example", "/a\r\nb", "javascript:x", "/\t/evil"):
            self.assertEqual(fnserve.local_path(text), "/function/list_functions")

    def test_login_expires(self):
        app = self.make_app(SESSION_HOURS=1)
        client = self.login(app)
        self.clock.now += 3500
        self.assertEqual(client.get("/function/list_functions").code, 200)
        self.clock.now += 200
        self.assertEqual(client.get("/function/list_functions").code, 401)

    def test_throttle(self):
        app = self.make_app()
        other = fnserve.App(app.settings, self.clock)  # another worker
        for turn in range(5):
            self.assertEqual(self.call((app, other)[turn % 2], "POST", "/login", json={"token": "x"}).code, 401)
        for worker in (app, other):
            answer = self.call(worker, "POST", "/login", json={"token": TOKEN})
            self.assertEqual(answer.code, 429)
            self.assertGreater(int(answer.headers["Retry-After"]), 290)
            self.assertEqual(self.admin(worker).get("/function/list_functions").code, 429)
        elsewhere = fnserve.Client(app, address="10.1.1.1")
        self.assertEqual(elsewhere.post("/login", json={"token": TOKEN}).code, 200)
        self.clock.now += 301
        self.assertEqual(self.call(app, "POST", "/login", json={"token": TOKEN}).code, 200)

    def test_cross_site(self):
        app = self.make_app()
        client = self.login(app)
        self.write("hello", "def main(request): return 'x'")
        for headers, status in (({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-site"}, 403),
                                ({"Sec-Fetch-Site": "same-origin"}, 200), ({"Sec-Fetch-Site": "none"}, 200),
                                ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403),
                                ({"Origin": "http://localhost"}, 200), ({}, 200)):
            with self.subTest(headers=headers):
                answer = client.post("/function/clear_stats", json={}, headers=headers)
                self.assertEqual(answer.code, status)

    def test_add_edit_rename_delete(self):
        app = self.make_app()
        client = self.admin(app)
        good = "def main(request):\r\n    return 'one'\r\n"
        self.assertEqual(client.post("/function/save_function", json={"module_name": "f", "code": good}).code, 201)
        self.assertEqual(client.get("/function/f").data, b"one")
        self.assertEqual((self.dir / "functions/f.py").read_bytes(), good.replace("\r\n", "\n").encode())
        for name, code, status in (("f", good, 409), ("1x", good, 400), ("_x", good, 400), ("../x", good, 400),
                                   ("login.x", good, 400), ("list_functions", good, 400), ("g", "  ", 400), ("", good, 400)):
            with self.subTest(name=name):
                answer = client.post("/function/save_function", json={"module_name": name, "code": code})
                self.assertEqual(answer.code, status)
        answer = client.post("/function/save_function", json={"module_name": "g", "code": "x = 1\ny = (\n"})
        self.assertEqual((answer.code, answer.json["line"]), (400, 2))
        self.assertGreater(answer.json["column"], 0)
        page = self.login(app).post("/function/save_function", data={"module_name": "g", "code": "if <b>"})
        self.assertEqual(page.code, 400)
        self.assertIn("if &lt;b&gt;", page.get_data(as_text=True))
        version = client.get("/function/edit_function?module_name=f").json["version"]
        two = {"module_name": "f", "code": "def main(request): return 'two'", "version": version}
        self.assertEqual(client.post("/function/update_function", json=two).code, 200)
        self.assertEqual(client.get("/function/f").data, b"two")
        self.assertEqual(client.post("/function/update_function", json=two).code, 409)
        self.assertEqual(client.post("/function/update_function", json={**two, "version": None}).code, 200)
        renamed = {"module_name": "g", "original_name": "f", "code": two["code"]}
        self.assertEqual(client.post("/function/update_function", json=renamed).code, 201)
        self.assertIn("f", client.get("/function/delete_function?module_name=f").get_data(as_text=True))
        self.assertEqual(client.get("/function/f").code, 200)
        self.assertEqual(client.post("/function/delete_function", json={"module_name": "f"}).code, 200)
        self.assertEqual(client.get("/function/f").code, 404)
        versions = client.get("/admin/versions?module_name=f").json["versions"]
        self.assertEqual([row["version"] for row in versions], [2, 1])
        self.assertEqual(client.post("/admin/restore", json={"module_name": "f", "version": 1}).code, 200)
        self.assertEqual(client.get("/function/f").data, b"one")
        self.assertEqual(client.get("/function/edit_function?module_name=nope").code, 404)

    def html(self, app, path: str, method: str = "GET", **options: object):
        """Ask as a browser does."""
        return self.client(app, Authorization="Bearer " + TOKEN, Accept="text/html", Accept_Language="en").open(path, method, **options)

    def test_list(self):
        self.write("hello", "'Say hello.'\nSETTINGS = {'methods': ['get', 'PUT']}\ndef main(request): return 'x'")
        self.write("bad", "def main(request): raise ValueError('first\\nlast <line>')")
        self.write("v1/half", "x = 1\ndef main(")
        self.write("v1/text", "def main(request): return 'no docstring'")
        app = self.make_app()
        for name in ("hello", "hello", "bad", "v1/half"):
            self.call(app, "PUT", "/function/" + name)
        rows = {row["name"]: row for row in self.admin(app).get("/function/list_functions").json["functions"]}
        self.assertEqual((rows["hello"]["methods"], rows["hello"]["summary"], rows["hello"]["calls"]), (["GET", "PUT"], "Say hello.", 2))
        self.assertEqual((rows["bad"]["methods"], rows["bad"]["last_error"]), (list(fnserve.METHODS), "last <line>"))
        self.assertEqual((rows["v1/half"]["status"], rows["v1/text"]["status"], rows["v1/text"]["summary"]), ("broken", "fine", ""))
        self.assertIn("line 2", rows["v1/half"]["reason"])
        for query, names in (("q=SAY", ["hello"]), ("q=v1/", ["v1/half", "v1/text"]), ("q=nothing", []), ("sort=calls", list(rows))):
            found = self.admin(app).get("/function/list_functions?" + query).json["functions"]
            self.assertEqual(sorted(row["name"] for row in found), sorted(names), query)
        for query, first in (("", "bad"), ("sort=calls", "hello"), ("sort=errors", "bad"), ("sort=nonsense", "bad"), ("sort=broken&q=v1", "v1/half")):
            page = self.html(app, "/function/list_functions?" + query).text
            self.assertEqual(re.search(r'<td data-label="Name"><a href="[^"]*">([^<]+)', page)[1], first, query)
        page = self.html(app, "/function/list_functions").text
        self.assertIn("last &lt;line&gt;</a>", page)
        self.assertIn("<details open><summary>v1/ ", page)  # a file in it is broken
        self.write("v1/half", "def main(request): return 'mended'")
        self.call(app, "PUT", "/function/v1/half")
        self.assertIn("<details><summary>v1/ ", self.html(app, "/function/list_functions").text)
        self.assertIn("<details open><summary>v1/ ", self.html(app, "/function/list_functions?q=half").text)

    def test_list_of_many(self):
        for number in range(450):
            self.write(f"{('', 'a/', 'b/', 'c/')[number % 4]}f{number:03}", "def main(request): return 'x'")
        app = self.make_app()
        looked, described = [], app.functions.describe
        app.functions.describe = lambda name: looked.append(name) or described(name)
        page = self.html(app, "/function/list_functions").text
        seen = re.findall(r'<td data-label="Name"><a href="[^"]*">([^<]+)', page)
        self.assertEqual((len(seen), looked), (300, seen))  # no other file was read
        self.assertIn("Only the first 300 rows are shown.", page)
        self.assertIn("c/f447", self.html(app, "/function/list_functions?q=f447").text)
        self.write("zz", "def main(")
        self.assertIn(">zz<", self.html(app, "/function/list_functions?sort=broken").text)
        self.assertEqual(len(self.admin(app).get("/function/list_functions").json["functions"]), 451)

    def test_stats_page(self):
        self.write("hello", "def main(request): return 'x'")
        self.write("bad", "def main(request): 1/0")
        app = self.make_app(KEEP_DAYS=3)
        for days, calls in ((2, 4), (1, 0), (0, 1)):
            self.clock.now = 1_700_000_000 - days * 86400
            for name in ["hello"] * calls + ["bad"]:
                self.call(app, "GET", "/function/" + name)
        self.admin(app).get("/function/show_stats")
        starts = [1_700_000_000 // 86400 * 1440 - days * 1440 for days in (2, 1, 0)]
        days = [fnserve.read_minutes(app, range(start, start + 1440), "/function/*") for start in starts]
        self.assertEqual([{name[10:]: figures[:2] for name, figures in day.items()} for day in days], [
            {"hello": (4, 0), "bad": (1, 1)}, {"bad": (1, 1)}, {"hello": (1, 0), "bad": (1, 1)}])  # pages aren't functions
        page = self.html(app, "/function/show_stats").text
        self.assertRegex(page, r"<title>\d\d-\d\d: 5</title>")
        self.assertIn("· max 5", page)
        self.assertIn("· max 4", self.html(app, "/function/show_stats?function=hello").text)
        self.assertEqual(self.html(app, "/function/show_stats?function=nope%3Cb%3E").status_code, 200)

    def test_assets_are_small(self):
        self.assertLess(len((fnserve.CSS + fnserve.JS).encode()), 60_000)
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/admin/assets/fnserve.js").text, fnserve.JS)

    def test_clear(self):
        self.write("hello", "def main(request): return 'x'")
        app = self.make_app()
        client = self.admin(app)
        client.get("/function/hello")
        self.assertEqual(client.get("/function/clear_stats").code, 200)
        self.assertEqual(client.get("/function/show_stats").json["stats"], {"hello": 1})
        client.post("/function/clear_stats")
        self.assertEqual(client.get("/function/show_stats").json["stats"], {})

    def test_data_browser(self):
        with contextlib.closing(sqlite3.connect(self.dir / "serverless.db")) as db, db:
            db.execute('CREATE TABLE "x""; DROP" (id INTEGER PRIMARY KEY, "na me" TEXT, data BLOB)')
            db.executemany('INSERT INTO "x""; DROP" VALUES (?, ?, ?)', [(n, f"<b>漢{n}", b"\xff") for n in range(1, 121)])
            db.execute("CREATE TABLE pairs (a TEXT, b INTEGER, c, PRIMARY KEY (a, b)) WITHOUT ROWID")
            db.execute("INSERT INTO pairs VALUES ('k', 1, 'v')")
        self.write("f", "def main(request): return 'x'")
        app = self.make_app()
        self.call(app, "GET", "/function/f")
        admin = self.admin(app)
        tables = {row["name"]: row for row in admin.get("/admin/data").json["tables"]}
        self.assertEqual((tables['x"; DROP']["rows"], tables["pairs"]["read_only"], tables["call_stats"]["read_only"]), (120, False, True))
        url = "/admin/data/" + urllib.parse.quote('x"; DROP', safe="")
        first = admin.get(url).json
        self.assertEqual((len(first["rows"]), first["rows"][0]["values"]["na me"], first["next"]), (50, "<b>漢1", [50]))
        self.assertEqual(len(admin.get(url, query={"after": "[100]"}).json["rows"]), 20)
        csv = self.admin(app).get(url + "?format=csv").get_data(as_text=True)
        self.assertTrue(csv.startswith("\ufeffid,na me,data"))
        self.assertEqual(csv.count("\n"), 121)

        def post(**sent: object):
            return admin.post("/admin/data", json=sent)
        self.assertEqual(post(action="update", table='x"; DROP', key=[2], values={"na me": "new"}).status_code, 200)
        self.assertEqual(post(action="delete", table='x"; DROP', key=[3]).status_code, 200)
        self.assertEqual(post(action="delete", table='x"; DROP', key=[3]).status_code, 404)
        self.assertEqual(post(action="update", table="pairs", key=["k", 1], values={"c": "w"}).status_code, 200)
        self.assertEqual(post(action="sql", sql="INSERT INTO pairs (a, b) VALUES ('l', 2)").json, {"rowcount": 1})
        self.assertEqual(post(action="update", table="pairs", key=["k"], values={"c": "w"}).status_code, 400)
        self.assertEqual(post(action="sql", sql="SELECT a, c FROM pairs ORDER BY a").json, {"columns": ["a", "c"], "rows": [["k", "w"], ["l", None]]})
        self.assertEqual(post(action="sql", sql="UPDATE pairs SET c = 1").json, {"rowcount": 2})
        self.assertEqual(post(action="create", table="made", columns="x INTEGER").status_code, 200)
        self.assertEqual(post(action="drop", table="made").status_code, 200)
        for sql in ("DROP TABLE call_stats", "DELETE FROM fn_versions", "INSERT INTO call_stats VALUES ('x', 1)", "UPDATE FN_META SET value = 1",
                    "CREATE TABLE fn_x (a)", "ALTER TABLE call_stats ADD COLUMN x", "ATTACH '/etc/passwd' AS p", "PRAGMA journal_mode=DELETE",
                    "CREATE TRIGGER t AFTER INSERT ON call_stats BEGIN SELECT 1; END", "SELEC 1", "SELECT 1; SELECT 2", "", "DROP TABLE nope"):
            with self.subTest(sql=sql):
                self.assertIn(post(action="sql", sql=sql).status_code, (400, 403))
        self.assertEqual(post(action="drop", table="call_stats").status_code, 403)
        seconds, fnserve.SQL_SECONDS = fnserve.SQL_SECONDS, .2
        self.addCleanup(setattr, fnserve, "SQL_SECONDS", seconds)
        endless = post(action="sql", sql="WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n")
        self.assertEqual((endless.status_code, endless.json["error"]), (400, "the statement took longer than 5 s"))
        fnserve.SQL_SECONDS = seconds
        self.assertEqual(len(post(action="sql", sql="WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 1000000) SELECT x FROM n")
                             .json["rows"]), fnserve.SQL_ROWS)
        page = fnserve.Client(app, headers={"Authorization": "Bearer " + TOKEN, "Accept": "text/html"}).get(url).text
        self.assertIn("&lt;b&gt;漢1", page)
        self.assertNotIn("<b>漢", page)
        self.assertEqual(admin.get("/function/show_stats").json["stats"], {"f": 1})

    def test_data_forms(self):
        with contextlib.closing(sqlite3.connect(self.dir / "serverless.db")) as db, db:
            db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, text TEXT, n INTEGER, any, data BLOB, nil)")
            db.execute("INSERT INTO t VALUES (1, 'a\r\nb', 5, 6, x'00ff', NULL)")
            db.execute("CREATE TABLE odd (rowid TEXT, \"_ROWID_\" TEXT)")
            db.executemany("INSERT INTO odd VALUES ('same', ?)", [("x",), ("y",)])
            db.execute("CREATE TABLE blobs (k BLOB PRIMARY KEY, v TEXT) WITHOUT ROWID")
            db.executemany("INSERT INTO blobs VALUES (?, ?)", [(b"\xff", "one"), (b"\xff\x00", "two")])
            db.execute("CREATE TABLE made (a INTEGER, twice INTEGER AS (a * 2), z TEXT)")
            db.execute("INSERT INTO made (a, z) VALUES (4, 'last')")
            db.execute("CREATE TABLE torn (a TEXT)")
            db.execute("INSERT INTO torn VALUES (CAST(x'e6bc' AS TEXT))")
        app = self.make_app()

        def row(sql: str):
            with contextlib.closing(sqlite3.connect(self.dir / "serverless.db")) as db:
                return db.execute(sql).fetchone()
        page = self.html(app, "/admin/data/t?key=[1]").text
        shown = json.loads(html.unescape(re.search(r"(?s)<textarea[^>]*>(.*?)</textarea>", page)[1]))
        self.assertEqual(shown, {"id": 1, "text": "a\r\nb", "n": 5, "any": 6, "nil": None})
        before = row("SELECT *, typeof(any), typeof(data) FROM t")
        for changes, after in (({}, before), ({"any": 7}, (*before[:3], 7, *before[4:])), ({"n": None}, (*before[:2], None, 7, *before[4:])),
                               ({"text": ""}, (1, "", None, 7, *before[4:]))):
            shown.update(changes)
            sent = {"action": "update", "table": "t", "key": "[1]", "values": json.dumps(shown)}
            self.assertEqual(self.html(app, "/admin/data", "POST", data=sent).status_code, 303)
            self.assertEqual(row("SELECT *, typeof(any), typeof(data) FROM t"), after)
        for bad in ("{", "[]", '{"nope": 1}', '{"n": [1]}', "[" * 100_000):
            refused = self.html(app, "/admin/data", "POST", data={**sent, "values": bad})
            self.assertEqual((refused.status_code, bad in html.unescape(refused.text)), (400, True), bad[:9])
        odd = {"action": "update", "table": "t", "key": ["\ud800"], "values": {}}
        self.assertEqual(self.admin(app).post("/admin/data", json=odd).status_code, 400)
        for bad in ("[2, 3]", "5", "[[1]]", '["x"]', "{", "[99999999999999999999]", '[{"a": 1}]', ""):
            self.assertIn(self.html(app, "/admin/data/t", query={"key": bad}).status_code, (400, 404), bad)
            self.assertIn(self.html(app, "/admin/data/t", query={"after": bad}).status_code, (200, 400), bad)
        admin = self.admin(app)
        keys = [found["key"] for found in admin.get("/admin/data/odd").json["rows"]]
        self.assertEqual(keys, [[1], [2]])
        admin.post("/admin/data", json={"action": "update", "table": "odd", "key": [2], "values": {"_ROWID_": "z"}})
        self.assertEqual(row("SELECT group_concat(\"_ROWID_\") FROM odd"), ("x,z",))
        found = admin.get("/admin/data/blobs?limit=1").json
        self.assertEqual(found["next"], [{"hex": "ff"}])
        second = admin.get("/admin/data/blobs", query={"after": json.dumps(found["next"])}).json["rows"]
        self.assertEqual(second, [{"key": [{"hex": "ff00"}], "values": {"k": "2 bytes", "v": "two"}}])
        self.assertEqual(admin.post("/admin/data", json={"action": "delete", "table": "blobs", "key": second[0]["key"]}).status_code, 200)
        self.assertEqual(row("SELECT count(*) FROM blobs"), (1,))
        self.assertEqual(admin.get("/admin/data/made").json["rows"][0]["values"], {"a": 4, "twice": 8, "z": "last"})
        changed = {"action": "update", "table": "made", "key": "[1]", "values": '{"a": 5, "twice": 8, "z": "last"}'}
        self.assertEqual(self.html(app, "/admin/data", "POST", data=changed).status_code, 303)
        self.assertEqual(row("SELECT * FROM made"), (5, 10, "last"))
        self.assertIn("ff,one", admin.get("/admin/data/blobs?format=csv").text)
        self.assertIn("\ufffd", admin.get("/admin/data/torn").text)
        update = {"action": "update", "table": "t", "key": [1]}
        for sent in ({**update, "values": {"n": 1 << 70}}, {**update, "values": {"text": "\ud800"}}, {**update, "values": {"nope": 1}}, update,
                     {"action": "sql", "sql": "SELECT '\ud800'"}, {"action": "insert", "table": "t", "values": {}},
                     {"action": "create", "table": "", "columns": "a"}, {"action": "create", "table": "u", "columns": "a); DROP TABLE t; --"},
                     {"action": "sql", "sql": "SELECT \0"}):
            self.assertEqual(admin.post("/admin/data", json=sent).status_code, 400, sent)
        wrong = self.html(app, "/admin/data", "POST", data={"action": "sql", "sql": "SELECT <b>"})
        self.assertEqual(wrong.status_code, 400)
        self.assertIn(">\nSELECT &lt;b&gt;</textarea>", wrong.text)  # what was typed is still there

    def test_data_of_a_million_rows(self):
        with contextlib.closing(sqlite3.connect(self.dir / "serverless.db")) as db, db:
            db.execute("CREATE TABLE big (a TEXT, b INTEGER, PRIMARY KEY (a, b)) WITHOUT ROWID")
            db.execute("WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 1000000) INSERT INTO big SELECT x % 7, x FROM n")
        admin = self.admin(self.make_app())
        self.assertEqual({row["name"]: row["rows"] for row in admin.get("/admin/data").json["tables"]}["big"], 1_000_000)
        seconds, fnserve.SQL_SECONDS = fnserve.SQL_SECONDS, .05
        self.addCleanup(setattr, fnserve, "SQL_SECONDS", seconds)
        for after, first in (('["3", 500000]', ["3", 500_006]), ('["6", 999990]', ["6", 999_991]), ('["9", 0]', None)):
            rows = admin.get("/admin/data/big", query={"after": after}).json["rows"]  # a scan would take longer than it may
            self.assertEqual(rows[0]["key"] if rows else None, first)
        fnserve.SQL_SECONDS = 0
        self.assertIn({"name": "big", "rows": None, "read_only": False}, admin.get("/admin/data").json["tables"])

    def test_backup_button(self):
        self.write("hello", "def main(request): return 'x'")
        self.write(".hello.py.draft"[:-3], "half")
        (self.dir / ".env").write_text("GREETING=hi\nMY_KEY='one\ntwo'\n# OLD_TOKEN=three\nNAME=x\n")
        app = self.make_app()
        self.assertEqual([self.call(app, "POST", "/admin/backup").status_code, self.html(app, "/admin/backup").status_code], [401, 405])
        self.assertIn('action="/admin/backup"', self.html(app, "/admin/settings").text)
        import zipfile
        for sent, env in (({}, b"GREETING=hi\nNAME=x\n"), ({"secrets": "1"}, (self.dir / ".env").read_bytes())):
            answer = self.html(app, "/admin/backup", "POST", data=sent)
            self.assertRegex(answer.headers["Content-Disposition"], r"attachment; filename=\"?fnserve-\d+-\d+\.zip")
            with zipfile.ZipFile(io.BytesIO(answer.data)) as archive:
                self.assertIsNone(archive.testzip())
                self.assertEqual(archive.namelist(), ["serverless.db", "functions/hello.py", ".env"])
                self.assertEqual(archive.read(".env"), env)
        self.assertEqual([name for name in os.listdir(self.dir) if name.startswith("tmp")], [])

    def test_settings_page(self):
        app = self.make_app(METRICS_TOKEN="hidden", PORT=8123)
        found = {row["name"]: row for row in self.admin(app).get("/admin/settings").json["settings"]}
        self.assertEqual((found["PORT"]["value"], found["PORT"]["source"]), (8123, "option"))
        self.assertEqual(set(found), {row.name for row in fnserve.SETTINGS_TABLE})
        self.assertNotIn("hidden", json.dumps(found))
        self.assertEqual(self.call(app, "GET", "/admin/settings").status_code, 401)

    def test_docs(self):
        self.write("greet", "SETTINGS = {'methods': ['GET'], 'parameters': {'name': {'type': 'string', 'required': True, 'description':"
                            " 'whom <b>'}}}\ndef main(request):\n    'Say hello.'\n    return 'x'")
        self.write("inner", "SETTINGS = {'auth': 'internal'}\ndef main(request): return 'x'")
        self.write("closed", "SETTINGS = {'auth': 'token'}\ndef main(request): return 'x'")
        self.write("helper", "def double(x): return x * 2")
        app = self.make_app()
        self.assertEqual([self.call(app, "GET", path).status_code for path in ("/openapi.json", "/docs")], [401, 401])
        app = self.make_app(DOCS="public")
        found = self.call(app, "GET", "/openapi.json").json
        self.assertEqual((found["openapi"], set(found["paths"])), ("3.1.0", {"/function/greet", "/function/closed"}))
        operation = found["paths"]["/function/greet"]["get"]
        self.assertEqual((operation["summary"], operation["parameters"][0]["name"], operation["parameters"][0]["required"]),
                         ("Say hello.", "name", True))
        self.assertIn("security", found["paths"]["/function/closed"]["post"])
        html = self.call(app, "GET", "/docs").text
        self.assertIn("whom &lt;b&gt;", html)
        self.assertIn("curl ", html)

    def test_docs_from_docstrings_and_hints(self):
        """Google's and Sphinx's ways to document parameters; SETTINGS go before them, and what the platform gives is none."""
        self.write("google", "SETTINGS = {'parameters': {'n': {'type': 'number', 'in': 'body', 'required': True}}}\n"
                             "def main(request, config) -> dict:\n"
                             '    """Count.\n\n    As far as it is told.\n\n    Args:\n        request (flask.Request): what came\n'
                             "        <https://example.com/x: y>\n        n (int): how far\n        what: things to count,\n            say: sheep\n"
                             '        config: the values of .env\n\n    Returns:\n        how many: there are\n    """\n    return {}')
        self.write("sphinx", "def main(request) -> str:\n    '''Sum.\n\n    :param float x: one\n    :param y: other\n    :returns: both\n    '''")
        app = self.make_app(DOCS="public")
        paths = self.call(app, "GET", "/openapi.json").json["paths"]
        got, sent = paths["/function/google"]["get"], paths["/function/google"]["post"]
        self.assertEqual((got["summary"], got["description"].splitlines()[0]), ("Count.", "As far as it is told."))
        self.assertEqual([(row["name"], row["in"], row["schema"]["type"], row["description"]) for row in got["parameters"]],
                         [("what", "query", "string", "things to count,")])
        self.assertEqual(sent["requestBody"]["content"]["application/json"]["schema"], {
            "type": "object", "required": ["n"], "properties": {"n": {"type": "number", "description": "how far"}}})
        self.assertEqual(list(got["responses"]["default"]["content"]), ["application/json"])
        summed = paths["/function/sphinx"]["get"]
        self.assertEqual([(row["name"], row["schema"]["type"], row["description"]) for row in summed["parameters"]],
                         [("x", "number", "one"), ("y", "string", "other")])
        self.assertEqual(list(summed["responses"]["default"]["content"]), ["text/html"])
        html = self.call(app, "GET", "/docs").text
        self.assertIn("As far as it is told.", html)
        self.assertIn("/function/google?what=...", html)

    def test_a_file_that_is_not_utf_8_is_not_edited(self):
        (self.dir / "functions" / "old.py").write_bytes("# -*- coding: big5 -*-\ndef main(request): return '中文'\n".encode("big5"))
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/function/old").text, "中文")
        refused = self.admin(app).get("/function/edit_function?module_name=old")
        self.assertEqual((refused.status_code, "UTF-8" in refused.json["error"]), (400, True))
        self.assertIn("def main", self.admin(app).get("/admin/versions?module_name=old&version=1").json["code"])
        for code, status in (("# -*- coding: latin-1 -*-\ndef main(request): return 'é'\n", 400), ("# coding: latin-1\ndef main(request): return 'e'\n", 201),
                             ("# \ud800\ndef main(request): return 'x'\n", 400)):
            sent = {"module_name": "new" if status == 201 else "bad", "code": code, "force": True}
            self.assertEqual(self.admin(app).post("/function/save_function", json=sent).status_code, status, code)
        self.assertEqual(self.call(app, "GET", "/function/new").text, "e")

    def test_settings_are_those_of_the_file(self):
        self.write("f", "import os\nREST = {}\nif os.name:\n    SETTINGS = {'methods': ['PUT'], os.name[:0] + 'timeout': 5, **REST, **{'retries': 1}}\ndef main(request):\n"
                        "    SETTINGS = {'nonsense': 1}\n    return 'x'")
        self.write("g", "SETTINGS = {'methods': ['PUT'], 'nonsense': 1}\ndef main(request): return 'x'")
        app = self.make_app()
        self.assertEqual(self.call(app, "PUT", "/function/f").data, b"x")
        f, g = self.admin(app).get("/function/list_functions").json["functions"]
        self.assertEqual([(row["methods"], row["status"]) for row in (f, g)], [(["PUT"], "fine"), (["PUT"], "broken")])

    def test_sql_that_would_write_to_our_tables(self):
        app = self.make_app()
        admin = self.admin(app)

        def sql(text: str) -> int:
            return admin.post("/admin/data", json={"action": "sql", "sql": text}).status_code
        for text, status in (("CREATE TABLE u(a)", 200), ("CREATE TABLE users(id INTEGER PRIMARY KEY AUTOINCREMENT)", 200),
                             ("ALTER TABLE users RENAME TO people", 200), ("DROP TABLE people", 200),
                             ("CREATE TRIGGER t AFTER INSERT ON u BEGIN UPDATE call_stats SET call_count = 9; END", 403),
                             ("CREATE TRIGGER t AFTER INSERT ON u BEGIN DELETE FROM u; END", 200), ("ALTER TABLE u RENAME TO fn_u", 403),
                             ("CREATE VIEW fn_new AS SELECT 1", 403), ("CREATE VIRTUAL TABLE notes USING fts5(body)", 200)):
            self.assertEqual(sql(text), status, text)
        self.assertIn("notes", [row["name"] for row in admin.get("/admin/data").json["tables"]])

    def test_csv_for_a_spreadsheet(self):
        app = self.make_app()
        admin = self.admin(app)
        rows = "('=1+1', '-5', '-1+2', x'00ff'), ('@SUM(1)', '+886 2', 7, zeroblob(20000))"
        for text in ("CREATE TABLE t(a, b, c, d)", "INSERT INTO t VALUES " + rows):
            self.assertEqual(admin.post("/admin/data", json={"action": "sql", "sql": text}).status_code, 200)
        self.assertEqual(admin.get("/admin/data/t?format=csv").data.decode("utf-8-sig"),
                         "a,b,c,d\r\n'=1+1,-5,'-1+2,00ff\r\n'@SUM(1),'+886 2,7,20000 bytes\r\n")

    def test_what_pages_tell(self):
        self.write("f", "SETTINGS = {'methods': ['POST']}\ndef main(request): return 'good'")
        app = self.make_app(DOCS="public")
        admin = self.client(app, Authorization="Bearer " + TOKEN, Accept="application/json", Accept_Language="en")
        for _ in range(5):
            self.call(app, "POST", "/function/f")
        docs = self.html(app, "/docs").text
        self.assertIn("-X POST", docs)
        self.assertRegex(docs, r'<form [^>]*method="POST"')
        sent = {"module_name": "f", "code": "import nowhere_to_be_found\ndef main(request): return 'x'", "force": True}
        self.assertIn("last good version", admin.post("/function/update_function", json=sent).json["message"])
        refused = admin.post("/function/update_function", json={"module_name": "f", "code": "x = 1"})
        self.assertEqual((refused.status_code, "not saved" in refused.json["message"]), (400, True))
        self.assertEqual(admin.post("/function/save_function", json={**sent, "force": False}).status_code, 409)
        self.assertIn("< 5 ms", html.unescape(self.html(app, "/function/show_stats").text))
        self.assertEqual(admin.post("/admin/data", json={"action": "sql", "sql": "SELECT 1e999"}).json["rows"], [["inf"]])

    def test_pages_are_safe(self):
        app = self.make_app(LOKI_TENANT=EVIL, DOCS="public")
        admin = self.admin(app)
        fill(self, lambda method, path, **options: admin.open(path, method, **options))
        client = self.login(app, Accept_Language="en")
        found = admin.get("/admin/queue").json["calls"][0]["id"]
        for path in [*PAGES, "/admin/queue?id=" + found, "/login?next=" + urllib.parse.quote(EVIL)]:
            with self.subTest(path=path):
                answer = client.get(path, headers={"Accept": "text/html"})
                self.assertNotRegex(answer.text, r"<(img src=x|script>window)|onerror=\"")
                if "Location" not in answer.headers:
                    self.assertEqual(answer.code, 404 if "nope" in path else 200)
                    self.assertIn("script-src 'self'", answer.headers["Content-Security-Policy"])
                    self.assertEqual(answer.headers["X-Frame-Options"], "DENY")
        for path in ("/admin/logs", "/admin/settings", EVIL_TABLE, EVIL_TABLE + "?key=[1]", "/docs", "/admin/data",
                     "/function/list_functions", "/function/edit_function?module_name=evil", "/monitoring/dashboard"):
            with self.subTest(path=path):  # it is there, but as text
                self.assertIn("&lt;img", client.get(path, headers={"Accept": "text/html"}).text)

    def test_languages(self):
        app = self.make_app()
        for header, word in (("en-US,en;q=0.9", "Log in"), ("zh-TW", "登入"), ("", "登入"), ("fr", "登入")):
            page = self.client(app, Accept_Language=header).get("/login").get_data(as_text=True)
            self.assertIn(word, page)
        for key, texts in fnserve.TEXTS.items():
            self.assertEqual(len([text for text in texts if text]), 2, key)


class CheckTest(Case):
    """What a save does before the new code serves, and calls on trial."""

    GOOD = "def main(request): return 'good'\n"

    def save(self, app, code: str, page: str = "update_function", **more: object):
        return self.admin(app).post("/function/" + page, headers={"Accept-Language": "en"}, json={
            "module_name": "f", "code": code, **more})

    def test_code_that_can_not_serve_is_not_saved(self):
        path = self.write("f", self.GOOD)
        app = self.make_app()
        self.assertEqual(self.call(app, "GET", "/function/f").data, b"good")
        seconds, fnserve.LOAD_SECONDS = fnserve.LOAD_SECONDS, 5.0
        self.addCleanup(setattr, fnserve, "LOAD_SECONDS", seconds)
        for code, line, reason in (
                ("import sys\nsys.exit(3)\n" + self.GOOD, 2, "SystemExit"), ("import os\nos._exit(3)\n" + self.GOOD, 0, "status 3"),
                ("import ctypes\nctypes.string_at(0)\n" + self.GOOD, 2, "SIGSEGV"), ("1/0\n" + self.GOOD, 1, "ZeroDivisionError"),
                ("x = 1\nwhile True: pass\n" + self.GOOD, 2, "too long"), ("x = bytearray(1 << 60)\n" + self.GOOD, 1, "MemoryError"),
                ("while True: print('x' * 10000)\n" + self.GOOD, 0, "printed too much"), ("x = 1\n", 0, "main()"),
                ("SETTINGS = {'metods': 1}\n" + self.GOOD, 0, "metods"), ("import nowhere_to_be_found\n" + self.GOOD, 1, "nowhere")):
            with self.subTest(code):
                answer = self.save(app, code)
                self.assertEqual((answer.status_code, answer.json["line"], answer.json["can_force"]), (400, line, True))
                self.assertIn(reason, answer.json["error"])
                self.assertEqual(path.read_text(), self.GOOD)
                self.assertEqual(self.call(app, "GET", "/function/f").data, b"good")

    def test_what_is_saved_all_the_same(self):
        path = self.write("f", self.GOOD)
        app = self.make_app()
        self.call(app, "GET", "/function/f")
        self.assertEqual(self.save(app, "1/0\n" + self.GOOD, force=True).status_code, 200)
        self.assertTrue(path.read_text().startswith("1/0"))
        self.assertEqual(self.call(app, "GET", "/function/f").data, b"good")  # the last good version serves
        self.assertEqual(self.save(app, "def main(", force=True).status_code, 400)  # but never what isn't Python
        answer = self.client(app, Authorization="Bearer " + TOKEN, Accept="application/json", Accept_Language="zh-TW").post(
            "/function/save_function", json={"module_name": "blank", "code": " "})
        self.assertEqual((answer.code, answer.json["error"]), (400, "程式碼是空的。"))
        html = fnserve.Client(app, headers={"Authorization": "Bearer " + TOKEN, "Accept": "text/html", "Accept-Language": "en"})
        page = html.post("/function/update_function", data={"module_name": "f", "code": "1/0 # <b>"})
        self.assertEqual(page.status_code, 400)
        self.assertIn("1/0 # &lt;b&gt;", page.text)
        self.assertRegex(page.text, '<label id="anyway"><input type="checkbox" name="force"')
        page = html.post("/function/update_function", data={"module_name": "f", "code": "1/0 # <b>", "force": "1"})
        self.assertEqual((page.status_code, path.read_text()), (303, "1/0 # <b>"))

    def test_what_it_tells(self):
        app = self.make_app()
        code = "import os, subprocess\nprint('loaded')\nsubprocess.Popen(['sleep', '60'])\nopen('made', 'w').write(os.environ['KEY'])\n" \
               "SETTINGS = {'methods': ['GET']}\n" + self.GOOD
        (self.dir / ".env").write_text("KEY=value\n")
        answer = self.save(app, code, "save_function")
        self.assertEqual(answer.status_code, 201)
        check = answer.json["check"]
        self.assertEqual((check["entries"], check["settings"], check["output"], check["warnings"]),
                         (["main"], {"methods": ["GET"]}, "loaded\n", []))
        self.assertEqual((self.dir / "made").read_text(), "value")  # the working directory and .env are the function's
        self.assertEqual(self.admin(app).post("/function/save_function", json={"module_name": "helper", "code": "x = 1\n"})
                         .json["check"]["warnings"], [fnserve.TEXTS["no_main"][0]])
        self.assertEqual(self.admin(app).post("/function/save_function", json={"module_name": "view_table", "code": self.GOOD})
                         .json["check"]["warnings"], [fnserve.TEXTS["admin_only"][0]])
        self.assertEqual(self.admin(app).get("/function/show_stats").json["stats"], {})

    def test_without_a_process(self):
        app = self.make_app()
        program, sys.executable = sys.executable, "/usr/bin/uwsgi"
        self.addCleanup(setattr, sys, "executable", program)
        answer = self.save(app, self.GOOD, "save_function")
        self.assertEqual((answer.status_code, answer.json["check"]["warnings"]), (201, [fnserve.TEXTS["unchecked"][1]]))
        self.assertEqual(self.admin(app).post("/admin/try", json={"module_name": "f"}).status_code, 503)

    def test_hooks_do_not_run(self):
        self.write("_hooks", "def on_start(): open('started', 'w')")
        app = self.make_app()
        self.call(app, "GET", "/health")
        wait_until((self.dir / "started").exists)  # of the server itself
        (self.dir / "started").unlink()
        self.assertEqual(self.save(app, self.GOOD, "save_function").status_code, 201)
        self.assertFalse((self.dir / "started").exists())

    def test_two_saves_at_once(self):
        self.write("f", self.GOOD)
        app = self.make_app()
        other = fnserve.App(app.settings, self.clock)
        version = self.admin(app).get("/function/edit_function?module_name=f").json["version"]
        answers = []

        def save(worker, text: str) -> None:
            client = fnserve.Client(worker, headers={"Authorization": "Bearer " + TOKEN})
            answers.append(client.post("/function/update_function", json={
                "module_name": "f", "code": f"# {text}\n" + self.GOOD, "version": version, "force": True}))
        threads = [threading.Thread(target=save, args=(worker, text)) for text, worker in (("a", app), ("b", other))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(sorted(answer.status_code for answer in answers), [200, 409])
        told = next(answer for answer in answers if answer.status_code == 409)
        self.assertEqual(told.json["version"], version + 1)
        self.assertEqual(self.save(app, "# c\n" + self.GOOD, version=version + 1).status_code, 200)
        other.store.close()

    def test_restore_is_checked(self):
        path = self.write("f", self.GOOD)
        app = self.make_app()
        self.call(app, "GET", "/function/f")
        self.save(app, "1/0\n", force=True)
        self.save(app, self.GOOD + "# 3\n")
        admin = self.admin(app)
        sent = {"module_name": "f", "version": 2}
        self.assertEqual(admin.post("/admin/restore", json=sent).status_code, 400)
        self.assertEqual(path.read_text(), self.GOOD + "# 3\n")
        html = fnserve.Client(app, headers={"Authorization": "Bearer " + TOKEN, "Accept": "text/html", "Accept-Language": "en"})
        self.assertIn("Make version 1 of “f” the newest again?", html.get("/admin/restore?module_name=f&version=1").text)
        self.assertIn('name="force"', html.post("/admin/restore", data=sent).text)
        self.assertEqual(admin.post("/admin/restore", json={**sent, "force": True}).status_code, 200)
        self.assertEqual(path.read_text(), "1/0\n")
        self.assertEqual(html.post("/admin/restore", data={"module_name": "f", "version": 1}).status_code, 303)
        self.assertEqual(path.read_text(), self.GOOD)
        diff = html.get("/admin/versions?module_name=f&version=3").text
        self.assertIn("<ins>+# 3</ins>", diff)
        self.assertIn("<del>-# 3</del>", diff)  # what is current lacks it

    def attempt(self, app, **sent: object):
        return self.admin(app).post("/admin/try", json={"module_name": "f", **sent})

    def test_calls_on_trial(self):
        self.write("f", "import os\ndef main(request):\n    print('seen', request.headers.get('X-A'))\n    return {'m': request.method, 's':"
                   " request.view_args['subpath'], 'q': request.args, 'b': request.get_data(as_text=True), 'p': os.getpid()}")
        self.write("_hooks", "def after_request(request, response):\n    response.headers['X-Hook'] = 'yes'\n    return response")
        app = self.make_app()
        found = self.attempt(app, method="POST", subpath="a/ b", query="n=1&q=漢%20", headers={"X-A": "b"}, body="漢").json
        body = json.loads(found["body"])
        self.assertNotEqual(body.pop("p"), os.getpid())
        self.assertEqual(body, {"m": "POST", "s": "a/ b", "q": {"n": "1", "q": "漢 "}, "b": "漢"})
        self.assertEqual((found["status"], found["output"], found["error"]), (200, "seen b\n", ""))
        self.assertIn(["X-Hook", "yes"], found["headers"])
        self.assertGreater(found["ms"], 0)
        found = self.attempt(app, module_name="new", code="def main(request):\n    print('p')\n    return 1/0").json
        self.assertEqual((found["status"], found["output"], found["line"]), (500, "p\n", 3))
        self.assertIn("ZeroDivisionError", found["error"])
        found = self.attempt(app, code="\ndef main(request):\n    return 1 / 0  # not saved").json
        self.assertIn("return 1 / 0  # not saved", found["error"])  # the lines of what ran, not of the file
        found = self.attempt(app, code="SETTINGS = {'auth': 'token', 'verify': 'github', 'async': True}\ndef main(request): return bytes([255])").json
        self.assertEqual((found["status"], found["body_base64"]), (200, "/w=="))
        found = self.attempt(app, code="def main(request):\n    return request.files['file'].read()", method="POST",
                             body_base64=fnserve.b2a_base64(b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhi\r\n--x--\r\n')
                             .decode(), headers={"Content-Type": "multipart/form-data; boundary=x"}).json
        self.assertEqual(found["body"], "hi")
        self.assertEqual(self.attempt(app, code="def main(").json["status"], 500)
        self.assertEqual(self.attempt(app, code="import os\ndef main(request):\n    print('bye')\n    os._exit(4)").json["output"], "bye\n")
        code = ("import os, traceback\nSETTINGS = {'timeout': .5}\ndef main(request):\n    try: 1/0\n    except ZeroDivisionError: traceback.print_exc()\n"
                "    print('x' * 9000)\n    while True: pass")
        found = self.attempt(app, code=code).json
        self.assertEqual((found["status"], found["line"], "ZeroDivisionError" in found["output"]), (504, 7, True))
        found = self.attempt(app, code=code.replace("while True: pass", "os.abort()")).json
        self.assertEqual((found["line"], "Fatal Python error: Aborted" in found["output"]), (7, True))
        self.assertEqual([self.attempt(app, **sent).status_code for sent in (
            {"module_name": "../x"}, {"module_name": "nope"}, {"headers": [1]}, {"method": "BREW"}, {"code": 1}, {"body_base64": "x"})],
            [400, 404, 400, 400, 400, 400])
        found = self.attempt(app, code="def main(request):\n    def parts():\n        yield request.headers['X-A']\n        1/0\n    return parts()",
                             headers={"X-A": "漢"}).json
        self.assertEqual(found["status"], 500)
        self.assertIn("ZeroDivisionError", found["error"])
        self.assertEqual(self.call(app, "POST", "/admin/try", json={"module_name": "f"}).status_code, 401)
        self.assertEqual(self.admin(app).get("/function/show_stats").json["stats"], {})  # a trial is no call

    def test_a_trial_may_queue(self):
        self.write("f", "def main(request): return 'x'")
        app = self.make_app()
        self.assertEqual(self.attempt(app, code="from fnserve import enqueue\ndef main(request): return enqueue('f')").json["status"], 200)
        self.assertEqual([row["state"] for row in self.admin(app).get("/admin/queue").json["calls"]], ["waiting"])


class BrowserTest(Case):
    """A real Chromium goes through the pages, as their user does."""
    options: tuple[str, ...] = ("--ui-lang", "en")

    def setUp(self) -> None:
        super().setUp()
        module("waitress")
        module("selenium.webdriver")
        need("chromium", shutil.which("chromium"))
        need("chromedriver", shutil.which("chromedriver"))
        self.browser = self.start_browser("profile")
        self.server = Server(self.dir, "--workers", "2", *self.options, FNSERVE_SECRET_TOKEN=TOKEN, FNSERVE_SECRET_KEY="k")
        self.addCleanup(self.server.kill_all)

    def start_browser(self, profile: str):
        webdriver = module("selenium.webdriver")
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
                     "--disable-component-update", "--disable-sync", f"--user-data-dir={self.dir}/{profile}",
                     "--disable-dev-shm-usage", "--lang=en-US"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        self.addCleanup(browser.quit)
        return browser

    def log_in(self) -> None:
        self.open("/login")
        self.find("#token").send_keys(TOKEN + "\n")
        self.wait(lambda: "Functions" in self.browser.title)

    def resize(self, width: int) -> None:
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500})

    def assert_quiet(self) -> None:
        """See that the console has no complaint but that 400, 401 and 409 are no 200."""
        bad = [entry for entry in self.browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
               and "Failed to load resource" not in entry["message"]]
        self.assertEqual(bad, [])

    def open(self, path: str) -> None:
        self.browser.get(f"http://127.0.0.1:{self.server.port}{path}")

    def find(self, selector: str):
        return self.browser.find_element("css selector", selector)

    def wait(self, true) -> None:
        """Wait for a page that is on its way."""
        common = module("selenium.common")

        def settled() -> bool:
            try:
                return true()
            except common.WebDriverException:
                return False
        wait_until(settled)

    def text(self) -> str:
        return self.find("body").text

    def shot(self, name: str) -> None:
        where = os.environ.get("FNSERVE_SHOTS")
        if where:
            self.browser.save_screenshot(os.path.join(where, f"{self.browser.execute_script('return innerWidth')}-{name}.png"))

    def marked_line(self) -> str:
        return self.browser.execute_script("return document.querySelector('textarea.code').style.getPropertyValue('--error-line')")

    def type_code(self, code: str) -> None:
        self.browser.execute_script("const c = document.querySelector('textarea.code'); c.value = arguments[0];"
                                    "c.dispatchEvent(new Event('input'))", code)

    def test_dashboard_jobs_and_queue(self):
        self.write("tick", "SETTINGS = {'schedule': 'every 1s'}\ndef main(request): return 'x'")
        self.write("bad", "SETTINGS = {'async': True, 'retries': 0}\ndef main(request): raise ValueError('broken <b>')")
        self.write("hello", "def main(request):\n    print('hi')\n    return 'x'")
        for _ in range(2):
            self.server.get("/function/bad", "POST")
        self.open("/login")
        self.find("#token").send_keys(TOKEN)
        self.find("button").click()
        self.wait(lambda: "Add function" in self.text())
        for width in (1280, 375):
            self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
                "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500})
            self.open("/monitoring/dashboard")
            before = self.find("#dashboard").text
            for _ in range(50):
                self.server.get("/function/hello")
            self.wait(lambda: self.find("#dashboard").text != before)  # it moves by itself
            self.find("#live").click()
            self.assertEqual(self.find("#live").text, "Go live")
            self.shot("dashboard")
            self.open("/admin/jobs")
            self.assertIn("tick", self.text())
            self.shot("jobs")
            self.find("form[action$='/pause'] button").click()
            self.wait(lambda: "paused" in self.text())
            self.find("form[action$='/resume'] button").click()
            self.wait(lambda: "paused" not in self.text())
            self.open("/admin/queue?state=dead")
            self.assertIn("broken <b>", self.text())
            self.shot("queue")
            self.open("/admin/logs?status=500")
            self.assertIn("ValueError", self.text())
            self.shot("logs")
        self.open("/admin/queue?state=dead")
        self.find("input[value=replay] ~ button").click()
        self.wait(lambda: "dead" in self.text())
        bad = [entry for entry in self.browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        self.assertEqual(bad, [])

    def test_walk(self):
        for width in (375, 1280):
            with self.subTest(width=width):
                self.resize(width)
                self.walk()
        self.assert_quiet()

    def test_editor(self):
        self.log_in()
        for width in (375, 1280):
            with self.subTest(width=width):
                self.resize(width)
                self.edit()
                self.assert_quiet()

    def edit(self) -> None:
        keys, path = webkeys(), self.write("edited", "def main(request):\n    return 'one'\n")
        self.open("/function/edit_function?module_name=edited")
        self.browser.execute_script("window.stays = 1")
        area = self.find("textarea.code")

        def value() -> str:
            return area.get_property("value")

        def save() -> None:
            area.send_keys(keys.CONTROL + "s")
            self.wait(lambda: not self.find("#news").get_property("hidden"))
        self.type_code("")
        for typed, text in (("if x:\nfor y in z:  # why\n", "if x:\n    for y in z:  # why\n        "), ("pass\n", "pass\n    "),
                            (keys.SHIFT + keys.TAB, None), ("ab" + keys.TAB + "c", "ab  c"), (keys.SHIFT + keys.TAB, None)):
            area.send_keys(typed)
            if text:
                self.assertTrue(value().endswith(text), value())
        self.assertTrue(value().endswith("pass\nab  c"), value())
        area.send_keys(keys.CONTROL + "a")
        area.send_keys(keys.TAB)
        self.assertEqual(value(), "    if x:\n        for y in z:  # why\n            pass\n    ab  c")
        self.find("[data-key=outdent]").click()
        self.assertEqual(value(), "if x:\n    for y in z:  # why\n        pass\nab  c")
        self.assertEqual(self.find(".gutter").text.split(), ["1", "2", "3", "4"])
        save()
        self.assertIn("Line 4", self.find("#news").text)
        self.assertEqual(self.marked_line(), "4")
        self.shot("error-line")
        self.type_code("def main(request):\n    print('out')\n    return {'q': request.args, 'j': request.json}\n")
        save()
        self.wait(lambda: "It serves main." in self.find("#news").text)
        self.assertIn("print('out')", path.read_text())
        self.type_code("1/0\n")
        save()
        self.wait(lambda: "ZeroDivisionError" in self.find("#news").text)
        self.assertIn("print('out')", path.read_text())
        self.shot("check")
        self.find("[name=force]").click()
        area.send_keys(keys.CONTROL + "s")
        self.wait(lambda: path.read_text() == "1/0\n")
        self.assertEqual(self.browser.execute_script("return window.stays"), 1)  # all that without leaving the page
        asks = "const e = new Event('beforeunload', {cancelable: true}); dispatchEvent(e); return e.defaultPrevented"
        self.wait(lambda: not self.browser.execute_script(asks))
        self.type_code("# never saved\n")
        self.assertTrue(self.browser.execute_script(asks))
        self.browser.get("about:blank")
        self.open("/function/edit_function?module_name=edited")
        self.assertTrue(self.find("#draft").is_displayed())
        self.shot("draft")
        self.assertEqual(self.find("textarea.code").get_property("value"), "# never saved\n")
        self.find("#draft button").click()
        self.assertEqual(self.find("textarea.code").get_property("value"), "1/0\n")
        self.assertFalse(self.find("#draft").is_displayed())
        self.browser.execute_script("document.querySelector('textarea.code').value = '1/0\\n'")
        self.try_panel()

    def try_panel(self) -> None:
        """Try what is in the editor, and what is saved."""
        def run(outcome: str) -> None:
            self.browser.execute_script("document.querySelector('#outcome').textContent = ''")
            self.find("#try button").click()
            self.wait(lambda: self.find("#outcome").text.startswith(outcome))

        def choose(name: str, value: str) -> None:
            self.find(f"#{name} option[value='{value}']").click()
        self.type_code("def main(request):\n    print('out')\n    return {'q': request.args, 'j': request.json, 'h': request.headers['X-A']}\n")
        choose("method", "POST")
        choose("kind", "json")
        for name, text in (("query", "n=1"), ("content", '{"a": [1]}'), ("headers", "X-A: b")):
            self.find("#" + name).clear()
            self.find("#" + name).send_keys(text)
        run("200")
        self.assertEqual(json.loads(self.find("#a_body").text), {"q": {"n": "1"}, "j": {"a": [1]}, "h": "b"})
        self.assertEqual(self.find("#a_output").text.strip(), "out")
        self.shot("try")
        self.assertLessEqual(self.browser.execute_script("return document.documentElement.scrollWidth - innerWidth"), 0)
        choose("which", "saved")  # it can't be loaded
        run("500")
        self.assertIn("ZeroDivisionError", self.find("#a_error").text)
        choose("which", "editor")
        self.find("#content").clear()
        upload = self.dir / "sent.txt"
        upload.write_text("hi")
        self.find("#file").send_keys(str(upload))
        self.type_code("def main(request):\n    return '<b>' + request.files['file'].filename\n")
        run("200")
        self.assertEqual(self.find("#a_body").text, "<b>sent.txt")
        self.assertFalse(self.find("#a_output").is_displayed())
        self.find("#past option[value='1']").click()  # the request before
        self.assertEqual(self.find("#content").get_property("value"), '{"a": [1]}')
        self.browser.execute_script("document.querySelector('textarea.code').value = '1/0\\n'")  # as saved: no draft is left

    def test_two_people_edit_the_same_function(self):
        path = self.write("shared", "def main(request):\n    return 'one'\n")
        first, second = self.browser, self.start_browser("other")
        for self.browser in (first, second):
            self.log_in()
            self.resize(1280)
            self.open("/function/edit_function?module_name=shared")
        for self.browser, text in ((first, "# first\n"), (second, "# second\n")):
            self.type_code(text + "def main(request):\n    return 'x'\n")
            self.find("textarea.code").send_keys(webkeys().CONTROL + "s")
            self.wait(lambda: not self.find("#news").get_property("hidden"))
        self.wait(lambda: "newer version" in self.find("#news").text)
        self.shot("conflict")
        self.assertTrue(path.read_text().startswith("# first"))
        self.assertTrue(self.find("textarea.code").get_property("value").startswith("# second"))
        self.find("textarea.code").send_keys(webkeys().CONTROL + "s")  # once more tells once more
        self.wait(lambda: self.find("#theirs").is_displayed())
        self.assertTrue(path.read_text().startswith("# first"))
        theirs = self.find("#theirs").get_attribute("href")
        mine = self.browser.current_window_handle
        self.find("#theirs").click()
        self.browser.switch_to.window(mine)
        self.find("textarea.code").send_keys(webkeys().CONTROL + "s")
        self.wait(lambda: "Saved as version 3" in self.find("#news").text)
        self.assertTrue(path.read_text().startswith("# second"))
        self.assert_quiet()
        self.browser.get(theirs)
        self.assertIn("+# first", self.text())  # nor is what was replaced lost
        self.shot("diff")
        self.open("/admin/versions?module_name=shared")
        self.shot("versions")
        self.find("a[href^='/admin/restore']").click()
        self.wait(lambda: "the newest again?" in self.text())
        self.find("button.danger").click()
        self.wait(lambda: "#4" in self.text())
        self.assertTrue(path.read_text().startswith("# first"))

    def walk(self) -> None:
        self.open("/function/list_functions")
        self.shot("login")
        self.find("#token").send_keys(TOKEN + "\n")
        self.wait(lambda: "Functions" in self.browser.title)
        self.find("main a.button").click()
        self.wait(lambda: "Add" in self.browser.title)
        self.find("#module_name").send_keys("tried")
        self.type_code("def main(request):\n    retrun 'x'\n")
        self.find("form button").click()
        self.wait(lambda: "Line 2" in self.text())
        self.assertIn("retrun", self.find("textarea.code").get_property("value"))
        self.assertEqual(self.marked_line(), "2")
        self.shot("mistake")
        self.type_code("def main(request):\n    print('seen')\n    return 'one'\n")
        self.find("form button").click()
        self.wait(lambda: "module_name=tried" in self.browser.current_url)
        self.assertEqual(self.server.get("/function/tried")[2], b"one")
        self.open("/function/list_functions")
        self.shot("list")
        self.assertLessEqual(self.browser.execute_script("return document.documentElement.scrollWidth - innerWidth"), 0)
        self.open("/function/edit_function?module_name=tried")
        area = self.find("textarea.code")
        area.send_keys(webkeys().CONTROL + webkeys().END)
        area.send_keys("def more():\n")
        area.send_keys("pass")
        self.assertTrue(area.get_property("value").endswith("def more():\n    pass"))
        area.send_keys(webkeys().CONTROL + "s")
        self.wait(lambda: "Saved" in self.text())
        self.shot("edit")
        self.find("#module_name").clear()
        self.find("#module_name").send_keys("renamed")
        self.find("form button").click()
        self.wait(lambda: "module_name=renamed" in self.browser.current_url)
        self.open("/function/delete_function?module_name=tried")
        self.find("button.danger").click()
        self.wait(lambda: "Deleted" in self.text())
        self.assertEqual(self.server.get("/function/tried")[0], 404)
        self.assertEqual(self.server.get("/function/renamed")[2], b"one")
        self.open("/admin/logs")
        self.assertIn("seen", self.text())
        self.shot("logs")
        self.open("/function/show_stats")
        self.assertIn("renamed", self.text())
        self.shot("stats")
        self.open("/admin/versions?module_name=renamed&version=1")
        self.assertIn("def main", self.text())
        self.open("/function/clear_stats")
        self.find("button.danger").click()
        self.wait(lambda: "Cleared" in self.text())
        self.open("/function/delete_function?module_name=renamed")
        self.find("button.danger").click()
        self.wait(lambda: "Deleted" in self.text())
        self.open("/logout")
        self.open("/function/list_functions")
        self.assertIn("Password", self.text())


class EveryPageTest(BrowserTest):
    """Every page in both languages, wide and narrow, light and dark, holding HTML in every field."""
    options = ("--docs", "public", "--loki-tenant", EVIL)
    test_walk = test_dashboard_jobs_and_queue = None

    def ask(self, method: str, path: str, json=None, headers=None):
        """Ask the server as the admin does."""
        headers = {"Authorization": "Bearer " + TOKEN, "Accept": "application/json", **(headers or {})}
        if json is not None:
            headers["Content-Type"] = "application/json"
        status, _, data = self.server.get(path, method, json if json is None else fnserve.dump_json(json), **headers)
        return fnserve.Response(data, status)

    def look(self, language: str, width: int, scheme: str) -> None:
        """Be a browser of this kind."""
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500})
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        self.browser.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {"Accept-Language": language}})

    def check(self, path: str) -> list[str]:
        """Return what is wrong with the page that is open: scripts that ran, a page wider than the window, axe's findings."""
        wrong = ["HTML was let through"] if self.browser.execute_script("return window.evil") else []
        if self.browser.execute_script("return document.documentElement.scrollWidth > innerWidth"):
            wrong.append("wider than the window")
        found = self.browser.execute_async_script(
            "const done = arguments[0]; axe.run(document, {preload: false, resultTypes: ['violations']}).then(r => done(r.violations.map(v => [v.impact, v.id,"
            " v.nodes.slice(0, 3).map(n => n.html.slice(0, 200) + ' ' + n.failureSummary)])))")
        return wrong + [str(row) for row in found if row[0] in ("serious", "critical")]

    KINDS = (("en", 1280, "light"), ("en", 375, "dark"), ("zh-TW", 1280, "dark"), ("zh-TW", 375, "light"))

    def login(self) -> None:
        self.browser.execute_cdp_cmd("Network.enable", {})
        self.open("/login")
        self.find("#token").send_keys(TOKEN + "\n")
        self.wait(lambda: self.browser.find_elements("css selector", "header a"))

    def press(self, selector: str) -> None:
        """Press a button, and wait for the page that it leads to."""
        button = self.find(selector)
        self.browser.execute_script("window.before = true")
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()
        self.wait(lambda: not self.browser.execute_script("return window.before") and self.browser.find_elements("css selector", "h1"))

    def put(self, **values: str) -> None:
        """Type into the fields of these names."""
        for name, value in values.items():
            field = self.find(f"main [name={name}]")
            field.clear()
            field.send_keys(value)

    def test_every_action(self):
        self.write("bad", "SETTINGS = {'async': True, 'retries': 0}\ndef main(request): raise ValueError('x')")
        self.write("v1/users", "SETTINGS = {'parameters': {'name': 'whom'}}\ndef main(request): return 'hi ' + request.args['name']")
        self.write("tick", "SETTINGS = {'schedule': '@yearly'}\ndef main(request): return 'x'")
        wait_until(lambda: b"tick" in self.ask("GET", "/scheduler/jobs").data)
        self.browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(self.dir / "got")})
        self.login()
        for kind in self.KINDS:
            with self.subTest(kind=kind):
                self.look(*kind)
                self.act()
        bad = [entry["message"] for entry in self.browser.get_log("browser") if "400" not in entry["message"]]  # SQL that is wrong
        self.assertEqual(bad, [])

    def act(self) -> None:
        """Do what can be done on the pages."""
        self.act_on_code()
        self.write("gone", "def main(request): return 'x'")
        self.open("/function/list_functions")
        folded = self.find("details:not([open]) summary")
        self.assertFalse(self.find("details a").is_displayed())
        folded.send_keys(webkeys().ENTER)
        self.assertTrue(self.find("details a").is_displayed())
        self.put(q="users")
        self.press("main form button")
        self.assertEqual(len(self.browser.find_elements("css selector", "main tbody tr")), 1)
        self.open("/function/list_functions?sort=calls")
        self.assertEqual(self.find("select").get_property("value"), "calls")
        self.open("/function/delete_function?module_name=gone")
        self.press("button.danger")
        self.assertEqual(self.server.get("/function/gone")[0], 404)
        self.ask("POST", "/function/bad")
        wait_until(lambda: b'"dead"' in self.ask("GET", "/admin/queue?function=bad&state=dead").data)
        for action in ("retry", "replay", "discard"):
            wait_until(lambda: b'"dead"' in self.ask("GET", "/admin/queue?function=bad&state=dead").data)
            self.open("/admin/queue?state=dead")
            self.press(f"input[value={action}] ~ button")
        for action in ("pause", "resume", "run"):
            self.open("/admin/jobs")
            self.press(f"form[action='/scheduler/jobs/tick/{action}'] button")
        self.open("/admin/logs")
        self.put(function="bad", status="5xx")
        self.press("main form button")
        self.assertIn("ValueError", self.text())
        self.open("/function/show_stats")
        self.press("td a[href*='function=bad']")
        self.assertIn("bad", self.find("h1").text)
        self.open("/function/clear_stats")
        self.press("button.danger")
        self.open("/docs")
        self.assertIn("curl", self.text())
        self.act_on_data()
        self.open("/admin/settings")
        before = len(list((self.dir / "got").glob("*.zip")))
        time.sleep(1.1 if before else 0)  # the name of a backup is its second
        self.find("form[action='/admin/backup'] button").click()
        wait_until(lambda: len(list((self.dir / "got").glob("*.zip"))) > before)

    def act_on_code(self) -> None:
        """Add a function, save a mistake, mend it, try it, set the version before back."""
        (self.dir / "functions" / "mine.py").unlink(missing_ok=True)
        self.open("/function/add_function")
        self.put(module_name="mine")
        self.type_code("def main(request): return 'one'")
        self.find("#edit form button").click()
        self.wait(lambda: "edit_function" in self.browser.current_url)
        for code, is_bad in (("def main(", True), ("def main(request): return 'two'", False)):
            self.type_code(code)
            self.find("#edit form button").click()
            self.wait(lambda: self.find("#news").text and ("bad" in self.find("#news").get_attribute("class")) == is_bad)
        self.assertEqual(self.server.get("/function/mine")[2], b"two")
        self.find("#try button").click()
        self.wait(lambda: self.find("#outcome").text.startswith("200"))
        self.assertEqual(self.find("#a_body").text, "two")
        self.open("/admin/versions?module_name=mine")
        self.press("a[href*='/admin/restore']")
        self.press("main form button")
        self.assertEqual(self.server.get("/function/mine")[2], b"one")

    def act_on_data(self) -> None:
        """Make a table of an evil name, fill, change and drop it."""
        name = 'x"; DROP'
        self.open("/admin/data")
        self.find("main details summary").click()
        self.put(table=name, columns="id INTEGER PRIMARY KEY, text TEXT")
        self.press("form input[value=create] ~ p button")
        self.press("main td a[href*=DROP]")
        self.assertEqual(self.find("h1").text, name)
        sent = {"action": "sql", "sql": """INSERT INTO "x""; DROP" (text) VALUES ('line <b>1</b>')"""}
        self.assertEqual(self.ask("POST", "/admin/data", json=sent).status_code, 200)
        self.browser.refresh()
        self.assertIn("line <b>1</b>", self.text())
        self.press("td a[href*=key]")
        self.put(values='{"text": "changed"}')
        self.press("form input[value=update] ~ p button")
        self.assertIn("changed", self.text())
        self.shot("table")
        self.press("td a[href*=key]")
        self.press("form input[value=delete] ~ button")
        self.assertNotIn("changed", self.text())
        self.browser.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
        self.press("button.danger")
        for sql, said in (("SELECT 6 * 7 AS answer", "42"), ("SELECT <b>", "<b>")):
            self.open("/admin/data")
            self.put(sql=sql)
            self.press("form input[value=sql] ~ p button")
            self.assertIn(said, self.text() + self.find("[name=sql]").get_property("value"))

    def test_every_page(self):
        path = os.environ.get("FNSERVE_AXE", "")
        need("axe-core (FNSERVE_AXE, the path of axe.min.js)", os.path.isfile(path))
        self.browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": Path(path).read_text(encoding="utf-8")})
        fill(self, self.ask)
        wait_until(lambda: b"dead" in self.ask("GET", "/admin/queue").data)
        wait_until(lambda: b"tick" in self.ask("GET", "/scheduler/jobs").data)
        queued = json.loads(self.ask("GET", "/admin/queue").data)["calls"][0]["id"]
        self.login()
        for kind in self.KINDS:
            self.look(*kind)
            for path in [*PAGES, "/admin/queue?id=" + queued]:
                with self.subTest(kind=kind, path=path):
                    self.browser.get_log("browser")
                    self.open(path)
                    self.assertEqual(self.browser.execute_script("return document.documentElement.lang"), kind[0])
                    self.shot("-".join(map(str, kind[::2])) + re.sub(r"\W+", "_", path)[:60])
                    self.assertEqual(self.check(path), [])
                    self.assertEqual([entry["message"] for entry in self.browser.get_log("browser")
                                      if "nope" not in path or "404" not in entry["message"]], [])


def webkeys():
    """Return selenium's names of keys."""
    return module("selenium.webdriver").Keys


# == 18 SERVER ============================================================


class ServerCase(Case):
    """Starts real servers."""

    def setUp(self) -> None:
        super().setUp()
        module("waitress")
        need("fork", hasattr(os, "fork"))

    def start(self, *options: str, limits: object = None, change: object = None, **environ: str) -> Server:
        server = Server(self.dir, *options, limits=limits, change=change, FNSERVE_SECRET_TOKEN=TOKEN, FNSERVE_SECRET_KEY="k", **environ)
        self.addCleanup(server.kill_all)
        return server

    def end(self, server: Server) -> None:
        """Stop a server, and see that it leaves no process and no port behind."""
        server.process.terminate()
        self.assertEqual(server.process.wait(20), 0)
        wait_until(lambda: not server.session(), 5)
        self.assertTrue(self.refuses(server))

    def stats(self, server: Server) -> dict:
        return json.loads(server.get("/function/show_stats", Authorization="Bearer " + TOKEN,
                                     Accept="application/json")[2])["stats"]

    def leader(self) -> int:
        """Return the process that holds the leader's lock."""
        inode = os.stat(self.dir / "journal" / "leader.lock").st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            if f":{inode} " in line and "->" not in line:
                return int(line.split()[4])
        return 0

    def refuses(self, server: Server) -> bool:
        """Tell whether nothing listens any more."""
        return self.refuses_port(server.port)

    @staticmethod
    def quietly(server, path: str, **headers: str) -> None:
        """Make a request whose answer doesn't matter."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            server.get(path, **headers)

    def nginx(self, ports: list, site: str = "") -> int:
        """Start a real nginx in front of servers, with our nginx.conf but for its TLS, or with a site; return its port."""
        program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
        need("nginx", program)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if not site:
            upstream, _, rest = (HERE / "nginx.conf").read_text().partition("server {\n    listen 80;")
            rest = re.sub(r"    ssl_certificate.*\n", "", rest[rest.index("server {"):]).replace("listen [::]:443 ssl http2;", "")
            servers = " ".join(f"server 127.0.0.1:{port};" for port in ports)
            site = upstream.replace("server 127.0.0.1:8000;", servers) + rest.replace("443 ssl http2", f"127.0.0.1:{port}")
        config = self.dir / "nginx.conf"
        config.write_text(f"daemon off; pid {self.dir}/nginx.pid; error_log {self.dir}/nginx.log; events {{}}\n"
                          f"http {{ access_log off; client_body_temp_path {self.dir}/b; proxy_temp_path {self.dir}/p;"
                          f" fastcgi_temp_path {self.dir}/f; uwsgi_temp_path {self.dir}/u; scgi_temp_path {self.dir}/s;\n"
                          f"{site}\n}}\n")
        os.chmod(self.dir, 0o755)
        checked = subprocess.run([program, "-t", "-c", config], capture_output=True, text=True)
        self.assertEqual(checked.returncode, 0, checked.stderr)
        process = subprocess.Popen([program, "-c", config], stderr=subprocess.DEVNULL)
        self.addCleanup(lambda: (process.terminate(), process.wait(10)))
        if ports:
            wait_until(lambda: not self.refuses_port(port))
        return port

    @staticmethod
    def refuses_port(port: int) -> bool:
        """Tell whether nothing listens on a port."""
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return True
        return False


class ServerTest(ServerCase):
    def test_first_start_in_an_empty_directory(self):
        (self.dir / "functions").rmdir()
        server = Server(self.dir, "--workers", "1")
        self.addCleanup(server.kill_all)
        self.assertEqual(server.get("/function/hello?name=Tony")[2], b"Hello, Tony!")
        self.assertEqual(server.get("/function/hello/Tony")[2], b"Hello, Tony!")
        token = fnserve.read_env(str(self.dir / ".env.local"))["SECRET_TOKEN"]
        self.assertEqual(server.get("/function/list_functions", Authorization="Bearer " + token)[0], 200)
        self.assertEqual(server.stop(), 0)
        self.assertNotIn(token, (self.dir / "stderr.txt").read_text())
        for path in self.dir.glob("serverless_error.log*"):
            self.assertNotIn(token, path.read_text())

    def test_counts_survive_every_kill(self):
        self.write("hello", "def main(request): return 'x'")
        server = self.start("--workers", "4")
        answered, attempted, lock, stop = [0], [0], threading.Lock(), threading.Event()

        def load():
            while not stop.is_set():
                with lock:
                    attempted[0] += 1
                try:
                    good = server.get("/function/hello")[0] == 200
                except (OSError, http.client.HTTPException):
                    good = False
                with lock:
                    answered[0] += good
        threads = [threading.Thread(target=load) for _ in range(6)]
        [thread.start() for thread in threads]
        for target in (200, 400, 600):
            wait_until(lambda: answered[0] > target)
            victim = server.workers()[0]
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: len(server.workers()) == 4 and victim not in server.workers())
        seen = self.stats(server)["hello"]
        self.assertGreater(seen, 500)
        wait_until(lambda: answered[0] > 800)
        server.kill_all()
        stop.set()
        [thread.join() for thread in threads]
        server = self.start("--workers", "2")
        first = self.stats(server)["hello"]
        self.assertTrue(answered[0] <= first <= attempted[0], (answered, first, attempted))
        self.assertEqual(self.stats(server)["hello"], first)
        for _ in range(50):
            server.get("/function/hello")
        self.assertEqual(self.stats(server)["hello"], first + 50)
        self.assertEqual(server.stop(), 0)

    def test_no_acknowledged_call_is_lost(self):
        """500 acknowledged calls, kill -9 of the whole tree at random moments: each runs, and those not interrupted run once."""
        runs = self.dir / "runs"
        self.write("work", "import os, time\nSETTINGS = {'async': True, 'retries': 9}\nhandle = os.open('runs', os.O_WRONLY | os.O_APPEND |"
                           " os.O_CREAT)\ndef main(request):\n    os.write(handle, request.args['n'].encode() + b'\\n')\n    time.sleep(.002)")
        seeded, acknowledged, server = random.Random(5), {}, [Server(self.dir, "--workers", "2")]
        self.addCleanup(lambda: server[0].kill_all())
        running, stop = set(), threading.Event()

        def send(first: int) -> None:
            for number in range(first, 500, 8):
                while number not in acknowledged and not stop.is_set():
                    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                        status, _, body = server[0].get(f"/function/work?n={number}", "POST")
                        if status == 202:
                            acknowledged[number] = json.loads(body)["id"]
        senders = [threading.Thread(target=send, args=(first,)) for first in range(8)]
        self.addCleanup(stop.set)
        for sender in senders:
            sender.start()
        for _ in range(5):
            target = len(acknowledged) + seeded.randrange(20, 90)
            wait_until(lambda: len(acknowledged) >= min(target, 500))
            server[0].kill_all()
            with contextlib.closing(sqlite3.connect(self.dir / "serverless.db")) as db:
                running |= {row[0] for row in db.execute("SELECT id FROM fn_queue WHERE state = 'running'")}
            server[0] = Server(self.dir, "--workers", "2")
        for sender in senders:
            sender.join(60)
        self.assertEqual(len(acknowledged), 500)

        def waiting() -> int:
            with contextlib.closing(sqlite3.connect(self.dir / "serverless.db", timeout=20)) as db:
                return db.execute("SELECT count(*) FROM fn_queue WHERE state <> 'done'").fetchone()[0]
        wait_until(lambda: waiting() == 0, 60)
        times = {number: 0 for number in range(500)}
        for line in runs.read_text().split():
            times[int(line)] += 1
        with contextlib.closing(sqlite3.connect(self.dir / "serverless.db")) as db:
            stored = [row[0] for row in db.execute("SELECT json_extract(request, '$.query') FROM fn_queue")]
        self.assertEqual([number for number, count in times.items() if count == 0], [])
        for number, count in times.items():  # one whose answer was cut off was sent again, so it is stored twice
            if acknowledged[number] not in running and stored.count(f"n={number}") == 1:
                self.assertEqual(count, 1, number)

    def test_a_job_fires_once_a_second_over_three_processes(self):
        self.write("tick", "SETTINGS = {'schedule': 'every 1s'}\ndef main(request): return 'x'")
        server = Server(self.dir, "--workers", "3")
        self.addCleanup(server.kill_all)

        def planned() -> list:
            with contextlib.closing(sqlite3.connect(self.dir / "serverless.db", timeout=20)) as db:
                return [row[0] for row in db.execute("SELECT planned FROM fn_queue WHERE job = 'tick' ORDER BY planned")]
        wait_until(lambda: len(planned()) >= 5)
        before = planned()
        steps = [round(b - a, 3) for a, b in zip(before, before[1:])]
        self.assertEqual(set(steps), {1.0})
        first = self.leader()
        self.assertIn(first, server.workers())
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: len(planned()) >= len(before) + 5)
        after = planned()
        self.assertEqual(len(after), len(set(after)))
        steps = [round(b - a, 3) for a, b in zip(after, after[1:])]
        self.assertLessEqual(max(steps), 5)  # another took over; what was late is made up for once
        self.assertNotEqual(self.leader(), first)

    def test_prometheus_sees_what_was_sent(self):
        """A real Prometheus, two workers, a restart: its queries give the numbers that were sent."""
        prometheus = shutil.which("prometheus")
        need("prometheus (apt-get install prometheus)", prometheus)
        self.write("hello", "from fnserve import counter\ndef main(request):\n    counter('seen').inc(who=request.args['who'])\n    return 'x'")
        ports = []
        for _ in range(2):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                ports.append(probe.getsockname()[1])
        (self.dir / "prometheus.yml").write_text(f"""
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
  - job_name: fnserve
    static_configs: [{{targets: ["127.0.0.1:{ports[0]}"]}}]
""")
        server = Server(self.dir, "--port", str(ports[0]), "--workers", "2")
        self.addCleanup(lambda: server.kill_all())
        watcher = subprocess.Popen([prometheus, "--config.file=prometheus.yml", "--storage.tsdb.path=tsdb",
                                    f"--web.listen-address=127.0.0.1:{ports[1]}"], cwd=self.dir, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, start_new_session=True)
        self.addCleanup(watcher.wait)
        self.addCleanup(watcher.kill)

        def query(text: str) -> float:
            with contextlib.suppress(OSError, IndexError, ValueError):
                url = f"http://127.0.0.1:{ports[1]}/api/v1/query?query={urllib.parse.quote(text)}"
                with urllib.request.urlopen(url, timeout=5) as answer:
                    return float(json.load(answer)["data"]["result"][0]["value"][1])
            return -1.0
        total = 0
        for turn in range(2):
            for number in range(40):
                server.get(f"/function/hello?who={number % 2}")
            total += 40
            wait_until(lambda: query('sum(fnserve_requests_total{endpoint="/function/hello",status="200"})') == total, 40)
            self.assertEqual(query('seen_total{who="1"}'), total / 2)
            self.assertEqual(query('fnserve_request_latency_seconds_count{endpoint="/function/hello"}'), total)
            self.assertEqual(query("fnserve_workers"), 2)
            if not turn:
                server.stop()
                server = Server(self.dir, "--port", str(ports[0]), "--workers", "2")

    def test_deadlines_and_bulkheads(self):
        self.write("spin", "import threading\nSETTINGS = {'timeout': 0.5}\ndef main(request):\n    while True: pass")
        self.write("stubborn", "SETTINGS = {'timeout': 0.5}\ndef main(request):\n    for _ in range(3):\n        try:\n"
                               "            while True: pass\n        except BaseException: pass\n    return 'late'")
        self.write("blocked", "import time\nSETTINGS = {'timeout': 0.5}\ndef main(request):\n    time.sleep(4)\n    return 'late'")
        self.write("slow", "import os, time\nSETTINGS = {'concurrency': 1, 'timeout': 20}\nmost = now = 0\ndef main(request):\n    global most, now\n"
                           "    now += 1; most = max(most, now)\n    while not os.path.exists('go'): time.sleep(.01)\n"
                           "    time.sleep(.02); now -= 1\n    return str(most)")
        self.write("busy", "import time\nSETTINGS = {'timeout': 2}\ndef main(request):\n    time.sleep(1.6)\n    return 'x'")
        self.write("drip", "import time\nSETTINGS = {'timeout': 1}\ndef main(request):\n    for n in range(5):\n        time.sleep(.5)\n        yield str(n)\n"
                           "    if request.args: time.sleep(9)")
        self.write("hello", "def main(request): return 'x'")
        server = self.start("--workers", "1", "--threads", "4")
        for name in ("spin", "stubborn", "blocked"):
            with self.subTest(name=name):
                began = time.monotonic()
                status, headers, body = server.get(f"/function/{name}")
                self.assertEqual((status, json.loads(body)["error"]), (504, "The function took too long"))
                self.assertEqual(json.loads(body)["request_id"], headers["X-Request-Id"])
                self.assertLess(time.monotonic() - began, 3.5)
        self.assertEqual(server.get("/function/drip")[2], b"01234")  # between chunks, not for the whole
        answers = []
        senders = [threading.Thread(target=lambda: answers.append(server.get("/function/slow")[2])) for _ in range(20)]
        for sender in senders:
            sender.start()
        self.assertEqual((server.get("/function/hello")[0], server.get("/health")[0]), (200, 200))  # others are not held up
        (self.dir / "go").touch()
        for sender in senders:
            sender.join()
        self.assertEqual(answers, [b"1"] * 20)  # one at a time, none refused
        statuses = []
        senders = [threading.Thread(target=lambda: statuses.append(server.get("/function/busy")[0])) for _ in range(8)]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        self.assertEqual(sorted(set(statuses)), [200, 503])  # three threads, two seconds: who can't be served is told
        self.assertEqual(server.get("/function/busy")[0], 200)
        logs = json.loads(server.get("/admin/logs?status=504", Authorization="Bearer " + TOKEN, Accept="application/json")[2])
        self.assertEqual([row["function"] for row in logs["invocations"]], ["blocked", "stubborn", "spin"])
        self.assertEqual(server.stop(), 0)

    def test_the_platform_answers_whatever_functions_do(self):
        begun = self.dir / "begun"
        self.write("imports", "import time\nfor _ in range(300): time.sleep(.01)\ndef main(request): return 'late'")
        self.write("_hooks", "import time\ndef before_request(request):\n    while 'hooked' in request.path: time.sleep(.01)")
        self.write("hooked", "def main(request): return 'never'")
        for name in ("one", "two"):
            self.write(name, f"import time\ndef main(request):\n    open({str(begun)!r}, 'a').write('x')\n    while True: time.sleep(.01)")
        self.write("hello", "def main(request): return 'x'")
        server = self.start("--workers", "1", "--threads", "3", "--timeout", "2")
        answers: list[tuple[str, int]] = []

        def ask(name: str) -> None:
            answers.append((name, server.get(f"/function/{name}")[0]))
        for names, others in ((["imports"] * 6, ["/function/hello", "/health"]), (["hooked"] * 6, ["/function/hello", "/health"]),
                              (["one"] * 5 + ["two"] * 5, ["/health", "/metrics"])):
            answers.clear()
            senders = [threading.Thread(target=ask, args=(name,)) for name in names]
            for sender in senders:
                sender.start()
            if "one" in names:
                wait_until(lambda: begun.exists() and begun.stat().st_size == 3)  # all places are taken
            for path in others:
                began = time.monotonic()
                self.assertEqual(server.get(path)[0], 200)
                self.assertLess(time.monotonic() - began, 1.5)
            for sender in senders:
                sender.join()
            self.assertLessEqual({status for _, status in answers}, {500, 503, 504})  # 500: who finds that it could not be loaded
            self.assertIn(504, {status for _, status in answers})
        self.assertEqual(server.get("/function/hello")[0], 200)

    def test_a_load_that_hung_leaves_no_lock(self):
        path = self.write("hang", "import time\nfor _ in range(3000): time.sleep(.01)\ndef main(request): return 'late'")
        server = self.start("--workers", "1", "--timeout", "1")
        statuses: list[int] = []
        senders = [threading.Thread(target=lambda: statuses.append(server.get("/function/hang")[0])) for _ in range(4)]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        self.assertLessEqual(set(statuses), {500, 503, 504})
        path.write_text("def main(request): return 'good'")
        self.assertEqual(server.get("/function/hang")[2], b"good")
        path.write_text("while True: pass\ndef main(request): return 'late'")  # the version before serves on
        self.assertEqual(server.get("/function/hang")[0], 504)
        self.assertEqual([server.get("/function/hang")[2] for _ in range(3)], [b"good"] * 3)

    def test_children_of_functions(self):
        self.write("ended", "import multiprocessing, time\ndef main(request):\n"
                            "    child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\n"
                            "    child.start(); child.terminate(); child.join(10)\n    return str(child.exitcode)")
        self.write("later", "import os\nfrom flask import after_this_request\nmade = []\ndef main(request):\n"
                            "    if request.args:\n        return str(os.waitpid(made[0], 0)[1])\n    @after_this_request\n    def fork(response):\n"
                            "        made.append(os.fork())\n        return response\n    return 'x'")
        server = self.start("--workers", "1")
        self.assertEqual(server.get("/function/ended")[2], b"-15")
        self.assertEqual(server.get("/function/later")[2], b"x")
        self.assertEqual(server.get("/function/later?wait=1")[2], b"0")  # it ended by itself

    def test_who_does_not_read_is_disconnected(self):
        need("waitress", module("waitress"))
        self.write("big", "def main(request): return iter([b'x' * 1000000] * 60)")
        app = self.make_app()
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listening:
            server = fnserve.waitress_server(app, listening, app.settings)
            threading.Thread(target=server.run, daemon=True).start()
            self.addCleanup(server.close)
            with contextlib.closing(socket.create_connection(listening.getsockname())) as client:
                client.sendall(b"GET /function/big HTTP/1.1\r\nHost: x\r\n\r\n")
                wait_until(lambda: any(channel.total_outbufs_len > 16_000_000 for channel in list(server.active_channels.values())))
                server.maintenance(time.time() + 30)
                self.assertTrue(server.active_channels)
                server.maintenance(time.time() + 61)
                wait_until(lambda: not server.active_channels)
        wait_until(lambda: self.admin(app).get("/admin/logs").json["invocations"])  # its thread is free, and it was recorded

    def test_a_first_look_without_waitress(self):
        (self.dir / "hidden").mkdir()
        (self.dir / "hidden" / "waitress.py").write_text("raise ImportError('none here')")
        self.write("f", "def main(request): return 'x'")
        server = Server(self.dir, PYTHONPATH=str(self.dir / "hidden"))
        self.addCleanup(server.kill_all)
        self.assertEqual(server.get("/function/f")[2], b"x")
        self.assertIn("for a first look only", (self.dir / "stderr.txt").read_text())
        self.assertEqual(server.stop(), 0)  # by SIGTERM

    def test_bodies_of_just_the_size_and_what_waitress_refuses(self):
        self.write("size", "def main(request): return str(len(request.get_data()))")
        server = self.start("--workers", "1", "--max-body", "1000")

        def chunked(data: bytes) -> bytes:
            return b"".join(b"1\r\n%c\r\n" % byte for byte in data) + b"0\r\n\r\n"
        head = b"POST /function/size HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        for raw, status, body in (
                (head + b"Content-Length: 1000\r\n\r\n" + b"x" * 1000, b"200", b"1000"), (head + b"Content-Length: 1001\r\n\r\n" + b"x" * 1001, b"413", b""),
                (head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b"x" * 1000), b"200", b"1000"),
                (head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b"x" * 1001), b"413", b""),
                (head + b"Content-Length: 99999999\r\n\r\n", b"413", b""), (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", b"400", b"")):
            with contextlib.closing(socket.create_connection(("127.0.0.1", server.port), timeout=20)) as connection:
                connection.sendall(raw)
                answer = b"".join(iter(functools.partial(connection.recv, 65536), b""))
            self.assertEqual((answer[9:12], answer.endswith(body)), (status, True), answer[:200])
        metrics = server.get("/metrics")[2].decode()
        for status, count in ((200, 2), (413, 2)):
            self.assertRegex(metrics, rf'endpoint="/function/size",status="{status}"}} {count}\n')
        self.assertRegex(metrics, r'fnserve_requests_total{method="POST",endpoint="\(unknown\)",status="413"} 1\n')
        self.assertRegex(metrics, r'endpoint="\(unknown\)",status="400"} 1\n')
        self.assertIn("fnserve_workers 1\n", metrics)

    def test_the_file_may_have_another_name(self):
        self.write("f", "import fnserve\ndef main(request): return [fnserve.__version__, fnserve.request.method]")
        for name in ("server_2.py", "server-2.py", "link"):
            with self.subTest(name=name), tempfile.TemporaryDirectory() as elsewhere:
                (Path(elsewhere) / "fnserve.py").write_text((HERE / "fnserve.py").read_text().replace("__version__ = ", "__version__ = '9' + "))
                if name == "link":
                    (self.dir / name).symlink_to(Path(elsewhere) / "fnserve.py")
                server = Server(self.dir, "--workers", "1", script=name)
                self.addCleanup(server.kill_all)
                (self.dir / "fnserve.py").write_text("raise SystemExit('the wrong one')")
                version = ("9" if name == "link" else "") + fnserve.__version__
                self.assertEqual(json.loads(server.get("/function/f")[2]), [version, "GET"])
                old = set(server.workers())
                os.kill(server.process.pid, signal.SIGHUP)
                wait_until(lambda: server.workers() and not old & set(server.workers()))
                self.assertEqual(json.loads(server.get("/function/f")[2]), [version, "GET"])
                self.assertEqual(server.stop(), 0)

    def test_a_stuck_worker_is_replaced(self):
        self.write("stuck", "import time\nSETTINGS = {'timeout': 0.2}\ndef main(request): time.sleep(60)")
        self.write("ticks", "import time\ndef main(request):\n    while True:\n        yield 'x'\n        time.sleep(.1)")
        self.write("hello", "import os\ndef main(request): return str(os.getpid())")
        server = self.start("--workers", "1", "--grace", "1")
        first = server.get("/function/hello")[2]
        with contextlib.closing(socket.create_connection(("127.0.0.1", server.port))) as watching:  # keeps the old one until GRACE
            watching.sendall(b"GET /function/ticks HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertTrue(watching.recv(1000))
            self.assertEqual(server.get("/function/stuck")[0], 504)
            wait_until(lambda: len(server.workers()) == 2)  # another is there before this one has gone
            self.assertEqual(server.get("/function/hello")[0], 200)
        wait_until(lambda: server.workers() and int(first) not in server.workers())
        self.assertNotEqual(server.get("/function/hello")[2], first)

    def test_a_stop_lets_queued_calls_finish_and_ends_dashboards(self):
        marks = self.dir / "marks"
        self.write("slow", f"import time\ndef main(request):\n    open({str(marks)!r}, 'a').write('begun ')\n    time.sleep(1)\n"
                           f"    open({str(marks)!r}, 'a').write('ended ')\n    return 'x'")
        for stop in (signal.SIGTERM, signal.SIGHUP):
            marks.write_text("")
            server = self.start("--workers", "1")
            wait_until(server.workers)
            first = server.workers()
            with contextlib.closing(socket.create_connection(("127.0.0.1", server.port))) as watching:
                watching.sendall(f"GET /monitoring/stream HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
                self.assertTrue(watching.recv(1000))
                self.assertEqual(server.get("/function/slow", Prefer="respond-async")[0], 202)
                wait_until(lambda: marks.read_text() == "begun ")
                began = time.monotonic()
                server.process.send_signal(stop)
                if stop == signal.SIGTERM:
                    self.assertEqual(server.process.wait(20), 0)
                else:
                    wait_until(lambda: server.workers() and not set(first) & set(server.workers()))
                self.assertLess(time.monotonic() - began, 10)  # GRACE is 30
            self.assertEqual(marks.read_text(), "begun ended ", stop)
            server.stop()
        server = self.start("--workers", "1")
        self.assertEqual(json.loads(server.get("/admin/queue", Authorization="Bearer " + TOKEN, Accept="application/json")[2])["calls"][0]["state"], "done")
        self.assertEqual(marks.read_text(), "begun ended ")

    def test_signals_while_a_new_file_is_tried(self):
        directory = self.dir / "gone"
        directory.mkdir()
        server = self.start("--workers", "1")
        self.assertEqual(server.get("/health")[0], 200)
        server.process.send_signal(signal.SIGHUP)
        server.process.send_signal(signal.SIGTERM)
        self.assertEqual(server.process.wait(20), 0)
        server = self.start("--workers", "1")
        self.assertEqual(server.get("/health")[0], 200)
        for _ in range(12):  # some while the new one starts
            server.process.send_signal(signal.SIGHUP)
            self.assertEqual(server.get("/health")[0], 200)
            time.sleep(.1)
        self.assertIn(server.stop(), (0, -signal.SIGTERM))  # the latter while Python starts, when its workers end by themselves
        server = Server(directory, "--workers", "1", "--dir", str(self.dir))
        self.addCleanup(server.kill_all)
        self.assertEqual(server.get("/health")[0], 200)
        shutil.rmtree(directory)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "does not start" in (self.dir / "serverless_error.log").read_text())
        self.assertEqual(server.get("/health")[0], 200)
        self.assertEqual(server.stop(), 0)

    def test_a_stop_waits_for_workers_of_before_a_sighup(self):
        self.write("slow", "import os, time\ndef main(request):\n    open('begun', 'w').close()\n    while not os.path.exists('free'):\n"
                           "        time.sleep(.01)\n    return 'done'")
        self.write("who", "import os\ndef main(request): return str(os.getpid())")
        server = self.start("--workers", "1")
        wait_until(server.workers)
        old, answers = set(server.workers()), []
        caller = threading.Thread(target=lambda: answers.append(server.get("/function/slow")[2]))
        caller.start()
        wait_until((self.dir / "begun").exists)
        os.kill(server.process.pid, signal.SIGHUP)
        wait_until(lambda: int(server.get("/function/who")[2]) not in old)
        server.process.terminate()
        with self.assertRaises(subprocess.TimeoutExpired):  # the new one has long gone
            server.process.wait(1)
        (self.dir / "free").touch()
        self.assertEqual((server.process.wait(20), server.session()), (0, []))
        caller.join(20)
        self.assertEqual(answers, [b"done"])

    def test_sighup_upgrades_without_a_failed_request(self):
        self.write("hello", "import fnserve\ndef main(request): return fnserve.__version__")
        server = self.start("--workers", "2")
        failed, versions, stop = [], set(), threading.Event()

        def ask() -> None:
            while not stop.is_set():
                try:
                    status, _, body = server.get("/function/hello")
                    versions.add(body)
                    if status != 200:
                        failed.append(status)
                except OSError as error:
                    failed.append(error)
        asking = [threading.Thread(target=ask) for _ in range(4)]
        self.addCleanup(stop.set)
        for thread in asking:
            thread.start()
        code = (self.dir / "fnserve.py").read_text()
        wait_until(lambda: versions)
        for broken in (code[:50_000] + "(", code.replace("def prepare(", "def prepared(")):
            (self.dir / "fnserve.py").write_text(broken)
            before = (self.dir / "stderr.txt").read_text().count("does not start")
            os.kill(server.process.pid, signal.SIGHUP)
            wait_until(lambda: (self.dir / "stderr.txt").read_text().count("does not start") > before)
        old = set(server.workers())
        (self.dir / "fnserve.py").write_text(code.replace(f'__version__ = "{fnserve.__version__}"', '__version__ = "99"'))
        os.kill(server.process.pid, signal.SIGHUP)
        wait_until(lambda: b"99" in versions)
        wait_until(lambda: len(server.workers()) == 2 and not old & set(server.workers()))
        stop.set()
        for thread in asking:
            thread.join()
        self.assertEqual((failed, server.get("/function/hello")[2]), ([], b"99"))
        self.assertEqual(server.stop(), 0)

    def test_a_second_signal_ends_at_once(self):
        server = self.start("--workers", "1")
        self.write("slow", "import time\ndef main(request):\n    open('began', 'w').close()\n    time.sleep(30)")
        threading.Thread(target=self.quietly, args=(server, "/function/slow"), daemon=True).start()
        wait_until((self.dir / "began").exists)
        began = time.monotonic()
        server.process.terminate()
        wait_until(lambda: self.refuses(server))  # the first has been heard
        server.process.terminate()
        server.process.wait(20)
        self.assertLess(time.monotonic() - began, 5)

    def test_a_function_that_kills_its_worker(self):
        self.write("die", "import os\ndef main(request): os._exit(7)")
        self.write("hello", "def main(request): return 'x'")
        server = self.start("--workers", "2")
        with self.assertRaises((OSError, http.client.HTTPException)):
            server.get("/function/die")
        wait_until(lambda: len(server.workers()) == 2)
        self.assertEqual(server.get("/function/hello")[2], b"x")
        self.assertEqual(server.stop(), 0)

    def test_drain(self):
        self.write("slow", "import time\ndef main(request):\n    open('began', 'w').close()\n    time.sleep(1)\n"
                           "    return 'done'")
        server, answers = self.start("--workers", "2"), []
        thread = threading.Thread(target=lambda: answers.append(server.get("/function/slow")[2]))
        thread.start()
        wait_until((self.dir / "began").exists)
        self.assertEqual(server.stop(), 0)
        thread.join()
        self.assertEqual(answers, [b"done"])

    def test_workers_end_with_their_supervisor(self):
        server = self.start("--workers", "2")
        wait_until(lambda: len(server.workers()) == 2)
        workers = server.workers()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(20)
        wait_until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() and
                                   Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers))

    def test_programs_of_functions_are_not_pinned(self):
        self.write("cores", "import os, subprocess, sys, threading\ndef main(request):\n"
                            "    code = 'import os; print(len(os.sched_getaffinity(0)))'\n"
                            "    program = int(subprocess.run([sys.executable, '-c', code], capture_output=True).stdout)\n"
                            "    found = []\n"
                            "    thread = threading.Thread(target=lambda: found.append(len(os.sched_getaffinity(0))))\n"
                            "    thread.start(); thread.join()\n    return [program, found[0]]")
        self.write("here", "import os\ndef main(request): return [len(os.sched_getaffinity(0))]")
        cores = len(os.sched_getaffinity(0))
        server = self.start("--workers", "1", "--threads", "1")
        for _ in range(2):
            self.assertEqual(json.loads(server.get("/function/here")[2]), [1])
            self.assertEqual(json.loads(server.get("/function/cores")[2]), [cores, cores])

    def test_without_supervisor_and_without_waitress(self):
        self.write("hello", "def main(request): return 'x'")
        server = self.start("--workers", "0")
        self.assertEqual(server.get("/function/hello")[2], b"x")
        self.assertEqual(server.stop(), 0)
        blocked = self.dir / "blocked"
        blocked.mkdir()
        (blocked / "waitress.py").write_text("raise ImportError")
        server = self.start(PYTHONPATH=str(blocked))
        self.assertEqual(server.get("/function/hello")[2], b"x")
        self.assertIn("waitress is missing", (self.dir / "stderr.txt").read_text())

    def test_forwarded_headers_only_from_the_proxy(self):
        self.write("who", "def main(request): return [request.remote_addr, request.scheme]")
        forwarded = {"X_Forwarded_For": "9.9.9.9", "X_Forwarded_Proto": "https"}
        server = self.start("--workers", "1")
        self.assertEqual(json.loads(server.get("/function/who", **forwarded)[2]), ["9.9.9.9", "https"])
        server.stop()
        server = self.start("--workers", "1", FNSERVE_TRUSTED_PROXY="10.0.0.1")
        self.assertEqual(json.loads(server.get("/function/who", **forwarded)[2]), ["127.0.0.1", "http"])

    def test_body_over_the_limit(self):
        self.write("hello", "def main(request): return 'x'")
        server = self.start("--workers", "1", "--max-body", "1kB")
        self.assertEqual(server.get("/function/hello", "POST", b"x" * 5000)[0], 413)
        self.assertEqual(server.get("/function/hello")[0], 200)

    def test_a_large_upload_goes_to_disk(self):
        self.write("up", "def main(request):\n    f = request.files['f']\n    f.seek(0, 2)\n    return [f.tell(), max(int(l.split()[1]) for l in"
                         " open('/proc/self/status') if l.startswith('VmHWM'))]")
        server = Server(self.dir, "--workers", "0", "--max-body", "200MiB")
        self.addCleanup(server.kill_all)
        edge = b'--B\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\n%b\r\n--B--\r\n'
        kind = "multipart/form-data; boundary=B"
        small = json.loads(server.get("/function/up", "POST", edge % b"x", Content_Type=kind)[2])
        large = json.loads(server.get("/function/up", "POST", edge % (b"x" * 100_000_000), Content_Type=kind)[2])
        self.assertEqual((small[0], large[0]), (1, 100_000_000))
        self.assertLess(large[1] - small[1], 20_000)

    def test_gunicorn_and_waitress_serve(self):
        need("gunicorn", module("gunicorn"))
        self.write("hello", "def main(request): return 'x'")
        shutil.copy(HERE / "fnserve.py", self.dir)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {**os.environ, "FNSERVE_SECRET_TOKEN": TOKEN, "FNSERVE_SECRET_KEY": "k", "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.Popen([sys.executable, "-m", "gunicorn", "-w", "4", "-b", f"127.0.0.1:{port}", "fnserve:app"],
                                   cwd=self.dir, env=env, stderr=subprocess.DEVNULL, start_new_session=True)
        self.addCleanup(lambda: (os.killpg(process.pid, signal.SIGKILL), process.wait()))

        def get(path: str, **headers: str) -> bytes:
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
            return urllib.request.urlopen(request, timeout=10).read()

        def up() -> bool:
            with contextlib.suppress(OSError):
                return get("/function/hello") == b"x"
            return False
        wait_until(up)
        for _ in range(40):
            get("/function/hello")
        stats = json.loads(get("/function/show_stats", Authorization="Bearer " + TOKEN, Accept="application/json"))
        self.assertEqual(stats["stats"], {"hello": 41})

    def test_behind_nginx(self):
        need("openssl", shutil.which("openssl"))
        self.write("hello", "def main(request): return [request.remote_addr, request.url]")
        self.write("slow", "import time\ndef main(request):\n    for n in range(3):\n        yield f'data: {n}\\n\\n'\n"
                           "        time.sleep(.3)")
        server = self.start("--workers", "2")
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            two.bind(("127.0.0.1", 0))
            plain, tls = one.getsockname()[1], two.getsockname()[1]
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                        "-keyout", self.dir / "key.pem", "-out", self.dir / "cert.pem"], check=True, capture_output=True)
        site = subprocess.run([sys.executable, "-B", HERE / "fnserve.py", "nginx", "--server-name", "localhost", "--port",
                               str(server.port)], cwd=self.dir, check=True, capture_output=True, text=True).stdout
        site = site.replace("listen [::]:80;", "").replace("listen [::]:443 ssl http2;", "")
        site = site.replace("listen 80;", f"listen 127.0.0.1:{plain};").replace("listen 443 ssl", f"listen 127.0.0.1:{tls} ssl")
        site = site.replace("/etc/letsencrypt/live/localhost/fullchain.pem", str(self.dir / "cert.pem"))
        site = site.replace("/etc/letsencrypt/live/localhost/privkey.pem", str(self.dir / "key.pem"))
        self.nginx([], site)
        import ssl
        context = ssl.create_default_context(cafile=self.dir / "cert.pem")
        context.check_hostname = False

        def get(path: str, method: str = "GET", body: object = None):
            connection = http.client.HTTPSConnection("127.0.0.1", tls, context=context, timeout=10)
            connection.request(method, path, body, {"Host": "localhost", "Content-Type": "application/json"})
            return connection.getresponse()

        def up() -> bool:
            with contextlib.suppress(OSError):
                return get("/function/hello").status == 200
            return False
        wait_until(up)
        self.assertEqual(json.loads(get("/function/hello").read()), ["127.0.0.1", "https://localhost/function/hello"])
        answer, began = get("/function/slow"), time.monotonic()
        self.assertEqual(answer.read(9), b"data: 0\n\n")
        self.assertLess(time.monotonic() - began, .55)  # the stream takes .9 s: it was not held back
        answer.read()
        self.assertEqual(get("/metrics").status, 403)
        cookie = get("/login", "POST", json.dumps({"token": TOKEN})).headers["Set-Cookie"]
        self.assertIn("Secure", cookie)
        self.assertIn(429, [get("/login", "POST", '{"token": "x"}').status for _ in range(8)])


class MisbehavingTest(ServerCase):
    """Functions that do what they should not: each costs its own callers at most, the others answer."""

    #: what main does, and what its caller gets: a status, or None where its worker dies
    ROWS = (
        ("import sys; sys.exit(3)", 500), ("import os; os._exit(3)", None), ("import os; os.abort()", None),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", None), ("raise KeyboardInterrupt", 500),
        ("return main(request)", 500),
        ("x = []\nfor _ in range(10**5): x = [x]\nreturn x", 500), ("x = {}\nx['x'] = x\nreturn x", 500),
        ("while True:\n  try:\n    while True: pass\n  except BaseException: pass", 504),
        ("def drops():\n  while True: yield ''\nreturn drops()", 504),
        ("import threading\nlock = threading.Lock()\nlock.acquire(); lock.acquire()", 504),
        ("print('x' * 10_000_000); return 'x'", 200), ("return 'x' * 20_000_000", 200),
        ("import os\nif not os.fork(): return 'child'\nreturn 'x'", 200),
        ("from flask import Response\nimport os\nreturn Response(type('It', (), {'__iter__': lambda self: (os.fork(), iter(['a']))[1]})())", 200),
        ("import os, sys\npid = os.fork()\nif not pid: sys.exit(7)\nreturn [os.waitpid(pid, 0)[1] // 256]", 200),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(1,)).start()\nreturn 'x'", 200),
        ("class E(Exception):\n  def __str__(self): raise ValueError\n  __repr__ = __str__\nraise E", 500),
        ("class E:\n  def __str__(self): raise SystemExit\n  __repr__ = __str__\nreturn E()", 500),
        ("return 'x', {'X-Big': 'y' * 50_000}", 200), ("return 'x', [(f'X-{n}', 'y') for n in range(90)]", 200),
        ("import sys\nfor part in (sys.stdin, sys.stdout, sys.stderr): part.close()\nprint('x'); return 'x'", 200),
        ("import os; os.chdir('/'); return 'x'", 200), ("import os; os.environ.clear(); return 'x'", 200),
        ("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)", 500), ("import gc; gc.disable(); return 'x'", 200),
        ("import sys; sys.setrecursionlimit(200); return 'x'", 200), ("import builtins; builtins.len = None; return 'x'", 0),
        ("import time\ntime.time = lambda: 0\ntime.monotonic = time.perf_counter = time.sleep = None\nreturn 'x'", 200),
        ("import time\ntime.time = None\nreturn 'x'", 0),
        ("import sys\nsys.setrecursionlimit(10**6)\nx = []\nfor _ in range(10**6): x = [x]\nreturn repr(x)", 0),
    )

    def test_others_answer(self):
        self.write("hello", "def main(request): return 'x'")
        for number, (code, _) in enumerate(self.ROWS):
            body = "".join(f"    {line}\n" for line in code.splitlines())
            self.write(f"bad{number}", f"SETTINGS = {{'timeout': 1}}\ndef main(request):\n{body}")
        server = self.start("--workers", "2", "--grace", "5")
        for number, (code, expected) in enumerate(self.ROWS):
            with self.subTest(code=code):
                try:
                    status = server.get(f"/function/bad{number}")[0]
                except (OSError, http.client.HTTPException):
                    status = None
                if expected != 0:  # 0: either way is right
                    self.assertEqual(status, expected)
                for _ in range(6):
                    self.assertEqual(server.get("/function/hello")[2], b"x")
                self.assertEqual(server.get("/health")[0], 200)
        self.assertGreaterEqual(self.stats(server)["hello"], 6 * len(self.ROWS))
        self.end(server)

    def test_a_stream_without_an_end_and_readers_that_stopped(self):
        """Who doesn't read his answer holds a thread no longer than an idle connection stays open."""
        self.write("forever", "def main(request):\n    while True: yield 'x' * 100_000")
        self.write("other", "def main(request):\n    while True: yield 'y' * 100_000")
        server = self.start("--workers", "1", "--threads", "3", "--grace", "1", change=("STALLED_SECONDS = 60.0", "STALLED_SECONDS = 1.0"))
        readers = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
        for number, reader in enumerate(readers):
            self.addCleanup(reader.close)
            reader.sendall(b"GET /function/%b HTTP/1.1\r\nHost: x\r\n\r\n" % (b"forever", b"other")[number % 2])
        time.sleep(.3)  # all threads are in an answer that nobody reads
        self.assertEqual(server.get("/health")[0], 200)
        wait_until(lambda: {"forever", "other"} <= set(self.stats(server)))
        self.end(server)

    def test_a_daemon_of_a_function_keeps_no_port(self):
        self.write("daemon", "import os, time\ndef main(request):\n    if not os.fork():\n        os.setsid()\n        time.sleep(3)\n"
                             "        os._exit(0)\n    return 'x'")
        server = self.start("--workers", "1")
        self.assertEqual(server.get("/function/daemon")[2], b"x")
        self.assertEqual(server.stop(), 0)
        self.assertTrue(self.refuses(server))

    def test_calls_cut_off_at_the_end_are_recorded(self):
        self.write("slow", "import time\ndef main(request):\n    open('began', 'w').close()\n    time.sleep(9)\n    return 'x'")
        self.write("drip", "import time\ndef main(request):\n    for _ in range(90):\n        yield 'x'\n        time.sleep(.1)")
        self.write("hello", "def main(request): return 'x'")
        server, answers = self.start("--workers", "1", "--grace", "1"), []
        thread = threading.Thread(target=lambda: answers.append(server.get("/function/slow")))
        thread.start()
        drip = threading.Thread(target=self.quietly, args=(server, "/function/drip"))
        drip.start()
        wait_until((self.dir / "began").exists)
        self.end(server)
        for sender in (thread, drip):
            sender.join()
        self.assertEqual((answers[0][0], json.loads(answers[0][2])["error"]), (503, "The server is stopping"))
        self.assertIn("SIGTERM", (self.dir / "stderr.txt").read_text())
        server = self.start("--workers", "1")
        logs = json.loads(server.get("/admin/logs", Authorization="Bearer " + TOKEN, Accept="application/json")[2])
        self.assertEqual({row["function"]: row["status"] for row in logs["invocations"]}, {"slow": 503, "drip": 503})
        self.assertEqual(server.stop(), 0)


class WireTest(ServerCase):
    """What comes over the wire: raw sockets, malformed, slow, many."""

    @staticmethod
    def post(*lines: bytes, body: bytes = b"") -> bytes:
        return b"\r\n".join((b"POST /function/hello HTTP/1.1", b"Host: x") + lines) + b"\r\n\r\n" + body

    def chunked(self, body: bytes, *lines: bytes) -> bytes:
        return self.post(b"Transfer-Encoding: chunked", *lines, body=body)

    def ask(self, server: Server, data: bytes) -> bytes:
        """Send bytes and no more; return all that comes back until the server closes."""
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            answer = b""
            with contextlib.suppress(ConnectionError):  # closed while we sent or before all was read
                connection.sendall(data)
                with contextlib.suppress(OSError):  # the server has closed already; its answer waits
                    connection.shutdown(socket.SHUT_WR)
                while data := connection.recv(65536):
                    answer += data
            return answer

    def rows(self) -> list:
        """Return (what, bytes, statuses that will do; 0 is a closed connection)."""
        get, end, host = b"GET /function/hello HTTP/1.1\r\n", b"\r\n\r\n", b"Host: x\r\n"
        bad, closed = (400,), (0,)
        rows = [
            ("CL and TE", self.chunked(b"0\r\n\r\nGET /function/smuggled HTTP/1.1\r\nHost: x\r\n\r\n", b"Content-Length: 5"), bad),
            ("TE and CL", self.post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), bad),
            ("TE in 1.0", self.chunked(b"0\r\n\r\n").replace(b"1.1", b"1.0"), (200,)),  # no TE in 1.0; and it closes
            *((f"CL {value!r}", self.post(b"Content-Length: " + value, body=b"hello"), bad) for value in (
                b"5\r\nContent-Length: 6", b"5\r\nContent-Length: 5", b"5, 5", b"+5", b"-5", b"0x5", b"5_0", b"5.0", b"", b"5 5",
                b"\xd9\xa5", b"9" * 5000, b"5\x0b")),
            *((f"TE {value!r}", self.post(b"Transfer-Encoding: " + value, body=b"0\r\n\r\n"), (400, 501)) for value in (
                b"gzip", b"xchunked", b"chunked, identity", b"identity", b"\x0bchunked", b"chunked\x0b", b'"chunked"', b"chunked;q=1")),
            *((f"TE spelt {line!r}", self.post(line, body=b"0\r\n\r\n"), bad) for line in (
                b"Transfer-Encoding : chunked", b"Transfer-Encoding\t: chunked", b" Transfer-Encoding: chunked\r\nX : y",
                b"Transfer\xadEncoding: chunked", b"Transfer-Encoding\x00: chunked")),
            *((f"chunk {body[:20]!r}", self.chunked(body), (400, 0)) for body in (
                b"zz\r\nhello\r\n0\r\n\r\n", b"-5\r\nhello\r\n0\r\n\r\n", b"+5\r\nhello\r\n0\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n",
                b"5\r\nhelloXX\r\n0\r\n\r\n", b"5\r\nhel\r\n0\r\n\r\n", b" 5\r\nhello\r\n0\r\n\r\n", b"5;a\nb\r\nhello\r\n0\r\n\r\n",
                b"5\nhello\n0\n\n", b"5\r\nhello", b"f" * 40 + b"\r\nhello\r\n0\r\n\r\n", b"\xd9\xa5\r\nhello\r\n0\r\n\r\n", b"5;\x00\r\nhello\r\n0\r\n\r\n")),
            ("a size without end", self.chunked(b"0" * 300_000), (400, 0)),
            ("an extension without end", self.chunked(b"5;" + b"a" * 300_000), (400, 0)),
            ("a trailer without end", self.chunked(b"0\r\n" + b"X: y\r\n" * 50_000), (400, 0)),
            *((f"header {line!r}", get + host + line + end, bad) for line in (
                b"X: a\0b", b"X\x01: y", b": y", b"nocolon", b"X Y: z", b"X: a\nY: b", b"X: a\rY: b", b"X(: y", b"X\xff: y", b"X:\x7fy")),
            ("obs-fold", get + host + b"X: a\r\n b" + end, (200, 400)),  # RFC 9112 5.2: refused, or read as a space
            ("fold first", get + b" X: a\r\n" + host + b"\r\n", bad),
            ("bare LF", b"GET /function/hello HTTP/1.1\nHost: x\n\n", closed),
            ("bare LF in a line", get + b"Host: x\nX: y" + end, bad),
            ("headers without end", get + host + b"X: " + b"y" * 300_000, (431, 0)),
            ("a long header", get + host + b"X: " + b"y" * 300_000 + end, (431, 0)),
            ("many headers", get + host + b"".join(b"X%d: y\r\n" % n for n in range(50_000)) + b"\r\n", (431, 0)),
            ("a long URL", b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\n" + host + b"\r\n", (431, 0)),
            *((f"line {line!r}", line + b"\r\n" + host + b"\r\n", bad) for line in (
                b"GET  /function/hello  HTTP/1.1", b"GET\t/function/hello\tHTTP/1.1", b"get /function/hello HTTP/1.1", b"G(T / HTTP/1.1",
                b"GET / HTTX/1.1", b"GET / HTTP/1.1.1", b"GET / HTTP/1.1 x", b"GET /\xff HTTP/1.1", b"GET http://[bad/ HTTP/1.1", b"GET")),
            *((f"path {path!r}", b"GET " + path + b" HTTP/1.1\r\n" + host + b"\r\n", (404,)) for path in (
                b"/function/he\0llo", b"/function/hello%00", b"/function/%ff%fe", b"/function/%zz%2", b"/function/../../etc/passwd",
                b"/function/%2e%2e%2f%2e%2e%2fetc/passwd", b"/function/" + b"a/" * 2000, b"*", b"/function/%0d%0aX:%20y", b"/invocations/%00",
                b"/function/hello\\..\\x", b"/adm/data/../x")),
            ("version 2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (404, 400)),
            ("TLS", bytes.fromhex("16030100a5010000a10303") + bytes(range(160)), (400, 0)),
            ("after a request", get + host + b"Content-Length: 5\r\n\r\nhelloGARBAGE\r\n\r\n", (200,)),
            ("proxy headers", get + host + b"X-Forwarded-Proto: gopher\r\nX-Forwarded-For: ,,\"" + end, bad),
        ]
        seeded, sound = random.Random(7), self.chunked(b"5\r\nhello\r\n0\r\n\r\n", b"Cookie: session=a.b.c", b"Range: bytes=0-1")
        for number in range(200):  # a sound request with a few bytes spoilt
            spoilt = bytearray(sound)
            for _ in range(seeded.randrange(1, 5)):
                spoilt[seeded.randrange(len(spoilt))] = seeded.choice(b"\0\r\n\t :;,\xff0aZ")
            rows.append((f"spoilt {number}", bytes(spoilt), (0, 200, 400, 404, 405, 413, 431, 501)))
        rows += [(f"noise {number}", bytes(seeded.randrange(256) for _ in range(300)) + end, (400, 0)) for number in range(50)]
        return rows

    def test_malformed(self):
        self.write("hello", "def main(request): return 'x'")
        server = self.start("--workers", "1")
        wait_until(server.workers)
        first = server.workers()
        for what, data, expected in self.rows():
            with self.subTest(what=what, data=data[:200]):
                answer = self.ask(server, data)
                head, _, body = answer.partition(b"\r\n\r\n")
                status = int(head[9:12] or 0)
                self.assertIn(status, expected, answer[:300])
                self.assertNotIn(b"Traceback", answer)
                self.assertNotIn(b"smuggled", answer)
                if status >= 400:
                    self.assertEqual(set(json.loads(body[:body.find(b"\n")])), {"error", "request_id"}, body)
        self.assertEqual((server.get("/function/hello")[2], server.workers()), (b"x", first))
        self.assertNotIn("Traceback", (self.dir / "stderr.txt").read_text() + (self.dir / "serverless_error.log").read_text()
                         if (self.dir / "serverless_error.log").exists() else "")
        self.end(server)

    def test_slow_clients(self):
        """200 clients that send or read hardly anything: the others are served as ever."""
        self.write("hello", "def main(request): return 'x'")
        self.write("big", "def main(request): return 'x' * 1_500_000")
        self.write("forever", "def main(request):\n    while True: yield 'x' * 100_000")
        server = self.start("--workers", "2")
        head = b"GET /function/%b HTTP/1.1\r\nHost: x\r\n"
        kinds = (head % b"hello" + b"X-Slow: ", self.post(b"Content-Length: 100", body=b"abc"), head % b"big" + b"\r\n",
                 head % b"forever" + b"\r\n")
        slow = []
        for number in range(200):
            slow.append(socket.create_connection(("127.0.0.1", server.port)))
            self.addCleanup(slow[-1].close)
            slow[-1].sendall(kinds[number % 4])
        for _ in range(10):
            began = time.monotonic()
            self.assertEqual((server.get("/health")[0], server.get("/function/hello")[2]), (200, b"x"))
            self.assertLess(time.monotonic() - began, 15)
        for connection in slow:
            connection.close()
        wait_until(lambda: all(len(os.listdir(f"/proc/{pid}/fd")) < 40 for pid in server.workers()))
        self.end(server)

    def test_few_file_descriptors(self):
        """With 64 file descriptors connections wait in the kernel, and what a call needs can be opened."""
        self.write("hello", "def main(request): return open(__file__).read()[:3]")
        server = self.start("--workers", "1", limits={"RLIMIT_NOFILE": 64})
        idle = []
        for _ in range(47):
            idle.append(socket.create_connection(("127.0.0.1", server.port)))
            self.addCleanup(idle[-1].close)
        late = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(100)]
        for connection in late:
            self.addCleanup(connection.close)
            connection.sendall(b"GET /function/hello HTTP/1.0\r\n\r\n")
        time.sleep(2.5)  # a round of the background loop
        wait_until(server.workers)
        [worker] = server.workers()
        ticks = [int(text) for text in Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[11:13]]
        self.assertLess(sum(ticks), 1.5 * os.sysconf("SC_CLK_TCK"))  # no busy loop about the socket that can't be accepted from
        for connection in idle:
            connection.close()
        for connection in late:
            self.assertTrue(connection.makefile("rb").read().endswith(b"def"))
        self.assertNotIn("Too many open files", (self.dir / "stderr.txt").read_text())
        self.assertEqual(server.workers(), [worker])
        self.end(server)


class KillTest(ServerCase):
    """kill -9 and SIGHUP under load, also through nginx: what fails was in flight on a process that was killed."""

    def load(self, port: int, threads: int = 6) -> list:
        """Start clients; return the list that gets (began, ended, what went wrong), and stop them at the end."""
        calls, stop = [], threading.Event()

        def ask(method: str) -> None:
            while not stop.is_set():
                began, wrong = time.monotonic(), ""
                try:
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
                    connection.request(method, "/function/hello", b"x" if method == "POST" else None)
                    answer = connection.getresponse()
                    wrong = "" if (answer.status, answer.read()) == (200, b"x") else f"status {answer.status}"
                except (OSError, http.client.HTTPException) as error:
                    wrong = repr(error)
                finally:
                    connection.close()
                calls.append((began, time.monotonic(), wrong))
        asking = [threading.Thread(target=ask, args=(("GET", "POST")[number % 2],)) for number in range(threads)]
        self.stop_load = lambda: (stop.set(), [thread.join() for thread in asking])
        self.addCleanup(stop.set)
        for thread in asking:
            thread.start()
        return calls

    def more(self, calls: list, count: int) -> None:
        """Wait for so many further calls."""
        target = len(calls) + count
        wait_until(lambda: len(calls) >= target)

    def check_kills(self, server: Server, port: int) -> None:
        seeded, kills, calls = random.Random(3), [], self.load(port)
        wait_until((self.dir / "journal" / "leader.lock").exists)
        for turn in range(6):
            self.more(calls, seeded.randrange(100, 300))
            wait_until(lambda: len(server.workers()) == 3)
            victim = 0
            wait_until(lambda: self.leader() in server.workers())
            while victim not in server.workers():  # 0 would be this process's group
                victim = self.leader() if turn % 2 else seeded.choice(server.workers())
            began = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: victim not in server.workers())
            kills.append((began, time.monotonic()))
        self.more(calls, 200)
        self.stop_load()
        failed = [call for call in calls if call[2]]
        for began, ended, wrong in failed:  # in flight while something was killed: begun before it was over, ended after
            self.assertTrue(any(began <= over and ended >= at for at, over in kills), (began, ended, wrong, kills))
        self.assertLessEqual(len(failed), 6 * len(kills))
        seen, answered = self.stats(server)["hello"], len(calls) - len(failed)
        self.assertTrue(answered <= seen <= len(calls) + len(failed), (answered, seen, len(calls)))

    def test_kills_under_load(self):
        self.write("hello", "def main(request): return 'x'")
        server = self.start("--workers", "3")
        self.check_kills(server, server.port)
        self.end(server)

    def test_kills_and_upgrades_under_load_through_nginx(self):
        self.write("hello", "def main(request): return 'x'")
        server = self.start("--workers", "3")
        port = self.nginx([server.port])
        self.check_kills(server, port)
        calls = self.load(port)
        for _ in range(4):
            self.more(calls, 150)
            old = set(server.workers())
            os.kill(server.process.pid, signal.SIGHUP)
            wait_until(lambda: len(server.workers()) == 3 and not old & set(server.workers()))
        self.more(calls, 150)
        self.stop_load()
        self.assertEqual([call for call in calls if call[2]], [])
        self.end(server)

    def test_a_killed_supervisor(self):
        """Its workers end, what they were doing is answered, the port is free, and the counts are whole."""
        self.write("hello", "def main(request): return 'x'")
        server = self.start("--workers", "3")
        calls = self.load(server.port)
        self.more(calls, 300)
        killed = time.monotonic()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(20)
        wait_until(lambda: not server.session())
        self.stop_load()
        self.assertEqual([call for call in calls if call[2] and call[1] < killed], [])
        answered = sum(not wrong for _, _, wrong in calls)
        server = self.start("--workers", "1", "--port", str(server.port))
        self.assertTrue(answered <= self.stats(server)["hello"] <= len(calls))
        self.end(server)

    def test_two_boards_behind_nginx(self):
        """README, "When one machine is not enough": one login for both, each with counts of its own, one may go."""
        boards = []
        for name in ("one", "two"):
            (self.dir / name / "functions").mkdir(parents=True)
            (self.dir / name / "functions" / "hello.py").write_text("def main(request): return 'x'")
            boards.append(Server(self.dir / name, "--workers", "1", FNSERVE_SECRET_TOKEN=TOKEN, FNSERVE_SECRET_KEY="k"))
            self.addCleanup(boards[-1].kill_all)
        port = self.nginx([board.port for board in boards])
        cookie = boards[0].get("/login", "POST", json.dumps({"token": TOKEN}), Content_Type="application/json")[1]["Set-Cookie"]
        for board in boards:
            self.assertEqual(board.get("/function/list_functions", Cookie=cookie.partition(";")[0])[0], 200)
        calls = self.load(port)
        self.more(calls, 400)
        boards[1].process.terminate()
        boards[1].process.wait(20)
        self.more(calls, 200)
        self.stop_load()
        self.assertEqual([call for call in calls if call[2]], [])
        counts = [self.stats(boards[0])["hello"]]
        boards[1] = Server(self.dir / "two", "--workers", "1", FNSERVE_SECRET_TOKEN=TOKEN, FNSERVE_SECRET_KEY="k")
        self.addCleanup(boards[1].kill_all)
        counts.append(self.stats(boards[1])["hello"])
        self.assertTrue(min(counts) > 100 and sum(counts) == len(calls), (counts, len(calls)))
        for board in boards:
            self.end(board)


class DamageTest(ServerCase):
    """Disk, database and journal while it runs: a call never fails for them, and what can't be written is told."""

    def setUp(self) -> None:
        super().setUp()
        self.write("hello", "def main(request): return 'x'")

    def calls(self, server: Server, count: int) -> None:
        for _ in range(count):
            self.assertEqual(server.get("/function/hello")[2], b"x")

    def counted(self, server: Server) -> int:
        with contextlib.suppress(ValueError, KeyError):
            return self.stats(server)["hello"]
        return 0

    def test_full_disk(self):
        """A real full disk where we may mount one."""
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", self.dir], capture_output=True)
        if mounted.returncode:  # not root, or in a container: test_files_that_may_not_grow has to do
            self.skipTest("may not mount a disk to fill")
        self.addCleanup(subprocess.run, ["umount", "-l", self.dir], capture_output=True)
        (self.dir / "functions").mkdir()
        self.write("hello", "def main(request): return 'x'")
        server = self.start("--workers", "2")
        self.calls(server, 20)
        self.assertEqual(self.counted(server), 20)
        self.fill(self.dir / "filler")
        self.calls(server, 100)
        self.assertEqual(server.get("/health")[0], 503)
        (self.dir / "filler").unlink()
        self.calls(server, 30)
        self.assertGreaterEqual(self.counted(server), 50)
        self.end(server)

    @staticmethod
    def fill(path: Path) -> None:
        """Write until the disk is full."""
        with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
            for size in (65536, 1):
                with contextlib.suppress(OSError):
                    while file.write(b"x" * size):
                        pass

    def test_files_that_may_not_grow(self):
        """The same by a limit on the size of files, which needs no rights."""
        server = self.start("--workers", "2", limits={"RLIMIT_FSIZE": 450_000})
        self.calls(server, 20)
        with open(next((self.dir / "journal").glob("*.jsonl")), "ab") as journal:
            journal.write(b"\n" * 460_000)
        self.calls(server, 100)
        self.assertIn("File too large", (self.dir / "serverless_error.log").read_text())
        self.assertGreaterEqual(self.counted(server), 20)
        self.end(server)

    def test_a_locked_database(self):
        """Somebody else holds the write lock longer than we wait for it."""
        server = self.start("--workers", "2")
        self.calls(server, 20)
        with contextlib.closing(sqlite3.connect(self.dir / "serverless.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            began = time.monotonic()
            self.calls(server, 50)
            self.assertLess(time.monotonic() - began, 4)
            self.assertEqual(server.get("/health")[0], 503)
            self.calls(server, 50)
        wait_until(lambda: server.get("/health")[0] == 200)
        self.assertEqual(self.counted(server), 120)
        self.end(server)

    def test_a_locked_database_and_logins_by_the_dozen(self):
        """They wait for who may log in within the places of their function, so that the others go on."""
        self.write("secret", "SETTINGS = {'auth': 'login'}\ndef main(request): return 'x'")
        server = self.start("--workers", "1", "--threads", "4")
        self.calls(server, 1)
        self.assertEqual(server.get("/function/secret")[0], 401)
        with contextlib.closing(sqlite3.connect(self.dir / "serverless.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            callers = [threading.Thread(target=self.quietly, args=(server, "/function/secret"), kwargs={"Authorization": "Bearer wrong"})
                       for _ in range(20)]
            for caller in callers:
                caller.start()
            until = time.monotonic() + 2  # all of them have come by then
            while time.monotonic() < until:
                with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=4)) as connection:
                    connection.request("GET", "/function/hello")
                    self.assertEqual(connection.getresponse().read(), b"x")
        server.process.kill()
        for caller in callers:
            caller.join(30)

    def test_a_database_that_breaks_while_it_runs(self):
        server = self.start("--workers", "2")
        self.calls(server, 20)
        self.assertEqual(self.counted(server), 20)
        for path in self.dir.glob("serverless.db*"):
            with open(path, "r+b") as file:
                file.write(b"this is no database" * 5000)
        self.calls(server, 50)
        self.assertEqual(server.get("/health")[0], 503)
        self.calls(server, 50)
        self.end(server)
        for path in self.dir.glob("serverless.db*"):
            path.unlink()
        server = self.start("--workers", "2")  # the journal has it all
        self.assertEqual(self.counted(server), 120)
        self.end(server)

    def test_a_database_that_is_deleted_while_it_runs(self):
        server = self.start("--workers", "2")
        self.calls(server, 20)
        self.assertEqual(self.counted(server), 20)

        def opened(pid: int) -> bool:
            with contextlib.suppress(OSError):
                return any(os.path.realpath(path).endswith("serverless.db") for path in Path(f"/proc/{pid}/fd").iterdir())
            return False
        wait_until(lambda: len(server.workers()) == 2 and all(map(opened, server.workers())))
        for path in self.dir.glob("serverless.db*"):
            path.unlink()
        self.calls(server, 30)
        wait_until((self.dir / "serverless_error.log").exists)
        wait_until(lambda: (self.dir / "serverless_error.log").read_text().count("was deleted") == 2)  # by each worker
        self.assertEqual(self.counted(server), 50)
        self.calls(server, 10)
        for _ in range(6):  # whichever worker is asked
            self.assertEqual(self.counted(server), 60)
        self.end(server)
        with contextlib.closing(sqlite3.connect(self.dir / "serverless.db")) as db:
            self.assertEqual(db.execute("PRAGMA integrity_check").fetchone()[0], "ok")
            self.assertEqual(db.execute("SELECT call_count FROM call_stats").fetchone()[0], 60)

    def test_a_journal_that_is_deleted_while_it_runs(self):
        self.write("later", "SETTINGS = {'async': True}\nimport time\ndef main(request):\n    time.sleep(.5)\n    return 'x'")
        server = self.start("--workers", "2")
        self.calls(server, 20)
        self.assertEqual(self.counted(server), 20)
        self.assertEqual(server.get("/function/later", "POST")[0], 202)
        wait_until(lambda: self.stats(server).get("later") == 1)
        shutil.rmtree(self.dir / "journal")

        def writes(pid: int) -> bool:
            with contextlib.suppress(OSError):
                return any(path.resolve().suffix == ".jsonl" and path.exists() for path in Path(f"/proc/{pid}/fd").iterdir())
            return False
        made = 0
        while not all(map(writes, server.workers())):  # each looks at its file every 64 records, which are lost
            self.calls(server, 10)
            made += 10
            self.assertLess(made, 2000)
        seen = self.counted(server)
        self.assertTrue(20 + made - 2 * 64 <= seen <= 20 + made, (made, seen))
        self.calls(server, 10)
        self.assertEqual(self.counted(server), seen + 10)
        wait_until((self.dir / "journal" / "leader.lock").exists)
        wait_until(lambda: self.leader() in server.workers())  # there is a leader whose lock others see
        answers = [json.loads(server.get("/function/later", "POST")[2])["id"] for _ in range(4)]

        def states() -> list:
            with contextlib.closing(sqlite3.connect(self.dir / "serverless.db", timeout=20)) as db:
                return db.execute("SELECT state, attempts FROM fn_queue WHERE id IN (?, ?, ?, ?)", answers).fetchall()
        wait_until(lambda: {row[0] for row in states()} == {"done"})
        self.assertEqual(states(), [("done", 1)] * 4)  # none was taken for a dead process's and run again
        self.end(server)

    def test_the_clock_jumps(self):
        """Years forward, an hour back, and back to where it was: calls, counts, logins and the schedule go on."""
        self.write("tick", "SETTINGS = {'schedule': 'every 1m'}\ndef main(request): return 'x'")
        self.write("rated", "SETTINGS = {'rate': '2/min'}\ndef main(request): return 'x'")
        app = self.make_app()
        self.stop(app)
        start, total = self.clock.now, 0
        for jump in (0, 60, 20 * 365 * 86400, 20 * 365 * 86400 - 3600, 0, -3600, -10 * 365 * 86400, 120):
            with self.subTest(jump=jump):
                self.clock.now = start + jump
                for _ in range(3):
                    self.assertLessEqual(app.background.step(self.clock.now), 1)
                self.assertEqual(self.call(app, "GET", "/function/hello").data, b"x")
                total += 1
                self.assertEqual(self.admin(app).get("/function/show_stats").json["stats"]["hello"], total)
                self.assertEqual(self.call(app, "GET", "/function/rated").code, 200)
                login = self.client(app)
                self.assertEqual(login.post("/login", json={"token": TOKEN}).code, 200)
                self.assertEqual(login.get("/function/list_functions").code, 200)
                following = app.schedule.get("tick")["next"]
                self.assertTrue(0 < following - self.clock.now <= 60, following - self.clock.now)
                self.assertLessEqual(app.store.read("SELECT count(*) FROM fn_queue WHERE job = 'tick'")[0][0], 8)


class FuzzTest(Case):
    """Made-up input of every kind: a proper answer or the documented error, never anything else.

    The same in every run; FNSERVE_FUZZ=5000 tries that many of each, other ones each time.
    """

    FUNCTIONS = {
        "echo": "def main(request):\n    return [len(request.args), len(request.form), len(request.files), len(request.cookies), request.url,\n"
                "            repr(request.get_json(silent=True))[:99], repr(request.authorization), request.access_route, request.host,\n"
                "            str(request.user_agent), str(request.referrer), list(request.accept_mimetypes), request.mimetype_params]",
        "file": "from flask import send_file\ndef main(request): return send_file('data.txt', conditional=True)",
        "counts": "from flask import session\ndef main(request):\n    session['n'] = session.get('n', 0) + 1\n    return dict(session)",
        "picks": "def main(request):\n    return [request.accept_mimetypes.best_match(['text/html', 'application/json']), request.is_json,\n"
                 "            str(request.if_none_match), str(request.if_modified_since), str(request.cache_control)]",
    }

    def setUp(self) -> None:
        super().setUp()
        self.tool = module("hypothesis")
        self.st = module("hypothesis.strategies")
        for name, code in self.FUNCTIONS.items():
            self.write(name, code)
        (self.dir / "data.txt").write_text("0123456789" * 100)
        self.app = self.make_app(MAX_BODY=100_000)
        self.stop(self.app)

    def fuzz(self, check, *strategies: object, examples: int = 120) -> None:
        """Call `check` with what the strategies make."""
        many = int(os.environ.get("FNSERVE_FUZZ", "0"))
        settings = self.tool.settings(max_examples=many or examples, derandomize=not many, deadline=None, database=None,
                                      suppress_health_check=list(self.tool.HealthCheck))
        settings(self.tool.given(self.st.tuples(*strategies))(lambda values: (check(*values), None)[1]))()

    def header(self):
        """Return a strategy: text as it may stand in a header, or parts of what headers look like."""
        parts = self.st.sampled_from(["bytes=", "0-", "-5", "5-2", ",", ";", "q=", "1.0", "*/*", "text/html", '"', "\\", "W/", "=", " ", "a", "\xff",
                                      "Basic ", "Bearer ", "Digest ", "Sat, 01 Jan 2022 00:00:00 GMT", "session=", "é", "99999999999999999999", "[::1]", ":"])
        text = self.st.text(self.st.characters(min_codepoint=32, max_codepoint=255), max_size=40)
        return self.st.one_of(text, self.st.lists(parts, max_size=8).map("".join))

    def ask(self, path: str, method: str = "GET", query: str = "", body: bytes = b"", **headers: str):
        """Make a call with a raw environ, and see that it is answered by no failure of ours."""
        environ = {"REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": query, "SERVER_NAME": "x", "SERVER_PORT": "80",
                   "SERVER_PROTOCOL": "HTTP/1.1", "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(body), "wsgi.errors": io.StringIO(),
                   "wsgi.version": (1, 0), "wsgi.multithread": True, "wsgi.multiprocess": True, "wsgi.run_once": False,
                   "REMOTE_ADDR": "127.0.0.1", "CONTENT_LENGTH": str(len(body)), **headers}
        seen = []
        answer = self.app(environ, lambda status, fields, exc_info=None: seen.append((status, fields)))
        data = b"".join(answer)
        if hasattr(answer, "close"):
            answer.close()
        status = int(seen[-1][0][:3])
        self.assertTrue(200 <= status < 500, (status, data[:300], environ, self.last_error()))
        for name, value in seen[-1][1]:
            self.assertFalse(set("\r\n\0") & set(name + value), (name, value))
        return status, data

    def last_error(self) -> str:
        path = self.dir / "serverless_error.log"
        return path.read_text()[-2000:] if path.exists() else ""

    def test_requests(self):
        st, names = self.st, ("HTTP_COOKIE", "HTTP_ACCEPT", "HTTP_RANGE", "HTTP_AUTHORIZATION", "HTTP_HOST", "HTTP_IF_NONE_MATCH", "HTTP_IF_RANGE",
                              "HTTP_IF_MODIFIED_SINCE", "HTTP_CACHE_CONTROL", "HTTP_ORIGIN", "HTTP_USER_AGENT", "HTTP_X_FORWARDED_FOR", "CONTENT_TYPE",
                              "HTTP_REFERER", "HTTP_ACCEPT_LANGUAGE", "HTTP_PREFER", "HTTP_IDEMPOTENCY_KEY", "HTTP_SEC_FETCH_SITE", "CONTENT_LENGTH")
        paths = st.one_of(st.sampled_from(["/function/echo", "/function/file", "/function/counts", "/function/picks", "/", "/login", "/health", "/metrics"]),
                          st.text(st.characters(max_codepoint=255), max_size=30).map(lambda text: "/function/" + text),
                          st.text(st.characters(max_codepoint=255), max_size=30).map(lambda text: "/" + text))
        self.fuzz(lambda path, method, query, headers, body: self.ask(path, method, query, body, **headers), paths,
                  st.one_of(st.sampled_from(["GET", "POST", "PUT", "HEAD", "OPTIONS"]), st.text("ABCxyz-", min_size=1, max_size=9)),
                  self.header(), st.dictionaries(st.sampled_from(names), self.header(), max_size=6), st.binary(max_size=200), examples=400)

    def test_conditional_and_ranges(self):
        names = ("HTTP_RANGE", "HTTP_IF_RANGE", "HTTP_IF_NONE_MATCH", "HTTP_IF_MODIFIED_SINCE", "HTTP_ACCEPT")
        self.fuzz(lambda path, headers: self.ask(path, **headers), self.st.sampled_from(["/function/file", "/function/picks"]),
                  self.st.dictionaries(self.st.sampled_from(names), self.header(), min_size=1), examples=200)

    def test_sessions(self):
        sound = self.app.signer.sign('{"n":1}', self.clock.now)

        def check(at: int, text: str, whole: str) -> None:
            status, data = self.ask("/function/counts", HTTP_COOKIE="session=" + (whole or sound[:at] + text + sound[at + len(text):]))
            self.assertIn(json.loads(data)["n"], (1, 2))
        self.fuzz(check, self.st.integers(0, len(sound)), self.st.text("abcXYZ019.-_=%", max_size=9), self.header())

    def test_multipart(self):
        parts = self.st.sampled_from([b"--B\r\n", b"--B--\r\n", b"--B", b"\r\n", b"\n", b"Content-Disposition: form-data; name=\"a\"", b"; filename=\"f\"",
                                      b"; filename*=utf-8''%ff", b"Content-Type: text/plain; charset=", b"utf-7", b"x" * 70_000, b"\0", b'"', b"value", b":"])
        self.fuzz(lambda body, kind: self.ask("/function/echo", "POST", body=body, CONTENT_TYPE=kind),
                  self.st.one_of(self.st.lists(parts, max_size=12).map(b"".join), self.st.binary(max_size=99)),
                  self.st.one_of(self.st.just("multipart/form-data; boundary=B"), self.header().map("multipart/form-data; boundary=".__add__),
                                 self.st.just("application/x-www-form-urlencoded"), self.st.just("application/json")))

    def test_env(self):
        path = self.dir / "made.env"

        def check(text: str) -> None:
            path.write_bytes(text.encode("utf-8", "replace"))
            self.assertTrue(all(isinstance(name, str) and isinstance(value, (str, type(None)))
                                for name, value in fnserve.read_env(str(path)).items()))
        parts = self.st.sampled_from(["A", "=", "'", '"', "\\", "\n", "${", "A}", ":-", "#", " ", "export ", "$", "}", "\r", "é", "\0", "PORT=x"])
        self.fuzz(check, self.st.one_of(self.st.text(max_size=60), self.st.lists(parts, max_size=20).map("".join)), examples=300)

    def json(self):
        """Return a strategy: any JSON."""
        st = self.st
        leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.sampled_from([2 ** 70, 1e308, -1, 0]))
        return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)

    def test_schedules(self):
        st = self.st
        parts = st.sampled_from(["*", "/", "5", "-", ",", "0", "59", "99", "mon", "jan", "last", "xth", "1st", "L", "#", " ", " ", " ", "@hourly", "every ",
                                 "30s", "1w", "999999999999d", "٥", "?"])
        names = st.sampled_from(["year", "month", "day", "week", "day_of_week", "hour", "minute", "second", "weeks", "days", "seconds", "run_date",
                                 "start_date", "end_date", "jitter", "timezone", "trigger", "misfire_grace_time", "max_instances", "coalesce", "x"])
        words = st.one_of(st.lists(parts, max_size=9).map("".join), st.lists(st.sampled_from(["*", "*/5", "1-5", "0", "7", "mon", "31", "2"]), min_size=5,
                                                                             max_size=5).map(" ".join), st.sampled_from(["2030-01-01", "9999-12-31T23:59:59", "UTC", "Asia/Taipei", "cron"]))

        def check(value: object) -> None:
            try:
                trigger = fnserve.parse_schedule(value, "UTC", self.clock.now)
                following = trigger.next(self.clock.now)
            except fnserve.TriggerError:
                return
            self.assertTrue(following is None or following > self.clock.now, (value, following))
        self.fuzz(check, st.one_of(words, st.dictionaries(names, st.one_of(words, self.json()), max_size=4), self.json()), examples=300)

    def test_the_journal_is_read(self):
        directory, total = Path(self.app.settings.JOURNAL_DIR), [0]
        self.ask("/function/echo")
        sound = next(directory.glob("*.jsonl")).read_bytes().strip()
        keys = self.st.sampled_from(["t", "id", "f", "r", "m", "p", "s", "us", "n", "c", "via", "try", "out", "err", "mx"])
        lines = self.st.one_of(self.st.binary(max_size=60), self.st.dictionaries(keys, self.json()).map(
            lambda fields: json.dumps({**json.loads(sound), "f": "other", **fields}).encode()), self.st.sampled_from([b"[]", b"{}", b"null", b"\xff"]))

        def check(made: list) -> None:
            with open(next(directory.glob("*.jsonl")), "ab") as file:
                file.write(b"".join(b"\n" + line + b"\n" for line in made) + b"\n" + sound + b"\n")
            total[0] += 1
            self.app.folder.fold()
            seen = self.app.store.read("SELECT call_count FROM call_stats WHERE func_name = 'echo'")[0][0]
            self.assertGreaterEqual(seen, total[0] + 1)
            for path in ("/admin/logs", "/function/show_stats", "/metrics"):
                self.ask(path, HTTP_AUTHORIZATION="Bearer " + TOKEN, HTTP_ACCEPT="application/json")
        self.fuzz(check, self.st.lists(lines, max_size=5), examples=60)

    def test_settings_of_functions(self):
        keys = self.st.sampled_from(["methods", "auth", "cors", "rate", "timeout", "concurrency", "verify", "async", "retries", "dedupe", "max_body",
                                     "entry", "parameters", "schedule", "x"])
        values = self.st.one_of(self.json(), self.st.sampled_from(["60/min", "1/s", "*", "github", "10MiB", "public", "GET", ["GET"], "0/s", "-1/min",
                                                                   {"header": "X"}, "1e9/s", 1e400, "main", "* * * * *"]))

        def check(number: int, settings: dict) -> None:
            text = repr(settings).replace("inf", "1e999").replace("nan", "(1e999 - 1e999)")
            self.write(f"made{number % 7}", f"SETTINGS = {text}\ndef main(request): return 'x'")
            status, data = 0, b""
            with contextlib.suppress(AssertionError):  # a load error is a 500 that is told in the log
                status, data = self.ask(f"/function/made{number % 7}", HTTP_AUTHORIZATION="Bearer " + TOKEN)
            self.assertTrue(status or "SETTINGS" in self.last_error().rpartition(" ERROR ")[2], (settings, self.last_error()))
        numbers = iter(range(10 ** 9))
        self.fuzz(lambda settings: check(next(numbers), settings), self.st.dictionaries(keys, values, max_size=3), examples=80)

    def test_json_of_the_admin(self):
        st, names = self.st, self.st.sampled_from(["id", "func", "trigger", "hour", "minute", "seconds", "args", "kwargs", "run_date", "action", "table",
                                                   "key", "values", "columns", "sql", "module_name", "code", "version", "token", "name"])
        values = st.one_of(self.json(), st.sampled_from(["echo", "echo:main", "cron", "interval", "date", "5", "*/2", "retry", "sql", "SELECT 1", "create"]))
        paths = st.sampled_from(["/scheduler/jobs", "/scheduler/jobs/x", "/scheduler/jobs/a/pause", "/admin/queue", "/admin/data", "/admin/restore",
                                 "/function/save_function", "/function/update_function", "/function/delete_function", "/login", "/admin/settings"])

        def check(path: str, method: str, sent: object) -> None:
            with contextlib.suppress(ValueError):
                self.ask(path, method, body=json.dumps(sent).encode("utf-8", "surrogatepass"), CONTENT_TYPE="application/json",
                         HTTP_AUTHORIZATION="Bearer " + TOKEN, HTTP_ACCEPT="application/json")
            for name in self.FUNCTIONS:
                self.assertTrue((self.dir / "functions" / f"{name}.py").exists() or self.write(name, self.FUNCTIONS[name]))
        self.fuzz(check, paths, st.sampled_from(["POST", "PATCH", "DELETE", "GET"]), st.one_of(st.dictionaries(names, values, max_size=6), self.json()),
                  examples=250)


class UnitTest(Case):
    def test_files_are_what_the_commands_print(self):
        run = [sys.executable, "-B", str(HERE / "fnserve.py")]
        for name, arguments in (("fnserve.service", ["service", "--dir", "/srv/fnserve"]),
                                ("nginx.conf", ["nginx", "--server-name", "functions.example.com"])):
            printed = subprocess.run(run + arguments, cwd=self.dir, check=True, capture_output=True, text=True).stdout
            self.assertEqual((HERE / name).read_text(), printed)

    def test_systemd(self):
        need("systemd-analyze", shutil.which("systemd-analyze"))
        unit = self.dir / "fnserve.service"
        text = (HERE / "fnserve.service").read_text().replace("/srv/fnserve/fnserve.py", str(HERE / "fnserve.py"))
        unit.write_text(text.replace("/usr/bin/python3", sys.executable))
        verified = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
        self.assertEqual([line for line in verified.stderr.splitlines() if "fnserve" in line], [])
        rated = subprocess.run(["systemd-analyze", "security", "--offline=true", unit], capture_output=True, text=True)
        found = re.search(r"exposure level for \S+: ([\d.]+)", rated.stdout)
        self.assertTrue(found, rated.stdout + rated.stderr)
        self.assertLessEqual(float(found[1]), 2.0)


# == 19 COMMAND LINE ======================================================


class CommandTest(Case):
    def run_command(self, *arguments: str, **environ: str):
        env = {**os.environ, "FNSERVE_SECRET_TOKEN": TOKEN, "FNSERVE_SECRET_KEY": "k", **environ}
        return subprocess.run([sys.executable, "-B", HERE / "fnserve.py", *arguments], cwd=self.dir, env=env,
                              capture_output=True, text=True, timeout=60)

    def test_commands(self):
        self.assertEqual(self.run_command("new", "fresh").returncode, 0)
        self.assertEqual(self.run_command("new", "fresh").returncode, 1)
        self.assertEqual(self.run_command("new", "1x").returncode, 2)
        self.assertIn("fresh is a file", self.run_command("new", "fresh/inner").stderr)
        answer = self.run_command("call", "fresh", "-q", "name=Tony")
        self.assertEqual((answer.returncode, answer.stdout.strip()), (0, "Hello, Tony!"))
        self.write("echo", "def main(request): return [request.method, request.get_json(), request.headers['X-A']]")
        answer = self.run_command("call", "echo", "-X", "PUT", "-d", '{"a": 1}', "-H", "X-A: b")
        self.assertEqual(json.loads(answer.stdout), ["PUT", {"a": 1}, "b"])
        self.assertEqual(self.run_command("call", "nope").returncode, 1)
        self.write("helper", "from flask import request\ndef who(): return request.path")
        self.assertEqual(self.run_command("check").returncode, 0)
        self.write("broken", "def main(")
        checked = self.run_command("check")
        self.assertEqual(checked.returncode, 1)
        self.assertIn("broken: line 1", checked.stdout)
        self.assertIn("fresh", self.run_command("stats").stdout)
        self.assertIn("/function/echo", self.run_command("logs", "-n", "3").stdout)
        self.assertIn("broken", self.run_command("list").stdout)
        self.write("fails", "def main(request): 1/0")
        self.assertIn("ZeroDivisionError", self.run_command("call", "fails", FNSERVE_LOG_FILE="/dev/stdout").stdout)  # a pipe

    def test_backup_and_restore(self):
        self.write("v1/hello", "def main(request): return 'old'")
        (self.dir / ".env").write_text("MY_KEY=secret1\nGREETING=hi\n")
        with contextlib.closing(sqlite3.connect(self.dir / "serverless.db")) as db, db:
            db.execute("CREATE TABLE mine (x)")
            db.execute("INSERT INTO mine VALUES (7)")
        self.assertEqual(self.run_command("backup", "b.zip").returncode, 0)
        self.assertEqual((self.dir / "b.zip").stat().st_mode & 0o077, 0)
        self.assertEqual(self.run_command("backup", "b.zip").returncode, 1)  # never over another
        import zipfile
        with zipfile.ZipFile(self.dir / "b.zip") as archive:
            self.assertEqual(archive.read(".env"), b"GREETING=hi\n")
        self.write("v1/hello", "def main(request): return 'new'")
        with contextlib.closing(sqlite3.connect(self.dir / "serverless.db")) as db, db:
            db.execute("DELETE FROM mine")
        for bad in ("fnone.zip", ".env"):
            answer = self.run_command("restore", bad)
            self.assertEqual(answer.returncode, 1, bad)
            self.assertNotIn("Traceback", answer.stderr)
        done = self.run_command("restore", "b.zip")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("old", (self.dir / "functions" / "v1" / "hello.py").read_text())
        with contextlib.closing(sqlite3.connect(self.dir / "serverless.db")) as db:
            self.assertEqual(db.execute("SELECT x FROM mine").fetchall(), [(7,)])
        self.assertIn("new", next(self.dir.glob("functions.*/v1/hello.py")).read_text())

    def test_restore_of_a_damaged_backup_touches_nothing(self):
        import types
        import zipfile
        self.write("hello", "def main(request): return 'old'")
        self.assertEqual(self.run_command("backup", "b.zip").returncode, 0)
        good, seeded = (self.dir / "b.zip").read_bytes(), random.Random(7)
        with zipfile.ZipFile(io.BytesIO(good)) as archive:
            database = bytearray(archive.read("serverless.db"))
        database[5000:9000] = b"\1" * 4000
        damaged = [good[:end] for end in (0, 10, len(good) // 2, len(good) - 1)]
        for _ in range(60):
            at = seeded.randrange(len(good))
            damaged.append(good[:at] + bytes([good[at] ^ 0xff]) + good[at + 1:])
        for names in ({"serverless.db": bytes(database)}, {"functions/hello.py": b"x"}, {"serverless.db": b"none"},
                      {"serverless.db": b"", "functions": b"a file"}):
            with zipfile.ZipFile(made := io.BytesIO(), "w") as archive:
                for name, data in names.items():
                    archive.writestr(name, data)
            damaged.append(made.getvalue())
        self.write("hello", "def main(request): return 'new'")

        def state() -> dict[str, bytes]:
            return {str(path): path.read_bytes() for path in self.dir.rglob("*") if path.is_file() and path.name != "bad.zip"}
        os.chdir(self.dir)
        before, accepted = state(), 0
        for number, data in enumerate(damaged):
            (self.dir / "bad.zip").write_bytes(data)
            with self.subTest(number=number):
                try:
                    fnserve.cmd_restore(types.SimpleNamespace(file="bad.zip"), {})
                    accepted += 1  # a byte that says nothing, such as a time: what it holds is whole, by its checksums
                    self.assertIn("old", (self.dir / "functions" / "hello.py").read_text())
                    for path in self.dir.iterdir():
                        if re.search(r"\.\d{8}-\d{6}$", path.name):
                            shutil.rmtree(path) if path.is_dir() else path.unlink()
                    self.write("hello", "def main(request): return 'new'")
                    before = state()
                except OSError as error:
                    self.assertIn("nothing was changed", str(error))
                    self.assertEqual(state(), before)
        self.assertLess(accepted, 30)

    def test_restore_over_a_database_that_is_none(self):
        self.write("hello", "def main(request): return 'old'")
        self.assertEqual(self.run_command("backup", "b.zip").returncode, 0)
        for path in self.dir.glob("serverless.db*"):
            path.unlink()
        (self.dir / "serverless.db").write_bytes(b"precious bytes" * 1000)
        done = self.run_command("restore", "b.zip")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.run_command("stats").returncode, 0)
        self.assertEqual(next(self.dir.glob("serverless.db.*-*")).read_bytes(), b"precious bytes" * 1000)

    def test_restore_on_a_full_disk_puts_all_back(self):
        class Full:
            def backup(self, _):
                raise sqlite3.OperationalError("database or disk is full")
        hello = self.write("hello", "def main(request): return 'x'")
        settings, fresh = fnserve.Settings({}, str(self.dir)), self.dir / "fresh"
        fresh.mkdir()
        for stored in (b"precious bytes" * 1000, b""):  # one that is no database, and one that is
            (self.dir / "serverless.db").write_bytes(stored)
            with self.assertRaises(sqlite3.OperationalError):
                fnserve.bring_back(Full(), str(fresh), settings)
            self.assertEqual(((self.dir / "serverless.db").read_bytes(), hello.exists(), fresh.exists()), (stored, True, True))
            for path in self.dir.glob("serverless.db.*"):
                path.unlink()

    def test_deploy(self):
        server = Server(self.dir, "--workers", "1", FNSERVE_SECRET_TOKEN=TOKEN, FNSERVE_SECRET_KEY="k")
        self.addCleanup(server.kill_all)
        path = self.dir / "fresh.py"
        for text in ("one", "two"):
            path.write_text(f"def main(request): return '{text}'")
            done = self.run_command("deploy", "fresh.py", "--to", f"http://127.0.0.1:{server.port}", "--token", TOKEN)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(server.get("/function/fresh")[2], text.encode())
        self.write("v1/users", "def main(request): return 'grouped'")
        made = self.run_command("deploy", "functions/v1/users.py", "--to", f"http://127.0.0.1:{server.port}", "--token", TOKEN)
        self.assertEqual((made.returncode, made.stdout), (0, "v1/users: version 1\n"))
        self.assertEqual(server.get("/function/v1/users")[2], b"grouped")
        (self.dir / "elsewhere" / "functions" / "v2").mkdir(parents=True)
        (self.dir / "elsewhere" / "functions" / "v2" / "users.py").write_text("def main(request): return 'from elsewhere'")
        made = self.run_command("deploy", "elsewhere/functions/v2/users.py", "--to", f"http://127.0.0.1:{server.port}", "--token", TOKEN)
        self.assertEqual((made.returncode, made.stdout), (0, "v2/users: version 1\n"))
        path.write_bytes(b"x = '\xff'")
        done = self.run_command("deploy", "fresh.py", "--to", f"http://127.0.0.1:{server.port}", "--token", TOKEN)
        self.assertEqual((done.returncode, "is not UTF-8" in done.stderr), (1, True), done.stderr)
        path.write_text("x = 1")
        for to, status in ((f"http://127.0.0.1:{server.port}/health?", 1), ("nonsense", 2), ("http://127.0.0.1:1", 1)):
            done = self.run_command("deploy", "fresh.py", "--to", to, "--token", TOKEN)
            self.assertEqual((done.returncode, "Traceback" in done.stderr), (status, False), done.stderr)
        path.write_text("def main(")
        done = self.run_command("deploy", "fresh.py", "--to", f"http://127.0.0.1:{server.port}", "--token", TOKEN)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"fresh.py: 400 Line 1: \S+")
        (self.dir / "good.py").write_text("def main(request): return 'good'")
        done = self.run_command("deploy", "fresh.py", "nowhere.py", "good.py", "--to", f"http://127.0.0.1:{server.port}", "--token", TOKEN)
        self.assertEqual((done.returncode, done.stdout), (1, "good: version 1\n"))
        self.assertIn("nowhere.py: it can't be read", done.stderr)

    def test_next(self):
        answer = self.run_command("next", "30 3 * * *", "-n", "2", "--from", "2026-01-01T00:00:00", "--timezone", "Asia/Taipei")
        self.assertEqual(answer.stdout, "2026-01-01T03:30:00+08:00\n2026-01-02T03:30:00+08:00\n")
        answer = self.run_command("next", '{"day": "last fri", "hour": 6}', "-n", "1", "--from", "2026-01-01", "--timezone", "UTC")
        self.assertEqual(answer.stdout, "2026-01-30T06:00:00+00:00\n")
        self.assertEqual(self.run_command("next", "0 0 31 2 *").stdout, "never\n")
        for wrong in ("99 * * * *", "{bad", "often"):
            answer = self.run_command("next", wrong)
            self.assertEqual((answer.returncode, "Traceback" in answer.stderr), (2, False), wrong)

    def test_one_module_when_it_is_the_script(self):
        self.write("f", "import fnserve, sys\ndef main(request):\n"
                        "    return [fnserve is sys.modules['__main__'], fnserve.request.method]")
        self.assertEqual(json.loads(self.run_command("call", "f").stdout), [True, "GET"])

    def test_init(self):
        answer = self.run_command("init", "sub", FNSERVE_SECRET_TOKEN="")
        self.assertEqual(answer.returncode, 0)
        self.assertTrue((self.dir / "sub/functions/hello.py").exists())
        self.assertIn("SECRET_TOKEN=", answer.stdout)

    def test_clear_errors(self):
        for arguments, environ, status, said in (
                (["--port", "x"], {}, 2, "PORT"), ([], {"FNSERVE_THREADS": "none"}, 2, "THREADS"),
                (["--functions-dir", "nowhere"], {}, 2, "FUNCTIONS_DIR"), (["nonsense"], {}, 2, "nonsense"),
                (["--nonsense"], {}, 2, "nonsense"), (["--dir", "nowhere"], {}, 1, "nowhere")):
            with self.subTest(arguments=arguments):
                answer = self.run_command(*arguments, **environ)
                self.assertEqual((answer.returncode, "Traceback" in answer.stderr), (status, False), answer.stderr)
                self.assertIn(said, answer.stderr)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            answer = self.run_command("--port", str(taken.getsockname()[1]))
            self.assertEqual(answer.returncode, 1)
            self.assertIn("PORT=", answer.stderr)

    def test_a_database_that_is_damaged(self):
        """One line and exit 2, wherever the damage is, and not a byte of it is touched."""
        with contextlib.closing(sqlite3.connect(self.dir / "serverless.db")) as db, db:
            db.execute("CREATE TABLE call_stats (func_name TEXT PRIMARY KEY, call_count INTEGER NOT NULL)")
            db.execute("CREATE TABLE t (x)")
            db.executemany("INSERT INTO call_stats VALUES (?, 1)", [(f"function_{number}",) for number in range(3000)])
            db.executemany("INSERT INTO t VALUES (?)", [("y" * 200,) for _ in range(500)])
        good = (self.dir / "serverless.db").read_bytes()
        for page in (1, 6, len(good) // 4096 - 2):
            damaged = good[:page * 4096] + b"\xff" * 4096 + good[(page + 1) * 4096:]
            (self.dir / "serverless.db").write_bytes(damaged)
            answer = self.run_command("--port", "0")
            self.assertEqual((page, answer.returncode, len(answer.stderr.splitlines())), (page, 2, 1), answer.stderr)
            self.assertEqual((self.dir / "serverless.db").read_bytes(), damaged)
        (self.dir / "serverless.db").write_bytes(good)
        self.assertEqual(self.run_command("stats").returncode, 0)

    def test_check_looks_at_hooks_and_the_directory(self):
        self.write("v1/f", "def main(request): return 'x'")
        self.assertEqual(self.run_command("check").returncode, 0)
        self.write("v1/_hooks", "def oops(:")
        answer = self.run_command("check")
        self.assertEqual((answer.returncode, "v1/_hooks: line 1" in answer.stdout), (1, True), answer.stdout)
        for command in ("check", "list"):
            answer = self.run_command(command, "--functions-dir", "nowhere")
            self.assertEqual((answer.returncode, "FUNCTIONS_DIR" in answer.stderr), (2, True))

    def test_call_prints_the_answer_as_it_is(self):
        self.write("raw", "def main(request):\n    print('noise')\n    return bytes(range(256))")
        self.write("echo", "def main(request): return [request.method, request.args.getlist('a'), request.headers['X-A'], request.get_data(as_text=True)]")
        done = subprocess.run([sys.executable, "-B", HERE / "fnserve.py", "call", "raw"], cwd=self.dir, capture_output=True, timeout=60)
        self.assertEqual((done.stdout, b"noise" in done.stderr), (bytes(range(256)), True))
        done = self.run_command("call", "echo", "-q", "a=1", "-q", "a=2", "-H", "X-A: 1", "-H", "X-A: 2", "-d", "")
        self.assertEqual(json.loads(done.stdout), ["POST", ["1", "2"], "1, 2", ""])
        (self.dir / "body").write_text("from a file")
        done = subprocess.run([sys.executable, "-B", HERE / "fnserve.py", "call", "echo", "-H", "X-A: b", "-d", f"@{self.dir.name}/body",
                               "--dir", str(self.dir)], cwd=self.dir.parent, capture_output=True, text=True, timeout=60)
        self.assertEqual(json.loads(done.stdout)[3], "from a file")

    def test_what_commands_take_in_first(self):
        """`jobs` the schedules of the files, `backup` what the journal still holds."""
        self.write("tick", "SETTINGS = {'schedule': '@hourly'}\ndef main(request): return 'x'")
        self.assertIn("tick", self.run_command("jobs").stdout)
        app = self.make_app()
        self.stop(app)
        for _ in range(3):
            self.call(app, "GET", "/function/tick")
        self.assertEqual(self.run_command("backup", "b.zip").returncode, 0)
        import zipfile
        with zipfile.ZipFile(self.dir / "b.zip") as archive:
            archive.extract("serverless.db", self.dir / "out")
        with contextlib.closing(sqlite3.connect(self.dir / "out" / "serverless.db")) as db:
            self.assertEqual(db.execute("SELECT call_count FROM call_stats").fetchall(), [(3,)])

    def test_a_file_that_is_no_database(self):
        (self.dir / "serverless.db").write_bytes(b"precious bytes" * 1000)
        answer = self.run_command("--port", "0")
        self.assertEqual(answer.returncode, 2)
        self.assertIn("serverless.db: file is not a database", answer.stderr)
        self.assertEqual((self.dir / "serverless.db").read_bytes(), b"precious bytes" * 1000)


if __name__ == "__main__":
    unittest.main(warnings="ignore")
