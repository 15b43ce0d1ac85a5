"""Whether the hub answers, which is asked once and briefly: its libraries retry for a minute and then blame a file."""

from __future__ import annotations

import http.client
import ssl
import threading
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

TIMEOUT_S = 5.0


def is_id(source: str) -> bool:
    """Tells whether this can only be a hub id: it has the form of one and is not on this disk."""
    try:
        validate_repo_id(split(source)[0])
    except HFValidationError:
        return False
    return not Path(source).exists()


def split(source: str | Path) -> tuple[str, str | None]:
    """A hub id and its revision; whatever is on this disk has none.

    >>> split("owner/name@v1.0")
    ('owner/name', 'v1.0')
    """
    name, _, revision = str(source).partition("@")
    return (name, revision) if revision and not Path(source).exists() else (str(source), None)


def arguments(source: str | Path) -> dict[str, Any]:
    """The arguments of `from_pretrained` that name `source`."""
    name, revision = split(source)
    return {"pretrained_model_name_or_path": name} | ({"revision": revision} if revision else {})


@cache
def unreachable() -> str:
    """Says why hub ids can only come from the cache, or empty. With a reason, the hub's libraries no longer try."""
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set, so nothing is fetched"
    why = _silence(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = bool(why)
    return f"{constants.ENDPOINT} cannot be reached ({why})" if why else ""


def _silence(endpoint: str) -> str:
    """Says why the hub does not answer, or empty if it answers anything."""
    silence = [f"no answer within {TIMEOUT_S:g} s"]
    # In a thread, since the time limit of urllib excludes the look-up of a name.
    asking = threading.Thread(target=lambda: silence.append(_ask(endpoint)), daemon=True)
    asking.start()
    asking.join(TIMEOUT_S)
    return silence[-1]


def _ask(endpoint: str) -> str:
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=TIMEOUT_S):
            return ""
    except urllib.error.HTTPError:
        return ""
    except urllib.error.URLError as error:  # the hub's library may accept a certificate that is refused here
        return "" if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except (OSError, http.client.HTTPException) as error:
        return str(error)


def why_absent(source: str | Path) -> str:
    """Says why the hub id `source` cannot be loaded, with the way out. Empty if it may be: `source` is a folder, the
    hub answers, or the cache has a copy."""
    source = str(source)
    if not is_id(source) or not (why := unreachable()):
        return ""
    name, revision = split(source)
    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return ""
    download = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    return (
        f"{why}, and the cache of the hub ({constants.HF_HUB_CACHE}) has no copy of it; where there is a network, "
        f"`{download} --local-dir FOLDER` makes a folder to name here"
    )
