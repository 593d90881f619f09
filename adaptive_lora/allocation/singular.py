"""The singular components of an adapter: B A = Σ_k σ_k u_k v_kᵀ, without ever forming the O x I
matrix.

Symbols: A (R, I), B (O, R). QR of Aᵀ = Q_A R_A and B = Q_B R_B, SVD of the R x R matrix R_B R_Aᵀ =
U Σ Vᵀ.
"""

from __future__ import annotations

import torch


def _svd(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (R_A, σ, Vᵀ), in float32 at least."""
    # LAPACK knows no 16-bit types.
    wide = torch.promote_types(a.dtype, torch.float32)
    r_a = torch.linalg.qr(a.to(wide).T, mode="r").R
    r_b = torch.linalg.qr(b.to(wide), mode="r").R
    _, values, v_t = torch.linalg.svd(r_b @ r_a.T)
    return r_a, values, v_t


def singular_values(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return σ of B A, falling, shape (R,); NaN in every place when a weight is not finite.

    >>> b = torch.tensor([[0.0, 3.0], [1.0, 0.0], [0.0, 0.0]])
    >>> singular_values(torch.eye(2, 5), b).tolist()
    [3.0, 1.0]
    """
    if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
        return a.new_full((a.shape[0],), float("nan"))  # LAPACK would raise
    return _svd(a, b)[1]


def rotation(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (P, N), both (R, R), which turn an adapter to its singular components, the largest
    first, balanced.

        A' = Nᵀ A,  B' = B Pᵀ,  B' A' = B A;   P = α⁻¹ Vᵀ R_A,  N = R_A⁻¹ V α,  P N = 1

    Row k of A' is α_k v_kᵀ and column k of B' is (σ_k / α_k) u_k, with α_k = √σ_k, so that both
    have the same length. A component without an update (σ_k = 0) keeps the root mean square length
    of the rows of A: with both sides zero it would never get a gradient.

    What transforms against the weights: g_A' = P g_A and g_B' = g_B N, for g = ∂L/∂(B A) stays what
    it is.

    >>> a, b = torch.randn(3, 7), torch.randn(5, 3)
    >>> p, n = rotation(a, b)
    >>> torch.allclose(b @ p.T @ (n.T @ a), b @ a, atol=1e-5)
    True
    """
    r_a, values, v_t = _svd(a, b)
    plain = r_a.square().sum().div(len(values)).sqrt()
    # As NumPy's `matrix_rank` has it: below this a σ is rounding.
    dead = values <= values.max() * len(values) * torch.finfo(values.dtype).eps
    alpha = torch.where(dead, plain, values.sqrt())
    # pinv: rows of A that depend on each other leave R_A without an inverse.
    return v_t @ r_a / alpha[:, None], torch.linalg.pinv(r_a) @ v_t.T * alpha


def balanced(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (A', B', σ) with B' A' = B A: row k of A' is √σ_k v_kᵀ, column k of B' √σ_k u_k, σ
    falling; in float64.

        B' = Q_B U √Σ,  A' = √Σ Vᵀ Q_Aᵀ

    The first k rows and columns are the best approximation of B A of rank k (Eckart & Young 1936).
    Both weights must be finite. Unlike `rotation` it needs no inverse, so it is exact for any A.

    >>> a, b = torch.randn(3, 7, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    >>> new_a, new_b, _ = balanced(a, b)
    >>> torch.allclose(new_b @ new_a, b @ a)
    True
    """
    # float64 costs next to nothing here: only factors and R x R matrices are worked on.
    q_a, r_a = torch.linalg.qr(a.to(torch.float64).T)
    q_b, r_b = torch.linalg.qr(b.to(torch.float64))
    u, values, v_t = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = values.sqrt()
    return root[:, None] * (v_t @ q_a.T), (q_b @ u) * root, values
