"""The cage at home: `pytest` tests this project in it, `python test.py` rehearses an algorithm.

Both do what the cage does: they start the entry of datavillage.yaml as a process of its own, with
the documented variables, a Redis over TCP and an API over HTTP. The Redis is fakeredis, embedded,
so that nothing has to be installed. Where a redis-server is found, the tests use that as well.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fakeredis
import pytest
import redis
import yaml

import index
import process

ROOT = Path(__file__).resolve().parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIG = yaml.safe_load((ROOT / "datavillage.yaml").read_text(encoding="utf-8"))
USERS = {
    "alice": '<https://example.org/alice> <https://schema.org/name> "Alice" .\n',
    "bob": '<https://example.org/bob> <https://schema.org/knows> "Zoë", "佐江" .\n',
}
EVENT = {"jobId": "job-1", "trigger": "rehearsal"}
TOKEN = "a-token-that-no-log-may-hold"
PATIENCE_SECONDS = 30  # until a test gives up waiting: far more than anything here takes


# The cage: an API, a Redis, and the processes started with them


class StandInApi(ThreadingHTTPServer):
    """The part of the Datavillage API that a process uses, on a free port of this machine.

    Takes each user's data by user ID; collects what is stored by user ID and kind.
    """

    daemon_threads = True

    def __init__(self, users: dict[str, str | bytes]) -> None:
        super().__init__(("127.0.0.1", 0), StandInApiHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.users = users
        self.stored: dict[tuple[str, str], str] = {}
        # What the tests look at: "GET activeUsers/alice/data" and the like, in order.
        self.requests: list[str] = []
        self.headers: list[Any] = []
        self.clients: set[tuple[str, int]] = set()
        # What they make go wrong: answers to such a request instead of the right one, in order;
        # and requests whose answer waits for the gate.
        self.faults: dict[str, list[dict[str, Any]]] = {}
        self.held: set[str] = set()
        self.gate = threading.Event()

    def __enter__(self) -> "StandInApi":
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.gate.set()
        self.shutdown()
        self.server_close()

    def until_held(self) -> None:
        """Wait until each of the requests to be held has come."""
        until(lambda: self.held <= set(self.requests), "the requests to be held have come")


class StandInApiHandler(BaseHTTPRequestHandler):
    """Answers one connection to the stand-in API."""

    server: StandInApi
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # so that head and body leave together, or each answer takes 40 ms longer

    def do_GET(self) -> None:
        """Answer any request; PUT comes here as well."""
        api = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        # A path that came through a proxy holds the whole URL.
        path = [unquote(segment) for segment in urlsplit(self.path).path.split("/")[1:]]
        request = f"{self.command} {'/'.join(path[4:])}"
        api.requests.append(request)
        api.headers.append(self.headers)
        api.clients.add(self.client_address)
        if request in api.held:
            api.gate.wait()
        if api.faults.get(request):
            self.answer(**api.faults[request].pop(0))
        elif self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer(401)
        elif path[:5] != ["clients", "client-1", "applications", "app-1", "activeUsers"]:
            self.answer(404)
        elif path[5:] == []:
            self.answer(200, json.dumps(list(api.users)), {"Content-Type": "application/json"})
        elif len(path) != 7 or path[5] not in api.users:
            self.answer(404)
        elif self.command == "GET" and path[6] == "data":
            self.answer(200, api.users[path[5]], {"Content-Type": "text/turtle"})
        elif self.command == "PUT" and self.headers["Content-Type"] == "text/turtle":
            api.stored[path[5], path[6]] = body.decode("utf-8", "replace")
            self.answer(200)
        else:
            self.answer(400)

    do_PUT = do_GET

    def answer(
        self, status: int, text: str | bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        """Send an answer; status 0 stands for a connection cut without one."""
        if status == 0:
            self.close_connection = True
            return
        body = text.encode("utf-8") if isinstance(text, str) else text
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Print nothing: the log belongs to the process."""


class EmbeddedRedis:
    """fakeredis behind a free port of this machine."""

    def __enter__(self) -> "EmbeddedRedis":
        self.server = fakeredis.TcpFakeServer(("127.0.0.1", 0))
        self.port = self.server.server_address[1]
        self.options: dict[str, Any] = {}  # of a client
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class RealRedis:
    """A redis-server on a free port of this machine, which keeps its data in a folder."""

    def __init__(self, folder: Path, certificate: Path | None = None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder = folder
        self.certificate = certificate
        self.options = {"ssl": True, "ssl_ca_certs": str(certificate)} if certificate else {}

    def __enter__(self) -> "RealRedis":
        command = ["redis-server", "--dir", str(self.folder), "--appendonly", "yes", "--save", ""]
        if self.certificate:
            command += ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            command += ["--tls-cert-file", str(self.certificate)]
            command += ["--tls-key-file", str(self.certificate.with_suffix(".key"))]
            command += ["--tls-ca-cert-file", str(self.certificate)]
        else:
            command += ["--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            with redis.Redis("127.0.0.1", self.port, **self.options) as client:
                until(lambda: can_ping(client), "redis-server answers")
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End it at once, as a machine that fails does."""
        self.process.kill()
        self.process.wait()

    def restart(self, *, keep_data: bool = True) -> None:
        """Start again what was ended."""
        if not keep_data:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
        self.__enter__()


def can_ping(client: redis.Redis) -> bool:
    """Tell whether Redis answers."""
    try:
        return client.ping()
    except redis.ConnectionError:
        return False


class Run:
    """One process, started as the cage starts it; its log goes to a file, or is let through."""

    def __init__(self, command: list[str], folder: Path, variables: dict, log: Path | None) -> None:
        self.log_file = log
        with open(log, "wb") if log else contextlib.nullcontext() as output:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=variables,
                stdout=output,
                stderr=output and subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the rehearsal, which then ends this too
            )

    @property
    def log(self) -> str:
        """All that the process has written so far."""
        return self.log_file.read_text(encoding="utf-8")

    def until(self, text: str) -> "Run":
        """Wait until the log holds a text."""
        until(lambda: text in self.log or self.process.poll() is not None, text)
        assert text in self.log, self.log
        return self

    def end(self) -> int:
        """Wait for the end; return the exit status."""
        return self.process.wait(PATIENCE_SECONDS)


class Cage:
    """What a process finds in the cage: the queue, the API, and the variables that name them."""

    def __init__(
        self, api: StandInApi, server: EmbeddedRedis | RealRedis, code: Path = ROOT
    ) -> None:
        self.api = api
        self.server = server
        self.queue = redis.Redis("127.0.0.1", server.port, **server.options)
        self.code = code
        self.runs: list[Run] = []
        self.variables = {
            "DV_URL": api.url,
            "DV_TOKEN": TOKEN,
            "DV_APP_ID": "app-1",
            "DV_CLIENT_ID": "client-1",
            "REDIS_SERVICE_HOST": "127.0.0.1",
            "REDIS_SERVICE_PORT": str(server.port),
            # For the entry to be found in the environment that this Python is of.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }

    def __enter__(self) -> "Cage":
        return self

    def __exit__(self, *exception: object) -> None:
        for run in self.runs:
            run.process.kill()
            run.process.wait()
        self.queue.close()

    def publish(self, event: dict[str, Any]) -> str:
        """Publish an event as the platform does; return the message's ID."""
        now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
        return self.publish_raw(msg_data=json.dumps(event | {"msg_dt": now.isoformat()}))

    def publish_raw(self, **fields: str | bytes) -> str:
        """Publish a message with any fields; return its ID."""
        return self.queue.xadd("events", fields, maxlen=1000, approximate=True).decode()

    def start(
        self,
        constants: str = "",
        variables: dict[str, str] | None = None,
        log_through: bool = False,
    ) -> Run:
        """Start the entry.

        Takes assignments such as `index.RENEW_SECONDS = 1` to make before, variables to set beside
        those of the cage, and whether the log is let through instead of kept.
        """
        command = shlex.split(CONFIG["entry"])
        if constants:
            launcher = f"import sys, index, process; {constants}; sys.exit(index.main())"
            command = [sys.executable, "-c", launcher]
        log = None if log_through else self.code / f"{len(self.runs)}.log"
        self.runs.append(Run(command, self.code, self.variables | (variables or {}), log))
        return self.runs[-1]

    def run(self, **options: Any) -> Run:
        """Start the entry and wait for its end."""
        run = self.start(**options)
        run.end()
        return run

    def pending(self) -> dict[str, int]:
        """Return the IDs of the events not acknowledged, with the deliveries of each."""
        entries = self.queue.xpending_range("events", "consummers", "-", "+", 1000)
        return {entry["message_id"].decode(): entry["times_delivered"] for entry in entries}

    def dead_letters(self) -> list[dict[bytes, bytes]]:
        """Return the fields of what was set aside."""
        return [fields for _, fields in self.queue.xrange("events:dead-letter")]

    def make_old(self, *message_ids: str) -> None:
        """Let pending events look as if their worker had been silent for over a minute."""
        self.queue.xclaim(
            "events", "consummers", "crashed", 0, message_ids, idle=61_000, justid=True
        )

    def deliver_to_another(self, *message_ids: str) -> None:
        """Hand the next events to a worker that is not there, as one that has just crashed."""
        with contextlib.suppress(redis.ResponseError):
            self.queue.xgroup_create("events", "consummers", "0", mkstream=True)
        self.queue.xreadgroup("consummers", "crashed", {"events": ">"}, count=len(message_ids))


def until(condition: Callable[[], object], what: str) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS} s in vain: {what}"
        time.sleep(0.01)


# The fixtures


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy of the project in which compute returns the data, whatever the author made of it."""
    folder = tmp_path / "code"
    folder.mkdir()
    for name in ("README.md", "datavillage.yaml", "index.py", "process.py", "test.py"):
        shutil.copy(ROOT / name, folder)
    edit(folder, "def compute(user_id, data): return data")
    return folder


def edit(code: Path, text: str) -> None:
    """Edit process.py as an author does: what is defined last counts."""
    with open(code / "process.py", "a", encoding="utf-8") as file:
        file.write(f"\n{text}\n")


@pytest.fixture
def api() -> Iterator[StandInApi]:
    """A stand-in API with the sample's users."""
    with StandInApi(dict(USERS)) as api:
        yield api


@pytest.fixture(params=["embedded", "real"])
def cage(request: pytest.FixtureRequest, api: StandInApi, code: Path) -> Iterator[Cage]:
    """A cage, once with each Redis."""
    if request.param == "real":
        yield request.getfixturevalue("real_cage")
        return
    with EmbeddedRedis() as server, Cage(api, server, code) as cage:
        yield cage


@pytest.fixture
def real_cage(api: StandInApi, code: Path, tmp_path: Path) -> Iterator[Cage]:
    """A cage for what is said about waiting, about being away, and about TLS."""
    require("redis-server")
    (tmp_path / "redis").mkdir()
    with RealRedis(tmp_path / "redis") as server, Cage(api, server, code) as cage:
        yield cage


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for this machine, its own CA, with the key beside it."""
    require("openssl")
    path = tmp_path_factory.mktemp("tls") / "ca.crt"
    create_certificate(path)
    return path


def create_certificate(path: Path) -> None:
    """Create a self-signed certificate for 127.0.0.1."""
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext"
    files = ["-keyout", str(path.with_suffix(".key")), "-out", str(path)]
    subject = "subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), subject, *files], check=True, capture_output=True)


def require(program: str) -> None:
    """Skip a test where a program is missing."""
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")


# The algorithm: an author edits compute, and with it this test of the sample


def test_the_sample_tells_the_length_in_a_valid_triple_whatever_the_id():
    for user_id in ("alice", "https://alice.example/card#me", 'a b<c>"d"\\e^`{|}\n', "Zoë", "100%"):
        iri = r'<[^\x00-\x20<>"{}|^`\\]+>'  # IRIREF of the Turtle grammar, without escapes
        assert re.fullmatch(f"{iri} {iri} 4 \\.\n", process.compute(user_id, "Zoë\n")), user_id


# From here on the tests are about the template, with an algorithm of their own. What is deployed:


def test_the_config_has_the_documented_keys_and_types():
    assert set(CONFIG) == {"env", "script", "entry"}
    assert isinstance(CONFIG["env"], str)
    assert isinstance(CONFIG["entry"], str)
    assert all(isinstance(line, str) for line in CONFIG["script"])


def test_the_entry_is_a_python_file_that_is_there():
    program, *arguments = shlex.split(CONFIG["entry"])
    assert program == "python"
    assert [(ROOT / argument).is_file() for argument in arguments] == [True]


def test_the_script_installs_the_five_packages_pinned():
    assert CONFIG["script"] == ["pip install -r requirements.txt"]
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    pins = [re.fullmatch(r"([a-z]+)==[0-9.]+", line) for line in lines if line and line[0] != "#"]
    names = {pin[1] for pin in pins if pin}  # an author may add others, as it suits
    assert names >= {"fakeredis", "pytest", "pyyaml", "redis", "requests"}


# What happens to an event


def test_an_event_ends_as_stored_results(cage: Cage):
    cage.publish(EVENT)
    run = cage.run()
    assert run.end() == 0, run.log
    assert cage.api.stored == {(user_id, "inferences"): data for user_id, data in USERS.items()}
    assert cage.pending() == {}


def test_user_ids_absent_or_null_are_all_a_list_just_those_an_empty_one_nobody(cage: Cage):
    for fields, users in (
        ({}, ["alice", "bob"]),
        ({"userIds": None}, ["alice", "bob"]),
        ({"userIds": ["bob"]}, ["bob"]),
        ({"userIds": []}, []),
    ):
        cage.api.stored.clear()
        cage.publish(EVENT | fields)
        run = cage.run()
        assert run.end() == 0, run.log
        assert [user_id for user_id, kind in sorted(cage.api.stored)] == users, fields


def test_a_user_named_twice_is_processed_once(cage: Cage):
    cage.publish({"userIds": ["bob", "bob"]})
    assert cage.run().end() == 0
    assert cage.api.requests.count("PUT activeUsers/bob/inferences") == 1


def test_the_event_is_handed_on_whole(cage: Cage):
    edit(cage.code, "def process_event(event): print(json.dumps(event, sort_keys=True))")
    event = {"type": "FULL", "data": {"own": [1, None, "ë"]}, "userIds": ["x"], "more": True}
    cage.publish_raw(msg_data=json.dumps(event), other="field")
    run = cage.run()
    assert json.dumps(event, sort_keys=True) in run.log.splitlines()


def test_one_run_takes_one_event_the_oldest_and_misses_none_from_before_the_first_start(cage: Cage):
    for user_id in ("alice", "bob"):
        cage.publish({"userIds": [user_id]})
    assert cage.run().end() == 0
    assert list(cage.api.stored) == [("alice", "inferences")]
    assert cage.run().end() == 0
    assert list(cage.api.stored) == [("alice", "inferences"), ("bob", "inferences")]


def test_any_id_is_one_path_segment(cage: Cage):
    user_ids = ["https://alice.example/card#me", "a/b", "a?b", "../c", "%2e", " ", "Zoë", "佐\n江"]
    cage.api.users = dict.fromkeys(user_ids, "")
    cage.publish(EVENT)
    run = cage.run()
    assert run.end() == 0, run.log
    assert sorted(user_id for user_id, kind in cage.api.stored) == sorted(user_ids)


def test_explanations_are_stored_as_such(cage: Cage):
    edit(cage.code, "def process_event(event): DatavillageApi().store('bob', '# why', 'explains')")
    cage.publish(EVENT)
    assert cage.run().end() == 0
    assert cage.api.stored == {("bob", "explains"): "# why"}


def test_sixteen_users_are_worked_on_side_by_side_on_as_many_connections(cage: Cage):
    # All 16 compute at once, so that no connection is in use: are they kept?
    edit(cage.code, "def compute(user_id, data): time.sleep(0.3); return data")
    cage.api.users = {f"user-{number}": "" for number in range(40)}
    cage.api.held = {f"GET activeUsers/{user_id}/data" for user_id in cage.api.users}
    cage.publish(EVENT)
    run = cage.start()
    until(lambda: len(cage.api.requests) == 1 + 16, "16 users under way")
    time.sleep(0.2)  # would any more come?
    assert len(cage.api.requests) == 1 + 16
    cage.api.gate.set()
    assert run.end() == 0
    assert len(cage.api.stored) == 40
    assert len(cage.api.clients) == 16


def test_a_long_job_tells_its_progress(cage: Cage):
    cage.api.users = {f"user-{number:04}": "" for number in range(1100)}
    cage.api.held = {"GET activeUsers/user-1099/data"}
    cage.publish({"userIds": [*cage.api.users, "unknown"]})
    run = cage.start(constants="process.PROGRESS_SECONDS = 0.1").until(
        "1,100 of 1,101 users, 1 failed"
    )
    cage.api.gate.set()
    assert run.end() == 1
    assert run.log.count(" users, ") < 100
    assert "1 of 1,101 users failed" in run.log


# How long it waits


def test_a_waiting_worker_outlasts_the_timeouts_and_takes_an_event_as_it_comes(real_cage: Cage):
    run = real_cage.start().until("waiting")
    time.sleep(6)  # more than the 5 s after which redis-py gives a socket up by default
    [client] = [item for item in real_cage.queue.client_list() if "xreadgroup" in item["cmd"]]
    assert int(client["age"]) >= 5  # it was not given up and made anew
    published = time.monotonic()
    real_cage.publish(EVENT)
    assert run.end() == 0
    assert (
        time.monotonic() - published < 5
    )  # it waits in steps of 10 s, and is not at the end of one
    assert "WARNING" not in run.log


def test_waiting_costs_next_to_no_cpu(real_cage: Cage):
    run = real_cage.start().until("waiting")
    stat = Path(f"/proc/{run.process.pid}/stat")
    if not stat.exists():
        pytest.skip("no /proc on this system")
    time.sleep(0.5)
    before = stat.read_text().split()[13:15]
    time.sleep(2)
    ticks = sum(map(int, stat.read_text().split()[13:15])) - sum(map(int, before))
    assert ticks <= 2  # of 200, a tick being 10 ms


# What it needs to start


def test_all_missing_variables_are_named_in_one_line_and_the_event_stays(cage: Cage):
    cage.publish(EVENT)
    documented = [name for name in cage.variables if name != "PATH"]
    run = cage.run(variables=dict.fromkeys(documented, ""))
    assert run.end() == 2
    [line] = run.log.splitlines()
    assert " ERROR " in line
    assert all(name in line for name in documented)
    for name in documented:
        left_out = {**cage.variables}
        del left_out[name]
        cage.variables, kept = left_out, cage.variables
        run = cage.run()
        cage.variables = kept
        assert run.end() == 2
        [line] = run.log.splitlines()
        assert [other for other in documented if other in line] == [name]
    assert cage.run().end() == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS_SERVICE_PORT", "tcp://10.0.0.1:6379"),
        ("REDIS_SERVICE_PORT", "70000"),
        ("DV_URL", "api.datavillage.me"),
        ("DV_URL", "https://user:secret@api.datavillage.me"),
        ("DV_TOKEN", "secret\n"),
        ("LOGLEVEL", "LOUD"),
        ("TLS_CAFILE", "/nowhere/ca.crt"),
        ("TLS_CAFILE", __file__),
    ],
)
def test_an_unusable_variable_is_named_and_the_event_stays(cage: Cage, name: str, value: str):
    cage.publish(EVENT)
    run = cage.run(variables={name: value})
    assert run.end() == 2
    [line] = run.log.splitlines()
    assert f"ERROR not started: {name} " in line
    assert "secret" not in line
    assert cage.run().end() == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def compute(:", "SyntaxError: invalid syntax (process.py, line"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("int(os.environ['DV_TOKEN'])", "ValueError\nTraceback"),
        ("raise SystemExit(0)", "SystemExit\nTraceback"),
    ],
)
def test_an_error_in_process_py_is_named_and_costs_no_event(cage: Cage, text: str, reason: str):
    edit(cage.code, text)
    cage.publish(EVENT)
    run = cage.run()
    assert run.end() == 2
    assert f"ERROR not started: process.py: {reason}" in run.log
    assert TOKEN not in run.log
    assert cage.queue.xinfo_groups("events") == []  # nothing was taken


# What the log holds


def test_the_log_holds_time_level_message_and_obeys_its_level(cage: Cage):
    for _ in range(2):
        cage.publish(EVENT)
    for line in cage.run().log.splitlines():
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO \S.*", line)
    assert cage.run(variables={"LOGLEVEL": "WARNING"}).log == ""


def test_neither_token_nor_data_is_in_any_log_or_dead_letter(cage: Cage):
    text = """
def compute(user_id, data):
    try:
        int(data)
    except ValueError as error:
        raise RuntimeError(data) from error
"""
    edit(cage.code, text)
    cage.api.users = {"alice": "a-secret-of-alice"}
    cage.publish(EVENT)
    run = cage.run(variables={"LOGLEVEL": "DEBUG"})
    assert run.end() == 1
    assert "ERROR user alice: compute failed\nTraceback" in run.log
    assert "ValueError" in run.log
    assert "RuntimeError" in run.log
    assert "raise RuntimeError(data) from error" in run.log
    assert "a-secret-of-alice" not in run.log
    assert TOKEN not in run.log


def test_an_event_that_fails_by_a_bug_gives_away_no_data_either(cage: Cage):
    edit(cage.code, "def process_event(event): raise KeyError(DatavillageApi().user_data('alice'))")
    message_id = cage.publish(EVENT)
    for delivery in (1, 2, 3):
        run = cage.run()
        assert run.end() == 1
        assert f"delivery {delivery} of 3" in run.log
        assert "Traceback" in run.log
        assert "KeyError" in run.log
        assert "Alice" not in run.log
        cage.make_old(message_id)
    [letter] = cage.dead_letters()
    assert letter[b"error"] == b"KeyError"


def test_no_value_from_outside_breaks_a_line_of_the_log(cage: Cage):
    cage.publish(
        {"userIds": ["eve ë\n2026-01-01 00:00:00,000 INFO all is well\u2028\x1b[2J\ud800"]}
    )
    run = cage.run(variables={"PYTHONIOENCODING": "ascii"})
    assert run.end() == 1
    [line] = [line for line in run.log.splitlines() if "user eve" in line]
    assert (
        "user eve \\xeb\\n2026-01-01 00:00:00,000 INFO all is well\\u2028\\x1b[2J\\ud800: GET"
        in line
    )
    assert re.match(r"\d{4}-\d\d-\d\d .{12} ERROR ", line)


# When a user fails


def test_one_failing_user_is_named_with_the_reason_and_stops_no_other(cage: Cage):
    cage.publish({"userIds": ["nobody", "alice", "bob"]})
    run = cage.run()
    assert run.end() == 1
    url = f"{cage.api.url}/clients/client-1/applications/app-1/activeUsers/nobody/data"
    assert f"ERROR user nobody: GET {url} answered 404" in run.log
    assert "failed: 1 of 3 users failed" in run.log
    assert "Traceback" not in run.log
    assert sorted(user_id for user_id, kind in cage.api.stored) == ["alice", "bob"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("exit()", "SystemExit"),
        ("return None", "the result is NoneType, not str"),
        ("return '\\ud800'", "UnicodeEncodeError"),
        ("raise ProcessingError('no age given')", "user bob: no age given"),
        ("raise OwnError('no age given')", "\nOwnError: no age given\n"),
        ("raise KeyboardInterrupt(data)", "KeyboardInterrupt"),
        ("raise in_a_circle()", "ValueError"),
    ],
)
def test_a_failing_compute_fails_its_user_alone(cage: Cage, body: str, reason: str):
    text = f"""
class OwnError(Exception): pass
def in_a_circle():
    first, second = TypeError(), ValueError()
    first.__cause__, second.__cause__ = second, first
    return second
sample = compute
def compute(user_id, data):
    if user_id == 'bob':
        {body}
    else:
        return sample(user_id, data)
"""
    cage.publish(EVENT)
    edit(cage.code, text)
    run = cage.run()
    assert run.end() == 1
    assert reason in run.log
    assert ("Traceback" in run.log) == ("return None" not in body and "Processing" not in body)
    assert "Zoë" not in run.log
    assert "failed: 1 of 2 users failed" in run.log
    assert list(cage.api.stored) == [("alice", "inferences")]


# What the API may do


def test_passing_faults_are_ridden_out(cage: Cage):
    cage.api.faults = {
        "GET activeUsers": [{"status": 500}, {"status": 0}],
        "GET activeUsers/alice/data": [{"status": 502}, {"status": 503}],
        "GET activeUsers/bob/data": [{"status": 504}],
        "PUT activeUsers/alice/inferences": [{"status": 0}, {"status": 429}],
    }
    cage.publish(EVENT)
    run = cage.run(constants="process.BACKOFF_SECONDS = process.JITTER_SECONDS = 0.01")
    assert run.end() == 0, run.log
    assert len(cage.api.stored) == 2
    assert not any(cage.api.faults.values())
    assert "WARNING" not in run.log  # what went well in the end is no line for each retry


def test_retry_after_is_obeyed(cage: Cage):
    cage.api.faults = {"GET activeUsers": [{"status": 429, "headers": {"Retry-After": "2"}}]}
    cage.publish(EVENT)
    started = time.monotonic()
    assert cage.run().end() == 0
    assert time.monotonic() - started > 2


def test_retries_end_and_the_error_names_method_url_and_status(cage: Cage):
    cage.api.faults = {"GET activeUsers": [{"status": 503}] * 9}
    cage.publish(EVENT)
    run = cage.run(constants="process.RETRIES = 2; process.BACKOFF_SECONDS = 0.01")
    assert run.end() == 1
    url = f"{cage.api.url}/clients/client-1/applications/app-1/activeUsers"
    assert f"failed: GET {url} answered 503" in run.log
    assert len(cage.api.faults["GET activeUsers"]) == 9 - 3
    assert run.log.count("\n") == 3  # no line for a retry, no traceback


def test_an_api_that_is_away_is_named_with_the_reason(cage: Cage):
    cage.publish(EVENT)
    url = "http://127.0.0.1:9"  # where nobody listens
    run = cage.run(constants="process.RETRIES = 0", variables={"DV_URL": url})
    assert run.end() == 1
    path = "/clients/client-1/applications/app-1/activeUsers"
    assert re.search(f"failed: GET {url}{path}: .*Connection refused", run.log)
    assert "Traceback" not in run.log


def test_no_answer_is_waited_for_for_ever(cage: Cage):
    cage.api.held = {"GET activeUsers"}
    cage.publish(EVENT)
    run = cage.run(constants="process.RETRIES = 0; process.TIMEOUT_SECONDS = (1, 1)")
    assert run.end() == 1
    assert "Read timed out. (read timeout=1)" in run.log


def test_a_redirect_is_an_error_and_is_not_followed(cage: Cage):
    with StandInApi(dict(USERS)) as elsewhere:
        for status in (301, 302, 303, 307, 308):
            redirect = {"status": status, "headers": {"Location": elsewhere.url}}
            cage.api.faults = {"PUT activeUsers/alice/inferences": [redirect]}
            cage.queue.flushall()
            cage.publish({"userIds": ["alice"]})
            run = cage.run()
            assert run.end() == 1
            assert f"/activeUsers/alice/inferences answered {status}" in run.log
        assert elsewhere.requests == []
    assert cage.api.stored == {}


@pytest.mark.parametrize("text", ['{"users": []}', "[1]", "<html>", "[" * 100_000, b'["\xff"]'])
def test_an_answer_that_is_no_list_of_ids_is_an_error(cage: Cage, text: str | bytes):
    cage.api.faults = {"GET activeUsers": [{"status": 200, "text": text}]}
    cage.publish(EVENT)
    run = cage.run()
    assert run.end() == 1
    assert "/activeUsers answered no JSON array of strings" in run.log
    assert "Traceback" not in run.log


def test_data_that_is_not_utf_8_is_an_error(cage: Cage):
    cage.api.users = {"alice": b"Zo\xeb"}
    cage.publish(EVENT)
    run = cage.run()
    assert run.end() == 1
    assert "/alice/data answered no UTF-8" in run.log


def test_an_active_user_whose_id_leads_elsewhere_is_an_error(cage: Cage):
    cage.api.users = {".": "", "..": "", "": "", "alice": ""}
    cage.publish(EVENT)
    run = cage.run()
    assert run.end() == 1
    assert "3 of 4 users failed" in run.log
    assert [request for request in cage.api.requests if "alice" not in request] == [
        "GET activeUsers"
    ]


def test_the_token_is_in_every_request_and_no_netrc_replaces_it(cage: Cage, tmp_path: Path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    cage.publish(EVENT)
    assert cage.run(variables={"HOME": str(tmp_path)}).end() == 0
    assert {headers["Authorization"] for headers in cage.api.headers} == {f"Bearer {TOKEN}"}
    assert len(cage.api.headers) == 5


def test_dv_url_may_end_in_a_slash(cage: Cage):
    cage.publish(EVENT)
    # To a proxy the whole URL is sent, and no client tidies it up.
    url = {"DV_URL": "http://api.example/", "HTTP_PROXY": cage.api.url}
    assert cage.run(variables=url).end() == 0


def test_a_proxy_of_the_environment_is_used(cage: Cage):
    cage.publish(EVENT)
    proxy = {"DV_URL": "http://api.example", "HTTP_PROXY": cage.api.url}
    run = cage.run(variables=proxy)
    assert run.end() == 0, run.log
    assert len(cage.api.stored) == 2
    assert {headers["Host"] for headers in cage.api.headers} == {"api.example"}


def test_the_ca_bundle_of_the_environment_is_used(cage: Cage, certificate: Path):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    with StandInApi(dict(USERS)) as api:
        api.socket = context.wrap_socket(api.socket, server_side=True)
        url = {"DV_URL": f"https://127.0.0.1:{api.server_port}"}
        cage.publish(EVENT)
        run = cage.run(variables=url, constants="process.RETRIES = 0")
        assert run.end() == 1
        assert "certificate verify failed" in run.log
        assert api.requests == []
        cage.publish(EVENT)
        run = cage.run(variables=url | {"REQUESTS_CA_BUNDLE": str(certificate)})
        assert run.end() == 0, run.log
        assert len(api.stored) == 2


# At least once


def test_a_run_killed_in_the_middle_is_finished_by_the_next(cage: Cage):
    cage.api.held = {"GET activeUsers/bob/data"}
    message_id = cage.publish(EVENT)
    run = cage.start()
    until(lambda: cage.api.stored and cage.api.held <= set(cage.api.requests), "half is done")
    run.process.send_signal(signal.SIGKILL)
    assert run.end() == -signal.SIGKILL
    assert cage.pending() == {message_id: 1}
    assert cage.api.stored.keys() == {("alice", "inferences")}
    cage.api.gate.set()
    cage.make_old(message_id)
    assert cage.run().end() == 0
    assert cage.api.stored.keys() == {("alice", "inferences"), ("bob", "inferences")}
    assert cage.pending() == {}


def test_an_abandoned_event_comes_before_any_new_one(cage: Cage):
    abandoned = cage.publish({"userIds": ["bob"]})
    cage.deliver_to_another(abandoned)
    cage.publish({"userIds": ["alice"]})
    cage.make_old(abandoned)
    assert cage.run().end() == 0
    assert list(cage.api.stored) == [("bob", "inferences")]


def test_an_event_that_a_live_worker_holds_is_left_to_it(cage: Cage):
    held = cage.publish({"userIds": ["bob"]})
    cage.deliver_to_another(held)
    cage.publish({"userIds": ["alice"]})
    assert cage.run().end() == 0
    assert cage.api.stored.keys() == {("alice", "inferences")}
    assert cage.pending() == {held: 1}


def test_an_abandoned_event_is_found_behind_all_that_live_workers_hold(cage: Cage):
    message_ids = [cage.publish(EVENT) for _ in range(300)]
    cage.deliver_to_another(*message_ids)
    cage.make_old(message_ids[-1])
    assert cage.run().end() == 0
    assert cage.pending().keys() == set(message_ids[:-1])


def test_a_waiting_worker_finds_an_event_as_it_is_abandoned(real_cage: Cage):
    message_id = real_cage.publish(EVENT)
    real_cage.deliver_to_another(message_id)
    run = real_cage.start(constants="index.WAIT_SECONDS = 0.2").until("waiting")
    time.sleep(0.5)
    assert run.process.poll() is None
    real_cage.make_old(message_id)
    assert run.end() == 0
    assert len(real_cage.api.stored) == 2


def test_looking_for_abandoned_events_happens_often_enough():
    assert index.WAIT_SECONDS <= 15
    assert index.CLAIM_SECONDS == 60
    assert index.RENEW_SECONDS == 20


def test_a_claim_is_renewed_while_a_slow_user_is_worked_on(cage: Cage):
    cage.api.held = {"GET activeUsers/bob/data"}
    slow = cage.publish({"userIds": ["bob"]})
    constants = "index.CLAIM_SECONDS = 1; index.RENEW_SECONDS = 0.2"
    first = cage.start(constants=constants)
    cage.api.until_held()
    time.sleep(1.5)  # longer than a claim without renewal
    cage.publish({"userIds": ["alice"]})
    second = cage.run(constants=constants)
    assert second.end() == 0
    assert cage.api.stored.keys() == {("alice", "inferences")}
    assert cage.pending() == {slow: 1}  # a renewal is no delivery
    cage.api.gate.set()
    assert first.end() == 0
    assert cage.pending() == {}


def test_a_worker_that_lost_its_claim_does_not_take_it_back(cage: Cage):
    cage.api.held = {"GET activeUsers/bob/data"}
    message_id = cage.publish({"userIds": ["bob"]})
    frozen = cage.start(constants="index.RENEW_SECONDS = 0.5")
    cage.api.until_held()
    frozen.process.send_signal(signal.SIGSTOP)
    cage.make_old(message_id)
    second = cage.start().until("delivery 2 of 3")
    frozen.process.send_signal(signal.SIGCONT)
    frozen.until(f"WARNING message {message_id}: claim lost")
    frozen.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert cage.pending() == {message_id: 2}
    [entry] = cage.queue.xpending_range("events", "consummers", "-", "+", 1, idle=30_000) or [None]
    assert entry is None
    cage.api.gate.set()
    assert frozen.end() == 143
    assert second.end() == 0
    assert cage.pending() == {}


def test_two_workers_share_many_events_each_once(cage: Cage):
    cage.api.users = {f"user-{number}": "" for number in range(12)}
    for user_id in cage.api.users:
        cage.publish({"userIds": [user_id]})
    for _ in range(6):
        both = [cage.start(), cage.start()]
        assert [run.end() for run in both] == [0, 0]
    stores = [request for request in cage.api.requests if request.startswith("PUT")]
    assert sorted(stores) == sorted(f"PUT activeUsers/{id}/inferences" for id in cage.api.users)
    assert cage.pending() == {}
    assert len(cage.queue.xinfo_consumers("events", "consummers")) == 1  # no run leaves a trace


# What is set aside


def test_an_event_that_fails_every_time_is_set_aside_after_its_third_try(cage: Cage):
    fails = cage.publish_raw(msg_data='{"userIds": ["nobody"]}', own="field", error="its own")
    cage.publish({"userIds": ["alice"]})
    for delivery in (1, 2, 3):
        run = cage.run()
        assert run.end() == 1
        assert f"message {fails}: delivery {delivery} of 3" in run.log
        if delivery < 3:
            assert cage.pending() == {fails: delivery}
            assert cage.dead_letters() == []
            cage.make_old(fails)
    lines = [line for line in run.log.splitlines() if "set aside" in line]
    assert len(lines) == 1
    assert (
        f"ERROR message {fails}: set aside in events:dead-letter: 1 of 1 users failed" in lines[0]
    )
    assert cage.pending() == {}
    [letter] = cage.dead_letters()
    assert letter == {
        b"msg_data": b'{"userIds": ["nobody"]}',
        b"own": b"field",
        b"error": b"1 of 1 users failed",
        b"message_id": fails.encode(),
    }
    assert cage.run().end() == 0
    assert cage.api.stored.keys() == {("alice", "inferences")}


def test_an_event_that_kills_its_worker_every_time_is_set_aside(cage: Cage):
    edit(cage.code, "def compute(user_id, data): os.kill(os.getpid(), 9)")
    kills = cage.publish({"userIds": ["bob"]})
    for _ in range(3):
        assert cage.run().end() == -signal.SIGKILL
        cage.make_old(kills)
    run = cage.run()
    assert run.end() == 1
    reason = "delivered 3 times, finished by no worker"
    assert f"ERROR message {kills}: set aside in events:dead-letter: {reason}" in run.log
    assert [letter[b"error"] for letter in cage.dead_letters()] == [reason.encode()]
    assert cage.pending() == {}


MALFORMED = {
    "no JSON": (b'{"secret": ', "msg_data is not JSON: Expecting value"),
    "not UTF-8": (b'{"secret": "\xff"}', "msg_data is not UTF-8 (byte 12)"),
    "UTF-16": ('{"secret": 1}'.encode("utf-16"), "msg_data is not UTF-8 (byte 0)"),
    "null": (b"null", "msg_data is not a JSON object"),
    "a number": (b"7", "msg_data is not a JSON object"),
    "a list": (b'["secret"]', "msg_data is not a JSON object"),
    "nested": (b'{"a":' * 100_000, "msg_data is nested too deeply"),
    "many digits": (b'{"a": %s}' % (b"7" * 5_000), ""),
    **{
        f"userIds {user_ids}": (b'{"userIds": %s}' % user_ids.encode(), "userIds is not a list of")
        for user_ids in ('"secret"', "{}", "7", "false", "[1]", "[null]", '[""]', '["."]', '[".."]')
    },
}


@pytest.mark.parametrize(("payload", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_message_is_set_aside_at_once(cage: Cage, payload: bytes, reason: str):
    malformed = cage.publish_raw(msg_data=payload)
    cage.publish({"userIds": ["alice"]})
    run = cage.run()
    assert run.end() == 1
    [_, line] = run.log.splitlines()
    assert (
        f"ERROR message {malformed}: set aside in events:dead-letter: malformed: {reason}" in line
    )
    assert "secret" not in line
    assert cage.pending() == {}
    [letter] = cage.dead_letters()
    assert letter[b"msg_data"] == payload
    assert letter[b"error"].startswith(b"malformed: ")
    assert letter[b"message_id"] == malformed.encode()
    assert cage.run().end() == 0
    assert cage.api.stored.keys() == {("alice", "inferences")}


def test_a_message_without_msg_data_is_set_aside_at_once(cage: Cage):
    cage.publish_raw(data="{}")
    run = cage.run()
    assert run.end() == 1
    assert "malformed: no field msg_data" in run.log
    assert cage.dead_letters()[0][b"data"] == b"{}"


def test_the_dead_letters_are_bounded(cage: Cage):
    for number in range(1500):
        cage.queue.xadd("events:dead-letter", {"msg_data": str(number)})
    cage.publish_raw(msg_data="null")
    assert cage.run().end() == 1
    letters = cage.dead_letters()
    assert 1000 <= len(letters) <= 1100  # Redis trims whole nodes, of 100 entries
    assert letters[-1][b"msg_data"] == b"null"


def test_an_entry_trimmed_while_it_was_pending_is_skipped_with_a_warning(cage: Cage):
    trimmed = cage.publish({"userIds": ["bob"]})
    cage.deliver_to_another(trimmed)
    cage.make_old(trimmed)
    cage.queue.xdel("events", trimmed)
    cage.publish({"userIds": ["alice"]})
    run = cage.run()
    assert run.end() == 0
    assert f"WARNING message {trimmed}: trimmed from the queue, skipped" in run.log
    assert cage.pending() == {}
    assert cage.api.stored.keys() == {("alice", "inferences")}


def test_a_dead_letter_that_redis_refuses_stays_in_the_queue_and_out_of_the_log(cage: Cage):
    cage.queue.set("events:dead-letter", "no stream")
    refused = cage.publish_raw(msg_data='["secret"]')
    run = cage.run()
    assert run.end() == 2
    assert "WRONGTYPE" in run.log.splitlines()[-1]
    assert "secret" not in run.log
    assert "Traceback" not in run.log
    assert cage.pending() == {refused: 1}


def test_a_dead_letter_that_redis_has_no_memory_for_stays_too(real_cage: Cage):
    refused = real_cage.publish_raw(msg_data='["secret"]')
    real_cage.queue.xgroup_create("events", "consummers", "0")
    real_cage.queue.config_set("maxmemory", 1)
    run = real_cage.run()
    assert run.end() == 2
    assert "events:dead-letter: command not allowed when used memory" in run.log
    assert "secret" not in run.log
    assert real_cage.pending() == {refused: 1}


# Signals


def test_sigterm_ends_a_waiting_worker_within_a_second_and_quietly(real_cage: Cage):
    for signal_number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        run = real_cage.start().until("waiting")
        time.sleep(0.3)
        sent = time.monotonic()
        run.process.send_signal(signal_number)
        assert run.end() == status
        assert time.monotonic() - sent < 1
        assert len(run.log.splitlines()) == 1


def test_sigterm_lets_users_under_way_finish_and_leaves_the_event_to_the_next(cage: Cage):
    cage.api.users = {f"user-{number}": "" for number in range(40)}
    cage.api.held = {f"GET activeUsers/{user_id}/data" for user_id in cage.api.users}
    message_id = cage.publish(EVENT)
    run = cage.start()
    until(lambda: len(cage.api.requests) == 1 + 16, "16 users are under way")
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    cage.api.gate.set()
    assert run.end() == 143
    assert f"WARNING message {message_id}: stopped" in run.log
    assert "Traceback" not in run.log
    assert len(cage.api.stored) == 16
    assert len(cage.api.requests) == 1 + 16 + 16
    assert cage.pending() == {message_id: 0}  # the stop is not counted against the event
    assert cage.run().end() == 0  # and at once, with no need to wait for the claim to end
    assert len(cage.api.stored) == 40


def test_sigterm_ends_a_worker_whose_users_never_finish(cage: Cage):
    cage.api.held = {"GET activeUsers/bob/data"}
    message_id = cage.publish(EVENT)
    run = cage.start(constants="index.GRACE_SECONDS = 1")
    cage.api.until_held()
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 143
    assert cage.pending() == {message_id: 1}
    assert index.GRACE_SECONDS < 30


# When Redis goes away


def test_redis_away_at_the_start_is_waited_for(real_cage: Cage):
    real_cage.publish(EVENT)
    real_cage.server.kill()
    run = real_cage.start().until("is away")
    time.sleep(1)
    real_cage.server.restart()
    assert run.end() == 0, run.log
    assert run.log.count("WARNING") == 1


@pytest.mark.parametrize("keep_data", [True, False])
def test_redis_restarted_while_a_worker_waits(real_cage: Cage, keep_data: bool):
    run = real_cage.start().until("waiting")
    until(lambda: real_cage.queue.exists("events"), "the group is there")
    real_cage.server.kill()
    run.until("is away")
    time.sleep(1)
    real_cage.server.restart(keep_data=keep_data)
    real_cage.publish(EVENT)
    assert run.end() == 0, run.log
    assert run.log.count("WARNING") == 1
    assert real_cage.pending() == {}
    assert len(real_cage.api.stored) == 2


def test_redis_emptied_while_a_worker_waits(real_cage: Cage):
    run = real_cage.start().until("waiting")
    until(lambda: real_cage.queue.exists("events"), "the group is there")
    time.sleep(0.2)
    real_cage.queue.flushall()
    real_cage.publish(EVENT)
    assert run.end() == 0, run.log
    assert len(real_cage.api.stored) == 2


def test_redis_restarted_while_a_worker_works(real_cage: Cage):
    real_cage.api.held = {"GET activeUsers/bob/data"}
    real_cage.publish(EVENT)
    run = real_cage.start(constants="index.RENEW_SECONDS = 0.1")
    real_cage.api.until_held()
    real_cage.server.kill()
    run.until("is away")
    real_cage.server.restart()
    assert run.process.poll() is None
    real_cage.api.gate.set()
    assert run.end() == 0, run.log
    assert real_cage.pending() == {}
    assert len(real_cage.api.stored) == 2


def test_a_claim_that_cannot_be_renewed_is_a_warning_and_the_work_goes_on(real_cage: Cage):
    real_cage.api.held = {"GET activeUsers/bob/data"}
    real_cage.publish(EVENT)
    run = real_cage.start(constants="index.RENEW_SECONDS = 0.1")
    real_cage.api.until_held()
    real_cage.queue.flushall()
    run.until("claim not renewed: NOGROUP")
    real_cage.api.gate.set()
    assert run.end() == 0, run.log
    assert len(real_cage.api.stored) == 2


def test_redis_restarted_before_the_acknowledgement(real_cage: Cage):
    real_cage.api.held = {"GET activeUsers/bob/data"}
    real_cage.publish(EVENT)
    run = real_cage.start()
    real_cage.api.until_held()
    real_cage.server.kill()
    real_cage.api.gate.set()
    run.until("is away")
    real_cage.server.restart()
    assert run.end() == 0, run.log
    assert run.log.count("WARNING") == 1
    assert real_cage.pending() == {}


def test_redis_that_stays_away_ends_the_run_with_one_clear_line(real_cage: Cage):
    real_cage.server.kill()
    started = time.monotonic()
    run = real_cage.run(constants="index.OUTAGE_SECONDS = 2; index.BACKOFF_SECONDS = 0.5")
    assert run.end() == 2
    assert 2 < time.monotonic() - started < 10
    [_, warning, error] = run.log.splitlines()
    address = f"127.0.0.1:{real_cage.server.port}"
    assert f"WARNING Redis at {address} is away: " in warning
    assert f"ERROR Redis at {address}: ConnectionError: " in error
    assert index.OUTAGE_SECONDS > 60


# What Redis may refuse


def test_a_key_of_another_type_ends_the_run_at_once(cage: Cage):
    cage.queue.set("events", "no stream")
    run = cage.run()
    assert run.end() == 2
    assert "WRONGTYPE" in run.log.splitlines()[-1]
    assert "Traceback" not in run.log


def test_a_password_that_redis_demands_ends_the_run_at_once(real_cage: Cage):
    real_cage.queue.config_set("requirepass", "another")
    run = real_cage.run()
    assert run.end() == 2
    assert len(run.log.splitlines()) == 2
    assert f"ERROR Redis at 127.0.0.1:{real_cage.server.port}: AuthenticationError" in run.log


# TLS


@pytest.fixture
def tls_cage(api: StandInApi, code: Path, tmp_path: Path, certificate: Path) -> Iterator[Cage]:
    """A cage whose Redis speaks TLS only, with the process told so."""
    require("redis-server")
    (tmp_path / "tls").mkdir()
    with RealRedis(tmp_path / "tls", certificate) as server, Cage(api, server, code) as cage:
        cage.variables["TLS_CAFILE"] = str(certificate)
        yield cage


def test_an_event_comes_over_tls(tls_cage: Cage):
    tls_cage.publish(EVENT)
    run = tls_cage.run()
    assert run.end() == 0, run.log
    assert len(tls_cage.api.stored) == 2


def test_a_certificate_of_another_ca_or_for_another_host_is_refused_at_once(
    tls_cage: Cage, tmp_path: Path
):
    create_certificate(tmp_path / "other.crt")
    tls_cage.publish(EVENT)
    for variables in (
        {"TLS_CAFILE": str(tmp_path / "other.crt")},
        {"REDIS_SERVICE_HOST": "127.0.0.2"},
    ):
        run = tls_cage.run(variables=variables)
        assert run.end() == 2
        [_, line] = run.log.splitlines()
        assert "certificate verify failed" in line
    assert tls_cage.run().end() == 0


def test_tls_on_one_side_only_ends_the_run_at_once(
    tls_cage: Cage, real_cage: Cage, certificate: Path
):
    run = tls_cage.run(variables={"TLS_CAFILE": ""})
    assert run.end() == 2
    [_, line] = run.log.splitlines()
    assert "it speaks TLS: set TLS_CAFILE" in line
    run = real_cage.run(variables={"TLS_CAFILE": str(certificate)})
    assert run.end() == 2
    [_, line] = run.log.splitlines()
    assert "no answer in TLS, which TLS_CAFILE asks for" in line


# What the README says


def test_the_readme_shows_the_config_as_it_is():
    [block] = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert yaml.safe_load(block) == CONFIG


def test_the_commands_of_the_readme_for_dead_letters_and_more_workers_work(cage: Cage):
    section = README.partition("## When something goes wrong")[2]
    look, publish_again, more_workers = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)

    def output_of(command: str) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=cage.variables, shell=True, capture_output=True, check=True
        )
        return done.stdout.decode("utf-8")

    malformed = [cage.publish_raw(msg_data="null", own=str(number)) for number in range(4)]
    output_of(more_workers)
    shown = re.findall(r"b'message_id': b'(.*?)'", output_of(look))
    assert sorted(shown) == malformed  # the workers ran side by side
    output_of(publish_again)
    assert cage.dead_letters() == []
    again = [fields for _, fields in cage.queue.xrange("events")[-4:]]
    assert all(fields.keys() == {b"msg_data", b"own"} for fields in again)
    assert sorted(fields[b"own"] for fields in again) == [b"0", b"1", b"2", b"3"]


# How the rehearsal goes


def rehearsal(code: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess:
    """Run the rehearsal in a folder that holds the project."""
    command = [sys.executable, str(code / "test.py"), *map(str, arguments)]
    return subprocess.run(command, env=variables, capture_output=True, encoding="utf-8")


def test_the_rehearsal_lets_the_log_through_and_prints_what_was_stored(code: Path):
    done = rehearsal(code)
    assert done.returncode == 0
    log, _, results = done.stdout.partition("\n\n")
    assert all(re.match(r"\d{4}-\d\d-\d\d .{12} INFO ", line) for line in log.splitlines())
    assert "processed in" in log
    lines = results.splitlines()
    assert lines[:-1] == [
        "alice: inferences",
        "    " + USERS["alice"].strip(),
        "bob: inferences",
        "    " + USERS["bob"].strip(),
    ]
    last = r"users: 2, stored: 2, failed: 0, seconds: \d+\.\d, exit status: 0"
    assert re.fullmatch(last, lines[-1])
    assert max(map(len, lines)) <= 80
    assert done.stderr == ""


def test_the_rehearsal_runs_the_algorithm_of_this_repository():
    done = rehearsal(ROOT)
    assert done.returncode == 0, done.stdout
    assert "users: 2, stored: 2, failed: 0," in done.stdout


def test_the_rehearsal_takes_files_and_keeps_their_text_intact(code: Path, tmp_path: Path):
    for name, text in {"zoë.ttl": '# "Zoë"\n# 佐江\n', "bob.card.ttl": "# ☃"}.items():
        (tmp_path / name).write_bytes(text.encode("utf-8"))
    for variables in ({}, {"PYTHONIOENCODING": "ascii"}):
        done = rehearsal(code, tmp_path / "zoë.ttl", tmp_path / "bob.card.ttl", **variables)
        assert done.returncode == 0
        results = done.stdout.partition("\n\n")[2].splitlines()
        assert results[:-1] == [
            "bob.card: inferences",
            "    # ☃",
            "zoë: inferences",
            '    # "Zoë"',
            "    # 佐江",
        ]


def test_the_data_in_the_rehearsal_is_what_is_in_the_file(code: Path, tmp_path: Path):
    (tmp_path / "alice.ttl").write_bytes(b"#\r\n#\r\n")
    edit(code, "def compute(user_id, data): return f'# {len(data)}'")
    assert "    # 6\n" in rehearsal(code, tmp_path / "alice.ttl").stdout


def test_the_rehearsal_publishes_the_event_it_is_given(code: Path):
    edit(code, "def process_event(event): print(event)")
    assert "{'jobId': 'job-1', 'trigger': 'rehearsal', 'msg_dt': '" in rehearsal(code).stdout
    done = rehearsal(code, "--event", '{"userIds": ["alice"], "trigger": "full"}')
    assert "{'userIds': ['alice'], 'trigger': 'full', 'msg_dt': '" in done.stdout


@pytest.mark.parametrize(
    ("event", "reason", "counts"),
    [
        ({"userIds": ["alice", "eve"]}, "1 of 2 users failed", "users: 2, stored: 1, failed: 1,"),
        ({"userIds": ["\ud800"]}, "answered 404", "users: 1, stored: 0, failed: 1,"),
        ({"userIds": [[1]]}, "malformed: userIds", "users: 2, stored: 0, failed: 2,"),
    ],
)
def test_the_rehearsal_shows_an_event_that_fails(code: Path, event: dict, reason: str, counts: str):
    done = rehearsal(code, "--event", json.dumps(event))
    assert done.returncode == 1
    assert reason in done.stdout
    assert counts in done.stdout
    assert done.stdout.endswith("exit status: 1\n")


def test_the_rehearsal_refuses_what_it_cannot_use_with_one_line(code: Path, tmp_path: Path):
    (tmp_path / "latin.ttl").write_bytes(b"Zo\xeb")
    (tmp_path / "other").mkdir()
    for name in ("alice.ttl", "other/alice.ttl"):
        (tmp_path / name).touch()
    for arguments, reason in (
        (["nowhere.ttl"], "nowhere.ttl: No such file"),
        ([tmp_path], "Is a directory"),
        ([tmp_path / "latin.ttl"], "not UTF-8"),
        ([tmp_path / "alice.ttl", tmp_path / "other" / "alice.ttl"], "another file for the user"),
        (["--event", "{"], "--event is not a JSON object"),
        (["--event", "[\n]"], "--event is not a JSON object"),
        (["--event", "[" * 100_000], "--event is not a JSON object"),
    ):
        done = rehearsal(code, *arguments)
        assert done.returncode == 2
        [line] = done.stderr.splitlines()
        assert reason in line
        assert done.stdout == ""


def test_the_rehearsal_explains_itself(code: Path):
    done = rehearsal(code, "--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("FILE", "--event", "user's ID", "built-in"))
    assert len(done.stdout.splitlines()) < 20


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_ends_the_rehearsal_at_once_and_leaves_no_process(code: Path, signal_number: int):
    edit(code, "def compute(user_id, data): print(f'<{os.getpid()}>'); time.sleep(60)")
    command = [sys.executable, str(code / "test.py")]
    with subprocess.Popen(command, env={}, stdout=subprocess.PIPE, encoding="utf-8") as rehearsed:
        process_id = None
        while not process_id:
            process_id = re.match(r"<(\d+)>", rehearsed.stdout.readline())
        sent = time.monotonic()
        rehearsed.send_signal(signal_number)
        assert rehearsed.wait(PATIENCE_SECONDS) == 128 + signal_number
        assert time.monotonic() - sent < 2
    with pytest.raises(ProcessLookupError):
        os.kill(int(process_id[1]), 0)


# The rehearsal


def rehearse(users: dict[str, str], event: dict[str, Any]) -> int:
    """Run the entry on one event and print what it stored; return its exit status.

    Takes the data of all active users by user ID.
    """
    started = time.monotonic()
    with StandInApi(users) as api, EmbeddedRedis() as server, Cage(api, server) as cage:
        cage.publish(event)
        process = cage.start(log_through=True).process
        while process.poll() is None:
            time.sleep(0.05)  # not wait(): a signal that another thread takes would not end it
        status = process.returncode
    status = status if status >= 0 else 128 - status  # ended by a signal: told as a shell does
    seconds = time.monotonic() - started
    named = event.get("userIds")
    strings = isinstance(named, list) and all(isinstance(user_id, str) for user_id in named)
    user_ids = set(named if strings else users)
    stored = {user_id for user_id, kind in api.stored}
    print()
    for user_id in sorted(user_ids - stored):
        print(f"{user_id}: nothing stored")
    for (user_id, kind), text in sorted(api.stored.items()):
        print(f"{user_id}: {kind}")
        print(textwrap.indent(text.rstrip("\n"), "    "))
    failed = len(user_ids - stored) if status else 0
    print(
        f"users: {len(user_ids)}, stored: {len(stored)}, failed: {failed}, "
        f"seconds: {seconds:.1f}, exit status: {status}"
    )
    return status


def main() -> int:
    """Rehearse what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(
        description="Rehearse the cage: run the entry of datavillage.yaml on one event, with a "
        "Redis and an API of its own, and print what it stored."
    )
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="a user's data, Turtle in UTF-8; the name without its ending is the user's ID "
        "(default: two built-in users)",
    )
    parser.add_argument(
        "--event",
        metavar="JSON",
        default=json.dumps(EVENT),
        help="the event to publish, a JSON object (default: %(default)s)",
    )
    arguments = parser.parse_args()
    try:
        event = json.loads(arguments.event)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        parser.exit(2, "--event is not a JSON object\n")
    users = {}
    for file in map(Path, arguments.files):
        if file.stem in users:
            parser.exit(2, f"{file}: there is another file for the user {file.stem}\n")
        try:
            users[file.stem] = file.read_bytes().decode("utf-8")  # with its line ends as they are
        except OSError as error:
            parser.exit(2, f"{file}: {error.strerror}\n")
        except UnicodeDecodeError as error:
            parser.exit(2, f"{file}: not UTF-8 at byte {error.start}\n")
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # An exit, and not the default: the cage then ends the process that it has started.
        signal.signal(signal_number, lambda number, frame: sys.exit(128 + number))
    return rehearse(users or USERS, event)


if __name__ == "__main__":
    sys.exit(main())
