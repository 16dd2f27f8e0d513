from torch import Tensor

with_cuda: bool

def connect(tensor_type: type, exchange_api: object) -> None: ...
def set_parallel_for(function: int) -> None: ...
def cpu_levels() -> list[str]: ...
def cpu_level() -> str: ...
def set_cpu_level(name: str) -> None: ...
def cuda_unavailable_reason() -> str: ...
def taylor_workspace(w: Tensor) -> int: ...
def taylor(
    kind: str,
    w: Tensor,
    g: Tensor | None,
    h: Tensor | None,
    x: Tensor | None,
    rows: Tensor,
    cols: Tensor,
    workspace: Tensor,
) -> None: ...
def gather_workspace(
    src: list[Tensor], index: list[Tensor], dims: list[int], dst: list[Tensor]
) -> int: ...
def gather(
    src: list[Tensor],
    index: list[Tensor],
    dims: list[int],
    dst: list[Tensor],
    workspace: Tensor | None,
    fresh: bool,
) -> None: ...
def scan_workspace(tensors: list[Tensor]) -> int: ...
def scan(tensors: list[Tensor], out: Tensor, workspace: Tensor) -> None: ...
def cross_entropy(
    logits: Tensor, targets: Tensor, loss: Tensor, log_normaliser: Tensor, scale: float | None
) -> None: ...
def attention_serves() -> bool: ...
def attention_workspace(q: Tensor, k: Tensor) -> int: ...
def attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, workspace: Tensor, scale: float
) -> None: ...
def attention_backward_workspace(q: Tensor, at_once: int) -> int: ...
def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    workspace: Tensor,
    scale: float,
) -> None: ...
def adamw_workspace(params: list[Tensor]) -> int: ...

class AdamWStates:
    def __init__(self) -> None: ...
    def sync(self, states: list[dict[str, Tensor | None]]) -> None: ...

class AdamWStep:
    def __init__(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        states: AdamWStates,
        group_of: list[int],
        groups: list[list[float]],
        steps: Tensor,
        stats: Tensor,
        total: Tensor,
        control: Tensor,
        workspace: Tensor,
        max_norm: float,
        master: str,
        seed: int,
        growth: float,
        backoff: float,
        interval: int,
    ) -> None: ...
    def misfits(self) -> list[int]: ...
    def norms(self) -> None: ...
    def update(self) -> None: ...
