"""What the template's tests share: a cage with a real Redis and an API that answers anything."""

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

import index
import process
from test import StandInApi, StandInApiHandler, StandInCage, stand_in_cage

PROJECT = Path(__file__).resolve().parent.parent
PATIENCE_SECONDS = 50  # until a test gives up waiting; far more than anything here takes
LATER = b"-later-"  # in an answer: the rest comes a moment later
PATIENT = Retry(ConstantBackoff(0.02), int(PATIENCE_SECONDS / 0.02))


class ErringApiHandler(StandInApiHandler):
    """Checks the token, and answers as the test says, with raw bytes."""

    def do_GET(self) -> None:
        api, line = self.server, f"{self.command} {unquote(self.path.partition('/app-1/')[2])}"
        api.requests.append(line)
        api.headers.append(self.headers)
        api.clients.add(self.client_address)
        if line in api.held:
            api.gate.wait(PATIENCE_SECONDS)
        answer = api.answers[line].pop(0) if api.answers.get(line) else None
        if self.headers["Authorization"] != "Bearer a-token":
            answer = response(401)
        if answer is None:
            return super().do_GET()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for number, part in enumerate(answer.split(LATER)):
            time.sleep(0.05 * number)
            self.wfile.write(part)
            self.wfile.flush()
        self.close_connection = True
        return None

    do_PUT = do_GET


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
        """Start it, or start it again, and wait until it answers."""
        self.data.mkdir(exist_ok=True)
        self.process = subprocess.Popen([*self.command, *options], stdout=subprocess.DEVNULL)
        with redis.Redis(port=self.port, retry=PATIENT) as client:
            client.ping()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Run(subprocess.Popen):
    """A process in the cage, whose output goes to a file."""

    @property
    def log(self) -> str:
        return Path(self.log_file).read_text(encoding="utf-8")

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds; fail at once, with the log, if the process has exited."""
        until(lambda: condition() or self.poll() is not None)
        assert condition(), f"exited with status {self.returncode}:\n{self.log}"

    end = functools.partialmethod(subprocess.Popen.wait, PATIENCE_SECONDS)


class RealCage(StandInCage):
    """The stand-in cage with a real Redis, an API that errs, and processes to start in it."""

    pauses_seconds = process.PAUSES_SECONDS  # as they are outside of the tests

    def __init__(self, api: StandInApi, server: RealRedis, folder: Path, fixtures: tuple) -> None:
        self.server, self.folder, (self.patch, self.caplog) = server, folder, fixtures
        self.runs: list[Run] = []
        self.until, self.response = until, response
        api.RequestHandlerClass = ErringApiHandler
        api.answers, api.held, api.gate = {}, set(), threading.Event()
        api.requests, api.headers, api.clients = [], [], set()
        queue = redis.Redis(port=server.port, decode_responses=True, retry=PATIENT)
        queue.flushall()
        super().__init__(api, queue)

    @property
    def log(self) -> str:
        return self.caplog.text

    def edit(self, text: str) -> None:
        """Edit the copy's process.py, as an author does: what is defined last counts."""
        with open(self.folder / "process.py", "w", encoding="utf-8") as file:
            file.write(f"{(PROJECT / 'process.py').read_text(encoding='utf-8')}\n{text}")

    def start(self, *command: Any, variables: dict[str, str] | None = None, **options: Any) -> Run:
        """Start a command in the copy of the project; without one, the entry."""
        options |= {"cwd": self.folder, "env": os.environ | (variables or {})}
        with open(self.folder.with_name(f"log-{len(self.runs)}"), "wb") as log:
            options |= {"stdout": log, "stderr": subprocess.STDOUT}
            self.runs.append(run := Run(command or (sys.executable, "index.py"), **options))
        run.log_file = log.name
        return run

    def main(self, process_event: Callable[[dict], Any] = lambda event: None) -> int:
        """Do in this process what the entry does, with another `process_event`."""
        self.patch.setattr(process, "process_event", process_event)
        return index.main()

    def set(self, **constants: float) -> None:
        for name, value in constants.items():
            self.patch.setattr(index, name, value)

    def is_waited_on(self) -> bool:
        return any(client["cmd"] == "xreadgroup" for client in self.queue.client_list())

    def deliver(self, *message_ids: str, deliveries: int = 1, idle_seconds: int = 60) -> None:
        """Have the next messages delivered to a run that died so many seconds ago."""
        self.queue.xreadgroup(index.GROUP, "died", {index.STREAM: ">"}, count=len(message_ids))
        options = {"idle": idle_seconds * 1000, "retrycount": deliveries, "justid": True}
        self.queue.xclaim(index.STREAM, index.GROUP, "died", 0, message_ids, **options)


def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
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
    ignored = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__")
    folder = shutil.copytree(PROJECT, tmp_path / "project", ignore=ignored)
    people = {"ann": "# Ann\n", "ben": '# "Zoë", "佐江"\n'}
    with stand_in_cage(people) as stand_in, monkeypatch.context() as patch:
        patch.setattr(process, "PAUSES_SECONDS", (0.001,) * 5)
        patch.setattr(index, "connect", real_connect)
        patch.setenv("REDIS_SERVICE_HOST", "127.0.0.1")
        patch.setenv("REDIS_SERVICE_PORT", str(server.port))
        yield (cage := RealCage(stand_in.api, server, folder, (patch, caplog)))
        cage.api.gate.set()
        for run in cage.runs:
            run.kill()
            run.wait()
        if server.process is not redis_process:  # restarted by the test, maybe with options
            server.kill()
            shutil.rmtree(server.data)
            server.start()
        cage.queue.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # restored
