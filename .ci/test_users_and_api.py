"""Promises 11, 12 and 14 to 17: the users and the API."""

import gzip
import inspect
import re
import socket
import ssl
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

import process
from process import DatavillageApi, for_each_user

CALLS = {
    "GET activeUsers": lambda: DatavillageApi().active_users(),
    "GET activeUsers/ann/data": lambda: DatavillageApi().user_data("ann"),
    "PUT activeUsers/ann/inferences": lambda: DatavillageApi().store("ann", "# Zoë"),
    "POST /metrics": lambda: DatavillageApi().call("POST", "/metrics", b"[1]"),
}
LIST, GET_ANN, PUT_ANN, POST = CALLS


def error_of(call, *arguments: object) -> str:
    with pytest.raises(process.ProcessingError) as caught:
        call(*arguments)
    return str(caught.value)


def outcome(cage, line: str, answer: bytes) -> tuple[int, str]:
    """Make a call that is always answered so; return the number of tries, and how it ended."""
    cage.api.requests.clear()
    cage.api.answers[line] = [answer] * 7
    try:
        CALLS[line]()
    except process.ProcessingError as error:
        return len(cage.api.requests), re.sub(r"^[A-Z]+ http\S+?:? ", "", str(error))
    return len(cage.api.requests), "done"


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The pauses between the tries of a call, which then take no time."""
    pauses: list[float] = []
    clock = SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic)
    monkeypatch.setattr(process, "time", clock)
    return pauses


# 11 and 12: the users
def test_results_come_in_the_order_of_the_users_each_worked_on_once():
    is_fast = threading.Event()
    work = {"slow": lambda: is_fast.wait(50), "fast": is_fast.set}
    results = for_each_user(iter(["slow", "fast", "slow"]), lambda user_id: work[user_id]())
    assert list(results.items()) == [("slow", True), ("fast", None)]


def test_many_failed_users_stop_no_other_and_the_error_names_the_first_three():
    def work(user_id: str) -> str:
        time.sleep(0.1 * (user_id == "0"))  # the first user is not the first that fails
        if user_id == "last":
            return "done"
        if user_id == "39":
            sys.exit()
        raise process.ProcessingError(f"no {user_id}")

    users = [*map(str, range(40)), "last"]
    assert for_each_user(users, work, skip_failed=True) == {"last": "done"}
    reasons = "'0': no 0; '1': no 1; '2': no 2; …"
    assert error_of(for_each_user, users, work) == f"40 of 41 users failed: {reasons}"


@pytest.mark.parametrize(("line", "number"), [("", 16), ("WORKERS = 4", 4)])
def test_sixteen_users_or_as_many_as_the_author_says_are_in_progress(line, number):
    def work(user_id: str) -> None:
        all_are_there.wait()
        threads.add(threading.current_thread())

    text = inspect.getsource(process).replace("\n# YOUR ALGORITHM", f"\n{line}\n# YOUR", 1)
    exec(compile(text, "process.py", "exec"), edited := {"__name__": "process"})
    all_are_there, threads = threading.Barrier(number, timeout=20), set()
    edited["for_each_user"](map(str, range(48)), work)
    assert len(threads) == number


def test_one_thread_is_enough_if_no_more_can_be_started_but_none_is_not(monkeypatch):
    starts = [mock.Mock(side_effect=RuntimeError)] * 32 + [threading.Thread.start]
    monkeypatch.setattr(threading.Thread, "start", lambda thread: starts.pop()(thread))
    users = list(map(str, range(40)))
    assert len(for_each_user(users, int)) == 40
    assert error_of(for_each_user, users, int).startswith("no thread could be started")


def test_progress_is_logged_at_intervals_also_while_nothing_moves(cage):
    assert process.PROGRESS_SECONDS == 30
    cage.patch.setattr(process, "PROGRESS_SECONDS", 0.1)
    started = time.monotonic()
    line = "0 of 1 users, 0 failed\n"
    for_each_user(["hangs"], lambda user_id: cage.until(lambda: cage.log.count(line) >= 3))
    assert time.monotonic() - started >= 0.3


async def coroutine(_: object) -> None:
    pass


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize(("work", "kind"), [(coroutine, "coroutine"), (lambda _: (yield), "gen")])
def test_work_that_never_ran_has_failed(cage, work, kind):
    assert f"failed: 'ann': returned {kind}" in error_of(for_each_user, ["ann"], work)
    assert error_of(DatavillageApi().store, "ann", work("ann")).startswith(f"returned {kind}")
    cage.publish({})
    assert cage.main(work) == 1
    assert f"failed: returned {kind}" in cage.log


def test_the_sample_fetches_for_many_users_at_a_time_and_computes_for_one(cage):
    def answer(request: str) -> None:
        if request.endswith("/data"):
            all_fetch.wait()

    def compute(user_id: str, data: str) -> str:
        assert computing.acquire(blocking=False), "another user is computed"
        time.sleep(0.001)
        computing.release()
        return data

    all_fetch, computing = threading.Barrier(process.WORKERS, timeout=50), threading.Lock()
    cage.api.answer, cage.api.users = answer, dict.fromkeys(map(str, range(48)), "")
    cage.patch.setattr(process, "compute", compute)
    process.process_event({"userIds": []})
    assert cage.stored == {}
    process.process_event({"userIds": None})
    assert len(cage.stored) == 48
    assert len(cage.api.clients) == process.WORKERS  # connections are kept


def test_the_larger_example_of_the_readme_works(cage):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    [example] = re.findall(r"(?ms)^```python\n((?:(?!^```).)*^def process_event.*?)^```", readme)
    exec(example, names := dict(vars(process)))
    event = {"type": "COMPARE", "userIds": ["ann", "eve"], "data": {"explain": True}}
    assert error_of(names["process_event"], event) == "1 of 2 users failed: 'eve': no data"
    user = "<https://example.org/ann> <https://example.org/"
    assert cage.stored["ann", "inferences"] == f"{user}aboveAverage> false .\n"


# 14 and 15: what an answer means
STATUSES = {
    # The calls, the statuses, the number of tries.
    "a temporary error": ((LIST, GET_ANN, PUT_ANN), (408, 429, 500, 503, 530), 6),
    "a final error": (CALLS, (300, 302, 307, 400, 401, 403, 404), 1),
    "no data": ((LIST, GET_ANN), (201, 204, 206), 1),
    "a POST that did nothing": ((POST,), (429, 503), 6),
    "a POST that may have arrived": ((POST,), (408, 500, 504), 1),
}


@pytest.mark.parametrize(("lines", "statuses", "tries"), STATUSES.values(), ids=STATUSES)
def test_the_status_decides_whether_a_call_is_tried_six_times(cage, lines, statuses, tries):
    for line in lines:
        for status in statuses:
            answer = cage.response(status, b'["secret"]', Location="/a")
            assert outcome(cage, line, answer) == (tries, f"answered {status}")


HEAD = b"HTTP/1.1 200 -\r\nConnection: close\r\n"
INCOMPLETE = {
    "nothing": b"",
    "no HTTP": b"no HTTP\r\n\r\n",
    "too short": HEAD + b"Content-Length: 9\r\n\r\n# Ann",
    "bad chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n# Ann",
    "no gzip": HEAD + b"Content-Encoding: gzip\r\n\r\n# Ann",
}


@pytest.mark.parametrize("answer", INCOMPLETE.values(), ids=INCOMPLETE)
def test_an_incomplete_answer_is_a_temporary_error_but_a_post_may_have_arrived(cage, answer):
    for line, tries in ((GET_ANN, 6), (POST, 1)):
        tried, error = outcome(cage, line, answer)
        assert (tried, error.isalpha()) == (tries, True)


@pytest.mark.parametrize(("line", "retries"), [(GET_ANN, 5), (PUT_ANN, 5), (POST, 0)])
def test_a_late_answer_is_a_temporary_error_but_a_post_not_repeated(cage, pauses, line, retries):
    assert DatavillageApi.TIMEOUT_SECONDS == (5, 60)
    cage.patch.setattr(DatavillageApi, "TIMEOUT_SECONDS", (50, 0.05))
    cage.api.answers[line] = [b"-later-" * 9] * 6
    assert error_of(CALLS[line]).endswith(": ReadTimeout")
    assert len(pauses) == retries


NO_LIST = "answered no JSON array of strings"
NO_DATA = [
    ({"Content_Type": "TEXT/HTML; charset=utf-8"}, b'["a"]', "answered 200 with a web page"),
    ({"Content_Type": "application/xhtml+xml"}, b'["a"]', "answered 200 with a web page"),
    *[({}, body, NO_LIST) for body in (b"", b'{"a": 1}', b'["secret", 1]', b"[" * 100_000)],
]


@pytest.mark.parametrize(("headers", "body", "error"), NO_DATA)
def test_a_web_page_or_another_json_is_no_list_of_users(cage, headers, body, error):
    assert outcome(cage, LIST, cage.response(200, body, **headers)) == (1, error)


def test_any_2xx_means_stored_even_if_the_answer_is_cut(cage):
    for status in (200, 201, 204, 206):
        for line in (PUT_ANN, POST):
            answer = cage.response(status, b"<p>", Content_Type="text/html")
            assert outcome(cage, line, answer) == (1, "done")
    assert outcome(cage, PUT_ANN, cage.response(201, b"cut")[:-1]) == (1, "done")


def test_the_pauses_between_tries_take_15_to_23_seconds_and_grow(cage, pauses):
    cage.patch.setattr(DatavillageApi, "PAUSES_SECONDS", cage.pauses_seconds)
    for _ in range(2):
        outcome(cage, LIST, cage.response(500))
    assert 15 <= sum(pauses[:5]) <= 23
    assert pauses[:5] == sorted(pauses[:5])
    assert pauses[0] < 1  # most errors pass at once
    assert pauses[:5] != pauses[5:]  # so that users do not all try again at the same moment


@pytest.mark.parametrize(
    ("retry_after", "shortest", "longest"),
    [("7", 10, 15), ("20", 20, 20), ("61", 60, 60), ("-20", 10, 15), ("20.5", 10, 15)],
)
def test_a_pause_is_as_long_as_the_api_asks_up_to_a_minute(
    cage, pauses, retry_after, shortest, longest
):
    cage.patch.setattr(DatavillageApi, "PAUSES_SECONDS", (10,))
    outcome(cage, LIST, cage.response(503, Retry_After=retry_after))
    assert shortest <= pauses[0] <= longest


@pytest.mark.parametrize("line", [PUT_ANN, POST])
def test_a_connection_that_is_not_made_in_time_is_a_temporary_error(cage, pauses, line):
    cage.patch.setattr(DatavillageApi, "TIMEOUT_SECONDS", (0.05, 9))
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        cage.patch.setenv("DV_URL", "http://127.0.0.1:{1}".format(*server.getsockname()))
        waiting = [socket.socket() for _ in range(8)]  # fill the queue of a busy server
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        started = time.monotonic()
        assert error_of(CALLS[line]).endswith(": ConnectTimeout")
    assert len(pauses) == 5
    assert time.monotonic() - started < 9


@pytest.mark.parametrize("variable", ["DV_URL", "http_proxy"])
def test_a_post_is_repeated_if_the_connection_is_refused(cage, pauses, variable):
    cage.patch.setenv("DV_URL", "http://api.example")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        cage.patch.setenv(variable, "http://127.0.0.1:{1}".format(*closed.getsockname()))
    error_of(CALLS[POST])
    assert len(pauses) == 5


def test_a_large_result_is_stored_over_a_slow_network(cage):
    def read_slowly(handler) -> None:
        rest = int(handler.headers["Content-Length"])
        while rest:
            rest -= len(handler.rfile.read1(min(rest, 1_000_000)))
            time.sleep(0.02)
        handler.wfile.write(cage.response(200))

    cage.patch.setattr(DatavillageApi, "TIMEOUT_SECONDS", (0.3, 50))
    cage.patch.setattr(cage.api.RequestHandlerClass, "respond", read_slowly)
    DatavillageApi().store("ann", "x" * 20_000_000)


def test_no_cookie_of_one_user_is_sent_for_another(cage):
    client = DatavillageApi()
    cage.api.answers[GET_ANN] = [cage.response(200, Set_Cookie="session=of-ann; Path=/")]
    client.user_data("ann")
    client.user_data("ben")
    assert [headers["Cookie"] for headers in cage.api.headers] == [None, None]


def test_no_user_gets_the_answer_that_follows_an_interim_one(cage):
    users = cage.api.users = {f"user-{number}": f"# {number}" for number in range(60)}
    interim = b"HTTP/1.1 103 -\r\n\r\n-later-" + cage.response(200, b"# of another")
    for number in range(0, 60, 5):
        cage.api.answers[f"GET activeUsers/user-{number}/data"] = [interim]
    data = for_each_user(users, DatavillageApi().user_data, skip_failed=True)
    assert len(data) == 48
    assert data.items() <= users.items()


# 16: IDs, text, and the environment
def test_any_id_is_one_path_segment(cage):
    users = ["https://a.example/card#me", "a?b", "../c", "%2e", "Zoë", "佐\n江", "..."]
    cage.api.users = {user_id: f"# {user_id!r}" for user_id in users}
    client = DatavillageApi()
    for user_id in client.active_users():
        client.store(user_id, client.user_data(user_id), "explains")
    assert cage.stored == {(user_id, "explains"): f"# {user_id!r}" for user_id in users}


NOT_SENT = {
    "'' cannot be part of a URL": lambda api: api.user_data(""),
    "'.' cannot be part of a URL": lambda api: api.user_data("."),
    "'..' cannot be part of a URL": lambda api: api.store("..", ""),
    "the result is bytes, not str: make it a text": lambda api: api.store("ann", b""),
    "'a' is not a path below DV_URL, such as '/a/b'": lambda api: api.call("GET", "a"),
    "'//a' is not a path below DV_URL, such as '/a/b'": lambda api: api.call("GET", "//a"),
    "the body is str, not bytes: encode it": lambda api: api.call("POST", "/a", "text"),
}


@pytest.mark.parametrize(("error", "call"), NOT_SENT.items(), ids=NOT_SENT)
def test_what_the_client_rejects_is_not_sent(cage, error, call):
    assert error_of(call, DatavillageApi()) == error
    assert cage.api.headers == []


def test_the_ids_of_client_and_application_are_one_path_segment_each(cage):
    cage.patch.setenv("DV_APP_ID", "app/1?")
    cage.patch.setenv("DV_CLIENT_ID", "client 1#")
    assert "/clients/client%201%23/applications/app%2F1%3F/activeUsers" in error_of(CALLS[LIST])


def test_a_token_that_cannot_be_sent_is_a_final_error(cage, pauses):
    cage.patch.setenv("DV_TOKEN", "secret\n")
    assert error_of(CALLS[LIST]).endswith("/activeUsers: InvalidHeader")
    assert pauses == []


def test_data_is_utf_8_without_a_byte_order_mark(cage):
    body = gzip.compress("\ufeff# Zoë".encode())
    headers = {"Content_Type": "text/plain; charset=latin-1", "Content_Encoding": "gzip"}
    cage.api.answers[GET_ANN] = [cage.response(200, body, **headers)]
    assert CALLS[GET_ANN]() == "# Zoë"


@pytest.mark.parametrize("result", ["\ufeff# Zoë 佐", ""])
def test_a_result_is_stored_as_turtle_without_a_byte_order_mark_in_the_second_try_too(cage, result):
    cage.api.answers[PUT_ANN] = [cage.response(500)]
    DatavillageApi().store("ann", result)
    assert cage.stored == {("ann", "inferences"): result.lstrip("\ufeff")}
    headers = cage.api.headers[-1]
    assert (headers["Content-Type"], headers["Transfer-Encoding"]) == ("text/turtle", None)


def test_a_proxy_is_honoured_but_netrc_is_not(cage, tmp_path):
    (tmp_path / ".netrc").write_text("machine api.example login somebody password else\n")
    cage.patch.setenv("HOME", str(tmp_path))
    cage.patch.setenv("http_proxy", f"http://127.0.0.1:{cage.api.server_port}")
    cage.patch.setenv("DV_URL", "http://api.example/")
    assert CALLS[LIST]() == ["ann", "ben"]  # with the token


def test_ca_variables_are_honoured(cage):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cage.server.certificate)
    cage.api.socket = context.wrap_socket(cage.api.socket, server_side=True)
    cage.patch.setenv("DV_URL", f"https://127.0.0.1:{cage.api.server_port}")
    assert error_of(CALLS[LIST]).endswith("/activeUsers: SSLError")
    cage.patch.setenv("REQUESTS_CA_BUNDLE", str(cage.server.certificate))
    assert CALLS[LIST]() == ["ann", "ben"]


# 17: other calls
BODIES = [((b"a", "text/plain"), "text/plain"), ((b"{}",), "application/json"), ((), None)]


@pytest.mark.parametrize(("body", "kind"), BODIES)
def test_a_call_reaches_any_other_endpoint_and_returns_the_answer(cage, body, kind):
    cage.api.answers["PATCH /metrics?of=a/b"] = [cage.response(201, b"\xff")]
    assert DatavillageApi().call("patch", "/metrics?of=a%2Fb", *body) == b"\xff"
    assert [headers["Content-Type"] for headers in cage.api.headers] == [kind]


def test_other_methods_are_repeated_after_any_temporary_error_but_a_patch_is_not(cage):
    tries = dict.fromkeys(("GET", "PUT", "DELETE", "HEAD", "OPTIONS"), 6) | {"PATCH": 1}
    for method, number in tries.items():
        cage.api.requests.clear()
        cage.api.answers[f"{method} /metrics"] = [cage.response(500)] * 7
        error_of(DatavillageApi().call, method.lower(), "/metrics")
        assert cage.api.requests == [f"{method} /metrics"] * number


def test_memory_does_not_grow_with_the_number_of_users(cage):
    cage.api.users = dict.fromkeys(map(str, range(150)), "x" * 100_000)
    client = DatavillageApi()
    tracemalloc.start()
    for_each_user(cage.api.users, lambda user_id: len(client.user_data(user_id)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000  # of 15
