"""Classify the images that INRs store, from their weights alone.

python inr_classification.py --conf configs/digits_cls/scalegmn.yml
"""

from scalegmn.experiments.config import ScriptConfig, read_config
from scalegmn.experiments.run import train
from scalegmn.reporting.errors import user_errors
from scalegmn.tasks.classification import Classification

if __name__ == "__main__":
    with user_errors():
        train(read_config(config_class=ScriptConfig), Classification.from_settings)
