#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["waitress>=3.0"]
# ///
"""fnserve: your own Google Cloud Functions, in one file.

Write ``functions/hello.py`` with a ``main(request)`` and it answers at ``/function/hello``. This file is the whole
platform: the standard library, served by waitress. ``python3 fnserve.py`` starts it, ``--help`` lists the commands.

Ground floor first; a section uses only what stands above it.

    01 errors        02 settings      03 http          04 sessions      05 store         06 journal
    07 functions     08 function API  09 signatures    10 triggers      11 queue         12 schedule
    13 pipeline      14 monitoring    15 assets        16 admin         17 app           18 server
    19 command line

The way of one call: waitress hands an environ to `App.__call__` (17), which makes a `Call` (08) and sends it through 13:
`handle` resolves, gates and runs it, `respond` answers and records it. Resolving asks `Functions` (07) for the newest
good version of the file; recording appends one line to the `Journal` (06), which is folded into SQLite (05) in the
background, and the pages (16) read only what was folded.
"""
from __future__ import annotations

import builtins
import calendar
import codecs
import contextlib
import contextvars
import copy
import datetime
import functools
import gc
import http
import importlib.machinery
import io
import itertools
import json
import linecache
import logging
import operator
import os
import queue
import re
import signal
import socket
import sqlite3
import stat
import sys
import threading
import traceback
import types
from binascii import a2b_base64, b2a_base64
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from json.encoder import encode_basestring_ascii as quote_json
from time import asctime, gmtime, localtime, mktime, monotonic, perf_counter, sleep, strftime, struct_time, time, time_ns
from typing import Any, Callable, NamedTuple, Optional, Union
from urllib.parse import parse_qsl, quote, unquote_to_bytes, urlencode

__version__ = "0.1.0"

log = logging.getLogger("fnserve")
# time's functions are imported by name, because a function may replace those of the module. What only some runs need is
# imported where it is used; the modules above are needed by every run, by waitress or by those above them.

# == 01 ERRORS ============================================================
# Every exception of fnserve's own. One that reaches a client is an HTTPException and is turned into a response in
# one place (13, `answer_error`); the others stop a start or a load and say what to mend.


class SettingError(Exception):
    """A setting that can't be used; the text names it and says what it takes. Exit status 2."""


class StoreError(Exception):
    """serverless.db is not usable (corrupt, not a database, no permission). Exit status 2 at start."""


class LoadError(Exception):
    """A function file that can't be served: why, and where (1-based `line` and `column`, 0 = unknown)."""

    def __init__(self, message: str, line: int = 0, column: int = 0, trace: str = "") -> None:
        super().__init__(message)
        self.message, self.line, self.column, self.trace = message, line, column, trace

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}" if self.line else self.message


class NoEntry(LoadError):
    """The file loads, but has no main()."""


REASONS = {status.value: status.phrase for status in http.HTTPStatus}
REASONS.update({413: "Request Entity Too Large", 414: "Request URI Too Long", 416: "Requested Range Not Satisfiable",
                418: "I'm a teapot", 422: "Unprocessable Entity"})  # Werkzeug's; Python has changed its own
STATUS_LINES = {code: f"{code} {reason.upper()}" for code, reason in REASONS.items()}  # as Flask has them
EXCEPTIONS: dict[int, Any] = {}  #: status -> the class that Werkzeug has for it


class HTTPException(Exception):
    """What `abort()` raises: `code`, the JSON `body` sent, extra `headers`; a `response` overrides all of these."""

    def __init__(self, code: int, description: Any = None, headers: Iterable[tuple[str, str]] = (),
                 response: Optional[Response] = None, **fields: Any) -> None:
        super().__init__(code, description)
        if type(self) is HTTPException:  # so that `except BadRequest` catches what the platform raises, too
            self.__class__ = EXCEPTIONS.get(code, HTTPException)
        self.code, self.headers, self.response = code, list(headers), response
        self.name = REASONS.get(code, "Error")
        self.description = description if description is not None else self.name
        self.body = {"error": self.description, **fields}

    def __str__(self) -> str:
        return f"{self.code} {self.name}: {self.description}"


_KEYWORDS = {"valid_methods": "Allow", "retry_after": "Retry-After", "www_authenticate": "WWW-Authenticate"}


def _named(name: str, code: int) -> type[HTTPException]:
    """Make the exception that Werkzeug has for a status: ``NotFound("why")``."""
    def __init__(self: Any, description: Any = None, response: Optional[Response] = None,
                 original_exception: Optional[BaseException] = None, **more: Any) -> None:
        self.original_exception = original_exception
        headers = [(_KEYWORDS[key], ", ".join(value) if isinstance(value, (list, tuple, set)) else str(value))
                   for key, value in more.items() if value is not None]
        HTTPException.__init__(self, code, description, headers, response)
    return type(name, (HTTPException,), {"__init__": __init__, "code": code})


EXCEPTIONS.update({code: _named(name, code) for code, name in {
    400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 405: "MethodNotAllowed",
    406: "NotAcceptable", 408: "RequestTimeout", 409: "Conflict", 410: "Gone", 411: "LengthRequired",
    412: "PreconditionFailed", 413: "RequestEntityTooLarge", 414: "RequestURITooLarge", 415: "UnsupportedMediaType",
    416: "RequestedRangeNotSatisfiable", 417: "ExpectationFailed", 418: "ImATeapot", 421: "MisdirectedRequest",
    422: "UnprocessableEntity", 423: "Locked", 424: "FailedDependency", 428: "PreconditionRequired",
    429: "TooManyRequests", 431: "RequestHeaderFieldsTooLarge", 451: "UnavailableForLegalReasons",
    500: "InternalServerError", 501: "NotImplemented", 502: "BadGateway", 503: "ServiceUnavailable",
    504: "GatewayTimeout", 505: "HTTPVersionNotSupported"}.items()})


class DeadlineExceeded(BaseException):
    """Raised in a function's thread once the deadline of its call has passed."""

# == 02 SETTINGS ==========================================================
# What can be set, and where each value came from. Uses 01. The one table below makes the parsing, the --help text
# and the README's table. `Settings` is read once at start; `Config` follows .env while the server runs.


def must(test: Callable[[Any], Any], what: str, make: Optional[Callable[[Any], Any]] = None) -> Callable[[Any], Any]:
    """Make a cast: what `test` takes goes on, through `make` if that is given; else ValueError says `what` it takes."""
    def cast(value: Any) -> Any:
        if not test(value):
            raise ValueError(what)
        return make(value) if make else value
    return cast


def whole(low: int, high: int) -> Callable[[Any], int]:
    """Make a cast for a whole number in low..high."""
    return must(lambda value: re.fullmatch(r"[+-]?\d{1,18}", str(value), re.A) and low <= int(value) <= high,
                f"a whole number from {low} to {high}", int)


def choice(*allowed: str) -> Callable[[Any], str]:
    """Make a cast for one of a few words, in any case."""
    known = {word.lower(): word for word in allowed}
    return must(lambda value: str(value).lower() in known, "one of " + ", ".join(allowed),
                lambda value: known[str(value).lower()])


seconds = must(lambda value: re.fullmatch(r"\d+(\.\d+)?", str(value)) and 0 < float(value) <= 31_536_000,
               "a number of seconds above 0", float)
_ON, _OFF = ("on", "true", "yes", "1"), ("off", "false", "no", "0")
switch = must(lambda text: text.lower() in _ON + _OFF, "on or off", lambda text: text.lower() in _ON)


def size(value: Any) -> int:
    """Cast ``16MiB``, ``500kB`` or plain bytes to bytes."""
    found = re.fullmatch(r"(\d+)\s*(?:([kKMG])(i?)B?|B)?", str(value), re.A)
    if not found or int(found[1]) == 0:
        raise ValueError("a size such as 16MiB, 500kB or 1048576")
    return int(found[1]) * (1024 if found[3] else 1000) ** " KMG".index((found[2] or " ").upper())


def words(text: str) -> tuple[str, ...]:
    """Cast a list separated by commas or spaces."""
    return tuple(text.replace(",", " ").split())


def is_address(text: str) -> bool:
    """Tell whether text is an IP address, * for any, or nothing."""
    with contextlib.suppress(OSError):
        return text in ("", "*") or bool(socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text))
    return False


ip_address = must(is_address, "one IP address, such as 127.0.0.1, or * for any")


def workers(text: str) -> int:
    """Cast a number of processes; auto = one per core this process may run on (one where it can't fork)."""
    if text.lower() != "auto":
        return whole(0, 256)(text)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


class Setting(NamedTuple):
    """One row of the table: name, how its text becomes a value, the default's text, what it is for."""
    name: str
    cast: Callable[[str], Any]
    default: str
    help: str
    secret: bool = False


SETTINGS_TABLE = (
    Setting("SECRET_TOKEN", str, "", "password of the admin pages; made on first start where blank", True),
    Setting("SECRET_KEY", str, "", "signs the session cookies; made on first start where blank", True),
    Setting("HOST", str, "127.0.0.1", "address to listen on"),
    Setting("PORT", whole(0, 65535), "8000", "port to listen on; 0 takes a free one"),
    Setting("WORKERS", workers, "auto", "processes; auto is one per core, 0 one process without a supervisor"),
    Setting("THREADS", whole(1, 256), "8", "calls of functions at once in each process"),
    Setting("FUNCTIONS_DIR", str, "functions", "directory of the function files"),
    Setting("DB_PATH", str, "serverless.db", "SQLite database"),
    Setting("LOG_FILE", str, "serverless_error.log", "error log"),
    Setting("LOG_MAX_BYTES", size, "1MiB", "size at which the error log rotates"),
    Setting("LOG_BACKUPS", whole(0, 100), "3", "rotated error logs kept"),
    Setting("JOURNAL_DIR", str, "journal", "directory of the access journal"),
    Setting("KEEP_INVOCATIONS", whole(0, 10_000_000), "10000", "calls kept for the logs"),
    Setting("KEEP_DAYS", whole(0, 3650), "7", "days that folded journal segments, charts and dead calls are kept"),
    Setting("MAX_BODY", size, "16MiB", "largest request body"),
    Setting("TIMEOUT", seconds, "60", "seconds after which a call is interrupted and gets 504; in context.deadline"),
    Setting("GRACE", seconds, "30", "seconds that calls get to finish at a stop"),
    Setting("SESSION_HOURS", seconds, "12", "hours that a login lasts"),
    Setting("TRUSTED_PROXY", ip_address, "127.0.0.1", "address whose X-Forwarded headers are believed; blank: nobody's"),
    Setting("API_TOKENS", words, "", "tokens that callers of functions with auth 'token' hold, separated by commas", True),
    Setting("PROTECTED_FUNCTIONS", words, "", "further functions, or groups, that only the admin may call"),
    Setting("METRICS_TOKEN", str, "", "Bearer token that /metrics asks for; blank: everybody may read them", True),
    Setting("LOKI_URL", must(re.compile(r"(https?://[^/\s]+\S*)?").fullmatch, "a URL such as http://127.0.0.1:3100"), "",
            "Loki that the journal is pushed to, such as http://127.0.0.1:3100; blank: none"),
    Setting("LOKI_USER", str, "", "user of Loki"), Setting("LOKI_PASSWORD", str, "", "password of Loki", True),
    Setting("LOKI_TENANT", str, "", "tenant of Loki"),
    Setting("QUEUE_MAX", whole(1, 10**9), "100000", "calls that may wait in the queue; more get 503"),
    Setting("TIMEZONE", str, "", "time zone of schedules; blank: the machine's"),
    Setting("SCHEDULER_ALLOWED_HOSTS", words, "*", "names of the machines that run the schedule; * is all"),
    Setting("ADMIN", switch, "on", "off: all admin URLs answer 404"),
    Setting("DOCS", choice("private", "public"), "private", "who may read /docs and /openapi.json: the admin, or everybody"),
    Setting("UI_LANG", choice("auto", "zh-TW", "en"), "auto", "language of the pages; auto: the browser's"),
)

# python-dotenv's grammar (its parser.py is the reference; the tests compare the two): a binding is
#   [export] key [= value] [# comment]
#   key   = 'quoted' or any characters but = # and white space
#   value = 'single \' quoted' | "double \n quoted" | unquoted, up to " #" or the end of the line
_ENV_BINDING = re.compile(r"""\s*(?:export[^\S\r\n]+)?
    (?:(?:'([^']+)'|(?!')([^=\#\s]+)|(?=\#))[^\S\r\n]*                                  # 1, 2: the key, quoted or not
    (=(?:[^\S\r\n]+(?=\#)|[^\S\r\n]*(?:'((?:\\[\s\S]|[^'\\])*)'|"((?:\\[\s\S]|[^"\\])*)"  # 3: the value; 4, 5: quoted
    |(?![^\S\r\n]*['"])([^\r\n]*))))?)?                                                 # 6: unquoted
    (?:((?:[^\S\r\n]*\#[^\r\n]*)?[^\S\r\n]*(?:\r\n|\n|\r|\Z))|[^\r\n]*)                 # 7: its end; or no binding
    """, re.X)
_ENV_VARIABLE = re.compile(r"\$\{(?P<name>[^}:]*)(?::-(?P<default>[^}]*))?\}")


def _env_value(found: re.Match[str]) -> Optional[str]:
    if found[4] is None and found[5] is None:
        return None if found[3] is None else re.sub(r"\s+#.*", "", found[6] or "").rstrip()
    text, escapes = (found[4], r"\\[\\']") if found[5] is None else (found[5], r"\\[\\'\"abfnrtv]")
    return re.sub(escapes, lambda escape: codecs.decode(escape[0], "unicode-escape"), text)


def parse_env(text: str, environ: Mapping[str, str]) -> dict[str, Optional[str]]:
    """Read .env text as python-dotenv does; a key without = is None, ``${NAME:-default}`` takes earlier keys or `environ`."""
    values: dict[str, Optional[str]] = {}

    def lookup(found: re.Match[str]) -> str:
        name = found["name"]
        return (values[name] if name in values else environ.get(name, found["default"])) or ""
    for found in _ENV_BINDING.finditer(text):
        key, value = found[1] or found[2], _env_value(found)
        if key and found[7] is not None:
            values[key] = value and _ENV_VARIABLE.sub(lookup, value)
    return values


def read_env(path: str, environ: Mapping[str, str] = os.environ) -> dict[str, Optional[str]]:
    """Read a .env file; a missing one is empty, one that isn't UTF-8 or can't be read is a SettingError."""
    try:
        with open(path, encoding="utf-8-sig") as file:  # Notepad starts files with a byte order mark
            return parse_env(file.read(), environ)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{path}: {error}") from None


def read_both(paths: list[str], environ: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read .env and the .env.local that overrides it, and that may use its values."""
    env = read_env(paths[0], environ)
    return env, read_env(paths[1], {**environ, **{key: text or "" for key, text in env.items()}})


class Settings(types.SimpleNamespace):
    """The settings, cast: ``settings.PORT``, paths absolute; `sources` says where each came from. Raises SettingError."""

    def __init__(self, options: Mapping[str, Any] = types.MappingProxyType({}), directory: str = ".") -> None:
        self.directory, self.options = os.path.abspath(directory), {name: str(value) for name, value in options.items()}
        self.env_files = [os.path.join(self.directory, name) for name in (".env", ".env.local")]  #: the second overrides
        self.sources: dict[str, str] = {}
        self.texts: dict[str, str] = {}  #: the values as they were written
        for name in set(options) - {row.name for row in SETTINGS_TABLE}:
            raise SettingError(f"{name}: there is no such setting")
        environ = {row.name: os.environ.get("FNSERVE_" + row.name) for row in SETTINGS_TABLE}
        environ["PORT"] = os.environ.get("PORT", "").strip() or environ["PORT"]  # plain PORT is what hosting services set
        env, local = read_both(self.env_files, os.environ)
        layers: list[tuple[str, dict[str, Optional[str]]]] = [  # rising priority
            (".env", env), (".env.local", local), ("environment", environ), ("option", {**self.options})]
        for row in SETTINGS_TABLE:
            setattr(self, row.name, self._value(row, layers))
        for name in ("FUNCTIONS_DIR", "DB_PATH", "LOG_FILE", "JOURNAL_DIR"):
            setattr(self, name, os.path.join(self.directory, getattr(self, name)))

    def _value(self, row: Setting, layers: list[tuple[str, dict[str, Optional[str]]]]) -> Any:
        text, source = row.default, "default"
        for name, values in layers:
            given = values.get(row.name)
            if given is not None and (given.strip() or "blank:" in row.help or row.cast is words):
                text, source = given.strip(), name
        self.sources[row.name], self.texts[row.name] = source, text
        try:
            return row.cast(text)
        except ValueError as error:
            shown = "" if row.secret else f"={text!r}"
            raise SettingError(f"{row.name}{shown} ({source}): must be {error}") from None


def file_stamp(path: str) -> Optional[tuple[int, int, int, int]]:
    """Tell one state of a file from another with one stat: times in ns, size, inode; None where there is no file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)


def read_bytes(path: Union[str, int]) -> bytes:
    """Read a whole file, or what is open as a file descriptor; OSError."""
    with open(path, "rb") as file:
        return file.read()


class Config:
    """The values of .env overlaid by .env.local, and the same in os.environ, as load_dotenv() leaves them."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths
        self._values, self._exported = {}, {}  # type: dict[str, Optional[str]], dict[str, str]
        self._lock, self._stamps = threading.Lock(), ()  # type: threading.Lock, tuple[Any, ...]

    def current(self) -> dict[str, Optional[str]]:
        """Return the values as they are now, for two stats; the caller copies. Files that can't be read change nothing."""
        stamps = file_stamp(self._paths[0]), file_stamp(self._paths[1])
        if stamps != self._stamps:
            with self._lock:
                self._load(stamps)
        return self._values

    def _load(self, stamps: tuple[Any, ...]) -> None:
        self._stamps = stamps
        environ = {key: value for key, value in os.environ.items() if self._exported.get(key) != value}
        try:
            env, local = read_both(self._paths, environ)
            values = {**env, **local}
        except SettingError as error:
            log.warning("%s: the values read before stay", error)
            return
        exported = {key: value for key, value in values.items() if value is not None and key not in environ
                    and "=" not in key and "\0" not in key + value}
        os.environ.update(exported)
        for key in self._exported.keys() - exported.keys() - environ.keys():
            os.environ.pop(key, None)
        self._values, self._exported = values, exported


def base64url(data: bytes) -> str:
    """Encode without padding and what a URL or a cookie would escape (RFC 4648 5)."""
    return b2a_base64(data, newline=False).decode().rstrip("=").translate({43: "-", 47: "_"})


def make_secrets(settings: Settings) -> dict[str, str]:
    """Write a SECRET_TOKEN and SECRET_KEY that are missing into .env.local (mode 0600); return what was made."""
    made = {name: base64url(os.urandom(24)) for name in ("SECRET_TOKEN", "SECRET_KEY") if not getattr(settings, name)}
    if made:
        path = settings.env_files[1]
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8") as file:
            os.chmod(path, 0o600)
            file.write("".join(f"\n{name}={value}" for name, value in made.items()) + "\n")  # the last line may lack its end
        for name, value in made.items():
            setattr(settings, name, value)
            settings.sources[name], settings.texts[name] = ".env.local", value
    return made


def exposed_files(settings: Settings) -> list[str]:
    """Name the files that hold secrets and that other users of the machine can read."""
    found = []
    for path in settings.env_files:
        with contextlib.suppress(OSError, SettingError):
            env = read_env(path) if os.name == "posix" and os.stat(path).st_mode & 0o044 else {}
            found += [path] if any(row.secret and env.get(row.name) for row in SETTINGS_TABLE) else []
    return found

# == 03 HTTP ==============================================================
# Requests and responses, as Flask and Werkzeug give them to functions. Uses 01. Nothing here has state; a Request
# parses each part when it is first asked for it, so a call that reads only `args` parses nothing else.

_MISSING = object()
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
FORM_FIELDS = 1000  # parts of a multipart body, and bytes of its fields in memory: Werkzeug's own limits
FORM_MEMORY = 500_000
QUERY_FIELDS = 20_000
SPOOL = 512 * 1024  # an upload above this goes to disk, not to memory
CHUNK = 64 * 1024


def check_size(size: float, limit: float) -> None:
    """Refuse a body, or a part of one, that is too large: 413."""
    if size > limit:
        raise HTTPException(413)


def _read(value: Any, cast: Optional[Callable[[Any], Any]], default: Any) -> Any:
    try:
        return value if cast is None else cast(value)
    except (ValueError, TypeError):
        return default


class BadRequestKeyError(EXCEPTIONS[400], KeyError):  # type: ignore[misc, valid-type]
    """A key that the client had to send is missing: a 400, and a KeyError for who catches that."""

    def __init__(self, key: str) -> None:
        super().__init__(f"Missing key: {key}"[:200])


def each_pair(source: Any) -> Iterator[tuple[str, Any]]:
    """Yield the pairs of a mapping, of a MultiDict or of pairs; a list or tuple as a mapping's value makes several."""
    items = getattr(source, "lists", None) or getattr(source, "items", None)
    for key, value in items() if items else source:
        for item in value if items and isinstance(value, (list, tuple)) else (value,):
            yield key, item


class MultiDict(dict):  # a dict of lists inside, of first values outside
    """Several values per key; the plain dict ways see the first. A KeyError of ``[]`` is a 400 to the client."""

    def __init__(self, pairs: Any = ()) -> None:
        if pairs:
            self.update(pairs)

    def add(self, key: str, value: Any) -> None:
        """Add one more value to `key`."""
        super().setdefault(key, []).append(value)

    def __getitem__(self, key: str) -> Any:
        try:
            return super().__getitem__(key)[0]
        except (KeyError, IndexError):
            raise BadRequestKeyError(key) from None

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, [value])

    def __iter__(self) -> Iterator[str]:  # overridden so that dict(x) asks __getitem__ and gets first values
        return super().__iter__()

    def get(self, key: str, default: Any = None, type: Optional[Callable[[Any], Any]] = None) -> Any:
        """Return the first value of `key`, made by `type`; the default where it is missing or `type` refuses it."""
        values = super().get(key)
        return _read(values[0], type, default) if values else default

    def getlist(self, key: str, type: Optional[Callable[[Any], Any]] = None) -> list[Any]:
        """Return every value of `key`, those that `type` refuses left out."""
        found = (_read(value, type, _MISSING) for value in super().get(key, []))
        return [value for value in found if value is not _MISSING]

    def items(self, multi: bool = False) -> Any:
        """Yield (key, first value), or every pair with `multi`."""
        return ((key, value) for key, values in super().items() for value in (values if multi else values[:1]))

    def update(self, pairs: Any = ()) -> None:  # type: ignore[override]
        """Add the values of a mapping or of pairs, as Werkzeug's does."""
        for key, value in each_pair(pairs):
            self.add(key, value)

    def __ior__(self, other: Any) -> MultiDict:
        self.update(other)
        return self

    def __or__(self, other: Any) -> MultiDict:
        return self.copy().__ior__(other)

    def lists(self) -> Iterator[tuple[str, list[Any]]]:
        """Yield (key, all values)."""
        return ((key, list(values)) for key, values in super().items())

    def listvalues(self) -> Iterator[list[Any]]:
        """Yield all values of each key."""
        return (values for _, values in self.lists())

    def setlist(self, key: str, values: Iterable[Any]) -> None:
        """Replace the values of `key`."""
        super().__setitem__(key, list(values))

    def poplist(self, key: str) -> list[Any]:
        """Take `key` out and return all its values."""
        return super().pop(key, [])

    def pop(self, key: str, default: Any = _MISSING) -> Any:
        """Take `key` out and return its first value."""
        value = self[key] if default is _MISSING else self.get(key, default)
        self.poplist(key)
        return value

    def popitem(self) -> tuple[str, Any]:
        """Take a key out and return it with its first value."""
        key, values = super().popitem()
        return key, values[0]

    setdefault: Any = MutableMapping.setdefault  # which asks [], and so gives the first value

    def values(self) -> Any:
        """Yield the first value of every key."""
        return (self[key] for key in self)

    def to_dict(self, flat: bool = True) -> dict[str, Any]:
        """Return a plain dict of first values, or of lists with ``flat=False``."""
        return dict(self.items() if flat else self.lists())

    def copy(self) -> MultiDict:
        """Return a copy with lists of its own."""
        return MultiDict(self)

    def __repr__(self) -> str:
        return f"MultiDict({list(self.items(multi=True))!r})"


_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_HOST = re.compile(r"[\w.\-]+(:\d+)?|\[[0-9a-fA-F:.]+\](:\d+)?", re.A)
_JSON_TYPE = re.compile(r"application/(.*[/+])?json")


def header_value(name: str, value: Any) -> str:
    """Check one header on its way out, the only door: RFC 9110 5.1 and 5.5; ValueError for line breaks and such."""
    text = value if isinstance(value, str) else str(value)
    if not _HEADER_NAME.fullmatch(name):
        raise ValueError(f"header name {name!r} is not allowed")
    if not _HEADER_VALUE.fullmatch(text):
        raise ValueError(f"header {name}: the value has a character that HTTP does not allow")
    return text


def quote_text(text: str) -> str:
    """Write a quoted string (RFC 9110 5.6.4)."""
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


class Headers(MutableMapping[str, str]):
    """Header fields in order, names in any case; ``[]`` sets and gets one, `add` and `getlist` several."""

    def __init__(self, pairs: Any = ()) -> None:
        self._list: list[tuple[str, str]] = []
        if pairs:
            self.extend(pairs)

    def add(self, name: str, value: Any, **parameters: Any) -> None:
        """Append a field; keywords become ``; name="value"`` parameters."""
        more = "".join(f'; {key.replace("_", "-")}=' + (item if _HEADER_NAME.fullmatch(item) else quote_text(item))
                       for key, item in parameters.items())
        self._list.append((name, header_value(name, f"{value}{more}")))

    def extend(self, pairs: Any) -> None:
        """Append the fields of a mapping or of pairs; a list as value is several fields."""
        for name, value in each_pair(pairs):
            self.add(name, value)

    def getlist(self, name: str) -> list[str]:
        """Return every value of a field."""
        return [value for key, value in self._list if key.lower() == name.lower()]

    get_all = getlist

    def get(self, name: str, default: Any = None, type: Optional[Callable[[str], Any]] = None) -> Any:
        """Return the first value of a field, made by `type`."""
        return _read(self[name], type, default) if name in self else default

    def setlist(self, name: str, values: Iterable[Any]) -> None:
        """Replace a field by several."""
        del self[name]
        self.extend({name: list(values)})

    def update(self, pairs: Any = (), **more: Any) -> None:  # type: ignore[override]
        """Set the fields of a mapping or of pairs."""
        for name, value in [*(pairs.items() if hasattr(pairs, "items") else pairs), *more.items()]:
            self.setlist(name, value if isinstance(value, (list, tuple)) else [value])

    def clear(self) -> None:
        """Take all fields out."""
        self._list = []

    def __getitem__(self, name: str) -> str:
        for value in self.getlist(name):
            return value
        raise KeyError(name)

    def __setitem__(self, name: str, value: Any) -> None:
        checked = header_value(name, value)
        del self[name]
        self._list.append((name, checked))

    set = __setitem__

    def __delitem__(self, name: str) -> None:
        self._list = [pair for pair in self._list if pair[0].lower() != name.lower()]

    remove, add_header = __delitem__, add

    def __contains__(self, name: object) -> bool:
        return bool(self.getlist(str(name)))

    def __iter__(self) -> Iterator[Any]:  # like Werkzeug's: for name, value in headers
        return iter(self.items())

    def keys(self) -> Any:
        """Return the names in order."""
        return [key for key, _ in self._list]

    def items(self) -> Any:
        """Return the (name, value) pairs in order, as start_response takes them."""
        return list(self._list)

    to_wsgi_list = items

    def values(self) -> Any:
        """Return the values in order."""
        return [value for _, value in self._list]

    def __len__(self) -> int:
        return len(self._list)

    def __repr__(self) -> str:
        return f"Headers({self._list!r})"


BARE_KEYS = ("CONTENT_TYPE", "CONTENT_LENGTH")  # that PEP 3333 has without HTTP_; blank means that they weren't sent


def environ_key(name: str) -> str:
    """Return the key that a header has in an environ."""
    key = name.upper().replace("-", "_")
    return key if key in BARE_KEYS else "HTTP_" + key


class RequestHeaders(Headers):
    """The header fields of a request, read from its environ."""

    def __init__(self, environ: Mapping[str, Any]) -> None:
        self._environ = environ

    @property
    def _list(self) -> list[tuple[str, str]]:  # type: ignore[override]
        return [(key.removeprefix("HTTP_").replace("_", "-").title(), value) for key, value in self._environ.items()
                if key.startswith("HTTP_") or key in BARE_KEYS and value]

    def getlist(self, name: str) -> list[str]:
        """Return the field, without making a list of them all."""
        key = environ_key(name)
        value = self._environ.get(key)
        return [] if value is None or not value and key in BARE_KEYS else [value]

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("the headers of a request can't be changed")

    __setitem__ = __delitem__ = add = extend = set = setlist = clear = remove = add_header = pop = popitem = _refuse


def decode_text(data: bytes, charset: str = "utf-8") -> str:
    """Decode what a client sent; what can't be decoded becomes U+FFFD, an unknown charset is read as UTF-8."""
    with contextlib.suppress(LookupError, ValueError):  # idna, punycode and such fail in ways of their own
        return data.decode(charset, "replace")
    return data.decode("utf-8", "replace")


def decode_wsgi(text: str) -> str:
    """Turn WSGI's bytes-as-latin-1 into text; bytes that aren't UTF-8 become U+FFFD (PEP 3333)."""
    return text if text.isascii() else text.encode("latin-1", "replace").decode("utf-8", "replace")


def parse_options(value: str) -> tuple[str, dict[str, str]]:
    """Split ``form-data; name="a"`` into its value and parameters (RFC 9110 5.6.6; RFC 8187's ``name*=``)."""
    main, rest = value.partition(";")[::2]
    options = {}
    for key, text in re.findall(r";\s*([^\s=;]+)\s*=\s*(\"(?:[^\"\\]|\\.)*\"|[^;]*)", ";" + rest):
        if text.startswith('"'):
            text = re.sub(r"\\(.)", r"\1", text[1:-1]) if re.search(r'\\["\\]', text) else text[1:-1]
        key = key.lower()
        if key.endswith("*") and text.count("'") >= 2:
            charset, _, text = text.split("'", 2)
            key, text = key[:-1], decode_text(unquote_to_bytes(text), charset)
        options[key] = text.strip()
    return main.strip().lower(), options


def _unquoted(value: str) -> str:
    if len(value) < 2 or not value[0] == value[-1] == '"':
        return value
    return re.sub(r"\\(?:([0-3][0-7]{2})|(.))", lambda m: chr(int(m[1], 8)) if m[1] else m[2], value[1:-1])


def parse_cookies(header: str) -> MultiDict:
    """Read a Cookie header (RFC 6265 4.2.1), with the octal escapes that http.cookies and Werkzeug write."""
    pairs = (map(str.strip, part.partition("=")[::2]) for part in header.split(";"))
    return MultiDict([(key, decode_wsgi(_unquoted(value))) for key, value in pairs if key])


def _cookie_attribute(name: str, item: Any) -> str:
    if ";" in str(item):
        raise ValueError(f"cookie attribute {name} has a semicolon")
    return name if item is True else f"{name}={item}"


def dump_cookie(key: str, value: str = "", max_age: Any = None, expires: Any = None, path: Optional[str] = "/",
                domain: Optional[str] = None, secure: bool = False, httponly: bool = False,
                samesite: Optional[str] = None, partitioned: bool = False) -> str:
    """Write a Set-Cookie value; the arguments are Flask's. ValueError for a key or attribute that isn't allowed."""
    if not _HEADER_NAME.fullmatch(key):
        raise ValueError(f"cookie name {key!r} is not allowed")
    raw = value.encode().decode("latin-1")  # bytes as characters
    if re.search(r"[^\w!#$%&'()*+\-./:<=>?@\[\]^`{|}~]", raw, re.A):
        value = re.sub("[^ -~]|[,;]", lambda found: f"\\{ord(found[0]):03o}", quote_text(raw))
    path = quote(path, safe="%!$&'()*+,/:=@") if path is not None else None
    domain = domain.lstrip(".").encode("idna").decode() if domain else None
    if max_age is not None:
        max_age = int(max_age.total_seconds() if hasattr(max_age, "total_seconds") else max_age)
        expires = time() + max_age if expires is None else expires
    if expires is not None and not isinstance(expires, str):
        expires = http_date(expires)
    if samesite is not None and samesite.title() not in ("Strict", "Lax", "None"):
        raise ValueError("SameSite must be Strict, Lax or None")
    attributes = {"Domain": domain, "Expires": expires, "Max-Age": max_age, "Secure": secure or partitioned,
                  "HttpOnly": httponly, "Path": path, "SameSite": samesite and samesite.title(), "Partitioned": partitioned}
    given = (_cookie_attribute(name, item) for name, item in attributes.items() if item is not None and item is not False)
    return "; ".join([f"{key}={value}", *given])


def http_date(moment: Any = None) -> str:
    """Format a datetime, struct_time or Unix time as RFC 9110 5.6.7 says: ``Sun, 06 Nov 1994 08:49:37 GMT``."""
    if hasattr(moment, "timetuple"):  # a datetime counts in UTC, a date has only this
        moment = getattr(moment, "utctimetuple", moment.timetuple)()
    elif not isinstance(moment, struct_time):
        moment = gmtime(moment)
    day, month, _, clock, _ = asctime(moment).split()  # in English whatever the locale is
    return f"{day}, {moment.tm_mday:02} {month} {moment.tm_year:04} {clock} GMT"


def parse_date(text: Optional[str]) -> Any:
    """Read an HTTP date into a datetime in UTC; None for anything else."""
    from email.utils import parsedate_to_datetime  # only for conditional requests
    with contextlib.suppress(ValueError, TypeError, OverflowError, IndexError):
        found = parsedate_to_datetime(text or "")
        return found.replace(tzinfo=datetime.timezone.utc) if found.tzinfo is None else found.astimezone(datetime.timezone.utc)
    return None


class ETags:
    """An If-Match or If-None-Match header (RFC 9110 13.1): ``in`` compares strongly, `contains_weak` weakly."""

    def __init__(self, header: Optional[str]) -> None:
        found = re.findall(r'(W/)?(?:"([^"]*)"|([^\s,"]+))(?:\s*,\s*|$)', header or "")
        self._strong = {quoted or bare for weak, quoted, bare in found if not weak and bare != "*"}
        self._weak = {quoted or bare for weak, quoted, bare in found if weak}
        self.star_tag = (header or "").strip() == "*"

    def contains_weak(self, etag: str) -> bool:
        """Tell whether `etag` is one of them, weak or not."""
        return etag in self._weak or etag in self

    def __contains__(self, etag: object) -> bool:
        return self.star_tag or etag in self._strong

    def __bool__(self) -> bool:
        return self.star_tag or bool(self._strong or self._weak)


class CacheControl(dict):
    """A Cache-Control header by names: ``max_age``, ``no_store``; True is a bare directive. Changes go to `changed`."""

    def __init__(self, header: str, changed: Callable[[str], Any] = str) -> None:
        for key, equals, value in (part.strip().partition("=") for part in header.split(",") if part.strip()):
            self[key.strip().lower().replace("-", "_")] = value.strip().strip('"') if equals else True
        self.__dict__["changed"] = changed

    def __getattr__(self, name: str) -> Any:
        value: Any = self.get(name, None if name in ("max_age", "s_maxage", "max_stale", "min_fresh") else False)
        return int(value) if str(value).isdecimal() else value

    def __setattr__(self, name: str, value: Any) -> None:
        self.pop(name, None)
        if value is not None and value is not False:
            self[name] = value
        self.changed(str(self))

    def __str__(self) -> str:
        return ", ".join(key.replace("_", "-") + ("" if value is True else f"={value}") for key, value in self.items())


class FileStorage:
    """An uploaded file: filename, name, content_type, headers, stream; read() and save() as in Flask."""

    def __init__(self, stream: Any, filename: str = "", name: str = "", headers: Optional[Headers] = None) -> None:
        self.stream, self.filename, self.name = stream, filename, name
        self.headers = headers if headers is not None else Headers()

    content_type = property(lambda self: self.headers.get("Content-Type"))
    content_length = property(lambda self: self.headers.get("Content-Length", 0, type=int))
    mimetype = property(lambda self: parse_options(self.content_type or "")[0])
    mimetype_params = property(lambda self: parse_options(self.content_type or "")[1])

    def save(self, destination: Any, buffer_size: int = CHUNK) -> None:
        """Write the file to a path or an open file."""
        from shutil import copyfileobj  # here already where an upload went to disk
        with contextlib.nullcontext(destination) if hasattr(destination, "write") else open(destination, "wb") as out:
            copyfileobj(self.stream, out, buffer_size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.stream)

    def __bool__(self) -> bool:
        return bool(self.filename)

    def __repr__(self) -> str:
        return f"<FileStorage: {self.filename!r} ({self.content_type!r})>"


class _Parts:
    """Reads a multipart stream up to one mark after another, holding no more than a chunk and a mark."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._buffer = stream, b"\r\n"  # so that the first boundary looks like the others

    def until(self, mark: bytes, limit: float = float("inf")) -> Any:
        """Return what stands before `mark` as an open file; 413 above `limit` bytes, 400 where the stream ends first."""
        file: Any = io.BytesIO()
        while (at := self._buffer.find(mark)) < 0:
            sure = max(0, len(self._buffer) - len(mark) + 1)
            file = _append(file, self._buffer[:sure], limit)
            chunk = self._stream.read(CHUNK)
            if not chunk:
                raise HTTPException(400, "The multipart body ends without its closing boundary")
            self._buffer = self._buffer[sure:] + chunk
        file = _append(file, self._buffer[:at], limit)
        self._buffer = self._buffer[at + len(mark):]
        file.seek(0)
        return file

    def at_end(self) -> bool:
        """Tell whether the last mark was the closing one."""
        while len(self._buffer) < 2 and (chunk := self._stream.read(CHUNK)):
            self._buffer += chunk
        return self._buffer[:2] == b"--"


def _append(file: Any, data: bytes, limit: float) -> Any:
    """Write to a file in memory, or to the real file on disk that stands in for it once it is large; return that."""
    total = file.tell() + len(data)
    check_size(total, limit)
    if total > SPOOL and isinstance(file, io.BytesIO):
        import tempfile  # only for large uploads: 900 kB
        small, file = file, tempfile.TemporaryFile()
        file.write(small.getvalue())
    file.write(data)
    return file


def _part_headers(text: str) -> Headers:
    """Read the header fields of a part, as sent: names of files are in any script."""
    headers, lines = Headers(), (line.partition(":") for line in text.split("\r\n") if ":" in line)
    headers._list = [(key.strip(), value.strip()) for key, _, value in lines if _HEADER_NAME.fullmatch(key.strip())]
    return headers


def parse_multipart(stream: Any, boundary: bytes) -> tuple[MultiDict, MultiDict]:
    """Read multipart/form-data (RFC 7578) into fields and files; 400 where malformed, 413 over FORM_FIELDS or FORM_MEMORY."""
    form, files, parts, memory, mark = MultiDict(), MultiDict(), _Parts(stream), FORM_MEMORY, b"\r\n--" + boundary
    parts.until(mark)
    for _ in range(FORM_FIELDS + 1):
        if parts.at_end():
            return form, files
        headers = _part_headers(parts.until(b"\r\n\r\n", 16 * 1024).read().decode("utf-8", "replace"))
        options = parse_options(headers.get("Content-Disposition", ""))[1]
        name = options.get("name", "")
        if "filename" in options:
            files.add(name, FileStorage(parts.until(mark), options["filename"], name, headers))
        else:
            field = parts.until(mark, memory).read()
            memory -= len(field)
            charset = parse_options(headers.get("Content-Type", ""))[1].get("charset", "utf-8")
            form.add(name, decode_text(field, charset))
    raise HTTPException(413)


class Accept(list):
    """An Accept header (RFC 9110 12.5.1): the pairs (value, quality), best first; `best_match`, `quality`, ``in``."""

    def __init__(self, header: str) -> None:
        for part in header.split(","):
            value, options = part.partition(";")[0].strip(), parse_options(part)[1]
            with contextlib.suppress(ValueError):
                if value:
                    self.append((value, max(0.0, min(1.0, float(options.get("q", "1"))))))
        self.sort(key=lambda pair: -pair[1])

    def quality(self, value: str) -> float:
        """Return how much `value` is wanted, 0.0 to 1.0; the most exact entry decides."""
        qualities = {name.lower(): quality for name, quality in reversed(self)}  # of two the first counts
        wanted = (value.lower(), value.partition("/")[0] + "/*", "*/*", "*")
        return next((qualities[name] for name in wanted if name in qualities), 0)

    def __getitem__(self, key: Any) -> Any:
        return self.quality(key) if isinstance(key, str) else super().__getitem__(key)

    def best_match(self, matches: Iterable[str], default: Optional[str] = None) -> Optional[str]:
        """Return the one of `matches` that the client wants most."""
        wanted = list(matches)
        best = max(wanted, key=self.quality, default="")
        return best if wanted and self.quality(best) else default

    accept_html = property(lambda self: "text/html" in self)
    accept_json = property(lambda self: "application/json" in self)
    best = property(lambda self: self[0][0] if self else None)

    def values(self) -> Iterator[str]:
        """Yield the values, best first."""
        return (value for value, _ in self)

    def __contains__(self, value: Any) -> bool:
        return self.quality(value) > 0

    def __str__(self) -> str:
        return ",".join(value if quality == 1 else f"{value};q={quality:g}" for value, quality in self)


class Authorization(NamedTuple):
    """An Authorization header: `type` in lower case, `token`, or `username` and `password` for Basic (RFC 7617)."""
    type: str
    token: Optional[str] = None
    username: Optional[str] = None
    password: Optional[str] = None


def parse_authorization(header: str) -> Optional[Authorization]:
    """Read an Authorization header; None where Basic's part can't be decoded."""
    kind, _, rest = header.partition(" ")
    if kind.lower() != "basic":
        return Authorization(kind.lower(), rest.strip())
    with contextlib.suppress(ValueError):
        name, colon, password = a2b_base64(rest).decode().partition(":")
        return Authorization("basic", None, name, password) if colon else None
    return None


class UserAgent(str):
    """The User-Agent header; `.string` as in Flask."""

    string = property(str)
    browser = platform = version = language = None  # nor does Flask tell any longer


class lazy:
    """A property that is computed once and then a plain attribute."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __set_name__(self, owner: Any, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        value = instance.__dict__[self.name] = self.function(instance)
        return value


def _sent(key: str, cast: Callable[[str], Any] = str, always: bool = False) -> property:
    """Make a property of Request that reads one key of the environ; None where it is missing or blank, unless `always`."""
    return property(lambda self: cast(self.environ.get(key, "")) if always or self.environ.get(key) else None)


class _Input(io.RawIOBase):
    """The body: 400 where it ends before its Content-Length, 413 above `limit` bytes where it has none."""

    def __init__(self, stream: Any, length: Optional[int], limit: int) -> None:
        self._stream, self._counted, self._left = stream, length is not None, limit + 1 if length is None else length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(min(len(buffer), self._left)) if self._left else b""
        if self._counted and self._left and not data:
            raise HTTPException(400, "The body ends before its Content-Length")
        self._left -= len(data)
        if not self._counted and not self._left:
            raise HTTPException(413)
        buffer[:len(data)] = data
        return len(data)


class Request:
    """One HTTP request, with Flask's names; each part is parsed when it is first asked for."""

    endpoint: Optional[str] = None

    def __init__(self, environ: dict[str, Any], max_content_length: int = 16 * 1024 * 1024) -> None:
        self.environ, self.max_content_length = environ, max_content_length  #: bounds the body, in bytes
        self.method: str = environ["REQUEST_METHOD"]
        path: str = environ.get("PATH_INFO", "")
        self.path = "/" + (path if path.isascii() else decode_wsgi(path)).lstrip("/")

    view_args = lazy(lambda self: {})  #: func_name and subpath, where a function serves
    headers = lazy(lambda self: RequestHeaders(self.environ))
    args = lazy(lambda self: MultiDict(parse_query(self.environ.get("QUERY_STRING", ""))))
    cookies = lazy(lambda self: parse_cookies(self.environ.get("HTTP_COOKIE", "")))
    _content = lazy(lambda self: parse_options(self.environ.get("CONTENT_TYPE") or ""))
    mimetype = property(lambda self: self._content[0])
    mimetype_params = property(lambda self: self._content[1])
    content_type, content_encoding = _sent("CONTENT_TYPE"), _sent("HTTP_CONTENT_ENCODING")
    content_length = _sent("CONTENT_LENGTH", lambda text: int(text) if text.isascii() and text.isdigit() else None)
    origin, referrer = _sent("HTTP_ORIGIN"), _sent("HTTP_REFERER")
    remote_addr, remote_user = _sent("REMOTE_ADDR"), _sent("REMOTE_USER")  # a proxy's word is taken only from TRUSTED_PROXY
    authorization = _sent("HTTP_AUTHORIZATION", parse_authorization)
    user_agent, cache_control = _sent("HTTP_USER_AGENT", UserAgent, True), _sent("HTTP_CACHE_CONTROL", CacheControl, True)
    date, if_modified_since, if_unmodified_since = (
        _sent(key, parse_date) for key in ("HTTP_DATE", "HTTP_IF_MODIFIED_SINCE", "HTTP_IF_UNMODIFIED_SINCE"))
    if_match, if_none_match = _sent("HTTP_IF_MATCH", ETags, True), _sent("HTTP_IF_NONE_MATCH", ETags, True)
    accept_mimetypes, accept_languages = _sent("HTTP_ACCEPT", Accept, True), _sent("HTTP_ACCEPT_LANGUAGE", Accept, True)
    accept_encodings, accept_charsets = _sent("HTTP_ACCEPT_ENCODING", Accept, True), _sent("HTTP_ACCEPT_CHARSET", Accept, True)
    scheme = property(lambda self: self.environ.get("wsgi.url_scheme", "http"))
    is_secure = property(lambda self: self.scheme == "https")
    _query = property(lambda self: self.environ.get("QUERY_STRING", ""))
    query_string = property(lambda self: self._query.encode("latin-1", "replace"))

    @lazy
    def stream(self) -> Any:
        """The body to be read piece by piece; empty once `data`, `form` or `json` have read it."""
        length = self.content_length
        check_size(length or 0, self.max_content_length)
        if length is None and not self.environ.get("wsgi.input_terminated"):
            length = 0  # PEP 3333: without a length reading could block for ever
        return io.BufferedReader(_Input(self.environ["wsgi.input"], length, self.max_content_length), CHUNK)

    def get_data(self, cache: bool = True, as_text: bool = False, parse_form_data: bool = False) -> Any:
        """Return the body as bytes, or as text; empty where a form was parsed before."""
        data = self.__dict__.get("_data")
        if data is None:
            if parse_form_data:
                self.form  # noqa: B018  # reads the body where it is a form
            data = self.stream.read()
            if cache:
                self.__dict__["_data"] = data
        return decode_text(data) if as_text else data

    data = property(lambda self: self.get_data(parse_form_data=True))  #: empty where the body is a form

    @lazy
    def _form_and_files(self) -> tuple[MultiDict, MultiDict]:
        data = self.__dict__.get("_data")
        stream = self.stream if data is None else io.BytesIO(data)
        if self.mimetype == "application/x-www-form-urlencoded":
            text = stream.read(FORM_MEMORY + 1)
            check_size(len(text), FORM_MEMORY)
            return MultiDict(parse_query(text.decode("latin-1"))), MultiDict()
        if self.mimetype == "multipart/form-data":
            boundary = self.mimetype_params.get("boundary", "").encode("latin-1", "replace")
            if not boundary:
                raise HTTPException(400, "The multipart body has no boundary")
            return parse_multipart(stream, boundary)
        return MultiDict(), MultiDict()

    form = property(lambda self: self._form_and_files[0])
    files = property(lambda self: self._form_and_files[1])

    @lazy
    def values(self) -> MultiDict:
        """`args`, and for everything but GET and HEAD `form` too; args come first."""
        form = self.form.items(multi=True) if self.method not in ("GET", "HEAD") else ()
        return MultiDict([*self.args.items(multi=True), *form])

    is_json = property(lambda self: bool(_JSON_TYPE.fullmatch(self.mimetype)))
    json = property(lambda self: self.get_json())

    def get_json(self, force: bool = False, silent: bool = False, cache: bool = True) -> Any:
        """Return the parsed JSON body: 415 for another content type, 400 for bad JSON; None for both where `silent`."""
        code, text = 415, "Did not attempt to load JSON data because the request Content-Type was not 'application/json'."
        if force or self.is_json:
            try:
                return json.loads(self.get_data(cache=cache))
            except (ValueError, RecursionError):
                code, text = 400, "The body is not valid JSON"
        if silent:
            return None
        raise HTTPException(code, text)

    @lazy
    def host(self) -> str:
        """The Host header, a standard port left out; the server's name where the client sent none, or nonsense."""
        sent, name, port = map(self.environ.get, ("HTTP_HOST", "SERVER_NAME", "SERVER_PORT"), ("", "localhost", "80"))
        host = sent if _HOST.fullmatch(sent) else f"{name}:{port}"
        return host.removesuffix(":443" if self.is_secure else ":80")

    script_root = root_path = property(lambda self: decode_wsgi(self.environ.get("SCRIPT_NAME", "")).rstrip("/"))
    host_url = property(lambda self: f"{self.scheme}://{self.host}/")
    url_root = root_url = property(lambda self: self.host_url + _shown((self.script_root + "/").lstrip("/")))
    base_url = property(lambda self: self.url_root + _shown(self.path.lstrip("/")))
    full_path = property(lambda self: f"{self.path}?{decode_wsgi(self._query)}")
    url = property(lambda self: self.base_url + (self._query and "?" + uri_to_iri(self._query)))

    @property
    def access_route(self) -> list[str]:
        """The client and the proxies behind it."""
        route = [part.strip() for part in self.environ.get("HTTP_X_FORWARDED_FOR", "").split(",") if part.strip()]
        return route or [self.remote_addr] if self.remote_addr else route

    def close(self) -> None:
        """Close the uploaded files."""
        if "_form_and_files" in self.__dict__:
            for _, upload in self.files.items(multi=True):
                upload.close()

    def __repr__(self) -> str:
        return f"<Request {self.url!r} [{self.method}]>"


def uri_to_iri(uri: str) -> str:
    """Show percent-encoded text that isn't ASCII as it is read (RFC 3987 3.2)."""
    escaped = r"(?:%[89A-Fa-f][0-9A-Fa-f])+"
    return re.sub(escaped, lambda found: unquote_to_bytes(found[0]).decode(errors="fnserve.percent"), uri)


def _shown(path: str) -> str:
    return uri_to_iri(quote(path, safe="/:@!$&'()*+,;=~%"))


def iri_to_uri(iri: str) -> str:
    """Percent-encode what a URL in a header may not hold (RFC 3987 3.1)."""
    return quote(iri, safe="%!#$&'()*+,/:;=?@[]~")


codecs.register_error("fnserve.percent", lambda error: (  # bytes that aren't UTF-8 stay percent-encoded, as in Werkzeug
    quote(error.object[error.start:error.end], safe=""), error.end))  # type: ignore[attr-defined]


def parse_query(text: str) -> list[tuple[str, str]]:
    """Read key=value pairs of a query string or a urlencoded body given as latin-1 (WHATWG URL 5.1)."""
    if not text:
        return []
    try:
        return parse_qsl(decode_wsgi(text), True, errors="fnserve.percent", max_num_fields=QUERY_FIELDS)
    except ValueError:
        raise HTTPException(413, f"More than {QUERY_FIELDS} fields") from None


def _json_default(value: Any) -> Any:
    if hasattr(value, "timetuple"):  # date and datetime
        return http_date(value)
    if type(value).__name__ in ("Decimal", "UUID"):
        return str(value)
    if hasattr(type(value), "__dataclass_fields__"):
        import dataclasses  # loaded already by whoever made one
        return dataclasses.asdict(value)
    if hasattr(value, "__html__"):
        return str(value.__html__())
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


dumps = functools.partial(json.dumps, default=_json_default, sort_keys=True)  # as flask.json's, with spaces
_ENCODER = json.JSONEncoder(default=_json_default, sort_keys=True, separators=(",", ":"))  # json.dumps makes one a time


def dump_json(value: Any, **options: Any) -> str:
    """Write JSON as Flask's jsonify does, but for the line end: sorted keys, datetimes as HTTP dates."""
    return dumps(value, **{"separators": (",", ":"), **options}) if options else _ENCODER.encode(value)


_HTML = ("Content-Type", "text/html; charset=utf-8")


def _header(name: str, load: Callable[[str], Any] = str, dump: Callable[[Any], str] = str) -> property:
    """Make a property of Response that reads and writes one header; None takes it out."""
    def write(response: Response, value: Any) -> None:
        if value is None:
            del response.headers[name]
        else:
            response.headers[name] = dump(value)
    return property(lambda self: load(self.headers[name]) if name in self.headers else None, write)


class HeaderSet(list):
    """The values of a header such as Vary: `add` and `discard` write the header through `changed`."""

    def __init__(self, header: str, changed: Callable[[str], Any]) -> None:
        super().__init__(part.strip() for part in header.split(",") if part.strip())
        self._changed = changed

    def add(self, value: str) -> None:
        """Add a value, unless it is there in any case."""
        if value not in self:
            self.append(value)
            self._changed(str(self))

    def discard(self, value: str) -> None:
        """Take a value out."""
        self[:] = [item for item in self if item.lower() != value.lower()]
        self._changed(str(self))

    def __contains__(self, value: object) -> bool:
        return str(value).lower() in map(str.lower, self)

    def __str__(self) -> str:
        return ", ".join(self)


def _parsed(name: str, kind: Callable[[str, Callable[[str], Any]], Any]) -> property:
    """Make a property of Response that is one header as a `kind`, which writes its changes back; set by text or an iterable."""
    return property(lambda self: kind(self.headers.get(name, ""), functools.partial(self.headers.set, name)),
                    lambda self, value: self.headers.set(name, value if isinstance(value, str) else ", ".join(value)))


class Response:
    """An HTTP response, with Flask's names: a body (str, bytes or an iterable of them), a status and headers."""

    default_mimetype = "text/html"
    code, _status, _on_close = 200, "200 OK", ()  # type: int, str, tuple[Callable[[], Any], ...]

    def __init__(self, response: Any = None, status: Any = 200, headers: Any = None, mimetype: Optional[str] = None,
                 content_type: Optional[str] = None, direct_passthrough: bool = False) -> None:
        self.headers = Headers(headers or ())
        self.direct_passthrough = direct_passthrough
        if status is not None and status != 200:
            self.status = status
        if content_type is not None:
            self.headers["Content-Type"] = content_type
        elif mimetype is None and not headers and self.default_mimetype == "text/html":
            self.headers._list.append(_HTML)  # the plain answer: nothing to check or to replace
        elif mimetype is not None or "Content-Type" not in self.headers:
            self.mimetype = mimetype or self.default_mimetype
        self.response = response

    def set_data(self, value: Any) -> None:
        """Replace the body: str, bytes, a list of them, or an iterable that is sent as it is made."""
        if isinstance(value, str):
            value = value.encode()
        elif isinstance(value, (bytearray, memoryview)):
            value = bytes(value)
        elif value is None:
            value = b""
        elif isinstance(value, (list, tuple)):
            value = b"".join(item.encode() if isinstance(item, str) else item for item in value)
        self._body = value

    response = property(lambda self: self._body, set_data)

    def _set_status(self, value: Any) -> None:
        if value.__class__ is int and value in STATUS_LINES:
            self.code, self._status = value, STATUS_LINES[value]
            return
        text = str(int(value)) if not isinstance(value, str) else value
        code, _, reason = text.partition(" ")
        if not re.fullmatch("[2-9][0-9][0-9]", code) or not _HEADER_VALUE.fullmatch(reason):
            raise ValueError(f"status {value!r} is not an HTTP status")
        self.code = int(code)
        self._status = f"{code} {reason}" if reason else STATUS_LINES.get(self.code, f"{code} UNKNOWN")

    def _set_mimetype(self, value: str) -> None:
        textual = value.startswith("text/") or value.endswith(("/xml", "+xml", "/javascript"))
        self.headers["Content-Type"] = value + ("; charset=utf-8" if textual and "charset" not in value else "")

    status = property(lambda self: self._status, _set_status)  #: ``"200 OK"``; set by a number or such a text
    status_code = property(lambda self: self.code, _set_status)
    _content = property(lambda self: parse_options(self.headers.get("Content-Type", "")))
    mimetype = property(lambda self: self._content[0] or None, _set_mimetype)  #: the type alone; text is given a charset
    mimetype_params = property(lambda self: self._content[1])
    content_type, location = _header("Content-Type"), _header("Location", dump=iri_to_uri)
    content_location, accept_ranges = _header("Content-Location", dump=iri_to_uri), _header("Accept-Ranges")
    content_encoding, access_control_allow_origin = _header("Content-Encoding"), _header("Access-Control-Allow-Origin")
    vary, allow = _parsed("Vary", HeaderSet), _parsed("Allow", HeaderSet)
    content_language, cache_control = _parsed("Content-Language", HeaderSet), _parsed("Cache-Control", CacheControl)
    age, retry_after = _header("Age", int), _header("Retry-After")
    date, expires, last_modified = (_header(name, parse_date, http_date) for name in ("Date", "Expires", "Last-Modified"))
    is_streamed = property(lambda self: not isinstance(self._body, bytes))
    content_length = property(
        lambda self: self.headers.get("Content-Length", type=int) if self.is_streamed else len(self._body),
        lambda self, value: self.headers.set("Content-Length", value))

    def get_data(self, as_text: bool = False) -> Any:
        """Return the whole body; a stream is read to its end."""
        if self.is_streamed:
            self.response = list(self._body)
        return self._body.decode("utf-8", "replace") if as_text else self._body

    data = property(get_data, set_data)
    json = property(lambda self: self.get_json())
    text = property(lambda self: self.get_data(as_text=True))
    is_json = property(lambda self: bool(_JSON_TYPE.fullmatch(self._content[0])))

    def get_json(self, force: bool = False, silent: bool = False) -> Any:
        """Return the body parsed as JSON; ValueError for bad JSON, None where `silent`."""
        with contextlib.suppress(*[ValueError] * silent):
            return json.loads(self.get_data()) if force or self.is_json else None
        return None

    def set_cookie(self, key: str, value: str = "", *arguments: Any, **options: Any) -> None:
        """Add a Set-Cookie header; the arguments are `dump_cookie`'s."""
        self.headers.add("Set-Cookie", dump_cookie(key, value, *arguments, **options))

    def delete_cookie(self, key: str, path: Optional[str] = "/", domain: Optional[str] = None, **options: Any) -> None:
        """Make the browser forget a cookie."""
        self.set_cookie(key, expires=0, max_age=0, path=path, domain=domain, **options)

    def set_etag(self, etag: str, weak: bool = False) -> None:
        """Set the ETag header."""
        self.headers["ETag"] = f'{"W/" if weak else ""}"{etag}"'

    def get_etag(self) -> tuple[Optional[str], Optional[bool]]:
        """Return the ETag without its quotes and whether it is weak; (None, None) where there is none."""
        text = self.headers.get("ETag", "")
        return (text.removeprefix("W/").strip('"'), text.startswith("W/")) if text else (None, None)

    def add_etag(self, overwrite: bool = False, weak: bool = False) -> None:
        """Set the ETag to a hash of the body."""
        import hashlib
        if overwrite or "ETag" not in self.headers:
            self.set_etag(hashlib.sha1(self.get_data()).hexdigest(), weak)

    def make_conditional(self, request: Any, accept_ranges: bool = False, complete_length: Optional[int] = None) -> Response:
        """Become a 304, 412, 206 or 416 where the request's If-... and Range headers say so (RFC 9110 13 and 14)."""
        request = request if hasattr(request, "environ") else Request(request)
        if request.method not in ("GET", "HEAD"):
            return self
        asked = request.headers.get("Range")
        if accept_ranges:
            self.accept_ranges = "bytes"
        if asked and accept_ranges and complete_length and self._is_for_this(request.headers.get("If-Range")):
            start, stop = parse_range(asked, complete_length)
            self._body = self._body[start:stop] if isinstance(self._body, bytes) else self._body.part(start, stop)
            self.status, self.content_length = 206, stop - start
            self.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{complete_length}"
        elif not self._is_modified(request):
            self.status = 412 if request.if_match else 304
            if self.code == 304:
                self.last_modified = None
        return self

    def _is_for_this(self, if_range: Optional[str]) -> bool:
        date = parse_date(if_range)
        if date is not None:
            return self.last_modified is not None and self.last_modified <= date
        return not if_range or self.get_etag()[0] in ETags(if_range)

    def _is_modified(self, request: Any) -> bool:
        since, etag = request.if_modified_since, self.get_etag()[0]
        if etag and request.if_match:
            return etag in request.if_match
        if etag and request.if_none_match:
            return not request.if_none_match.contains_weak(etag)
        return not (since and self.last_modified and self.last_modified <= since)

    def call_on_close(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Have `function` called once the answer was sent."""
        self._on_close += (function,)
        return function

    def close(self) -> None:
        """Close the body, where it can be closed, and call what waits for it."""
        for function in filter(None, [getattr(self._body, "close", None), *self._on_close]):
            function()
        self._on_close = ()

    def __repr__(self) -> str:
        return f"<Response [{self.status}]>"


def parse_range(header: str, length: int) -> tuple[int, int]:
    """Read ``bytes=0-99``, ``bytes=100-`` or ``bytes=-50`` into [start, stop); 416 for anything else (RFC 9110 14.1)."""
    found = re.fullmatch(r"\s*bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", header, re.A | re.I)
    if found and (found[1] or found[2]):
        start = int(found[1]) if found[1] else length - int(found[2])
        stop = min(int(found[2]) + 1, length) if found[1] and found[2] else length
        if 0 <= start < stop:
            return start, stop
    raise HTTPException(416, headers=[("Content-Range", f"bytes */{length}")])


_TUPLE_FORMS = "(body, status), (body, headers) or (body, status, headers)"


def make_response(*values: Any) -> Response:
    """Turn what a function returned into a Response (SPEC 3); TypeError says what it was instead."""
    value = values[0] if len(values) == 1 else values
    if value.__class__ is str:
        return Response(value)
    if not values:
        return Response()
    status, headers = None, ()  # type: Any, Any
    if isinstance(value, tuple):
        if len(value) not in (2, 3):
            raise TypeError(f"a tuple of {len(value)} was returned; it must be {_TUPLE_FORMS}")
        value, status, headers = (*value, ())[:3]
        if not headers and isinstance(status, (dict, list, tuple, Headers)):
            status, headers = None, status
    if isinstance(value, types.AsyncGeneratorType):
        value = iterate_async(value)
    if value is None:
        value, status = "", 204 if status is None else status
    if isinstance(value, (str, bytes, bytearray)) or hasattr(value, "__next__"):
        return Response(value, status, headers)
    response = _other_response(value)
    if status is not None:
        response.status = status
    response.headers.update(headers or ())  # as in Flask, where the last of a name counts here
    return response


def iterate_async(values: Any) -> Iterator[Any]:
    """Yield what an async generator yields, in an event loop of its own."""
    import asyncio  # only for async functions
    loop = asyncio.new_event_loop()
    try:
        with contextlib.suppress(StopAsyncIteration):
            while True:
                yield loop.run_until_complete(values.__anext__())
    finally:
        try:
            tasks = asyncio.all_tasks(loop)  # what a deadline has left
            for task in tasks:
                task.cancel()
            if tasks:
                loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.run_until_complete(values.aclose())
        finally:
            loop.close()


def _other_response(value: Any) -> Response:
    if isinstance(value, Response):
        return value
    if isinstance(value, (dict, list)):
        return Response(dump_json(value) + "\n", mimetype="application/json")
    if hasattr(value, "get_wsgi_headers") and hasattr(value, "status"):  # a Response of the real Werkzeug or Flask
        return Response(value.response if value.is_streamed else value.get_data(), value.status, list(value.headers))
    raise TypeError(f"{type(value).__name__} was returned; it must be str, bytes, dict, list, Response, an iterator, "
                    f"None, {_TUPLE_FORMS}")

# == 04 SESSIONS ==========================================================
# The signed cookie, and the admin's login in it. Uses 02 and 03. A `Signer` holds the two secrets, nothing else has
# state. hmac and hashlib cost 3.6 MB, so they are imported by the first call that needs a signature.

SESSION_SECONDS = 31 * 86400


def same_secret(one: str, other: str) -> bool:
    """Compare two secrets in constant time."""
    import hmac
    return hmac.compare_digest(one.encode("utf-8", "surrogatepass"), other.encode("utf-8", "surrogatepass"))


class Signer:
    """Signs with HMAC-SHA256 under SECRET_KEY: session cookies, and logins that SECRET_TOKEN is mixed into."""

    def __init__(self, secret_key: str, secret_token: str) -> None:
        self._key, self._token = secret_key.encode(), secret_token

    def signature(self, purpose: str, payload: str) -> str:
        """Return the signature of `payload` for one purpose, base64url without padding."""
        import hmac
        text = f"fnserve {purpose}\0{payload}".encode("utf-8", "surrogatepass")
        return base64url(hmac.new(self._key, text, "sha256").digest())

    def sign(self, payload: str, now: float) -> str:
        """Return ``payload.time.signature``, all of it safe in a cookie."""
        text = f"{base64url(payload.encode())}.{int(now)}"
        return f"{text}.{self.signature('session', text)}"

    def unsign(self, text: str, now: float) -> Optional[str]:
        """Return the payload; None for what is forged, cut, too old or from the future."""
        signed, _, signature = text.rpartition(".")
        payload, _, moment = signed.partition(".")
        if not self._key or not signed or not same_secret(signature, self.signature("session", signed)) \
                or not now - SESSION_SECONDS <= int(moment) <= now + 60:  # one's own signature, so it is a number
            return None
        return a2b_base64(payload.translate({45: "+", 95: "/"}) + "==").decode()

    def login_mark(self, expires: int) -> list[Any]:
        """Return what a session holds while its owner is logged in; a function can't make it up."""
        return [expires, self.signature("login", f"{expires} {self._token}")]

    def is_login(self, mark: Any, now: float) -> bool:
        """Tell whether `mark` is a login that has not expired, made under today's SECRET_TOKEN."""
        return (isinstance(mark, list) and len(mark) == 2 and isinstance(mark[0], int) and isinstance(mark[1], str)
                and mark[0] > now and bool(self._token) and same_secret(mark[1], self.login_mark(mark[0])[1]))


class Session(dict):
    """The session: a dict that goes into the cookie as JSON when it has changed; `permanent` keeps it 31 days."""

    new, accessed = False, True  # as Flask's are for whoever can ask

    def __init__(self, payload: Optional[str]) -> None:
        with contextlib.suppress(ValueError, TypeError):  # signed, but by somebody who put something else into it
            self.update(json.loads(payload or "{}"))
        self._before, self._marked = dump_json(self), False

    modified = property(lambda self: self._marked or dump_json(self) != self._before,
                        lambda self, value: setattr(self, "_marked", value))
    #: whether the cookie outlives the browser
    permanent = property(lambda self: bool(self.get("_permanent")), lambda self, value: self.update(_permanent=bool(value)))


def save_session(session: Session, request: Request, response: Response, signer: Signer, now: float) -> None:
    """Set, delete or, where it is permanent, renew the cookie on a response whose call looked at the session."""
    safe: dict[str, Any] = {"httponly": True, "samesite": "Lax", "secure": request.is_secure}
    response.headers.add("Vary", "Cookie")
    if not session and session.modified:
        response.delete_cookie("session", **safe)
    elif session.modified or session.permanent:
        until = {"max_age": SESSION_SECONDS, "expires": now + SESSION_SECONDS} if session.permanent else {}
        response.set_cookie("session", signer.sign(dump_json(session), now), **safe, **until)

# == 05 STORE =============================================================
# serverless.db: one connection per process behind a lock. Uses 01. The users' own tables live beside ours; call_stats
# is as they know it, all others of ours start with fn_.

TABLES = {
    "call_stats": "(func_name TEXT PRIMARY KEY, call_count INTEGER NOT NULL)",
    "fn_meta": "(key TEXT PRIMARY KEY, value) WITHOUT ROWID",
    "fn_journal": "(segment INTEGER PRIMARY KEY, position INTEGER NOT NULL)",
    "fn_functions": "(func_name TEXT PRIMARY KEY, errors INTEGER NOT NULL, last_call REAL NOT NULL) WITHOUT ROWID",
    "fn_requests": "(method TEXT, endpoint TEXT, status INTEGER, count INTEGER NOT NULL,"
                   " PRIMARY KEY (method, endpoint, status)) WITHOUT ROWID",
    "fn_latency": "(method TEXT, endpoint TEXT, seconds REAL NOT NULL, buckets TEXT NOT NULL,"
                  " PRIMARY KEY (method, endpoint)) WITHOUT ROWID",
    "fn_minutes": "(minute INTEGER, endpoint TEXT, calls INTEGER NOT NULL, errors INTEGER NOT NULL, buckets TEXT NOT NULL,"
                  " PRIMARY KEY (minute, endpoint)) WITHOUT ROWID",
    "fn_calls": "(number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT, time REAL, function TEXT, method TEXT, path TEXT,"
                " status INTEGER, us INTEGER, bytes INTEGER, client TEXT, trigger TEXT, attempt INTEGER, output TEXT,"
                " error TEXT)",
    "fn_versions": "(func_name TEXT, version INTEGER, saved_at REAL NOT NULL, source BLOB NOT NULL, loaded INTEGER NOT NULL,"
                   " PRIMARY KEY (func_name, version))",
    "fn_failed_versions": "ON fn_versions (func_name, version) WHERE loaded < 0",  # so that no source is read to find them
    "fn_broken": "(func_name TEXT PRIMARY KEY, at REAL NOT NULL, error TEXT NOT NULL) WITHOUT ROWID",
    "fn_failures": "(address TEXT, at REAL)",
    "fn_metrics": "(name TEXT, labels TEXT, kind TEXT NOT NULL, help TEXT NOT NULL, value REAL NOT NULL, bounds TEXT NOT NULL,"
                  " buckets TEXT NOT NULL, PRIMARY KEY (name, labels)) WITHOUT ROWID",
    "fn_samples": "(minute INTEGER PRIMARY KEY, cpu_percent REAL, memory_rss_mb REAL, threads INTEGER)",
}
LOOK_SECONDS = 1.0
SUMS = {"last_call": "max({0}, excluded.{0})", "buckets": "add_buckets({0}, excluded.{0})"}  # of other columns the sum


def add_buckets(one: str, other: str) -> str:
    """Add up two histograms' counts; SQL uses it too."""
    return json.dumps([a + b for a, b in zip(json.loads(one), json.loads(other))])


@functools.lru_cache(maxsize=64)  # a fold makes a few of these statements very often
def insert_sql(table: str, names: tuple[str, ...], figures: tuple[str, ...] = ()) -> str:
    """Make the statement that adds a row, or adds its `figures` to those of a row that has the other columns."""
    sums = (f"{name} = {SUMS.get(name, '{0} + excluded.{0}').format(name)}" for name in figures)
    conflict = f" ON CONFLICT ({', '.join(names)}) DO UPDATE SET {', '.join(sums)}" if figures else ""
    return f"INSERT INTO {table} ({', '.join(names + figures)}) VALUES ({', '.join('?' * len(names + figures))}){conflict}"


def insert_row(connection: sqlite3.Connection, table: str, row: Mapping[str, Any]) -> None:
    """Add a row."""
    connection.execute(insert_sql(table, tuple(row)), tuple(row.values()))


def add_up(connection: sqlite3.Connection, table: str, key: Mapping[str, Any], **figures: Any) -> None:
    """Add figures to those of a row; make the row where there is none."""
    connection.execute(insert_sql(table, tuple(key), tuple(figures)), (*key.values(), *figures.values()))


def make_private(path: str) -> None:
    """Make a file that isn't there for its owner's eyes only; one that is there is never opened: closing it would drop the
    locks that SQLite has on it in this process, and the next who leaves would delete its WAL (howtocorrupt 2.2)."""
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def in_children(function: Callable[[], Any]) -> None:
    """Have `function` called in each process that is forked from this one."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


class Store:
    """The database. `read()` returns rows, `write()` is one transaction; both raise sqlite3.Error."""

    #: opened by the first use in each process, so that none crosses a fork (sqlite.org/howtocorrupt 2.6)
    _connection: Optional[sqlite3.Connection] = None
    _owner, _opened = 0, [0, 0]

    def __init__(self, path: str, tables: Mapping[str, str], migrations: Iterable[tuple[str, str, str]] = ()) -> None:
        self.path, self._tables, self._migrations, self._lock = path, tables, migrations, threading.RLock()
        self._inherited: list[Any] = []  #: connections of a parent process, which must not be closed here
        in_children(self._after_fork)

    def follow(self) -> None:
        """Let go of a file that was deleted or replaced while it was open, or whose WAL was, which happens where a function
        reads the database as a file (howtocorrupt 2.2); the next use opens what is there by then."""
        with self._lock:
            if self._connection and any(old and old != new for old, new in zip(self._opened, self._files())):
                log.error("%s was deleted or replaced; what the journal still has is counted anew", self.path)
                self._inherited.append(self._connection)  # closing it would delete the new one's WAL (howtocorrupt 2.4)
                self._connection = None

    def read(self, sql: str, *values: Any) -> list[Any]:
        """Run one SELECT and return its rows, whose columns go by number or by name."""
        with self._lock:
            return self._open().execute(sql, values).fetchall()

    @contextlib.contextmanager
    def write(self, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """Hold the database's one write lock for a transaction: committed at the end, `durable` with fsync, undone by an
        exception."""
        with self._lock:
            connection = self._open()
            try:
                if connection.in_transaction:  # an interrupt came just before its ROLLBACK
                    connection.execute("ROLLBACK")
                connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")  # a fold that is lost is done anew
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

    def run(self, sql: str, *values: Any) -> int:
        """Run one statement as a transaction of its own; return how many rows it changed."""
        with self.write() as connection:
            return connection.execute(sql, values).rowcount

    def check(self) -> None:
        """Open the database; StoreError where it can't be used. A lock held by somebody else is not an error."""
        try:
            if os.path.exists(self.path) and os.path.getsize(self.path):
                self._look()
            self.read("SELECT 1 FROM call_stats LIMIT 1")
        except sqlite3.Error as error:
            if "locked" not in str(error):
                raise StoreError(f"{self.path}: {error}") from None
            log.warning("%s is locked; the calls go on and are counted later", self.path)
        finally:
            self.close()

    def _look(self) -> None:
        """Check the file before anything is written to it, for LOOK_SECONDS at most; DatabaseError where it is broken."""
        until = monotonic() + LOOK_SECONDS
        with contextlib.closing(sqlite3.connect(f"file:{quote(os.fsencode(self.path))}?mode=ro", uri=True)) as connection:
            connection.set_progress_handler(lambda: monotonic() > until, 10_000)
            with contextlib.suppress(sqlite3.OperationalError):  # it took too long, or is locked
                found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
                if found != "ok" and not found.startswith(("NULL value in", "CHECK constraint failed")):  # their own affair
                    raise sqlite3.DatabaseError(" ".join(found.split()))

    def close(self) -> None:
        """Close this process's connection."""
        with self._lock:
            if self._connection is not None and self._owner == os.getpid():
                self._connection.close()
            self._connection = None

    def _after_fork(self) -> None:
        self._inherited.append(self._connection)
        self._connection, self._lock = None, threading.RLock()

    def _open(self) -> sqlite3.Connection:
        if self._connection is None or self._owner != os.getpid():
            make_private(self.path)
            connection = sqlite3.connect(self.path, timeout=5, isolation_level=None, check_same_thread=False)
            try:
                connection.row_factory = sqlite3.Row
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=NORMAL")
                connection.execute("PRAGMA cache_size=-1024")
                connection.create_function("add_buckets", 2, add_buckets)
                for name, columns in self._tables.items():
                    kind = "TABLE" if columns.startswith("(") else "INDEX"
                    connection.execute(f"CREATE {kind} IF NOT EXISTS {name} {columns}")
                for table, column, kind in self._migrations:
                    if column not in {row["name"] for row in connection.execute(f"PRAGMA table_info({table})")}:
                        connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")
            except BaseException:
                connection.close()
                raise
            self._connection, self._owner, self._opened = connection, os.getpid(), self._files()
        return self._connection

    def _files(self) -> list[int]:
        """Return what tells the database and its WAL from other files of these names; 0 where there is none."""
        return [os.stat(path).st_ino if os.path.exists(path) else 0 for path in (self.path, self.path + "-wal")]

# == 06 JOURNAL ===========================================================
# One append per call; whatever counts is folded from the lines into SQLite. Uses 03, 05. `Journal` owns this process's
# file handle, `Folder` owns nothing: the read position is stored in the transaction that adds what was read.
#
# A segment is journal/<number>.jsonl. Whoever appends to it holds a shared flock, which the kernel drops with the
# process. Once a newer segment exists, nobody takes the old one's lock any more; when the exclusive lock can be had,
# its last line has been written, and it is done with after one more read.

SEGMENT_BYTES = 8 * 1024 * 1024
FOLD_BYTES = 512 * 1024  # read per transaction: bounds memory, and how long others wait for the write lock
RECORD_BYTES = 384 * 1024  # no record is longer: output, traceback, series
OUTPUT_BYTES = 8 * 1024
MOST_SERIES = 1000  # of one metric of a function's own
CALL_COLUMNS = {"id": "id", "time": "t", "function": "f", "method": "m", "path": "p", "status": "s", "us": "us", "bytes": "n",
                "client": "c", "trigger": "via", "attempt": "try", "output": "out", "error": "err"}  # of fn_calls, of a record
KEEP_CALL = f"INSERT INTO fn_calls ({', '.join(CALL_COLUMNS)}) VALUES ({', '.join('?' * len(CALL_COLUMNS))})"
BUCKETS = (.005, .01, .025, .05, .075, .1, .25, .5, .75, 1.0, 2.5, 5.0, 7.5, 10.0)  # prometheus_client's defaults

try:
    from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
except ImportError:  # Windows: one process, so nobody to lock out
    LOCK_EX = LOCK_NB = LOCK_SH = 0  # type: ignore[misc]

    def flock(handle: int, operation: int) -> None:  # type: ignore[misc]
        """Do nothing."""


def lock_file(path: str) -> int:
    """Open a file and take its lock, which the kernel drops with the process; -1 where somebody else has it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with contextlib.suppress(OSError):
        flock(handle, LOCK_EX | LOCK_NB)
        return handle
    os.close(handle)
    return -1


def segments(directory: str) -> list[int]:
    """List the numbers of the segments, oldest first."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(int(name[:-6]) for name in os.listdir(directory) if re.fullmatch(r"\d+\.jsonl", name, re.A))
    return []


def segment_path(directory: str, number: int) -> str:
    """Return the path of a segment."""
    return os.path.join(directory, f"{number:08}.jsonl")


class Journal:
    """Appends records. A write that fails never fails a call: it is counted in `lost` and logged once a minute."""

    lost = 0  #: records this process could not write
    handle = -1  #: of the segment, from the first record on
    _number, _count, _complained = 0, 0, 0.0

    def __init__(self, directory: str) -> None:
        self.directory, self._lock = directory, threading.Lock()
        in_children(self._let_go)

    def append(self, record: str) -> None:
        """Write one JSON record with one write(2)."""
        line = f"\n{record}\n".encode()  # a break on both sides: what a short write leaves never spoils the next record
        try:
            self._count += 1
            if self._count & 63 == 1 or self.handle < 0:
                self.refresh()
            if os.write(self.handle, line) != len(line):
                raise OSError("the disk is full")
        except OSError as error:
            self.lost += 1
            if monotonic() - self._complained > 60:
                self._complained = monotonic()
                log.error("%s: %s; %d records lost so far", self.directory, error, self.lost)

    def _let_go(self) -> None:
        """Let a child open the segment for itself: the process that it was forked from holds its own."""
        if self.handle >= 0:
            os.close(self.handle)
        self.handle, self._lock = -1, threading.Lock()

    def refresh(self) -> None:
        """Open the current segment; move on to a new one where it is full, was deleted or is no longer the newest."""
        with self._lock:
            least = 0
            if self.handle >= 0 and os.fstat(self.handle).st_nlink:
                least = self._number + (os.fstat(self.handle).st_size >= SEGMENT_BYTES)
                if least == self._number and not os.path.exists(segment_path(self.directory, least + 1)):
                    return
            self._open(least)

    def _open(self, least: int) -> None:
        """Open the newest segment, at least number `least`, and hold it."""
        os.makedirs(self.directory, exist_ok=True)
        while True:  # the first number is a new one: a position stored for a deleted segment never meets another file
            number = max([least] + (segments(self.directory)[-1:] or [int(time()), self._number + 1]))
            handle = os.open(segment_path(self.directory, number), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            flock(handle, LOCK_SH)
            if segments(self.directory)[-1:] == [number]:
                break
            os.close(handle)
        if self.handle >= 0:
            os.dup2(handle, self.handle, inheritable=False)  # a thread that is about to write hits the old or the new
            os.close(handle)
            handle = self.handle
        self._number, self.handle = number, handle


_SECRET = re.compile(r"token|key|secret|signature|(?<![a-z])(sig|pass)(?![a-z])|passw|pwd|auth(?!ors?(?![a-z]))|cookie|hmac"
                     "|credential", re.I)


def scrub(query: str) -> str:
    """Blank the values of query parameters that carry secrets, however their names are spelt, also in a URL that is a value;
    cut a long query."""
    shown = []
    for pair in query[:1000].replace(";", "&").split("&"):
        names = re.findall(r"(?<![^=&?#/])([^=&?#/]*)=", unquote_to_bytes(pair).decode("utf-8", "replace"))
        shown.append(pair.partition("=")[0] + "=***" if any(map(_SECRET.search, names)) else pair)
    return "&".join(shown)


class Tally:
    """What a batch of records adds up to, before it is written in one transaction."""

    torn = 0  #: lines that are no record

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        #: (function or None, endpoint, method, status, minute) -> [count, microseconds, last time, buckets]
        self.groups: dict[tuple[Optional[str], str, str, int, int], list[Any]] = {}
        self.metrics: list[list[Any]] = []  #: what functions counted: name, labels, kind, help, sum, bounds, buckets

    def add(self, lines: list[bytes]) -> None:
        """Add lines of the journal. All at once where they are sound: 0.6 s instead of 1.3 s for 100,000."""
        try:
            records = json.loads(b"[" + b",".join(lines) + b"]")
        except ValueError:
            records = lines
        for record in records:
            try:
                self._add(json.loads(record) if record.__class__ is bytes else record)
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
                self.torn += 1

    def _add(self, record: dict[str, Any]) -> None:
        name, moment, taken = record.get("f"), float(record["t"]), min(int(record["us"]), 1 << 53)
        if not (0 <= moment < 1e11 and 0 <= int(record["s"]) < 1000 and taken >= 0):  # a number that SQLite refuses
            raise ValueError("no record of ours")
        name = sql_value(name) if name else None
        queued = record.get("via") == "queued"  # the function has not run yet; it counts once, when it does
        method = record["m"] if record["m"] in METHODS else "OTHER"  # nobody may grow the series by inventing methods
        endpoint = "/function/" + name if name else sql_value(str(record["r"]))
        key = (None if queued else name, endpoint, method, int(record["s"]), int(moment) // 60)
        group = self.groups.get(key) or self.groups.setdefault(key, [0, 0, 0.0, [0] * (len(BUCKETS) + 1)])
        group[0] += 1
        group[1] += taken
        group[2] = max(group[2], moment)
        group[3][bisect_left(BUCKETS, taken / 1e6)] += 1
        self.calls.append(record)
        self.metrics += record.get("mx", ())


def sql_value(value: Any) -> Any:
    """Return what SQLite can store of a JSON value; a lone surrogate, which a client can send, becomes a ?."""
    if isinstance(value, int) and abs(value) < 1 << 62 or value is None or isinstance(value, float):
        return value
    return str(value).encode("utf-8", "replace").decode()


def sum_buckets(texts: Optional[str]) -> list[int]:
    """Add up bucket counts, lists in JSON with commas between."""
    return [sum(column) for column in zip(*json.loads(f"[{texts or '[0]'}]"))]


def quantile(buckets: Sequence[int], q: float) -> float:
    """Estimate a quantile in seconds from bucket counts, as histogram_quantile() does."""
    rank, below = q * sum(buckets), 0.0
    for index, count in enumerate(buckets[:len(BUCKETS)]):
        if count and below + count >= rank:
            low = BUCKETS[index - 1] if index else 0.0
            return low + (BUCKETS[index] - low) * (rank - below) / count
        below += count
    return BUCKETS[-1] if any(buckets) else 0.0


def milliseconds(value: float) -> str:
    """Show a quantile; within the first bucket nothing is known of it."""
    return f"< {BUCKETS[0] * 1000:.0f} ms" if 0 < value <= BUCKETS[0] else f"{value * 1000:.0f} ms"


def read_lines(path: str, position: int) -> tuple[list[bytes], int, bool]:
    """Return a segment's lines from a position on, as many as are read at once, the position after them, and if more wait."""
    data = b""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        position = min(position, os.fstat(file.fileno()).st_size)  # power loss can leave less than what was folded
        file.seek(position)
        data = file.read(FOLD_BYTES)
    # the last line may be half written yet; one longer than all that is read at once is none of ours
    ready = len(data) if len(data) == FOLD_BYTES and b"\n" not in data else data.rfind(b"\n") + 1
    return [line for line in data[:ready].split(b"\n") if line], position + ready, len(data) == FOLD_BYTES


class Folder:
    """Folds the journal into the database, each record exactly once, whichever process does it and dies doing it."""

    def __init__(self, journal: Journal, store: Store, settings: Settings, is_protected: Callable[[str], bool]) -> None:
        self._directory, self._store, self._is_protected = journal.directory, store, is_protected
        self._keep_calls, self._keep_days = settings.KEEP_INVOCATIONS, settings.KEEP_DAYS

    def fold(self, within: Optional[Callable[[sqlite3.Connection], None]] = None) -> int:
        """Fold all appended so far, return how many records; `within` runs in the last transaction, so it sees each once."""
        total, more = 0, True
        while more:
            with self._store.write() as connection:
                tally = Tally()
                more = self._read(connection, tally)
                if tally.calls or tally.torn:
                    self._add(connection, tally)
                if not more and within:
                    within(connection)
            total += len(tally.calls)
        return total

    def _read(self, connection: sqlite3.Connection, tally: Tally) -> bool:
        done = dict(connection.execute("SELECT segment, position FROM fn_journal"))
        for number in segments(self._directory):
            lines, position, more = read_lines(segment_path(self._directory, number), done.get(number, 0))
            tally.add(lines)
            if position != done.get(number, 0):
                connection.execute("REPLACE INTO fn_journal VALUES (?, ?)", (number, position))
            if more:
                return True
        return False

    def _add(self, connection: sqlite3.Connection, tally: Tally) -> None:
        for (name, endpoint, method, status, minute), (count, taken, last, counts) in tally.groups.items():
            failed, buckets, ends = count if status >= 500 else 0, json.dumps(counts), {"method": method, "endpoint": endpoint}
            if name and not self._is_protected(name):
                add_up(connection, "call_stats", {"func_name": name}, call_count=count)
            if name:
                add_up(connection, "fn_functions", {"func_name": name}, errors=failed, last_call=last)
            add_up(connection, "fn_requests", {**ends, "status": status}, count=count)
            add_up(connection, "fn_latency", ends, seconds=taken / 1e6, buckets=buckets)
            if name or not endpoint.startswith("/function/"):  # what was queued the charts count once, when it runs
                add_up(connection, "fn_minutes", {"minute": minute, "endpoint": endpoint}, calls=count, errors=failed,
                       buckets=buckets)
        if tally.torn:
            add_up(connection, "fn_meta", {"key": "torn_lines"}, value=tally.torn)
        for metric in tally.metrics:
            with contextlib.suppress(TypeError, ValueError, sqlite3.IntegrityError):  # a row that no call of ours wrote
                self._add_metric(connection, *metric)
        # the platform's own pages and probes, unless they fail, and what scanners look for would drive functions' calls out
        kept = [call for call in tally.calls if call.get("f") or call["s"] >= 400 and call["s"] != 404]
        self._keep(connection, kept[max(0, len(kept) - self._keep_calls):])

    def _add_metric(self, connection: sqlite3.Connection, name: str, labels: str, kind: str, text: str, value: float,
                    bounds: list[float], counts: list[int]) -> None:
        """Add to a counter, or to a histogram with its first bounds; not to more than MOST_SERIES, nor to both by one name."""
        row = connection.execute("SELECT value, bounds, buckets FROM fn_metrics WHERE name = ? AND labels = ?",
                                 (name, labels)).fetchone()
        if row is None:
            known = connection.execute("SELECT count(*), min(kind) FROM fn_metrics WHERE name = ?", (name,)).fetchone()
            if known[0] >= MOST_SERIES or known[1] not in (None, kind):
                return
            row = (0.0, json.dumps(bounds), json.dumps([0] * (len(bounds) + 1)))
        buckets, first = json.loads(row[2]), json.loads(row[1])
        for bound, count in zip([*bounds, float("inf")], counts):
            buckets[bisect_left(first, bound)] += count
        connection.execute("REPLACE INTO fn_metrics VALUES (?, ?, ?, ?, ?, ?, ?)",
                           (name, labels, kind, text, row[0] + value, row[1], json.dumps(buckets)))

    def _keep(self, connection: sqlite3.Connection, calls: list[dict[str, Any]]) -> None:
        """Store the last calls for the logs page, and drop those beyond KEEP_INVOCATIONS."""
        rows = ({"via": "http", "try": 1, **call, "f": call.get("f") or call.get("r")} for call in calls)
        connection.executemany(KEEP_CALL, ([sql_value(row.get(key)) for key in CALL_COLUMNS.values()] for row in rows))
        connection.execute("DELETE FROM fn_calls WHERE number <= (SELECT max(number) FROM fn_calls) - ?", (self._keep_calls,))

    def prune(self, now: float, pushed: Optional[Mapping[int, int]] = None) -> None:
        """Delete segments that are folded, `pushed` to Loki, given up by every writer and older than KEEP_DAYS; old minutes."""
        oldest = now - max(self._keep_days * 86400, 60)
        done = dict(self._store.read("SELECT segment, position FROM fn_journal"))
        for number in segments(self._directory)[:-1]:
            path = segment_path(self._directory, number)
            with contextlib.suppress(FileNotFoundError, BlockingIOError), open(path, "rb") as file:
                waits = pushed is not None and pushed.get(number, 0) < os.fstat(file.fileno()).st_size
                if os.fstat(file.fileno()).st_mtime > oldest or waits:
                    continue
                flock(file.fileno(), LOCK_EX | LOCK_NB)
                if not read_lines(path, done.get(number, 0))[0]:  # a torn last line is not waited for
                    os.unlink(path)
        with self._store.write() as connection:
            connection.execute("DELETE FROM fn_minutes WHERE minute < ?", (int(oldest) // 60,))
            connection.execute("DELETE FROM fn_journal WHERE segment < ?", (min(segments(self._directory), default=0),))
            connection.execute("DELETE FROM fn_failures WHERE at < ?", (now - 3600,))

# == 07 FUNCTIONS =========================================================
# Names to files, files to modules. Uses 01 to 03, 05; the modules that `from flask import ...` means are handed in.
# `Functions` owns what this process has loaded; `Versions` keeps every source in the database, for all processes.

HOOKS = "_hooks"
PACKAGE = "functions"  # what functions are called in sys.modules, whatever FUNCTIONS_DIR is called
KEEP_VERSIONS = 50
KEEP_READ = 20_000  # files whose descriptions are kept in memory, as of a stamp
GROUP_DEPTH = 8
KEYWORDS = ("config", "protected", "context")
UNREADABLE = object()  #: stands for what of a file can't be told
_PARSING = threading.Lock()  # where two threads make syntax trees at once, Python 3.11 raises SystemError (gh-106905)


def valid_name(name: str) -> bool:
    """Tell whether this may name a function: identifiers that don't start with _, joined by / for groups."""
    return len(name) <= 200 and all(part.isidentifier() and part[0] != "_" for part in name.split("/"))


def is_protected(name: str, protected: frozenset[str]) -> bool:
    """Tell whether a function is one of the protected names, or in a group that is."""
    return name in protected or "/" in name and is_protected(name.rpartition("/")[0], protected)


def compile_source(source: bytes, path: str, flags: int = 0) -> Any:
    """Compile a function file; LoadError with line and column where it can't be."""
    if not source.strip():
        raise LoadError("the file is empty")
    try:
        with _PARSING:
            return compile(source, path, "exec", flags, dont_inherit=True)
    except SyntaxError as error:
        raise LoadError(f"{type(error).__name__}: {error.msg}", error.lineno or 0, error.offset or 0) from None
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:  # NUL bytes, absurd nesting
        raise LoadError(f"{type(error).__name__}: {error}") from None


class Description(NamedTuple):
    """What a file says of itself, of which nothing is run."""
    docstring: str = ""  #: the file's, else main's
    returns: str = ""  #: main's hint: dict, str, ...
    settings: Mapping[str, Any] = types.MappingProxyType({})  #: as far as they are literals
    serves: bool = True  #: False for a helper module, which names nothing that could be an entry point
    methods: Sequence[str] = ()  #: those of its settings, if they name any
    error: Optional[LoadError] = None  #: why it can't be loaded, as far as that can be told

    @property
    def summary(self) -> str:
        """The docstring's first line."""
        return self.docstring.partition("\n")[0].rstrip()


def own_settings(tree: Any) -> dict[Any, Any]:
    """Return what a file's SETTINGS say, as far as that is literal: of the file's own level, within if, with and try too."""
    import ast
    nodes, found = [tree], {}  # type: list[Any], dict[Any, Any]
    while nodes:
        node = nodes.pop()
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.expr)):
            nodes += reversed(list(ast.iter_child_nodes(node)))
        target, value = (getattr(node, "targets", None) or [getattr(node, "target", None)])[0], getattr(node, "value", None)
        if isinstance(value, ast.Dict) and getattr(target, "id", "") == "SETTINGS":
            for key, item in zip(value.keys, value.values):
                with contextlib.suppress(ValueError, TypeError, RecursionError):  # what only running it would tell
                    found.update({ast.literal_eval(key): ast.literal_eval(item)} if key else {})  # no key: **another
    return found


def describe_source(source: bytes, path: str) -> Description:
    """Read what a file says of itself; LoadError where it does not compile."""
    import ast  # 500 kB, only for pages, queues and files that have SETTINGS
    tree = compile_source(source, path, ast.PyCF_ONLY_AST)
    mains = [node for node in tree.body if getattr(node, "name", "") == "main" and hasattr(node, "body")]
    docstrings = [(ast.get_docstring(node, clean=False) or "").strip() for node in [tree, *mains]]
    hint = getattr(getattr(mains[-1], "returns", None), "id", "") if mains else ""
    settings = own_settings(tree) if b"SETTINGS" in source else {}
    serves = re.search(rb"\bmain\b|functions_framework|\bentry\b", source) is not None
    return Description(next(filter(None, docstrings), ""), hint, settings, serves)


@functools.lru_cache(KEEP_READ)
def read_schedule(path: str, stamp: Any) -> Any:
    """Return a file's literal SETTINGS["schedule"], None where there is none, UNREADABLE where that can't be told."""
    try:
        source = read_source(path)
        plain = b"SETTINGS" not in source and source.strip()  # as most files, of which there may be 10,000
        return None if plain else describe_source(source, path).settings.get("schedule")
    except LoadError:
        return UNREADABLE


class Versions:
    """The last 50 sources of each function that were saved or served, and which are broken; a write may fail, a call not."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store, self._clock = store, clock

    _NEWEST = "SELECT version, source, loaded FROM fn_versions WHERE func_name = ? ORDER BY version DESC LIMIT 1"
    _GOOD = "SELECT source FROM fn_versions WHERE func_name = ? AND loaded > 0 ORDER BY version DESC LIMIT 1"
    _BROKEN = "SELECT func_name, 'version ' || version || ' failed its first calls; the one before it serves again'" \
              " FROM fn_versions AS failed WHERE loaded < 0 AND version + 1 = (SELECT max(version) FROM fn_versions" \
              " WHERE func_name = failed.func_name) UNION ALL SELECT func_name, error FROM fn_broken"

    def remember(self, name: str, source: bytes, loaded: bool) -> int:
        """Store `source` unless it is the newest version already; return its number (0: could not)."""
        try:
            for version, newest, good in self._store.read(self._NEWEST, name):
                if newest == source and good >= loaded:  # the usual case needs no write lock
                    return version
            with self._store.write() as connection:
                return self.add(connection, name, source, loaded)
        except sqlite3.Error as error:
            log.warning("%s: its version could not be stored: %s", name, error)
            return 0

    def add(self, connection: sqlite3.Connection, name: str, source: bytes, loaded: bool) -> int:
        """Store `source` within a transaction."""
        row = connection.execute(self._NEWEST, (name,)).fetchone()
        if row and row[1] == source:
            connection.execute("UPDATE fn_versions SET loaded = max(loaded, ?) WHERE func_name = ? AND version = ?",
                               (loaded, name, row[0]))
            return row[0]
        version = row[0] + 1 if row else 1
        connection.execute("INSERT INTO fn_versions VALUES (?, ?, ?, ?, ?)", (name, version, self._clock(), source, loaded))
        connection.execute("DELETE FROM fn_versions WHERE func_name = ?1 AND version <= ?2 AND version <> (SELECT"
                           " max(version) FROM fn_versions WHERE func_name = ?1 AND loaded > 0)",
                           (name, version - KEEP_VERSIONS))
        return version

    def last_good(self, name: str) -> Optional[bytes]:
        """Return the newest source that has loaded, in this or any other process."""
        with contextlib.suppress(sqlite3.Error, IndexError):
            return bytes(self._store.read(self._GOOD, name)[0][0])
        return None

    def forget(self, name: str) -> None:
        """Let no version stand in for a file that was deleted on purpose; all can still be restored."""
        self.mark_broken(name, None)
        self._store.run("UPDATE fn_versions SET loaded = 0 WHERE func_name = ?", name)

    def mark_broken(self, name: str, error: Optional[LoadError]) -> None:
        """Note that a function can't be loaded, or can again."""
        with contextlib.suppress(sqlite3.Error):
            if error is not None:
                self._store.run("REPLACE INTO fn_broken VALUES (?, ?, ?)", name, self._clock(), str(error))
            elif self._store.read("SELECT 1 FROM fn_broken WHERE func_name = ?", name):
                self._store.run("DELETE FROM fn_broken WHERE func_name = ?", name)

    def broken(self) -> dict[str, str]:
        """Return the functions that could not be loaded when somebody last tried, or were rolled back, and why."""
        return dict(self._store.read(self._BROKEN))


class Entry(NamedTuple):
    """An entry point and how it wants to be called."""
    function: Callable[..., Any]
    takes_request: bool
    wants: tuple[str, ...]  #: which of config, protected, context it takes
    kind: str = "http"  #: http or cloud_event
    plain: bool = False  #: it takes the request and nothing else


class CallSettings(NamedTuple):
    """What a function's SETTINGS say about its calls, checked."""
    methods: tuple[str, ...] = ()  #: blank: every method
    auth: str = "public"
    cors: tuple[str, ...] = ()  #: origins, or *
    rate: tuple[int, float] = (0, 0.0)  #: calls per seconds of one client; 0 is unbounded
    concurrency: int = 0  #: calls at once in one worker; 0: what the worker allows
    timeout: float = 0.0  #: seconds; 0: TIMEOUT
    max_body: int = 0  #: bytes; 0: MAX_BODY
    entry: str = ""
    parameters: Mapping[str, Any] = types.MappingProxyType({})
    verify: Any = None  #: a scheme of section 09
    async_: Optional[bool] = None  #: True: every call is queued; False: none is; None: as the client prefers
    retries: int = 3
    dedupe: str = ""  #: header that tells a repeat
    schedule: Any = None
    guard: bool = False  #: see guard()


class Code(NamedTuple):
    """A version of a function that has loaded."""
    source: bytes
    module: types.ModuleType
    settings: CallSettings
    entries: dict[str, Entry]  #: by name; main is "", and alone
    handlers: list[tuple[Any, Callable[[Any], Any]]]  #: what functions_framework.errorhandler marked: (status or class, it)


class Share:
    """Places that calls can hold at once: as many Nones as are free. See Watch."""

    def __init__(self) -> None:
        self.limit, self.places = 0, []  # type: int, list[None]


class Function:
    """One function file in this process: the code that serves, and what is wrong with the newest file."""

    def __init__(self, name: str, path: str) -> None:
        self.name, self.path = name, path
        self.stamp: Any = None  #: state of the file that was last looked at
        self.source: Optional[bytes] = None  #: the newest source, good or not
        self.code: Optional[Code] = None
        self.error: Optional[LoadError] = None
        self.is_hooks = name.rpartition("/")[2] == HOOKS
        self.tried = 0.0  #: monotonic time of the last attempt to load
        self.uses_helpers = False
        self.stored = True  #: whether its code is among the versions
        self.lock = threading.RLock()
        self.share, self.loading = Share(), Share()  #: of those that call it, and of the one that loads it


class _HelperLoader(importlib.machinery.SourceFileLoader):
    """Loads a module under functions/ with the functions' imports."""

    def __init__(self, fullname: str, path: str, names: dict[str, Any]) -> None:
        super().__init__(fullname, path)
        self._builtins = names

    def exec_module(self, module: types.ModuleType) -> None:  # a .pyc goes by the second and misses edits; none is written
        module.__dict__["__builtins__"] = self._builtins
        exec(compile(self.get_data(self.path), self.path, "exec", dont_inherit=True), module.__dict__)


class Functions:
    """The functions of one directory; `api` is what imports of flask and such mean there, `reserved` names are not served."""

    def __init__(self, root: str, versions: Versions, api: Mapping[str, types.ModuleType], reserved: frozenset[str],
                 casts: Mapping[str, Callable[[Any], Any]]) -> None:
        self.root, self.versions, self._api, self._reserved, self._casts = root, versions, api, reserved, casts
        self.builtins = {**builtins.__dict__, "__import__": self._import}
        self._known: dict[str, Function] = {}
        self._forgetting = threading.Lock()
        self._watched: dict[str, Any] = {}  #: helper file -> its stamp when it was imported
        self._looked, self._warned = 0.0, set()  # type: float, set[str]
        self._generation = 0  #: how often helpers have changed
        self._describe = functools.lru_cache(KEEP_READ)(self._read_description)
        self._hooked: dict[str, bool] = {}  #: group -> whether it has hooks, as of the last look

    def install(self) -> None:
        """Make functions/ importable in this process: `import foo`, `from functions.foo import bar`, `from . import`."""
        package = types.ModuleType(PACKAGE)
        package.__path__ = [self.root]
        sys.modules[PACKAGE] = package
        for path in (self.root, os.path.dirname(self.root)):
            if path not in sys.path:
                sys.path.append(path)  # last, so that no function hides a library
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Functions)]
        at = sys.meta_path.index(importlib.machinery.PathFinder) if importlib.machinery.PathFinder in sys.meta_path else 0
        sys.meta_path.insert(at, self)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Find a module as ever, but give one under functions/ or beside it the loader above (importlib's protocol)."""
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader) and self._is_helper(spec.origin or ""):
            spec.loader, spec.cached = _HelperLoader(fullname, spec.origin or "", self.builtins), None
        return spec

    def _is_helper(self, path: str) -> bool:
        return path.startswith(self.root + os.sep) or os.path.dirname(path) == os.path.dirname(self.root)

    def path(self, name: str) -> str:
        """Return the file of a name, which must be a `valid_name`; the only door from names to the file system."""
        if not valid_name(name):
            raise ValueError(f"{name!r} is no function name")
        return os.path.join(self.root, *name.split("/")) + ".py"

    def exists(self, name: str) -> bool:
        """Tell whether there is a file for this name."""
        return valid_name(name) and os.path.isfile(self.path(name))

    def hider(self, name: str) -> str:
        """Return the function that would serve the calls of `name`, since its file comes first in the path; "" for none."""
        return next(filter(self.exists, itertools.accumulate(name.split("/")[:-1], "{}/{}".format)), "")

    def resolve(self, path: str) -> tuple[Optional[Function], str, bool]:
        """Find the function for ``hello/sub/path``, the rest of the path, and whether it is loaded as its file says now; where
        not, `refresh` it before its code is used. The first segment that is a file wins."""
        if monotonic() - self._looked >= 0.5:
            self._look_around()
        known = self._known.get(path)
        if known is not None and "/" not in path and known.stamp == file_stamp(known.path):  # as most calls
            return known, "", True
        name, rest = "", path
        for _ in range(GROUP_DEPTH):
            part, _, rest = rest.partition("/")
            if not part.isidentifier() or part[0] == "_":
                break
            name = f"{name}/{part}" if name else part
            function, is_fresh = self._find(name)
            if function is not None:
                return function, rest, is_fresh
        return None, "", False

    def get(self, name: str) -> Optional[Function]:
        """Return a function as its file says now, or None where there is no file. One stat where nothing changed."""
        function, is_fresh = self._find(name)
        return function if function is None or is_fresh else self.refresh(function)

    def _find(self, name: str) -> tuple[Optional[Function], bool]:
        function = self._known.get(name)
        path = function.path if function else os.path.join(self.root, *name.split("/")) + ".py"  # hooks too, unlike `path`
        stamp = file_stamp(path) if name not in self._reserved else None
        if stamp is None or function is None and not os.path.isfile(path):
            self._known.pop(name, None)
            return None, False
        function = function or self._known.setdefault(name, Function(name, path))
        return function, stamp == function.stamp

    def pretend(self, name: str, source: bytes) -> Code:
        """Load `source` as if it were the file of `name`, and serve it from now on in this process; LoadError."""
        function, find = Function(name, self.path(name)), self._find
        function.code = self._execute(function, source)
        setattr(self, "_find", lambda wanted: (function, True) if wanted == name else find(wanted))
        return function.code

    def hooks(self, name: str) -> list[types.ModuleType]:
        """Return the _hooks.py of functions/ and of each group that `name` is in, as fresh as functions are; LoadError where
        one never loaded. New ones are looked for twice a second."""
        if "/" not in name and self._hooked.get("") is False:
            return []
        found = []
        for group in ["", *(name[:at + 1] for at, sign in enumerate(name) if sign == "/")]:
            if group not in self._hooked:
                self._hooked[group] = os.access(os.path.join(self.root, group, HOOKS + ".py"), os.F_OK)
            function = self.get(group + HOOKS) if self._hooked[group] else None
            if function is not None:
                if function.code is None:
                    raise function.error or LoadError(f"{function.path}: it could not be loaded")
                found.append(function.code.module)
        return found

    def names(self) -> list[str]:
        """List every function there is a file for."""
        found = []
        for name in filter(self.exists, self._reserved - self._warned):
            log.warning("%s: this name is the platform's own, so the file is not served", self.path(name))
            self._warned.add(name)
        top = os.path.join(self.root, "")
        for directory, groups, files in os.walk(top, followlinks=True):
            group = directory[len(top):].replace(os.sep, "/") + "/"
            groups[:] = filter(valid_name, groups) if group.count("/") < GROUP_DEPTH else ()
            names = ((group + file[:-3]).lstrip("/") for file in files if file.endswith(".py"))
            found += [name for name in names if valid_name(name) and name not in self._reserved]
        return sorted(found)

    def describe(self, name: str) -> tuple[Description, float]:
        """Return what a function's file says of itself, and its time."""
        path = self.path(name)
        stamp = file_stamp(path)
        return self._describe(path, stamp), stamp[0] / 1e9 if stamp else 0.0

    def _read_description(self, path: str, stamp: Any) -> Description:
        said = Description()
        try:
            said = describe_source(read_source(path), path)
            with contextlib.suppress(ValueError, KeyError):
                said = said._replace(methods=self._casts["methods"](said.settings["methods"]))
            read_settings(said.settings, self._casts)
        except LoadError as error:
            return said._replace(error=error)
        return said

    def retries(self, name: str) -> int:
        """Return how often a function's failed calls are run again, as its file says; nothing of it is run."""
        found = self.describe(name)[0].settings.get("retries") if valid_name(name) else None
        return found if isinstance(found, int) else PLAIN.retries

    def schedules(self) -> dict[str, Any]:
        """Return SETTINGS["schedule"] of every function that has one; nothing is run, so it must be a literal."""
        paths = {name: self.path(name) for name in self.names()}
        found = {name: read_schedule(path, file_stamp(path)) for name, path in paths.items()}
        return {name: schedule for name, schedule in found.items() if schedule is not None}

    def save(self, name: str, source: bytes) -> None:
        """Write a function's file atomically: a reader sees the old file or the new one."""
        path = os.path.realpath(self.path(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        draft = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.urandom(4).hex()}")
        mode = stat.S_IMODE(os.stat(path).st_mode) if os.path.exists(path) else 0o644
        try:
            with open(draft, "wb") as file:
                file.write(source)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(draft, mode)
            os.replace(draft, path)
        finally:
            with contextlib.suppress(OSError):  # there is none where all went well
                os.unlink(draft)

    def refresh(self, function: Function) -> Function:
        """Bring a function up to date, and return it; its lock keeps two threads from loading the same version twice."""
        try:
            while not function.lock.acquire(timeout=.1):  # not for ever at once: who waits can be interrupted in between
                pass
            self._load(function)
            return function
        finally:
            with contextlib.suppress(RuntimeError):  # it was interrupted before it had the lock
                function.lock.release()

    def _load(self, function: Function) -> None:
        stamp, generation = file_stamp(function.path), self._generation
        if stamp is None or stamp == function.stamp:
            return
        try:
            source = read_source(function.path)
            retry = function.error and not isinstance(function.error, NoEntry) and monotonic() - function.tried > 1
            if source != function.source or retry:
                self._swap(function, source)
        except LoadError as error:
            self._fail(function, error)
        except BaseException:  # a deadline came while this was stored: nothing may be taken for done
            function.source = None
            raise
        # A second edit within the clock's tick would leave the same stamp, so a young file is read again
        young = abs(time_ns() - stamp[0]) < (2e9 if stamp[0] % 1_000_000_000 == 0 else 2e7)
        hung = function.code is not None and function.error and isinstance(function.error.__context__, DeadlineExceeded)
        function.stamp = () if young or function.error and not hung else stamp
        if generation != self._generation and function.uses_helpers:  # a helper changed while this was loading
            function.stamp, function.source = (), None

    def _swap(self, function: Function, source: bytes) -> None:
        function.source, function.tried = source, monotonic()
        code = self._execute(function, source)
        error = None if code.entries or function.is_hooks else NoEntry("it has no main()")
        if error and (function.code is not None and function.code.entries or self.versions.last_good(function.name)):
            raise error
        function.code, function.error = code, error
        if error is None:  # after it serves: this waits for a database that somebody has locked
            function.stored = bool(self.versions.remember(function.name, source, loaded=True))
        self.versions.mark_broken(function.name, None)  # a helper module without main() is not broken either

    def _fail(self, function: Function, error: LoadError) -> None:
        """Have the last good version serve, whichever process has loaded it."""
        if str(error) != str(function.error):
            log.error("%s: %s%s", function.path, error, "\n" + error.trace if error.trace else "")
            self.versions.mark_broken(function.name, error)
        function.error = error
        if function.code is not None and not function.stored:
            function.stored = bool(self.versions.remember(function.name, function.code.source, loaded=True))
        source = self.versions.last_good(function.name) if function.stored else None
        if source and (function.code is None or function.code.source != source):
            with contextlib.suppress(LoadError):
                function.code = self._execute(function, source)

    def _make_module(self, name: str, path: str) -> types.ModuleType:
        module, loader = types.ModuleType(name), _HelperLoader(name, path, self.builtins)
        module.__dict__.update(__file__=path, __package__=name.rpartition(".")[0], __loader__=loader,
                               __spec__=importlib.machinery.ModuleSpec(name, loader, origin=path), __builtins__=self.builtins)
        return module

    def _execute(self, function: Function, source: bytes) -> Code:
        """Run a file as a module; whatever it raises, SystemExit too, is a LoadError."""
        name = f"{PACKAGE}.{function.name.replace('/', '.')}"
        program = compile_source(source, function.path)
        module = self._make_module(name, function.path)
        before = sys.modules.get(name)
        sys.modules[name] = module
        try:
            exec(program, module.__dict__)
            settings = read_settings(getattr(module, "SETTINGS", {}), self._casts)
            code = Code(source, module, settings, find_entries(module, settings.entry), find_handlers(module))
            if settings.schedule is not None and describe_source(source, "").settings.get("schedule") != settings.schedule:
                raise LoadError("SETTINGS['schedule']: must be written as a literal, because the file is read for it, not run")
            if settings.schedule is not None and code.entries and "" not in code.entries:
                raise LoadError("SETTINGS['schedule']: SETTINGS['entry'] must name which of the functions is meant")
            if function.is_hooks and hasattr(module, "on_start"):
                module.on_start()
        except BaseException as error:  # a module may raise anything; none of it may end the server
            sys.modules.pop(name, None)
            sys.modules.update({name: before} if before else {})
            raise error if isinstance(error, LoadError) else describe_failure(error, function.path) from None
        parent = sys.modules.get(module.__package__ or "")
        if parent is not None:
            setattr(parent, name.rpartition(".")[2], module)
        return code

    def _import(self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        """Stand in for __import__ in function files: flask and such are fnserve; helpers are noted, to be watched."""
        top = name.partition(".")[0]
        given = name if fromlist else top
        if level == 0 and not self._api.keys().isdisjoint((top, given)) and not self._wants_more(name, fromlist or (), globals):
            if name not in self._api:
                raise ImportError(f"{name} is not part of fnserve; see the README for what of it is", name=name)
            return self._api[given]
        if level and globals is not None and not globals.get("__package__"):  # `import foo` made it a top-level module
            group = os.path.relpath(os.path.dirname(globals.get("__file__") or self.root), self.root).replace(os.sep, ".")
            package = PACKAGE if group == "." else f"{PACKAGE}.{group}"
            globals = {"__name__": globals.get("__name__"), "__package__": package}
        module = builtins.__import__(name, globals, locals, fromlist, level)
        user = self._known.get(str((globals or {}).get("__name__"))[len(PACKAGE) + 1:].replace(".", "/"))
        for found in (module, sys.modules.get(name), *(getattr(module, item, None) for item in fromlist or ())):
            path = found.__dict__.get("__file__") or "" if isinstance(found, types.ModuleType) else ""
            if self._is_helper(path):
                self._watched.setdefault(path, file_stamp(path))
                if user is not None:
                    user.uses_helpers = True
        return module

    def _wants_more(self, name: str, fromlist: Iterable[str], globals: Any) -> bool:
        """Tell whether a module beside functions/ asks for more of a package than fnserve has, and the package is there."""
        beside = not str((globals or {}).get("__file__")).startswith(self.root + os.sep)
        has = name in self._api and vars(self._api[name]).keys() >= set(fromlist)
        return beside and not has and importlib.machinery.PathFinder.find_spec(name.partition(".")[0]) is not None

    def _look_around(self) -> None:
        """Twice a second: look for new hooks, and where a helper has changed, forget all of them and load their users anew."""
        self._looked, self._hooked = monotonic(), {}
        with self._forgetting:
            self._forget_helpers({path for path, stamp in list(self._watched.items()) if file_stamp(path) != stamp})

    def _forget_helpers(self, changed: set[str]) -> None:
        if not changed:
            return
        self._watched, self._generation = {}, self._generation + 1
        stay = [function.code.module for function in self._known.copy().values()
                if function.code is not None and not function.uses_helpers and function.path not in changed]
        for name, module in list(sys.modules.items()):
            if isinstance(getattr(module, "__loader__", None), _HelperLoader) and module not in stay:
                parent, _, last = name.rpartition(".")
                sys.modules.pop(name, None)
                getattr(sys.modules.get(parent), "__dict__", {}).pop(last, None)
        for function in list(self._known.values()):
            if function.uses_helpers:
                function.stamp, function.source, function.uses_helpers = (), None, False


def read_source(path: str) -> bytes:
    """Read a function file; LoadError where it can't be read."""
    try:
        return read_bytes(path)
    except OSError as error:
        raise LoadError(f"it can't be read: {error.strerror}") from None


def encode_source(code: str) -> bytes:
    """Turn a file's text into what is saved, in UTF-8; HTTPException 400 where that isn't what it would be read as."""
    import tokenize  # only where source is saved
    with contextlib.suppress(UnicodeEncodeError, SyntaxError):  # half a character; an encoding that doesn't exist
        source = code.lstrip("\ufeff").encode()
        if source.isascii() or tokenize.detect_encoding(io.BytesIO(source).readline)[0].startswith("utf-8"):
            return source
    raise HTTPException(400, "files are saved as UTF-8: take out the line that names another encoding (or half a character)")


def decode_source(source: bytes) -> str:
    """Turn a file into text that can be saved again; HTTPException 400 where it is not UTF-8."""
    with contextlib.suppress(UnicodeDecodeError):
        return source.decode("utf-8-sig")
    raise HTTPException(400, "the file is not UTF-8")


def describe_failure(error: BaseException, path: str) -> LoadError:
    """Say what a module raised while it loaded, and at which of its own lines."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    text = f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace").decode()
    return LoadError(text, (lines[-1] if lines else 0) or 0, 0, user_traceback(error))


def user_traceback(error: BaseException) -> str:
    """Format a traceback without the platform's own frames."""
    shown = traceback.TracebackException(type(error), error, error.__traceback__)
    shown.stack = traceback.StackSummary.from_list([frame for frame in shown.stack if frame.filename != __file__])
    return "".join(shown.format())


def find_entries(module: types.ModuleType, name: str) -> dict[str, Entry]:
    """Find the entry points: SETTINGS["entry"], several that functions_framework marked, main, or the one marked."""
    marked = {name: value for name, value in vars(module).items() if isinstance(value, types.FunctionType)
              and getattr(value, "_fnserve_entry", ("",))[0] == module.__name__}
    marked = {name: value for name, value in marked.items()
              if name == value.__name__ or marked.get(value.__name__) is not value}  # main = hello is no second one
    if name:
        if not callable(getattr(module, name, None)):
            raise LoadError(f"SETTINGS['entry']: the file has no function {name!r}")
        return {"": make_entry(getattr(module, name))}
    if len(marked) > 1:
        return {name: make_entry(value) for name, value in marked.items()}
    main = [value for value in (getattr(module, "main", None), *marked.values()) if callable(value)]
    return {"": make_entry(main[0])} if main else {}


def find_handlers(module: types.ModuleType) -> list[tuple[Any, Callable[[Any], Any]]]:
    """Find what functions_framework.errorhandler marked."""
    return [(value.__dict__["_fnserve_handles"][1], value) for value in vars(module).values()
            if isinstance(value, types.FunctionType) and "_fnserve_handles" in value.__dict__]


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and len(value) > 0 and all(isinstance(x, str) for x in value)


def _list_of(check: Callable[[str], str], what: str) -> Callable[[Any], tuple[str, ...]]:
    cast = must(_is_list, what, lambda found: tuple(map(check, found)))
    return lambda value: cast(words(value) if isinstance(value, str) else value)


def _rate(value: Any) -> tuple[int, float]:
    found = re.fullmatch(r"([1-9]\d{0,8})\s*/\s*(s|sec|second|m|min|minute|h|hour|d|day)", str(value), re.A)
    if not found:
        raise ValueError("calls per time, such as 60/min: s, min, hour or day")
    return int(found[1]), {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}[found[2][0]]


_truth = must(lambda value: isinstance(value, bool), "True or False")
_ORIGINS = "* or origins such as https://example.com"
SETTINGS_CASTS: dict[str, Callable[[Any], Any]] = {
    "methods": _list_of(choice(*METHODS), "a list of HTTP methods"),
    "auth": choice("public", "login", "token", "internal"), "rate": _rate, "concurrency": whole(1, 256), "timeout": seconds,
    "cors": _list_of(must(re.compile(r"\*|[a-z][a-z0-9+.\-]*://[^/\s*]+", re.I).fullmatch, _ORIGINS), _ORIGINS),
    "max_body": size, "retries": whole(0, 100), "parameters": must(lambda value: isinstance(value, dict), "a dict"),
    "async": _truth, "guard": _truth,
    "dedupe": must(lambda value: isinstance(value, str) and _HEADER_NAME.fullmatch(value), "the name of a header"),
    "entry": must(lambda value: str(value).isidentifier(), "the name of a function"),
}


def read_settings(given: Any, casts: Mapping[str, Callable[[Any], Any]]) -> CallSettings:
    """Check a file's SETTINGS; LoadError names the key that can't be used."""
    if not isinstance(given, dict):
        raise LoadError("SETTINGS: must be a dict")
    found = {}
    for key, value in given.items():
        if key not in casts:
            raise LoadError(f"SETTINGS[{key!r}]: there is no such key; there are {', '.join(casts)}")
        try:
            found["async_" if key == "async" else key] = casts[key](value)
        except ValueError as error:
            raise LoadError(f"SETTINGS[{key!r}] = {value!r}: must be {error}") from None
    return CallSettings(**found) if found else PLAIN


PLAIN = CallSettings()


def make_entry(entry: Callable[..., Any]) -> Entry:
    """Look at an entry point: whether it takes the request, and which of config, protected and context."""
    if type(entry) is types.FunctionType:
        code = entry.__code__  # what inspect.signature would say, without the 500 kB of importing it
        names = code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]
        first, every = code.co_argcount > 0 or bool(code.co_flags & 4), bool(code.co_flags & 8)
        names = names[1 if code.co_argcount else 0:]
    if type(entry) is not types.FunctionType or every and hasattr(entry, "__wrapped__"):  # a wrapper hands on what it gets
        first, every, names = _inspect_callable(entry)
    wants = KEYWORDS if every else tuple(word for word in KEYWORDS if word in names)
    kind = getattr(entry, "_fnserve_entry", ("", "http"))[1]
    return Entry(entry, first, wants, kind, first and not wants and kind == "http")


def _inspect_callable(entry: Callable[..., Any]) -> tuple[bool, bool, tuple[str, ...]]:
    import inspect
    try:
        kinds = [(row.name, row.kind.name) for row in inspect.signature(entry).parameters.values()]
    except (TypeError, ValueError):  # a builtin without a signature
        return True, False, ()
    first = bool(kinds) and kinds[0][1] in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL")
    return first, any(kind == "VAR_KEYWORD" for _, kind in kinds), tuple(name for name, _ in kinds[1 if first else 0:])

# == 08 FUNCTION API ======================================================
# What a function file imports, under Flask's names. Uses 01 to 07. One context variable holds the call being served;
# the proxies read it. `flask`, `functions_framework` and the others are made by `make_api` for `Functions`.


class Run:
    """How a call came about that no client is waiting for: by the queue, the schedule or the command line."""

    def __init__(self, trigger: str, attempt: int = 1, entry: str = "", args: Any = (), kwargs: Any = None) -> None:
        self.trigger, self.attempt, self.entry, self.args, self.kwargs = trigger, attempt, entry, args, kwargs or {}
        self.call: Optional[Call] = None


_HTTP, _QUEUED = Run("http"), Run("queued")


class Call:
    """One call on its way through the pipeline: request, answer so far, and what it printed."""

    deadline = until = 0.0  #: Unix time; the same on the clock of `clock`
    function: Optional[str] = None  #: name of the function, once it is known
    route = "(unknown)"  #: label of what answered, where no function did
    code: Optional[Code] = None  #: the version of the function that serves
    settings = PLAIN  #: its SETTINGS
    queued = False  #: to be put into the queue, not run
    runs = False  #: past the gate: from here on the function's own error handlers are asked
    holds: Optional[list[None]] = None  #: the share of its function that it holds a place of
    interrupted = 0  #: how often its thread was told that it is late
    responding = recorded = False
    printed = 0  #: characters printed, those beyond OUTPUT_BYTES too
    error = ""  #: traceback, for the admin
    failed: Optional[BaseException] = None  #: what the function raised
    opened: Optional[Session] = None  #: the session, once asked for; not `lazy`: a look into __dict__ costs each call 7 %

    def __init__(self, app: Any, environ: dict[str, Any]) -> None:
        self.app, self.run = app, environ.get("fnserve.run", _HTTP)
        if self.run is not _HTTP:
            self.run.call = self
        self.request = Request(environ, app.settings.MAX_BODY)
        self.id, self.started, self.clock = app.new_id(), app.clock(), perf_counter()
        self.after: list[Callable[[Response], Any]] = []
        self.hooks: list[types.ModuleType] = []
        self.output: list[str] = []
        self.metrics: dict[tuple[str, str], list[Any]] = {}  #: what it counted: (name, labels) -> rest of Tally.metrics' row

    trigger = property(lambda self: self.run.trigger)  #: http, async, schedule or cli; queued: this one does not run
    attempt = property(lambda self: self.run.attempt)  #: which run of a queued call this is, from 1
    g = lazy(lambda self: Globals())
    flashes = lazy(lambda self: self.session.pop("_flashes", []))  #: taken out once, however often they are asked for

    @property
    def session(self) -> Session:
        """The session, read when it is first asked for; empty where anything is wrong with the cookie."""
        if self.opened is None:
            self.opened = Session(self.app.signer.unsign(self.request.cookies.get("session", ""), self.started))
        return self.opened

    def capture(self, text: str) -> None:
        """Keep what the call prints, the first OUTPUT_BYTES of it."""
        if self.printed < OUTPUT_BYTES:
            self.output.append(text[:OUTPUT_BYTES - self.printed])
        self.printed += len(text)


class Globals(types.SimpleNamespace):
    """Flask's `g`: attributes, `in`, get() and pop()."""

    get = property(lambda self: vars(self).get)
    pop = property(lambda self: vars(self).pop)
    setdefault = property(lambda self: vars(self).setdefault)

    def __contains__(self, name: str) -> bool:
        return name in self.__dict__

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__)


current_call: contextvars.ContextVar[Call] = contextvars.ContextVar("fnserve_call")


def serving() -> Call:
    """Return the call being served here; RuntimeError outside of one."""
    if (call := current_call.get(None)) is not None:
        return call
    raise RuntimeError("this works only while a function is called, in its thread or one that copied its context")


def _forward(operation: Callable[..., Any]) -> Any:
    return lambda self, *values: operation(self._find(), *values)


class Proxy:
    """Stands for an object of the current call, as Flask's `request` and `session` do."""

    __slots__ = ("_find", "_kind")

    def __init__(self, kind: type, find: Callable[[], Any]) -> None:
        object.__setattr__(self, "_find", find)
        object.__setattr__(self, "_kind", kind)

    _get_current_object = property(lambda self: self._find)  # werkzeug.local's

    def __getattr__(self, name: str) -> Any:
        return getattr(self._find(), name)

    __setattr__, __delattr__ = _forward(setattr), _forward(delattr)
    __getitem__, __setitem__, __delitem__ = _forward(operator.getitem), _forward(operator.setitem), _forward(operator.delitem)
    __contains__, __iter__, __len__ = _forward(operator.contains), _forward(iter), _forward(len)
    __eq__, __hash__, __or__ = _forward(operator.eq), _forward(hash), _forward(operator.or_)
    __class__ = property(lambda self: self._kind)  # what isinstance() asks; it must not look at the session

    def __bool__(self) -> bool:
        return _MISSING is not current_call.get(_MISSING) and bool(self._find())

    def __repr__(self) -> str:
        return repr(self._find()) if current_call.get(None) else f"<{self._kind.__name__} outside of a call>"


class CurrentApp:
    """`current_app`: .config holds the settings and .env's values, .logger logs for the call."""

    logger, name, debug, testing = logging.getLogger("functions"), "fnserve", False, False
    app_context = staticmethod(contextlib.nullcontext)  # there is always one

    @property
    def config(self) -> dict[str, Any]:
        """The settings, overlaid by .env."""
        app = serving().app
        return {**{row.name: getattr(app.settings, row.name) for row in SETTINGS_TABLE}, **app.config.current()}


request: Any = Proxy(Request, lambda: serving().request)
session: Any = Proxy(Session, lambda: serving().session)
g: Any = Proxy(Globals, lambda: serving().g)
current_app = CurrentApp()


def jsonify(*args: Any, **kwargs: Any) -> Response:
    """Return a JSON response of the one argument, of a list of several, or of a dict of keywords."""
    if args and kwargs:
        raise TypeError("jsonify() takes arguments or keywords, not both")
    value = args[0] if len(args) == 1 else list(args) if args else kwargs or None
    return Response(dump_json(value) + "\n", mimetype="application/json")


def abort(code: Any, description: Any = None, response: Optional[Response] = None, **more: Any) -> Any:
    """Answer with this status: `description` is the JSON's "error"; a Response is sent as it is. LookupError for no error."""
    if isinstance(code, Response):
        raise HTTPException(code.status_code, response=code)
    if code not in EXCEPTIONS:
        raise LookupError(f"there is no exception for {code!r}")
    raise EXCEPTIONS[code](description, response, **more)


def redirect(location: str, code: int = 302, Response: type[Response] = Response) -> Response:
    """Return a redirect to `location`."""
    shown = escape(location)
    return Response(f"<!doctype html>\n<title>Redirecting...</title>\n<a href=\"{shown}\">{shown}</a>\n", code, {
        "Location": iri_to_uri(location)}, "text/html")


def url_for(endpoint: str, *, _external: bool = False, _anchor: Optional[str] = None, _scheme: Optional[str] = None,
            _method: Any = None, func_name: str = "", subpath: str = "", **values: Any) -> str:
    """Return the URL of a function; `subpath` follows its name, other values become the query. `func_name` is the name
    whatever the endpoint is: ``url_for(request.endpoint, **request.view_args)`` is this page."""
    name, safe = func_name or endpoint, "!$'()*,/:;?@"
    path = "/function/" + quote(name) + ("/" + quote(subpath.lstrip("/"), safe="!$&'()*+,/:;=@") if subpath else "")
    query = urlencode({key: value for key, value in values.items() if value is not None}, doseq=True, safe=safe)
    path += ("?" + query if query else "") + ("#" + quote(_anchor, safe=safe + "%#&+=") if _anchor else "")
    if not (_external or _scheme):
        return path
    current = serving().request
    return f"{_scheme or current.scheme}://{current.host}{path}"


def after_this_request(function: Callable[[Response], Any]) -> Callable[[Response], Any]:
    """Have `function` change or replace the response of this call."""
    serving().after.append(function)
    return function


def stream_with_context(body: Any) -> Any:
    """Return the generator, or the generator function, as it is: a stream always runs inside its call here."""
    return body


def enqueue(name: str, json: Any = None, data: Any = None, query: Optional[Mapping[str, Any]] = None,
            headers: Optional[Mapping[str, str]] = None, delay: float = 0) -> str:
    """Have a function called in the background, at least once, `delay` seconds from now, by a POST of `json` or `data`;
    return the id of the call. Raises ValueError for a name that is no function."""
    return serving().app.enqueue(name, json, data, query, headers, delay)


_COUNTING = threading.Lock()  # a call's own threads may count together


class Metric:
    """A counter or histogram of a function's own, shown at /metrics: counted with its call's record, so exact over workers."""

    def __init__(self, name: str, help: str, kind: str, bounds: list[float], labels: Mapping[str, Any]) -> None:
        if not re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", name) or name.startswith(("fnserve_", "process_")):
            raise ValueError(f"{name!r} is no name for a metric of a function")
        self._name, self._help, self._kind, self._bounds, self._labels = name, str(help), kind, bounds, labels

    def labels(self, **labels: Any) -> Metric:
        """Return the series of these labels."""
        return Metric(self._name, self._help, self._kind, self._bounds, {**self._labels, **labels})

    def inc(self, amount: float = 1, **labels: Any) -> None:
        """Add to a counter; ValueError for less than nothing."""
        if amount < 0:
            raise ValueError("a counter only goes up")
        self.observe(amount, **labels)

    def observe(self, value: float, **labels: Any) -> None:
        """Count one value in a histogram."""
        if not abs(value) < float("inf"):
            raise ValueError(f"{value!r} can't be counted")
        named = sorted({**self._labels, **labels}.items())
        for label, _ in named:
            if not re.fullmatch(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*", label) or label == "le":
                raise ValueError(f"{label!r} is no name for a label")
        shown = json.dumps({key: sql_value(str(item)[:200]) for key, item in named}, ensure_ascii=False)
        with _COUNTING:
            row = serving().metrics.setdefault((self._name, shown), [
                self._kind, self._help, 0.0, self._bounds, [0] * (len(self._bounds) + 1)])
            row[2] += float(value)
            row[4][bisect_left(row[3], value)] += 1


def counter(name: str, help: str = "") -> Metric:
    """Return a counter by its name; _total is added where it is missing."""
    return Metric(name.removesuffix("_total"), help or name, "counter", [], {})


def histogram(name: str, help: str = "", buckets: Iterable[float] = BUCKETS) -> Metric:
    """Return a histogram by its name; `buckets` are the upper bounds, prometheus_client's default ones for seconds."""
    return Metric(name, help or name, "histogram", sorted(map(float, buckets)), {})


class Markup(str):
    """Text that is HTML already: `escape` leaves it alone and escapes what is put into it by +, %, format and join."""

    def __html__(self) -> str:
        return self

    @classmethod
    def escape(cls, value: Any) -> Markup:
        """Return text with the five characters of HTML escaped, as markupsafe does."""
        if hasattr(value, "__html__"):
            return cls(value.__html__())
        text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return cls(text.replace('"', "&#34;").replace("'", "&#39;"))

    def __add__(self, other: Any) -> Markup:
        return Markup(str.__add__(self, self.escape(other)))

    def __radd__(self, other: Any) -> Markup:
        return Markup(str.__add__(self.escape(other), self))

    def __mod__(self, values: Any) -> Markup:
        return Markup(str.__mod__(self, self._each(values)))

    def format(self, *values: Any, **named: Any) -> Markup:
        """Put values in, escaped."""
        return Markup(str.format(self, *self._each(values), **self._each(named)))

    def join(self, parts: Iterable[Any]) -> Markup:
        """Put this between the parts, which are escaped."""
        return Markup(str.join(self, map(self.escape, parts)))

    def _each(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._each, value))
        if isinstance(value, dict):
            return {key: self._each(item) for key, item in value.items()}
        return value if isinstance(value, (int, float)) else self.escape(value)


escape = Markup.escape


def send_file(path_or_file: Any, mimetype: Optional[str] = None, as_attachment: bool = False,
              download_name: Optional[str] = None, conditional: bool = True, etag: Any = True,
              last_modified: Any = None, max_age: Any = None) -> Response:
    """Return a file's contents, streamed; `download_name` may be in any script (RFC 6266). Ranges are answered."""
    import mimetypes  # only where files are sent
    file = path_or_file
    if isinstance(path_or_file, (str, os.PathLike)):
        file = open(path_or_file, "rb")
        found = os.fstat(file.fileno())
        download_name, last_modified = download_name or os.path.basename(path_or_file), last_modified or found.st_mtime
        etag = f"{found.st_mtime_ns:x}-{found.st_size:x}" if etag is True else etag
    if download_name is None and (mimetype is None or as_attachment):
        raise TypeError("send_file() needs a download_name, or a mimetype, for a file without a name")
    guessed = mimetypes.guess_type(download_name or "")[0] or "application/octet-stream"
    response, start = Response(FileBody(file), mimetype=mimetype or guessed), file.tell()
    response.content_length = length = file.seek(0, 2) - start
    file.seek(start)
    if as_attachment or download_name:
        response.headers["Content-Disposition"] = content_disposition(as_attachment, download_name or "")
    response.last_modified = last_modified
    age = max_age(path_or_file) if callable(max_age) else max_age
    response.headers["Cache-Control"] = ("public" if age else "no-cache") + ("" if age is None else f", max-age={int(age)}")
    if isinstance(etag, str):
        response.set_etag(etag)
    return response.make_conditional(serving().request, True, length) if conditional and has_request_context() else response


class FileBody:
    """Yields an open file, or a `part` of it, in chunks, and closes it."""

    def __init__(self, file: Any, left: float = float("inf")) -> None:
        self._file, self._left = file, left

    def part(self, start: int, stop: int) -> FileBody:
        """Return the bytes from `start` to `stop` of what is left."""
        self._file.seek(start, 1)
        return FileBody(self._file, stop - start)

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self._file.read(int(min(CHUNK, self._left))):
            self._left -= len(chunk)
            yield chunk

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def plain_ascii(text: str) -> str:
    """Return text without accents and whatever else ASCII lacks."""
    import unicodedata
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def content_disposition(attachment: bool, name: str) -> str:
    """Write a Content-Disposition; a name that isn't plain ASCII is given twice (RFC 6266 4.3)."""
    kind, plain = "attachment" if attachment else "inline", plain_ascii(name)
    both = "" if plain == name else "; filename*=UTF-8''" + quote(name, safe="!#$&+-.^_`|~")
    return f"{kind}; filename={plain if _HEADER_NAME.fullmatch(plain) else quote_text(plain)}{both}"


def send_from_directory(directory: Any, path: str, **options: Any) -> Response:
    """Return a file below `directory`; 404 for one that is missing or would lie outside of it."""
    root = os.path.realpath(directory)
    full = os.path.realpath(os.path.join(root, path)) if "\0" not in path else ""
    if full.startswith(root + os.sep) and os.path.isfile(full):
        return send_file(full, **options)
    raise HTTPException(404)


def secure_filename(name: str) -> str:
    """Return a name that is safe on a file system, as werkzeug.utils.secure_filename does."""
    parts = plain_ascii(name).replace("/", " ").replace("\\", " ").split()
    return re.sub(r"[^A-Za-z0-9_.-]", "", "_".join(parts)).strip("._")


def _jinja(app: Any) -> Any:
    try:
        import jinja2
    except ImportError:
        raise RuntimeError("render_template needs Jinja2: pip install jinja2") from None
    if app.templates is None:
        loader = jinja2.FileSystemLoader(os.path.join(app.settings.directory, "templates"))
        environment = jinja2.Environment(loader=loader, auto_reload=True, autoescape=jinja2.select_autoescape(
            ("html", "htm", "xml", "xhtml", "svg")))
        environment.globals.update(request=request, session=session, g=g, url_for=url_for, config=Proxy(
            dict, lambda: current_app.config), get_flashed_messages=get_flashed_messages)
        environment.policies["json.dumps_function"] = dumps
        app.templates = environment
    return app.templates


def render_template(template_name_or_list: Any, **values: Any) -> str:
    """Render templates/<name>, beside functions/, with Jinja2."""
    return _jinja(serving().app).get_or_select_template(template_name_or_list).render(**values)


def render_template_string(source: str, **values: Any) -> str:
    """Render a template given as text with Jinja2."""
    return _jinja(serving().app).from_string(source).render(**values)


def copy_current_request_context(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` bound to this call, to be run in a thread."""
    context = contextvars.copy_context()
    return lambda *args, **kwargs: context.copy().run(function, *args, **kwargs)


def has_request_context() -> bool:
    """Tell whether a call is being served here."""
    return current_call.get(None) is not None


def flash(message: str, category: str = "message") -> None:
    """Keep a message in the session for the next page."""
    session["_flashes"] = [*session.get("_flashes", []), [category, message]]


def get_flashed_messages(with_categories: bool = False, category_filter: Iterable[str] = ()) -> list[Any]:
    """Take the messages out of the session."""
    wanted = list(category_filter)
    found = [tuple(pair) for pair in serving().flashes if not wanted or pair[0] in wanted]
    return found if with_categories else [message for _, message in found]


class CloudEvent(dict):
    """A CloudEvent 1.0: `data`, and its attributes by ``event["type"]``, `get` and `get_attributes`."""

    def __init__(self, attributes: Mapping[str, Any], data: Any = None) -> None:
        super().__init__({"specversion": "1.0", **attributes})
        self.data = data
        if missing := [name for name in ("id", "source", "type") if not self.get(name)]:
            raise HTTPException(400, f"The CloudEvent lacks {', '.join(missing)}")

    get_attributes = dict.copy

    def get_data(self) -> Any:
        """Return the data."""
        return self.data


def read_event(request: Request) -> CloudEvent:
    """Read a CloudEvent from a request, in binary or structured mode (CloudEvents 1.0, HTTP binding 3); 400 for none."""
    if request.mimetype == "application/cloudevents+json":
        sent = request.get_json()
        if not isinstance(sent, dict):
            raise HTTPException(400, "The CloudEvent is not a JSON object")
        data = sent.pop("data", None)
        with contextlib.suppress(ValueError, TypeError):
            data = a2b_base64(sent.pop("data_base64", None))
        return CloudEvent(sent, data)
    named = {name[3:].lower(): decode_wsgi(value) for name, value in request.headers if name.startswith("Ce-")}
    if request.content_type:
        named["datacontenttype"] = request.content_type
    body = request.get_data()
    if body and (request.is_json or not request.content_type):
        with contextlib.suppress(ValueError, RecursionError):
            body = json.loads(body)
    return CloudEvent({name.replace("-", "_"): value for name, value in named.items()}, body or None)


def mark(name: str, value: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a decorator that leaves a mark on a function: functions_framework's http, cloud_event and errorhandler."""
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        setattr(function, name, (function.__module__, value))
        return function
    return decorate


PUBLIC = """request session g current_app jsonify abort redirect url_for Response Request make_response send_file
send_from_directory stream_with_context after_this_request render_template render_template_string escape Markup flash
get_flashed_messages copy_current_request_context has_request_context enqueue counter histogram Client CloudEvent""".split()


def _missing_name(module: str, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(f"{name} of {module} is not part of fnserve, where a function is no application; see the README")


def make_api() -> dict[str, types.ModuleType]:
    """Make the modules that imports in function files mean; those of others only where they are missing."""
    here, made = sys.modules[__name__], {}

    def module(name: str, **values: Any) -> types.ModuleType:
        made[name] = types.ModuleType(name, f"What {name} means inside function files.")
        made[name].__dict__.update(values, __getattr__=functools.partial(_missing_name, name))
        return made[name]
    public = {name: getattr(here, name) for name in PUBLIC}
    module("flask", **public, has_app_context=has_request_context, typing=module("flask.typing", ResponseReturnValue=Any),
           json=module("flask.json", **{**vars(json), "dumps": dumps, "jsonify": jsonify}))
    made.update(dict.fromkeys(("flask.globals", "flask.helpers", "flask.wrappers"), made["flask"]))
    module("functions_framework", http=mark("_fnserve_entry", "http"), cloud_event=mark("_fnserve_entry", "cloud_event"),
           errorhandler=functools.partial(mark, "_fnserve_handles"))
    made["fnserve"] = here
    errors = {kind.__name__: kind for kind in EXCEPTIONS.values()}
    module("werkzeug.exceptions", HTTPException=HTTPException, BadRequestKeyError=BadRequestKeyError, abort=abort,
           default_exceptions=EXCEPTIONS, **errors)
    if importlib.machinery.PathFinder.find_spec("werkzeug") is None:
        module("werkzeug", utils=module("werkzeug.utils", secure_filename=secure_filename),
               exceptions=made["werkzeug.exceptions"])
    if importlib.machinery.PathFinder.find_spec("markupsafe") is None:
        module("markupsafe", escape=escape, Markup=Markup)
    if importlib.machinery.PathFinder.find_spec("cloudevents") is None:
        module("cloudevents", http=module("cloudevents.http", CloudEvent=CloudEvent))
    return made


def make_environ(method: str, path: bytes, query: str, body: bytes, fields: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Make the environ of a request that doesn't come from a server (PEP 3333)."""
    return {"REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": path.decode("latin-1"), "QUERY_STRING": query,
            "SERVER_NAME": "localhost", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1", "REMOTE_ADDR": "127.0.0.1",
            "HTTP_HOST": "localhost", "CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body),
            "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.errors": sys.stderr, "wsgi.multithread": True,
            "wsgi.multiprocess": True, "wsgi.run_once": False, **{environ_key(name): value for name, value in fields}}


class Client:
    """Calls a WSGI app without a server, keeping cookies: ``Client(app).post("/function/hello?a=b", json={})``."""

    def __init__(self, app: Any, headers: Optional[Mapping[str, str]] = None, address: str = "127.0.0.1") -> None:
        self.app, self.headers, self.address = app, dict(headers or {}), address
        self.cookies: dict[str, str] = {}

    def open(self, path: str, method: str = "GET", *, query: Optional[Mapping[str, Any]] = None, data: Any = None,
             json: Any = None, headers: Optional[Mapping[str, str]] = None,
             query_string: Optional[Mapping[str, Any]] = None) -> Response:
        """Make one call and read its answer to the end; `query_string` is Flask's name for `query`."""
        fields = {**self.headers, **(headers or {})}
        if json is not None:
            data, fields = dump_json(json), {"Content-Type": "application/json", **fields}
        elif isinstance(data, dict):
            data, fields = urlencode(data), {"Content-Type": "application/x-www-form-urlencoded", **fields}
        if self.cookies:
            fields = {"Cookie": "; ".join(f"{key}={value}" for key, value in self.cookies.items()), **fields}
        path, _, text = path.partition("?")
        text = "&".join(filter(None, (text, urlencode(query or query_string or {}, doseq=True))))
        body = data.encode() if isinstance(data, str) else data or b""
        environ = make_environ(method.upper(), unquote_to_bytes(path), text, body, fields.items())
        return self.run({**environ, "REMOTE_ADDR": self.address})

    def run(self, environ: dict[str, Any], most: float = float("inf")) -> Response:
        """Make the call that an environ describes; `most` cuts the answer off after so many bytes."""
        started: list[Any] = []
        parts = self.app(environ, lambda status, headers, exc_info=None: started.append((status, headers)))
        body = bytearray()
        try:
            for part in parts:
                body += part
                if len(body) > most:
                    break
        finally:
            if hasattr(parts, "close"):
                parts.close()
        response = Response(body, started[-1][0])
        response.headers = Headers(started[-1][1])
        for cookie in response.headers.getlist("Set-Cookie"):
            key, _, value = cookie.partition(";")[0].partition("=")
            if "Max-Age=0" in cookie:
                self.cookies.pop(key, None)
            else:
                self.cookies[key] = value
        return response

    get = functools.partialmethod(open, method="GET")
    head = functools.partialmethod(open, method="HEAD")
    post = functools.partialmethod(open, method="POST")
    put = functools.partialmethod(open, method="PUT")
    patch = functools.partialmethod(open, method="PATCH")
    delete = functools.partialmethod(open, method="DELETE")

# == 09 SIGNATURES ========================================================
# Who sent this webhook: the providers' schemes in one table, checked on the raw body before the function sees it. Uses
# 03 and 04; pure. The reason of a refusal is for the admin, never for the sender.


class BadSignature(Exception):
    """A webhook whose signature is missing, wrong or stale; the text says which."""


def make_mac(key: bytes, signed: bytes, algorithm: str = "sha256", encoding: str = "hex") -> str:
    """Return an HMAC as hex or base64."""
    import hmac
    digest = hmac.new(key, signed, algorithm).digest()
    return digest.hex() if encoding == "hex" else b2a_base64(digest, newline=False).decode()


def header_of(request: Request, name: str) -> str:
    """Return a header that must be there."""
    if not request.headers.get(name, "").strip():
        raise BadSignature(f"no {name} header")
    return request.headers[name].strip()


def fresh(moment: str, now: float) -> bytes:
    """Return a signature's time, which must be a number within five minutes of now."""
    age = now - int(moment) if re.fullmatch(r"\d{1,12}", moment, re.A) else None
    if age is None or abs(age) > 300:
        raise BadSignature("the time is no number" if age is None else f"{age:.0f} s old")
    return moment.encode()


Parts = tuple[list[str], list[bytes]]  #: the signatures that a header gives, and the texts of which one must be signed


def _stripe(request: Request, given: str, now: float) -> Parts:
    pairs = [part.strip().partition("=")[::2] for part in given.split(",")]
    signed = fresh(dict(pairs).get("t", ""), now) + b"." + request.get_data()
    return [value for key, value in pairs if key == "v1"], [signed]


def _twilio(request: Request, given: str, now: float) -> Parts:
    """Twilio signs the public URL, with or without its port, and the form's fields; or the URL with the body's hash."""
    environ, body, fields = request.environ, request.get_data(), ""
    path = environ.get("REQUEST_URI", "").partition("?")[0] or quote(environ.get("SCRIPT_NAME", "") + environ["PATH_INFO"])
    query = environ.get("QUERY_STRING", "")
    if "bodySHA256" in request.args:
        import hashlib
        if not same_secret(request.args["bodySHA256"], hashlib.sha256(body).hexdigest()):
            raise BadSignature("the body's hash does not match")
    elif request.mimetype.endswith("form-urlencoded"):
        fields = "".join(name + value for name, value in sorted(set(parse_query(body.decode("latin-1")))))
    host, _, port = environ.get("HTTP_HOST", "").partition(":")
    return [given], [f"{request.scheme}://{name}{path}{'?' + query if query else ''}{fields}".encode()
                     for name in (host, f"{host}:{port or (443 if request.is_secure else 80)}")]


_P = 2 ** 255 - 19  # ed25519, RFC 8032 5.1: points are (X, Y, Z, T) with x = X/Z, y = Y/Z, x * y = T/Z
_L = 2 ** 252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, _P - 2, _P) % _P
_Point = tuple[int, int, int, int]


def _add_points(one: _Point, other: _Point) -> _Point:
    a, b = (one[1] - one[0]) * (other[1] - other[0]) % _P, (one[1] + one[0]) * (other[1] + other[0]) % _P
    c, d = 2 * one[3] * other[3] * _D % _P, 2 * one[2] * other[2] % _P
    e, f, g, h = b - a, d - c, d + c, b + a
    return (e * f, g * h, f * g, e * h)


def _multiply_point(factor: int, point: _Point) -> _Point:
    result = (0, 1, 1, 0)
    while factor:
        if factor & 1:
            result = _add_points(result, point)
        point, factor = _add_points(point, point), factor >> 1
    return result


def _read_point(data: bytes) -> _Point:
    y, odd = int.from_bytes(data, "little") & (1 << 255) - 1, data[31] >> 7
    square = (y * y - 1) * pow(_D * y * y + 1, _P - 2, _P) % _P
    x = pow(square, (_P + 3) // 8, _P)
    if (x * x - square) % _P:
        x = x * pow(2, (_P - 1) // 4, _P) % _P
    if y >= _P or (x * x - square) % _P or x == 0 and odd:
        raise ValueError("no point of the curve")
    x = _P - x if x & 1 != odd else x
    return (x, y, 1, x * y % _P)


def verify_ed25519(public: bytes, message: bytes, signature: bytes) -> bool:
    """Tell whether an Ed25519 signature is right (RFC 8032 5.1.7), ValueError for no point; public data, so time may tell."""
    import hashlib
    s = int.from_bytes(signature[32:], "little")
    if len(public) != 32 or len(signature) != 64 or s >= _L:
        return False
    key, r, base = map(_read_point, (public, signature[:32], b"\x58" + b"\x66" * 31))
    if not _multiply_point(8, key)[0] % _P:  # a key of small order, such as zeros, under which anybody can sign
        return False
    k = int.from_bytes(hashlib.sha512(signature[:32] + public + message).digest(), "little") % _L
    one, other = _multiply_point(s, base), _add_points(r, _multiply_point(k, key))
    return (one[0] * other[2] - other[0] * one[2]) % _P == 0 and (one[1] * other[2] - other[1] * one[2]) % _P == 0


class Scheme(NamedTuple):
    """A header with signatures; `secret` names the key in .env. SETTINGS["verify"] may be a dict of the first five."""
    header: str
    secret: str
    algorithm: str = "sha256"  #: of the HMAC; ed25519; "" for a header that is the key itself
    encoding: str = "hex"
    prefix: str = ""
    before: str = ""  #: what is signed before the body: text and, in braces, other headers
    stamp: str = ""  #: the header with the time
    parts: Optional[Callable[[Request, str, float], Parts]] = None  #: of a header that needs code
    key: Callable[[str], bytes] = str.encode


def _parts(scheme: Scheme, request: Request, now: float) -> Parts:
    given = header_of(request, scheme.header)
    if scheme.parts is not None:
        return scheme.parts(request, given, now)
    if scheme.stamp:
        fresh(header_of(request, scheme.stamp), now)
    before = re.sub(r"\{(.+?)\}", lambda name: header_of(request, name[1]), scheme.before)
    return given.split() if before else [given], [before.encode("latin-1", "replace") + request.get_data()]


SCHEMES = {
    "line": Scheme("X-Line-Signature", "LINE_CHANNEL_SECRET", encoding="base64"),
    "github": Scheme("X-Hub-Signature-256", "GITHUB_WEBHOOK_SECRET", prefix="sha256="),
    "stripe": Scheme("Stripe-Signature", "STRIPE_WEBHOOK_SECRET", parts=_stripe),
    "slack": Scheme("X-Slack-Signature", "SLACK_SIGNING_SECRET", prefix="v0=", before="v0:{X-Slack-Request-Timestamp}:",
                    stamp="X-Slack-Request-Timestamp"),
    "standard": Scheme("webhook-signature", "STANDARD_WEBHOOK_SECRET", encoding="base64", prefix="v1,",
                       before="{webhook-id}.{webhook-timestamp}.", stamp="webhook-timestamp",
                       key=lambda text: a2b_base64(text.removeprefix("whsec_"))),
    "shopify": Scheme("X-Shopify-Hmac-Sha256", "SHOPIFY_WEBHOOK_SECRET", encoding="base64"),
    "gitlab": Scheme("X-Gitlab-Token", "GITLAB_WEBHOOK_TOKEN", ""),
    "telegram": Scheme("X-Telegram-Bot-Api-Secret-Token", "TELEGRAM_SECRET_TOKEN", ""),
    "twilio": Scheme("X-Twilio-Signature", "TWILIO_AUTH_TOKEN", "sha1", "base64", parts=_twilio),
    "discord": Scheme("X-Signature-Ed25519", "DISCORD_PUBLIC_KEY", "ed25519", before="{X-Signature-Timestamp}",
                      key=bytes.fromhex)}


def read_scheme(value: Any) -> Scheme:
    """Check SETTINGS["verify"]: a name of the table, or a dict that describes an HMAC of the body."""
    if isinstance(value, str) and value in SCHEMES:
        return SCHEMES[value]
    if isinstance(value, dict) and {"header", "secret"} <= value.keys() <= set(Scheme._fields[:5]) \
            and all(isinstance(item, str) for item in value.values()):
        scheme = Scheme(**value)
        if scheme.secret.isidentifier() and scheme.algorithm in ("sha1", "sha256", "sha384", "sha512") \
                and scheme.encoding in ("hex", "base64"):
            return scheme
    raise ValueError(f"one of {', '.join(SCHEMES)}, or a dict of header, secret (the name of the key in .env), "
                     "algorithm (sha1, sha256, sha384, sha512), encoding (hex, base64), prefix")


def verify(scheme: Scheme, request: Request, config: Mapping[str, Optional[str]], now: float) -> None:
    """Check a webhook's signature under each of the keys that .env holds, separated by commas; BadSignature says why not."""
    keys = [key.strip() for key in (config.get(scheme.secret) or "").split(",") if key.strip()]
    if not keys:
        raise BadSignature(f"{scheme.secret} is not set in .env")
    sent, signed = _parts(scheme, request, now)
    given = [one[len(scheme.prefix):] for one in sent if one.startswith(scheme.prefix)]
    if sent and not given:
        raise BadSignature(f"bad encoding: it does not start with {scheme.prefix}")
    why = "it does not match"
    for key in keys:  # one by one, so that one of them being nonsense spoils no other
        try:
            if _is_right(scheme, scheme.key(key), signed, given):
                return
        except ValueError as error:  # binascii.Error is one
            why = f"bad encoding: {error}"
    raise BadSignature(why)


def _is_right(scheme: Scheme, key: bytes, signed: list[bytes], given: list[str]) -> bool:
    if scheme.algorithm == "ed25519":
        return verify_ed25519(key, signed[0], bytes.fromhex(given[0]))
    wanted = [make_mac(key, text, scheme.algorithm, scheme.encoding) if scheme.algorithm else key.decode() for text in signed]
    return sum(same_secret(one, other) for other in wanted for one in given) > 0  # every one with every one, in constant time


def answer_challenge(scheme: Scheme, request: Request) -> Any:
    """Return the answer to Slack's and Discord's question whether this URL is ours; None for a real webhook."""
    asks = {SCHEMES["slack"]: "url_verification", SCHEMES["discord"]: 1}.get(scheme)
    sent = request.get_json(silent=True) if asks and request.is_json else None
    if not isinstance(sent, dict) or sent.get("type") != asks:
        return None
    return {"type": 1} if asks == 1 else {"challenge": sent.get("challenge")}

# == 10 TRIGGERS ==========================================================
# From text to the next time: cron, interval, date, with APScheduler's fields. Pure. Times are Unix seconds; a
# local time is turned into one by zoneinfo, imported where it is used.
#
# Daylight saving: a local time that comes twice fires twice; one that is left out fires as much later as the clock is put
# forward (2:30 at 3:30). Both as APScheduler does.

CRON_FIELDS: dict[str, tuple[int, int, str]] = {  # name: (least, most, names of the values from the least on)
    "year": (1970, 9999, ""), "month": (1, 12, "jan feb mar apr may jun jul aug sep oct nov dec"), "day": (1, 31, ""),
    "week": (1, 53, ""), "day_of_week": (0, 6, "mon tue wed thu fri sat sun"), "hour": (0, 23, ""), "minute": (0, 59, ""),
    "second": (0, 59, "")}
CRON_DEFAULTS = dict(zip(CRON_FIELDS, ("*", "1", "1", "*", "*", "0", "0", "0")))
INTERVAL_FIELDS = {"weeks": 604_800, "days": 86_400, "hours": 3600, "minutes": 60, "seconds": 1}
COMMON_FIELDS = ("start_date", "end_date", "jitter", "timezone")
JOB_OPTIONS = ("misfire_grace_time", "max_instances", "coalesce")  # of a job, that may stand beside the fields
TRIGGER_FIELDS = {"cron": (*CRON_FIELDS, *COMMON_FIELDS), "interval": (*INTERVAL_FIELDS, *COMMON_FIELDS),
                  "date": ("run_date", "timezone")}
CRONTAB_WEEKDAYS = (0, 7, "sun mon tue wed thu fri sat")
NICKNAMES = {"@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *", "@weekly": "0 0 * * 0",
             "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@hourly": "0 * * * *"}
ORDINALS = ("1st", "2nd", "3rd", "4th", "5th", "last")
LAST_MOMENT = 253_000_000_000.0  # in the year 9987: what zoneinfo and datetime can still turn into a local time
MOST_RUNS = 1000  # that are counted one by one of a job that was not looked at for long
YEARS_AHEAD = 41  # every combination of date and weekday that exists comes within 40 years; 31 February never does


class TriggerError(ValueError):
    """A trigger or a job that can't be: `field` is the one to mend."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


def _number(field: str, text: str, allowed: tuple[int, int, str]) -> int:
    least, most, names = allowed
    known = {name: number for number, name in enumerate(names.split(), least)}
    value = known.get(text, int(text) if re.fullmatch(r"\d{1,4}", text, re.A) else -1)
    if not least <= value <= most:
        raise TriggerError(field, f"{text!r} is not from {least} to {most}" + (f" or one of {names}" if names else ""))
    return value


def _values(field: str, text: str, allowed: tuple[int, int, str]) -> set[int]:
    """Read one field but for its commas: ``*``, ``*/a``, ``a``, ``a-b``, ``a-b/c``, ``a/c``."""
    span, slash, step = text.partition("/")
    first, dash, last = span.partition("-")
    least, most, _ = allowed
    if slash and not re.fullmatch(r"(?!0+$)\d{1,4}", step, re.A):
        raise TriggerError(field, f"the step of {text!r} is no number above 0")
    if span != "*":
        least = _number(field, first, allowed)
        most = _number(field, last, allowed) if dash else most if slash else least
    if least > most:
        raise TriggerError(field, f"{text!r} ends before it begins")
    return set(range(least, most + 1, int(step or 1)))


def _day(text: str) -> Callable[[int, int, int], bool]:
    """Read ``last``, ``last fri``, ``2nd mon``: a test of day, weekday and the length of the month."""
    if text == "last":
        return lambda day, weekday, length: day == length
    ordinal, _, name = text.partition(" ")
    if ordinal not in ORDINALS:
        raise TriggerError("day", f"{text!r} is no day")
    wanted, number = _number("day_of_week", name.strip(), CRON_FIELDS["day_of_week"]), ORDINALS.index(ordinal)
    if ordinal == "last":
        return lambda day, weekday, length: weekday == wanted and day > length - 7
    return lambda day, weekday, length: weekday == wanted and (day - 1) // 7 == number


class Cron:
    """When a cron trigger's local time matches. `either`: day of month or day of week, as crontab(5) has it."""

    def __init__(self, fields: Mapping[str, Any], either: bool = False) -> None:
        given = [name for name in CRON_FIELDS if fields.get(name) is not None]
        least = list(CRON_FIELDS).index(given[-1]) if given else len(CRON_FIELDS)  # with no field it is every second
        self._sets: dict[str, set[int]] = {name: set() for name in CRON_FIELDS}
        self._days: list[Callable[[int, int, int], bool]] = []
        self._either = either
        for index, name in enumerate(CRON_FIELDS):
            text = str(fields[name]) if name in given else "*" if index < least else CRON_DEFAULTS[name]
            for part in (part.strip().lower() for part in text.split(",")):
                if name == "day" and re.match("[a-z]|[0-9](st|nd|rd|th)", part):
                    self._days.append(_day(part))
                else:
                    self._sets[name] |= _values(name, part, CRON_FIELDS[name])
        self._times = [sorted(self._sets[name]) for name in ("hour", "minute", "second")]

    def walls(self, start: datetime.datetime) -> Iterator[datetime.datetime]:
        """Yield the local times (naive datetimes) that match, from `start` on."""
        hours, minutes, seconds = self._times
        years = sorted(year for year in self._sets["year"] if year >= start.year)[:YEARS_AHEAD]
        for day in self._days_of(years, start):
            least = (start.hour, start.minute) if day.date() == start.date() else (0, 0)
            for hour, minute in itertools.product(hours, minutes) if self._is_day(day) else ():
                if (hour, minute) >= least:
                    times = (day.replace(hour=hour, minute=minute, second=second) for second in seconds)
                    yield from (found for found in times if found >= start)

    def _days_of(self, years: list[int], start: datetime.datetime) -> Iterator[datetime.datetime]:
        for month in itertools.product(years, sorted(self._sets["month"])):
            if month >= (start.year, start.month):
                first = start.day if month == (start.year, start.month) else 1
                for day in range(first, calendar.monthrange(*month)[1] + 1):
                    yield datetime.datetime(*month, day)

    def _is_day(self, day: datetime.datetime) -> bool:
        weekday, length = day.weekday(), calendar.monthrange(day.year, day.month)[1]
        by_day = day.day in self._sets["day"] or any(test(day.day, weekday, length) for test in self._days)
        by_weekday = weekday in self._sets["day_of_week"]
        in_week = len(self._sets["week"]) == 53 or day.isocalendar()[1] in self._sets["week"]
        return in_week and (by_day or by_weekday if self._either else by_day and by_weekday)


class Trigger:
    """When something fires. `fields` are APScheduler's; `kind` is cron, interval or date; `zone` is the default of the field
    timezone, `now` where an interval without start_date begins. Raises TriggerError."""

    def __init__(self, kind: str, fields: Mapping[str, Any], zone: str, now: float, either: bool = False) -> None:
        if kind not in TRIGGER_FIELDS:
            raise TriggerError("trigger", f"{kind!r} is not one of {', '.join(TRIGGER_FIELDS)}")
        for name in fields:
            if name not in TRIGGER_FIELDS[kind]:
                raise TriggerError(name, f"no field of the {kind} trigger; there are {', '.join(TRIGGER_FIELDS[kind])}")
        self.kind, self.fields = kind, dict(fields)
        self.zone = read_zone(str(fields.get("timezone") or zone))
        self._start = self._moment("start_date", float("-inf"))
        self._end = self._moment("end_date", float("inf"))
        self._jitter = self._positive("jitter")
        if kind == "cron":
            self._cron = Cron(fields, either)
        elif kind == "interval":
            self._every = sum(self._positive(name) * unit for name, unit in INTERVAL_FIELDS.items()) or 1
            if self._every < 1:
                raise TriggerError("seconds", "the interval is less than a second")
        else:
            self._start = self._moment("run_date", now)
        self._anchor = self._start if self._start > float("-inf") else now  # without a start the clock may be put back

    def next(self, after: float) -> Optional[float]:
        """Return the first time after `after`, None where there is none."""
        found = self._start if after < self._start else float("inf")
        if self.kind == "cron":
            found = self._next_cron(max(after, self._start - .001))
        elif self.kind == "interval" and after >= self._start:
            found = self._anchor + ((after - self._anchor) // self._every + 1) * self._every
        if found > min(self._end, LAST_MOMENT):
            return None
        if self._jitter:  # only ever later, or it would fire twice; only the process that moves the job on draws
            found += int.from_bytes(os.urandom(4), "big") / 2 ** 32 * self._jitter
        return found

    def times(self, first: Optional[float], end: float) -> list[float]:
        """Return when this fires from `first` to `end`: MOST_RUNS times at most."""
        found: list[float] = []
        while first is not None and first <= end and len(found) < MOST_RUNS:
            found.append(first)
            first = self.next(first)
        return found

    def count(self, first: float, end: float) -> int:
        """Return how often this fires from `first` on and before `end`: exactly for an interval, else MOST_RUNS at most."""
        return int(-((first - end) // self._every)) if self.kind == "interval" else len(self.times(first, end - .001))

    def iso(self, moment: Optional[float]) -> Optional[str]:
        """Write a Unix time as ISO 8601 in the trigger's zone; None for None."""
        with contextlib.suppress(ValueError, OverflowError, OSError):  # a time that no calendar has
            return datetime.datetime.fromtimestamp(moment, self.zone).isoformat() if moment is not None else None
        return None

    def _next_cron(self, after: float) -> float:
        """Near a change of the clock local times are not in the order of real ones, but off by the change at most. One that
        comes twice has two moments, by `fold` (PEP 495); of one that is left out the first is the later."""
        start = datetime.datetime.fromtimestamp(after, self.zone).replace(microsecond=0, tzinfo=None)
        offsets: list[Any] = [datetime.datetime.fromtimestamp(min(after + seconds, LAST_MOMENT), self.zone).utcoffset()
                              for seconds in (-10_800, 10_800)]
        best = float("inf")
        for wall in self._cron.walls(start - abs(offsets[0] - offsets[1])):
            first, second = (wall.replace(tzinfo=self.zone, fold=fold).timestamp() for fold in (0, 1))
            best = min([best] + [moment for moment in (first, max(first, second)) if moment > after])
            if min(first, second) >= best:
                break
        return best

    def _moment(self, name: str, default: float) -> float:
        value = self.fields.get(name)
        return default if value is None else read_moment(name, value, self.zone)

    def _positive(self, name: str) -> float:
        value = self.fields.get(name, 0)
        if isinstance(value, bool) or not re.fullmatch(r"\d{1,9}(\.\d+)?", str(value)):
            raise TriggerError(name, f"{value!r} is no number of {name if name != 'jitter' else 'seconds'}")
        return float(value)


def read_zone(name: str) -> Any:
    """Return a time zone, "" is the machine's; TriggerError for a name that isn't one, or that it has no data of."""
    import zoneinfo
    try:
        return zoneinfo.ZoneInfo(name or os.path.realpath("/etc/localtime").partition("zoneinfo/")[2] or "UTC")
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
        raise TriggerError("timezone", f"{name!r} is no time zone that this machine knows") from None


def read_moment(field: str, value: Any, zone: Any) -> float:
    """Read an ISO date, with or without time and offset, or a Unix time."""
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found = datetime.datetime.fromtimestamp(value, zone)
        else:
            found = read_iso(str(value).strip())
        moment = (found if found.tzinfo else found.replace(tzinfo=zone)).timestamp()
        if abs(moment) > LAST_MOMENT:
            raise OverflowError
        return moment
    except (ValueError, OverflowError, OSError):
        raise TriggerError(field, f"{value!r} is no date such as 2026-05-01 08:00:00") from None


_ISO = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})(?:[ T](\d{1,2}):(\d{1,2})(?::(\d{1,2})(?:\.(\d{1,6}))?)?)?"
                  r"\s*(Z|[+-]\d\d:?\d\d)?", re.A)


def read_iso(text: str) -> datetime.datetime:
    """Read an ISO 8601 date and time as APScheduler does, and in whatever other form this Python knows; ValueError."""
    found = _ISO.fullmatch(text)
    if not found:
        return datetime.datetime.fromisoformat(text)
    year, month, day, hour, minute, second = (int(number or 0) for number in found.groups()[:6])
    made = datetime.datetime(year, month, day, hour, minute, second, int((found[7] or "0").ljust(6, "0")))
    return made.replace(tzinfo=datetime.datetime.strptime(found[8].replace("Z", "+0000"), "%z").tzinfo) if found[8] else made


def parse_schedule(value: Any, zone: str, now: float) -> Trigger:
    """Read SETTINGS["schedule"]: a crontab(5) line of five fields, @hourly and such, ``every 30s``, or a dict of fields."""
    if isinstance(value, dict):
        fields = {name: item for name, item in value.items() if name not in JOB_OPTIONS}
        if not fields:
            raise TriggerError("schedule", "names no field of a trigger")
        kind = fields.pop("trigger", None) or ("date" if "run_date" in fields else
                                               "interval" if INTERVAL_FIELDS.keys() & fields.keys() else "cron")
        return Trigger(str(kind), fields, zone, now)
    text = " ".join(str(value).lower().split())
    every = re.fullmatch(r"every (\d{1,9}) ?(s|m|h|d|w|secs?|mins?|seconds?|minutes?|hours?|days?|weeks?)", text, re.A)
    if every and int(every[1]):
        return Trigger("interval", {name: int(every[1]) for name in INTERVAL_FIELDS if name[0] == every[2][0]}, zone, now)
    parts = NICKNAMES.get(text, text).split()
    if len(parts) != 5:
        raise TriggerError("schedule", f"{value!r} is neither five crontab fields, nor @hourly and such, nor 'every 30s'")
    names = ("minute", "hour", "day", "month", "day_of_week")
    fields = dict(zip(names, parts))
    if re.search("[a-z]", fields["day"]):
        raise TriggerError("day", f"{fields['day']!r} is no day of a month")
    days = re.sub(r"-(sun|0)\b", "-7", re.sub(r"(^|,)(\w+)/", r"\1\2-6/", parts[4]))  # 1/2 ends with Saturday
    weekdays = (_values("day_of_week", part, CRONTAB_WEEKDAYS) for part in days.split(","))
    fields["day_of_week"] = ",".join(str((day + 6) % 7) for day in set().union(*weekdays))  # APScheduler's, 0 is Monday
    return Trigger("cron", fields, zone, now, not parts[2].startswith("*") and not parts[4].startswith("*"))

# == 11 QUEUE =============================================================
# Calls that must not be lost: a request is on disk before its sender hears 202, and is run at least once. Uses 01 and 05 to
# 07. The table fn_queue is the state, shared by all processes; `Queue` owns a process's claim on what it runs: a lock on a
# file of its own, which the kernel drops at its death, so that its calls can be given back at once.

QUEUE_TABLES = {
    "fn_queue": "(id TEXT PRIMARY KEY, function TEXT NOT NULL, state TEXT NOT NULL, due REAL NOT NULL, trigger TEXT NOT NULL,"
                " attempts INTEGER NOT NULL, retries INTEGER, owner TEXT, created REAL NOT NULL, started REAL, finished REAL,"
                " key TEXT, job TEXT, planned REAL, request TEXT NOT NULL, body BLOB, status INTEGER, headers TEXT,"
                " answer BLOB, error TEXT)",
    "fn_queue_due": "ON fn_queue (due) WHERE state = 'waiting'",
    "fn_queue_running": "ON fn_queue (owner) WHERE state = 'running'",
    "fn_queue_job": "ON fn_queue (job, created) WHERE job IS NOT NULL",
    "fn_queue_key": "ON fn_queue (key) WHERE key IS NOT NULL",
}
FREE_BYTES = 128 * 1024 * 1024  # that calls of strangers leave on the disk
KEPT_BODY = 64 * 1024  # of a call that is done; a larger one can't be replayed
RESULT_SECONDS = 86_400  # results and idempotency keys are kept this long, dead calls KEEP_DAYS
ANSWER_BYTES = 1024 * 1024
ANSWER_CUT = f"the answer is longer than {ANSWER_BYTES} bytes; the rest of it is not kept"
QUEUE_FULL = (503, "The queue is full", [("Retry-After", "60")])
MAX_BACKOFF_SECONDS = 3600.0
YIELD_SECONDS = .003  # before a call is run, so that its sender is answered first: 1.7 commits instead of 2.9 (bench/)
STATES = ("waiting", "running", "done", "dead")


def free_bytes(directory: str) -> int:
    """Return how many bytes are free on a directory's disk."""
    found = os.statvfs(directory if os.path.isdir(directory) else ".") if hasattr(os, "statvfs") else None
    return found.f_bavail * found.f_frsize if found else FREE_BYTES


def new_call_id(now: float) -> str:
    """Return an id that can't be guessed (96 random bits), in the order of time, so that the rows lie side by side."""
    return f"{int(now) & 0xffffffff:08x}{os.urandom(12).hex()}"


class Queued(NamedTuple):
    """A call to put: `request` is a JSON object (method, path, query, headers; func, args and kwargs for a job)."""
    function: str
    request: str
    body: bytes = b""
    due: float = 0.0
    trigger: str = "async"
    key: Optional[str] = None  #: a repeat of it within a day is the first call
    job: Optional[str] = None
    planned: Optional[float] = None


class Queue:
    """The durable queue. `put` returns once the call is on disk; `claim`, `finish` and `reclaim` are for those who run it."""

    def __init__(self, store: Store, directory: str, limit: int, clock: Callable[[], float]) -> None:
        self._store, self._directory, self._limit, self.clock = store, directory, limit, clock
        self._waiting: list[tuple[Queued, list[Any]]] = []  #: for a commit, which adds to each its id, or the error
        self._lock, self._owner, self._handle = threading.Lock(), "", -1
        self._room, self._counted = 0, 0.0  #: how many more calls may wait, as of when
        in_children(self._disown)

    def put(self, call: Queued) -> str:
        """Commit a call with fsync and return its id; who comes while another commits shares the next commit. HTTPException
        503 where QUEUE_MAX calls wait already, or the disk is nearly full."""
        outcome: list[Any] = []
        self._waiting.append((call, outcome))
        with self._lock:
            if not outcome:
                self._commit()
        if isinstance(outcome[-1], BaseException):
            raise outcome[-1]
        return outcome[-1]

    def _commit(self) -> None:
        batch: list[tuple[Queued, list[Any]]] = []
        try:
            batch = list(self._waiting)
            del self._waiting[:len(batch)]  # who comes meanwhile is added behind these
            with self._store.write(durable=True) as connection:
                if self._room < len(batch) or not 0 <= monotonic() - self._counted < 1:
                    self._count(connection)
                for call, outcome in batch:
                    outcome.append(self.insert(connection, call) if self._room > 0 else HTTPException(*QUEUE_FULL))
                    self._room -= 1
        except BaseException as error:  # one caller's deadline may end it; the others must not hear of that
            shown = error if isinstance(error, sqlite3.Error) else sqlite3.OperationalError(str(error))
            for _, outcome in batch:
                outcome.append(shown)

    def _count(self, connection: sqlite3.Connection) -> None:
        """See how many calls may still wait; once a second will do, since it takes 8 ms where 100,000 wait."""
        waiting = connection.execute("SELECT count(*) FROM fn_queue WHERE state = 'waiting'").fetchone()[0]
        self._room = self._limit - waiting if free_bytes(self._directory) >= FREE_BYTES else 0
        self._counted = monotonic()

    def insert(self, connection: sqlite3.Connection, call: Queued) -> str:
        """Add a call within somebody's transaction; return its id, or the first one's where the key is known."""
        now = self.clock()
        if call.key is not None:
            for row in connection.execute("SELECT id, created FROM fn_queue WHERE key = ?", (call.key,)).fetchall():
                if row[1] > now - RESULT_SECONDS:
                    return row[0]
                connection.execute("UPDATE fn_queue SET key = NULL WHERE id = ?", (row[0],))
        number, more = new_call_id(now), {"state": "waiting", "attempts": 0, "created": now, "due": call.due or now}
        insert_row(connection, "fn_queue", {**call._asdict(), **more, "id": number})
        return number

    def claim(self, now: float, share: int = 1000) -> Optional[sqlite3.Row]:
        """Take the call that is due for longest, or None; of one function this process runs no more than `share`."""
        if not self._store.read("SELECT 1 FROM fn_queue WHERE state = 'waiting' AND due <= ? LIMIT 1", now):
            return None
        owner = self._own()
        with self._store.write() as connection:
            row = connection.execute(
                "SELECT id FROM fn_queue WHERE state = 'waiting' AND due <= ? AND function NOT IN (SELECT function FROM"
                " fn_queue WHERE state = 'running' AND owner = ? GROUP BY function HAVING count(*) >= ?) ORDER BY due LIMIT 1",
                (now, owner, share)).fetchone()
            if row is None:
                return None
            connection.execute("UPDATE fn_queue SET state = 'running', owner = ?, started = ?, attempts = attempts + 1"
                               " WHERE id = ?", (owner, now, row[0]))
        return self.get(row[0])

    def get(self, number: str) -> Optional[sqlite3.Row]:
        """Return a call by its id."""
        rows = self._store.read("SELECT * FROM fn_queue WHERE id = ?", number)
        return rows[0] if rows else None

    def finish(self, row: Any, retries: int, failed: bool, error: str, status: Optional[int] = None,
               headers: Optional[str] = None, answer: Optional[bytes] = None) -> None:
        """Store how a run ended: done, or for a failure due again after 1, 2, 4, ... seconds each half off at most (at once
        where there is no status, since its process died), or dead."""
        now = self.clock()
        again = failed and row["attempts"] <= (retries if row["retries"] is None else row["retries"])
        wait = min(2.0 ** (row["attempts"] - 1), MAX_BACKOFF_SECONDS) * (.5 + int.from_bytes(os.urandom(2), "big") / 65536)
        state = "waiting" if again else "dead" if failed else "done"
        with self._store.write() as connection:
            connection.execute(
                "UPDATE fn_queue SET state = ?, due = ?, owner = NULL, finished = ?, status = ?, headers = ?, answer = ?,"
                " error = ? WHERE id = ? AND state = 'running' AND attempts = ?",  # not where it was given back
                (state, now + wait if again and status else row["due"], now, status, headers, answer, error or None, row["id"],
                 row["attempts"]))
            if state == "done":
                connection.execute("UPDATE fn_queue SET body = NULL WHERE id = ? AND length(body) > ?", (row["id"], KEPT_BODY))

    def reclaim(self, retries: Callable[[str], int]) -> None:
        """Give back the calls of processes that died, whose file's lock can be had, or give them up after so many `retries` of
        their function."""
        running = self._store.read("SELECT owner, id, function, attempts, retries, due FROM fn_queue WHERE state = 'running'")
        for owner in {row["owner"] for row in running} - {self._owner}:
            path = os.path.join(self._directory, owner)
            if (handle := lock_file(path)) >= 0:
                os.close(handle)
                for row in running:
                    if row["owner"] == owner:
                        self.finish(row, retries(row["function"]), True, "its process died")
                os.unlink(path)

    def next_due(self) -> Optional[float]:
        """Return when the next waiting call is due."""
        return self._store.read("SELECT min(due) FROM fn_queue WHERE state = 'waiting'")[0][0]

    def act(self, number: str, action: str) -> str:
        """Retry (go on with a dead call), replay (run the request anew) or discard; return the id. HTTPException 404 for no
        such call, 409 where its state or a body that was not kept forbids it."""
        with self._store.write() as connection:
            row = self.get(sql_value(number))
            if row is None:
                raise HTTPException(404, "There is no such call")
            if row["state"] == "running" or action == "retry" and row["state"] != "dead" \
                    or action == "replay" and row["body"] is None:
                raise HTTPException(409, "It can't be done with this call now; of calls that are done, no body over"
                                         f" {KEPT_BODY} bytes is kept")
            if action == "discard":
                connection.execute("DELETE FROM fn_queue WHERE id = ?", (number,))
            elif action == "retry":
                connection.execute("UPDATE fn_queue SET state = 'waiting', due = ?, retries = attempts + 2 WHERE id = ?",
                                   (self.clock(), number))
            else:
                number = self.insert(connection, Queued(row["function"], row["request"], row["body"], trigger=row["trigger"]))
        return number

    def prune(self, now: float, keep_days: int) -> None:
        """Delete results older than a day, dead calls older than KEEP_DAYS."""
        self._store.run("DELETE FROM fn_queue WHERE state = 'done' AND finished < ? OR state = 'dead' AND finished < ?",
                        now - RESULT_SECONDS, now - max(1, keep_days) * 86_400)

    def _own(self) -> str:
        """Return this process's name in the table, and hold its lock."""
        with self._lock:
            if self._handle < 0 or not os.fstat(self._handle).st_nlink:  # the journal was deleted, with its locks
                self._owner = f"runner-{os.getpid()}-{os.urandom(4).hex()}.lock"
                self._handle = lock_file(os.path.join(self._directory, self._owner))
            return self._owner

    def _disown(self) -> None:
        """Let a child that a function forks not hold its parent's lock."""
        if self._handle >= 0:
            os.close(self._handle)
        self._lock, self._owner, self._handle, self._waiting = threading.Lock(), "", -1, []


class Runner:
    """Runs what is due in threads of this process; they start when there is something to run, and end when there isn't."""

    def __init__(self, queue: Queue, run: Callable[[Any], None], threads: int) -> None:
        self._queue, self._run, self._most = queue, run, threads
        self._lock, self._threads, self._idle = threading.Lock(), 0, 0
        self._wake = threading.Semaphore(0)
        self.running, self.stopping = 0, False  #: how many calls run here; whether no more are to be claimed

    def poke(self) -> None:
        """Let an idle thread look for a call, or a new one."""
        with self._lock:
            if self._idle:
                self._idle -= 1
                self._wake.release()
            elif self._threads < self._most:
                with contextlib.suppress(RuntimeError):  # there can be no more threads now: the background loop pokes again
                    threading.Thread(target=self._loop, name="fnserve queue", daemon=True).start()
                    self._threads += 1

    def _loop(self) -> None:
        while not self.stopping:
            sleep(YIELD_SECONDS)
            try:
                row = self._queue.claim(self._queue.clock(), max(1, self._most - 1))
            except (sqlite3.Error, OSError) as error:  # locked for long, or the disk is full: the background loop pokes again
                log.warning("queue: %s", error)
                row = None
            if row is not None:
                self.poke()  # there may be more
                self._run_one(row)
            elif not self._rest():
                return

    def _run_one(self, row: Any) -> None:
        with self._lock:
            self.running += 1
        try:
            self._run(row)
        except BaseException as error:  # a thread must outlive whatever a call does
            log.error("queue: %s: %s", row["function"], user_traceback(error))
        finally:
            with self._lock:
                self.running -= 1

    def _rest(self) -> bool:
        """Wait to be poked; False after a while without, when the thread ends."""
        with self._lock:
            self._idle += 1
        if self._wake.acquire(timeout=60):
            return True
        with self._lock:
            if self._wake.acquire(blocking=False):  # poked at the last moment
                return True
            self._idle -= 1
            self._threads -= 1
        return False

# == 12 SCHEDULE ==========================================================
# Jobs and when they fire. Uses 01, 03, 05 to 11. Only the leader calls `step`: a run goes into the queue in the transaction
# that moves next_run_time, so it is put once, whoever dies. The table fn_jobs is the state.

JOB_COUNTS = ("planned", "started", "late", "skipped", "missed")
SCHEDULE_TABLES = {
    "fn_jobs": "(id TEXT PRIMARY KEY, name TEXT NOT NULL, func TEXT NOT NULL, args TEXT NOT NULL, kwargs TEXT NOT NULL,"
               " schedule TEXT NOT NULL, next REAL, paused INTEGER NOT NULL DEFAULT 0, source TEXT NOT NULL, grace REAL,"
               " instances INTEGER NOT NULL, coalesce INTEGER NOT NULL, created REAL NOT NULL, "
               + ", ".join(f"{name} INTEGER NOT NULL DEFAULT 0" for name in JOB_COUNTS) + ")"}
MIGRATIONS = (("fn_jobs", "started", "INTEGER NOT NULL DEFAULT 0"),)  # columns that older databases lack
MISFIRE_SECONDS = 60.0  # APScheduler's default of one second would miss what a restart of the board delays
LATE_SECONDS = 5.0
JOB_FIELDS = ("id", "name", "func", "args", "kwargs", "trigger", "misfire_grace_time", "max_instances", "coalesce")
SHOWN_FIELDS = {*JOB_FIELDS, "next_run_time", "paused", "source", *JOB_COUNTS}  # of a job, besides those of its trigger
JOB_ID = re.compile(r"[^/?#\x00-\x1f\ud800-\udfff]{1,200}")
FUNC = re.compile(r"([^\W\d]\w*(?:/[^\W\d]\w*)*)(?::([^\W\d]\w*))?")


class Schedule:
    """The jobs. Times are Unix seconds; a job as others see it is the dict of `show`."""

    def __init__(self, store: Store, queue: Queue, zone: str, clock: Callable[[], float]) -> None:
        self._store, self._queue, self._zone, self._clock = store, queue, zone, clock
        self._stepped = 0.0
        self._refused: dict[str, str] = {}  #: function -> the schedule of it that is in the log

    def trigger(self, row: Mapping[str, Any]) -> Trigger:
        """Return the trigger of a stored job."""
        return parse_schedule(json.loads(row["schedule"]), self._zone, row["created"])

    def jobs(self) -> list[Any]:
        """Return the stored jobs."""
        return self._store.read("SELECT * FROM fn_jobs ORDER BY id")

    def get(self, number: str) -> Any:
        """Return one stored job; HTTPException 404 for none."""
        for row in self._store.read("SELECT * FROM fn_jobs WHERE id = ?", number):
            return row
        raise HTTPException(404, f"Job {number[:100]} not found")

    def show(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a job as Flask-APScheduler shows it, with the counts of its runs."""
        trigger = self.trigger(row)
        return {"id": row["id"], "name": row["name"], "func": row["func"], "args": json.loads(row["args"]),
                "kwargs": json.loads(row["kwargs"]), "trigger": trigger.kind, **trigger.fields,
                "misfire_grace_time": row["grace"], "max_instances": row["instances"], "coalesce": bool(row["coalesce"]),
                "next_run_time": None if row["paused"] else trigger.iso(row["next"]), "paused": bool(row["paused"]),
                "source": row["source"], **{name: row[name] for name in JOB_COUNTS}}

    def add(self, sent: Mapping[str, Any], source: str = "api") -> Any:
        """Store a new job; HTTPException 409 for an id that is taken, TriggerError for a field that is wrong."""
        row = self._read(sent, source)
        with self._store.write() as connection:
            if connection.execute("SELECT 1 FROM fn_jobs WHERE id = ?", (row["id"],)).fetchone():
                raise HTTPException(409, f"Job {row['id']} already exists", field="id")
            insert_row(connection, "fn_jobs", row)
        return self.get(row["id"])

    def change(self, number: str, sent: Mapping[str, Any]) -> Any:
        """Change fields of a job; with `trigger` all of the old one's fields go. Its counts stay."""
        with self._store.write() as connection:
            old = {name: value for name, value in self.show(self.get(number)).items()
                   if name in SHOWN_FIELDS or "trigger" not in sent}
            row = self._read({**old, **sent, "id": number}, "api")
            names = ["name", "func", "args", "kwargs", "grace", "instances", "coalesce"]
            names += ["schedule", "next", "created"] if sent.keys() - SHOWN_FIELDS or "trigger" in sent else []
            connection.execute(f"UPDATE fn_jobs SET {', '.join(f'{name} = ?' for name in names)} WHERE id = ?",
                               (*(row[name] for name in names), number))
        return self.get(number)

    def remove(self, number: str) -> None:
        """Delete a job."""
        self.get(number)
        self._store.run("DELETE FROM fn_jobs WHERE id = ?", number)

    def pause(self, number: str, paused: bool) -> Any:
        """Pause or resume a job; what would have fired meanwhile is not made up for."""
        following = self.trigger(self.get(number)).next(self._clock())
        self._store.run("UPDATE fn_jobs SET paused = ?, next = ? WHERE id = ?", paused, following, number)
        return self.get(number)

    def step(self, now: float) -> Optional[float]:
        """Put what is due into the queue; return when the next job is."""
        if not self._stepped or now < self._stepped - 300:  # what a clock that was wrong has planned is planned anew
            for row in self.jobs():
                with contextlib.suppress(ValueError, OverflowError):
                    following = self.trigger(row).next(now)
                    if following is not None and (row["next"] is None or row["next"] > following):
                        self._store.run("UPDATE fn_jobs SET next = ? WHERE id = ?", following, row["id"])
        self._stepped = now
        for row in self._store.read("SELECT * FROM fn_jobs WHERE next <= ? AND NOT paused", now):
            try:
                self._fire(row, now)
            except (ValueError, OverflowError) as error:  # one job must not hold up the others
                log.error("job %s: %s", row["id"], error)
                self._store.run("UPDATE fn_jobs SET next = NULL WHERE id = ?", row["id"])
        return self._store.read("SELECT min(next) FROM fn_jobs WHERE NOT paused")[0][0]

    def _fire(self, row: Mapping[str, Any], now: float) -> None:
        """Work out what a job has to do, then write it all at once, unless somebody was faster."""
        trigger, oldest = self.trigger(row), row["next"]
        since = oldest if row["grace"] is None else max(oldest, now - row["grace"])
        missed = trigger.count(oldest, since)
        ready = trigger.times(oldest if oldest >= since else trigger.next(since - .001), now)
        following = trigger.next(now if len(ready) == MOST_RUNS else ready[-1] if ready else since - .001)
        planned, ready = missed + len(ready), ready[-1:] if row["coalesce"] else ready
        with self._store.write() as connection:
            if not connection.execute("SELECT 1 FROM fn_jobs WHERE id = ? AND next = ?", (row["id"], oldest)).fetchone():
                return  # changed, deleted or fired since it was read
            under_way = connection.execute("SELECT count(*) FROM fn_queue WHERE job = ? AND state IN ('waiting', 'running')",
                                           (row["id"],)).fetchone()[0]
            run = ready[:max(0, row["instances"] - under_way)]
            for moment in run:
                self._queue.insert(connection, self.call(row, moment))
            if missed:
                add_up(connection, "fn_meta", {"key": "missed_runs"}, value=missed)
                log.warning("job %s: %d runs were missed", row["id"], missed)
            if following is None and row["source"] == "api":  # as in APScheduler: a job that never fires again is gone
                connection.execute("DELETE FROM fn_jobs WHERE id = ?", (row["id"],))
            connection.execute("UPDATE fn_jobs SET next = ?, planned = planned + ?, missed = missed + ?, skipped = skipped + ?"
                               " WHERE id = ?", (following, planned, missed, len(ready) - len(run), row["id"]))

    def count_start(self, number: str, delay: float) -> None:
        """Count a run of a job that has just begun, so many seconds after it was planned."""
        self._store.run("UPDATE fn_jobs SET started = started + 1, late = late + ? WHERE id = ?", delay > LATE_SECONDS, number)

    def sync(self, wanted: Mapping[str, Any]) -> None:
        """Make the jobs of SETTINGS["schedule"] what the files say: function -> schedule."""
        known = {row["id"]: row for row in self._store.read("SELECT * FROM fn_jobs WHERE source = 'code'")}
        for name in known.keys() - wanted.keys():
            self.remove(name)
        for name, schedule in wanted.items():
            row = known.get(name)
            try:
                if schedule is UNREADABLE or row is not None and row["schedule"] == dump_json(schedule):
                    continue
                options = {key: schedule[key] for key in JOB_OPTIONS if isinstance(schedule, dict) and key in schedule}
                new = self._read({"id": name, "func": name, **options}, "code", schedule)
                with self._store.write() as connection:
                    connection.execute("DELETE FROM fn_jobs WHERE id = ?", (name,))  # a job of the API by this name gives way
                    insert_row(connection, "fn_jobs", {**new, "paused": row["paused"] if row else 0})
            except (ValueError, TypeError, OverflowError) as error:  # the list shows it, too
                if self._refused.get(name) != repr(schedule):
                    self._refused[name] = repr(schedule)
                    log.error("%s: its SETTINGS['schedule'] can't be used: %s", name, error)

    def _read(self, sent: Mapping[str, Any], source: str, schedule: Any = None) -> dict[str, Any]:
        """Check what a job is made of, and return the row."""
        now, number = self._clock(), str(sent.get("id") or os.urandom(8).hex())
        job = {"func": "", "args": [], "kwargs": {}, "misfire_grace_time": MISFIRE_SECONDS, "max_instances": 1, **sent}
        func, grace, instances = job["func"], job["misfire_grace_time"], job["max_instances"]
        if schedule is None:
            schedule = {name: value for name, value in sent.items() if name == "trigger" or name not in SHOWN_FIELDS}
        for field, right, message in (
                ("func", isinstance(func, str) and FUNC.fullmatch(func), f"{func!r} is neither hello nor reports:daily"),
                ("id", source == "code" or JOB_ID.fullmatch(number) and number.strip(". "), "must be text without / ? #"),
                ("args", isinstance(job["args"], list), "must be a list"),
                ("kwargs", isinstance(job["kwargs"], dict), "must be a dict"),
                ("misfire_grace_time", grace is None or type(grace) in (int, float) and grace > 0,
                 "must be seconds above 0, or null for no limit"),
                ("max_instances", type(instances) is int and 0 < instances <= 1000, "must be a whole number above 0"),
                ("trigger", schedule, "is missing: cron, interval or date")):
            if not right:
                raise TriggerError(field, message)
        trigger = parse_schedule(schedule, self._zone, now)
        following = trigger.next(float("-inf") if trigger.kind == "date" else now)  # a date just past is still run
        return {"id": number, "name": sql_value(str(sent.get("name") or number)), "func": func, "args": dump_json(job["args"]),
                "kwargs": dump_json(job["kwargs"]), "schedule": dump_json(schedule), "next": following,
                "paused": int("next_run_time" in sent and sent["next_run_time"] is None),  # as APScheduler's add_job has it
                "source": source, "grace": grace, "instances": instances, "coalesce": bool(sent.get("coalesce", True)),
                "created": now}

    def call(self, row: Mapping[str, Any], planned: Optional[float] = None) -> Queued:
        """Return a run of a job, to be put into the queue; without `planned` it is one beside the plan."""
        function, _, name = row["func"].partition(":")
        request: dict[str, Any] = {"method": "POST", "path": "/function/" + function, "query": "", "headers": []}
        if name:
            request.update(entry=name, args=json.loads(row["args"]), kwargs=json.loads(row["kwargs"]))
        else:
            request["headers"] = [["Content-Type", "application/json"]]
        body = b"" if name else row["kwargs"].encode()
        return Queued(function, dump_json(request), body, trigger="schedule", job=row["id"], planned=planned)

# == 13 PIPELINE ==========================================================
# One call: resolve, gate, run, respond, record, each a plain function that is handed the app. Uses 01 to 12; App owns
# what is made here. `handle` raises nothing but Parked, so nothing a client or a function does gets past it.

NAMES_OF_ADMIN_FUNCTIONS = frozenset(  # beside those that are routes; where the user has such a file, it serves the admin
    "list_tables show_schema view_table export_table add_table drop_table delete_record execute_sql".split())
FAILURES, FAILURE_SECONDS = 5, 300
TOO_LATE, FAILED = (504, "The function took too long"), (500, "Function execution failed")
FIRST_CALLS, PROVEN_CALLS = 5, 20  # see guard()
MOST_WAITING, WATCH_SECONDS = 1000, .25
LAST_SECONDS = 1.0  # that hooks and handlers have where the function has used up all of its time
FLOOD_COUNT = 20  # entries of one kind in a minute; the rest would only wear out the SD card
NOT_THEIRS = frozenset(  # hop by hop (RFC 9110 7.6.1), which PEP 3333 forbids to applications, and what we add ourselves
    "connection keep-alive proxy-authenticate proxy-authorization te trailer trailers transfer-encoding upgrade"
    " x-request-id".split())


class Route(NamedTuple):
    """A URL of the platform's own."""
    view: Callable[[Any, Call], Any]
    admin: bool = True
    methods: tuple[str, ...] = ("GET", "HEAD")
    basic: bool = False  #: HTTP Basic with SECRET_TOKEN as the password will do


def handle(app: Any, call: Call) -> Response:
    """Make the answer to a call. Whatever goes wrong becomes a response here and nowhere else."""
    try:
        target = resolve(app, call)
        gate(app, call, target)
        response = accept(app, call) if call.queued else make_response(run(app, call, target))
    except Parked:
        raise
    except BaseException as error:  # SystemExit and the like too: a function must not be able to end its worker
        response = recover(app, call, error)
    if not (call.after or call.hooks):
        return response
    try:
        return run_last(app, call, finish, app, call, response)
    except DeadlineExceeded as error:
        return answer_failure(call, error)


def resolve(app: Any, call: Call) -> Union[Route, Function]:
    """Find what serves the path, a route or a function; 404 where nothing does."""
    path = call.request.path
    of_function = path.startswith("/function/")
    if of_function:
        function, subpath, is_fresh = app.functions.resolve(path[10:])
        if function is not None:
            call.function = call.request.endpoint = function.name
            call.request.view_args = {"func_name": function.name, "subpath": subpath}
            if not is_fresh:
                load(app, call, function)
            return function
    root = "/admin/data/" if path.startswith("/admin/data/") else path[:path.find("/", 1) + 1]
    label = path if path in app.routes else root + "*"
    route = app.routes.get(label)
    if route is not None and (app.settings.ADMIN or not route.admin):
        call.route = call.request.endpoint = label
        return route
    if not of_function:
        raise HTTPException(404, "Not found")
    first = path[10:].partition("/")[0]
    if first in app.protected and app.settings.ADMIN:  # like the others, so that names can't be probed
        require_admin(app, call)
    raise not_found(first)


def not_found(name: Optional[str]) -> HTTPException:
    """Make the 404 of a function that isn't there, or is hidden."""
    return HTTPException(404, f'Function "{(name or "")[:100]}" not found')


def load(app: Any, call: Call, function: Function) -> None:
    """Load a file under a deadline, since what it does when it is imported may hang too; others wait in line meanwhile."""
    call.until = call.clock + app.settings.TIMEOUT
    app.watch.enter(call, function.loading, 1)
    app.watch.run(call, app.functions.refresh, function)
    app.watch.leave(call)
    app.watch.release(lambda share, until: share is function.loading)  # all who wait find it loaded


def gate(app: Any, call: Call, target: Union[Route, Function]) -> None:
    """Refuse what may not be served: method, login, origin, rate, size; then take a place in the function's share."""
    if isinstance(target, Route):
        return gate_route(app, call, target)
    request, code = call.request, target.code
    settings, call.code = code.settings if code is not None else PLAIN, code
    limit = settings.timeout or app.settings.TIMEOUT
    call.deadline, call.until = call.started + limit, call.clock + limit
    if settings is not PLAIN or "HTTP_PREFER" in request.environ:
        call.settings = settings
        gate_function(app, call, target)
        call.queued = code is not None and wants_queue(call)
    # most calls are spared the call of is_protected
    protected = target.name in app.protected or "/" in target.name and is_protected(target.name, app.protected)
    if protected and call.trigger not in ("async", "schedule", "cli"):
        if not app.settings.ADMIN:
            raise not_found(call.function)
        require_admin_of(app, call, target)
    if "CONTENT_LENGTH" in request.environ:
        check_size(request.content_length or 0, request.max_content_length)
    if not call.queued and call.holds is None:
        app.watch.enter(call, target.share, settings.concurrency)


def gate_route(app: Any, call: Call, route: Route) -> None:
    """Refuse what a URL of the platform's own refuses."""
    if route.admin:
        require_admin(app, call, route.basic)
    else:
        call.request.max_content_length = FORM_MEMORY // 10  # nobody has logged in yet: a token needs no more
    if call.request.method not in route.methods:
        raise HTTPException(405, headers=[("Allow", ", ".join(route.methods))])
    check_size(call.request.content_length or 0, call.request.max_content_length)


def require_admin_of(app: Any, call: Call, function: Function, purpose: str = "") -> None:
    """Let the admin pass to a function, in a place of its share where that is asked of the database, which may be slow."""
    if "HTTP_AUTHORIZATION" in call.request.environ and call.holds is None:
        app.watch.enter(call, function.share, call.settings.concurrency)
    require_admin(app, call, purpose=purpose)


def gate_function(app: Any, call: Call, function: Function) -> None:
    """Refuse what a function's SETTINGS refuse; answer a preflight."""
    request, settings = call.request, call.settings
    if settings.auth == "internal" and call.trigger == "http":
        raise not_found(call.function)
    if settings.cors:
        share_origin(call, settings.cors)
    allowed = settings.methods + (("HEAD",) if "GET" in settings.methods else ())
    if call.trigger in ("async", "schedule"):
        return
    if allowed and request.method not in allowed:
        raise HTTPException(405, headers=[("Allow", ", ".join(dict.fromkeys(allowed)))])
    if call.trigger != "cli" and (settings.auth == "login" or settings.auth == "token" and not has_api_token(app, request)):
        require_admin_of(app, call, function, " " + settings.auth)
    if settings.max_body:
        request.max_content_length = settings.max_body
    waiting = waiting_request(call)
    if hasattr(waiting, "passed"):  # it was checked and counted before it stood in line
        return
    if settings.verify is not None and call.trigger == "http":
        check_signature(app, call, settings.verify)
    if settings.rate[0]:
        app.rates.take(call, settings.rate)
    waiting.passed = True


def check_signature(app: Any, call: Call, scheme: Any) -> None:
    """Refuse a webhook that isn't signed as SETTINGS["verify"] says: 401 to the sender, the reason to the admin's logs."""
    try:
        verify(scheme, call.request, app.config.current(), call.started)
    except BadSignature as error:
        call.error = f"the signature was refused: {error}"
        log.warning("%s: %s", call.function, call.error, extra={"call": call.id})
        raise HTTPException(401, "The signature was refused") from None
    answer = answer_challenge(scheme, call.request)
    if answer is not None:
        raise HTTPException(200, response=make_response(answer))


def wants_queue(call: Call) -> bool:
    """Tell whether a call is to be queued: SETTINGS["async"], or the client's Prefer (RFC 7240) where that says nothing."""
    if call.trigger != "http" or not call.app.queues or call.settings.async_ is False:
        return False
    return call.settings.async_ or "respond-async" in re.split(r"[\s,;]+", call.request.environ.get("HTTP_PREFER", "").lower())


def accept(app: Any, call: Call) -> Response:
    """Put a call into the queue and answer 202: after the commit, so that the sender may forget it."""
    request, dedupe, key = call.request, call.settings.dedupe, None
    mark = dedupe and request.headers.get(dedupe) or request.headers.get("Idempotency-Key")
    if mark:  # of this request: nobody gets another's result by guessing its key
        import hashlib
        whose = "\n".join((request.method, request.path, request.headers.get("Authorization", "")))
        key = f"{call.function}:{hashlib.sha256(whose.encode('utf-8', 'replace')).hexdigest()[:32]}:{mark}"
    stored = {"method": request.method, "path": request.path, "query": request.environ.get("QUERY_STRING", ""),
              "headers": kept_headers(app, call), "host": request.host, "scheme": request.scheme, "client": request.remote_addr}
    number = app.put(Queued(call.function or "", json.dumps(stored), request.get_data(), key=key))
    call.run = _QUEUED  # its record is not a run of the function
    answer = {"id": number, "status_url": f"{request.url_root}invocations/{number}"}
    return Response(dump_json(answer) + "\n", 202, mimetype="application/json", headers={
        "Location": f"/invocations/{number}", "Preference-Applied": "respond-async"})


def kept_headers(app: Any, call: Call) -> list[tuple[str, str]]:
    """Return a request's headers but the admin's token and login, which a queued call must not keep on disk."""
    is_login, token = "HTTP_COOKIE" in call.request.environ and "_login" in call.session, f" {app.settings.SECRET_TOKEN}"
    return [(name, re.sub(r"(?:^|;\s*)session=[^;]*", "", value) if is_login and name == "Cookie" else value)
            for name, value in call.request.headers if name != "Authorization" or not decode_wsgi(value).endswith(token)]


def run_alone(app: Any, run: Run, stored: Mapping[str, Any], body: bytes) -> Response:
    """Make a call that no client waits for, and return its answer, read until it is longer than ANSWER_BYTES."""
    environ = make_environ(stored["method"], stored["path"].encode(), stored["query"], body, [
        ("Host", stored.get("host", "localhost")), *stored["headers"]])
    environ.update({"REMOTE_ADDR": stored.get("client") or "", "wsgi.url_scheme": stored.get("scheme", "http"),
                    "fnserve.run": run, "CONTENT_LENGTH": str(len(body))})  # which the headers may have of another request
    try:
        return Client(app).run(environ, ANSWER_BYTES)
    except Exception as error:  # a stream that broke
        return Response(f"{type(error).__name__}: {error}", 500)


def run_queued(app: Any, row: Any) -> None:
    """Run a call of the queue through the pipeline, and store how it ended."""
    stored, body = json.loads(row["request"]), bytes(row["body"] or b"")
    if row["planned"] is not None and row["attempts"] == 1:
        with contextlib.suppress(sqlite3.Error):  # a locked database must not keep it from running
            app.schedule.count_start(row["job"], row["started"] - row["planned"])
    run = Run(row["trigger"], row["attempts"], stored.get("entry", ""), stored.get("args", []), stored.get("kwargs", {}))
    response = run_alone(app, run, stored, body)
    call, run.call = run.call, None  # else each would keep the other, and the body, until the garbage is collected
    gone = call is None or call.function is None
    retries = call.settings.retries if call is not None else PLAIN.retries
    why = call.error if call and call.error else response.status if gone or response.code >= 500 else ""
    if len(response.get_data()) > ANSWER_BYTES:
        why = why or ANSWER_CUT
    while True:
        try:
            return app.queue.finish(row, retries, gone or response.code >= 500, sql_value(why), response.code,
                                    dump_json(list(response.headers)), response.get_data()[:ANSWER_BYTES])
        except sqlite3.Error as locked:  # it ran, and must not run again because somebody else holds the database
            log.error("%s: the end of its queued call can't be stored yet: %s", row["function"], locked)
            sleep(1)


def has_api_token(app: Any, request: Request) -> bool:
    """Tell whether a request carries one of API_TOKENS; all are compared, so that time tells nothing."""
    given = request.authorization
    token = decode_wsgi(given.token or "") if given is not None and given.type == "bearer" else ""
    return bool(token) and sum(same_secret(token, known) for known in app.settings.API_TOKENS) > 0


def share_origin(call: Call, origins: tuple[str, ...]) -> None:
    """Let a function's other origins read its answers (CORS, Fetch standard 3.2); a preflight is answered here."""
    request = call.request
    allowed = "*" if "*" in origins else request.origin if request.origin in origins else None

    def add(response: Response) -> None:
        if allowed:
            response.access_control_allow_origin = allowed
        if allowed != "*":
            response.headers.add("Vary", "Origin")
    call.after.append(add)
    if request.origin and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in request.environ and request.method == "OPTIONS":
        headers = {"Access-Control-Max-Age": "600", "Access-Control-Allow-Methods": ", ".join(call.settings.methods or METHODS)}
        if "Access-Control-Request-Headers" in request.headers:
            headers["Access-Control-Allow-Headers"] = request.headers["Access-Control-Request-Headers"]
        raise HTTPException(204, response=Response(status=204, headers=headers))


class Rates:
    """Counts each client's calls of the functions that bound them, in this worker; `share` is the number of workers."""

    def __init__(self) -> None:
        self.share = 1
        self._lock = threading.Lock()
        self._calls: dict[tuple[Optional[str], str], list[float]] = {}

    def take(self, call: Call, rate: tuple[int, float]) -> None:
        """Count a call, or raise 429 with the time until there is room."""
        limit, key = max(1, -(-rate[0] // self.share)), (call.function, client_network(call.request.remote_addr or ""))
        with self._lock:
            recent = [at for at in self._calls.pop(key, ()) if call.started - rate[1] < at <= call.started]
            self._calls[key] = recent  # now the last of the dict, whose first is the one not seen for longest
            if len(self._calls) > 10_000:
                del self._calls[next(iter(self._calls))]
            if len(recent) >= limit:
                wait = max(1, int(recent[0] + rate[1] - call.started) + 1)
                raise HTTPException(429, "Too many calls", [("Retry-After", str(wait))])
            recent.append(call.started)


_NEWEST_AND_GOOD = "SELECT version, saved_at, source FROM fn_versions WHERE func_name = ?1 AND (loaded > 0 OR version = (" \
                   "SELECT max(version) FROM fn_versions WHERE func_name = ?1)) ORDER BY version DESC LIMIT 2"
_FAILED_OF_CALLS = "SELECT count(*), ifnull(sum(status >= 500), 0) FROM (SELECT status FROM fn_calls WHERE function = ? AND" \
                   " time >= ? AND time < ? AND trigger <> 'queued' ORDER BY number DESC LIMIT ?)"


def guard(app: Any, call: Call, name: str, code: Code) -> None:
    """Take a function whose call has failed back to its last good version, where the newest fails its first calls: of
    FIRST_CALLS or more more than half are 5xx, while of the version before at most half were (SETTINGS["guard"]).

    Only failed calls pay for it, until the version is proven: the journal knows how the others went, in every process.
    """
    if app.proven.get(name) is code:
        return
    try:
        app.folder.fold()
        rows = app.store.read(_NEWEST_AND_GOOD, name)
        if len(rows) < 2 or rows[0]["source"] != code.source or rows[1]["source"] == code.source:
            return
        (version, since, _), (good, since_good, source) = rows
        calls, errors = app.store.read(_FAILED_OF_CALLS, name, since, 1e12, PROVEN_CALLS)[0]
        if calls >= PROVEN_CALLS or app.store.read("SELECT ifnull(min(time), 0) FROM fn_calls")[0][0] > since:
            app.proven[name] = code  # its first calls are over, or may not all be there any more
        elif calls >= FIRST_CALLS and errors > calls / 2:
            calls_before, errors_before = app.store.read(_FAILED_OF_CALLS, name, since_good, since, PROVEN_CALLS)[0]
            if errors_before <= calls_before / 2 and roll_back(app, name, code, version, source):
                log.error("%s: version %d failed %d of its first %d calls; version %d serves again", name, version, errors,
                          calls, good, extra={"call": call.id})
    except (sqlite3.Error, OSError, LoadError) as error:  # a locked database or a full disk; it will try again
        log.warning("%s: its guard can't act: %s", name, error)


def roll_back(app: Any, name: str, code: Code, version: int, good: bytes) -> bool:
    """Make the good source the file again, unless another process or somebody's save was first."""
    with app.store.write() as connection:
        if read_source(app.functions.path(name)) != code.source:
            return False
        connection.execute("UPDATE fn_versions SET loaded = -1 WHERE func_name = ? AND version = ?", (name, version))
        app.functions.save(name, good)
        app.functions.versions.add(connection, name, good, loaded=True)
    return True


def waiting_request(call: Call) -> Any:
    """Return what keeps marks on a call while it is parked: waitress's request."""
    connection = call.request.environ.get("fnserve.connection")
    return connection.requests[0] if connection is not None else types.SimpleNamespace()


class Parked(BaseException):
    """A call waits for room in its function's share, and its thread is free for others. No response has begun."""


class Watch:
    """Bulkhead and deadlines: how many calls of each function run here, which thread is in which function, since when.

    All functions together hold THREADS places, each of them all but one; the platform's own pages need none. A call that finds
    none left is parked: waitress's connection waits in line without a thread, and is handed back through `resume`. `step`
    interrupts calls that are late.
    """

    def __init__(self, app: Any) -> None:
        self._app, self._most = app, max(1, app.settings.THREADS - 1)
        self._places: list[None] = [None] * app.settings.THREADS
        self._lock, self._ending = threading.Lock(), False
        self._late: dict[int, Call] = {}  #: thread -> the call whose function it runs
        self._lines: dict[Share, list[tuple[float, Any]]] = {}  #: (until when, connection or Event) in line
        self.resume: Callable[[Any], Any] = lambda connection: None
        in_children(self._late.clear)  # a child that a function forks ends where it comes back to `run`
        #: ends this process once it has finished what else it has, which may take so many seconds
        self.retire: Optional[Callable[[float], Any]] = None

    def enter(self, call: Call, share: Share, concurrency: int) -> None:
        """Take a place in a share; Parked, or 503 where the line is absurdly long or took too long."""
        limit = concurrency if 0 < concurrency < self._most else self._most
        if share.limit != limit:
            share.limit, share.places = limit, [None] * limit
        if not self._take(call, share.places):
            self._wait(call, share)

    def _take(self, call: Call, places: list[None]) -> bool:
        """Take one of the function's places and one of all; they are lists of as many Nones as there are places, because
        pop and append are single steps of CPython, so that no lock is needed (0.1 instead of 1 us)."""
        try:
            places.pop()
        except IndexError:
            return False
        try:
            self._places.pop()
        except IndexError:
            places.append(None)
            return False
        call.holds = places
        return True

    def _wait(self, call: Call, share: Share) -> None:
        connection, request = call.request.environ.get("fnserve.connection"), waiting_request(call)  # type: Any, Any
        waited = getattr(request, "waits_until", None)
        until = waited or call.until
        place = (until, threading.Event() if connection is None else connection)
        while until > perf_counter() and not self._ending:
            with self._lock:
                line = self._lines.setdefault(share, [])
                if len(line) >= MOST_WAITING:
                    break
                line.insert(len(line) if waited is None else 0, place)
                if self._take(call, share.places):  # given back just now, by somebody who did not see this line yet
                    line.remove(place)
                    return
            if connection is not None:
                request.waits_until = until
                call.request.environ["wsgi.input"].seek(0)  # who has checked its signature has read it
                raise Parked
            place[1].wait(until - perf_counter())
            place[1].clear()
        raise HTTPException(503, "The function has too much to do", [("Retry-After", "5")])

    def leave(self, call: Call) -> None:
        """Give a place back, and let the next in line try."""
        places, call.holds = call.holds, None
        if places is not None:
            places.append(None)
            self._places.append(None)
            if self._lines:
                self._call_next(perf_counter())

    def release(self, which: Callable[[Share, float], bool]) -> None:
        """Let those out of line for whom `which(share, until)` holds; they try again, or are refused."""
        with self._lock:
            out = [place for share, line in self._lines.items() for until, place in line if which(share, until)]
            self._lines = {share: left for share, line in self._lines.items()
                           if (left := [row for row in line if not which(share, row[0])])}
        self._wake(out)

    def _call_next(self, now: float) -> None:
        """Wake who has waited longest of those whose function has room; who is late or has gone has no use for the place."""
        woken: list[tuple[float, Any]] = []
        with self._lock:
            while not woken or woken[-1][0] < now or not getattr(woken[-1][1], "connected", True):
                ready = [line for share, line in self._lines.items() if line and share.places]
                if not ready:
                    break
                woken.append(min(ready, key=lambda line: line[0][0]).pop(0))
            self._lines = {share: line for share, line in self._lines.items() if line}
        self._wake(place for _, place in woken)

    def _wake(self, places: Iterable[Any]) -> None:
        for place in places:
            place.set() if isinstance(place, threading.Event) else self.resume(place)

    def run(self, call: Call, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function's code under its call's deadline."""
        ident, call.interrupted = threading.get_ident(), 0
        outer = self._late.get(ident)  # a handler of what comes after a function; a function that is a client of this app
        self._late[ident] = call
        try:
            return function(*args)
        finally:
            if ident not in self._late:
                end_child()
            del self._late[ident]  # no call here: Python 3.13 would throw in it what was thrown late, before `outer` is back
            if outer is not None:
                self._late[ident] = outer
            if call.interrupted:  # what was thrown may be still on its way: let it arrive here, not in fnserve's own code
                with contextlib.suppress(DeadlineExceeded), self._lock:
                    for _ in range(1000):
                        pass
                raise DeadlineExceeded  # also where the function has swallowed it

    def cut_off(self) -> None:
        """Answer 503 for the calls of clients that are still running, or in line, when the process ends."""
        self._ending = True
        self.release(lambda share, until: True)
        for call in list(self._late.values()):
            if call.trigger == "http" and not call.recorded:
                give_up(self._app, call, "cut off by the end of the server", HTTPException(503, "The server is stopping"))

    def step(self) -> float:
        """Interrupt what is late, answer for what can't be, retire the process where that lasts; return the seconds to wait."""
        now = perf_counter()
        for ident, call in [row for row in self._late.copy().items() if row[1].until < now]:
            import ctypes  # 1.5 MB, only where a call is late
            with self._lock:
                call.interrupted += 1  # first, so that a thread that is just done waits for the lock
                if self._late.get(ident) is call:  # it arrives with the thread's next bytecode
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(DeadlineExceeded))
            if call.interrupted > 4 and not call.recorded:  # a second: it is blocked in C
                why = "blocked beyond its deadline, in code that can't be interrupted"
                give_up(self._app, call, why, HTTPException(*TOO_LATE))
            if call.until + self._app.settings.GRACE < now and self.retire is not None:
                log.error("%s: can't be interrupted; this worker is replaced", call.function, extra={"call": call.id})
                retire, self.retire = self.retire, None
                retire(max([0.0] + [call.until - now for call in self._late.copy().values()]))
        self.release(lambda share, until: until < now)
        return WATCH_SECONDS


def end_child() -> None:
    """End a process that a function has forked where it comes back to us: its parent is the one that answers."""
    error = sys.exc_info()[1]
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    code = error.code if isinstance(error, SystemExit) else error and 1
    os._exit(code if isinstance(code, int) else int(code is not None))


def complain(call: Call, why: str) -> None:
    """Keep what went wrong with a call, and write it into the error log."""
    call.error = why
    log.error("%s %s: %s", call.request.method, quote(call.request.path)[:500], call.error.rstrip(), extra={"call": call.id})


def give_up(app: Any, call: Call, why: str, error: HTTPException) -> None:
    """Answer in place of a thread that is blocked in C or cut off; what it makes of it in the end is thrown away."""
    complain(call, call.error or f"{call.function}: {why}")
    record(app, call, error.code, 0)
    connection = call.request.environ.get("fnserve.connection")
    if connection is not None:
        body = json_error(call, error).get_data()
        connection.give_up(b"" if call.responding else (
            b"HTTP/1.1 %d %b\r\nConnection: close\r\nContent-Type: application/json\r\nX-Request-Id: %b\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (error.code, REASONS[error.code].encode(), call.id.encode(), len(body), body)))


def run(app: Any, call: Call, target: Union[Route, Function]) -> Any:
    """Call the view or the function, and return what it returns."""
    if isinstance(target, Route):
        return target.view(app, call)
    code = call.code
    if code is None:
        raise target.error or LoadError("it could not be loaded")
    return app.watch.run(call, run_function, app, call, code)


def run_function(app: Any, call: Call, code: Code) -> Any:
    """Run the hooks that come before, then the function."""
    call.hooks, call.runs = app.functions.hooks(call.function), True
    for hook in call.hooks:
        value = hook.before_request(call.request) if hasattr(hook, "before_request") else None
        if value is not None:
            return value
    if call.run.entry:
        return call_job(call)
    entry = code.entries.get("") or choose_entry(call, code)
    value = entry.function(call.request) if entry.plain else call_entry(call, entry)
    return finish_coroutine(value) if value.__class__ is types.CoroutineType else value


def choose_entry(call: Call, code: Code) -> Entry:
    """Take the next part of the path as the name of one of several entry points."""
    if not code.entries:
        raise HTTPException(400, f'Module "{call.function}" has no main()')
    name, _, rest = call.request.view_args["subpath"].partition("/")
    if name not in code.entries:
        raise HTTPException(404, f'Module "{call.function}" has these functions', functions=[
            f"/function/{call.function}/{known}" for known in code.entries])
    call.request.view_args["subpath"] = rest
    return code.entries[name]


def call_entry(call: Call, entry: Entry) -> Any:
    """Call an entry point with what it takes."""
    keywords = {word: call.app.keyword(word, call) for word in entry.wants}
    if entry.kind == "cloud_event":
        finish_coroutine(entry.function(read_event(call.request), **keywords))
        return "OK"
    return entry.function(call.request, **keywords) if entry.takes_request else entry.function(**keywords)


def finish_coroutine(value: Any) -> Any:
    """Run what an `async def` has returned to its end; return anything else as it is."""
    if isinstance(value, types.CoroutineType):
        import asyncio  # only for async functions
        return asyncio.run(value)
    return value


def call_job(call: Call) -> Any:
    """Call the callable of a job, ``reports:daily``, with its args and kwargs; what it returns need be no answer."""
    function = getattr(call.code.module, call.run.entry, None) if call.code else None
    if not callable(function):
        raise LoadError(f"the file has no function {call.run.entry!r}")
    value = finish_coroutine(function(*call.run.args, **call.run.kwargs))
    try:
        return make_response(value)
    except TypeError:
        return Response(repr(value), mimetype="text/plain")


def run_last(app: Any, call: Call, function: Callable[..., Any], *args: Any) -> Any:
    """Run what comes after a function within what is left of its time, or LAST_SECONDS where nothing is."""
    call.until = max(call.until, perf_counter() + LAST_SECONDS)
    return app.watch.run(call, function, *args)


def recover(app: Any, call: Call, error: BaseException) -> Response:
    """Make the answer to what went wrong: the function's own handler's, the hooks', or the platform's."""
    if type(error).__module__.startswith("werkzeug.") and hasattr(error, "get_response"):  # the real Werkzeug's
        known: Any = error
        error = HTTPException(known.code or 500, known.description, response=known.response and make_response(known.response))
    if isinstance(error, DeadlineExceeded):
        answer_failure(call, error)
        error = HTTPException(*TOO_LATE)
    if call.function is None and isinstance(error, (sqlite3.Error, OSError)):  # a page of ours meets a locked database
        answer_failure(call, error)
        error = HTTPException(503, "The database or a directory can't be used just now", [("Retry-After", "5")])
    if isinstance(error, HTTPException) and error.response is not None:
        return error.response
    for handler in find_handlers_of(call, error) if call.runs else ():
        try:
            value = run_last(app, call, handler)
            if value is not None:
                return make_response(value)
        except BaseException as again:
            error = again
            break
    return answer_error(app, call, error) if isinstance(error, HTTPException) else answer_failure(call, error)


def find_handlers_of(call: Call, error: BaseException) -> Iterator[Callable[[], Any]]:
    """Yield the handlers of an error: functions_framework.errorhandler's, the most exact first as in Flask, then the hooks'."""
    status: Any = error if isinstance(error, HTTPException) else EXCEPTIONS[500](original_exception=error)
    kinds = [] if status is error else [(kind, error) for kind in type(error).__mro__]
    exact = 1 if status.code == 500 else None  # no more for a 500: in functions_framework, too, our answer comes next
    for kind, given in [*kinds, (status.code, status), *((kind, status) for kind in type(status).__mro__[:exact])]:
        for handles, handler in call.code.handlers if call.code else ():
            if handles == kind:
                yield functools.partial(handler, given)
    for hook in reversed(call.hooks):
        if hasattr(hook, "errorhandler"):
            yield functools.partial(hook.errorhandler, call.request, error)


def finish(app: Any, call: Call, response: Response) -> Response:
    """Let what was left for the end see the response: after_this_request, then the hooks, the innermost first."""
    try:
        for function in call.after:
            response = make_response(function(response) or response)
        for hook in reversed(call.hooks):
            if hasattr(hook, "after_request"):
                response = make_response(hook.after_request(call.request, response) or response)
    except BaseException as error:
        call.failed = error
        response = recover(app, call, error)
    for hook in reversed(call.hooks):
        try:
            if hasattr(hook, "teardown_request"):
                hook.teardown_request(call.request, call.failed)
        except BaseException as error:
            response = answer_failure(call, error)
    return response


def require_admin(app: Any, call: Call, basic: bool = False, purpose: str = "") -> None:
    """Let the admin pass; 401 for anybody else, 403 for another site that uses the admin's browser. Failures count for one
    `purpose`: a caller with an old API token must not lock the admin out."""
    given = call.request.authorization
    if given is not None and given.type == "bearer" and check_token(app, call, decode_wsgi(given.token or ""), purpose):
        return
    known = basic and given is not None and given.type == "basic" and check_token(app, call, given.password or "")
    if not known and not app.signer.is_login(call.session.get("_login"), call.started):
        challenge = 'Basic realm="fnserve"' if basic else "Bearer"
        raise HTTPException(401, "Authentication required", [("WWW-Authenticate", challenge)], login_url="/login")
    if is_cross_site(call.request):  # browsers send cookies, and what they know of Basic, by themselves
        raise HTTPException(403, "This request came from another site")


def is_cross_site(request: Request) -> bool:
    """Tell whether a browser says that another site made it send this (Sec-Fetch-Site, else Origin against Host)."""
    site = request.environ.get("HTTP_SEC_FETCH_SITE")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = request.environ.get("HTTP_ORIGIN")
    host = origin.partition("://")[2].lower() if origin is not None else ""
    return origin is not None and host not in (request.host.lower(), request.environ.get("HTTP_HOST", "").lower())


def check_token(app: Any, call: Call, token: str, purpose: str = "") -> bool:
    """Compare with SECRET_TOKEN; five failures in five minutes from one address are a 429 in every worker."""
    if not app.settings.SECRET_TOKEN or not token:
        return False
    address = client_network(call.request.remote_addr or "") + purpose
    try:
        with app.store.write() as connection:  # counts and compares in one, so that a hundred at once get no more tries
            now = app.clock()  # not when the request began: those under way together must count each other
            first, count = connection.execute("SELECT min(at), count(*) FROM fn_failures WHERE address = ? AND at > ? AND"
                                              " at <= ?", (address, now - FAILURE_SECONDS, now)).fetchone()
            right = same_secret(token, app.settings.SECRET_TOKEN) and count < FAILURES
            if not right and count < FAILURES:
                connection.execute("INSERT INTO fn_failures VALUES (?, ?)", (address, now))
    except sqlite3.Error:
        raise HTTPException(503, "The database can't be written to", [("Retry-After", "5")]) from None
    if count >= FAILURES:
        wait = max(1, int(first + FAILURE_SECONDS - now) + 1)
        raise HTTPException(429, "Too many failed logins", [("Retry-After", str(wait))])
    return right


def client_network(address: str) -> str:
    """Return what failures are counted for: an IPv4 address, or the /64 that one IPv6 customer has."""
    if ":" not in address:
        return address
    import ipaddress  # only for IPv6 clients that log in
    with contextlib.suppress(ValueError):
        found = ipaddress.IPv6Address(address.partition("%")[0])
        return str(found.ipv4_mapped or ipaddress.IPv6Network((int(found) >> 64 << 64, 64)))
    return address


def answer_error(app: Any, call: Call, error: HTTPException) -> Response:
    """Make the JSON of an HTTPException; a browser that lacks a login gets the login page."""
    if error.response is not None:
        return error.response
    wants_page = call.request.accept_mimetypes.best_match(("application/json", "text/html")) == "text/html"
    ours = call.route != "(unknown)" or error.code == 401
    response: Response = app.error_page(call, error) if wants_page and ours else json_error(call, error)
    response.status = error.code
    for name, value in error.headers:
        response.headers[name] = value
    return response


def json_error(call: Call, error: HTTPException) -> Response:
    """Make the JSON of an error: its fields and the request id."""
    body = dump_json({**error.body, "request_id": call.id}, sort_keys=False) + "\n"
    return Response(body, error.code, mimetype="application/json")


def answer_failure(call: Call, error: BaseException) -> Response:
    """Log a failure, the traceback for the admin only, and answer 500; 504 where the call's time was over."""
    call.failed = error
    complain(call, error.trace or str(error) if isinstance(error, LoadError) else user_traceback(error))
    return json_error(call, HTTPException(*(TOO_LATE if isinstance(error, DeadlineExceeded) else FAILED)))


def respond(app: Any, call: Call, response: Response, start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Start the response and return its body; the record is written before the last byte is handed over."""
    if call.opened is not None:
        save_session(call.session, call.request, response, app.signer, call.started)
    body, headers, code = response._body, response.headers.to_wsgi_list(), response.code
    bare = code == 204 or code == 304 or code < 200
    if bare or headers != [_HTML]:
        headers = clean_headers(headers, bare, body.__class__ is bytes)
    whole = body.__class__ is bytes
    if whole:
        body = b"" if bare else body
        headers += [("X-Request-Id", call.id)] if bare else [("Content-Length", str(len(body))), ("X-Request-Id", call.id)]
    if whole and not response._on_close:
        call.responding = True
        record(app, call, code, len(body))
        start_response(response._status, headers)
        return [b"" if call.request.method == "HEAD" else body]
    try:
        call.until = call.until or perf_counter() + app.settings.TIMEOUT  # a page of ours has none yet
        empty = bare or call.request.method == "HEAD"
        chunks = app.watch.run(call, iter, () if empty else [body] if whole else response.response)
        chunk = next_chunk(app, call, chunks)  # before the headers go out, so that what fails at once is a proper 500
    except BaseException as error:
        with contextlib.suppress(Exception):
            response.close()
        late = isinstance(error, DeadlineExceeded)  # the handlers are asked, as for a function that is
        return respond(app, call, recover(app, call, error) if late else answer_failure(call, error), start_response)
    call.responding = True
    start_response(response.status, headers if whole else headers + [("X-Request-Id", call.id)])
    body = stream(app, call, response, chunks, chunk)
    next(body)  # from here on its close() records the call, however it ends
    return body


def clean_headers(headers: list[tuple[str, str]], bare: bool, whole: bool) -> list[tuple[str, str]]:
    """Leave out what the server says itself, which a function that hands on another server's answer has, and nonsense."""
    unwanted = ("content-length", "content-type") if bare else ("content-length",) if whole else ()
    return [pair for pair in headers if (name := pair[0].lower()) not in NOT_THEIRS and name not in unwanted
            and (name != "content-length" or re.fullmatch("[0-9]+", pair[1]))]


def next_chunk(app: Any, call: Call, chunks: Iterator[Any]) -> bytes:
    """Return the next chunk that isn't empty, made inside its call and with a deadline of its own; b"" at the end."""
    token = current_call.set(call)
    call.until = perf_counter() + (call.settings.timeout or app.settings.TIMEOUT)
    try:
        return app.watch.run(call, _first_chunk, chunks)
    finally:
        current_call.reset(token)


def _first_chunk(chunks: Iterator[Any]) -> bytes:
    for chunk in chunks:
        if data := chunk.encode() if isinstance(chunk, str) else b"".join([chunk]):  # a TypeError for what is neither
            return data
    return b""


def stream(app: Any, call: Call, response: Response, chunks: Iterator[Any], chunk: bytes) -> Iterator[bytes]:
    """Yield b"" once, then a body as it is made; close it and record the call at its end, or where the client goes."""
    sent, length = 0, response.content_length
    try:
        yield b""
        while chunk:
            sent += len(chunk)
            if length is not None and sent >= length:
                record(app, call, response.code, sent)
            yield chunk
            chunk = b"" if call.recorded else next_chunk(app, call, chunks)
    except GeneratorExit:
        pass  # the client has gone, or the server has had enough
    except BaseException as error:  # the status is out: all that is left is to cut the connection
        complain(call, user_traceback(error))
        raise ConnectionAbortedError("the function failed in the middle of its answer") from None
    finally:
        token = current_call.set(call)
        for part in (chunks, response, call.request):
            try:
                if hasattr(part, "close"):
                    run_last(app, call, part.close)
            except BaseException as error:  # the function's own code; the other parts must be closed all the same
                complain(call, user_traceback(error))
        current_call.reset(token)
        app.watch.leave(call)
        record(app, call, 500 if call.error else response.code, sent)


def record(app: Any, call: Call, status: int, size: int) -> None:
    """Append the call's line to the journal, once."""
    if call.recorded:  # the watch has answered for it
        return
    call.recorded = True
    environ = call.request.environ
    where, query = environ.get("PATH_INFO", ""), environ.get("QUERY_STRING")
    if query:
        where = f"{where}?{scrub(query)}"
    if not where.isascii():
        where = decode_wsgi(where)
    taken = (perf_counter() - call.clock) * 1e6
    more = record_details(call) if call.output or call.error or call.run is not _HTTP or call.metrics else ""
    name = f'"f":{quote_json(call.function)}' if call.function is not None else f'"r":{quote_json(call.route)}'
    app.journal.append(
        f'{{"t":{call.started:.6f},"id":"{call.id}",{name},"m":{quote_json(call.request.method[:20])},'
        f'"p":{quote_json(where[:500])},"s":{status},"us":{taken:.0f},"n":{size},'
        f'"c":{quote_json(environ.get("REMOTE_ADDR") or "")}{more}}}')
    if status >= 500 and call.settings.guard and call.trigger != "cli" and call.function and call.code:
        guard(app, call, call.function, call.code)


def record_details(call: Call) -> str:
    """Return the rare fields of a record: trigger, attempt, captured output, traceback."""
    dropped = call.printed - OUTPUT_BYTES
    output = "".join(call.output) + (f"\n... {dropped} more characters" if dropped > 0 else "")
    with _COUNTING:
        counted = [[*key, *row] for key, row in call.metrics.items()]
    if counted and len(json.dumps(counted)) > RECORD_BYTES // 3:
        log.error("%s: %d series are too many to be counted in one call", call.function, len(counted))
        counted = []
    fields = {"via": call.trigger if call.trigger != "http" else None, "try": call.attempt if call.attempt > 1 else None,
              "out": output or None, "err": call.error[-OUTPUT_BYTES:] or None, "mx": counted or None}
    return "".join(f",{quote_json(key)}:{json.dumps(value)}" for key, value in fields.items() if value is not None)


class Capture:
    """Stands for stdout or stderr: what a call prints is kept with it, and still reaches the real stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write to the call's output and the real stream."""
        call = current_call.get(None)
        if call is not None:
            call.capture(text)
        with contextlib.suppress(OSError, ValueError):  # a closed terminal must not fail a call
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several pieces."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the real stream."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class CallLog(logging.StreamHandler):
    """Prints what is logged to stdout as it is now, so that it is captured with the call."""

    stream = property(lambda self: sys.stdout, lambda self, stream: None)


class ErrorLog(logging.Handler):
    """The error log: one file, appended to by every process, rotated by whoever finds it full."""

    def __init__(self, path: str, max_bytes: int, backups: int) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s [%(request_id)s] %(message)s"))
        self._path, self._max_bytes, self._backups = path, max_bytes, backups
        self._seen: dict[tuple[str, str], int] = {}  #: what was logged -> how often
        self._began = 0.0  #: to count, in Unix time

    def emit(self, record: logging.LogRecord) -> None:
        """Append one record; a log that can't be written never fails a call. More of the same in a minute are counted."""
        call, key = current_call.get(None), (record.msg, record.getMessage().rpartition("\n")[2][-200:])
        record.request_id = getattr(record, "call", None) or (call.id if call is not None else "-")
        if not 0 <= record.created - self._began < 120:  # in a supervisor, where nobody sums up once a minute
            self.sum_up(record.created)
        self._seen[key] = count = self._seen.get(key, 0) + 1
        if count <= FLOOD_COUNT:
            self._append(self.format(record))

    def sum_up(self, now: float) -> None:
        """Write how often what was left out came, and begin anew; called once a minute."""
        seen, self._seen, self._began = self._seen, {}, time()
        for text, more in [(key[1], count - FLOOD_COUNT) for key, count in seen.items() if count > FLOOD_COUNT]:
            self._append(f"{strftime('%Y-%m-%d %H:%M:%S', localtime(now))} {more} more: {text}")

    def _append(self, text: str) -> None:
        line = f"{text}\n".encode("utf-8", "backslashreplace")
        with contextlib.suppress(OSError):
            with self._open() as file:
                if os.fstat(file.fileno()).st_size + len(line) > self._max_bytes:
                    self._rotate(file.fileno())
            with self._open() as file:
                file.write(line)

    def _open(self) -> Any:
        return open(os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")

    def _rotate(self, handle: int) -> None:
        flock(handle, LOCK_EX)
        if os.fstat(handle).st_ino != os.stat(self._path).st_ino:
            return  # another process was first
        for number in range(self._backups, 0, -1):
            older = f"{self._path}.{number - 1}" if number > 1 else self._path
            with contextlib.suppress(FileNotFoundError):
                os.replace(older, f"{self._path}.{number}")
        if not self._backups:
            os.unlink(self._path)

# == 14 MONITORING ========================================================
# Health, process figures from /proc, the metrics text, Loki. Uses 02, 06 and 11; `Loki` owns its thread, the position
# of what was pushed is in the database.

FULL_BYTES = 16 * 1024 * 1024
STUCK_SECONDS = 120
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def _database_fault(app: Any) -> str:
    with app.store.write():  # takes the write lock, and writes nothing
        return "" if os.path.exists(app.settings.DB_PATH) else "the file is gone"


def _journal_fault(app: Any) -> str:
    os.makedirs(app.settings.JOURNAL_DIR, exist_ok=True)
    return "" if os.access(app.settings.JOURNAL_DIR, os.W_OK) else "not writable"


def _disk_fault(app: Any) -> str:
    directories = app.settings.directory, app.settings.JOURNAL_DIR, os.path.dirname(app.settings.DB_PATH)
    free = min(map(free_bytes, directories))
    return f"only {free // 1024} KiB are left" if free < FULL_BYTES else ""


def _queue_fault(app: Any) -> str:
    due = app.queue.next_due()
    late = app.clock() - due if due is not None else 0
    return f"a call has been due for {late:.0f} s" if late > STUCK_SECONDS else ""


#: what must work -> what says what is wrong with it, if anything; so do OSError and sqlite3.Error
CHECKS: dict[str, Callable[[Any], Optional[str]]] = {
    "database": _database_fault, "functions": lambda served: os.scandir(served.settings.FUNCTIONS_DIR).close(),
    "journal": _journal_fault, "disk": _disk_fault, "queue": _queue_fault}


def check_health(app: Any) -> tuple[str, dict[str, str]]:
    """Return "healthy" or "unhealthy", and what was checked: "ok", or what is wrong."""
    found = {}
    for name, find_fault in CHECKS.items():
        try:
            found[name] = find_fault(app) or "ok"
        except (OSError, sqlite3.Error) as error:
            found[name] = str(getattr(error, "strerror", None) or error)  # without the path: anybody may ask
    return "healthy" if set(found.values()) == {"ok"} else "unhealthy", found


class Usage(NamedTuple):
    """What /proc says of a process, or of several in sum: CPU and start (of the oldest) in seconds, memory in bytes."""
    workers: int = 0
    cpu: float = 0.0
    started: float = 0.0
    rss: int = 0
    virtual: int = 0
    threads: int = 0
    files: int = 0


def read_process(pid: int) -> Usage:
    """Read /proc/<pid> (proc_pid_stat(5)); OSError where it has ended."""
    fields = read_bytes(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    booted = next(float(line.split()[1]) for line in read_bytes("/proc/stat").splitlines() if line.startswith(b"btime"))
    return Usage(pid != os.getppid(), (int(fields[11]) + int(fields[12])) / TICKS, booted + int(fields[19]) / TICKS,
                 int(fields[21]) * os.sysconf("SC_PAGE_SIZE"), int(fields[20]), int(fields[17]),
                 len(os.listdir(f"/proc/{pid}/fd")))


def read_usage() -> Usage:
    """Add up this process and those beside it that run the same command in the same directory: workers and supervisor."""
    def command(pid: Union[int, str]) -> bytes:
        return read_bytes(f"/proc/{pid}/cmdline") + os.fsencode(os.readlink(f"/proc/{pid}/cwd"))
    rows, parent = [], os.getppid()
    with contextlib.suppress(OSError):
        for pid in {os.getpid(), parent, *map(int, read_bytes(f"/proc/{parent}/task/{parent}/children").split())}:
            with contextlib.suppress(OSError):
                if command(pid) == command("self"):
                    rows.append(read_process(pid))
    return Usage(*map(sum, zip(*rows)))._replace(started=min((row.started for row in rows), default=0.0))


class Load:
    """CPU per cent between two looks, over all processes."""

    def __init__(self) -> None:
        self._used, self._at = 0.0, 0.0

    def figures(self, now: float) -> dict[str, Any]:
        """Return SPEC 11's system_metrics."""
        found, used, since = read_usage(), self._used, self._at
        self._used, self._at = found.cpu, now
        started = found.started or now
        percent = 100 * max(0.0, found.cpu - used) / max(now - (since or started), .01)  # what ended processes used is gone
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if found.rss else 1
        return {"cpu_percent": round(percent, 1), "memory_rss_mb": round(found.rss / 2 ** 20, 1),
                "memory_percent": round(100 * found.rss / total, 2), "threads": found.threads,
                "uptime_seconds": round(now - started), "workers": found.workers}


Sample = tuple[str, dict[str, Any], Any]  #: suffix, labels, value
Family = tuple[str, str, str, list[Sample]]  #: a metric's name without _total, kind, help, samples


def write_metrics(families: Iterable[Family], openmetrics: bool) -> str:
    """Write Prometheus's text format 0.0.4, or OpenMetrics 1.0."""
    lines = []
    for name, kind, text, samples in families:
        head = name + ("_total" if kind == "counter" and not openmetrics else "")
        lines += [f"# HELP {head} {_escape_metric(text, openmetrics)}", f"# TYPE {head} {kind}"]
        for suffix, labels, value in samples:
            shown = ",".join(f'{key}="{_escape_metric(str(item), True)}"' for key, item in labels.items())
            lines.append(f"{name}{suffix}{'{' + shown + '}' if shown else ''} {value}")
    return "\n".join(lines + ["# EOF"] * openmetrics) + "\n"


def _escape_metric(text: str, quotes: bool) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text


def histogram_samples(labels: dict[str, Any], bounds: Iterable[float], buckets: list[int], total: float) -> list[Sample]:
    """Return the samples of one histogram: cumulative buckets, count and sum."""
    sums = list(itertools.accumulate(buckets))
    found = [("_bucket", {**labels, "le": bound}, below) for bound, below in zip([*map(float, bounds), "+Inf"], sums)]
    return [*found, ("_count", labels, sums[-1]), ("_sum", labels, total)]


def collect_metrics(app: Any) -> Iterator[Family]:
    """Yield every metric: exact over all workers and restarts, because the journal is folded first."""
    with contextlib.suppress(sqlite3.Error):  # somebody holds the write lock: the figures of a moment ago will do
        app.folder.fold()
    requests = app.store.read("SELECT method, endpoint, status, count FROM fn_requests ORDER BY endpoint, method, status")
    yield "fnserve_requests", "counter", "Requests answered.", [
        ("_total", {"method": method, "endpoint": endpoint, "status": status}, count)
        for method, endpoint, status, count in requests]
    latencies = app.store.read("SELECT method, endpoint, seconds, buckets FROM fn_latency ORDER BY endpoint, method")
    yield "fnserve_request_latency_seconds", "histogram", "Time from request to answer.", [
        sample for method, endpoint, total, buckets in latencies
        for sample in histogram_samples({"method": method, "endpoint": endpoint}, BUCKETS, json.loads(buckets), total)]
    for name, text, least in (("calls", "Calls of functions.", 0), ("errors", "Calls of functions that failed.", 500)):
        yield f"fnserve_function_{name}", "counter", text, [
            ("_total", {"function": endpoint[10:]}, sum(row["count"] for row in rows if row["status"] >= least))
            for endpoint, rows in itertools.groupby(requests, operator.itemgetter("endpoint"))
            if endpoint.startswith("/function/") and endpoint not in app.routes]
    states = dict(app.store.read("SELECT state, count(*) FROM fn_queue GROUP BY state"))
    yield "fnserve_queue_calls", "gauge", "Queued calls by state.", [
        ("", {"state": state}, states.get(state, 0)) for state in STATES]
    for name, kind, text, value in collect_figures(app):
        yield name, kind, text, [("_total" if kind == "counter" else "", {}, value)]
    yield "fnserve_build_info", "gauge", "Version of fnserve and of Python.", [
        ("", {"version": __version__, "python": sys.version.split()[0]}, 1)]
    yield from collect_custom_metrics(app)


def collect_figures(app: Any) -> Iterator[tuple[str, str, str, float]]:
    """Yield the metrics of one sample, the standard process metrics among them, summed over all processes."""
    kept, found = dict(app.store.read("SELECT key, value FROM fn_meta")), read_usage()
    lost = kept.get("lost_lines", 0) + kept.get("torn_lines", 0)
    yield "fnserve_load_errors", "gauge", "Functions that can't be loaded.", len(app.functions.versions.broken())
    yield "fnserve_job_runs_missed", "counter", "Scheduled runs that were missed.", kept.get("missed_runs", 0)
    yield "fnserve_journal_lost_lines", "counter", "Records that could not be written or read.", lost
    yield "fnserve_workers", "gauge", "Processes that serve.", found.workers
    if found.workers:
        import resource
        yield "process_cpu_seconds", "counter", "User and system CPU time.", found.cpu
        yield "process_resident_memory_bytes", "gauge", "Resident memory.", found.rss
        yield "process_virtual_memory_bytes", "gauge", "Virtual memory.", found.virtual
        yield "process_start_time_seconds", "gauge", "Start of the oldest process.", found.started
        yield "process_open_fds", "gauge", "Open file descriptors.", found.files
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        yield "process_max_fds", "gauge", "Most open file descriptors of one process.", limit


def collect_custom_metrics(app: Any) -> Iterator[Family]:
    """Yield what functions count by `counter` and `histogram`."""
    families: dict[str, Family] = {}
    for name, kind, text, labels, value, bounds, buckets in app.store.read(
            "SELECT name, kind, help, labels, value, bounds, buckets FROM fn_metrics ORDER BY name, labels"):
        samples = families.setdefault(name, (name, kind, text, []))[3]
        if kind == "counter":
            samples.append(("_total", json.loads(labels), value))
        else:
            samples.extend(histogram_samples(json.loads(labels), json.loads(bounds), json.loads(buckets), value))
    return iter(families.values())


class Loki:
    """Pushes the journal to Loki, in a thread of the leader. The position moves on once Loki has taken a batch, so nothing
    is lost while it is away; what it refuses for good (400) is dropped and logged, or it would block the rest."""

    def __init__(self, app: Any) -> None:
        self._app, self._wait = app, 1.0
        self._thread: Optional[threading.Thread] = None

    def keep_up(self) -> None:
        """Start the thread that pushes what waits, unless it runs."""
        if self._app.settings.LOKI_URL and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._run, name="fnserve loki", daemon=True)
            self._thread.start()

    def position(self) -> dict[int, int]:
        """Return how far each segment has been pushed."""
        rows = self._app.store.read("SELECT value FROM fn_meta WHERE key = 'loki'")
        return {int(key): value for key, value in json.loads(rows[0][0]).items()} if rows else {}

    def _run(self) -> None:
        try:
            while self._push_some():
                self._wait = 1.0
        except Exception as error:  # it is down, busy, or no Loki at all: what waits stays in the journal
            log.warning("Loki: %s; trying again in %.0f s", error, self._wait)
            sleep(self._wait)
            self._wait = min(self._wait * 2, 60.0)

    def _push_some(self) -> bool:
        done, directory = self.position(), self._app.journal.directory
        kept = segments(directory)
        for number in kept:
            lines, position, _ = read_lines(segment_path(directory, number), done.get(number, 0))
            if lines:
                self._send(lines)
            if position != done.get(number, 0):
                place = {key: value for key, value in {**done, number: position}.items() if key in kept}
                self._app.store.run("REPLACE INTO fn_meta VALUES ('loki', ?)", json.dumps(place))
                return True
        return False

    def _send(self, lines: list[bytes]) -> None:
        import gzip
        import urllib.error
        import urllib.request
        settings = self._app.settings
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        if settings.LOKI_USER:
            secret = f"{settings.LOKI_USER}:{settings.LOKI_PASSWORD}".encode()
            headers["Authorization"] = "Basic " + b2a_base64(secret, newline=False).decode()
        if settings.LOKI_TENANT:
            headers["X-Scope-OrgID"] = settings.LOKI_TENANT
        body = gzip.compress(json.dumps({"streams": loki_streams(lines)}).encode())
        request = urllib.request.Request(settings.LOKI_URL.rstrip("/") + "/loki/api/v1/push", body, headers)
        try:
            urllib.request.urlopen(request, timeout=10).close()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != 400:
                raise
            log.error("Loki refused %d records: %s", len(lines), error)


def loki_streams(lines: list[bytes]) -> list[dict[str, Any]]:
    """Make the streams of Loki's push API of records: labels service, level and endpoint, a JSON line each."""
    streams: dict[tuple[str, str], list[list[str]]] = {}
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, OverflowError):  # no record of ours
            row = json.loads(line)
            endpoint = "/function/" + row["f"] if row.get("f") else row["r"]
            shown = {"endpoint": endpoint, "request_id": row["id"], "trigger": row.get("via", "http"),
                     "request": {"method": row["m"], "path": row["p"], "client": row.get("c")},
                     "response": {"status": row["s"], "bytes": row.get("n")},
                     "performance": {"duration_ms": row["us"] / 1000}, "output": row.get("out"), "error": row.get("err")}
            level = "error" if row["s"] >= 500 else "warning" if row["s"] >= 400 else "info"
            text = json.dumps({key: value for key, value in shown.items() if value is not None}, ensure_ascii=False)
            streams.setdefault((level, endpoint), []).append([str(int(row["t"] * 1e9)), text])
    return [{"stream": {"service": "fnserve", "level": level, "endpoint": endpoint}, "values": sorted(values)}
            for (level, endpoint), values in streams.items()]

# == 15 ASSETS ============================================================
# What the browser gets that isn't made per request, served from URLs of its own so that the pages' policy can forbid
# everything inline. Plain strings, nothing else.

CSS = """\
:root{color-scheme:light dark;--ink:#1b2733;--soft:#5b6b7a;--line:#d9e0e6;--paper:#fff;--back:#f4f6f8;--main:#0b6b57;
--warn:#b3261e;--good:#1d7a3e;--mark:#fdecea;--plus:#e3f5e8}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9fb0bf;--line:#33414d;--paper:#18212a;--back:#10171e;
--main:#57c7ae;--warn:#ff8a80;--good:#7bd88f;--mark:#4a2422;--plus:#1d3b28}}
*{box-sizing:border-box} a{color:var(--main)} h1{font-size:1.35rem;margin:.4rem 0 1rem;overflow-wrap:anywhere}
body{margin:0;background:var(--back);color:var(--ink);font:16px/1.5 system-ui,"Noto Sans TC","PingFang TC",sans-serif}
header{background:var(--paper);border-bottom:1px solid var(--line);padding:0 1rem;display:flex;flex-wrap:wrap;gap:.25rem 1.1rem}
header b{font-size:1.1rem;color:var(--main)} header *{padding:.7rem 0} header a{color:var(--ink);text-decoration:none}
header{align-items:center} header a[aria-current]{box-shadow:inset 0 -3px var(--main)}
main{max-width:70rem;margin:0 auto;padding:1rem} .figures .card{min-width:8rem;margin:0;flex:1}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem;margin:1rem 0}
.charts .card{margin:0} .charts svg{width:100%}h2{font-size:1.1rem}
.narrow{max-width:24rem;margin:10vh auto} .scroll{overflow-x:auto}
.card{background:var(--paper);border:1px solid var(--line);border-radius:.6rem;padding:1rem;margin-bottom:1rem}
.note{border-left:4px solid var(--main)} .note.bad{border-left-color:var(--warn);background:var(--mark);color:var(--ink)}
.bad{color:var(--warn)} .good{color:var(--good)} .soft{color:var(--soft);font-size:.9rem}
.row{display:flex;flex-wrap:wrap;gap:.6rem;align-items:center} label{display:block;font-weight:600;margin:.7rem 0 .25rem}
table{border-collapse:collapse;width:100%} tr:last-child td{border-bottom:0}
th,td{text-align:left;padding:.5rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600;font-size:.85rem;white-space:nowrap}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
input,select,textarea,button,.button{font:inherit;color:inherit;
border:1px solid var(--line);border-radius:.4rem;padding:.5rem .7rem}
input,select,textarea{background:var(--paper);width:100%;max-width:100%;font-weight:400}
input[type=checkbox]{width:auto;margin-right:.4rem} input[type=search]{width:auto;flex:1 1 9rem}
.break{overflow-wrap:anywhere} td.time{white-space:nowrap}
input:focus,select:focus,textarea:focus,button:focus-visible,a:focus-visible{outline:2px solid var(--main);outline-offset:1px}
button,.button{background:var(--main);border-color:var(--main);color:var(--paper);cursor:pointer;text-decoration:none}
button.plain,.button.plain{background:none;color:var(--ink);border-color:var(--line)}
.button{display:inline-block} button.danger{background:var(--warn);border-color:var(--warn)}
pre,.mono,textarea.code,.gutter{font:14px/1.5 ui-monospace,Menlo,Consolas,monospace}
pre{white-space:pre-wrap;overflow-wrap:anywhere;overflow:auto;background:var(--back);border-radius:.4rem;padding:.7rem;
margin:.4rem 0}
.editor{display:flex;border:1px solid var(--line);border-radius:.4rem;overflow:hidden;height:min(52vh,40rem)}
.gutter{margin:0;padding:8px .4rem;text-align:right;color:var(--soft);background:none;overflow:visible;user-select:none;
min-width:3rem;border-radius:0;white-space:pre}
textarea.code{border:0;border-radius:0;flex:1;resize:none;white-space:pre;overflow:auto;tab-size:4;padding:8px .6rem;
background:linear-gradient(var(--mark),var(--mark)) no-repeat local 0 calc(8px + (var(--error-line,-9) - 1)*1lh)/100% 1lh,
var(--paper)}
textarea.code:focus{outline:0} .editor:focus-within{outline:2px solid var(--main)}
.beside{display:grid;grid-template-columns:minmax(0,1fr);gap:1rem;align-items:start}
#try .row>*{flex:1}
#try h2{margin:0} #try h3{font-size:.9rem;margin:.7rem 0 0} #try pre{max-height:20rem} [hidden]{display:none!important}
#anyway{margin:0;font-weight:400} ins,del{text-decoration:none;display:block;background:var(--plus)} del{background:var(--mark)}
#news{position:sticky;bottom:.5rem;margin:.6rem 0}
form.row{margin-bottom:1rem} form.row label{margin:0} form.row select{width:auto;margin-left:.4rem}
details>summary{cursor:pointer;font-weight:600;padding:.5rem 0}
svg{display:block;max-width:100%} svg rect{fill:var(--main)} svg .over{fill:var(--warn)}
.calm rect{fill:var(--soft)} .calm .over{fill:var(--main)}
.ends{display:flex;justify-content:space-between}
@media(min-width:64rem){main:has(.beside){max-width:100rem} .beside{grid-template-columns:minmax(0,3fr) minmax(0,2fr)}
.beside .editor{height:max(52vh,30rem)}}
@media(max-width:40rem){textarea.code,.gutter{font-size:16px;line-height:24px} .gutter{min-width:2.2rem}
main{padding:.6rem} th,td{padding:.4rem} .wide,thead{display:none}
header{flex-wrap:nowrap;overflow-x:auto;white-space:nowrap;scrollbar-width:none}
tr{display:block;padding:.4rem 0;border-bottom:1px solid var(--line)} tr:last-child,td{border:0}
td{display:block;padding:.15rem 0;overflow-wrap:anywhere} td.n{display:inline-block;padding-right:1.2rem}
td.wide,td:empty{display:none}
td+td:not([data-label=""])::before{content:attr(data-label);color:var(--soft);font-size:.85rem;margin-right:.5rem}}
"""

JS = r"""
const find = selector => document.querySelector(selector), code = find("textarea.code"), panel = find("#try");
const live = find("#live"), board = find("#dashboard");
const recall = key => { try { return JSON.parse(localStorage.getItem(key)); } catch { return null; } };
const keep = (key, value) => { try { localStorage.setItem(key, JSON.stringify(value)); } catch { /* full */ } };
const post = async (url, data) => {
  try {
    const answer = await fetch(url, {method: "POST", body: JSON.stringify(data),
      headers: {"Content-Type": "application/json", Accept: "application/json"}});
    return [answer.status, await answer.json()];
  } catch { return [0, {message: find("#edit").dataset.offline}]; }
};
if (code) {
  const form = code.form, fields = form.elements, gutter = find(".gutter"), news = find("#news"), draft = find("#draft");
  const theirs = find("#theirs"), name = "draft:" + fields.original_name.value;
  let lines = 0, saved = code.value, many = false, timer = 0, sending = Promise.resolve();
  const draw = () => {  // only the numbers in sight are there, so a long file costs no more than a short one
    const height = parseFloat(getComputedStyle(code).lineHeight), first = Math.floor(code.scrollTop / height);
    const length = Math.min(code.clientHeight / height + 2, lines - first);
    gutter.textContent = Array.from({length}, (_, at) => first + at + 1).join("\n");
    gutter.style.transform = `translateY(${first * height - code.scrollTop}px)`;
  };
  const count = () => {
    const found = code.value.split("\n").length;
    if (found === lines) return;  // a letter within a line needs no layout of the whole text
    lines = found;
    draw();
  };
  const mark = line => {
    code.style.setProperty("--error-line", line || -9);
    if (!line) return;
    const at = code.value.split("\n").slice(0, line - 1).join("\n").length + (line > 1 ? 1 : 0);
    code.focus();
    code.setSelectionRange(at, at);
    code.scrollTop = code.scrollHeight * (line - 5) / lines;
  };
  const put = text => document.execCommand(text ? "insertText" : "delete", false, text);  // which can be undone
  const lineStart = () => code.value.lastIndexOf("\n", code.selectionStart - 1) + 1;
  const before = () => code.value.slice(lineStart(), code.selectionStart);
  const indent = back => {
    const start = lineStart(), rows = code.value.slice(start, code.selectionEnd).split("\n");
    const fresh = rows.map(row => back ? row.replace(/^(\t| {1,4})/, "") : row && "    " + row).join("\n");
    code.setSelectionRange(start, code.selectionEnd);
    put(fresh);
    code.setSelectionRange(rows.length > 1 ? start : start + fresh.length, start + fresh.length);
  };
  const step = back => {
    if (back || code.value.slice(code.selectionStart, code.selectionEnd).includes("\n")) indent(back);
    else put(" ".repeat(4 - before().length % 4));
  };
  const store = () => {
    timer = clearTimeout(timer);
    if (code.value === saved) draft.hidden = true;
    keep(name, code.value !== saved && {code: code.value, version: fields.version.value});
  };
  const send = async () => {
    const sent = Object.fromEntries(new FormData(form)), [status, found] = await post(form.action, sent);
    const good = status === 200 || status === 201;
    find("#anyway").hidden = !found.can_force;
    theirs.hidden = status !== 409 || !found.version;
    theirs.search = new URLSearchParams({module_name: sent.module_name, version: found.version});
    fields.force.checked = false;
    find("#done")?.remove();
    news.textContent = found.message || found.error;
    news.hidden = false;
    news.classList.toggle("bad", !good);
    mark(good ? 0 : found.line || 0);
    if (!good) return;
    saved = sent.code.replaceAll("\r\n", "\n");
    draft.hidden = true;
    store();
    fields.version.value = found.version;
    if (status === 201) {
      saved = code.value;
      location = "/function/edit_function?" + new URLSearchParams({module_name: found.module_name, done: "saved"});
    }
  };
  code.addEventListener("keydown", event => {
    if (event.key === "Tab" && !event.ctrlKey && !event.altKey) {
      event.preventDefault();
      step(event.shiftKey);
    } else if (event.key === "Escape") form.querySelector("button").focus();
  });
  code.addEventListener("beforeinput", event => {
    many = code.selectionStart !== code.selectionEnd;
    if (event.inputType !== "insertLineBreak" || event.isComposing) return;
    event.preventDefault();
    const text = before(), space = text.match(/^[ \t]*/)[0], ends = /^\s*(return|pass|break|continue|raise)\b/.test(text);
    put("\n" + (/:\s*(#.*)?$/.test(text) ? space + "    " : ends ? space.replace(/(\t| {1,4})$/, "") : space));
  });
  code.addEventListener("input", event => {  // nothing that takes longer in a longer file, at an ordinary key
    if (event.inputType !== "insertText" || many || !event.data || event.data.includes("\n")) count();
    timer = timer || setTimeout(store, 1500);
  });
  code.addEventListener("scroll", draw);
  for (const key of form.querySelectorAll("[data-key]")) {
    key.addEventListener("click", () => { code.focus(); step(key.dataset.key === "outdent"); });
  }
  document.addEventListener("keydown", event => {
    const wanted = {s: form, Enter: panel}[event.key];
    if (!wanted || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    wanted.requestSubmit();
  });
  form.addEventListener("submit", event => {
    event.preventDefault();
    sending = sending.then(send);  // one after another: each needs the version before
  });
  const look = () => { fields.version.value = new URLSearchParams(theirs.search).get("version"); };
  for (const kind of ["click", "auxclick", "contextmenu"]) theirs.addEventListener(kind, look);  // then saving replaces it
  addEventListener("resize", draw);
  addEventListener("pagehide", store);
  addEventListener("beforeunload", event => {
    if (code.value === saved) return;
    event.preventDefault();
    event.returnValue = "";
  });
  const left = recall(name), served = fields.version.value;
  if (left && left.code !== code.value) {
    code.value = left.code;
    fields.version.value = left.version;
    draft.hidden = false;
  }
  draft.querySelector("button").addEventListener("click", () => {
    code.value = saved;
    fields.version.value = served;
    draft.hidden = true;
    code.dispatchEvent(new Event("input"));
  });
  count();
  mark(Number(code.dataset.line));
}
if (panel) {
  const fields = panel.elements, outcome = find("#outcome");
  const key = () => "requests:" + code.form.elements.module_name.value;
  const list = () => {
    const past = recall(key()) || [];
    fields.past.replaceChildren(new Option(""), ...past.map((row, at) => new Option(
      `${row.method} /${row.subpath}${row.query && "?" + row.query} ${row.content.slice(0, 40)}`, at)));
  };
  const pack = async ({kind, content}) => {  // the content, else the file, else nothing
    const types = {json: "application/json", form: "application/x-www-form-urlencoded", raw: "text/plain"};
    const data = new FormData(), [file] = fields.file.files;
    data.append("file", file);
    const body = new Response(content ? new Blob([content], {type: types[kind]}) : file ? data : null);
    const bytes = Array.from(new Uint8Array(await body.arrayBuffer()), byte => String.fromCharCode(byte));
    return [btoa(bytes.join("")), body.headers.get("content-type")];
  };
  const pretty = found => {
    if (found.body_base64) return `${atob(found.body_base64).length} bytes`;
    try { return JSON.stringify(JSON.parse(found.body), null, 2); } catch { return found.body; }
  };
  panel.addEventListener("submit", async event => {
    event.preventDefault();
    const {past, file, which, ...row} = Object.fromEntries(new FormData(panel)), button = panel.querySelector("button");
    const [body_base64, sent_type] = await pack(row), headers = sent_type ? {"Content-Type": sent_type} : {};
    for (const [, name, value] of row.headers.matchAll(/^\s*([^:\n]+?)\s*:(.*)$/gm)) headers[name] = value.trim();
    const sent = {...row, headers, body_base64, module_name: code.form.elements.module_name.value};
    if (which === "editor") sent.code = code.value;
    keep(key(), [row, ...(recall(key()) || []).filter(old => JSON.stringify(old) !== JSON.stringify(row))].slice(0, 8));
    button.disabled = true;
    outcome.textContent = "…";
    const [status, found] = await post("/admin/try", sent), ran = status === 200, parts = ran ? found : {headers: []};
    button.disabled = false;
    outcome.textContent = ran ? [found.status, found.ms && found.ms + " ms"].filter(Boolean).join(" · ")
      : found.message || found.error;
    outcome.className = ran && found.status && found.status < 500 ? "good" : "bad";
    const texts = {...parts, body: pretty(parts), headers: parts.headers.map(pair => pair.join(": ")).join("\n")};
    for (const name of ["error", "body", "output", "headers"]) {
      const box = find("#a_" + name);
      box.textContent = texts[name] || "";
      box.parentNode.hidden = !texts[name];
    }
    outcome.scrollIntoView({block: innerWidth < 640 ? "start" : "nearest"});
    list();
  });
  fields.past.addEventListener("change", () => {
    for (const [name, value] of Object.entries((recall(key()) || [])[fields.past.value] || {})) fields[name].value = value;
  });
  list();
}
if (live) {
  let source, timer;
  const poll = async () => { board.innerHTML = await (await fetch("/monitoring/dashboard?part=1")).text(); };
  const start = () => {
    live.textContent = live.dataset.stop;
    source = new EventSource("/monitoring/stream");
    source.onmessage = event => { board.innerHTML = JSON.parse(event.data).html; };
    source.onerror = () => {  // viewers enough, or the server restarts: ask now and then
      source.close();
      timer = setInterval(poll, 5000);
    };
  };
  const stop = () => {
    source = source.close();
    clearInterval(timer);
    live.textContent = live.dataset.start;
  };
  live.addEventListener("click", () => source ? stop() : start());
  start();
}
find("header [aria-current]")?.scrollIntoView({block: "nearest", inline: "center"});
"""

TEXTS: dict[str, Any] = {  # the English, or a name for what is long: Chinese, or (Chinese, English)
    "Functions": "函式", "Add function": "新增函式", "Statistics": "統計", "Logs": "紀錄", "Log in": "登入", "Log out": "登出",
    "That password is wrong": "登入失敗", "Name": "名稱", "Calls": "呼叫", "Errors": "錯誤", "Last call": "最近呼叫",
    "Last hour": "最近一小時", "Status": "狀態", "fine": "正常", "broken": "損壞", "Run": "執行", "Edit": "編輯",
    "Delete": "刪除", "Versions": "版本", "Save": "儲存", "Code": "程式碼", "Cancel": "取消", "Search": "搜尋",
    "Sort by": "排序", "Clear statistics": "清除統計", "Calls by hour, one day": "一天內每小時呼叫", "Time": "時間",
    "Function": "函式", "Request": "請求", "Took": "耗時", "Restore": "還原", "Size": "大小", "current": "目前",
    "Go on": "繼續", "Data": "資料", "Rows": "列數", "Create a table": "新增資料表", "Columns": "欄位",
    "Drop this table": "刪除資料表", "Schema": "結構", "Settings": "設定", "API": "API 說明", "Value": "值", "Source": "來源",
    "default": "預設", "option": "命令列選項", "environment": "環境變數", "Download a backup": "下載備份",
    "Monitoring": "監控", "Memory": "記憶體", "Threads": "執行緒", "Uptime": "運行時間", "Processes": "行程",
    "Requests/s": "請求/秒", "Error rate": "錯誤率", "Endpoint": "端點", "Slowest": "最慢", "Last errors": "最近錯誤",
    "one day": "一天", "Stop": "停止更新", "Go live": "即時更新", "Filter": "篩選", "Text": "文字", "Follow": "持續更新",
    "Jobs": "排程", "Queue": "佇列", "Schedule": "時間規則", "Next run": "下次執行", "Last run": "最近執行",
    "Planned": "已排定", "Started": "已開始", "Late": "延遲", "Skipped": "略過", "Missed": "錯過", "paused": "已暫停",
    "never": "不再執行", "Pause": "暫停", "Resume": "恢復", "All": "全部", "Runs": "次數", "Due": "到期", "Error": "錯誤",
    "Answer": "回應", "waiting": "等待中", "running": "執行中", "done": "完成", "dead": "失敗", "Version": "版本",
    "See theirs": "看看新版本", "Save anyway": "仍要儲存", "Indent": "縮排",
    "Outdent": "取消縮排", "Try": "測試", "Earlier requests": "之前的請求", "Method": "方法", "in the editor": "編輯器裡的",
    "as saved": "已儲存的", "Subpath": "子路徑", "Query": "查詢字串", "Headers": "標頭", "Body": "主體",
    "form": "表單", "raw": "原文", "File": "檔案", "Content": "主體內容", "Output": "輸出",
    "failed, rolled back": "失敗，已退回", "Retry": "重試", "Replay": "重新執行", "Discard": "捨棄",
    "alive": ("fnserve 執行中。", "fnserve is running."), "token": ("管理密碼 (SECRET_TOKEN)", "Password (SECRET_TOKEN)"),
    "saved": ("已儲存。", "Saved."),
    "ask_delete": ("要刪除「{}」嗎？它的版本會保留，可以還原。", "Delete “{}”? Its versions are kept and can be restored."),
    "deleted": ("已刪除。", "Deleted."),
    "ask_clear": ("要清除所有統計嗎？無法復原。", "Clear all statistics? This can't be undone."),
    "cleared": ("已清除。", "Cleared."), "accepted": ("已處理。", "Done."),
    "by_day": ("每日呼叫（紅色：錯誤）", "Calls by day (red: errors)"),
    "latency": ("延遲 p95（綠色：p50）ms", "Latency p95 (green: p50), ms"), "restored": ("已還原。", "Restored."),
    "line": ("第 {} 行", "Line {}"), "cross": ("這個請求來自其他網站。", "This request came from another site."),
    "exists": ("這個名稱已經存在。", "A function of this name exists already."),
    "failed": ("請求無法完成。", "The request could not be completed."),
    "diff": ("與前一版的差異", "Difference to the one before"),
    "read_only": ("fnserve 的（唯讀）", "fnserve's own, read only"),
    "first_rows": ("只顯示前 {} 列。", "Only the first {} rows are shown."),
    "secrets": ("包含金鑰與密碼（SECRET_TOKEN 等）", "With secrets (SECRET_TOKEN and such)"),
    "saved_as": ("已存成第 {} 版。", "Saved as version {}."), "serves": ("提供 {}。", "It serves {}."),
    "no_main": ("沒有 main()，所以只能被匯入。", "It has no main(), so it can only be imported."),
    "too_long": ("它執行太久。", "It took too long."), "too_much": ("它印出太多。", "It printed too much."),
    "ended": ("它的行程結束了：{}。", "Its process ended: {}."),
    "admin_only": ("這個名稱只有管理者能呼叫。", "Only the admin may call this name."),
    "draft": ("這是沒存過的草稿。", "This is a draft that was never saved."),
    "ask_restore": ("要把「{}」還原成第 {} 版嗎？", "Make version {1} of “{0}” the newest again?"),
    "changes": ("與目前的差異", "Difference to the current one"), "nothing": ("這裡還沒有東西。", "There is nothing here yet."),
    "bad_name": ("名稱必須是 Python 識別字，不以底線開頭，也不是平台保留的名稱。",
                 "The name must be a Python identifier that does not start with _ and is not one of the platform's own."),
    "hidden": ("{} 是一個檔案，這個名稱的呼叫都會由它處理。", "{} is a file: it would serve every call of this name."),
    "stale": ("別人已經存了新版本。您的文字還在這裡；看過新的版本，再存一次就會取代它。",
              "Somebody has saved a newer version. Your text is still here; look at theirs, then saving replaces it."),
    "restart": ("設定在啟動時讀取，改動在重新啟動後生效；函式的 config 則立即生效。",
                "Settings are read at the start, so a change takes effect after a restart; functions' config follows at once."),
    "forced": ("沒有試載入；載入不了時，由上一個好的版本繼續服務。",
               "It was not tried. Where it can't be loaded, the last good version goes on serving."),
    "no_code": ("程式碼是空的。", "The code is empty."),
    "lost_main": ("沒有 main()，但目前的版本有，所以沒有存。",
                  "It has no main(), which the version before has, so it is not saved."),
    "unchecked": ("無法啟動檢查用的行程，所以沒有試載入。",
                  "No process to load it in could be started, so it was not checked."),
    "offline": ("連不上伺服器，還沒有存；文字保留在這裡。",
                "The server can't be reached. Nothing is saved; your text stays here."),
    "keys": ("Tab 與 Shift+Tab 縮排，Ctrl+S 儲存，Ctrl+Enter 測試，Esc 離開編輯器。",
             "Tab and Shift+Tab indent, Ctrl+S saves, Ctrl+Enter tries, Esc leaves the editor."),
}
TEXTS = {key: text if isinstance(text, tuple) else (text, key) for key, text in TEXTS.items()}

HELLO = '''"""Say hello, to the name in the path (/Tony) or in the query (?name=Tony)."""
from flask import escape


def main(request):
    name = request.view_args["subpath"] or request.args.get("name", "World")
    return f"Hello, {escape(name)}!"
'''

# == 16 ADMIN =============================================================
# The pages, one small view each: it gathers data, and answers it as JSON or as a page of it. Uses 01 to 15; owns no
# state. `tag` escapes whatever isn't Markup, and no HTML is put together in any other way.

PAGE_HEADERS = {  # of every page: no foreign or injected script runs, no foreign frame shows it
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src "
                               "'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin"}
LIST = "/function/list_functions"
MENU = {"Functions": LIST, "Add function": "/function/add_function", "Statistics": "/function/show_stats",
        "Logs": "/admin/logs", "Jobs": "/admin/jobs", "Queue": "/admin/queue", "Monitoring": "/monitoring/dashboard",
        "Data": "/admin/data", "Settings": "/admin/settings", "API": "/docs", "Log out": "/logout"}
_VOID, NOTE, BAD = ("input", "meta", "link"), "div.card.note", "div.card.note.bad"


def tag(kind: str, /, *children: Any, **attributes: Any) -> Markup:
    """Make an HTML element, escaping what isn't Markup: ``p.soft`` has a class, ``data_x=`` is data-x, False is left out."""
    name, _, classes = kind.partition(".")
    attributes = {"class": classes.replace(".", " ") or None, **attributes}
    shown = "".join(f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(value)}"')
                    for key, value in attributes.items() if value is not None and value is not False)
    return Markup(f"<{name}{shown}>" if name in _VOID else f"<{name}{shown}>{join(*children)}</{name}>")


def join(*parts: Any) -> Markup:
    """Put pieces of a page one after another."""
    return Markup("".join(escape(part) for part in parts if part is not None))


def link(text: Any, path: str, kind: Optional[str] = None, **query: Any) -> Markup:
    """Make a link; `kind` is its class."""
    return tag("a", text, href=quote(path) + ("?" + urlencode(query) if query else ""), class_=kind)


def form(action: str, /, *parts: Any, **hidden: Any) -> Markup:
    """Make a form that posts its parts and the hidden values."""
    kept = (tag("input", type="hidden", name=name, value=value) for name, value in hidden.items())
    return tag("form", *kept, *parts, method="post", action=action)


def field(label: str, name: str, control: str = "input", *children: Any, **attributes: Any) -> Markup:
    """Make a labelled field of a form."""
    return tag("div", tag("label", label, for_=name), tag(control, *children, id=name, name=name, **attributes))


def note(text: str, kind: str = NOTE, **attributes: Any) -> Markup:
    """Make the box that says what has happened."""
    return tag(kind, text, role="status", **attributes)


class Texts:
    """The words of one language: ``t("Save")``."""

    def __init__(self, call: Call) -> None:
        self.lang = call.app.settings.UI_LANG
        if self.lang == "auto":
            wanted = call.request.accept_languages.best_match(("en", "en-us", "en-gb", "zh-tw", "zh-hant-tw", "zh"), "zh-TW")
            self.lang = "en" if str(wanted).startswith("en") else "zh-TW"

    def __call__(self, key: str, *values: Any) -> str:
        return TEXTS.get(key, (key, key))[self.lang == "en"].format(*values)


def table(t: Texts, columns: Mapping[str, Optional[str]], rows: Iterable[Iterable[Any]], ours: bool = True) -> Markup:
    """Make a table of cells, or a note; `columns` are headings, to be translated where they are `ours`, and cells' class."""
    heads = [(t(head) if ours else head, kind) for head, kind in columns.items()]
    body = [tag("tr", *(tag("td", cell, class_=kind, data_label=head or None) for cell, (head, kind) in zip(row, heads)))
            for row in rows]
    shown = tag("table", tag("thead", tag("tr", *(tag("th", head, class_=kind) for head, kind in heads))), tag("tbody", *body))
    return tag("div.card.scroll", shown, tabindex="0") if body else note(t("nothing"))  # by key, who has no pointer


def bars(values: Sequence[Any], width: int, height: int, label: str, over: Iterable[Any] = (),
         names: Sequence[str] = ()) -> Markup:
    """Draw numbers as a small bar chart, others `over` them; `names` say what each stands for."""
    top, step = max(1, *values), width / len(values)
    drawn = [(kind, index, value) for kind, series in ((None, values), ("over", over)) for index, value in enumerate(series)]
    rects = [tag("rect", tag("title", f"{names[index]}: {value:,}") if names else None, x=f"{index * step:.1f}",
                 y=f"{height - value / top * height:.1f}", width=f"{step * .8:.1f}", height=f"{value / top * height:.1f}",
                 class_=kind) for kind, index, value in drawn if value]
    return tag("svg", tag("title", label), *rects, viewBox=f"0 0 {width} {height}", width=width, height=height, role="img",
               preserveAspectRatio="none")


def chart_card(label: str, values: Sequence[Any], spans: Iterable[range], shape: str, over: Iterable[Any] = (),
               kind: str = "div.card") -> Markup:
    """Make the box of one chart: what it shows and its maximum, the bars, the times of the minutes where it begins and ends."""
    names = [strftime(shape, localtime(span.start * 60)) for span in spans]
    return tag(kind, tag("div.soft", f"{label} · max {round(max(values), 1):,}"), bars(values, 300, 60, label, over, names),
               tag("div.ends.soft", tag("span", names[0]), tag("span", names[-1])))


def spark(history: list[dict[str, Counts]], name: str, label: str) -> Markup:
    """Draw a function's calls, and errors over them, of some spans of minutes."""
    calls, errors, _ = zip(*(found.get("/function/" + name, NOTHING) for found in history))
    return bars(calls, 120, 24, f"{label}: {sum(calls)}", errors)


def last_line(text: Optional[str]) -> str:
    """Return the last line of a traceback, which says what went wrong."""
    return (text or "").strip().rpartition("\n")[2]


def local_time(moment: Optional[float]) -> str:
    """Show a Unix time in the machine's zone."""
    return strftime("%Y-%m-%d %H:%M:%S", localtime(moment)) if moment else ""


def wants_json(call: Call) -> bool:
    """Tell whether a page is asked for as JSON: a JSON body, or JSON preferred in Accept."""
    accept = call.request.accept_mimetypes
    return call.request.is_json or accept.quality("application/json") > accept.quality("text/html")


def as_json(data: Any, status: int = 200) -> Response:
    """Answer the data of a page as JSON."""
    return Response(dump_json(data, sort_keys=False, ensure_ascii=False) + "\n", status, PAGE_HEADERS, "application/json")


def page(call: Call, title: str, *body: Any, data: Any = None, menu: bool = True, status: int = 200) -> Response:
    """Make a page: head, menu, what has just been done (``?done=saved``), body; `data` is its JSON, for who asks for that."""
    if data is not None and wants_json(call):
        return as_json(data, status)
    t, last = Texts(call), call.request.args.get("done")
    links = [tag("a", t(key), href=url, aria_current="page" if url == call.request.path else None)
             for key, url in MENU.items() if menu]
    head = tag("head", tag("meta", charset="utf-8"), tag("meta", name="viewport", content="width=device-width,initial-scale=1"),
               tag("title", f"{title} · fnserve"), tag("link", rel="icon", href="data:,"),
               tag("link", rel="stylesheet", href=f"/admin/assets/fnserve.css?v={__version__}"))
    news = note(t(last), id="done") if menu and last in ("saved", "deleted", "restored", "cleared", "accepted") else None
    content = tag("body", tag("header", tag("b", "fnserve"), *links), tag("main", tag("h1", title), news, *body),
                  tag("script", src=f"/admin/assets/fnserve.js?v={__version__}"))
    return Response(Markup("<!doctype html>\n") + tag("html", head, content, lang=t.lang), status, PAGE_HEADERS, "text/html")


def done(call: Call, message: str, url: str, status: int = 200, **data: Any) -> Response:
    """Answer that something was done: JSON with `status`, or a page by way of a redirect."""
    return as_json({"message": message, **data}, status) if wants_json(call) else redirect(url, 303)


def fields(call: Call) -> dict[str, Any]:
    """Return what was sent to a page: the JSON body, else form and query."""
    request = call.request
    return {**request.args.to_dict(), **json_fields(call)} if request.is_json else request.values.to_dict()


def json_fields(call: Call) -> dict[str, Any]:
    """Return the JSON object that was sent."""
    if isinstance(sent := call.request.json, dict):
        return sent
    raise HTTPException(400, "The JSON body must be an object")


def text_field(sent: Mapping[str, Any], name: str) -> str:
    """Return one field that must be text; a missing one is blank."""
    if not isinstance(sent.get(name, ""), str):
        raise HTTPException(400, f"{name} must be text")
    return sent.get(name, "")


def view_index(app: Any, call: Call) -> Response:
    """/ : to the list for who is logged in; else that the server runs."""
    if app.settings.ADMIN and app.signer.is_login(call.session.get("_login"), call.started):
        return redirect(LIST)
    t = Texts(call)
    return page(call, "fnserve", tag("p", t("alive")), link(t("Log in"), "/login", "button") if app.settings.ADMIN else None,
                menu=False, data={"status": "running"})


def login_page(call: Call, going_to: str, status: int, news: Optional[Markup] = None) -> Response:
    """Show the form that asks for the token."""
    t = Texts(call)
    asked = field(t("token"), "token", type="password", autocomplete="current-password", autofocus=True, required=True)
    user = tag("input", name="user", value="admin", autocomplete="username", hidden=True)  # for password managers
    shown = form("/login", user, asked, tag("p", tag("button", t("Log in"))), next=going_to)
    return page(call, t("Log in"), news, tag("div.card.narrow", shown), menu=False, status=status,
                data={"message": "登入失敗"} if news else None)


def local_path(text: str) -> str:
    """Return where to go after the login: a path on this server, nothing that a browser reads as another host."""
    return text if re.fullmatch(r"/(?![/\\])[^\x00-\x20\x7f\\]*", text) else LIST


def view_login(app: Any, call: Call) -> Response:
    """/login : the form; a right token starts a session of SESSION_HOURS."""
    sent = fields(call)
    going_to = local_path(text_field(sent, "next"))
    if call.request.method != "POST":
        return login_page(call, going_to, 200)
    if check_token(app, call, text_field(sent, "token")):
        call.session.clear()
        call.session["_login"] = app.signer.login_mark(int(call.started + app.settings.SESSION_HOURS * 3600))
        return done(call, "登入成功", going_to)
    return login_page(call, going_to, 401, note(Texts(call)("That password is wrong"), BAD))


def view_logout(app: Any, call: Call) -> Response:
    """/logout : ends the session."""
    call.session.clear()
    return done(call, "已登出", "/")


def error_page(call: Call, error: HTTPException) -> Response:
    """Answer an error to a browser on one of our own pages; the login page where a login is what is missing."""
    t, request, cross = Texts(call), call.request, error.code == 403
    if error.code == 401:
        return login_page(call, local_path(request.full_path.rstrip("?") if request.method == "GET" else ""), 401)
    return page(call, t("failed"), note(t("cross") if cross else f"{error.code} {error.description}", BAD),
                link(t("Go on"), request.path, "button") if cross else None, tag("div.soft", call.id), menu=False)


Counts = tuple[int, int, list[int]]  #: calls, errors, latency buckets for `quantile`
NOTHING: Counts = (0, 0, [0])


def read_minutes(app: Any, minutes: range, functions: str = "*", by: str = "endpoint",
                 buckets: str = "group_concat(buckets)") -> dict[Any, Counts]:
    """Return what was called within some minutes, of functions by a pattern (GLOB); * is all there is, but for streams, which
    last as long as somebody looks. `by` and `buckets` are SQL: what to group by, and NULL where no latency is asked for."""
    return {key: (calls, errors, sum_buckets(texts)) for key, calls, errors, texts in app.store.read(
        f"SELECT {by}, sum(calls), sum(errors), {buckets} FROM fn_minutes WHERE minute >= ?1 AND minute < ?2"
        " AND endpoint <> '/monitoring/stream' AND endpoint GLOB ?3 AND (?3 = '*' OR endpoint IN (SELECT '/function/' ||"
        " func_name FROM fn_functions)) GROUP BY 1", minutes.start, minutes.stop, functions)}


def sum_minutes(app: Any, minutes: range, functions: str = "*", buckets: str = "group_concat(buckets)") -> Counts:
    """Return what was called within some minutes, all in all."""
    return read_minutes(app, minutes, functions, "'all'", buckets).get("all", NOTHING)


def function_rows(app: Any) -> list[dict[str, Any]]:
    """Gather what was counted of every function; what stands in its file is for `describe_row` to add."""
    app.folder.fold()
    calls = dict(app.store.read("SELECT func_name, call_count FROM call_stats"))
    known = {row["name"]: dict(row) for row in app.store.read("SELECT func_name AS name, errors, last_call FROM fn_functions")}
    failed = {row[0]: last_line(row[1]) for row in app.store.read(
        "SELECT function, error, max(number) FROM fn_calls WHERE status >= 500 GROUP BY function")}
    broken, unknown = app.functions.versions.broken(), {"errors": 0, "last_call": None}
    return [{"name": name, "calls": calls.get(name, 0), **known.get(name, unknown), "last_error": failed.get(name),
             "reason": broken.get(name, "")} for name in app.functions.names()]


def describe_row(app: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Add what a function's file says, of which nothing is run."""
    said, modified = app.functions.describe(row["name"])
    reason = str(said.error or row["reason"])
    return {**row, "summary": said.summary, "methods": list(said.methods or METHODS), "modified": modified,
            "status": "broken" if reason else "fine", "reason": reason}


LIST_ORDERS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "name": ("Name", lambda row: 0), "calls": ("Calls", lambda row: -row["calls"]),
    "errors": ("Errors", lambda row: -row["errors"]), "last": ("Last call", lambda row: -(row["last_call"] or 0)),
    "broken": ("broken", lambda row: not row["reason"])}
LIST_ROWS = 300  # of one page; the others are found by sorting and searching


def view_list(app: Any, call: Call) -> Response:
    """/function/list_functions?q=&sort= : what there is, a folded part for each group."""
    args, rows, parts = call.request.args, function_rows(app), []
    text, order, t, minute = args.get("q", "").strip().lower(), args.get("sort", "name"), Texts(call), int(call.started) // 60
    if text or order == "broken" or wants_json(call):  # else only the rows that are shown have their files read
        rows = [row for row in (describe_row(app, row) for row in rows) if text in f"{row['name']}\n{row['summary']}".lower()]
    if wants_json(call):
        return as_json({"functions": rows})
    _, rank = LIST_ORDERS.get(order, LIST_ORDERS["name"])
    rows.sort(key=lambda row: (rank(row), row["name"]))
    first = sorted(rows[:LIST_ROWS], key=lambda row: row["name"].rpartition("/")[0])
    history = [read_minutes(app, range(at, at + 3), "/function/*", buckets="NULL") for at in range(minute - 59, minute, 3)]
    for name, found in itertools.groupby(first, lambda row: row["name"].rpartition("/")[0]):
        shown = [describe_row(app, row) for row in found]
        head, wrong = tag("summary", f"{name}/ ", tag("span.soft", len(shown))), any(row["reason"] for row in shown)
        part = list_table(t, shown, history)
        parts.append(tag("details", head, part, open=wrong or text != "") if name else part)
    search = tag("input", type="search", name="q", value=args.get("q", ""), aria_label=t("Search"), placeholder=t("Search"))
    orders = (tag("option", t(label), value=key, selected=key == order) for key, (label, _) in LIST_ORDERS.items())
    asked = tag("form.row", link(t("Add function"), MENU["Add function"], "button"), search, tag("label", t("Sort by"), tag(
        "select", *orders, name="sort")), tag("button.plain", t("Filter")), method="get", action=LIST)
    return page(call, t("Functions"), asked, *(parts or [note(t("nothing"))]),
                note(t("first_rows", LIST_ROWS)) if len(rows) > LIST_ROWS else None)


def list_table(t: Texts, rows: list[dict[str, Any]], history: list[dict[str, Counts]]) -> Markup:
    """Show functions: what is said and was counted of each, and what can be done with it."""
    columns = {"Name": None, "Calls": "n", "Errors": "n", "Last call": "n soft wide", "Last hour": "wide", "Status": None}
    cells = []
    for row in rows:
        name, failed = row["name"], row["last_error"]
        last = link((failed or "")[:200], "/admin/logs", "bad", function=name, status="5xx")
        about = join(link(name, "/function/edit_function", module_name=name), tag("div.soft", row["summary"]),
                     tag("div.soft", last) if failed and failed != row["reason"] else None, function_links(t, name))
        status = tag("span.bad" if row["reason"] else "span.good", t(row["status"]), tag("div.soft", row["reason"]))
        cells.append((about, f"{row['calls']:,}", tag("span.bad" if row["errors"] else "span", f"{row['errors']:,}"),
                      local_time(row["last_call"]), spark(history, name, t("Last hour")), status))
    return table(t, columns, cells)


def function_links(t: Texts, name: str) -> Markup:
    """Link to what can be done with one function."""
    return tag("div.row.soft", tag("a", t("Run"), href=f"/function/{quote(name)}", target="_blank", rel="noopener"),
               link(t("Edit"), "/function/edit_function", module_name=name), link(t("Logs"), "/admin/logs", function=name),
               link(t("Versions"), "/admin/versions", module_name=name),
               link(t("Delete"), "/function/delete_function", "bad", module_name=name))


def read_current(app: Any, name: str) -> tuple[bytes, int]:
    """Return the source that a function's file holds now, and the number it is kept under; 404 where there is no file."""
    if not app.functions.exists(name):
        raise not_found(name)
    source = read_source(app.functions.path(name))
    return source, app.functions.versions.remember(name, source, loaded=False)


def python_command(call: str, *arguments: str) -> list[str]:
    """Return the command line that imports this file as the module fnserve, whatever it is called, and makes a call."""
    path = os.path.realpath(__file__)
    boot = (f"import sys, importlib.util as util; sys.path[0] = {os.path.dirname(path)!r};"
            f" spec = util.spec_from_file_location('fnserve', {path!r}); found = util.module_from_spec(spec);"
            f" sys.modules['fnserve'] = found; spec.loader.exec_module(found); sys.exit(found.{call})")
    return [sys.executable, *(["-B"] if sys.dont_write_bytecode else []), "-c", boot, *arguments]


LOAD_SECONDS, START_SECONDS, MOST_PRINTED = 5.0, 20.0, 1024 * 1024


def try_out(app: Any, t: Texts, name: str, source: bytes, seconds: float,
            request: Optional[dict[str, Any]] = None) -> dict[str, Any]:
    """Load code in a process of its own, `request` makes a call of it; whatever the code does, only that process ends. Return
    what `try_in_child` found and "output", or "error" and "line" where it did not live to tell; {} where none can start."""
    if not app.trials.acquire(timeout=1):  # no longer: who waits has a thread
        raise HTTPException(503, "There are trials enough under way", [("Retry-After", "5")])
    job = {"name": name, "source": source.decode("utf-8", "surrogateescape"), "seconds": seconds, "request": request,
           "options": app.settings.options, "directory": app.settings.directory}
    app.config.current()  # os.environ is the child's too
    try:
        return read_trial(t, app.functions.path(name), *run_child(json.dumps(job).encode(), seconds + START_SECONDS))
    except OSError as error:
        log.warning("%s: no process to try it in could be started: %s", name, error)
        return {}
    finally:
        app.trials.release()


def run_child(job: bytes, seconds: float) -> tuple[int, bytes, bytes]:
    """Return status, answer and output of `try_in_child`, run between files, which unlike pipes none it leaves holds open."""
    import subprocess
    from tempfile import TemporaryFile
    if "python" not in os.path.basename(sys.executable or "").lower():  # uWSGI says that it is the interpreter
        raise OSError("this Python does not know its own program")
    with TemporaryFile() as given, TemporaryFile() as answer, TemporaryFile() as output:
        given.write(job)
        given.seek(0)
        process = subprocess.Popen(python_command("try_in_child()"), stdin=given, stdout=answer, stderr=output,
                                   start_new_session=True)
        until = monotonic() + seconds
        while process.poll() is None:
            if monotonic() > until or os.fstat(output.fileno()).st_size > MOST_PRINTED:
                process.kill()
            sleep(.005)
        with contextlib.suppress(OSError, AttributeError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started ends with it
        answer.seek(0)
        output.seek(0)
        return process.returncode, answer.read(), output.read(MOST_PRINTED)


def read_trial(t: Texts, path: str, status: int, answer: bytes, output: bytes) -> dict[str, Any]:
    """Make of a child's answer, or of its end without one, what `try_out` returns."""
    text, found = output.decode("utf-8", "replace"), None  # type: str, Any
    if not answer:  # not even the blank that says it is there
        raise OSError(text[-500:])
    with contextlib.suppress(ValueError):  # nothing, or something that the code itself wrote there
        found = json.loads(answer)
    if not isinstance(found, dict):
        crash = re.search(r"^(Timeout \(|Fatal Python error)", text, re.M)  # what faulthandler writes, at the end
        trace = text[crash.start():] if crash else ""
        late, place = trace.startswith("Timeout"), re.search(rf'File "{re.escape(path)}", line (\d+)', trace)
        end = signal.Signals(-status).name if status < 0 else f"status {status}"
        why = t("too_long" if late else "too_much" if len(output) >= MOST_PRINTED else "ended", end)
        found = {"error": why, "line": int(place[1]) if place else 0, "status": 504 if late else None}
    dropped, half = len(text) - OUTPUT_BYTES, OUTPUT_BYTES // 2
    shown = f"{text[:half]}\n... {dropped} more characters\n{text[-half:]}" if dropped > 0 else text
    return {**found, "output": shown}


def swap_in(app: Any, t: Texts, name: str, source: bytes, fresh: bool, seen: str = "") -> int:
    """Make `source` the file of a function, all at once whoever else saves; return the number of the version. HTTPException
    409 where it exists and is meant to be `fresh`, or where somebody has saved since the version `seen`."""
    path, versions = app.functions.path(name), app.functions.versions
    try:
        with app.store.write() as connection:
            there = os.path.isfile(path)
            if fresh and there:
                raise HTTPException(409, t("exists"))
            newest = versions.add(connection, name, read_source(path), False) if there else 0
            if fresh or seen in ("", str(newest)):
                app.functions.save(name, source)
                return versions.add(connection, name, source, loaded=False)
    except OSError as error:
        raise HTTPException(500, f"{path}: {error.strerror}") from None
    except sqlite3.Error as error:
        raise HTTPException(503, f"The database can't be written to: {error}") from None
    raise HTTPException(409, t("stale"), version=newest)


def save_code(app: Any, t: Texts, name: str, source: bytes, fresh: bool, force: Any, seen: str = "") -> dict[str, Any]:
    """Load code on trial, unless by `force`, make it the file of a function, and say in a few words what it serves, with
    warnings; HTTPException 400 where it can't be served, and what is no Python is never saved."""
    try:
        compile_source(source, app.functions.path(name))
    except LoadError as error:
        why = error.message if source.strip() else t("no_code")
        raise HTTPException(400, why, line=error.line, column=error.column) from None
    found = {} if force else try_out(app, t, name, source, LOAD_SECONDS)
    wrong, line = found.pop("error", ""), found.pop("line", 0)
    if not wrong and found and not found["entries"] and app.functions.versions.last_good(name):
        wrong = t("lost_main")
    if wrong:
        raise HTTPException(400, wrong, line=line, column=0, output=found["output"], can_force=True)
    warnings = {"forced": force, "unchecked": not found and not force, "no_main": found.get("entries") == [],
                "admin_only": is_protected(name, app.protected)}
    check = {"entries": [], "settings": {}, "output": "", **found, "warnings": [t(key) for key in warnings if warnings[key]]}
    version = swap_in(app, t, name, source, fresh, seen)
    entries, settings = (", ".join(map(str, check[key])) for key in ("entries", "settings"))
    said = (t("saved_as", version), entries and t("serves", entries), settings and f"SETTINGS: {settings}.", *check["warnings"])
    return {"message": " ".join(filter(None, said)), "module_name": name, "version": version, "check": check}


def editor_page(call: Call, name: str, code: str, original: Optional[str] = None, version: Any = "",
                wrong: Mapping[str, Any] = types.MappingProxyType({}), status: int = 200) -> Response:
    """Show the editor: of a new function where there is no `original`, with what is `wrong` and the text that caused it. The
    draft, and the buttons that only an error calls for, are hidden, for the script to show."""
    t = Texts(call)
    draft = tag("div.card.note", t("draft"), " ", tag("button.plain", t("Discard"), type="button"), id="draft", hidden=True)
    text = tag("textarea.code", "\n" + code, id="code", name="code", spellcheck="false", wrap="off", autocapitalize="off",
               autocomplete="off", aria_describedby="keys", data_line=wrong.get("line") or None)
    shown = form("/function/save_function" if original is None else "/function/update_function",
                 field(t("Name"), "module_name", value=name, required=True, autocapitalize="off", autofocus=not name,
                       placeholder="hello"), tag("label", t("Code"), for_="code"),
                 tag("div.editor", tag("pre.gutter", aria_hidden="true"), text),
                 note(wrong.get("message", ""), BAD, id="news", hidden=not wrong),
                 editor_buttons(t, name, wrong), tag("p.soft", t("keys"), id="keys"),
                 function_links(t, original) if original else None, original_name=original or "", version=version)
    return page(call, t("Add function" if original is None else "Edit"), draft, tag(
        "div.beside", tag("div.card", shown), try_panel(t), id="edit", data_offline=t("offline")), status=status,
        data={"module_name": name, "code": code, "version": version} if status == 200 else wrong)


def editor_buttons(t: Texts, name: str, wrong: Mapping[str, Any]) -> Markup:
    """Make the buttons below the code."""
    theirs = wrong.get("version")
    see = tag("a.button.plain", t("See theirs"), id="theirs", target="_blank", hidden=not theirs,
              href=f"/admin/versions?module_name={quote(name)}&version={theirs}")
    anyway = tag("label", tag("input", type="checkbox", name="force", value="1"), " ", t("Save anyway"), id="anyway",
                 hidden=not wrong.get("can_force"))
    steps = (tag("button.plain", sign, type="button", data_key=key.lower(), aria_label=t(key), title=t(key))
             for key, sign in (("Outdent", "⇤"), ("Indent", "⇥")))
    return tag("p.row", tag("button", t("Save")), anyway, see, *steps, link(t("Cancel"), LIST, "button plain"))


def error_text(t: Texts, error: HTTPException) -> str:
    """Say what kept code from being saved, and where."""
    line = error.body.get("line")
    return (t("line", line) + ": " if line else "") + str(error.description)


def try_panel(t: Texts) -> Markup:
    """Make the form beside the editor that calls the function; the script sends it to /admin/try."""
    def select(label: str, name: str, **values: str) -> Markup:
        return field(label, name, "select", *(tag("option", text, value=value) for value, text in values.items()))
    shown = (tag("div", tag("h3", t(key)), tag("pre", id="a_" + key.lower(), tabindex="0", aria_label=t(key)), hidden=True)
             for key in ("Error", "Body", "Output", "Headers"))
    return tag(
        "form.card", tag("h2", t("Try")), select(t("Earlier requests"), "past"),
        tag("div.row", select(t("Method"), "method", **dict(zip(METHODS, METHODS))),
            select(t("Code"), "which", editor=t("in the editor"), saved=t("as saved"))),
        tag("div.row", field(t("Subpath"), "subpath", autocapitalize="off"),
            field(t("Query"), "query", placeholder="name=Tony&n=1")),
        field(t("Headers"), "headers", "textarea", rows="1", placeholder="X-Name: value", spellcheck="false"),
        select(t("Body"), "kind", json="JSON", form=t("form"), raw=t("raw")),
        field(t("Content"), "content", "textarea", rows="3", spellcheck="false"), field(t("File"), "file", type="file"),
        tag("p", tag("button", t("Run")), " ", tag("span", id="outcome", role="status")),
        *shown, id="try")


def view_save(app: Any, call: Call) -> Response:
    """/function/add_function, save_function, update_function : an empty form; POST saves, as new by another original_name."""
    if call.request.method != "POST":
        return editor_page(call, "", HELLO)
    t, sent = Texts(call), fields(call)
    name, code = text_field(sent, "module_name").strip(), text_field(sent, "code")
    seen = str(sent.get("version") or "")
    original = (text_field(sent, "original_name") or name) if call.request.path == "/function/update_function" else None
    fresh = name != original
    try:
        if fresh and (not valid_name(name) or name in app.reserved):
            raise HTTPException(400, t("bad_name"))
        if fresh and (hider := app.functions.hider(name)):
            raise HTTPException(400, t("hidden", hider))
        if fresh and app.functions.exists(name):
            raise HTTPException(409, t("exists"))
        if not fresh:
            read_current(app, name)
        saved = save_code(app, t, name, encode_source(code.replace("\r\n", "\n")), fresh, sent.get("force"), seen)
    except HTTPException as error:
        wrong = {"line": 0, "column": 0, **error.body, "message": error_text(t, error), "request_id": call.id}
        return editor_page(call, name, code, original, error.body.get("version", seen), wrong, error.code)
    url = f"/function/edit_function?module_name={quote(name)}&done=saved"
    return done(call, url=url, status=201 if fresh else 200, **saved)


def view_try(app: Any, call: Call) -> Response:
    """/admin/try : POST {module_name, [code,] method, subpath, query, headers, body or body_base64} calls code on trial."""
    t, sent = Texts(call), fields(call)
    name, method = text_field(sent, "module_name").strip() or "untitled", text_field(sent, "method") or "GET"
    headers, body = sent.get("headers") or {}, text_field(sent, "body").encode("utf-8", "surrogatepass")
    if not valid_name(name):
        raise HTTPException(400, t("bad_name"))
    if not isinstance(headers, dict) or method not in METHODS:
        raise HTTPException(400, "headers must be an object, method one of " + ", ".join(METHODS))
    source = encode_source(text_field(sent, "code")) if "code" in sent else read_current(app, name)[0]
    try:
        body = a2b_base64(text_field(sent, "body_base64")) or body
    except ValueError as error:
        raise HTTPException(400, f"body_base64: {error}") from None
    found = try_out(app, t, name, source, app.settings.TIMEOUT, {
        "method": method, "subpath": text_field(sent, "subpath"), "query": text_field(sent, "query"), "headers": headers,
        "host": call.request.host, "body": b2a_base64(body, newline=False).decode()})
    if not found:
        raise HTTPException(503, t("unchecked"))
    return as_json({"headers": [], "body": "", "ms": 0, "line": 0, **found})


def view_edit(app: Any, call: Call) -> Response:
    """/function/edit_function?module_name= : the code and its version."""
    name = call.request.args.get("module_name", "")
    (source, version), reason = read_current(app, name), app.functions.versions.broken().get(name)
    return editor_page(call, name, decode_source(source), name, version, {"message": reason} if reason else {})


def ask(call: Call, title: str, text: str, **hidden: Any) -> Response:
    """Show a page that asks before something is done."""
    buttons = tag("p.row", tag("button.danger", title), link(Texts(call)("Cancel"), LIST, "button plain"))
    asked = tag("div.card", form(call.request.path, tag("p", text), buttons, **hidden))
    return page(call, title, asked, data={"message": text, **hidden})


def view_delete(app: Any, call: Call) -> Response:
    """/function/delete_function?module_name= : GET asks, POST and DELETE delete; the versions stay."""
    t, name = Texts(call), text_field(fields(call), "module_name")
    read_current(app, name)
    if call.request.method in ("GET", "HEAD"):
        return ask(call, t("Delete"), t("ask_delete", name), module_name=name)
    os.unlink(app.functions.path(name))
    app.functions.versions.forget(name)
    return done(call, "deleted", LIST + "?done=deleted", module_name=name)


def stats_rows(app: Any, now: float) -> list[dict[str, Any]]:
    """Gather counts, errors and latencies of every function that was called."""
    app.folder.fold()
    errors = dict(app.store.read("SELECT func_name, errors FROM fn_functions"))
    today = read_minutes(app, range(int(now) // 60 - 1439, int(now) // 60 + 1), "/function/*")
    return [{"name": name, "calls": count, "errors": errors.get(name, 0),
             **{key: quantile(today.get("/function/" + name, NOTHING)[2], q) for key, q in (("p50", .5), ("p95", .95))}}
            for name, count in app.store.read("SELECT func_name, call_count FROM call_stats ORDER BY call_count DESC")]


def view_stats(app: Any, call: Call) -> Response:
    """/function/show_stats?function= : how often each function was called, exactly, and charts of all or of one."""
    rows, args = stats_rows(app, call.started), call.request.args
    if wants_json(call):
        return as_json({"stats": {row["name"]: row["calls"] for row in rows}})
    t, one = Texts(call), args.get("function")
    year, month, today = localtime(call.started)[:3]
    edges = [int(mktime((year, month, today - back, 0, 0, 0, 0, 0, -1))) // 60
             for back in range(min(app.settings.KEEP_DAYS, 31), -2, -1)]
    days = [range(*pair) for pair in zip(edges, edges[1:])]
    history = [read_minutes(app, day, "/function/*", buckets="NULL") for day in days]
    shown = table(t, {"Function": None, "Calls": "n", "Errors": "n", "p50": "n", "p95": "n", "by_day": "wide"}, (
        (link(row["name"], "/function/show_stats", function=row["name"]), f"{row['calls']:,}", f"{row['errors']:,}",
         *(milliseconds(row[key]) for key in ("p50", "p95")), spark(history, row["name"], t("by_day")))
        for row in rows[:LIST_ROWS]))
    charts = stats_charts(app, t, int(call.started) // 3600, f"/function/{one or '*'}", days)
    more = note(t("first_rows", LIST_ROWS)) if len(rows) > LIST_ROWS else None
    return page(call, t("Statistics") + (f": {one}" if one else ""), charts, shown, more,
                tag("p", link(t("Clear statistics"), "/function/clear_stats", "button plain")))


def stats_charts(app: Any, t: Texts, hour: int, functions: str, days: list[range]) -> Markup:
    """Draw calls by day and by hour with errors over them, and p95 with p50 over it, of functions by a pattern."""
    hours = [range(at * 60, at * 60 + 60) for at in range(hour - 23, hour + 1)]
    calls, errors, _ = zip(*(sum_minutes(app, day, functions, "NULL") for day in days))
    hourly, hourly_errors, latency = zip(*(sum_minutes(app, span, functions) for span in hours))
    high, low = ([round(quantile(buckets, q) * 1000, 1) for buckets in latency] for q in (.95, .5))
    return tag("div.charts", chart_card(t("by_day"), calls, days, "%m-%d", errors),
               chart_card(t("Calls by hour, one day"), hourly, hours, "%H:%M", hourly_errors),
               chart_card(t("latency"), high, hours, "%H:%M", low, "div.card.calm"))


def view_clear(app: Any, call: Call) -> Response:
    """/function/clear_stats : GET asks, POST clears what was counted until now."""
    def clear(connection: sqlite3.Connection) -> None:
        for name in ("call_stats", "fn_functions", "fn_minutes"):
            connection.execute(f"DELETE FROM {name}")
    if call.request.method in ("GET", "HEAD"):
        t = Texts(call)
        return ask(call, t("Clear statistics"), t("ask_clear"))
    app.folder.fold(within=clear)
    return done(call, "cleared", "/function/show_stats?done=cleared")


def read_calls(app: Any, function: str = "", status: str = "", text: str = "", limit: int = 100,
               after: int = 0) -> list[dict[str, Any]]:
    """Return the last calls, newest first, or those that follow number `after`; `status` is 404 or 4xx, `text` occurs in
    path, output or traceback."""
    app.folder.fold()
    wanted = {"number > ?": after, **{condition: value for condition, value in (
        ("function = ?", function), ("status LIKE ?", status.lower().replace("x", "_")),
        ("instr(path || char(10) || ifnull(output, '') || char(10) || ifnull(error, '') || id, ?)", text)) if value}}
    rows = app.store.read(
        "SELECT id, time, function, method, path, status, us / 1000.0 AS ms, trigger, attempt, output, error, number"
        f" FROM fn_calls WHERE {' AND '.join(wanted)} ORDER BY number {'' if after else 'DESC'} LIMIT ?",
        *wanted.values(), limit)
    return [dict(row) for row in (reversed(rows) if after else rows)]


def view_logs(app: Any, call: Call) -> Response:
    """/admin/logs?function=&status=&q=&limit=&after= : the last calls, with what they printed and why they failed."""
    args, after = call.request.args, call.request.args.get("after", "0")
    if not re.fullmatch(r"\d{1,15}", after, re.A):  # the id of a call; of one that isn't kept any more all that are kept follow
        after = dict(app.store.read("SELECT id, number FROM fn_calls WHERE id = ?", after)).get(after, 0)
    rows = read_calls(app, args.get("function", ""), args.get("status", ""), args.get("q", ""),
                      max(1, min(1000, args.get("limit", 100, type=int))), int(after))
    t, columns = Texts(call), {"Time": "soft time", "Function": None, "Request": "break", "Status": None, "Took": "n"}
    asked = (tag("label", t(label), tag("input", name=name, value=args.get(name, ""))) for name, label in (
        ("function", "Function"), ("status", "Status"), ("q", "Text")))
    follow = tag("label", tag("input", type="checkbox", name="follow", value="1", checked="follow" in args), t("Follow"))
    filters = tag("form.card.row", *asked, follow, tag("button", t("Filter")), method="get", action="/admin/logs")
    shown = table(t, columns, ((
        local_time(row["time"]), row["function"], join(
            f"{row['method']} {row['path']}", *(tag("pre", row[key]) for key in ("output", "error") if row[key]),
            tag("div.soft", row["id"])),
        tag("span.bad" if row["status"] >= 500 else "span", row["status"]), f"{row['ms']:.1f} ms") for row in rows))
    response = page(call, t("Logs"), filters, shown, data={"invocations": rows})
    if "follow" in args:
        response.headers["Refresh"] = "3"
    return response


def read_version(app: Any, name: str, number: str) -> tuple[bytes, bytes, bytes]:
    """Return the source of a version, that of the one before and of the newest; 404 where it isn't kept."""
    kept = {str(version): bytes(source) for version, source in app.store.read(
        "SELECT version, source FROM fn_versions WHERE func_name = ? ORDER BY version DESC", name)}
    if number not in kept:
        raise HTTPException(404, f'Version {number[:20]} of "{name[:100]}" not found')
    older = [source for version, source in kept.items() if int(version) < int(number)]
    return kept[number], older[0] if older else b"", next(iter(kept.values()))


def view_versions(app: Any, call: Call) -> Response:
    """/admin/versions?module_name=[&version=] : what was saved, the newest first."""
    if "version" in call.request.args:
        return view_version(app, call)
    t, name = Texts(call), call.request.args["module_name"]
    now = read_source(app.functions.path(name)) if app.functions.exists(name) else None
    rows = [{"version": version, "saved_at": moment, "size": size, "current": bool(same) and not at, "rolled_back": loaded < 0}
            for at, (version, moment, size, loaded, same) in enumerate(app.store.read(
                "SELECT version, saved_at, length(source), loaded, source = ? FROM fn_versions WHERE func_name = ?"
                " ORDER BY version DESC LIMIT ?", now, name, KEEP_VERSIONS))]
    shown = table(t, {"Version": None, "Time": None, "Size": "n", "Status": None, "": None}, ((
        link(f"#{row['version']}", "/admin/versions", module_name=name, version=row["version"]), local_time(row["saved_at"]),
        row["size"], tag("span.good", t("current")) if row["current"] else
        tag("span.bad", t("failed, rolled back")) if row["rolled_back"] else "",
        None if row["current"] else link(t("Restore"), "/admin/restore", "button plain", module_name=name,
                                         version=row["version"])) for row in rows))
    edit = tag("p", link(t("Edit"), "/function/edit_function", "button", module_name=name)) if now is not None else None
    return page(call, f"{t('Versions')}: {name}", edit, shown, data={"versions": rows})


def view_version(app: Any, call: Call) -> Response:
    """Show one version, its difference to the one before and to what is current."""
    t, name, number = Texts(call), call.request.args["module_name"], call.request.args["version"]
    code, before, newest = (source.decode("utf-8", "replace") for source in read_version(app, name, number))
    if wants_json(call):
        return as_json({"module_name": name, "version": int(number), "code": code})
    every = link(t("Versions"), "/admin/versions", "button plain", module_name=name)
    restore = link(t("Restore"), "/admin/restore", "button", module_name=name, version=number)
    return page(call, f"{name} #{number}", tag("p.row", every, restore if newest != code else None),
                show_diff(t("diff"), before, code), show_diff(t("changes"), code, newest) if newest != code else None,
                tag("div.card", tag("h2", t("Code")), tag("pre", code, tabindex="0")))


def show_diff(title: str, old: str, new: str) -> Markup:
    """Show what has changed, line by line, with three lines around it."""
    import difflib  # only on this page
    lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=3))[2:]
    kinds = {"+": "ins", "-": "del", "@": "b"}
    shown = (tag(kinds.get(line[0], "span"), line + ("" if line[0] in "+-" else "\n")) for line in lines)
    return tag("div.card", tag("h2", title), tag("pre", *shown, tabindex="0"))


def view_restore(app: Any, call: Call) -> Response:
    """/admin/restore : GET asks, POST makes an old version the file again, checked as a save is; it becomes the newest."""
    t, sent = Texts(call), fields(call)
    name, number = text_field(sent, "module_name"), str(sent.get("version", ""))
    if not valid_name(name) or not number:
        raise HTTPException(400, "module_name and version are needed")
    source, title = read_version(app, name, number)[0], t("ask_restore", name, number)
    if call.request.method in ("GET", "HEAD"):
        return ask(call, t("Restore"), title, module_name=name, version=number)
    try:
        saved = save_code(app, t, name, source, False, sent.get("force"))
    except HTTPException as error:
        if wants_json(call) or "can_force" not in error.body:
            raise
        return ask(call, t("Save anyway"), f"{error_text(t, error)} {title}", module_name=name, version=number, force="1")
    return done(call, url=f"/admin/versions?module_name={quote(name)}&done=restored", **saved)


def view_health(app: Any, call: Call) -> Response:
    """/health : 200 or 503, and what was checked."""
    status, checks = check_health(app)
    broken = len(app.functions.versions.broken()) if checks["database"] == "ok" else 0
    return as_json({"status": status, "checks": checks, "broken_functions": broken}, 200 if status == "healthy" else 503)


def view_metrics(app: Any, call: Call) -> Response:
    """/metrics : Prometheus text, or OpenMetrics by Accept; with METRICS_TOKEN only for who holds it."""
    given = call.request.authorization
    if app.settings.METRICS_TOKEN and not (given and same_secret(given.token or "", app.settings.METRICS_TOKEN)):
        raise HTTPException(401, "METRICS_TOKEN is needed", [("WWW-Authenticate", "Bearer")])
    newer = "application/openmetrics-text" in call.request.headers.get("Accept", "")
    kind = "application/openmetrics-text; version=1.0.0; charset=utf-8" if newer else "text/plain; version=0.0.4; charset=utf-8"
    return Response(write_metrics(collect_metrics(app), newer), content_type=kind)


def view_monitoring(app: Any, call: Call) -> Response:
    """/monitoring/health : the figures of all workers, and of the last minutes."""
    return as_json({"status": check_health(app)[0], "system_metrics": app.load.figures(app.clock()),
                    **recent_figures(app, app.clock())})


def recent_figures(app: Any, now: float) -> dict[str, Any]:
    """Gather the rates and latency of the last five minutes, the slowest endpoints of the hour, the last errors."""
    app.folder.fold()
    minute = int(now) // 60
    calls, errors, buckets = sum_minutes(app, range(minute - 4, minute + 1))
    hour = read_minutes(app, range(minute - 59, minute + 1)).items()
    slow = sorted(((quantile(found, .95), name) for name, (_, _, found) in hour), reverse=True)
    last = app.store.read("SELECT id, time, function, status, error FROM fn_calls WHERE status >= 500"
                          " AND function <> '/monitoring/stream' ORDER BY number DESC LIMIT 5")
    return {"requests_per_second": round(calls / (240 + now % 60), 2), "error_rate": round(errors / calls, 4) if calls else 0.0,
            "p50_ms": round(quantile(buckets, .5) * 1000, 1), "p95_ms": round(quantile(buckets, .95) * 1000, 1),
            "slowest": [{"endpoint": name, "p95_ms": round(value * 1000, 1)} for value, name in slow[:5]],
            "last_errors": [dict(row) for row in last]}


FIGURES = {  # what the dashboard shows of `figures` and `recent_figures`: its name and unit
    "status": ("Status", ""), "cpu_percent": ("CPU", " %"), "memory_rss_mb": ("Memory", " MB"),
    "memory_percent": ("Memory", " %"), "threads": ("Threads", ""), "uptime_seconds": ("Uptime", " s"),
    "workers": ("Processes", ""), "requests_per_second": ("Requests/s", ""), "error_rate": ("Error rate", ""),
    "p50_ms": ("p50", " ms"), "p95_ms": ("p95", " ms")}


def dashboard(app: Any, t: Texts) -> Markup:
    """Make what the dashboard shows and its stream sends anew: figures, charts of the hour and the day, slow and failing."""
    now, minute = app.clock(), int(app.clock()) // 60
    recent = recent_figures(app, now)
    wrong = ", ".join(f"{name}: {value}" for name, value in check_health(app)[1].items() if value != "ok")
    found = {"status": wrong or t("fine"), **app.load.figures(now), **recent, "error_rate": f"{recent['error_rate']:.2%}"}
    boxes = (tag("div.card", tag("div.soft", t(label)),
                 tag("b.bad" if wrong and name == "status" else "b", f"{found[name]}{unit}"))
             for name, (label, unit) in FIGURES.items())
    slow = table(t, {"Endpoint": None, "p95": "n"}, (row.values() for row in recent["slowest"]))
    last = table(t, {"Time": "soft time", "Function": None, "Error": "break"}, (
        (local_time(row["time"]), row["function"], last_line(row["error"])) for row in recent["last_errors"]))
    charts = (*dashboard_charts(app, t, [range(at, at + 1) for at in range(minute - 59, minute + 1)], t("Last hour")),
              *dashboard_charts(app, t, [range(at, at + 24) for at in range(minute - 1439, minute + 1, 24)], t("one day")))
    return join(tag("div.row.figures", *boxes), tag("div.charts", *charts), tag("h2", t("Slowest")), slow,
                tag("h2", t("Last errors")), last)


def dashboard_charts(app: Any, t: Texts, spans: list[range], title: str) -> Iterator[Markup]:
    """Draw calls, errors, p95, memory and CPU of some spans of minutes."""
    rows = []
    for span in spans:
        calls, errors, buckets = sum_minutes(app, span)
        sample = app.store.read("SELECT ifnull(max(memory_rss_mb), 0), ifnull(max(cpu_percent), 0) FROM fn_samples"
                                " WHERE minute >= ? AND minute < ?", span.start, span.stop)[0]
        rows.append((calls, errors, round(quantile(buckets, .95) * 1000, 1), *sample))
    for name, values in zip(("Calls", "Errors", "p95 (ms)", "Memory", "CPU"), zip(*rows)):
        yield chart_card(f"{t(name)}, {title}", values, spans, "%H:%M")


def view_dashboard(app: Any, call: Call) -> Response:
    """/monitoring/dashboard : the page; /monitoring/stream keeps it up."""
    t = Texts(call)
    if call.request.args.get("part"):  # for viewers beyond MOST_VIEWERS, who poll
        return Response(dashboard(app, t), headers=PAGE_HEADERS)
    button = tag("button.plain", t("Stop"), id="live", data_start=t("Go live"), data_stop=t("Stop"))
    return page(call, t("Monitoring"), tag("p", button), tag("div", dashboard(app, t), id="dashboard"))


MOST_VIEWERS, STREAM_SECONDS = 2, 2.0


def view_stream(app: Any, call: Call) -> Response:
    """/monitoring/stream : the dashboard as server-sent events every two seconds; each viewer holds a thread, so few may."""
    if not app.viewers.acquire(blocking=False):
        raise HTTPException(503, "There are viewers enough; poll instead", [("Retry-After", "5")])

    def events() -> Iterator[str]:
        try:
            while not app.background.stopping.is_set():
                yield f"data: {json.dumps({'html': dashboard(app, Texts(call))})}\n\n"
                app.background.stopping.wait(STREAM_SECONDS)
        finally:
            app.viewers.release()
    return Response(events(), headers={**PAGE_HEADERS, "Content-Type": "text/event-stream"})


def view_invocation(app: Any, call: Call) -> Response:
    """/invocations/<id> : state and result of a queued call, for whoever holds its id."""
    row = app.queue.get(call.request.path.rpartition("/")[2])
    if row is None:
        raise HTTPException(404, "There is no such call; results are kept for a day")
    failed = row["state"] == "dead" or row["status"] is not None and row["status"] >= 500  # why is for the admin
    shown = FAILED[1] if failed else ANSWER_CUT if row["error"] == ANSWER_CUT else None
    return as_json({"id": row["id"], "function": row["function"], "state": row["state"], "attempts": row["attempts"],
                    "status": row["status"], "headers": json.loads(row["headers"] or "null"),
                    **shown_body("body", row["answer"]), "error": shown})


def shown_body(name: str, data: Optional[bytes]) -> dict[str, Any]:
    """Return bytes as JSON can hold them: ``body``, or ``body_base64`` where they are no text."""
    with contextlib.suppress(UnicodeDecodeError):
        return {name: None if data is None else bytes(data).decode()}
    return {name + "_base64": b2a_base64(data or b"", newline=False).decode()}


def view_scheduler(app: Any, call: Call) -> Response:
    """/scheduler : whether this machine runs the schedule."""
    return as_json({"current_host": socket.gethostname(), "allowed_hosts": list(app.settings.SCHEDULER_ALLOWED_HOSTS),
                    "running": app.runs_schedule})


def view_jobs(app: Any, call: Call) -> Response:
    """/scheduler/jobs, /scheduler/jobs/<id>[/pause, /resume, /run] : Flask-APScheduler's REST API."""
    found = re.fullmatch(r"/scheduler/jobs(?:/(.*?)(?:/(pause|resume|run))?)?", call.request.path, re.S)
    if not found:
        raise HTTPException(404, "Not found")
    number, action = found.groups()
    allowed = ("POST",) if action else ("GET", "HEAD", "PATCH", "DELETE") if number else ("GET", "HEAD", "POST")
    if call.request.method not in allowed:
        raise HTTPException(405, headers=[("Allow", ", ".join(allowed))])
    try:
        if not action:
            return answer_job(app, call, number)
        if action == "run":
            app.put(app.schedule.call(app.schedule.get(number)))
        row = app.schedule.get(number) if action == "run" else app.schedule.pause(number, action == "pause")
    except TriggerError as error:
        raise HTTPException(400, str(error), field=error.field) from None
    if "html" in call.request.headers.get("Accept", ""):  # a form of the page
        return redirect("/admin/jobs?done=accepted", 303)
    return as_json(app.schedule.show(row))


def answer_job(app: Any, call: Call, number: str) -> Response:
    """Show, make, change or delete a job, whose function or callable must be there; show all where there is no `number`."""
    schedule, method = app.schedule, call.request.method
    if method in ("PATCH", "DELETE") and schedule.get(number)["source"] == "code":
        raise HTTPException(409, f"This job comes from SETTINGS in {number}.py: change it there, or pause it")
    if method == "DELETE":
        schedule.remove(number)
        return Response(status=204)
    if method in ("GET", "HEAD"):
        return as_json(schedule.show(schedule.get(number)) if number else [schedule.show(row) for row in schedule.jobs()])
    sent = json_fields(call)
    if found := FUNC.fullmatch(sent["func"]) if isinstance(sent.get("func"), str) else None:  # the form Schedule checks
        function = app.functions.get(found[1])
        module = function.code.module if function is not None and function.code is not None else None
        if function is None or found[2] and not callable(getattr(module, found[2], None)):
            raise TriggerError("func", f"there is no {found[0]}")
    return as_json(schedule.show(schedule.change(number, sent) if number else schedule.add(sent)))


def view_admin_jobs(app: Any, call: Call) -> Response:
    """/admin/jobs : the jobs, when they fire next, and what became of their runs."""
    t, jobs = Texts(call), [app.schedule.show(row) for row in app.schedule.jobs()]
    if wants_json(call):
        return as_json(jobs)
    last = {job: f"{t(state)} {status or ''}" for job, state, status, _ in app.store.read(
        "SELECT job, state, status, max(created) FROM fn_queue WHERE job IS NOT NULL GROUP BY job")}
    columns = {"Name": None, "Schedule": "soft", "Next run": None, "Last run": None,
               **{name.capitalize(): "n" for name in JOB_COUNTS}, "": None}
    shown = table(t, columns, ((
        join(job["id"], tag("div.soft", job["func"])),
        join(job["trigger"], *(tag("div", f"{name} = {job[name]}") for name in job if name in TRIGGER_FIELDS[job["trigger"]])),
        t("paused") if job["paused"] else (job["next_run_time"] or t("never")).replace("T", " ").partition(".")[0],
        link(last[job["id"]], "/admin/queue", job=job["id"]) if job["id"] in last else None,
        *(job[name] for name in JOB_COUNTS),
        tag("div.row", *(form(f"/scheduler/jobs/{quote(job['id'])}/{action}", tag("button.plain", t(action.capitalize())))
                         for action in ("resume" if job["paused"] else "pause", "run")))) for job in jobs))
    return page(call, t("Jobs"), shown)


QUEUE_COLUMNS = "id function state attempts due status error trigger job planned created started finished".split()
CALL_ACTIONS = {"dead": ("retry", "replay", "discard"), "done": ("replay", "discard"), "waiting": ("discard",), "running": ()}


def view_queue(app: Any, call: Call) -> Response:
    """/admin/queue?state=&function=&job=&id=&limit= : the queued calls, newest first; POST {id, action} acts on one."""
    if call.request.method == "POST":
        return act_on_call(app, call)
    args, t = call.request.args, Texts(call)
    state, limit = args.get("state", ""), max(1, min(1000, args.get("limit", 100, type=int)))
    wanted = {f"{name} = ?": sql_value(args[name]) for name in ("state", "function", "job", "id") if args.get(name)}
    rows = app.store.read(f"SELECT {', '.join(QUEUE_COLUMNS)} FROM fn_queue WHERE {' AND '.join(['1', *wanted])}"
                          " ORDER BY created DESC LIMIT ?", *wanted.values(), limit)
    one = whole_call(app.queue.get(args["id"])) if rows and args.get("id") else None
    columns = {"Function": None, "Status": "time", "Runs": "n", "Due": "soft time", "Answer": "n", "Error": "break", "": None}
    shown = table(t, columns, ((
        join(link(row["function"], "/admin/queue", id=row["id"]), tag("div.soft", row["id"])),
        tag("span.bad" if row["state"] == "dead" else "span", t(row["state"])), row["attempts"], local_time(row["due"]),
        row["status"], last_line(row["error"]), tag("div.row", *(
            form("/admin/queue", tag("button.plain", t(action.capitalize())), id=row["id"], action=action, state=state)
            for action in CALL_ACTIONS[row["state"]]))) for row in rows))
    states = (link(t(name or "All"), "/admin/queue", "button" if name == state else "button plain", state=name)
              for name in ("", *STATES))
    details = tag("pre", json.dumps(one, indent=2, ensure_ascii=False)) if one else None
    return page(call, t("Queue"), tag("p.row", *states), shown, details,
                data={"calls": [dict(row) for row in rows], **({"call": one} if one else {})})


def whole_call(row: Any) -> dict[str, Any]:
    """Return the request and the result of a queued call, secrets in its headers and query blanked."""
    request = json.loads(row["request"])
    request["headers"], request["query"] = shown_headers(request["headers"]), scrub(request["query"])
    return {"request": {**request, **shown_body("body", row["body"])}, "status": row["status"],
            "headers": shown_headers(json.loads(row["headers"] or "[]")), **shown_body("answer", row["answer"])}


def shown_headers(headers: Iterable[list[str]]) -> list[list[str]]:
    """Blank the values of headers that carry secrets, in URLs too."""
    return [[name, "***" if _SECRET.search(name) else value.partition("?")[0] + "?" + scrub(value.partition("?")[2])
             if "://" in value and "?" in value else value] for name, value in headers]


def act_on_call(app: Any, call: Call) -> Response:
    """Retry, replay or discard a queued call."""
    sent = fields(call)
    number, action = text_field(sent, "id"), text_field(sent, "action")
    if action not in ("retry", "replay", "discard"):
        raise HTTPException(400, "action must be retry, replay or discard")
    number = app.queue.act(number, action)
    app.runner.poke()
    return done(call, action, f"/admin/queue?state={quote(str(sent.get('state', '')))}&done=accepted", id=number)


def quote_name(name: str) -> str:
    """Write a table's or column's name in SQL."""
    return '"' + name.replace('"', '""') + '"'


SQL_SECONDS, SQL_ROWS, CSV_BYTES = 5.0, 1000, 16_000  # a spreadsheet's cell holds 32,767 characters


def is_ours(name: Optional[str]) -> bool:
    """Tell whether a table is fnserve's own, to be read only."""
    return (name or "").lower() == "call_stats" or (name or "").lower().startswith("fn_")


def _authorize(action: int, first: Optional[str], second: Optional[str], *_: Any) -> int:
    """Let SQL do everything but write to fnserve's tables, attach files and set pragmas (sqlite3_set_authorizer)."""
    written = {1: second, 2: first, 7: second, 9: first, 10: second, 11: first, 16: second, 18: first, 23: first, 26: second}
    pragma = action == 19 and first not in ("table_info", "table_xinfo", "index_list", "data_version")  # FTS5 asks for the last
    if action == 20 and first == "fn_queue" and second in ("request", "headers", "body", "answer"):
        return 2  # reads as NULL: they hold the callers' secrets
    return 1 if action in (24, 25) or pragma or is_ours(written.get(action)) else 0


@contextlib.contextmanager
def user_data(app: Any, writes: bool = False) -> Iterator[sqlite3.Connection]:
    """Open the database for the data browser: fnserve's tables can't be written to, and nothing takes longer than 5 s. What
    `writes` waits for the lock first: what reads before it would be told at once that the database is locked."""
    until = monotonic() + SQL_SECONDS
    make_private(app.settings.DB_PATH)
    with contextlib.closing(sqlite3.connect(app.settings.DB_PATH, timeout=5, isolation_level=None)) as connection:
        known = connection.execute("SELECT sql FROM sqlite_master").fetchall()
        connection.set_authorizer(_authorize)
        connection.set_progress_handler(lambda: monotonic() > until, 10_000)
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        try:
            connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
            yield connection
            for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall():
                if (sql,) not in known and (is_ours(name) or kind == "trigger" and re.search(r"(?i)\b(fn_|call_stats\b)", sql)):
                    raise sqlite3.DatabaseError(f"{name}: not authorized")  # made just now: it would write to our tables later
            connection.execute("COMMIT")
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:  # a second statement was a Warning once
            text = "the statement took longer than 5 s" if "interrupted" in str(error) else str(error)
            raise HTTPException(403 if "prohibited" in text or "authorized" in text else 400, text) from None


def shown_value(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    if isinstance(value, float) and not abs(value) < float("inf"):
        return str(value)
    return f"{len(value)} bytes" if isinstance(value, bytes) else value


def read_key(given: Any) -> list[Any]:
    """Return the values of a row's key from JSON, or from its text; ``{"hex": ...}`` is a blob. 400 where it is none."""
    try:
        key = json.loads(given) if isinstance(given, str) else list(given)
        return [bytes.fromhex(item["hex"]) if isinstance(item, dict) else item for item in key]
    except (ValueError, TypeError, KeyError):
        raise HTTPException(400, "a key must be a list of values") from None


class Table:
    """A table as the data browser sees it, within `user_data`; 404 where there is none."""

    def __init__(self, connection: sqlite3.Connection, name: str) -> None:
        found = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table' AND name = ? COLLATE NOCASE",
                                   (name,)).fetchone()
        if found is None:
            raise HTTPException(404, f"There is no table {name[:100]}")
        self.name, self.sql = found
        self._run, self._quoted = connection.execute, quote_name(self.name)
        rows = [row for row in self._run(f"PRAGMA table_xinfo({self._quoted})") if row[6] != 1]  # as SELECT * has them
        self.columns = [{"name": row[1], "type": row[2], "pk": row[5]} for row in rows]
        self._key = [quote_name(row[1]) for row in sorted(rows, key=operator.itemgetter(5)) if row[5]]  #: tells its rows apart
        taken = {row[1].lower() for row in rows}
        with contextlib.suppress(sqlite3.OperationalError, StopIteration):  # WITHOUT ROWID, or all three are columns
            rowid = next(word for word in ("rowid", "_rowid_", "oid") if word not in taken)
            self._run(f"SELECT {rowid} FROM {self._quoted} LIMIT 0")
            self._key = [rowid]
        self._where = " AND ".join(f"{name} = ?" for name in self._key)

    def rows(self, after: Any, limit: int, shown: Callable[[Any], Any]) -> list[dict[str, Any]]:
        """Return keys and values of the rows that follow the key `after`: by the key, so as fast in a million as in ten.
        `shown` makes of a value what is kept of it, row by row, since a page of photos would fill the memory."""
        names, keys, width = [column["name"] for column in self.columns], ", ".join(self._key), len(self._key)
        begin = [] if after is None else read_key(after)
        where = "" if after is None else f"WHERE ({keys}) > ({', '.join('?' * width)})"
        return [{"key": [{"hex": value.hex()} if isinstance(value, bytes) else value for value in row[:width]],
                 "values": dict(zip(names, map(shown, row[width:])))} for row in self._run(
            f"SELECT {keys}, * FROM {self._quoted} {where} ORDER BY {keys} LIMIT ?", (*begin, limit))]

    def find(self, key: list[Any]) -> dict[str, Any]:
        """Return one row by its key; 404 where there is none, 400 where the key is of another table."""
        if len(key) != len(self._key):
            raise HTTPException(400, f"key must hold {', '.join(self._key)}")
        for row in self._run(f"SELECT * FROM {self._quoted} WHERE {self._where}", key):
            return {column["name"]: value for column, value in zip(self.columns, row)}
        raise HTTPException(404, "There is no such row")

    def delete(self, key: list[Any]) -> None:
        """Delete one row by its key; 404 where there is none."""
        self.find(key)
        self._run(f"DELETE FROM {self._quoted} WHERE {self._where}", key)

    def update(self, key: list[Any], given: Any) -> None:
        """Write what differs of one row: an object of its columns, or the text of one; 404 where there is no such row."""
        row = self.find(key)
        try:
            given = json.loads(given) if isinstance(given, str) else given
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"values: {error}") from None
        if not isinstance(given, dict) or not given.keys() <= row.keys():
            raise HTTPException(400, "values must be a JSON object of the table's columns")
        if new := {name: value for name, value in given.items() if value != row[name]}:
            self._run(f"UPDATE {self._quoted} SET ({', '.join(map(quote_name, new))}) = ({', '.join('?' * len(new))})"
                      f" WHERE {self._where}", [*new.values(), *key])


def count_rows(connection: sqlite3.Connection, name: str) -> Optional[int]:
    """Count a table's rows; None where that takes too long. A plain count(*) is one step that can't be interrupted."""
    with contextlib.suppress(sqlite3.OperationalError):
        return connection.execute(f"SELECT count(*) FROM (SELECT 1 FROM {quote_name(name)} LIMIT -1)").fetchone()[0]
    return None


def view_data(app: Any, call: Call) -> Response:
    """/admin/data : the tables, a form for a new one and a box for SQL; POST does what `action` says."""
    if call.request.method == "POST":
        return change_data(app, call)
    with user_data(app) as connection:
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        data = [{"name": name, "rows": count_rows(connection, name), "read_only": is_ours(name)}
                for name in sorted(names, key=is_ours) if not name.startswith("sqlite_")]
    t = Texts(call)
    shown = table(t, {"Name": None, "Rows": "n", "": "soft"}, (
        (link(row["name"], "/admin/data/" + row["name"]), "?" if row["rows"] is None else f"{row['rows']:,}",
         t("read_only") if row["read_only"] else "") for row in data))
    asked = form("/admin/data", field(t("Name"), "table", required=True, placeholder="notes"),
                 field(t("Columns"), "columns", required=True, placeholder="id INTEGER PRIMARY KEY, text TEXT"),
                 tag("p", tag("button", t("Create a table"))), action="create")
    return page(call, t("Data"), shown, tag("details.card", tag("summary", t("Create a table")), asked), sql_form(t, ""),
                data={"tables": data})


def sql_form(t: Texts, text: str) -> Markup:
    """Make the box that takes SQL."""
    box = tag("textarea.mono", "\n" + text, name="sql", rows="4", spellcheck="false")
    return tag("div.card", form("/admin/data", tag("label", "SQL", box), tag("p", tag("button", t("Run"))), action="sql"))


def view_rows(app: Any, call: Call) -> Response:
    """/admin/data/<table>?after=&limit=&format=csv, or ?key= : a page of rows, all of them as CSV, or the form of one."""
    name, args = call.request.path[len("/admin/data/"):], call.request.args
    limit = max(1, min(SQL_ROWS, args.get("limit", 50, type=int)))
    with user_data(app) as connection:
        found = Table(connection, name)
        if "key" in args:
            return row_page(call, found.name, args["key"], row_text(found.find(read_key(args["key"]))))
        rows = found.rows(args.get("after"), limit, shown_value)
    if args.get("format") == "csv":
        headers = {**PAGE_HEADERS, "Content-Disposition": content_disposition(True, name + ".csv")}
        return Response(csv_pages(app, name), headers=headers, content_type="text/csv; charset=utf-8")
    return rows_page(call, found, rows, rows[-1]["key"] if len(rows) == limit else None)


def csv_pages(app: Any, name: str) -> Iterator[str]:
    """Yield a table as CSV, page by page, with the byte order mark by which Excel knows UTF-8."""
    import csv
    after, mark, rows = None, "\ufeff", [{}]  # type: Any, str, list[dict[str, Any]]
    while rows:
        with user_data(app) as connection:
            found = Table(connection, name)
            rows = found.rows(after, SQL_ROWS, csv_value)
        out = io.StringIO()
        csv.writer(out).writerows([[column["name"] for column in found.columns]] * bool(mark))
        csv.writer(out).writerows(row["values"].values() for row in rows)
        yield mark + out.getvalue()
        after, mark = rows[-1]["key"] if rows else None, ""


def csv_value(value: Any) -> Any:
    """Return a value as a spreadsheet may have it: text that it would calculate, which a stranger may have sent, is quoted."""
    if isinstance(value, bytes):
        return value.hex() if len(value) <= CSV_BYTES else shown_value(value)
    return f"'{value}" if isinstance(value, str) and re.match(r"[=@\t\r]|[+-](?![0-9.]+$)", value) else value


def rows_page(call: Call, found: Table, rows: list[dict[str, Any]], following: Optional[list[Any]]) -> Response:
    """Show rows, and what can be done with them where the table may be written to."""
    t, url, ours = Texts(call), "/admin/data/" + found.name, is_ours(found.name)
    columns: dict[str, Optional[str]] = {**{column["name"]: None for column in found.columns}, "": None}
    shown = table(t, columns, ((
        *(tag("i.soft", "NULL") if value is None else str(value)[:200] + "…" * (len(str(value)) > 200)
          for value in row["values"].values()),
        None if ours else link(t("Edit"), url, key=json.dumps(row["key"]))) for row in rows), False)
    more = link(t("Go on"), url, "button plain", after=json.dumps(following)) if following else None
    parts = {"Schema": tag("pre", found.sql), "Drop this table": form(
        "/admin/data", tag("button.danger", t("Drop this table")), action="drop", table=found.name)}
    folded = (tag("details.card", tag("summary", t(key)), part) for key, part in parts.items() if not ours or key == "Schema")
    return page(call, found.name, tag("p.row", more, link("CSV", url, "button plain", format="csv")), shown, *folded, data={
        "table": found.name, "columns": found.columns, "read_only": ours, "rows": rows, "next": following})


def row_text(row: Mapping[str, Any]) -> str:
    """Return a row as JSON; a blob isn't shown, and so stays as it is."""
    shown = {name: value for name, value in row.items() if not isinstance(value, bytes)}
    return json.dumps(shown, indent=2, ensure_ascii=False)


def row_page(call: Call, name: str, key: str, text: str, error: Optional[HTTPException] = None) -> Response:
    """Show one row, to change or delete it, and what is wrong with its text."""
    t, which = Texts(call), {"table": name, "key": key}
    box = tag("textarea.mono", "\n" + text, name="values", aria_label=t("Edit"), spellcheck="false", rows=text.count("\n") + 2)
    return page(call, f"{name}: {t('Edit')}", note(error.description, BAD) if error else None, tag(
        "div.card", form("/admin/data", box, tag("p", tag("button", t("Save"))), action="update", **which),
        form("/admin/data", tag("button.danger", t("Delete")), action="delete", **which)), status=error.code if error else 200)


def change_data(app: Any, call: Call) -> Response:
    """Create or drop a table, update or delete one row, run SQL. A row's text that is refused comes back with its page."""
    sent = fields(call)
    action, name = text_field(sent, "action"), text_field(sent, "table")
    if action == "sql":
        return run_sql(app, call, text_field(sent, "sql"))
    try:
        with user_data(app, writes=True) as connection:
            change_table(connection, action, name, sent)
    except HTTPException as error:
        if wants_json(call) or action != "update":
            raise
        return row_page(call, name, text_field(sent, "key"), text_field(sent, "values"), error)
    return done(call, action, "/admin/data" + ("/" + quote(name, safe="") if action not in ("create", "drop") else ""))


def change_table(connection: sqlite3.Connection, action: str, name: str, sent: Mapping[str, Any]) -> None:
    """Do what was sent to a table, or to one row of it."""
    if action not in ("create", "drop", "update", "delete") or not name:
        raise HTTPException(400, "action must be create, drop, update, delete or sql, table the name of one")
    if action == "create":
        connection.execute(f"CREATE TABLE {quote_name(name)} ({text_field(sent, 'columns')})")
        return
    found = Table(connection, name)
    if action == "drop":
        connection.execute(f"DROP TABLE {quote_name(found.name)}")
    elif action == "delete":
        found.delete(read_key(sent.get("key") or []))
    else:
        found.update(read_key(sent.get("key") or []), sent.get("values"))


def run_sql(app: Any, call: Call, text: str) -> Response:
    """Run one statement: a SELECT gives its first rows, anything else the number of rows it changed."""
    t = Texts(call)
    try:
        if not text.strip():
            raise HTTPException(400, "There is no statement")
        with user_data(app, not re.match(r"\s*(select|values|explain|pragma)\b", text, re.I)) as connection:
            cursor = connection.execute(text)
            rows = [list(map(shown_value, row)) for _, row in zip(range(SQL_ROWS), cursor)]
            columns, changed = [column[0] for column in cursor.description or ()], cursor.rowcount
    except HTTPException as error:
        return page(call, t("Data"), sql_form(t, text), note(error.description, BAD), status=error.code,
                    data={"error": error.description, "request_id": call.id})
    result = table(t, dict.fromkeys(columns), rows, False) if columns else note(f"{t('Rows')}: {changed}")
    return page(call, t("Data"), sql_form(t, text), note(t("first_rows", SQL_ROWS)) if len(rows) == SQL_ROWS else None, result,
                data={"columns": columns, "rows": rows} if columns else {"rowcount": max(0, changed)})


def view_settings(app: Any, call: Call) -> Response:
    """/admin/settings : every setting, its value (secrets masked) and its source."""
    t, texts = Texts(call), app.settings.texts
    rows = [{"name": row.name, "value": "***" if row.secret and texts[row.name] else getattr(app.settings, row.name),
             "source": app.settings.sources[row.name], "help": row.help} for row in SETTINGS_TABLE]
    shown = table(t, {"Name": None, "Value": "break", "Source": "soft"}, (
        (row["name"], "***" if row["value"] == "***" else texts[row["name"]], t(row["source"])) for row in rows))
    saved = form("/admin/backup", tag("label", tag("input", type="checkbox", name="secrets", value="1"), " ", t("secrets")),
                 tag("p", tag("button", t("Download a backup"))))
    return page(call, t("Settings"), tag("p", t("restart")), shown, tag("div.card", saved), data={"settings": rows})


def view_backup(app: Any, call: Call) -> Response:
    """/admin/backup : POST downloads what the command `backup` writes; `secrets` puts those of the settings into it too."""
    import tempfile
    file = tempfile.TemporaryFile(dir=app.settings.directory)
    app.folder.fold()
    write_backup(app.settings, file, bool(fields(call).get("secrets")))
    file.seek(0)
    name = strftime("fnserve-%Y%m%d-%H%M%S.zip", localtime(call.started))
    response = send_file(file, as_attachment=True, download_name=name, conditional=False)
    response.headers.update(PAGE_HEADERS)
    return response


def write_backup(settings: Settings, file: Any, secrets: bool) -> None:
    """Write functions, database and settings into a zip file, while the server runs: the database as of one moment."""
    import tempfile
    import zipfile
    with tempfile.TemporaryDirectory(dir=settings.directory) as scratch, zipfile.ZipFile(
            file, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        copy = os.path.join(scratch, "copy.db")
        with contextlib.closing(sqlite3.connect(settings.DB_PATH)) as old, contextlib.closing(sqlite3.connect(copy)) as new:
            old.backup(new)
        archive.write(copy, "serverless.db")
        for directory, _, names in os.walk(settings.FUNCTIONS_DIR):
            for path in (os.path.join(directory, name) for name in names if not name.startswith(".")):  # . is a draft
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    if os.path.isfile(path) and os.path.basename(directory) != "__pycache__":
                        archive.write(path, os.path.join(PACKAGE, os.path.relpath(path, settings.FUNCTIONS_DIR)))
        for path in settings.env_files:
            with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as env:
                archive.writestr(os.path.basename(path), "".join(  # by bindings, since a secret may have several lines
                    found[0] for found in _ENV_BINDING.finditer(env.read())
                    if secrets or not _SECRET.search(found[0].partition("=")[0])))


def describe_functions(app: Any) -> list[dict[str, Any]]:
    """Gather what is said of each public function: its docstring, its hints and its SETTINGS, as they are written."""
    import textwrap
    rows = []
    for name in app.functions.names():
        said, auth = (found := app.functions.describe(name)[0]), found.settings.get("auth", "public")
        if said.serves and not said.error and auth != "internal" and not is_protected(name, app.protected):
            text = textwrap.dedent(said.docstring.partition("\n")[2]).strip()
            rows.append({"name": name, "summary": said.summary, "description": text, "answers": ANSWERS.get(said.returns),
                         "methods": said.methods or ["GET", "POST"], "auth": auth,
                         "parameters": read_parameters(text, said.settings.get("parameters"))})
    return rows


ANSWERS = {"dict": "application/json", "list": "application/json", "str": "text/html", "bytes": "text/html"}
KINDS = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "dict": "object"}


def read_parameters(text: str, given: Any) -> list[dict[str, Any]]:
    """Make Parameter Objects (OpenAPI 3.1 4.8.12) of what a docstring says, ``:param int n: how many``, or ``n (int): how
    many`` below ``Args:``, and of SETTINGS, which go before it; a word that OpenAPI doesn't know becomes the most usual one."""
    rows = re.findall(r"^[ \t]*:param[ \t]+(?:(\w+)[ \t]+)?(\w+)[ \t]*:(.*)$", text, re.M)
    for block in re.findall(r"^(?:Args|Arguments|Parameters):[ \t]*\n((?:[ \t]+\S.*\n?)+)", text, re.M):
        indent = block[:-len(block.lstrip())]  # what is deeper goes on with what stands above it
        rows += [(kind, name, said) for name, kind, said in re.findall(
            rf"^{indent}(\w+)[ \t]*(?:\((\w*).*?\))?[ \t]*:(?!//)(.*)$", block, re.M)]
    found: dict[str, Any] = {name: {"type": KINDS.get(kind, kind), "description": said.strip()} for kind, name, said in rows
                             if name not in ("request", "req", *KEYWORDS)}  # what the platform gives
    for name, item in given.items() if isinstance(given, dict) else ():
        found[str(name)] = {**found.get(str(name), {}), **(item if isinstance(item, dict) else {"description": item})}
    return [{"name": name, "in": item["in"] if item.get("in") in ("query", "header", "cookie", "body") else "query",
             "schema": {"type": item["type"] if item.get("type") in KINDS.values() else "string"},
             "description": str(item.get("description", "")), "required": bool(item.get("required", False))}
            for name, item in found.items()]


def view_openapi(app: Any, call: Call) -> Response:
    """/openapi.json : OpenAPI 3.1 of the public functions."""
    paths = {"/function/" + quote(row["name"]): {method.lower(): describe_operation(row, method) for method in row["methods"]}
             for row in describe_functions(app)}
    return as_json({"openapi": "3.1.0", "info": {"title": "Functions", "version": __version__}, "paths": paths,
                    "components": {"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}}})


def describe_operation(row: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Make an Operation Object (OpenAPI 3.1 4.8.10); parameters that are ``in`` the body become its JSON schema."""
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}_{row['name'].replace('/', '.')}", "summary": row["summary"],
        "description": row["description"], "parameters": [item for item in row["parameters"] if item["in"] != "body"],
        "responses": {"default": {"description": "What the function answers",
                                  **({"content": {row["answers"]: {}}} if row["answers"] else {})}}}
    if method in ("POST", "PUT", "PATCH"):
        body = [item for item in row["parameters"] if item["in"] == "body"]
        schema = {"type": "object", "required": [item["name"] for item in body if item["required"]], "properties": {
            item["name"]: {**item["schema"], "description": item["description"]} for item in body}} if body else {}
        operation["requestBody"] = {"content": {"application/json": {"schema": schema}}}
    return {**operation, "security": [{"bearer": []}]} if row["auth"] != "public" else operation


def view_docs(app: Any, call: Call) -> Response:
    """/docs : the public functions, to be read and tried."""
    t, cards = Texts(call), []
    for row in describe_functions(app):
        url = call.request.host_url + "function/" + quote(row["name"])
        names = "&".join(f"{quote(item['name'])}=..." for item in row["parameters"] if item["in"] != "body")
        token = " -H 'Authorization: Bearer ...'" if row["auth"] != "public" else ""
        method = "" if "GET" in row["methods"] else row["methods"][0]
        asked = (tag("label", item["name"], tag("input", name=item["name"]), tag("span.soft", item["description"]))
                 for item in row["parameters"])
        cards.append(tag(
            "div.card", tag("h2", row["name"]), tag("p", row["summary"]),
            tag("pre", row["description"]) if row["description"] else None,
            tag("pre", f"curl{token}{method and ' -X ' + method} '{url}{'?' + names if names else ''}'"),
            tag("form", *asked, tag("p", tag("button.plain", t("Run"))), method=method or "get", action=url,
                target="_blank") if method in ("", "POST") else None))  # all a form can send
    return page(call, t("API"), *cards, menu=app.signer.is_login(call.session.get("_login"), call.started))


def view_asset(app: Any, call: Call) -> Response:
    """/admin/assets/... : the style sheet and the script; the login page needs them too."""
    body, kind = (CSS, "text/css") if call.request.path.endswith(".css") else (JS, "text/javascript")
    return Response(body, 200, {**PAGE_HEADERS, "Cache-Control": "public, max-age=86400"}, kind)


GET_POST, POST = ("GET", "HEAD", "POST"), ("POST",)
ROUTES = {
    "/": Route(view_index, False), LIST: Route(view_list), "/function/show_stats": Route(view_stats),
    "/health": Route(view_health, admin=False), "/metrics": Route(view_metrics, admin=False),
    "/monitoring/health": Route(view_monitoring), "/monitoring/dashboard": Route(view_dashboard),
    "/monitoring/stream": Route(view_stream, True, ("GET",)), "/invocations/*": Route(view_invocation, admin=False),
    "/scheduler": Route(view_scheduler, basic=True),
    "/scheduler/*": Route(view_jobs, True, ("GET", "HEAD", "POST", "PATCH", "DELETE"), basic=True),
    "/admin/data": Route(view_data, True, GET_POST), "/admin/data/*": Route(view_rows), "/admin/settings": Route(view_settings),
    "/openapi.json": Route(view_openapi), "/admin/backup": Route(view_backup, True, POST),
    "/docs": Route(view_docs), "/admin/jobs": Route(view_admin_jobs),
    "/admin/queue": Route(view_queue, True, GET_POST),
    "/admin/assets/fnserve.css": Route(view_asset, False), "/admin/assets/fnserve.js": Route(view_asset, False),
    "/login": Route(view_login, False, GET_POST), "/logout": Route(view_logout, False, GET_POST),
    "/function/add_function": Route(view_save, True, GET_POST), "/function/save_function": Route(view_save, True, POST),
    "/function/edit_function": Route(view_edit), "/function/update_function": Route(view_save, True, POST),
    "/function/delete_function": Route(view_delete, True, (*GET_POST, "DELETE")), "/admin/logs": Route(view_logs),
    "/function/clear_stats": Route(view_clear, True, GET_POST), "/admin/versions": Route(view_versions),
    "/admin/restore": Route(view_restore, True, GET_POST), "/admin/try": Route(view_try, True, POST),
}

# == 17 APP ===============================================================
# Wires 01 to 16 and is the WSGI callable. One App owns the state of a process; its background loop keeps the journal
# folded, in whichever process holds the lock.

FOLD_SECONDS = 60


class App:
    """The platform as a WSGI application. `start()` has side effects, making one has none."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time) -> None:
        self.settings, self.clock = settings, clock
        docs = {path: ROUTES[path]._replace(admin=settings.DOCS == "private") for path in ("/docs", "/openapi.json")}
        self.routes, self.error_page = {**ROUTES, **docs}, error_page
        self.reserved = frozenset(path[10:] for path in ROUTES if path.startswith("/function/"))
        self.protected = NAMES_OF_ADMIN_FUNCTIONS | self.reserved | set(settings.PROTECTED_FUNCTIONS)
        self.signer = Signer(settings.SECRET_KEY, settings.SECRET_TOKEN)
        self.store = Store(settings.DB_PATH, {**TABLES, **QUEUE_TABLES, **SCHEDULE_TABLES}, MIGRATIONS)
        self.journal = Journal(settings.JOURNAL_DIR)
        self.config = Config(settings.env_files)
        casts = {**SETTINGS_CASTS, "verify": read_scheme, "schedule": self._read_schedule}
        self.functions = Functions(settings.FUNCTIONS_DIR, Versions(self.store, clock), make_api(), self.reserved, casts)
        self.queue = Queue(self.store, settings.JOURNAL_DIR, settings.QUEUE_MAX, clock)
        self.load, self.loki, self.viewers = Load(), Loki(self), threading.Semaphore(MOST_VIEWERS)
        self.schedule = Schedule(self.store, self.queue, settings.TIMEZONE, clock)
        self.runner = Runner(self.queue, functools.partial(run_queued, self), max(1, settings.THREADS // 2))
        self.folder = Folder(self.journal, self.store, settings, lambda name: is_protected(name, self.protected))
        self.background, self.rates, self.watch, self.trials = Background(self), Rates(), Watch(self), threading.Semaphore(2)
        self.proven: dict[str, Code] = {}  #: code of guarded functions whose first calls are over
        self.queues = True  #: whether calls may be put into the queue
        self.templates: Any = None  #: Jinja2's environment, once it is used
        self._starting, self._started = threading.Lock(), 0
        self._ids: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Serve one request (PEP 3333)."""
        if self._started != os.getpid():
            self.start()
        call, body = Call(self, environ), None  # type: Call, Optional[Iterable[bytes]]
        token = current_call.set(call)
        try:
            body = respond(self, call, handle(self, call), start_response)
        except Parked:
            raise
        except BaseException as error:  # an answer that can't be sent: a session or a body that is none
            why = sys.exc_info()
            call.opened = None
            body = respond(self, call, answer_failure(call, error), lambda *started: start_response(*started, why))
        finally:
            if call.failed is not None and call.trigger != "cli":  # its traceback holds the function's locals, and this call
                call.failed = None
            if body.__class__ is list or body is None:
                call.request.close()
                if call.holds is not None:
                    self.watch.leave(call)
            current_call.reset(token)
        return body

    def start(self, background: bool = True) -> None:
        """Prepare this process: imports under functions/, captured output, the background loop."""
        with self._starting:
            if self._started == os.getpid():
                return
            self._ids = []  # none that another process of the same origin has too
            self.functions.install()
            self.config.current()
            capture_output(self.settings)
            if background:
                self.background.start()
            self._started = os.getpid()

    def _read_schedule(self, value: Any) -> Any:
        try:
            parse_schedule(value, self.settings.TIMEZONE, self.clock())
        except TriggerError as error:
            raise LoadError(f"SETTINGS['schedule'] = {value!r}: {error}") from None
        return value

    def put(self, call: Queued) -> str:
        """Queue a call and have it run; 503 where the queue is full or the disk can't be written to."""
        try:
            number = self.queue.put(call)
        except sqlite3.Error as error:
            log.error("%s: the call could not be queued: %s", call.function, error)
            raise HTTPException(503, "The queue can't be written to", [("Retry-After", "5")]) from None
        self.runner.poke()
        return number

    def enqueue(self, name: str, json: Any, data: Any, query: Any, headers: Any, delay: float) -> str:
        """Queue a POST of a function's own making."""
        function = self.functions.resolve(name)[0]
        if function is None:
            raise ValueError(f"there is no function {name!r}")
        if data is not None and not isinstance(data, (bytes, str)) or data is not None and json is not None:
            raise TypeError("enqueue() takes json, or data as text or bytes")
        fields = {"Content-Type": "application/json"} if json is not None else {}
        body = dump_json(json).encode() if json is not None else data.encode() if isinstance(data, str) else data or b""
        request = {"method": "POST", "path": "/function/" + name, "query": urlencode(query or {}, doseq=True),
                   "headers": [[key, str(value)] for key, value in {**fields, **(headers or {})}.items()]}
        return self.put(Queued(function.name, dump_json(request), body, self.clock() + max(0.0, float(delay))))

    def new_id(self) -> str:
        """Return a request id: 64 random bits, taken from a store of them since each system call costs the GIL."""
        try:
            return self._ids.pop()
        except IndexError:
            self._ids.extend(re.findall(".{16}", os.urandom(4096).hex()))
            return self._ids.pop()

    @property
    def runs_schedule(self) -> bool:
        """Tell whether this machine is one of SCHEDULER_ALLOWED_HOSTS."""
        return bool({"*", socket.gethostname()} & set(self.settings.SCHEDULER_ALLOWED_HOSTS))

    def keyword(self, word: str, call: Call) -> Any:
        """Return what an entry point gets for one of KEYWORDS."""
        if word == "context":
            return types.SimpleNamespace(request_id=call.id, function=call.function or "", trigger=call.trigger,
                                         attempt=call.attempt, deadline=call.deadline)
        return dict(self.config.current()) if word == "config" else sorted(self.protected)


def capture_output(settings: Settings) -> None:
    """Let print() and logging be kept with the call, and fnserve's own log go to the error log."""
    if not isinstance(sys.stdout, Capture):
        sys.stdout, sys.stderr = Capture(sys.stdout), Capture(sys.stderr)
    root = logging.getLogger()
    if not any(isinstance(handler, CallLog) for handler in root.handlers):
        shown = CallLog()
        shown.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        root.addHandler(shown)
        root.setLevel(min(root.level or logging.INFO, logging.INFO))
    log.propagate = False  # what fnserve itself has to say is not the call's output
    log.handlers[:] = [handler for handler in log.handlers if not isinstance(handler, ErrorLog)]
    log.addHandler(ErrorLog(settings.LOG_FILE, settings.LOG_MAX_BYTES, settings.LOG_BACKUPS))


class Background:
    """The loop of a process. `step(now)` is one round of it, so that a test needs no sleep."""

    def __init__(self, app: App) -> None:
        self._app, self._handle, self._sync_seconds, self._load, self._lost, self._newest = app, -1, 1.0, Load(), 0, [0]
        self._done: dict[str, float] = {}  #: what is done now and then -> when it was done last
        self.stopping = threading.Event()  #: set when this process is about to end
        in_children(self._resign)

    def start(self) -> None:
        """Run the loops in threads of their own, and the hooks' on_start()."""
        self._handle, self.stopping = -1, threading.Event()
        for target, *values in ((self._loop, self.stopping, lambda: self.step(self._app.clock()), 5.0),
                                (self._loop, threading.Event(), lambda: self._app.watch.step(), WATCH_SECONDS),  # to the end
                                (self._app.functions.get, HOOKS)):
            threading.Thread(target=target, args=values, name="fnserve background", daemon=True).start()

    def drain(self) -> None:
        """Start nothing new: queued calls and leading are left to other processes. What runs keeps its deadlines."""
        self._app.runner.stopping = True
        self.stopping.set()

    def _loop(self, ending: threading.Event, step: Callable[[], float], retry: float) -> None:
        pause = min(1.0, retry)
        while not ending.wait(pause):
            try:
                pause = step()
            except Exception as error:  # the loop must outlive a locked database or a full disk; it tries again
                log.error("background: %s: %s", type(error).__name__, error)
                pause = retry
        if ending is self.stopping:
            self._resign()

    def step(self, now: float) -> float:
        """Do one round; return the seconds until the next, one at most. The leader also does what is done once for all."""
        leads, following = self._keep_up(now), None
        if leads and self._app.runs_schedule:
            following = self._app.schedule.step(now)
        due = self._app.queue.next_due()
        if due is not None and due <= now:
            self._app.runner.poke()
            due = None
        return max(.01, min([1.0] + [moment - now for moment in (due, following) if moment is not None]))

    def _keep_up(self, now: float) -> bool:
        """Do what recurs; tell whether this process leads."""
        self._app.store.follow()
        self._app.config.current()  # os.environ follows .env within a second; `config` does with the next call
        if self._app.journal.handle >= 0:
            self._app.journal.refresh()
        if self._is_due("sum up", now, 60):
            self._sum_up(now)
        if not self._lead():
            return False
        self._app.queue.reclaim(self._app.functions.retries)
        for duty, seconds in ((self._sync, self._sync_seconds), (self._fold, 5), (self._sample, 60), (self._prune, 3600)):
            if self._is_due(duty.__name__, now, seconds):
                duty(now)
        self._app.loki.keep_up()
        return True

    def _is_due(self, duty: str, now: float, seconds: float) -> bool:
        """Tell whether something was last done so long ago, or later than now since the clock was put back; it is done now."""
        due = not 0 <= now - self._done.get(duty, float("-inf")) < seconds
        self._done[duty] = now if due else self._done[duty]
        return due

    def _sync(self, now: float) -> None:
        began = monotonic()
        self._app.schedule.sync(self._app.functions.schedules())
        self._sync_seconds = 1 + 50 * (monotonic() - began)  # 10,000 functions take a while to look at

    def _fold(self, now: float) -> None:
        """Fold once a minute, and when a segment is full: there is a newer one than at the last fold."""
        newest = segments(self._app.journal.directory)[-1:]
        if self._is_due("fold", now, FOLD_SECONDS) or newest != self._newest:
            self._app.folder.fold()
            self._newest = newest

    def _prune(self, now: float) -> None:
        self._app.folder.prune(now, self._app.loki.position() if self._app.settings.LOKI_URL else None)
        self._app.queue.prune(now, self._app.settings.KEEP_DAYS)

    def _sum_up(self, now: float) -> None:
        """Sum up floods in the error log, and add this process's lost records to those of all."""
        for handler in log.handlers:
            if isinstance(handler, ErrorLog):
                handler.sum_up(now)
        lost, self._lost = self._app.journal.lost - self._lost, self._app.journal.lost
        if lost:
            with self._app.store.write() as connection:
                add_up(connection, "fn_meta", {"key": "lost_lines"}, value=lost)

    def _sample(self, now: float) -> None:
        """Keep what the charts of memory and CPU show, for KEEP_DAYS."""
        minute, kept = int(now) // 60, operator.itemgetter("cpu_percent", "memory_rss_mb", "threads")(self._load.figures(now))
        self._app.store.run("REPLACE INTO fn_samples VALUES (?, ?, ?, ?)", minute, *kept)
        self._app.store.run("DELETE FROM fn_samples WHERE minute < ?", minute - 1440 * self._app.settings.KEEP_DAYS)

    def _resign(self) -> None:
        """Give up the leader's lock; a child that a function forks must not hold it."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _lead(self) -> bool:
        """Tell whether this process does the work that is done once; the kernel passes the lock on at its death."""
        if self._handle < 0 or not os.fstat(self._handle).st_nlink:
            self._resign()  # nobody else sees the lock of a file that was deleted
            self._handle = lock_file(os.path.join(self._app.journal.directory, "leader.lock"))
        return self._handle >= 0


def try_in_child() -> None:
    """Be the child of `try_out`: load code, call it where a request is given, write what became of it, and end."""
    import faulthandler
    answer = os.dup(1)
    os.dup2(2, 1)  # whatever prints, at whatever level, prints into the output
    os.write(answer, b"\n")
    job = json.load(sys.stdin)
    bound_memory()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    app = App(Settings(job["options"], job["directory"]))
    app.start(background=False)
    app.runner.stopping = True  # what is queued here is run by the others
    setattr(app.journal, "append", lambda record: None)
    log.handlers[:] = [logging.NullHandler()]
    faulthandler.enable()
    faulthandler.dump_traceback_later(LOAD_SECONDS, exit=True)
    try:
        found = load_on_trial(app, job)
    except LoadError as error:
        found = {"status": 500, "error": error.trace or error.message if job["request"] else error.message, "line": error.line}
    sys.stdout.flush()
    os.write(answer, json.dumps(found, default=repr, skipkeys=True).encode())
    os._exit(0)  # threads that the code has started end here


def load_on_trial(app: App, job: Mapping[str, Any]) -> dict[str, Any]:
    """Load the code of a trial, and make the call if one is asked for; return what is found. LoadError."""
    import faulthandler
    began, name, source = perf_counter(), job["name"], job["source"].encode("utf-8", "surrogateescape")
    path = app.functions.path(name)
    linecache.cache[path] = len(source), None, source.decode("utf-8", "replace").splitlines(True), path  # for tracebacks
    code = app.functions.pretend(name, source)
    if job["request"]:
        faulthandler.dump_traceback_later(min(job["seconds"], code.settings.timeout or job["seconds"]), exit=True)
        return call_on_trial(app, name, job["request"])
    return {"entries": [getattr(entry.function, "__name__", repr(entry.function)) for entry in code.entries.values()],
            "settings": dict(getattr(code.module, "SETTINGS", {})), "ms": (perf_counter() - began) * 1e3}


def call_on_trial(app: App, name: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Make the call of a trial: as the command line does, so that neither a signature nor a login is asked for."""
    run, subpath = Run("cli"), request["subpath"].lstrip("/")
    path = f"/function/{name}/{subpath}" if subpath else f"/function/{name}"
    headers = [("Host", request["host"]), *((key, str(value).encode().decode("latin-1"))
                                            for key, value in request["headers"].items())]
    query, began = quote(request["query"], safe="=&%+/?:@!$'()*,;-._~"), perf_counter()
    response = run_alone(app, run, {"method": request["method"].upper(), "path": path, "query": query, "headers": headers,
                                    "client": "127.0.0.1"}, a2b_base64(request["body"]))
    taken, call = (perf_counter() - began) * 1e3, run.call  # type: float, Any
    wrong = call.failed is not None and not isinstance(call.failed, HTTPException)  # an abort() is meant
    return {"status": response.code, "headers": list(response.headers), "ms": round(taken, 1), "error": call.error,
            "line": describe_failure(call.failed, app.functions.path(name)).line if wrong else 0,
            **shown_body("body", response.get_data()[:ANSWER_BYTES])}


def bound_memory() -> None:
    """Let this process have half of the machine's memory, and be the first to go where that runs out."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def prepare(directory: str = ".", **options: Any) -> App:
    """Make the app of a directory: settings read, secrets made, database looked at. SettingError, StoreError."""
    settings = Settings(options, directory)
    made = make_secrets(settings)
    try:
        if settings.TIMEZONE:  # zoneinfo costs 1 MB, which a board without schedules can do without
            read_zone(settings.TIMEZONE)
    except TriggerError as error:
        raise SettingError(f"TIMEZONE ({settings.sources['TIMEZONE']}): {error}") from None
    app = App(settings)
    app.store.check()
    if "SECRET_TOKEN" in made:  # printed to a terminal only: stderr that is a file or systemd's journal is a log
        shown = made["SECRET_TOKEN"] if sys.stderr.isatty() else "in .env.local, as SECRET_TOKEN"
        sys.stderr.write(f"The password of the admin pages is {shown}\n")
    for path in exposed_files(settings):
        log.warning("%s holds secrets and others on this machine can read it: chmod 600 %s", path, path)
    return app


def create_app(directory: str = ".", **options: Any) -> App:
    """Make and start the app; options are settings by name: ``create_app(TIMEOUT=5)``."""
    made = prepare(directory, **options)
    made.start()
    return made


_first_app, _making = functools.lru_cache(maxsize=None)(create_app), threading.Lock()


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """`fnserve:app` for gunicorn, uWSGI and waitress-serve: made by the first request, so importing does nothing."""
    with _making:
        made = _first_app()
    return made(environ, start_response)

# == 18 SERVER ============================================================
# From a socket to the app: one worker is a waitress on the shared socket, the supervisor forks and replaces them. Uses
# 01 to 17. A worker's signal handler sets a flag and wakes its loop, the supervisor has none.
#
# Waitress has one thread for input and output and others for the calls. On several cores they pass the GIL from core to
# core, which costs more than the work: pinned to one core it serves about twice as many requests (bench/).

BACKLOG, MOST_CONNECTIONS = 1024, 1000
STALLED_SECONDS = 60.0
SPARE_THREADS = 1 + MOST_VIEWERS  # for the platform itself, whatever functions do
STARTED_IN = os.getcwd()  # where the command line's paths begin, for a SIGHUP
BIRTH_SECONDS, MAX_BACKOFF, TRIAL_SECONDS, CUT_SECONDS = 1.0, 30.0, 20.0, .5
MOST_CHUNK_CONTROL = 8192  # waitress would copy it anew with each piece that comes: 20 s of CPU for 15 MB
QUIET_SECONDS = 1.0  # that a draining worker leaves a connection open: a proxy may be sending its next request just now


def open_socket(settings: Settings) -> Any:
    """Open the listening socket, or take the one that systemd hands over (sd_listen_fds(3))."""
    kept = os.environ.pop("FNSERVE_SOCKET", "")
    if kept:  # from before a SIGHUP
        return socket.socket(fileno=int(kept))
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS", "0") != "0":
        return socket.socket(fileno=3)
    try:
        found = socket.getaddrinfo(settings.HOST, settings.PORT, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.socket(*found[:2])
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(found[4])
    except OSError as error:
        kind = SettingError if isinstance(error, socket.gaierror) else OSError
        raise kind(f"HOST={settings.HOST} PORT={settings.PORT}: can't listen there: {error.strerror}") from None
    opened.listen(BACKLOG)
    return opened


class Pin:
    """Keeps a worker's threads on one core, but not the programs and threads that functions start: those inherit the core of
    the thread that starts them, so an audit hook (PEP 578) frees it just before, until its next call."""

    EVENTS = frozenset(("subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "os.forkpty", "os.exec",
                        "_thread.start_new_thread", "_thread.start_joinable_thread"))

    def __init__(self, core: int) -> None:
        self._cores, self._core, self.freed = os.sched_getaffinity(0), {core}, set()  # type: set[int], set[int], set[int]
        os.sched_setaffinity(0, self._core)

    def hold(self) -> None:
        """Pin this thread again where it was freed."""
        if threading.get_ident() in self.freed:
            self.freed.discard(threading.get_ident())
            os.sched_setaffinity(0, self._core)

    def free(self, event: str, args: Any) -> None:
        """Let this thread run anywhere before it starts a program or a thread; an audit hook."""
        if event in self.EVENTS:
            os.sched_setaffinity(0, self._cores)
            self.freed.add(threading.get_ident())


def waitress_server(app: App, opened: Any, settings: Settings, pin: Optional[Pin] = None) -> Any:
    """Make a waitress on an open socket, its threads kept where `pin` says."""
    import waitress.server
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a line per queued request is no use to anybody
    tasks: Any = queue.SimpleQueue()
    for number in range(settings.THREADS + SPARE_THREADS):
        threading.Thread(target=serve_tasks, args=(tasks.get, pin), name=f"fnserve {number}", daemon=True).start()
    files = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1  # a quarter of them is for everything else
    most = min(MOST_CONNECTIONS, files * 3 // 4) if files > 0 else MOST_CONNECTIONS
    made = waitress.server.create_server(
        lambda environ, start_response: None, sockets=[opened], threads=settings.THREADS, ident=None, expose_tracebacks=False,
        log_socket_errors=False,
        max_request_body_size=settings.MAX_BODY + settings.MAX_BODY // 8 + CHUNK,  # it counts the framing of chunks, too
        trusted_proxy=settings.TRUSTED_PROXY or None, clear_untrusted_proxy_headers=True, backlog=BACKLOG,
        trusted_proxy_headers="x-forwarded-for x-forwarded-proto x-forwarded-host" if settings.TRUSTED_PROXY else "",
        asyncore_use_poll=hasattr(os, "fork"), connection_limit=most, channel_timeout=75, cleanup_interval=10,
        _dispatcher=types.SimpleNamespace(add_task=tasks.put))
    made.application = believe_proxy(app, made.application)
    made.channel_class = channel_class(app, copy.copy(made.adj))
    made.adj.send_bytes = 18_000  # by default headers and body are two packets: 6,400 requests/s instead of 9,000
    made.maintenance = functools.partial(end_stalled, made, made.maintenance)
    return made


def refuse(app: App, environ: dict[str, Any], status: int, start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer and record what never reaches the app as the app does it."""
    call = Call(app, environ)
    return respond(app, call, json_error(call, HTTPException(status)), start_response)


def believe_proxy(app: App, middleware: Callable[..., Any]) -> Callable[..., Iterable[bytes]]:
    """Wrap an app in waitress's reading of a proxy's headers, made around an app that returns None: an answer is a refusal."""
    from waitress.proxy_headers import PROXY_HEADERS
    names = frozenset("HTTP_" + name for name in PROXY_HEADERS)  # a request without any is spared 4 us

    def serve_request(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if not names.isdisjoint(environ) and middleware(environ, lambda *_: None) is not None:
            log.warning("the proxy's headers can't be read: %s", {name: environ.get(name) for name in sorted(names)})
            return refuse(app, environ, 400, start_response)
        return app(environ, start_response)
    return serve_request


def end_stalled(server: Any, maintenance: Callable[[float], Any], now: float) -> None:
    """Disconnect clients that have taken nothing of their answer for long, which waitress lets hold a thread for ever."""
    maintenance(now)
    for channel in list(server.active_channels.values()):
        if channel.total_outbufs_len and channel.last_activity < now - STALLED_SECONDS:
            channel.will_close = True
            with contextlib.suppress(OSError):
                channel.socket.shutdown(2)  # or the loop, which waits for room to write, would not look at it


def channel_class(app: Any, adj: Any) -> Any:
    """Make the class of waitress's connections.

    What never reaches the app (malformed or too large) is answered and recorded as the app does it. A body in pieces is sent
    piece by piece under `adj`; any other goes out with its headers, by the thread that does the input and output.
    """
    from waitress.channel import HTTPChannel
    from waitress.task import ErrorTask, WSGITask

    class JsonErrorTask(ErrorTask):
        def start_response(self, status: str, headers: list[tuple[str, str]]) -> None:
            self.status, self.response_headers = status, headers

        def execute(self) -> None:
            method, path = (str(getattr(self.request, name, "")) for name in ("command", "path"))  # if it got so far
            environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "REMOTE_ADDR": str(self.channel.addr[0])}
            body = refuse(app, environ, self.request.error.code, self.start_response)
            self.set_close_on_finish()
            self.write(b"".join(body))

    class Task(WSGITask):
        def get_environment(self) -> Any:
            if not self.channel.server.accepting:  # draining: let the client come back to another worker
                self.request.headers["CONNECTION"] = "close"
            environ = super().get_environment()
            environ["fnserve.connection"] = self.channel
            return environ

        def write(self, data: bytes) -> None:
            if data:
                piecewise = self.content_length is None or len(data) < self.content_length
                self.channel.adj = adj if piecewise else self.channel.server.adj
            super().write(data)

    class Channel(HTTPChannel):
        error_task_class, task_class, parser_class = JsonErrorTask, Task, request_parser()

        def give_up(self, data: bytes) -> None:
            """Send what there is to say in place of a thread that is stuck, and close; its own answer will fail."""
            with contextlib.suppress(OSError):
                if not self.total_outbufs_len:  # else it would land within the answer to an earlier request
                    self.socket.send(data)
            self.connected, self.will_close = False, True
            self.server.pull_trigger()

    return Channel


def request_parser() -> Any:
    """Make the class that reads waitress's requests: without what could smuggle one, or would cost much to refuse."""
    from waitress.parser import HTTPRequestParser, ParsingError
    from waitress.utilities import BadRequest

    class Parser(HTTPRequestParser):
        def received(self, data: bytes) -> int:
            used: int = super().received(data)
            if self.chunked and len(self.body_rcv.control_line) + len(self.body_rcv.trailer) > MOST_CHUNK_CONTROL:
                self.error, self.completed = BadRequest("a chunk's size or the trailer is too long"), True
            return used

        def parse_header(self, header_plus: bytes) -> None:
            try:
                super().parse_header(header_plus)
            except ValueError:  # a URL or a number that Python can't read
                raise ParsingError("malformed") from None
            if self.chunked and "CONTENT_LENGTH" in self.headers:  # RFC 9112 6.1: a proxy may have believed the other one
                raise ParsingError("Content-Length beside Transfer-Encoding")

    return Parser


def serve_tasks(take: Callable[[], Any], pin: Optional[Pin]) -> None:
    """Serve waitress's tasks in a thread; waitress hands them over by a Condition, at half the requests/s (bench/)."""
    while True:
        task = take()
        if pin is not None and pin.freed:
            pin.hold()
        try:
            task.service()
        except Parked:  # it comes back through add_task
            pass
        except BaseException as error:  # a thread must outlive whatever a connection does
            log.error("connection: %s", user_traceback(error))


def notify(state: str) -> None:
    """Tell systemd how we are (sd_notify(3)); nothing where it didn't start us."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


STOP_TEXT = "%s: the server ends when its calls have"
ENDS = (signal.SIGTERM, signal.SIGINT)
SIGNALS = [*ENDS, *(getattr(signal, name) for name in ("SIGHUP", "SIGCHLD", "SIGUSR1") if hasattr(signal, name))]


def hold_signals() -> None:
    """Hold back signals: a supervisor waits for them; a child must let go of our handlers first, which would swallow them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def wait_for_signal(seconds: float) -> tuple[int, int]:
    """Wait for one that is held back; return its number and which process has sent it, zeros where none came."""
    told = signal.sigtimedwait(SIGNALS, max(0.0, seconds))
    ignored = told and told.si_signo in ENDS and signal.getsignal(told.si_signo) == signal.SIG_IGN  # as background jobs do
    return (told.si_signo, told.si_pid) if told and not ignored else (0, 0)


def release_signals(handler: Any = None, numbers: Iterable[int] = ()) -> None:
    """Have signals handled so; let through what was held back, maybe by a supervisor that this process was before a SIGHUP."""
    for number in numbers:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class Worker:
    """One waitress that serves until it is told to stop, then finishes what it has."""

    def __init__(self, app: App, opened: Any, core: Optional[int] = None) -> None:
        self._app, self._grace, self._stopping, self._stopped_by = app, app.settings.GRACE, False, signal.SIGTERM
        pin = Pin(core) if core is not None else None
        app.start()
        self._server = waitress_server(app, opened, app.settings, pin)
        app.watch.resume = self._server.add_task
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=hold_signals, after_in_parent=release_signals, after_in_child=self._let_go)
        if pin is not None:
            sys.addaudithook(pin.free)  # waitress's own threads are there by now

    def _let_go(self) -> None:
        """Let a child that a function forks keep neither the port nor anybody's connection open, nor our signal handlers."""
        for part in list(self._server._map.values()):
            part.socket.close()
        release_signals(signal.SIG_DFL, (signal.SIGHUP, *ENDS))

    def stop(self, number: int = signal.SIGTERM, _: Any = None) -> None:
        """Begin to drain; a signal handler."""
        self._stopped_by, self._stopping = signal.Signals(number), True
        self._server.pull_trigger()

    def run(self, parent: Optional[int] = None) -> None:
        """Serve until `stop`, or until the supervisor, the parent process, is gone."""
        from waitress import wasyncore
        if parent is not None:
            self._app.watch.retire = functools.partial(self._retire, parent)
        turn = functools.partial(wasyncore.loop, use_poll=self._server.adj.asyncore_use_poll, map=self._server._map, count=1)
        while not self._stopping and self._server.accepting and (parent is None or os.getppid() == parent):
            if parent is None:
                notify("WATCHDOG=1")
            turn(timeout=1)
        wasyncore.dispatcher.close(self._server)  # the listening socket of this process; the trigger stays
        if parent is None:
            log.warning(STOP_TEXT, self._stopped_by.name)
        self._app.background.drain()
        if not self._finish(turn, self._grace):
            self._app.watch.cut_off()
            self._finish(turn, CUT_SECONDS)
            for channel in list(self._server.active_channels.values()):
                channel.handle_close()
            sleep(.1)  # for streams to notice, so that they are recorded

    def _finish(self, turn: Callable[..., Any], seconds: float) -> bool:
        until = monotonic() + seconds
        while (busy := self._busy()) and monotonic() < until:
            turn(timeout=.05)
        return not busy

    def _retire(self, parent: int, seconds: float) -> None:
        self._grace = max(self._grace, seconds)
        if not self._stopping:
            self.stop()
            send_signal(signal.SIGUSR1, [parent])  # it puts another in this one's place

    def _busy(self) -> bool:
        """Tell whether a request is being read or answered, or a queued call runs; idle connections are closed."""
        for channel in list(self._server.active_channels.values()):
            quiet = abs(time() - channel.last_activity) > QUIET_SECONDS
            if not channel.requests and channel.request is None and not channel.total_outbufs_len and quiet:
                channel.handle_close()
        return bool(self._server.active_channels or self._app.runner.running)


class Supervisor:
    """Forks the workers, replaces those that die, drains them on SIGTERM and SIGINT.

    It keeps its signals blocked and takes them one by one, so that they wait while it turns into a new fnserve.py.
    """

    def __init__(self, app: App, opened: Any, former: Iterable[int]) -> None:
        self._app, self._socket = app, opened
        self._leaving = set(former)  #: who finish what they have: relieved, or of the code before a SIGHUP
        self._workers: dict[int, tuple[int, float]] = {}  #: pid -> number, monotonic time of birth
        self._due = dict.fromkeys(range(app.settings.WORKERS), 0.0)  #: number -> when it may be forked
        self._backoff = dict.fromkeys(self._due, 0.0)  #: number -> seconds to wait, for workers that die at birth

    def run(self) -> int:
        """Supervise until a signal; return the exit status."""
        hold_signals()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever ignores it can't wait for children
        self._replace(monotonic())
        notify("READY=1")
        send_signal(signal.SIGTERM, self._leaving)  # others are there now
        while True:
            number, pid = wait_for_signal(min([1.0] + [due - monotonic() for due in self._due.values()]))
            if number in ENDS:
                return self._drain(number)
            if number == signal.SIGHUP:
                self._execute_again()
            elif number == signal.SIGUSR1 and pid in self._workers:
                self._leaving.add(pid)
                self._due[self._workers.pop(pid)[0]] = 0.0
            self._reap()
            self._replace(monotonic())
            notify("WATCHDOG=1")

    def _execute_again(self) -> None:
        """Become the fnserve.py that lies there now, with the same socket and process id; go on where that can't start.

        The workers serve on until the new ones are there.
        """
        import subprocess
        command = python_command("main()", *sys.argv[1:])
        try:
            subprocess.run(command, env={**os.environ, "FNSERVE_TRIAL": "1"}, cwd=STARTED_IN, capture_output=True, text=True,
                           check=True, timeout=TRIAL_SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            why = getattr(error, "stderr", None) or error
            log.error("SIGHUP: the new fnserve.py does not start, the old one goes on: %s", str(why).strip()[-2000:])
            return
        os.set_inheritable(self._socket.fileno(), True)
        os.environ.update(FNSERVE_SOCKET=str(self._socket.fileno()),
                          FNSERVE_FORMER=" ".join(map(str, [*self._leaving, *self._workers])))
        notify("RELOADING=1")
        os.chdir(STARTED_IN)
        os.execv(sys.executable, command)

    def _fork(self, number: int) -> None:
        supervisor = os.getpid()
        pid, status = os.fork(), 1
        if pid:
            self._workers[pid] = number, monotonic()
            return
        try:
            self._work(number, supervisor)
            status = 0
        except BaseException as error:  # a worker's end, whatever its reason, must not run the supervisor's code
            log.error("worker %d: %s", number, user_traceback(error))
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(status)

    def _work(self, number: int, supervisor: int) -> None:
        # the terminal sends them to all; the supervisor passes on a stop
        release_signals(signal.SIG_IGN, (signal.SIGHUP, signal.SIGINT))
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._app.rates.share = self._app.settings.WORKERS
        worker = Worker(self._app, self._socket, cores[number % len(cores)] if cores else None)
        signal.signal(signal.SIGTERM, worker.stop)
        worker.run(supervisor)

    def _reap(self) -> None:
        while self._workers or self._leaving:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            self._leaving.discard(pid)
            if pid in self._workers:
                number, born = self._workers.pop(pid)
                young = monotonic() - born < BIRTH_SECONDS
                self._backoff[number] = min(MAX_BACKOFF, max(.1, self._backoff[number] * 2)) if young else 0.0
                self._due[number] = monotonic() + self._backoff[number]
                code = os.waitstatus_to_exitcode(status)
                how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
                log.error("worker %d (process %d) ended %s; it is replaced", number, pid, how)

    def _replace(self, now: float) -> None:
        for number in [number for number, due in self._due.items() if due <= now]:
            try:
                self._fork(number)
                del self._due[number]
            except OSError as error:  # no memory or no process ids left just now
                log.error("worker %d can't be started: %s", number, error)
                self._due[number] = now + 1

    def _drain(self, number: int) -> int:
        """Tell the workers to finish; kill those that don't within GRACE and a little, or all at a second signal."""
        notify("STOPPING=1")
        log.warning(STOP_TEXT, signal.Signals(number).name)
        self._socket.close()
        self._leaving.update(self._workers)
        self._workers.clear()  # nobody takes their places
        send_signal(signal.SIGTERM, self._leaving)
        until, number = monotonic() + self._app.settings.GRACE + 2, 0
        while self._leaving and monotonic() < until and number not in ENDS:
            number, _ = wait_for_signal(until - monotonic())
            self._reap()
        send_signal(signal.SIGKILL, self._leaving)
        return 0


def send_signal(number: int, pids: Iterable[int]) -> None:
    """Send a signal to those of the processes that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def serve_first_look(app: App, opened: Any) -> None:
    """Serve with wsgiref where waitress is missing: good enough to look at, not to run."""
    print("waitress is missing, so this is for a first look only: sudo apt-get install python3-waitress"
          "  (or: pip install waitress)", file=sys.stderr, flush=True)
    import socketserver
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

    class Server(socketserver.ThreadingMixIn, WSGIServer):
        daemon_threads = True

    class Handler(WSGIRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Stay silent: the journal has it."""

    server = Server(opened.getsockname()[:2], Handler, bind_and_activate=False)
    server.socket.close()
    server.socket, (server.server_name, server.server_port) = opened, opened.getsockname()[:2]
    server.setup_environ()
    server.set_app(app)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


def serve_alone(app: App, opened: Any) -> None:
    """Serve in this process, without a supervisor."""
    worker = Worker(app, opened)
    for number in ENDS:
        signal.signal(number, worker.stop)
    notify("READY=1")
    worker.run()


def give_back_memory() -> None:
    """Return to the system what compiling this file has left free (glibc's malloc_trim(3)): 10 MB of 45."""
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes
        ctypes.CDLL(None).malloc_trim(0)


def announce(names: list[str], host: str, port: int) -> None:
    """Print where a function and the admin pages are."""
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    first = "/function/" + quote("hello" if "hello" in names else names[0]) if names else "/"
    print(f"fnserve {__version__}: http://{shown}:{port}{first}   admin: http://{shown}:{port}/login", flush=True)


def serve(app: App) -> int:
    """Serve until a signal; return the exit status."""
    if os.environ.get("FNSERVE_TRIAL"):  # a supervisor wants to know whether this file would start
        return 0
    opened, former = open_socket(app.settings), [int(pid) for pid in os.environ.pop("FNSERVE_FORMER", "").split()]
    announce(app.functions.names(), *opened.getsockname()[:2])
    serve_here = serve_alone
    try:
        import waitress.server  # noqa: F401  # before the fork, so that the workers share its pages
    except ImportError:
        serve_here = serve_first_look
    gc.collect()
    give_back_memory()
    if serve_here is serve_alone and app.settings.WORKERS and hasattr(signal, "sigtimedwait"):
        capture_output(app.settings)
        gc.freeze()  # what is there now is never looked at again, so its pages stay shared
        return Supervisor(app, opened, former).run()
    if hasattr(signal, "pthread_sigmask"):
        release_signals()
    send_signal(signal.SIGTERM, former)
    serve_here(app, opened)
    return 0

# == 19 COMMAND LINE ======================================================
# `main` and one function per command, which returns the exit status, None for 0. Uses all of the above.


def cmd_serve(arguments: Any, options: dict[str, Any]) -> int:
    """serve the functions (the default)"""
    first = not os.path.exists("functions") and not options.get("FUNCTIONS_DIR")
    app = prepare(**options)
    if first and not os.path.exists(app.settings.FUNCTIONS_DIR):
        write_new(os.path.join(app.settings.FUNCTIONS_DIR, "hello.py"), HELLO)
    return serve(with_functions(app))


def with_functions(app: App) -> App:
    """Return the app; refuse a FUNCTIONS_DIR that isn't there."""
    if not os.path.isdir(app.settings.FUNCTIONS_DIR):
        raise SettingError(f"FUNCTIONS_DIR={app.settings.FUNCTIONS_DIR!r}: there is no such directory")
    return app


def write_new(path: str, text: str, mode: int = 0o666) -> bool:
    """Write a file that isn't there yet; tell whether it was written."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with open(path, "x", encoding="utf-8", opener=functools.partial(os.open, mode=mode)) as file:
            file.write(text)
    except FileExistsError:
        return False
    print(f"made {path}")
    return True


def cmd_init(arguments: Any, options: dict[str, Any]) -> None:
    """make functions/hello.py and the secrets in a directory"""
    os.makedirs(arguments.directory, exist_ok=True)
    settings = Settings(options, arguments.directory)
    write_new(os.path.join(settings.FUNCTIONS_DIR, "hello.py"), HELLO)
    for name, value in make_secrets(settings).items():
        print(f"{name}={value}  (in {settings.env_files[1]})" if name == "SECRET_TOKEN" else f"made {name}")


def cmd_new(arguments: Any, options: dict[str, Any]) -> int:
    """make a function that says hello"""
    app = App(Settings(options))
    if not valid_name(arguments.name) or arguments.name in app.reserved:
        raise SettingError(f"{arguments.name!r}: {TEXTS['bad_name'][1]}")
    if hider := app.functions.hider(arguments.name):
        raise SettingError(f"{arguments.name}: {TEXTS['hidden'][1].format(hider)}")
    path = app.functions.path(arguments.name)
    if write_new(path, HELLO):
        return 0
    print(f"{path} exists already", file=sys.stderr)
    return 1


def cmd_list(arguments: Any, options: dict[str, Any]) -> None:
    """list the functions"""
    app = with_functions(prepare(**options))
    for row in (describe_row(app, row) for row in function_rows(app)):
        print_row(row, row["reason"] or row["summary"])


def print_row(row: Mapping[str, Any], more: str) -> None:
    print(f"{row['name']:24} {row['calls']:8} calls {row['errors']:6} errors  {more}")


def read_data(text: str) -> bytes:
    """Return what -d says: text, or what @FILE holds, where - is the standard input."""
    if not text.startswith("@"):
        return os.fsencode(text)
    return read_bytes(text[1:] if text != "@-" else 0)


def cmd_call(arguments: Any, options: dict[str, Any]) -> int:
    """call a function without a server, and print its answer"""
    data, headers = arguments.data, {}  # type: Optional[bytes], dict[str, str]
    for name, _, value in (line.partition(":") for line in arguments.header):
        headers[name.strip()] = f"{headers[name.strip()]}, {value.strip()}" if name.strip() in headers else value.strip()
    if data is not None and not any(name.lower() == "content-type" for name in headers):
        headers["Content-Type"] = "application/" + ("json" if data.lstrip()[:1] in (b"{", b"[") else "x-www-form-urlencoded")
    app = prepare(**options)
    out, sys.stdout = sys.stdout, sys.stderr  # what the function prints must not get into what it answers
    app.start()
    client = Client(lambda environ, start: app({**environ, "fnserve.run": Run("cli")}, start))
    query: Any = [pair.partition("=")[::2] for pair in arguments.query]
    method = arguments.method or ("GET" if data is None else "POST")
    response = client.open("/function/" + quote(arguments.name), method, query=query, data=data, headers=headers)
    body = response.get_data()
    getattr(out, "buffer").write(body + b"\n" if out.isatty() and not body.endswith(b"\n") else body)
    if response.code >= 400:
        print(response.status, file=sys.stderr)
    return int(response.code >= 400)


def cmd_check(arguments: Any, options: dict[str, Any]) -> int:
    """load every function, exit 1 where one can't be"""
    app, failed = with_functions(prepare(**options)), 0
    app.functions.install()
    app.config.current()
    log.handlers[:] = [logging.NullHandler()]  # the errors are printed below, a line each
    names = app.functions.names()
    groups = {"", *(name[:at + 1] for name in names for at, sign in enumerate(name) if sign == "/")}
    for name in [*names, *(group + HOOKS for group in sorted(groups) if app.functions.get(group + HOOKS))]:
        function = app.functions.get(name)
        error, code = (function.error, function.code) if function else (None, None)
        helper = isinstance(error, NoEntry) and code is not None and not code.entries
        failed += error is not None and not helper
        print(f"{name}: {'fine, a helper module' if helper else error or 'fine'}")
    return int(failed > 0)


def cmd_logs(arguments: Any, options: dict[str, Any]) -> None:
    """print the last calls"""
    app, after = prepare(**options), 0
    while True:
        rows = read_calls(app, arguments.name or "", limit=arguments.n if not after else 1000, after=after)
        for row in reversed(rows):
            print(f"{local_time(row['time'])} {row['id']} {row['status']} {row['ms']:8.1f} ms {row['method']} {row['path']}")
            for text in filter(None, (row["output"], row["error"])):
                print("    " + text.rstrip().replace("\n", "\n    "))
        after = max([after] + [row["number"] for row in rows])
        if not arguments.follow:
            return
        sys.stdout.flush()
        sleep(1)


def cmd_stats(arguments: Any, options: dict[str, Any]) -> None:
    """print how often each function was called"""
    for row in stats_rows(prepare(**options), time()):
        print_row(row, f"p50 {milliseconds(row['p50'])}  p95 {milliseconds(row['p95'])}")


def cmd_jobs(arguments: Any, options: dict[str, Any]) -> None:
    """list the jobs and when they fire next"""
    app = prepare(**options)
    app.schedule.sync(app.functions.schedules())
    for row in app.schedule.jobs():
        job = app.schedule.show(row)
        print(f"{job['id']:24} {job['func']:24} {'paused' if job['paused'] else job['next_run_time'] or 'never'}"
              + "".join(f"  {name} {job[name]}" for name in JOB_COUNTS))


def cmd_queue(arguments: Any, options: dict[str, Any]) -> None:
    """list queued calls, the newest last"""
    for row in reversed(prepare(**options).store.read("SELECT * FROM fn_queue ORDER BY created DESC LIMIT ?", arguments.n)):
        print(f"{row['id']} {row['state']:8} {row['function']:24} runs {row['attempts']}  {row['status'] or ''}")


def cmd_next(arguments: Any, options: dict[str, Any]) -> None:
    """say when a schedule fires: EXPRESSION as in SETTINGS, or a JSON dict of trigger fields"""
    zone = Settings(options).TIMEZONE
    try:
        now = read_moment("--from", arguments.start, read_zone(zone)) if arguments.start else time()
        given = json.loads(arguments.expression) if arguments.expression.startswith("{") else arguments.expression
        trigger = parse_schedule(given, zone, now)
    except ValueError as error:  # TriggerError, and what json raises
        raise SettingError(str(error)) from None
    for _ in range(arguments.n):
        moment = trigger.next(now)
        print(trigger.iso(moment) or "never")
        if moment is None:
            break
        now = moment


def cmd_deploy(arguments: Any, options: dict[str, Any]) -> int:
    """send function files to a running fnserve"""
    settings = Settings(options, arguments.dir)
    token, failed, root = arguments.token or settings.SECRET_TOKEN, 0, settings.FUNCTIONS_DIR + os.sep
    for path in arguments.files:
        full = os.path.abspath(path)
        _, below, name = f"{os.sep}{path}".rpartition(f"{os.sep}{PACKAGE}{os.sep}")  # as it was typed
        name = full[len(root):] if full.startswith(root) else name if below else os.path.basename(full)
        name = name.removesuffix(".py").replace(os.sep, "/")
        try:
            print(f"{name}: version {send_code(arguments.to, token, name, read_source(full))}")
        except (LoadError, HTTPException) as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed = 1
    return failed


def send_code(url: str, token: str, name: str, source: bytes, page: str = "update_function") -> int:
    """Save code as a function of another fnserve, a new one where it isn't there; return its version. LoadError: refused."""
    import urllib.error
    import urllib.request
    sent = json.dumps({"module_name": name, "code": decode_source(source)}).encode()
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/function/{page}", sent, {
            "Content-Type": "application/json", "Accept": "application/json", "Accept-Language": "en",
            "Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(json.load(answer)["version"])
    except urllib.error.HTTPError as error:
        if error.code == 404 and page == "update_function":
            return send_code(url, token, name, source, "save_function")
        said = error.read(10_000).decode("utf-8", "replace")
        found = re.search(r'"message":\s*("(?:[^"\\]|\\.)*")', said)
        raise LoadError(f"{error.code} {json.loads(found[1]) if found else said.strip()}") from None
    except (ValueError, KeyError) as error:
        raise SettingError(f"--to {url}: there is no fnserve ({error})") from None


def cmd_backup(arguments: Any, options: dict[str, Any]) -> None:
    """write functions, database and settings into a zip file, while the server runs"""
    app = prepare(**options)
    app.folder.fold()
    if os.path.exists(arguments.file):
        raise OSError(f"{arguments.file} exists already, and is not written over")
    with os.fdopen(os.open(arguments.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        try:
            write_backup(app.settings, file, arguments.secrets)
        except BaseException:
            os.unlink(arguments.file)  # half a backup is worse than none
            raise
    print(f"made {arguments.file}")


def cmd_restore(arguments: Any, options: dict[str, Any]) -> None:
    """bring back functions and database from a backup; what was there is kept beside it. Settings stay as they are"""
    import tempfile
    import zipfile
    settings = Settings(options)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(settings.FUNCTIONS_DIR)) as scratch:  # where a rename reaches
        fresh = os.path.join(scratch, PACKAGE)
        try:
            with zipfile.ZipFile(arguments.file) as archive:
                if "serverless.db" not in archive.namelist():
                    raise zipfile.BadZipFile("it holds no database")
                archive.extractall(scratch)  # which compares checksums
            os.makedirs(fresh, exist_ok=True)
            with contextlib.closing(sqlite3.connect(os.path.join(scratch, "serverless.db"))) as found:
                if found.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
                    raise zipfile.BadZipFile("its database is damaged")
                bring_back(found, fresh, settings)
        except Exception as error:  # there is hardly one that damaged archives don't make zipfile raise
            raise OSError(f"{arguments.file}: {error}; nothing was changed") from None


def bring_back(found: sqlite3.Connection, fresh: str, settings: Settings) -> None:
    """Put the functions and the database of a backup in place: both or, where the database can't be written, neither."""
    suffix = strftime(".%Y%m%d-%H%M%S")
    with contextlib.ExitStack() as undo:
        if os.path.exists(settings.DB_PATH):
            keep_database(settings.DB_PATH, settings.DB_PATH + suffix, undo)
        make_private(settings.DB_PATH)
        if os.path.isdir(settings.FUNCTIONS_DIR):
            os.rename(settings.FUNCTIONS_DIR, settings.FUNCTIONS_DIR + suffix)
            undo.callback(os.rename, settings.FUNCTIONS_DIR + suffix, settings.FUNCTIONS_DIR)
        os.rename(fresh, settings.FUNCTIONS_DIR)  # first: the database may be locked for long
        undo.callback(os.rename, settings.FUNCTIONS_DIR, fresh)
        with contextlib.closing(sqlite3.connect(settings.DB_PATH, timeout=30)) as database:
            found.backup(database)
        undo.pop_all()


def keep_database(path: str, aside: str, undo: contextlib.ExitStack) -> None:
    """Copy the database beside itself; one that can't be read, which may be why a backup is brought back, is moved there."""
    os.close(os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with contextlib.closing(sqlite3.connect(path)) as old, contextlib.closing(sqlite3.connect(aside)) as copy:
            old.backup(copy)
    except sqlite3.DatabaseError as error:
        if not re.search("not a database|malformed", str(error)):  # it is locked, or the disk is full; 3.9 tells by the text
            os.unlink(aside)
            raise
        for end in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(path + end, aside + end)
                undo.callback(os.replace, aside + end, path + end)


def serve_exported(name: str, settings: dict[str, Any]) -> Callable[..., Any]:
    """Make what functions-framework serves of an export: the function `name`, for requests of the real Flask."""
    import flask
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    state = os.environ.get("FNSERVE_STATE", "/tmp/fnserve")  # the only directory that it writes to
    os.makedirs(state, exist_ok=True)
    app = App(Settings({"ADMIN": "off", "SCHEDULER_ALLOWED_HOSTS": "-", "JOURNAL_DIR": f"{state}/journal", "KEEP_DAYS": 0,
                        "DB_PATH": f"{state}/serverless.db", "LOG_FILE": f"{state}/error.log", **settings}))
    app.queues, path = False, f"/function/{name}".encode().decode("latin-1")  # nobody would run what is queued here

    def main(request: Any) -> Any:
        asked, started = request.environ["PATH_INFO"], []  # type: str, list[Any]
        environ = {**request.environ, "PATH_INFO": path + ("" if asked == "/" else asked),
                   "REQUEST_URI": quote(asked.encode("latin-1"))}  # what the sender of a webhook has signed
        body = app(environ, lambda *values: started.append(values))
        return flask.Response(body, *started[-1][:2])
    return main


EXPORTED = '''\
"""{name}, exported from fnserve: functions-framework --target main serves it, and so do Cloud Run functions."""
import functions_framework

import fnserve

main = functions_framework.http(fnserve.serve_exported({name!r}, {settings!r}))
'''


def exported_requirements() -> str:
    needed = ["functions-framework\n"]  # serves in place of waitress
    with contextlib.suppress(FileNotFoundError), open("requirements.txt", encoding="utf-8") as file:
        needed += [line for line in file if not line.startswith(("waitress", "functions-framework"))]
    return "".join(needed)


def exported_env(config: Mapping[str, Optional[str]]) -> str:
    """Return the values of .env that are no settings, quoted as python-dotenv reads them."""
    own = {row.name for row in SETTINGS_TABLE}
    return "".join("{}='{}'\n".format(name, value.replace("\\", "\\\\").replace("'", "\\'")) for name, value in config.items()
                   if name not in own and value is not None)


def cmd_export(arguments: Any, options: dict[str, Any]) -> None:
    """write a directory that Google's functions-framework serves"""
    app, name, target = App(Settings(options)), arguments.name, arguments.to
    if not app.functions.exists(name):
        raise SettingError(f"there is no function {name!r}")
    if os.path.isdir(target) and os.listdir(target):
        raise SettingError(f"--to {arguments.to}: the directory is not empty")
    import shutil
    config = app.config.current()
    shown = {"MAX_BODY", "TIMEOUT", "TRUSTED_PROXY", "UI_LANG", "SESSION_HOURS"} & set(config)
    files = {
        "main.py": EXPORTED.format(name=name, settings={key: config[key] for key in sorted(shown)}),
        "requirements.txt": exported_requirements(), "Procfile": "web: functions-framework --target main --port $PORT\n",
        ".env": exported_env(config)}
    for directory, copied in ((app.settings.FUNCTIONS_DIR, PACKAGE), ("templates", "templates")):
        if os.path.isdir(directory):
            shutil.copytree(directory, os.path.join(target, copied), ignore=shutil.ignore_patterns("_*_", ".*"))
    shutil.copy(__file__, os.path.join(target, "fnserve.py"))
    for file_name, text in files.items():
        write_new(os.path.join(target, file_name), text, 0o600 if file_name == ".env" else 0o666)


UNIT = """\
# systemd unit for fnserve: put it into /etc/systemd/system/, then  systemctl enable --now fnserve
[Unit]
Description=fnserve, functions over HTTP
After=network.target

[Service]
Type=notify
WatchdogSec=60
User={user}
WorkingDirectory={directory}
ExecStart={python} -m fnserve
Restart=always
RestartSec=2
TimeoutStopSec={stop}
UMask=0077

# Functions are Python code of whoever holds SECRET_TOKEN. This is what they can reach: their directory, and the network.
ReadWritePaths={directory}
ProtectSystem=strict
ProtectHome={home}
{bind}{sandbox}CapabilityBoundingSet=
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
ProtectProc=invisible
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallFilter=sched_setaffinity
SystemCallErrorNumber=EPERM
MemoryMax=80%
TasksMax=512
OOMPolicy=continue

[Install]
WantedBy=multi-user.target
"""

SITE = """\
# nginx site for fnserve: put it into /etc/nginx/sites-enabled/, mind the name and the certificate, then  nginx -s reload
limit_req_zone $binary_remote_addr zone=fnserve_login:1m rate=10r/m;

upstream fnserve {{ server {address}; keepalive 16; }}

server {{
    listen 80; listen [::]:80;
    server_name {name};
    return 301 https://$host$request_uri;
}}

server {{
    listen 443 ssl http2; listen [::]:443 ssl http2;
    server_name {name};
    ssl_certificate     /etc/letsencrypt/live/{name}/fullchain.pem;
    ssl_certificate_key /etc/letsencrypt/live/{name}/privkey.pem;

    client_max_body_size {megabytes}m;   # MAX_BODY
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host $host;
    proxy_set_header X-Forwarded-For $remote_addr;
    proxy_set_header X-Forwarded-Proto $scheme;
    proxy_set_header X-Forwarded-Host $host;
    proxy_buffering off;                 # streams and server-sent events go out as they are made
    proxy_read_timeout {timeout}s;

    location / {{ proxy_pass http://fnserve; }}
    location = /login {{ limit_req zone=fnserve_login burst=10 nodelay; proxy_pass http://fnserve; }}
    # for this machine only: ask fnserve itself, on {address}
    location = /metrics {{ return 403; }}
    location /monitoring/ {{ return 403; }}
}}
"""


SANDBOX = """PrivateTmp PrivateDevices PrivateUsers NoNewPrivileges RestrictNamespaces RestrictRealtime RestrictSUIDSGID
LockPersonality ProtectClock ProtectControlGroups ProtectHostname ProtectKernelLogs ProtectKernelModules ProtectKernelTunables
RemoveIPC"""


def cmd_service(arguments: Any, options: dict[str, Any]) -> None:
    """print a systemd unit for this directory"""
    directory = os.path.abspath(arguments.dir)
    at_home = f"{directory}/".startswith(("/home/", "/root/"))
    stop = round(Settings(options, directory).GRACE) + 10
    print(UNIT.format(user=arguments.user, directory=directory, python=arguments.python, stop=stop,
                      home="tmpfs" if at_home else "yes", bind=f"BindPaths={directory}\n" if at_home else "",
                      sandbox="".join(f"{name}=yes\n" for name in SANDBOX.split())), end="")


def cmd_nginx(arguments: Any, options: dict[str, Any]) -> None:
    """print an nginx site for this directory"""
    if not re.fullmatch(r"[\w.\-*]+", arguments.server_name):
        raise SettingError(f"--server-name {arguments.server_name!r} is no host name")
    settings = Settings(options, arguments.dir)
    host = f"[{settings.HOST}]" if ":" in settings.HOST else settings.HOST
    print(SITE.format(name=arguments.server_name, address=f"{host}:{settings.PORT}", timeout=round(settings.TIMEOUT) + 5,
                      megabytes=-(-settings.MAX_BODY // 1024 ** 2)), end="")


COMMANDS: dict[Callable[..., Optional[int]], dict[str, dict[str, Any]]] = {  # each with what argparse is told of its arguments;
    # paths begin where they are typed, not in --dir
    cmd_serve: {}, cmd_init: {"directory": {"nargs": "?", "default": "."}}, cmd_new: {"name": {}}, cmd_list: {},
    cmd_call: {"name": {"help": "name of the function, a subpath may follow: hello/Tony"}, "-X": {"dest": "method"},
               "-q": {"dest": "query", "action": "append", "default": [], "metavar": "KEY=VALUE"},
               "-H": {"dest": "header", "action": "append", "default": [], "metavar": "'NAME: VALUE'"},
               "-d": {"dest": "data", "type": read_data, "metavar": "DATA|@FILE"}},
    cmd_check: {}, cmd_stats: {}, cmd_jobs: {}, cmd_queue: {"-n": {"type": int, "default": 50}},
    cmd_export: {"name": {}, "--to": {"required": True, "type": os.path.abspath, "metavar": "DIR"}},
    cmd_logs: {"name": {"nargs": "?"}, "-n": {"type": int, "default": 20}, "-f": {"dest": "follow", "action": "store_true"}},
    cmd_deploy: {"files": {"nargs": "+", "metavar": "FILE"}, "--to": {"required": True, "metavar": "URL"}, "--token": {}},
    cmd_backup: {"file": {"type": os.path.abspath, "metavar": "FILE"}, "--secrets": {"action": "store_true"}},
    cmd_restore: {"file": {"type": os.path.abspath, "metavar": "FILE"}},
    cmd_next: {"expression": {"metavar": "EXPRESSION"}, "-n": {"type": int, "default": 5},
               "--from": {"dest": "start", "metavar": "ISO-TIME"}},
    cmd_service: {"--user": {"default": "fnserve"}, "--python": {"default": "/usr/bin/python3"}},
    cmd_nginx: {"--server-name": {"required": True}}}


def make_parser() -> Any:
    """Make the parser of the command line; every setting that is no secret is an option too."""
    import argparse  # 500 kB that a plain start does without
    settings = argparse.ArgumentParser(add_help=False)
    settings.add_argument("--dir", default=argparse.SUPPRESS, help="directory to run in (default: the current one)")
    group = settings.add_argument_group("settings")
    for row in SETTINGS_TABLE:
        if not row.secret:
            group.add_argument("--" + row.name.lower().replace("_", "-"), dest=row.name, default=argparse.SUPPRESS,
                               metavar="VALUE", help=f"{row.help} ({row.default or 'blank'})".replace("%", "%%"))
    parser = argparse.ArgumentParser(prog="fnserve.py", parents=[settings],
                                     description="Your own Google Cloud Functions, in one file.")
    parser.set_defaults(run=cmd_serve)
    parser.add_argument("--version", action="version", version=f"fnserve {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for function, taken in COMMANDS.items():
        command = commands.add_parser(function.__name__[4:], parents=[settings], help=function.__doc__)
        command.set_defaults(run=function)
        for name, how in taken.items():
            command.add_argument(name, **how)
    return parser


def serve_from_module() -> None:
    """Start anew as an imported module, which Python keeps compiled: a script's syntax tree would stay, 18 MB a process."""
    is_script = __name__ == "__main__" and __spec__ is None and os.path.realpath(__file__).endswith(".py")
    if is_script and os.name == "posix" and sys.executable:
        os.execv(sys.executable, python_command("main()", *sys.argv[1:]))


def main(argv: Optional[list[str]] = None) -> int:
    """Run a command; return 0, 1 where it failed or 2 for wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    log.addHandler(logging.StreamHandler())
    log.propagate = False
    try:
        if not argv:
            serve_from_module()
            return cmd_serve(None, {})
        arguments = make_parser().parse_args(argv)
        arguments.dir = getattr(arguments, "dir", ".")
        if arguments.run is cmd_serve:
            serve_from_module()
        options = {row.name: getattr(arguments, row.name) for row in SETTINGS_TABLE if hasattr(arguments, row.name)}
        if arguments.run not in (cmd_service, cmd_nginx, cmd_deploy):
            os.chdir(arguments.dir)
        return arguments.run(arguments, options) or 0
    except (SettingError, StoreError, LoadError, OSError, sqlite3.Error) as error:
        print(f"fnserve: {error}", file=sys.stderr)
        return 2 if isinstance(error, (SettingError, StoreError)) else 1
    except KeyboardInterrupt:
        return 1


if __name__ == "__main__":
    sys.modules["fnserve"] = sys.modules["__main__"]  # one module, however function files come by it
    sys.exit(main())
