"""Requests to an OpenAI-compatible server by the `openai` package: deadlines, retries, and one line for each failure.

The key is kept in the client only: where a server repeats it in an error, it is removed.
"""

import json
import logging
import random
import time
from collections.abc import Mapping
from typing import Any

from lvctx.errors import InputError, MissingError, first_line
from lvctx.inference.endpoint_config import EndpointConfig
from lvctx.inference.engine import EngineGone

log = logging.getLogger(__name__)
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
"""Seconds before the first repetition, doubled before each further one up to the longest."""
LONGEST_WAIT = 600.0
"""Most seconds that a server's Retry-After is obeyed for."""
HOPELESS = 8
"""Failed requests after which a server is given up that has never answered one."""
UNKEYED = "none"
"""Sent if there is no key, because the package requires one."""


class _Retry(Exception):
    """A failure that may not happen again."""

    def __init__(self, what: str, *, wait: float | None = None, lost: bool = False) -> None:
        super().__init__(what)
        self.wait, self.lost = wait, lost


class ChatClient:
    """One model of a server; may be used by several threads."""

    def __init__(self, config: EndpointConfig, model: str, *, api_key: str | None) -> None:
        """Make no request yet. Raises MissingError without the openai package."""
        try:
            import httpx2
            import openai
        except ImportError as e:
            raise MissingError("the openai package is not installed", fix="pip install 'lvctx[endpoint]'") from e
        assert config.endpoint is not None
        self.config, self.model, self.url = config, model, config.endpoint
        self.reasons = False
        """Whether the model was found to generate reasoning before its replies."""
        self._answered, self._failed = False, 0
        self._errors, self._http, self._key = openai, httpx2, api_key or ""
        self._client = openai.OpenAI(
            base_url=self.url, api_key=api_key or UNKEYED, timeout=config.timeout, max_retries=0
        )

    def chat(self, messages: list[dict[str, Any]], fields: Mapping[str, Any]) -> dict[str, Any]:
        """The server's completion of a chat. Raises InputError for a failed request, EngineGone for one of many."""
        return self._ask("chat", {"messages": messages, **fields})

    def complete(self, prompt: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The server's continuation of a text. Raises as `chat`."""
        return self._ask("completion", {"prompt": prompt, **fields})

    def models(self) -> list[str] | None:
        """Names of the models that the server lists; None where it has no such list. Raises EngineGone."""
        try:
            listed = self._attempt("models", {}, timeout=min(self.config.timeout, 30.0))
            return [str(model["id"]) for model in listed["data"]]
        except _Retry as e:
            if e.lost:
                raise self._down(e) from None
            return None
        except EngineGone:
            raise
        except (InputError, KeyError, TypeError):
            return None

    def _ask(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        for attempt in range(self.config.retries + 1):
            try:
                answer = self._attempt(kind, body, timeout=self.config.timeout)
                self._answered = True
                return answer
            except _Retry as e:
                if attempt == self.config.retries:
                    raise self._give_up(e, attempt + 1) from None
                delay = min(FIRST_DELAY * 2**attempt, LONGEST_DELAY) * random.uniform(0.75, 1.0)
                delay = delay if e.wait is None else min(max(e.wait, delay), LONGEST_WAIT)
                log.info("%s: %s; asked again in %.1f s", self.url, e, delay)
                time.sleep(delay)
        raise AssertionError

    def _request(self, kind: str, body: dict[str, Any], timeout: float) -> Any:
        """A context manager of the answer, whose body is yet to be read."""
        client: Any = self._client.with_options(timeout=timeout)
        if kind == "models":
            return client.models.with_streaming_response.list()
        model, extra = {"model": self.model}, {**body, **(self.config.extra_body or {})}
        if kind == "chat":
            messages = extra.pop("messages")
            return client.chat.completions.with_streaming_response.create(messages=messages, extra_body=extra, **model)
        prompt = extra.pop("prompt")
        return client.completions.with_streaming_response.create(prompt=prompt, extra_body=extra, **model)

    def _give_up(self, e: _Retry, attempts: int) -> InputError:
        """A request is lost; a server that is gone, or has answered none of several, ends the run."""
        if e.lost:
            self.models()
        self._failed += 1
        what = f"{e} ({attempts} attempts)"
        if not self._answered and self._failed >= HOPELESS:
            return EngineGone(f"none of {self._failed} requests was answered: {what}", where=self.url)
        return InputError(what, where=self.url)

    def _attempt(self, kind: str, body: dict[str, Any], *, timeout: float) -> dict[str, Any]:
        """One request, whose answer is complete by the deadline."""
        errors, deadline = self._errors, time.monotonic() + timeout
        late = _Retry(f"no answer within {timeout:g} s")
        try:
            with self._request(kind, body, timeout) as response:
                parts = []
                for part in response.iter_bytes():
                    parts.append(part)
                    if time.monotonic() > deadline:
                        raise late
        except errors.APITimeoutError as e:
            late.lost = isinstance(e.__cause__, self._http.ConnectTimeout)
            raise late from None
        except errors.APIConnectionError as e:
            raise _Retry(f"no connection ({first_line(e.__cause__ or e)})", lost=True) from None
        except errors.APIStatusError as e:
            raise self._refusal(e, kind) from None
        except self._http.HTTPError as e:
            raise _Retry(f"the answer broke off ({first_line(e)})") from None
        try:
            answer = json.loads(b"".join(parts))
        except (ValueError, RecursionError):
            raise _Retry("the answer is malformed JSON") from None
        if not isinstance(answer, dict):
            raise _Retry("the answer is no JSON object")
        return answer

    def _refusal(self, e: Any, kind: str) -> Exception:
        """What an HTTP status means: try again, give up this request, or give up altogether."""
        status, said = int(e.status_code), self._said(e)
        if status in (401, 403):
            fix = "set LVCTX_API_KEY or OPENAI_API_KEY"
            said = said if status == 403 else ""  # which may repeat a part of the key
            return EngineGone(f"the server refuses the key (HTTP {status}){said}", where=self.url, fix=fix)
        if status == 404 and kind != "models":
            what = f"the server has no model {self.model} (HTTP 404){said}"
            return EngineGone(what, where=self.url, fix=self._names())
        if status == 429 and getattr(e, "code", None) == "insufficient_quota":
            return EngineGone(f"the account's quota is used up (HTTP 429){said}", where=self.url)
        if status in (408, 409, 425, 429) or status >= 500:
            return _Retry(f"HTTP {status}{said}", wait=_retry_after(e.response.headers))
        fix = "fewer --frames, or fewer --frame-pixels" if status == 413 else ""
        return InputError(f"HTTP {status}{said}", where=self.url, fix=fix)

    def _said(self, e: Any) -> str:
        """The server's own words in one line, without the key."""
        body = e.body if isinstance(e.body, dict) else {"message": e.body if isinstance(e.body, str) else ""}
        error = body.get("error", body)
        error = error if isinstance(error, dict) else {"message": error}
        text = str(error.get("message") or body.get("detail") or body.get("message") or "")
        text = " ".join(text.split())[:300]
        if self._key:
            text = text.replace(self._key, "***")
        return f": {text}" if text else ""

    def _names(self) -> str:
        try:
            names = self.models()
        except EngineGone:
            names = None
        return f"it has {', '.join(names[:8])}" if names else "check --endpoint and --model"

    def _down(self, e: Exception) -> EngineGone:
        return EngineGone(f"the server does not answer: {e}", where=self.url, fix="start it, or correct --endpoint")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header; None where there is none, or a date."""
    try:
        return max(0.0, float(headers.get("retry-after", "")))
    except ValueError:
        return None
