"""GLoRA: W' = W + W * A + B, b' = b + b D + E + W c; A, B and c low-rank, D and E one number each."""


def weight(W, p, f):
    p.W = W
    return W + W * (p.terms_A_Xd @ p.terms_A_Xu) + p.terms_B_Xd @ p.terms_B_Xu


def bias(b, p, f):
    c = p.terms_C_Xd @ p.terms_C_Xu
    return b + b * p.terms_D_X + p.terms_E_X + (p.W @ c)[:, 0]
