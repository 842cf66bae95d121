"""Promise 5: Redis is unavailable, fails over, cannot serve for a moment, or is full."""

import re
from functools import partial
from signal import SIGCONT, SIGSTOP
from unittest import mock

import pytest
import redis

import index

ENDS = [("succeed", 0, [], 0), ("fail", 1, [], 1), ("be_stopped", 143, [2], 0)]
PASS = ["NOREPLICAS", "MISCONF", "BUSY", "CLUSTERDOWN", "MASTERDOWN", "READONLY"]


@pytest.fixture(params=["restart", "hang", "failover"])
def outage(cage, request):
    """What makes Redis unavailable in one way until that is logged; then an event is published."""

    def begin_outage() -> None:
        begin()
        cage.when(partial(cage.lines, "WARNING"), end_and_publish)

    def end_and_publish() -> None:
        end()
        cage.publish({})

    cage.set(WAIT_SECONDS=0.1, SOCKET_TIMEOUT_SECONDS=0.3, RETRIES=500, RETRY_PAUSE_SECONDS=0.05)
    kill, replicate = cage.server.process.send_signal, cage.queue.replicaof
    ways = {
        "restart": (cage.server.kill, cage.server.start),
        "hang": (partial(kill, SIGSTOP), partial(kill, SIGCONT)),
        "failover": (partial(replicate, "127.0.0.1", 9), partial(replicate, "no", "one")),
    }
    begin, end = ways[request.param]
    return begin_outage


def test_an_outage_is_survived_while_a_run_starts(cage, outage):
    outage()
    assert cage.main() == 0
    assert cage.lines("WARNING")[0].startswith("Redis is unavailable: ")


@pytest.mark.parametrize("outage", ["restart"], indirect=True)  # a failover ends the run
def test_an_outage_is_survived_while_a_run_waits(cage, outage):
    cage.when(cage.is_waited_on, outage)
    assert cage.main() == 0


def test_an_outage_is_survived_while_a_run_works(cage, outage):
    def process_event(event: dict) -> None:
        outage()
        cage.until(partial(cage.lines, "WARNING"))

    cage.set(RENEW_SECONDS=0.05)
    cage.publish({})
    assert cage.main(process_event) == 0
    assert cage.pending() == {}


@pytest.mark.parametrize(("work", "status", "pending", "letters"), ENDS)
def test_an_outage_is_survived_at_the_end_of_a_run(cage, outage, work, status, pending, letters):
    def process_event(event: dict) -> None:
        outage()
        getattr(cage, work)(event)

    cage.deliver(cage.publish({}), deliveries=2)
    assert cage.main(process_event) == status
    assert list(cage.pending().values()) == pending
    assert len(cage.dead_letters()) == letters


@pytest.mark.parametrize(("end", "status"), [("succeed", 1), ("be_stopped", 143)])
def test_an_outage_of_over_a_minute_ends_the_run_but_costs_no_event(cage, end, status):
    def process_event(event: dict) -> None:
        cage.server.kill()
        getattr(cage, end)(event)

    pauses: list[float] = []
    message_id = cage.publish({})
    with mock.patch("redis.retry.sleep", pauses.append):
        assert cage.main(process_event) == status
    assert 60 <= sum(pauses) <= index.CLAIM_SECONDS
    assert max(pauses) == 5  # so the end of the outage is noticed soon
    assert pauses[0] < 0.5
    assert len(cage.lines("WARNING")) == 1
    assert re.fullmatch(r"Redis: ConnectionError: \w.*", "\n".join(cage.lines("ERROR")))
    cage.server.start()
    assert cage.pending() == {message_id: 1}


@pytest.mark.parametrize("code", [*PASS, "BUSYGROUP", "NOPERM", "ERR not MISCONF or NOREPLICAS"])
def test_only_errors_that_pass_are_retried(cage, code):
    pauses: list[float] = []
    cage.set(RETRIES=5)
    with mock.patch("redis.retry.sleep", pauses.append), pytest.raises(redis.RedisError):
        index.connect().eval("return redis.error_reply(ARGV[1])", 0, f"{code} for a moment")
    assert len(pauses) == 5 * (code in PASS)


@pytest.mark.parametrize("command", ["REPLICAOF 127.0.0.1 9", "FLUSHALL"])
def test_a_failover_or_lost_data_while_a_run_waits_ends_it(cage, command):
    cage.when(cage.is_waited_on, partial(cage.queue.execute_command, *command.split()))
    assert cage.main() == 1
    assert re.fullmatch(r"Redis: \w+: \w.*", "\n".join(cage.lines("ERROR")))


def test_a_dead_letter_that_redis_refuses_stays_in_the_queue_and_is_not_quoted(cage):
    def refuse(queue: redis.Redis, stream: str, letter: dict, **_: int) -> None:
        queue.execute_command("REFUSED", *letter.values())

    message_id = cage.queue.xadd("events", {"msg_data": '{"userIds": "secret"}'})
    cage.patch.setattr(index.QueueClient, "xadd", refuse)
    assert cage.main() == 1
    assert cage.lines("ERROR") == ["Redis: ResponseError: unknown command 'REFUSED'"]
    assert cage.pending() == {message_id: 1}


def test_the_events_in_a_full_redis_are_processed_and_given_back(cage):
    _, stopped = cage.publish({}), cage.publish({})
    cage.queue.config_set("maxmemory", 1)
    assert [cage.main(), cage.main(cage.be_stopped)] == [0, 143]
    cage.assert_given_back(stopped)
