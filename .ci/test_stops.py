"""Promise 4: SIGTERM and Ctrl-C end a run within two seconds, and the next run gets the event."""

import os
import subprocess
import sys
import time
from signal import SIGINT, SIGTERM
from unittest import mock

import pytest

import index
import process

IN_C = "ctypes.PyDLL(None).sleep(60)  # holds Python's lock"
RUN_A_TREE = "subprocess.run('sleep 60 & sh -c \"sleep 60; true\"; true', shell=True)"
IGNORE_SIGNALS = "for number in (2, 15): signal.signal(number, signal.SIG_IGN)"
JOIN_GROUP_OF_ENTRY = "os.setpgid(0, os.getpgid(os.getppid()))"


def assert_stopped(run, process_id: int, signal_number: int = SIGTERM) -> None:
    """Stop a run; it must end in time, say so, and leave no process."""
    started = time.monotonic()
    os.kill(process_id, signal_number)
    assert run.end() == 143, run.log
    assert time.monotonic() - started < 5  # two are promised, and a busy machine is slower
    assert run.leaves_nothing()
    assert "Traceback" not in run.log


@pytest.mark.parametrize(
    ("work", "at_import"),
    [
        pytest.param(IN_C, "", id="a call into C that holds the lock"),
        pytest.param(RUN_A_TREE, IGNORE_SIGNALS, id="programs that ignore the signals"),
        pytest.param(IN_C, JOIN_GROUP_OF_ENTRY, id="in the group of the entry"),
    ],
)
def test_a_stop_ends_a_run_whatever_the_algorithm_is_doing(cage, work, at_import):
    run = cage.start_work(work, at_import=at_import)
    assert_stopped(run, run.pid)
    assert run.log.endswith(f" WARNING message {run.message_id}: stopped\n")
    cage.assert_given_back(run.message_id)


def test_the_event_is_given_back_only_when_the_algorithm_has_ended(cage):
    run = cage.start_work("time.sleep(60)", at_import=IGNORE_SIGNALS)
    run.terminate()
    run.until(lambda: cage.pending() == {run.message_id: 0})
    assert run.children() == []


def test_ctrl_c_ends_a_run_that_imports_process_py(cage):
    cage.edit("open('importing', 'w'); time.sleep(60)")
    run = cage.start()
    run.until((cage.folder / "importing").exists)
    assert_stopped(run, -run.pid, SIGINT)  # as a terminal does, to the group in the foreground
    assert run.log == ""


def test_a_stop_ends_a_run_as_pid_1_that_imports_process_py(cage):
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]  # what follows runs as PID 1
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespace can be made here")
    start_a_tree = RUN_A_TREE.replace("run", "Popen")
    cage.edit(f"import subprocess; {start_a_tree}; open('importing', 'w'); time.sleep(60)")
    run = cage.start(*unshare, sys.executable, "index.py")
    run.until((cage.folder / "importing").exists)
    assert_stopped(run, run.children()[0])


def fill(pipe: int) -> None:
    """Fill it to the last byte, without waiting; the processes' own descriptors may wait."""
    descriptor = os.open(f"/proc/self/fd/{pipe}", os.O_WRONLY | os.O_NONBLOCK)
    with open(descriptor, "wb", buffering=0) as file:
        while file.write(b"-"):
            pass


def test_a_stop_ends_a_run_although_nobody_reads_its_log(cage):
    cage.edit("def process_event(event): time.sleep(60)")
    message_id = cage.publish({})
    _, pipe = os.pipe()
    run = cage.start(stdout=pipe)
    run.until(cage.pending)
    fill(pipe)
    assert_stopped(run, run.pid)
    cage.assert_given_back(message_id)


# In this process: what happens at one place in the entry
def test_a_stop_ends_a_run_that_waits(cage):
    cage.when(cage.is_waited_on, cage.stop)
    assert cage.main() == 143
    message_id = cage.publish({})
    assert cage.main() == 0
    assert f"message {message_id}: delivery 1 of 3" in cage.log


def test_a_second_stop_does_not_interrupt_the_first(cage):
    message_id = cage.publish({})
    cage.deliver(message_id, deliveries=2)  # so the run's is the last one
    assert cage.main(cage.be_stopped) == 143
    assert cage.lines("WARNING") == [f"message {message_id}: stopped"]
    cage.assert_given_back(message_id, deliveries=2)


def test_a_stop_in_the_middle_of_a_redis_command_gives_the_event_back(cage):
    def process_event(event: dict) -> None:
        cage.queue.client_pause(400, all=False)  # so the reply to a renewal is late
        cage.until(lambda: any("b" in client["flags"] for client in cage.queue.client_list()))
        cage.be_stopped(event)

    cage.set(RENEW_SECONDS=0.05)
    message_id = cage.publish({})
    assert cage.main(process_event) == 143
    cage.assert_given_back(message_id)


@pytest.mark.parametrize(
    ("process_event", "status", "letters"),
    [
        pytest.param(lambda event: None, 0, [], id="success"),
        pytest.param(mock.Mock(side_effect=process.EventRejected("x")), 1, ["x"], id="dead letter"),
    ],
)
def test_a_stop_after_the_work_comes_too_late(cage, process_event, status, letters):
    def acknowledge(*arguments: object) -> None:
        cage.stop()
        real_acknowledge(*arguments)

    real_acknowledge = index.redis.Redis.xack
    cage.patch.setattr(index.QueueClient, "xack", acknowledge)
    cage.publish({})
    assert cage.main(process_event) == status
    assert [letter["error"] for letter in cage.dead_letters()] == letters
    assert cage.pending() == {}
