"""The indices of these tests are in a folder of their own, not in the cache of whoever runs them."""

import pytest


@pytest.fixture(scope="package", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
