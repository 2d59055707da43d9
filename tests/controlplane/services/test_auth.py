"""Who may call: credentials files, bearer tokens and admin rights."""

import json
from pathlib import Path

import pytest

from controlplane.errors import PermissionDeniedError, UnauthenticatedError
from controlplane.services.auth import ANYBODY, Authenticator, Caller, CredentialsError, require_admin

CALLERS = {"secret-1": Caller("acme", is_admin=False), "secret-2": Caller("ops", is_admin=True)}


def test_without_credentials_everybody_is_the_default_tenant_and_admin() -> None:
    assert Authenticator().authenticate(None) == ANYBODY
    assert Authenticator().authenticate("Bearer whatever") == ANYBODY
    require_admin(ANYBODY, "/x")


@pytest.mark.parametrize("header", ["Bearer secret-1", "bearer secret-1", "BEARER  secret-1 "])
def test_a_known_token_stands_for_its_tenant(header: str) -> None:
    assert Authenticator(CALLERS).authenticate(header) == CALLERS["secret-1"]


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (None, "TOKEN_MISSING"),
        ("", "TOKEN_MALFORMED"),
        ("Basic secret-1", "TOKEN_MALFORMED"),
        ("Bearer ", "TOKEN_UNKNOWN"),
        ("Bearer secret", "TOKEN_UNKNOWN"),
        ("Bearer secret-11", "TOKEN_UNKNOWN"),
        ("Bearer sécret", "TOKEN_UNKNOWN"),
    ],
)
def test_anything_else_is_refused_without_repeating_it(header: str | None, reason: str) -> None:
    with pytest.raises(UnauthenticatedError) as caught:
        Authenticator(CALLERS).authenticate(header)
    assert caught.value.reason == reason
    assert "secret" not in caught.value.message


def test_only_an_admin_may_administer() -> None:
    require_admin(CALLERS["secret-2"], "/x")
    with pytest.raises(PermissionDeniedError, match="'acme'"):
        require_admin(CALLERS["secret-1"], "/x")


def test_a_credentials_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    path.write_text(json.dumps({"tokens": {"t1": {"tenant": "acme"}, "t2": {"tenant": "ops", "admin": True}}}))
    authenticator = Authenticator.from_file(path)
    assert authenticator.authenticate("Bearer t1") == Caller("acme", is_admin=False)
    assert authenticator.authenticate("Bearer t2") == Caller("ops", is_admin=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "expected"),
        ('{"tokens": {}}', "expected"),
        ('{"tokens": {"hidden": {}}}', "token 1 must have"),
        ('{"tokens": {"hidden": "acme"}}', "token 1 must have"),
        ('{"tokens": {"hidden": {"tenant": "a", "admin": "yes"}}}', "token 1 must have"),
        ('{"tokens": {"hidden": {"tenant": "a", "amdin": true}}}', "nothing else"),
        ('{"tokens": {" hidden": {"tenant": "a"}}}', "token 1 is empty or has spaces"),
    ],
)
def test_a_malformed_credentials_file_is_refused_without_showing_its_tokens(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "credentials.json"
    path.write_text(content)
    with pytest.raises(CredentialsError, match=words) as caught:
        Authenticator.from_file(path)
    assert "hidden" not in str(caught.value)
