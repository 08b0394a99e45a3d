"""Predict the test accuracy of CNNs from their weights alone.

python predicting_generalization.py --conf configs/digits_cnn/scalegmn_hetero.yml
"""

from scalegmn.experiments.config import ScriptConfig, read_config
from scalegmn.experiments.run import train
from scalegmn.reporting.errors import user_errors
from scalegmn.tasks.generalization import Generalization


def build_task(config: ScriptConfig) -> Generalization:
    """The task, for models with one output."""
    config.model_config.check_output("vector", "predicting generalisation", out_dim=1)
    return Generalization(config.data, config.batch_size, config.train_args.loss, config.debug)


if __name__ == "__main__":
    with user_errors():
        train(read_config(config_class=ScriptConfig), build_task)
