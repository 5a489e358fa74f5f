"""Fish-DIP: W' = W + values at the entries chosen now + past values at those chosen before."""


def weight(W, p, f):
    mine = p.entries_where[0] == p.index
    W = W.index_put(tuple(p.entries_where[1:, mine].long()), p.entries_values[mine], accumulate=True)
    return W.reshape(-1).index_add(0, p.past_at, p.past).view(W.shape)
