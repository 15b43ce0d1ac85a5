"""What rldoctor and rlprobe find in runs: `python others.py RUN ...`, by the interpreter of their environment.

Prints one JSON line a run. Nothing else is needed in that environment.
"""

import json
import sys
import time
from pathlib import Path


def rl_doctor(place: Path) -> list[dict[str, object]]:
    """Its findings, the worst first, as its report has them."""
    from rl_doctor.diagnosis import diagnose
    from rl_doctor.ingest import load_run

    said = []
    for found in diagnose(load_run(str(place / "trainer_state.json"))).problems:
        said.append({"kind": found.detector, "grave": found.severity.name != "INFO", "evidence": found.summary})
    return said


def rlprobe(place: Path) -> list[dict[str, object]]:
    from rlprobe.doctor import diagnose

    said = []
    for found in diagnose(place / "rlprobe"):
        said.append({"kind": found.signature_id, "grave": found.severity != "info", "evidence": found.explanation})
    return said


def main() -> None:
    for name in sys.argv[1:]:
        found = {}
        for tool, call in (("rl-doctor", rl_doctor), ("rlprobe", rlprobe)):
            began = time.process_time()
            found[tool] = {"said": call(Path(name)), "seconds": round(time.process_time() - began, 3)}
        print(json.dumps({"place": name, **found}), flush=True)


if __name__ == "__main__":
    main()
