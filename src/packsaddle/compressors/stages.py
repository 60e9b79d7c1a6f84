"""Stages: a compressor applied repeatedly to its own residual v - C(v), in one message."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from packsaddle.compressors.base import Compressor, Message, Summary, check_count
from packsaddle.compressors.parts import decoding
from packsaddle.compressors.quantized import Sign
from packsaddle.errors import MessageError
from packsaddle.messages import shown
from packsaddle.numerics.seeds import mix


@dataclass(frozen=True)
class Stages(Compressor):
    """A compressor that applies another compressor `passes` times, each time to the residual of the previous pass.

    C(v) = C_1(r_0) + ... + C_p(r_{p-1}) with r_0 = v and r_i = r_{i-1} - C_i(r_{i-1}), so v - C(v) = r_p. The passes
    have independent randomness, a function of (seed, step, i), and the expected energy of r_i is at most 1 - mu times
    that of r_{i-1}. So C is a (1 - (1 - mu)^p)-compressor if each C_i is a mu-compressor. A message has the parts of
    all passes: "1 signs", "2 signs", ....

    Linear compressors are not allowed: with a larger ratio, one pass sends the same number of coordinates in one part,
    which can be all-reduced. Messages are all-gathered, even for compressors with another aggregation (LowRank,
    SketchTopK). Raises ValueError if the compressor is not a Compressor, or is linear or lossless, or if passes is not
    a positive integer.

    >>> import torch
    >>> from packsaddle import Sign, Stages
    >>> v = torch.tensor([1.0, -3.0, 2.0, 0.0])
    >>> Sign()(v)
    tensor([ 1.5000, -1.5000,  1.5000,  1.5000])
    >>> Stages(Sign(), 2)(v)
    tensor([ 0.5000, -2.5000,  2.5000,  0.5000])
    """

    summary: ClassVar[Summary] = Summary(
        "1 - (1 - mu of C)^passes", "C's message of each pass", ({"compressor": Sign()},)
    )
    compressor: Compressor  # compressor of each pass
    passes: int = 2  # p, number of passes

    def __post_init__(self) -> None:
        if not isinstance(self.compressor, Compressor):
            raise ValueError(f"compressor of Stages must be a Compressor, got {self.compressor!r}")
        if self.compressor.lossless:
            raise ValueError(f"compressor of Stages must leave something, and {self.compressor!r} is lossless")
        if self.compressor.linear:
            raise ValueError(
                f"compressor of Stages must not be linear, and {self.compressor!r} is: a larger ratio sends as much"
            )
        check_count("passes of Stages", self.passes)

    @property
    def private(self) -> bool:  # type: ignore[override]
        """True if the randomness of the repeated compressor differs between workers."""
        return self.compressor.private

    @property
    def fixed_size(self) -> bool:  # type: ignore[override]
        """True if the sizes of the message parts of the repeated compressor depend on the vector's length alone."""
        return self.compressor.fixed_size

    def mu(self, d: int) -> float:
        return 1 - (1 - self.compressor.mu(d)) ** self.passes

    def validate(self, d: int) -> None:
        self.compressor.validate(d)

    def restrict(self, start: int, stop: int, d: int) -> "Stages":
        return replace(self, compressor=self.compressor.restrict(start, stop, d))

    def for_tensors(self, shapes: Sequence[torch.Size]) -> "Stages":
        return replace(self, compressor=self.compressor.for_tensors(shapes))

    def apportion(self, samples: Sequence[Tensor], sizes: Sequence[int]) -> list[Compressor] | None:
        allotted = self.compressor.apportion(samples, sizes)
        return None if allotted is None else [replace(self, compressor=compressor) for compressor in allotted]

    def rates(self, d: int) -> list[tuple[int, float]] | None:
        """Return (number of coordinates, probability that at least one pass sends each of them) for consecutive ranges
        of the d coordinates. Returns None if the probability depends on the vector."""
        rates = self.compressor.rates(d)
        return None if rates is None else [(n, 1 - (1 - rate) ** self.passes) for n, rate in rates]

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        rest, messages = v.clone(), []
        for i in range(self.passes):
            message = self.compressor.encode(rest, seed=self._seed_of(i, seed), step=step)
            messages.append(message)
            if i + 1 < self.passes:
                self.compressor.add_decoded(message, rest, -1.0)
        parts = {f"{i} {name}": part for i, m in enumerate(messages, 1) for name, part in m.parts.items()}
        return Message(parts, tuple(m.context for m in messages))

    def receive(self, parts: Mapping[str, Tensor], d: int, *, seed: int, step: int) -> Message:
        messages = []
        for i, of_pass in enumerate(self._split(parts)):
            with decoding(self, f"{i + 1} "):
                messages.append(self.compressor.receive(of_pass, d, seed=self._seed_of(i, seed), step=step))
        return Message(parts, tuple(m.context for m in messages))

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        for one in self._messages(message):
            self.compressor.add_decoded(one, out, alpha)

    def support_of(self, message: Message, d: int) -> Tensor | None:
        sent: Tensor | None = None
        for one in self._messages(message):
            support = self.compressor.support_of(one, d)
            if support is None:
                return None
            sent = support.new_zeros(d, dtype=torch.bool) if sent is None else sent
            sent[support] = True
        return None if sent is None else sent.nonzero().squeeze(1)

    def message_bytes(self, d: int, itemsize: int = 4) -> float:
        if self.fixed_size:
            return self.passes * self.compressor.message_bytes(d, itemsize)
        return super().message_bytes(d, itemsize)  # residuals are not Gaussian, so measure all passes

    def _split(self, parts: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Split the parts of a message by pass, and remove the pass number from each part's name. Raises MessageError
        if a part belongs to no pass."""
        split: list[dict[str, Tensor]] = []
        for i in range(1, self.passes + 1):
            split.append({n.removeprefix(f"{i} "): part for n, part in parts.items() if n.startswith(f"{i} ")})
        if sum(map(len, split)) != len(parts):
            raise MessageError("parts", f"named by passes 1 to {self.passes}", ", ".join(parts), shown(self))
        return split

    def _messages(self, message: Message) -> list[Message]:
        """Split a message of this compressor into one message per pass, in the format of the repeated compressor."""
        return [Message(*pair) for pair in zip(self._split(message.parts), message.context, strict=True)]

    @property
    def _depth(self) -> int:
        return 1 + (self.compressor._depth if isinstance(self.compressor, Stages) else 0)

    def _seed_of(self, i: int, seed: int) -> int:
        """Return the random seed of pass i, derived from the message's `seed`. For pass 0 it is `seed` itself. For
        later passes it is a hash of `seed`, i, and the depth to which Stages are nested in this one."""
        return mix(seed, i, i * self._depth) if i else seed
