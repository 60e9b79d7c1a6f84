"""The data sets and networks of the lab, and the distribution of examples to workers."""

from lab.tasks.images import Dataset, Images, load_data, load_images
from lab.tasks.models import Task, make_task, mnist_autoencoder, task_loss
from lab.tasks.options import DataConfig, ModelConfig
from lab.tasks.sharding import Batches, shard
from lab.tasks.text import Text, cut_text, encode_text, load_text

__all__ = [
    "Batches",
    "DataConfig",
    "Dataset",
    "Images",
    "ModelConfig",
    "Task",
    "Text",
    "cut_text",
    "encode_text",
    "load_data",
    "load_images",
    "load_text",
    "make_task",
    "mnist_autoencoder",
    "shard",
    "task_loss",
]
