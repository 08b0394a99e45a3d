"""Edit the images that INRs store, through their weights.

python inr_editing.py --conf configs/digits_editing/scalegmn_bidir.yml
python inr_editing.py --checkpoint RUN --edit net.pth --out edited.pth
"""

from pathlib import Path

import torch

from scalegmn.config import read_checkpoint_config, start_run, with_run_dir
from scalegmn.data.loader import open_data
from scalegmn.edit import EditConfig, edit_files, export_zoo
from scalegmn.log import user_errors
from scalegmn.tasks.editing import Editing, table
from scalegmn.train.trainer import fit
from scalegmn.trained import load_model


def main() -> None:
    """Parse, train, test; results in the run folder. Or edit files with a trained model."""
    with user_errors():
        config = read_checkpoint_config(EditConfig)
        if config.edit is not None:
            return edit_files(config)
        if config.checkpoint is not None:
            zoo = open_data(config.data)
            return export_zoo(config, load_model(config.scalegmn_args, Path(config.checkpoint), zoo.spec), zoo)
        config = with_run_dir(config)
        config.train_args.check_device()
        task = Editing(config.data, config.batch_size, config.debug)
        torch.manual_seed(config.train_args.seed)
        model = config.scalegmn_args.build(task.spec)
        run = start_run(config)
    try:
        summary = fit(task, model, config.train_args, config.optimization, run)
    except FloatingPointError as error:
        raise SystemExit(f"error: {error}") from None
    print(table(summary))
    if config.export_edited is not None:
        with user_errors():
            export_zoo(config, model, task.zoo)


if __name__ == "__main__":
    main()
