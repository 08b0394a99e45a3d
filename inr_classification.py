"""Classify the images that INRs store, from their weights alone.

python inr_classification.py --conf configs/digits_cls/scalegmn.yml
"""

from scalegmn.config import ScriptConfig, read_config
from scalegmn.log import user_errors
from scalegmn.run import train
from scalegmn.tasks.classification import Classification


def build_task(config: ScriptConfig) -> Classification:
    """The task, for models with one output per class."""
    model_config = config.scalegmn_args
    if model_config.output != "vector":
        raise ValueError(f"scalegmn_args.output: found {model_config.output}, but classification needs vector")
    return Classification(config.data, config.batch_size, model_config.out_dim, config.debug)


if __name__ == "__main__":
    with user_errors():
        train(read_config(config_class=ScriptConfig), build_task)
