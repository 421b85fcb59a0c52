"""Two processes, played by threads: each sees its share of the rows, and sums are over both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Two:
    """Two threads in the place of two processes; `all_reduce_sum` sums what both bring."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2)
        self.brought: list[list[Tensor]] = [[], []]

    def all_reduce_sum(self, rank: int) -> Callable[[Sequence[Tensor]], None]:
        """The sum over both, in place, for one of them."""

        def sum_up(tensors: Sequence[Tensor]) -> None:
            self.brought[rank] = [tensor.clone() for tensor in tensors]
            self.barrier.wait(20)
            for tensor, one, other in zip(tensors, *self.brought, strict=True):
                tensor.copy_(one + other)
            self.barrier.wait(20)

        return sum_up

    def run(self, what: Callable[[int], Any]) -> list[Any]:
        """What each comes to, 0 and 1."""
        results: list[Any] = [None, None]

        def work(rank: int) -> None:
            try:
                results[rank] = what(rank)
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results
