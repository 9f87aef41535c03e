"""The loss, alone and with the layer before it, beside its peers. Writes results/cross_entropy.*

    python -m benchmarks.bench_cross_entropy [--quick | --check]

M rows of V logits of s bytes; 8 M V operations. The loss alone moves M V s bytes, and with its
gradient 3 M V s (logits in; logits in again, gradient out). One pass that overwrites the logits
with the gradient moves 2 M V s; linear_cross_entropy does so with its own logits. With the layer
before the loss, x (M, 768), the work is three products, 6 M V C operations. The bound "three
products" times those alone and overwrites their results every time. The eager form makes fp32
logits, as autocast does. Liger overwrites its input logits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu
from nanogpt2.kernels import cross_entropy as room
from nanogpt2.kernels.cross_entropy import cross_entropy, linear_cross_entropy

# rows, columns, columns that are tokens, input width of the linear layer
SHAPES = {
    "full": [(16384, 50257, 50257, 768), (16384, 50304, 50257, 768)],
    "quick": [(2048, 50257, 50257, 768)],
    "check": [(5, 64, 50, 7)],
}


def cases(M: int, N: int, V: int, C: int):
    logits, targets = gpu.randn(M, N), torch.randint(V, (M,), device=gpu.DEVICE)
    size, name = M * N * logits.element_size(), f"{M} x {N}"

    def eager(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z[:, :V].float(), t)

    liger = gpu.liger("transformers.functional", "liger_cross_entropy")
    functions = {
        "ours": lambda z, t: cross_entropy(z, t, vocab_size=V),
        "eager": eager,
        "torch.compile": gpu.compiled(eager),
        # Liger does not support padded columns
        "Liger": liger if V == N else "does not support a padded vocabulary",
    }
    work = {"forward": (size, 4 * M * N), "forward and backward": (3 * size, 8 * M * N)}
    yield from gpu.passes(name, functions, eager, (logits, targets), work)

    yield in_one_pass(f"{name}, one pass", logits, targets, V, eager)
    yield from with_the_layer(M, N, V, C, logits, targets)


def in_one_pass(name: str, logits: Tensor, targets: Tensor, V: int, eager) -> gpu.Case:
    own = logits.clone()

    def ours() -> tuple[Tensor, Tensor]:
        """Return the loss and the logits' memory, which now holds the gradient times M."""
        losses, _ = room._losses(own, targets, -100, V, True)
        return losses.mean(), own

    def reference() -> tuple[Tensor, Tensor]:
        z = logits.detach().float().requires_grad_()
        loss = eager(z, targets)
        return loss.detach(), torch.autograd.grad(loss * len(z), z)[0]

    size = logits.numel()
    return gpu.Case(name, {"ours": ours}, reference, 2 * size * logits.element_size(), 8 * size)


def with_the_layer(M: int, N: int, V: int, C: int, logits: Tensor, targets: Tensor):
    x, weight = gpu.randn(M, C), gpu.randn(N, C) / C**0.5
    dx, dw = torch.empty_like(x), torch.empty_like(weight)

    def eager(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy((x @ w[:V].t()).float(), t)

    def three_products() -> None:
        torch.mm(x, weight.t(), out=logits)
        torch.mm(logits, weight, out=dx)
        torch.mm(logits.t(), x, out=dw)

    liger = gpu.liger("transformers.functional", "liger_fused_linear_cross_entropy")
    functions = {
        "ours": lambda x, w, t: linear_cross_entropy(x, w, t, vocab_size=V),
        "eager": eager,
        "torch.compile": gpu.compiled(eager),
        "Liger": liger if V == N else "does not support a padded vocabulary",
    }
    s = x.element_size()
    work = {"forward and backward": (2 * s * (M + N) * C, 6 * M * N * C)}
    yield from gpu.passes(
        f"{M} x {C} to {N}", functions, eager, (x, weight, targets), work,
        bounds={"three products": three_products},
    )  # fmt: skip


if __name__ == "__main__":
    gpu.main(__file__, __doc__, SHAPES, cases)
