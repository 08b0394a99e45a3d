"""Meta-train a learned optimiser.

python learning_to_optimize.py --conf configs/l2o/digits.yml

The same as `scalegmn train optimizer`.
"""

import sys

from scalegmn.cli import main

if __name__ == "__main__":
    main(["train", "optimizer", *sys.argv[1:]])
