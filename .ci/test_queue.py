"""Promises 1, 2, 3, 6 and 7: events, dead letters, late runs, and what stops a run at its start."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest

import index
import process

NO_OBJECT = "malformed: msg_data is not a JSON object in UTF-8"
NO_LIST = "malformed: userIds is not a list of strings"
MALFORMED = {
    "list": (b'["secret"]', NO_OBJECT),
    "no JSON": (b"{secret", NO_OBJECT),
    "Latin-1": (b'{"secret": "\xff"}', NO_OBJECT),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), NO_OBJECT),
    "deeply nested": (b'{"a":' * 100_000, NO_OBJECT),
    "userIds: string": (b'{"userIds": "secret"}', NO_LIST),
    "userIds: false": (b'{"userIds": false}', NO_LIST),
    "userIds: with null": (b'{"userIds": ["secret", null]}', NO_LIST),
}
FAILURES = {  # what process_event raises, the delivery, and the reason
    "rejected": (process.EventRejected("no such bank"), 1, "no such bank"),
    "its message": (process.ProcessingError("a\n\ud800"), 3, r"a \\ud800"),
    "its place": (ValueError("secret"), 3, r"ValueError at .*\.py:\d+ .*"),
    "exit()": (SystemExit(0), 3, r"SystemExit at .*\.py:\d+ .*"),
    "not called": (None, 4, "delivered 3 times, never acknowledged"),
}
LOSSES = [("XTRIM events MAXLEN 0", "fail", 1), ("FLUSHALL", "be_stopped", 143)]
MEANWHILE = {"XCLAIM events consummers another 0": [4], "XACK events consummers": []}
NAMES = "DV_URL, DV_TOKEN, DV_APP_ID, DV_CLIENT_ID, REDIS_SERVICE_HOST, REDIS_SERVICE_PORT"
WRONG = {
    f"missing variables: {NAMES}": dict.fromkeys(NAMES.split(", "), ""),
    "REDIS_SERVICE_PORT is 'tcp://x', not a number": {"REDIS_SERVICE_PORT": "tcp://x"},
    r"GET \S+/activeUsers: ConnectionError": {"DV_URL": "http://127.0.0.1:9"},
    r"GET \S+/activeUsers answered 401": {"DV_TOKEN": "of-another"},
    r"GET \S+/c%23/applications/a%2F1/\w+ answered 404": {"DV_APP_ID": "a/1", "DV_CLIENT_ID": "c#"},
}
TLS = {
    "right": ({}, 0, "processed in"),
    "wrong CA": ({"TLS_CAFILE": process.requests.certs.where()}, 1, "verify failed"),
    "wrong host": ({"REDIS_SERVICE_HOST": "localhost"}, 1, "mismatch"),
}


def test_the_documented_times():
    assert (index.CLAIM_SECONDS, index.RENEW_SECONDS, index.MAX_DELIVERIES) == (75, 5, 3)
    assert index.WAIT_SECONDS + 2 <= index.SOCKET_TIMEOUT_SECONDS <= 10  # or a wait is an outage
    assert index.CLEAN_UP_SECONDS <= 1.5  # so a stop takes at most two seconds
    assert (process.WORKERS, process.PROGRESS_SECONDS) == (16, 30)
    assert process.DatavillageApi.TIMEOUT_SECONDS == (5, 60)


def test_events_published_before_the_first_start_are_taken_in_turn_with_all_that_they_hold(cage):
    cage.queue.delete("events")  # with the group
    events = [{"msg_dt": "1", "own": ["ë"]}, {"msg_dt": "2", "userIds": None}]
    for event in events:
        cage.publish(event)
    taken: list[dict] = []
    assert [cage.main(taken.append), cage.main(taken.append)] == [0, 0]
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
    cage.set(WAIT_SECONDS=0.3, SOCKET_TIMEOUT_SECONDS=2)  # in the order of the real ones
    cage.deliver(cage.publish({}), idle_seconds=0)
    threading.Timer(0.8, cage.pass_a_minute).start()
    processor_seconds = time.process_time()
    assert cage.main() == 0
    assert time.process_time() - processor_seconds < 0.4
    assert cage.lines("WARNING") == []


@pytest.mark.parametrize(("payload", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_event_is_a_dead_letter_at_once_and_is_not_quoted(cage, payload, reason):
    fields = {b"own": b"field", b"msg_data": payload}
    message_id = cage.queue.xadd("events", fields | {"error": "of an earlier delivery"})
    assert cage.main() == 1
    [(_, letter)] = index.connect().xrange("events:dead-letter")
    assert letter == {**fields, b"error": reason.encode(), b"message_id": message_id.encode()}
    assert cage.pending() == {}
    assert "secret" not in cage.log


def test_a_failed_event_is_delivered_three_times_and_then_a_dead_letter(cage):
    message_id = cage.publish({})
    for deliveries in (1, 2):
        assert cage.main(cage.fail) == 1
        assert cage.pending() == {message_id: deliveries}
        assert index.take_abandoned(index.connect()) is None  # it has to wait
        cage.pass_a_minute()
    assert cage.main(cage.fail) == 1
    again = "delivered again in 75 s, because it failed"
    texts = [again, again, "failed", "set aside in events:dead-letter"]
    assert cage.lines("ERROR") == [f"message {message_id}: {text}: no age given" for text in texts]


def test_an_event_is_one_dead_letter_although_its_run_died_when_it_had_written_it(cage):
    message_id = cage.publish({})
    cage.deliver(message_id, deliveries=3)
    letter = {"error": "no age given", "message_id": message_id}
    cage.queue.xadd("events:dead-letter", letter)
    assert cage.main() == 1
    assert cage.dead_letters() == [letter]


@pytest.mark.parametrize(("error", "delivery", "reason"), FAILURES.values(), ids=FAILURES)
def test_a_dead_letter_says_why_the_event_failed_and_quotes_nothing(cage, error, delivery, reason):
    cage.deliver(cage.publish({}), deliveries=delivery - 1)
    assert cage.main(mock.Mock(side_effect=error)) == 1
    assert re.fullmatch(reason, cage.dead_letters()[0]["error"])
    assert "secret" not in "".join(cage.caplog.messages)


def test_about_ten_thousand_dead_letters_are_kept(cage):
    cage.queue.eval("for n=1,10200 do redis.call('XADD', 'events:dead-letter', '*', 'n', n) end", 0)
    cage.queue.xadd("events", {"no": "msg_data"})
    assert cage.main() == 1
    assert 10_000 < cage.queue.xlen("events:dead-letter") <= 10_100  # Redis trims by the hundred


def test_a_pending_event_that_was_trimmed_is_skipped(cage):
    trimmed, _ = cage.publish({}), cage.publish({})
    cage.deliver(trimmed)
    cage.queue.xdel("events", trimmed)
    assert cage.main() == 0
    assert cage.lines("WARNING") == [f"message {trimmed}: no longer in the queue, skipped"]
    assert cage.pending() == {}


@pytest.mark.parametrize(("loss", "end", "status"), LOSSES)
def test_an_event_that_has_left_the_queue_is_a_dead_letter(cage, loss, end, status):
    def process_event(event: dict) -> None:
        cage.queue.execute_command(*loss.split())
        time.sleep(0.2)  # for a renewal, which removes the pending entry on Redis 7
        getattr(cage, end)(event)

    cage.set(RENEW_SECONDS=0.05)
    message_id = cage.publish({"msg_dt": "1"})
    assert cage.main(process_event) == status
    [letter] = cage.dead_letters()
    assert letter.pop("error").endswith("; no longer in the queue")
    assert letter == {"msg_data": '{"msg_dt": "1"}', "message_id": message_id}


def test_an_unexpected_exception_in_the_entry_ends_the_run_with_one_line(cage):
    cage.patch.setattr(index, "renew", mock.Mock(side_effect=MemoryError("secret")))
    cage.set(RENEW_SECONDS=0.05)
    message_id = cage.publish({})
    assert cage.main(lambda event: time.sleep(60)) == 1
    assert re.fullmatch(r"MemoryError at \S+\.py:\d+", "\n".join(cage.lines("CRITICAL")))
    assert cage.pending() == {message_id: 1}


@pytest.mark.parametrize(("end", "status"), [("fail", 1), ("be_stopped", 143)])
@pytest.mark.parametrize(("meanwhile", "left"), MEANWHILE.items())
def test_a_run_that_was_frozen_leaves_the_event_alone(cage, meanwhile, left, end, status):
    def process_event(event: dict) -> None:
        cage.queue.execute_command(*meanwhile.split(), message_id)
        getattr(cage, end)(event)

    message_id = cage.publish({})
    cage.deliver(message_id, deliveries=2)
    assert cage.main(process_event) == status
    assert f"message {message_id}: another run has it, or it is finished" in cage.log
    assert list(cage.pending().values()) == left


@pytest.mark.parametrize(("reason", "variables"), WRONG.items())
def test_what_would_fail_every_event_costs_none(cage, reason, variables):
    for name, value in variables.items():
        cage.patch.setenv(name, value)
    assert cage.main() == 1
    assert cage.queue.xinfo_consumers("events", "consummers") == []  # nobody asked for an event
    assert re.fullmatch(f"not started: {reason}", "\n".join(cage.lines("ERROR")))


def test_403_for_the_list_of_users_does_not_stop_a_run(cage):
    cage.api.answer = {"GET activeUsers": 403}.get
    cage.publish({})
    assert cage.main() == 0


@pytest.mark.parametrize(("variables", "status", "text"), TLS.values(), ids=TLS)
def test_tls_is_verified(cage, variables, status, text):
    cage.set(RETRIES=3, RETRY_PAUSE_SECONDS=0.01)
    for name, value in (cage.server.tls | variables).items():
        cage.patch.setenv(name, value)
    cage.publish({})
    assert cage.main() == status
    assert text in cage.log
