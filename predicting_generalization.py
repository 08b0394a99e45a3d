"""Predict the test accuracy of CNNs from their weights alone.

python predicting_generalization.py --conf configs/digits_cnn/scalegmn_hetero.yml

The same as `scalegmn train generalization`.
"""

import sys

from scalegmn.cli import main

if __name__ == "__main__":
    main(["train", "generalization", *sys.argv[1:]])
