"""Classify the images that INRs store, from their weights alone.

python inr_classification.py --conf configs/digits_cls/scalegmn.yml
"""

from scalegmn.experiments.config import ScriptConfig, read_config
from scalegmn.experiments.run import train
from scalegmn.reporting.errors import user_errors
from scalegmn.tasks.classification import Classification


def build_task(config: ScriptConfig) -> Classification:
    """The task, for models with one output per class."""
    return Classification(config.data, config.batch_size, config.model_config, config.debug)


if __name__ == "__main__":
    with user_errors():
        train(read_config(config_class=ScriptConfig), build_task)
