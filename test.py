"""The cage at home: `pytest` tests this project in it, `python test.py` rehearses an algorithm.

Both give the code what the cage gives it: the documented variables, a Redis over TCP, an API over
HTTP. Your tests come first, then the template's; the cage and the rehearsal are at the bottom. The
Redis is fakeredis, embedded, so that nothing has to be installed; where there is a redis-server,
the tests use that.
"""

import argparse
import asyncio
import contextlib
import datetime
import functools
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fakeredis
import pytest
import redis
import requests
import yaml
from redis.backoff import ConstantBackoff
from redis.retry import Retry

import index
import process

# YOUR TESTS. Edit them along with `compute` and `process_event`, which no other test here uses.

# Each user's data by user ID: for these tests, and for `python test.py` without files.
USERS = {
    "alice": '<https://example.org/alice> <https://schema.org/name> "Alice" .\n',
    "bob": '<https://example.org/bob> <https://schema.org/knows> "Zoë", "佐江" .\n',
}


def test_compute_tells_the_length_in_a_valid_triple_whatever_the_id():
    for user_id in ("alice", "https://alice.example/card#me", 'a b<c>"d"\\e^`{|}\n', "Zoë", "100%"):
        iri = r'<[^\x00-\x20<>"{}|^`\\]+>'  # IRIREF of the Turtle grammar, without escapes
        assert re.fullmatch(f"{iri} {iri} 4 \\.\n", process.compute(user_id, "Zoë\n")), user_id


def test_process_event_stores_a_result_for_each_user_of_the_event(cage):
    cage.api.users = USERS
    everybody, one = list(USERS), list(USERS)[-1]
    for event, user_ids in (
        ({}, everybody),
        ({"userIds": None}, everybody),
        ({"userIds": [one, one]}, [one]),
        ({"userIds": []}, []),
    ):
        cage.api.stored = {}
        process.process_event(event)
        assert cage.api.stored == {
            (user_id, "inferences"): process.compute(user_id, USERS[user_id])
            for user_id in user_ids
        }
    with pytest.raises(process.ProcessingError, match="1 of 2 users failed"):
        process.process_event({"userIds": ["nobody", one]})
    assert cage.api.stored.keys() == {(one, "inferences")}


def test_process_event_in_the_whole_cage(cage):
    cage.api.users = USERS
    cage.edit("")  # nothing: the entry runs your process.py as it is
    cage.publish({"jobId": "job-1", "trigger": "test"})
    run = cage.start()
    assert run.end() == 0, run.log
    assert cage.api.stored.keys() == {(user_id, "inferences") for user_id in USERS}
    assert cage.pending() == {}


# THE TEMPLATE'S TESTS bring algorithms of their own. First: what an event is, and becomes.

NO_OBJECT = "msg_data is not a JSON object in UTF-8"
NO_USER_IDS = "userIds is not a list of non-empty strings other than '.' and '..'"


def test_an_event_is_parsed_whole_or_called_malformed_without_a_word_of_it():
    for payload in (
        "{}",
        '{"userIds": ["a", "https://b.example/c#me"], "jobId": "1", "trigger": "full"}',
        '{"userIds": null, "type": "FULL", "data": {"own": [1, "ë"]}, "more": true}',
        '{"userIds": []}',
    ):
        assert index.parse({b"msg_data": payload.encode("utf-8")}) == json.loads(payload)
    no_objects = [b'{"secret": ', b'{"secret": "\xff"}', '{"secret": 1}'.encode("utf-16"), b"null"]
    no_objects += [b'["secret"]', b'{"a":' * 100_000, b'{"a": %s}' % (b"7" * 5_000)]
    no_user_ids = [b'"secret"', b"{}", b"7", b"false", b"[1]", b'["secret", null]']
    no_user_ids += [b'[""]', b'["."]', b'[".."]']
    reasons = dict.fromkeys(no_objects, NO_OBJECT)
    reasons |= {b'{"userIds": %s}' % value: NO_USER_IDS for value in no_user_ids}
    for malformed, reason in reasons.items():
        with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
            index.parse({b"msg_data": malformed})


def test_one_run_takes_one_event_the_oldest_and_misses_none_from_before_the_first_start(cage):
    events, handled = [{"number": 1}, {"number": 2}], []
    for event in events:
        cage.publish(msg_data=json.dumps(event), other="field")
    for number in (1, 2):
        assert cage.handle(handled.append) == 0
        assert handled == events[:number]
        assert cage.pending() == {}
        index.create_group(cage.queue)  # as when another worker came first
    assert len(cage.queue.xinfo_consumers("events", "consummers")) == 1  # no run leaves a trace


def test_a_malformed_event_is_set_aside_at_once_among_about_a_thousand(cage, caplog, monkeypatch):
    assert index.DEAD_LETTER_LENGTH == 1_000
    monkeypatch.setattr(index, "DEAD_LETTER_LENGTH", 100)
    for _ in range(300):
        cage.queue.xadd("events:dead-letter", {"msg_data": "{}"})
    malformed = cage.publish(own="field")
    cage.publish()
    assert cage.handle(never) == 1
    error = f"malformed: {NO_OBJECT}"
    line = f"ERROR index message {malformed}: set aside in events:dead-letter: {error}\n"
    assert line in caplog.text
    letters = cage.dead_letters()
    assert 100 <= len(letters) <= 200  # Redis trims whole nodes, of 100 entries
    assert letters[-1] == {"own": "field", "error": error, "message_id": malformed}
    assert cage.pending() == {}
    assert cage.handle(ignore) == 0


def test_an_event_is_set_aside_when_three_deliveries_failed_or_killed_their_worker(cage, caplog):
    fails = cage.publish(msg_data='{"number": 1}')
    for delivery in (1, 2, 3):
        assert cage.pending() == ({fails: delivery - 1} if delivery > 1 else {})
        assert cage.dead_letters() == []
        assert cage.handle(raise_(process.ProcessingError("no age given\ud800"))) == 1
        assert f"INFO index message {fails}: delivery {delivery} of 3\n" in caplog.text
        cage.make_old(fails)
    assert f"ERROR index message {fails}: failed: no age given\ud800\n" in caplog.text
    kills = cage.publish(msg_data='{"number": 2}')
    cage.deliver_to_another(kills)
    cage.make_old(kills, deliveries=3)
    assert cage.handle(never) == 1
    error = "delivered 3 times, finished by no worker"
    assert cage.dead_letters() == [
        {"msg_data": '{"number": 1}', "error": "no age given\\ud800", "message_id": fails},
        {"msg_data": '{"number": 2}', "error": error, "message_id": kills},
    ]
    assert cage.pending() == {}


def test_a_dead_letter_that_redis_refuses_stays_in_the_queue(cage):
    cage.queue.set("events:dead-letter", "no stream")
    refused = cage.publish(msg_data='["secret"]')
    with pytest.raises(redis.ResponseError, match=r"^WRONGTYPE [^\[]*$"):
        cage.handle(never)
    assert cage.pending() == {refused: 1}


def test_an_event_fails_by_any_exception_and_anything_returned_and_no_text_is_told(cage, caplog):
    def recurse(event: dict) -> None:
        recurse(event)

    unspeakable = type("UnspeakableError", (Exception,), {"__str__": lambda self: 1 / 0})()
    coroutine = asyncio.sleep(0, "secret")  # what calling an `async def` gives
    for work, reason in (
        (raise_(unspeakable), r"UnspeakableError at test\.py:\d+ work"),
        (raise_(SystemExit("secret")), r"SystemExit at test\.py:\d+ work"),
        (recurse, r"RecursionError at (test\.py:\d+ recurse(, )?){5,30}"),
        (lambda event: coroutine, r"process_event returned coroutine: is it async\?"),
        (lambda event: (yield), r"process_event returned generator: is it async\?"),
    ):
        message_id = cage.publish()
        assert cage.handle(work) == 1
        line = f"ERROR index message {message_id}: failed: {reason}"
        assert re.search(f"^{line}$", caplog.text, re.MULTILINE)
        assert cage.pending()[message_id] == 1
    coroutine.close()


# At least once


def test_the_oldest_abandoned_event_comes_first_however_many_live_workers_hold(cage):
    held = [cage.publish({"number": number}) for number in range(300)]
    cage.deliver_to_another(*held)
    for message_id in held[-2:]:
        cage.make_old(message_id)
    cage.publish({"number": 300})
    handled = []
    for _ in range(3):
        assert cage.handle(handled.append) == 0
    assert [event["number"] for event in handled] == [298, 299, 300]
    assert cage.pending() == dict.fromkeys(held[:-2], 1)


def test_a_waiting_worker_finds_an_event_as_it_is_abandoned(real_cage, monkeypatch):
    monkeypatch.setattr(index, "WAIT_SECONDS", 0.05)
    message_id = real_cage.publish()
    real_cage.deliver_to_another(message_id)
    run = real_cage.handle_beside(ignore)
    time.sleep(0.2)
    assert not run.done()
    real_cage.make_old(message_id)
    assert run.result(PATIENCE_SECONDS) == 0


def test_a_claim_is_renewed_while_the_work_goes_on(cage, monkeypatch):
    assert (index.RENEW_SECONDS, index.CLAIM_SECONDS, index.WAIT_SECONDS) == (20, 60, 5)
    monkeypatch.setattr(index, "CLAIM_SECONDS", 0.5)
    monkeypatch.setattr(index, "RENEW_SECONDS", 0.1)
    slow, finish = cage.publish(), threading.Event()
    run = cage.handle_beside(lambda event: finish.wait(PATIENCE_SECONDS) and None)
    until(cage.pending)
    time.sleep(0.8)  # longer than a claim without renewal
    cage.publish({"number": 2})
    handled = []
    assert cage.handle(handled.append) == 0
    assert handled[0]["number"] == 2
    assert cage.pending() == {slow: 1}  # a renewal is no delivery
    finish.set()
    assert run.result(PATIENCE_SECONDS) == 0
    assert cage.pending() == {}


def test_a_claim_that_cannot_be_renewed_is_a_warning_and_the_work_goes_on(
    cage, caplog, monkeypatch
):
    monkeypatch.setattr(index, "RENEW_SECONDS", 0.05)

    def lose_the_queue(event: dict) -> None:
        cage.queue.flushall()
        until(lambda: "claim not renewed: NOGROUP" in caplog.text)

    cage.publish()
    assert cage.handle(lose_the_queue) == 0


def test_an_entry_trimmed_while_it_was_pending_is_skipped_with_a_warning(cage, caplog):
    trimmed = cage.publish()
    cage.deliver_to_another(trimmed)
    cage.make_old(trimmed)
    cage.queue.xdel("events", trimmed)
    cage.publish({"number": 2})
    handled = []
    assert cage.handle(handled.append) == 0
    assert handled[0]["number"] == 2
    assert f"WARNING index message {trimmed}: trimmed from the queue, skipped\n" in caplog.text
    assert cage.pending() == {}


@pytest.mark.parametrize("error", [process.ProcessingError("no age given"), KeyboardInterrupt()])
def test_an_event_trimmed_while_it_was_worked_on_is_set_aside_if_it_fails_or_is_stopped(
    cage, monkeypatch, error
):
    monkeypatch.setattr(index, "RENEW_SECONDS", 0.05)

    def fail(event: dict) -> None:
        cage.queue.xtrim("events", 0)
        time.sleep(0.2)  # for a renewal, which on Redis 7 removes the pending entry
        raise error

    message_id = cage.publish(msg_data="{}")
    with contextlib.suppress(KeyboardInterrupt):
        assert cage.handle(fail) == 1
    reason = f"{str(error) or 'stopped'}; meanwhile it was trimmed from the queue"
    letter = {"msg_data": "{}", "error": reason, "message_id": message_id}
    assert cage.dead_letters() == [letter]
    assert cage.pending() == {}


# Many users at once


def test_a_user_whose_work_raised_is_named_with_the_reason_and_stops_no_other(caplog):
    caplog.set_level("INFO")
    no_age = raise_(process.ProcessingError("no age given"))
    works = {"alice": len, "b\nad": int, "exit": sys.exit, "no age": no_age, "bob": len}
    called = []

    def work(user_id: str) -> int:
        called.append(user_id)
        return works[user_id](user_id)

    assert process.for_each_user(iter([*works, *works]), work) == {"alice": 5, "bob": 3}
    assert sorted(called) == sorted(works)
    for line in (
        r"ERROR process user 'b\\nad': ValueError at test\.py:\d+ work",
        r"ERROR process user 'exit': SystemExit at test\.py:\d+ work",
        r"ERROR process user 'no age': no age given",
        r"INFO process 5 of 5 users, 3 failed",
    ):
        assert re.search(f"^{line}$", caplog.text, re.MULTILINE), line


def test_sixteen_users_are_worked_on_side_by_side_on_connections_that_are_kept(api, client):
    together = threading.Barrier(16, timeout=PATIENCE_SECONDS)

    def work(number: str) -> int:
        together.wait()  # all 16 are under way, and no connection is in use
        client.user_data("ann")
        return threading.get_ident()

    threads = process.for_each_user(map(str, range(48)), work)
    assert len(threads) == 48
    assert len(set(threads.values())) == 16
    assert len(api.clients) <= 16


def test_a_long_job_tells_its_progress(caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(process, "PROGRESS_SECONDS", 0.1)

    def work(user_id: str) -> None:
        if user_id == "1099":
            until(lambda: "1,099 of 1,100 users, 0 failed" in caplog.text)

    assert len(process.for_each_user(map(str, range(1100)), work)) == 1100
    assert caplog.text.count(" users, ") < 100


def test_a_child_of_the_algorithm_can_be_ended():
    def work(user_id: str) -> int:
        with subprocess.Popen(["sleep", "9"]) as child:
            child.terminate()
            return child.wait()

    assert process.for_each_user(["alice"], work) == {"alice": -signal.SIGTERM}


# What the API may do


def test_any_id_is_one_path_segment(api, client):
    user_ids = ["https://alice.example/card#me", "a/b", "a?b", "../c", "%2e", " ", "Zoë", "佐\n江"]
    api.users = {user_id: f"# {user_id!r}" for user_id in user_ids}
    assert client.active_users() == user_ids
    assert {user_id: client.user_data(user_id) for user_id in user_ids} == api.users
    for user_id in (".", "..", ""):
        with pytest.raises(process.ProcessingError, match=f"'{user_id}' cannot be part of a URL"):
            client.user_data(user_id)


def test_results_and_explanations_are_stored_as_turtle(api, client):
    client.store("ben", "# Zoë")
    client.store("ben", "# why", "explains")
    assert api.stored == {("ben", "inferences"): "# Zoë", ("ben", "explains"): "# why"}
    with pytest.raises(process.ProcessingError, match="the result is NoneType, not str: no ret"):
        client.store("ben", None)


def test_no_interim_answer_gives_a_user_the_data_of_another(api, client, caplog):
    api.users = {f"user-{number}": f"# {number}" for number in range(60)}
    api.hinted = {f"GET activeUsers/user-{number}/data" for number in range(0, 60, 5)}
    data = process.for_each_user(api.users, client.user_data)
    assert len(data) == 48
    assert data.items() <= api.users.items()
    assert caplog.text.count("/data answered 103\n") == 12


def test_passing_faults_are_ridden_out(api, client):
    cut = b""
    api.faults = {
        "GET activeUsers": [fault(500), cut],
        "GET activeUsers/ann/data": [fault(502), fault(503), cut],
        "PUT activeUsers/ann/inferences": [cut, fault(504), fault(429)],
    }
    assert client.active_users() == ["ann", "ben"]
    client.store("ann", client.user_data("ann"))
    assert api.stored == {("ann", "inferences"): PEOPLE["ann"]}
    assert not any(api.faults.values())


def test_a_wrong_answer_is_an_error_in_words_that_do_not_quote_it(api, client):
    tries = 1 + process.RETRIES
    assert BACKOFF_SECONDS * (2**process.RETRIES - 2) >= 15  # the pauses between them
    ok = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
    no_list = "answered no JSON array of strings"
    for answers, error in (
        ([ok + b"Content-Length: 9\r\n\r\nsecret"], r"\w+Error"),
        ([ok + b"Transfer-Encoding: chunked\r\n\r\nsecret"], r"\w+Error"),
        ([ok + b"Content-Encoding: gzip\r\nContent-Length: 6\r\n\r\nsecret"], r"\w+Error"),
        ([b"secret\r\n\r\n"] * tries, r"\w+Error"),
        ([fault(503)] * tries, "answered 503"),
        ([fault(401)], "answered 401"),
        ([fault(200, b'{"users": []}')], no_list),
        ([fault(200, b"[1]")], no_list),
        ([fault(200, b"[" * 100_000)], no_list),
        ([fault(200, b'["\xff"]')], no_list),
    ):
        api.faults = {"GET activeUsers": answers}
        url = f"{api.url}/clients/client-1/applications/app-1/activeUsers"
        with pytest.raises(process.ProcessingError, match=f"^GET {url}:? {error}$"):
            client.active_users()
        assert answers == []


def test_a_redirect_is_an_error_and_is_not_followed(api, client):
    location = f"{api.url}/clients/client-1/applications/app-1/activeUsers"
    for status in (301, 302, 303, 307, 308):
        api.faults = {"PUT activeUsers/ann/inferences": [fault(status, location=location)]}
        with pytest.raises(process.ProcessingError, match=f"/ann/inferences answered {status}"):
            client.store("ann", "")


def test_the_api_may_ask_for_a_pause_but_for_no_more_than_a_minute(cage, monkeypatch):
    assert process.RETRY_AFTER_SECONDS == 60
    monkeypatch.setattr(process, "RETRY_AFTER_SECONDS", 0.3)
    cage.api.faults = {"GET activeUsers": [fault(429, retry_after="86400")]}
    started = time.monotonic()
    process.DatavillageApi().active_users()
    assert time.monotonic() - started >= 0.3


def test_an_api_that_does_not_answer_or_is_away_is_named_with_the_reason(cage, monkeypatch):
    monkeypatch.setattr(process, "RETRIES", 0)
    monkeypatch.setattr(process, "TIMEOUT_SECONDS", (5, 0.2))
    cage.api.held = {"GET activeUsers"}
    with pytest.raises(process.ProcessingError, match=r"Read timed out\. \(read timeout=0\.2\)$"):
        process.DatavillageApi().active_users()
    monkeypatch.setenv("DV_URL", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(process.ProcessingError, match=r"^GET http://127.0.0.1:9/.* refused$"):
        process.DatavillageApi().active_users()


def test_proxies_are_those_of_the_environment_and_no_netrc_replaces_the_token(
    cage, monkeypatch, tmp_path
):
    (tmp_path / ".netrc").write_text("machine api.example login somebody password else\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("http_proxy", cage.api.url)
    # To a proxy the whole URL is sent, and no client tidies it up: the slash may be there.
    monkeypatch.setenv("DV_URL", "http://api.example/")
    assert process.DatavillageApi().user_data("ann") == PEOPLE["ann"]


def test_the_api_is_verified_with_the_ca_bundle_of_the_environment(real_cage, monkeypatch):
    api, certificate = real_cage.api, real_cage.server.certificate
    monkeypatch.setattr(process, "RETRIES", 0)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    api.socket = context.wrap_socket(api.socket, server_side=True)
    monkeypatch.setenv("DV_URL", f"https://127.0.0.1:{api.server_port}")
    with pytest.raises(process.ProcessingError, match="certificate verify failed"):
        process.DatavillageApi().active_users()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    assert process.DatavillageApi().active_users() == ["ann", "ben"]


# The process: what it needs, what it logs, how it ends


def test_what_is_missing_or_unusable_is_named_in_one_line_and_nothing_is_taken(cage, monkeypatch):
    unusable = {
        "DV_URL": ["", "api.datavillage.me", "https://user:secret@api.datavillage.me"],
        "DV_TOKEN": ["", "secret\n", "sec ret"],
        "DV_APP_ID": ["", "."],
        "DV_CLIENT_ID": ["", ".."],
        "REDIS_SERVICE_HOST": [""],
        "REDIS_SERVICE_PORT": ["", "tcp://10.0.0.1:6379", "70000"],
        "LOGLEVEL": ["LOUD"],
        "TLS_CAFILE": ["/nowhere/ca.crt", __file__],
    }
    assert index.unusable_variables() == []
    for name, values in unusable.items():
        for value in values:
            with monkeypatch.context() as patch:
                patch.setenv(name, value)
                assert index.unusable_variables() == [name]
    cage.publish()
    run = cage.start(**{name: values[-1].rstrip() for name, values in unusable.items()})
    assert run.end() == 2
    [line] = run.lines
    assert line.endswith(f" ERROR not started: missing or unusable: {', '.join(unusable)}")
    assert cage.queue.xinfo_groups("events") == []


def test_an_error_in_process_py_is_pythons_own_and_costs_no_event(cage):
    cage.edit("import nowhere")
    cage.publish()
    run = cage.start()
    assert run.end() == 1
    assert "ModuleNotFoundError: No module named 'nowhere'\n" in run.log
    assert cage.queue.xinfo_groups("events") == []


TALKATIVE = """
import asyncio, gc, logging, threading, warnings

async def fail_later(data):
    asyncio.get_running_loop().create_future().set_exception(ValueError(data))

def process_event(event):
    data = DatavillageApi().user_data("ann")
    logging.getLogger("library").warning(data)
    logging.warning(data)
    silent = logging.getLogger("silent")
    silent.propagate = False
    silent.error(data)
    warnings.warn(data)
    asyncio.run(fail_later(data))
    type("Unraisable", (), {"__del__": lambda self: int(data)})()
    thread = threading.Thread(target=int, args=[data])
    thread.start()
    thread.join()
    gc.collect()
    logging.getLogger("process.ages").debug("of my own: %r", "ë\\n")
    print("printed ë")
    int(data)
"""


def test_libraries_and_exceptions_do_not_speak_at_any_level_and_the_authors_code_does(cage):
    cage.api.users = {"ann": "secret"}
    cage.edit(TALKATIVE)
    cage.publish()
    run = cage.start(LOGLEVEL="DEBUG", PYTHONIOENCODING="ascii")
    assert run.end() == 1
    assert "secret" not in run.log
    assert TOKEN not in run.log
    assert "\nprinted \\xeb\n" in run.log
    for line, pattern in zip(
        run.lines,
        (
            "INFO waiting .*",
            r"INFO message [\d-]+: delivery 1 of 3",
            r"ERROR left unraised: ValueError at process\.py:\d+ <lambda>",
            r"ERROR left unraised: ValueError at [\w.:, ]+ run",
            r"DEBUG of my own: '\\xeb\\n'",
            r"ERROR message [\d-]+: failed: ValueError at process\.py:\d+ process_event",
        ),
        strict=True,
    ):
        assert re.fullmatch(rf"[\d-]{{10}} [\d:]{{8}},\d{{3}} {pattern}", line)


def test_a_log_that_breaks_stops_no_work_and_reports_no_data(cage):
    cage.api.users = {"ann": "secret"}
    cage.edit(TALKATIVE)
    message_id = cage.publish()
    run = cage.start("bash", "-c", "python index.py 2>&1 > >(:)")  # `:` ends without reading
    run.end()
    assert cage.pending() == {message_id: 1}
    assert "secret" not in run.log


def test_a_run_killed_in_the_middle_is_finished_by_the_next(cage):
    cage.api.held = {"GET activeUsers/ben/data"}
    message_id = cage.publish()
    run = cage.start()
    until(lambda: cage.api.stored and cage.api.held <= set(cage.api.requests))
    run.kill()
    assert run.end() == -signal.SIGKILL
    assert cage.pending() == {message_id: 1}
    assert cage.api.stored.keys() == {("ann", "inferences")}
    cage.api.gate.set()
    cage.make_old(message_id)
    run = cage.start(LOGLEVEL="WARNING")
    assert run.end() == 0
    assert run.lines == []
    assert cage.api.stored.keys() == {("ann", "inferences"), ("ben", "inferences")}
    assert cage.pending() == {}


def test_a_run_waits_without_end_or_cost(real_cage, caplog, monkeypatch):
    with index.connect() as queue:  # by itself redis-py waits 5 s for an answer
        assert queue.get_connection_kwargs()["socket_timeout"] > index.WAIT_SECONDS
    monkeypatch.setattr(index, "WAIT_SECONDS", 0.4)
    run = real_cage.handle_beside(ignore)
    until(real_cage.is_waited_on)
    processor_seconds = time.process_time()
    time.sleep(1.5)
    assert time.process_time() - processor_seconds < 0.2
    real_cage.publish()
    assert run.result(PATIENCE_SECONDS) == 0
    assert "WARNING" not in caplog.text


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_waiting_run_at_once_and_quietly(real_cage, signal_number):
    run = real_cage.start()
    until(real_cage.is_waited_on)
    run.send_signal(signal_number)
    assert run.wait(3) == 143  # it waits in steps of 5 s
    assert len(run.lines) == 1


def test_sigterm_lets_users_under_way_finish_and_hands_the_event_to_the_next(cage):
    cage.api.users = {f"user-{number}": "" for number in range(40)}
    cage.api.held = {f"GET activeUsers/user-{number}/data" for number in range(16)}
    message_id = cage.publish()
    run = cage.start()
    until(lambda: cage.api.held <= set(cage.api.requests))
    run.send_signal(signal.SIGTERM)
    time.sleep(1.2)  # it may take a second until the main thread sees it
    cage.api.gate.set()
    assert run.end() == 143
    assert f" WARNING message {message_id}: stopped\n" in run.log
    assert "Traceback" not in run.log
    assert len(cage.api.stored) == 16
    assert len(cage.api.requests) == 1 + 16 + 16
    assert cage.pending() == {message_id: 0}
    assert cage.start().end() == 0
    assert len(cage.api.stored) == 40


# When Redis goes away


@pytest.mark.parametrize(
    "state", ["starting", "waiting", "waiting, without its data", "working", "acknowledging"]
)
def test_a_restart_of_redis_is_ridden_out_with_one_warning_that_names_the_reason(
    real_cage, caplog, monkeypatch, state
):
    cage, finish, waiting = real_cage, threading.Event(), state.startswith("waiting")
    if state == "working":
        monkeypatch.setattr(index, "RENEW_SECONDS", 0.05)
    if not waiting:
        cage.publish()
    if state == "starting":
        cage.server.kill()
    run = cage.handle_beside(lambda event: finish.wait(PATIENCE_SECONDS) and None)
    if state != "starting":
        until(cage.is_waited_on if waiting else cage.pending)
        cage.server.kill()
    if state == "acknowledging":
        finish.set()
    address = index.redis_address()
    warning = rf"Redis at {address} is away: Error \d+ connecting to {address}. Connection refused."
    until(lambda: re.search(warning, caplog.text))
    if state == "waiting, without its data":
        shutil.rmtree(cage.server.data)
    cage.server.start()
    if waiting:
        cage.publish()
    finish.set()
    assert run.result(PATIENCE_SECONDS) == 0
    assert caplog.text.count("WARNING") == 1
    assert cage.pending() == {}


def test_redis_emptied_while_a_run_waits_costs_no_later_event_which_is_taken_as_it_comes(real_cage):
    run = real_cage.handle_beside(ignore)
    until(real_cage.is_waited_on)
    real_cage.queue.flushall()
    until(lambda: real_cage.queue.exists("events"))
    real_cage.publish()
    assert run.result(3) == 0  # it waits in steps of 5 s


def test_redis_that_refuses_or_stays_away_ends_the_run_in_words(real_cage, caplog, monkeypatch):
    retry = index.connect().get_retry()
    assert 60 < sum(retry._backoff.compute(failures + 1) for failures in range(index.RETRIES)) < 90
    for name, value in FEW_TRIES.items():
        monkeypatch.setattr(index, name, value)

    def log_of_a_run() -> str:
        caplog.clear()
        assert index.main() == 2
        return caplog.text

    real_cage.queue.set("events", "no stream")
    assert re.search(r"ERROR index Redis at \S+: \w*ResponseError: WRONGTYPE ", log_of_a_run())
    real_cage.queue.config_set("requirepass", "another")
    assert re.search(r"WARNING index Redis at \S+ is away: .*authenticate", log_of_a_run())
    real_cage.server.kill()
    log = log_of_a_run()
    assert re.search(r"ERROR index Redis at \S+: ConnectionError: Error \d+ connecting to ", log)
    assert log.count("WARNING index Redis at ") == 1


@pytest.mark.parametrize("tls", [False, True])
def test_redis_that_hangs_is_ridden_out(real_cage, caplog, monkeypatch, tls):
    monkeypatch.setattr(index, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(index, "SOCKET_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(index, "CLAIM_SECONDS", 1)  # for an event whose delivery came too late
    for name, value in real_cage.server.tls.items() if tls else ():
        monkeypatch.setenv(name, value)
    run = real_cage.handle_beside(ignore)
    until(real_cage.is_waited_on)
    real_cage.server.process.send_signal(signal.SIGSTOP)
    until(lambda: "is away: Timeout" in caplog.text)
    real_cage.server.process.send_signal(signal.SIGCONT)
    real_cage.publish()
    assert run.result(PATIENCE_SECONDS) == 0


def test_tls_is_verified_and_what_is_wrong_with_it_is_named(real_cage, caplog, monkeypatch):
    tls = real_cage.server.tls
    real_cage.publish()
    for variables, reason in (
        (tls | {"TLS_CAFILE": requests.certs.where()}, "certificate verify failed"),
        (tls | {"REDIS_SERVICE_HOST": "localhost"}, "mismatch"),
        (tls | {"TLS_CAFILE": ""}, "Connection"),
        ({"TLS_CAFILE": tls["TLS_CAFILE"]}, "Timeout connecting"),
    ):
        with monkeypatch.context() as patch:
            for name, value in (FEW_TRIES | {"SOCKET_TIMEOUT_SECONDS": 0.2}).items():
                patch.setattr(index, name, value)
            for name, value in variables.items():
                patch.setenv(name, value)
            caplog.clear()
            with pytest.raises(redis.RedisError):
                real_cage.handle(never)
        assert re.search(f"WARNING index Redis at .* is away: .*{reason}", caplog.text)
    for name, value in tls.items():
        monkeypatch.setenv(name, value)
    assert real_cage.handle(ignore) == 0


# What is deployed, and what the README shows


def test_the_config_is_what_the_cage_expects():
    config = yaml.safe_load((ROOT / "datavillage.yaml").read_text(encoding="utf-8"))
    assert config.keys() == {"env", "script", "entry"}
    assert "pip install -r requirements.txt" in config["script"]
    assert "python index.py" in config["entry"]


def readme(start: str, language: str) -> list[str]:
    """Return the blocks of code in the part of the README that starts so."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(start)[2]
    return re.findall(rf"^```{language}\n(.*?)```", text, re.MULTILINE | re.DOTALL)


def test_the_readmes_algorithm_over_all_users_works(cage):
    cage.edit(readme("## Write more than compute", "python")[0])
    cage.publish({"userIds": ["ann", "nobody"], "trigger": "full"})
    run = cage.start()
    assert run.end() == 1
    assert "user 'nobody': no data\n" in run.log
    assert "failed: 1 of 2 users failed" in run.log
    average = sum(map(len, PEOPLE.values())) / 2
    user, iri = "<https://example.org/ann>", "https://example.org"
    assert cage.api.stored == {
        ("ann", "inferences"): f"{user} <{iri}/aboveAverage> false .\n",
        ("ann", "explains"): f"{user} <{iri}/average> {average} .\n",
    }


def test_the_readmes_commands_for_the_queue_work(cage):
    look, publish, publish_again = readme("### A look at the queue", "bash")

    def output_of(command: str) -> str:
        return call(cage.folder, "bash", "-c", command, check=True).stdout

    malformed = cage.publish(msg_data="null", own="field")
    assert cage.handle(never) == 1
    cage.publish()
    assert cage.handle(raise_(ValueError())) == 1
    *_, waiting, in_work, set_aside, letter = output_of(publish + look).splitlines()
    assert (waiting, in_work, set_aside) == ("1", "1", "1")
    assert malformed in letter
    output_of(publish_again)
    assert cage.dead_letters() == []
    assert cage.queue.xrevrange("events", count=1)[0][1] == {"msg_data": "null", "own": "field"}


def test_the_readmes_loop_runs_until_a_run_is_stopped(cage):
    cage.edit("""
import os, signal

def process_event(event):
    if event["stop"]:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)
""")
    for payload in ('{"stop": false}', "null", '{"stop": true}'):
        cage.publish(msg_data=payload)
    run = cage.start("bash", "-c", readme("## Deploy it", "bash")[0])
    assert run.end() == 0
    ends = re.findall("processed in|set aside in|stopped", run.log)
    assert ends == ["processed in", "set aside in", "stopped"]


# What the rehearsal shows


def test_the_rehearsal_takes_files_and_prints_what_was_stored(cage, tmp_path):
    files = {tmp_path / "zoë.ttl": '# "Zoë"\r\n# 佐江\n', tmp_path / "bob.card.ttl": "# ☃"}
    for file, text in files.items():
        file.write_bytes(text.encode("utf-8"))
    done = call(cage.folder, "python", "test.py", *files)
    log, _, results = done.stdout.rpartition("\n\n")
    assert re.search(r"^[\d-]{10} [\d:,]{12} INFO message .* processed in", log, re.MULTILINE)
    assert re.fullmatch(
        'zoë: inferences\n    # "Zoë"\n    # 佐江\nbob.card: inferences\n    # ☃\n'
        "users: 2, stored: 2, not stored: 0, stored though not named: 0, "
        r"seconds: \d+\.\d, exit status: 0\n",
        results,
    )


UNQUIET = """
import logging, os, time, warnings

def work(user_id):
    print(f"{user_id} begins")
    breakpoint()
    warnings.warn(f"a library on {user_id}")
    logging.getLogger("library").warning("a library on %s", user_id)
    print(f"{user_id} ends {os.environ['AN_API_KEY']}")
    return int(user_id)

def fail(user_id):
    raise type("BadSyntax", (SyntaxError,), {"__str__": lambda self: "bad at line 7"})()

def process_event(event):
    for_each_user(["ann", "ben"], work)
    for_each_user(["ann"], fail)
    DatavillageApi().store("ann", "# of ann")
    DatavillageApi().store("ben", "# of ben", "explains")
    raise ValueError("the event's")
"""


def test_the_rehearsal_shows_what_the_cage_hides_one_user_after_the_other(
    cage, monkeypatch, tmp_path
):
    cage.edit(UNQUIET)
    monkeypatch.setenv("AN_API_KEY", "kept")
    files = [tmp_path / "ann.ttl", tmp_path / "ben.ttl"]
    for file in files:
        file.touch()
    command = ["python", "test.py", *files, "--event", '{"userIds": ["eve", "ann"]}']
    done = call(cage.folder, *command, input="p 'debugged', user_id\nc\n" * 2)
    assert done.returncode == 1
    log, _, results = done.stdout.rpartition("\n\n")
    ann = ["ann begins", "(Pdb) ('debugged', 'ann')", "ann ends kept"]
    prints = [line for line in log.splitlines() if re.search("begins$|debugged|kept$", line)]
    assert prints == [*ann, *(line.replace("ann", "ben") for line in ann)]
    assert "UserWarning: a library on ann\n" in log
    assert " WARNING a library on ann\n" in log
    assert "\nValueError: invalid literal for int() with base 10: 'ann'\n" in log
    assert "\nbad at line 7\n" in log
    assert log.endswith("\nValueError: the event's")
    assert re.fullmatch(
        "eve: nothing stored; no file holds this user\n"
        "ann: inferences\n    # of ann\n"
        "ben: explains; the event does not name this user\n    # of ben\n"
        "users: 2, stored: 1, not stored: 1, stored though not named: 1, "
        r"seconds: \d+\.\d, exit status: 1\n",
        results,
    )


def test_the_rehearsal_refuses_what_it_cannot_use_with_one_line(capsys, tmp_path):
    (tmp_path / "latin.ttl").write_bytes(b"Zo\xeb")
    (tmp_path / "alice.ttl").touch()
    for arguments, reason in (
        (["nowhere.ttl"], "nowhere.ttl: [Errno 2] No such file"),
        ([tmp_path], "Is a directory"),
        ([tmp_path / "latin.ttl"], "latin.ttl: 'utf-8' codec can't decode byte"),
        ([tmp_path / "alice.ttl", tmp_path / "alice.ttl"], "another file for the user 'alice'"),
        (["--event", "{a"], "--event: Expecting property name enclosed in double quotes: line 1"),
        (["--event", "[]"], "--event: not a JSON object"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([str(argument) for argument in arguments])
        [line] = capsys.readouterr().err.splitlines()
        assert reason in line


def test_ctrl_c_ends_the_rehearsal_at_once_and_leaves_no_process(cage):
    sleep = "lambda _: print(os.getpid()) or time.sleep(99)"
    cage.edit(f"def process_event(event):\n    for_each_user(['ann'], {sleep})")
    run = cage.start("python", "test.py")
    until(lambda: re.search(r"^\d+$", run.log, re.MULTILINE))
    run.send_signal(signal.SIGINT)
    assert run.wait(10) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(re.search(r"^\d+$", run.log, re.MULTILINE)[0]), 0)


# THE CAGE: an API, a Redis, and the processes started with them

ROOT = Path(__file__).resolve().parent
TOKEN = "a-token-that-no-log-may-hold"
BACKOFF_SECONDS = process.BACKOFF_SECONDS  # as it is outside of the tests
FEW_TRIES = {"RETRIES": 3, "BACKOFF_SECONDS": 0.01}  # for index.py
PATIENCE_SECONDS = 60  # until a test gives up waiting: far more than anything here takes
# Another redis-server can be named, or none: REDIS_SERVER= pytest
REDIS_SERVER = shutil.which(os.environ.get("REDIS_SERVER", "redis-server"))
# What the template's tests have in place of USERS and of process.py's own algorithm.
PEOPLE = {"ann": "# Ann\n", "ben": '# "Zoë", "佐江"\n'}
ALGORITHM = """
def process_event(event):
    api = DatavillageApi()
    for_each_user(api.active_users(), lambda user_id: api.store(user_id, api.user_data(user_id)))
"""


class StandInApi(ThreadingHTTPServer):
    """The part of the Datavillage API that a process uses, on a free port of this machine.

    Takes each user's data by user ID; collects what is stored by user ID and kind.
    """

    daemon_threads = True
    request_queue_size = 128  # connections that wait: with 5, as usual, of 16 some stall for 1 s

    def __init__(self, users: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), StandInApiHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.users = users
        self.stored: dict[tuple[str, str], str] = {}
        # What the tests look at: "GET activeUsers/ann/data" and the like, in order.
        self.requests: list[str] = []
        self.clients: set[tuple[str, int]] = set()
        # What they make go wrong, by such a request: bytes sent instead of an answer, in order;
        # those with an interim answer before the real one; those whose answer waits for the gate.
        self.faults: dict[str, list[bytes]] = {}
        self.hinted: set[str] = set()
        self.held: set[str] = set()
        self.gate = threading.Event()

    def handle_error(self, *arguments: object) -> None:
        """Print nothing: of clients that are gone, or trust nobody, the tests know."""


class StandInApiHandler(BaseHTTPRequestHandler):
    """Answers one connection to the stand-in API."""

    server: StandInApi
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer any request; PUT comes here as well."""
        api = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        # A path that came through a proxy holds the whole URL.
        path = [unquote(segment) for segment in urlsplit(self.path).path.split("/")[1:]]
        request = f"{self.command} {'/'.join(path[4:])}"
        api.clients.add(self.client_address)
        api.requests.append(request)
        if request in api.held:
            api.gate.wait(PATIENCE_SECONDS)
        if request in api.hinted:
            self.wfile.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
            time.sleep(0.05)  # for the connection to be used again meanwhile, by mistake
        if api.faults.get(request):
            self.wfile.write(api.faults[request].pop(0))
            self.close_connection = True
        else:
            self.wfile.write(self.answer_to(path, body))

    do_PUT = do_GET

    def answer_to(self, path: list[str], body: bytes) -> bytes:
        """Do what the API does; return its answer."""
        users = self.server.users
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return answer(401)
        if path[:5] != ["clients", "client-1", "applications", "app-1", "activeUsers"]:
            return answer(404)
        if path[5:] == []:
            return answer(200, json.dumps(list(users)).encode("utf-8"))
        user_id, kind = path[5:]
        if user_id not in users:
            return answer(404)
        if (self.command, kind) == ("GET", "data"):
            return answer(200, users[user_id].encode("utf-8"), content_type="text/turtle")
        if kind == "data" or self.headers["Content-Type"] != "text/turtle":
            return answer(400)
        self.server.stored[user_id, kind] = body.decode("utf-8")
        return answer(200)

    def log_message(self, *arguments: object) -> None:
        """Print nothing: the log belongs to the process."""


def answer(status: int, body: bytes = b"", **headers: str) -> bytes:
    """Return an HTTP answer as it is sent."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} -\r\nContent-Length: {len(body)}\r\n{lines}\r\n".encode() + body


fault = functools.partial(answer, connection="close")


@contextlib.contextmanager
def serving(server: socketserver.TCPServer) -> Iterator[Any]:
    """Let a server serve until the block ends."""
    with server:
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


class RealRedis:
    """A redis-server that keeps its data in a folder, on two free ports, one of them for TLS."""

    def __init__(self, folder: Path) -> None:
        local = ("127.0.0.1", 0)
        with socket.create_server(local) as free, socket.create_server(local) as other:
            self.server_address, self.tls_port = free.getsockname(), other.getsockname()[1]
        self.data = folder / "data"
        # Signed by itself, with its key in the same file.
        self.certificate = file = folder / "redis.pem"
        command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext"
        words = [*command.split(), "subjectAltName=IP:127.0.0.1", "-keyout", file, "-out", file]
        call(folder, *words, check=True)
        # What is to be set for TLS.
        self.tls = {"REDIS_SERVICE_PORT": str(self.tls_port), "TLS_CAFILE": str(self.certificate)}

    def start(self) -> None:
        """Start it, anew if it was ended, and wait until it listens."""
        self.data.mkdir(exist_ok=True)
        # Without fsync always, what came last would be lost by a kill.
        options = f"--port {self.server_address[1]} --tls-port {self.tls_port}"
        options += " --tls-auth-clients no --appendonly yes --appendfsync always"
        command = [REDIS_SERVER, *options.split(), "--save", "", "--dir", self.data]
        for file in ("cert", "key", "ca-cert"):
            command += [f"--tls-{file}-file", self.certificate]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        patience = Retry(ConstantBackoff(0.02), PATIENCE_SECONDS * 50)
        with redis.Redis(*self.server_address, retry=patience) as client:
            client.ping()

    def kill(self) -> None:
        """End it at once, as a machine that fails does."""
        self.process.kill()
        self.process.wait()


class Run(subprocess.Popen):
    """A process in the cage, whose output goes to a file."""

    def __init__(self, command: Sequence[str], log_file: Path, **options: Any) -> None:
        self.log_file = log_file
        with open(log_file, "wb") as log:
            super().__init__(command, stdout=log, stderr=subprocess.STDOUT, **options)

    @property
    def log(self) -> str:
        """What the process has written so far."""
        return self.log_file.read_text(encoding="utf-8")

    @property
    def lines(self) -> list[str]:
        """The lines of the log, without what the author's own code printed."""
        return re.findall(r"^[\d-]{10} [\d:,]{12} [A-Z]+ .*", self.log, re.MULTILINE)

    def end(self) -> int:
        """Wait for the end; return the exit status."""
        return self.wait(PATIENCE_SECONDS)


class Cage:
    """What a process finds in the cage: the queue, the API, and the variables that name them."""

    def __init__(self, api: StandInApi, server: Any, folder: Path) -> None:
        self.api = api
        self.server = server
        self.folder = folder
        host, port = server.server_address
        self.queue = redis.Redis(host, port, decode_responses=True)
        self.runs: list[Run] = []
        self.threads = ThreadPoolExecutor()
        self.handling: list[Future[int]] = []
        self.variables = {
            "DV_URL": api.url,
            "DV_TOKEN": TOKEN,
            "DV_APP_ID": "app-1",
            "DV_CLIENT_ID": "client-1",
            "REDIS_SERVICE_HOST": host,
            "REDIS_SERVICE_PORT": str(port),
            "TLS_CAFILE": "",
            "no_proxy": f"127.0.0.1,{os.environ.get('no_proxy') or os.environ.get('NO_PROXY', '')}",
            # For `python` to be the one that this is.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }

    def publish(self, event: dict[str, Any] | None = None, **fields: str) -> str:
        """Publish an event as the platform does, or a message with any fields; return its ID."""
        if not fields:
            now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
            fields = {"msg_data": json.dumps({"msg_dt": now.isoformat()} | (event or {}))}
        return self.queue.xadd("events", fields, maxlen=1000, approximate=True)

    def start(self, *command: str, **variables: str) -> Run:
        """Start a command, by itself the entry, with some variables set otherwise."""
        log_file = self.folder.with_name(f"{len(self.runs)}.log")
        options = {"cwd": self.folder, "env": os.environ | self.variables | variables}
        self.runs.append(Run(command or ("python", "index.py"), log_file, **options))
        return self.runs[-1]

    def edit(self, text: str) -> None:
        """Edit the folder's process.py as an author does: what is defined last counts."""
        original = (ROOT / "process.py").read_text(encoding="utf-8")
        (self.folder / "process.py").write_text(f"{original}\n{text}", encoding="utf-8")

    def handle(self, process_event: Callable[[dict], Any]) -> int:
        """Do in this process what the entry does, with another process_event."""
        with index.connect() as queue:
            return index.handle(queue, index.take(queue), process_event)

    def handle_beside(self, process_event: Callable[[dict], Any]) -> Future[int]:
        """Do so beside the test."""
        self.handling.append(self.threads.submit(self.handle, process_event))
        return self.handling[-1]

    def pending(self) -> dict[str, int]:
        """Return the IDs of the events not acknowledged, with the deliveries of each."""
        with contextlib.suppress(redis.ResponseError):  # while there is no group
            entries = self.queue.xpending_range("events", "consummers", "-", "+", 1000)
            return {entry["message_id"]: entry["times_delivered"] for entry in entries}
        return {}

    def dead_letters(self) -> list[dict[str, str]]:
        """Return the fields of what was set aside."""
        return [fields for _, fields in self.queue.xrange("events:dead-letter")]

    def deliver_to_another(self, *message_ids: str) -> None:
        """Hand the next events to a worker that is not there, as one that has just crashed."""
        index.create_group(self.queue)
        self.queue.xreadgroup("consummers", "crashed", {"events": ">"}, count=len(message_ids))

    def make_old(self, message_id: str, deliveries: int | None = None) -> None:
        """Let a pending event look as if its worker had been silent for over a minute."""
        options = {"idle": 61_000, "retrycount": deliveries, "justid": True}
        self.queue.xclaim("events", "consummers", "crashed", 0, [message_id], **options)

    def is_waited_on(self) -> bool:
        """Tell whether a run waits for an event."""
        return any(client["cmd"] == "xreadgroup" for client in self.queue.client_list())


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInApi]:
    """A stand-in API, which is asked again after short pauses."""
    monkeypatch.setattr(process, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(process, "JITTER_SECONDS", 0)
    with serving(StandInApi(PEOPLE)) as api:
        yield api


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Redis, a real one where there is one."""
    if not REDIS_SERVER:
        with serving(fakeredis.TcpFakeServer(("127.0.0.1", 0))) as server:
            yield server
        return
    server = RealRedis(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project as it is, with all that its author has added."""
    folder = tmp_path_factory.mktemp("project") / "copy"
    ignore = shutil.ignore_patterns(".git", ".venv")
    # An editor's locks are links that lead nowhere.
    return shutil.copytree(ROOT, folder, ignore=ignore, ignore_dangling_symlinks=True)


@pytest.fixture
def cage(api, server, project, monkeypatch, caplog) -> Iterator[Cage]:
    """A cage with an empty queue, in the environment of this process as well."""
    caplog.set_level("INFO")
    cage = Cage(api, server, project)
    monkeypatch.delenv("LOGLEVEL", raising=False)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # or an edit in the same second is missed
    for name, value in cage.variables.items():
        monkeypatch.setenv(name, value)
    cage.edit(ALGORITHM)
    cage.queue.flushall()
    yield cage
    for run in cage.runs:
        run.kill()
        run.wait()
    while not all(handling.done() for handling in cage.handling):
        cage.publish()  # a test that failed has left it waiting
    cage.queue.close()


@pytest.fixture
def client(cage: Cage) -> process.DatavillageApi:
    """A client of the cage's API."""
    return process.DatavillageApi()


@pytest.fixture
def real_cage(cage: Cage) -> Iterator[Cage]:
    """A cage for what only a redis-server does: wait, end, speak TLS."""
    if not REDIS_SERVER:
        pytest.skip("redis-server is not installed")
    yield cage
    cage.server.kill()  # with what a test has set
    cage.server.start()


def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS} s in vain"
        time.sleep(0.01)


def ignore(event: dict) -> None:
    """Process an event without ado."""


def raise_(error: BaseException) -> Callable[[Any], None]:
    """Return a function that raises an exception."""

    def work(event: object) -> None:
        raise error

    return work


never = raise_(AssertionError("this event is not to be processed"))


def call(folder: Path, *command: str | Path, **options: Any) -> subprocess.CompletedProcess:
    """Run a command in a folder to its end; return its status, output and errors."""
    options |= {"capture_output": True, "encoding": "utf-8", "timeout": PATIENCE_SECONDS}
    return subprocess.run(command, cwd=folder, **options)


# THE REHEARSAL

EVENT = '{"jobId": "job-1", "trigger": "rehearsal"}'
# The entry at home: one user after the other, and with all that the cage's log leaves out.
REHEARSED_ENTRY = """
import logging, sys
import index, process

class Formatter(logging.Formatter):
    def formatException(self, error):  # of a library's SyntaxError, Python shows no text
        text = super().formatException(error)
        return f"{text}\\n{error[1]}" if isinstance(error[1], SyntaxError) else text

sys.stdout.reconfigure(errors="backslashreplace")
logging.basicConfig(stream=sys.stdout)
logging.getLogger().handlers[0].setFormatter(Formatter(index.LOG_FORMAT))
logging.captureWarnings(True)
process.WORKERS = 1
sys.exit(index.main())
"""


def rehearse(users: dict[str, str], event: dict[str, Any], folder: Path) -> int:
    """Run the entry on one event and print what it stored; return its exit status."""
    started = time.monotonic()
    command = [sys.executable, "-u", "-c", REHEARSED_ENTRY]
    fake_redis = fakeredis.TcpFakeServer(("127.0.0.1", 0))
    with serving(StandInApi(users)) as api, serving(fake_redis) as server:
        cage = Cage(api, server, folder)
        cage.publish(event)
        # A timeout makes it wait in steps: a signal that another thread takes ends no other wait.
        options = {"env": os.environ | cage.variables, "timeout": threading.TIMEOUT_MAX}
        status = subprocess.run(command, cwd=folder, **options).returncode
    status = status if status >= 0 else 128 - status  # as a shell does
    user_ids = event.get("userIds")
    named = set(map(str, user_ids if isinstance(user_ids, list) else users))
    stored = {user_id for user_id, kind in api.stored}
    print()
    for user_id in sorted(named - stored):
        print(f"{user_id}: nothing stored{'' if user_id in users else '; no file holds this user'}")
    for (user_id, kind), turtle in api.stored.items():
        note = "" if user_id in named else "; the event does not name this user"
        print(f"{user_id}: {kind}{note}", textwrap.indent(turtle.rstrip("\n"), "    "), sep="\n")
    print(
        f"users: {len(named)}, stored: {len(named & stored)}, not stored: {len(named - stored)}, "
        f"stored though not named: {len(stored - named)}, "
        f"seconds: {time.monotonic() - started:.1f}, exit status: {status}"
    )
    return status


def main(arguments: list[str] | None = None) -> int:
    """Rehearse what the command line says; return the exit status."""
    description = "Rehearse the cage: run the entry on one event, and print what it stored."
    parser = argparse.ArgumentParser(description=description)
    files_help = "a user's Turtle, in a file named by the user's ID (default: USERS of test.py)"
    parser.add_argument("files", nargs="*", metavar="FILE", help=files_help)
    event_help = "the event to publish (default: %(default)s)"
    parser.add_argument("--event", metavar="JSON", default=EVENT, help=event_help)
    options = parser.parse_args(arguments)
    users: dict[str, str] = {}
    try:
        event = json.loads(options.event)
    except (ValueError, RecursionError) as error:
        parser.exit(2, f"--event: {error}\n")
    if not isinstance(event, dict):
        parser.exit(2, "--event: not a JSON object\n")
    for file in map(Path, options.files):
        if file.stem in users:
            parser.exit(2, f"{file}: another file for the user {file.stem!r}\n")
        try:
            users[file.stem] = file.read_bytes().decode("utf-8")  # with its line ends as they are
        except (OSError, UnicodeDecodeError) as error:
            parser.exit(2, f"{file}: {error}\n")
    try:
        return rehearse(users or USERS, event, ROOT)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also for a job in the background
    sys.exit(main())
