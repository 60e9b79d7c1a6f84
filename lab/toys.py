"""Networks of the lab as functions without arguments, for `packsaddle plan link --model lab.toys:NAME --input SHAPE`.

NAME and SHAPE are mnist_autoencoder 1x28x28, char_transformer int64:64, or resnet18, resnet34 or resnet50 3x32x32.
"""

from functools import partial

from torch import nn

from lab.tasks import models
from lab.tasks.text import load_text


def char_transformer() -> nn.Module:
    """Return the character transformer of `lab.paper.language`.

    Its vocabulary is that of Python's language reference.
    """
    text = load_text(train=True)
    return models.seeded(lambda: models.CharTransformer(text.classes, text.context, width=64, depth=2, heads=2), 0)


mnist_autoencoder = partial(models.seeded, models.mnist_autoencoder, 0)
resnet18, resnet34, resnet50 = (partial(models.seeded, partial(models.resnet, depth, 10), 0) for depth in (18, 34, 50))
