"""JSON in a store, with a checksum: what is damaged is named, never read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from orchestrator.registry import InputError, canonical_json
from orchestrator.store import Store


def seal(body: Mapping[str, Any]) -> bytes:
    """A body as JSON beside its checksum."""
    text = canonical_json(body)
    return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": body}, allow_nan=False).encode()


_AGAIN = "remove it and run its sweep again, which computes it anew and keeps everything else"


def unseal(store: Store, name: str, remedy: str = _AGAIN) -> dict[str, Any]:
    """The body of a stored object; FileNotFoundError where there is none, InputError where it is damaged."""
    content = store.get(name)
    try:
        sealed = json.loads(content)
        body: dict[str, Any] = sealed["body"]
        if hashlib.sha256(canonical_json(body).encode()).hexdigest() == sealed["sha256"]:
            return body
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{store.url(name)} is damaged: {len(content)} bytes that do not match their checksum; {remedy}")
