"""cuda.core: StridedMemoryView, through its DLPack exchange table.

    view = StridedMemoryView.from_dlpack(array, stream_ptr=-1)

cuda.core allocates no arrays and has no current stream: give `out`, `workspace`, and `stream`, to
which a cuda.core Stream can be given as it is. A view of 16-bit integers with dtype="bfloat16"
stands for bfloat16.
"""

from __future__ import annotations

from .versions import installed

TESTED = "cuda-core 1.2"


def status():
    """(version found or None, why the door is closed or None). Does not import cuda.core."""
    return installed("cuda-core")
