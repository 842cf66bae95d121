"""The algorithm: edit `compute`, which turns one user's data into that user's result.

Edit `process_event` as well when one function per user is not enough. What both stand on is below:
`for_each_user`, which works on many users at once, and a small client of the Datavillage API.
"""

import contextlib
import gzip
import inspect
import json
import logging
import os
import random
import re
import time
import traceback
import zlib
from calendar import timegm
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import quote

import requests
import urllib3
from requests.adapters import HTTPAdapter

WORKERS = 16  # users worked on side by side, each on a connection of its own
PROGRESS_SECONDS = 30  # from one line about the progress of a long job to the next
NAMED_FAILURES = 3  # failed users that an event's reason names: enough to see what they share
TIMEOUT_SECONDS = (5, 60)  # to connect; to wait for more of an answer
PAUSES_SECONDS = (0, 1, 2, 4, 8)  # between the six tries of a call: 15 s of outage are ridden out
STRETCH = 1.5  # a pause takes up to this many times as long, so that 16 workers do not go in step
RETRY_AFTER_SECONDS = 60  # the longest pause that the API may ask for: the run seems dead meanwhile
RETRY_STATUSES = (429, 500, 502, 503, 504)  # overload and passing faults
WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html)[\s>]", re.IGNORECASE)  # as of a sign-in
# What a call of the API raises that brings no answer, a part of one, or one of an absurd length.
FAULTS = (
    OSError,
    ValueError,
    MemoryError,
    OverflowError,
    HTTPException,
    urllib3.exceptions.HTTPError,
)

logger = logging.getLogger(__name__)


def compute(user_id: str, data: str) -> str:
    """Return one user's result, as Turtle, from the user's ID and data, also Turtle.

    An exception fails this user and no other. The sample states how long the data is.
    """
    user = f"https://example.org/{quote(user_id, safe='')}"  # any ID makes a valid IRI
    return f"<{user}> <https://example.org/characters> {len(data)} .\n"


def process_event(event: dict[str, Any]) -> None:
    """Compute and store the result of each user that an event is about.

    Takes the event as published. Its `userIds` is a list of non-empty strings; if it is None or
    absent, all active users are meant. Raises ProcessingError if the API does not tell who these
    are, or if a user failed, after all were tried.
    """
    api = DatavillageApi()

    def work(user_id: str) -> None:
        api.store(user_id, compute(user_id, api.user_data(user_id)))

    user_ids = event.get("userIds")
    for_each_user(api.active_users() if user_ids is None else user_ids, work)


def for_each_user(
    user_ids: Iterable[str], work: Callable[[str], Any], *, skip_failed: bool = False
) -> dict[str, Any]:
    """Call `work` with each user's ID, each once, WORKERS side by side, in threads.

    Returns, by user ID, what it returned. A user whose work raised is logged, with the reason.
    After all users were tried, raises ProcessingError if any failed; with `skip_failed`, leaves
    them out of what it returns instead. On a stop, finishes the users under way, begins no more.
    """
    users = dict.fromkeys(user_ids)
    waiting = iter(users)  # threads can share the iterator of a dict, but not a generator
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}

    def work_in_turn() -> None:
        for user_id in waiting:
            try:
                result = work(user_id)
                if cause := unfinished(result):
                    raise ProcessingError(f"work returned {type(result).__name__}: {cause}")
                results[user_id] = result
            except BaseException as error:  # exit() for one user is no reason to leave the others
                failed[user_id] = ""  # counted, whatever the exception does
                failed[user_id] = describe(error)
                logger.error("user %r: %s", user_id, failed[user_id], exc_info=error)

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
            begun = len(users) - len(list(waiting))  # takes the rest: on a stop, no more are begun
            while len(results) + len(failed) < begun:
                time.sleep(0.01)  # the pool does not know of a thread whose start a stop interrupts
    for worker in workers:
        worker.result()  # raises what went wrong outside of `work`
    if failed and not skip_failed:
        reasons = [f"{user_id!r}: {failed[user_id]}" for user_id in users if user_id in failed]
        reasons[NAMED_FAILURES:] = ["…"] if len(failed) > NAMED_FAILURES else []
        count = f"{len(failed):,} of {len(users):,} users failed"
        raise ProcessingError(f"{count}: {'; '.join(reasons)}")
    return results


class ProcessingError(Exception):
    """What went wrong, in words that hold neither the token nor a user's data: they are logged."""


def describe(error: BaseException) -> str:
    """Return, on one line, what may be logged of an exception: its text may quote a user's data.

    That is the text of a ProcessingError; of any other the type, and the places it came through.
    """
    if isinstance(error, ProcessingError):
        with contextlib.suppress(Exception):  # one that an author defined may have no text
            return " ".join(str(error).splitlines())
    places = traceback.extract_tb(error.__traceback__, limit=-30)  # recursion makes a thousand
    path = ", ".join(
        f"{os.path.basename(place.filename)}:{place.lineno} {place.name}"
        for place in places[1:] or places  # the first is the one that caught it
    )
    return " ".join(f"{type(error).__name__} at {path}".splitlines())


def unfinished(returned: Any) -> str:
    """Return why work whose call returned this may not have run; nothing if it has."""
    kinds = (inspect.iscoroutine, inspect.isgenerator, inspect.isasyncgen)
    if any(is_kind(returned) for is_kind in kinds):
        return "is it async, or does it yield?"
    is_future = inspect.isawaitable(returned) or hasattr(type(returned), "add_done_callback")
    return "nothing waits for its end" if is_future or isinstance(returned, (map, filter)) else ""


class DatavillageApi:
    """A client of the Datavillage API, for the application that the DV_* variables name.

    Threads may share it. Every call raises ProcessingError when it does not succeed.
    """

    def __init__(self) -> None:
        app, client = as_segment(os.environ["DV_APP_ID"]), as_segment(os.environ["DV_CLIENT_ID"])
        base = os.environ["DV_URL"].rstrip("/")
        self._users_url = f"{base}/clients/{client}/applications/{app}/activeUsers"
        # Of the ways to compress an answer, `body_of` can tell the end of this one from a cut.
        token = os.environ["DV_TOKEN"]
        self._headers = {"Authorization": f"Bearer {token}", "Accept-Encoding": "gzip"}
        self._session = requests.Session()
        # Proxies and CA bundle are read here, once: else each request would look them up.
        settings = self._session.merge_environment_settings(base, {}, None, None, None)
        self._session.proxies, self._session.verify = settings["proxies"], settings["verify"]
        self._session.trust_env = False
        # A cookie that came with one user's data would go out with the next user's call.
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        # Even a redirect that is not followed would be parsed, and a malformed one raises.
        self._session.get_redirect_target = lambda response: None
        for scheme in ("https://", "http://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=WORKERS))

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
        """Return a user's data, as Turtle, without a byte order mark."""
        return self._call("GET", f"{self._users_url}/{as_segment(user_id)}/data")

    def store(self, user_id: str, turtle: str, kind: str = "inferences") -> None:
        """Store Turtle as a user's `inferences` or `explains`, in place of earlier ones."""
        if not isinstance(turtle, str):
            cause = "is a return missing?" if turtle is None else "it is to be Turtle, as text"
            cause = unfinished(turtle) or cause
            raise ProcessingError(f"the result is {type(turtle).__name__}, not str: {cause}")
        self._call("PUT", f"{self._users_url}/{as_segment(user_id)}/{kind}", turtle)

    def _call(self, method: str, url: str, turtle: str = "") -> str:
        """Return what a GET is answered. Try again after what may have been a passing fault."""
        headers = self._headers | ({"Content-Type": "text/turtle"} if method == "PUT" else {})
        # As a stream, an answer that is not read closes its connection. That matters after an
        # interim one (103): the real one comes behind it, and would answer the next call. A
        # redirect is not followed: a PUT would be sent again as a GET.
        options = {"timeout": TIMEOUT_SECONDS, "stream": True, "allow_redirects": False}
        for pause in (*PAUSES_SECONDS, None):
            asked_pause = 0.0
            try:
                request = requests.Request(method, url, headers, data=turtle.encode("utf-8"))
                with self._session.send(request.prepare(), **options) as response:
                    status = response.status_code
                    if method == "PUT" and 200 <= status < 300:
                        response.raw.drain_conn()  # for the connection to be used again
                        return ""
                    body = body_of(response) if status == 200 else b""
                    kind = response.headers.get("Content-Type", "").lower()
                    if status == 200 and "html" not in kind and not WEB_PAGE.match(body):
                        # Turtle is UTF-8 (W3C, RDF 1.1 Turtle); requests takes it for Latin-1.
                        return body.decode("utf-8-sig")
                    failure = f" answered {status}{' with HTML' if status == 200 else ''}"
                    passing, asked_pause = status in RETRY_STATUSES, retry_after(response)
            except FAULTS as error:
                failure, passing = f": {reason_of(error)}", not isinstance(error, ValueError)
            if not passing or pause is None:
                break
            time.sleep(max(pause * random.uniform(1, STRETCH), asked_pause))
        raise ProcessingError(f"{method} {url}{failure}")


def as_segment(text: str) -> str:
    """Return the text percent-encoded as one path segment (RFC 3986, 3.3).

    Raises ProcessingError for what leads to another resource however encoded, or has no encoding.
    """
    if text in ("", ".", "..") or re.search("[\ud800-\udfff]", text):
        raise ProcessingError(f"{text!r} cannot be part of a URL")
    return quote(text, safe="")


def body_of(response: requests.Response) -> bytes:
    """Return the whole body of an answer; raise one of FAULTS if it was cut.

    Of one that is compressed, requests would return what came before the cut.
    """
    body = response.raw.read(decode_content=False)
    if response.headers.get("Content-Encoding", "").lower() != "gzip":
        return body
    try:
        if body:
            return gzip.decompress(body)
    except (OSError, EOFError, zlib.error):
        pass
    raise urllib3.exceptions.DecodeError("cut, or no gzip")


def retry_after(response: requests.Response) -> float:
    """Return the pause that an answer asks for, in seconds (RFC 9110, 10.2.3); else 0."""
    value = response.headers.get("Retry-After", "").strip()
    try:
        if re.fullmatch("[0-9]{1,9}", value):
            seconds = int(value)
        else:
            seconds = timegm(parsedate_to_datetime(value).utctimetuple()) - time.time()
    except (ValueError, OverflowError):
        return 0
    return min(max(seconds, 0), RETRY_AFTER_SECONDS)


def reason_of(error: Exception) -> str:
    """Return why a call failed, in words where these hold no header and no part of an answer."""
    failure = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
    failure = getattr(failure, "reason", failure)  # of what urllib3 makes of it
    errors = urllib3.exceptions
    in_words = isinstance(failure, (errors.TimeoutError, errors.SSLError, errors.ProxyError))
    return str(failure) if in_words else type(error).__name__
