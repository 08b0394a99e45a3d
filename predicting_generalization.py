"""Predict the test accuracy of CNNs from their weights alone.

python predicting_generalization.py --conf configs/digits_cnn/scalegmn_hetero.yml
python predicting_generalization.py --checkpoint RUN --predict net.pth
"""

import torch

from scalegmn.config import read_checkpoint_config, start_run, with_run_dir
from scalegmn.log import user_errors
from scalegmn.predict import PredictConfig, predict_file
from scalegmn.tasks.generalization import Generalization
from scalegmn.train.trainer import fit


def main() -> None:
    """Parse, train, test; results in the run folder. Or predict a file's accuracy with a trained model."""
    with user_errors():
        config = read_checkpoint_config(PredictConfig)
        if config.predict is not None:
            return predict_file(config)
        config = with_run_dir(config)
        config.train_args.check_device()
        task = Generalization(config.data, config.batch_size, config.train_args.loss, config.debug)
        torch.manual_seed(config.train_args.seed)
        model = config.scalegmn_args.build(task.spec)
        run = start_run(config)
    try:
        fit(task, model, config.train_args, config.optimization, run)
    except FloatingPointError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
