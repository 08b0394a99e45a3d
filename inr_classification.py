"""Classify the images that INRs store, from their weights alone.

python inr_classification.py --conf configs/digits_cls/scalegmn.yml
"""

import torch

from scalegmn.config import read_config, start_run
from scalegmn.log import user_errors
from scalegmn.tasks.classification import Classification
from scalegmn.train.trainer import fit


def main() -> None:
    """Parse, train, test; results in the run folder."""
    with user_errors():
        config = read_config()
        config.train_args.check_device()
        model_config = config.scalegmn_args
        if model_config.output != "vector":
            raise ValueError(f"scalegmn_args.output: found {model_config.output}, but classification needs vector")
        task = Classification(config.data, config.batch_size, model_config.out_dim, config.debug)
        torch.manual_seed(config.train_args.seed)
        model = model_config.build(task.spec)
        run = start_run(config)
    try:
        fit(task, model, config.train_args, config.optimization, run)
    except FloatingPointError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
