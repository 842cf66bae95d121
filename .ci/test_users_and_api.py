"""Promises 8 to 12: the users and the API."""

import gzip
import re
import ssl
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

import process

ANN, PUT_ANN = "GET activeUsers/ann/data", "PUT activeUsers/ann/inferences"
NAMELESS = type("", (type,), {"__name__": property(lambda cls: 1 / 0)})("", (Exception,), {})
UNREADABLE = type("Unreadable", (process.ProcessingError,), {"__str__": None})


def error_of(call, *arguments: object) -> str:
    with pytest.raises(process.ProcessingError) as caught:
        call(*arguments)
    return str(caught.value)


# 8 and 9: the users
def test_results_come_in_the_order_of_the_users_and_failures_are_named(cage):
    def work(user_id: str) -> str:
        calls.append(user_id)
        time.sleep(0.05 if user_id == "c" else 0)
        if user_id.isdigit() or user_id == "bug":
            raise UNREADABLE if user_id.isdigit() else NAMELESS
        return user_id.upper()

    calls: list[str] = []
    users = ["c", "40", *map(str, range(30)), "b", "41", "a", "c", "0"]  # more fail than threads
    results = process.for_each_user(iter(users), work, skip_failed=True)
    assert list(results.items()) == [("c", "C"), ("b", "B"), ("a", "A")]
    assert sorted(calls) == sorted({*users})
    assert "INFO process 35 of 35 users, 32 failed" in cage.log
    place = r"Unreadable at test_users_and_api\.py:\d+ work"
    assert len(re.findall(rf"ERROR process user '\d+': {place}\n", cage.log)) == 32
    named = "; ".join(f"'{number}': {place}" for number in (40, 0, 1))
    error = error_of(process.for_each_user, users, work)
    assert re.fullmatch(f"32 of 35 users failed: {named}; …", error)
    error = error_of(process.for_each_user, ["40", "0", "1"], work)
    assert re.fullmatch(f"3 of 3 users failed: {named}", error)
    assert process.for_each_user([], work) == {}
    with pytest.raises(ZeroDivisionError):  # a bug in the helpers is not a success
        process.for_each_user(["bug"], work)
    assert process.PROGRESS_SECONDS == 30
    cage.patch.setattr(process, "PROGRESS_SECONDS", 0.05)
    process.for_each_user(["a", "b"], lambda user_id: time.sleep(0.3 if user_id == "a" else 0))
    assert cage.log.count("1 of 2 users, 0 failed") == 1  # it does not repeat itself


def test_sixteen_users_are_in_progress_on_connections_that_are_kept_and_one_is_computed(cage):
    def answer(request: str) -> None:
        if request.endswith("/data"):
            all_fetch.wait()

    def compute(user_id: str, data: str) -> str:
        assert computing.acquire(blocking=False)
        time.sleep(0.001)
        computing.release()
        return data

    all_fetch, computing = threading.Barrier(process.WORKERS, timeout=50), threading.Lock()
    cage.api.answer = answer
    cage.api.users = dict.fromkeys(map(str, range(48)), "")
    cage.patch.setattr(process, "compute", compute)
    process.process_event({"userIds": []})
    assert cage.stored == {}
    process.process_event({"userIds": list(cage.api.users)})
    assert process.WORKERS == 16
    assert len(cage.stored) == 48
    assert len(cage.api.clients) == 16


def test_memory_does_not_grow_with_the_number_of_users_even_if_the_api_sets_cookies(cage):
    data = cage.response(200, b"x" * 100_000, Set_Cookie="session=of-a-user; Max-Age=99")
    users = list(map(str, range(300)))
    cage.api.answers = {f"GET activeUsers/{user_id}/data": [data] for user_id in users}
    client = process.DatavillageApi()
    tracemalloc.start()
    process.for_each_user(users, lambda user_id: len(client.user_data(user_id)))
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    client.store("ann", "")
    assert not any("Cookie" in headers for headers in cage.api.headers)


def test_the_larger_example_of_the_readme_works(cage):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    [example] = re.findall(r"(?ms)^```python\n(def process_event.*?)^```", readme)
    exec(example, names := dict(vars(process)))
    error = error_of(names["process_event"], {"userIds": ["ann", "eve"], "trigger": "full"})
    assert error == "1 of 2 users failed: 'eve': no data"
    user = "<https://example.org/ann> <https://example.org/"
    assert cage.stored["ann", "inferences"] == f"{user}aboveAverage> false .\n"
    assert cage.stored["ann", "explains"] == f"{user}average> 10.0 .\n"


# 10: temporary errors
OK = b"HTTP/1.1 200 -\r\nConnection: close\r\n"
INCOMPLETE = (
    b"",
    b"no HTTP\r\n\r\n",
    OK + b"Content-Length: 9\r\n\r\n# Ann",
    OK + b"Content-Length: 99999999999999999999\r\n\r\n# Ann",
    OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\n# Ann\r\n",
    OK + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n# Ann",
    OK + b"Content-Encoding: gzip\r\n\r\n# Ann",
)


def calls() -> dict:
    client = process.DatavillageApi()
    return {
        "GET activeUsers": client.active_users,
        ANN: lambda: client.user_data("ann"),
        PUT_ANN: lambda: client.store("ann", "# Zoë"),
    }


def test_temporary_errors_are_retried_five_times(cage):
    temporary = [cage.response(status) for status in (408, 429, 500, 503, *range(520, 531))]
    for line, call in calls().items():
        for error in (*temporary, *INCOMPLETE[: 2 if line == PUT_ANN else None]):
            cage.api.answers[line] = [error] * 5
            call()
            assert cage.api.answers[line] == []
            cage.api.answers[line] = [error] * 7
            assert re.fullmatch(r"\w+ http\S+( answered \d+|: \w+)", error_of(call))
            assert len(cage.api.answers.pop(line)) == 1
    assert cage.stored == {("ann", "inferences"): "# Zoë"}
    assert process.TIMEOUT_SECONDS == (5, 60)
    cage.patch.setattr(process, "TIMEOUT_SECONDS", (5, 0.1))
    cage.api.held.add(ANN)
    assert error_of(calls()[ANN]).endswith("/ann/data: ReadTimeout")


def test_retries_take_at_least_15_seconds_and_as_long_as_the_api_asks(cage):
    def seconds(*headers: dict[str, str]) -> float:
        cage.api.answers["GET activeUsers"] = [cage.response(503, **more) for more in headers]
        started = time.monotonic()
        process.DatavillageApi().active_users()
        return time.monotonic() - started

    assert (sum(cage.pauses_seconds), process.LONGEST_PAUSE_SECONDS) == (15, 60)
    cage.patch.setattr(process, "LONGEST_PAUSE_SECONDS", 0.3)
    cage.patch.setattr(process, "PAUSES_SECONDS", (0.2,) * 5)
    assert 1 <= seconds(*[{}] * 5) < 2.5
    cage.patch.setattr(process, "PAUSES_SECONDS", (0,) * 5)
    for value in ("1", "60", "9" * 5_000):
        assert 0.3 <= seconds({"Retry-After": value}) < 5, value
    cage.patch.setattr(process, "LONGEST_PAUSE_SECONDS", 60)
    for values in (("0", "", "-5", "1.5"), ("5s", "\xb2", "soon", "Fri, 31 Dec 2999 23:59:59 GMT")):
        assert seconds(*({"Retry-After": value} for value in values)) < 5
    assert 1 <= seconds({"Retry-After": "1"}, {}) < 1.9  # once


def test_a_large_result_is_stored_over_a_slow_network(cage):
    def read_slowly(handler) -> None:
        rest = int(handler.headers["Content-Length"])
        while rest:
            rest -= len(handler.rfile.read1(min(rest, 1_000_000)))
            time.sleep(0.03)
        handler.wfile.write(cage.response(200))

    cage.patch.setattr(process, "TIMEOUT_SECONDS", (0.3, 50))
    cage.patch.setattr(cage.api.RequestHandlerClass, "do_PUT", read_slowly)
    process.DatavillageApi().store("ann", "x" * 20_000_000)


# 11: what counts as data, and as stored
def test_a_200_that_is_no_web_page_is_data_and_any_2xx_means_stored(cage):
    statuses = (200, 201, 202, 203, 204, 206, 300, 301, 302, 303, 304, 307, 400, 401, 403, 404, 410)
    cases = [(status, {"Content-Type": "application/xhtml+xml"}) for status in statuses]
    cases += [(200, {"Content-Type": "TEXT/HTML; a=b", "Content-Encoding": "gzip"})]
    locations = ("/a", "http://[::1", "//\xff", "http://a:99999")
    cases += [(302, {"Location": location}) for location in locations]
    for line, call in calls().items():
        for status, headers in cases:
            cage.api.requests.clear()
            cage.api.answers = {line: [cage.response(status, b"# secret", **headers)]}
            if line == PUT_ANN and status < 300:
                call()
            else:
                reason = f"answered {status}{' with a web page' if status == 200 else ''}"
                assert re.fullmatch(rf"\w+ http\S+ {reason}", error_of(call))
            assert cage.api.requests == [line]
    cage.api.answers = {PUT_ANN: [cage.response(200, b"cut")[:-1]]}
    calls()[PUT_ANN]()
    assert cage.stored == {}
    for body in (b"", b'{"a": "secret"}', b'["secret", 1]', b"[" * 100_000, b'["\xff"]'):
        cage.api.answers = {"GET activeUsers": [cage.response(200, body)]}
        error = error_of(calls()["GET activeUsers"])
        assert error.endswith("/activeUsers answered no JSON array of strings")


def test_no_interim_response_gives_a_user_the_data_of_another(cage):
    users = cage.api.users = {f"user-{number}": f"# {number}" for number in range(60)}
    interim = b"HTTP/1.1 103 -\r\n\r\n-later-" + cage.response(200, b"# of another")
    for number in range(0, 60, 5):
        cage.api.answers[f"GET activeUsers/user-{number}/data"] = [interim]
    data = process.for_each_user(users, process.DatavillageApi().user_data, skip_failed=True)
    assert len(data) == 48
    assert data.items() <= users.items()
    assert cage.log.count("/data answered 103") == 12


# 12: IDs, text, and the environment
def test_any_id_is_one_path_segment(cage):
    client = process.DatavillageApi()
    users = ["https://a.example/card#me", "a/b", "a?b", "../c", "%2e", " ", "Zoë", "佐\n江", "..."]
    cage.api.users = {user_id: f"# {user_id!r}" for user_id in users}
    for user_id in client.active_users():
        client.store(user_id, client.user_data(user_id), "explains")
    assert cage.stored == {(user_id, "explains"): f"# {user_id!r}" for user_id in users}
    for user_id in ("", ".", ".."):
        for call, *more in ((client.user_data,), (client.store, "")):
            assert error_of(call, user_id, *more) == f"'{user_id}' cannot be part of a URL"
    cage.patch.setenv("DV_APP_ID", "app/1?")
    cage.patch.setenv("DV_CLIENT_ID", "client 1#")
    error = error_of(process.DatavillageApi().active_users)
    assert "/clients/client%201%23/applications/app%2F1%3F/activeUsers" in error


def test_turtle_is_utf_8_in_both_directions_without_a_byte_order_mark(cage):
    client = process.DatavillageApi()
    kind = "text/turtle; charset=ascii"
    marked = cage.response(200, "\ufeff# Zoë 佐".encode(), Content_Type=kind)
    zipped = cage.response(200, gzip.compress("# Zoë 佐".encode()), Content_Encoding="gzip")
    cage.api.answers[ANN] = [marked, zipped]
    for _ in range(2):
        client.store("ann", "\ufeff" + client.user_data("ann"))
        assert cage.stored.popitem() == (("ann", "inferences"), "# Zoë 佐")
    assert cage.api.headers[-1]["Content-Type"] == "text/turtle"
    client.store("ann", "")
    assert not any("Transfer-Encoding" in headers for headers in cage.api.headers)
    for result in (None, b"", 1, [""]):
        assert error_of(client.store, "ann", result).startswith("the result is ")


def test_proxy_and_ca_variables_are_honoured_and_netrc_is_not(cage, tmp_path):
    netrc = "machine {} login somebody password else\n"
    (tmp_path / ".netrc").write_text(netrc.format("api.example") + netrc.format("127.0.0.1"))
    cage.patch.setenv("HOME", str(tmp_path))
    cage.patch.setenv("http_proxy", f"http://127.0.0.1:{cage.api.server_port}")
    cage.patch.setenv("DV_URL", "http://api.example/")
    assert process.DatavillageApi().active_users() == ["ann", "ben"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cage.server.certificate)
    cage.api.socket = context.wrap_socket(cage.api.socket, server_side=True)
    cage.patch.setenv("DV_URL", f"https://127.0.0.1:{cage.api.server_port}")
    assert error_of(process.DatavillageApi().active_users).endswith("/activeUsers: SSLError")
    cage.patch.setenv("REQUESTS_CA_BUNDLE", str(cage.server.certificate))
    assert process.DatavillageApi().active_users() == ["ann", "ben"]
