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
        task = Classification(config.data, config.batch_size, config.debug)
        task.check(config.scalegmn_args.output, config.scalegmn_args.out_dim)
        torch.manual_seed(config.train_args.seed)
        model = config.scalegmn_args.build(task.spec)
        run = start_run(config)
    try:
        fit(task, model, config.train_args, config.optimization, run)
    except FloatingPointError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
