"""Task types: name in a recipe or manifest -> class."""

from dsvlm.tasks.base import TaskType
from dsvlm.tasks.caption import Caption
from dsvlm.tasks.classify import Classify
from dsvlm.tasks.conversation import Conversation
from dsvlm.tasks.detect import Detect
from dsvlm.tasks.locate import Locate
from dsvlm.tasks.pair import Pair
from dsvlm.tasks.vqa import Vqa

TASK_TYPES: dict[str, type[TaskType]] = {
    "caption": Caption,
    "vqa": Vqa,
    "classify": Classify,
    "locate": Locate,
    "detect": Detect,
    "pair": Pair,
    "conversation": Conversation,
}

__all__ = ["TASK_TYPES", "TaskType"]
