"""A device on the CPU whose copies happen as late as they may, or not before they are waited for."""

from __future__ import annotations

import threading

import torch

from hf_optim.toolkit.offloading.files import aligned_memory


class LateLink:
    """Copies run when something waits for them, in their order; a mark counts what the device was given.

    Attributes:
        copied: bytes that were copied.
    """

    host_is_device = False

    def __init__(self):
        self.device = torch.device("cpu")
        self.waiting, self.copied, self.marks = [], 0, 0
        self.lock = threading.Lock()

    def slot(self, size):
        return torch.zeros(size, dtype=torch.uint8)

    def host(self, size):
        return aligned_memory(size)

    def mark(self):
        self.marks += 1
        return self.marks

    def copy(self, target, source, after):
        assert after is None or after <= self.marks
        ticket = [target, source]
        with self.lock:
            self.copied += target.numel()
            self.waiting.append(ticket)
        return ticket

    def wait(self, ticket):
        if ticket is None:
            return
        with self.lock:
            while any(each is ticket for each in self.waiting):
                target, source = self.waiting.pop(0)
                target.copy_(source)

    finish = wait
