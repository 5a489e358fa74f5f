"""NoLA: W' = W + (alpha / r) B A, A = A_0 + sum_i a_i A_i / sqrt(k), B = sum_i b_i B_i / sqrt(k)."""

from math import sqrt


def weight(W, p, f):
    A = p.basis_A_0[:, : p.n] / sqrt(p.n)
    B = 0
    for i in range(f.k):
        A = A + p.a[i] / sqrt(f.k) * p.basis_A[i, :, : p.n]
        B = B + p.b[i] / sqrt(f.k) * p.basis_B[i, :, : p.m]
    return W + f.alpha / f.r * B.T @ A
