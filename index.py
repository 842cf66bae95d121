"""Take one event from the cage's Redis queue, hand it to process.py, acknowledge it, exit.

Delivery is at least once: an event is acknowledged when its work is done, and its claim renewed
until then. The event of a worker that fell silent goes to the next one that asks. An event that
is malformed, or that MAX_DELIVERIES deliveries did not finish, is set aside as a dead letter.
`main`, `take`, `handle` and `parse` are the way of an event; below them is what they stand on.

Exit status:
    0    the event was processed
    1    the event failed: it is delivered again later, or was set aside
    2    not started, or Redis was lost: the event stays in the queue
    143  stopped by SIGTERM (130: by SIGINT): the event stays in the queue
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
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import redis
from redis.backoff import EqualJitterBackoff
from redis.retry import Retry

VARIABLES = (
    "DV_URL",
    "DV_TOKEN",
    "DV_APP_ID",
    "DV_CLIENT_ID",
    "REDIS_SERVICE_HOST",
    "REDIS_SERVICE_PORT",
)
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

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
WAIT_SECONDS = 10  # one blocking read; between two, abandoned events are looked for
SOCKET_TIMEOUT_SECONDS = 15  # more than WAIT_SECONDS, or each quiet wait would end as an error
OUTAGE_SECONDS = 75  # for how long Redis may be away: a good minute, time for a restart
BACKOFF_SECONDS = 5  # the longest pause between two tries: Redis is found soon after it is back
GRACE_SECONDS = 25  # from a signal to the end at the latest: Kubernetes kills after 30

logger = logging.getLogger(__name__)


class Message(NamedTuple):
    """An entry of the stream, as delivered."""

    id: str
    fields: dict[bytes, bytes]
    deliveries: int  # with this one


class Stopped(SystemExit):
    """A signal ends the run; the code is the exit status."""


def main() -> int:
    """Process one event; return the exit status."""
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    start_logging()
    if problems := environment_problems():
        logger.error("not started: %s", "; ".join(problems))
        return 2
    try:
        from process import process_event  # before an event is taken, so that an error costs none
    except Stopped:
        raise
    except (ImportError, SyntaxError) as error:
        logger.error("not started: process.py: %s: %s", type(error).__name__, error)
        return 2
    except BaseException as error:
        logger.exception("not started: process.py: %s", describe(error))
        return 2
    try:
        with connect() as queue:
            return handle(queue, take(queue), process_event)
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

    Raises Stopped on a signal, redis.RedisError when Redis is lost or refuses.
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
            process_event(event)
    except Stopped:
        logger.warning("message %s: stopped, left to the next worker", message.id)
        hand_back(queue, message)
        raise
    except BaseException as error:  # an algorithm that calls exit() has not finished either
        reason = describe(error)
        logger.error("message %s: failed: %s", message.id, reason, exc_info=not is_own(error))
        if message.deliveries == MAX_DELIVERIES:
            set_aside(queue, message, reason)
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
    except KeyError:
        raise ValueError("no field msg_data") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"msg_data is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise ValueError("msg_data is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"msg_data is not JSON: {error}") from None
    if not isinstance(event, dict):
        raise ValueError("msg_data is not a JSON object")
    user_ids = event.get("userIds")
    if user_ids is not None and not (
        isinstance(user_ids, list)
        and all(isinstance(user_id, str) and user_id not in ("", ".", "..") for user_id in user_ids)
    ):
        raise ValueError("userIds is not a list of non-empty strings other than '.' and '..'")
    return event


@contextlib.contextmanager
def renewed_claim(queue: redis.Redis, message: Message) -> Iterator[None]:
    """Renew the claim on a message every RENEW_SECONDS, until the block ends or it is lost."""
    finished = threading.Event()

    def renew() -> None:
        # Signals are for the main thread: one that this thread takes would not wake it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGALRM})
        while not finished.wait(RENEW_SECONDS):
            try:
                if not is_claimed(queue, message):
                    logger.warning("message %s: claim lost, the work goes on", message.id)
                    return
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


def is_claimed(queue: redis.Redis, message: Message) -> bool:
    """Tell whether a delivery is still the last one, that is, no other worker took it over."""
    pending = queue.xpending_range(STREAM, GROUP, message.id, message.id, 1)
    return bool(pending) and pending[0]["times_delivered"] == message.deliveries


def hand_back(queue: redis.Redis, message: Message) -> None:
    """Let the next worker have a message at once, and do not count this delivery.

    It is not the event's fault that the run was stopped. Without Redis, the claim just ends.
    """
    idle, count = int(CLAIM_SECONDS * 1000), message.deliveries - 1
    with contextlib.suppress(redis.RedisError):
        if is_claimed(queue, message):
            queue.xclaim(
                STREAM, GROUP, CONSUMER, 0, [message.id], idle=idle, retrycount=count, justid=True
            )


def set_aside(queue: redis.Redis, message: Message, reason: str) -> None:
    """Move a message to the dead letters, with the reason, in one transaction.

    Raises redis.RedisError when Redis is lost or refuses; the message then stays in the queue.
    """
    # The message's own names are bytes, so that no field of it is replaced here.
    fields = {**message.fields, "error": printable(reason), "message_id": message.id}
    queue.xlen(DEAD_LETTER_STREAM)  # fails for a key of another type, before the acknowledgement
    try:
        with queue.pipeline(transaction=True) as transaction:
            transaction.xadd(DEAD_LETTER_STREAM, fields, maxlen=DEAD_LETTER_LENGTH)
            transaction.xack(STREAM, GROUP, message.id)
            transaction.execute()
    except redis.ResponseError as error:
        # redis-py puts the command in front, and with it the payload.
        refusal = str(error).rpartition("caused error: ")[2]
        raise redis.ResponseError(f"{DEAD_LETTER_STREAM}: {refusal}") from None
    logger.error("message %s: set aside in %s: %s", message.id, DEAD_LETTER_STREAM, reason)


def stop(signal_number: int, frame: FrameType | None) -> None:
    """Handle a signal: raise Stopped, and should that take GRACE_SECONDS, exit all the same.

    SIGTERM needs a handler: PID 1 of a container ignores a signal that has none.
    """
    status = 128 + signal_number
    signal.signal(signal.SIGALRM, lambda *_: os._exit(status))
    signal.alarm(GRACE_SECONDS)
    raise Stopped(status)


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
        retry=OutageRetry(EqualJitterBackoff(BACKOFF_SECONDS, base=0.1), -1, outages),
    )


class OutageRetry(Retry):
    """The retry of redis-py, bounded by time, with one warning, and for outages only."""

    def call_with_retry(
        self,
        do: Callable[[], Any],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> Any:
        """Take, return and raise what redis.retry.Retry does."""
        failures, gone_at = 0, 0.0

        def is_outage(error: Exception) -> bool:
            nonlocal failures, gone_at
            raise_if_lasting(error)
            failures += 1
            if failures == 1:  # it may be just this connection that was cut
                gone_at = time.monotonic()
            elif failures == 2:
                raise_if_tls_is_spoken()
                logger.warning("Redis at %s is away: %s", redis_address(), error)
            return time.monotonic() - gone_at < OUTAGE_SECONDS

        return super().call_with_retry(do, fail, is_outage, with_failure_count)


def raise_if_lasting(error: Exception) -> None:
    """Raise redis.ConnectionError for an error that no waiting mends."""
    cause = error.__context__
    wrong_tls = isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError)
    if wrong_tls or isinstance(error, redis.AuthenticationError):
        raise error
    if "handshake" in str(cause):  # timed out: to a Redis without TLS it is half a command
        raise redis.ConnectionError("no answer in TLS, which TLS_CAFILE asks for") from None


def raise_if_tls_is_spoken() -> None:
    """Raise redis.ConnectionError if Redis speaks TLS while TLS_CAFILE is not set.

    Such a Redis cuts the connection without a word, just as one that goes away.
    """
    if not os.environ.get("TLS_CAFILE"):
        with contextlib.suppress(OSError):
            ssl.get_server_certificate(redis_address().rsplit(":", 1), timeout=1)
            raise redis.ConnectionError("it speaks TLS: set TLS_CAFILE to its CA certificate")


def redis_address() -> str:
    """Return host and port of the queue."""
    return f"{os.environ['REDIS_SERVICE_HOST']}:{os.environ['REDIS_SERVICE_PORT']}"


def environment_problems() -> list[str]:
    """Return what is missing or unusable in the environment, without the value of any secret."""
    value = os.environ.get
    problems = []
    if missing := [name for name in VARIABLES if not value(name)]:
        problems.append(f"missing or empty: {', '.join(missing)}")
    if (url := value("DV_URL")) and not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url):
        problems.append("DV_URL is not a plain http or https address")
    if (token := value("DV_TOKEN")) and not re.fullmatch(r"[!-~]+", token):
        problems.append("DV_TOKEN holds a space, a line break or what else no header can carry")
    port = value("REDIS_SERVICE_PORT")
    if port and not (re.fullmatch("[0-9]{1,5}", port) and int(port) in range(1, 65536)):
        problems.append(f"REDIS_SERVICE_PORT is not a port number: {port}")
    if ca_file := value("TLS_CAFILE"):
        try:
            ssl.create_default_context(cafile=ca_file)
        except OSError as error:
            problems.append(f"TLS_CAFILE cannot be used: {ca_file}: {error}")
    if (level := value("LOGLEVEL")) and level not in LOG_LEVELS:
        problems.append(f"LOGLEVEL is {level}, not one of {', '.join(LOG_LEVELS)}")
    return problems


def start_logging() -> None:
    """Log to standard output, where the cage captures it, one line a record."""
    level = os.environ.get("LOGLEVEL")
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level if level in LOG_LEVELS else "INFO", handlers=[handler])


class LogFormatter(logging.Formatter):
    """Keeps a record on its line, and what an exception may quote out of the log."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, exc_info: Any) -> str:
        """Return the tracebacks of an exception and its causes."""
        error, seen, texts = exc_info[1], [], []
        while error and error not in seen:  # a chain of causes may be a circle
            stack = "".join(traceback.format_tb(error.__traceback__))
            text = str(error) if is_own(error) else "(left out, as it may quote a user's data)"
            title = printable(f"{type(error).__name__}: {text}")
            texts.insert(0, f"Traceback (most recent call last):\n{stack}{title}")
            seen.append(error)
            error = error.__cause__ or error.__context__
        return "\n".join(texts)


def describe(error: BaseException) -> str:
    """Return what may be said of an exception from the algorithm.

    One that process.py defines speaks for itself. The text of any other may quote a user's data,
    as that of int("...") does.
    """
    return str(error) if is_own(error) else type(error).__name__


def is_own(error: BaseException) -> bool:
    """Tell whether process.py defines an exception's class."""
    return type(error).__module__ == "process"


def printable(text: str) -> str:
    """Return the text with all that could break a line escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


if __name__ == "__main__":
    sys.exit(main())
