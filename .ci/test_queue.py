"""Promises 1, 2, 3, 6 and 7: events, dead letters, late runs, and what stops a run at its start."""

import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from unittest import mock

import pytest
import redis
import requests

import index
import process


def test_the_documented_times_and_names():
    assert (index.CLAIM_SECONDS, index.RENEW_SECONDS, index.MAX_DELIVERIES) == (75, 5, 3)
    assert index.WAIT_SECONDS + 2 <= index.SOCKET_TIMEOUT_SECONDS <= 10  # or a wait is an outage
    assert index.CLEAN_UP_SECONDS <= 1.5  # so a stop takes at most two seconds
    assert index.DEAD_LETTER_LENGTH == 10_000
    streams = (index.STREAM, index.GROUP, index.DEAD_LETTER_STREAM)
    assert streams == ("events", "consummers", "events:dead-letter")
    assert (process.WORKERS, process.PROGRESS_SECONDS) == (16, 30)
    api = process.DatavillageApi
    assert api.TIMEOUT_SECONDS == (5, 60)
    assert (len(api.PAUSES_SECONDS), sum(api.PAUSES_SECONDS)) == (5, 15)
    assert api.LONGEST_PAUSE_SECONDS == 60


# 1: one event, the oldest one, however long it takes
def test_events_published_before_the_first_start_are_taken_in_turn_with_all_that_they_hold(cage):
    cage.queue.delete(index.STREAM)  # with the group
    events = [{"type": "first", "own": ["ë"]}, {"type": "second", "userIds": None}]
    for event in events:
        cage.publish(event)
    taken: list[dict] = []
    assert [cage.main(taken.append), cage.main(taken.append)] == [0, 0]
    assert all(datetime.fromisoformat(event.pop("msg_dt")) for event in taken)
    assert taken == events


def test_events_abandoned_for_75_seconds_come_first_and_the_oldest_of_them(cage):
    message_ids = [cage.publish({"number": number}) for number in range(123)]
    held, abandoned = message_ids[:120], message_ids[120:122]
    cage.deliver(*held, idle_seconds=70)
    cage.deliver(*abandoned)
    taken: list[dict] = []
    assert [cage.main(taken.append) for _ in range(3)] == [0, 0, 0]
    assert [event["number"] for event in taken] == [120, 121, 122]
    assert cage.pending() == dict.fromkeys(held, 1)


def test_of_two_runs_that_find_an_abandoned_event_one_gets_it(cage):
    both = [cage.publish({}), cage.publish({})]
    cage.deliver(*both)
    cage.queue.client_pause(300, all=False)  # both find the same one, and claim it after the pause
    with ThreadPoolExecutor() as threads:
        claims = threads.map(lambda _: index.take_abandoned(index.connect()).id, range(2))
    assert sorted(claims) == both
    assert cage.pending() == dict.fromkeys(both, 2)  # the other one has left it alone


def test_a_run_waits_without_cost_or_outage_and_finds_an_event_as_it_is_abandoned(cage):
    cage.set(WAIT_SECONDS=0.3, SOCKET_TIMEOUT_SECONDS=0.6)  # in the order of the real ones
    message_id = cage.publish({})
    cage.deliver(message_id, idle_seconds=0)
    threading.Timer(0.8, cage.pass_a_minute).start()
    processor_seconds = time.process_time()
    assert cage.main() == 0
    assert time.process_time() - processor_seconds < 0.4
    assert f"message {message_id}: delivery 2 of 3" in cage.log
    assert cage.lines("WARNING") == []


# 2
def test_an_event_is_claimed_until_its_work_is_done_and_then_acknowledged(cage):
    def process_event(event: dict) -> None:
        cage.wait_for_renewals()
        entries.extend(cage.pending_entries())

    entries: list[dict] = []
    cage.set(RENEW_SECONDS=0.05)
    cage.publish({})
    assert cage.main(process_event) == 0
    assert [entry["times_delivered"] for entry in entries] == [1]  # a renewal is no delivery
    assert entries[0]["consumer"] == socket.gethostname()  # so an operator sees where it is
    assert cage.pending() == {}
    assert re.fullmatch(r"message \S+: processed in \d+\.\d s", cage.lines("INFO")[-1])


# 3: failures and dead letters
NO_OBJECT = "malformed: msg_data is not a JSON object in UTF-8"
NO_LIST = "malformed: userIds is not a list of strings"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        pytest.param(None, NO_OBJECT, id="none"),
        pytest.param(b'["secret"]', NO_OBJECT, id="list"),
        pytest.param(b"{secret", NO_OBJECT, id="no JSON"),
        pytest.param(b'{"secret": "\xff"}', NO_OBJECT, id="Latin-1"),
        pytest.param('{"a": 1}'.encode("utf-16"), NO_OBJECT, id="UTF-16"),
        pytest.param(b'{"a":' * 100_000, NO_OBJECT, id="deeply nested"),
        pytest.param(b'{"userIds": "secret"}', NO_LIST, id="userIds: string"),
        pytest.param(b'{"userIds": false}', NO_LIST, id="userIds: false"),
        pytest.param(b'{"userIds": ["secret", null]}', NO_LIST, id="userIds: with null"),
    ],
)
def test_a_malformed_event_is_a_dead_letter_at_once_and_is_not_quoted(cage, payload, reason):
    fields = {b"own": b"field"} | ({b"msg_data": payload} if payload else {})
    message_id = cage.queue.xadd(index.STREAM, fields | {"error": "of an earlier delivery"})
    assert cage.main() == 1
    with redis.Redis(port=cage.server.port) as queue:
        [(_, letter)] = queue.xrange("events:dead-letter")
    assert letter == {**fields, b"error": reason.encode(), b"message_id": message_id.encode()}
    assert cage.pending() == {}
    set_aside = f"message {message_id}: set aside in events:dead-letter: {reason}"
    assert cage.lines("ERROR") == [set_aside]
    assert "secret" not in cage.log


def test_a_failed_event_is_delivered_three_times_and_then_a_dead_letter(cage):
    message_id = cage.publish({})
    failed = f"message {message_id}: %sfailed: no age given"
    again = failed % "delivered again in 75 s, because it "
    for deliveries in (1, 2):
        assert cage.main(cage.fail) == 1
        assert cage.pending() == {message_id: deliveries}
        assert index.take_abandoned(index.connect()) is None  # it has to wait
        cage.pass_a_minute()
    assert cage.main(cage.fail) == 1
    set_aside = f"message {message_id}: set aside in events:dead-letter: no age given"
    assert cage.lines("ERROR") == [again, again, failed % "", set_aside]
    assert cage.pending() == {}
    assert len(cage.dead_letters()) == 1


def test_about_ten_thousand_dead_letters_are_kept(cage):
    cage.set(DEAD_LETTER_LENGTH=100)  # Redis trims whole nodes, of 100 entries
    for number in range(300):
        cage.queue.xadd(index.DEAD_LETTER_STREAM, {"error": number})
    cage.queue.xadd(index.STREAM, {"no": "msg_data"})
    assert cage.main() == 1
    assert 100 < len(cage.dead_letters()) <= 200
    assert cage.dead_letters()[-1]["error"] == NO_OBJECT  # the old ones were removed


def test_an_event_whose_runs_all_died_is_a_dead_letter_and_is_not_delivered_again(cage):
    cage.deliver(cage.publish({}), deliveries=3)
    assert cage.main() == 1
    [letter] = cage.dead_letters()
    assert letter["error"] == "delivered 3 times, never acknowledged"


def test_a_pending_event_that_was_trimmed_is_skipped(cage):
    trimmed, kept = cage.publish({}), cage.publish({})
    cage.deliver(trimmed)
    cage.queue.xdel(index.STREAM, trimmed)
    assert cage.main() == 0
    assert cage.lines("WARNING") == [f"message {trimmed}: no longer in the queue, skipped"]
    assert f"message {kept}: delivery 1 of 3" in cage.log
    assert cage.pending() == {}


@pytest.mark.parametrize(
    ("lose", "end", "status", "reason"),
    [
        ("XTRIM events MAXLEN 0", "fail", 1, "no age given; no longer in the queue"),
        ("FLUSHALL", "be_stopped", 143, "stopped; no longer in the queue"),
    ],
)
def test_an_event_that_has_left_the_queue_is_a_dead_letter(cage, lose, end, status, reason):
    def process_event(event: dict) -> None:
        cage.queue.execute_command(*lose.split())
        time.sleep(0.2)  # for a renewal, which removes the pending entry on Redis 7
        getattr(cage, end)(event)

    cage.set(RENEW_SECONDS=0.05)
    message_id = cage.publish({"own": "field"})
    assert cage.main(process_event) == status
    [letter] = cage.dead_letters()
    assert (letter["message_id"], letter["error"]) == (message_id, reason)
    assert '"own": "field"' in letter["msg_data"]
    assert cage.pending() == {}


@pytest.mark.parametrize(
    ("error", "deliveries", "reason"),
    [
        pytest.param(process.EventRejected("no such bank"), 1, "no such bank", id="rejected"),
        pytest.param(process.ProcessingError("a\n\ud800"), 3, r"a \\ud800", id="its message"),
        pytest.param(ValueError("secret"), 3, r"ValueError at .*\.py:\d+ .*", id="its place"),
        pytest.param(SystemExit(0), 3, r"SystemExit at .*\.py:\d+ .*", id="exit()"),
    ],
)
def test_a_rejected_or_failed_event_is_a_dead_letter(cage, error, deliveries, reason):
    cage.deliver(cage.publish({}), deliveries=deliveries - 1)
    assert cage.main(mock.Mock(side_effect=error)) == 1
    assert re.fullmatch(reason, cage.dead_letters()[0]["error"])
    assert cage.pending() == {}
    assert "secret" not in "".join(cage.caplog.messages)


def test_an_unexpected_exception_in_the_entry_ends_the_run_with_one_line(cage):
    cage.patch.setattr(index, "renew", mock.Mock(side_effect=MemoryError("secret")))
    cage.set(RENEW_SECONDS=0.05)
    message_id = cage.publish({})
    assert cage.main(lambda event: time.sleep(60)) == 1
    assert re.fullmatch(r"MemoryError at \S+\.py:\d+", "\n".join(cage.lines("CRITICAL")))
    assert cage.pending() == {message_id: 1}


# 6: a late run
@pytest.mark.parametrize(("end", "status"), [("fail", 1), ("be_stopped", 143)])
@pytest.mark.parametrize("meanwhile", ["taken over", "finished"])
def test_a_run_that_was_frozen_leaves_the_event_alone(cage, meanwhile, end, status):
    def process_event(event: dict) -> None:
        cage.queue.xclaim(index.STREAM, index.GROUP, "other", 0, [message_id])
        if meanwhile == "finished":
            cage.queue.xack(index.STREAM, index.GROUP, message_id)
        getattr(cage, end)(event)

    message_id = cage.publish({})
    cage.deliver(message_id, deliveries=2)
    assert cage.main(process_event) == status
    assert f"message {message_id}: another run has it, or it is finished" in cage.log
    assert cage.dead_letters() == []
    assert cage.pending() == ({message_id: 4} if meanwhile == "taken over" else {})
    assert index.take_abandoned(index.connect()) is None


# 7
NAMES = ["DV_URL", "DV_TOKEN", "DV_APP_ID", "DV_CLIENT_ID"]
NAMES += ["REDIS_SERVICE_HOST", "REDIS_SERVICE_PORT"]


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        (dict.fromkeys(NAMES, ""), f"missing variables: {', '.join(NAMES)}"),
        ({"REDIS_SERVICE_PORT": "tcp://x"}, "REDIS_SERVICE_PORT is 'tcp://x', not a number"),
        ({"DV_URL": "http://127.0.0.1:9"}, r"GET \S+/activeUsers: ConnectionError"),
        ({"DV_TOKEN": "of-another"}, r"GET \S+/activeUsers answered 401"),
        ({"DV_APP_ID": "unknown"}, r"GET \S+/activeUsers answered 404"),
        ({"DV_APP_ID": ".."}, r"'\.\.' cannot be part of a URL"),
    ],
)
def test_what_would_fail_every_event_costs_none(cage, variables, reason):
    for name, value in variables.items():
        cage.patch.setenv(name, value)
    assert cage.main() == 1
    assert cage.queue.xinfo_consumers(index.STREAM, index.GROUP) == []  # nobody asked for an event
    assert re.fullmatch(f"not started: {reason}", "\n".join(cage.lines("ERROR")))


def test_403_for_the_list_of_users_does_not_stop_a_run(cage):
    cage.api.answers["GET activeUsers"] = [cage.response(403)]
    cage.publish({})
    assert cage.main() == 0


@pytest.mark.parametrize(
    ("variables", "status", "text"),
    [
        pytest.param({}, 0, "processed in", id="right"),
        pytest.param({"TLS_CAFILE": requests.certs.where()}, 1, "verify failed", id="wrong CA"),
        pytest.param({"REDIS_SERVICE_HOST": "localhost"}, 1, "mismatch", id="wrong host"),
    ],
)
def test_tls_is_verified(cage, variables, status, text):
    cage.set(RETRIES=3, RETRY_PAUSE_SECONDS=0.01)
    for name, value in (cage.server.tls | variables).items():
        cage.patch.setenv(name, value)
    cage.publish({})
    assert cage.main() == status
    assert text in cage.log
