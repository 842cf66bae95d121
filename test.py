"""The cage at home: `pytest` runs the tests, `python test.py` rehearses the algorithm.

First come your tests. Then those that show what the cage does, whatever the algorithm; what the
cage is made of here, an API over HTTP and a Redis over TCP; and the rehearsal.
"""

import argparse
import contextlib
import datetime
import json
import logging
import os
import re
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import fakeredis
import pytest
import redis

import index
import process

# YOUR TESTS: edit them along with `compute` and `process_event`.

# Each user's data by user ID, for these tests, and for `python test.py` without files.
USERS = {
    "alice": '<https://example.org/alice> <https://schema.org/name> "Alice" .\n',
    "bob": '<https://example.org/bob> <https://schema.org/knows> "Zoë", "佐江" .\n',
}
# What `python test.py` publishes without `--event`.
EVENT = {"jobId": "job-1", "trigger": "rehearsal"}


def test_compute_tells_the_length_in_a_valid_triple_whatever_the_id():
    for user_id in ("alice", "https://alice.example/card#me", 'a b<c>"d"\\e^`{|}\n', "Zoë", "100%"):
        iri = r'<[^\x00-\x20<>"{}|^`\\]+>'  # IRIREF of the Turtle grammar, without escapes
        assert re.fullmatch(f"{iri} {iri} 4 \\.\n", process.compute(user_id, "Zoë\n")), user_id


def test_process_event_stores_a_result_for_each_user():
    with stand_in_cage(USERS) as cage:
        process.process_event(EVENT)
        assert cage.stored == {
            (user_id, "inferences"): process.compute(user_id, data)
            for user_id, data in USERS.items()
        }


def test_process_event_works_on_the_users_that_the_event_names():
    for user_ids in (["bob"], ["bob", "bob"], []):
        with stand_in_cage(USERS) as cage:
            process.process_event({"userIds": user_ids})
            assert cage.stored.keys() == {(user_id, "inferences") for user_id in user_ids}


# WHAT THE CAGE DOES, whatever the algorithm: each of these tests brings its own.


def test_cage_takes_one_event_the_oldest_and_acknowledges_it(monkeypatch):
    events = []
    monkeypatch.setattr(process, "process_event", events.append)
    with stand_in_cage({}) as cage:
        cage.publish({"trigger": "first"})
        cage.publish({"trigger": "second"})
        assert index.main() == 0
        assert [event["trigger"] for event in events] == ["first"]
        assert cage.pending() == {}


def test_cage_sets_a_malformed_event_aside_with_the_reason():
    with stand_in_cage({}) as cage:
        cage.publish(msg_data='{"userIds": "alice"}')
        assert index.main() == 1
        assert cage.pending() == {}
        [letter] = cage.dead_letters()
        assert letter["error"].startswith("malformed: userIds is not a list")


def test_cage_delivers_a_failed_event_again_and_sets_it_aside_after_three(monkeypatch):
    def fail(event: dict) -> None:
        raise process.ProcessingError("no age")

    monkeypatch.setattr(process, "process_event", fail)
    monkeypatch.setattr(index, "CLAIM_SECONDS", 0)  # or the next delivery would be in a minute
    with stand_in_cage({}) as cage:
        message_id = cage.publish({"trigger": "full"})
        for deliveries in (1, 2):
            assert index.main() == 1
            assert cage.pending() == {message_id: deliveries}
        assert index.main() == 1
        assert cage.pending() == {}
        [letter] = cage.dead_letters()
        assert letter["error"] == "no age"
        assert json.loads(letter["msg_data"])["trigger"] == "full"


def test_cage_hands_the_event_of_a_worker_that_died_to_the_next(monkeypatch):
    events = []
    monkeypatch.setattr(process, "process_event", events.append)
    with stand_in_cage({}) as cage:
        cage.publish({"trigger": "first"})
        cage.queue.xreadgroup("consummers", "died", {"events": ">"})
        cage.publish({"trigger": "second"})
        monkeypatch.setattr(index, "CLAIM_SECONDS", 0)  # as if it had died a minute ago
        assert index.main() == 0
        assert [event["trigger"] for event in events] == ["first"]
        assert cage.pending() == {}


def test_cage_renews_the_claim_while_the_work_goes_on(monkeypatch):
    def work(event: dict) -> None:
        silences = [0]
        while silences[-1] >= max(silences):  # the silence is shorter after a renewal
            [pending] = cage.queue.xpending_range("events", "consummers", "-", "+", 1)
            silences.append(pending["time_since_delivered"])
            assert silences[-1] < 20_000  # ms
        assert pending["times_delivered"] == 1

    monkeypatch.setattr(process, "process_event", work)
    monkeypatch.setattr(index, "RENEW_SECONDS", 0.05)
    with stand_in_cage({}) as cage:
        cage.publish({})
        assert index.main() == 0


def test_cage_tries_all_users_and_names_the_one_that_failed(monkeypatch):
    def process_event(event: dict) -> None:
        process.for_each_user(["alice", "eve", "bob"], lambda user_id: done.append(names[user_id]))

    names, done = {"alice": "Alice", "bob": "Bob"}, []
    monkeypatch.setattr(process, "process_event", process_event)
    monkeypatch.setattr(index, "MAX_DELIVERIES", 1)
    with stand_in_cage({}) as cage:
        cage.publish({})
        assert index.main() == 1
        assert sorted(done) == ["Alice", "Bob"]
        [letter] = cage.dead_letters()
        reason = r"1 of 3 users failed: 'eve': KeyError at test\.py:\d+ <lambda>"
        assert re.fullmatch(reason, letter["error"])


def test_cage_rides_out_a_passing_fault_of_the_api(monkeypatch):
    faults = [http_answer(503), http_answer(200, b"cut")[:-1], http_answer(429)]

    def answer(request: str) -> bytes | None:
        return faults.pop() if faults and request == "GET activeUsers/alice/data" else None

    monkeypatch.setattr(process, "PAUSES_SECONDS", (0, 0, 0))
    with stand_in_cage({"alice": "# Alice"}, answer):
        assert process.DatavillageApi().user_data("alice") == "# Alice"
        assert faults == []


def test_cage_hands_back_the_event_of_a_run_that_is_stopped(monkeypatch):
    monkeypatch.setattr(process, "process_event", lambda event: signal.raise_signal(signal.SIGTERM))
    with stand_in_cage({}) as cage:
        message_id = cage.publish({})
        assert index.main() == 143
        assert cage.pending() == {message_id: 0}  # the delivery does not count
        monkeypatch.setattr(process, "process_event", lambda event: None)
        assert index.main() == 0  # the next run need not wait for the claim to end
        assert cage.pending() == {}


def test_cage_lets_no_users_data_into_the_log():
    entry = """if True:
    import logging, os, sys, warnings, index, process
    os.environ["LOGLEVEL"] = "INFO"
    def process_event(event):
        data = process.DatavillageApi().user_data("alice")
        logging.getLogger("library").error(data)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(data)
        logging.getLogger("process.helper").info("my own words")
        raise ValueError(data)
    process.process_event = process_event
    index.start_logging()
    sys.exit(index.main())
    """
    with stand_in_cage({"alice": "secret"}) as cage:
        cage.publish({})
        command, folder = [sys.executable, "-c", entry], Path(__file__).parent
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=60)
    log = (done.stdout + done.stderr).decode("utf-8")
    assert "secret" not in log
    assert STAND_IN_TOKEN not in log
    assert " INFO my own words\n" in log
    assert re.search("ERROR .* failed: ValueError at <string>:11 process_event\n", log)


def test_cage_runs_the_readmes_larger_example():
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    examples = [block for block in blocks if block.startswith("def process_event(")]
    if not examples:
        pytest.skip("this README has no such example")
    names = dict(vars(process))
    exec(examples[0], names)
    with stand_in_cage({"ann": "# Ann\n", "ben": '# "Zoë", "佐江"\n'}) as cage:
        with pytest.raises(process.ProcessingError, match="1 of 2 users failed: 'eve': no data"):
            names["process_event"]({"userIds": ["ann", "eve"], "trigger": "full"})
        result, explanation = (cage.stored["ann", kind] for kind in ("inferences", "explains"))
        assert result == "<https://example.org/ann> <https://example.org/aboveAverage> false .\n"
        assert explanation == "<https://example.org/ann> <https://example.org/average> 10.0 .\n"


# THE STAND-IN CAGE: the variables, a queue, and an API, as a process finds them in the cage.

STAND_IN_TOKEN = "a-token-that-no-log-may-hold"


@contextlib.contextmanager
def stand_in_cage(
    users: dict[str, str], answer: Callable[[str], bytes | None] = lambda request: None
) -> Iterator["StandInCage"]:
    """Make a cage in which `process.process_event(event)` and `index.main()` work as they are.

    Takes each user's data by user ID, and what may answer in place of the API: it is called with
    each request, such as `GET activeUsers/alice/data`, and returns an `http_answer`, or None for
    the usual one. Yields the cage; restores what the process had before at the end.
    """
    api, queue = StandInApi(users, answer), fakeredis.TcpFakeServer(("127.0.0.1", 0))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    log_level = logging.root.level
    with serving(api), serving(queue), pytest.MonkeyPatch.context() as environment:
        cage = StandInCage(api, *queue.server_address)
        for name, value in cage.variables.items():
            environment.setenv(name, value)
        index.create_group(cage.queue)  # or the first read would fail; fakeredis then disconnects
        try:
            yield cage
        finally:
            cage.queue.close()
            logging.root.setLevel(log_level)
            for number, handler in handlers.items():
                if signal.getsignal(number) is not handler:
                    signal.signal(number, handler)


class StandInCage:
    """What a process finds in the cage."""

    def __init__(self, api: "StandInApi", redis_host: str, redis_port: int) -> None:
        self.stored = api.stored  # Turtle, by user ID and kind, such as ("alice", "inferences")
        self.queue = redis.Redis(redis_host, redis_port, decode_responses=True)
        no_proxy = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
        self.variables = {
            "DV_URL": f"http://127.0.0.1:{api.server_address[1]}",
            "DV_TOKEN": STAND_IN_TOKEN,
            "DV_APP_ID": "app-1",
            "DV_CLIENT_ID": "client-1",
            "REDIS_SERVICE_HOST": redis_host,
            "REDIS_SERVICE_PORT": str(redis_port),
            "TLS_CAFILE": "",
            "no_proxy": f"127.0.0.1,{no_proxy}",
        }

    def publish(self, event: dict[str, Any] | None = None, **fields: str) -> str:
        """Publish an event as the platform does, or a message with any fields; return its ID."""
        now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
        msg_data = json.dumps({"msg_dt": now.isoformat()} | (event or {}))
        return self.queue.xadd("events", fields or {"msg_data": msg_data}, maxlen=1000)

    def pending(self) -> dict[str, int]:
        """Return the IDs of the events that were delivered but not acknowledged; how often."""
        entries = self.queue.xpending_range("events", "consummers", "-", "+", 1000)
        return {entry["message_id"]: entry["times_delivered"] for entry in entries}

    def dead_letters(self) -> list[dict[str, str]]:
        """Return the fields of what was set aside."""
        return [fields for _, fields in self.queue.xrange("events:dead-letter")]


class StandInApi(socketserver.ThreadingTCPServer):
    """The part of the Datavillage API that a process uses, on a free port of this machine."""

    daemon_threads = True
    request_queue_size = 128  # connections that wait: with 5, as usual, of 16 some stall for 1 s

    def __init__(self, users: dict[str, str], answer: Callable[[str], bytes | None]) -> None:
        super().__init__(("127.0.0.1", 0), StandInApiHandler)
        self.users, self.answer = users, answer
        self.stored: dict[tuple[str, str], str] = {}

    def handle_error(self, *connection: Any) -> None:
        """Print what went wrong in answering, unless it is that the client is gone."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(*connection)


class StandInApiHandler(socketserver.StreamRequestHandler):
    """Answers one connection to the stand-in API; http.server would take twice as long."""

    server: StandInApi

    def handle(self) -> None:
        """Answer requests until the client is gone, or was given an answer that is not usual."""
        while line := self.rfile.readline().decode("latin-1"):
            method, target, _ = line.split()
            headers = {}
            while line := self.rfile.readline().decode("latin-1").strip():
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            body = self.rfile.read(int(headers.get("content-length", 0)))
            # A target that came through a proxy is the whole URL.
            path = [unquote(segment) for segment in urlsplit(target).path.split("/")[1:]]
            answer = self.server.answer(f"{method} {'/'.join(path[4:])}")
            if answer is not None:
                self.wfile.write(answer.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                return
            self.wfile.write(self.usual_answer(method, path, headers, body))

    def usual_answer(self, method: str, path: list[str], headers: dict, body: bytes) -> bytes:
        """Do what the API does; return its answer."""
        users = self.server.users
        if headers.get("authorization") != f"Bearer {STAND_IN_TOKEN}":
            return http_answer(401)
        if path[:5] != ["clients", "client-1", "applications", "app-1", "activeUsers"]:
            return http_answer(404)
        if (method, path[5:]) == ("GET", []):
            return http_answer(200, json.dumps(list(users)).encode("utf-8"))
        user_id, kind = path[5:] if len(path) == 7 else ("", "")
        if user_id not in users or kind not in ("data", "inferences", "explains"):
            return http_answer(404)
        if (method, kind) == ("GET", "data"):
            return http_answer(200, users[user_id].encode("utf-8"), content_type="text/turtle")
        if kind == "data" or (method, headers.get("content-type")) != ("PUT", "text/turtle"):
            return http_answer(400)
        self.server.stored[user_id, kind] = body.decode("utf-8")
        return http_answer(200)


def http_answer(status: int, body: bytes = b"", **headers: str) -> bytes:
    """Return an HTTP answer as it is sent."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} -\r\nContent-Length: {len(body)}\r\n{lines}\r\n".encode() + body


@contextlib.contextmanager
def serving(server: socketserver.TCPServer) -> Iterator[None]:
    """Let a server serve until the block ends."""
    with server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


# THE REHEARSAL: the entry as a process in the stand-in cage, and what it stored.

PRINTED_USERS = 10  # whose results are printed: enough to see whether they are right
PROGRESS_SECONDS = 1.5  # from one look at how far it is to the next
FILE_IRI = (
    "holds a file: IRI, with the path of this folder, against which a relative IRI was resolved; "
    'parse the data with publicID="https://..."'
)
# The entry at home: one user after the other, and with what the cage's log leaves out.
REHEARSED_ENTRY = """if True:
    import json, logging, os, signal, sys, traceback
    # Ctrl-C was held back until here, where it ends without a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    sys.path[0] = os.getcwd()
    import index, process

    def at_home(text):
        return "home| " + text.rstrip().replace("\\n", "\\nhome| ")

    class Formatter(logging.Formatter):
        def format(self, record):
            if not index.is_own(record.name):
                return at_home(super().format(record))
            if record.msg == "user %r: %s":
                queue.rpush("failed", json.dumps(record.args))
            error = record.exc_info and record.exc_info[1]
            record.exc_info = None
            text = super().format(record)
            if error and not isinstance(error, process.ProcessingError):
                text += "\\n" + at_home("".join(traceback.format_exception(error)))
                if isinstance(error, SyntaxError):  # of a library's, Python shows no text
                    text += "\\n" + at_home(str(error))
            return text

    queue = index.connect()
    index.start_logging()
    handler = logging.root.handlers[0]
    handler.removeFilter(index.keep_data_out)
    handler.setFormatter(Formatter(index.LOG_FORMAT))
    handler.handleError = lambda record: print(at_home(traceback.format_exc()))
    process.WORKERS = 1
    sys.exit(index.main())
"""


def rehearse_from_command_line(arguments: list[str] | None = None) -> int:
    """Rehearse what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(description="Run the entry at home; print what it stored.")
    paths_help = "a user's Turtle, in ID.ttl, or a folder of such files (default: USERS)"
    parser.add_argument("paths", nargs="*", metavar="FILE", help=paths_help)
    parser.add_argument("--event", metavar="JSON", help="the event to publish (default: EVENT)")
    results_help = "where to write results, as inferences/ID.ttl and explains/ID.ttl"
    parser.add_argument("--results", metavar="FOLDER", type=Path, help=results_help)
    options = parser.parse_args(arguments)
    try:
        event = EVENT if options.event is None else json.loads(options.event)
    except (ValueError, RecursionError) as error:
        parser.exit(2, f"--event: {error}\n")
    if not isinstance(event, dict):
        parser.exit(2, "--event: not a JSON object\n")
    users: dict[str, str] = {}
    try:
        if options.results:
            path = options.results
            path.mkdir(parents=True, exist_ok=True)
        for path in map(Path, options.paths):
            files = sorted(path.glob("[!.]*.ttl")) if path.is_dir() else [path]
            if not files:
                parser.exit(2, f"{path}: no *.ttl file in this folder\n")
            for path in files:
                if path.stem in users:
                    parser.exit(2, f"{path}: another file for the user {path.stem!r}\n")
                users[path.stem] = path.read_bytes().decode("utf-8-sig")  # line ends as they are
    except (OSError, UnicodeDecodeError) as error:
        parser.exit(2, f"{path}: {error}\n")
    return rehearse(users or USERS, event, options.results)


def rehearse(users: dict[str, str], event: dict[str, Any], results_folder: Path | None) -> int:
    """Run the entry on one event, and report what it stored; return the exit status."""
    started, child = time.monotonic(), None

    def end(*_: object) -> None:
        if child:
            child.kill()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child.pid, 0)  # a zombie would be a process left, too
        os._exit(130)

    signal.signal(signal.SIGINT, end)
    user_ids = event.get("userIds")
    named = set(map(str, user_ids if isinstance(user_ids, list) else users))
    # Ctrl-C is held back until the process can be ended, and never comes to a server's thread.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    with stand_in_cage(users, teller_of_progress(len(named))) as cage:
        cage.publish(event)
        command = [sys.executable, "-u", "-c", REHEARSED_ENTRY]
        child = subprocess.Popen(command, cwd=Path(__file__).resolve().parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        fault_in = checker_of_turtle()  # meanwhile
        status = child.wait()
        failed = dict(map(json.loads, cage.queue.lrange("failed", 0, -1)))
    status = status if status >= 0 else 128 - status  # as a shell does
    print("\x1b[K" if sys.stderr.isatty() else "", end="", file=sys.stderr, flush=True)
    print()
    stored = dict.fromkeys(user_id for user_id, _ in cage.stored)
    printed, empty, notes = set(list(stored)[:PRINTED_USERS]), set(), []
    for (user_id, kind), turtle in cage.stored.items():
        marks = "" if user_id in named else "; the event does not name this user"
        if holds_no_triple(turtle):
            empty.add(user_id)
            marks += "; empty"
        if user_id in printed:
            print(f"{user_id}: {kind}{marks}")
            print(re.sub("(?m)^(?=.)", "    ", turtle.removesuffix("\n")))
        if fault := fault_in and fault_in(turtle):
            failed[user_id] = f"{kind}: not valid Turtle: {fault}"
            status = status or 1
        if re.search("<file:", turtle, re.IGNORECASE):
            notes.append(f"{user_id}: {kind}: {FILE_IRI}")
        if results_folder:
            file = results_folder / kind / f"{quote(user_id, safe='')}.ttl"
            try:
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(turtle.encode("utf-8"))
            except OSError as error:
                notes.append(f"{user_id}: {kind}: not written: {error}")
    silent = sorted(named - stored.keys() - failed.keys())
    no_file = dict.fromkeys(named - users.keys(), "; no file holds this user")
    if len(stored) > len(printed):
        print(f"... and the results of {len(stored) - len(printed):,} more users")
    print_some(notes)
    print_some(
        [f"{user_id}: no result, no failure{no_file.get(user_id, '')}" for user_id in silent]
    )
    print_some([f"{key}: failed: {failed[key]}{no_file.get(key, '')}" for key in failed])
    unnamed = f", stored though not named: {len(stored.keys() - named):,}"
    print(
        f"users: {len(named):,}, stored: {len(named & stored.keys()):,}, empty: {len(empty):,}, "
        f"failed: {len(failed):,}, without result or failure: {len(silent):,}"
        f"{unnamed if stored.keys() - named else ''}, seconds: {time.monotonic() - started:,.1f}, "
        f"exit status: {status}"
        f"{'' if fault_in else '; Turtle not checked: rdflib is not installed'}",
        flush=True,
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said
    return status


def teller_of_progress(users: int) -> Callable[[str], None]:
    """Return what tells on a terminal, at a request, how many users the process has come to.

    At a request it waits for the answer: no debugger's prompt is there to be overwritten.
    """
    begun, told, tell_at = set(), 0, time.monotonic() + PROGRESS_SECONDS

    def tell(request: str) -> None:
        nonlocal told, tell_at
        if request != "GET activeUsers":
            begun.add(request.partition(" ")[2].rpartition("/")[0])
        if sys.stderr.isatty() and len(begun) > told and time.monotonic() >= tell_at:
            told, tell_at = len(begun), time.monotonic() + PROGRESS_SECONDS
            print(f"{told:,} of {users:,} users\r", end="", file=sys.stderr, flush=True)

    return tell


def checker_of_turtle() -> Callable[[str], str] | None:
    """Return what tells why Turtle is not valid, or ''; None if rdflib is not installed."""
    try:
        import rdflib
    except ImportError:
        return None
    logged: list[str] = []
    # What it says of an IRI that is none, it says to its log alone.
    logging.getLogger("rdflib.term").addFilter(lambda record: logged.append(record.getMessage()))

    def fault_in(turtle: str) -> str:
        logged.clear()
        graph = rdflib.Graph()
        try:
            graph.parse(data=turtle.rstrip(" \t\r\n") + "\n", format="turtle")
        except Exception as error:
            return " ".join(f"{type(error).__name__} {error}".split())
        for text in logged:
            iri, is_invalid, _ = text.partition(" does not look like a valid URI")
            if is_invalid:
                return f"at line {turtle.partition(iri)[0].count(chr(10)) + 1}: {text}"
        if any(
            isinstance(s, rdflib.Literal) or not isinstance(p, rdflib.URIRef) for s, p, _ in graph
        ):
            return "a subject is a literal, or a predicate no IRI"
        return ""

    fault_in("<a:b> <a:b> <a:b> .")  # the first time, it loads its parser
    return fault_in


def holds_no_triple(turtle: str) -> bool:
    """Tell whether Turtle holds no triple: nothing but blanks, comments and prefixes."""
    directives = r"#[^\r\n]*|@?(prefix|base)\s[^<]*<[^>]*>\s*\.?"
    return not re.sub(directives, "", turtle, flags=re.IGNORECASE).strip(" \t\r\n")


def print_some(lines: list[str], some: int = 20) -> None:
    """Print the first lines, and the number of the others: some show what they share."""
    for line in lines[:some]:
        print(line)
    if len(lines) > some:
        print(f"... and {len(lines) - some:,} more")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also for a job in the background
    sys.exit(rehearse_from_command_line())
