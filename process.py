"""The algorithm: edit `compute`, which turns one user's data into that user's result.

If one function per user is not enough, edit `process_event` too. The helpers that both use are
below: `for_each_user`, which works on many users in parallel, and a client of the Datavillage API.
"""

import contextlib
import inspect
import io
import json
import logging
import os
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import quote

import requests
from requests.adapters import HTTPAdapter

# YOUR ALGORITHM: add constants, a logger and helper functions here.


def compute(user_id: str, data: str) -> str:
    """Return one user's result, as Turtle, from the user's ID and data, also Turtle.

    If it raises, only this user fails. This example returns the length of the data.
    """
    user = f"https://example.org/{quote(user_id, safe='')}"  # a valid IRI for any ID
    return f"<{user}> <https://example.org/characters> {len(data)} .\n"


def process_event(event: dict[str, Any]) -> None:
    """Compute and store the results of the users named in an event.

    Takes the event as it was published. Its `userIds` is a list of strings; None or missing means
    all active users. Raises ProcessingError after the last user if any of them failed.
    """
    api = DatavillageApi()
    lock = threading.Lock()  # many libraries are not thread-safe; rdflib's SPARQL is not

    def work(user_id: str) -> None:
        data = api.user_data(user_id)
        with lock:
            result = compute(user_id, data)
        api.store(user_id, result)

    user_ids = event.get("userIds")
    for_each_user(api.active_users() if user_ids is None else user_ids, work)


# THE HELPERS

WORKERS = 16  # users in parallel, each with its own connection
PROGRESS_SECONDS = 30  # between progress lines in the log
TIMEOUT_SECONDS = (5, 60)  # to connect or send a block; between two parts of a response
PAUSES_SECONDS = (0, 1, 2, 4, 8)  # between six tries; survives an outage of 15 s
LONGEST_PAUSE_SECONDS = 60  # upper limit for Retry-After

logger = logging.getLogger(__name__)


def for_each_user(
    user_ids: Iterable[str], work: Callable[[str], Any], *, skip_failed: bool = False
) -> dict[str, Any]:
    """Call `work` once for each user ID, in WORKERS threads.

    Returns the results by user ID, in the order of `user_ids`. Users whose work raises are logged.
    After the last user, raises ProcessingError if any failed; with `skip_failed`, leaves the failed
    users out of the results instead.
    """
    users = dict.fromkeys(user_ids)
    waiting = iter(users)  # unlike a generator, threads can share it
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}

    def work_in_turn() -> None:
        for user_id in waiting:
            try:
                results[user_id] = check_that_it_ran(work(user_id))
            except BaseException as error:  # includes exit()
                failed[user_id] = describe(error)
                unexpected = not isinstance(error, ProcessingError)  # logs a traceback at home
                logger.error("user %r: %s", user_id, failed[user_id], exc_info=unexpected)

    logged = ""
    with ThreadPoolExecutor(WORKERS) as pool:
        workers = [pool.submit(work_in_turn) for _ in range(min(WORKERS, len(users)))]
        in_progress = True
        while in_progress:
            in_progress = wait(workers, timeout=PROGRESS_SECONDS).not_done
            done = len(results) + len(failed)
            progress = f"{done:,} of {len(users):,} users, {len(failed):,} failed"
            if progress != logged:  # not over and over at the prompt of a debugger
                logger.info(progress)
            logged = progress
    for worker in workers:
        worker.result()  # raises what went wrong outside of `work`
    if failed and not skip_failed:
        reasons = [f"{user_id!r}: {failed[user_id]}" for user_id in users if user_id in failed]
        reasons[3:] = ["…"] if len(failed) > 3 else []
        count = f"{len(failed):,} of {len(users):,} users failed"
        raise ProcessingError(f"{count}: {'; '.join(reasons)}")
    return {user_id: results[user_id] for user_id in users if user_id in results}


def check_that_it_ran(returned: Any) -> Any:
    """Return what a call returned; raise ProcessingError if the function's body never ran."""
    kinds = (inspect.isawaitable, inspect.isgenerator, inspect.isasyncgen)
    if any(is_kind(returned) for is_kind in kinds):
        kind = type(returned).__name__
        raise ProcessingError(f"returned {kind}, so it never ran: remove async or yield")
    return returned


class ProcessingError(Exception):
    """What went wrong, in a message that is logged: it must not contain the token or user data."""


def describe(error: BaseException) -> str:
    """Return one line about an exception that is safe to log.

    The message of a ProcessingError; for others only the type and the places in the code, because
    the message may quote user data.
    """
    if isinstance(error, ProcessingError):
        with contextlib.suppress(BaseException):  # from an author's own `__str__`
            if message := " ".join(str(error).split()):
                return message
    places = [
        f"{os.path.basename(place.filename)}:{place.lineno} {place.name}"
        for place in traceback.extract_tb(error.__traceback__)
    ]
    places = places[1:] or places  # without the one that caught it
    if len(places) > 8:
        places[4:-4] = ["…"]
    return f"{type(error).__name__} at {', '.join(places)}"


class DatavillageApi:
    """A client of the Datavillage API for the application named by the DV_* variables.

    It is thread-safe. Its methods raise ProcessingError if a call fails.
    """

    def __init__(self) -> None:
        app, client = as_segment(os.environ["DV_APP_ID"]), as_segment(os.environ["DV_CLIENT_ID"])
        base, token = os.environ["DV_URL"].rstrip("/"), os.environ["DV_TOKEN"]
        self._users_url = f"{base}/clients/{client}/applications/{app}/activeUsers"
        self._headers = {"Authorization": f"Bearer {token}", "Accept-Encoding": "gzip"}
        # A Session sends one user's cookies with the next user's call, parses redirects and uses
        # .netrc. So it only reads the proxies and the CA bundle here, once; the adapter sends.
        self._options = requests.Session().merge_environment_settings(base, {}, None, None, None)
        self._adapter = HTTPAdapter(pool_maxsize=WORKERS)

    def check(self) -> None:
        """Raise ProcessingError if the API is down, or rejects the token or the application."""
        try:
            self.active_users()
        except ProcessingError as error:
            if not str(error).endswith(" answered 403"):  # this call alone needs another role
                raise

    def active_users(self) -> list[str]:
        """Return the IDs of all active users of the application."""
        try:
            user_ids = json.loads(self._call("GET", self._users_url))
        except (ValueError, RecursionError):
            user_ids = None
        if not isinstance(user_ids, list) or not all(isinstance(item, str) for item in user_ids):
            raise ProcessingError(f"GET {self._users_url} answered no JSON array of strings")
        return user_ids

    def user_data(self, user_id: str) -> str:
        """Return a user's data, as Turtle."""
        data = self._call("GET", f"{self._users_url}/{as_segment(user_id)}/data")
        return data.decode("utf-8-sig")  # Turtle is UTF-8 (W3C); requests would say Latin-1

    def store(self, user_id: str, turtle: str, kind: str = "inferences") -> None:
        """Store Turtle as a user's `inferences` or `explains`; replaces what was there."""
        if not isinstance(turtle, str):
            raise ProcessingError(f"the result is {type(turtle).__name__}, not str")
        url = f"{self._users_url}/{as_segment(user_id)}/{kind}"
        self._call("PUT", url, turtle.removeprefix("\ufeff").encode("utf-8"))

    def _call(self, method: str, url: str, turtle: bytes = b"") -> bytes:
        """Return the body of the response to a GET; retry after a temporary error."""
        headers = self._headers | ({"Content-Type": "text/turtle"} if method == "PUT" else {})
        options = {"timeout": TIMEOUT_SECONDS, **self._options}
        for pause in (*PAUSES_SECONDS, None):
            asked_pause = 0
            # As a file, because a bytes body must be sent within the connect timeout.
            body = io.BytesIO(turtle) if turtle else b""
            try:
                request = requests.Request(method, url, headers, data=body).prepare()
                # Leaving the block unread closes the connection. Kept after an interim response
                # (103), it would bring the real response as the answer to the next call.
                with self._adapter.send(request, **options) as response:
                    status = response.status_code
                    if method == "PUT" and 200 <= status < 300:
                        response.raw.drain_conn()  # its body does not matter; reuse the connection
                        return b""
                    is_page = "html" in response.headers.get("Content-Type", "").lower()
                    if status == 200 and not is_page:
                        return response.content
                    failure = f" answered {status}{' with a web page' if status == 200 else ''}"
                    is_temporary = status in (408, 429) or status >= 500
                    if (value := response.headers.get("Retry-After", "")).isdecimal():
                        asked_pause = min(int(value[:9]), LONGEST_PAUSE_SECONDS)
            except Exception as error:
                failure = f": {type(error).__name__}"  # its message may quote the response
                is_temporary = not isinstance(error, ValueError)
            if not is_temporary or pause is None:
                break
            time.sleep(max(pause * random.uniform(1, 1.5), asked_pause))
        raise ProcessingError(f"{method} {url}{failure}")


def as_segment(text: str) -> str:
    """Percent-encode a text as one path segment of a URL (RFC 3986, 3.3)."""
    if text in ("", ".", ".."):  # these would change the path
        raise ProcessingError(f"{text!r} cannot be part of a URL")
    return quote(text, safe="")
