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

PATIENCE_SECONDS = 50  # until a test gives up waiting; far more than anything here takes
Call = Callable[[], object]
PATIENT = Retry(ConstantBackoff(0.02), int(PATIENCE_SECONDS / 0.02))


class ErringApi(test.StandInApi):
    """The API, which checks the token and answers as the test says."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.RequestHandlerClass = ErringApiHandler
        self.answers: dict[str, list[bytes]] = {}  # raw, by request; used up one after another
        self.headers: list[Message] = []
        self.clients: set[tuple[str, int]] = set()


class ErringApiHandler(test.StandInApiHandler):
    """Answers a request with the next raw answer to it, or else as the API does."""

    def respond(self) -> None:
        api, (_, is_of_users, resource) = self.server, self.path.partition("/app-1/")
        line = f"{self.command} {unquote(resource if is_of_users else self.path)}"
        api.headers.append(self.headers)
        api.clients.add(self.client_address)
        if not api.answers.get(line):
            return super().respond()
        answer = api.answers[line].pop(0)
        api.requests.append(line)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for number, part in enumerate(answer.split(b"-later-")):  # the rest comes a moment later
            time.sleep(0.05 * number)
            self.wfile.write(part)
            self.wfile.flush()
        self.close_connection = True
        return None

    def usual_answer(self, path: list[str], body: str) -> str | int:
        is_known = self.headers["Authorization"] == "Bearer a-token"
        return super().usual_answer(path, body) if is_known else 401


class RealRedis:
    """A redis-server that keeps its data in a folder, on two free ports, one of them for TLS."""

    def __init__(self, folder: Path) -> None:
        local = ("127.0.0.1", 0)
        with socket.create_server(local) as one, socket.create_server(local) as other:
            self.port, tls_port = one.getsockname()[1], other.getsockname()[1]
        self.certificate = pem = folder / "redis.pem"  # with its key
        command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test"
        command += f" -addext subjectAltName=IP:127.0.0.1 -keyout {pem} -out {pem}"
        subprocess.run(command.split(), check=True, capture_output=True)
        self.tls = {"REDIS_SERVICE_PORT": str(tls_port), "TLS_CAFILE": str(pem)}
        command = f"redis-server --port {self.port} --tls-port {tls_port} --tls-auth-clients no"
        command += f" --tls-cert-file {pem} --tls-key-file {pem} --tls-ca-cert-file {pem}"
        # Without `always`, a kill would lose what Redis acknowledged in the last second.
        command += f" --dir {folder} --appendonly yes --appendfsync always"
        self.command = command.split()
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        redis.Redis(port=self.port, retry=PATIENT).ping()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def until(condition: Call, then: Call = lambda: None, seconds: int = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.01)
    then()


class Run(subprocess.Popen):
    """A process in the cage, in a session of its own; its output goes to a file."""

    end = functools.partialmethod(subprocess.Popen.wait, PATIENCE_SECONDS)

    @property
    def log(self) -> str:
        return Path(self.log_file).read_text(encoding="utf-8")

    def until(self, condition: Call) -> None:
        """Wait until a condition holds; fail at once, with the log, if the process has exited."""
        until(lambda: condition() or self.poll() is not None)
        assert condition(), f"exited with status {self.returncode}:\n{self.log}"

    def processes(self) -> set[int]:
        """Return the processes of its session, but no zombies."""
        found = set()
        for file in Path("/proc").glob("[0-9]*/stat"):  # see proc(5)
            with contextlib.suppress(OSError):  # it has just ended
                state, _, _, session, *_ = file.read_text().rpartition(")")[2].split()
                if int(session) == self.pid and state not in "ZX":
                    found.add(int(file.parent.name))
        return found

    def assert_leaves_nothing(self) -> None:
        """All that it has started is gone soon after its end; two seconds are promised."""
        until(lambda: not self.processes(), seconds=5)

    def kill_session(self) -> None:
        for process_id in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
        self.wait()


class RealCage(test.StandInCage):
    """The stand-in cage with a real Redis, an API that errs, and processes to start in it."""

    pauses_seconds = process.DatavillageApi.PAUSES_SECONDS  # as they are outside of the tests
    until = staticmethod(until)
    succeed = staticmethod(lambda event: None)

    def __init__(self, api: ErringApi, server: RealRedis, parent: Path, *fixtures: Any) -> None:
        self.server, self.parent, (self.patch, self.caplog) = server, parent, fixtures
        self.runs: list[Run] = []
        skip = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__")
        self.folder = shutil.copytree(Path(__file__).parent.parent, parent / "project", ignore=skip)
        queue = redis.Redis(port=server.port, decode_responses=True, retry=PATIENT)
        queue.replicaof("no", "one")
        queue.config_set("maxmemory", 0)
        queue.flushall()
        super().__init__(api, queue)

    @property
    def log(self) -> str:
        return self.caplog.text

    def lines(self, level: str) -> list[str]:
        return re.findall(rf"(?m)^{level} index (.*)", self.log)

    def when(self, condition: Call, act: Call) -> None:
        """Do something as soon as a condition holds, but do not wait for it here."""
        threading.Thread(target=until, args=[condition, act], daemon=True).start()

    def edit(self, text: str) -> None:
        """Edit the copy's process.py, as an author does: what is defined last counts."""
        with open(self.folder / "process.py", "a", encoding="utf-8") as file:
            file.write(f"\n{text}")

    def set(self, **constants: float) -> None:
        """Set constants of index.py, in this process and in the copy."""
        file = self.folder / "index.py"
        for name, value in constants.items():
            self.patch.setattr(index, name, value)
            text = file.read_text("utf-8").replace(f"\n{name} = ", f"\n{name} = {value} or ")
            file.write_text(text, encoding="utf-8")

    def start(self, *command: Any, variables: dict[str, str] | None = None, **options: Any) -> Run:
        """Start a command in the copy of the project; without one, the entry."""
        options |= {"cwd": self.folder, "env": os.environ | (variables or {})}
        with open(self.parent / f"log-{len(self.runs)}", "wb") as log:
            defaults = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
            run = Run(command or (sys.executable, "index.py"), **(defaults | options))
        self.runs.append(run)
        run.log_file = log.name
        return run

    def start_work(self, *lines: str, at_import: str = "", **options: Any) -> Run:
        """Start the entry with an event and a process_event of these lines; wait until it works."""
        modules = "ctypes, logging.config, multiprocessing.shared_memory, signal, subprocess"
        body = "\n    ".join(["logger.warning('works')", *lines])
        self.edit(f"import {modules}\n{at_import}\ndef process_event(event):\n    {body}\n")
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

    def is_waited_on(self) -> bool:
        return any(client["cmd"] == "xreadgroup" for client in self.queue.client_list())

    def deliver(self, *message_ids: str, deliveries: int = 1, idle_seconds: int = 75) -> None:
        """Have the next messages delivered to a run that died so many seconds ago."""
        self.queue.xreadgroup(index.GROUP, "died", {index.STREAM: ">"}, count=len(message_ids))
        options = {"idle": idle_seconds * 1000, "retrycount": deliveries, "justid": True}
        self.queue.xclaim(index.STREAM, index.GROUP, "died", 0, message_ids, **options)

    def assert_given_back(self, message_id: str, deliveries: int = 0) -> None:
        """The stopped delivery does not count, and the next run does not have to wait."""
        assert self.pending() == {message_id: deliveries}
        assert self.dead_letters() == []
        assert index.take_abandoned(index.connect()).deliveries == deliveries + 1


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
    monkeypatch.setattr(test, "StandInApi", ErringApi)
    people, real_connect = {"ann": "# Ann\n", "ben": '# "Zoë", "佐江"\n'}, index.connect
    with test.stand_in_cage(people) as stand_in, monkeypatch.context() as patch:
        patch.setattr(process.DatavillageApi, "PAUSES_SECONDS", (0.001,) * 5)
        patch.setattr(index, "connect", real_connect)
        patch.setenv("REDIS_SERVICE_HOST", "127.0.0.1")
        patch.setenv("REDIS_SERVICE_PORT", str(server.port))
        yield (cage := RealCage(stand_in.api, server, tmp_path, patch, caplog))
        for run in cage.runs:
            run.kill_session()
        server.process.send_signal(signal.SIGCONT)
        if server.process.poll() is not None:
            server.start()
