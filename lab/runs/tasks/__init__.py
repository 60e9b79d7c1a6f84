"""The data and networks of runs: images, text, their distribution to workers, and models."""

from lab.runs.tasks.images import Dataset, Images, load_data, load_images
from lab.runs.tasks.models import Task, make_task, mnist_autoencoder, task_loss
from lab.runs.tasks.sharding import Batches, shard
from lab.runs.tasks.text import Text, cut_text, encode_text, load_text

__all__ = [
    "Batches",
    "Dataset",
    "Images",
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
