"""Promises 11, 12 and 14 to 17: the users and the API."""

import asyncio
import re
import runpy
import socket
import sys
import threading
import time
import tracemalloc
from unittest import mock

import pytest

import process
from process import DatavillageApi, ProcessingError, for_each_user

CALLS = {
    "GET activeUsers": lambda: DatavillageApi().active_users(),
    "GET activeUsers/ann/data": lambda: DatavillageApi().user_data("ann"),
    "PUT activeUsers/ann/inferences": lambda: DatavillageApi().store("ann", "# Zoë"),
    "POST /metrics": lambda: DatavillageApi().call("post", "/metrics", b"[1]"),
    "PATCH /metrics": lambda: DatavillageApi().call("patch", "/metrics", b"[1]"),
    "DELETE /metrics": lambda: DatavillageApi().call("delete", "/metrics"),
}
LIST, GET, PUT, POST, PATCH, *_ = CALLS
BODIES = [((b"a", "text/plain"), "text/plain"), ((b"{}",), "application/json"), ((), None)]


def end_of(call, *arguments: object) -> str:
    """Make a call; return the message of its error, without the address, or "done"."""
    try:
        call(*arguments)
    except ProcessingError as error:
        return re.sub(r"^[A-Z]+ http\S+?:? ", "", str(error))
    return "done"


def answer(status: int, body: bytes = b"[]", header: str = "Location: /a") -> bytes:
    head = f"HTTP/1.1 {status} -\r\nConnection: close\r\n{header}\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    pauses: list[float] = []  # between the tries of a call, which then take no time
    monkeypatch.setattr(process, "time", mock.Mock(wraps=time, sleep=pauses.append))
    return pauses


def test_each_user_is_worked_on_once_in_workers_threads_and_results_keep_the_order():
    barrier = threading.Barrier(4, timeout=20)
    in_four = runpy.run_path(process.__file__, {"WORKERS": 4})["for_each_user"]
    results = in_four(iter([*range(12), 0]), lambda _: (barrier.wait(), threading.get_ident()))
    assert list(results) == [*range(12)]
    assert len({thread for _, thread in results.values()}) == 4


def test_many_failed_users_stop_no_other_and_the_error_names_the_first_three():
    work = {str(number): sys.exit for number in range(40)} | {"last": lambda: "done"}
    work["0"] = lambda: sys.exit(time.sleep(0.1))  # the first user is not the first that fails
    end = end_of(for_each_user, work, lambda user_id: work[user_id]())
    reasons = "; ".join(f"'{number}': SystemExit at [^;]+" for number in range(3))
    assert re.fullmatch(f"40 of 41 users failed: {reasons}; …", end)


@pytest.mark.parametrize("number", [0, 1])
def test_all_users_are_worked_on_with_as_many_threads_as_can_be_started(monkeypatch, number):
    starts = [mock.Mock(side_effect=RuntimeError)] * 40 + [threading.Thread.start] * number
    monkeypatch.setattr(threading.Thread, "start", lambda thread: starts.pop()(thread))
    assert len(for_each_user(range(40), int)) == 40


def test_progress_is_logged_at_intervals_also_while_nothing_moves(cage):
    cage.patch.setattr(process, "PROGRESS_SECONDS", 0.1)
    started, line = time.monotonic(), "0 of 1 users, 0 failed\n"
    for_each_user(["hangs"], lambda user_id: cage.until(lambda: cage.log.count(line) >= 3))
    assert time.monotonic() - started >= 0.3


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize("work", [asyncio.sleep, lambda _: (yield)], ids=["coroutine", "generator"])
def test_work_that_never_ran_has_failed(cage, work):
    reason = f"returned {type(work('ann')).__name__}, so it never ran: remove async or yield"
    assert end_of(for_each_user, ["ann"], work) == f"1 of 1 users failed: 'ann': {reason}"
    assert end_of(DatavillageApi().store, "ann", work("ann")) == reason
    cage.publish({})
    assert cage.main(work) == 1
    assert f"failed: {reason}" in cage.log


def test_the_sample_calls_the_api_for_many_users_at_a_time_and_computes_for_one(cage):
    def wait_for_all(request: str) -> None:
        all_are_there.wait()

    def compute(user_id: str, data: str) -> str:
        assert computing.acquire(blocking=False), "another user is computed"
        time.sleep(0.001)
        computing.release()
        return data

    all_are_there, computing = threading.Barrier(16, timeout=50), threading.Lock()
    cage.api.answer, cage.api.users = wait_for_all, dict.fromkeys(map(str, range(48)), "")
    cage.patch.setattr(process, "compute", compute)
    process.process_event({"userIds": [*cage.api.users]})
    assert len(cage.api.clients) == 16  # connections are kept


def test_memory_does_not_grow_with_the_number_of_users(cage):
    cage.api.users = dict.fromkeys(map(str, range(150)), "x" * 100_000)
    tracemalloc.start()
    process.process_event({})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000  # of 15


def test_the_larger_example_of_the_readme_works(cage):
    readme = (cage.folder / "README.md").read_text(encoding="utf-8")
    [example] = re.findall(r"(?ms)^```python\n((?:(?!^```).)*^def process_event.*?)^```", readme)
    exec(example, names := dict(vars(process)))
    event = {"type": "COMPARE", "userIds": ["ann", "eve"], "data": {"explain": True}}
    assert end_of(names["process_event"], event) == "1 of 2 users failed: 'eve': no data"
    assert " <https://example.org/aboveAverage> false ." in cage.stored["ann", "inferences"]
    assert " <https://example.org/average> 10.0 ." in cage.stored["ann", "explains"]


FINAL = (201, 204, 206, 300, 302, 307, 400, 401, 403, 404)
NO_LIST, PAGE = "answered no JSON array of strings", "answered 200 with a web page"
ANSWERS = [
    # What is called, what is always answered, the number of tries, and how it ends.
    *[(line, answer(status), 6, f"answered {status}") for line in CALLS for status in (429, 503)],
    *[(line, answer(500), 6, "answered 500") for line in CALLS if line not in (POST, PATCH)],
    *[(line, answer(500), 1, "answered 500") for line in (POST, PATCH)],
    *[(GET, answer(status), 6, f"answered {status}") for status in (408, 530)],
    *[(POST, answer(status), 1, f"answered {status}") for status in (408, 504)],
    *[(GET, answer(status), 1, f"answered {status}") for status in FINAL],
    *[(line, answer(302), 1, "answered 302") for line in CALLS],
    *[(line, answer(status), 1, "done") for line in (PUT, POST) for status in (200, 201, 204, 206)],
    (PUT, answer(201)[:-1], 1, "done"),
    (LIST, answer(200, header="Content-Type: application/XHTML+xml; charset=utf-8"), 1, PAGE),
    *[(LIST, answer(200, body), 1, NO_LIST) for body in (b"", b"{}", b'["", 1]', b"[" * 100_000)],
    (GET, b"", 6, "ConnectionError"),
    (GET, answer(200)[:-1], 6, "ChunkedEncodingError"),
    (GET, answer(200, header="Content-Encoding: gzip"), 6, "ContentDecodingError"),
]
IDS = [f"{line}: {end}" for line, _, _, end in ANSWERS]


@pytest.mark.parametrize(("line", "answer", "tries", "end"), ANSWERS, ids=IDS)
def test_the_answer_decides_whether_a_call_is_tried_six_times(cage, line, answer, tries, end):
    cage.api.answers[line] = [answer] * 7
    assert end_of(CALLS[line]) == end
    assert len(cage.api.requests) == tries


@pytest.mark.parametrize(("line", "retries"), [(GET, 5), (POST, 0)])
def test_a_late_answer_is_a_temporary_error_but_a_post_not_repeated(cage, pauses, line, retries):
    cage.patch.setattr(DatavillageApi, "TIMEOUT_SECONDS", (50, 0.05))
    cage.api.answers[line] = [b"-later-" * 9] * 6
    assert end_of(CALLS[line]) == "ReadTimeout"
    assert len(pauses) == retries


def test_the_pauses_between_tries_take_15_to_23_seconds(cage, pauses):
    cage.patch.setattr(DatavillageApi, "PAUSES_SECONDS", cage.pauses_seconds)
    cage.api.answers[LIST] = [answer(500)] * 6
    assert end_of(CALLS[LIST]) == "answered 500"
    assert 15 <= sum(pauses) <= 23
    assert pauses[0] < 1  # most errors pass at once


def test_a_pause_is_as_long_as_the_api_asks_up_to_a_minute(cage, pauses):
    cage.patch.setattr(DatavillageApi, "PAUSES_SECONDS", (10,) * 5)
    cage.api.answers[LIST] = [answer(503, header=f"Retry-After: {n}") for n in (20, 61, 7, 20.5)]
    assert CALLS[LIST]() == ["ann", "ben"]
    assert pauses[:2] == [20, 60]
    assert 10 <= min(pauses[2:]) <= max(pauses[2:]) <= 15


@pytest.mark.parametrize("variable", ["DV_URL", "http_proxy"])
def test_a_post_is_repeated_if_no_connection_is_made(cage, pauses, variable):
    cage.patch.setattr(DatavillageApi, "TIMEOUT_SECONDS", (0.05, 50))
    cage.patch.setenv("DV_URL", "http://api.example")
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        cage.patch.setenv(variable, "http://127.0.0.1:{1}".format(*server.getsockname()))
        with socket.create_connection(server.getsockname()):  # it has room for one
            end_of(CALLS[POST])
    assert len(pauses) == 5
    end_of(CALLS[POST])  # now it is refused
    assert len(pauses) == 10


def test_a_large_result_is_stored_over_a_slow_network(cage):
    def read_slowly(handler) -> None:
        for _ in range(40):
            handler.rfile.read(500_000)
            time.sleep(0.02)
        handler.wfile.write(answer(200))

    cage.patch.setattr(DatavillageApi, "TIMEOUT_SECONDS", (0.3, 50))
    cage.patch.setattr(cage.api.RequestHandlerClass, "respond", read_slowly)
    DatavillageApi().store("ann", "x" * 20_000_000)


def test_nothing_in_an_answer_for_one_user_reaches_another(cage):
    users = cage.api.users = {f"u{number}": f"# {number}" for number in range(60)}
    interim = b"HTTP/1.1 103 -\r\n\r\n-later-" + answer(200, b"# of another")
    lines = [f"GET activeUsers/u{number}/data" for number in range(0, 60, 5)]
    cage.api.answers = {line: [interim] for line in lines}
    cage.api.answers["GET activeUsers/u1/data"] = [answer(200, b"# 1", "Set-Cookie: of=1")]
    data = for_each_user(users, DatavillageApi().user_data, skip_failed=True)
    assert len(data) == 48
    assert data.items() <= users.items()
    assert {headers["Cookie"] for headers in cage.api.headers} == {None}


def test_all_active_users_are_processed_whatever_their_ids(cage):
    users = ["https://a.example/card#me", "a?b", "../c", "%2e", "Zoë", "佐\n江", "..."]
    cage.api.users = {user_id: f"# {user_id!r}" for user_id in users}
    cage.patch.setattr(process, "compute", lambda user_id, data: f"{user_id}: {data}")
    process.process_event({"userIds": []})
    assert cage.stored == {}
    process.process_event({"userIds": None})
    assert cage.stored == {(user, "inferences"): f"{user}: # {user!r}" for user in users}


NOT_SENT = {
    "'' cannot be part of a URL": lambda api: api.user_data(""),
    "'.' cannot be part of a URL": lambda api: api.user_data("."),
    "'..' cannot be part of a URL": lambda api: api.store("..", ""),
    "the result is bytes, not str: make it a text": lambda api: api.store("ann", b""),
    "'a' is not a path below DV_URL, such as '/a/b'": lambda api: api.call("GET", "a"),
    "'//a' is not a path below DV_URL, such as '/a/b'": lambda api: api.call("GET", "//a"),
    "the body is str, not bytes: encode it": lambda api: api.call("POST", "/a", "text"),
    "InvalidHeader": lambda api: api.call("PUT", "/a", b"text", "text/plain\n"),
}


@pytest.mark.parametrize(("error", "call"), NOT_SENT.items(), ids=NOT_SENT)
def test_what_the_client_rejects_is_not_sent_and_not_tried_again(cage, pauses, error, call):
    assert end_of(call, DatavillageApi()) == error
    assert cage.api.headers == pauses == []


@pytest.mark.parametrize("turtle", ["# Zoë 佐", ""])
def test_turtle_is_utf_8_in_both_directions_without_a_byte_order_mark(cage, turtle):
    data = answer(200, f"\ufeff{turtle}".encode(), "Content-Type: text/plain; charset=latin-1")
    cage.api.answers = {GET: [data], PUT: [answer(500)]}
    assert CALLS[GET]() == turtle
    DatavillageApi().store("ann", f"\ufeff{turtle}")
    assert cage.stored == {("ann", "inferences"): turtle}  # in the second try too
    sent = cage.api.headers[-1]
    assert (sent["Content-Type"], sent["Transfer-Encoding"]) == ("text/turtle", None)


def test_proxy_and_ca_variables_are_honoured_but_netrc_is_not(cage, tmp_path):
    (tmp_path / ".netrc").write_text("machine api.example login somebody password else\n")
    cage.patch.setenv("HOME", str(tmp_path))
    cage.patch.setenv("http_proxy", f"http://127.0.0.1:{cage.api.server_port}")
    cage.patch.setenv("DV_URL", "http://api.example/")
    assert CALLS[LIST]() == ["ann", "ben"]  # with the token
    cage.patch.setenv("DV_URL", "https://127.0.0.1:" + cage.server.tls["REDIS_SERVICE_PORT"])
    assert end_of(CALLS[LIST]) == "SSLError"
    cage.patch.setenv("REQUESTS_CA_BUNDLE", str(cage.server.certificate))
    assert end_of(CALLS[LIST]) == "ConnectionError"  # Redis speaks TLS, but no HTTP


@pytest.mark.parametrize(("body", "kind"), BODIES)
def test_a_call_reaches_any_other_endpoint_and_returns_the_answer(cage, body, kind):
    cage.api.answers["PATCH /metrics?of=a/b"] = [answer(201, b"\xff")]
    assert DatavillageApi().call("patch", "/metrics?of=a%2Fb", *body) == b"\xff"
    assert [headers["Content-Type"] for headers in cage.api.headers] == [kind]
