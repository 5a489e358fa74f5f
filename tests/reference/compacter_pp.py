"""Compacter++: Compacter's forward at fewer sites."""

from reference.compacter import bias as bias
from reference.compacter import output as output
from reference.compacter import weight as weight
