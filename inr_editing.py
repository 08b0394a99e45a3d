"""Edit the images that INRs store, through their weights.

python inr_editing.py --conf configs/digits_editing/scalegmn_bidir.yml
"""

import torch

from scalegmn.config import read_config, start_run
from scalegmn.log import user_errors
from scalegmn.tasks.editing import Editing
from scalegmn.train.trainer import fit


def main() -> None:
    """Parse, train, test; results in the run folder."""
    with user_errors():
        config = read_config()
        config.train_args.check_device()
        model_config = config.scalegmn_args
        if model_config.output != "parameters":
            raise ValueError(f"scalegmn_args.output: found {model_config.output}, but editing needs parameters")
        task = Editing(config.data, config.batch_size, config.debug)
        torch.manual_seed(config.train_args.seed)
        model = model_config.build(task.spec)
        run = start_run(config)
    try:
        summary = fit(task, model, config.train_args, config.optimization, run)
    except FloatingPointError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{'mean squared error x 1e-2':<28}{'val':>8}{'test':>8}")
    trivial = summary["data"]["trivial_answers"]
    for name in ("no_edit", "linear_map"):
        print(f"{name.replace('_', ' '):<28}{100 * trivial['val'][name]:>8.3f}{100 * trivial['test'][name]:>8.3f}")
    print(f"{'ScaleGMN':<28}{100 * summary['val_loss']:>8.3f}{100 * summary['test_loss']:>8.3f}")


if __name__ == "__main__":
    main()
