"""The keys of every recipe, pinned: `python -m tests.golden` writes golden_keys.json anew.

A key that changes makes every stored result of its kind a stranger. Where that is meant, bump a version, run this
and say so in the commit.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from orchestrator.recipes import RECIPES
from orchestrator.specs import key
from orchestrator.study import Study

FILE = Path(__file__).with_name("golden_keys.json")
FINGERPRINT = "0" * 64  # stands in for the data, which is not at hand for every recipe


def keys_of(study: Study) -> dict[str, Any]:
    """The keys of a study by kind; of its runs, which are many, their number and one hash."""
    runs = sorted(key(run) for _, run in study.runs(FINGERPRINT))
    return {
        "campaign": key(study.campaign_spec(FINGERPRINT)),
        "scores": key(study.scores_spec(FINGERPRINT)),
        "originals": [key(original) for original in study.originals(FINGERPRINT)],
        "references": [key(reference) for reference in study.reference_runs(FINGERPRINT)],
        "runs": {"count": len(runs), "sha256": hashlib.sha256("\n".join(runs).encode()).hexdigest()},
    }


def golden() -> dict[str, Any]:
    """What the file should hold."""
    return {name: keys_of(RECIPES[name].function()) for name in RECIPES}


if __name__ == "__main__":
    FILE.write_text(json.dumps(golden(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"wrote {FILE.name}: {', '.join(RECIPES)}")
