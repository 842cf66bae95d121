"""The algorithm: edit `compute`, which turns one user's data into that user's result.

Edit `process_event` as well when one function per user is not enough. Below it is what both stand
on: the work on one user, and a small client of the Datavillage API.
"""

import contextlib
import json
import logging
import os
import signal
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, Literal
from urllib.parse import quote

import requests
import urllib3
from requests.adapters import HTTPAdapter

WORKERS = 16  # users worked on side by side, each on a connection of its own
PROGRESS_SECONDS = 30  # from one line about the progress of a long job to the next
TIMEOUT_SECONDS = (5, 60)  # to connect; to wait for more of an answer
RETRIES = 5  # of one call: with the pauses below, an outage of 15 seconds is ridden out
BACKOFF_SECONDS = 0.5  # pauses of 0, 2, 4, 8 and 16 times this
JITTER_SECONDS = 0.5  # added to a pause at most, so that 16 workers do not come back as one
RETRY_STATUSES = (429, 500, 502, 503, 504)  # overload and passing faults
REMEDIES = {
    401: " (is DV_TOKEN valid?)",
    403: " (may DV_TOKEN do this?)",
    404: " (are DV_CLIENT_ID, DV_APP_ID and the user right?)",
}

logger = logging.getLogger(__name__)
# urllib3 would warn at each retry of each call; here one line says what came of them.
logging.getLogger("urllib3").setLevel(logging.ERROR)


def compute(user_id: str, data: str) -> str:
    """Return one user's result, as Turtle, from the user's ID and data, also Turtle.

    An exception fails this user and no other. The sample states how long the data is.
    """
    user = f"https://example.org/users/{quote(user_id, safe='')}"  # any ID makes a valid IRI
    return f"<{user}> <https://example.org/characters> {len(data)} .\n"


def process_event(event: dict[str, Any]) -> None:
    """Compute and store the result of each user that an event is about.

    Takes the event as published; its `userIds`, if any, is a list of non-empty strings, and none
    stands for all active users. Raises ProcessingError when the API does not tell the users, or
    after all of them were tried, when some failed.
    """
    with contextlib.closing(DatavillageApi()) as api:
        user_ids = event.get("userIds")
        if user_ids is None:
            user_ids = api.active_users()
        process_users(api, list(dict.fromkeys(user_ids)))


def process_users(api: "DatavillageApi", user_ids: list[str]) -> None:
    """Process users, WORKERS at a time; raise ProcessingError in the end if some failed."""
    waiting = iter(user_ids)
    under_way: set[Future[bool]] = set()
    processed = failed = 0
    report_at = time.monotonic() + PROGRESS_SECONDS
    # Signals are for the main thread: one that a worker takes would not wake it.
    left_to_main = signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGALRM}
    with ThreadPoolExecutor(WORKERS, "", signal.pthread_sigmask, left_to_main) as pool:
        while True:
            # Only what can start at once: memory stays flat, and a signal finds nothing queued.
            for user_id in islice(waiting, WORKERS - len(under_way)):
                under_way.add(pool.submit(process_user, api, user_id))
            if not under_way:
                break
            finished, under_way = wait(under_way, PROGRESS_SECONDS, FIRST_COMPLETED)
            processed += len(finished)
            failed += sum(not future.result() for future in finished)
            if time.monotonic() >= report_at or processed == len(user_ids):
                logger.info(f"{processed:,} of {len(user_ids):,} users, {failed:,} failed")
                report_at += PROGRESS_SECONDS
    if failed:
        raise ProcessingError(f"{failed:,} of {len(user_ids):,} users failed")


def process_user(api: "DatavillageApi", user_id: str) -> bool:
    """Compute and store one user's result; return whether that went well, and log why not."""
    try:
        api.store(user_id, compute(user_id, api.user_data(user_id)))
    except ProcessingError as error:
        logger.error("user %s: %s", user_id, error)
        return False
    except BaseException:  # exit() for one user is no reason to leave the others
        logger.exception("user %s: compute failed", user_id)
        return False
    return True


class ProcessingError(Exception):
    """What went wrong, in words that hold neither the token nor a user's data: they are logged."""


class DatavillageApi:
    """A client of the Datavillage API, for the application that the DV_* variables name.

    Threads may share it. Every call raises ProcessingError when it does not succeed.
    """

    def __init__(self) -> None:
        client, application = (
            as_segment(os.environ[name]) for name in ("DV_CLIENT_ID", "DV_APP_ID")
        )
        base = os.environ["DV_URL"].rstrip("/")
        self._users_url = f"{base}/clients/{client}/applications/{application}/activeUsers"
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {os.environ['DV_TOKEN']}"
        # Proxies and CA bundle are read here, once; else each request would look them up, and
        # a .netrc could replace the token.
        environment = self._session.merge_environment_settings(base, {}, None, None, None)
        self._session.proxies = environment["proxies"]
        self._session.verify = environment["verify"]
        self._session.trust_env = False
        retry = urllib3.Retry(
            RETRIES,
            status_forcelist=RETRY_STATUSES,
            raise_on_status=False,
            backoff_factor=BACKOFF_SECONDS,
            backoff_jitter=JITTER_SECONDS,
        )
        adapter = HTTPAdapter(pool_maxsize=WORKERS, max_retries=retry)
        self._session.mount("https://", adapter)
        self._session.mount("http://", adapter)

    def active_users(self) -> list[str]:
        """Return the IDs of all users who are active in the application."""
        response = self._call("GET", self._users_url)
        try:
            user_ids = json.loads(response.content)
        except (ValueError, RecursionError):
            user_ids = None
        if not isinstance(user_ids, list) or not all(isinstance(item, str) for item in user_ids):
            raise ProcessingError(f"GET {self._users_url} answered no JSON array of strings")
        return user_ids

    def user_data(self, user_id: str) -> str:
        """Return a user's data, as Turtle."""
        url = f"{self._users_url}/{as_segment(user_id)}/data"
        try:
            # Not `text`: it takes text/* for ISO-8859-1. Turtle is UTF-8 (W3C, RDF 1.1 Turtle).
            return self._call("GET", url).content.decode("utf-8")
        except UnicodeDecodeError:
            raise ProcessingError(f"GET {url} answered no UTF-8") from None

    def store(
        self, user_id: str, turtle: str, kind: Literal["inferences", "explains"] = "inferences"
    ) -> None:
        """Store a user's result, as Turtle, in place of an earlier one of that kind."""
        if not isinstance(turtle, str):
            raise ProcessingError(f"the result is {type(turtle).__name__}, not str")
        self._call("PUT", f"{self._users_url}/{as_segment(user_id)}/{kind}", turtle.encode("utf-8"))

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def _call(self, method: str, url: str, turtle: bytes | None = None) -> requests.Response:
        headers = None if turtle is None else {"Content-Type": "text/turtle"}
        try:
            # A redirected PUT would be sent again as a GET.
            response = self._session.request(
                method,
                url,
                data=turtle,
                headers=headers,
                timeout=TIMEOUT_SECONDS,
                allow_redirects=False,
            )
        except OSError as error:  # as all exceptions of requests are
            raise ProcessingError(f"{method} {url}: {reason_of(error)}") from None
        status = response.status_code
        if not 200 <= status < 300:
            raise ProcessingError(f"{method} {url} answered {status}{REMEDIES.get(status, '')}")
        return response


def as_segment(text: str) -> str:
    """Return the text percent-encoded as one path segment (RFC 3986, 3.3).

    Raises ProcessingError for `.` and `..`, which lead to another resource however encoded.
    """
    if text in ("", ".", ".."):
        raise ProcessingError(f"'{text}' cannot be part of a URL")
    return quote(text, safe="", errors="surrogatepass")


def reason_of(error: OSError) -> str:
    """Return why a call failed, without what a header holds, or a broken answer."""
    if type(error) is OSError:
        return str(error)  # from requests: there is no CA bundle at this path
    failure = error.args[0] if error.args else None
    failure = getattr(failure, "reason", failure)  # of the last retry
    errors = urllib3.exceptions
    if isinstance(failure, (errors.TimeoutError, errors.SSLError, errors.ProxyError)):
        return str(failure)
    return type(failure if isinstance(failure, Exception) else error).__name__
