"""Who asks: keys for use and for administration, and which adapters each may use.

The file holds SHA-256 of keys, never keys: they are random and long, so that a slow hash for
passwords would add nothing. Keys are compared in constant time, all of them at every request, and
are written nowhere.
"""

import hashlib
import hmac
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from loralab.errors import ConfigError, ForbiddenError
from loralab.files import cannot_write
from loralab.serving.http.errors import AccessError
from loralab.serving.http.quotas import Quota

ALL = "*"
Positive = Annotated[int, Field(gt=0)]


class _Key(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    admin: bool = False
    adapters: list[str] = [ALL]


class _Quota(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    tokens_per_minute: Positive | None = None
    concurrent: Positive | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    keys: dict[str, _Key] = {}
    quotas: dict[str, _Quota] = {}


@dataclass(frozen=True)
class Caller:
    """Whoever made a request.

    adapters: names that may be used, the base's among them; None: all.
    """

    name: str
    admin: bool = False
    adapters: frozenset[str] | None = None

    def may_use(self, name: str) -> bool:
        """Whether requests for that adapter, or the base, are answered."""
        return self.adapters is None or name in self.adapters

    def check_use(self, names: Sequence[str]) -> None:
        """Raises `ForbiddenError`, which does not tell whether there is such an adapter."""
        barred = [name for name in names if not self.may_use(name)]
        if barred:
            raise ForbiddenError(
                f"this key may not use {', '.join(map(repr, barred))}",
                f"ask for one of: {', '.join(sorted(self.adapters or ()))}.",
            )

    def check_admin(self) -> None:
        """Raises `ForbiddenError` for a key that is for use alone."""
        if not self.admin:
            raise ForbiddenError(
                "this key is for use, not for administration", "use a key with `admin = true`."
            )


ANYONE = Caller("anyone", admin=True)


@dataclass(frozen=True)
class Keys:
    """The known keys by their hash; without any, everybody may do everything.

    quotas: by adapter; "default" for those without one of their own.
    """

    callers: Mapping[str, Caller] = field(default_factory=dict)
    quotas: Mapping[str, Quota] = field(default_factory=dict)

    def caller(self, authorization: str | None) -> Caller:
        """Whose key the header holds. Raises `AccessError` where it is no known one."""
        if not self.callers:
            return ANYONE
        kind, _, key = (authorization or "").partition(" ")
        given = _sha256(key.strip())
        found: Caller | None = None
        for known, caller in self.callers.items():  # all of them, whichever it is
            if hmac.compare_digest(known, given):
                found = caller
        if found is None or kind.lower() != "bearer":
            raise AccessError(
                "no key, or none that this server knows",
                "send it as `Authorization: Bearer KEY`.",
            )
        return found


def read_keys(path: Path) -> Keys:
    """The keys and quotas of a TOML file. Raises `ConfigError` that lists every fault."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        read = _File.model_validate(tables)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error})", "make one with `loralab serve --add-key NAME`."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}", "mend that line.") from None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors()]
        raise ConfigError(  # what was given is not shown: it may be a key
            "\n  - ".join([f"{path} is no file of keys", *faults]),
            "a key is a table [keys.NAME] with sha256, and if need be admin and adapters.",
        ) from None
    callers = {
        key.sha256: Caller(
            name, key.admin, None if ALL in key.adapters else frozenset(key.adapters)
        )
        for name, key in read.keys.items()
    }
    if len(callers) < len(read.keys):
        raise ConfigError(
            f"{path}: one key stands there twice", "give everyone a key of their own."
        )
    quotas = {
        name: Quota(quota.tokens_per_minute, quota.concurrent)
        for name, quota in read.quotas.items()
    }
    return Keys(callers, quotas)


def add_key(path: Path, name: str, *, admin: bool = False) -> str:
    """A new key, whose hash is added to the file (made readable for its owner alone).

    Raises `ConfigError` where the name is taken, `OutputError` for the disk.
    """
    if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise ConfigError(f"{name!r} cannot name a key", "give letters, digits, - and _.")
    if path.is_file() and name in _names(path):
        raise ConfigError(f"{path} has a key {name!r} already", "choose another name.")
    key = f"loralab-{secrets.token_urlsafe(32)}"
    told = f'[keys.{name}]\nsha256 = "{_sha256(key)}"\nadmin = {str(admin).lower()}\n'
    told += 'adapters = ["*"]\n'
    try:
        path.touch(mode=0o600)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n{told}" if path.stat().st_size else told)
    except OSError as error:
        raise cannot_write(path, error) from error
    return key


def _names(path: Path) -> set[str]:
    read_keys(path)
    tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    return set(tables.get("keys", {}))


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
