"""Take one event from the cage's Redis queue, hand it to process.py, acknowledge it, exit.

Delivery is at least once: an event is acknowledged only when process.py has finished it. Until then
this run holds a claim on it. If the run fails or dies, a later run gets the event. A malformed
event, or one that failed MAX_DELIVERIES times, becomes a dead letter.

process.py runs in a child process, so that nothing in it can lose a claim or hold up a stop.

Exit status: 0, the event was processed; 1, it failed, or none was taken, and the log says why;
143, stopped by SIGTERM or Ctrl-C: the next run gets the event.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until Algorithm forks: it would take a tenth of the start

import _thread
import contextlib
import encodings.idna  # noqa: F401 - for addresses; later, both processes would import it: 2 ms
import json
import logging
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TextIO

import redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import ClusterDownError
from redis.retry import Retry

API_VARIABLES = ("DV_URL", "DV_TOKEN", "DV_APP_ID", "DV_CLIENT_ID")
REDIS_VARIABLES = ("REDIS_SERVICE_HOST", "REDIS_SERVICE_PORT")
STREAM = "events"
GROUP = "consummers"  # the platform's spelling
CONSUMER = socket.gethostname()  # shows in XPENDING where an event is; runs may share it
DEAD_LETTER_STREAM = "events:dead-letter"
DEAD_LETTER_LENGTH = 10_000  # entries, approximately; a few megabytes
MAX_DELIVERIES = 3  # enough for a temporary error; a bad event does not block the queue
CLAIM_SECONDS = 75  # until a claim that is not renewed expires: a minute's outage, 3 renewals
RENEW_SECONDS = 5  # between renewals, and between checks that the child process is alive
WAIT_SECONDS = 5  # for a new event, before looking for abandoned ones again
SOCKET_TIMEOUT_SECONDS = 8  # must exceed WAIT_SECONDS, or an idle wait looks like an outage
RETRIES = 18  # of a Redis command: with these pauses 71 s, enough for a restart
RETRY_PAUSE_SECONDS = 5  # at most
# Temporary errors: an outage, a failover, and a cluster's CLUSTERDOWN or MASTERDOWN.
OUTAGES = (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError, ClusterDownError)
OUTAGE_REPLIES = ("NOREPLICAS ", "MISCONF ", "BUSY ")  # temporary; redis-py has no class
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
OWN_END_SECONDS = 0.5  # for the algorithm's process to end by itself
CLEAN_UP_SECONDS = 1.2  # after SIGTERM, for what it has started, before SIGKILL
LOGGERS = ("index", "process")  # what the log shows, with all whose names begin so and a dot
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
LOG_LEVEL = getattr(logging, os.environ.get("LOGLEVEL", "").upper(), logging.INFO)

logger = logging.getLogger("index")
home_logger = logging.getLogger("home")  # heard only at home: tracebacks may quote user data
stop_asked = False  # by a signal
is_ending = False  # what is left is short and must be done as a whole: no signal interrupts it


class Message(NamedTuple):
    """An entry of the stream, as delivered."""

    id: str
    fields: dict[bytes, bytes]
    deliveries: int  # including this one


class Outcome(NamedTuple):
    """How the algorithm's work ended; if it failed, with a reason."""

    reason: str = ""
    is_final: bool = False  # a retry would fail again
    traceback: str = ""  # of a failed import, which cannot quote data yet


def main() -> int:
    """Check the variables and process one event; return the exit status."""
    global stop_asked, is_ending
    stop_asked = is_ending = False  # tests call this more than once
    names = (*API_VARIABLES, *REDIS_VARIABLES)
    if missing := [name for name in names if not os.environ.get(name)]:
        logger.error("not started: missing variables: %s", ", ".join(missing))
        return 1
    if not (port := os.environ["REDIS_SERVICE_PORT"]).isdecimal():
        logger.error("not started: REDIS_SERVICE_PORT is %r, not a number", port)
        return 1
    try:
        for signal_number in STOP_SIGNALS:
            signal.signal(signal_number, stop)
        # The client connects at its first command, so when Algorithm forks there is no connection.
        with connect() as queue, contextlib.closing(Algorithm()) as algorithm:
            return run(queue, algorithm)
    except KeyboardInterrupt:  # raised by `stop`
        return 143
    except redis.RedisError as error:  # its text may quote the event, after "with args"
        logger.error("Redis: %s: %s", type(error).__name__, str(error).split(", with args")[0])
    except Exception as error:  # a bug, or too little memory; its text may quote the event
        place = traceback.extract_tb(error.__traceback__)[-1]
        logger.critical("%s at %s:%d", type(error).__name__, place.filename, place.lineno)
    return 143 if stop_asked else 1


def stop(signal_number: int, frame: object) -> None:
    """Raise KeyboardInterrupt at the first signal, unless the run ends anyway; note later ones."""
    global stop_asked, is_ending
    stop_asked = True
    if not is_ending:
        is_ending = True
        raise KeyboardInterrupt


def run(queue: redis.Redis, algorithm: "Algorithm") -> int:
    """Take and handle an event when the algorithm is ready, or say why not; return the status."""
    ready = algorithm.answer()
    if ready.traceback:
        print(ready.traceback, end="", flush=True)
    elif ready.reason:
        logger.error("not started: %s", ready.reason)
    elif message := take(queue, algorithm):
        return handle(queue, message, algorithm)
    else:
        logger.error("no event taken: %s", algorithm.answer().reason)
    return 1


def take(queue: redis.Redis, algorithm: "Algorithm") -> Message | None:
    """Wait for a message, as long as it takes; abandoned ones come before new ones.

    Returns None if the algorithm's process dies meanwhile, and gives back what came too late.
    """
    logger.info("waiting for an event at %s:%s", *map(os.environ.get, REDIS_VARIABLES))
    create_group(queue)
    while algorithm.process.is_alive():
        if message := take_abandoned(queue) or take_new(queue):
            if algorithm.process.is_alive():
                return message
            leave(queue, message, algorithm.answer(), counts=False)
    return None


def create_group(queue: redis.Redis) -> None:
    """Create the consumer group, with all events published before, unless it exists."""
    try:
        queue.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
    except redis.OutOfMemoryError:
        pass  # refused even if the group exists; if it does not, the next command says so
    except redis.ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):  # it exists
            raise


def take_abandoned(queue: redis.Redis) -> Message | None:
    """Claim the oldest event whose claim has expired; of several runs, XCLAIM lets one have it.

    Acknowledges entries that are no longer in the stream. Returns None if there is nothing to take.
    """
    idle = int(CLAIM_SECONDS * 1000)
    while pending := queue.xpending_range(STREAM, GROUP, "-", "+", 1, idle=idle):
        message_id = pending[0]["message_id"]
        claimed = dict(queue.xclaim(STREAM, GROUP, CONSUMER, idle, [message_id]))
        if fields := claimed.get(message_id):
            return Message(message_id.decode(), fields, pending[0]["times_delivered"] + 1)
        if not queue.xrange(STREAM, message_id, message_id):
            logger.warning("message %s: no longer in the queue, skipped", message_id.decode())
            queue.xack(STREAM, GROUP, message_id)
    return None


def take_new(queue: redis.Redis) -> Message | None:
    """Wait up to WAIT_SECONDS for a new event."""
    block = int(WAIT_SECONDS * 1000)
    reply = queue.xreadgroup(GROUP, CONSUMER, {STREAM: ">"}, count=1, block=block)
    if not reply:
        return None
    message_id, fields = reply[0][1][0]
    return Message(message_id.decode(), fields, deliveries=1)


def handle(queue: redis.Redis, message: Message, algorithm: "Algorithm") -> int:
    """Process a message, then acknowledge, leave or set it aside; return the exit status.

    At a stop, gives the message back to the queue and lets KeyboardInterrupt pass.
    """
    global is_ending
    started = time.monotonic()
    try:
        outcome = work_on(queue, message, algorithm)
        is_ending = True  # from here on, a stop is only noted
    except KeyboardInterrupt:
        algorithm.close()
        queue.connection_pool.disconnect()  # the stop may have come between a command and its reply
        leave(queue, message, Outcome("stopped"), counts=False)
        logger.warning("message %s: stopped", message.id)
        raise
    if outcome.reason:
        leave(queue, message, outcome)
        return 1
    queue.xack(STREAM, GROUP, message.id)
    logger.info("message %s: processed in %.1f s", message.id, time.monotonic() - started)
    return 0


def work_on(queue: redis.Redis, message: Message, algorithm: "Algorithm") -> Outcome:
    """Have the algorithm process a message, and renew the claim on it meanwhile.

    A malformed message, or one that was delivered too often, is not handed over. Logs the delivery
    and the failure, but not a final one, which the dead letter's line names.
    """
    if message.deliveries > MAX_DELIVERIES:  # all of its runs died
        return Outcome(f"delivered {MAX_DELIVERIES} times, never acknowledged", is_final=True)
    try:
        event = parse(message.fields)
    except ValueError as error:
        return Outcome(str(error), is_final=True)
    delivery = f"{log_prefix_of(event)}delivery {message.deliveries} of {MAX_DELIVERIES}"
    logger.info("message %s: %s", message.id, delivery)
    try:
        algorithm.channel.send(event)
    except BrokenPipeError:
        pass  # `answer` will say why
    except RecursionError:
        return Outcome("malformed: nested too deeply", is_final=True)
    outcome = algorithm.answer(meanwhile=lambda: renew(queue, message))
    if outcome.reason and not outcome.is_final:
        is_last = message.deliveries >= MAX_DELIVERIES
        then = "" if is_last else f"delivered again in {CLAIM_SECONDS} s, because it "
        logger.error("message %s: %sfailed: %s", message.id, then, outcome.reason)
    return outcome


def parse(fields: dict[bytes, bytes]) -> dict[str, Any]:
    """Return the event in a message's fields; raise ValueError, unquoted, if it is malformed."""
    try:
        event = json.loads(fields[b"msg_data"].decode("utf-8"))  # json would take UTF-16 as well
    except (KeyError, ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise ValueError("malformed: msg_data is not a JSON object in UTF-8")
    user_ids = event.get("userIds")
    is_list = isinstance(user_ids, list) and all(isinstance(item, str) for item in user_ids)
    if user_ids is not None and not is_list:
        raise ValueError("malformed: userIds is not a list of strings")
    return event


def log_prefix_of(event: dict[str, Any]) -> str:
    """Return the event's `type`, or else its `trigger`, as "TYPE, "; or "". Up to 40 characters."""
    for text in (event.get("type"), event.get("trigger")):
        if isinstance(text, str) and text.strip():
            return "".join(char if char.isprintable() else " " for char in text[:40]) + ", "
    return ""


def renew(queue: redis.Redis, message: Message) -> None:
    """Renew the claim, or take it back, without counting a delivery; a failure is only logged."""
    try:
        queue.xclaim(STREAM, GROUP, CONSUMER, 0, [message.id], justid=True)
    except redis.RedisError as error:
        logger.warning("message %s: claim not renewed: %s", message.id, error)


def leave(queue: redis.Redis, message: Message, outcome: Outcome, *, counts: bool = True) -> None:
    """Leave an unfinished message for a later run, or set it aside.

    If this delivery `counts`, a later run gets the message when the claim expires; if not, at once.
    It is set aside if it is no longer in the queue, or if a delivery that counts was final or the
    last one. Does nothing if another run has taken the message over, or finished it.
    """
    create_group(queue)  # or XPENDING fails, if Redis has lost its data
    pending = queue.xpending_range(STREAM, GROUP, message.id, message.id, 1)
    is_in_stream = bool(queue.xrange(STREAM, message.id, message.id))
    is_finished = is_in_stream and not pending
    is_taken_over = bool(pending) and pending[0]["times_delivered"] > message.deliveries
    if is_finished or is_taken_over:  # by another run, while this one was frozen
        logger.warning("message %s: another run has it, or it is finished", message.id)
    elif not is_in_stream:
        set_aside(queue, message, f"{outcome.reason}; no longer in the queue")
    elif not counts:
        options = {"idle": int(CLAIM_SECONDS * 1000), "retrycount": message.deliveries - 1}
        queue.xclaim(STREAM, GROUP, CONSUMER, 0, [message.id], justid=True, **options)
    elif outcome.is_final or message.deliveries >= MAX_DELIVERIES:
        set_aside(queue, message, outcome.reason)
    # Otherwise a later run gets it when the claim expires.


def set_aside(queue: redis.Redis, message: Message, reason: str) -> None:
    """Move a message to the dead letters, with the reason; keep its first letter if it has two."""
    error = reason.encode("utf-8", "backslashreplace")
    letter = {**message.fields, b"error": error, b"message_id": message.id}
    queue.xadd(DEAD_LETTER_STREAM, letter, maxlen=DEAD_LETTER_LENGTH)
    queue.xack(STREAM, GROUP, message.id)
    logger.error("message %s: set aside in %s: %s", message.id, DEAD_LETTER_STREAM, reason)
    # If a reply was lost, redis-py has repeated XADD. A run may also have died before its XACK.
    latest = queue.xrevrange(DEAD_LETTER_STREAM, count=20)
    same = [entry for entry, fields in latest if fields.get(b"message_id") == message.id.encode()]
    for later_id in same[:-1]:
        queue.xdel(DEAD_LETTER_STREAM, later_id)


def connect() -> redis.Redis:
    """Return a client of the queue, with verified TLS if TLS_CAFILE names a CA certificate."""
    return QueueClient(
        host=os.environ["REDIS_SERVICE_HOST"],
        port=int(os.environ["REDIS_SERVICE_PORT"]),
        ssl=bool(os.environ.get("TLS_CAFILE")),
        ssl_ca_certs=os.environ.get("TLS_CAFILE"),
        socket_timeout=SOCKET_TIMEOUT_SECONDS,
        driver_info=None,  # saves 5 ms, in which redis-py would look up its own version
        retry=Retry(OutageBackoff(RETRY_PAUSE_SECONDS, base=0.1), RETRIES, OUTAGES),
    )


class QueueClient(redis.Redis):
    """A client that takes OUTAGE_REPLIES for an outage, so that the command is retried."""

    def parse_response(self, *arguments: Any, **options: Any) -> Any:
        """Return the reply to a command; raise redis.ConnectionError for OUTAGE_REPLIES."""
        try:
            return super().parse_response(*arguments, **options)
        except redis.ResponseError as error:
            if str(error).startswith(OUTAGE_REPLIES):
                raise redis.ConnectionError(str(error)) from error
            raise


class OutageBackoff(ExponentialBackoff):
    """The pauses between retries of a Redis command; logs the second failure."""

    def compute(self, failures: int) -> float:
        """Return the pause in seconds; redis-py calls this while it handles the error."""
        if failures == 2:  # the first may only be a dropped connection
            logger.warning("Redis is unavailable: %s", sys.exc_info()[1])
        return super().compute(failures)


# THE ALGORITHM'S PROCESS


class Algorithm:
    """process.py in a child process, and the channel to it."""

    def __init__(self) -> None:
        self.channel, channel = multiprocessing.Pipe()
        self.start(channel)

    def start(self, channel: Connection) -> None:
        """Fork the child process, which must happen before there are threads or connections."""
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=be_the_child, args=[channel, self.channel])
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if SIG_IGN is inherited, the status is lost
        gc.freeze()  # or the collector would write to, and so copy, the memory that both share
        # Until the child has its own handlers and process group, a stop would be lost in it.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        self.process.start()
        os.setpgid(self.process.pid, self.process.pid)  # in the child too: one of them is first
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        channel.close()
        gc.enable()

    def answer(self, meanwhile: Callable[[], None] = lambda: None) -> Outcome:
        """Wait for the outcome of the check before an event; the next time, for that of the event.

        Calls `meanwhile` every RENEW_SECONDS. If the child process dies, the outcome says how. The
        channel alone may not show that, because a process of the algorithm may hold it open.
        """
        while not self.channel.poll(RENEW_SECONDS) and self.process.is_alive():
            meanwhile()
        with contextlib.suppress(EOFError, OSError):
            if self.channel.poll():
                return Outcome(*self.channel.recv())
        wait_until(lambda: not self.process.is_alive(), OWN_END_SECONDS)
        status = self.process.exitcode
        if status is None:
            return Outcome("process.py closed its channel")
        # A look-up, because signal.Signals(-status) would raise for a real-time signal.
        killed = {-number: f"killed by {number.name}" for number in signal.Signals}
        return Outcome(f"process.py ended: {killed.get(status, f'status {status}')}")

    def close(self) -> None:
        """End the child process, and what it has started and is still in its process group.

        Unless at a stop, it first gets a moment to exit by itself, so that pools remove their
        temporary folders. Then come SIGTERM and, because some ignore that, SIGINT at once. SIGKILL
        follows later: Python's resource tracker, which ignores both, removes semaphores and memory.
        """
        global is_ending
        is_ending = True
        if self.channel.closed:  # `handle` has done all of this at a stop
            return
        self.channel.close()
        if not stop_asked:
            wait_until(lambda: not self.process.is_alive(), OWN_END_SECONDS)
        for signal_number in STOP_SIGNALS:
            self.signal_group(signal_number)
        wait_until(self.is_gone, CLEAN_UP_SECONDS)
        self.signal_group(signal.SIGKILL)
        self.process.kill()  # if it has left its group
        self.process.join(OWN_END_SECONDS)  # before another run may have the event

    def signal_group(self, signal_number: int) -> bool:
        """Send a signal to the processes of the group; return whether there are any."""
        try:
            os.killpg(self.process.pid, signal_number)
        except OSError:
            return False
        return True

    def is_gone(self) -> bool:
        """Return whether neither the child process nor another of its group is there."""
        if self.process.is_alive():
            return False
        with contextlib.suppress(ChildProcessError):  # PID 1 has to reap orphans
            os.waitpid(-self.process.pid, os.WNOHANG)
        return not self.signal_group(0)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition holds, for so many seconds at most."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)


def be_the_child(channel: Connection, channel_of_parent: Connection) -> None:
    """Import and run process.py, and keep what it and its own children print out of the log."""
    os.setpgid(0, 0)  # so that one signal reaches all that the algorithm starts
    for signal_number in STOP_SIGNALS:
        signal.signal(signal_number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    channel_of_parent.close()
    with contextlib.suppress(RuntimeError):  # no thread can be started: the parent ends it
        # Not a threading.Thread, which gevent's monkey patch in process.py would not survive.
        _thread.start_new_thread(end_with_parent, (multiprocessing.parent_process().sentinel,))
    # What the algorithm forks must not hold the channel open, or the parent would not see this
    # process die until it renews the claim.
    os.register_at_fork(after_in_child=channel.close)
    start_logging(os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace"))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    try:
        import process
    except BaseException as error:
        if isinstance(error, SystemExit):
            error = ImportError("process.py called exit()")
        channel.send(("", False, "".join(traceback.format_exception(error))))
        return
    gc.freeze()  # what is imported stays; looking through it for garbage would take 8 ms
    gc.enable()
    log_error = logging.getLogger("process").error
    threading.excepthook = lambda args: log_error(process.describe_error(args.exc_value))
    run_algorithm(channel)


def end_with_parent(sentinel: int) -> None:
    """Wait until the parent has died; then end this process, and those that it has started."""
    os.read(sentinel, 1)
    with contextlib.suppress(OSError):  # if it has left its group
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def run_algorithm(channel: Connection) -> None:
    """Make the check before an event, then process the event that comes; send both outcomes."""
    import process  # not above: the parent process does not import it

    def call(function: Callable[..., Any], *arguments: Any) -> tuple:
        try:
            process.check_that_it_ran(function(*arguments))
        except BaseException as error:  # includes exit()
            if not isinstance(error, process.ProcessingError):
                home_logger.error("not in the cage's log:", exc_info=True)
            is_final = isinstance(error, process.EventRejected)
            return process.describe_error(error), is_final
        return ()

    with contextlib.closing(channel), contextlib.suppress(EOFError, OSError):  # the run ended
        channel.send(call(process.check_before_event))
        channel.send(call(process.process_event, channel.recv()))


# THE LOG


def start_logging(log: TextIO) -> None:
    """Log what the template and the author log, but not what libraries do: it may quote data."""
    handler = LogHandler(log)
    handler.setFormatter(OneLineFormatter(LOG_FORMAT))
    for name in LOGGERS:  # not the root, whose handlers libraries replace
        logging.getLogger(name).handlers = [handler]
        logging.getLogger(name).setLevel(LOG_LEVEL)


class LogHandler(logging.StreamHandler):
    """Writes the log. If nobody reads it, a stop does not wait."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; drop it if there is no room for it and a stop was asked for."""
        while not select.select([], [self.stream], [], 0.1)[1]:
            if stop_asked:
                return
        super().emit(record)


class OneLineFormatter(logging.Formatter):
    """Formats a record as one line, without its exception, which may quote user data."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, up to the first line break in the message.

        Also cut to 4,000 bytes: Linux writes 4,096 to a pipe in one piece, so that lines of the two
        processes do not mix.
        """
        record.message = "".join(record.getMessage().splitlines()[:1])
        record.asctime = self.formatTime(record)
        line = self.formatMessage(record).encode("utf-8", "backslashreplace")
        return line[:4000].decode("utf-8", "ignore")


class LastingLogger(logging.Logger):
    """A logger, for process.py, that dictConfig and logging.disable do not silence."""

    disabled = property(lambda self: False, lambda self, value: None)

    def isEnabledFor(self, level: int) -> bool:
        """Return whether a record of this level is logged."""
        return level >= self.getEffectiveLevel()


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    logging.setLoggerClass(LastingLogger)
    start_logging(sys.stdout)
    os._exit(main())  # at once: Python would take a tenth of a second to clean up
