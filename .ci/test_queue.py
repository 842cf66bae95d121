"""Promises 1 to 7: the queue."""

import functools
import os
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from signal import SIGCONT, SIGINT, SIGSTOP, SIGTERM

import pytest
import redis
import requests

import index
import process


def fail(event: dict) -> None:
    raise process.ProcessingError("no age given")


def be_stopped(*more_signals: int) -> None:
    for signal_number in (SIGTERM, *more_signals):
        os.kill(os.getpid(), signal_number)
        time.sleep(0.1)
    time.sleep(30)


def errors(cage) -> list[str]:
    return re.findall("(?m)^ERROR index (.*)", cage.log)


# 1: one event, the oldest one, however long it takes
def test_events_are_taken_in_turn_abandoned_ones_first_and_none_that_another_run_works_on(cage):
    cage.queue.delete(index.STREAM)  # with the group: they are published before the first start
    _, *held = [cage.publish({"number": number, "own": ["ë"]}) for number in range(300)]
    taken: list[dict] = []
    assert cage.main(taken.append) == 0
    cage.deliver(*held, idle_seconds=58)
    cage.deliver(*held[-2:])
    cage.publish({"number": 300, "own": ["ë"]})
    for _ in range(3):
        assert cage.main(taken.append) == 0
    assert [event["number"] for event in taken if event["own"] == ["ë"]] == [0, 298, 299, 300]
    assert cage.pending() == dict.fromkeys(held[:-2], 1)
    cage.pass_a_minute()
    cage.queue.client_pause(500, all=False)  # two see the same event, and claim it after the pause
    with ThreadPoolExecutor() as threads:
        claims = threads.map(lambda _: index.take_abandoned(index.connect()).id, range(2))
    assert sorted(claims) == held[:2]


def test_a_run_waits_without_cost_and_finds_an_event_as_it_is_abandoned(cage):
    assert index.WAIT_SECONDS + 2 <= index.SOCKET_TIMEOUT_SECONDS < 15
    cage.set(WAIT_SECONDS=0.4, SOCKET_TIMEOUT_SECONDS=0.8)
    message_id = cage.publish({})
    cage.deliver(message_id, idle_seconds=0)
    threading.Timer(1.5, cage.pass_a_minute).start()
    processor_seconds = time.process_time()
    assert cage.main() == 0
    assert time.process_time() - processor_seconds < 0.5
    assert f"message {message_id}: delivery 2 of 3" in cage.log
    assert "WARNING" not in cage.log


# 2: acknowledged when the work is done, claimed until then
def test_a_claim_is_renewed_while_a_run_works(cage):
    assert (index.CLAIM_SECONDS, index.RENEW_SECONDS, index.MAX_DELIVERIES) == (60, 5, 3)
    cage.set(CLAIM_SECONDS=0.8, RENEW_SECONDS=0.1)

    def work(event: dict) -> None:
        time.sleep(1.5)  # longer than a claim
        with index.connect() as queue:
            assert index.take_abandoned(queue) is None
        assert cage.pending() == {message_id: 1}  # a renewal is no delivery

    message_id = cage.publish({})
    assert cage.main(work) == 0


# 3: failures and dead letters
NO_OBJECT = "malformed: msg_data is not a JSON object in UTF-8"
NO_LIST = "malformed: userIds is not a list of strings"
NO_LISTS = (b'"secret"', b"{}", b"0", b"false", b"[1]", b'["secret", null]', b'[["a"]]')
NO_OBJECTS = (b"", b"null", b"7", b'["secret"]', b'"secret"', b"{secret", b'{"secret": "\xff"}')
NO_OBJECTS += ('{"a": 1}'.encode("utf-16"), b'{"a":' * 100_000, b'{"a": %s}' % (b"7" * 5_000))


def test_a_malformed_event_is_a_dead_letter_at_once_and_about_ten_thousand_are_kept(cage):
    payloads = {b'{"userIds": %s}' % value: NO_LIST for value in NO_LISTS}
    payloads |= dict.fromkeys(NO_OBJECTS, NO_OBJECT)
    for payload in payloads:
        cage.queue.xadd(index.STREAM, {"msg_data": payload, "error": "of an earlier delivery"})
        assert cage.main(fail) == 1
    with redis.Redis(port=cage.server.port) as queue:
        letters = [fields for _, fields in queue.xrange(index.DEAD_LETTER_STREAM)]
    found = [(letter[b"msg_data"], letter[b"error"].decode()) for letter in letters]
    assert found == [*payloads.items()]
    last_id = letters[-1][b"message_id"].decode()
    assert f"message {last_id}: set aside in events:dead-letter: {NO_OBJECT}" in cage.log
    assert "secret" not in cage.log
    assert index.DEAD_LETTER_LENGTH == 10_000
    cage.set(DEAD_LETTER_LENGTH=100)
    for _ in range(300):
        cage.queue.xadd(index.DEAD_LETTER_STREAM, {"msg_data": "{}"})
    cage.queue.xadd(index.STREAM, {"no": "msg_data"})
    assert cage.main() == 1
    assert 100 < len(cage.dead_letters()) <= 200  # Redis trims whole nodes, of 100 entries
    assert cage.dead_letters()[-1]["error"] == NO_OBJECT


@pytest.mark.parametrize("lost_by", ["xtrim", "flushall"])
@pytest.mark.parametrize("stopped", [False, True])
def test_an_event_that_fails_when_it_has_left_the_queue_is_a_dead_letter(cage, lost_by, stopped):
    def process_event(event: dict) -> None:
        cage.queue.flushall() if lost_by == "flushall" else cage.queue.xtrim(index.STREAM, 0)
        time.sleep(0.4)  # for a renewal, which removes the pending entry on Redis 7
        be_stopped() if stopped else fail(event)

    cage.set(RENEW_SECONDS=0.05)
    message_id = cage.publish({})
    assert cage.main(process_event) == (143 if stopped else 1)
    [letter] = cage.dead_letters()
    assert letter["error"] == f"{'stopped' if stopped else 'no age given'}; no longer in the queue"
    assert (letter["message_id"], letter["msg_data"][:9]) == (message_id, '{"msg_dt"')
    assert cage.pending() == {}


def test_pending_events_that_were_trimmed_are_skipped_and_those_that_killed_set_aside(cage):
    trimmed, kills = cage.publish({}), cage.publish({})
    cage.deliver(trimmed, kills, deliveries=3)
    cage.queue.xdel(index.STREAM, trimmed)
    assert cage.main() == 1
    assert f"WARNING index message {trimmed}: no longer in the queue, skipped" in cage.log
    [letter] = cage.dead_letters()
    assert letter["error"] == "delivered 3 times, never acknowledged"
    assert letter["message_id"] == kills
    assert cage.pending() == {}


EXITING = type("Exiting", (process.ProcessingError,), {"__str__": lambda error: exit()})
UNREADABLE = type("Unreadable", (process.ProcessingError,), {"__str__": None})
NEVER_RAN = "returned {}, so it never ran: remove async or yield"
TWICE_FOUR = "ZeroDivisionError at (<string>:1 work, ){4}…(, <string>:1 work){4}"
FAILURES = {
    "def work(*_): raise process.ProcessingError": r"ProcessingError at <string>:1 work",
    "def work(*_): raise process.ProcessingError('two\\nlines\\u2028 of it')": "two lines of it",
    "def work(*_): raise process.ProcessingError('of \\ud800')": "of (\ud800|\\\\ud800)",
    "work = int": r"(Type|Value)Error at (index|process)\.py:\d+ (run|work_in_turn)",
    "def work(*_): raise UNREADABLE": r"Unreadable at <string>:1 work",
    "def work(*_): raise EXITING": r"Exiting at <string>:1 work",
    "def work(*_): raise ValueError('secret')": r"ValueError at <string>:1 work",
    "def work(*_): raise KeyboardInterrupt('secret')": r"KeyboardInterrupt at <string>:1 work",
    "def work(*_): return 1 / 0 if len(_) > 30 else work(*_, 1)": TWICE_FOUR,
    "def work(*_): exit()": r"SystemExit at <string>:1 work, .*_sitebuiltins\S* __call__",
    "async def work(*_): pass": NEVER_RAN.format("coroutine"),
    "async def work(*_): yield": NEVER_RAN.format("async_generator"),
    "def work(*_): yield": NEVER_RAN.format("generator"),
}


@pytest.mark.filterwarnings("ignore:coroutine 'work' was never awaited")
def test_a_failure_of_any_kind_counts_as_one_and_has_a_reason(cage):
    for number, (code, reason) in enumerate(FAILURES.items()):
        exec(code, names := dict(globals()))
        message_id = cage.publish({})
        cage.deliver(message_id, deliveries=2)
        assert cage.main(names["work"]) == 1
        assert re.search(f"ERROR index message {message_id}: failed: {reason}\n", cage.log)
        assert re.fullmatch(reason, cage.dead_letters()[number]["error"])
        with pytest.raises(process.ProcessingError, match=f"^1 of 1 users failed: 'ann': {reason}"):
            process.for_each_user(["ann"], names["work"])
    assert "secret" not in "".join(cage.caplog.messages)


# 4: a stop
POOLS = ("multiprocessing.get_context('fork').Pool", "ProcessPoolExecutor", "ThreadPoolExecutor")
DOING = [
    "pass  # waiting",
    "pass  # checking the API",
    "time.sleep(60)",
    "while True: pass",
    "exec('while True:\\n try: time.sleep(60)\\n except: pass')",
    "asyncio.run(asyncio.to_thread(time.sleep, 60))",
    "subprocess.run(['sleep', '60'])",
    *(f"with {pool}(2) as pool: list(pool.map(time.sleep, [60, 60]))" for pool in POOLS),
]


@pytest.mark.parametrize("doing", DOING)
@pytest.mark.parametrize("signal_number", [SIGTERM, SIGINT])
def test_a_stop_ends_a_run_at_once_and_the_next_run_gets_the_event(cage, doing, signal_number):
    cage.edit(f"""
import asyncio, multiprocessing, subprocess
from concurrent.futures import ProcessPoolExecutor
def compute(user_id, data):
    logger.warning("works")
    {doing}""")
    message_id = "waiting" in doing or cage.publish({"userIds": ["ann"]})
    if "checking" in doing:
        cage.api.held.add("GET activeUsers")
    elif "waiting" not in doing:
        cage.deliver(message_id, deliveries=2)  # the run's is the third
    run = cage.start(start_new_session=True)
    states = {DOING[0]: cage.is_waited_on, DOING[1]: lambda: cage.api.requests}
    run.until(states.get(doing, lambda: " works\n" in run.log))
    time.sleep(0.1)
    started = time.monotonic()
    (os.killpg if signal_number == SIGINT else os.kill)(run.pid, signal_number)
    assert run.end() == 143, run.log
    assert time.monotonic() - started < 5
    os.system(f"kill -9 -{run.pid} 2>&-")  # what the algorithm has left
    assert "Traceback" not in run.log
    if doing not in states:
        assert f" WARNING message {message_id}: stopped\n" in run.log
        assert cage.pending() == {message_id: 2}
        assert cage.dead_letters() == []
        with index.connect() as queue:
            assert index.take_abandoned(queue).deliveries == 3


# 5: outages
@pytest.mark.parametrize("doing", ["starting", "waiting", "working", "done", "failing", "stopped"])
@pytest.mark.parametrize("kind", ["restart", "hang", "failover"])
def test_an_outage_is_survived_with_one_warning(cage, kind, doing):
    def outage() -> None:
        cage.until(cage.is_waited_on if doing == "waiting" else lambda: True)
        begin[kind]()
        began.set()
        cage.until(lambda: "unavailable" in cage.log)
        end[kind]()
        if doing == "waiting":
            cage.publish({})

    def process_event(event: dict) -> None:
        if not began.is_set():
            thread.start()
            began.wait()
        if doing == "working":
            thread.join()
        if doing in ("failing", "stopped"):
            fail(event) if doing == "failing" else be_stopped(SIGINT, SIGTERM)

    if kind == "failover" and doing in ("starting", "waiting"):
        pytest.skip("it ends the run")
    redis_process, fail_over = cage.server.process, cage.queue.replicaof
    begin = {"hang": lambda: redis_process.send_signal(SIGSTOP), "restart": cage.server.kill}
    begin["failover"] = lambda: fail_over("127.0.0.1", 9)
    end = {"hang": lambda: redis_process.send_signal(SIGCONT), "restart": cage.server.start}
    end["failover"] = lambda: fail_over("no", "one")
    cage.set(WAIT_SECONDS=0.2, SOCKET_TIMEOUT_SECONDS=0.5, CLAIM_SECONDS=1)
    cage.set(RENEW_SECONDS=0.05 if doing == "working" else 60)
    thread, began = threading.Thread(target=outage), threading.Event()
    if doing != "waiting":
        message_id = cage.publish({})
        cage.deliver(message_id, deliveries=2)
    if doing in ("starting", "waiting"):
        thread.start()
    assert cage.main(process_event) == {"failing": 1, "stopped": 143}.get(doing, 0)
    thread.join()
    [warning] = re.findall("WARNING index (?!message .* stopped)(.*)", cage.log)
    assert re.match(r"Redis is unavailable: \w", warning)
    assert cage.pending() == ({message_id: 2} if doing == "stopped" else {})
    assert len(cage.dead_letters()) == (doing == "failing")


@pytest.mark.parametrize("what", ["failover", "lost data", "outage", "outage while working"])
def test_what_is_not_survived_ends_the_run_with_one_error_and_loses_no_event(cage, what):
    def end(event: dict | None = None) -> None:
        cage.until(lambda: event or cage.is_waited_on())
        fail_over = functools.partial(cage.queue.replicaof, "127.0.0.1", 9)
        ends = {"failover": fail_over, "lost data": cage.queue.flushall}
        ends.get(what, cage.server.kill)()

    backoff = index.connect().get_retry()._backoff
    assert 60 < sum(map(backoff.compute, range(3, index.RETRIES + 1))) < 90
    cage.set(RETRIES=3, RETRY_PAUSE_SECONDS=0.01)
    if what == "outage while working":
        cage.publish({})
    else:
        threading.Thread(target=end).start()
    assert cage.main(end) == 1
    [error] = errors(cage)
    assert re.match(r"Redis: \w+: \w", error)
    assert cage.log.count("Redis is unavailable: Error") == ("outage" in what)
    cage.server.start() if "outage" in what else cage.queue.replicaof("no", "one")
    cage.publish({})
    assert cage.main() == 0
    assert len(cage.pending()) == (what == "outage while working")


def test_a_dead_letter_that_redis_refuses_stays_in_the_queue_and_is_not_quoted(cage):
    cage.server.kill()
    shutil.rmtree(cage.server.data)
    cage.server.start("--rename-command", "XADD", "RENAMED")
    payload = '{"userIds": "secret"}'
    index.create_group(cage.queue)
    refused = cage.queue.execute_command("RENAMED", index.STREAM, "*", "msg_data", payload)
    assert cage.main() == 1
    assert errors(cage) == ["Redis: ResponseError: unknown command 'XADD'"]
    assert cage.pending() == {refused: 1}


# 6: a late run
@pytest.mark.parametrize("deliveries", [1, 3])
@pytest.mark.parametrize("end", ["fails", "is stopped"])
@pytest.mark.parametrize("other", ["works on it", "has finished it"])
def test_a_run_that_was_frozen_leaves_the_event_alone(cage, deliveries, end, other):
    def process_event(event: dict) -> None:
        cage.queue.xclaim(index.STREAM, index.GROUP, "other", 0, [message_id])
        if other == "has finished it":
            cage.queue.xack(index.STREAM, index.GROUP, message_id)
        fail(event) if end == "fails" else be_stopped()

    message_id = cage.publish({})
    if deliveries > 1:
        cage.deliver(message_id, deliveries=deliveries - 1)
    assert cage.main(process_event) == (1 if end == "fails" else 143)
    assert f"message {message_id}: another run has it, or it is finished" in cage.log
    assert cage.dead_letters() == []
    for entry in cage.queue.xpending_range(index.STREAM, index.GROUP, "-", "+", 9):
        assert (entry["consumer"], entry["times_delivered"]) == ("other", deliveries + 1)
        assert entry["time_since_delivered"] < 50_000
    assert len(cage.pending()) == (other == "works on it")


# 7: what is found before an event is taken
def not_started(cage) -> str:
    cage.caplog.clear()
    cage.publish({})
    assert cage.main() == 1
    assert cage.queue.xinfo_consumers(index.STREAM, index.GROUP) == []  # nobody asked for an event
    [line] = errors(cage)
    return line.removeprefix("not started: ")


def test_what_would_fail_every_event_costs_none_but_403_for_the_users_does_not_stop_a_run(cage):
    names = ["DV_URL", "DV_TOKEN", "DV_APP_ID", "DV_CLIENT_ID"]
    names += ["REDIS_SERVICE_HOST", "REDIS_SERVICE_PORT"]
    with cage.patch.context() as patch:
        for name in names[:3]:
            patch.delenv(name)
        for name in names[3:]:
            patch.setenv(name, "")
        assert not_started(cage) == f"missing variables: {', '.join(names)}"
    url = process.DatavillageApi()._users_url
    for status in (401, 404, 503, 302):
        cage.api.answers["GET activeUsers"] = [cage.response(status, Location="http://[::1")] * 6
        assert not_started(cage) == f"GET {url} answered {status}"
    cage.api.answers["GET activeUsers"] = [cage.response(200, b"<html>", Content_Type="text/html")]
    assert not_started(cage) == f"GET {url} answered 200 with a web page"
    unusable = {"REDIS_SERVICE_PORT": "tcp:", "DV_APP_ID": "..", "DV_URL": "http://127.0.0.1:9"}
    for name, value in unusable.items():
        with cage.patch.context() as patch:
            patch.setenv(name, value)
            assert value in not_started(cage)
    cage.api.answers["GET activeUsers"] = [cage.response(403)]
    assert cage.main() == 0


def test_tls_is_verified(cage):
    cage.set(RETRIES=3, RETRY_PAUSE_SECONDS=0.01)
    cage.publish({})
    for variables, reason in (
        ({"TLS_CAFILE": requests.certs.where()}, "certificate verify failed"),
        ({"REDIS_SERVICE_HOST": "localhost"}, "mismatch"),
        ({"TLS_CAFILE": ""}, "Connection|reset"),
        ({"TLS_CAFILE": "/nowhere"}, "No such file"),
        ({}, None),
    ):
        local = {"REDIS_SERVICE_HOST": "127.0.0.1"}
        for name, value in (cage.server.tls | local | variables).items():
            cage.patch.setenv(name, value)
        assert cage.main() == (1 if reason else 0)
        assert not reason or re.search(f"Redis is unavailable: .*({reason})", cage.log)
