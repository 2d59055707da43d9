"""JSON objects from files that strangers wrote: bounded, without duplicate keys, errors naming the file."""

import json

from adapter_store.errors import AdapterCorruptError, shorten


def parse_json_object(data: bytes, file: str, part: str = "") -> dict[str, object]:
    """The object that `data` holds. `part` names where in the file it stands, for messages.

    Raises:
        AdapterCorruptError: it is not UTF-8 JSON, not an object, or names a key twice.
    """
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise AdapterCorruptError(file, "", f"{part}JSON is nested too deeply") from None
    except ValueError as error:
        raise AdapterCorruptError(file, "", f"{part}not valid JSON: {shorten(str(error))}") from None
    if not isinstance(parsed, dict):
        raise AdapterCorruptError(file, "", f"{part}JSON holds a {type(parsed).__name__} where an object belongs")
    return parsed


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Readers disagree on which of two equal keys counts, so neither does."""
    fields: dict[str, object] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"key {shorten(key)!r} stands there twice")
        fields[key] = value
    return fields
