"""The head: logits, and losses in chunks of rows, cross-entropy or divergence from a teacher."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.models.layers import upcast

Divergence = Literal["reverse_kl", "forward_kl", "total_variation", "mse"]
# From the logits of a chunk, the rows that they belong to, and a dtype: the loss of every row, and its gradient with
# respect to the logits in this dtype; without dtype, no gradient. The logits may be overwritten. On a GPU they may
# have columns behind V, which are -inf and have gradient 0.
RowLosses = Callable[[Tensor, slice, torch.dtype | None], tuple[Tensor, Tensor | None]]
# Largest number of logits (rows x V) that are computed together, by device type. On a CPU they fit the caches. On a
# GPU there are so many that reading and writing the head's gradient once a chunk costs little time.
CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 28}
# Tensor cores take half-precision matrices whose sizes are multiples of this. Products of others are several times as
# slow (docs/speed.md).
ALIGNED = 8
# Logit of an id of the other modality, whose probability is exactly 0. Finite, so that divergences are.
NEVER = -1e30


class Modalities(NamedTuple):
    """Where the caption of a row ends and its image begins, in positions and in ids.

    Attributes:
        places: positions of the caption, which come first.
        ids: ids of text, which come first.
    """

    places: int
    ids: int

    def mask(self, logits: Float[Tensor, "T V"], places: Int[Tensor, "T"]) -> Float[Tensor, "T V"]:
        """Give ids of the other modality the logit `NEVER`, in place.

        Args:
            logits: of all ids.
            places: position of every row.
        """
        ids = torch.arange(logits.shape[1], device=logits.device)
        return logits.masked_fill_((places < self.places)[:, None] != (ids < self.ids), NEVER)

    def rows(self, losses: RowLosses, places: Int[Tensor, "T"]) -> RowLosses:
        """Make losses that see the ids of a row's own modality alone.

        Args:
            losses: of logits.
            places: position of every row.
        """
        return lambda logits, part, dtype: losses(self.mask(logits, places[part]), part, dtype)


def chunk_rows(entries: Mapping[str, int], width: int, device: torch.device) -> int:
    """Choose the number of rows to compute together on a device.

    Args:
        entries: largest number of entries that are computed together, by device type; others count as "cpu".
        width: entries of a row.
        device: where they are computed.

    Returns:
        At least 1.
    """
    return max(1, entries.get(device.type, entries["cpu"]) // width)


@dataclass(frozen=True)
class DistillTargets:
    """The teacher's predictions at a batch's targets.

    Attributes:
        hidden: [Q, H] the teacher's vectors, in the order of `Batch.target_index`.
        head: maps a chunk of them to float32 logits.
        divergence: the loss at every position.
        places: [Q] positions of the targets, which a head with `modalities` needs; None for others.
    """

    hidden: Float[Tensor, "Q H_teacher"]
    head: Callable[..., Tensor]
    divergence: Divergence
    places: Int[Tensor, "Q"] | None = None


def divergence(
    student: Float[Tensor, "T V"], teacher: Float[Tensor, "T V"], kind: Divergence
) -> Float[Tensor, "T"]:
    """Compute the divergence between two distributions in every row.

    Args:
        student: logits.
        teacher: logits; gradients reach both arguments.
        kind: "reverse_kl" is KL(student || teacher) and "forward_kl" is KL(teacher || student), in nats;
            "total_variation" is half the sum of absolute differences; "mse" is the mean over V of squared
            differences of log-probabilities.

    Returns:
        [T].

    Source:
        arXiv 2410.21035, section 4.
    """
    student_log, teacher_log = student.log_softmax(-1), teacher.log_softmax(-1)
    if kind == "reverse_kl":
        return (student_log.exp() * (student_log - teacher_log)).sum(-1)
    if kind == "forward_kl":
        return (teacher_log.exp() * (teacher_log - student_log)).sum(-1)
    if kind == "total_variation":
        return (student_log.exp() - teacher_log.exp()).abs().sum(-1) / 2
    return (student_log - teacher_log).square().mean(-1)


def cross_entropy_rows(targets: Int[Tensor, "T"]) -> RowLosses:
    """Make the function that computes the cross-entropy with target ids, in nats.

    Args:
        targets: ids of all rows.

    Returns:
        What `chunked_loss` applies to the logits of a chunk.
    """

    def losses(logits: Tensor, rows: slice, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        log_prob, index = logits.log_softmax(-1), targets[rows, None]
        chosen = log_prob.gather(1, index)
        if dtype is None:
            return -chosen.squeeze(1), None
        # The probabilities, written in the precision of the products that follow; at the targets, minus 1.
        same = log_prob.dtype == dtype
        grad = torch.exp(log_prob, out=log_prob if same else torch.empty_like(log_prob, dtype=dtype))
        at_target = torch.expm1(chosen, out=torch.empty_like(chosen, dtype=dtype))
        return -chosen.squeeze(1), grad.scatter_(1, index, at_target)

    return losses


def divergence_rows(targets: DistillTargets) -> RowLosses:
    """Make the function that computes `divergence` from a teacher.

    Args:
        targets: the teacher's vectors of all rows, its head and the kind of divergence.

    Returns:
        What `chunked_loss` applies to the logits of a chunk.
    """

    def losses(logits: Tensor, rows: slice, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            places = {} if targets.places is None else {"places": targets.places[rows]}
            teacher_logits = targets.head(targets.hidden[rows], **places)
        added = logits.shape[1] - teacher_logits.shape[1]
        logits = logits[:, : teacher_logits.shape[1]]
        if dtype is None:
            return divergence(logits, teacher_logits, targets.divergence), None
        with torch.enable_grad():
            values = divergence(logits.requires_grad_(), teacher_logits, targets.divergence)
            (grad,) = torch.autograd.grad(values.sum(), logits)
        return values.detach(), F.pad(grad.to(dtype), (0, added))

    return losses


def chunked_loss(
    hidden: Float[Tensor, "T H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, "V"],
    row_weights: Float[Tensor, "T"],
    row_losses: RowLosses,
    chunk: int,
) -> Float[Tensor, "T"]:
    """Compute weighted losses of a linear head's logits, a chunk of rows at a time.

    The gradients are computed in the forward pass, while a chunk's logits are there: three products in all, and
    memory that grows with the chunk and not with the rows. This is why the weights of the rows are an argument. The
    gradient of the result must be the same number for every row, as that of a sum is. Any other makes all gradients
    NaN.

    Logits are float32 sums (or float64) whatever the precision of the inputs. On a GPU, bf16 inputs are multiplied as
    they are; on a CPU they are converted first.

    Args:
        hidden: vectors of the rows.
        weight: of the head.
        bias: of the head.
        row_weights: factor of every row's loss; it has no gradient.
        row_losses: the loss.
        chunk: rows whose logits are held together.

    Returns:
        [T] float32, or float64 for float64 inputs.
    """
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, weight, bias))
    result: Tensor = _ChunkedLoss.apply(hidden, weight, bias, row_weights, row_losses, chunk, learns)
    return result


def operands(*tensors: Tensor) -> list[Tensor]:
    """Convert tensors to what `product` multiplies: on a GPU as they are, elsewhere float32 (or float64).

    Args:
        *tensors: of any floating-point type.

    Returns:
        The tensors, converted.
    """
    return [x if x.is_cuda else upcast(x) for x in tensors]


def product(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """Multiply matrices with a float32 result (or float64); no gradient passes through it.

    Args:
        a: left operand, from `operands`.
        b: right operand of the same dtype.

    Returns:
        [m, n].
    """
    return torch.mm(a, b, out_dtype=torch.float32) if _is_half(a) else torch.mm(a, b)


def _is_half(x: Tensor) -> bool:
    """Whether products of such tensors have a result of another precision."""
    return x.dtype not in (torch.float32, torch.float64)


class _Products:
    """The products of a head, whose inputs and sums have one precision.

    Args:
        x: [T, H] vectors of all rows.
        weight: [V, H].
        bias: [V].
        row_weights: [T] factors of the rows in gradients.
        learns: allocate the gradients.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, row_weights: Tensor, learns: bool):
        self.x, self.weight, self.bias, self.row_weights = x, weight, bias, row_weights.to(x.dtype)
        if learns:
            self.hidden_grad = torch.empty_like(x)
            self.weight_grad, self.bias_grad = torch.zeros_like(weight), torch.zeros_like(bias)

    def logits(self, part: slice) -> Tensor:
        """Compute the logits of rows."""
        return torch.addmm(self.bias, self.x[part], self.weight.T)

    def add_gradients(self, part: slice, grad: Tensor) -> None:
        """Add what rows with this gradient of the logits contribute; `hidden_grad` is without row weights."""
        torch.mm(grad, self.weight, out=self.hidden_grad[part])
        self.weight_grad.addmm_(grad.T, self.x[part] * self.row_weights[part, None])
        self.bias_grad.addmv_(grad.T, self.row_weights[part])


class _HalfProducts(_Products):
    """The same for bf16 inputs on a GPU, with float32 logits and sums.

    The bias is one more column of the weight, beside a 1 in every row, so that the products add it to the logits and
    sum its gradient, without passes of their own. Columns and entries of the vocabulary are filled up to multiples of
    `ALIGNED`; the logits of added entries are -inf.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, row_weights: Tensor, learns: bool):
        vocabulary, size = weight.shape
        self.rows = torch.cat([x, F.pad(x.new_ones(len(x), 1), (0, ALIGNED - 1))], 1)
        self.columns = F.pad(weight, (0, ALIGNED, 0, -vocabulary % ALIGNED))
        self.columns[:, size] = F.pad(bias, (0, -vocabulary % ALIGNED), value=-torch.inf)
        self.weight = self.columns[:, :size]
        if learns:
            self.hidden_grad = torch.empty_like(x)
            self.weighted = (self.rows * row_weights[:, None]).to(x.dtype)
            self.sums = torch.zeros_like(self.columns, dtype=torch.float32)
            self.weight_grad, self.bias_grad = self.sums[:vocabulary, :size], self.sums[:vocabulary, size]

    def logits(self, part: slice) -> Tensor:
        """Compute the logits of rows."""
        return product(self.rows[part], self.columns.T)

    def add_gradients(self, part: slice, grad: Tensor) -> None:
        """Add what rows with this gradient of the logits contribute; `hidden_grad` is without row weights."""
        torch.mm(grad, self.weight, out=self.hidden_grad[part])
        self.sums += product(grad.T, self.weighted[part])


class _ChunkedLoss(torch.autograd.Function):
    """`chunked_loss` with its gradients computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        row_weights: Tensor,
        row_losses: RowLosses,
        chunk: int,
        learns: bool,
    ) -> Tensor:
        """Compute the losses and, if it `learns`, the gradients of their sum."""
        x, table, shift = operands(hidden, weight, bias)
        head = (_HalfProducts if _is_half(x) else _Products)(x, table, shift, row_weights, learns)
        losses = torch.empty_like(row_weights, dtype=torch.promote_types(x.dtype, torch.float32))
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            values, grad = row_losses(head.logits(part), part, x.dtype if learns else None)
            losses[part] = values
            if grad is not None:
                head.add_gradients(part, grad)
            del grad  # before the next chunk's logits
        if learns:
            ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype
            ctx.save_for_backward(row_weights, head.hidden_grad, head.weight_grad, head.bias_grad)
        return losses.mul_(row_weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients, in place where they keep their precision."""
        row_weights, *grads = ctx.saved_tensors
        scale = upstream.new_ones(())
        if len(upstream):
            scale = torch.where((upstream == upstream[0]).all(), upstream[0], torch.nan)
        factors = (row_weights * scale)[:, None], scale, scale
        scaled = []
        for grad, factor, dtype in zip(grads, factors, ctx.dtypes, strict=True):
            out = grad if grad.dtype == dtype else torch.empty(grad.shape, dtype=dtype, device=grad.device)
            scaled.append(torch.mul(grad, factor, out=out))
        return *scaled, None, None, None, None


class Head(nn.Module):
    """Projection to the vocabulary; the only module that makes tensors with V entries a row.

    Args:
        size: H.
        vocab_size: V.

    Attributes:
        modalities: of rows of captions and images, in which a position has the ids of its own modality only; None:
            every position has all ids.
    """

    def __init__(self, size: int, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.modalities: Modalities | None = None
        self.weight = nn.Parameter(torch.zeros(vocab_size, size))
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(
        self,
        hidden: Float[Tensor, "T H"],
        targets: Int[Tensor, "T"] | DistillTargets | None = None,
        row_weights: Float[Tensor, "T"] | None = None,
        places: Int[Tensor, "T"] | None = None,
    ) -> Float[Tensor, "T V"] | Float[Tensor, "T"]:
        """Compute logits, or the loss of every row without ever holding all logits.

        Args:
            hidden: vectors from the final norm.
            targets: ids below V, and the loss is the cross-entropy with them, in nats; or a teacher's vectors for the
                same rows, and the loss is the divergence from the teacher; None: logits.
            row_weights: factor of every row's loss, see `chunked_loss`; None: 1.
            places: positions of the rows, which a head with `modalities` needs.

        Returns:
            Logits [T, V] without targets, else losses [T]; float32, since cross-entropies from bf16 logits are wrong
            by up to 0.25 nats.
        """
        if targets is None:
            if torch.is_grad_enabled():
                logits = F.linear(upcast(hidden), upcast(self.weight), upcast(self.bias))
            else:
                x, weight, bias = operands(hidden, self.weight, self.bias)
                if _is_half(x):
                    weight = F.pad(weight, (0, 0, 0, -len(weight) % ALIGNED))
                logits = product(x, weight.T)[:, : self.vocab_size].add_(bias)
            if self.modalities is None:
                return logits
            assert places is not None, "positions tell which ids are predicted"
            return self.modalities.mask(logits, places)
        if row_weights is None:
            row_weights = torch.ones(len(hidden), device=hidden.device)
        row_losses = (
            divergence_rows(targets) if isinstance(targets, DistillTargets) else cross_entropy_rows(targets)
        )
        if self.modalities is not None:
            assert places is not None, "positions tell which ids are predicted"
            row_losses = self.modalities.rows(row_losses, places)
        chunk = chunk_rows(CHUNK_LOGITS, self.vocab_size, hidden.device)
        return chunked_loss(hidden, self.weight, self.bias, row_weights, row_losses, chunk)
