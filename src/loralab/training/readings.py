"""Numbers on their way from the device to the host, which goes on meanwhile."""

import torch
from jaxtyping import Float
from torch import Tensor


class Reading:
    """What `numbers` will be when the device has computed them; on a CPU they are there at once."""

    def __init__(self, numbers: Float[Tensor, " count"]) -> None:
        is_remote = numbers.is_cuda
        self._numbers = numbers.to("cpu", non_blocking=is_remote)  # into pinned memory
        self._arrival = (
            torch.cuda.current_stream(numbers.device).record_event() if is_remote else None
        )

    @property
    def has_arrived(self) -> bool:
        """Whether `numbers` would not wait."""
        return self._arrival is None or self._arrival.query()

    def wait(self) -> None:
        """Wait for the numbers, and for no work that was enqueued after them."""
        if self._arrival is not None:
            self._arrival.synchronize()

    def numbers(self) -> list[float]:
        """The numbers, as soon as they are there."""
        self.wait()
        return self._numbers.tolist()
