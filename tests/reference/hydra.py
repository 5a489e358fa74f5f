"""Hydra: y' = y + s B_1 A_1 x + s B_2 A_2 y, y the projection's output with its bias."""


def output(x, y, p, f):
    return y + f.scale * (x @ p.A.T @ p.B + y @ p.C.T @ p.D)
