"""Promise 5: Redis is unavailable, fails over, cannot serve for a moment, or is full."""

import re
import shutil
from functools import partial
from signal import SIGCONT, SIGSTOP

import pytest
import redis

import index


def fail_over(cage) -> None:
    cage.queue.replicaof("127.0.0.1", 9)  # which makes it a replica, so read-only


@pytest.fixture
def outage(cage, request):
    """What makes Redis unavailable in one way, and what ends that."""
    cage.set(WAIT_SECONDS=0.1, SOCKET_TIMEOUT_SECONDS=0.3, RENEW_SECONDS=60)
    cage.set(RETRIES=500, RETRY_PAUSE_SECONDS=0.05)
    kill, set_ = cage.server.process.send_signal, cage.queue.config_set
    ways = {
        "restart": (cage.server.kill, cage.server.start),
        "hang": (partial(kill, SIGSTOP), partial(kill, SIGCONT)),
        "failover": (partial(fail_over, cage), partial(cage.queue.replicaof, "no", "one")),
        "noreplicas": [partial(set_, "min-replicas-to-write", number) for number in (1, 0)],
    }
    return ways[request.param]


def ways(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("outage", names, indirect=True)


def is_logged(cage) -> bool:
    return "WARNING index Redis is unavailable: " in cage.log


def assert_survived(cage) -> None:
    assert len(cage.lines("WARNING")) == 1
    assert cage.pending() == {}


@ways("restart", "hang", "failover")
def test_an_outage_is_survived_while_a_run_starts(cage, outage):
    cage.publish({})
    begin, end = outage
    begin()
    cage.when(partial(is_logged, cage), end)
    assert cage.main() == 0
    assert_survived(cage)


@ways("restart", "noreplicas")  # a failover ends the run
def test_an_outage_is_survived_while_a_run_waits(cage, outage):
    def end_and_publish() -> None:
        end()
        cage.publish({})

    begin, end = outage
    cage.when(cage.is_waited_on, begin)
    cage.when(partial(is_logged, cage), end_and_publish)
    assert cage.main() == 0
    assert_survived(cage)


@ways("restart", "failover")
def test_an_outage_is_survived_while_a_run_works(cage, outage):
    def process_event(event: dict) -> None:
        begin()
        cage.until(partial(is_logged, cage))
        end()

    begin, end = outage
    cage.set(RENEW_SECONDS=0.05)
    cage.publish({})
    assert cage.main(process_event) == 0
    assert_survived(cage)


@pytest.mark.parametrize(
    ("outage", "work", "status", "deliveries", "letters"),
    [
        ("failover", "succeed", 0, [], 0),
        ("noreplicas", "succeed", 0, [], 0),
        ("restart", "fail", 1, [], 1),
        ("hang", "be_stopped", 143, [2], 0),
        ("noreplicas", "be_stopped", 143, [2], 0),
    ],
    indirect=["outage"],
)
def test_an_outage_is_survived_at_the_end_of_a_run(cage, outage, work, status, deliveries, letters):
    def process_event(event: dict) -> None:
        begin()
        cage.when(partial(is_logged, cage), end)
        getattr(cage, work)(event)

    begin, end = outage
    message_id = cage.publish({})
    cage.deliver(message_id, deliveries=2)
    assert cage.main(process_event) == status
    assert is_logged(cage)
    assert list(cage.pending().values()) == deliveries
    assert len(cage.dead_letters()) == letters


def test_an_outage_is_survived_for_a_minute_and_not_for_much_longer(cage):
    pauses: list[float] = []
    cage.server.kill()
    with cage.patch.context() as patch:
        patch.setattr("redis.retry.sleep", pauses.append)
        assert cage.main() == 1
    assert 60 <= sum(pauses) <= index.CLAIM_SECONDS
    assert max(pauses) == 5  # so the end of the outage is noticed soon
    assert pauses[0] < 0.5
    assert len(cage.lines("WARNING")) == len(cage.lines("ERROR")) == 1


@pytest.mark.parametrize(
    ("reply", "retries"),
    [
        ("NOREPLICAS Not enough good replicas to write.", 5),
        ("MISCONF Redis is configured to save RDB snapshots", 5),
        ("BUSY Redis is busy running a script.", 5),
        ("CLUSTERDOWN Hash slot not served", 5),
        ("MASTERDOWN Link with MASTER is down", 5),
        ("READONLY You can't write against a read only replica.", 5),
        ("BUSYGROUP Consumer Group name already exists", 0),
        ("NOPERM this user has no permissions", 0),
        ("ERR unknown command; not MISCONF or NOREPLICAS", 0),
    ],
)
def test_only_errors_that_pass_are_retried(cage, reply, retries):
    pauses: list[float] = []
    cage.set(RETRIES=5)
    with cage.patch.context() as patch, pytest.raises(redis.RedisError):
        patch.setattr("redis.retry.sleep", pauses.append)
        index.connect().eval("return redis.error_reply(ARGV[1])", 0, reply)
    assert len(pauses) == retries


@pytest.mark.parametrize("what", ["failover", "lost data", "outage"])
def test_a_failover_lost_data_or_a_longer_outage_while_a_run_waits_ends_it(cage, what):
    causes = {"failover": partial(fail_over, cage), "lost data": cage.queue.flushall}
    cage.set(RETRIES=3, RETRY_PAUSE_SECONDS=0.01)
    cage.when(cage.is_waited_on, causes.get(what, cage.server.kill))
    assert cage.main() == 1
    assert re.fullmatch(r"Redis: \w+: \w.*", "\n".join(cage.lines("ERROR")))


@pytest.mark.parametrize(("end", "status"), [("succeed", 1), ("be_stopped", 143)])
def test_a_longer_outage_at_the_end_of_a_run_leaves_the_event_in_the_queue(cage, end, status):
    def process_event(event: dict) -> None:
        cage.server.kill()
        getattr(cage, end)(event)

    cage.set(RETRIES=3, RETRY_PAUSE_SECONDS=0.01)
    message_id = cage.publish({})
    assert cage.main(process_event) == status
    assert re.fullmatch(r"Redis: ConnectionError: \w.*", "\n".join(cage.lines("ERROR")))
    cage.server.start()
    assert cage.pending() == {message_id: 1}


def test_a_dead_letter_that_redis_refuses_stays_in_the_queue_and_is_not_quoted(cage):
    cage.server.kill()
    shutil.rmtree(cage.server.data)
    cage.server.start("--rename-command", "XADD", "RENAMED")
    payload = '{"userIds": "secret"}'
    index.create_group(cage.queue)
    refused = cage.queue.execute_command("RENAMED", index.STREAM, "*", "msg_data", payload)
    assert cage.main() == 1
    assert cage.lines("ERROR") == ["Redis: ResponseError: unknown command 'XADD'"]
    assert cage.pending() == {refused: 1}


def test_the_events_in_a_full_redis_are_processed_and_given_back(cage):
    cage.publish({})
    stopped = cage.publish({})
    cage.queue.config_set("maxmemory", 1)
    assert [cage.main(), cage.main(cage.be_stopped)] == [0, 143]
    cage.assert_given_back(stopped)
