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
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
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
EVENT = {"jobId": "job-1", "trigger": "rehearsal"}


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


def test_cage_takes_the_oldest_event_and_acknowledges_it(monkeypatch):
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
        cage.publish({"userIds": "alice"})
        assert index.main() == 1
        [letter] = cage.dead_letters()
        assert letter["error"] == "malformed: userIds is not a list of strings"


def test_cage_delivers_a_failed_event_three_times_and_sets_it_aside(monkeypatch):
    monkeypatch.setattr(process, "process_event", lambda event: event["age"])
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


def test_cage_gives_the_event_of_a_run_that_died_to_the_next_run(monkeypatch):
    events = []
    monkeypatch.setattr(process, "process_event", events.append)
    with stand_in_cage({}) as cage:
        cage.publish({"trigger": "first"})
        cage.queue.xreadgroup(index.GROUP, "died", {index.STREAM: ">"})
        cage.publish({"trigger": "second"})
        cage.pass_a_minute()
        assert index.main() == 0
        assert [event["trigger"] for event in events] == ["first"]


def test_cage_returns_the_event_of_a_stopped_run_to_the_queue(monkeypatch):
    def process_event(event: dict) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)  # a stop does not wait for it

    monkeypatch.setattr(process, "process_event", process_event)
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
    monkeypatch.setattr(process, "PAUSES_SECONDS", (0, 0))
    with stand_in_cage({"alice": "# Alice"}, lambda request: errors.pop() if errors else None):
        assert process.DatavillageApi().user_data("alice") == "# Alice"
    assert errors == []


def test_cage_keeps_user_data_out_of_the_log(caplog, monkeypatch):
    def process_event(event: dict) -> None:
        logging.getLogger("library").error("Alice is 41")
        logging.getLogger("process.ages").error("in my own words")
        raise ValueError("Alice is 41")

    monkeypatch.setattr(process, "process_event", process_event)
    caplog.set_level("INFO")
    monkeypatch.setattr(caplog.handler, "filters", [index.keep_data_out])  # as in the cage
    with stand_in_cage({}) as cage:
        cage.publish({})
        assert index.main() == 1
    assert "Alice" not in caplog.text
    assert "in my own words" in caplog.text
    assert "failed: ValueError at test.py:" in caplog.text


# THE STAND-IN CAGE: the variables, the queue and the API that a process finds in the cage.


@contextlib.contextmanager
def stand_in_cage(
    users: dict[str, str], answer: Callable[[str], int | None] = lambda request: None
) -> Iterator["StandInCage"]:
    """Make a cage in which `process.process_event(event)` and `index.main()` work unchanged.

    Takes the user data by user ID. `answer` may replace the API's answers: it is called with each
    request, such as `GET activeUsers/alice/data`, and returns an HTTP status, or None for the
    normal answer. Everything is restored at the end.
    """
    api = StandInApi(users, answer)
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
    handlers = {number: signal.getsignal(number) for number in index.STOP_SIGNALS}
    with api, mock.patch.dict(os.environ, variables), mock.patch.object(index, "connect", connect):
        threading.Thread(target=api.serve_forever, args=[0.01], daemon=True).start()
        try:
            yield StandInCage(api, connect(decode_responses=True))
        finally:
            api.shutdown()
            for number, handler in handlers.items():
                signal.signal(number, handler)


class StandInCage:
    """The stand-in cage, as a test sees it."""

    def __init__(self, api: "StandInApi", queue: redis.Redis) -> None:
        self.api, self.queue = api, queue
        self.stored = api.stored  # Turtle, by user ID and kind, such as ("alice", "inferences")
        index.create_group(queue)

    def publish(self, event: dict[str, Any]) -> str:
        """Publish an event as the platform does; return its ID."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
        return self.queue.xadd(index.STREAM, {"msg_data": json.dumps({"msg_dt": now} | event)})

    def pending(self) -> dict[str, int]:
        """Return the delivery counts of the events not yet acknowledged, by ID."""
        entries = self.queue.xpending_range(index.STREAM, index.GROUP, "-", "+", 1000)
        return {entry["message_id"]: entry["times_delivered"] for entry in entries}

    def pass_a_minute(self) -> None:
        """Make all claims a minute old, so they expire."""
        for message_id in self.pending():
            options = {"idle": 60_000, "justid": True}
            self.queue.xclaim(index.STREAM, index.GROUP, "died", 0, [message_id], **options)

    def dead_letters(self) -> list[dict[str, str]]:
        """Return the fields of the dead letters."""
        return [fields for _, fields in self.queue.xrange(index.DEAD_LETTER_STREAM)]


class StandInApi(ThreadingHTTPServer):
    """The part of the Datavillage API that a process uses, on a free local port."""

    request_queue_size = 128  # waiting connections; with the default of 5, some of 16 stall for 1 s

    def __init__(self, users: dict[str, str], answer: Callable[[str], int | None]) -> None:
        super().__init__(("127.0.0.1", 0), StandInApiHandler)
        self.users, self.answer = users, answer
        self.stored: dict[tuple[str, str], str] = {}


class StandInApiHandler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: StandInApi
    protocol_version = "HTTP/1.1"  # keeps connections open
    wbufsize = -1  # sends each answer in one piece; a second piece would wait 40 ms

    def do_GET(self) -> None:
        """Answer as the test says, or as the API would."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode("utf-8")
        _, _, resource = self.path.partition("/clients/client-1/applications/app-1/")
        path = [unquote(segment) for segment in resource.split("/")]
        status, answer = self.server.answer(f"{self.command} {'/'.join(path)}"), ""
        if status is None:
            status, answer = self.usual_answer(self.command, *path, body=body)
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(answer.encode("utf-8"))))
        self.end_headers()
        self.wfile.write(answer.encode("utf-8"))

    do_PUT = do_GET

    def usual_answer(self, *request: str, body: str) -> tuple[int, str]:
        """Do what the API does; return the status and the body."""
        users, stored = self.server.users, self.server.stored
        match request:
            case "GET", "activeUsers":
                return 200, json.dumps(list(users))
            case "GET", "activeUsers", user_id, "data" if user_id in users:
                return 200, users[user_id]
            case "PUT", "activeUsers", user_id, "inferences" | "explains" if user_id in users:
                stored[user_id, request[-1]] = body
                return 200, ""
        return 404, ""

    def log_message(self, *_: object) -> None:
        """Do not log requests."""


# THE REHEARSAL: run the entry in the stand-in cage and show what it stored.


class HomeFormatter(logging.Formatter):
    """Marks tracebacks, because the log of a real cage does not show them."""

    def formatException(self, exc_info: Any) -> str:
        """Return the traceback, marked. Python leaves out the text of a library's syntax error."""
        text = super().formatException(exc_info)
        text += f"\n{exc_info[1]}" if isinstance(exc_info[1], SyntaxError) else ""
        return "home| " + text.replace("\n", "\nhome| ")


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
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(HomeFormatter(index.LOG_FORMAT))
    logging.basicConfig(handlers=[handler], level=index.LOG_LEVEL, force=True)
    process.WORKERS, process.PROGRESS_SECONDS = 1, 2  # one user at a time, for `breakpoint()`
    index.STOP_SIGNALS = ()  # Ctrl-C ends the rehearsal at once, even an endless `compute`
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with stand_in_cage(users) as cage:
        cage.publish(event)
        status = index.main()
    print()
    user_ids = event.get("userIds")
    named = set(map(str, user_ids if isinstance(user_ids, list) else users))
    missing = named - {user_id for user_id, _ in cage.stored}
    found = {"without a result": sorted(missing), "empty": [], "not valid": []}
    can_check = importlib.util.find_spec("rdflib")
    for number, ((user_id, kind), turtle) in enumerate(cage.stored.items()):
        if number < 10:
            print(f"{user_id}: {kind}\n    " + turtle.rstrip("\n").replace("\n", "\n    "))
        if not turtle.strip():
            found["empty"].append(f"{user_id}: {kind}")
        if can_check and (error := error_in(turtle)):
            found["not valid"].append(f"{user_id}: {kind}: {error}")
        if results:
            try:
                (results / kind / f"{quote(user_id, safe='')}.ttl").write_bytes(turtle.encode())
            except OSError as error:
                found.setdefault("not written", []).append(f"{user_id}: {kind}: {error}")
    if len(cage.stored) > 10:
        print(f"... and {len(cage.stored) - 10:,} more; --results FOLDER writes them all")
    for name, lines in found.items():
        for line in lines[:20]:
            print(f"{name}: {line}")
        if len(lines) > 20:
            print(f"{name}: ... and {len(lines) - 20:,} more")
    status = status or int(bool(found["not valid"] or "not written" in found))
    summary = {"users": len(named), "results": len(cage.stored)}
    summary |= {name: len(lines) for name, lines in found.items()}
    summary |= {} if can_check else {"not valid": "unknown without rdflib"}
    summary |= {"seconds": round(time.monotonic() - started, 1), "exit status": status}
    print(", ".join(f"{name}: {value}" for name, value in summary.items()))
    return status


def error_in(turtle: str) -> str:
    """Return what is wrong with the Turtle, or ""."""
    import rdflib

    graph = rdflib.Graph()
    try:
        graph.parse(data=f"{turtle}\n", format="turtle", publicID="https://example.org/")
    except Exception as error:
        return " ".join(str(error).split())
    terms = {term for triple in graph for term in triple}
    for iri in (term for term in terms if isinstance(term, rdflib.URIRef)):
        if iri.startswith("file:"):
            return f'a relative IRI became {iri}; parse the data with publicID="https://..."'
        if any(character <= " " or character in '<>"{}|^`\\' for character in iri):
            return f"{str(iri)!r} is not a valid IRI"
    return ""


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    sys.exit(rehearse_from_command_line())
