"""Take one event from the cage's Redis queue, hand it to process.py, acknowledge it, exit.

Delivery is at least once: an event is acknowledged when its work is done, and its claim renewed
until then. The event of a worker that fell silent goes to the next one that asks. An event that
is malformed, or that MAX_DELIVERIES deliveries did not finish, is set aside as a dead letter.

Exit status:
    0    the event was processed
    1    the event failed: it is delivered again later, or was set aside
    2    not started, or Redis was lost: the event stays in the queue
    143  stopped by SIGTERM or Ctrl-C: an event that was not finished stays in the queue
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
from urllib.parse import urlsplit

import redis
import requests
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"

try:
    import process

    callable(process.process_event)  # without it, each event would be taken and fail
except BaseException as error:
    if __name__ != "__main__" or isinstance(error, KeyboardInterrupt):
        raise
    # Whatever process.py has set, this is to be seen. No user's data is there yet, to be quoted.
    sys.stdout = os.fdopen(1, "w", errors="backslashreplace", closefd=False)
    logging.disable(logging.NOTSET)
    logging.basicConfig(format=LOG_FORMAT, stream=sys.stdout, level="INFO", force=True)
    logging.exception("not started: process.py cannot be imported")
    sys.exit(2)

# What tells whether the value of a variable can be used: by a true result, and no error.
VARIABLES: dict[str, Callable[[str], object]] = {
    "DV_URL": lambda url: is_address(url),
    "DV_TOKEN": re.compile(r"[!-~]+").fullmatch,  # what a header can carry
    "DV_APP_ID": process.as_segment,
    "DV_CLIENT_ID": process.as_segment,
    "REDIS_SERVICE_HOST": lambda host: re.fullmatch(r"\S+", host) and host.encode("idna"),
    "REDIS_SERVICE_PORT": lambda port: re.fullmatch("[0-9]+", port) and 0 < int(port) < 65_536,
    "TLS_CAFILE": lambda path: is_ca_file(path),
    "REQUESTS_CA_BUNDLE": lambda path: os.path.isdir(path) or is_ca_file(path),
    "CURL_CA_BUNDLE": lambda path: os.path.isdir(path) or is_ca_file(path),
    "LOGLEVEL": re.compile("(?i)(DEBUG|INFO|WARNING|ERROR|CRITICAL)?").fullmatch,
}

STREAM = "events"
GROUP = "consummers"  # spelled so by the platform
# Tells in XPENDING which machine holds an event. Workers may share a name, for Redis keeps claims
# by event; a name for each process would stay behind in Redis after each run.
CONSUMER = socket.gethostname()
DEAD_LETTER_STREAM = "events:dead-letter"
DEAD_LETTER_LENGTH = 1_000  # entries, about: the bound that the platform sets for events
MAX_DELIVERIES = 3  # enough to outlast a passing fault, few enough to get past an event that kills
CLAIM_SECONDS = 60  # silence after which a worker has lost its event
RENEW_SECONDS = 4  # a stop is noted then, too: soon, for Docker kills ten seconds after its signal
WAIT_SECONDS = 5  # one blocking read; between two, abandoned events are looked for
SOCKET_TIMEOUT_SECONDS = 8  # more than WAIT_SECONDS, or each quiet wait would end as an error
RETRIES = 18  # of one command: with the pauses between them, a good minute, time for a restart
BACKOFF_SECONDS = 5  # the longest of these pauses: Redis is found soon after it is back
# What is retried: a Redis that is away, or that was the primary until a failover. By default
# socket.timeout is an outage too, and redis-py then retries each of its retries.
OUTAGES = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.ReadOnlyError,
    redis.exceptions.MasterDownError,
)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

logger = logging.getLogger("index")  # the name __main__ would not tell whose it is


class Message(NamedTuple):
    """An entry of the stream, as delivered."""

    id: str
    fields: dict[bytes, bytes]
    deliveries: int  # with this one


class Stop:
    """The request to stop, by SIGTERM or Ctrl-C, and the handler of these signals."""

    process_id = os.getpid()
    asked = False
    interrupts = True  # until the work has ended: what follows is short, and better done

    def __call__(self, signal_number: int, frame: object) -> None:
        """Interrupt what the main thread does, at the first signal; a second changes nothing."""
        if os.getpid() != self.process_id:  # a child that the algorithm forked: its own signal
            signal.signal(signal_number, signal.SIG_DFL)
            signal.raise_signal(signal_number)
        is_first, self.asked = not self.asked, True
        if is_first and self.interrupts:
            raise KeyboardInterrupt


def main() -> int:
    """Process one event; return the exit status."""
    stop, status = Stop(), 2
    try:
        # Also PID 1 of a container and a job in the background are to be stopped by a signal.
        for signal_number in STOP_SIGNALS:
            signal.signal(signal_number, stop)
        if names := unusable_variables():
            logger.error("not started: missing or unusable: %s", ", ".join(names))
        else:
            logging.getLogger().setLevel(os.environ.get("LOGLEVEL", "").upper() or "INFO")
            with connect() as queue:
                status = handle(queue, take(queue), stop)
    except KeyboardInterrupt:
        stop.asked = True  # by Ctrl-C before its handler was there
    except redis.RedisError as error:
        kind, reason = type(error).__name__, without_arguments(error)
        logger.error("Redis at %s: %s: %s", redis_address(), kind, reason)
    for signal_number in STOP_SIGNALS:
        signal.signal(signal_number, signal.SIG_IGN)  # Python's own end takes a while
    return 143 if stop.asked else status


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


def handle(queue: redis.Redis, message: Message, stop: Stop) -> int:
    """Process a message and acknowledge it, or keep it, or set it aside; return the exit status.

    Raises redis.RedisError when Redis is lost or refuses.
    """
    if message.deliveries > MAX_DELIVERIES:
        set_aside(queue, message, f"delivered {MAX_DELIVERIES} times, acknowledged by none")
        return 1
    try:
        event = parse(message.fields)
    except ValueError as error:
        set_aside(queue, message, f"malformed: {error}")
        return 1
    logger.info("message %s: delivery %d of %d", message.id, message.deliveries, MAX_DELIVERIES)
    started = time.monotonic()
    claim = Claim(queue, message, stop)
    try:
        with claim.renewed():
            returned = process.process_event(event)
            if stop.asked:
                raise KeyboardInterrupt  # which the algorithm has swallowed
            stop.interrupts = False
            if returned is not None:
                cause = process.unfinished(returned) or "it is to return nothing"
                kind = type(returned).__name__
                raise process.ProcessingError(f"process_event returned {kind}: {cause}")
    except BaseException as error:  # an algorithm that calls exit() has not finished either
        stop.interrupts = False
        if stop.asked:
            reason = "stopped"
            logger.warning("message %s: stopped", message.id)
        else:
            reason = process.describe(error)
            logger.error("message %s: failed: %s", message.id, reason, exc_info=error)
        leave(claim, reason)
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


class Claim:
    """The claim of this run on a message, which ends CLAIM_SECONDS after it was last renewed."""

    def __init__(self, queue: redis.Redis, message: Message, stop: Stop) -> None:
        self.queue, self.message, self.stop = queue, message, stop
        self.deliveries = message.deliveries  # as this run wrote it last
        self.lost = False

    @contextlib.contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew the claim every RENEW_SECONDS until the block ends, or another run has it."""
        finished = threading.Event()

        def renew() -> None:
            while not finished.wait(RENEW_SECONDS) and not self.lost:
                try:
                    self.renew()
                except (redis.RedisError, ValueError) as error:  # ValueError: closed meanwhile
                    reason = without_arguments(error)
                    logger.warning("message %s: claim not renewed: %s", self.message.id, reason)

        renewer = threading.Thread(target=renew, daemon=True)
        renewer.start()
        try:
            yield
        finally:
            finished.set()
            renewer.join(timeout=1)  # at once, unless it waits for a Redis that is away

    def renew(self, idle_seconds: float = 0) -> None:
        """Claim the message again, as if so many seconds ago, unless another worker has it.

        From a stop on, this delivery is not counted. Raises redis.RedisError.
        """
        if self.is_held():
            idle, ids = int(idle_seconds * 1000), [self.message.id]
            deliveries = self.message.deliveries - 1 if self.stop.asked else None
            # JUSTID: without it a renewal would count as a delivery.
            options = {"idle": idle, "retrycount": deliveries, "justid": True}
            self.queue.xclaim(STREAM, GROUP, CONSUMER, 0, ids, **options)
            self.deliveries = self.deliveries if deliveries is None else deliveries

    def is_held(self) -> bool:
        """Tell whether this worker still has the message; if not, warn.

        Each takeover raises the count of deliveries, and no claim is left after the end of another
        worker. That of an entry that was trimmed is removed by a renewal, too (Redis 7): it counts
        as held, for nobody can tell whether it was finished. Raises redis.RedisError.
        """
        if not self.lost:
            message_id = self.message.id
            try:
                pending = self.queue.xpending_range(STREAM, GROUP, message_id, message_id, 1)
            except redis.ResponseError as error:
                if not str(error).startswith("NOGROUP"):
                    raise
                pending = []  # Redis lost its data
            if pending:
                self.lost = pending[0]["times_delivered"] > self.deliveries
            else:
                self.lost = bool(self.queue.xrange(STREAM, message_id, message_id))
            if self.lost:
                logger.warning("message %s: another worker has it, left alone", message_id)
        return not self.lost


def leave(claim: Claim, reason: str) -> None:
    """Leave a message that was not finished to the next worker, or set it aside with the reason.

    A stop is not the event's fault: the next worker has it at once, and this delivery is not
    counted. Raises redis.RedisError when Redis is lost or refuses.
    """
    queue, message = claim.queue, claim.message
    if not claim.is_held():
        return
    if not queue.xrange(STREAM, message.id, message.id):
        set_aside(queue, message, f"{reason}; meanwhile it was trimmed from the queue")
    elif claim.stop.asked:
        claim.renew(idle_seconds=CLAIM_SECONDS)
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
    return redis.Redis(
        host=os.environ["REDIS_SERVICE_HOST"],
        port=int(os.environ["REDIS_SERVICE_PORT"]),
        ssl=bool(ca_file),
        ssl_ca_certs=ca_file,
        socket_timeout=SOCKET_TIMEOUT_SECONDS,
        retry=Retry(OutageBackoff(BACKOFF_SECONDS, base=0.1), RETRIES, OUTAGES),
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


def without_arguments(error: Exception) -> str:
    """Return an error's text, cut before a command's arguments: they may hold an event."""
    return str(error).partition(", with args")[0]


def unusable_variables() -> list[str]:
    """Return the names of the variables that are missing or unusable; a value may be a secret."""

    def is_usable(name: str) -> bool:
        try:
            return bool(VARIABLES[name](os.environ.get(name, "")))
        except (OSError, ValueError, process.ProcessingError):
            return False

    return [name for name in VARIABLES if not is_usable(name)]


def is_address(url: str) -> bool:
    """Tell whether a URL can be that of the API. Raises OSError or ValueError if it cannot."""
    host = urlsplit(requests.Request("GET", url).prepare().url).hostname
    return bool(re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url) and host.encode("idna"))


def is_ca_file(path: str) -> bool:
    """Tell whether a path is empty, or of CA certificates. Raises OSError for any other file."""
    return not path or bool(ssl.create_default_context(cafile=path))


def start_logging() -> None:
    """Log to standard output, where the cage captures it, one line a record.

    Here users' data is kept out of the log. It could come with the text of an exception, wherever
    Python or a logger would print it: `process.describe` tells what may be said of one, and the
    handler drops the exception itself, which only the rehearsal shows. And it could come from
    libraries, which quote what they work on: only the project's own loggers speak.
    """
    if not hasattr(sys.stdout, "reconfigure"):  # process.py has set another
        sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    logging.disable(logging.NOTSET)
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(keep_data_out)
    logging.basicConfig(format=LOG_FORMAT, handlers=[handler], force=True)
    for name in filter(is_own, logging.root.manager.loggerDict):
        logging.getLogger(name).disabled = False  # logging.config disables those that are there
    logging.captureWarnings(True)
    logging.lastResort = None
    logging.raiseExceptions = False
    sys.unraisablehook = threading.excepthook = lambda unraised: logger.error(
        "left unraised: %s", process.describe(unraised.exc_value), exc_info=unraised.exc_value
    )


def keep_data_out(record: logging.LogRecord) -> bool:
    """Strip a record of its exception; tell whether its logger is the project's own."""
    record.exc_info = record.exc_text = None
    return is_own(record.name)


def is_own(name: str) -> bool:
    """Tell whether a logger is `index`, `process` or `process.…`."""
    return name.partition(".")[0] in ("index", "process")


if __name__ == "__main__":
    start_logging()
    sys.exit(main())
