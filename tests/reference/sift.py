"""SIFT: W' = W + values at chosen entries (site, row, column); k = share of the entries of every site."""

from reference.fishmask import weight as weight
