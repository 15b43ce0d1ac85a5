"""Scripts for TRL without an interpreter of their own."""

import pytest
from copies import WITH_COPIES

from grpo.cli.migration import trl_script


@pytest.fixture
def copied_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts are read by copies of this process, which has TRL already.

    `test_what_a_script_may_do_before_its_trainer` reads one in a fresh interpreter, as a user does.
    """
    import trl.trainer.grpo_trainer  # noqa: F401 - what is imported here is in each copy

    monkeypatch.setattr(trl_script, "subprocess", WITH_COPIES)
