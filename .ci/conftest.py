"""What the template's tests share: a cage with a real Redis and an API that answers anything."""

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

import index
import process
import test
from test import StandInApi, StandInApiHandler, StandInCage, stand_in_cage

PROJECT = Path(__file__).resolve().parent.parent
PATIENCE_SECONDS = 50  # until a test gives up waiting; far more than anything here takes
LATER = b"-later-"  # in an answer: the rest comes a moment later
PATIENT = Retry(ConstantBackoff(0.02), int(PATIENCE_SECONDS / 0.02))


class ErringApi(StandInApi):
    """The API, which checks the token, and answers or hesitates as the test says."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.RequestHandlerClass = ErringApiHandler
        self.answers: dict[str, list[bytes]] = {}  # raw, by request; used up one after another
        self.held: set[str] = set()  # requests that are answered when the gate is open
        self.gate = threading.Event()
        self.headers: list[Message] = []
        self.clients: set[tuple[str, int]] = set()


class ErringApiHandler(StandInApiHandler):
    """Answers the requests of one connection to the API that errs."""

    server: ErringApi

    def respond(self) -> None:
        """Answer with the next raw answer to this request, or as the stand-in API does."""
        api, (_, is_of_users, resource) = self.server, self.path.partition("/app-1/")
        line = f"{self.command} {unquote(resource if is_of_users else self.path)}"
        api.headers.append(self.headers)
        api.clients.add(self.client_address)
        answer = api.answers[line].pop(0) if api.answers.get(line) else None
        if self.headers["Authorization"] != "Bearer a-token":
            answer = response(401)
        if answer is None:
            return super().respond()
        api.requests.append(line)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for number, part in enumerate(answer.split(LATER)):
            time.sleep(0.05 * number)
            self.wfile.write(part)
            self.wfile.flush()
        self.close_connection = True
        return None

    def usual_answer(self, path: list[str], body: str) -> str | int:
        if f"{self.command} {'/'.join(path)}" in self.server.held:
            self.server.gate.wait(PATIENCE_SECONDS)
        return super().usual_answer(path, body)


def response(status: int, body: bytes = b"", **headers: str) -> bytes:
    head = f"HTTP/1.1 {status} -\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"{head}{lines}\r\n".encode("latin-1") + body


class RealRedis:
    """A redis-server that keeps its data in a folder, on two free ports, one of them for TLS."""

    def __init__(self, folder: Path) -> None:
        local = ("127.0.0.1", 0)
        with socket.create_server(local) as one, socket.create_server(local) as other:
            self.port, tls_port = one.getsockname()[1], other.getsockname()[1]
        self.data, self.certificate = folder / "data", folder / "redis.pem"  # with its key
        command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext "
        command += f"subjectAltName=IP:127.0.0.1 -keyout {self.certificate} -out {self.certificate}"
        subprocess.run(command.split(), check=True, capture_output=True)
        self.tls = {"REDIS_SERVICE_PORT": str(tls_port), "TLS_CAFILE": str(self.certificate)}
        # Without `always`, a kill would lose what Redis acknowledged in the last second.
        command = f"redis-server --port {self.port} --tls-port {tls_port} --dir {self.data} --save"
        command += "  --appendonly yes --appendfsync always --tls-auth-clients no"
        for name in ("cert", "key", "ca-cert"):
            command += f" --tls-{name}-file {self.certificate}"
        self.command = command.split(" ")
        self.start()

    def start(self, *options: str) -> None:
        self.data.mkdir(exist_ok=True)
        self.process = subprocess.Popen([*self.command, *options], stdout=subprocess.DEVNULL)
        with redis.Redis(port=self.port, retry=PATIENT) as client:
            client.ping()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Run(subprocess.Popen):
    """A process in the cage, in a session of its own; its output goes to a file."""

    end = functools.partialmethod(subprocess.Popen.wait, PATIENCE_SECONDS)

    @property
    def log(self) -> str:
        return Path(self.log_file).read_text(encoding="utf-8")

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds; fail at once, with the log, if the process has exited."""
        until(lambda: condition() or self.poll() is not None)
        assert condition(), f"exited with status {self.returncode}:\n{self.log}"

    def processes(self) -> dict[int, int]:
        """Return the other processes of its session, with their parents, but no zombies."""
        parents = {}
        for file in Path("/proc").glob("[0-9]*/stat"):  # see proc(5)
            with contextlib.suppress(OSError):  # it has just ended
                state, parent, _, session, *_ = file.read_text().rpartition(")")[2].split()
                if int(session) == self.pid and state not in "ZX":
                    parents[int(file.parent.name)] = int(parent)
        parents.pop(self.pid, None)
        return parents

    def children(self) -> list[int]:
        return [child for child, parent in self.processes().items() if parent == self.pid]

    def leaves_nothing(self) -> bool:
        """Wait until all that it has started is gone; two seconds are promised."""
        deadline = time.monotonic() + 5
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self.processes()

    def kill_session(self) -> None:
        self.kill()
        for process_id in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
        self.wait()


class RealCage(StandInCage):
    """The stand-in cage with a real Redis, an API that errs, and processes to start in it."""

    pauses_seconds = process.DatavillageApi.PAUSES_SECONDS  # as they are outside of the tests

    def __init__(self, api: ErringApi, server: RealRedis, folder: Path, fixtures: tuple) -> None:
        self.server, self.parent, (self.patch, self.caplog) = server, folder, fixtures
        self.runs: list[Run] = []
        self.until, self.response = until, response
        server.process.send_signal(signal.SIGCONT)
        queue = redis.Redis(port=server.port, decode_responses=True, retry=PATIENT)
        queue.replicaof("no", "one")
        queue.config_set("maxmemory", 0, "min-replicas-to-write", 0)
        queue.flushall()
        super().__init__(api, queue)

    @functools.cached_property
    def folder(self) -> Path:
        ignored = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__")
        return shutil.copytree(PROJECT, self.parent / "project", ignore=ignored)

    @property
    def log(self) -> str:
        return self.caplog.text

    def edit(self, text: str) -> None:
        """Edit the copy's process.py, as an author does: what is defined last counts."""
        with open(self.folder / "process.py", "w", encoding="utf-8") as file:
            file.write(f"{(PROJECT / 'process.py').read_text(encoding='utf-8')}\n{text}")

    def set_in_copy(self, name: str, value: float) -> None:
        """Set a constant in the copy's index.py, for the processes that are started in it."""
        file = self.folder / "index.py"
        text = file.read_text(encoding="utf-8")
        assert text.count(f"\n{name} = ") == 1
        file.write_text(text.replace(f"\n{name} = ", f"\n{name} = {value} or "), encoding="utf-8")

    def start(self, *command: Any, variables: dict[str, str] | None = None, **options: Any) -> Run:
        """Start a command in the copy of the project; without one, the entry."""
        options |= {"cwd": self.folder, "env": os.environ | (variables or {})}
        with open(self.parent / f"log-{len(self.runs)}", "wb") as log:
            options = {"stdout": log, "stderr": subprocess.STDOUT, **options}
            options["start_new_session"] = True
            self.runs.append(run := Run(command or (sys.executable, "index.py"), **options))
        run.log_file = log.name
        return run

    def start_work(self, *lines: str, at_import: str = "", **options: Any) -> Run:
        """Start the entry with an event and a process_event of these lines; wait until it works."""
        modules = "ctypes, gc, logging.config, multiprocessing, signal, socket, subprocess, sys"
        body = "\n    ".join(["logger.warning('works')", *lines])
        code = f"import {modules}, warnings\n{at_import}\ndef process_event(event):\n    {body}\n"
        self.edit(code)
        message_id = self.publish({})
        run = self.start(**options)
        run.message_id = message_id
        run.until(lambda: " works\n" in run.log)
        return run

    def main(self, process_event: Callable[[dict], Any] = lambda event: None) -> int:
        """Do in this process what the entry does, with another `process_event`."""
        self.patch.setattr(process, "process_event", process_event)
        give_up = threading.Timer(PATIENCE_SECONDS, os.kill, [os.getpid(), signal.SIGTERM])
        give_up.start()
        try:
            return index.main()
        finally:
            give_up.cancel()

    def succeed(self, event: dict) -> None:
        pass

    def fail(self, event: dict) -> None:
        raise process.ProcessingError("no age given")

    def be_stopped(self, event: dict) -> None:
        self.stop()
        time.sleep(60)

    def stop(self) -> None:
        """Stop the run in this process twice, as an impatient operator does."""
        time.sleep(0.05)  # until it waits for what calls this
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.pthread_kill(threading.main_thread().ident, signal_number)

    def when(self, condition: Callable[[], object], act: Callable[[], object]) -> None:
        """Do something as soon as a condition holds, but do not wait for it here."""

        def wait_and_act() -> None:
            until(condition)
            act()

        threading.Thread(target=wait_and_act, daemon=True).start()

    def set(self, **constants: float) -> None:
        for name, value in constants.items():
            self.patch.setattr(index, name, value)

    def is_waited_on(self) -> bool:
        return any(client["cmd"] == "xreadgroup" for client in self.queue.client_list())

    def deliver(self, *message_ids: str, deliveries: int = 1, idle_seconds: int = 75) -> None:
        """Have the next messages delivered to a run that died so many seconds ago."""
        self.queue.xreadgroup(index.GROUP, "died", {index.STREAM: ">"}, count=len(message_ids))
        options = {"idle": idle_seconds * 1000, "retrycount": deliveries, "justid": True}
        self.queue.xclaim(index.STREAM, index.GROUP, "died", 0, message_ids, **options)

    def pending_entries(self) -> list[dict]:
        return self.queue.xpending_range(index.STREAM, index.GROUP, "-", "+", 9)

    def wait_for_renewals(self) -> None:
        """Wait until the claim on the only event in progress is renewed three times."""
        for _ in range(3):
            options = {"idle": 60_000, "justid": True}
            self.queue.xclaim(index.STREAM, index.GROUP, "", 0, [*self.pending()], **options)
            until(lambda: self.pending_entries()[0]["time_since_delivered"] < 50_000)

    def assert_given_back(self, message_id: str, deliveries: int = 0) -> None:
        """The stopped delivery does not count, and the next run does not have to wait."""
        assert self.pending() == {message_id: deliveries}
        assert self.dead_letters() == []
        assert index.take_abandoned(index.connect()).deliveries == deliveries + 1

    def lines(self, level: str) -> list[str]:
        return re.findall(rf"(?m)^{level} index (.*)", self.log)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS} s in vain"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRedis]:
    yield (server := RealRedis(tmp_path_factory.mktemp("redis")))
    server.kill()


@pytest.fixture
def cage(server, tmp_path, caplog, monkeypatch) -> Iterator[RealCage]:
    """A cage with an empty queue and a copy of the project, in this process' environment too."""
    caplog.set_level("INFO")
    for name in ("LOGLEVEL", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # or an edit in the same second is missed
    redis_process, real_connect = server.process, index.connect
    people = {"ann": "# Ann\n", "ben": '# "Zoë", "佐江"\n'}
    monkeypatch.setattr(test, "StandInApi", ErringApi)
    with stand_in_cage(people) as stand_in, monkeypatch.context() as patch:
        patch.setattr(process.DatavillageApi, "PAUSES_SECONDS", (0.001,) * 5)
        patch.setattr(index, "connect", real_connect)
        patch.setenv("REDIS_SERVICE_HOST", "127.0.0.1")
        patch.setenv("REDIS_SERVICE_PORT", str(server.port))
        yield (cage := RealCage(stand_in.api, server, tmp_path, (patch, caplog)))
        cage.api.gate.set()
        for run in cage.runs:
            run.kill_session()
        # Ended by the test, or started again, maybe with options:
        if server.process is not redis_process or server.process.poll() is not None:
            server.kill()
            shutil.rmtree(server.data)
            server.start()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # restored
