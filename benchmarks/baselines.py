"""A finished run of classification or generalisation beside simple baselines on the same networks.

python benchmarks/baselines.py RUN
"""

import json
import sys
from pathlib import Path

from scalegmn.experiments.baselines import BASELINES
from scalegmn.reporting.errors import user_errors

if __name__ == "__main__":
    with user_errors():
        if len(sys.argv) != 2:
            raise ValueError("expected the folder of a finished run: python benchmarks/baselines.py RUN")
        run = Path(sys.argv[1])
        task = json.loads((run / "summary.json").read_text())["data"]["task"]
        if task not in BASELINES:
            raise ValueError(f"{run} is a run of {task}, which has no baselines; expected {' or '.join(BASELINES)}")
        print(f"\n{BASELINES[task](run)}")
