"""The template's promises, on a real redis-server with real TLS: `pytest .ci`.

What an author may rely on is shown by test.py. Here stands the rest: outages, TLS, kills, claims,
leaks, what an API may answer, what the README shows and the rehearsal prints. Each test brings an
algorithm of its own. What the tests stand on is at the bottom.
"""

import concurrent.futures
import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
import requests
import yaml
from redis.backoff import ConstantBackoff
from redis.retry import Retry

import index
import process
from test import (
    STAND_IN_TOKEN,
    StandInApi,
    StandInApiHandler,
    StandInCage,
    http_answer,
    rehearse_from_command_line,
    serving,
)

# What an event is, and becomes

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
        with recursion_limit(1_000), pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
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
    assert socket.gethostname() == index.CONSUMER
    assert cage.queue.xlen("events") == 2  # nor takes it from whoever else reads the stream


def test_a_group_that_redis_refuses_to_create_is_an_error(cage):
    cage.queue.set("events", "no stream")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        index.create_group(cage.queue)


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
    assert 100 < len(letters) <= 200  # Redis trims whole nodes, of 100 entries
    assert letters[-1] == {"own": "field", "error": error, "message_id": malformed}
    assert cage.pending() == {}
    assert cage.handle(ignore) == 0


def test_an_event_is_set_aside_when_three_deliveries_failed_or_killed_their_worker(cage, caplog):
    fails = cage.publish(msg_data='{"number": 1}')
    for delivery in (1, 2, 3):
        assert cage.pending() == ({fails: delivery - 1} if delivery > 1 else {})
        assert cage.dead_letters() == []
        assert cage.handle(raise_error(process.ProcessingError("no age given"))) == 1
        assert f"INFO index message {fails}: delivery {delivery} of 3\n" in caplog.text
        cage.make_old(fails)
    assert f"ERROR index message {fails}: failed: no age given\n" in caplog.text
    kills = cage.publish(msg_data='{"number": 2}')
    cage.deliver_to_another(kills)
    cage.make_old(kills, deliveries=3)
    assert cage.handle(never) == 1
    error = "delivered 3 times, acknowledged by none"
    assert cage.dead_letters() == [
        {"msg_data": '{"number": 1}', "error": "no age given", "message_id": fails},
        {"msg_data": '{"number": 2}', "error": error, "message_id": kills},
    ]
    assert cage.pending() == {}


def test_a_reason_that_is_no_unicode_is_a_reason(cage, caplog, monkeypatch):
    monkeypatch.setattr(index, "MAX_DELIVERIES", 1)
    caplog.set_level("CRITICAL", logger="index")  # in a report, it would break pytest-xdist
    cage.publish()
    assert cage.handle(raise_error(process.ProcessingError("of \ud800"))) == 1
    assert cage.dead_letters()[0]["error"] == "of \\ud800"


def test_a_dead_letter_that_was_published_again_as_it_was_gets_its_new_reason(cage):
    cage.publish(msg_data="null", error="old", message_id="0-0")
    assert cage.handle(never) == 1
    assert cage.dead_letters()[0]["error"] == f"malformed: {NO_OBJECT}"


def test_a_dead_letter_that_redis_refuses_stays_in_the_queue(cage):
    cage.queue.set("events:dead-letter", "no stream")
    refused = cage.publish(msg_data='["secret"]')
    with pytest.raises(redis.ResponseError, match=r"^WRONGTYPE [^\[]*$"):
        cage.handle(never)
    assert cage.pending() == {refused: 1}


async def be_async(*arguments: object) -> None:
    """Do nothing, later."""


async def be_async_and_yield(*arguments: object) -> Any:
    """Yield nothing, later."""
    yield


class Awaitable:
    """What an author's own library may return."""

    def __await__(self) -> Iterator[None]:
        yield


IS_IT_ASYNC = r"is it async, or does it yield\?"
UNFINISHED = (
    (be_async, f"coroutine: {IS_IT_ASYNC}"),
    (be_async_and_yield, f"async_generator: {IS_IT_ASYNC}"),
    (lambda *arguments: (yield), f"generator: {IS_IT_ASYNC}"),
    (lambda *arguments: Awaitable(), "Awaitable: nothing waits for its end"),
    (lambda *arguments: concurrent.futures.Future(), "Future: nothing waits for its end"),
    (lambda *arguments: map(len, []), "map: nothing waits for its end"),
)


@pytest.mark.filterwarnings("ignore:coroutine 'be_async' was never awaited")
def test_an_event_fails_by_any_exception_and_anything_returned_and_no_text_is_told(cage, caplog):
    def recurse(event: dict) -> None:
        recurse(event)

    def go_deep(event: dict, steps: int = 50) -> None:
        go_deep(event, steps - 1) if steps else raise_error(ValueError("secret"))(event)

    no_text = {"__str__": lambda self: int("secret")}
    unspeakable = type("UnspeakableError", (Exception,), no_text)()
    unspeakable_too = type("OwnError", (process.ProcessingError,), no_text)()
    two_lines = type("Two\nLines", (Exception,), {})()
    for work, reason in (
        (raise_error(unspeakable), r"UnspeakableError at test_template\.py:\d+ work"),
        (raise_error(unspeakable_too), r"OwnError at test_template\.py:\d+ work"),
        (raise_error(two_lines), r"Two Lines at test_template\.py:\d+ work"),
        (raise_error(SystemExit("secret")), r"SystemExit at test_template\.py:\d+ work"),
        (
            raise_error(KeyboardInterrupt("secret")),
            r"KeyboardInterrupt at test_template\.py:\d+ work",
        ),
        (recurse, r"RecursionError at test_template\.py:\d+ recurse(, [^,\n]+){5,29}"),
        (go_deep, r"ValueError at (test_template\.py:\d+ go_deep, ){28}test_template\.py:\d+ work"),
        (lambda event: {"secret": 1}, "process_event returned dict: it is to return nothing"),
        (lambda event: [], "process_event returned list: it is to return nothing"),
        *((work, f"process_event returned {cause}") for work, cause in UNFINISHED),
    ):
        message_id = cage.publish()
        with recursion_limit(1_000):
            assert cage.handle(work) == 1
        line = f"ERROR index message {message_id}: failed: {reason}"
        assert re.search(f"^{line}$", caplog.text, re.MULTILINE), reason
        assert cage.pending()[message_id] == 1


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


def test_a_waiting_worker_finds_an_event_as_it_is_abandoned(cage, monkeypatch):
    monkeypatch.setattr(index, "WAIT_SECONDS", 0.05)
    message_id = cage.publish()
    cage.deliver_to_another(message_id)
    run = cage.handle_beside(ignore)
    time.sleep(0.2)
    assert not run.done()
    cage.make_old(message_id)
    assert run.result(PATIENCE_SECONDS) == 0


def test_one_of_two_claimants_gets_an_abandoned_event_and_the_other_leaves_it_alone(cage):
    message_id = cage.publish()
    cage.deliver_to_another(message_id)
    cage.make_old(message_id)
    cage.queue.client_pause(500, all=False)  # both see it abandoned, and claim it after the pause

    def claim(_: object) -> object:
        with index.connect() as queue:
            return index.take_abandoned(queue)

    got = [message.deliveries for message in cage.threads.map(claim, range(2)) if message]
    assert got == [2]
    assert cage.pending() == {message_id: 2}


def test_a_claim_is_renewed_while_the_work_goes_on(cage, monkeypatch):
    assert (index.RENEW_SECONDS, index.CLAIM_SECONDS, index.WAIT_SECONDS) == (4, 60, 5)
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


def test_a_claim_that_cannot_be_renewed_is_a_warning_and_is_renewed_when_it_can(
    cage, caplog, monkeypatch
):
    monkeypatch.setattr(index, "RENEW_SECONDS", 0.05)

    def lose_the_queue_for_a_while(event: dict) -> None:
        cage.queue.rename("events", "elsewhere")
        until(lambda: "claim not renewed: NOGROUP" in caplog.text)
        cage.queue.rename("elsewhere", "events")
        cage.make_old(message_id)
        until(lambda: cage.silence() < 61_000)

    message_id = cage.publish()
    assert cage.handle(lose_the_queue_for_a_while) == 0


def test_nothing_of_a_run_goes_on_after_its_end_or_keeps_it_from_ending(cage, monkeypatch):
    monkeypatch.setattr(index, "RENEW_SECONDS", 0.01)
    before = set(threading.enumerate())

    def fail_while_a_renewal_is_under_way(event: dict) -> None:
        renewers.extend(set(threading.enumerate()) - before)
        cage.queue.client_pause(300, all=False)
        time.sleep(0.1)
        raise process.ProcessingError("fails")

    renewers: list[threading.Thread] = []
    cage.publish()
    assert cage.handle(fail_while_a_renewal_is_under_way) == 1
    assert set(threading.enumerate()) == before
    assert [renewer.daemon for renewer in renewers] == [True]


def test_a_renewal_that_hangs_holds_up_no_end_and_says_so_quietly(cage, caplog, monkeypatch):
    monkeypatch.setattr(index, "RENEW_SECONDS", 0.01)

    def fail_while_a_renewal_hangs(event: dict) -> None:
        cage.queue.client_pause(3_000, all=False)
        time.sleep(0.1)
        raise process.ProcessingError("fails")

    cage.publish()
    started = time.monotonic()
    assert cage.handle(fail_while_a_renewal_hangs) == 1
    assert time.monotonic() - started < 2.5
    cage.queue.client_unpause()
    until(lambda: "claim not renewed" in caplog.text)


def test_entries_trimmed_while_they_were_pending_are_skipped_with_a_warning(cage, caplog):
    trimmed, abandoned = cage.publish(), cage.publish({"number": 2})
    cage.deliver_to_another(trimmed, abandoned)
    for message_id in (trimmed, abandoned):
        cage.make_old(message_id)
    cage.queue.xdel("events", trimmed)
    with index.connect() as queue:
        assert index.take_abandoned(queue).id == abandoned
    assert f"WARNING index message {trimmed}: trimmed from the queue, skipped\n" in caplog.text
    assert cage.pending() == {abandoned: 2}


@pytest.mark.parametrize("stopped", [False, True])
def test_an_event_trimmed_while_it_was_worked_on_is_set_aside_if_it_fails_or_is_stopped(
    cage, monkeypatch, stopped
):
    monkeypatch.setattr(index, "RENEW_SECONDS", 0.05)

    def fail(event: dict) -> None:
        cage.queue.xtrim("events", 0)
        time.sleep(0.2)  # for a renewal, which on Redis 7 removes the pending entry
        if stopped:
            signal.raise_signal(signal.SIGTERM)
        raise process.ProcessingError("no age given")

    message_id = cage.publish(msg_data="{}")
    assert cage.main(fail) == (143 if stopped else 1)
    what = "stopped" if stopped else "no age given"
    reason = f"{what}; meanwhile it was trimmed from the queue"
    letter = {"msg_data": "{}", "error": reason, "message_id": message_id}
    assert cage.dead_letters() == [letter]
    assert cage.pending() == {}


def test_an_event_that_fails_after_redis_lost_its_data_is_set_aside(cage):
    def fail(event: dict) -> None:
        cage.queue.flushall()
        raise process.ProcessingError("no age given")

    cage.publish()
    assert cage.handle(fail) == 1
    assert [letter["error"][:12] for letter in cage.dead_letters()] == ["no age given"]


# A late worker: it was frozen for longer than its claim


@pytest.mark.parametrize("notices", ["at the end", "at a renewal"])
@pytest.mark.parametrize("end", ["fails", "is stopped"])
def test_a_worker_whose_event_another_has_leaves_it_alone_with_a_warning(
    cage, caplog, monkeypatch, end, notices
):
    monkeypatch.setattr(index, "MAX_DELIVERIES", 1)  # by itself, it would set the event aside
    monkeypatch.setattr(index, "RENEW_SECONDS", 0.05 if notices == "at a renewal" else 60)
    warning = "WARNING index message {}: another worker has it, left alone\n"

    def lose_it(event: dict) -> None:
        cage.take_over(message_id)
        if notices == "at a renewal":
            until(lambda: warning.format(message_id) in caplog.text)
            time.sleep(0.2)
        if end == "is stopped":
            signal.raise_signal(signal.SIGTERM)
        raise process.ProcessingError("fails")

    message_id = cage.publish()
    assert cage.main(lose_it) == (1 if end == "fails" else 143)
    assert cage.holder() == ("another", 2)
    assert cage.dead_letters() == []
    assert caplog.text.count(warning.format(message_id)) == 1


@pytest.mark.parametrize("end", ["fails", "is stopped"])
def test_a_worker_whose_event_another_finished_leaves_it_alone(cage, caplog, monkeypatch, end):
    monkeypatch.setattr(index, "MAX_DELIVERIES", 1)

    def lose_it(event: dict) -> None:
        cage.take_over(message_id)
        cage.queue.xack("events", "consummers", message_id)
        if end == "is stopped":
            signal.raise_signal(signal.SIGTERM)
        raise process.ProcessingError("fails")

    message_id = cage.publish()
    assert cage.main(lose_it) == (1 if end == "fails" else 143)
    assert cage.pending() == {}
    assert cage.dead_letters() == []
    assert f"message {message_id}: another worker has it, left alone\n" in caplog.text


def test_a_worker_that_noted_its_stop_knows_when_another_has_its_event(cage, caplog, monkeypatch):
    monkeypatch.setattr(index, "RENEW_SECONDS", 0.05)

    def outlast_the_claim(event: dict) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        until(lambda: cage.pending() == {message_id: 0})
        cage.take_over(message_id)
        until(lambda: "another worker has it" in caplog.text)

    message_id = cage.publish()
    assert cage.main(outlast_the_claim) == 143
    assert cage.holder() == ("another", 1)


def test_a_late_worker_that_succeeds_acknowledges(cage):
    message_id = cage.publish()
    assert cage.handle(lambda event: cage.take_over(message_id)) == 0
    assert cage.pending() == {}


# A stop


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_waiting_run_at_once_and_quietly(cage, signal_number):
    run = cage.start()
    until(cage.is_waited_on)
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
    for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):  # change nothing
        run.send_signal(signal_number)
        time.sleep(0.2)
    assert run.poll() is None
    assert "stopped" not in run.log
    cage.api.gate.set()
    assert run.end() == 143
    assert f" WARNING message {message_id}: stopped\n" in run.log
    assert "Traceback" not in run.log
    assert len(cage.stored) == 16
    assert len(cage.api.requests) == 1 + 16 + 16
    assert cage.pending() == {message_id: 0}
    assert cage.start().end() == 0
    assert len(cage.stored) == 40


def test_a_stop_while_threads_are_started_waits_for_each_user_that_was_begun(cage):
    def work(user_id: str) -> None:
        under_way.add(user_id)
        time.sleep(0.02)
        under_way.remove(user_id)

    def process_event(event: dict) -> None:
        threading.Timer(delays.pop(), signal.raise_signal, [signal.SIGTERM]).start()
        process.for_each_user(map(str, range(40)), work)

    under_way, delays = set(), [0, 0.0005, 0.001, 0.0015, 0.002] * 8
    while delays:
        cage.publish()
        cage.main(process_event)
        assert under_way == set()


def test_a_signal_that_another_thread_takes_is_seen_within_a_second(cage):
    called = []

    def work(user_id: str) -> None:
        called.append(user_id)
        if user_id == "0":
            until(lambda: len(called) == 16)
            time.sleep(0.1)  # for the main thread to wait again
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        time.sleep(1.6)

    cage.publish()
    assert cage.main(lambda event: process.for_each_user(map(str, range(40)), work)) == 143
    assert len(called) == 16


def test_a_stop_is_noted_while_the_work_goes_on_so_that_a_kill_then_costs_no_delivery(
    cage, monkeypatch
):
    assert index.RENEW_SECONDS <= 5
    monkeypatch.setattr(index, "RENEW_SECONDS", 0.05)

    def outlast_the_grace_period(event: dict) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        until(lambda: cage.pending() == {message_id: 2})
        cage.make_old(message_id)
        until(lambda: cage.silence() < 61_000)  # renewed all the same
        done.append("all of it")

    done: list[str] = []
    message_id = cage.publish()
    cage.deliver_to_another(message_id)
    cage.make_old(message_id, deliveries=2)
    assert cage.main(outlast_the_grace_period) == 143  # the third delivery, and no dead letter
    assert done == ["all of it"]
    assert cage.pending() == {message_id: 2}
    assert cage.dead_letters() == []
    assert cage.handle(ignore) == 0


@pytest.mark.parametrize("then", ["returns", "raises"])
def test_a_run_whose_algorithm_swallows_the_stop_acknowledges_nothing(cage, then):
    def swallow(event: dict) -> None:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        if then == "raises":
            raise process.ProcessingError("not all users done")

    message_id = cage.publish()
    assert cage.main(swallow) == 143
    assert cage.pending() == {message_id: 0}


@pytest.mark.parametrize("fails", [False, True])
def test_a_signal_after_the_work_lets_the_rest_be_done_and_ends_the_run(
    cage, caplog, monkeypatch, fails
):
    monkeypatch.setattr(index, "MAX_DELIVERIES", 1)

    def work(event: dict) -> None:
        cage.queue.client_pause(300, all=False)
        threading.Timer(0.1, signal.raise_signal, [signal.SIGTERM]).start()
        if fails:
            raise process.ProcessingError("fails")

    cage.publish()
    assert cage.main(work) == 143
    assert ("set aside in" if fails else "processed in") in caplog.text
    assert cage.pending() == {}
    signal.raise_signal(signal.SIGTERM)  # after the end it changes nothing


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_python_itself_ends_changes_nothing(cage, signal_number):
    cage.edit("""
class Lasting:
    def __del__(self, write=os.write, sleep=time.sleep):
        write(1, b"ends")
        sleep(0.5)

lasting = Lasting()
""")
    cage.publish()
    run = cage.start()
    until(lambda: run.log.endswith("ends"))
    run.send_signal(signal_number)
    assert run.end() == 0


def test_a_stop_whose_hand_back_finds_no_redis_is_a_stop(cage, monkeypatch):
    def lose_redis(event: dict) -> None:
        cage.server.kill()
        signal.raise_signal(signal.SIGTERM)

    cage.try_less()
    cage.publish()
    assert cage.main(lose_redis) == 143
    cage.server.start()


def test_a_signal_while_the_variables_are_checked_is_a_stop(cage, monkeypatch):
    checks = {"DV_URL": lambda value: signal.raise_signal(signal.SIGTERM)}
    monkeypatch.setattr(index, "VARIABLES", checks)
    assert cage.main(never) == 143
    checks["DV_URL"] = stop  # Ctrl-C, before its handler is there
    assert cage.main(never) == 143


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_import_of_the_algorithm_ends_as_it_does_by_itself(cage, signal_number):
    cage.edit('print("imports", flush=True); time.sleep(99)')
    run = cage.start()
    until(lambda: "imports" in run.log)
    run.send_signal(signal_number)
    assert run.end() == -signal_number
    assert "not started" not in run.log


# Many users at once


def test_a_user_whose_work_raised_is_named_with_the_reason_and_stops_no_other(caplog):
    class OwnError(process.ProcessingError):
        """As an author may define it."""

    no_age = raise_error(OwnError("no age\r\ngiven\u2028at all\x0cyet"))
    works = {"alice": len, "b\nad": int, "exit": sys.exit, "no age": no_age, "stop": stop}
    works |= {"bob": len}
    called = []

    def work(user_id: str) -> int:
        called.append(user_id)
        return works[user_id](user_id)

    users = iter([*works, *works])
    results = process.for_each_user(users, work, skip_failed=True)
    assert results == {"alice": 5, "bob": 3}
    assert sorted(called) == sorted(works)
    place = r"at test_template\.py:\d+ work"
    for line in (
        rf"ERROR process user 'b\\nad': ValueError {place}",
        rf"ERROR process user 'exit': SystemExit {place}",
        "ERROR process user 'no age': no age given at all yet",
        rf"ERROR process user 'stop': KeyboardInterrupt {place}, .* stop",
        "INFO process 6 of 6 users, 4 failed",
    ):
        assert re.search(f"^{line}$", caplog.text, re.MULTILINE), line
    reasons = rf"'b\\nad': ValueError {place}; 'exit': SystemExit {place}; 'no age': no age given"
    with pytest.raises(process.ProcessingError, match=f"^4 of 6 users failed: {reasons} .*; …$"):
        process.for_each_user([*works, *works], work)
    with pytest.raises(
        process.ProcessingError, match=r"^1 of 1 users failed: 'no age': no age [^;…]*$"
    ):
        process.for_each_user(["no age"], work)
    with pytest.raises(
        process.ProcessingError, match=r"^3 of 3 users failed: 'a': [^…]*; 'c': [^…]*$"
    ):
        process.for_each_user(
            ["a", "b", "c"], lambda user_id: time.sleep(user_id == "a") or int(user_id)
        )
    assert process.for_each_user([], work) == {}


@pytest.mark.filterwarnings("ignore:coroutine 'be_async' was never awaited")
def test_work_that_never_ran_is_a_failure_in_words():
    for work, cause in UNFINISHED:
        with pytest.raises(process.ProcessingError, match=f"failed: 'ann': work returned {cause}$"):
            process.for_each_user(["ann"], work)


def test_what_is_no_turtle_is_no_result(client):
    for turtle, reason in (
        (None, r"NoneType, not str: is a return missing\?"),
        (b"", "bytes, not str: it is to be Turtle, as text"),
        (be_async_and_yield(), f"async_generator, not str: {IS_IT_ASYNC}"),
    ):
        with pytest.raises(process.ProcessingError, match=f"^the result is {reason}$"):
            client.store("ann", turtle)
    with pytest.raises(
        process.ProcessingError, match=r"^PUT .*/ann/inferences: UnicodeEncodeError$"
    ):
        client.store("ann", "\ud800")


def test_sixteen_users_are_worked_on_side_by_side_on_connections_that_are_kept(cage, client):
    together = threading.Barrier(16, timeout=PATIENCE_SECONDS)

    def work(number: str) -> int:
        together.wait()  # all 16 are under way, and no connection is in use
        client.store("ann", client.user_data("ann"))
        return threading.get_ident()

    threads = process.for_each_user(map(str, range(48)), work)
    assert len(threads) == 48
    assert len(set(threads.values())) == 16
    assert len(cage.api.clients) <= 16
    over_tls = client._session.get_adapter("https://api.example")
    assert over_tls.poolmanager.connection_pool_kw["maxsize"] == 16


def test_threads_take_users_from_an_iterator_that_they_can_share():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        user_ids = list(map(str, range(200_000)))
        assert len(process.for_each_user(iter(user_ids), len)) == 200_000
        slow = (time.sleep(0.01) or user_id for user_id in user_ids[:20])
        assert len(process.for_each_user(slow, len)) == 20
    finally:
        sys.setswitchinterval(interval)


def test_what_goes_wrong_outside_of_the_work_fails_the_event_too():
    nameless = type("Nameless", (type,), {"__name__": property(lambda cls: 1 / 0)})
    with pytest.raises(ZeroDivisionError):
        process.for_each_user(["ann"], raise_error(nameless("Error", (Exception,), {})()))


def test_a_long_job_tells_its_progress_again_and_again(caplog, monkeypatch):
    monkeypatch.setattr(process, "PROGRESS_SECONDS", 0.1)

    def work(user_id: str) -> None:
        if user_id == "1099":
            until(lambda: caplog.text.count("1,099 of 1,100 users, 0 failed") == 2)

    assert len(process.for_each_user(map(str, range(1100)), work)) == 1100
    assert caplog.text.count(" users, ") < 100
    caplog.clear()
    monkeypatch.setattr(process, "PROGRESS_SECONDS", PROGRESS_SECONDS)
    process.for_each_user(["a"], lambda user_id: time.sleep(1.2))
    assert PROGRESS_SECONDS == 30
    assert caplog.text.count(" users, ") == 1


def test_a_forked_child_of_the_algorithm_can_be_ended_after_a_stop(cage):
    def work(user_id: str) -> None:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.1)
        child = os.fork()
        if not child:
            try:
                time.sleep(9)
            finally:
                os._exit(1)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        ended.append(os.waitpid(child, 0)[1])

    ended: list[int] = []
    cage.publish()
    assert cage.main(lambda event: process.for_each_user(["ann"], work)) == 143
    assert ended == [signal.SIGTERM]


def test_a_child_of_the_algorithm_can_be_ended():
    def work(user_id: str) -> int:
        with subprocess.Popen(["sleep", "9"]) as child:
            child.terminate()
            return child.wait()

    assert process.for_each_user(["alice"], work) == {"alice": -signal.SIGTERM}


# What the API may do


def test_any_id_is_one_path_segment(cage, client, monkeypatch):
    user_ids = ["https://alice.example/card#me", "a/b", "a?b", "../c", "%2e", " ", "Zoë", "佐\n江"]
    cage.api.users = {user_id: f"# {user_id!r}" for user_id in user_ids}
    assert client.active_users() == user_ids
    assert {user_id: client.user_data(user_id) for user_id in user_ids} == cage.api.users
    for user_id in user_ids:
        client.store(user_id, user_id)
    assert cage.stored == {(user_id, "inferences"): user_id for user_id in user_ids}
    for user_id in (".", "..", "", "\ud800"):
        match = f"^{re.escape(repr(user_id))} cannot be part of a URL$"
        with pytest.raises(process.ProcessingError, match=match):
            client.user_data(user_id)
    monkeypatch.setenv("DV_APP_ID", "app/1?")
    monkeypatch.setenv("DV_CLIENT_ID", "client 1#")
    with pytest.raises(
        process.ProcessingError, match="clients/client%201%23/applications/app%2F1%3F/"
    ):
        process.DatavillageApi().active_users()


def test_results_and_explanations_are_stored_as_turtle(cage, client):
    client.store("ben", "# Zoë")
    client.store("ben", "# why", "explains")
    assert cage.stored == {("ben", "inferences"): "# Zoë", ("ben", "explains"): "# why"}
    with pytest.raises(process.ProcessingError, match=r"/ben/inference answered 404$"):
        client.store("ben", "", "inference")
    url, token = (
        f"{client._users_url}/ben/inferences",
        {"Authorization": f"Bearer {STAND_IN_TOKEN}"},
    )
    assert requests.put(url, headers=token, timeout=9).status_code == 400  # it says no type
    assert requests.put(url, timeout=9).status_code == 401


def test_a_put_is_done_with_any_2xx_whatever_its_body(cage, client):
    for status in (200, 201, 202, 204, 206):
        for body in (b"", b"{}"):
            answer = http_answer(status, body, content_type="text/html", content_encoding="gzip")
            cage.api.faults = {"PUT activeUsers/ann/inferences": [answer]}
            client.store("ann", "")
    cage.api.faults = {"PUT activeUsers/ann/inferences": [http_answer(200, b"cut")[:-1]]}
    client.store("ann", "")
    assert cage.api.requests == ["PUT activeUsers/ann/inferences"] * 11


def test_no_interim_answer_gives_a_user_the_data_of_another(cage, client, caplog):
    cage.api.users = {f"user-{number}": f"# {number}" for number in range(60)}
    cage.api.hinted = {f"GET activeUsers/user-{number}/data" for number in range(0, 60, 5)}
    data = process.for_each_user(cage.api.users, client.user_data, skip_failed=True)
    assert len(data) == 48
    assert data.items() <= cage.api.users.items()
    assert sum(text.endswith("/data answered 103") for text in caplog.messages) == 12


def test_no_cookie_of_one_answer_goes_out_with_the_next_call(cage, client):
    for attributes in ("", "; Path=/", "; Domain=127.0.0.1; Max-Age=99"):
        answer = http_answer(200, set_cookie=f"session=of-ann{attributes}")
        cage.api.faults = {"GET activeUsers/ann/data": [answer]}
        client.user_data("ann")
        client.user_data("ben")
        client.store("ben", "")
    assert not any("cookie" in headers for headers in cage.api.headers)
    assert len(client._session.cookies) == 0


GZIPPED = gzip.compress(b"# Ann, at length " * 99)
CUT = (
    b"",
    http_answer(200, b"# Ann")[:-1],
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n# Ann\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n# A",
    http_answer(200, GZIPPED, content_encoding="gzip")[:-1],
    http_answer(200, GZIPPED[:-1], content_encoding="gzip"),
    http_answer(200, GZIPPED[:30], content_encoding="GZIP"),
    http_answer(200, b"", content_encoding="gzip"),
    b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n# Ann",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n# Ann",
    http_answer(200, GZIPPED[:10] + b"\x07" + GZIPPED[11:], content_encoding="gzip"),
)


def test_passing_faults_are_ridden_out(cage, client):
    faults = [http_answer(status) for status in (429, 500, 502, 503, 504)]
    for fault in (*faults, *CUT):
        cage.api.faults = {
            "GET activeUsers": [fault] * 5,
            "GET activeUsers/ann/data": [fault] * 5,
            "PUT activeUsers/ann/inferences": [] if fault in CUT[1:] else [fault] * 5,
        }
        assert client.active_users() == ["ann", "ben"]
        client.store("ann", client.user_data("ann"))
        assert cage.stored.pop(("ann", "inferences")) == PEOPLE["ann"]
        assert not any(cage.api.faults.values())


def test_pauses_grow_to_fifteen_seconds_and_are_stretched_and_none_comes_after_the_last_try(
    cage, client, monkeypatch
):
    assert sum(PAUSES_SECONDS) >= 15
    assert process.STRETCH == 1.5
    assert process.TIMEOUT_SECONDS == (5, 60)
    cage.api.faults = {"GET activeUsers": [http_answer(503)] * 6}
    monkeypatch.setattr(process, "PAUSES_SECONDS", (0.1,) * 5)
    assert seconds_of(client.active_users, "answered 503") >= 0.52
    monkeypatch.setattr(process, "PAUSES_SECONDS", ())
    cage.api.faults = {"GET activeUsers": [http_answer(503, retry_after="30")]}
    assert seconds_of(client.active_users, "answered 503") < 20


def seconds_of(call: Callable[[], object], error: str) -> float:
    """Return how long a call takes, which fails so."""
    started = time.monotonic()
    with pytest.raises(process.ProcessingError, match=error):
        call()
    return time.monotonic() - started


def test_a_compressed_answer_is_data(cage, client):
    answer = http_answer(200, GZIPPED, content_encoding="gzip")
    cage.api.faults = {"GET activeUsers/ann/data": [answer]}
    assert client.user_data("ann") == "# Ann, at length " * 99
    client.active_users()
    assert cage.api.headers[0]["accept-encoding"] == "gzip"  # the end of others cannot be told


def test_data_that_begins_as_a_web_page_would_is_data(cage, client):
    for data in ("<html#x> <a:b> <c:d> .", "<html/x> <a:b> <c:d> .", "<!doctype-of> <a:b> <c:d> ."):
        cage.api.users = {"ann": data}
        assert client.user_data("ann") == data


def test_a_byte_order_mark_is_no_data(cage, client):
    cage.api.users = {"ann": "\ufeff# Ann"}
    assert client.user_data("ann") == "# Ann"


def test_what_is_no_users_data_is_an_error_in_words_that_do_not_quote_it(cage, client):
    page = b"<!DOCTYPE html><title>secret</title>"
    for answer, reason in (
        *((http_answer(status, b"# secret"), f" answered {status}") for status in STATUSES),
        (http_answer(200, page, content_type="text/html"), " answered 200 with HTML"),
        (
            http_answer(200, b"<x/>", content_type="TEXT/HTML; a=b"),
            " answered 200 with HTML",
        ),
        (
            http_answer(200, b"<x/>", content_type="application/xhtml+xml"),
            " answered 200 with HTML",
        ),
        (http_answer(200, b"\n <html lang=en>"), " answered 200 with HTML"),
        (http_answer(200, page), " answered 200 with HTML"),
        (http_answer(200, b"\xef\xbb\xbf" + page), " answered 200 with HTML"),
        (http_answer(200, content_type="text/html"), " answered 200 with HTML"),
        (http_answer(200, "Zoë".encode("latin-1")), ": UnicodeDecodeError"),
        (http_answer(200, GZIPPED, content_encoding="deflate"), ": UnicodeDecodeError"),
    ):
        cage.api.faults = {"GET activeUsers/ann/data": [answer]}
        with pytest.raises(
            process.ProcessingError, match=f"^GET {client._users_url}/ann/data{reason}$"
        ):
            client.user_data("ann")
        assert not any(cage.api.faults.values())
    assert cage.api.requests == ["GET activeUsers/ann/data"] * (len(STATUSES) + 9)  # none again


STATUSES = (201, 202, 203, 204, 206, 300, 304, 400, 401, 403, 404, 410, 501)


def test_a_wrong_answer_is_an_error_in_words_that_do_not_quote_it(cage, client):
    tries = 1 + len(process.PAUSES_SECONDS)
    no_list = "answered no JSON array of strings"
    for answers, error in (
        *(([cut] * tries, r"\w+Error|\w+Encoding") for cut in CUT),
        ([b"secret\r\n\r\n"] * tries, r"\w+Error"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 7, 8\r\n\r\nsecret"], "InvalidHeader"),
        ([http_answer(503)] * tries, "answered 503"),
        ([http_answer(404)], "answered 404"),
        ([http_answer(200, b"")], no_list),
        ([http_answer(200, b'{"users": []}')], no_list),
        ([http_answer(200, b'["secret", 1]')], no_list),
        ([http_answer(200, b"[" * 100_000)], no_list),
        ([http_answer(200, b'["\xff"]')], "UnicodeDecodeError"),
    ):
        cage.api.faults = {"GET activeUsers": answers}
        match = f"^GET {client._users_url}:? ({error})$"
        with recursion_limit(1_000), pytest.raises(process.ProcessingError, match=match):
            client.active_users()
        assert answers == []


def test_a_redirect_is_an_error_and_is_not_followed_or_looked_at(cage, client):
    own = f"{cage.variables['DV_URL']}/clients/client-1/applications/app-1/activeUsers"
    for location in (own, "http://[::1", "//\xff", "", "http://a:99999"):
        for status in (300, 301, 302, 303, 307, 308):
            answer = f"HTTP/1.1 {status} -\r\nContent-Length: 0\r\nLocation: {location}\r\n\r\n"
            cage.api.faults = {"PUT activeUsers/ann/inferences": [answer.encode("latin-1")]}
            with pytest.raises(
                process.ProcessingError, match=f"/ann/inferences answered {status}$"
            ):
                client.store("ann", "")


def test_the_api_may_ask_for_a_pause_but_for_no_more_than_a_minute(cage, monkeypatch):
    assert process.RETRY_AFTER_SECONDS == 60
    monkeypatch.setattr(process, "RETRY_AFTER_SECONDS", 0.2)
    for value in ("86400", "Fri, 31 Dec 9999 23:59:59 GMT", "Fri Dec 31 23:59:59 9999"):
        cage.api.faults = {"GET activeUsers": [http_answer(429, retry_after=value)]}
        started = time.monotonic()
        process.DatavillageApi().active_users()
        assert time.monotonic() - started >= 0.2
    monkeypatch.setattr(process, "RETRY_AFTER_SECONDS", 60)
    cage.api.faults = {"GET activeUsers": [http_answer(429, retry_after="1"), b""]}
    started = time.monotonic()
    process.DatavillageApi().active_users()
    assert 1 <= time.monotonic() - started < 1.9  # once


NO_PAUSES = (
    *("1.5", "5s", "5 s", "", "-5", "+5", "1e1", "soon", "5, 5", "\xb2", "9" * 1_000, "9" * 5_000),
    *("Fri, 31 Feb 2997 00:00:00 GMT", "Fri, 31 Dec 99999 23:59:59 GMT", "Fri, 31 Dec 1999"),
    "Fri, 31 Jan 2997 00:00:00 +" + "9" * 400,
)


@pytest.mark.parametrize("value", NO_PAUSES, ids=range(len(NO_PAUSES)))
def test_a_pause_in_no_valid_form_counts_as_none_asked_for(cage, client, value):
    fault = http_answer(503, retry_after="HERE").replace(b"HERE", value.encode("latin-1"))
    cage.api.faults = {"GET activeUsers": [fault] * 5}
    started = time.monotonic()
    assert client.active_users() == ["ann", "ben"]
    assert time.monotonic() - started < 3


def test_an_api_that_does_not_answer_or_is_away_is_named_with_the_reason(cage, monkeypatch):
    monkeypatch.setattr(process, "PAUSES_SECONDS", ())
    monkeypatch.setattr(process, "TIMEOUT_SECONDS", (5, 0.2))
    cage.api.held = {"GET activeUsers"}
    with pytest.raises(process.ProcessingError, match=r"Read timed out\. \(read timeout=0\.2\)$"):
        process.DatavillageApi().active_users()
    monkeypatch.setenv("DV_URL", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(process.ProcessingError, match=r"^GET http://127.0.0.1:9/.* refused$"):
        process.DatavillageApi().active_users()
    monkeypatch.setenv("DV_URL", "http://api.example")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(process.ProcessingError, match="Unable to connect to proxy"):
        process.DatavillageApi().active_users()


def test_proxies_are_those_of_the_environment_and_no_netrc_replaces_the_token(
    cage, monkeypatch, tmp_path
):
    (tmp_path / ".netrc").write_text("machine api.example login somebody password else\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("http_proxy", cage.variables["DV_URL"])
    # To a proxy the whole URL is sent, and no client tidies it up: the slash may be there.
    monkeypatch.setenv("DV_URL", "http://api.example/")
    assert process.DatavillageApi().user_data("ann") == PEOPLE["ann"]


def test_the_api_is_verified_with_the_ca_bundle_of_the_environment(cage, monkeypatch):
    api, certificate = cage.api, cage.server.certificate
    monkeypatch.setattr(process, "PAUSES_SECONDS", ())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    api.socket = context.wrap_socket(api.socket, server_side=True)
    monkeypatch.setenv("DV_URL", f"https://127.0.0.1:{api.server_address[1]}")
    with pytest.raises(process.ProcessingError, match="certificate verify failed"):
        process.DatavillageApi().active_users()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    assert process.DatavillageApi().active_users() == ["ann", "ben"]


# The process: what it needs, what it logs, how it ends


def test_what_is_missing_or_unusable_is_named_in_one_line_and_nothing_is_taken(cage, monkeypatch):
    long = "a" * 70
    unusable = {
        "DV_URL": [
            "",
            "api.datavillage.me",
            "https://user:secret@api.datavillage.me",
            "http://[::1",
        ],
        "DV_TOKEN": ["", "secret\n", "sec ret"],
        "DV_APP_ID": ["", ".", "\udcff"],
        "DV_CLIENT_ID": ["", ".."],
        "REDIS_SERVICE_HOST": ["", "a b", "a..b", f"{long}.b"],
        "REDIS_SERVICE_PORT": [
            "",
            "tcp://10.0.0.1:6379",
            "0",
            "65536",
            "+6379",
            "6_379",
            "9" * 5_000,
        ],
        "LOGLEVEL": ["LOUD"],
        "TLS_CAFILE": ["/nowhere/ca.crt", "/tmp", __file__],
        "REQUESTS_CA_BUNDLE": ["/nowhere/ca.crt", __file__],
        "CURL_CA_BUNDLE": ["/nowhere/ca.crt", __file__],
    }
    unusable["DV_URL"] += ["http://a:70000", "http://*.a", "http://.a", "http://[::1]x", "https://"]
    unusable["DV_URL"] += ["http://a..b", f"http://{long}.b", "http://a/b c", "http://a?b"]
    usable = {
        "DV_URL": ["http://api_v2.example:65535/v1/", "http://[::1]:80", "https://ä.example"],
        "REDIS_SERVICE_HOST": ["redis_1", "::1", "redis.example."],
        "REDIS_SERVICE_PORT": ["1", "65535", "06379"],
        "LOGLEVEL": ["", "debug", "Warning"],
        "TLS_CAFILE": ["", requests.certs.where()],
        "REQUESTS_CA_BUNDLE": ["", "/tmp", requests.certs.where()],
        "CURL_CA_BUNDLE": ["", "/tmp", requests.certs.where()],
    }
    assert index.unusable_variables() == []
    for values_by_name, is_usable in ((unusable, False), (usable, True)):
        for name, values in values_by_name.items():
            for value in values:
                with monkeypatch.context() as patch:
                    patch.setenv(name, value)
                    assert index.unusable_variables() == ([] if is_usable else [name]), value
    cage.publish()
    run = cage.start(**{name: values[-1].rstrip() for name, values in unusable.items()})
    assert run.end() == 2
    [line] = run.lines
    names = line.partition(" ERROR not started: missing or unusable: ")[2].split(", ")
    assert sorted(names) == sorted(unusable)
    assert cage.queue.xinfo_groups("events") == []


@pytest.mark.parametrize(
    ("edit", "traceback"),
    [
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("open('model.nowhere')", "FileNotFoundError: [Errno 2] No such file"),
        ("def compute(:", "SyntaxError: "),
        ("exit()", "SystemExit"),
        ("class Own(BaseException): pass\nraise Own", "Own"),
        ("import io, logging, sys; sys.stdout = io.StringIO(); logging.disable(); 1 / 0", "Zero"),
        ("del process_event", "no attribute 'process_event'"),
        (
            "import logging; logging.basicConfig(format='own %(message)s'); 1 / 0",
            "ZeroDivisionError",
        ),
        (
            "import logging.config as own; own.dictConfig({'version': 1}); 1 / 0",
            "ZeroDivisionError",
        ),
    ],
)
def test_a_process_py_that_cannot_be_imported_is_named_and_costs_no_event(cage, edit, traceback):
    cage.edit(edit)
    cage.publish()
    run = cage.start("bash", "-c", "python index.py 2> >(:)")  # standard output is what counts
    assert run.end() == 2
    assert run.lines[0].endswith(" ERROR not started: process.py cannot be imported")
    assert traceback in run.log
    assert cage.queue.xinfo_groups("events") == []
    shown = call(cage.folder, "python", "test.py")
    assert shown.returncode == (0 if edit == "exit()" else 1)
    assert edit == "exit()" or traceback in shown.stderr


TALKATIVE = """
import asyncio, gc, logging, logging.config, threading, warnings

warnings.simplefilter("always")
ages = logging.getLogger("process.ages")
logging.config.dictConfig({
    "version": 1,  # disables, by itself, the loggers that are there
    "handlers": {"own": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["own"], "level": "DEBUG"},
})

async def fail_later(data):
    asyncio.get_running_loop().create_future().set_exception(ValueError(data))

def process_event(event):
    data = DatavillageApi().user_data("ann")
    logging.getLogger("library").warning(data)
    logging.getLogger("process_utils").error(data)
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
    ages.debug("of my own: %r", "ë\\n")
    try:
        int(data)
    except ValueError as error:
        ages.exception("an exception of my own")
        record = ages.makeRecord(ages.name, 40, "", 0, "formatted before", (), None)
        record.exc_text = f"ValueError: {error}"
        ages.handle(record)
    print("printed ë")
    for_each_user(["ann"], int, skip_failed=True)
    int(data)
"""


def test_libraries_and_exceptions_do_not_speak_at_any_level_and_the_authors_code_does(cage):
    cage.api.users = {"ann": "secret"}
    cage.edit(TALKATIVE)
    cage.publish()
    run = cage.start(LOGLEVEL="debug", PYTHONIOENCODING="ascii")
    assert run.end() == 1
    assert "secret" not in run.log
    assert STAND_IN_TOKEN not in run.log
    assert "\nprinted \\xeb\n" in run.log
    for line, pattern in zip(
        run.lines,
        (
            "INFO waiting .*",
            r"INFO message [\d-]+: delivery 1 of 3",
            r"ERROR left unraised: ValueError at process\.py:\d+ <lambda>",
            r"ERROR left unraised: ValueError at [\w.:, ]+ run",
            r"DEBUG of my own: '\\xeb\\n'",
            "ERROR an exception of my own",
            "ERROR formatted before",
            r"ERROR user 'ann': ValueError at process\.py:\d+ work_in_turn",
            "INFO 1 of 1 users, 1 failed",
            r"ERROR message [\d-]+: failed: ValueError at process\.py:\d+ process_event",
        ),
        strict=True,
    ):
        assert re.fullmatch(rf"[\d-]{{10}} [\d:]{{8}},\d{{3}} {pattern}", line), pattern


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
    cage.edit("def compute(user_id, data):\n    print('computes', user_id)\n    return data")
    message_id = cage.publish()
    run = cage.start()
    until(lambda: cage.stored and cage.api.held <= set(cage.api.requests))
    run.kill()
    assert run.end() == -signal.SIGKILL
    assert "computes ann\n" in run.log
    assert cage.pending() == {message_id: 1}
    assert cage.stored.keys() == {("ann", "inferences")}
    cage.api.gate.set()
    cage.make_old(message_id)
    run = cage.start(LOGLEVEL="WARNING")
    assert run.end() == 0
    assert run.lines == []
    assert cage.stored.keys() == {("ann", "inferences"), ("ben", "inferences")}
    assert cage.pending() == {}


def test_a_run_waits_without_end_or_cost(cage, caplog, monkeypatch):
    with index.connect() as queue:  # by itself redis-py waits 5 s for an answer
        assert index.WAIT_SECONDS < queue.get_connection_kwargs()["socket_timeout"] < 10
    monkeypatch.setattr(index, "WAIT_SECONDS", 0.4)
    run = cage.handle_beside(ignore)
    until(cage.is_waited_on)
    processor_seconds = time.process_time()
    time.sleep(1.5)
    assert time.process_time() - processor_seconds < 0.2
    cage.publish()
    assert run.result(PATIENCE_SECONDS) == 0
    assert "WARNING" not in caplog.text


# When Redis goes away


@pytest.mark.parametrize(
    "state", ["starting", "waiting", "waiting, without its data", "working", "acknowledging"]
)
def test_a_restart_of_redis_is_ridden_out_with_one_warning_that_names_the_reason(
    cage, caplog, monkeypatch, state
):
    finish, waiting = threading.Event(), state.startswith("waiting")
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


STATES = ["waiting", "working", "acknowledging", "setting aside", "handing back"]


@pytest.mark.parametrize("stale", ["yes", "no"])
@pytest.mark.parametrize("state", STATES)
def test_a_failover_is_ridden_out_in_every_state(cage, caplog, monkeypatch, state, stale):
    monkeypatch.setattr(index, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(index, "MAX_DELIVERIES", 1)

    def fail_over() -> None:
        cage.queue.config_set("replica-serve-stale-data", stale)
        cage.queue.replicaof("127.0.0.1", 9)  # it answers READONLY, or MASTERDOWN to reads, too
        threading.Timer(0.5, cage.queue.replicaof, ["no", "one"]).start()

    def work(event: dict) -> None:
        if state != "waiting":
            fail_over()
        if state == "working":
            until(lambda: "is away: " in caplog.text)
            until(lambda: cage.queue.role()[0] == "master")
        if state == "setting aside":
            raise process.ProcessingError("fails")
        if state == "handing back":
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(process, "process_event", work)
    if state == "waiting":
        run = cage.handle_beside(work)
        until(cage.is_waited_on)
        fail_over()
        until(lambda: cage.queue.role()[0] == "master")
        cage.publish()
        assert run.result(PATIENCE_SECONDS) == 0
    else:
        message_id = cage.publish()
        assert cage.main(work) == {"setting aside": 1, "handing back": 143}.get(state, 0)
    assert cage.pending() == ({message_id: 0} if state == "handing back" else {})
    assert len(cage.dead_letters()) == (1 if state == "setting aside" else 0)
    assert "claim not renewed" not in caplog.text


def test_redis_emptied_while_a_run_waits_costs_no_later_event_which_is_taken_as_it_comes(cage):
    run = cage.handle_beside(ignore)
    until(cage.is_waited_on)
    cage.queue.flushall()
    until(lambda: cage.queue.exists("events"))
    cage.publish()
    assert run.result(3) == 0  # it waits in steps of 5 s


def test_redis_that_refuses_or_stays_away_ends_the_run_in_words(cage, caplog, monkeypatch):
    retry = index.connect().get_retry()
    assert 60 < sum(retry._backoff.compute(failures + 1) for failures in range(index.RETRIES)) < 90
    cage.try_less()

    def log_of_a_run() -> str:
        caplog.clear()
        assert cage.main(never) == 2
        return caplog.text

    cage.queue.set("events", "no stream")
    assert re.search(r"ERROR index Redis at \S+: \w*ResponseError: WRONGTYPE ", log_of_a_run())
    cage.queue.config_set("requirepass", "another")
    assert re.search(r"WARNING index Redis at \S+ is away: .*authenticate", log_of_a_run())
    cage.server.kill()
    log = log_of_a_run()
    assert re.search(r"ERROR index Redis at \S+: ConnectionError: Error \d+ connecting to ", log)
    assert log.count("WARNING index Redis at ") == 1
    cage.server.start()


@pytest.mark.parametrize("command", ["XADD", "XCLAIM"])
def test_a_redis_that_renamed_a_command_is_named_without_what_the_command_held(
    cage, caplog, monkeypatch, command
):
    monkeypatch.setattr(index, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(index, "MAX_DELIVERIES", 1)
    cage.server.kill()
    shutil.rmtree(cage.server.data)
    cage.server.start("--rename-command", command, "RENAMED")
    publish = "RENAMED" if command == "XADD" else "XADD"
    cage.queue.execute_command(publish, "events", "*", "msg_data", '{"userIds": ["secret"]}')

    def fail(event: dict) -> None:
        if command == "XCLAIM":
            until(lambda: "claim not renewed: unknown command 'XCLAIM'\n" in caplog.text)
        raise process.ProcessingError("fails")

    assert cage.main(fail) == (2 if command == "XADD" else 1)
    if command == "XADD":
        assert caplog.text.endswith(": ResponseError: unknown command 'XADD'\n")
    assert "secret" not in "".join(caplog.messages)
    assert "args" not in "".join(caplog.messages)


@pytest.mark.parametrize("tls", [False, True])
def test_redis_that_hangs_is_ridden_out(cage, caplog, monkeypatch, tls):
    monkeypatch.setattr(index, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(index, "SOCKET_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(index, "CLAIM_SECONDS", 1)  # for an event whose delivery came too late
    for name, value in cage.server.tls.items() if tls else ():
        monkeypatch.setenv(name, value)
    run = cage.handle_beside(ignore)
    until(cage.is_waited_on)
    cage.server.process.send_signal(signal.SIGSTOP)
    until(lambda: "is away: Timeout" in caplog.text)
    cage.server.process.send_signal(signal.SIGCONT)
    cage.publish()
    assert run.result(PATIENCE_SECONDS) == 0


def test_tls_is_verified_and_what_is_wrong_with_it_is_named(cage, caplog, monkeypatch):
    tls = cage.server.tls
    cage.publish()
    for variables, reason in (
        (tls | {"TLS_CAFILE": requests.certs.where()}, "certificate verify failed"),
        (tls | {"REDIS_SERVICE_HOST": "localhost"}, "mismatch"),
        (tls | {"TLS_CAFILE": ""}, "Connection"),
        ({"TLS_CAFILE": tls["TLS_CAFILE"]}, "Timeout connecting"),
    ):
        with monkeypatch.context() as patch:
            cage.try_less(patch)
            patch.setattr(index, "SOCKET_TIMEOUT_SECONDS", 0.2)
            for name, value in variables.items():
                patch.setenv(name, value)
            caplog.clear()
            with pytest.raises(redis.RedisError):
                cage.handle(never)
        assert re.search(f"WARNING index Redis at .* is away: .*{reason}", caplog.text)
    for name, value in tls.items():
        monkeypatch.setenv(name, value)
    assert cage.handle(ignore) == 0


# What is deployed, and what the README shows


def test_the_config_is_what_the_cage_expects():
    config = yaml.safe_load((PROJECT / "datavillage.yaml").read_text(encoding="utf-8"))
    assert config.keys() == {"env", "script", "entry"}
    assert "pip install -r requirements.txt" in config["script"]
    assert "python index.py" in config["entry"]


def readme(start: str, language: str, blocks: int) -> list[str]:
    """Return the blocks of code in the README's section that starts so; skip if it has not."""
    text = (PROJECT / "README.md").read_text(encoding="utf-8").partition(start)[2]
    section = re.split(r"^##+ ", text, maxsplit=1, flags=re.MULTILINE)[0]
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", section, re.MULTILINE | re.DOTALL)
    if len(found) < blocks:
        pytest.skip(f"this README has no {blocks} blocks of {language} under {start!r}")
    return found


def test_the_readmes_commands_for_the_queue_work(cage):
    look, publish, publish_again = readme("### A look at the queue", "bash", 3)

    def output_of(command: str) -> str:
        return call(cage.folder, "bash", "-c", command, check=True).stdout

    def counts() -> list[str]:
        return re.findall(r"^.*: (\d+)$", output_of(look), re.MULTILINE)

    assert counts() == ["0", "0", "0"]  # before anything was published
    malformed = cage.publish(msg_data="null", own="field")
    assert counts() == ["1", "0", "0"]
    assert cage.handle(never) == 1
    cage.publish()
    assert cage.handle(raise_error(ValueError())) == 1
    output_of(publish)
    assert counts() == ["1", "1", "1"]
    assert malformed in output_of(look)
    output_of(publish_again)
    assert cage.dead_letters() == []
    assert cage.queue.xrevrange("events", count=1)[0][1] == {"msg_data": "null", "own": "field"}


def test_the_readmes_loop_runs_until_a_run_is_stopped(cage):
    cage.edit("""
def process_event(event):
    if event["stop"]:
        os.kill(os.getpid(), 15)
        time.sleep(9)
""")
    for payload in ('{"stop": false}', "null", '{"stop": true}'):
        cage.publish(msg_data=payload)
    loops = [block for block in readme("## Deploy it", "bash", 1) if block.startswith("until ")]
    run = cage.start("bash", "-c", loops[0])
    assert run.end() == 0
    ends = re.findall("processed in|set aside in|stopped", run.log)
    assert ends == ["processed in", "set aside in", "stopped"]


# What the rehearsal shows


def rehearse(cage: "RealCage", *arguments: str | Path, **options: Any) -> tuple[str, str, int]:
    """Rehearse in the folder of the cage; return the log, the report, and the exit status."""
    done = call(cage.folder, "python", "test.py", *arguments, **options)
    assert done.stderr == ""
    log, _, report = done.stdout.partition("\n\n")
    return log, report, done.returncode


def files_of(folder: Path, texts: dict[str, str]) -> Path:
    """Write users' data into a new folder; return it."""
    folder.mkdir()
    for user_id, text in texts.items():
        (folder / f"{user_id}.ttl").write_bytes(text.encode("utf-8"))
    return folder


def summary(users: int, stored: int, *others: int, status: int = 0) -> str:
    """Return what the last line matches; the other counts are in its order, and 0 by default."""
    empty, failed, silent, extra = (*others, 0, 0, 0, 0)[:4]
    return (
        f"users: {users:,}, stored: {stored:,}, empty: {empty}, failed: {failed}, "
        f"without result or failure: {silent}, "
        f"{f'stored though not named: {extra}, ' if extra else ''}"
        rf"seconds: \d+\.\d, exit status: {status}(; Turtle not checked: rdflib is not installed)?"
    )


def test_the_rehearsal_prints_and_writes_what_was_stored_as_it_is(cage, tmp_path):
    bob = '<a:b> <a:c>  "1\x0c2\u20283\x854" .\n\n# \u2603'
    files = files_of(tmp_path / "data", {"zoë": '# "Zoë"\r\n# 佐江\n', "bob.card": bob})
    (files / "notes.txt").touch()
    (files / ".#zoë.ttl").symlink_to("nowhere")  # an editor's
    results = tmp_path / "new" / "results"
    log, report, status = rehearse(cage, files, "--results", results)
    assert status == 0
    assert re.search(
        r"^[\d-]{10} [\d:,]{12} INFO message .* processed in \d+\.\d s$", log, re.MULTILINE
    )
    assert "home|" not in log
    indented = bob.replace("\n\n", "\n\n    ")
    assert report.startswith(
        f'bob.card: inferences\n    {indented}\nzoë: inferences; empty\n    # "Zoë"\n    # 佐江\n'
    )
    assert re.fullmatch(summary(2, 2, 1), report.splitlines()[-1])
    written = {path.relative_to(results): path.read_bytes() for path in results.rglob("*.ttl")}
    assert written == {
        Path("inferences/zo%C3%AB.ttl"): '# "Zoë"\r\n# 佐江\n'.encode(),
        Path("inferences/bob.card.ttl"): bob.encode("utf-8"),
    }


def test_a_result_that_cannot_be_written_is_named(cage, tmp_path):
    files = files_of(tmp_path / "data", {"€" * 80: ""})  # 240 bytes, and 720 when it is encoded
    _, report, status = rehearse(cage, files, "--results", tmp_path / "results")
    assert status == 0
    assert "€: inferences: not written: [Errno 36] File name too long" in report


UNQUIET = """
import logging, os, threading, time, warnings

warnings.simplefilter("always")
WORKERS = int(os.environ.get("WORKERS", WORKERS))

def work(user_id):
    print(f"{user_id} begins")
    breakpoint()
    warnings.warn(f"a library on {user_id}")
    logging.getLogger("library").warning("a library on %s,\\nand more", user_id)
    logging.getLogger("process.ages").warning("the author on %s,\\nand more", user_id)
    logging.getLogger("process.ages").warning("too few %s %s", user_id)
    print(f"{user_id} ends {os.environ['AN_API_KEY']}")
    return int(user_id)

def fail(user_id):
    raise type("BadSyntax", (SyntaxError,), {"__str__": lambda self: "bad at line 7"})()

def process_event(event):
    thread = threading.Thread(target=int, args=["unraised"])
    thread.start()
    thread.join()
    for_each_user(["ann", "ben"], work, skip_failed=True)
    for_each_user(["eve"], fail, skip_failed=True)
    DatavillageApi().store("ann", "<a:b> <a:c> <a:d> .")
    DatavillageApi().store("ben", "# of ben", "explains")
    raise ValueError("the event's")
"""


def test_the_rehearsal_marks_what_the_cage_hides_and_takes_one_user_after_the_other(
    cage, monkeypatch, tmp_path
):
    cage.edit(UNQUIET)
    monkeypatch.setenv("AN_API_KEY", "kept")
    files = files_of(tmp_path / "data", {"ann": "", "ben": ""})
    event = json.dumps({"userIds": ["eve", "ann", "dan"]})
    debugger = "p 'debugged', user_id\nc\n" * 2
    log, report, status = rehearse(cage, files, "--event", event, input=debugger)
    assert status == 1
    ann = ["ann begins", "(Pdb) ('debugged', 'ann')", "ann ends kept"]
    prints = [line for line in log.split("\n") if re.search("begins$|debugged|kept$", line)]
    assert prints == [*ann, *(line.replace("ann", "ben") for line in ann)]
    at_home = re.findall(r"^(?:\(Pdb\) )?home\| .*", log, re.MULTILINE)
    for text in (
        "UserWarning: a library on ann",
        "WARNING a library on ann,\nhome| and more",
        "ValueError: invalid literal for int() with base 10: 'ann'",
        "ValueError: invalid literal for int() with base 10: 'unraised'",
        "TypeError: not enough arguments for format string",
        "bad at line 7",
        "ValueError: the event's",
    ):
        assert text in log
        assert any(line.endswith(text.split("\n")[-1]) for line in at_home), text
    cage.queue.flushall()
    cage.publish({})
    run = cage.start(AN_API_KEY="kept", PYTHONBREAKPOINT="0", WORKERS="1")
    run.end()
    assert own_lines(run.log) == own_lines(log)
    assert re.fullmatch(
        "ann: inferences\n    <a:b> <a:c> <a:d> .\n"
        "ben: explains; the event does not name this user; empty\n    # of ben\n"
        "dan: no result, no failure; no file holds this user\n"
        r"ann: failed: ValueError at process.py:\d+ work\n"
        r"ben: failed: ValueError at process.py:\d+ work\n"
        r"eve: failed: BadSyntax at process.py:\d+ fail; no file holds this user\n"
        f"{summary(3, 1, 1, 3, 1, 1, status=1)}\n",
        report,
    )


def own_lines(log: str) -> list[str]:
    """Return, sorted, what is neither marked nor the debugger's, without what no two runs share."""
    lines = [line for line in log.split("\n") if not re.match(r"home\| |> |-> |\(Pdb\)|$", line)]
    varies = r"\d{4}-[\d-]+ [\d:,]+ |message [\d-]+|:\d{4,5}$|\d+\.\d s"
    return sorted(re.sub(varies, "", line) for line in lines)


def test_the_rehearsal_of_many_users_is_short_and_ends_with_the_failures(cage, tmp_path):
    cage.edit("""
def compute(user_id, data):
    if user_id.endswith("7"):
        raise ProcessingError("no sevens")
    return "" if user_id.endswith("8") else f"<a:{user_id}> <a:b> <a:c> .\\n"

def process_event(event):
    api = DatavillageApi()
    work = lambda user_id: api.store(user_id, compute(user_id, ""))
    for_each_user(api.active_users(), work, skip_failed=True)
""")
    files = files_of(tmp_path / "data", {str(number): "" for number in range(10_000, 10_250)})
    log, report, status = rehearse(cage, files)
    assert status == 0  # for the algorithm does without them
    lines = report.split("\n")
    assert len(log.split("\n")) + len(lines) < 90
    assert lines[:2] == ["10000: inferences", "    <a:10000> <a:b> <a:c> ."]
    assert lines[20:22] == ["... and the results of 215 more users", "10007: failed: no sevens"]
    assert lines[41] == "... and 5 more"
    assert re.fullmatch(summary(250, 225, 25, 25), lines[42])
    assert "\n10008: inferences; empty\n\n10009: inferences\n" in report


@pytest.mark.parametrize("rdflib", [True, False], ids=["with rdflib", "without rdflib"])
def test_the_rehearsal_names_results_that_are_not_valid_or_empty_or_tell_the_folder(
    cage, tmp_path, rdflib
):
    if rdflib:
        pytest.importorskip("rdflib")
    else:
        cage.edit_test("^ +import rdflib$", "        raise ImportError")
    texts = {
        "line": "<a:a> <a:b> <a:c> .\n<a:a> <a:b> oops .\n",
        "end": "<a:a> <a:b> <a:c>",
        "string": '<a:a> <a:b> "c .',
        "iri": "<a:a b> <a:b> <a:c> .",
        "fine": '\ufeff<a:a> <a:b> "# no comment" . # one',
        "local": f"<{tmp_path.as_uri()}/a> <a:b> <a:c> .",
        "nothing": "",
        "newline": "\n",
        "comments": " # <a:a> <a:b> <a:c> .\r\n\t# more",
        "form-feed": "<a:a> <a:b> <a:c> .\x0c",
        "literal": '"a" <a:b> <a:c> .',
        "return": "# comment\r<a:a> <a:b> <a:c> .",
        "prefixes": "@prefix a: <a:#> .\nPREFIX b: <b:>\nBASE <a:c>",
        "one-line": "@prefix a: <a:#> . a:a a:b a:c .",
    }
    _, report, _status = rehearse(cage, files_of(tmp_path / "data", texts))
    invalid = ["line", "end", "string", "iri", "form-feed", "literal"] if rdflib else []
    empty = ["nothing", "newline", "comments", "prefixes"]
    assert re.findall(
        "^(.*): failed: inferences: not valid Turtle: ", report, re.MULTILINE
    ) == sorted(invalid)
    if rdflib:
        assert re.search(
            "^line: failed: .* at line 2 of .*objectList expected", report, re.MULTILINE
        )
        assert re.search(
            "^iri: failed: .* a:a b does not look like a valid URI", report, re.MULTILINE
        )
    printed = re.findall("^(.*): inferences; empty$", report, re.MULTILINE)
    assert printed == sorted({*empty} - {"prefixes"})  # which is not among the first ten
    assert re.findall("^(.*): inferences: holds a file: IRI", report, re.MULTILINE) == ["local"]
    *_, last = report.split("\n")[:-1]
    counts = (14, 14, len(empty), len(invalid))
    assert re.fullmatch(summary(*counts, status=1 if invalid else 0), last)
    assert ("Turtle not checked" in last) == (not rdflib)


def test_the_rehearsal_ends_as_the_entry_does_and_writes_nothing_elsewhere(
    cage, monkeypatch, tmp_path
):
    cage.edit("""
def process_event(event):
    DatavillageApi().store("../佐", "")
    os.kill(os.getpid(), 9)
""")
    cage.edit_test("^USERS = {", 'USERS = {"../佐": "",')
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    _, report, status = rehearse(cage, "--results", tmp_path)
    assert status == 137  # as a shell says it
    assert report.startswith("../佐: inferences; empty\n")
    assert [path.name for path in tmp_path.rglob("*.ttl")] == ["..%2F%E4%BD%90.ttl"]


def test_the_rehearsal_publishes_the_event_that_stands_beside_the_users(cage):
    cage.edit_test("^EVENT = .*", 'EVENT = {"userIds": ["own"]}')
    _, report, _status = rehearse(cage)
    assert report.startswith("own: failed: GET http")
    assert "answered 404; no file holds this user\n" in report


def test_the_rehearsal_refuses_what_it_cannot_use_with_one_line(capsys, tmp_path):
    (tmp_path / "latin.ttl").write_bytes(b"Zo\xeb")
    (tmp_path / "alice.ttl").touch()
    (tmp_path / "empty").mkdir()
    for arguments, reason in (
        (["nowhere.ttl"], "nowhere.ttl: [Errno 2] No such file"),
        ([tmp_path / "empty"], "empty: no *.ttl file in this folder"),
        ([tmp_path / "latin.ttl"], "latin.ttl: 'utf-8' codec can't decode byte"),
        ([tmp_path / "alice.ttl", tmp_path / "alice.ttl"], "another file for the user 'alice'"),
        (["--event", "{a"], "--event: Expecting property name enclosed in double quotes: line 1"),
        (["--event", "[]"], "--event: not a JSON object"),
        (["--results", tmp_path / "alice.ttl"], "alice.ttl: [Errno 17] File exists"),
    ):
        with pytest.raises(SystemExit, match="2"):
            rehearse_from_command_line([str(argument) for argument in arguments])
        [line] = capsys.readouterr().err.splitlines()
        assert reason in line


def test_a_long_rehearsal_tells_on_a_terminal_how_far_it_is_and_spares_the_prompt(cage, tmp_path):
    cage.edit("""
def compute(user_id, data):
    time.sleep(0.15)
    if user_id == "4":
        breakpoint()
    return ""
""")
    cage.edit_test("^PROGRESS_SECONDS = .*", "PROGRESS_SECONDS = 0.2")
    files = files_of(tmp_path / "data", {str(number): "" for number in range(6)})
    terminal, other_end = os.openpty()
    options = {"cwd": cage.folder, "stdin": subprocess.PIPE, "stderr": other_end}
    with Run(["python", "test.py", files], tmp_path / "log", **options) as run:
        os.close(other_end)
        until(lambda: "(Pdb)" in run.log)
        told = os.read(terminal, 9_999)
        assert re.fullmatch(rb"(\d of 6 users\r){2,3}", told)
        assert len(set(told.split(b"\r"))) == len(told.split(b"\r"))
        time.sleep(0.5)
        os.set_blocking(terminal, False)
        with pytest.raises(BlockingIOError):
            os.read(terminal, 9_999)
        run.communicate(b"c\n", timeout=PATIENCE_SECONDS)
    assert re.fullmatch(rb"(\d of 6 users\r)?\x1b\[K", os.read(terminal, 9_999))
    os.close(terminal)


@pytest.mark.parametrize("to_group", [False, True], ids=["to it", "to its group"])
@pytest.mark.parametrize("moment", ["waiting for", "delivery 1", "works", "a: inferences"])
def test_ctrl_c_ends_the_rehearsal_at_once_and_leaves_no_process(cage, tmp_path, moment, to_group):
    seconds = 99 if moment == "works" else 0
    cage.edit(f"""
def process_event(event):
    print(os.getpid(), "works")
    for_each_user(["a"], lambda _: time.sleep({seconds}))
    for number in range(300):
        DatavillageApi().store("a", f"<a:b> <a:c> {{number}} .")
""")
    files = files_of(tmp_path / "data", {"a": ""})
    run = cage.start("python", "test.py", files, start_new_session=True)
    until(lambda: moment in run.log)
    (os.killpg if to_group else os.kill)(run.pid, signal.SIGINT)
    status = run.wait(10)
    assert "Traceback" not in run.log
    assert status == (0 if "exit status" in run.log else 130)
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)


# What an author may have in the folder


def test_an_authors_own_files_and_settings_stop_no_test_of_the_cage(cage, monkeypatch):
    cage.edit("""
import logging.config, pathlib, sys, warnings
import own_helper

MODEL = (pathlib.Path(__file__).parent / "own_model.txt").read_text()
logging.config.dictConfig({"version": 1})
logging.basicConfig(level="DEBUG")
warnings.simplefilter("error")
sys.setrecursionlimit(30_000)
os.chdir("/")

def compute(user_id, data):
    raise ValueError(MODEL)

def process_event(event):
    compute("", "")
""")
    folder = cage.folder
    own_test = "from test import stand_in_cage\ndef test_own():\n    with stand_in_cage({}): pass\n"
    own_tests = ["test_own.py", "own_a/test_a.py", "own_b/test_a.py", "own_a/unit/test_a.py"]
    files = dict.fromkeys(own_tests, own_test)
    files |= {"own_helper.py": "", "own_model.txt": "", "README.md": "# An algorithm\n"}
    files |= {"own_package/__init__.py": "", "own_package/test.py": "raise SystemExit"}
    files |= {
        "own_environment/pyvenv.cfg": "",
        "own_environment/lib/own/test_a.py": "raise SystemExit",
    }
    for name in ("index.py", "process.py", "test.py"):
        files[f"own_clone/{name}"] = (PROJECT / name).read_text(encoding="utf-8")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "own_link").symlink_to(".")
    (folder / "own_dangling").symlink_to("nowhere")
    os.mkfifo(folder / "own_pipe")
    monkeypatch.chdir(folder)  # for the path of the socket to be short enough
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("own_socket")
    done = call(folder, "pytest", "-q", "-rA", "-p", "no:randomly")
    passed = re.findall(r"^PASSED (\S+)", done.stdout, re.MULTILINE)
    assert {f"{name}::test_own" for name in own_tests} <= set(passed), done.stdout
    cage_tests = re.findall(r"^(\w+) .*test\.py::test_cage_", done.stdout, re.MULTILINE)
    assert cage_tests == ["PASSED"] * 9, done.stdout  # and one skipped, for want of a README
    assert re.search("^SKIPPED .* this README has no such example$", done.stdout, re.MULTILINE)
    collected = call(folder, "pytest", "-q", "--collect-only", ".ci")
    assert collected.returncode == 0, collected.stdout


# What the tests stand on: an API that errs, a real Redis, a copy of the project

PROJECT = Path(__file__).resolve().parent.parent
PAUSES_SECONDS = process.PAUSES_SECONDS  # as they are outside of the tests
PROGRESS_SECONDS = process.PROGRESS_SECONDS
PATIENCE_SECONDS = 50  # until a test gives up waiting: far more than anything here takes
# What these tests have in place of USERS and of process.py's own algorithm.
PEOPLE = {"ann": "# Ann\n", "ben": '# "Zoë", "佐江"\n'}
ALGORITHM = """
import os, time

def compute(user_id, data):
    return data

def process_event(event):
    api, user_ids = DatavillageApi(), event.get("userIds")

    def work(user_id):
        api.store(user_id, compute(user_id, api.user_data(user_id)))

    for_each_user(api.active_users() if user_ids is None else user_ids, work)
"""


class ErringApi(StandInApi):
    """A stand-in API that goes wrong as a test says, by requests such as `GET activeUsers`."""

    def __init__(self, users: dict[str, str]) -> None:
        super().__init__(users, self.err)
        self.RequestHandlerClass = ErringApiHandler
        self.faults: dict[str, list[bytes]] = {}  # sent instead of an answer, in order
        self.held: set[str] = set()  # those whose answer waits for the gate
        self.gate = threading.Event()
        self.hinted: set[str] = set()  # those with an interim answer before the real one
        # What the tests look at, in order.
        self.requests: list[str] = []
        self.clients: set[tuple[str, int]] = set()
        self.headers: list[dict[str, str]] = []

    def err(self, request: str) -> bytes | None:
        """Answer a request otherwise, or late."""
        self.requests.append(request)
        if request in self.held:
            self.gate.wait(PATIENCE_SECONDS)
        return self.faults[request].pop(0) if self.faults.get(request) else None


class ErringApiHandler(StandInApiHandler):
    """Answers one connection to it."""

    server: ErringApi

    def usual_answer(
        self, method: str, path: list[str], headers: dict[str, str], body: bytes
    ) -> bytes:
        """Note who asks; hint at the answer if it is to be hinted at."""
        self.server.clients.add(self.client_address)
        self.server.headers.append(headers)
        if f"{method} {'/'.join(path[4:])}" in self.server.hinted:
            self.wfile.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
            time.sleep(0.05)  # for the connection to be used again meanwhile, by mistake
        return super().usual_answer(method, path, headers, body)


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

    def start(self, *more: str) -> None:
        """Start it, anew if it was ended, with more options, and wait until it listens."""
        self.data.mkdir(exist_ok=True)
        # Without fsync always, what came last would be lost by a kill.
        options = f"--port {self.server_address[1]} --tls-port {self.tls_port}"
        options += " --tls-auth-clients no --appendonly yes --appendfsync always"
        command = ["redis-server", *options.split(), "--save", "", "--dir", self.data, *more]
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
            super().__init__(command, stdout=log, **{"stderr": subprocess.STDOUT} | options)

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


class RealCage(StandInCage):
    """The stand-in cage with a real Redis and an API that errs, and processes to start in it."""

    def __init__(
        self, api: ErringApi, server: RealRedis, folder: Path, patch: pytest.MonkeyPatch
    ) -> None:
        super().__init__(api, *server.server_address)
        self.api, self.server, self.folder, self.patch = api, server, folder, patch
        self.runs: list[Run] = []
        self.threads = ThreadPoolExecutor()
        self.handling: list[Future[int]] = []
        # For `python` to be the one that this is.
        self.variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def start(self, *command: str | Path, start_new_session: bool = False, **variables: str) -> Run:
        """Start a command, by itself the entry, with some variables set otherwise."""
        log_file = self.folder.with_name(f"{len(self.runs)}.log")
        options = {"cwd": self.folder, "env": os.environ | variables}
        options["start_new_session"] = start_new_session
        self.runs.append(Run(command or ("python", "index.py"), log_file, **options))
        return self.runs[-1]

    def edit(self, text: str) -> None:
        """Edit the folder's process.py as an author does: what is defined last counts."""
        original = (PROJECT / "process.py").read_text(encoding="utf-8")
        edited = f"{original}\n{ALGORITHM}\n{text}"
        (self.folder / "process.py").write_text(edited, encoding="utf-8")

    def edit_test(self, pattern: str, replacement: str) -> None:
        """Edit the folder's test.py, where a line matches the pattern."""
        file = self.folder / "test.py"
        text = re.sub(pattern, replacement, file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        file.write_text(text, encoding="utf-8")

    def main(self, process_event: Callable[[dict], Any]) -> int:
        """Do in this process all that the entry does, with another process_event."""
        self.patch.setattr(process, "process_event", process_event)
        return index.main()

    def handle(self, process_event: Callable[[dict], Any]) -> int:
        """Do so without the signals, which are for the main thread only."""
        self.patch.setattr(process, "process_event", process_event)
        with index.connect() as queue:
            return index.handle(queue, index.take(queue), index.Stop())

    def handle_beside(self, process_event: Callable[[dict], Any]) -> Future[int]:
        """Do so beside the test."""
        self.handling.append(self.threads.submit(self.handle, process_event))
        return self.handling[-1]

    def try_less(self, patch: pytest.MonkeyPatch | None = None) -> None:
        """Make the entry give Redis up soon."""
        (patch or self.patch).setattr(index, "RETRIES", 3)
        (patch or self.patch).setattr(index, "BACKOFF_SECONDS", 0.01)

    def pending(self) -> dict[str, int]:
        """Return the IDs of the events not acknowledged; none while there is no group."""
        with contextlib.suppress(redis.ResponseError):
            return super().pending()
        return {}

    def _pending_entry(self) -> dict[str, Any]:
        [entry] = self.queue.xpending_range("events", "consummers", "-", "+", 2)
        return entry

    def holder(self) -> tuple[str, int]:
        """Return who holds the pending event, and after how many deliveries."""
        return self._pending_entry()["consumer"], self._pending_entry()["times_delivered"]

    def silence(self) -> int:
        """Return for how long the pending event was not claimed, in ms."""
        return self._pending_entry()["time_since_delivered"]

    def deliver_to_another(self, *message_ids: str) -> None:
        """Hand the next events to a worker that is not there, as one that has just crashed."""
        index.create_group(self.queue)
        self.queue.xreadgroup("consummers", "crashed", {"events": ">"}, count=len(message_ids))

    def make_old(self, message_id: str, deliveries: int | None = None) -> None:
        """Let a pending event look as if its worker had been silent for over a minute."""
        options = {"idle": 61_000, "retrycount": deliveries, "justid": True}
        self.queue.xclaim("events", "consummers", "crashed", 0, [message_id], **options)

    def take_over(self, message_id: str) -> None:
        """Hand a pending event to another worker, as when this one was silent for too long."""
        self.queue.xclaim("events", "consummers", "another", 0, [message_id])

    def is_waited_on(self) -> bool:
        """Tell whether a run waits for an event."""
        return any(client["cmd"] == "xreadgroup" for client in self.queue.client_list())


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRedis]:
    """The redis-server of all tests."""
    server = RealRedis(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have caplog take what the cage logs, also if an author has disabled the loggers."""
    caplog.set_level("INFO")
    for logger in (index.logger, process.logger):
        monkeypatch.setattr(logger, "disabled", False)


@pytest.fixture
def cage(server, tmp_path_factory, monkeypatch) -> Iterator[RealCage]:
    """A cage with an empty queue, in the environment of this process as well."""
    monkeypatch.setattr(process, "PAUSES_SECONDS", (0.001,) * 5)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    server_process = server.process
    folder = tmp_path_factory.mktemp("project") / "copy"
    folder.mkdir()
    for path in PROJECT.iterdir():
        if (path.suffix == ".py" and path.is_file()) or path.name == "README.md":
            shutil.copy(path, folder)
        elif path.name != ".git":
            (folder / path.name).symlink_to(path)
    with serving(api := ErringApi(PEOPLE)):
        cage = RealCage(api, server, folder, monkeypatch)
        for name in ("LOGLEVEL", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(
            "PYTHONDONTWRITEBYTECODE", "1"
        )  # or an edit in the same second is missed
        for name, value in cage.variables.items():
            monkeypatch.setenv(name, value)
        cage.edit("")
        cage.queue.flushall()
        yield cage
        api.gate.set()
        for run in cage.runs:
            run.kill()
            run.wait()
        if server.process is not server_process:
            server.kill()  # with the options of a test
            shutil.rmtree(server.data)
            server.start()
        while not all(handling.done() for handling in cage.handling):
            cage.publish()  # a test that failed has left it waiting
        cage.queue.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def client(cage: RealCage) -> process.DatavillageApi:
    """A client of the cage's API."""
    return process.DatavillageApi()


@contextlib.contextmanager
def recursion_limit(limit: int) -> Iterator[None]:
    """Set it for a while: what an author has set may be more than the machine's stack holds."""
    original = sys.getrecursionlimit()
    sys.setrecursionlimit(limit)
    try:
        yield
    finally:
        sys.setrecursionlimit(original)


def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS} s in vain"
        time.sleep(0.01)


def ignore(event: dict) -> None:
    """Process an event without ado."""


def raise_error(error: BaseException) -> Callable[[Any], None]:
    """Return a function that raises an exception."""

    def work(event: object) -> None:
        raise error

    return work


def stop(user_id: str) -> None:
    """Do what Ctrl-C does, without one."""
    raise KeyboardInterrupt


never = raise_error(AssertionError("this event is not to be processed"))


def call(folder: Path, *command: str | Path, **options: Any) -> subprocess.CompletedProcess:
    """Run a command in a folder to its end; return its status, output and errors."""
    options |= {"capture_output": True, "encoding": "utf-8", "timeout": PATIENCE_SECONDS}
    return subprocess.run(command, cwd=folder, **options)
