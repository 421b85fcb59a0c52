"""Attention transfer (TinyBERT): match the attention scores before the softmax, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hfcompress.distillation.losses.base import all_heads, attention_problems, in_float32
from hfcompress.models.shape import Shape
from hfcompress.training.loss import Loss, Step, Units

if TYPE_CHECKING:
    from torch import Tensor, nn


class AttentionScores(Loss):
    """`L = Σ_m (1/h) Σ_i MSE(A^S_m,i, A^T_g(m),i)` with `A = Q Kᵀ / √d`, over pairs of real tokens of the batch.

    For long inputs no attention map is made: `‖A^S - A^T‖²` is computed from d x d products of queries and of keys.
    This is a difference of large numbers. If the scores differ by a thousandth of their size, the value is accurate to
    a few percent; if they differ by less, it may be below zero. Even then the gradient is accurate to 0.02 %.
    """

    source: ClassVar[str] = "TinyBERT, Jiao et al. 2020, arXiv:1909.10351, eq. 7"
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "keys"})

    tinybert_compat: bool = False
    """Compute the loss as TinyBERT's code of 2019: the mean is over all pairs of tokens, with padded queries; the
    scores of padded keys, and scores of -100 or less, count as 0. This makes attention maps."""

    def problems(self, student: Shape, teacher: Shape) -> list[str]:
        return attention_problems(self.name, student, teacher, all_heads(student, teacher))

    def units(self, batch: Units) -> Tensor:
        return batch.places * batch.mask.shape[1] if self.tinybert_compat else batch.token_pairs

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        distance = _compute_tinybert if self.tinybert_compat else _mean_square
        total = step.student.logits.new_zeros(())
        for m, g in step.pairs:
            student = step.student.queries[m], step.student.keys[m]
            teacher = step.require_teacher().queries[g], step.require_teacher().keys[g]
            with in_float32(student[0]):
                total = total + distance(*student, *teacher, step.mask)
        return total


def _mean_square(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, mask: Tensor) -> Tensor:
    """Computes the mean of `(A^S - A^T)²` over heads and pairs of real tokens, from `(batch, heads, length, d)`."""
    heads, length, width = q_s.shape[1:]
    # Beyond this length the Gram matrices are smaller and faster.
    squares = _by_maps if length <= 2 * max(width, q_t.shape[-1]) else _by_gram
    return squares(q_s, k_s, q_t, k_t, mask) / heads / mask.sum(1).float().pow(2).sum().clamp(min=1)


def _zero_padding(tensor: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
    """Sets padding to zero, in float32, `(batch * heads, length, d)`: the scores of padded tokens are then 0."""
    return (tensor.float() * (mask[:, None, :, None] * scale)).contiguous().flatten(0, 1)


def _by_maps(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, mask: Tensor) -> Tensor:
    q_s, q_t = (_zero_padding(queries, mask, queries.shape[-1] ** -0.5) for queries in (q_s, q_t))
    k_s, k_t = _zero_padding(k_s, mask), _zero_padding(k_t, mask)
    return (q_s @ k_s.mT - q_t @ k_t.mT).pow(2).sum()


def _by_gram(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, mask: Tensor) -> Tensor:
    """Computes the value and its gradient together, and keeps only the gradient for the backward pass.

    Autograd would keep every factor, and compute symmetric products twice.
    """
    value, to_queries, to_keys = _value_and_slopes(q_s.detach(), k_s.detach(), q_t.detach(), k_t.detach(), mask)
    linear = (to_queries.view(q_s.shape) * q_s).sum() + (to_keys.view(k_s.shape) * k_s).sum()
    return value + (linear - linear.detach())


def _value_and_slopes(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `‖Q_S K_Sᵀ - Q_T K_Tᵀ‖² = ⟨Q_SᵀQ_S, K_SᵀK_S⟩ - 2⟨Q_TᵀQ_S, K_TᵀK_S⟩ + ⟨Q_TᵀQ_T, K_TᵀK_T⟩`.

    The queries are scaled by `1/√d`. The gradient is `2 (Q_S K_SᵀK_S - Q_T K_TᵀK_S)` for `Q_S`, and alike for `K_S`.
    """
    scale = q_s.shape[-1] ** -0.5
    q_s, k_s = _zero_padding(q_s, mask, scale), _zero_padding(k_s, mask)
    q_t, k_t = _zero_padding(q_t, mask, q_t.shape[-1] ** -0.5), _zero_padding(k_t, mask)
    own_q, own_k = q_s.mT @ q_s, k_s.mT @ k_s
    crossed_q, crossed_k = q_t.mT @ q_s, k_t.mT @ k_s
    taught = (q_t.mT @ q_t) * (k_t.mT @ k_t)
    value = (own_q * own_k).sum() - 2 * (crossed_q * crossed_k).sum() + taught.sum()
    to_queries = (q_s @ own_k).baddbmm_(q_t, crossed_k, beta=2 * scale, alpha=-2 * scale)
    to_keys = (k_s @ own_q).baddbmm_(k_t, crossed_q, beta=2, alpha=-2)
    return value, to_queries, to_keys


def _compute_tinybert(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, mask: Tensor) -> Tensor:
    def kept(queries: Tensor, keys: Tensor) -> Tensor:
        scores = _scores(queries.float(), keys.float())
        return scores.masked_fill((scores <= -100) | ~mask[:, None, None], 0)

    return (kept(q_s, k_s) - kept(q_t, k_t)).pow(2).mean()


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    return queries @ keys.mT / queries.shape[-1] ** 0.5
