"""Promises 8, 9, 10 and 13, and 2 in a call into C: the algorithm's process."""

import os
import re
import signal
import sys

import pytest

import index

START_A_PROGRAM = "subprocess.Popen(['sleep', '60'])"
START_A_TREE = "subprocess.Popen('sleep 60 & sleep 60', shell=True)"
START_A_THREAD = "threading.Thread(target=time.sleep, args=[60]).start()"
HOLD_THE_CHANNEL = "ctypes.CDLL(None).fork() or time.sleep(60)  # in a process forked by C code"
CONFIGURE_LOGGING = """logging.config.dictConfig({"version": 1})
logging.basicConfig(force=True)
logging.getLogger("index").setLevel(99)
logging.disable()"""
MEDDLE = """
warnings.simplefilter("error")
socket.setdefaulttimeout(0.0001)
sys.setrecursionlimit(80)
for number in (2, 15, 17): signal.signal(number, signal.SIG_IGN)
import redis; redis.Redis.xack = redis.Redis.xclaim = None
os.chdir("/")
"""


# 2
def test_a_claim_is_renewed_during_a_call_into_c_that_holds_pythons_lock(cage):
    cage.set_in_copy("RENEW_SECONDS", 0.1)
    cage.start_work("ctypes.PyDLL(None).sleep(60)  # holds Python's lock")
    cage.wait_for_renewals()
    assert list(cage.pending().values()) == [1]


# 8 and 13
@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (["ctypes.string_at(0)"], "process.py ended: killed by SIGSEGV"),
        (["os._exit(0)"], "process.py ended: status 0"),
        ([HOLD_THE_CHANNEL, "os.abort()"], "process.py ended: killed by SIGABRT"),
        (["raise ProcessingError(f'collector: {gc.isenabled()}')"], "collector: True"),
        (["signal.setitimer(signal.ITIMER_REAL, 0.05)", "time.sleep(60)"], "an alarm"),
    ],
)
def test_the_log_and_the_dead_letter_say_how_the_algorithm_ended(cage, work, reason):
    cage.set_in_copy("RENEW_SECONDS", 0.3)
    cage.set_in_copy("MAX_DELIVERIES", 1)
    ring = "def ring(*_): raise ProcessingError('an alarm')\n"
    ring += "signal.signal(signal.SIGALRM, ring)"
    run = cage.start_work(*work, at_import=ring)
    assert run.end() == 1
    assert f": failed: {reason}\n" in run.log
    assert [letter["error"] for letter in cage.dead_letters()] == [reason]
    assert run.leaves_nothing()


def test_a_run_whose_algorithm_dies_while_it_waits_ends_and_takes_no_event(cage):
    cage.set_in_copy("WAIT_SECONDS", 0.3)
    run = cage.start()
    run.until(cage.is_waited_on)
    os.kill(run.children()[0], signal.SIGKILL)
    assert run.end() == 1
    assert run.log.endswith(" ERROR no event taken: process.py ended: killed by SIGKILL\n")


def test_an_event_published_after_the_algorithm_died_is_given_back(cage):
    run = cage.start()
    run.until(cage.is_waited_on)
    run.send_signal(signal.SIGSTOP)  # so that it sees both at once
    os.kill(run.children()[0], signal.SIGKILL)
    cage.until(lambda: not run.children())
    message_id = cage.publish({})
    run.send_signal(signal.SIGCONT)
    assert run.end() == 1
    cage.assert_given_back(message_id)


@pytest.mark.parametrize(
    ("code", "last_line"),
    [
        ("os._exit(7)", " ERROR not started: process.py ended: status 7\n"),
        ("raise RuntimeError('of the author')", "\nRuntimeError: of the author\n"),
    ],
)
def test_a_process_py_that_cannot_be_imported_costs_no_event(cage, code, last_line):
    cage.edit(code)
    run = cage.start()
    assert run.end() == 1
    assert run.log.endswith(last_line)
    assert cage.queue.xinfo_consumers(index.STREAM, index.GROUP) == []


# 9
def test_nothing_that_the_algorithm_has_started_outlives_the_run_or_holds_it_up(cage):
    run = cage.start_work(START_A_PROGRAM, START_A_TREE, START_A_THREAD)
    assert run.end() == 0
    assert run.leaves_nothing()


def test_no_shared_memory_and_no_semaphore_is_left_after_a_stop(cage):
    run = cage.start_work(
        "from multiprocessing import shared_memory",
        "memory = shared_memory.SharedMemory(create=True, size=9)",
        "lock = multiprocessing.get_context('spawn').Lock()",
        "logger.warning('made %s %s', memory.name, lock._semlock.name)",
        "os.kill(os.getppid(), 15)",
        "time.sleep(60)",
    )
    assert run.end() == 143
    assert run.leaves_nothing()
    [names] = re.findall(r" made /?(\S+) /(\S+)\n", run.log)
    assert [file for file in os.listdir("/dev/shm") if file.endswith(names)] == []


def test_no_temporary_folder_is_left_after_a_success(cage, tmp_path):
    run = cage.start_work(
        "from multiprocessing import util",
        "logger.warning(util.get_temp_dir())",
        "util.Finalize(None, time.sleep, [0.1], exitpriority=1)  # a pool takes a moment to end",
        variables={"TMPDIR": str(tmp_path)},
    )
    assert run.end() == 0
    assert f" WARNING {tmp_path}/pymp-" in run.log
    assert list(tmp_path.glob("pymp-*")) == []


def test_the_algorithm_ends_with_the_entry(cage):
    run = cage.start_work(START_A_PROGRAM, "time.sleep(60)")
    run.until(lambda: len(run.processes()) == 2)
    run.kill()
    run.wait()
    assert run.leaves_nothing()


# 10
def test_what_is_done_at_import_or_to_logging_does_no_harm(cage):
    work = [*CONFIGURE_LOGGING.split("\n"), "logger.warning('mine')", "raise ProcessingError('x')"]
    run = cage.start_work(*work, at_import=CONFIGURE_LOGGING + MEDDLE + START_A_THREAD)
    assert run.end() == 1
    assert " WARNING mine\n" in run.log
    assert run.log.endswith("delivered again in 75 s, because it failed: x\n")
    assert run.leaves_nothing()


def test_the_entry_forks_without_threads_and_without_warnings(cage):
    cage.publish({})
    run = cage.start(sys.executable, "-W", "error", "index.py")
    assert run.end() == 0
    assert "Warning" not in run.log
