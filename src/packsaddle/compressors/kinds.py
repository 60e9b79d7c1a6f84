"""The list of all compressors, one line each. Names, help, configurations, exports, tables and tests derive from it."""

# Tables and messages list the compressors in this order.
# isort: off
from packsaddle.compressors.sparse import Identity as Identity
from packsaddle.compressors.sparse import RandomK as RandomK
from packsaddle.compressors.sparse import TopK as TopK
from packsaddle.compressors.sparse import AdaptiveTopK as AdaptiveTopK
from packsaddle.compressors.shared import SharedTopK as SharedTopK
from packsaddle.compressors.shared import SketchTopK as SketchTopK
from packsaddle.compressors.quantized import Sign as Sign
from packsaddle.compressors.quantized import Rounded as Rounded
from packsaddle.compressors.quantized import QSGD as QSGD
from packsaddle.compressors.linear_sketch import LinearSketch as LinearSketch
from packsaddle.compressors.low_rank import LowRank as LowRank
