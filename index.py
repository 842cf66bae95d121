"""Take one event from the cage's Redis queue, hand it to process.py, acknowledge it, exit.

Delivery is at least once: an event is acknowledged when its work is done, and its claim renewed
until then. The event of a worker that fell silent goes to the next one that asks. An event that
is malformed, or that MAX_DELIVERIES deliveries did not finish, is set aside as a dead letter.

Exit status:
    0    the event was processed
    1    the event failed: it is delivered again later, or was set aside
    2    not started, or Redis was lost: the event stays in the queue
    143  stopped by SIGTERM or Ctrl-C: the event stays in the queue
"""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

import process

# How each variable has to look. The last two may be missing.
VARIABLES = {
    "DV_URL": r"https?://[^\s/?#@]+(/[^\s?#]*)?",
    "DV_TOKEN": r"[!-~]+",  # what a header can carry
    "DV_APP_ID": r"(?!\.\.?$).+",  # `.` and `..` would lead to another resource
    "DV_CLIENT_ID": r"(?!\.\.?$).+",
    "REDIS_SERVICE_HOST": r"\S+",
    "REDIS_SERVICE_PORT": r"[1-5]?[0-9]{1,4}|6[0-5][0-9]{3}",
    "TLS_CAFILE": r".*",
    "LOGLEVEL": r"(DEBUG|INFO|WARNING|ERROR|CRITICAL)?",
}
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"

STREAM = "events"
GROUP = "consummers"  # spelled so by the platform
# Tells in XPENDING which machine holds an event. Workers may share a name, for Redis keeps claims
# by event; a name for each process would stay behind in Redis after each run.
CONSUMER = socket.gethostname()
DEAD_LETTER_STREAM = "events:dead-letter"
DEAD_LETTER_LENGTH = 1_000  # entries, about: the bound that the platform sets for events
MAX_DELIVERIES = 3  # enough to outlast a passing fault, few enough to get past an event that kills
CLAIM_SECONDS = 60  # silence after which a worker has lost its event
RENEW_SECONDS = 20  # a third of the claim: two renewals may fail
WAIT_SECONDS = 5  # one blocking read; between two, abandoned events are looked for
SOCKET_TIMEOUT_SECONDS = 8  # more than WAIT_SECONDS, or each quiet wait would end as an error
RETRIES = 18  # of one command: with the pauses between them, a good minute, time for a restart
BACKOFF_SECONDS = 5  # the longest of these pauses: Redis is found soon after it is back

logger = logging.getLogger("index")  # the name __main__ would not tell whose it is


class Message(NamedTuple):
    """An entry of the stream, as delivered."""

    id: str
    fields: dict[bytes, bytes]
    deliveries: int  # with this one


def main() -> int:
    """Process one event; return the exit status."""
    # Also PID 1 of a container and a job in the background are to be stopped by a signal.
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, signal.default_int_handler)
    if names := unusable_variables():
        logger.error("not started: missing or unusable: %s", ", ".join(names))
        return 2
    logging.getLogger().setLevel(os.environ.get("LOGLEVEL") or "INFO")
    try:
        with connect() as queue:
            return handle(queue, take(queue), process.process_event)
    except KeyboardInterrupt:
        return 143
    except redis.RedisError as error:
        logger.error("Redis at %s: %s: %s", redis_address(), type(error).__name__, error)
        return 2


def take(queue: redis.Redis) -> Message:
    """Wait for a message, however long: an abandoned one before a new one, the oldest first.

    Raises redis.RedisError when Redis is lost or refuses.
    """
    logger.info("waiting for an event at %s", redis_address())
    while True:
        try:
            if message := take_abandoned(queue) or take_new(queue):
                return message
        except redis.ResponseError as error:
            # At the very first start, and when Redis lost its data, before a read or during it.
            if not str(error).startswith(("NOGROUP", "UNBLOCKED")):
                raise
            create_group(queue)


def take_abandoned(queue: redis.Redis) -> Message | None:
    """Claim the oldest event whose worker was silent for CLAIM_SECONDS, if there is one.

    XPENDING with IDLE (Redis 6.2) looks at every pending event, however many live workers hold.
    XCLAIM looks at the idle time again, so one of several claimants gets the event.
    """
    idle = int(CLAIM_SECONDS * 1000)
    while pending := queue.xpending_range(STREAM, GROUP, "-", "+", 1, idle=idle):
        message_id = pending[0]["message_id"]
        claimed = dict(queue.xclaim(STREAM, GROUP, CONSUMER, idle, [message_id]))
        if fields := claimed.get(message_id):
            return Message(message_id.decode(), fields, pending[0]["times_delivered"] + 1)
        if not queue.xrange(STREAM, message_id, message_id):
            logger.warning("message %s: trimmed from the queue, skipped", message_id.decode())
            queue.xack(STREAM, GROUP, message_id)
    return None


def take_new(queue: redis.Redis) -> Message | None:
    """Wait up to WAIT_SECONDS for an event that was never delivered."""
    block = int(WAIT_SECONDS * 1000)
    reply = queue.xreadgroup(GROUP, CONSUMER, {STREAM: ">"}, count=1, block=block)
    if not reply:
        return None
    message_id, fields = reply[0][1][0]
    return Message(message_id.decode(), fields, deliveries=1)


def create_group(queue: redis.Redis) -> None:
    """Create the consumer group at 0, so that no event published before is missed."""
    try:
        queue.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
    except redis.ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):  # another worker came first
            raise


def handle(queue: redis.Redis, message: Message, process_event: Callable[[dict], None]) -> int:
    """Process a message and acknowledge it, or keep it, or set it aside; return the exit status.

    Raises KeyboardInterrupt on a stop, redis.RedisError when Redis is lost or refuses.
    """
    if message.deliveries > MAX_DELIVERIES:
        set_aside(queue, message, f"delivered {MAX_DELIVERIES} times, finished by no worker")
        return 1
    try:
        event = parse(message.fields)
    except ValueError as error:
        set_aside(queue, message, f"malformed: {error}")
        return 1
    logger.info("message %s: delivery %d of %d", message.id, message.deliveries, MAX_DELIVERIES)
    started = time.monotonic()
    try:
        with renewed_claim(queue, message):
            if (returned := process_event(event)) is not None:
                kind = type(returned).__name__
                raise process.ProcessingError(f"process_event returned {kind}: is it async?")
    except KeyboardInterrupt:
        logger.warning("message %s: stopped", message.id)
        leave(queue, message, "stopped", stopped=True)
        raise
    except BaseException as error:  # an algorithm that calls exit() has not finished either
        reason = process.describe(error)
        bug = not isinstance(error, process.ProcessingError)
        logger.error("message %s: failed: %s", message.id, reason, exc_info=bug)
        leave(queue, message, reason)
        return 1
    queue.xack(STREAM, GROUP, message.id)
    logger.info("message %s: processed in %.1f s", message.id, time.monotonic() - started)
    return 0


def parse(fields: dict[bytes, bytes]) -> dict[str, Any]:
    """Return the event in a message's fields, whole, with userIds that can be relied on.

    Raises ValueError that says what is wrong and repeats nothing of the payload.
    """
    try:
        event = json.loads(fields[b"msg_data"].decode("utf-8"))
    except (KeyError, ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise ValueError("msg_data is not a JSON object in UTF-8")
    user_ids = event.get("userIds")
    if user_ids is not None and not (
        isinstance(user_ids, list)
        and all(isinstance(user_id, str) and user_id not in ("", ".", "..") for user_id in user_ids)
    ):
        raise ValueError("userIds is not a list of non-empty strings other than '.' and '..'")
    return event


@contextlib.contextmanager
def renewed_claim(queue: redis.Redis, message: Message) -> Iterator[None]:
    """Renew the claim on a message every RENEW_SECONDS until the block ends."""
    finished = threading.Event()

    def renew() -> None:
        while not finished.wait(RENEW_SECONDS):
            try:
                # JUSTID: without it a renewal would count as a delivery.
                queue.xclaim(STREAM, GROUP, CONSUMER, 0, [message.id], justid=True)
            except redis.RedisError as error:
                logger.warning("message %s: claim not renewed: %s", message.id, error)

    renewer = threading.Thread(target=renew, daemon=True)
    renewer.start()
    try:
        yield
    finally:
        finished.set()
        renewer.join(timeout=1)  # at once, unless it waits for a Redis that is away


def leave(queue: redis.Redis, message: Message, reason: str, *, stopped: bool = False) -> None:
    """Leave a message that was not finished to the next worker, or set it aside with the reason.

    A stop is not the event's fault: the next worker has it at once, and this delivery is not
    counted. Raises redis.RedisError when Redis is lost or refuses.
    """
    if not queue.xrange(STREAM, message.id, message.id):
        set_aside(queue, message, f"{reason}; meanwhile it was trimmed from the queue")
    elif stopped:
        ids, idle, count = [message.id], int(CLAIM_SECONDS * 1000), message.deliveries - 1
        queue.xclaim(STREAM, GROUP, CONSUMER, 0, ids, idle=idle, retrycount=count, justid=True)
    elif message.deliveries == MAX_DELIVERIES:
        set_aside(queue, message, reason)


def set_aside(queue: redis.Redis, message: Message, reason: str) -> None:
    """Move a message to the dead letters, with the reason.

    Raises redis.RedisError when Redis is lost or refuses; the message then stays in the queue.
    """
    error = reason.encode("utf-8", "backslashreplace")
    letter = {**message.fields, b"error": error, b"message_id": message.id}
    queue.xadd(DEAD_LETTER_STREAM, letter, maxlen=DEAD_LETTER_LENGTH)
    queue.xack(STREAM, GROUP, message.id)
    logger.error("message %s: set aside in %s: %s", message.id, DEAD_LETTER_STREAM, reason)


def connect() -> redis.Redis:
    """Return a client of the queue, over verified TLS if TLS_CAFILE names a CA certificate."""
    ca_file = os.environ.get("TLS_CAFILE")
    # By default socket.timeout is one too, and redis-py then retries each of its retries.
    outages = (redis.ConnectionError, redis.TimeoutError)
    return redis.Redis(
        host=os.environ["REDIS_SERVICE_HOST"],
        port=int(os.environ["REDIS_SERVICE_PORT"]),
        ssl=bool(ca_file),
        ssl_ca_certs=ca_file,
        socket_timeout=SOCKET_TIMEOUT_SECONDS,
        retry=Retry(OutageBackoff(BACKOFF_SECONDS, base=0.1), RETRIES, outages),
    )


class OutageBackoff(ExponentialBackoff):
    """The pauses between the tries of one command, with a warning that Redis is away."""

    def compute(self, failures: int) -> float:
        """Return the pause after so many failures, in seconds."""
        if failures == 2:  # the first may be just a connection that was cut
            logger.warning("Redis at %s is away: %s", redis_address(), sys.exc_info()[1])
        return super().compute(failures)


def redis_address() -> str:
    """Return host and port of the queue."""
    return f"{os.environ['REDIS_SERVICE_HOST']}:{os.environ['REDIS_SERVICE_PORT']}"


def unusable_variables() -> list[str]:
    """Return the names of the variables that are missing or unusable; a value may be a secret."""
    value = os.environ.get
    names = [name for name, form in VARIABLES.items() if not re.fullmatch(form, value(name, ""))]
    if ca_file := value("TLS_CAFILE"):
        try:
            ssl.create_default_context(cafile=ca_file)
        except OSError:  # no such file, or no certificate in it: ssl.SSLError is an OSError
            names.append("TLS_CAFILE")
    return names


def start_logging() -> None:
    """Log to standard output, where the cage captures it, one line a record.

    Only the project's own loggers speak: libraries quote the data that they work on. So does the
    text of an exception, wherever Python or a logger would print it.
    """
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(is_own)
    logging.basicConfig(format=LOG_FORMAT, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.lastResort = None
    logging.raiseExceptions = False
    sys.unraisablehook = threading.excepthook = lambda unraised: logger.error(
        "left unraised: %s", process.describe(unraised.exc_value)
    )


def is_own(record: logging.LogRecord) -> bool:
    """Strip a record of its exception; tell whether it is of `index`, `process` or `process.…`."""
    record.exc_info = record.exc_text = None
    return record.name.partition(".")[0] in ("index", "process")


if __name__ == "__main__":
    start_logging()
    sys.exit(main())
