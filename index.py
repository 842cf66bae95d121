"""Take one event from the cage's Redis queue, hand it to process.py, acknowledge it, exit.

Delivery is at least once: an event is acknowledged only when process.py has finished it. Until then
this run holds a claim on it. If the run fails or dies, a later run gets the event. A malformed
event, or one that failed MAX_DELIVERIES times, becomes a dead letter.

Exit status:
    0    the event was processed
    1    the event failed, or the run could not start; the log says why
    143  stopped by SIGTERM or Ctrl-C; the next run gets the event
"""

import functools
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, NamedTuple, TextIO

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

API_VARIABLES = ("DV_URL", "DV_TOKEN", "DV_APP_ID", "DV_CLIENT_ID")
REDIS_VARIABLES = ("REDIS_SERVICE_HOST", "REDIS_SERVICE_PORT")
STREAM = "events"
GROUP = "consummers"  # spelled so by the platform
CONSUMER = socket.gethostname()  # shows in XPENDING where an event is; runs may share it
DEAD_LETTER_STREAM = "events:dead-letter"
DEAD_LETTER_LENGTH = 10_000  # entries, approximately; a few megabytes
MAX_DELIVERIES = 3  # enough for a temporary error; a bad event does not block the queue
CLAIM_SECONDS = 60  # without a renewal, after which another run takes the event over
RENEW_SECONDS = 5  # between renewals; the claim then outlives an outage of Redis of 50 s
WAIT_SECONDS = 5  # for a new event, before looking for abandoned ones again
SOCKET_TIMEOUT_SECONDS = 8  # must exceed WAIT_SECONDS, or an idle wait looks like an outage
RETRIES, RETRY_PAUSE_SECONDS = 18, 5  # of a Redis command: a minute, enough for a restart
OUTAGES = (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError)  # the last: failover
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
LOG_LEVEL = getattr(logging, os.environ.get("LOGLEVEL", "").upper(), logging.INFO)


def open_log() -> TextIO:
    """Return the log; drop all else that goes to standard output or error: it may quote data."""
    log = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    nowhere = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", errors="backslashreplace")
    os.dup2(os.dup2(nowhere.fileno(), 1), 2)
    sys.stdout = sys.stderr = nowhere  # takes any character: a `print` does not fail in the cage
    sys.excepthook = functools.partial(traceback.print_exception, file=log)  # no data is there yet
    return log


if __name__ == "__main__":
    log = open_log()  # before process.py starts a child process

try:  # not used before `main` runs: a module that process.py imports may import this one
    import process
except SystemExit as error:
    raise ImportError("process.py called exit()") from error

logger = logging.getLogger("index")
stop_asked = threading.Event()


class Message(NamedTuple):
    """An entry of the stream, as delivered."""

    id: str
    fields: dict[bytes, bytes]
    deliveries: int  # including this one


def main() -> int:
    """Process one event; return the exit status."""
    stop_asked.clear()
    status = 1
    try:
        for signal_number in STOP_SIGNALS:
            signal.signal(signal_number, stop)
        names = (*API_VARIABLES, *REDIS_VARIABLES)
        if missing := [name for name in names if not os.environ.get(name)]:
            raise process.ProcessingError(f"missing variables: {', '.join(missing)}")
        process.DatavillageApi().check()
        with connect() as queue:
            status = handle(queue, take(queue))
    except KeyboardInterrupt:
        pass  # raised by `stop`
    except (process.ProcessingError, ValueError) as error:
        logger.error("not started: %s", error)
    except redis.RedisError as error:  # its text may quote the event, after "with args"
        logger.error("Redis: %s: %s", type(error).__name__, str(error).split(", with args")[0])
    return 143 if stop_asked.is_set() else status


def stop(signal_number: int, frame: object) -> None:
    """Interrupt the main thread. Later signals are ignored, because the run is about to end."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    stop_asked.set()
    raise KeyboardInterrupt


def take(queue: redis.Redis) -> Message:
    """Wait for a message, as long as it takes; abandoned ones come before new ones."""
    logger.info("waiting for an event at %s:%s", *map(os.environ.get, REDIS_VARIABLES))
    create_group(queue)
    while True:
        if message := take_abandoned(queue) or take_new(queue):
            return message


def create_group(queue: redis.Redis) -> None:
    """Create the consumer group if it does not exist, with all events published before."""
    try:
        queue.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
    except redis.ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):  # another error than that it exists
            raise


def take_abandoned(queue: redis.Redis) -> Message | None:
    """Claim the oldest event whose claim has expired; of several runs, XCLAIM lets one have it."""
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


def handle(queue: redis.Redis, message: Message) -> int:
    """Process a message, then acknowledge, leave or set it aside; return the exit status."""
    try:
        if message.deliveries > MAX_DELIVERIES:  # all of its runs died
            raise ValueError(f"delivered {MAX_DELIVERIES} times, never acknowledged")
        event = parse(message.fields)
    except ValueError as error:
        set_aside(queue, message, str(error))
        return 1
    logger.info("message %s: delivery %d of %d", message.id, message.deliveries, MAX_DELIVERIES)
    started = time.monotonic()
    try:
        run_algorithm(queue, message.id, event)
        queue.xack(STREAM, GROUP, message.id)
    except (process.ProcessingError, KeyboardInterrupt) as error:
        if stop_asked.is_set():
            logger.warning("message %s: stopped", message.id)
        leave(queue, message, str(error) or "stopped")
        return 1
    logger.info("message %s: processed in %.1f s", message.id, time.monotonic() - started)
    return 0


def parse(fields: dict[bytes, bytes]) -> dict[str, Any]:
    """Return the event in a message's fields; raise ValueError, which does not quote them."""
    try:
        event = json.loads(fields[b"msg_data"].decode("utf-8"))
    except (KeyError, ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise ValueError("malformed: msg_data is not a JSON object in UTF-8")
    user_ids = event.get("userIds")
    is_list = isinstance(user_ids, list) and all(isinstance(item, str) for item in user_ids)
    if user_ids is not None and not is_list:
        raise ValueError("malformed: userIds is not a list of strings")
    return event


def run_algorithm(queue: redis.Redis, message_id: str, event: dict[str, Any]) -> None:
    """Run `process_event` and renew the claim meanwhile; raise ProcessingError if it fails."""
    succeeded, reason = False, "the algorithm did not finish"

    def run() -> None:
        nonlocal succeeded, reason
        try:
            process.check_that_it_ran(process.process_event(event))
            succeeded = True
        except BaseException as error:  # includes exit()
            reason = process.describe(error)
            unexpected = not isinstance(error, process.ProcessingError)  # logs a traceback at home
            logger.error("message %s: failed: %s", message_id, reason, exc_info=unexpected)

    # In its own thread, so a stop, which raises KeyboardInterrupt here, need not wait for it.
    algorithm = threading.Thread(target=run, daemon=True)
    algorithm.start()
    renewed = time.monotonic()
    # In steps, because another thread may get the signal, or a finalizer swallow the interrupt.
    while algorithm.is_alive() and not stop_asked.is_set():
        algorithm.join(timeout=0.2)
        if time.monotonic() - renewed >= RENEW_SECONDS:
            renewed = time.monotonic()
            try:
                queue.xclaim(STREAM, GROUP, CONSUMER, 0, [message_id], justid=True)  # no delivery
            except redis.RedisError as error:
                logger.warning("message %s: claim not renewed: %s", message_id, error)
    if not succeeded:
        raise process.ProcessingError(reason)


def leave(queue: redis.Redis, message: Message, reason: str) -> None:
    """Leave an unfinished message for a later run, or set it aside."""
    create_group(queue)  # Redis may have lost its data
    pending = queue.xpending_range(STREAM, GROUP, message.id, message.id, 1)
    is_kept = bool(queue.xrange(STREAM, message.id, message.id))
    # A takeover raises the number of deliveries; what another run has finished is not pending.
    if pending[0]["times_delivered"] > message.deliveries if pending else is_kept:
        logger.warning("message %s: another run has it, or it is finished", message.id)
    elif not is_kept:
        set_aside(queue, message, f"{reason}; no longer in the queue")
    elif stop_asked.is_set():  # the next run gets it at once; this delivery does not count
        options = {"idle": int(CLAIM_SECONDS * 1000), "retrycount": message.deliveries - 1}
        queue.xclaim(STREAM, GROUP, CONSUMER, 0, [message.id], justid=True, **options)
    elif message.deliveries == MAX_DELIVERIES:
        set_aside(queue, message, reason)


def set_aside(queue: redis.Redis, message: Message, reason: str) -> None:
    """Move a message to the dead letters, with the reason."""
    error = reason.encode("utf-8", "backslashreplace")
    letter = {**message.fields, b"error": error, b"message_id": message.id}
    queue.xadd(DEAD_LETTER_STREAM, letter, maxlen=DEAD_LETTER_LENGTH)
    queue.xack(STREAM, GROUP, message.id)
    logger.error("message %s: set aside in %s: %s", message.id, DEAD_LETTER_STREAM, reason)


def connect() -> redis.Redis:
    """Return a client of the queue, with verified TLS if TLS_CAFILE names a CA certificate."""
    return redis.Redis(
        host=os.environ["REDIS_SERVICE_HOST"],
        port=int(os.environ["REDIS_SERVICE_PORT"]),
        ssl=bool(os.environ.get("TLS_CAFILE")),
        ssl_ca_certs=os.environ.get("TLS_CAFILE"),
        socket_timeout=SOCKET_TIMEOUT_SECONDS,
        retry=Retry(OutageBackoff(RETRY_PAUSE_SECONDS, base=0.1), RETRIES, OUTAGES),
    )


class OutageBackoff(ExponentialBackoff):
    """The pauses between retries of a Redis command; logs the second failure."""

    def compute(self, failures: int) -> float:
        """Return the pause after so many failures, in seconds."""
        if failures == 2:  # the first may only be a dropped connection
            logger.warning("Redis is unavailable: %s", sys.exc_info()[1])
        return super().compute(failures)


def start_logging(log: TextIO) -> None:
    """Log this project's records; of an exception, only what `process.describe` returns."""
    handler = logging.StreamHandler(log)
    handler.addFilter(keep_data_out)
    logging.basicConfig(format=LOG_FORMAT, handlers=[handler], level=LOG_LEVEL, force=True)
    sys.excepthook = lambda _, error, traceback: logger.critical(process.describe(error))
    threading.excepthook = lambda thread: logger.error(process.describe(thread.exc_value))


def keep_data_out(record: logging.LogRecord) -> bool:
    """Remove the exception from a log record; return whether it is one of this project's."""
    record.exc_info = record.exc_text = None
    return record.name.partition(".")[0] in ("index", "process")


def spare_children() -> None:
    """Keep `stop` out of the children that the algorithm forks: a pool ends them with SIGTERM."""
    hold = functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK, STOP_SIGNALS)
    release = functools.partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, STOP_SIGNALS)
    for number in STOP_SIGNALS:
        os.register_at_fork(after_in_child=functools.partial(signal.signal, number, signal.SIG_DFL))
    # A signal that comes before the child has its own handler would be lost.
    os.register_at_fork(before=hold, after_in_parent=release, after_in_child=release)


if __name__ == "__main__":
    start_logging(log)
    spare_children()
    status = main()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)  # without waiting for what the algorithm has left
