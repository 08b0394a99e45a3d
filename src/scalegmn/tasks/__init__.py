"""What metanetworks learn, one file per task.

A task is a class with a name (`register_task`). It owns its options, what it needs of a model, loss, metrics, figures,
what a trained model answers, and the text of its model card. `TASKS` has all tasks.
"""

from scalegmn.tasks.classification import Classification
from scalegmn.tasks.editing import Editing
from scalegmn.tasks.generalization import Generalization
from scalegmn.tasks.improvement import Improvement
from scalegmn.tasks.registry import TASKS, register_task
from scalegmn.tasks.zoo_task import ZooTask

__all__ = ["TASKS", "Classification", "Editing", "Generalization", "Improvement", "ZooTask", "register_task"]
