"""The cage at home: `pytest` runs the tests, `python test.py` rehearses the algorithm.

Your tests come first. Then tests that show how the cage behaves; the stand-in cage that they use,
with its own queue and API; and the rehearsal.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler
from multiprocessing.connection import Connection
from pathlib import Path
from socketserver import ThreadingTCPServer
from types import FrameType
from typing import Any
from unittest import mock
from urllib.parse import quote, unquote

import fakeredis
import pytest
import redis

import index
import process

# YOUR TESTS: replace them when you edit `compute` and `process_event`.

# User data by user ID, for these tests and for `python test.py` without files.
USERS = {
    "alice": '<https://example.org/alice> <https://schema.org/name> "Alice" .\n',
    "bob": '<https://example.org/bob> <https://schema.org/knows> "Zoë", "佐江" .\n',
}
# The event that `python test.py` publishes without `--event`.
EVENT = {"type": "rehearsal"}
# What the API answers to requests that you make with `call`: a text, with the status 200, or just a
# status, by request: "GET /collaborationSpaces/app-1/collaborators", with its query or without.
ANSWERS: dict[str, str | int] = {}


def test_compute_returns_the_length_of_the_data():
    result = "<https://example.org/alice> <https://example.org/characters> 4 .\n"
    assert process.compute("alice", "Zoë\n") == result


def test_compute_makes_a_valid_iri_from_any_user_id():
    assert process.compute("a/b <c>", "").startswith("<https://example.org/a%2Fb%20%3Cc%3E> ")


def test_process_event_stores_a_result_for_each_user():
    with stand_in_cage(USERS) as cage:
        process.process_event(EVENT)
        assert cage.stored == {
            (user_id, "inferences"): process.compute(user_id, data)
            for user_id, data in USERS.items()
        }


def test_process_event_works_on_the_users_that_the_event_names():
    with stand_in_cage(USERS) as cage:
        process.process_event({"userIds": ["bob"]})
        assert list(cage.stored) == [("bob", "inferences")]


# HOW THE CAGE BEHAVES: these tests use their own algorithms.


@pytest.fixture
def run_in_cage(monkeypatch) -> Callable[[Callable[[dict], Any]], None]:
    """Replace your algorithm by a `process_event` of the test's own."""
    monkeypatch.setattr(process, "check_before_event", lambda: None)
    return functools.partial(monkeypatch.setattr, process, "process_event")


def test_cage_takes_the_oldest_event_and_acknowledges_it(run_in_cage):
    events = []
    run_in_cage(events.append)
    with stand_in_cage({}) as cage:
        cage.publish({"type": "first"})
        cage.publish({"type": "second"})
        assert index.main() == 0
        assert [event["type"] for event in events] == ["first"]
        assert cage.pending() == {}


def test_cage_sets_a_malformed_or_rejected_event_aside_with_the_reason(run_in_cage):
    reject = mock.Mock(side_effect=process.EventRejected("no such bank"))
    run_in_cage(reject)
    with stand_in_cage({}) as cage:
        cage.publish({"userIds": "alice"})
        cage.publish({})
        assert [index.main(), index.main()] == [1, 1]
        reasons = [letter["error"] for letter in cage.dead_letters()]
        assert reasons == ["malformed: userIds is not a list of strings", "no such bank"]


def test_cage_delivers_a_failed_event_three_times_and_sets_it_aside(run_in_cage):
    run_in_cage(lambda event: event["age"])
    with stand_in_cage({}) as cage:
        message_id = cage.publish({})
        for deliveries in (1, 2):
            assert index.main() == 1
            assert cage.pending() == {message_id: deliveries}
            cage.pass_a_minute()
        assert index.main() == 1
        assert cage.pending() == {}
        [letter] = cage.dead_letters()
        assert letter["error"].startswith("KeyError at test.py:")


def test_cage_returns_the_event_of_a_stopped_run_to_the_queue(run_in_cage):
    def process_event(event: dict) -> None:
        time.sleep(0.05)  # until the run waits, or the signal might not wake it
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)  # a stop does not wait for it

    run_in_cage(process_event)
    with stand_in_cage({}) as cage:
        message_id = cage.publish({})
        assert index.main() == 143
        assert cage.pending() == {message_id: 0}  # this delivery does not count


def test_cage_works_on_many_users_in_parallel():
    all_are_there = threading.Barrier(process.WORKERS, timeout=30)
    users = map(str, range(process.WORKERS))
    process.for_each_user(users, lambda user_id: all_are_there.wait())


def test_cage_tries_all_users_and_names_those_that_failed():
    ages = {"alice": 41, "bob": 43}
    with pytest.raises(process.ProcessingError, match="1 of 3 users failed: 'eve': KeyError at"):
        process.for_each_user(["eve", *ages], ages.__getitem__)
    assert process.for_each_user(["eve", *ages], ages.__getitem__, skip_failed=True) == ages


def test_cage_retries_a_call_after_a_temporary_error_of_the_api(monkeypatch):
    errors = [503, 429]
    monkeypatch.setattr(process.DatavillageApi, "PAUSES_SECONDS", (0, 0))
    with stand_in_cage({"alice": "# Alice"}, lambda request: errors.pop() if errors else None):
        assert process.DatavillageApi().user_data("alice") == "# Alice"
    assert errors == []


def test_cage_keeps_user_data_out_of_the_log(run_in_cage, monkeypatch, tmp_path):
    def process_event(event: dict) -> None:
        logging.getLogger("library").error("Alice is 41")
        logging.getLogger("process.ages").error("in my own words")
        raise ValueError("Alice is 41")

    run_in_cage(process_event)
    for name in index.LOGGERS:
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    with stand_in_cage({}) as cage, open(tmp_path / "log", "w+", encoding="utf-8") as log:
        index.start_logging(log)
        cage.publish({})
        assert index.main() == 1
        log.seek(0)
        text = log.read()
    assert "Alice" not in text
    assert "in my own words" in text
    assert "failed: ValueError at test.py:" in text


# THE STAND-IN CAGE: the variables, the queue and the API that a process finds in the cage.


Answer = Callable[[str], int | None]
Answers = dict[str, str | int]


@contextlib.contextmanager
def stand_in_cage(
    users: dict[str, str],
    answer: Answer = lambda request: None,
    answers: Answers | None = None,
) -> Iterator["StandInCage"]:
    """Make a cage in which `process.process_event(event)` and `index.main()` work unchanged.

    Takes the user data by user ID. `answer` may replace the API's answers: it is called with each
    request, such as `GET activeUsers/alice/data`, and returns an HTTP status, or None for the
    normal answer. `answers` takes the place of ANSWERS. Everything is restored at the end.
    """
    logging.disable(logging.NOTSET)  # in the cage too, no import can silence the log
    for name in index.LOGGERS:
        logging.getLogger(name).disabled = False
    api = StandInApi(users, answer, ANSWERS if answers is None else answers)
    variables = {
        "DV_URL": f"http://127.0.0.1:{api.server_port}",
        "DV_TOKEN": "a-token",
        "DV_APP_ID": "app-1",
        "DV_CLIENT_ID": "client-1",
        "REDIS_SERVICE_HOST": "stand-in",
        "REDIS_SERVICE_PORT": "6379",
        "TLS_CAFILE": "",
        "no_proxy": f"127.0.0.1,{os.environ.get('no_proxy') or os.environ.get('NO_PROXY', '')}",
    }
    connect = functools.partial(fakeredis.FakeRedis, server=fakeredis.FakeServer())
    entry_here = mock.patch.multiple(index, connect=connect, Algorithm=AlgorithmInThread)
    handlers = {number: signal.getsignal(number) for number in index.STOP_SIGNALS}
    with api, mock.patch.dict(os.environ, variables), entry_here:
        threading.Thread(target=api.serve_forever, args=[0.01], daemon=True).start()
        try:
            yield StandInCage(api, connect(decode_responses=True))
        finally:
            api.shutdown()
            for number, handler in handlers.items():
                signal.signal(number, handler)


class AlgorithmInThread(index.Algorithm):
    """process.py in a thread of this process, where a test can replace its functions."""

    def start(self, channel: Connection) -> None:
        """Start the thread."""
        self.process = threading.Thread(target=index.run_algorithm, args=[channel], daemon=True)
        self.process.start()

    def close(self) -> None:
        """Leave the thread to itself."""
        self.channel.close()


class StandInCage:
    """The stand-in cage, as a test sees it."""

    def __init__(self, api: "StandInApi", queue: redis.Redis) -> None:
        self.api, self.queue = api, queue
        self.stored = api.stored  # Turtle, by user ID and kind, such as ("alice", "inferences")
        self.sent = api.sent  # the bodies of other requests, by request, such as "POST /a/path"
        index.create_group(queue)

    def publish(self, event: dict[str, Any]) -> str:
        """Publish an event as the platform does; return its ID."""
        now = datetime.now(timezone.utc).replace(tzinfo=None).isoformat(timespec="microseconds")
        return self.queue.xadd(index.STREAM, {"msg_data": json.dumps({"msg_dt": now} | event)})

    def pending(self) -> dict[str, int]:
        """Return the delivery counts of the events not yet acknowledged, by ID."""
        entries = self.queue.xpending_range(index.STREAM, index.GROUP, "-", "+", 1000)
        return {entry["message_id"]: entry["times_delivered"] for entry in entries}

    def pass_a_minute(self) -> None:
        """Let so much time pass that all claims expire: a little more than 75 seconds."""
        for message_id in self.pending():
            options = {"idle": int(index.CLAIM_SECONDS * 1000) + 1, "justid": True}
            self.queue.xclaim(index.STREAM, index.GROUP, "died", 0, [message_id], **options)

    def dead_letters(self) -> list[dict[str, str]]:
        """Return the fields of the dead letters."""
        return [fields for _, fields in self.queue.xrange(index.DEAD_LETTER_STREAM)]


class StandInApi(ThreadingTCPServer):
    """The part of the Datavillage API that a process uses, on a free local port."""

    daemon_threads = True
    request_queue_size = 128  # waiting connections; with the default of 5, some of 16 stall for 1 s

    def __init__(self, users: dict[str, str], answer: Answer, answers: Answers) -> None:
        super().__init__(("127.0.0.1", 0), StandInApiHandler)
        self.server_port = self.server_address[1]
        self.users, self.answer = users, answer
        self.answers = {unquote(request): reply for request, reply in answers.items()}
        self.stored: dict[tuple[str, str], str] = {}
        self.sent: dict[str, str] = {}
        self.requests: list[str] = []


class StandInApiHandler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: StandInApi
    protocol_version = "HTTP/1.1"  # keeps connections open
    wbufsize = -1  # sends each answer in one piece; a second piece would wait 40 ms

    def __getattr__(self, name: str) -> Callable[[], None]:
        """Have `respond` called for any method: http.server looks for do_GET, do_PATCH, ..."""
        if name.startswith("do_"):
            return self.respond
        raise AttributeError(name)

    def respond(self) -> None:
        """Answer as the test says, or as the API would."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode("utf-8")
        _, is_of_users, resource = self.path.partition("/clients/client-1/applications/app-1/")
        segments = [unquote(segment) for segment in resource.split("/")]
        request = f"{self.command} {'/'.join(segments) if is_of_users else unquote(self.path)}"
        self.server.requests.append(request)
        if not is_of_users:
            self.server.sent[request] = body
        answer = self.server.answer(request)
        for path in (self.path, self.path.partition("?")[0]):  # in ANSWERS, with the query or not
            if answer is None:
                answer = self.server.answers.get(f"{self.command} {unquote(path)}")
        if answer is None:
            answer = self.usual_answer(segments, body)
        status, text = (answer, "") if isinstance(answer, int) else (200, answer)
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(text.encode("utf-8"))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode("utf-8"))

    def usual_answer(self, path: list[str], body: str) -> str | int:
        """Do what the API does; return a text, or the status of an error."""
        users, stored = self.server.users, self.server.stored
        match self.command, *path:
            case "GET", "activeUsers":
                return json.dumps(list(users))
            case "GET", "activeUsers", user_id, "data" if user_id in users:
                return users[user_id]
            case "PUT", "activeUsers", user_id, "inferences" | "explains" if user_id in users:
                stored[user_id, path[-1]] = body
                return 200
        return 404

    def log_message(self, *_: object) -> None:
        """Do not log requests."""


# THE REHEARSAL: run the entry in the stand-in cage and show what it stored.


class HomeFormatter(logging.Formatter):
    """Shows what the log of a real cage does not: tracebacks, marked, and users in progress."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        return ", in progress: ".join([super().format(record), *getattr(record, "in_progress", [])])

    def formatException(self, exc_info: Any) -> str:
        """Return the traceback. Python leaves out the text of a library's syntax error."""
        text = super().formatException(exc_info)
        text += f"\n{exc_info[1]}" if isinstance(exc_info[1], SyntaxError) else ""
        return "home| " + text.replace("\n", "\nhome| ")


class HomeHandler(logging.StreamHandler):
    """Prints the log, but progress only if it is news: it would flood a debugger's prompt."""

    last = ""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to print a record."""
        is_progress = bool(getattr(record, "in_progress", []))
        is_news = record.getMessage() != self.last
        self.last = record.getMessage()
        return is_news or not is_progress


def rehearse_from_command_line() -> int:
    """Parse the command line and rehearse; return the exit status."""
    parser = argparse.ArgumentParser(description="Run the entry at home; print what it stored.")
    paths_help = "a user's Turtle, in ID.ttl, or a folder of such files (default: USERS)"
    parser.add_argument("paths", nargs="*", type=Path, metavar="FILE", help=paths_help)
    event_help = "the event to publish (default: EVENT)"
    parser.add_argument("--event", default=json.dumps(EVENT), metavar="JSON", help=event_help)
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="where to write results")
    options = parser.parse_args()
    users: dict[str, str] = {}
    argument = "--event"
    try:
        event = json.loads(options.event)
        if not isinstance(event, dict):
            raise ValueError("not a JSON object")
        for argument in options.paths:
            files = sorted(argument.glob("[!.]*.ttl")) if argument.is_dir() else [argument]
            if not files:
                raise ValueError("no *.ttl file in this folder")
            for argument in files:
                if argument.stem in users:
                    raise ValueError(f"another file for the user {argument.stem!r}")
                users[argument.stem] = argument.read_bytes().decode("utf-8-sig")
        argument = "--results"
        for kind in ("inferences", "explains") if options.results else ():
            (options.results / kind).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, RecursionError) as error:
        parser.exit(2, f"{argument}: {error}\n")
    return rehearse(users or USERS, event, options.results)


def rehearse(users: dict[str, str], event: dict[str, Any], results: Path | None) -> int:
    """Run the entry on one event, print the results and a summary; return the exit status."""
    started = time.monotonic()
    handler = HomeHandler(sys.stdout)
    handler.setFormatter(HomeFormatter(index.LOG_FORMAT))
    logging.basicConfig(handlers=[handler], level=index.LOG_LEVEL, force=True)
    process.WORKERS, process.PROGRESS_SECONDS = 1, 2  # one user at a time, for `breakpoint()`
    with stand_in_cage(users) as cage:
        cage.publish(event)
        status = run_entry()
    print()
    show_results(cage.stored)
    user_ids = event.get("userIds")
    named = set(map(str, user_ids if isinstance(user_ids, list) else users))
    found = look_at(cage, named)
    if status == 0 and not cage.stored and set(cage.api.requests) <= {"GET activeUsers"}:
        print("no data asked for, nothing stored: right for an event that is not about users")
        found["without a result"] = []
    if results:
        found |= write_results(cage.stored, results)
    for name, lines in found.items():
        for line in lines[:20]:
            print(f"{name}: {line}")
        if len(lines) > 20:
            print(f"{name}: ... and {len(lines) - 20:,} more")
    is_wrong = any(found.get(name) for name in ("not asked for", "not valid", "not written"))
    status = status or int(is_wrong)
    summary = {"users": len(named), "results": len(cage.stored)}
    summary |= {name: len(lines) for name, lines in found.items()}
    if not can_check_turtle():
        python = os.path.relpath(sys.executable)
        print(f"to have the results checked: {python} -m pip install pyoxigraph==0.5.13")
        summary["not valid"] = "unknown without pyoxigraph"
    summary |= {"seconds": round(time.monotonic() - started, 1), "exit status": status}
    print(", ".join(f"{name}: {value}" for name, value in summary.items()))
    return status


def run_entry() -> int:
    """Run index.main in a thread, and the algorithm in the main thread, as in the cage."""
    channel, channel_of_algorithm = multiprocessing.Pipe()
    statuses = [1]

    class AlgorithmInMainThread(AlgorithmInThread):
        def __init__(self) -> None:
            self.channel, self.process = channel, threading.main_thread()

    def run_main() -> None:
        with channel:  # whose end also ends the algorithm's wait for an event
            statuses.append(index.main())

    index.STOP_SIGNALS = ()  # Ctrl-C ends the rehearsal
    signal.signal(signal.SIGINT, end_at_ctrl_c)
    with mock.patch.object(index, "Algorithm", AlgorithmInMainThread):
        entry = threading.Thread(target=run_main)
        entry.start()
        index.run_algorithm(channel_of_algorithm)
        entry.join()
    return statuses[-1]


def end_at_ctrl_c(signal_number: int, frame: FrameType | None) -> None:
    """Show where the algorithm is, and for which user, and end at once."""
    name = "process_event"
    for thread in threading.enumerate():
        if thread.name.startswith("user "):
            name, frame = thread.name, sys._current_frames()[thread.ident]
    print(f"\nstopped in {name}:\n{''.join(traceback.format_stack(frame)[-4:])}", flush=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def show_results(stored: dict[tuple[str, str], str]) -> None:
    """Print the first ten results."""
    for (user_id, kind), turtle in list(stored.items())[:10]:
        print(f"{user_id}: {kind}\n    " + turtle.rstrip("\n").replace("\n", "\n    "))
    if len(stored) > 10:
        print(f"... and {len(stored) - 10:,} more; --results FOLDER writes them all")


def look_at(cage: StandInCage, named: set[str]) -> dict[str, list[str]]:
    """Return what is odd about the results, by kind, for the users that the event named."""
    stored = cage.stored
    with_result = {user_id for user_id, _ in stored}
    found = {
        "without a result": sorted(named - with_result),
        "not asked for": sorted(with_result - named),
        "empty": [],
        "not valid": [],
    }
    can_check = can_check_turtle()
    for (user_id, kind), turtle in stored.items():
        if not turtle.strip() and kind == "inferences":
            found["empty"].append(f"{user_id}: {kind}")
        if can_check and (error := error_in(turtle) or mistake_in(turtle)):
            found["not valid"].append(f"{user_id}: {kind}: {error}")
    return found


def write_results(stored: dict[tuple[str, str], str], folder: Path) -> dict[str, list[str]]:
    """Write the results to files; return those that cannot be written, if any."""
    failed = []
    for (user_id, kind), turtle in stored.items():
        try:
            (folder / kind / f"{quote(user_id, safe='')}.ttl").write_bytes(turtle.encode())
        except OSError as error:
            failed.append(f"{user_id}: {kind}: {error}")
    return {"not written": failed} if failed else {}


def can_check_turtle() -> bool:
    """Return whether pyoxigraph is installed."""
    return importlib.util.find_spec("pyoxigraph") is not None


# The base of relative IRIs, which shows that they are; no data has this scheme.
RELATIVE = "relative-iri://here/"


def error_in(turtle: str) -> str:
    """Return why a text is not Turtle (https://www.w3.org/TR/turtle/), or ""; never raises."""
    try:
        for _ in parse_turtle(turtle):
            pass
    except Exception as error:
        return " ".join(str(getattr(error, "msg", error)).split())
    return ""


def mistake_in(turtle: str) -> str:
    """Return what Turtle allows and yet is a mistake in a result, or "": two kinds of IRIs."""
    for triple in parse_turtle(turtle):
        iris = re.sub(r'"(\\.|[^"\\])*"', "", str(triple))  # without texts
        if found := re.search("<((?i:file):[^>]*)>", iris):
            advice = 'parse the data with publicID="https://..." (pyoxigraph: base_iri)'
            return f"a relative IRI became {found[1]}; {advice}"
        if found := re.search("<relative-iri:(?://here/)?([^>]*)>", iris):
            return f"<{found[1]}> is relative, so it depends on the reader: write it in full"
    return ""


def parse_turtle(turtle: str) -> Iterator[Any]:
    """Return the triples in a text; raises an exception if it is not Turtle."""
    import pyoxigraph

    return pyoxigraph.parse(turtle.encode(), pyoxigraph.RdfFormat.TURTLE, base_iri=RELATIVE)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    sys.exit(rehearse_from_command_line())
