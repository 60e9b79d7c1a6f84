"""Data and networks of runs: images, text, sharding over workers, models, batch normalization."""

from packsaddle.runs.tasks.images import Dataset, Images, load_data, load_images
from packsaddle.runs.tasks.models import Task, make_task, mnist_autoencoder, task_loss
from packsaddle.runs.tasks.sharding import Batches, shard
from packsaddle.runs.tasks.text import Text, cut_text, encode_text, load_text
from packsaddle.runs.tasks.toys import MODELS, build_model

__all__ = [
    "MODELS",
    "Batches",
    "Dataset",
    "Images",
    "Task",
    "Text",
    "build_model",
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
