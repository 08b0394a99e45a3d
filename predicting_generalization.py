"""Predict the test accuracy of CNNs from their weights alone.

python predicting_generalization.py --conf configs/digits_cnn/scalegmn_hetero.yml
python predicting_generalization.py --checkpoint RUN --predict net.pth
"""

from scalegmn.config import read_config
from scalegmn.log import user_errors
from scalegmn.predict import PredictConfig, predict_file
from scalegmn.run import train
from scalegmn.tasks.generalization import Generalization


def build_task(config: PredictConfig) -> Generalization:
    """The task."""
    return Generalization(config.data, config.batch_size, config.train_args.loss, config.debug)


if __name__ == "__main__":
    with user_errors():
        config = read_config(config_class=PredictConfig)
        if config.predict is not None:
            predict_file(config)
        else:
            train(config, build_task)
