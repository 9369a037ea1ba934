"""Who may ask a server of ours, and how much: the token, the cookie, the address, and the size and pace of a request.

`AuthMiddleware` stands before each of our applications: the server, `serve policy`, `serve segmenter`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ibisagent.errors import ConfigError

OPEN_PATHS = ("/health", "/ready")
LOGIN = "/login"
ASKED, GRANTED = "/auth/", "/auth/token"  # where programs ask whether a token is needed, and get it for a password
COOKIE = "ibisagent_visitor"
MIN_TOKEN_CHARS = 8
LOGIN_BYTES = 8192
BODY_GRACE_SECONDS = 20.0  # how long a body may be silent or slow at first ...
BODY_BYTES_PER_SECOND = 16 * 1024  # ... and the pace that it has to keep from then on
MAX_VALUES = 2**17  # in JSON: twenty times its bytes are needed to hold as many small ones as it has room for
FREE_ATTEMPTS = 5  # wrong tokens before a client is slowed down
LONGEST_DELAY = 2.0  # seconds that the answer to a wrong token is held back at most
FORGET_SECONDS = 10.0  # after which one wrong token is forgotten
HELD_ANSWERS = 8  # of one client; beyond, its tokens are not looked at
WATCHED_CLIENTS = 4096

# Nothing on our pages comes from elsewhere, and a browser is told not to fetch it either.
_SAFE_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; object-src 'none';"
        b" base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    ),
]
LOOPBACK_ORIGIN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?"
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
_LENGTH = re.compile(r"[0-9]{1,18}")


def token_for(host: str) -> str | None:
    """The token from IBIS_TOKEN, None if unset.

    ConfigError for a token that is too short or could not be sent, and for none unless `host` is this machine's
    loopback.
    """
    token = os.environ.get("IBIS_TOKEN")
    if token is None:
        if not is_loopback(bare_host(host)):
            raise ConfigError(
                f"host {host} can be reached from elsewhere: set IBIS_TOKEN to a secret, or use 127.0.0.1"
            )
        return None
    if len(token) < MIN_TOKEN_CHARS or not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(
            f"IBIS_TOKEN must be {MIN_TOKEN_CHARS} or more letters, digits or signs of ASCII without spaces;"
            " unset it, or make one with: openssl rand -hex 24"
        )
    return token


def bare_host(host: str) -> str:
    """An address to listen on without the brackets that IPv6 has in URLs."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def url_of(host: str, port: int) -> str:
    """The address of a server that listens on `host`."""
    host = bare_host(host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(name: str) -> bool:
    """Whether a name or address, without brackets, is this machine's own."""
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"


@dataclass(frozen=True, slots=True)
class OtherPages:
    """Web pages from elsewhere that may call some of our addresses, without a cookie.

    origins: as a browser sends them. paths: how those addresses begin. loopback: also pages of this machine.
    """

    origins: frozenset[str] = frozenset()
    paths: tuple[str, ...] = ()
    loopback: bool = False

    def may(self, origin: str, path: str) -> bool:
        """Whether a page of `origin` may call `path`."""
        return path.startswith(self.paths) and (
            origin in self.origins or (self.loopback and re.fullmatch(LOOPBACK_ORIGIN, origin) is not None)
        )


def checked_origin(text: str) -> str:
    """An origin that a user allows, as browsers send it; ConfigError for anything else, such as one with a path."""
    origin = text.strip().rstrip("/").lower()
    if not re.fullmatch(rf"https?://{_HOST.pattern}", origin):
        raise ConfigError(f"origin '{text[:80]}': give scheme, name and port of a web page, as http://localhost:3000")
    return origin


class Keys:
    """The token, and the cookies that stand for it in browsers.

    A cookie is a random secret of one browser and its signature under a key that is derived from the token: it says
    nothing of the token, survives a restart, and ends with the token. A browser is known to the rest of the program as
    a `visitor`, a hash of its secret, which is safe to keep on disk.
    """

    def __init__(self, token: str | None) -> None:
        self._token = token
        # Slow on purpose: whoever steals a cookie cannot try tokens on it at leisure.
        self._key = b"" if token is None else hashlib.scrypt(token.encode(), salt=b"ibisagent", n=2**14, r=8, p=1)

    @property
    def needed(self) -> bool:
        """Whether there is a token at all."""
        return self._token is not None

    def is_token(self, sent: str) -> bool:
        """Whether a client sent the token; takes the same time wherever it differs."""
        return self._token is not None and hmac.compare_digest(sent.encode(errors="replace"), self._token.encode())

    def new_cookie(self) -> str:
        """A cookie for a browser that has none."""
        secret = secrets.token_hex(16)
        return f"{secret}.{self._signature(secret)}"

    def visitor(self, cookie: str) -> str | None:
        """Whose cookie this is, 32 hexadecimal digits; None where it was not made with this token."""
        secret, _, signature = cookie.partition(".")
        if not re.fullmatch(r"[0-9a-f]{32}", secret, re.ASCII):
            return None
        if not hmac.compare_digest(signature.encode(errors="replace"), self._signature(secret).encode()):
            return None
        return hashlib.sha256(secret.encode()).hexdigest()[:32]

    def _signature(self, secret: str) -> str:
        return hmac.digest(self._key, secret.encode(), "sha256").hex()


class WrongTokens:
    """Slows down whoever tries tokens, client by client.

    The answers to a client's wrong tokens are held back longer and longer, and while HELD_ANSWERS of them are held its
    tokens are not looked at: trying many at once is no faster. Otherwise the right token passes at once, so that a
    neighbour behind the same address locks nobody out with wrong ones; browsers that have their cookie always pass.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client: wrong tokens, when counted
        self._held: dict[str, int] = {}

    def too_many(self, client: str) -> bool:
        """Whether this client's tokens are not looked at just now."""
        return self._held.get(client, 0) >= HELD_ANSWERS

    def delay(self, client: str) -> float:
        """Note a wrong token; seconds to hold its answer back."""
        now = self._clock()
        count, when = self._seen.pop(client, (0.0, now))
        count = max(0.0, count - (now - when) / FORGET_SECONDS) + 1
        self._seen[client] = (count, now)
        while len(self._seen) > WATCHED_CLIENTS:
            self._seen.popitem(last=False)
        return 0.0 if count <= FREE_ATTEMPTS else float(min(LONGEST_DELAY, 0.1 * 2 ** (count - FREE_ATTEMPTS)))

    async def hold(self, client: str) -> None:
        """Note a wrong token, and wait as long as its answer is held back, also where the client hangs up."""
        seconds = self.delay(client)
        if seconds:
            self._held[client] = self._held.get(client, 0) + 1
            asyncio.get_running_loop().call_later(seconds, self._release, client)
            await asyncio.sleep(seconds)

    def _release(self, client: str) -> None:
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]


def _json_refusal(status: int, reason: str) -> Response:
    return JSONResponse({"detail": reason}, status_code=status)


class AuthMiddleware:
    """Stands before a whole application, whatever is mounted in it, and lets in what may come in.

    - With a token only requests that carry it, as "Authorization: Bearer <token>" or, in a browser, as the cookie that
      the page /login gives for it. `OPEN_PATHS` need none. Without a token only requests that are addressed to this
      machine by a loopback name, so that no web page reaches the server through a name of its own.
    - No request that another web page makes a browser send (its Origin is not this server).
    - One reading of where a request ends: exactly one Host, at most one Content-Length, no Transfer-Encoding.
    - At most `max_body` bytes, counted as they come, at a pace that does not hold the server up; of JSON also at most
      MAX_VALUES values.

    The visitor that a request's cookie names is in its scope as "visitor" (see `Keys`), None where there is none.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        max_body: int,
        browsers: bool = False,
        others: OtherPages | None = None,
        observe: Callable[[str, str, int, float], None] = lambda *_: None,
        refuse: Callable[[int, str], Response] = _json_refusal,
    ) -> None:
        """browsers: also take cookies, and offer /login. others: pages from elsewhere.

        observe: called with method, path, status and seconds of every answered request. refuse: makes an error of the
        application's own shape of a status and a reason.
        """
        self._app, self._max_body, self._browsers, self._others = app, max_body, browsers, others or OtherPages()
        self._observe, self._refuse = observe, refuse
        self._keys, self._wrong = keys, WrongTokens()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks over web sockets
            await send({"type": "websocket.close", "code": 1008})
            return
        started, status, answering = time.perf_counter(), 500, False

        async def noting(message: Message) -> None:
            nonlocal status, answering
            if message["type"] == "http.response.start":
                status, answering = message["status"], True
                message["headers"] = [*message["headers"], *_SAFE_HEADERS]
            await send(message)

        try:
            await self._let_in(scope, receive, noting)
        except asyncio.CancelledError:  # the server stops and waits no longer: the client is told, not cut off
            if answering:
                await send({"type": "http.response.body"})
            else:
                await self._refuse(503, "the server stops: what is done so far is kept")(scope, receive, noting)
        finally:
            self._observe(scope["method"], scope["path"], status, time.perf_counter() - started)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        path, origin = scope["path"], headers.get("origin", "")
        limit = LOGIN_BYTES if path in (LOGIN, GRANTED) else self._max_body
        other = self._others.may(origin, path) and _netloc(origin) != headers.get("host", "").lower()
        knows = self._browsers and not other
        scope["visitor"] = self._keys.visitor(Request(scope).cookies.get(COOKIE, "")) if knows else None
        scope["other_page"] = other
        refusal = self._misformed(headers, limit) or self._stranger(headers, other)
        asks_first = other and scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        is_open = path in OPEN_PATHS or (self._browsers and path == ASKED)
        if refusal is None and self._keys.needed and not (is_open or asks_first):
            refusal = await self._unknown(scope, headers, receive, limit)
        if refusal is not None:
            await refusal(scope, receive, send)
        else:
            await self._measured(scope, receive, send, limit)

    def _misformed(self, headers: Headers, limit: int) -> Response | None:
        """A request of which two programs could read different lengths or addresses, or that is too long."""
        lengths = headers.getlist("content-length")
        if "transfer-encoding" in headers:
            if lengths:
                return self._close(400, "Content-Length and Transfer-Encoding do not go together: send Content-Length")
            return self._close(411, "the request does not say how long it is: send Content-Length")
        if len(lengths) > 1 or not all(_LENGTH.fullmatch(length) for length in lengths):
            return self._close(400, "Content-Length must be one number")
        if lengths and int(lengths[0]) > limit:
            return self._refuse(413, self._too_long(limit))
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
            return self._close(400, "Host must be one name or address")
        return None

    def _stranger(self, headers: Headers, other: bool) -> Response | None:
        """A request through a name of somebody else, or from another web page, unless it is one of the `others`."""
        host = headers["host"]
        name = host.rpartition(":")[0] if re.search(r":[0-9]+$", host) else host
        if not self._keys.needed and not is_loopback(bare_host(name)):
            return self._refuse(400, "without a token only requests to this machine by a loopback name are answered")
        origin = headers.get("origin")
        if origin is not None and not other and _netloc(origin) != host.lower():
            return self._refuse(403, "requests from other web pages are not answered")
        return None

    async def _unknown(self, scope: Scope, headers: Headers, receive: Receive, limit: int) -> Response | None:
        """What a client without the token gets; None for one that has it."""
        if scope["path"] == LOGIN and self._browsers:
            return await self._log_in(scope, receive, limit)
        if scope["path"] == GRANTED and self._browsers and scope["method"] == "POST":
            return await self._grant(scope, receive, limit)
        if scope["visitor"] is not None:
            return None
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and sent:
            return await self._check(scope, sent.strip())
        if self._browsers and scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            if headers.get("sec-fetch-site") == "cross-site":  # a link elsewhere: the cookie does not come along
                return again()
            return RedirectResponse(LOGIN, 303)
        return self._refuse(401, "wrong or missing token: send it as 'Authorization: Bearer <token>'")

    async def _check(self, scope: Scope, sent: str) -> Response | None:
        client = _client(scope)
        if self._wrong.too_many(client):
            answer = self._refuse(429, "too many wrong tokens from this address: try again in a few seconds")
            answer.headers["retry-after"] = "3"
            return answer
        if self._keys.is_token(sent):
            return None
        await self._wrong.hold(client)
        return self._refuse(401, "wrong or missing token: send it as 'Authorization: Bearer <token>'")

    async def _log_in(self, scope: Scope, receive: Receive, limit: int) -> Response:
        """The page that asks for the token, and the cookie for it."""
        if scope["method"] != "POST":
            return HTMLResponse(_LOGIN_PAGE.format(message="This server asks for its token."))

        def entered(_sent: str, refusal: Response | None) -> Response:
            if refusal is not None:
                return HTMLResponse(_LOGIN_PAGE.format(message="That is not the token."), refusal.status_code)
            answer = RedirectResponse("/", 303)
            set_cookie(answer, scope, self._keys.new_cookie())
            return answer

        return await self._shown(scope, receive, limit, "token", entered)

    async def _grant(self, scope: Scope, receive: Receive, limit: int) -> Response:
        """The token for the token: programs that know passwords alone (OAuth 2's grant "password") send it as one."""

        def granted(sent: str, refusal: Response | None) -> Response:
            return refusal or JSONResponse({"access_token": sent, "token_type": "bearer"})

        return await self._shown(scope, receive, limit, "password", granted)

    async def _shown(
        self,
        scope: Scope,
        receive: Receive,
        limit: int,
        field: str,
        answered: Callable[[str, Response | None], Response],
    ) -> Response:
        """What `answered` makes of the token that a form shows in `field`, and of why it is refused, if it is."""
        answer: Response | None = None

        async def form(inner: Scope, incoming: Receive, send: Send) -> None:
            nonlocal answer
            try:
                sent = (await Request(inner, incoming).form(max_files=0, max_fields=8)).get(field)
            except HTTPException:
                sent = None
            shown = sent if isinstance(sent, str) else ""
            answer = answered(shown, await self._check(scope, shown))

        failed = await self._measure(form, scope, receive, None, limit)
        return failed or answer or self._refuse(400, "cannot be read")

    async def _measured(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        failed = await self._measure(self._app, scope, receive, send, limit)
        if failed is not None:
            await failed(scope, receive, send)

    async def _measure(
        self, app: ASGIApp, scope: Scope, receive: Receive, send: Send | None, limit: int
    ) -> Response | None:
        """Run `app` with a body that ends, as if the client had hung up, where it is too long or too slow.

        What to answer then; None where the application answered.
        """
        began, received, values, whole, answering = time.monotonic(), 0, 0, False, False
        counting: bool | None = None  # values: unless it is a form of multiple parts or a PNG, whatever it says it is
        failed: Response | None = None

        async def receiving() -> Message:
            nonlocal received, values, whole, failed, counting
            if whole:
                return await receive()
            patience = BODY_GRACE_SECONDS + received / BODY_BYTES_PER_SECOND - (time.monotonic() - began)
            try:
                message = await asyncio.wait_for(receive(), max(patience, 0.001))
            except TimeoutError:
                failed = self._close(408, "the request came too slowly")
                return {"type": "http.disconnect"}
            part = message.get("body", b"")
            if counting is None and part:
                counting = part[:1] not in (b"-", b"\x89")
            received += len(part)
            values += part.count(b",") if counting else 0
            whole = not message.get("more_body", False)
            if received > limit:
                failed = self._close(413, self._too_long(limit))
                return {"type": "http.disconnect"}
            if values > MAX_VALUES:
                failed = self._close(413, f"the request holds more than {MAX_VALUES} values")
                return {"type": "http.disconnect"}
            return message

        async def sending(message: Message) -> None:
            nonlocal answering
            if failed is None or answering:
                answering = True
                if send is not None:
                    await send(message)

        try:
            await app(scope, receiving, sending)
        except Exception:
            if failed is None or answering:
                raise
        return None if answering else failed

    @staticmethod
    def _too_long(limit: int) -> str:
        return (
            f"the request is larger than {limit} bytes ({limit / 2**20:.0f} MB), more is not taken: send less at once"
        )

    def _close(self, status: int, reason: str) -> Response:
        """A refusal after which nothing more is read from the connection."""
        answer = self._refuse(status, reason)
        answer.headers["connection"] = "close"
        return answer


class AnswersOtherPages:
    """Behind the middleware: lets a page from elsewhere, that the middleware let in, read the answers."""

    def __init__(self, app: ASGIApp, others: OtherPages) -> None:
        self._app = app
        self._shared = CORSMiddleware(
            app,
            allow_origins=sorted(others.origins),
            allow_origin_regex=LOOPBACK_ORIGIN if others.loopback else None,
            allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        await (self._shared if scope.get("other_page") else self._app)(scope, receive, send)


def visitor_of(request: Request) -> str | None:
    """The visitor that the middleware saw in a request's cookie."""
    visitor: str | None = request.scope.get("visitor")
    return visitor


def set_cookie(answer: Response, scope: Scope, cookie: str) -> None:
    """Give a browser its cookie: for this server alone, out of reach of scripts, over TLS alone where TLS is used."""
    answer.set_cookie(COOKIE, cookie, httponly=True, samesite="strict", secure=scope["scheme"] == "https")


def again() -> Response:
    """A page that asks for itself again, now from here: the browser then sends the cookie that it has."""
    return HTMLResponse('<!doctype html><meta http-equiv="refresh" content="0"><title>ibisagent</title>')


def _netloc(origin: str) -> str | None:
    """Host and port of an Origin; None where it has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:  # half a bracket
        return None


def _client(scope: Scope) -> str:
    """Who asks, as far as wrong tokens go: an address, for IPv6 its network of one customer."""
    host = (scope.get("client") or ("",))[0]
    try:
        address = ip_address(host)
    except ValueError:
        return str(host)[:100]
    if isinstance(address, IPv6Address):
        return str(address.ipv4_mapped or ip_network((address, 64), strict=False))
    return host


_LOGIN_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>ibisagent</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:24rem;margin:4rem auto;padding:0 1rem}}</style>
<h1>ibisagent</h1><p role="alert">{message}</p><form method="post" action="/login"><label>Token
<input name="token" type="password" autocomplete="current-password" autofocus></label> <button>Enter</button></form>
"""
