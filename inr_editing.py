"""Edit the images that INRs store, through their weights.

python inr_editing.py --conf configs/digits_editing/scalegmn_bidir.yml
python inr_editing.py --checkpoint RUN --export_edited data/edited
"""

from pathlib import Path
from typing import Any

from scalegmn.experiments.config import read_config
from scalegmn.experiments.edited_zoo import EditConfig, export_zoo
from scalegmn.experiments.run import train
from scalegmn.experiments.trained import load_model
from scalegmn.models.base import Metanetwork
from scalegmn.reporting.errors import user_errors
from scalegmn.tasks.editing import Editing
from scalegmn.zoos.loader import open_data


def finished(config: EditConfig, task: Editing, model: Metanetwork, summary: dict[str, Any]) -> None:
    """Prints the errors beside trivial answers', and writes the edited zoo if one is wanted."""
    print(task.result_text(summary))
    if config.export_edited is not None:
        export_zoo(config, model, task.zoo)


if __name__ == "__main__":
    with user_errors():
        config = read_config(config_class=EditConfig)
        if config.checkpoint is not None:
            zoo = open_data(config.data)
            export_zoo(config, load_model(config.model_config, Path(config.checkpoint), zoo.spec), zoo)
        else:
            train(config, Editing.from_settings, finished)
