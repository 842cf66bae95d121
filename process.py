"""The algorithm: edit `compute`, which turns one user's data into that user's result.

Edit `process_event` as well when one function per user is not enough. What both stand on is below:
`for_each_user`, which works on many users at once, and a small client of the Datavillage API.
"""

import json
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any
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
RETRY_AFTER_SECONDS = 60  # the longest pause that the API may ask for: the run seems dead meanwhile
RETRY_STATUSES = (429, 500, 502, 503, 504)  # overload and passing faults

logger = logging.getLogger(__name__)


def compute(user_id: str, data: str) -> str:
    """Return one user's result, as Turtle, from the user's ID and data, also Turtle.

    An exception fails this user and no other. The sample states how long the data is.
    """
    user = f"https://example.org/{quote(user_id, safe='')}"  # any ID makes a valid IRI
    return f"<{user}> <https://example.org/characters> {len(data)} .\n"


def process_event(event: dict[str, Any]) -> None:
    """Compute and store the result of each user that an event is about.

    Takes the event as published; its `userIds` is a list of non-empty strings, or None or absent
    for all active users. Raises ProcessingError if the API does not tell these, or if, after all
    users were tried, some had failed.
    """
    api = DatavillageApi()

    def work(user_id: str) -> None:
        api.store(user_id, compute(user_id, api.user_data(user_id)))

    user_ids = event.get("userIds")
    if user_ids is None:
        user_ids = api.active_users()
    stored = for_each_user(user_ids, work)
    if failed := set(user_ids) - stored.keys():
        raise ProcessingError(f"{len(failed):,} of {len(set(user_ids)):,} users failed")


def for_each_user(user_ids: Iterable[str], work: Callable[[str], Any]) -> dict[str, Any]:
    """Call `work` with each user's ID, each once, WORKERS side by side, in threads.

    Returns, by user ID, what it returned. A user whose work raised is not in there, but in the
    log, with the reason. On a stop, users under way are finished, and no more are begun.
    """
    users = dict.fromkeys(user_ids)
    waiting = iter(users)
    results: dict[str, Any] = {}
    failed: list[str] = []

    def work_in_turn() -> None:
        for user_id in waiting:
            try:
                results[user_id] = work(user_id)
            except BaseException as error:  # exit() for one user is no reason to leave the others
                failed.append(user_id)
                bug = not isinstance(error, ProcessingError)
                logger.error("user %r: %s", user_id, describe(error), exc_info=bug)

    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            workers = [pool.submit(work_in_turn) for _ in range(min(WORKERS, len(users)))]
            report_at = time.monotonic() + PROGRESS_SECONDS
            under_way = True
            while under_way:
                # In steps of a second: a signal that another thread takes does not end a wait.
                under_way = wait(workers, timeout=1).not_done
                if not under_way or time.monotonic() >= report_at:
                    done = len(results) + len(failed)
                    logger.info(f"{done:,} of {len(users):,} users, {len(failed):,} failed")
                    report_at += PROGRESS_SECONDS
        finally:
            list(waiting)  # takes the rest: on a stop, the workers find no user to begin
    return results


class ProcessingError(Exception):
    """What went wrong, in words that hold neither the token nor a user's data: they are logged."""


def describe(error: BaseException) -> str:
    """Return, on a line, what may be said of an exception: its text may quote a user's data.

    That is the text of a ProcessingError; of any other the type, and the places it came through.
    """
    if isinstance(error, ProcessingError):
        return str(error)
    places = traceback.extract_tb(error.__traceback__, limit=-30)  # recursion makes a thousand
    path = ", ".join(
        f"{os.path.basename(place.filename)}:{place.lineno} {place.name}"
        for place in places[1:] or places  # the first is the one that caught it
    )
    return f"{type(error).__name__} at {path}"


class DatavillageApi:
    """A client of the Datavillage API, for the application that the DV_* variables name.

    Threads may share it. Every call raises ProcessingError when it does not succeed.
    """

    def __init__(self) -> None:
        app, client = as_segment(os.environ["DV_APP_ID"]), as_segment(os.environ["DV_CLIENT_ID"])
        base = os.environ["DV_URL"].rstrip("/")
        self._users_url = f"{base}/clients/{client}/applications/{app}/activeUsers"
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {os.environ['DV_TOKEN']}"
        # Proxies and CA bundle are read here, once; else each request would look them up, and
        # a .netrc could replace the token.
        settings = self._session.merge_environment_settings(base, {}, None, None, None)
        self._session.proxies, self._session.verify = settings["proxies"], settings["verify"]
        self._session.trust_env = False
        retry = urllib3.Retry(
            RETRIES,
            status_forcelist=RETRY_STATUSES,
            raise_on_status=False,
            backoff_factor=BACKOFF_SECONDS,
            backoff_jitter=JITTER_SECONDS,
            retry_after_max=RETRY_AFTER_SECONDS,
        )
        for scheme in ("https://", "http://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=WORKERS, max_retries=retry))

    def active_users(self) -> list[str]:
        """Return the IDs of all users who are active in the application."""
        try:
            user_ids = json.loads(self._call("GET", self._users_url))
        except (ValueError, RecursionError):
            user_ids = None
        if not isinstance(user_ids, list) or not all(isinstance(item, str) for item in user_ids):
            raise ProcessingError(f"GET {self._users_url} answered no JSON array of strings")
        return user_ids

    def user_data(self, user_id: str) -> str:
        """Return a user's data, as Turtle. Raises UnicodeDecodeError if it is not UTF-8."""
        # By itself requests takes text/* for ISO-8859-1. Turtle is UTF-8 (W3C, RDF 1.1 Turtle).
        return self._call("GET", f"{self._users_url}/{as_segment(user_id)}/data").decode("utf-8")

    def store(self, user_id: str, turtle: str, kind: str = "inferences") -> None:
        """Store Turtle as a user's `inferences` or `explains`, in place of earlier ones."""
        if not isinstance(turtle, str):
            found = type(turtle).__name__
            raise ProcessingError(f"the result is {found}, not str: no return? or is it async?")
        url = f"{self._users_url}/{as_segment(user_id)}/{kind}"
        headers = {"Content-Type": "text/turtle"}
        self._call("PUT", url, data=turtle.encode("utf-8"), headers=headers)

    def _call(self, method: str, url: str, **content: Any) -> bytes:
        options = {"timeout": TIMEOUT_SECONDS, "stream": True, **content}
        try:
            # As a stream, an answer that is not read closes its connection. That matters after an
            # interim one (103): the real one comes behind it, and would answer the next call.
            # A redirect is not followed: a PUT would be sent again as a GET.
            with self._session.request(method, url, allow_redirects=False, **options) as response:
                if 200 <= response.status_code < 300:
                    return response.content
                raise ProcessingError(f"{method} {url} answered {response.status_code}")
        except requests.RequestException as error:
            raise ProcessingError(f"{method} {url}: {reason_of(error)}") from None


def as_segment(text: str) -> str:
    """Return the text percent-encoded as one path segment (RFC 3986, 3.3).

    Raises ProcessingError for what leads to another resource however encoded.
    """
    if text in ("", ".", ".."):
        raise ProcessingError(f"{text!r} cannot be part of a URL")
    return quote(text, safe="")


def reason_of(error: requests.RequestException) -> str:
    """Return why a call failed, in words where these hold no header and no part of an answer."""
    failure = getattr(error.args[0], "reason", error.args[0])  # of the last retry
    errors = urllib3.exceptions
    in_words = isinstance(failure, (errors.TimeoutError, errors.SSLError, errors.ProxyError))
    return str(failure) if in_words else type(error).__name__
