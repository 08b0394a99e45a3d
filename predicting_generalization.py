"""Predict the test accuracy of CNNs from their weights alone.

python predicting_generalization.py --conf configs/digits_cnn/scalegmn_hetero.yml
"""

from scalegmn.experiments.config import ScriptConfig, read_config
from scalegmn.experiments.run import train
from scalegmn.reporting.errors import user_errors
from scalegmn.tasks.generalization import Generalization

if __name__ == "__main__":
    with user_errors():
        train(read_config(config_class=ScriptConfig), Generalization.from_settings)
