"""Which environment variables a reward worker gets: a few by name, and those that the user lists.

A reward runs a user's or a third party's code on what a model wrote, and needs no keys and tokens of the training
process. This is not a sandbox: a reward may still read the files that its user may read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from rewards.opened import VARIABLE as OPENED
from rewards.protocol import RewardError

_PASSED = re.compile(
    "|".join(
        [
            "PATH|HOME|USER|LOGNAME|SHELL|TERM|PWD|TMPDIR|TMP|TEMP|LANG|LANGUAGE|LC_[A-Z]+|TZ",
            "XDG_(CACHE|CONFIG|DATA)_HOME",
            "PYTHON[A-Z0-9]+|VIRTUAL_ENV|CONDA_PREFIX|CONDA_DEFAULT_ENV|(DY)?LD_LIBRARY_PATH|LD_PRELOAD",
            "(OMP|KMP|GOMP|MKL|OPENBLAS|BLIS|VECLIB|NUMEXPR|RAYON)_[A-Z0-9_]+|TOKENIZERS_PARALLELISM",
            "(CUDA|HIP|ROCR|NVIDIA)_VISIBLE_DEVICES|CUDA_DEVICE_ORDER|CUDA_HOME",
            "HF_(HOME|ENDPOINT|HUB_CACHE|HUB_OFFLINE|DATASETS_CACHE|DATASETS_OFFLINE)|TRANSFORMERS_OFFLINE",
            "TORCH_HOME|NLTK_DATA|SACREBLEU",  # where libraries keep downloads
            f"{OPENED}|SSL_CERT_FILE|SSL_CERT_DIR|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE",
        ]
    )
)
_PROXY = re.compile("(HTTP|HTTPS|ALL|NO)_PROXY", re.IGNORECASE)


def worker_variables(names: Iterable[str] = ()) -> dict[str, str]:
    """The environment of a worker: the usual few variables of this process, and `names`.

    A proxy is passed unless its address holds a password. Raises RewardError for one of `names` that is not set.
    """
    names = list(names)
    for name in names:
        if name not in os.environ:
            raise RewardError(
                f"reward.pass_variables: {name!r} is not set in this environment; set it, or take it out of the list"
            )
    variables = {}
    for name, value in os.environ.items():
        if name in names or _PASSED.fullmatch(name) or (_PROXY.fullmatch(name) and "@" not in value):
            variables[name] = value
    return variables


def hint_at_withheld(message: str, names: Iterable[str] = ()) -> str:
    """The message, with the way out if it names a variable that is set here and was not passed to the worker."""
    passed = worker_variables(names)
    words = set(re.findall(r"\w+", message))
    withheld = [name for name in os.environ if name in words and "_" in name.strip("_") and name not in passed]
    if not withheld:
        return message
    return (
        f"{message}. {', '.join(withheld)}: set here, but rewards get only a few environment variables; pass more with "
        f"reward.pass_variables: [{', '.join(withheld)}]"
    )
