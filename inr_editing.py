"""Edit the images that INRs store, through their weights.

python inr_editing.py --conf configs/digits_editing/scalegmn_probes.yml

The same as `scalegmn train editing`.
"""

import sys

from scalegmn.cli import main

if __name__ == "__main__":
    main(["train", "editing", *sys.argv[1:]])
