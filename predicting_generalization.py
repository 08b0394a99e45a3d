"""Predict the test accuracy of CNNs from their weights. Comes with the next release."""

import sys

if __name__ == "__main__":
    print(
        "error: predicting_generalization.py comes with the next release; inr_classification.py works today",
        file=sys.stderr,
    )
    raise SystemExit(2)
