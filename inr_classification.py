"""Classify the images that INRs store, from their weights alone.

python inr_classification.py --conf configs/digits_cls/scalegmn.yml

The same as `scalegmn train classification`.
"""

import sys

from scalegmn.cli import main

if __name__ == "__main__":
    main(["train", "classification", *sys.argv[1:]])
