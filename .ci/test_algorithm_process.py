"""Promises 8, 9, 10 and 13, and 2 in a call into C: the algorithm's process."""

import os
import re
import signal

import pytest

WORK = "def process_event(event):"
HOLD_THE_CHANNEL = "ctypes.CDLL(None).fork() or time.sleep(60)  # in a process forked by C code"
START_A_TREE = "subprocess.Popen('sleep 60 & sleep 60', shell=True)"
START_A_THREAD = "threading.Thread(target=time.sleep, args=[60]).start()"
MAKE_A_FOLDER = [
    "logger.warning('made %s', multiprocessing.util.get_temp_dir())",
    "multiprocessing.util.Finalize(None, time.sleep, [0.1], exitpriority=1)  # takes a moment",
]
MAKE_SHARED_MEMORY = [
    "memory = multiprocessing.shared_memory.SharedMemory(create=True, size=9)",
    "lock = multiprocessing.get_context('spawn').Lock()",
    "logger.warning('made /dev/shm/%s made /dev/shm/sem.%s', memory.name, lock._semlock.name[1:])",
    "os.kill(os.getppid(), 15)",
    "time.sleep(60)",
]
CONFIGURE_LOGGING = ["logging.config.dictConfig({'version': 1})", "logging.disable()"]
CONFIGURE_LOGGING += ["logging.basicConfig(force=True)", "logging.getLogger('index').setLevel(99)"]
MEDDLE = """
import redis, socket, sys, warnings
redis.Redis.xack = redis.Redis.xclaim = None
socket.setdefaulttimeout(0.0001)
sys.setrecursionlimit(80)
warnings.simplefilter("error")
for number in (2, 15, 17): signal.signal(number, signal.SIG_IGN)
"""
MADE = {
    "at a success": ([START_A_TREE, START_A_THREAD], 0, 0),
    "at a kill": ([START_A_TREE, "os.kill(os.getppid(), 9)", "time.sleep(60)"], -9, 0),
    "a folder": (MAKE_A_FOLDER, 0, 1),
    "shared memory at a stop": (MAKE_SHARED_MEMORY, 143, 2),
}
STATE = "gc.isenabled(), signal.getsignal(15), signal.pthread_sigmask(0, ())"
DEATHS = {
    "os._exit(0)": "not started: process.py ended: status 0",
    "raise RuntimeError('of the author')": "RuntimeError: of the author",
    "raise SystemExit": "ImportError: process.py called exit()",
    f"{WORK} ctypes.string_at(0)": "process.py ended: killed by SIGSEGV",
    f"{WORK}\n {HOLD_THE_CHANNEL}\n os.abort()": "process.py ended: killed by SIGABRT",
    f"{WORK} raise ProcessingError(threading.current_thread().name)": "MainThread",
    f"{WORK} raise ProcessingError({STATE})": "(True, <Handlers.SIG_DFL: 0>, set())",
}


def test_a_claim_is_renewed_during_a_call_into_c_that_holds_pythons_lock(cage):
    cage.set(RENEW_SECONDS=0.1)
    run = cage.start_work("ctypes.PyDLL(None).sleep(60)  # holds Python's lock")
    owners = [{"name": os.uname().nodename, "pending": 1}]  # so an operator sees where it is
    for _ in range(3):
        cage.pass_a_minute()  # which gives the claim to another consumer
        run.until(lambda: cage.queue.xpending("events", "consummers")["consumers"] == owners)
    assert cage.pending() == {run.message_id: 1}  # a renewal is no delivery
    assert cage.queue.xpending_range("events", "consummers", "-", "+", 9, idle=70_000) == []


@pytest.mark.parametrize(("code", "last_words"), DEATHS.items(), ids=DEATHS.values())
def test_the_log_says_how_the_algorithm_ended(cage, code, last_words):
    cage.set(RENEW_SECONDS=0.3, MAX_DELIVERIES=1)
    cage.edit(f"import ctypes, gc, signal\n{code}")
    cage.publish({})
    run = cage.start()
    assert run.end() == 1
    assert run.log.endswith(f"{last_words}\n")


@pytest.mark.parametrize("number", [0, 1])
def test_a_run_whose_algorithm_dies_while_it_waits_ends_and_takes_no_event(cage, number):
    cage.set(WAIT_SECONDS=0.3)
    run = cage.start()
    run.until(cage.is_waited_on)
    run.send_signal(signal.SIGSTOP)  # so that it sees both at once
    [algorithm] = run.processes() - {run.pid}
    os.kill(algorithm, signal.SIGKILL)
    tasks = f"/proc/{algorithm}/task"  # threads may outlive the zombie, which then is not reaped
    cage.until(lambda: run.processes() == {run.pid} and len(os.listdir(tasks)) == 1)
    message_ids = [cage.publish({}) for _ in range(number)]
    run.send_signal(signal.SIGCONT)
    assert run.end() == 1
    assert run.log.endswith(" ERROR no event taken: process.py ended: killed by SIGKILL\n")
    assert cage.pending() == dict.fromkeys(message_ids, 0)


@pytest.mark.parametrize(("work", "status", "number"), MADE.values(), ids=MADE)
def test_nothing_that_the_algorithm_made_outlives_the_run(cage, work, status, number):
    run = cage.start_work(*work)
    assert run.end() == status
    run.assert_leaves_nothing()
    made = re.findall(r" made (\S+)", run.log)
    assert [os.path.exists(path) for path in made] == [False] * number


def test_what_is_done_at_import_or_to_logging_does_no_harm(cage):
    work = [*CONFIGURE_LOGGING, "logger.warning('mine')", "raise ProcessingError('x')"]
    run = cage.start_work(*work, at_import="\n".join([*CONFIGURE_LOGGING, MEDDLE, START_A_THREAD]))
    assert run.end() == 1
    assert " WARNING mine\n" in run.log
    assert run.log.endswith("delivered again in 75 s, because it failed: x\n")


def test_the_entry_forks_without_threads_and_without_warnings(cage):
    cage.publish({})
    run = cage.start(variables={"PYTHONWARNINGS": "error"})
    assert run.end() == 0
    assert "Warning" not in run.log
