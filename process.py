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
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from random import uniform
from typing import Any
from urllib.parse import quote

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ConnectTimeoutError

# YOUR ALGORITHM: add constants and helper functions here.

logger = logging.getLogger("process")  # the log shows it, and any "process.something"


def compute(user_id: str, data: str) -> str:
    """Return one user's result, as Turtle, from the user's ID and data, also Turtle.

    If it raises, the other users are still processed, but the event fails and comes again with all
    of them. This example returns the length of the data.
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


def check_before_event() -> None:
    """Raise an exception if every event would fail; each run calls it before it takes one.

    The run then ends, and its event stays in the queue. If your algorithm is not about users, its
    API may have no list of them: replace the call with a check of your own, or with `pass`.
    """
    DatavillageApi().check()


# THE HELPERS

WORKERS = globals().get("WORKERS", 16)  # users in parallel, unless you define it above
PROGRESS_SECONDS = 30  # between progress lines in the log
helpers_logger = logging.getLogger("process")  # not `logger`, which you may redefine


class ProcessingError(Exception):
    """An error whose message is logged, so it must not contain the token or user data."""


class EventRejected(ProcessingError):
    """Raised by `process_event` for an event that can never succeed: it becomes a dead letter."""


def for_each_user(
    user_ids: Iterable[str], work: Callable[[str], Any], *, skip_failed: bool = False
) -> dict[str, Any]:
    """Call `work` once for each user ID, in WORKERS threads, or in fewer if no more can be started.

    Returns the results by user ID, in the order of `user_ids`. Users whose work raises are logged.
    After the last user, raises ProcessingError if any failed; with `skip_failed`, leaves the failed
    users out of the results instead.
    """
    users = dict.fromkeys(user_ids)
    waiting = deque(users)  # unlike an iterator, threads may share it, even without Python's lock
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}

    def work_in_turn() -> None:
        while True:
            try:
                user_id = waiting.popleft()
            except IndexError:
                return
            threading.current_thread().name = f"user {user_id!r}"  # shown at home while in progress
            try:
                results[user_id] = check_that_it_ran(work(user_id))
            except BaseException as error:  # includes exit()
                failed[user_id] = describe_error(error)
                unexpected = not isinstance(error, ProcessingError)  # shows a traceback at home
                helpers_logger.error("user %r: %s", user_id, failed[user_id], exc_info=unexpected)

    def log_progress(in_progress: list[str]) -> None:
        done = len(results) + len(failed)
        text = f"{done:,} of {len(users):,} users, {len(failed):,} failed"
        helpers_logger.info(text, extra={"in_progress": in_progress})  # which shows at home

    number = min(WORKERS, len(users))
    threads = [threading.Thread(target=work_in_turn, daemon=True) for _ in range(number)]
    with contextlib.suppress(RuntimeError):  # the container allows no more threads
        for thread in threads:
            thread.start()
    if not any(thread.ident for thread in threads):  # nor a single one
        work_in_turn()
    due = time.monotonic() + PROGRESS_SECONDS
    while alive := [thread for thread in threads if thread.is_alive()]:
        alive[0].join(max(0, due - time.monotonic()))
        if time.monotonic() >= due:
            log_progress([thread.name for thread in alive])
            due = time.monotonic() + PROGRESS_SECONDS
    log_progress([])
    if len(results) + len(failed) < len(users):
        raise ProcessingError("a thread ended early")  # because of a MemoryError
    if failed and not skip_failed:
        reasons = [f"{user_id!r}: {failed[user_id]}" for user_id in users if user_id in failed]
        shown = reasons if len(reasons) <= 3 else [*reasons[:3], "…"]
        raise ProcessingError(f"{len(failed):,} of {len(users):,} users failed: {'; '.join(shown)}")
    return {user_id: results[user_id] for user_id in users if user_id in results}


def check_that_it_ran(returned: Any) -> Any:
    """Return what a call returned; raise ProcessingError if the function's body never ran."""
    is_generator = inspect.isgenerator(returned) or inspect.isasyncgen(returned)
    if is_generator or inspect.isawaitable(returned):
        kind = type(returned).__name__
        raise ProcessingError(f"returned {kind}, so it never ran: remove async or yield")
    return returned


def describe_error(error: BaseException) -> str:
    """Return one line about an exception that is safe to log.

    This is the message of a ProcessingError. For others it is the type and the places in the code,
    because the message may quote user data.
    """
    if isinstance(error, ProcessingError):
        with contextlib.suppress(BaseException):  # from an author's own `__str__`
            if message := " ".join(str(error).split()):
                return message
    places = [
        f"{os.path.basename(place.filename)}:{place.lineno} {place.name}"
        for place in traceback.extract_tb(error.__traceback__)
    ]
    places = places[1:] or places  # without the place that caught it
    if len(places) > 8:
        places = [*places[:4], "…", *places[-4:]]
    return f"{type(error).__name__} at {', '.join(places)}"


class DatavillageApiError(ProcessingError):
    """A failed call of the API; `status` is the HTTP status, or None if there was no answer."""

    def __init__(self, message: str, status: int | None, pause: int | None) -> None:
        super().__init__(message)
        self.status = status
        self.pause = pause  # minimum seconds before a retry; None if it must not be retried


class DatavillageApi:
    """A client of the Datavillage API for the application named by the DV_* variables.

    It is thread-safe. Its methods raise ProcessingError if a call fails.
    """

    TIMEOUT_SECONDS = (5, 60)  # to connect or send a block; for the next part of a response
    PAUSES_SECONDS = (0, 1, 2, 4, 8)  # between six attempts; survives an outage of 15 s
    LONGEST_PAUSE_SECONDS = 60  # upper limit for Retry-After
    REPEATABLE = ("GET", "HEAD", "PUT", "DELETE", "OPTIONS")  # twice is as good as once (RFC 9110)

    def __init__(self) -> None:
        app, client = (as_path_segment(os.environ[name]) for name in ("DV_APP_ID", "DV_CLIENT_ID"))
        self._base, token = os.environ["DV_URL"].rstrip("/"), os.environ["DV_TOKEN"]
        self._users = f"/clients/{client}/applications/{app}/activeUsers"
        self._headers = {"Authorization": f"Bearer {token}", "Accept-Encoding": "gzip"}
        # A Session sends one user's cookies with the next user's call, parses redirects and uses
        # .netrc. So it only reads the proxies and the CA bundle here, once; the adapter sends.
        session = requests.Session()
        try:
            self._options = session.merge_environment_settings(self._base, {}, None, None, None)
        except ValueError:
            raise ProcessingError(f"DV_URL is not an address: {self._base!r}") from None
        self._adapter = HTTPAdapter(pool_maxsize=WORKERS)

    def check(self) -> None:
        """Raise ProcessingError if the API is down, or knows no such token or application."""
        try:
            self.active_users()
        except DatavillageApiError as error:
            if error.status != 403:  # only listing the users needs another role
                raise

    def active_users(self) -> list[str]:
        """Return the IDs of all active users of the application."""
        try:
            user_ids = json.loads(self._call("data", "GET", self._users))
        except (ValueError, RecursionError):
            user_ids = None
        if not isinstance(user_ids, list) or not all(isinstance(item, str) for item in user_ids):
            url = f"{self._base}{self._users}"
            raise ProcessingError(f"GET {url} answered no JSON array of strings")
        return user_ids

    def user_data(self, user_id: str) -> str:
        """Return a user's data, as Turtle."""
        data = self._call("data", "GET", f"{self._users}/{as_path_segment(user_id)}/data")
        return data.decode("utf-8-sig")  # Turtle is UTF-8 (W3C); requests would guess Latin-1

    def store(self, user_id: str, turtle: str, kind: str = "inferences") -> None:
        """Store Turtle as a user's `inferences` or `explains`; replaces what was there."""
        if not isinstance(check_that_it_ran(turtle), str):
            raise ProcessingError(f"the result is {type(turtle).__name__}, not str: make it a text")
        path = f"{self._users}/{as_path_segment(user_id)}/{kind}"
        body = turtle.removeprefix("\ufeff").encode("utf-8")
        self._call("nothing", "PUT", path, body, "text/turtle")

    def call(
        self, method: str, path: str, body: bytes = b"", content_type: str = "application/json"
    ) -> bytes:
        """Call another endpoint, at a `path` below DV_URL; return the body of the answer.

        Any 2xx succeeds. A POST or PATCH that may have arrived is not repeated.
        """
        if not path.startswith("/") or path.startswith("//"):
            raise ProcessingError(f"{path!r} is not a path below DV_URL, such as '/a/b'")
        if not isinstance(body, bytes):
            raise ProcessingError(f"the body is {type(body).__name__}, not bytes: encode it")
        return self._call("anything", method.upper(), path, body, content_type if body else "")

    def _call(self, *request: Any) -> bytes:
        """Make a request, and repeat it if its error allows that; takes what `_request` takes."""
        for pause in self.PAUSES_SECONDS:
            try:
                return self._request(*request)
            except DatavillageApiError as error:
                if error.pause is None:
                    raise
                time.sleep(max(pause * uniform(1, 1.5), error.pause))
        return self._request(*request)

    def _request(
        self, wants: str, method: str, path: str, body: bytes = b"", content_type: str = ""
    ) -> bytes:
        """Make one request; return the body of the answer, or b"" if the caller wants "nothing".

        Any 2xx succeeds, but if the caller wants "data", only a 200 that is not a web page.
        """
        url, status, pause = f"{self._base}{path}", None, 0
        headers = self._headers | ({"Content-Type": content_type} if content_type else {})
        # As a file, because a bytes body must be sent within the connect timeout.
        data = io.BytesIO(body) if body else b""
        try:
            request = requests.Request(method, url, headers, data=data).prepare()
            options = {"timeout": self.TIMEOUT_SECONDS, **self._options}
            # An unread response closes its connection. If it were kept after an interim response
            # (103), the next call would get this call's real response.
            with self._adapter.send(request, **options) as response:
                status = response.status_code
                is_page = "html" in response.headers.get("Content-Type", "").lower()
                if wants == "nothing" and 200 <= status < 300:
                    response.raw.drain_conn()  # so that the connection is used again
                    return b""
                if (status == 200 and not is_page) or (wants != "data" and 200 <= status < 300):
                    return response.content
                failure = f" answered {status}{' with a web page' if status == 200 else ''}"
                was_not_processed = status in (429, 503)
                is_temporary = status == 408 or status >= 500
                if (asked := response.headers.get("Retry-After", "")).isdecimal():
                    pause = min(int(asked[:9]), self.LONGEST_PAUSE_SECONDS)
        except Exception as error:
            failure = f": {type(error).__name__}"  # its message may quote the response
            was_not_processed, is_temporary = was_not_sent(error), not isinstance(error, ValueError)
        can_repeat = was_not_processed or (is_temporary and method in self.REPEATABLE)
        raise DatavillageApiError(f"{method} {url}{failure}", status, pause if can_repeat else None)


def was_not_sent(error: Exception) -> bool:
    """Return whether a request was never sent, because no connection could be made."""
    cause = error.args[0] if error.args else None
    reason = getattr(cause, "reason", None)
    reason = getattr(reason, "original_error", reason)  # of a connection to a proxy
    return isinstance(reason, ConnectTimeoutError)


def as_path_segment(text: str) -> str:
    """Percent-encode a text as one path segment of a URL (RFC 3986, 3.3)."""
    if text in ("", ".", ".."):  # these would change the path
        raise ProcessingError(f"{text!r} cannot be part of a URL")
    return quote(text, safe="")
