"""Who is calling: bearer tokens from a credentials file, and the tenant that each stands for.

Knows nothing of what is called: the interceptor asks it, and services read `current_caller`.
"""

import hashlib
import hmac
import json
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from controlplane.errors import PermissionDeniedError, UnauthenticatedError

_SCHEME = "bearer "


@dataclass(frozen=True, slots=True)
class Caller:
    """The tenant behind a call, and whether it may administer the service."""

    tenant: str
    is_admin: bool


# Where no credentials are configured, everybody is this caller.
ANYBODY = Caller(tenant="default", is_admin=True)

_caller: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)


def current_caller() -> Caller:
    """The caller of the rpc that is being handled."""
    return _caller.get()


def set_current_caller(caller: Caller) -> None:
    """Notes the caller for the rest of this rpc. For the interceptor."""
    _caller.set(caller)


class CredentialsError(Exception):
    """The credentials file is not usable; the message says why, and names no token."""


class Authenticator:
    """The known tokens. Only their digests are kept; finding one takes the same time whatever the token."""

    def __init__(self, callers: dict[str, Caller] | None = None) -> None:
        """callers: by token; None lets everybody in as ANYBODY."""
        self._callers = None if callers is None else {_digest(token): caller for token, caller in callers.items()}

    @classmethod
    def from_file(cls, path: Path | None) -> "Authenticator":
        """Reads `{"tokens": {"<token>": {"tenant": "...", "admin": false}}}`; no path lets everybody in.

        Raises:
            CredentialsError: the file is not of that form.
        """
        if path is None:
            return cls()
        return cls(_parse_credentials(path))

    def authenticate(self, authorization: str | None) -> Caller:
        """The caller behind an `authorization` header.

        Raises:
            UnauthenticatedError: no token, or one that is not known.
        """
        if self._callers is None:
            return ANYBODY
        if authorization is None:
            raise UnauthenticatedError(
                "this service needs a credential: send the metadata 'authorization: Bearer <token>'", reason="TOKEN_MISSING"
            )
        if not authorization.lower().startswith(_SCHEME):
            raise UnauthenticatedError(
                "the authorization metadata must be of the form 'Bearer <token>'", reason="TOKEN_MALFORMED"
            )
        offered = _digest(authorization[len(_SCHEME) :].strip())
        found: Caller | None = None
        for known, caller in self._callers.items():
            if hmac.compare_digest(known, offered):
                found = caller
        if found is None:
            raise UnauthenticatedError("the bearer token is not known to this service", reason="TOKEN_UNKNOWN")
        return found


def require_admin(caller: Caller, method: str) -> None:
    """Raises PermissionDeniedError unless the caller may administer the service."""
    if not caller.is_admin:
        raise PermissionDeniedError(
            f"{method} needs an admin credential; the one given is tenant {caller.tenant!r} without admin rights",
            reason="ADMIN_REQUIRED",
            metadata={"method": method, "tenant": caller.tenant},
        )


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _parse_credentials(path: Path) -> dict[str, Caller]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CredentialsError(f"{path} is not JSON: {error}") from error
    tokens = content.get("tokens") if isinstance(content, dict) else None
    if not isinstance(tokens, dict) or not tokens:
        raise CredentialsError(
            f'{path}: expected {{"tokens": {{"<token>": {{"tenant": "...", "admin": false}}}}}} with one token or more'
        )
    callers: dict[str, Caller] = {}
    for number, (token, entry) in enumerate(tokens.items(), start=1):
        # Messages name a token by its place in the file, never by itself.
        if not token or token != token.strip():
            raise CredentialsError(f"{path}: token {number} is empty or has spaces around it")
        tenant = entry.get("tenant") if isinstance(entry, dict) else None
        is_admin = entry.get("admin", False) if isinstance(entry, dict) else None
        if not isinstance(tenant, str) or not tenant or not isinstance(is_admin, bool) or set(entry) - {"tenant", "admin"}:
            raise CredentialsError(
                f'{path}: token {number} must have "tenant" (a text) and may have "admin" (true or false), nothing else'
            )
        callers[token] = Caller(tenant, is_admin)
    return callers
