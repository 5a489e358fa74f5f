"""Propulsion: y = (W x + b) * z^k; an embedding's rows likewise."""


def output(x, y, p, f):
    return y * p.scale**f.degree
