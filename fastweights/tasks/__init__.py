"""What a model is trained on: text, and diagnostic tasks whose examples are a function of (seed, step).

From Python, a batch of a task is

>>> from fastweights.tasks import task
>>> inputs, targets = task("mqar:pairs=4,vocabulary=64").batch(seed=0, step=0, size=8)
>>> inputs.shape, (targets != -100).sum().item()
(torch.Size([8, 64]), 32)
"""

from .arithmetic import Modular
from .code import Code
from .continual import Continual
from .copying import Copying
from .environments import ENVIRONMENTS, Bandit, Environment, Step, TMaze
from .fewshot import FewShot
from .groups import Group, Words, group
from .images import Images, images
from .languages import Language
from .listops import ListOps
from .parity import Parity
from .recall import MQAR, Recall
from .registry import TASKS, describe, task
from .regression import InContextRegression
from .retrieval import Overwrite, Retrieval
from .source import IGNORED, Source, Task, VectorSource
from .text import Text, read_text, standard_library
from .timeseries import TimeSeries

__all__ = [
    "ENVIRONMENTS", "IGNORED", "MQAR", "TASKS", "Bandit", "Code", "Continual", "Copying", "Environment", "FewShot", "Group", "Images",
    "InContextRegression", "Language", "ListOps", "Modular", "Overwrite", "Parity", "Recall", "Retrieval", "Source", "Step", "TMaze",
    "Task", "Text", "TimeSeries", "VectorSource", "Words", "describe", "group", "images", "read_text", "standard_library", "task",
]  # fmt: skip
